"""How fast each stage of a build is, whole builds beside them, and the shard writer beside NumPy's and a bare write.

A stage's row goes through the stages before it, too, by the build's own functions with its batches and threads. All
rows come from one run with interleaved rounds; only their ratios mean something on another machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from ..builder import build
from ..config import BuildConfig
from ..decode import make_decoder
from ..decode.base import Decoder, Stage
from ..environment import Choice, choose, inspect
from ..errors import UsageError
from ..geometry import Geometry
from ..job import Job
from ..normalize import CudaNormalizer, Normalizer, row_shape
from ..npz.writer import NpzWriter
from ..plan import Batch, Plan, collect
from ..sources.folder import FolderSource
from ..storage import LocalStorage
from ..tuning import Tuning
from ..worker import Progress, Task, interleaved, work
from .rates import Measurement, Tick, Way, folder_of, in_turns, linked, machine

ROUNDS = 5
IMAGES = {"cuda": 20_000, "cpu": 2_000}
_DTYPES = ("float32", "float16", "uint8")
_WRITER_BATCHES = 4
_WRITER_BATCH_ROWS = 256
_BUFFERS = 3


@dataclass(frozen=True)
class Setup:
    """One build's parts, as `build` would put them together."""

    config: BuildConfig
    choice: Choice
    source: FolderSource
    plan: Plan
    tuning: Tuning
    place: Path

    @classmethod
    def of(cls, config: BuildConfig, choice: Choice, source: FolderSource, place: Path) -> Setup:
        """The parts of a build of `source` that writes below `place`."""
        row_bytes = math.prod(cls._shape(config)) * np.dtype(config.dtype).itemsize
        plan = Plan(collect(source.groups()), config.shard_rows(row_bytes))
        shard_rows = min(plan.shard_rows, plan.item_count)
        tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=shard_rows, shards=plan.shard_count)
        return cls(config, choice, source, plan, tuning, place)

    @staticmethod
    def _shape(config: BuildConfig) -> tuple[int, ...]:
        assert config.size is not None
        return row_shape(config, *config.size)

    def batches(self) -> Iterator[Batch]:
        return interleaved(self.plan, range(self.plan.shard_count), self.tuning)

    def decoder(self, stream: int | None = None) -> Decoder:
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

    def bare(self, tick: Tick, last: Stage) -> None:
        """The stages up to `last`, and nothing around them."""
        with self.decoder() as decoder:
            for batch in decoder.bare(self.batches(), last):
                tick(len(batch.items))

    def normalized(self, tick: Tick, *, transfer: bool) -> None:
        """Decoded, resized and normalized rows; on a GPU they stay there, or are copied to the host."""
        normalizer: Normalizer | CudaNormalizer
        if self.choice.gpu is None:
            normalizer = Normalizer(self.config)
            step = normalizer.apply
        else:
            normalizer = CudaNormalizer(self.config, self.choice.gpu)
            step = normalizer.apply if transfer else normalizer.launch
        shape = (self.tuning.batch_size, *self._shape(self.config))
        buffers = [normalizer.allocate(shape) for _ in range(_BUFFERS)]
        waits: deque[Callable[[], None]] = deque()
        with self.decoder(getattr(normalizer, "stream", None)) as decoder:
            for number, decoded in enumerate(decoder.decode(self.batches())):
                out = buffers[number % _BUFFERS][: len(decoded.kept)]
                waits.append(step(decoded.pixels, decoded.kept, out))
                if len(waits) == _BUFFERS:
                    waits.popleft()()
                tick(len(decoded.batch.items))
            for wait in waits:
                wait()

    def written(self, tick: Tick) -> None:
        """What a worker does: all stages, and committed shards."""
        assert self.config.size is not None
        with folder_of(self.place / "out") as out:
            Job.create(
                LocalStorage(out),
                self.plan,
                self.config,
                self.choice,
                source=(self.source.kind, self.source.location),
                class_names=self.source.class_names,
                image_size=self.config.size,
            )
            task = Task(os.fspath(out), self.source, self.choice.gpu, self.tuning, None)
            for event in work(task, range(self.plan.shard_count)):
                if isinstance(event, Progress):
                    tick(event.items)

    def built(self, tick: Tick) -> None:
        """A whole build."""
        with folder_of(self.place / "out") as out:
            build(
                self.source.location,
                out,
                self.config,
                progress=lambda event: tick(event.items) if isinstance(event, Progress) else None,
            )

    def looped(self, tick: Tick) -> None:
        """The steps of a build straight after one another: read, decode, resize, normalize, CRC, write, flush."""
        normalizer = Normalizer(self.config)
        buffer = normalizer.allocate((self.tuning.batch_size, *self._shape(self.config)))
        with self.decoder() as decoder:
            for shard in range(self.plan.shard_count):
                with _flushed(self.place / f"loop-{shard}") as descriptor:
                    crc = 0
                    for decoded in decoder.decode(self.plan.batches(shard, self.tuning.batch_size)):
                        rows = buffer[: len(decoded.kept)]
                        normalizer.apply(decoded.pixels, decoded.kept, rows)
                        crc = crc32(rows.reshape(-1).view(np.uint8).data, crc)
                        _write(descriptor, rows)
                        tick(len(decoded.batch.items))


