"""The command line's output: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Warnings(logging.Handler):
    """Prints log records, each text only once, because all sides of a split log the same warnings about SRC."""

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
    """Prints the library's warnings on stderr."""
    logger = logging.getLogger("gpu_npz")
    logger.handlers = [_Warnings()]
    logger.propagate = False


def print_json(value: dict[str, Any] | list[Any]) -> None:
    """Prints a result as JSON on stdout."""
    click.echo(json.dumps(value, indent=1))


def counted(number: int, noun: str) -> str:
    """Formats a number with its noun: `1 shard`, `2 shards`."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def class_sizes(counts: Mapping[str, int]) -> str:
    """The number of images of the smallest and the largest class, by the classes' names."""
    smallest, largest = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    if counts[smallest] == counts[largest]:
        return f"{counts[smallest]} images in each"
    sizes = (f"{counts[name]} ({printable(name)})" for name in (smallest, largest))
    return f"{' to '.join(sizes)} images in one"


def printable(text: str, keep: str = "") -> str:
    """Makes text from files safe for a terminal: control characters and bytes that are not UTF-8 become escapes.

    Args:
        text: the text.
        keep: the characters that are not escaped.
    """
    return "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1] for character in text
    )
