"""Writes rows to shards and commits them, in one thread per open shard, while the decoder continues.

While one shard is flushed, renamed and committed, others are written, so that the disk is never idle in between.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.commits import CommitRecord, commit
from ..dataset.job import Job
from ..dataset.layout import shard_name
from ..machine.tuning import Tuning
from ..npz.writer import NpzWriter
from ..sources.base import Item
from ..sources.rejects import Reject
from ..storage.base import Storage
from .events import Committed, ShardCounts

_SPARE_BUFFERS = 2  # one that is being filled, one that is being copied
_UNFLUSHED_SHARDS = 2


@dataclass(frozen=True)
class Rows:
    """The rows of one batch, without their images. They are kept until the shard is committed.

    Attributes:
        shard: the number of the shard that they belong to.
        items: the N items.
        source_bytes: the encoded size of each item, int64 (N,).
        valid: whether each row has an image, bool (N,).
        rejects: the rejects of the batch.
        last: whether this is the last batch of the shard.
    """

    shard: int
    items: list[Item]
    source_bytes: NDArray[np.int64]
    valid: NDArray[np.bool_]
    rejects: list[Reject]
    last: bool


@dataclass(frozen=True)
class RowImages:
    """The images of some rows. They are dropped once they have been written.

    Attributes:
        images: (N, *row shape), the front of `buffer`; complete once `ready` has returned.
        buffer: the buffer that `ShardSink.buffer` returned.
        ready: waits until the images are complete; called once, in the shard's thread.
        count: the counts of the batch; called once, in the shard's thread, after the images have been written. It may
            raise an error, which ends the build.
        encoded: the files' bytes, which a GPU may read until `ready` has returned.
    """

    images: NDArray[Any]
    buffer: NDArray[Any]
    ready: Callable[[], None]
    count: Callable[[], ShardCounts]
    encoded: Sequence[NDArray[np.uint8]]


# The rows of one shard as they arrive; None if no more will come.
_RowQueue = queue.SimpleQueue["tuple[Rows, RowImages] | None"]


class ShardSink:
    """Writes shards, each in its own thread.

    Use as a context manager. Leaving it waits until all shards are committed; if the body raised an error, shards that
    are unfinished by then are discarded.

    Args:
        storage: OUT.
        job: the job of the build.
        provenance: stored in every commit record.
        allocate: allocates a row buffer of a given shape; a few buffers are allocated and reused.
        tuning: rows per buffer, and how many shards may be open.
        drop_cache: whether the page cache drops shards as they reach the disk.

    Attributes:
        seconds: how long the threads were busy with each stage, by its name.
    """

    def __init__(
        self,
        storage: Storage,
        job: Job,
        provenance: dict[str, Any],
        allocate: Callable[[tuple[int, ...]], NDArray[Any]],
        tuning: Tuning,
        *,
        drop_cache: bool = False,
    ) -> None:
        self.seconds = {"transfer": 0.0, "write": 0.0, "check": 0.0, "commit": 0.0}
        self._storage = storage
        self._job = job
        self._provenance = provenance
        self._drop_cache = drop_cache
        self._free: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()
        for _ in range(tuning.open_shards + _SPARE_BUFFERS):
            self._free.put(allocate((tuning.batch_size, *job.row_shape)))
        self._todo: dict[int, _RowQueue] = {}  # by shard, until its last rows
        self._done: queue.SimpleQueue[Committed] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        shards = tuning.open_shards + _UNFLUSHED_SHARDS
        self._room = threading.BoundedSemaphore(shards)
        self._threads = ThreadPoolExecutor(shards, "gpu-npz-shard")

    def __enter__(self) -> ShardSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = self._failure or error
        for todo in self._todo.values():
            todo.put(None)
        self._threads.shutdown()
        if error is None:
            self._raise_failure()

    def buffer(self) -> NDArray[Any]:
        """Waits for a free row buffer. Raises the error of a shard's thread if one failed."""
        buffer = self._free.get()
        self._raise_failure()
        return buffer

    def put(self, rows: Rows, images: RowImages) -> None:
        """Adds the next rows of a shard, in order. Rows of other open shards may come in between."""
        todo = self._todo.get(rows.shard)
        if todo is None:
            self._room.acquire()
            todo = self._todo[rows.shard] = queue.SimpleQueue()
            self._threads.submit(self._build, rows.shard, todo)
        todo.put((rows, images))
        if rows.last:
            del self._todo[rows.shard]

    def committed(self) -> Iterator[Committed]:
        """The shards that were committed since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._done.get_nowait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _build(self, shard: int, todo: _RowQueue) -> None:
        """Builds a shard from its first rows to its commit record, in the shard's own thread."""
        name = shard_name(shard, self._job.plan.shard_count)
        temporary = self._storage.temporary(name)
        taken = self._taken(todo)
        parts: list[Rows] = []
        counts = ShardCounts()
        try:
            with self._storage.explained(name), NpzWriter(temporary, drop_cache=self._drop_cache) as file:
                level = self._job.settings.deflate_level
                file.begin("images", self._job.dtype, self._job.row_shape, deflate_level=level)
                for rows, images in taken:
                    if self._failure is not None:
                        break
                    with self._timed("transfer"):
                        images.ready()
                    with self._timed("write"):
                        file.append(images.images)
                    with self._timed("check"):
                        counts.add(images.count())
                    parts.append(rows)
                if self._failure is None and parts and parts[-1].last:
                    with self._timed("commit"):
                        self._done.put(Committed(self._commit(shard, temporary, file, parts), counts))
        except BaseException as exc:  # the main thread raises it
            self._failure = self._failure or exc
        finally:
            for _ in taken:  # free all buffers, since the main thread may be waiting for one
                pass
            self._storage.discard(temporary)
            self._room.release()

    def _taken(self, todo: _RowQueue) -> Iterator[tuple[Rows, RowImages]]:
        """The rows of a shard as they arrive. A buffer is freed when the next rows are requested."""
        while (entry := todo.get()) is not None:
            rows, images = entry
            yield entry
            self._free.put(images.buffer)
            if rows.last:
                break

    def _commit(self, shard: int, temporary: str, file: NpzWriter, parts: list[Rows]) -> CommitRecord:
        """Adds the other members to a shard, publishes it and writes its commit record."""
        for member, array in self._columns(parts).items():
            file.add(member, array)
        directory = file.close(self._job.comment(shard))
        self._storage.publish(temporary, shard_name(shard, self._job.plan.shard_count))
        record = CommitRecord(
            id=self._job.record.id,
            shard=shard,
            rows=directory.members["images"].shape[0],
            bytes=directory.file_bytes,
            digest=directory.digest,
            environment=self._provenance,
            rejects=tuple(reject for rows in parts for reject in rows.rejects),
        )
        commit(self._storage, record, self._job.plan.shard_count)
        return record

    def _columns(self, parts: list[Rows]) -> dict[str, NDArray[Any]]:
        """The members besides `images`, with one entry per row."""
        items = [item for rows in parts for item in rows.items]
        columns: dict[str, NDArray[Any]] = {}
        if self._job.labelled:
            columns["labels"] = self._job.label_array([item.label for item in items])
        columns["paths"] = np.array([item.path for item in items], None if items else "<U1")
        columns["index"] = np.array([item.index for item in items], np.int64)
        columns["source_bytes"] = np.concatenate([rows.source_bytes for rows in parts])
        if self._job.settings.on_reject == "blank":
            columns["valid"] = np.concatenate([rows.valid for rows in parts])
        return columns

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start
