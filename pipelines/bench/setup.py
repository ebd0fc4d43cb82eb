"""The parts of a build, and measurements of its stages, which use the build's own functions."""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from ..builder.build import build
from ..config import BuildConfig
from ..dataset.job import Job
from ..dataset.plan import Plan, collect
from ..machine.environment import Choice
from ..machine.tuning import Tuning
from ..preprocess.base import DecodedBatch, Decoder, Normalizer
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import NumpyNormalizer, row_shape
from ..preprocess.normalize_cuda import CudaNormalizer
from ..sources.base import Batch, Source
from ..sources.rejects import Stage
from ..storage.local import LocalStorage
from ..workers.events import Committed, Progress, Task
from ..workers.worker import interleaved_batches, work
from .rates import Tick, folder_of

_BUFFERS = 3


@dataclass(frozen=True)
class Setup:
    """The parts of one build, as `build` would combine them."""

    config: BuildConfig
    choice: Choice
    source: Source
    plan: Plan
    tuning: Tuning
    place: Path

    @classmethod
    def of(cls, config: BuildConfig, choice: Choice, source: Source, place: Path) -> Setup:
        """The parts of a build that reads `source` and writes below `place`."""
        row_bytes = math.prod(cls._shape(config)) * np.dtype(config.dtype).itemsize
        arrays = collect(source.groups())
        plan = Plan(arrays, config.for_items(Plan(arrays, 1).item_count).shard_rows(row_bytes))
        shard_rows = min(plan.shard_rows, plan.item_count)
        tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=shard_rows, shards=plan.shard_count)
        return cls(config, choice, source, plan, tuning, place)

    @staticmethod
    def _shape(config: BuildConfig) -> tuple[int, ...]:
        assert config.size is not None
        return row_shape(config, *config.size)

    def batches(self, shards: Iterable[int] | None = None) -> Iterator[Batch]:
        return interleaved_batches(self.plan, range(self.plan.shard_count) if shards is None else shards, self.tuning)

    def decoder(self, stream: Any = None) -> Decoder:
        assert self.config.size is not None
        geometry = Geometry.of(self.config, self.config.size)
        return make_decoder(
            self.choice.backend,
            self.config,
            geometry,
            self.source,
            tuning=self.tuning,
            gpu=self.choice.gpu,
            stream=stream,
        )

    def bare(self, tick: Tick, last: Stage, shards: Iterable[int] | None = None) -> None:
        """Only the stages up to `last`, without a worker, of all shards or those given."""
        with self.decoder() as decoder:
            for batch in decoder.bare(self.batches(shards), last):
                tick(len(batch.items))

    def normalized(self, tick: Tick, *, transfer: bool) -> None:
        """Decoded, resized and normalized rows; on a GPU they stay there, or are copied to the host."""
        normalizer: Normalizer
        if self.choice.gpu is None:
            normalizer = NumpyNormalizer(self.config)
            step = normalizer.apply
        else:
            normalizer = on_gpu = CudaNormalizer(self.config, self.choice.gpu)
            step = on_gpu.apply if transfer else on_gpu.launch
        shape = (self.tuning.batch_size, *self._shape(self.config))
        buffers = [normalizer.allocate(shape) for _ in range(_BUFFERS)]
        waits: deque[tuple[DecodedBatch, Callable[[], None]]] = deque()  # a GPU may be reading a batch until then
        with self.decoder(normalizer.stream) as decoder:
            for number, decoded in enumerate(decoder.decode(self.batches())):
                out = buffers[number % _BUFFERS][: len(decoded.kept)]
                waits.append((decoded, step(decoded.pixels, decoded.kept, out)))
                if len(waits) == _BUFFERS:
                    waits.popleft()[1]()
                tick(len(decoded.batch.items))
            for _, wait in waits:
                wait()
            tick(0)

    def written(self, tick: Tick) -> None:
        """A worker's run: all stages, up to committed shards."""
        assert self.config.size is not None
        with folder_of(self.place / "out") as out:
            Job.create(
                LocalStorage(out),
                self.plan,
                self.config,
                self.choice,
                source=self.source,
                image_size=self.config.size,
            )
            task = Task(os.fspath(out), self.source, self.choice.gpu, self.tuning, None)
            for event in work(task, range(self.plan.shard_count)):
                _count(event, tick)

    def built(self, tick: Tick) -> None:
        """A whole build."""
        with folder_of(self.place / "out") as out:
            build(self.source.location, out, self.config, progress=lambda event: _count(event, tick))

    def looped(self, tick: Tick, shards: Iterable[int] | None = None) -> None:
        """The steps of a build one after the other: read, decode, resize, normalize, CRC, write, flush.

        Args:
            tick: called after each batch.
            shards: the numbers of the shards; all if None.
        """
        normalizer = NumpyNormalizer(self.config)
        buffer = normalizer.allocate((self.tuning.batch_size, *self._shape(self.config)))
        with self.decoder() as decoder:
            for shard in range(self.plan.shard_count) if shards is None else shards:
                with flushed(self.place / f"loop-{shard}") as descriptor:
                    crc = 0
                    for decoded in decoder.decode(self.plan.batches(shard, self.tuning.batch_size)):
                        rows = buffer[: len(decoded.kept)]
                        normalizer.apply(decoded.pixels, decoded.kept, rows)
                        crc = crc32(rows.reshape(-1).view(np.uint8).data, crc)
                        write_all(descriptor, rows)
                        tick(len(decoded.batch.items))
                tick(0)


def _count(event: object, tick: Tick) -> None:
    """Counts the images of a batch when it is decoded; the last image is done when the last shard is committed."""
    if isinstance(event, Progress):
        tick(event.items)
    elif isinstance(event, Committed):
        tick(0)


@contextlib.contextmanager
def flushed(path: Path) -> Iterator[int]:
    """The descriptor of a new file, which is flushed to the disk at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, array: Any) -> None:
    """Writes an array's bytes with `write()`."""
    data = array.reshape(-1).view(np.uint8).data
    while data:
        data = data[os.write(descriptor, data) :]
