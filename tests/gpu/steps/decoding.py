"""Whether DALI's decoders give the right pixels: with bad neighbours, on a stream, turned, damaged, beside Pillow's."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from runner import Context

import gpu_npz.audit.parity as audit
from gpu_npz.bench.rates import folder_of
from gpu_npz.bench.setup import Setup
from gpu_npz.config import BuildConfig
from gpu_npz.machine.environment import choose, inspect
from gpu_npz.preprocess.base import on_host
from gpu_npz.sources.folders.folder import FolderSource

MEAN_LEVELS = 1.0  # from Pillow; see gpu_npz.audit.parity
_INTACT = 253
_DAMAGED = 64
_ROUNDS = 3


@dataclass
class Outcome:
    """Rows, uint8 (H, W, 3), and the codes of rejects, by path."""

    rows: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    rejects: dict[str, str] = field(default_factory=dict)


def decoded(context: Context, folder: Path, *, stream: Any = None, **settings: Any) -> Outcome:
    """All images of a folder, by DALI unless `backend` says otherwise."""
    by_pillow = {"device": "cpu"} if settings.get("backend") == "pillow" else context.settings
    config = BuildConfig(**{"dtype": "uint8", "labels": "none", **by_pillow, **settings})
    choice = choose(config, inspect(config))
    outcome = Outcome()
    setup = Setup.of(config, choice, FolderSource(folder), Path(context.place))
    with setup.decoder(stream) as decoder:
        for batch in decoder.decode(setup.batches()):
            if stream is not None:
                stream.synchronize()
            pixels = np.array(on_host(batch.pixels)) if len(batch.kept) else None
            for position in batch.kept.tolist():
                assert pixels is not None
                outcome.rows[batch.batch.items[position].path] = pixels[position]
            outcome.rejects |= {reject.path: reject.code for reject in batch.rejects}
    return outcome


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean absolute difference in levels."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def jpegs(context: Context, count: int) -> list[bytes]:
    """The contents of so many plain JPEGs of SRC, some of them several times if it has fewer."""
    found = []
    for path in sorted(path for path in Path(context.src).rglob("*") if path.is_file()):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info:
                found.append(data)
    return list(itertools.islice(itertools.cycle(found), count))


def written(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """The folder, with these files in it."""
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def differing(one: Outcome, other: Outcome) -> list[str]:
    """The paths of the rows that are not equal to the last bit, or missing on a side."""
    return sorted(
        path
        for path in one.rows.keys() | other.rows.keys()
        if path not in one.rows or path not in other.rows or not np.array_equal(one.rows[path], other.rows[path])
    )


def bad_files_in_a_batch(context: Context) -> dict[str, Any]:
    """A batch with a text file, an empty file and half a file: their rejects, and the rows of all others."""
    intact = {f"{number:03}.jpg": data for number, data in enumerate(jpegs(context, _INTACT))}
    half = next(iter(intact.values()))
    bad = {"050-text.jpg": b"no image\n", "100-empty.jpg": b"", "150-half.jpg": half[: len(half) // 2]}
    with folder_of(Path(context.place, "files")) as folder:
        alone = decoded(context, written(folder, intact), reproducible=True)
        beside = decoded(context, written(folder, bad), reproducible=True)
        pillow = decoded(context, folder, backend="pillow")
    changed = differing(alone, beside)
    means = [difference(row, pillow.rows[path]) for path, row in beside.rows.items()]
    assert beside.rejects == pillow.rejects, (beside.rejects, pillow.rejects)
    assert not changed, f"{len(changed)} rows changed beside bad files: {changed[:5]}"
    assert np.mean(means) <= MEAN_LEVELS, means
    return {"rejects": beside.rejects, "summary": [f"the rejects of Pillow; mean {np.mean(means):.3f} levels from it"]}


def outputs_on_a_stream(context: Context) -> dict[str, Any]:
    """Pixels after `run(stream)` equal those after `run()`, and CPU outputs equal what was given."""
    wrong = _cpu_outputs_that_differ(context)
    assert not wrong, f"{len(wrong)} CPU outputs differ: {wrong[:5]}"
    stream = None
    if context.on_gpu:
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
    with folder_of(Path(context.place, "files")) as folder:
        written(
            folder,
            {
                f"{number:03}.jpg": data
                for number, data in enumerate(jpegs(context, 4 * _INTACT if context.on_gpu else 40))
            },
        )
        for load in (0.0, 1.0):
            ours = decoded(context, folder, stream=stream, hw_decoder_load=load)
            waited = decoded(context, folder, hw_decoder_load=load)
            changed = differing(ours, waited)
            assert not changed, f"load {load}: {len(changed)} of {len(ours.rows)} rows differ: {changed[:5]}"
    return {"summary": ["CPU outputs and pixels are equal with and without a stream, at loads 0 and 1"]}


def _cpu_outputs_that_differ(context: Context) -> list[int]:
    """The numbers of the runs in which an output on the CPU was not what went in, beside work on the GPU."""
    from nvidia.dali import fn, pipeline_def, types

    fed: list[NDArray[np.int64]] = []

    def source() -> list[Any]:
        fed.append(np.random.default_rng(len(fed)).integers(0, 1 << 40, (64, 16)))
        return [fed[-1], np.zeros((64, 200, 200, 3), np.uint8)]

    @pipeline_def(batch_size=64, num_threads=4, device_id=0 if context.on_gpu else None, prefetch_queue_depth=3)
    def graph() -> Any:
        numbers, images = fn.external_source(source, num_outputs=2, dtype=[types.INT64, types.UINT8], ndim=[1, 3])
        if context.on_gpu:
            images = fn.resize(images.gpu(), size=[400, 400])
        return numbers + 1, images

    stream = None
    if context.on_gpu:
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
    pipeline, wrong = graph(), []
    pipeline.build()
    for number in range(300 if context.on_gpu else 5):
        numbers, _ = pipeline.run(stream)
        if not np.array_equal(np.asarray(numbers.as_tensor()), fed[number] + 1):
            wrong.append(number)
    return wrong


def orientations(context: Context) -> dict[str, Any]:
    """Images under each EXIF orientation, beside Pillow's rows of them."""
    contents = {}
    for number, data in enumerate(jpegs(context, 8 * 16)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = number % 8 + 1
        file = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.save(file, "JPEG", quality=90, exif=exif)
        contents[f"{number % 8 + 1}-{number:03}.jpg"] = file.getvalue()
    with folder_of(Path(context.place, "files")) as folder:
        written(folder, contents)
        means: dict[str, dict[str, float]] = {}
        for mode in ("stretch", "center-crop", "pad"):
            pillow = decoded(context, folder, backend="pillow", resize_mode=mode)
            for load in (0.0, 1.0):
                rows = decoded(context, folder, resize_mode=mode, hw_decoder_load=load).rows
                found = means[f"{mode} at load {load}"] = {}
                for orientation in "12345678":
                    paths = [path for path in rows if path.startswith(orientation)]
                    found[orientation] = float(np.mean([difference(rows[p], pillow.rows[p]) for p in paths]))
    worst = max(mean for found in means.values() for mean in found.values())
    assert worst <= MEAN_LEVELS, means
    return {"means": means, "summary": [f"all eight within a mean of {worst:.3f} levels of Pillow"]}


def parity(context: Context, load: float) -> dict[str, Any]:
    """All images of SRC beside Pillow's rows of them."""
    sides = ("pillow", "dali-gpu" if context.on_gpu else "dali-cpu")
    config = BuildConfig(device="0" if context.on_gpu else "cpu", hw_decoder_load=load)
    found = audit.parity(context.src, config, sides, images=1000)  # type: ignore[arg-type]
    assert found.mean <= MEAN_LEVELS, found.to_json()
    every = next(kind for kind in found.kinds if kind.kind == "all")
    summary = f"{every.images} images: mean {every.mean:.3f}, p99 {every.p99}, max {every.max} levels from Pillow"
    return {**found.to_json(), "summary": [f"{summary}; {len(found.verdicts)} verdicts differ"]}


def damaged_files(context: Context, load: float) -> dict[str, Any]:
    """Files with damaged data and an intact end, which a decoder may take: what they become, and their neighbours."""
    random = np.random.default_rng(0)
    intact = {f"{number:03}.jpg": data for number, data in enumerate(jpegs(context, _INTACT - _DAMAGED))}
    damaged = {}
    for number, data in enumerate(jpegs(context, _DAMAGED)):
        scan = data.rindex(b"\xff\xda") + 14
        content = bytearray(data)
        if number % 2:
            for place in random.integers(scan, len(data) - 2, 20).tolist():
                content[place] ^= 1 << int(random.integers(8))
        else:  # half of the data, then the end
            del content[(scan + len(data)) // 2 : -2]
        damaged[f"{number * 3:03}-damaged.jpg"] = bytes(content)
    with folder_of(Path(context.place, "files")) as folder:
        alone = decoded(context, written(folder, intact), hw_decoder_load=load)
        written(folder, damaged)
        rounds = [decoded(context, folder, hw_decoder_load=load) for _ in range(_ROUNDS)]
        pillow = decoded(context, folder, backend="pillow")
    beside = [[difference(found.rows[path], row) for path, row in alone.rows.items()] for found in rounds]
    changed = [sum(mean > 0 for mean in means) for means in beside]
    unequal = [len(differing(rounds[0], found)) for found in rounds[1:]]
    both = [path for path in damaged if path in rounds[0].rows and path in pillow.rows]
    means = [difference(rounds[0].rows[path], pillow.rows[path]) for path in both]
    other = sorted(rounds[0].rejects.keys() ^ pillow.rejects.keys())
    most = max(map(max, beside))
    assert not any(changed), f"intact rows changed beside damaged files: {changed} by round, by up to {most:.2f} levels"
    far = sum(mean > 8 for mean in means)
    return {
        "means": sorted(means, reverse=True),
        "other_verdicts": other,
        "unequal": unequal,
        "summary": [
            f"intact rows unchanged; of {len(damaged)} damaged {len(both)} have rows, {far} of them over 8 levels from "
            f"Pillow; {len(other)} verdicts differ; {unequal} rows differ from run to run"
        ],
    }
