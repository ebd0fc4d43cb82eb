"""The Pillow decoder: every kind of input, the resize modes as Pillow itself does them, and what becomes a reject."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin
from support import MakeTree, decode, encode, file_bytes, pillow_of, rejection

from gpu_npz.bench.pictures import paint
from gpu_npz.config import BuildConfig
from gpu_npz.errors import ShardError
from gpu_npz.preprocess.base import DecodedBatch
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.pillow import PillowDecoder, first_size
from gpu_npz.sources.base import Batch, Item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import BadItem, clean

Pixels = NDArray[np.uint8]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
# How an upright picture is stored under each orientation: Exif 2.32, tag 0x0112, where the 0th row and column are.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def decoded(data: bytes, **settings: Any) -> Pixels:
    pixels = decode(data, name="a/1.jpg", **settings)
    assert pixels.dtype == np.uint8
    return pixels


def by_pillow(data: bytes, mode: str = "RGB") -> Image.Image:
    return Image.open(io.BytesIO(data)).convert(mode)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def decode_all(root: Path, batch_items: int = 100, **settings: Any) -> list[DecodedBatch]:
    """All images below `root`, as a worker has them decoded."""
    config = BuildConfig(**{"resizer": "pillow", **settings})
    source = FolderSource(root)
    listed = [(os.fsdecode(group.folder + name), group.label) for group in source.groups() for name in group.names]
    items = [Item(index, path, label) for index, (path, label) in enumerate(listed)]
    starts = range(0, len(items), batch_items)
    batches = [Batch(0, items[start : start + batch_items], start == starts[-1]) for start in starts]
    assert config.size is not None
    with PillowDecoder(config, Geometry.of(config, config.size), source) as decoder:
        return list(decoder.decode(batches))


# Every kind of input


@pytest.mark.parametrize("channels", ["rgb", "gray"])
def test_every_good_kind_has_pixels(
    good_kinds: tuple[str, ...], channels: str, recwarn: pytest.WarningsRecorder
) -> None:
    for kind in good_kinds:
        pixels = decoded(file_bytes(kind), size="32x48", channels=channels)
        assert pixels.shape == (32, 48, 1 if channels == "gray" else 3), kind
        assert kind in ("1x1", "half-with-eoi") or pixels.std() > 10, kind
    assert not list(recwarn)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-444", "jpeg-422", "progressive", "cmyk", "png-named-jpg", "palette"])
@pytest.mark.parametrize(("channels", "mode"), [("rgb", "RGB"), ("gray", "L")])
def test_pixels_are_those_that_pillow_gives(kind: str, channels: str, mode: str) -> None:
    expected = np.asarray(by_pillow(file_bytes(kind), mode).resize((48, 32), FILTERS["bilinear"]))
    pixels = decoded(file_bytes(kind), size="32x48", channels=channels)
    np.testing.assert_array_equal(pixels, expected.reshape(pixels.shape))


@pytest.mark.parametrize("kind", ["gray", "bilevel", "gray16"])
def test_gray_images_have_three_equal_channels_or_one(kind: str) -> None:
    colour = decoded(file_bytes(kind), size="32x48")
    gray = decoded(file_bytes(kind), size="32x48", channels="gray")
    np.testing.assert_array_equal(colour, np.repeat(gray, 3, axis=2))


def test_bgr_is_left_to_the_normalization() -> None:
    data = file_bytes("jpeg")
    np.testing.assert_array_equal(decoded(data, size=32, channels="bgr"), decoded(data, size=32))


def test_black_and_white_stay_black_and_white() -> None:
    drawn = np.arange(20 * 30).reshape(20, 30) % 7 < 3
    pixels = decoded(encode(Image.fromarray(drawn), "PNG"), size="20x30")
    np.testing.assert_array_equal(pixels[..., 0], drawn * np.uint8(255))


@pytest.mark.parametrize(
    ("mode", "file_format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I;16", "PPM")]
)
def test_sixteen_bit_gray_is_scaled_and_not_saturated(mode: str, file_format: str) -> None:
    levels = np.arange(65_536).reshape(256, 256)
    stored = levels.astype(">u2" if mode.endswith("B") else "<u2")
    data = encode(Image.frombytes(mode, (256, 256), stored.tobytes()), file_format)
    expected = (levels * 255 + 32_767) // 65_535  # the nearest level; none lies in the middle
    np.testing.assert_array_equal(decoded(data, size=256)[..., 0], expected)


def test_samples_of_32_bits_are_rejected() -> None:
    wide = np.full((20, 20), 70_000)
    assert rejection(encode(Image.fromarray(wide.astype(np.int32)), "TIFF"))[:2] == ("decode", "undecodable")
    stage, code, detail = rejection(encode(Image.fromarray(wide.astype(np.float32)), "TIFF"))
    assert (stage, code) == ("decode", "undecodable")
    assert detail == "a TIFF of float32 samples; allowed are unsigned ones of up to 16 bits"
    assert rejection(encode(Image.fromarray(wide.astype(np.float32)), "PPM"))[2] == "samples of 32 bits (mode F)"


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 0, 200)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_the_background(mode: str, background: tuple[int, int, int]) -> None:
    colour = paint(40, 60, 0) if mode == "RGBA" else np.repeat(paint(40, 60, 0)[..., :1], 3, axis=2)
    alpha = np.broadcast_to(np.array([0, 255, 128, 40], np.uint8).repeat(15), (40, 60))
    image = Image.fromarray(np.dstack([colour, alpha])).convert(mode)
    pixels = decoded(encode(image, "PNG"), size="40x60", background=background)
    share = alpha[..., None] / 255
    exact = colour * share + np.array(background) * (1 - share)
    assert (pixels[alpha == 0] == background).all()
    assert (pixels[alpha == 255] == colour[alpha == 255]).all()
    difference = np.abs(pixels - exact).max()
    print(f"largest difference to exact blending: {difference:.2f} levels")
    assert difference <= 1  # Pillow blends in integers


def test_one_transparent_colour_shows_the_background() -> None:
    colour = paint(20, 20, 0)
    colour[:10] = (10, 20, 30)
    images: dict[str, bytes] = {
        "RGB": encode(colour, "PNG", transparency=(10, 20, 30)),
        "L": encode(colour[..., 0].copy(), "PNG", transparency=10),
        "P": encode(Image.fromarray(colour[..., 0].copy()).convert("P"), "PNG", transparency=10),
        "GIF": encode(Image.fromarray(colour[..., 0].copy()).convert("P"), "GIF", transparency=10),
    }
    for kind, data in images.items():
        pixels = decoded(data, size=20, background=(200, 0, 100))
        assert (pixels[:10] == (200, 0, 100)).all(), kind
        assert not (pixels[10:] == (200, 0, 100)).all(axis=2).any(), kind


# EXIF orientation


@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad", "none"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_before_anything_else(orientation: int, mode: str) -> None:
    upright = paint(50, 70, 0)
    size = "50x70" if mode == "none" else "32x48"
    turned = encode(np.ascontiguousarray(STORED[orientation](upright)), "PNG", exif=oriented(orientation))
    np.testing.assert_array_equal(
        decoded(turned, size=size, resize_mode=mode), decoded(encode(upright, "PNG"), size=size, resize_mode=mode)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_can_be_left_alone(orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](paint(50, 70, 0)))
    data = encode(stored, "PNG", exif=oriented(orientation))
    np.testing.assert_array_equal(decoded(data, size=stored.shape[:2], exif_orientation=False), stored)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_file_format_is_turned_once(file_format: str, orientation: int) -> None:
    data = encode(np.ascontiguousarray(STORED[orientation](paint(50, 70, 0))), file_format, exif=oriented(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decoded(data, size="50x70"), expected)


def test_sixteen_bit_gray_can_be_turned() -> None:
    upright = (np.arange(30 * 40).reshape(30, 40) * 54).astype(np.uint16)
    data = encode(np.ascontiguousarray(STORED[6](upright)), "PNG", exif=oriented(6))
    np.testing.assert_array_equal(decoded(data, size="30x40")[..., 0], np.round(upright / 257))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02\x36\0\0\0\0\0\0\0",  # orientation "6", a text
    ],
    ids=["garbage", "nothing", "short", "offset", "ninety-nine", "text"],
)
def test_broken_exif_turns_nothing_and_says_nothing(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    pixels = paint(50, 70, 0)
    expected = np.asarray(by_pillow(encode(pixels)))
    np.testing.assert_array_equal(decoded(encode(pixels, exif=exif), size="50x70"), expected)
    assert not list(recwarn)


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    upright = paint(50, 70, 0)
    data = encode(np.ascontiguousarray(STORED[6](upright)), "PNG", exif=oriented(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, name, content, CRC
    before_last = len(data) - 12
    moved = data[:start] + data[end:before_last] + data[start:end] + data[before_last:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    np.testing.assert_array_equal(decoded(moved, size="50x70"), upright)
    with pillow_of() as decoder:
        assert decoder.upright_size(moved, "a/1.jpg") == (50, 70)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x0f\0\x02\0\0\0\x02a\0\0\0\0\0\0\0"], ids=["alone", "beside-exif"]
)
def test_what_xmp_says_of_the_orientation_turns_nothing(exif: bytes) -> None:
    said = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    whole = encode(paint(50, 70, 0), exif=exif)
    data = whole[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2, "big") + said + whole[2:]
    assert b"xmp" in data
    np.testing.assert_array_equal(decoded(data, size="50x70"), np.asarray(by_pillow(whole)))


# Resize modes


@pytest.mark.parametrize("interpolation", FILTERS)
def test_stretch_is_pillows_resize(interpolation: str) -> None:
    expected = by_pillow(file_bytes("jpeg")).resize((40, 50), FILTERS[interpolation])
    pixels = decoded(file_bytes("jpeg"), size="50x40", interpolation=interpolation)
    np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_center_crop_is_pillows_resize_and_crop(interpolation: str) -> None:
    # 90 x 120 to cover 50 x 50: 50 x 66 (66.7 truncated); 5 and 13 pixels to the middle's corner.
    expected = by_pillow(file_bytes("jpeg")).resize((66, 50), FILTERS[interpolation]).crop((13, 5, 53, 45))
    pixels = decoded(file_bytes("jpeg"), size=40, resize_mode="center-crop", crop_pct=0.8, interpolation=interpolation)
    np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(89, 88), (88, 89), (88, 88), (91, 88)])
def test_center_crop_cuts_a_single_row_or_column(height: int, width: int) -> None:
    image = paint(height, width, 0)
    top, left = round((height - 88) / 2), round((width - 88) / 2)
    pixels = decoded(encode(image, "PNG"), size=88, resize_mode="center-crop", crop_pct=1)
    np.testing.assert_array_equal(pixels, image[top : top + 88, left : left + 88])


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("pad_value", [0, 114])
def test_pad_is_pillows_resize_on_a_canvas(interpolation: str, pad_value: int) -> None:
    # 90 x 120 to fit 40 x 40: 30 x 40, 5 rows below the top.
    expected = Image.new("RGB", (40, 40), (pad_value,) * 3)
    expected.paste(by_pillow(file_bytes("jpeg")).resize((40, 30), FILTERS[interpolation]), (0, 5))
    pixels = decoded(file_bytes("jpeg"), size=40, resize_mode="pad", pad_value=pad_value, interpolation=interpolation)
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_pad_keeps_a_line_of_an_image_that_is_one_pixel_wide() -> None:
    pixels = decoded(encode(np.full((3000, 1, 3), 200, np.uint8), "PNG"), size=50, resize_mode="pad")
    assert (pixels == 200).all(axis=(0, 2)).sum() == 1
    assert (pixels == 0).all(axis=(0, 2)).sum() == 49


def test_none_takes_the_one_size_as_it_is_and_rejects_any_other() -> None:
    image = paint(50, 70, 0)
    data = encode(image, "PNG")
    np.testing.assert_array_equal(decoded(data, size="50x70", resize_mode="none"), image)
    stage, code, detail = rejection(data, size="70x50", resize_mode="none")
    assert (stage, code) == ("resize", "wrong-size")
    assert detail == "50 x 70 pixels (height x width); expected 70 x 50"


# Decoding at a half, a quarter or an eighth


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes (width, height) at which JPEGs are decoded after `draft`."""
    sizes: list[tuple[int, int]] = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self: Any, mode: str | None, size: tuple[int, int] | None) -> Any:
        result = draft(self, mode, size)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    return sizes


