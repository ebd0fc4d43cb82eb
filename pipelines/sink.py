"""From rows to committed shards, behind the decoder's back: one thread writes, one flushes, publishes and commits."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .job import Job
from .manifest import CommitRecord, commit
from .npz.writer import NpzWriter
from .output import shard_name
from .plan import Item
from .rejects import Reject
from .storage import LocalStorage

_BUFFERS = 3  # one being filled, one being written, one between the two
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


@dataclass
class _OpenShard:
    shard: int
    temporary: str
    file: NpzWriter
    rows: list[Rows] = field(default_factory=list)


class ShardSink:
    """Writes shards one after the other, in threads of its own.

    Use as a context manager: leaving it waits until everything is committed; if its body raised, no shard that is
    unfinished by then is published.

    Args:
        storage: OUT.
        job: what is being built.
        environment: what goes into every commit record.
        allocate: makes a row buffer of a given shape; a few are made, and used again and again.
        batch_size: rows a buffer holds.
    """

    def __init__(
        self,
        storage: LocalStorage,
        job: Job,
        environment: dict[str, Any],
        allocate: Callable[[tuple[int, ...]], NDArray[Any]],
        batch_size: int,
    ) -> None:
        self.seconds = {"write": 0.0, "commit": 0.0}
        self._storage = storage
        self._job = job
        self._environment = environment
        self._free: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(allocate((batch_size, *job.row_shape)))
        self._todo: queue.SimpleQueue[Rows | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[CommitRecord] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._open: _OpenShard | None = None
        self._unflushed = threading.BoundedSemaphore(_UNFLUSHED_SHARDS)
        self._committer = ThreadPoolExecutor(1, "gpu-npz-commit")
        self._writer = threading.Thread(target=self._write_all, name="gpu-npz-write", daemon=True)

    def __enter__(self) -> ShardSink:
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = self._failure or error
        self._todo.put(None)
        self._writer.join()
        self._committer.shutdown()
        if self._open is not None:
            self._abandon(self._open)
        if error is None:
            self._raise_failure()

    def buffer(self) -> NDArray[Any]:
        """A row buffer that nothing uses; waits for one. Raises what a thread of this sink failed with."""
        buffer = self._free.get()
        self._raise_failure()
        return buffer

    def put(self, rows: Rows) -> None:
        """Takes the next rows. The rows of a shard come in order and without another shard's between them."""
        self._todo.put(rows)

    def committed(self) -> Iterator[CommitRecord]:
        """The shards that were committed since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._done.get_nowait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write_all(self) -> None:
        while (rows := self._todo.get()) is not None:
            try:
                if self._failure is None:
                    self._write(rows)
            except BaseException as exc:  # handed to the main thread, which raises it
                self._failure = exc
            finally:
                self._free.put(rows.buffer)

    def _write(self, rows: Rows) -> None:
        rows.ready()
        start = time.perf_counter()
        name = self._name(rows.shard)
        with self._storage.explained(name):
            if self._open is None:
                temporary = self._storage.temporary(name)
                self._open = _OpenShard(rows.shard, temporary, NpzWriter(temporary))
                self._open.file.begin("images", self._job.dtype, self._job.row_shape)
            shard = self._open
            shard.file.append(rows.images)
            shard.rows.append(rows)
            rows.images = rows.images[:0]  # the buffer goes back, the rest stays until the shard ends
            if rows.last:
                for member, array in self._columns(shard.rows).items():
                    shard.file.add(member, array)
        self.seconds["write"] += time.perf_counter() - start
        if rows.last:
            self._unflushed.acquire()
            self._open = None
            self._committer.submit(self._commit, shard)

    def _columns(self, batches: list[Rows]) -> dict[str, NDArray[Any]]:
        """The members beside the images, one entry a row each."""
        items = [item for rows in batches for item in rows.items]
        columns: dict[str, NDArray[Any]] = {}
        if self._job.labelled:
            columns["labels"] = np.array([item.label for item in items], np.int64)
        columns["paths"] = np.array([item.path for item in items], None if items else "<U1")
        columns["index"] = np.array([item.index for item in items], np.int64)
        columns["source_bytes"] = np.concatenate([rows.source_bytes for rows in batches])
        if self._job.settings.on_reject == "blank":
            columns["valid"] = np.concatenate([rows.valid for rows in batches])
        return columns

    def _commit(self, shard: _OpenShard) -> None:
        start = time.perf_counter()
        try:
            if self._failure is not None:
                self._abandon(shard)
                return
            name = self._name(shard.shard)
            with self._storage.explained(name), shard.file:
                directory = shard.file.close(self._job.comment(shard.shard))
            self._storage.publish(shard.temporary, name)
            record = CommitRecord(
                id=self._job.record.id,
                shard=shard.shard,
                rows=directory.members["images"].shape[0],
                bytes=directory.file_bytes,
                digest=directory.digest,
                environment=self._environment,
                rejects=tuple(reject for rows in shard.rows for reject in rows.rejects),
            )
            commit(self._storage, record, self._job.plan.shard_count)
            self._done.put(record)
        except BaseException as exc:  # handed to the main thread, which raises it
            self._failure = exc
            self._storage.discard(shard.temporary)
        finally:
            self.seconds["commit"] += time.perf_counter() - start
            self._unflushed.release()

    def _abandon(self, shard: _OpenShard) -> None:
        with shard.file:
            self._storage.discard(shard.temporary)

    def _name(self, shard: int) -> str:
        return shard_name(shard, self._job.plan.shard_count)
