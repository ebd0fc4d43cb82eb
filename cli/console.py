"""The command line's output: results on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

_START = re.compile(r" *[a-z]+( [a-z]+)* {2,}| +")  # the indentation of a line, with its name


class _Warnings(logging.Handler):
    """Prints log records, each text only once, because all sides of a split log the same warnings about SRC."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage(), keep="\n")
        if text not in self._said:
            self._said.add(text)
            from rich.markup import escape

            style = "bold red" if record.levelno >= logging.WARNING else "dim"
            errors().print(f"[{style}]{escape(wrapped(f'gpu-npz: {text}', sys.stderr))}[/]")


@functools.cache
def errors() -> Console:
    """The console on stderr. Rich is slow to import, and many commands print nothing there."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_warnings() -> None:
    """Prints the library's warnings on stderr."""
    logger = logging.getLogger("gpu_npz")
    logger.handlers = [_Warnings()]
    logger.propagate = False


def print_json(value: dict[str, Any] | list[Any]) -> None:
    """Prints a result as JSON on stdout."""
    click.echo(json.dumps(value, indent=1))


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines on stdout, wrapped as by `wrapped`."""
    for line in lines:
        click.echo(wrapped(line, sys.stdout))


def wrapped(text: str, stream: TextIO) -> str:
    """Wraps the lines of a text on words if it is for a terminal. Longer words, such as paths, stay whole.

    The continuation of a line is indented like the line, or behind its name, as in `  hint        ...`.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.split("\n"):
        start = match[0] if (match := _START.match(line)) else ""
        body = textwrap.wrap(
            line[len(start) :], width, initial_indent=start, subsequent_indent=" " * len(start),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        lines += body or [line]
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Formats a number with its noun: `1 shard`, `2 shards`."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def class_sizes(counts: Mapping[str, int]) -> str:
    """The number of images of the smallest and the largest class, by the classes' names."""
    smallest, largest = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    if counts[smallest] == counts[largest]:
        return f"{counted(counts[smallest], 'image')} in each"
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