def measure(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    images: int | None = None,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures the stages of a build, whole builds, and the shard writer.

    Pillow is measured with one worker on one core, beside a loop of the same steps; DALI with one worker on all cores.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        config: the settings; the rows after `resize` have its dtype, and whole builds are made of every dtype.
        images: how many images each row takes; 20,000 on a GPU and 2,000 on a CPU if None.
        rounds: how often everything is measured; the ways take turns within a round.
        folder: where to write; the system's temporary folder if None. It needs some 2.5 MB an image.
        say: told what is being measured.

    Raises:
        UsageError: `resize_mode` is `none`.
        BackendError, SourceError: as `build`.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: rates of images as they are say little; choose another mode, or a --size")
    choice = choose(config, inspect(config.device))
    if choice.warning:
        say(choice.warning)
    device = "cpu" if choice.gpu is None else str(choice.gpu)
    common = {"device": device, "backend": choice.backend, "workers": 0, "max_rejects": "100%"}
    settings = BuildConfig(**{**config.model_dump(), **common})
    one_core = choice.backend == "pillow"
    with (
        tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name,
        _one_core() if one_core else contextlib.nullcontext(),
    ):
        place = Path(name)
        source = FolderSource(linked(src, place / "src", images or IMAGES[choice.device]))
        setup = Setup.of(settings, choice, source, place)
        ways = _stages(setup)
        for dtype in _DTYPES:
            typed = BuildConfig(**{**settings.model_dump(), "dtype": dtype})
            whole = Setup.of(typed, choice, source, place)
            baselines: tuple[str, ...] = ("resize",)
            if one_core:
                loop = f"loop {dtype}"
                ways[loop] = (baselines, whole.looped)
                baselines = (loop, *baselines)
            ways[f"build {dtype}"] = (baselines, whole.built)
        ways |= _writers(place)
        rows = in_turns(ways, rounds, say)
        environment = setup.decoder().environment()
    used = {"images": setup.plan.item_count, "dtype": settings.dtype, "size": settings.size, **asdict(setup.tuning)}
    return Measurement(rows, used, {**machine(environment), "cores": 1} if one_core else machine(environment))


def _stages(setup: Setup) -> dict[str, tuple[tuple[str, ...], Way]]:
    ways: dict[str, tuple[tuple[str, ...], Way]] = {
        "read": ((), lambda tick: setup.bare(tick, "read")),
        "decode": (("read",), lambda tick: setup.bare(tick, "decode")),
        "resize": (("decode",), lambda tick: setup.bare(tick, "resize")),
        "normalize": (("resize",), lambda tick: setup.normalized(tick, transfer=False)),
    }
    if setup.choice.gpu is not None:
        ways["transfer"] = (("normalize",), lambda tick: setup.normalized(tick, transfer=True))
    ways["write"] = ((list(ways)[-1], "resize"), setup.written)
    return ways


def _writers(place: Path) -> dict[str, tuple[tuple[str, ...], Way]]:
    """The same float32 rows by `write()` and `fsync()`, by `numpy.savez` and `fsync()`, and by a shard's writer."""
    batch = np.random.default_rng(0).normal(size=(_WRITER_BATCH_ROWS, 3, 224, 224)).astype(np.float32)
    path = place / "file.npz"

    def bare_write(tick: Tick) -> None:
        with _flushed(path) as descriptor:
            for _ in range(_WRITER_BATCHES):
                _write(descriptor, batch)
        tick(len(batch) * _WRITER_BATCHES)

    def savez(tick: Tick) -> None:
        np.savez(path, images=np.concatenate([batch] * _WRITER_BATCHES))
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        tick(len(batch) * _WRITER_BATCHES)

    def shard_writer(tick: Tick) -> None:
        with NpzWriter(path) as file:
            file.begin("images", batch.dtype, batch.shape[1:])
            for _ in range(_WRITER_BATCHES):
                file.append(batch)
            file.close()
        tick(len(batch) * _WRITER_BATCHES)

    return {
        "savez": ((), savez),
        "bare write": (("savez",), bare_write),
        "shard writer": (("savez", "bare write"), shard_writer),
    }


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _flushed(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, array: Any) -> None:
    data = array.reshape(-1).view(np.uint8).data
    while data:
        data = data[os.write(descriptor, data) :]
