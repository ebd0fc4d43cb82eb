"""Gives a finished dataset as NumPy arrays. Rows are read on demand: from mapped shards, or from an object store."""

from __future__ import annotations

import bisect
import errno
import functools
import os
import shlex
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..dataset.identity import index_comment, shard_comment
from ..dataset.layout import INDEX, MANIFEST, shard_name
from ..dataset.manifest import Manifest, so_far
from ..dataset.records import open_npz
from ..errors import FormatError, IncompleteError, StorageError
from ..machine.environment import usable_cpus
from ..npz.format import is_text
from ..npz.reader import CachedDirectory, DeflatedRows, NpzReader
from ..preprocess.normalize import images_together
from ..sources.base import label_form
from ..storage import open_storage
from ..storage.base import Storage
from ..storage.objects import ObjectStorage
from .cache import ShardCache, cache_limit
from .inference import Preprocess
from .remote import READS_AT_ONCE, RemoteRows, RemoteShard, RemoteShards
from .views import RowIndex, Rows

# Shards that stay mapped. Before Python 3.13, each map holds a file descriptor; the usual limit is 1,024 per process.
_OPEN_SHARDS = 1024 if sys.version_info >= (3, 13) else 64
_KNOWN_SHARDS = 16_384  # shards whose zip directory is cached, a few kilobytes each

_datasets: weakref.WeakSet[Dataset] = weakref.WeakSet()


def _renew_locks() -> None:
    for dataset in _datasets:
        dataset._lock = threading.Lock()
        if dataset._remote is not None:
            dataset._remote.renew()


os.register_at_fork(after_in_child=_renew_locks)  # a thread that the child does not have may hold a lock

Answer = TypeVar("Answer")


