"""The kernels, the sweep, and whole builds, measured."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from runner import Context

from gpu_npz import BuildConfig, build
from gpu_npz.bench import sweep as bench
from gpu_npz.bench import worker as worker_cost
from gpu_npz.bench.rates import folder_of
from gpu_npz.preprocess.normalize import NumpyNormalizer
from steps.machine import engine_use

_BATCH = (256, 224, 224, 3)
_REPEATS = 50
_PER_IMAGE = ("standardize", "minmax", "maxabs", "l2")


def kernels(context: Context) -> dict[str, Any]:
    """Normalized rows equal NumPy's to the bit, and how long the kernel and its copy to the host take."""
    import cupy

    from gpu_npz.preprocess.normalize_cuda import CudaNormalizer

    pixels = np.random.default_rng(0).integers(0, 256, _BATCH, np.uint8)
    kept = np.arange(_BATCH[0])[np.arange(_BATCH[0]) % 5 > 0]
    on_gpu = cupy.asarray(pixels)
    times: dict[str, dict[str, float]] = {}
    kinds = [*itertools.product(("float32", "float16", "uint8"), ("NCHW", "NHWC"), ("imagenet",))]
    kinds += [("float32", "NCHW", kind) for kind in _PER_IMAGE]
    for dtype, layout, normalize in kinds:
        kind = {"dtype": dtype, "layout": layout, "normalize": "none" if dtype == "uint8" else normalize}
        config = BuildConfig(**kind)
        ours, theirs = CudaNormalizer(config, 0), NumpyNormalizer(config)
        shape = (len(kept), 3, 224, 224) if layout == "NCHW" else (len(kept), *_BATCH[1:])
        found, right = ours.allocate(shape), theirs.allocate(shape)
        found.view(np.uint8)[...] = 170
        ours.apply(on_gpu, kept, found)()
        theirs.apply(pixels, kept, right)()
        assert found.tobytes() == right.tobytes(), f"{kind}: rows differ from NumPy's"
        spent = {}
        for name, run in (("kernel", ours.launch), ("kernel and copy", ours.apply)):
            start = time.perf_counter()
            for _ in range(_REPEATS):
                run(on_gpu, kept, found)()
            spent[name] = (time.perf_counter() - start) / _REPEATS / len(kept) * 1e6
        times[f"{dtype} {layout} {kind['normalize']}"] = spent
    shown = {name: f"{spent['kernel']:.2f}/{spent['kernel and copy']:.2f}" for name, spent in times.items()}
    return {
        "us_per_image": times,
        "summary": [
            "equal to NumPy's; us per image, without and with the copy:",
            ", ".join(f"{name} {spent}" for name, spent in shown.items() if "NCHW" in name),
        ],
    }


def worker(context: Context) -> dict[str, Any]:
    """What a worker's main thread costs per image beside the decoder."""
    config = BuildConfig(**context.settings)
    found = worker_cost.measure(config, images=20_480 if context.on_gpu else 2048, rounds=3, folder=context.place)
    stages = ", ".join(f"{name} {cost:.2f}" for name, cost in found.stages.items())
    return {**found.to_json(), "summary": [f"{found.total:.2f} us per image ({stages})"]}


def sweep(context: Context) -> dict[str, Any]:
    """The fastest options for uint8."""
    logging.basicConfig(level=logging.INFO)  # the rates so far, if it fails or hangs
    config = BuildConfig(**context.settings, dtype="uint8")
    given = {"seconds": 90.0, "cell_s": 3.0} if context.on_gpu else {"seconds": 6.0, "cell_s": 0.1}
    found = bench.sweep(context.many, config, folder=context.place, **given)
    trials = [f"{trial.images_per_second:.0f} {_named(trial.options)}" for trial in found.trials]
    lines = [", ".join(trials[start : start + 6]) for start in range(0, len(trials), 6)]
    builds = "; ".join(f"build {each.images_per_second:.0f} with {_named(each.options)}" for each in found.builds)
    return {
        **found.to_json(),
        "summary": [f"use {_named(found.options)}: {found.gain:.2f} of the defaults' rate", *lines, builds],
    }


def _named(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items()) or "defaults"


def built(context: Context, dtype: str) -> dict[str, Any]:
    """A whole build, of as many images as there is room for."""
    image_bytes = 224 * 224 * 3 * np.dtype(dtype).itemsize
    room = int(shutil.disk_usage(context.place).free * 0.6) // image_bytes
    limit = min(context.images, room, 40_000 if dtype == "float32" else context.images)
    config = BuildConfig(**context.settings, dtype=dtype, limit=limit, max_rejects="100%")
    with folder_of(Path(context.place, "out")) as out, engine_use() as percents:
        report = build(context.many, out, config)
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stage_seconds.items())
    return {
        "report": asdict(report),
        "engine_percents": percents,
        "summary": [
            f"{report.images_per_second:.0f} images/s, {report.built_items} images, start-up "
            f"{report.startup_seconds:.1f} s, teardown {report.teardown_seconds:.1f} s, "
            f"engines {max(percents, default='?')}%",
            f"seconds by stage: {stages}; GPU memory {report.gpu_memory_bytes / 2**30:.1f} GiB",
        ],
    }