@pytest.mark.parametrize(("scale", "divisor"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (15, 4), (16, 8), (40, 8)])
def test_draft_leaves_at_least_twice_the_target(drafted: list[tuple[int, int]], scale: int, divisor: int) -> None:
    data = encode(paint(24 * scale, 32 * scale, 0), quality=95)
    pixels = decoded(data, size="24x32")
    assert drafted == ([(32 * scale // divisor, 24 * scale // divisor)] if divisor > 1 else [])
    exact = np.asarray(by_pillow(data).resize((32, 24), FILTERS["bilinear"]))
    difference = np.abs(pixels.astype(int) - exact).mean()
    print(f"scale {scale}: mean difference to decoding in full {difference:.3f} levels")
    assert difference <= (0 if divisor == 1 else 2)  # two filters instead of one; 0.2 to 1.2 on these pictures


def test_draft_looks_at_the_upright_image(drafted: list[tuple[int, int]]) -> None:
    data = encode(np.ascontiguousarray(STORED[6](paint(800, 400, 0))), exif=oriented(6))
    decoded(data, size="100x50")
    assert drafted == [(200, 100)]  # stored lying: 800 wide, 400 high


def test_draft_looks_at_what_is_covered_and_not_at_what_is_cut(drafted: list[tuple[int, int]]) -> None:
    decoded(encode(paint(400, 400, 0)), size=100, resize_mode="center-crop", crop_pct=0.5)
    assert not drafted


@pytest.mark.parametrize(
    "settings", [{"interpolation": "nearest"}, {"resize_mode": "none", "size": "512x768"}], ids=["nearest", "none"]
)
def test_nearest_and_none_always_decode_in_full(settings: dict[str, Any]) -> None:
    data = encode(paint(512, 768, 0))
    settings = {"size": "32x48", **settings}
    height, width = map(int, settings["size"].split("x"))
    expected = by_pillow(data).resize((width, height), FILTERS["nearest"])
    np.testing.assert_array_equal(decoded(data, **settings), np.asarray(expected))


# Rejects


def test_every_bad_file_is_rejected_with_its_stage_and_code(
    make_tree: MakeTree, bad_kinds: dict[str, tuple[str, str]], recwarn: pytest.WarningsRecorder
) -> None:
    root = make_tree({f"a/{kind}.jpg": kind for kind in bad_kinds})
    (root / "a" / "dangling.jpg").symlink_to("nowhere.jpg")
    (result,) = decode_all(root, size=32)
    expected = {f"a/{kind}.jpg": verdict for kind, verdict in bad_kinds.items()}
    expected["a/dangling.jpg"] = ("read", "missing")
    assert {reject.path: (reject.stage, reject.code) for reject in result.rejects} == expected
    assert len(result.kept) == 0
    assert not list(recwarn)
    for reject in result.rejects:
        assert 0 < len(reject.detail) <= 200
        assert reject.detail.isprintable()
        assert not [part for part in ("0x", "/", "BytesIO") if part in reject.detail]
        assert reject.to_json()["path"] == reject.path


def test_a_detail_is_the_same_in_every_run(make_tree: MakeTree, bad_kinds: dict[str, tuple[str, str]]) -> None:
    root = make_tree({f"a/{kind}.jpg": kind for kind in bad_kinds})
    assert decode_all(root, size=32)[0].rejects == decode_all(root, size=32)[0].rejects


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("cannot identify image file <_io.BytesIO object at 0x7f3a12b4c1d0>", "cannot identify image file the file"),
        ("failed at 0x7fffdeadbeef again", "failed at again"),
        ("cannot open '/data/in/cats/1.jpg': damaged", "cannot open 'the file': damaged"),
        ("/data/in/1.jpg is damaged", "the file is damaged"),
        ("two\nlines\tand \x00 more", "two lines and more"),
        ("a marker 0xd9, ratio 3/4, and/or", "a marker 0xd9, ratio 3/4, and/or"),
        ("x" * 500, "x" * 200),
    ],
)
def test_details_lose_addresses_paths_and_control_characters(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_a_size_that_is_only_claimed_is_rejected_before_pixels_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    stage, code, detail = rejection(file_bytes("claims-65500"))
    assert (stage, code) == ("decode", "too-large")
    assert detail == "65500 x 65500 pixels; at most 89478485"


def test_max_pixels_is_the_largest_that_is_taken() -> None:
    data = encode(paint(50, 70, 0))
    decoded(data, size=16, max_pixels=3500)
    assert rejection(data, size=16, max_pixels=3499)[:2] == ("decode", "too-large")


def test_an_extreme_aspect_that_would_grow_too_large_is_rejected_before_it_does() -> None:
    data = encode(Image.new("1", (2, 20_000)), "PNG")
    stage, code, detail = rejection(data, resize_mode="center-crop")
    assert (stage, code) == ("resize", "too-large")
    assert detail == "20000 x 2 pixels become 2560000 x 256; at most 89478485"
    assert decoded(data, resize_mode="stretch").shape == (224, 224, 3)
    assert decoded(data, resize_mode="pad").shape == (224, 224, 3)


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("run"))
    assert rejection(file_bytes("postscript"))[1] == "not-an-image"


def test_running_out_of_memory_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ShardError, match=r"no memory to decode 'a/1\.jpg'; lower --workers or --max-pixels"):
        decoded(file_bytes("jpeg"))


