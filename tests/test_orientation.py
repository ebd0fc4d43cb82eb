"""One rule for the EXIF orientation, whichever decoder, file format or function meets it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headers
import numpy as np
import pytest
from headers import Segment, exif, joined, jpeg, segments
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gpu_npz import Preprocess
from gpu_npz.config import BuildConfig
from gpu_npz.machine.tuning import Tuning
from gpu_npz.preprocess.decoders import make_decoder
from gpu_npz.preprocess.exif import orientation_in
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.sources.base import Batch, Item
from gpu_npz.sources.folders.folder import FolderSource

Rows = Callable[[dict[str, bytes]], dict[str, NDArray[np.uint8]]]

PLAIN = segments(jpeg(60, 90, 3, quality=95))
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
ENTRY = struct.pack("<HHI4x", 0x0132, 2, 0xFFFFFFFF)  # a date of 4 GB
COPYRIGHT = struct.pack("<HHI4x", 0x8298, 2, 4)


def with_segments(*parts: Segment, after: int = 0x00) -> bytes:
    """The picture with further segments: at the beginning, or behind the first segment of a kind."""
    at = next((number + 1 for number, (marker, _) in enumerate(PLAIN) if marker == after), 0)
    return joined([*PLAIN[:at], *parts, *PLAIN[at:]])


def tiff(body: bytes) -> bytes:
    return b"Exif\0\0" + body


# What the first EXIF segment of a JPEG says, and the orientation that it means.
BLOCKS: dict[str, tuple[bytes, int]] = {
    **{f"{kind} in {order}": (exif(6, order=order, kind=kind), 6) for kind in (1, 3, 4) for order in "<>"},
    **{f"value {value}": (exif(value), value if 1 <= value <= 8 else 1) for value in (*range(10), 0xFFFF)},
    "LONG of 65,536 + 6": (exif(0x10006, kind=4), 1),
    "ASCII": (exif(6, kind=2), 1),
    "UNDEFINED": (exif(6, kind=7), 1),
    "two numbers": (exif(6).replace(b"\x12\x01\x03\0\x01\0\0\0", b"\x12\x01\x03\0\x02\0\0\0"), 1),
    "behind a damaged entry": (exif(6, before=ENTRY), 6),
    "behind an entry of ones": (exif(6, before=b"\xff" * 12), 6),
    "behind 300 entries": (exif(6, before=COPYRIGHT * 300), 6),
    "in a directory that claims 10,000 entries": (exif(6, count=10_000), 6),
    "in a directory that claims none": (exif(6, count=0), 1),
    "behind the last of its entries": (exif(6, before=COPYRIGHT, count=1), 1),
    "twice": (exif(6, before=struct.pack("<HHIH2x", 0x0112, 3, 1, 8)), 8),
    "as ASCII, then as a number": (exif(6, before=struct.pack("<HHI4x", 0x0112, 2, 4)), 6),
    "cut": (exif(6)[:-12], 1),
    "empty": (tiff(b""), 1),
    "of a directory beyond its end": (tiff(b"II*\0\xff\xff\xff\xff" + bytes(40)), 1),
    "of no TIFF": (tiff(b"XX*\0" + exif(6)[10:]), 1),
    "of BigTIFF": (tiff(b"II+\0" + exif(6)[10:]), 1),
}
FILES: dict[str, tuple[bytes, int]] = {
    **{f"EXIF {name}": (with_segments((0xE1, block)), orientation) for name, (block, orientation) in BLOCKS.items()},
    "none": (with_segments(), 1),
    "XMP alone": (with_segments((0xE1, XMP)), 1),
    "XMP, then EXIF": (with_segments((0xE1, XMP), (0xE1, exif(8))), 8),
    "EXIF, then XMP": (with_segments((0xE1, exif(8)), (0xE1, XMP)), 8),
    "behind JFIF": (with_segments((0xE1, exif(7)), after=0xE0), 7),
    "behind Photoshop and ICC": (
        with_segments((0xED, b"Photoshop 3.0\0"), (0xE2, b"ICC_PROFILE\0\1\1" + bytes(99)), (0xE1, exif(5))),
        5,
    ),
    "behind the frame": (with_segments((0xE1, exif(3)), after=0xC0), 3),
    "in two segments": (with_segments((0xE1, exif(6)), (0xE1, exif(3))), 6),
    "in two segments, the first upright": (with_segments((0xE1, exif(1)), (0xE1, exif(8))), 1),
    "in two segments, the first damaged": (with_segments((0xE1, tiff(b"XX")), (0xE1, exif(8))), 1),
    "in a segment that is not EXIF": (with_segments((0xE1, b"exif\0\0" + exif(6)[6:])), 1),
    "in APP2": (with_segments((0xE2, exif(6))), 1),
}


@pytest.fixture(params=["pillow", "dali"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Rows:
    """`rows({"a.jpg": data})`: what a decoder makes of files."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return lambda files, **settings: decoded(request.param, tmp_path, files, **settings)


