"""The shards of a dataset in an object store: single rows by requests for their bytes, or whole shards through a cache.

At the first use of a shard, its end is fetched: the directory, whose SHA-256 must be the one in index.npz, and the
comment. Every later request names the ETag of that answer, so it fails if the object has been replaced (on S3; other
stores have no such condition). Then a run of consecutive rows is one request for exactly its bytes.

What is checked by ranges: the directory and the comment as in a file; the headers and the CRC-32 of each array but the
images; the row index and the structure of deflated rows. The headers before the images are not fetched: their content
follows from the directory, the manifest and index.npz. A single row has no checksum of its own. Whole shards, on their
way into the cache, are checked as files are, with the CRC-32 of all arrays.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..config import DType
from ..dataset.layout import INDEX, MANIFEST, shard_name
from ..dataset.manifest import Manifest
from ..errors import FormatError, StorageError
from ..npz.format import Directory, Member, read_end, read_member, rowindex
from ..npz.reader import NpzReader, RowArray, inflated, require_rowindex
from ..storage.objects import ObjectStorage, Part
from .cache import ShardCache

log = logging.getLogger(__name__)
READS_AT_ONCE = 16  # of one batch
_END_BYTES = 4096  # the directory of a shard, its end records and its comment take less than 1,000
_PIECE_BYTES = 8 << 20  # of a request for a part of a shard
_DOWNLOADS = 4  # whole shards that a process fetches at a time in the background
_KNOWN_SHARDS = 16_384  # shards whose end is kept, a few kilobytes each
_LOCKS = 64


@dataclass(frozen=True)
class _End:
    """What the end of a shard says.

    Attributes:
        tag: the ETag of the object.
        directory: its content.
        ends: the row index of deflated images; None if they are stored.
    """

    tag: str
    directory: Directory
    ends: NDArray[np.int64] | None


class RemoteRows:
    """The images of a shard in an object store. Each access is one request, for exactly the bytes of its rows.

    Attributes:
        shape: the shape of the array, (N, *row_shape).
        dtype: the dtype of the array.
    """

    def __init__(self, shard: RemoteShard, member: Member, ends: NDArray[np.int64] | None) -> None:
        self.shape, self.dtype = member.shape, member.dtype
        self._shard, self._member, self._ends = shard, member, ends
        self._row_bytes = member.dtype.itemsize * math.prod(member.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        count = max(1, _PIECE_BYTES // self._row_bytes)
        for start in range(0, len(self), count):
            yield from self[start : start + count]

    def __getitem__(self, rows: int | slice) -> NDArray[Any]:
        """Returns a new array: a row, of `row_shape`, or the rows of a slice, (rows, *row_shape).

        Raises:
            FormatError: the shard is missing or damaged.
            StorageError: the shard was replaced, or the store does not answer.
        """
        span = range(len(self))[rows]
        if not isinstance(span, range):
            row: NDArray[Any] = self._read(span, span + 1)[0]
            return row
        if not span:
            return np.empty((0, *self.shape[1:]), self.dtype)
        start = min(span)
        found = self._read(start, max(span) + 1)
        return found if span.step == 1 else found[np.array(span) - start]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        first, ends = self._member.data_offset, self._ends
        if ends is None:
            data = self._shard.fetch(first + start * self._row_bytes, first + stop * self._row_bytes)
            pixels: Any = data
        else:
            begin = int(ends[start])
            data = self._shard.fetch(first + begin, first + int(ends[stop])) if ends[stop] > begin else b""
            runs, path = memoryview(data), self._shard.path
            pixels = b"".join(
                inflated(runs[ends[row] - begin : ends[row + 1] - begin], self._row_bytes, f"images: row {row}", path)
                for row in range(start, stop)
            )
        images: NDArray[Any] = np.frombuffer(bytearray(pixels), self.dtype).reshape(stop - start, *self.shape[1:])
        return images


class RemoteShard:
    """A shard in an object store, with the interface of `NpzReader` as far as a dataset needs it.

    Once the shard is in the cache, it is read from there.

    Attributes:
        path: the URL of the shard.
        directory: its content. Arrays other than the images have the form of bytes there (`read_end`).
    """

    def __init__(self, shards: RemoteShards, number: int, end: _End) -> None:
        self.path, self.directory = shards.path(number), end.directory
        self._shards, self._number, self._end = shards, number, end
        self._arrays: dict[str, NDArray[Any] | RemoteRows] = {}
        self._local: NpzReader | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.directory.members

    @property
    def is_local(self) -> bool:
        """Whether the shard is read from the cache."""
        self._local = self._local or self._shards.cached(self._number)
        return self._local is not None

    def rows(self, name: str) -> RowArray | RemoteRows:
        """The rows of the array `name`. Arrays other than the images are fetched as a whole, and kept.

        Raises:
            FormatError: the array is missing, or the shard is damaged.
            StorageError: the shard was replaced, or the store does not answer.
        """
        if self.is_local:
            assert self._local is not None
            return self._local.rows(name)
        if name not in self._arrays:
            if name not in self:
                held = ", ".join(self.directory.members)
                raise FormatError(f"no array {name!r}; it holds {held}", self.path)
            member = self.directory.members[name]
            if name == "images":
                self._arrays[name] = RemoteRows(self, member, self._end.ends)
            else:
                with self._shards.lock(self._number):
                    if name not in self._arrays:
                        content = self.fetch(member.header_offset, member.end)
                        self._arrays[name] = read_member(member, content, self.path)
        return self._arrays[name]

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes of the shard from `start` up to `stop`, of which there is at least one, by one request."""
        return self._shards.fetch(self._number, start, stop, self._end.tag).data


