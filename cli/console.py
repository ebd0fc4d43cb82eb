"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Warnings(logging.Handler):
    """Says what is logged, each text once: both sides of a split have the same to say of SRC."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage(), keep="\n")
        if text not in self._said:
            self._said.add(text)
            style = "bold red" if record.levelno >= logging.WARNING else "dim"
            errors.print(f"[{style}]gpu-npz: {escape(text)}[/]")


def show_warnings() -> None:
    """Lets the library's warnings appear on stderr."""
    logger = logging.getLogger("gpu_npz")
    logger.handlers = [_Warnings()]
    logger.propagate = False


def print_json(value: dict[str, Any] | list[Any]) -> None:
    """Prints a result for machines, on stdout."""
    click.echo(json.dumps(value, indent=1))


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 shard`, `2 shards`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def printable(text: str, keep: str = "") -> str:
    """Text from files as a terminal may have it: control characters, and bytes that are no UTF-8, appear as escapes.

    The characters in `keep` stay as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1] for character in text
    )
