"""Builds that use all cores, compared with one reference loop per core and with the script that people write."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import BuildConfig
from ..machine.environment import Choice, usable_cpus
from ..sources.folders.folder import FolderSource
from .rates import Tick, Way
from .setup import Setup

_SHARDS_A_CORE = 4
_SCRIPT_THREADS = 8
_SCRIPT_IMAGES = 256  # the script is slow, and its rate does not depend on this number
_MEAN, _STD = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def ways(setup: Setup) -> dict[str, tuple[tuple[str, ...], Way]]:
    """Builds of float32 and uint8 that use all cores, and what to compare them with: baselines and way by name."""
    found: dict[str, tuple[tuple[str, ...], Way]] = {}
    for dtype in ("float32", "uint8"):
        shard_size = max(1, setup.plan.item_count // (_SHARDS_A_CORE * usable_cpus()))
        given = {"dtype": dtype, "workers": usable_cpus(), "shard_size": shard_size}
        config = BuildConfig(**{**setup.config.model_dump(), **given})
        cores = Setup.of(config, setup.choice, setup.source, setup.place)
        found[f"{usable_cpus()} loops {dtype}"] = ((), partial(_on_all_cores, setup=cores, work=Setup.looped))
        baselines = (f"{usable_cpus()} loops {dtype}", *(["usual script"] if dtype == "float32" else []))
        found[f"all cores {dtype}"] = (baselines, cores.built)
    return {"usual script": ((), lambda tick: _usual_script(tick, setup)), **found}


def resized(tick: Tick, setup: Setup) -> None:
    """Decodes and resizes on all cores, and keeps nothing."""
    _on_all_cores(tick, setup, _resize)


def _resize(setup: Setup, tick: Tick, shards: Iterable[int]) -> None:
    setup.bare(tick, "resize", shards)


def _on_all_cores(tick: Tick, setup: Setup, work: Callable[[Setup, Tick, Iterable[int]], None]) -> None:
    """Runs `work` in one process per worker, each of which asks for a shard when it needs one."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pipes: list[Connection] = []
        for number in range(setup.tuning.workers):
            here, there = context.Pipe()
            place = setup.place / f"core-{number}"
            arguments = (there, work, os.fspath(setup.source.location), os.fspath(place), setup.config, setup.choice)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            stack.callback(process.join)
            stack.callback(here.close)  # ends the process after an error
            there.close()  # so that `recv` raises EOFError if the process dies
            pipes.append(here)
        for pipe in pipes:
            pipe.recv()  # the process is ready
        tick(0)
        shards = iter(range(setup.plan.shard_count))
        for pipe in pipes:
            pipe.send(next(shards, None))
        while pipes:
            for ready in wait(pipes):
                assert isinstance(ready, Connection)
                images, more = ready.recv()
                tick(images)
                if more:
                    ready.send(next(shards, None))
                else:
                    pipes.remove(ready)


def _serve(
    pipe: Connection,
    work: Callable[[Setup, Tick, Iterable[int]], None],
    src: str,
    place: str,
    config: BuildConfig,
    choice: Choice,
) -> None:
    os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"
    Path(place).mkdir(exist_ok=True)
    images = 0

    def tick(count: int, when: float | None = None, /) -> None:
        nonlocal images
        images += count

    def shards() -> Iterator[int]:
        nonlocal images
        while True:
            pipe.send((images, True))
            images = 0
            if (shard := pipe.recv()) is None:
                return
            yield shard

    work(Setup.of(config, choice, FolderSource(src), Path(place)), tick, shards())
    pipe.send((images, False))


def _usual_script(tick: Tick, setup: Setup) -> None:
    """Decodes and resizes with Pillow in eight threads, then calls `np.stack` and `np.savez_compressed`."""
    assert setup.config.size is not None
    height, width = setup.config.size

    def load(path: str) -> NDArray[Any]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        values: NDArray[Any] = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    items = setup.plan.items(0, min(setup.plan.item_count, _SCRIPT_IMAGES))
    with ThreadPoolExecutor(_SCRIPT_THREADS) as pool:
        rows = list(pool.map(load, (os.fsdecode(setup.source.local_path(item)) for item in items)))
    np.savez_compressed(
        setup.place / "script.npz", images=np.stack(rows), labels=np.array([item.label or 0 for item in items])
    )
    tick(len(items))