class RemoteShards:
    """The shards of a dataset in an object store, counted from 0 over the shards of the dataset.

    Args:
        storage: where the dataset is.
        manifest: its manifest.
        numbers: the number of each shard in the plan.
        index: the arrays of index.npz by name.
        cache: where whole shards are kept; None keeps none.

    Raises:
        FormatError: the manifest describes no images.
    """

    def __init__(
        self, storage: ObjectStorage, manifest: Manifest, numbers: Sequence[int], index: Any, cache: ShardCache | None
    ) -> None:
        images = manifest.images
        if images.dtype not in get_args(DType) or min(images.shape) < 1:
            raise FormatError(f"images of {images.dtype} {images.shape}; the file is damaged", storage.path(MANIFEST))
        self._storage = storage
        self._names = [shard_name(number, manifest.counts.shards) for number in numbers]
        self._form = np.dtype(images.dtype), images.shape
        self._rows: list[int] = index["shard_rows"].tolist()
        self._bytes: list[int] = index["shard_bytes"].tolist()
        self._digests = [row.tobytes().hex() for row in index["shard_digest"]]
        if not len(self._names) == len(self._rows) == len(self._bytes) == len(self._digests):
            raise FormatError(f"{INDEX} does not fit the manifest; run gpu-npz verify on the dataset", storage.root)
        self._cache = cache
        self._ends: dict[int, _End] = {}
        self.renew()

    def renew(self) -> None:
        """Begins as a new process does, after a fork: without locks that threads hold, and with nothing to fetch."""
        self._locks = [threading.RLock() for _ in range(_LOCKS)]
        self._threads: list[threading.Thread] = []
        self._queue: deque[tuple[int, bool]] = deque()  # shards to fetch; whether to wait for other processes
        self._queued: set[int] = set()
        self._awaited: set[int] = set()
        self._faults: dict[int, FormatError] = {}

    @property
    def has_cache(self) -> bool:
        """Whether there is a cache."""
        return self._cache is not None

    def path(self, number: int) -> str:
        """The URL of a shard."""
        return self._storage.path(self._names[number])

    def lock(self, number: int) -> threading.RLock:
        """A lock for what one thread at a time fetches of a shard."""
        return self._locks[number % _LOCKS]

    def open(self, number: int) -> NpzReader | RemoteShard:
        """A shard, from the cache if it is there.

        Raises:
            FormatError: the shard is missing or damaged.
            StorageError: the store does not answer, or the process has too many open files.
        """
        return self.cached(number) or RemoteShard(self, number, self._end(number))

    def cached(self, number: int) -> NpzReader | None:
        """A shard from the cache, which fetches it if `fill` said that its rows wait for it; None if it is not there.

        Raises:
            FormatError, StorageError: as for `open`.
        """
        if self._cache is None:
            return None
        if fault := self._faults.get(number):
            raise FormatError(fault.problem, fault.path)
        path, digest = self._cache.path(self._digests[number]), self._digests[number]
        if not os.path.exists(path) and not (number in self._awaited and self._keep(number, wait=True)):
            return None
        try:
            reader = NpzReader(path)
        except FileNotFoundError:  # somebody deleted it meanwhile
            return None
        except OSError as exc:
            raise StorageError(
                f"{path}: {exc.strerror}; raise the limit of open files (ulimit -n), if it is that"
            ) from exc
        except FormatError as exc:
            raise FormatError(f"{exc.problem}; delete this copy, which is fetched again then", path) from exc
        if reader.directory.digest != digest:
            raise FormatError("it is another shard than its name says; delete it: it is fetched again then", path)
        return reader

    def fill(self, numbers: Sequence[int], *, wait: bool) -> None:
        """Begins to fetch whole shards into the cache, in this order, in the background.

        Args:
            numbers: the shards.
            wait: whether the rows of these shards are read from the cache only, so that an access waits for the shard,
                if there is room for it.
        """
        if self._cache is None or self._cache.is_full:
            return
        if wait and len(self._awaited) < len(self._names):
            self._awaited.update(numbers)
        if len(self._queued) == len(self._names):
            return
        new = [number for number in numbers if number not in self._queued]
        self._queued.update(new)
        self._queue.extend((number, False) for number in new)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(len(new), _DOWNLOADS - len(self._threads))):
            # As a daemon, it does not keep a process from ending. What it leaves is taken over by the next process.
            self._threads.append(threading.Thread(target=self._work, name="gpu-npz-cache", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Fetches no further shards in the background."""
        self._queue.clear()

    def fetch(self, number: int, start: int, stop: int, tag: str = "") -> Part:
        """Bytes of a shard from `start` up to `stop`; see `ObjectStorage.fetch`.

        Raises:
            FormatError: the shard is missing, or has another size than index.npz says.
            StorageError: the shard was replaced, or the store does not answer.
        """
        try:
            part = self._storage.fetch(self._names[number], start, stop, tag)
        except FileNotFoundError as exc:
            raise self._fault(number, "the object is missing") from exc
        size = self._bytes[number]
        if len(part.data) != stop - start or part.size not in (size, None):
            raise self._fault(number, f"its size is not {size} bytes, as {INDEX} says")
        return part

    def _fault(self, number: int, problem: str) -> FormatError:
        repair = f"gpu-npz verify {shlex.quote(self._storage.root)} --repair"
        return FormatError(f"{problem}; restore the object, or run: {repair}", self.path(number))

    def _end(self, number: int) -> _End:
        with self.lock(number):
            if (known := self._ends.get(number)) is not None:
                return known
            size = self._bytes[number]
            if size < 1:
                raise FormatError(f"{INDEX} says that it has {size} bytes; run gpu-npz verify", self.path(number))
            data, tag, _ = self.fetch(number, max(0, size - _END_BYTES), size)
            dtype, shape = self._form
            forms = {"images": (dtype, (self._rows[number], *shape))}
            directory = read_end(memoryview(data), size, forms, self.path(number))
            if directory.digest != self._digests[number]:
                raise self._fault(number, f"it has the digest {directory.digest}, and {INDEX} another one")
            end = _End(tag, directory, self._row_ends(number, directory, tag))
            if len(self._ends) < _KNOWN_SHARDS:
                self._ends[number] = end
            return end

    def _row_ends(self, number: int, directory: Directory, tag: str) -> NDArray[np.int64] | None:
        images, ends = directory.members.get("images"), directory.members.get(rowindex("images"))
        if images is None or images.runs_bytes is None:
            return None
        if ends is None:
            raise FormatError(f"no array {rowindex('images')!r}; copy the file again", self.path(number))
        content = self.fetch(number, ends.header_offset, ends.end, tag)
        found = read_member(ends, content.data, self.path(number))
        require_rowindex(found, images, self.path(number))
        return found

    def _work(self) -> None:
        """Fetches what is queued, in a thread."""
        while self._queue:
            try:
                number, wait = self._queue.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                if self._keep(number, wait=wait) is None:
                    self._queue.append((number, True))
            except FormatError as exc:
                self._faults[number] = exc
            except StorageError as exc:  # whoever needs the shard will see it
                log.info("%s", exc)

    def _keep(self, number: int, *, wait: bool) -> bool | None:
        """Brings a shard into the cache; see `ShardCache.add`."""
        assert self._cache is not None

        def fill(descriptor: int, part: str) -> None:
            size, tag = self._bytes[number], self._end(number).tag
            for start in range(0, size, _PIECE_BYTES):
                data = self.fetch(number, start, min(size, start + _PIECE_BYTES), tag).data
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], start + done)
            self._require_whole(number, part)

        return self._cache.add(self._digests[number], self._bytes[number], fill, wait=wait)

    def _require_whole(self, number: int, path: str) -> None:
        """Raises FormatError if a copy of a shard is not complete and correct."""
        try:
            reader = NpzReader(path)
            damaged = [name for name in reader.directory.members if not reader.crc_matches(name)]
        except FormatError as exc:
            raise self._fault(number, exc.problem) from exc
        if damaged or reader.directory.digest != self._digests[number]:
            raise self._fault(number, f"the checksum of {', '.join(damaged) or 'its directory'} is wrong")
