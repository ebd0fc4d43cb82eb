"""Parquet files that contain the images themselves, as Hugging Face stores them.

The image column is a struct `{bytes: binary, path: string}` (https://huggingface.co/docs/datasets/about_dataset_features
"Image") or any of Arrow's binary types. The names of classes are those of `ClassLabel` in the schema's `huggingface`
metadata.

A row group can be read only from its beginning. In the order of the file, this costs nothing. With `--shuffle`, each
image can cost the reading of a row group, unless there are only a few. So write few rows per group (100, as `datasets`
does), or build in order and shuffle while training. Arrow inflates one page at a time, which may have up to 2 GB.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import BuildConfig
from ...errors import SourceError
from ..access.files import Files
from ..base import Group, Item, as_bytes
from ..labels import LabelledSource, Listing, is_missing, read_labels, shared
from ..rejects import MAX_ENCODED_BYTES, BadItem
from .arrow import explained, is_text, open_parquet, rows
from .columns import PATH_COLUMNS, key_column, label_columns, require, usual

log = logging.getLogger(__name__)

_USUAL_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")
_GROUP_ITEMS = 10_000
_WINDOW_BYTES = 16 << 20  # of a row group, kept up to the last row that was read
_OPEN_GROUPS = 8  # one for each shard that a worker has open
_OPEN_FILES = 8
_LARGE_GROUP_BYTES = _WINDOW_BYTES


@dataclass(frozen=True)
class _ParquetListing(Listing):
    """Also holds the number of rows in each row group of each file, and the key of each row."""

    counts: list[list[int]]
    keys: list[bytes]


class ParquetSource(LabelledSource[_ParquetListing]):
    """The images in Parquet files, in the order of files and rows. An item's path is such as `FILE.parquet/000123`.

    An item's place: the numbers of the file, of the row group, and of the row in it.

    Raises:
        SourceError: a file is not Parquet, is truncated, lacks a column, or has invalid labels.
    """

    kind = "parquet"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._files = Files(location, "*.parquet")
        self.location = self._files.location
        self.files = self._files.stamps
        self.reads_at_once = min(2, self._files.reads_at_once)  # one read runs ahead while images are decoded
        self._classes = classes
        first = open_parquet(self._files, 0)
        columns = first.schema_arrow.names
        self._image = image_column(first, config.image_column, self._files.path(0))
        self._asked = label_columns(config.labels, columns, self._files.path(0))
        self._key = key_column(config)
        if self._key is not None:
            require(self._key, columns, self._files.path(0))
        self._known = {name: names for name, names in _class_names(first).items() if name in dict(self._asked)}
        self._take_labels()
        sizes = (first.metadata.row_group(group).total_byte_size for group in range(first.num_row_groups))
        if config.shuffle is not None and max(sizes, default=0) > _LARGE_GROUP_BYTES:
            log.warning(
                "%r has row groups of more than %d MB, and --shuffle rereads one of them for almost every image; "
                "write it with 100 rows a group, or leave --shuffle out and shuffle while training",
                self.location,
                _LARGE_GROUP_BYTES >> 20,
            )
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._opened: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._windows: collections.OrderedDict[tuple[int, int], _Window] = collections.OrderedDict()
        self._damage: dict[tuple[int, int], tuple[int, str]] = {}  # the first damaged row, and the error

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lock": None, "_opened": None, "_windows": None, "_damage": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def groups(self) -> Iterator[Group]:
        """The items. Label columns are reread after the first call; images are not read.

        Raises:
            SourceError: as the constructor, or the labels have changed since.
        """
        listing = self._listed()
        labels = listing.labels
        start = 0
        for number, counts in enumerate(listing.counts):
            folder = as_bytes(self._files.names[number]) + b"/"
            row = 0
            for group, count in enumerate(counts):
                for first in range(0, count, _GROUP_ITEMS):
                    taken = min(_GROUP_ITEMS, count - first)
                    span = slice(start, start + taken)
                    places = np.empty((taken, 3), np.int64)
                    places[:] = (number, group, 0)
                    places[:, 2] = np.arange(first, first + taken)
                    yield Group(
                        folder,
                        [b"%06d" % each for each in range(row, row + taken)],
                        labels=None if labels is None else labels.values[span],
                        places=places,
                        keys=None if self._key is None else listing.keys[span],
                    )
                    start, row = start + taken, row + taken

    def _list(self) -> _ParquetListing:
        """Reads the numbers of rows, the labels and the keys of all files."""
        counts: list[list[int]] = []
        values: list[list[Any]] = [[] for _ in self._asked]
        keys: list[bytes] = []
        names = [name for name, _ in self._asked] + ([] if self._key is None else [self._key])
        starts, one = [0], shared()
        for number in range(len(self._files)):
            path = self._files.path(number)
            file = open_parquet(self._files, number)
            image_column(file, self._image, path)
            for name in names:
                require(name, file.schema_arrow.names, path)
            if any(_class_names(file).get(name, known) != known for name, known in self._known.items()):
                raise SourceError(f"{path!r} has other names of classes than {self._files.path(0)!r}; build them apart")
            for row, found in enumerate(rows(file, path, names) if names else ()):
                try:
                    entries = [*map(one, found)]
                except ValueError as exc:
                    raise SourceError(f"{path!r}: row {row} {exc}; name another column by --labels") from exc
                if self._key is not None:
                    if is_missing(key := entries.pop()):
                        raise SourceError(f"{path!r}: row {row} has no {self._key}, which --split-by needs; fill it in")
                    keys.append(as_bytes(str(key).strip()))
                for column, entry in zip(values, entries, strict=True):
                    column.append(entry)
            counts.append([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            starts.append(starts[-1] + file.metadata.num_rows)

        def where(row: int) -> str:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            return f"row {row - starts[number]} of {self._files.names[number]!r}"

        if not self._asked:
            return _ParquetListing(None, counts, keys)
        labels = read_labels(
            self._asked, values, location=self.location, where=where, classes=self._classes, known=self._known
        )
        return _ParquetListing(labels, counts, keys)

    def read(self, item: Item) -> bytes:
        """The bytes in the item's row.

        Raises:
            OSError: from the system.
            BadItem: the row has no bytes or more than any image should have, or its row group is damaged.
        """
        if min(item.place) < 0 or item.place[0] >= len(self._files):
            raise BadItem("read", "unreadable", f"there is no place {item.place}")
        with self._lock:
            try:
                data = self._row(*item.place)
            except SourceError as exc:
                if (error := _of_system(exc)) is not None:
                    raise error from None
                raise BadItem("read", "unreadable", str(exc)) from exc
        if data is None:
            raise BadItem("read", "missing", "the row has no bytes; only those are read, never the file of its path")
        if len(data) > MAX_ENCODED_BYTES:
            raise BadItem("read", "too-large", f"{len(data)} bytes; at most {MAX_ENCODED_BYTES}")
        return data

    def check(self) -> None:
        """Raises SourceError if a file is gone."""
        self._files.check()

    def _row(self, number: int, group: int, row: int) -> bytes | None:
        if (damage := self._damage.get((number, group))) is not None and row >= damage[0]:
            raise SourceError(damage[1])  # do not reread the row group for each later row
        window = self._windows.pop((number, group), None)
        if window is None or row < window.first:
            file = self._opened.pop(number, None)
            if file is None:
                file = open_parquet(self._files, number)
            self._opened[number] = file
            if len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)
            window = _Window(_batches(file, group, self._image))
        try:
            data = window.row(row)
        except SourceError as exc:
            if _of_system(exc) is None:
                self._damage[number, group] = (window.end, str(exc))
            raise
        self._windows[number, group] = window
        if len(self._windows) > _OPEN_GROUPS:
            self._windows.popitem(last=False)
        return data


class _Window:
    """A row group that is read forward, and the last rows that were read."""

    def __init__(self, batches: Iterator[list[bytes | None]]) -> None:
        self.first = 0
        self._batches = batches
        self._rows: collections.deque[bytes | None] = collections.deque()
        self._bytes = 0

    def row(self, row: int) -> bytes | None:
        """The image in a row, not before `first`. Raises SourceError if the row group is damaged up to there."""
        while row >= self.end:
            with explained("row group"):
                batch = next(self._batches, None)
            if batch is None:
                raise SourceError(f"the row group ends after {self.end} rows")
            self._rows += batch
            self._bytes += sum(len(data or b"") for data in batch)
            while self._bytes > _WINDOW_BYTES and len(self._rows) > len(batch):
                self._bytes -= len(self._rows.popleft() or b"")
                self.first += 1
        return self._rows[row - self.first]

    @property
    def end(self) -> int:
        """The row after the last one that was read."""
        return self.first + len(self._rows)


def _of_system(exc: SourceError) -> OSError | None:
    """The system error that caused a SourceError, if one did; it may be temporary."""
    cause = exc.__cause__
    return cause if isinstance(cause, OSError) and cause.errno is not None else None


def _batches(file: Any, group: int, column: str) -> Iterator[list[bytes | None]]:
    """The images of a row group, in batches."""
    leaf = column if _is_binary(file.schema_arrow.field(column).type) else f"{column}.bytes"
    # One row at a time: with a dictionary, a few bytes can encode a large image for every row.
    for batch in file.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False):
        yield [entry["bytes"] if isinstance(entry, dict) else entry for entry in batch.column(column).to_pylist()]


def image_column(file: Any, asked: str | None, path: str) -> str:
    """The image column: the one asked for, or else the only one of bytes, or else the one with a usual name.

    Raises:
        SourceError: there is none, or it contains anything else.
    """
    schema = file.schema_arrow
    able = _columns_of_bytes(schema)
    if asked is not None:
        require(asked, schema.names, path)
        if not _holds_bytes(schema.field(asked).type):
            raise _no_images(path, schema.field(asked))
        return asked
    found = able if len(able) == 1 else [name for name in _USUAL_NAMES if name in able]
    if not able and (other := next((each for each in schema if _looks_like_images(each)), None)) is not None:
        raise _no_images(path, other)
    if not found:
        raise SourceError(
            f"{path!r} has {len(able)} columns of bytes among {', '.join(map(repr, schema.names[:30]))}; "
            "--image-column NAME says which one has images; for paths of images say --source table"
        )
    return found[0]


def kind_of(location: str, column: str | None) -> str:
    """`table` for a Parquet file with paths instead of images, else `parquet`."""
    with contextlib.suppress(SourceError):
        files = Files(location, "*.parquet")
        if len(files) == 1 and not _has_images(open_parquet(files, 0).schema_arrow, column):
            return "table"
    return "parquet"


def _has_images(schema: Any, column: str | None) -> bool:
    """Whether a file contains images, or what may be meant as such, rather than paths."""
    fields = [each for each in schema if column in (None, each.name)]
    if any(_several(each.type) or (_holds_bytes(each.type) and not _is_fixed(each.type)) for each in fields):
        return True
    paths = column is None and any(is_text(schema.field(name).type) for name in usual(PATH_COLUMNS, schema.names))
    return not paths and any(_holds_bytes(each.type) or _looks_like_images(each) for each in fields)


def _no_images(path: str, field: Any) -> SourceError:
    way = "images are binary, or a struct with bytes; for paths of images say --source table"
    if _several(field.type):
        way = "a row is one image: write one row for each, for example with explode of pandas"
    return SourceError(f"{path!r}: column {field.name!r} is of the type {field.type}; {way}")


def _columns_of_bytes(schema: Any) -> list[str]:
    """The columns that may contain images. Those of fixed size, such as hashes, count only if there are no others."""
    found = [each for each in schema if _holds_bytes(each.type)]
    return [each.name for each in [each for each in found if not _is_fixed(each.type)] or found]


def _looks_like_images(field: Any) -> bool:
    """Whether a column may be meant as images: lists of images, or nested lists of pixels."""
    from pyarrow import types

    return _several(field.type) or (types.is_nested(field.type) and field.name in _USUAL_NAMES)


def _several(kind: Any) -> bool:
    """Whether a type is a list of images."""
    from pyarrow import types

    value = getattr(kind, "value_type", None)  # of all list types
    return value is not None and not types.is_dictionary(kind) and _holds_bytes(value)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    view = getattr(types, "is_binary_view", None)  # since pyarrow 16
    return types.is_binary(kind) or types.is_large_binary(kind) or _is_fixed(kind) or bool(view and view(kind))


def _is_fixed(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_fixed_size_binary(kind))


def _class_names(file: Any) -> dict[str, tuple[str, ...]]:
    """The names of classes by column, from the schema metadata that `datasets` writes, if any."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    found = {}
    with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError, RecursionError):
        for name, feature in json.loads(text)["info"]["features"].items():
            names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
            if isinstance(names, list) and names and all(isinstance(each, str) for each in names):
                found[name] = tuple(names)
    return found