# Batches


def test_good_neighbours_of_bad_files_are_untouched_and_in_order(
    make_tree: MakeTree, bad_kinds: dict[str, tuple[str, str]]
) -> None:
    files = {}
    for number, kind in enumerate(bad_kinds):
        files[f"a/{number:02d}-0.jpg"] = file_bytes("jpeg", seed=number)
        files[f"a/{number:02d}-1.jpg"] = file_bytes(kind)
    files["a/99.jpg"] = file_bytes("progressive", seed=99)
    (result,) = decode_all(make_tree(files), size="32x48")
    good = [position for position, path in enumerate(files) if "-1" not in path]
    assert result.kept.tolist() == good
    assert result.pixels.shape == (len(files), 32, 48, 3)
    for position in good:
        alone = decoded(list(files.values())[position], size="32x48")
        np.testing.assert_array_equal(result.pixels[position], alone)
    assert [reject.index for reject in result.rejects] == [n for n in range(len(files)) if n not in good]
    assert result.source_bytes.tolist() == [len(data) for data in files.values()]


def test_batches_come_in_order_and_one_at_a_time(tree: Path) -> None:
    config = BuildConfig(size=16, resizer="pillow")
    source = FolderSource(tree)
    paths = [os.fsdecode(group.folder + name) for group in source.groups() for name in group.names]
    items = [Item(index, path, 0) for index, path in enumerate(paths)]
    taken = []

    def batches() -> Iterator[Batch]:
        for start in range(0, 40, 16):
            taken.append(start)
            yield Batch(0, items[start : start + 16], start == 32)

    results = []
    with PillowDecoder(config, Geometry.of(config, (16, 16)), source) as decoder:
        for result in decoder.decode(batches()):
            results.append(result)
            assert len(taken) == len(results)
    assert [item.path for result in results for item in result.batch.items] == paths
    assert [len(result.kept) for result in results] == [16, 16, 8]
    together = decode_all(tree, size=16)[0]
    np.testing.assert_array_equal(np.concatenate([result.pixels for result in results]), together.pixels)
    assert all(set(result.seconds) == {"read", "decode"} for result in results)


