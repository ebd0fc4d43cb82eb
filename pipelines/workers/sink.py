"""From rows to committed shards, behind the decoder's back: one thread a shard, from its first row to its record.

While one shard is flushed, renamed and committed, others are written; so nobody waits for the disk but the disk.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
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

_SPARE_BUFFERS = 2  # one being filled, one on its way
_UNFLUSHED_SHARDS = 2


@dataclass
class Rows:
    """Rows of one batch on their way to the disk.

    Attributes:
        shard: which shard they belong to.
        images: (N, *row shape), the front of `buffer`; whole once `ready` has returned.
        items: the N items.
        source_bytes: the encoded size of each, int64 (N,).
        valid: whether each has an image, bool (N,).
        rejects: the batch's items that have none.
        last: whether the shard ends here.
        ready: waits for the images; called once, in the shard's thread.
        buffer: what `ShardSink.buffer` gave.
    """

    shard: int
    images: NDArray[Any]
    items: list[Item]
    source_bytes: NDArray[np.int64]
    valid: NDArray[np.bool_]
    rejects: list[Reject]
    last: bool
    ready: Callable[[], None]
    buffer: NDArray[Any]


_Todo = queue.SimpleQueue["Rows | None"]  # one shard's rows; None if no more of them come


class ShardSink:
    """Writes shards, each in a thread of its own.

    Use as a context manager: leaving it waits until everything is committed; if its body raised, no shard that is
    unfinished by then is published.

    Args:
        storage: OUT.
        job: what is being built.
        provenance: what goes into every commit record.
        allocate: makes a row buffer of a given shape; a few are made, and used again and again.
        tuning: rows a buffer holds, and how many shards may be open.
    """

    def __init__(
        self,
        storage: Storage,
        job: Job,
        provenance: dict[str, Any],
        allocate: Callable[[tuple[int, ...]], NDArray[Any]],
        tuning: Tuning,
    ) -> None:
        self.seconds = {"transfer": 0.0, "write": 0.0, "commit": 0.0}
        self._storage = storage
        self._job = job
        self._provenance = provenance
        self._free: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()
        for _ in range(tuning.open_shards + _SPARE_BUFFERS):
            self._free.put(allocate((tuning.batch_size, *job.row_shape)))
        self._todo: dict[int, _Todo] = {}  # by shard, while its rows come
        self._done: queue.SimpleQueue[CommitRecord] = queue.SimpleQueue()
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
        """A row buffer that nothing uses; waits for one. Raises what a thread of this sink failed with."""
        buffer = self._free.get()
        self._raise_failure()
        return buffer

    def put(self, rows: Rows) -> None:
        """Takes the next rows of a shard, which come in order; those of other open shards may come between them."""
        todo = self._todo.get(rows.shard)
        if todo is None:
            self._room.acquire()
            todo = self._todo[rows.shard] = queue.SimpleQueue()
            self._threads.submit(self._build, rows.shard, todo)
        todo.put(rows)
        if rows.last:
            del self._todo[rows.shard]

    def committed(self) -> Iterator[CommitRecord]:
        """The shards that were committed since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._done.get_nowait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _build(self, shard: int, todo: _Todo) -> None:
        """Takes a shard from its first rows to its commit record; runs in a thread of its own."""
        name = shard_name(shard, self._job.plan.shard_count)
        temporary = self._storage.temporary(name)
        taken = self._taken(todo)
        parts: list[Rows] = []
        try:
            with self._storage.explained(name), NpzWriter(temporary) as file:
                level = self._job.settings.deflate_level
                file.begin("images", self._job.dtype, self._job.row_shape, deflate_level=level)
                for rows in taken:
                    if self._failure is not None:
                        break
                    with self._timed("transfer"):
                        rows.ready()
                    with self._timed("write"):
                        file.append(rows.images)
                    rows.images = rows.images[:0]  # the buffer goes back, the rest stays until the shard ends
                    parts.append(rows)
                if self._failure is None and parts and parts[-1].last:
                    with self._timed("commit"):
                        self._done.put(self._commit(shard, temporary, file, parts))
        except BaseException as exc:  # handed to the main thread, which raises it
            self._failure = self._failure or exc
        finally:
            for _ in taken:  # whoever waits for a buffer must get one
                pass
            self._storage.discard(temporary)
            self._room.release()

    def _taken(self, todo: _Todo) -> Iterator[Rows]:
        """A shard's rows as they come; a buffer is free again when the next rows are asked for."""
        while (rows := todo.get()) is not None:
            yield rows
            self._free.put(rows.buffer)
            if rows.last:
                break

    def _commit(self, shard: int, temporary: str, file: NpzWriter, parts: list[Rows]) -> CommitRecord:
        """Gives a shard its other members, its final name and its record."""
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
            provenance=self._provenance,
            rejects=tuple(reject for rows in parts for reject in rows.rejects),
        )
        commit(self._storage, record, self._job.plan.shard_count)
        return record

    def _columns(self, parts: list[Rows]) -> dict[str, NDArray[Any]]:
        """The members beside the images, one entry a row each."""
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
