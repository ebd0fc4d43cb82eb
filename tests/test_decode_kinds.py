"""Files that are easily taken for others: lossless JPEG, BMP of 16 bits a pixel, what is cut off, what is unknown."""

from __future__ import annotations

import functools
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features
from support import decode, encode, pillow_of, rejection

import gpu_npz
from gpu_npz import BuildConfig, Preprocess
from gpu_npz.bench.pictures import paint
from gpu_npz.dataset.manifest import Manifest
from gpu_npz.preprocess.resize import is_simd
from gpu_npz.sources.rejects import BadItem

Pixels = NDArray[Any]


decoded = functools.partial(decode, name="a/1")


def rejected(data: bytes, **settings: Any) -> tuple[str, str]:
    return rejection(data, **{"size": 16, **settings})[1:]


# JPEG: lossless, and decoded at a half or less


def lossless(pixels: Pixels) -> bytes:
    return bytes(pytest.importorskip("imagecodecs").jpeg_encode(pixels, lossless=True))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_the_verdict_of_a_lossless_jpeg_does_not_depend_on_the_size(backend: str, tmp_path: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    colours = paint(256, 320, 0)
    pictures = {"gray": np.ascontiguousarray(colours[..., 0]), "rgb": colours}
    (tmp_path / "src").mkdir()
    for name, pixels in pictures.items():
        (tmp_path / f"src/{name}.jpg").write_bytes(lossless(pixels))
    verdicts = set()
    for size in (8, 40, 128, (256, 320)):
        config = BuildConfig(device="cpu", workers=0, backend=backend, size=size, dtype="uint8", max_rejects="100%")
        gpu_npz.build(tmp_path / "src", tmp_path / f"out-{size}", config)
        data = gpu_npz.open_dataset(tmp_path / f"out-{size}")
        verdicts.add(tuple(data.paths[:]))
        for row, pixels in zip(data[:], pictures.values(), strict=False):
            difference = np.abs(row.astype(int) - Preprocess(config, data.image_shape[1:])(pixels)).mean()
            print(f"{backend}, {size}: mean difference to the pixels resized by Pillow {difference:.2f} levels")
            assert difference <= (0 if backend == "pillow" else 4), size  # where DALI resizes
    assert len(verdicts) == 1
    if not is_simd():  # which is compiled with the system's library, of any version
        assert verdicts == {("gray.jpg", "rgb.jpg")}


def test_decoding_in_full_gives_pixels_the_row_of_their_file(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number, (height, width) in enumerate(((300, 400), (90, 70), (1000, 500))):
        (src / f"{number}.jpg").write_bytes(encode(paint(height, width, number), quality=90))
    whole = {path.name: np.asarray(Image.open(path)) for path in src.iterdir()}
    exact = {}
    for reduced in (True, False):
        config = BuildConfig(device="cpu", workers=0, size=32, dtype="uint8", reduced_decoding=reduced)
        gpu_npz.build(src, tmp_path / f"out-{reduced}", config)
        data = gpu_npz.open_dataset(tmp_path / f"out-{reduced}")
        preprocess = Preprocess.from_dataset(data.path)
        for row, name in enumerate(data.paths[:]):
            np.testing.assert_array_equal(preprocess(src / name), data[row])
            exact[reduced, name] = np.array_equal(preprocess(whole[name]), data[row])
            with Image.open(src / name) as picture:
                picture.load()
                assert np.array_equal(preprocess(picture), preprocess(whole[name]))
    assert exact == {
        **{(False, name): True for name in whole},
        (True, "0.jpg"): False, (True, "1.jpg"): True, (True, "2.jpg"): False,
    }  # fmt: skip
    train, val = (Preprocess.from_dataset(tmp_path / f"out-{reduced}") for reduced in (True, False))
    assert train.differences(val) == ["reduced-decoding: True and False"]


def test_a_dataset_from_before_the_setting_opens_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/0.jpg").write_bytes(encode(paint(90, 90, 0)))
    config = BuildConfig(device="cpu", workers=0, size=16, shard_size=64)
    gpu_npz.build(tmp_path / "src", tmp_path / "out", config)
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    assert content["settings"].pop("reduced_decoding") is True
    manifest = Manifest(**content)
    assert manifest.config.reduced_decoding
    assert manifest.config.identity() == config.identity()


# BMP


def bmp(pixels: Pixels, masks: tuple[int, int, int] | None) -> bytes:
    """16 bits a pixel: 5, 5 and 5 of them, or as the masks say (BI_BITFIELDS)."""
    red, green, blue = masks or (0x7C00, 0x3E0, 0x1F)
    values = np.zeros(pixels.shape[:2], np.uint16)
    for channel, mask in enumerate((red, green, blue)):
        low = (mask & -mask).bit_length() - 1
        values |= (pixels[..., channel].astype(np.uint16) * (mask >> low) // 255 << low).astype(np.uint16)
    height, width = values.shape
    lines = b"".join(line.astype("<u2").tobytes().ljust(-(-width // 2) * 4, b"\0") for line in values[::-1])
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3 if masks else 0, len(lines), 0, 0, 0, 0)
    more = struct.pack("<III", *masks) if masks else b""
    start = 14 + len(head) + len(more)
    return b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start) + head + more + lines


@pytest.mark.parametrize("masks", [None, (0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)], ids=["555", "555 masks", "565"])
def test_a_bmp_of_16_bits_a_pixel_has_8_bits_a_channel(masks: tuple[int, int, int] | None) -> None:
    pixels = paint(20, 31, 0)
    green = 63 if masks and masks[1] == 0x7E0 else 31
    top = np.array([31, green, 31])
    expected = (pixels.astype(int) * top // 255) * 255 // top
    data = bmp(pixels, masks)
    with pillow_of(size="20x31") as decoder:
        np.testing.assert_array_equal(decoder.decode_image(data, "a.bmp"), expected)
        assert decoder.sixteen_bit is None
    pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    np.testing.assert_array_equal(decoded(data, size="20x31", bit_depth=16), expected * 257)


def rle_bmp() -> bytes:
    """8 bits a pixel, run-length encoded: each run is of one pixel."""
    indices = paint(20, 30, 0)[..., 0]
    lines = b"".join(b"".join(bytes([1, index]) for index in line) + b"\0\0" for line in indices) + b"\0\1"
    palette = b"".join(bytes([level, level // 2, 255 - level, 0]) for level in range(256))
    start = 14 + 40 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, 30, 20, 1, 8, 1, len(lines), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start) + head + palette + lines


# What is cut, and what is of another kind


def test_a_file_that_is_cut_is_truncated_wherever_that_is() -> None:
    pixels = paint(20, 30, 0)
    wholes = {
        "BMP": encode(pixels, "BMP"), "BMP RLE": rle_bmp(), "GIF": encode(pixels, "GIF"), "PPM": encode(pixels, "PPM"),
        "PNG": encode(pixels, "PNG"), "TIFF": encode(pixels, "TIFF"),
        **({"WEBP": encode(pixels, "WEBP")} if features.check("webp") else {}),
    }  # fmt: skip
    first = {"PPM": 12, "WEBP": 12}
    with pillow_of(size=16) as decoder:
        for kind, whole in wholes.items():
            decoder.decode_image(whole, "a/1")
            for end in range(first.get(kind, 8), len(whole) - 30, 7):  # the last bytes hold no pixels
                with pytest.raises(BadItem) as caught:
                    decoder.decode_image(whole[:end], "a/1")
                assert caught.value.code == "truncated", (kind, end, caught.value.detail)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_jpeg_of_more_than_8_bits_is_undecodable_and_said_to_be(bits: int) -> None:
    codecs = pytest.importorskip("imagecodecs")
    samples = (paint(20, 30, 0)[..., 0].astype(np.uint16) << (bits - 8)).copy()
    for size in (8, 20):
        code, detail = rejected(bytes(codecs.ljpeg_encode(samples, bitspersample=bits)), size=size)
        assert (code, f"{bits}-bit" in detail) == ("undecodable", True), detail


@pytest.mark.parametrize(
    ("first_bytes", "name"),
    [
        (b"\0\0\0\x20ftypavif", "AVIF"), (b"\0\0\0\x18ftypheic", "HEIF"), (b"\0\0\0\x1cftypmif1", "HEIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51\0", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"8BPS\0\1", "Photoshop"), (b"\0\0\1\0\1\0", "ICO"),
        (b"\x76\x2f\x31\x01\2", "OpenEXR"),
    ],
)  # fmt: skip
def test_an_image_of_a_format_that_is_not_decoded_is_named(first_bytes: bytes, name: str) -> None:
    code, detail = rejected(first_bytes + bytes(100))
    assert code == "undecodable"
    assert detail == f"{name}, which is not supported; allowed are JPEG, PNG, WebP, GIF, BMP, TIFF, PPM and DICOM"


@pytest.mark.parametrize("data", [b"text", b"Python 3", b"Px text", b"<svg/>", bytes(50), b"%!PS-Adobe", b"\x89PN"])
def test_other_content_is_no_image(data: bytes) -> None:
    assert rejected(data) == ("not-an-image", "the content is not a known image format")


def test_pictures_that_pillow_has_loaded_are_taken_as_they_are() -> None:
    preprocess = Preprocess(BuildConfig(size=8, dtype="uint8"), (8, 8))
    for mode in ("La", "LA"):
        picture = Image.merge("LA", [Image.new("L", (8, 8), 60), Image.new("L", (8, 8), 120)])
        row = preprocess(picture.convert(mode))
        assert np.abs(row.astype(int) - round(60 * 120 / 255)).max() <= 1
    file = io.BytesIO()
    Image.new("I;16", (8, 8), 300).save(file, "PNG", transparency=300)
    with Image.open(file) as picture:
        assert not preprocess(picture).any()
        picture.load()
        assert not preprocess(picture).any()