def test_pixels_of_one_batch_outlive_the_next(tree: Path) -> None:
    results = decode_all(tree, batch_items=8, size=16)
    assert not any(np.shares_memory(a.pixels, b.pixels) for a, b in itertools.pairwise(results))


# The size of the first image


def test_the_first_size_is_that_of_the_first_image_that_can_be_decoded(
    make_tree: MakeTree, bad_kinds: dict[str, tuple[str, str]]
) -> None:
    root = make_tree({**{f"a/{kind}.jpg": kind for kind in bad_kinds}, "b/1.jpg": "exif-6", "b/2.jpg": "1x1"})
    source = FolderSource(root)
    items = [
        Item(index, f"{folder}/{name}.jpg", 0)
        for index, (folder, name) in enumerate([*(("a", kind) for kind in bad_kinds), ("b", "1"), ("b", "2")])
    ]
    assert first_size(source, items, BuildConfig(resize_mode="none")) == (120, 90)
    assert first_size(source, items, BuildConfig(resize_mode="none", exif_orientation=False)) == (90, 120)
    assert first_size(source, items[:-2], BuildConfig(resize_mode="none")) is None


def test_the_first_size_of_a_turned_tiff_is_the_upright_one(make_tree: MakeTree) -> None:
    root = make_tree({"a/1.tif": encode(paint(50, 70, 0), "TIFF", exif=oriented(6))})
    assert first_size(FolderSource(root), [Item(0, "a/1.tif", 0)], BuildConfig(resize_mode="none")) == (70, 50)


# The process around it


def test_pillows_limit_and_warnings_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # fewer than the files have
    filters = list(warnings.filters)
    for kind in ("jpeg", "half", "broken-exif"):
        with contextlib.suppress(BadItem):
            decoded(file_bytes(kind))
        assert Image.MAX_IMAGE_PIXELS == 1000
        assert list(warnings.filters) == filters


def test_a_decoder_can_be_opened_again() -> None:
    decoder, found = pillow_of(size=16), []
    for _ in range(2):
        with decoder:
            found.append(np.array(decoder.decode_image(file_bytes("jpeg"), "a/1.jpg")))
    assert found[0].shape == (16, 16, 3)
    np.testing.assert_array_equal(*found)


def test_the_environment_names_the_libraries_that_decide_the_pixels() -> None:
    found = pillow_of().provenance()
    assert found["backend"] == "pillow"
    assert found["pillow"] == PIL.__version__
    assert found["pillow_simd"] == (".post" in PIL.__version__)
    assert found["libjpeg"].startswith("libjpeg")
    assert any(character.isdigit() for character in found["libjpeg"])


def test_decoding_logs_and_prints_nothing(
    tree: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="gpu_npz"):
        decode_all(tree, size=16)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
