"""Reads the files of a batch for DALI's decoder and decides, from their headers, how each item is decoded.

DALI reads regular local files in its own threads. Python reads everything else: items of archives, named pipes, for
which DALI would wait, and files such as /proc/kcore, which would fill the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..machine.tuning import Tuning
from ..sources.access.local import is_plain, statuses
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import BadItem
from .dali_pipelines import read_files
from .fed_pipeline import FedPipeline
from .geometry import Geometry
from .routing import Route, route

T = TypeVar("T")


@dataclass
class EncodedBatch:
    """A batch whose files have been read.

    Attributes:
        batch: the batch of N items.
        encoded: each item's bytes, uint8 (bytes,); empty if it cannot be read.
        inputs: the same bytes in the form that costs DALI the least: its own list of tensors, or `encoded`.
        route: how the items are decoded.
    """

    batch: Batch
    encoded: Sequence[NDArray[np.uint8]]
    inputs: Any
    route: Route


class DaliReader:
    """Reads batches in order. Use as a context manager.

    Args:
        config: the settings of the build.
        geometry: the resize mode and the output size.
        source: reads the items. If each item is a local file, DALI reads it.
        tuning: the batch size and the number of threads.

    Raises:
        RuntimeError, OSError: on entering, if DALI does not start.
    """

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source, tuning: Tuning) -> None:
        self._config = config
        self._geometry = geometry
        self._source = source
        self._tuning = tuning
        self._open = contextlib.ExitStack()

    def __enter__(self) -> DaliReader:
        self._pool = self._open.enter_context(ThreadPoolExecutor(self._tuning.threads, "gpu-npz-read"))
        if self._source.file_per_item:
            self._pipeline: FedPipeline[tuple[Batch, list[int]]] = FedPipeline(
                read_files,
                batch_size=self._tuning.batch_size,
                num_threads=self._tuning.reading_threads,
                device_id=None,
                prefetch_queue_depth=self._tuning.prefetch,
            )
            self._open.callback(self._pipeline.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, batches: Iterable[Batch]) -> Generator[EncodedBatch, None, None]:
        """The batches with the bytes and the route of their items.

        An exception of `batches` is raised after all batches before it are returned.
        """
        if self._source.file_per_item:
            yield from self._read_by_dali(batches)
        else:
            yield from (self._read_here(self._checked(batch)) for batch in batches)

    def routed(self, batch: Batch, encoded: Sequence[NDArray[np.uint8]], inputs: Any = None) -> EncodedBatch:
        """A batch with these bytes.

        Args:
            batch: the batch.
            encoded: each item's bytes, uint8 (bytes,).
            inputs: the same bytes as DALI's list of tensors; None if there is none.
        """
        found = route([data.data for data in encoded], self._config, self._geometry)
        return EncodedBatch(batch, encoded, encoded if inputs is None else inputs, found)

    def _read_by_dali(self, batches: Iterable[Batch]) -> Generator[EncodedBatch, None, None]:
        """Reads plain files with DALI. If DALI fails on a batch because a file cannot be read, Python reads it."""
        with contextlib.ExitStack() as stack:
            lookups = stack.enter_context(ThreadPoolExecutor(1, "gpu-npz-lookup"))
            feed = _one_ahead(lookups.submit(self._paths, self._checked(batch)) for batch in batches)
            runs = stack.enter_context(contextlib.closing(self._pipeline.run(future.result() for future in feed)))
            for (batch, others), outputs in runs:
                if isinstance(outputs, Exception):
                    yield self._read_here(batch)
                    continue
                encoded, tensors = list(map(np.asarray, outputs[0])), outputs[0]
                for position in others:
                    encoded[position] = self._encoded(batch.items[position])
                yield self.routed(batch, encoded, None if others else tensors)

    def _read_here(self, batch: Batch) -> EncodedBatch:
        return self.routed(batch, list(self._pool.map(self._encoded, batch.items)))

    def _encoded(self, item: Item) -> NDArray[np.uint8]:
        """The item's bytes, empty if it cannot be read."""
        try:
            return np.frombuffer(read_item(self._source, item), np.uint8)
        except BadItem:
            return np.empty(0, np.uint8)

    def _paths(self, batch: Batch) -> tuple[tuple[Batch, list[int]], list[Any]]:
        """A batch, which of its items are no plain files, and the paths for DALI: an empty file for those items."""
        paths = [self._source.local_path(item) for item in batch.items]
        others = [position for position, status in enumerate(statuses(paths)) if not is_plain(status)]
        for position in others:
            paths[position] = b"/dev/null"
        # One array costs DALI a seventh of what an array per path does. Slashes before an absolute path change nothing.
        length = max(map(len, paths))
        padded = np.frombuffer(b"".join([path.rjust(length, b"/") for path in paths]), np.uint8)
        return (batch, others), [padded.reshape(len(paths), length)]

    def _checked(self, batch: Batch) -> Batch:
        if not 1 <= len(batch.items) <= self._tuning.batch_size:
            raise ValueError(f"a batch of {len(batch.items)} items; allowed are 1 to {self._tuning.batch_size}")
        return batch


def _one_ahead(entries: Iterable[T]) -> Generator[T, None, None]:
    """The entries, each once the next one has been made. What `entries` raises comes after the entries before it."""
    before: list[T] = []
    try:
        for entry in entries:
            yield from before
            before = [entry]
    except Exception:
        yield from before
        raise
    yield from before
