"""JPEGs decoded by simplejpeg: the same pixels, rejects and rows as from Pillow, which decodes where it is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import MakeTree, cpu_config, decode, encode, file_bytes, paint, pillow_of, rejection

from gpu_npz.builder.build import build
from gpu_npz.errors import MismatchError
from gpu_npz.preprocess import turbo
from gpu_npz.preprocess.jpeg import read_header
from gpu_npz.sources.rejects import BadItem

pytest.importorskip("cykooz_resizer")
pytest.importorskip("simplejpeg")


def missing() -> None:
    """In place of `turbo._library`: simplejpeg cannot be imported."""


def as_pillow(data: bytes, **settings: Any) -> np.ndarray[Any, Any]:
    """What the same settings give where simplejpeg is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turbo, "_library", missing)
        return decode(data, **settings)


def oriented(orientation: int, **given: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(paint(91, 123, 1), quality=90, exif=exif, **given)


def test_the_fast_way_is_taken() -> None:
    with pillow_of(resizer="simd") as decoder:
        assert decoder._plain_jpeg(file_bytes("jpeg"), "image") is not None
        assert decoder._plain_jpeg(file_bytes("progressive"), "image") is not None
        for kind in ("gray", "cmyk", "palette"):
            assert decoder._plain_jpeg(file_bytes(kind), "image") is None, kind
    for other in ({"resizer": "pillow"}, {"resizer": "simd", "channels": "gray"}):
        with pillow_of(**other) as decoder:
            assert "jpeg_decoder" not in decoder.libraries


@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_are_those_of_pillow(good_kinds: tuple[str, ...], mode: str, layout: str) -> None:
    for kind in good_kinds:
        given: dict[str, Any] = {"size": "24x36", "resize_mode": mode, "resizer": "simd", "layout": layout}
        np.testing.assert_array_equal(
            decode(file_bytes(kind), **given), as_pillow(file_bytes(kind), **given), err_msg=kind
        )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("upright", [True, False])
def test_exif_orientations_are_turned_alike(orientation: int, upright: bool) -> None:
    given: dict[str, Any] = {"size": "20x31", "resizer": "simd", "exif_orientation": upright}
    data = oriented(orientation)
    np.testing.assert_array_equal(decode(data, **given), as_pillow(data, **given))


def test_the_first_image_of_an_mpo_is_decoded_as_a_jpeg() -> None:
    """Phones append smaller images to a JPEG, in the format MPO, for which Pillow has another plug-in."""
    file = io.BytesIO()
    first, second = (Image.fromarray(paint(400, 600, seed)) for seed in (1, 2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    header = read_header(file.getvalue())
    assert header is not None
    with Image.open(file) as image:
        assert image.format == "MPO"
        for resizer in ("simd", "pillow"):
            given: dict[str, Any] = {"size": (50, 60), "resizer": resizer}
            pixels = decode(file.getvalue(), **given)
            np.testing.assert_array_equal(pixels, as_pillow(file.getvalue(), **given))
            with pillow_of(**given) as decoder:
                np.testing.assert_array_equal(decoder.pixels_of(image, "image"), pixels)
    alone = file.getvalue()[: file.getvalue().rindex(b"\xff\xd8\xff\xe0")]
    np.testing.assert_array_equal(decode(alone, **given), pixels)


@pytest.mark.parametrize("side", [256, 100, 40, 13, 3])
@pytest.mark.parametrize("size", [(517, 803), (1000, 333)])
def test_large_jpegs_are_reduced_alike(side: int, size: tuple[int, int]) -> None:
    for given in ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2, "progressive": True}):
        data = encode(paint(*size, 3), quality=85, **given)
        for reduced in (True, False):
            settings: dict[str, Any] = {"size": side, "resizer": "simd", "reduced_decoding": reduced}
            np.testing.assert_array_equal(decode(data, **settings), as_pillow(data, **settings))


def test_an_image_of_the_size_of_the_output_is_not_resized() -> None:
    data = file_bytes("jpeg-444")
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image)
    given: dict[str, Any] = {"size": expected.shape[:2], "resizer": "simd"}
    np.testing.assert_array_equal(decode(data, **given), expected)
    np.testing.assert_array_equal(decode(data, **given, resize_mode="none"), expected)


def test_damaged_data_is_left_to_pillow() -> None:
    """Every file with one damaged byte is rejected with the same words, or gives the same pixels, as without it."""
    data = file_bytes("jpeg")
    given: dict[str, Any] = {"size": 16, "resizer": "simd"}
    random = np.random.default_rng(5)
    warned = 0
    for position in random.integers(2, len(data) - 2, 300).tolist():
        bad = bytearray(data)
        bad[position] = int(random.integers(0, 256))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(turbo, "_library", missing)
            try:
                expected = decode(bytes(bad), **given)
            except BadItem:
                expected = None
            words = rejection(bytes(bad), **given) if expected is None else None
        if words is None:
            np.testing.assert_array_equal(decode(bytes(bad), **given), expected)
        else:
            assert rejection(bytes(bad), **given) == words
        found = read_header(bytes(bad))
        if found is not None and found.plain and found.components == 3:
            warned += turbo.decode(bytes(bad), found, 1) is None
    assert warned > 20


def test_a_truncated_jpeg_is_rejected_as_by_pillow() -> None:
    for kind in ("jpeg", "progressive"):
        cut = file_bytes(kind)[:-400] + b"\xff\xd9"  # with an end marker, so that its header is plain
        np.testing.assert_array_equal(
            decode(cut, size=16, resizer="simd"), as_pillow(cut, size=16, resizer="simd"), err_msg=kind
        )
        assert rejection(file_bytes(kind)[:-400], size=16, resizer="simd")[1] == "truncated"


def test_the_limit_of_pixels_holds() -> None:
    assert rejection(file_bytes("jpeg"), size=8, resizer="simd", max_pixels=100)[1] == "too-large"


def test_its_version_is_recorded_and_kept(make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_tree({"a/0.jpg": "jpeg", "a/1.jpg": "exif-6", "b/0.jpg": "gray", "b/1.png": "palette"})
    out = tmp_path / "out"
    settings = cpu_config(shard_size=2, workers=0)
    build(src, out, settings)
    commit = json.loads(min((out / ".gpu-npz/commits").iterdir()).read_text())
    assert commit["environment"]["jpeg_decoder"] == turbo.version()
    whole = (out / "shard-00001.npz").read_bytes()
    (out / "shard-00001.npz").unlink()
    monkeypatch.setattr(turbo, "_library", missing)
    with pytest.raises(MismatchError, match="jpeg_decoder"):
        build(src, out, settings)
    build(src, out, settings.model_copy(update={"accept_environment": True}))
    assert (out / "shard-00001.npz").read_bytes() == whole