def decoded(backend: Any, root: Path, files: dict[str, bytes], **settings: Any) -> dict[str, NDArray[np.uint8]]:
    for name, data in files.items():
        (root / name).write_bytes(data)
    config = BuildConfig(**{"size": (48, 72), "normalize": "unit", "device": "cpu", "backend": backend, **settings})
    assert config.size is not None
    geometry, tuning = Geometry.of(config, config.size), Tuning(1, len(files), 2, 1, 2, 1, None)
    batch = Batch(0, [Item(number, name, None) for number, name in enumerate(files)], True)
    with make_decoder(backend, config, geometry, FolderSource(root), tuning=tuning) as decoder:
        (found,) = decoder.decode([batch])
        assert found.rejects == []
        return dict(zip(files, found.pixels, strict=True))


def canonical() -> dict[str, bytes]:
    return {f"{orientation}.jpg": with_segments((0xE1, exif(orientation))) for orientation in range(1, 9)}


def test_every_form_of_exif_means_the_same_to_every_decoder(rows: Rows) -> None:
    expected = rows(canonical())
    assert len({row.tobytes() for row in expected.values()}) == 8
    found = rows({f"{number}-.jpg": data for number, (data, _) in enumerate(FILES.values())})
    for (name, (_, orientation)), row in zip(FILES.items(), found.values(), strict=True):
        means = [known for known, other in expected.items() if np.array_equal(row, other)]
        assert means == [f"{orientation}.jpg"], name


@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad"])
@pytest.mark.parametrize("size", [(96, 128), (200, 40)])
def test_dali_turns_images_and_stays_as_near_to_pillow_as_with_upright_ones(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    picture = headers.picture(301, 399, 1)
    files, expected = {}, {}
    for orientation in range(1, 9):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95, exif=exif(orientation))
        files[f"{orientation}.jpg"] = file.getvalue()
        image = ImageOps.exif_transpose(Image.open(file))
        config = BuildConfig(size=size, resize_mode=mode, normalize="unit", exif_orientation=False)
        place = Geometry.of(config, size).place(image.height, image.width)
        resized = np.asarray(image.resize((place.width, place.height), Image.Resampling.BILINEAR))
        canvas = np.zeros((*size, 3), np.uint8)
        top, left = max(0, place.top), max(0, place.left)
        cut = resized[max(0, -place.top) :, max(0, -place.left) :][: size[0], : size[1]]
        canvas[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        expected[f"{orientation}.jpg"] = canvas
    found = decoded("dali", tmp_path, files, size=size, resize_mode=mode)
    means = {name: float(np.abs(row.astype(int) - expected[name]).mean()) for name, row in found.items()}
    print(mode, size, means)
    # Upright images differ by the rounding of two resizers; those that are turned, also by the order of its two passes.
    assert max(means.values()) <= means["1.jpg"] + 0.1


def test_without_exif_orientation_nothing_is_turned(rows: Rows) -> None:
    found = rows(canonical(), exif_orientation=False)
    assert len({row.tobytes() for row in found.values()}) == 1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_follow_the_same_rule(form: str, tmp_path: Path) -> None:
    def file(block: bytes) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(headers.picture(60, 90, 3)).save(stream, form, exif=block, lossless=True)
        return stream.getvalue()

    expected = decoded("pillow", tmp_path, {f"{each}.png": file(exif(each)) for each in range(1, 9)})
    assert len({row.tobytes() for row in expected.values()}) == 8
    for name, (block, orientation) in BLOCKS.items():
        if form == "PNG" and name == "empty":  # which Pillow does not write
            continue
        (row,) = decoded("pillow", tmp_path, {"one.png": file(block)}).values()
        assert np.array_equal(row, expected[f"{orientation}.png"]), name


def test_an_image_that_somebody_turned_already_is_not_turned_again(tmp_path: Path) -> None:
    preprocess = Preprocess(BuildConfig(size=(48, 72), normalize="unit", dtype="uint8", layout="NHWC"), (48, 72))
    for orientation in range(1, 9):
        image = Image.open(io.BytesIO(canonical()[f"{orientation}.jpg"]))
        expected = preprocess(np.asarray(ImageOps.exif_transpose(image)))
        ImageOps.exif_transpose(image, in_place=True)
        np.testing.assert_array_equal(preprocess(image), expected)


def test_a_block_that_begins_as_exif_a_million_times_means_nothing() -> None:
    assert orientation_in(headers.exif(6)[:6] * 500_000 + exif(6)) == 1
    assert orientation_in(headers.exif(6)[:6] + exif(6)) == 6


@pytest.mark.parametrize("name", ["in two segments", "EXIF 4 in >", "behind the frame", "XMP alone"])
def test_preprocess_turns_paths_bytes_and_pil_images_as_a_build_does(name: str, tmp_path: Path) -> None:
    data, orientation = FILES[name]
    config = BuildConfig(size=(48, 72), normalize="unit", dtype="uint8", layout="NHWC")
    preprocess = Preprocess(config, (48, 72))
    expected = decoded("pillow", tmp_path, canonical())[f"{orientation}.jpg"]
    (tmp_path / "file.jpg").write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for given in (tmp_path / "file.jpg", data, Image.open(io.BytesIO(data)), loaded):
        np.testing.assert_array_equal(preprocess(given), expected)
