"""A script that writes a folder of images as shards or as another library's dataset, for `bench writers`.

    PYTHON peers.py versions      prints the versions of the packages of `NEEDED`, as JSON by name
    PYTHON peers.py NAME JOB      runs a writer by its name; JOB is a `Job` in JSON

Other libraries are installed in an environment of their own, so this file imports gpu_npz only where it builds. All
writers make the same rows with the same number of workers, and use their library as its documentation does. Rates count
from the first row to the last, plus the time that it takes to flush the output. What a library waits for after its last
row does not count.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from multiprocessing import Pool
from pathlib import Path
from typing import Any, TypedDict

NEEDED = {  # by writer
    "litdata": ("litdata", "numpy", "pillow"),
    "mds": ("mosaicml-streaming", "numpy", "pillow"),
    "savez": ("numpy", "pillow"),
}
_IN_ITS_PLACE = {"pillow": "pillow-simd"}
SPAN = "span.json"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_CHUNK_BYTES = "64MB"  # of litData, as in its documentation; the default of MDSWriter is 64 MiB
_GROUPS_A_WORKER = 2  # as in the documentation of MDSWriter
_SAVEZ_ROWS = 256
_TIMES = "times"

Entry = tuple[str, int]  # the path of an image, and its label


class Job(TypedDict):
    """What a writer does.

    Attributes:
        src: a folder of class folders.
        out: an empty folder.
        scratch: an empty folder for the time of each row, and for the result, which is a `Span` in JSON.
        workers: the number of processes, or of threads.
        dtype: float32, normalized as ImageNet is, or uint8.
        size: height and width.
        config: the settings of a build, which include all of the above; unused by the other writers.
    """

    src: str
    out: str
    scratch: str
    workers: int
    dtype: str
    size: tuple[int, int]
    config: dict[str, Any]


class Span(TypedDict):
    """What a writer did: `images` were made from the time `first` to `last`, of `time.perf_counter()`."""

    images: int
    first: float
    last: float


def main(arguments: list[str]) -> None:
    """Runs the script."""
    if arguments == ["versions"]:
        sys.stdout.write(json.dumps(_versions()))
        return
    name, text = arguments
    job: Job = json.loads(text)
    span = _WRITERS[name](job)
    start = time.perf_counter()
    for folder, _, files in os.walk(job["out"]):
        for path in [*files, "."]:
            descriptor = os.open(os.path.join(folder, path), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    span["last"] += time.perf_counter() - start
    Path(job["scratch"], SPAN).write_text(json.dumps(span))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in sorted({package for packages in NEEDED.values() for package in packages}):
        for name in (package, _IN_ITS_PLACE.get(package, package)):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(name)
    return found


def _entries(job: Job) -> list[Entry]:
    classes = sorted(Path(job["src"]).iterdir())
    return [(str(path), label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]


def _sample(entry: Entry, job: Job) -> dict[str, Any]:
    """An image as a row (3, height, width), and its label. Large JPEGs are decoded at a half or less, as by a build."""
    import numpy as np
    from PIL import Image

    path, label = entry
    height, width = job["size"]
    with Image.open(path) as image:
        image.draft(None, (2 * width, 2 * height))
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    row = np.ascontiguousarray(pixels.transpose(2, 0, 1), job["dtype"])
    if job["dtype"] == "float32":
        mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (_MEAN, _STD))
        row *= 1 / (255 * std)
        row -= mean / std
    os.write(_times(job["scratch"]), struct.pack("d", time.perf_counter()))
    return {"image": row, "label": label}


@functools.cache
def _times(scratch: str) -> int:
    return os.open(os.path.join(scratch, _TIMES), os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _span(job: Job) -> Span:
    """The span of a writer that has called `_sample` for each row."""
    times = [seconds for (seconds,) in struct.iter_unpack("d", Path(job["scratch"], _TIMES).read_bytes())]
    return Span(images=len(times) - 1, first=min(times), last=max(times))


def _build(job: Job) -> Span:
    """Our build. Each worker's first batch does not count, since most of it comes before the first report of any."""
    from gpu_npz.builder.build import build
    from gpu_npz.config import BuildConfig
    from gpu_npz.workers.events import Committed, Progress

    times = []

    def progress(event: object) -> None:
        if isinstance(event, Progress | Committed):
            times.append(time.perf_counter())

    report = build(job["src"], job["out"], BuildConfig(**job["config"]), progress=progress)
    images = report.rows - report.tuning.workers * report.tuning.batch_size
    return Span(images=images, first=times[0], last=times[-1])


def _litdata(job: Job) -> Span:
    """litData: `optimize`."""
    from litdata import optimize

    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[name] = os.path.join(job["scratch"], name)  # it would empty /tmp/chunks and /tmp/data
    optimize(
        fn=functools.partial(_sample, job=job),
        inputs=_entries(job),
        output_dir=job["out"],
        chunk_bytes=_CHUNK_BYTES,
        num_workers=job["workers"],
    )
    return _span(job)


def _mds(job: Job) -> Span:
    """MosaicML Streaming: an `MDSWriter` for each group of images, in a pool of processes; then `merge_index`."""
    from streaming.base.util import merge_index

    entries = _entries(job)
    groups = _GROUPS_A_WORKER * job["workers"]
    tasks = [(job, entries[group::groups], os.path.join(job["out"], str(group))) for group in range(groups)]
    with Pool(job["workers"]) as pool:
        for _ in pool.imap(_mds_group, tasks):
            pass
    merge_index(job["out"], keep_local=True)
    return _span(job)


def _mds_group(task: tuple[Job, list[Entry], str]) -> None:
    from streaming import MDSWriter

    job, entries, out = task
    height, width = job["size"]
    columns = {"image": f"ndarray:{job['dtype']}:3,{height},{width}", "label": "int"}
    with MDSWriter(out=out, columns=columns) as writer:
        for entry in entries:
            writer.write(_sample(entry, job))


def _savez(job: Job) -> Span:
    """The script that people write: a pool of threads, and `numpy.savez`."""
    import numpy as np

    entries = _entries(job)
    load = functools.partial(_sample, job=job)
    with ThreadPoolExecutor(job["workers"]) as pool:
        for start in range(0, len(entries), _SAVEZ_ROWS):
            rows = list(pool.map(load, entries[start : start + _SAVEZ_ROWS]))
            images, labels = (np.stack([row[name] for row in rows]) for name in ("image", "label"))
            np.savez(os.path.join(job["out"], f"{start:08}.npz"), images=images, labels=labels)
    return _span(job)


_WRITERS = {"build": _build, "litdata": _litdata, "mds": _mds, "savez": _savez}

if __name__ == "__main__":
    main(sys.argv[1:])
