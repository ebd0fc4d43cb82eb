"""Reads the rows of a dataset for an export: in order, one shard at a time, each shard checked before it is used."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from shlex import quote
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..dataset.manifest import Manifest
from ..errors import FormatError, UsageError
from ..npz.reader import NpzReader, RowArray
from ..readers.dataset import column_fault, open_dataset, open_shard
from ..sources.base import LabelColumn, countable
from ..storage.local import LocalStorage

_SPAN_ROWS = 4096  # bounds the time to find the next gap
_SPAN_BYTES = 1 << 24  # bounds the memory of inflated images

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard, none of them blank.

    Attributes:
        position: the position of the first row among all rows of the export.
        reader: the shard.
        places: the rows' places in the shard.
    """

    position: int
    reader: NpzReader
    places: slice

    @property
    def images(self) -> NDArray[Any]:
        """The stored images (n, C, H, W) or (n, H, W, C): a view, or a copy if the shard is deflated."""
        return self.reader.rows("images")[self.places]

    @property
    def paths(self) -> NDArray[np.str_]:
        """The source paths, `<U` (n,)."""
        return self.reader["paths"][self.places]

    def texts(self) -> Iterator[tuple[int, str]]:
        """The position and the source path of each row. Raises FormatError if a path is no text."""
        try:
            yield from enumerate(self.paths.tolist(), self.position)
        except (ValueError, SystemError) as exc:  # code points beyond Unicode
            raise FormatError(f"paths: {exc}; it is damaged", self.reader.path) from exc


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        position: its position among all rows of the export.
        path: its source path.
    """

    position: int
    path: str
    _images: RowArray
    _place: int

    def image(self) -> NDArray[Any]:
        """The stored image, (C, H, W) or (H, W, C)."""
        found: NDArray[Any] = self._images[self._place]
        return found


class ExportedRows:
    """The rows of a finished dataset, without blank ones.

    Only one shard is mapped at a time, so memory does not grow with the dataset, except for some 24 bytes per row.

    Args:
        out: the dataset's folder.

    Attributes:
        manifest: the manifest of the dataset.
        path: the dataset's folder.
        labels: int64 or float64 (N,), or (N, K) for K columns; None without labels.
        columns: the label columns.
        blank: how many rows were left out because `--on-reject blank` left them empty.

    Raises:
        IncompleteError: the build has not finished.
        FormatError: `out` is not a dataset, or is damaged.
        StorageError: the dataset is not on a disk.
        UsageError: the dataset has no rows.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        data = open_dataset(out)
        self.path, self.manifest = data.path, data.manifest
        self._storage = LocalStorage(data.path)
        self._kept = np.arange(len(data)) if data.valid is None else np.flatnonzero(data.valid)
        self._ends = np.cumsum(data.shard_rows)
        self._span_rows = max(1, min(_SPAN_ROWS, _SPAN_BYTES // self.image_bytes))
        # The shard that was read last, and whether its images were checked.
        self._opened: tuple[int, bool, NpzReader | None] = (-1, False, None)
        self.blank = len(data) - len(self._kept)
        if not len(self._kept):
            raise UsageError(f"{data.path!r} holds no images: all its items were rejected; there is nothing to export")
        self.labels = data.labels if data.labels is None or not self.blank else data.labels[self._kept]
        self.columns = _columns(self.manifest)
        for number, column in enumerate(self.columns):
            self._require_classes(column, number)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def image_bytes(self) -> int:
        """The size of a stored image, in bytes."""
        images = self.manifest.images
        return math.prod(images.shape) * np.dtype(images.dtype).itemsize

    @property
    def by_class(self) -> bool:
        """Whether there is one label column, of classes or integers."""
        return countable(self.manifest.classes, self.manifest.columns)

    def label(self, position: int) -> list[Any]:
        """The labels of a row: for each column the name of the class, or the number."""
        if self.labels is None:
            return []
        numbers = np.atleast_1d(self.labels[position]).tolist()
        return [_value(column, number) for column, number in zip(self.columns, numbers, strict=True)]

    def spans(self, start: int = 0, stop: int | None = None, *, images: bool = True) -> Iterator[Span]:
        """Reads some of the rows, in order.

        Args:
            start: the position of the first row.
            stop: the position behind the last row; None for all rows.
            images: whether to check the images of a shard, too, rather than only its paths.

        Raises:
            FormatError: a shard is missing or damaged.
        """
        stop = len(self) if stop is None else stop
        while start < stop:
            first = int(self._kept[start])
            shard = int(np.searchsorted(self._ends, first, "right"))
            end = int(self._ends[shard])
            begin = int(self._ends[shard - 1]) if shard else 0
            rows = self._kept[start : min(stop, start + end - first, start + self._span_rows)]
            rows = rows[rows < end]
            count = int(np.searchsorted(rows - np.arange(len(rows)), first, "right"))  # up to the first gap
            place = first - begin
            yield Span(start, self._shard(shard, end - begin, images=images), slice(place, place + count))
            start += count

    def require_sound(self) -> None:
        """Raises FormatError for the first damaged shard, or because none is damaged any more."""
        for _ in self.spans():
            pass
        raise FormatError("a shard was read that is sound now; check the disk, then run the same command", self.path)

    def paths(self) -> Iterator[tuple[int, str]]:
        """The position and the source path of each row. Raises FormatError as `spans`."""
        for span in self.spans(images=False):
            yield from span.texts()

    def samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        """Reads some of the rows one by one; the arguments and errors are those of `spans`."""
        for span in self.spans(start, stop):
            stored = span.reader.rows("images")
            first = span.places.start - span.position
            for position, path in span.texts():
                yield Sample(position, path, stored, first + position)

    def _shard(self, number: int, rows: int, *, images: bool) -> NpzReader:
        opened, checked, reader = self._opened
        if opened == number and reader is not None and (checked or not images):
            return reader
        self._opened = (-1, False, None)  # unmaps the last shard first
        reader = open_shard(self._storage, self.manifest, number)
        fault = column_fault(reader, "paths", self.manifest)
        if fault is None and len(reader.rows("images")) != rows:
            fault = f"{len(reader.rows('images'))} rows instead of {rows}"
        if fault is None and not all(reader.crc_matches(name) for name in ("paths", "images")[: 1 + images]):
            fault = "its content is damaged"
        if fault is not None:
            raise FormatError(f"{fault}; rebuild it: gpu-npz verify {quote(self.path)} --repair", reader.path)
        self._opened = (number, images, reader)
        return reader

    def _require_classes(self, column: LabelColumn, number: int) -> None:
        if column.classes is None or self.labels is None:
            return
        numbers = self.labels if self.labels.ndim == 1 else self.labels[:, number]
        if numbers.min() < 0 or numbers.max() >= len(column.classes):
            span = f"{numbers.min()} to {numbers.max()}"
            raise FormatError(f"{self.path!r}: labels of {column} are {span}; run gpu-npz verify {quote(self.path)}")


def _value(column: LabelColumn, number: float) -> str | int | float:
    if column.kind == "float":
        return number
    return int(number) if column.classes is None else column.classes[int(number)]


def _columns(manifest: Manifest) -> tuple[LabelColumn, ...]:
    if manifest.classes is not None:
        return (LabelColumn(name="class", kind="class", classes=manifest.classes),)
    return manifest.columns


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Yields each item with the result of `function`, in order, while the pool computes up to `ahead` more."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()
