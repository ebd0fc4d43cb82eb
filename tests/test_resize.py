"""Resizing by cykooz-resizer: close to Pillow's, recorded, kept on resume, and left to Pillow where it is missing."""

from __future__ import annotations

import functools
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import MakeTree, contents, cpu_config, decode, file_bytes

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.audit.parity import parity
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.manifest import Manifest
from gpu_npz.errors import BackendError, MismatchError, UsageError
from gpu_npz.preprocess import resize

pytest.importorskip("cykooz_resizer")
settings = functools.partial(cpu_config, shard_size=2)


@pytest.fixture
def without_simd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cykooz-resizer cannot be imported."""
    monkeypatch.setattr(resize, "_library", lambda: None)
    resize._warn_once.cache_clear()
    yield
    resize._warn_once.cache_clear()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def src(make_tree: MakeTree) -> Path:
    return make_tree(
        {"a/0.jpg": "jpeg", "a/1.jpg": "gray", "b/0.jpg": "exif-6", "b/1.jpg": "cmyk", "b/2.png": "palette"}
    )


@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad"])
@pytest.mark.parametrize("channels", ["rgb", "gray"])
def test_pixels_are_within_two_levels_of_pillows(good_kinds: tuple[str, ...], mode: str, channels: str) -> None:
    for kind in good_kinds:
        given: dict[str, Any] = {"size": "24x36", "resize_mode": mode, "channels": channels}
        ours, pillows = (decode(file_bytes(kind), resizer=each, **given) for each in ("simd", "pillow"))
        difference = np.abs(ours.astype(int) - pillows)
        assert difference.max() <= 2, kind
        assert difference.mean() < 0.5, kind


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((640, 480), (224, 224)),
        ((300, 200), (32, 500)),
        ((1, 1), (9, 7)),
        ((2, 3), (224, 224)),
        ((5000, 1), (3, 4)),
        ((1, 4000), (224, 1)),
        ((3000, 2000), (1, 1)),
    ],
)
def test_pixels_of_any_size_have_no_bias(size: tuple[int, int], target: tuple[int, int], mode: str) -> None:
    channels = len(mode)
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], channels), np.uint8)
    image = Image.fromarray(noise[..., 0] if channels == 1 else noise)
    samples = resize.samples_of(image)
    ours = resize.SimdResizer("bilinear").resize(samples, *target)[..., :channels].astype(int)
    ours = ours.reshape(*target, *noise.shape[2:] if channels > 1 else ())
    difference = ours - np.asarray(image.resize(target[::-1], Image.Resampling.BILINEAR))
    assert np.abs(difference).max() <= 2
    assert abs(difference.mean()) <= (0.05 if difference.size > 10_000 else 1)


def test_without_resizing_the_resizer_changes_nothing() -> None:
    given: dict[str, Any] = {"resize_mode": "none", "size": None}
    data = file_bytes("jpeg")
    with Image.open(io.BytesIO(data)) as image:
        size = image.size[::-1]
    ours, pillows = (decode(data, resizer=each, **{**given, "size": size}) for each in ("simd", "pillow"))
    np.testing.assert_array_equal(ours, pillows)


def test_threads_that_share_a_decoder_get_the_same_pixels() -> None:
    resizer = resize.SimdResizer("bilinear")
    with Image.open(io.BytesIO(file_bytes("jpeg"))) as image:
        samples = resize.samples_of(image)
        expected = resizer.resize(samples, 31, 17)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: resizer.resize(samples, 31, 17), range(50)):
                np.testing.assert_array_equal(found, expected)


def test_auto_is_simd_for_bilinear_in_8_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**given: Any) -> str:
        return resize.resolved(BuildConfig(**given)).resizer

    assert chosen() == "simd"
    assert chosen(resizer="pillow") == chosen(interpolation="bicubic") == chosen(bit_depth=16) == "pillow"
    assert chosen(resizer="simd", interpolation="lanczos") == "simd"
    monkeypatch.setattr(resize, "is_simd", lambda: True)
    assert chosen() == "pillow"


@pytest.mark.parametrize("given", [{"interpolation": "nearest"}, {"bit_depth": 16}])
def test_simd_is_refused_for_what_it_does_not_resize(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--resizer simd does not resize by"):
        BuildConfig(resizer="simd", **given)


def test_a_build_records_its_resizer_and_keeps_it(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(src, out, settings())
    commit = json.loads(min((out / ".gpu-npz/commits").iterdir()).read_text())
    assert commit["environment"]["resizer"].startswith("cykooz-resizer ")
    assert json.loads((out / ".gpu-npz/job.json").read_text())["resizer"] == "simd"
    assert "resizer" not in Manifest.load(str(out)).settings
    (out / "shard-00001.npz").unlink()
    with pytest.raises(MismatchError, match="OUT was started with --resizer simd; --resizer pillow asks for another"):
        build(src, out, settings(resizer="pillow"))
    monkeypatch.setattr(resize, "is_simd", lambda: True)  # for which a new build would take Pillow
    assert build(src, out, settings()).built_shards == 1


def test_a_build_by_pillow_names_no_resizer_and_stays_with_pillow(src: Path, out: Path) -> None:
    build(src, out, settings(resizer="pillow"))
    before = contents(out)
    commit = json.loads(min((out / ".gpu-npz/commits").iterdir()).read_text())
    assert "resizer" not in commit["environment"]
    job = json.loads((out / ".gpu-npz/job.json").read_text())
    del job["resizer"]  # as in builds from before the setting
    (out / ".gpu-npz/job.json").write_text(json.dumps(job))
    (out / "shard-00001.npz").unlink()
    assert build(src, out, settings()).built_shards == 1
    changing = {".gpu-npz/report.json": b"", ".gpu-npz/job.json": b""}
    assert {**contents(out), **changing} == {**before, **changing}


def test_a_build_by_simd_does_not_go_on_without_it(src: Path, out: Path, without_simd: None) -> None:
    with pytest.raises(BackendError, match=r"pip install 'cykooz-resizer.*'"):
        build(src, out, settings(resizer="simd"))
    assert not out.exists() or not list(out.iterdir())


def test_a_resume_without_simd_is_refused(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(src, out, settings())
    (out / "shard-00001.npz").unlink()
    monkeypatch.setattr(resize, "_library", lambda: None)
    with pytest.raises(BackendError, match=r"(?s)OUT was started with.*pip install 'cykooz-resizer.*'"):
        build(src, out, settings())


def test_preprocess_and_deep_verification_take_the_resizer_of_the_build(src: Path, tmp_path: Path) -> None:
    for resizer in ("simd", "pillow"):
        out = tmp_path / resizer
        build(src, out, settings(resizer=resizer, dtype="uint8"))
        dataset, preprocess = gpu_npz.open_dataset(out), gpu_npz.Preprocess.from_dataset(out)
        for number, path in enumerate(dataset.paths):
            np.testing.assert_array_equal(preprocess(src / path), dataset[number])
        checked = compare(out, 10)
        assert checked.exact
        assert checked.max == 0


def test_without_simd_pillow_resizes_with_one_warning(
    src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(src, out, settings(dtype="uint8"))
    monkeypatch.setattr(resize, "_library", lambda: None)
    resize._warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        row = gpu_npz.Preprocess.from_dataset(out)(src / "a/0.jpg")
    assert np.abs(row.astype(int) - gpu_npz.open_dataset(out)[0]).max() <= 2
    checked = compare(out, 10)
    assert not checked.exact
    assert not checked.problems
    assert sum("cykooz-resizer, which is not installed" in record.message for record in caplog.records) == 1


def test_parity_compares_the_two_resizers(src: Path) -> None:
    found = parity(src, BuildConfig(size=16, normalize="none", device="cpu"), ("pillow", "simd"), images=10)
    assert found.images == 5
    assert 0 < found.mean < 0.5
    assert next(kind.max for kind in found.kinds if kind.kind == "all") <= 2
    assert "resizer" in found.sides["simd"]
    assert "resizer" not in found.sides["pillow"]


def test_it_is_recommended_where_it_is_missing(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert not any("cykooz-resizer" in hint for hint in build(src, out, settings()).hints)
    shutil.rmtree(out)
    monkeypatch.setattr(resize, "_library", lambda: None)
    assert any("cykooz-resizer" in hint for hint in build(src, out, settings()).hints)
    shutil.rmtree(out)
    assert not any("cykooz-resizer" in hint for hint in build(src, out, settings(resizer="pillow")).hints)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert resize.advice(BuildConfig()) is None or sys.platform == "darwin"
