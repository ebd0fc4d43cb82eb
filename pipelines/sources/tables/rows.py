"""Tables (CSV, TSV, JSON lines, Parquet): streaming their rows, and a compact list of the items that they name."""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import itertools
import json
import operator
import os
import re
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from shlex import quote
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from ...storage.base import is_remote
from ..access.files import Files
from ..access.stores import as_source_errors, as_system_errors, ask_store, fetch, is_web, store_of, without_query
from ..base import Group, as_bytes, as_text, is_image
from ..labels import Labels, LabelSpec, is_missing, read_labels, shared
from ..rejects import BadItem
from . import arrow
from .columns import PATH_COLUMNS, require, usual
from .paths import ForeignPath

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # the first one that occurs in the header is used
_MAX_LINE_BYTES = 4 << 20  # text tables are held one line at a time
_MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
# A data: URL, or the beginning of a JPEG, PNG, GIF, WebP or TIFF in Base64.
_CONTENT = re.compile(r"data:[^,]{0,100},|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AK)[A-Za-z0-9+/\s]{60}")
_CONTENT_ADVICE = "images themselves are read from files or from Parquet: write them there"
_GROUP_ITEMS = 10_000


def _downloaded(url: str) -> Any:
    """A temporary copy of a file on a web server, since not all servers support ranges."""
    with as_source_errors(url):
        try:
            content = ask_store(lambda: fetch(store_of(url), url))
        except BadItem as exc:
            raise SourceError(f"{url!r}: {exc.detail}; download it, and give the file") from exc
    suffix = os.path.splitext(without_query(url))[1]
    file = tempfile.NamedTemporaryFile(prefix="gpu-npz-table-", suffix=suffix)  # noqa: SIM115  # kept by the Table
    file.write(content)
    file.flush()
    return file


