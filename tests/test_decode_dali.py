"""The DALI decoder against Pillow's: pixels within a level or so, verdicts, order, and neighbours of bad images.

Everything runs on DALI's CPU operators, and once more on a GPU where there is one.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from support import file_bytes

from gpu_npz.bench.pictures import paint
from gpu_npz.config import BuildConfig
from gpu_npz.errors import ShardError
from gpu_npz.machine.tuning import Tuning
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.pillow import PillowDecoder
from gpu_npz.sources.base import Batch, Item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import Reject

dali = pytest.importorskip("gpu_npz.preprocess.dali", reason="DALI is not installed", exc_type=ImportError)

Pixels = NDArray[np.uint8]

# Allowed differences of uint8 images from Pillow's: inside, at the border (two pixels), and the mean. Inside, bilinear
# rounds at most a level apart; cubic and Lanczos overshoot, where Pillow clips between its two passes. At the border
# DALI repeats the edge, and Pillow renormalizes the cut kernel. Nearest takes the other one of two equally near pixels.
ALLOWED = {
    "bilinear": (1, 24, 0.4),
    "bicubic": (30, 30, 0.4),
    "lanczos": (45, 45, 0.4),
    "nearest": (255, 255, 4.0),
}
EXACT = (0, 0, 0.0)
GPU_EXTRA = (8, 8, 1.0)  # DALI's own tests allow its GPU decoder a mean of 1 from its CPU decoder


PIPELINES = 1  # of the decoders in this module


@pytest.fixture(params=["cpu", "two pipelines", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(sys.modules[__name__], "PIPELINES", 1 if request.param == "cpu" else 2)
    return 0 if request.param == "gpu" else None


@dataclass
class Outcome:
    """What came of a run of batches, by path."""

    rows: dict[str, Pixels] = field(default_factory=dict)
    rejects: dict[str, Reject] = field(default_factory=dict)
    source_bytes: dict[str, int] = field(default_factory=dict)


def jpeg(pixels: Pixels | Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, "JPEG", **options)
    return file.getvalue()


def damaged_scan(data: bytes) -> bytes:
    """A JPEG whose header is in order and whose data make DALI, and Pillow, fail: they have a marker in their midst."""
    return data[:-500] + b"\xff\xd8\xff\xe0" + data[-496:]


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def pictures(count: int) -> dict[str, bytes]:
    return {f"{n:02d}.jpg": jpeg(paint(60 + n, 111 - n, n)) for n in range(count)}


def config_of(device: int | None, **settings: Any) -> tuple[BuildConfig, Geometry]:
    # Unless reproducible, a GPU may decode an image by another of its engines when its neighbours change.
    config = BuildConfig(**{"size": 64, "normalize": "unit", "reproducible": device is not None, **settings})
    assert config.size is not None
    return config, Geometry.of(config, config.size)


def tuning_of(config: BuildConfig, batch_size: int) -> Tuning:
    load = 0.0 if config.reproducible else None
    return Tuning(1, batch_size, threads=2, pipelines=PIPELINES, prefetch=2, open_shards=1, hw_decoder_load=load)


def decoder_of(root: Path, device: int | None, batch_size: int = 8, **settings: Any) -> Any:
    config, geometry = config_of(device, **settings)
    return dali.DaliDecoder(config, geometry, FolderSource(root), tuning=tuning_of(config, batch_size), device=device)


def batches_of(names: list[str], size: int) -> list[Batch]:
    items = [Item(1000 + number, name, None) for number, name in enumerate(names)]
    return [Batch(0, items[start : start + size], False) for start in range(0, len(items), size)]


def outcome_of(decoder: Any, names: list[str], size: int = 8) -> Outcome:
    """All that the decoder gives, after a look at its order, its types and its counts."""
    outcome = Outcome()
    for batch, decoded in zip(batches_of(names, size), decoder.decode(iter(batches_of(names, size))), strict=True):
        assert decoded.batch == batch
        pixels = decoded.pixels.get() if hasattr(decoded.pixels, "get") else decoded.pixels
        assert pixels.dtype == np.uint8
        assert decoded.kept.dtype == decoded.source_bytes.dtype == np.int64
        kept = [batch.items[position] for position in decoded.kept]
        assert sorted(decoded.kept.tolist()) == decoded.kept.tolist()
        assert [r.index for r in decoded.rejects] == [item.index for item in batch.items if item not in kept]
        assert set(decoded.seconds) == {"read", "decode"}
        outcome.rows |= {item.path: pixels[p] for item, p in zip(kept, decoded.kept.tolist(), strict=True)}
        outcome.rejects |= {reject.path: reject for reject in decoded.rejects}
        outcome.source_bytes |= {item.path: int(n) for item, n in zip(batch.items, decoded.source_bytes, strict=True)}
    return outcome


def by_pillow(root: Path, names: list[str], **settings: Any) -> Outcome:
    config, geometry = config_of(None, **settings)
    with PillowDecoder(config, geometry, FolderSource(root)) as decoder:
        return outcome_of(decoder, names)


def assert_same(ours: dict[str, Pixels], theirs: dict[str, Pixels]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, row in ours.items() if (row != theirs[name]).any()] == []


def compare(what: str, ours: Pixels, theirs: Pixels, allowed: tuple[int, int, float], device: int | None) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    inside, overall, mean = difference[2:-2, 2:-2].max(initial=0), difference.max(), difference.mean()
    print(f"{what}: max {inside} inside, {overall} overall, mean {mean:.3f}")
    limits = allowed if device is None else tuple(map(sum, zip(allowed, GPU_EXTRA, strict=True)))
    assert all(found <= limit for found, limit in zip((inside, overall, mean), limits, strict=True)), (what, limits)


def every_kind_of_jpeg() -> dict[str, bytes]:
    picture = paint(300, 400, 1)
    files = {sampling: jpeg(picture, subsampling=sampling) for sampling in ("4:4:4", "4:2:2", "4:2:0")}
    files |= {"gray": jpeg(picture[..., 0].copy()), "progressive": jpeg(picture, progressive=True)}
    files |= {"cmyk": jpeg(Image.fromarray(picture).convert("CMYK")), "low-quality": jpeg(picture, quality=20)}
    files |= {f"{h}x{w}": jpeg(paint(h, w, 2)) for h, w in ((301, 399), (500, 60), (33, 640), (1, 1))}
    for orientation in range(10):  # 0 and 9 do not exist, and mean nothing
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        files[f"exif-{orientation}"] = jpeg(picture, exif=exif)
    return {f"{kind}.jpg": data for kind, data in files.items()}


@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad", "none"])
def test_every_kind_of_jpeg_looks_as_pillow_decodes_it(mode: str, device: int | None, tmp_path: Path) -> None:
    root = folder(tmp_path, files := every_kind_of_jpeg())
    settings = {"size": (300, 400) if mode == "none" else (128, 130), "resize_mode": mode, "pad_value": 114}
    expected = by_pillow(root, list(files), **settings)
    with decoder_of(root, device, **settings) as decoder:
        outcome = outcome_of(decoder, list(files))
    assert outcome.rejects == expected.rejects
    assert {reject.code for reject in outcome.rejects.values()} == ({"wrong-size"} if mode == "none" else set())
    inside, border, mean = ALLOWED["bilinear"]
    allowed = EXACT if mode == "none" else (border if mode == "pad" else inside, border, mean)
    assert outcome.rows.keys() == expected.rows.keys() != set()
    for name, row in expected.rows.items():
        compare(f"{mode} {name}", outcome.rows[name], row, allowed, device)


@pytest.mark.parametrize("size", [(50, 70), (410, 530)], ids=["down", "up"])
@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize("interpolation", ALLOWED)
def test_every_filter_gives_what_pillows_gives(
    interpolation: str, channels: str, size: tuple[int, int], device: int | None, tmp_path: Path
) -> None:
    root = folder(tmp_path, files := {f"{seed}.jpg": jpeg(paint(197, 223, seed)) for seed in range(4)})
    settings = {"size": size, "interpolation": interpolation, "channels": channels}
    expected = by_pillow(root, list(files), **settings).rows
    inside, border, mean = ALLOWED[interpolation]
    if channels == "gray":  # DALI takes the luma as it is stored, Pillow goes by R,G,B, which saturate
        inside += 16
    with decoder_of(root, device, **settings) as decoder:
        rows = outcome_of(decoder, list(files)).rows
    assert list(rows) == list(files)
    for name, row in rows.items():
        what = f"{interpolation} {channels} {size} {name}"
        compare(what, row, expected[name], (inside, max(inside, border), mean), device)


@pytest.mark.parametrize("size", [8, 3])
def test_bad_images_become_pillows_rejects_and_leave_their_neighbours_alone(
    size: int,
    device: int | None,
    tmp_path: Path,
    bad_kinds: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    good, whole = pictures(40), jpeg(paint(90, 120, 3))
    frame, table = whole.index(b"\xff\xc0"), whole.index(b"\xff\xc4")
    told = (
        {f"{kind}.jpg": file_bytes(kind) for kind in bad_kinds}
        | {  # what the graph can tell before DALI decodes
            "one-byte.jpg": b"\xff",
            "tail-only.jpg": b"no image\xff\xd9",
            "no-height.jpg": whole[: frame + 5] + b"\0\0" + whole[frame + 7 :],
            "12-bit.jpg": whole[: frame + 4] + b"\x0c" + whole[frame + 5 :],
            "no-scan.jpg": whole[:table] + b"\xff\xd9",
            "marked-text.jpg": b"\xff\xd8 no image, whatever its first and last bytes say \xff\xd9",
        }
    )
    failing = {
        "marker.jpg": damaged_scan(whole),
        "broken-table.jpg": whole[: table + 5] + b"\xff" * 16 + whole[table + 21 :],
    }
    others = {f"{kind}.jpg": file_bytes(kind) for kind in ("png-named-jpg", "zeros-behind", "alpha")}
    root = folder(tmp_path, good | told | failing | others | {"sparse.jpg": b""})
    os.truncate(root / "sparse.jpg", 1 << 40)
    (root / "folder.jpg").mkdir()
    rejected = [*told, *failing, "missing.jpg", os.fsdecode(b"miss\xff.jpg"), "folder.jpg", "sparse.jpg"]
    names = [*itertools.chain(*zip(good, rejected, strict=False)), *others, *list(good)[len(rejected) :]]
    expected = by_pillow(root, names)
    with decoder_of(root, device, size) as decoder:
        clean = outcome_of(decoder, [*good, *told, *others], size)
        assert "DALI failed" not in caplog.text
        outcome = outcome_of(decoder, names, size)
    assert list(outcome.rejects) == rejected
    assert outcome.rejects == expected.rejects
    assert outcome.source_bytes == expected.source_bytes
    assert_same(outcome.rows, clean.rows)
    assert_same({name: outcome.rows[name] for name in others}, {name: expected.rows[name] for name in others})


def test_batches_that_fail_one_after_the_other_leave_order_and_pixels_alone(device: int | None, tmp_path: Path) -> None:
    whole = jpeg(paint(90, 120, 0))
    root = folder(tmp_path, (good := pictures(20)) | {"bad.jpg": damaged_scan(whole)})
    with decoder_of(root, device, 4) as decoder:
        clean = outcome_of(decoder, list(good), 4).rows
        for every in (1, 2, 3, 7):
            names = [name for n, path in enumerate(good) for name in ([path, "bad.jpg"] if n % every == 0 else [path])]
            outcome = outcome_of(decoder, names, 4)
            assert list(outcome.rows) == list(clean)
            assert_same(outcome.rows, clean)
        repair, runs = decoder._repair.run, []

        def run(feed: Any, stream: int | None) -> Any:
            runs.append(len(feed[0][1][0]))
            return repair(feed, stream)

        decoder._repair.run = run
        outcome_of(decoder, ["bad.jpg", *list(good)[:3]], 4)
        assert runs == [3, 1]  # no search for the bad one


def test_batches_of_any_size_and_any_number_of_calls_give_the_same_pixels(device: int | None, tmp_path: Path) -> None:
    root, names = folder(tmp_path, pictures(9)), list(pictures(9))
    with decoder_of(root, device) as decoder:
        first = outcome_of(decoder, names).rows
        for size in (1, 5, 8):
            assert_same(outcome_of(decoder, names, size).rows, first)
        assert list(decoder.decode([])) == []
        left_early = decoder.decode(batches_of(names, 2))
        next(left_early)
        left_early.close()
        assert_same(outcome_of(decoder, names[::-1], 3).rows, first)
        with pytest.raises(ValueError, match="9 items; allowed are 1 to 8"):
            list(decoder.decode(batches_of(names, 9)))


@pytest.mark.parametrize("error", [RuntimeError("mine"), MemoryError(), KeyError("plan"), ShardError("no plan")])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_an_exception_of_the_batches_comes_unchanged_after_the_batches_before_it(
    error: Exception, before: int, device: int | None, tmp_path: Path
) -> None:
    def batches() -> Iterator[Batch]:
        yield from batches_of(["00.jpg"] * before, 1)
        raise error

    with decoder_of(folder(tmp_path, pictures(1)), device) as decoder:
        got = []
        with pytest.raises(type(error)) as raised:
            got.extend(decoder.decode(batches()))
        assert raised.value is error
        assert len(got) == before
        assert len(outcome_of(decoder, ["00.jpg"]).rows) == 1


def test_what_is_no_plain_file_never_reaches_dali(device: int | None, tmp_path: Path) -> None:
    root = folder(tmp_path, pictures(1))
    os.mkfifo(root / "pipe.jpg")  # DALI would wait for it
    (root / "memory.jpg").symlink_to("/proc/self/mem")
    (root / "empty.jpg").touch()
    with open(root / "huge.jpg", "wb") as file:
        os.truncate(file.fileno(), 10 << 30)  # DALI would read all of it
    names = ["00.jpg", "pipe.jpg", "memory.jpg", "empty.jpg", "huge.jpg", "missing.jpg"]
    with decoder_of(root, device) as decoder:
        outcome = outcome_of(decoder, names)
    assert len(outcome.rows) == 1
    assert {name: reject.code for name, reject in outcome.rejects.items()} == {
        "pipe.jpg": "unreadable", "memory.jpg": "unreadable", "empty.jpg": "empty", "huge.jpg": "too-large",
        "missing.jpg": "missing",
    }  # fmt: skip


def test_trouble_with_reading_is_no_reject(device: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(source: FolderSource, item: Item) -> bytes:
        number = errno.ENOENT if item.path == "missing.jpg" else errno.ESTALE
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", (0.0,))
    monkeypatch.setattr(FolderSource, "read", stale)
    root = folder(tmp_path, pictures(1))
    os.mkfifo(root / "trouble.jpg")  # which DALI does not get
    for names in (["00.jpg", "trouble.jpg"], ["00.jpg", "trouble.jpg", "missing.jpg"]):  # sorted out; failing
        with decoder_of(root, device) as decoder, pytest.raises(ShardError, match=r"reading 'trouble.jpg' failed"):
            outcome_of(decoder, names)


def test_what_is_or_becomes_too_large_never_reaches_dali(
    device: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shapes = {"fits.jpg": (100, 100), "larger.jpg": (101, 100), "line.jpg": (1, 20_000), "column.jpg": (9000, 1)}
    root = folder(tmp_path, {name: jpeg(np.zeros((*shape, 3), np.uint8)) for name, shape in shapes.items()})
    for settings, rejected in (
        ({"max_pixels": 10_000}, {"larger.jpg", "line.jpg"}),
        ({"resize_mode": "center-crop"}, {"line.jpg"}),  # which becomes 73 x 1,460,000
        ({"resize_mode": "center-crop", "max_pixels": 48_000_000}, {"line.jpg"}),
        ({"resize_mode": "center-crop", "max_pixels": 47_000_000}, {"line.jpg", "column.jpg"}),
        ({"resize_mode": "pad", "max_pixels": 2**40}, set()),
    ):
        with decoder_of(root, device, **settings) as decoder:
            outcome = outcome_of(decoder, list(shapes))
        assert outcome.rejects.keys() == rejected
        assert outcome.rejects == by_pillow(root, list(shapes), **settings).rejects
    assert "DALI failed" not in caplog.text


def test_want_of_memory_splits_the_batch_and_never_changes_the_decoder(device: int | None, tmp_path: Path) -> None:
    root = folder(tmp_path, good := pictures(7))
    names = [*good, "missing.jpg"]
    with decoder_of(root, device) as decoder:
        clean = outcome_of(decoder, names).rows
        most, message = 2, "Error in MIXED operator: CUDA allocation failed"
        (decoder._repair,) = decoder._decoding(decoder._names, repairing=True)
        repair = decoder._repair.run

        def run(feed: Any, stream: Any) -> Any:
            return repair(feed, stream) if len(feed[0][1][0]) <= most else [(None, RuntimeError(message))]

        def failing(main: Any) -> Any:
            return lambda *given: ((read, RuntimeError(message)) for read, _ in main(*given))

        decoder._repair.run = run
        for pipeline in decoder._main:
            pipeline.run = failing(pipeline.run)
        assert_same(outcome_of(decoder, names).rows, clean)
        most, message = 0, "std::bad_alloc"
        with pytest.raises(ShardError, match="no memory"):
            outcome_of(decoder, names)
        message = "CUDA runtime API error cudaErrorIllegalAddress (700)"
        with pytest.raises(ShardError, match="error state"):
            outcome_of(decoder, names)


def test_a_batch_that_comes_out_of_turn_is_an_error(device: int | None, tmp_path: Path) -> None:
    with decoder_of(folder(tmp_path, pictures(4)), device) as decoder:
        decoding = decoder.decode(batches_of(list(pictures(4)), 1))
        next(decoding)
        decoder._main[0]._pipeline.run()  # as if DALI had lost a batch
        with pytest.raises(ShardError, match="out of turn"):
            list(decoding)


def test_the_environment_is_json_and_names_what_decides_the_pixels(device: int | None, tree: Path) -> None:
    provenance = decoder_of(tree, device).provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["backend"] == "dali"
    assert provenance["device"] == ("cpu" if device is None else "cuda")
    assert {"dali", "nvimgcodec", "pillow", "libjpeg"} <= provenance.keys()
    assert ("gpu" in provenance) == (device is not None)


def test_no_thread_outlives_the_decoder_even_while_its_error_is_kept(tmp_path: Path) -> None:
    def batches() -> Iterator[Batch]:
        yield from batches_of(["00.jpg", "missing.jpg"], 2)
        raise error

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before, error, root = threads(), KeyError("plan"), folder(tmp_path, pictures(1))
    with decoder_of(root, None) as decoder:
        with pytest.raises(KeyError):
            list(decoder.decode(batches()))
        assert threads() > before + 2
    deadline = time.monotonic() + 10  # the system may count a thread for a moment after it has ended
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


@pytest.mark.gpu
def test_pixels_are_ordered_on_the_stream_that_was_given(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    root, names = folder(tmp_path, pictures(30)), list(pictures(30))
    with decoder_of(root, 0) as decoder:
        expected = outcome_of(decoder, names).rows
    config, geometry = config_of(0)
    stream, source, tuning = cupy.cuda.Stream(non_blocking=True), FolderSource(root), tuning_of(config, 8)
    with (
        dali.DaliDecoder(config, geometry, source, tuning=tuning, device=0, stream=stream) as decoder,
        stream,
    ):
        rows = np.concatenate([cupy.asnumpy(decoded.pixels) for decoded in decoder.decode(batches_of(names, 8))])
    assert_same(dict(zip(names, rows, strict=True)), expected)