class Dataset(Rows):
    """The images of a finished dataset, one per row, in the order of its plan. It is pickled as its path.

    `dataset[i]` is the image of row i as stored, (C, H, W) or (H, W, C): a view of the mapped file. `dataset[a:b]` is a
    batch: a view if it lies in one shard, else a copy. `dataset[[3, 1, 2]]` is a copy. Changes to a view stay in this
    process. With a compressed dataset, all of these are copies, and only the requested rows are decompressed.

    In an object store, a run of consecutive rows is one request for its bytes, and the rows of a batch are fetched
    concurrently. With a cache, iterating over the dataset, and the readers of the frameworks, bring whole shards there,
    from which their rows are mapped; other accesses fetch rows.

    Args:
        path: the dataset's folder, or its URL on an object store (s3://, gs://).
        partial: open a dataset whose build has not finished, with the shards that are committed so far.
        cache: a folder on a local disk for whole shards of a dataset in an object store, which several datasets and
            processes may share. Nothing in it is ever evicted. For a dataset in a folder, it has no effect.
        cache_size: the most that shards in the cache may take, in bytes or with a unit, such as "200GB"; by default,
            the disk is the limit.

    Attributes:
        path: the dataset's folder or URL.
        manifest: the contents of dataset.json.
        labels: int64 (N,), or None; for several columns (N, K), float64 if one of them has fractions.
        class_names: the class names by label, if there is one column of labels and it holds classes; else None.
        label_columns: the label columns if `class_names` does not describe them: name, kind and classes of each.
        index: the position of each row in the plan, int64 (N,).
        valid: bool (N,), False for the zero rows of `--on-reject blank`; None if the dataset cannot have such rows.
        paths: the source path of each row, read from its shard on access.
        shard_rows: how many rows each shard has, int64 (shards,).

    Raises:
        IncompleteError: the build has not finished; with `partial`, no shard is committed yet.
        FormatError: not a dataset, damaged, or made by a later version.
        StorageError: the process has too many open files; the store is not supported, refuses, or does not answer; a
            shard was replaced in the meantime; the cache cannot be used.
        UsageError: a `cache_size` that is not allowed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        partial: bool = False,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
    ) -> None:
        limit = cache_limit(cache, cache_size)
        self._options = (partial, cache and os.path.abspath(cache), cache_size)
        self._storage = open_storage(path, only_read=True)
        self.path = self._storage.root
        index: Any
        self._numbers: Sequence[int]
        if partial and self._storage.size(MANIFEST) is None:
            self.manifest, index, self._numbers = so_far(self._storage)
            if not self._numbers:
                shards = self.manifest.counts.shards
                raise IncompleteError(f"{self.path!r} has none of its {shards} shards yet; wait for the build")
        else:
            self.manifest = Manifest.load(self.path)
            index = open_index(self._storage, self.manifest)
            if isinstance(self._storage, ObjectStorage):
                _require_crcs(index)
            self._numbers = range(self.manifest.counts.shards)
        self.index: NDArray[np.int64] = index["index"]
        self.labels: NDArray[Any] | None = index.get("labels")
        self.valid: NDArray[np.bool_] | None = index.get("valid")
        self.shard_rows: NDArray[np.int64] = index["shard_rows"]
        require_fit(index, self.manifest.counts.rows, len(self._numbers), self.path)
        ends = np.cumsum(self.shard_rows).tolist()
        self.class_names = self.manifest.classes
        self.label_columns = self.manifest.columns
        self._ends: list[int] = ends
        self._shards: dict[int, NpzReader | RemoteShard] = {}  # the first that was opened is the first to be closed
        self._known: dict[int, CachedDirectory] = {}
        self._lock = threading.Lock()
        self._remote: RemoteShards | None = None
        if isinstance(self._storage, ObjectStorage):
            kept = None if cache is None else ShardCache(cache, limit)
            self._remote = RemoteShards(self._storage, self.manifest, self._numbers, index, kept)
            weakref.finalize(self, self._remote.stop)
        _datasets.add(self)

    def __repr__(self) -> str:
        images = self.manifest.images
        return f"<Dataset {self.path!r}: {len(self)} images {images.shape} {images.dtype}>"

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open_dataset, (self.path, *self._options)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """This dataset alone; a view may have several."""
        return (self,)

    @property
    def id(self) -> str:
        """The id in the manifest."""
        return self.manifest.id

    @property
    def layout(self) -> Literal["NCHW", "NHWC"]:
        """The order of the axes of stored images."""
        return self.manifest.images.layout

    @property
    def deflated(self) -> bool:
        """Whether stored images are compressed."""
        return self.manifest.deflated

    @property
    def has_cache(self) -> bool:
        """Whether shards are fetched from an object store into a cache."""
        return self._remote is not None and self._remote.has_cache

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image: (C, H, W) or (H, W, C)."""
        return self.manifest.images.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the images."""
        return np.dtype(self.manifest.images.dtype)

    def __getitem__(self, rows: RowIndex) -> NDArray[Any]:
        if type(rows) is int:  # a fast path: copying a small image takes no longer than a few calls
            shard, at = self._find(rows)
            row: NDArray[Any] = (self._shards.get(shard) or self.shard(shard)).rows("images")[at]
            return row
        return self.column("images", rows)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        self.fill(wait=True)
        for number in range(len(self.shard_rows)):
            yield from self.shard(number).rows("images")

    def column(self, name: str, rows: RowIndex) -> NDArray[Any]:
        """The entries of one array of the shards (`images`, `paths`, `source_bytes`, ...) for some rows.

        Args:
            name: the name of the array.
            rows: a row number, a slice, or a list or array of row numbers.

        Raises:
            IndexError: a row is out of range.
            TypeError: `rows` is of another type.
            FormatError: a shard is missing or damaged, or has no such array.
        """
        if isinstance(rows, slice):
            span = range(len(self))[rows]
            if span.step == 1 and span:
                return self._span(name, span.start, span.stop)
            rows = np.array(span)
        # Checking for int first avoids two checks that take longer than finding the row.
        if type(rows) is int or (isinstance(rows, SupportsIndex) and np.ndim(rows) == 0):  # type: ignore[arg-type]
            shard, at = self._find(int(rows))
            row: NDArray[Any] = self._rows(shard, name)[at]
            return row
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise TypeError(
                f"rows: got {wanted.dtype} {wanted.shape}; allowed: an integer, a slice or a list of integers"
            )
        places = [self._find(int(row)) for row in wanted]
        if name == "images" and self._remote is not None:
            return self._images(wanted.astype(np.int64) % max(1, len(self)))
        return self._gather(name, [(shard, at, at + 1) for shard, at in places])

    def read(self, rows: NDArray[np.int64], out: NDArray[Any], *, normalize: bool = False, threads: int = 1) -> None:
        """Reads images into memory that exists already, as stored or normalized.

        Args:
            rows: row numbers from 0 up to N - 1, int64 (n,).
            out: (n, C, H, W) or (n, H, W, C) as stored, with any strides. Its dtype is the stored one; with
                `normalize`, it is float32, or float16, whose values are those of a float16 build if pixels are stored.
            normalize: whether to normalize stored pixels, as `normalized` does; blank rows stay zero.
            threads: how many threads share the rows.
        """
        if threads > 1 and len(rows) > 1:
            step = -(-len(rows) // threads)
            spans = [slice(start, start + step) for start in range(0, len(rows), step)]
            with ThreadPoolExecutor(len(spans)) as pool:
                list(pool.map(lambda span: self.read(rows[span], out[span], normalize=normalize), spans))
            return
        fetched = {} if self._remote is None else self._fetched(rows)
        order = np.argsort(rows, kind="stable")  # shard by shard
        together = min(images_together(self.image_shape), len(rows)) if normalize else 1
        if together > 1:
            stored, values = (np.empty((together, *self.image_shape), dtype) for dtype in (self.dtype, out.dtype))
            for start in range(0, len(order), together):
                places = order[start : start + together]
                for image, row in zip(stored, rows[places].tolist(), strict=False):
                    image[...] = fetched[row] if row in fetched else self[row]
                self.preprocess.write(stored[: len(places)], values[: len(places)])
                out[places] = values[: len(places)]
        else:
            for place in order.tolist():
                row = int(rows[place])
                image = fetched[row] if row in fetched else self[row]
                if normalize:
                    self.preprocess.write(image, out[place])
                else:
                    np.copyto(out[place], image)
        if normalize and self.valid is not None:
            out[~self.valid[rows]] = 0

    @functools.cached_property
    def preprocess(self) -> Preprocess:
        """The preprocessing of this dataset, to apply to other images at inference, or to compare with a dataset."""
        return Preprocess.of(self.manifest)

    def fill(self, rows: NDArray[np.int64] | None = None, *, wait: bool = False) -> None:
        """Begins to fetch whole shards into the cache, in the background; without a cache, this does nothing.

        Args:
            rows: those that will be read, from 0 up to N - 1, in this order; all of them by default.
            wait: whether a row of their shards waits until its shard is in the cache, if there is room for it, as is
                best for reading most rows of a shard. Otherwise it is fetched alone until then.
        """
        if self._remote is None or not self.has_cache:
            return
        shards: Sequence[int] = range(len(self.shard_rows))
        if rows is not None:
            numbers = np.searchsorted(self._ends, rows, side="right")
            shards = numbers[np.sort(np.unique(numbers, return_index=True)[1])].tolist()
        self._remote.fill(shards, wait=wait)

    def shard(self, number: int) -> NpzReader | RemoteShard:
        """One shard, which is opened unless it still is open.

        Args:
            number: counted from 0 over the shards of this dataset; with `partial`, over the committed ones.

        Raises:
            FormatError: the shard is missing, damaged, or of another dataset.
        """
        if self._remote is not None:
            if (found := self._shards.get(number)) is not None:
                return found
            remote = self._remote.open(number)  # without the lock: it may take a while
            self._require_fit(number, remote)
            with self._lock:
                return self._keep(number, remote)
        with self._lock:
            if number in self._shards:
                return self._shards[number]
            name = shard_name(self._numbers[number], self.manifest.counts.shards)
            reader = _opened(self._storage, name, self._known.get(number))
            if len(self._known) < _KNOWN_SHARDS:
                self._known[number] = reader.known
            self._require_fit(number, reader)
            return self._keep(number, reader)

    def _require_fit(self, number: int, reader: NpzReader | RemoteShard) -> None:
        _require_shard(reader, self.manifest, self._numbers[number])
        rows = self._ends[number] - (self._ends[number - 1] if number else 0)
        if len(reader.rows("images")) != rows:
            raise FormatError(
                f"{len(reader.rows('images'))} rows; {INDEX} says {rows}; run gpu-npz verify", reader.path
            )

    def _keep(self, number: int, reader: NpzReader | RemoteShard) -> NpzReader | RemoteShard:
        self._shards[number] = reader
        if len(self._shards) > _OPEN_SHARDS:
            del self._shards[next(iter(self._shards))]
        return reader

    def _rows(self, number: int, name: str) -> NDArray[Any] | DeflatedRows | RemoteRows:
        """An array of a shard. Raises FormatError if it does not have one entry per image."""
        reader = self.shard(number)
        rows, images = reader.rows(name), reader.rows("images")
        if rows is not images and (rows.shape[:1] != images.shape[:1] or len(rows.shape) > 1 + (name == "labels")):
            raise FormatError(f"{name} is {rows.shape} beside {len(images)} images; copy it again", reader.path)
        return rows

    def _find(self, row: int) -> tuple[int, int]:
        count = self._ends[-1]
        if not 0 <= row < count:
            if not -count <= row < 0:
                raise IndexError(f"row {row} of a dataset with {count} rows")
            row += count
        shard = bisect.bisect_right(self._ends, row)
        return shard, row - (self._ends[shard - 1] if shard else 0)

    def _span(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The rows from `start` up to `stop`, of which there is at least one."""
        runs = []
        while start < stop:
            shard, at = self._find(start)
            count = min(stop, self._ends[shard]) - start
            runs.append((shard, at, at + count))
            start += count
        if len(runs) != 1 and name == "images" and self._remote is not None:
            return self._images(np.arange(stop - sum(end - at for _, at, end in runs), stop))
        if len(runs) != 1 or (name == "images" and self.manifest.deflated and self._remote is None):
            return self._gather(name, runs)
        ((shard, begin, end),) = runs
        view: NDArray[Any] = self._rows(shard, name)[begin:end]
        return view

    def _gather(self, name: str, runs: list[tuple[int, int, int]]) -> NDArray[Any]:
        """A copy of the rows of all runs (shard, start, stop), copied run by run: views would keep all shards open."""
        if not runs:
            runs = [(0, 0, 0)]
        if name == "images" and self.manifest.deflated:
            return self._inflated([(shard, row) for shard, start, stop in runs for row in range(start, stop)])
        out: NDArray[Any] | None = None
        filled, count = 0, sum(stop - start for _, start, stop in runs)

        def read(run: tuple[int, int, int]) -> NDArray[Any]:
            shard, start, stop = run
            return self._rows(shard, name)[start:stop]

        for rows in map(read, runs) if self._remote is None else _concurrently(read, runs):
            if out is None:
                out = np.empty((count, *rows.shape[1:]), rows.dtype)
            elif rows.dtype != out.dtype:  # strings, whose width differs between shards
                out = out.astype(np.promote_types(out.dtype, rows.dtype))
            out[filled : filled + len(rows)] = rows
            filled += len(rows)
        assert out is not None
        return out

    def _inflated(self, places: list[tuple[int, int]]) -> NDArray[Any]:
        """The images at these places (shard, row), decompressed with one thread per core."""
        out = np.empty((len(places), *self.image_shape), self.dtype)

        def inflate(at: int) -> None:
            shard, row = places[at]
            out[at] = self.shard(shard).rows("images")[row]

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(inflate, range(len(places))))
        return out

    def _images(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the images of these rows, which are from 0 up to N - 1."""
        out = np.empty((len(rows), *self.image_shape), self.dtype)
        self.read(rows, out)
        return out

    def _fetched(self, rows: NDArray[np.int64]) -> dict[int, NDArray[Any]]:
        """The images of those rows whose shards are not in the cache, by row, fetched concurrently."""
        wanted = np.unique(rows)
        shards = np.searchsorted(self._ends, wanted, side="right")
        unmapped = [each for each in np.unique(shards).tolist() if not isinstance(self._shards.get(each), NpzReader)]

        def opened(number: int) -> RemoteShard | None:
            shard = self.shard(number)
            return shard if isinstance(shard, RemoteShard) and not shard.is_local else None

        found = zip(unmapped, _concurrently(opened, unmapped), strict=True)
        remote = {number: shard for number, shard in found if shard is not None}
        runs = np.split(wanted, np.flatnonzero((np.diff(wanted) != 1) | (np.diff(shards) != 0)) + 1)

        def fetch(run: NDArray[np.int64]) -> NDArray[Any]:
            number, start = self._find(int(run[0]))
            return remote[number].rows("images")[start : start + len(run)]

        runs = [run for run in runs if len(run) and self._find(int(run[0]))[0] in remote]
        pairs = zip(runs, _concurrently(fetch, runs), strict=True)
        return {row: image for run, images in pairs for row, image in zip(run.tolist(), images, strict=True)}

    @functools.cached_property
    def _threads(self) -> int:
        return usable_cpus()


def open_dataset(
    path: str | os.PathLike[str],
    partial: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
) -> Dataset:
    """Opens a finished dataset or, with `partial`, the committed shards of an unfinished one; see `Dataset`."""
    return Dataset(path, partial=partial, cache=cache, cache_size=cache_size)


def _concurrently(call: Callable[[Any], Answer], values: Sequence[Any]) -> Iterator[Answer]:
    """The results of a call for each value, in order, several at a time."""
    if len(values) < 2:
        yield from map(call, values)
        return
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from pool.map(call, values)


def open_index(storage: Storage, manifest: Manifest) -> NpzReader:
    """Opens index.npz. Raises FormatError if it is missing, damaged or from another dataset."""
    reader = _opened(storage, INDEX)
    _require_comment(reader, index_comment(manifest.id))
    kinds: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "index": (np.int64, ()),
        "labels": label_form(manifest.columns),
        "valid": (np.bool_, ()),
        "shard_rows": (np.int64, ()),
        "shard_bytes": (np.int64, ()),
        "shard_digest": (np.uint8, (32,)),
    }
    for name, (kind, shape) in kinds.items():
        if name in ("labels", "valid") and name not in reader:
            continue
        found = reader[name]
        if found.dtype != kind or found.ndim != 1 + len(shape) or found.shape[1:] != shape:
            wanted = f"{kind.__name__} ({', '.join(map(str, ('N', *shape)))})"
            raise FormatError(f"{name} is {found.dtype} {found.shape}, not {wanted}", reader.path)
    return reader


def require_fit(index: Any, rows: int, shards: int, path: str) -> None:
    """Raises FormatError if an index does not have as many rows and shards as the manifest of its dataset says.

    Args:
        index: the arrays of index.npz by name.
        rows: the rows of the dataset.
        shards: the shards of the dataset.
        path: the dataset's folder, for the message.
    """
    columns = [index[name] for name in ("index", "labels", "valid") if name in index]
    held = index["shard_rows"]
    fits = 0 < len(held) == shards and bool(((held >= 0) & (held <= rows)).all()) and int(held.sum()) == rows
    if not fits or any(len(column) != rows for column in columns):
        raise FormatError(f"{INDEX} does not fit the manifest; run gpu-npz verify on the dataset", path)


def open_shard(storage: Storage, manifest: Manifest, number: int, before: CachedDirectory | None = None) -> NpzReader:
    """Opens one shard and checks that it is the right one.

    Args:
        storage: where the dataset is.
        manifest: the manifest of the dataset.
        number: the number of the shard in the plan.
        before: as for `NpzReader`.

    Raises:
        FormatError: the shard is missing, damaged, or of another dataset, or its images have another shape or dtype.
    """
    reader = _opened(storage, shard_name(number, manifest.counts.shards), before)
    _require_shard(reader, manifest, number)
    return reader


def _require_shard(reader: NpzReader | RemoteShard, manifest: Manifest, number: int) -> None:
    _require_comment(reader, shard_comment(manifest.id, number))
    images = reader.rows("images")
    if (reader.directory.members["images"].runs_bytes is not None) != manifest.deflated:
        raise FormatError(
            f"its images are {'stored' if manifest.deflated else 'deflated'}, unlike the manifest's; copy it again",
            reader.path,
        )
    if images.shape[1:] != manifest.images.shape or images.dtype.name != manifest.images.dtype:
        wanted = f"{manifest.images.dtype} (N, {', '.join(map(str, manifest.images.shape))})"
        raise FormatError(f"images are {images.dtype} {images.shape}; the manifest says {wanted}", reader.path)


def column_fault(reader: NpzReader, name: str, manifest: Manifest) -> str | None:
    """What is wrong with the dtype or shape of an array of a shard other than the images; None if nothing is.

    Raises as `NpzReader`.
    """
    label_type, label_shape = label_form(manifest.columns)
    kinds = {"index": "i", "source_bytes": "i", "paths": "U", "valid": "b", "labels": np.dtype(label_type).kind}
    shape = (len(reader.rows("images")), *(label_shape if name == "labels" else ()))
    column, kind = reader[name], kinds[name]
    if (column.shape, column.dtype.kind) == (shape, kind):
        return f"{name} has code points that are not in Unicode" if kind == "U" and not is_text(column) else None
    return f"{name} is {column.dtype} {column.shape}; {kind!r} {shape} belongs there"


def _require_comment(reader: NpzReader | RemoteShard, expected: str) -> None:
    if (found := reader.directory.comment) != expected:
        raise FormatError(f"it is {found!r}, but {expected!r} belongs here; copy it again", reader.path)


def _require_crcs(index: NpzReader) -> None:
    if damaged := [name for name in index.directory.members if not index.crc_matches(name)]:
        raise FormatError(
            f"the checksum of {', '.join(damaged)} is wrong; run gpu-npz verify on the dataset", index.path
        )


def _opened(storage: Storage, name: str, before: CachedDirectory | None = None) -> NpzReader:
    path = storage.path(name)
    try:
        return open_npz(storage, name, before)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            raise StorageError(
                f"{path}: {exc.strerror}; copy rows instead of keeping views of many shards, or raise the limit "
                "(ulimit -n)"
            ) from exc
        repair = f"gpu-npz verify {shlex.quote(storage.root)} --repair"
        raise FormatError(f"{exc.strerror or exc}; restore the file, or run: {repair}", path) from exc