class Table:
    """One table, a file or a URL.

    CSV (RFC 4180) begins with a line of column names; if that line has no comma, semicolons or tabs separate values.
    TSV is the same with tabs. JSON lines (https://jsonlines.org) contain one object per line; the union of their keys
    is the columns. Text is UTF-8; other bytes become surrogates (PEP 383).

    Attributes:
        location: its absolute path or URL.
        columns: their names.

    Raises:
        SourceError: it cannot be read, or is not a table.
    """

    def __init__(self, location: str) -> None:
        if not is_remote(location) and os.path.isdir(location):
            raise SourceError(f"{location!r} is a folder; give a table, a file with one of {' '.join(EXTENSIONS)}")
        self._copy = _downloaded(location) if is_web(location) else None
        if self._copy:
            weakref.finalize(self, self._copy.close)
        self._files = Files(self._copy.name if self._copy else location)
        self.location = location if self._copy else self._files.path(0)
        self._extension = os.path.splitext(without_query(self.location))[1].lower()
        if len(self._files) > 1 or self._extension not in EXTENSIONS:
            raise SourceError(f"{location!r} is no table; give one file with one of {' '.join(EXTENSIONS)}")
        self._delimiter = ","
        self.columns = self._header()
        if not self.columns:
            raise SourceError(f"{self.location!r} is empty; a table starts with the names of its columns")
        if self._extension in _DELIMITERS and not usual(PATH_COLUMNS, self.columns):
            self._require_names()

    def rows(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of some columns, one tuple per row; None for a missing value.

        Raises:
            SourceError: the table lacks a column, or a line is damaged.
        """
        for name in names:
            require(name, self.columns, self.location)
        if self._extension == ".parquet":
            yield from arrow.rows(arrow.open_parquet(self._files, 0), self.location, names)
            return
        with self._opened() as file:
            if self._extension in _DELIMITERS:
                records = self._records(file)
                next(records)
                pick = operator.itemgetter(
                    *map(self.columns.index, names), 0
                )  # one more index, so that itemgetter always returns a tuple
                for row in records:
                    yield pick(row)[:-1]
            else:
                for line in self._objects(file):
                    yield tuple(map(line.get, names))

    def _header(self) -> tuple[str, ...]:
        if self._extension == ".parquet":
            return tuple(arrow.open_parquet(self._files, 0).schema_arrow.names)
        with self._opened() as file:
            if self._extension in _DELIMITERS:
                return tuple(name.strip() for name in next(self._records(file), ()))
            return tuple(dict.fromkeys(key for each in self._objects(file) for key in each))

    def _require_names(self) -> None:
        """Raises SourceError, with a command to add column names, if the first line already contains an image path."""
        images = [is_image(as_bytes(name)) for name in self.columns]
        if not any(images):
            return
        at, other = images.index(True), "label" if len(images) == 2 else "column{}"
        names = ["path" if number == at else other.format(number + 1) for number in range(len(images))]
        first = self._delimiter.join(names).replace("\t", "\\t")
        stem, extension = os.path.splitext(self.location)
        command = f"{{ printf '{first}\\n'; cat {quote(self.location)}; }} > {quote(f'{stem}-named{extension}')}"
        way = "" if is_remote(self.location) else f", for example with: {command}"
        raise SourceError(
            f"{self.location!r} has no line of column names: its first line is a row already "
            f"({', '.join(map(repr, self.columns[:5]))}); add a line such as {first!r} before it{way}"
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        # Buffered again, because fsspec files do not support readline with a limit.
        with self._files.opened(0) as raw, io.BufferedReader(raw) as file:  # type: ignore[type-var]  # IOBase is enough
            yield file

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        number = 0
        while line := self._line(file):
            number += 1
            if b"\0" in line:
                raise self._damaged(number, "has a NUL byte", "save the table as UTF-8 text")
            if len(line) > _MAX_LINE_BYTES:
                raise self._damaged(number, f"is longer than {_MAX_LINE_BYTES} bytes", "leave long columns out")
            yield as_text(
                line.removeprefix(codecs.BOM_UTF8)
            )  # a prepended line of names moves the BOM to the second line

    def _line(self, file: BinaryIO) -> bytes:
        try:
            with as_system_errors():
                return file.readline(_MAX_LINE_BYTES + 1)
        except OSError as exc:
            raise SourceError(f"{self.location!r}: {exc.strerror or exc}; make it readable") from exc

    def _records(self, file: BinaryIO) -> Iterator[list[str]]:
        """The rows of a CSV, beginning with the column names. All have the same length."""
        lines = self._lines(file)
        head = [""]
        while not head[-1].strip() and (line := next(lines, "")):
            head.append(line)
        allowed = _DELIMITERS[self._extension]
        delimiter = self._delimiter = next((each for each in allowed if each in head[-1]), allowed[0])
        width = held = 0

        def of_records() -> Iterator[str]:
            nonlocal held
            for line in itertools.chain(head[1:], lines):
                held += len(line)  # a quoted value may span lines
                if held > _MAX_LINE_BYTES:
                    raise self._damaged(
                        reader.line_num + 1, f"ends no record within {_MAX_LINE_BYTES} bytes", "it may lack a quote"
                    )
                yield line

        reader = csv.reader(of_records(), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                held = 0
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise self._damaged(reader.line_num, f"has {len(row)} values, the first {width}", "fix it")
                yield row
        except csv.Error as exc:
            long = "field larger" in str(exc)
            advice = f"leave long columns out; {_CONTENT_ADVICE}" if long else "fix it, or write the table again"
            raise self._damaged(reader.line_num, f"is not valid CSV ({exc})", advice) from exc

    def _objects(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._lines(file), 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise self._damaged(number, f"is no JSON ({exc})", "it may be cut: write the table again") from exc
            if not isinstance(found, dict):
                raise self._damaged(number, "is no JSON object", 'write lines such as {"path": "a.jpg", "label": 1}')
            yield found

    def _damaged(self, line: int, what: str, advice: str) -> SourceError:
        return SourceError(f"{self.location!r}: line {line} {what}; {advice}")


class TableListing:
    """The items that tables name. Takes some 30 bytes per item, plus its path, its labels, and distinct texts.

    Args:
        location: the source, for messages.
        asked: the label columns.
        key: the column of `Group.keys`, if any.

    Attributes:
        labels: of all items, set by `finish`; None if there are no label columns.
        digest: SHA-256 of paths, labels and keys, set by `finish`.
    """

    def __init__(self, location: str, asked: LabelSpec, key: str | None = None) -> None:
        self.labels: Labels | None = None
        self.digest: str | None = None
        self._location = location
        self._asked = asked
        self._key = key
        self._tables: list[tuple[int, str]] = []
        self._names = bytearray()
        self._ends = array("q", [0])
        self._hashes = array("q")
        self._values: list[list[Any]] = [[] for _ in asked]
        self._keys: list[bytes] = []
        self._shared = shared()

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, table: Table, path_column: str, path_of: Callable[[str], bytes]) -> None:
        """Adds all rows of a table.

        Args:
            table: the table.
            path_column: the column of paths.
            path_of: converts a value of that column to an item's path. Raises ValueError with the reason if it is
                invalid; ForeignPath if advice can be given from all paths.

        Raises:
            SourceError: a row has no path or an invalid one, or a value is neither text nor a number.
        """
        self._tables.append((len(self), table.location))
        extra = [] if self._key is None else [self._key]
        for text, *values in table.rows([path_column, *(name for name, _ in self._asked), *extra]):
            try:
                if not isinstance(text, str) or is_missing(text):
                    raise ValueError("has no path" if is_missing(text) else f"has {repr(text)[:200]}, which is no path")
                if _CONTENT.match(text):
                    raise ValueError(f"has an image in place of a path ({text[:30]!r}...); {_CONTENT_ADVICE}")
                name = path_of(text)
                if len(name) > _MAX_PATH_BYTES:
                    raise ValueError(f"has a path of {len(name)} bytes; at most {_MAX_PATH_BYTES} are allowed")
                if self._key is not None:
                    self._keys.append(self._key_of(values.pop()))
                for column, value in zip(self._values, values, strict=True):
                    column.append(self._value_of(value))
            except ValueError as exc:
                advice = ""
                if isinstance(exc, ForeignPath):
                    advice = "; " + exc.root.advice(table.location, (each for (each,) in table.rows([path_column])))
                raise SourceError(f"{table.location!r}: row {self._row(len(self))} {exc}{advice}") from exc
            self._names += name
            self._ends.append(len(self._names))
            self._hashes.append(hash(name))

    def finish(self, classes: Sequence[str] | None) -> TableListing:
        """Converts the labels after all tables were added, and returns the listing itself.

        Raises:
            SourceError: a path occurs twice, or as `read_labels`.
            UsageError: as `read_labels`.
        """
        ordered, order = self._by_hash()
        same = np.flatnonzero(ordered[1:] == ordered[:-1])
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            if self._name(first) == self._name(second):
                raise SourceError(
                    f"{self._location!r}: {self._where(first)} and {self._where(second)} both have the path "
                    f"{os.fsdecode(self._name(first))!r}; keep one"
                )
        if self._asked:
            self.labels = read_labels(
                self._asked, self._values, location=self._location, where=self._where, classes=classes
            )
        self._values, self._shared = [], shared()
        digest = hashlib.sha256(self._names)
        digest.update(self._ends)
        if self.labels is not None:
            digest.update(repr(self.labels.class_names).encode())
            digest.update(self.labels.values.tobytes())
        for key in self._keys:
            digest.update(key)
        self.digest = digest.hexdigest()
        return self

    def groups(self) -> Iterator[Group]:
        """The items in the order of the rows."""
        for start in range(0, len(self), _GROUP_ITEMS):
            span = range(start, min(start + _GROUP_ITEMS, len(self)))
            yield Group(
                b"",
                [self._name(number) for number in span],
                labels=None if self.labels is None else self.labels.values[start : span.stop],
                keys=None if self._key is None else self._keys[start : span.stop],
            )

    def require_rows(self, names: Iterator[bytes]) -> None:
        """Raises SourceError if an image of SRC, given by its path, has no row."""
        ordered, order = self._by_hash()
        images, lacking, example = 0, 0, b""
        for name in names:
            images += 1
            at = int(np.searchsorted(ordered, hash(name)))
            if at == len(ordered) or self._name(int(order[at])) != name:
                lacking, example = lacking + 1, example or name
        if lacking:
            more = f" or in {len(self._tables) - 1} more tables" if len(self._tables) > 1 else ""
            rows = f"rows there begin with {os.fsdecode(self._name(0))!r}" if len(self) else "there are no rows"
            raise SourceError(
                f"{lacking} of {images} images have no row in {self._tables[0][1]!r}{more}, {os.fsdecode(example)!r} "
                f"for one, relative to SRC, and {rows}; add or fix rows, or move the images away"
            )

    def _by_hash(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _name(self, number: int) -> bytes:
        return bytes(self._names[self._ends[number] : self._ends[number + 1]])

    def _row(self, number: int) -> int:
        return number - next(start for start, _ in reversed(self._tables) if start <= number) + 1

    def _where(self, number: int) -> str:
        table = next(location for start, location in reversed(self._tables) if start <= number)
        return f"row {self._row(number)}" + (f" of {table!r}" if len(self._tables) > 1 else "")

    def _value_of(self, value: Any) -> Any:
        if value is None or isinstance(value, (int, float, str)):
            return self._shared(value)
        raise ValueError(f"has a {type(value).__name__} as label; allowed: texts and numbers")

    def _key_of(self, value: Any) -> bytes:
        if is_missing(value):
            raise ValueError(f"has no {self._key}, by which --split-by tells what belongs together; fill it in")
        return as_bytes(str(self._value_of(value)).strip())
