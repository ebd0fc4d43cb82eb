"""The rates of each stage of a build and of whole builds, and of the shard writer beside NumPy's and a plain write.

The row of a stage includes the stages before it, and uses the build's own functions, batches and threads. All rows are
measured in one run, in interleaved rounds; only their ratios can be compared with those of another machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..config import BuildConfig
from ..errors import UsageError
from ..machine.environment import choose, inspect
from ..npz.writer import NpzWriter
from ..sources.folders.folder import FolderSource
from . import cores
from .rates import Measurement, Tick, Way, in_turns, linked, machine, on_one_core
from .setup import Setup, flushed, write_all

ROUNDS = 5
IMAGES = {"cuda": 100_000, "cpu": 2_000}
_DTYPES = ("float32", "float16", "uint8")
_WRITER_BATCHES = 4
_WRITER_BATCH_ROWS = 256


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

    Pillow is measured on one core, beside a loop of the same steps, and then on all of them; DALI always has them all.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        config: the settings; the rows after `resize` have its dtype, and whole builds are made of every dtype.
        images: how many images each row processes; 100,000 on a GPU and 2,000 on a CPU if None.
        rounds: how often everything is measured; the rows take turns within a round.
        folder: where to write; the system's temporary folder if None. It needs some 2.5 MB per image.
        say: called with the name of what is measured next.

    Raises:
        UsageError: `resize_mode` is `none`.
        BackendError, SourceError: as `build`.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: rates of images as they are say little; choose another mode, or a --size")
    choice = choose(config, inspect(config))
    if choice.warning:
        say(choice.warning)
    device = "cpu" if choice.gpu is None else str(choice.gpu)
    common = {"device": device, "backend": choice.backend, "workers": 0, "max_rejects": "100%"}
    settings = BuildConfig(**{**config.model_dump(), **common})
    by_pillow = choice.backend == "pillow"
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        place = Path(name)
        source = FolderSource(linked(src, place / "src", images or IMAGES[choice.device]))
        setup = Setup.of(settings, choice, source, place)
        ways = _stages(setup)
        for dtype in _DTYPES:
            typed = BuildConfig(**{**settings.model_dump(), "dtype": dtype})
            whole = Setup.of(typed, choice, source, place)
            baselines: tuple[str, ...] = ("resize",)
            if by_pillow:
                loop = f"loop {dtype}"
                ways[loop] = (baselines, whole.looped)
                baselines = (loop, *baselines)
            ways[f"build {dtype}"] = (baselines, whole.built)
        if by_pillow:
            ways = {name: (baselines, on_one_core(way)) for name, (baselines, way) in ways.items()}
            ways |= cores.ways(setup)
        ways |= _writers(place)
        rows = in_turns(ways, rounds, say)
        provenance = setup.decoder().provenance()
    used = {"images": setup.plan.item_count, "dtype": settings.dtype, "size": settings.size, **asdict(setup.tuning)}
    return Measurement(rows, used, machine(provenance))


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
    """The same float32 rows, written with `write()` and `fsync()`, `numpy.savez` and `fsync()`, and `NpzWriter`."""
    batch = np.random.default_rng(0).normal(size=(_WRITER_BATCH_ROWS, 3, 224, 224)).astype(np.float32)
    path = place / "file.npz"

    def bare_write(tick: Tick) -> None:
        with flushed(path) as descriptor:
            for _ in range(_WRITER_BATCHES):
                write_all(descriptor, batch)
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
