"""How fast a build is beside a bare loop of its own steps, and the shard writer beside NumPy's and a bare write.

All rows of a table come from one run with interleaved rounds; only their ratios mean something on another machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from ..builder import build
from ..config import BATCH_SIZE, BuildConfig
from ..decode.pillow import PillowDecoder, versions
from ..geometry import Geometry
from ..normalize import Normalizer, row_shape
from ..npz.writer import NpzWriter
from ..plan import Plan, collect
from ..sources.folder import FolderSource

ROUNDS = 5
_SHARD_ROWS = 1024
_WRITER_BATCHES = 4
_WRITER_BATCH_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One measured way: images a second in each round; `baseline` names the row that it is compared with."""

    name: str
    baseline: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rates."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measurement:
    """A whole run: its rows, and the machine that they were measured on."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]

    def ratio(self, row: Row) -> float:
        """The median over rounds of a row's rate to its baseline's in the same round."""
        baseline = next(other for other in self.rows if other.name == row.baseline)
        return statistics.median(a / b for a, b in zip(row.rates, baseline.rates, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        rows = [{**asdict(row), "median": row.median, "ratio": self.ratio(row)} for row in self.rows]
        return {"rows": rows, "machine": self.machine}


def measure(
    src: str | os.PathLike[str],
    *,
    images: int = 3000,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures builds with one worker on one core, and the shard writer.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        images: how many images a build has.
        rounds: how often everything is measured; the ways take turns within a round.
        folder: where to write; the system's temporary folder if None. It needs some 2.5 MB an image.
        say: told what is being measured.
    """
    ways: dict[tuple[str, str], Callable[[], float]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name, _one_core():
        place = Path(name)
        source = _linked(src, place / "src", images)
        for dtype in ("float32", "uint8"):
            config = BuildConfig(
                dtype=dtype, device="cpu", backend="pillow", workers=1, shard_size=str(_SHARD_ROWS), max_rejects="100%"
            )
            loop = f"loop {dtype}"
            ways[loop, loop] = lambda config=config: _timed(images, lambda: reference_loop(source, place, config))  # type: ignore[misc]
            ways[f"build {dtype}", loop] = lambda config=config: _timed(  # type: ignore[misc]
                images, lambda: build(source, place / "out", config), place / "out"
            )
        batch = np.random.default_rng(0).normal(size=(_WRITER_BATCH_ROWS, 3, 224, 224)).astype(np.float32)
        count = _WRITER_BATCHES * len(batch)
        for way in (bare_write, savez, shard_writer):
            name = way.__name__.replace("_", " ")
            ways[name, "savez"] = lambda way=way: _timed(count, lambda: way(place / "file.npz", batch))  # type: ignore[misc]
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
        for number in range(rounds + 1):
            for key, run in ways.items():
                say(f"round {number} of {rounds}: {key[0]}")
                rate = run()
                if number:  # the first round warms up
                    rates[key].append(rate)
    rows = tuple(Row(name, baseline, tuple(values)) for (name, baseline), values in rates.items())
    return Measurement(rows, machine())


def reference_loop(source: Path, place: Path, config: BuildConfig) -> None:
    """The steps of a build straight after one another: read, decode, resize, normalize, CRC, write, flush."""
    assert config.size is not None
    collection = FolderSource(source)
    plan = Plan(collect(collection.groups()), _SHARD_ROWS)
    normalizer = Normalizer(config)
    buffer = normalizer.allocate((BATCH_SIZE["cpu"], *row_shape(config, *config.size)))
    with PillowDecoder(config, Geometry.of(config, config.size), collection) as decoder:
        for shard in range(plan.shard_count):
            with _flushed(place / f"loop-{shard}") as descriptor:
                crc = 0
                for decoded in decoder.decode(plan.batches(shard, len(buffer))):
                    rows = buffer[: len(decoded.kept)]
                    normalizer.apply(decoded.pixels, rows)
                    crc = crc32(rows.reshape(-1).view(np.uint8).data, crc)
                    _write(descriptor, rows)


def bare_write(path: Path, batch: Any) -> None:
    """The same bytes by `write()` and `fsync()` alone."""
    with _flushed(path) as descriptor:
        for _ in range(_WRITER_BATCHES):
            _write(descriptor, batch)


def savez(path: Path, batch: Any) -> None:
    """`numpy.savez` of the whole array, and `fsync()`."""
    np.savez(path, images=np.concatenate([batch] * _WRITER_BATCHES))
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def shard_writer(path: Path, batch: Any) -> None:
    """A shard's writer, batch by batch."""
    with NpzWriter(path) as file:
        file.begin("images", batch.dtype, batch.shape[1:])
        for _ in range(_WRITER_BATCHES):
            file.append(batch)
        file.close()


def machine() -> dict[str, Any]:
    """Processor and versions."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    names = ("numpy", "isal")
    return {"processor": model, "cores": 1, **{name: version(name) for name in names}, **versions()}


def _timed(images: int, run: Callable[[], object], out: Path | None = None) -> float:
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    run()
    return images / (time.perf_counter() - start)


def _linked(src: str | os.PathLike[str], place: Path, images: int) -> Path:
    """A tree of `images` links to the files of `src`."""
    collection = FolderSource(src)
    plan = Plan(collect(collection.groups()), 1)
    items = plan.items(0, plan.item_count)
    for number in range(images):
        item = items[number % len(items)]
        folder = place / f"class-{number * 100 // images:03}"
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink(os.fsdecode(collection.local_path(item.path)), folder / f"{number:08}{Path(item.path).suffix}")
    return place


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
