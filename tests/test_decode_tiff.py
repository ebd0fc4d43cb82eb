"""TIFF: whichever library reads it, samples have the levels that TIFF 6.0 says, or the file a reason for its reject."""

from __future__ import annotations

import functools
import itertools
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, features
from support import decode, encode, pillow_of, rejection

import gpu_npz
from gpu_npz import BuildConfig, Preprocess
from gpu_npz.builder.estimate import estimate
from gpu_npz.builder.maintenance import retry
from gpu_npz.preprocess.pillow import first_size
from gpu_npz.preprocess.tiff import Tiff
from gpu_npz.sources.base import Item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import BadItem

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

Samples = NDArray[Any]
HEIGHT, WIDTH = 14, 18
GRAY_0, GRAY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6  # PhotometricInterpretation: in the first, zero is white
RAW, LZW, JPEG, DEFLATE, PACKBITS = 1, 5, 7, 8, 32773


def noise(bits: int, samples: int, seed: int = 0) -> Samples:
    found = np.random.default_rng(seed).integers(0, 1 << bits, (HEIGHT, WIDTH, samples), np.uint16)
    found[0, 0], found[0, 1] = 0, (1 << bits) - 1
    return found


def packed(rows: Samples, bits: int, order: str) -> bytes:
    """Each row from its own byte on, the highest bit first (section 8, FillOrder 1)."""
    if bits in (8, 16):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    digits = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: Samples,
    bits: int,
    photometric: int,
    *,
    compression: int = RAW,
    planar: bool = False,
    order: str = "<",
    large: bool = False,
    tile: tuple[int, int] | None = None,
    rows: int = HEIGHT,
    predictor: bool = False,
    low_bit_first: bool = False,
    content_at: int | None = None,
    tags: dict[int, tuple[int, list[int]]] | None = None,
) -> bytes:
    """A TIFF, or a BigTIFF, whose directory stands at its end, or before the samples where their place is given.

    `tags` come in addition, as type and values.
    """
    header = 16 if large else 8
    height, width, count = samples.shape
    high, wide = tile or (rows, width)
    parts = [samples[..., [at]] for at in range(count)] if planar else [samples]
    content, offsets, sizes = b"", [], []
    for part, top, left in itertools.product(parts, range(0, height, high), range(0, width, wide)):
        piece = part[top : top + high, left : left + wide].astype(np.int64)
        if tile:
            piece = np.pad(piece, [(0, high - piece.shape[0]), (0, wide - piece.shape[1]), (0, 0)])
        if predictor:
            piece[:, 1:] -= piece[:, :-1].copy()
        data = packed(piece.reshape(len(piece), -1) & ((1 << bits) - 1), bits, order)
        if compression == DEFLATE:
            data = zlib.compress(data)
        elif compression == PACKBITS:
            pieces = [data[at : at + 128] for at in range(0, len(data), 128)]
            data = b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)
        if low_bit_first:
            data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
        offsets.append((content_at or header) + len(content))
        sizes.append(len(data))
        content += data + bytes(len(data) % 2)
    fields = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * count), 259: (3, [compression]),
        262: (3, [photometric]), 266: (3, [1 + low_bit_first]), 277: (3, [count]), 284: (3, [1 + planar]),
        317: (3, [1 + predictor]),
        **({322: (3, [wide]), 323: (3, [high]), 324: (4, offsets), 325: (4, sizes)} if tile else {
            273: (4, offsets), 278: (3, [rows]), 279: (4, sizes)}),
        **(tags or {}),
    }  # fmt: skip
    pointer, counter, inline, size = ("Q", "Q", 8, 20) if large else ("I", "H", 4, 12)
    start = header if content_at else header + len(content)
    values = start + struct.calcsize(order + counter) + size * len(fields) + inline
    entries, behind = b"", b""
    for tag, (kind, numbers) in sorted(fields.items()):
        raw = struct.pack(order + {1: "B", 3: "H", 4: "I", 9: "i", 11: "f"}[kind] * len(numbers), *numbers)
        if len(raw) > inline:
            raw, behind = struct.pack(order + pointer, values + len(behind)), behind + raw
        entries += struct.pack(order + "HH" + pointer, tag, kind, len(numbers)) + raw.ljust(inline, b"\0")
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HHHQ" if large else order + "HI", *((43, 8, 0, start) if large else (42, start)))
    directory = struct.pack(order + counter, len(fields)) + entries + bytes(inline) + behind
    return (head + directory).ljust(content_at, b"\0") + content if content_at else head + content + directory


decoder_of = functools.partial(pillow_of, size=(HEIGHT, WIDTH))
decoded = functools.partial(decode, name="a.tif", size=(HEIGHT, WIDTH))


def rejected(data: bytes, **settings: Any) -> tuple[str, str]:
    return rejection(data, **{"size": (HEIGHT, WIDTH), **settings})[1:]


def level(values: Samples, bits: int, depth: int, *, gray: bool = True) -> Samples:
    """The formulas that tiff.py states, in floating point; 8 bits in a build of 16 are scaled afterwards."""
    share = values.astype(np.float64) / ((1 << bits) - 1)
    if depth == 16:
        return np.floor(share * 65535 + 0.5) if bits > 8 else 257 * np.floor(share * 255 + 0.5)
    return np.floor(share * 255 + 0.5) if gray or bits <= 8 else np.floor(share * 65535 + 0.5) // 256


FORMS: dict[str, dict[str, Any]] = {
    "one strip": {}, "strips": {"rows": 5}, "tiles": {"tile": (16, 16)}, "deflate": {"compression": DEFLATE},
    "deflate, strips": {"compression": DEFLATE, "rows": 5},
    "packbits tiles": {"compression": PACKBITS, "tile": (16, 16)},
    "big-endian": {"order": ">"}, "big-endian deflate": {"order": ">", "compression": DEFLATE},
    "BigTIFF": {"large": True}, "big-endian BigTIFF": {"large": True, "order": ">", "compression": DEFLATE},
    "low bit first": {"low_bit_first": True}, "predictor": {"compression": DEFLATE, "predictor": True, "rows": 5},
    "predictor without compression": {"tags": {317: (3, [2])}},
}  # fmt: skip


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", FORMS)
def test_gray_and_rgb_of_every_depth_have_the_levels_of_tiff_6(form: str, bits: int, depth: int) -> None:
    if "predictor" in FORMS[form] and bits < 8:
        assert rejected(tiff(noise(6, 3), 6, RGB, **FORMS[form]))[0] == "undecodable"
        return
    gray = noise(bits, 1)
    expected = np.broadcast_to(level(gray, bits, depth), (HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(decoded(tiff(gray, bits, GRAY, **FORMS[form]), bit_depth=depth), expected)
    white = decoded(tiff(gray, bits, GRAY_0, **FORMS[form]), bit_depth=depth)
    np.testing.assert_array_equal(white, expected.max() - expected)
    colours = noise(bits, 3)
    for planar in (False, True):
        found = decoded(tiff(colours, bits, RGB, planar=planar, **FORMS[form]), bit_depth=depth)
        np.testing.assert_array_equal(found, level(colours, bits, depth, gray=False), err_msg=f"planar: {planar}")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize(
    ("photometric", "extra", "alpha"),
    [
        (GRAY, [2], 1), (GRAY_0, [2], 1), (GRAY, [1], 1), (GRAY, [0], None),
        (RGB, [2], 3), (RGB, [1], 3), (RGB, [0], None), (RGB, [], 3),
        (RGB, [2, 0], 3), (RGB, [0, 2], 4), (RGB, [0, 0], None),
    ],
    ids=str,
)  # fmt: skip
def test_more_samples_are_alpha_or_left_out(
    photometric: int, extra: list[int], alpha: int | None, compression: int, planar: bool, bits: int, depth: int
) -> None:
    count = 3 if photometric == RGB else 1
    samples = noise(bits, count + max(1, len(extra)))
    if extra == [1]:  # colours never exceed the alpha by which they were multiplied
        samples = (samples.astype(np.int64) * np.maximum(samples[..., -1:], 0) // ((1 << bits) - 1)).astype(np.uint16)
        samples[..., -1] = noise(bits, count + 1)[..., -1]
    tags = {338: (3, extra)} if extra else None
    data = tiff(samples, bits, photometric, planar=planar, compression=compression, tags=tags)
    found = decoded(data, bit_depth=depth, background="0,0,255").astype(np.float64)
    top = 255 if depth == 8 else 65535
    colours = samples[..., :count] / ((1 << bits) - 1)
    share = np.ones((HEIGHT, WIDTH, 1)) if alpha is None else samples[..., [alpha]] / ((1 << bits) - 1)
    if extra == [1]:
        colours = colours / np.maximum(share, 1e-9)
    if photometric == GRAY_0:
        colours = 1 - colours
    expected = top * (colours * share + np.array([0, 0, 1]) * (1 - share))
    difference = np.abs(found - expected).max()
    print(f"largest difference to exact blending: {difference:.2f} levels")
    # Colours and alpha are rounded to levels, divided, and blended in levels: of 8 bits where either side has these.
    assert difference <= (3.1 if depth == 8 else 3.1 * 257 if bits == 8 else 1.6)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
def test_cmyk_is_the_same_by_pixels_and_by_planes(compression: int, bits: int, planar: bool) -> None:
    samples = noise(bits, 4)
    inks = (samples >> (bits - 8)).astype(np.uint8)
    expected = np.asarray(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()).convert("RGB"))
    data = tiff(samples, bits, CMYK, planar=planar, compression=compression)
    np.testing.assert_array_equal(decoded(data), expected)
    np.testing.assert_array_equal(decoded(data, bit_depth=16), expected * np.uint16(257))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [(8, False), (16, False), (16, True), (12, False)], ids=str)
def test_the_orientation_counts_once_or_not_at_all(kind: tuple[int, bool], orientation: int) -> None:
    bits, planar = kind
    samples = noise(bits, 3)
    upright = samples.transpose(1, 0, 2) if orientation >= 5 else samples  # TIFF 6.0, section 8: Orientation
    upright = upright[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    data = tiff(samples, bits, RGB, planar=planar, tags={274: (3, [orientation])})
    for depth in (8, 16):
        for turned, pixels in ((True, upright), (False, samples)):
            settings: dict[str, Any] = {"bit_depth": depth, "exif_orientation": turned, "size": pixels.shape[:2]}
            found = decoded(data, **settings)
            np.testing.assert_array_equal(found, level(pixels, bits, depth, gray=False))
            with decoder_of(**settings) as decoder:
                assert decoder.upright_size(data, "a.tif") == pixels.shape[:2]


def test_what_xmp_says_of_a_tiff_s_orientation_turns_nothing() -> None:
    said = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    samples = noise(8, 3)
    found = decoded(tiff(samples, 8, RGB, tags={700: (1, list(said))}))
    np.testing.assert_array_equal(found, samples)


JPEG_12 = tiff(noise(12, 1), 12, GRAY, tags={259: (3, [JPEG])})
UNREADABLE: dict[str, tuple[str, bytes]] = {
    "float16": ("float16 samples", tiff(noise(16, 1), 16, GRAY, tags={339: (3, [3])})),
    "int8": ("int8 samples", tiff(noise(8, 3), 8, RGB, tags={339: (3, [2, 2, 2])})),
    "int16": ("int16 samples", tiff(noise(16, 1), 16, GRAY, order=">", tags={339: (3, [2])})),
    "undefined": ("SampleFormat 4 of 8", tiff(noise(8, 1), 8, GRAY, tags={339: (3, [4])})),
    "32 bits": ("uint32 samples", tiff(noise(8, 1), 8, GRAY, tags={258: (3, [32])})),
    "5, 6 and 5 bits": ("samples of 5, 6 bits", tiff(noise(8, 3), 8, RGB, tags={258: (3, [5, 6, 5])})),
    "CFA": ("photometric interpretation 32803", tiff(noise(16, 1), 16, 32803)),
    "JPEG of 12 bits": ("12-bit samples of photometric interpretation 1 and compression 7", JPEG_12),
    "JPEG 2000": ("compression 34712", tiff(noise(16, 3), 16, RGB, tags={259: (3, [34712])})),
    "palette of 16 bits": ("16-bit samples of photometric interpretation 3", tiff(noise(16, 1), 16, PALETTE)),
    "subsampled": ("whose chroma is subsampled", tiff(noise(8, 3)[:, :12], 8, YCBCR, tags={256: (3, [WIDTH])})),
    "bands": ("6 samples a pixel", tiff(noise(16, 6), 16, GRAY, tags={338: (3, [0] * 5)})),
    "an unnamed sample": ("2 samples a pixel", tiff(noise(16, 2), 16, GRAY)),
    "too few samples": ("1 samples a pixel", tiff(noise(16, 1), 16, RGB)),
    "other inks": ("inks other than", tiff(noise(8, 4), 8, CMYK, tags={332: (3, [2])})),
    "predictor 3": (
        "with predictor 3", tiff(noise(16, 3), 16, RGB, planar=True, compression=DEFLATE, tags={317: (3, [3])})
    ),
    "65,535 samples": ("65535 samples a pixel; at most 16", tiff(noise(8, 1), 8, GRAY, tags={277: (3, [65535])})),
    "0 wide": ("0 x 14 pixels", tiff(noise(8, 1), 8, GRAY, tags={256: (3, [0])})),
    "a fractional size": ("tag 256 of type 11", tiff(noise(8, 1), 8, GRAY, tags={256: (11, [WIDTH])})),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_nothing_reads_right_is_undecodable_and_its_kind_is_named(kind: str) -> None:
    named, data = UNREADABLE[kind]
    for depth in (8, 16):
        code, detail = rejected(data, bit_depth=depth)
        assert code == "undecodable"
        assert detail.startswith("a TIFF of ")
        assert named in detail


@pytest.mark.skipif(not features.check("libtiff"), reason="this Pillow has no libtiff")
def test_samples_that_pillow_cannot_decode_are_said_to_be_compressed_so() -> None:
    data = tiff(noise(8, 3), 8, RGB, compression=DEFLATE)
    at = data.index(b"\x78\x9c")
    damaged = data[:at] + bytes(20) + data[at + 20 :]
    assert rejected(damaged) == (
        "undecodable", "a TIFF of compression tiff_adobe_deflate that Pillow cannot decode (decoder error -2)",
    )  # fmt: skip


def test_two_values_for_one_tag_are_not_chosen_from() -> None:
    data = tiff(noise(16, 3), 16, RGB, planar=True)
    at = struct.unpack_from("<I", data, 4)[0]
    twice = bytearray(data)
    twice[at + 2 : at + 4] = b"\1\1"  # the first tag, the width, as a second length
    assert rejected(bytes(twice)) == ("undecodable", "a TIFF of tag 257 twice")
    deep = tiff(noise(16, 3), 16, RGB, planar=True, tags={32997: (4, [1_000_000])})  # ImageDepth
    assert rejected(deep)[1] == "a TIFF of tags that two libraries read differently"


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library may allocate pixels."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("decoded"))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.usefixtures("undecoded")
def test_tiles_far_larger_than_the_image_are_rejected_before_they_are_decoded(bits: int, planar: bool) -> None:
    for wide, high in ((26_000, 26_000), (2**31, 16), (16, 2**31)):
        tags = {322: (4, [wide]), 323: (4, [high])}
        data = tiff(noise(bits, 3), bits, RGB, planar=planar, tile=(16, 16), compression=DEFLATE, tags=tags)
        assert rejected(data) == ("undecodable", f"a TIFF of tiles of {wide} x {high} pixels for an image of 18 x 14")
    large = tiff(noise(bits, 3), bits, RGB, planar=planar, tags={256: (4, [2**31 - 1])})
    assert rejected(large) == ("too-large", "2147483647 x 14 pixels; at most 89478485")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_strip_may_say_that_it_has_room_for_more_rows_than_the_image(bits: int) -> None:
    samples = noise(bits, 3)
    for planar, compression in itertools.product((False, True), (RAW, DEFLATE)):
        data = tiff(samples, bits, RGB, planar=planar, compression=compression, tags={278: (4, [2**32 - 1])})
        np.testing.assert_array_equal(decoded(data), level(samples, bits, 8, gray=False))


def test_numbers_may_have_a_type_with_a_sign() -> None:
    samples = noise(16, 3)
    for planar in (False, True):
        data = tiff(samples, 16, RGB, planar=planar, tags={256: (9, [WIDTH]), 257: (9, [HEIGHT]), 274: (9, [3])})
        np.testing.assert_array_equal(decoded(data, bit_depth=16), samples[::-1, ::-1])
        np.testing.assert_array_equal(decoded(data, bit_depth=16, exif_orientation=False), samples)
    assert rejected(tiff(samples, 16, RGB, tags={257: (9, [-HEIGHT])}))[0] == "too-large"


def test_a_small_image_may_lie_in_a_usual_tile() -> None:
    samples = noise(16, 3)
    data = tiff(samples, 16, RGB, planar=True, tile=(1024, 1024), compression=DEFLATE)
    np.testing.assert_array_equal(decoded(data, bit_depth=16), samples)


def test_tiles_that_are_listed_as_strips_are_tiles() -> None:
    samples = noise(8, 3)
    data = bytearray(tiff(samples, 8, RGB, tile=(16, 16)))
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        struct.pack_into("<H", data, entry, {324: 273, 325: 279}.get(tag, tag))
    np.testing.assert_array_equal(decoded(bytes(data)), samples)


@pytest.mark.parametrize("form", ["one strip", "strips", "tiles", "deflate, strips", "packbits tiles"])
@pytest.mark.parametrize(("bits", "planar"), [(8, False), (16, False), (16, True), (12, False)])
def test_a_file_that_is_cut_anywhere_is_truncated(form: str, bits: int, planar: bool) -> None:
    for content_at, depth in itertools.product((None, 1024), (8, 16)):
        whole = tiff(noise(bits, 3), bits, RGB, planar=planar, content_at=content_at, **FORMS[form])
        last = len(whole) - (200 if "tiles" in form else 2)  # behind it, tiles are no pixels of the image
        with decoder_of(bit_depth=depth) as decoder:
            decoder.decode_image(whole, "a.tif")
            for end in {*range(4, last, 61), last - 1}:
                with pytest.raises(BadItem) as caught:
                    decoder.decode_image(whole[:end], "a.tif")
                assert caught.value.code == "truncated", (end, len(whole), caught.value.detail)


def test_data_of_too_few_samples_is_no_picture() -> None:
    for compression in (RAW, DEFLATE, PACKBITS):
        taller = tiff(noise(16, 3), 16, RGB, planar=True, compression=compression, tags={257: (3, [99])})
        assert rejected(taller)[0] == "undecodable"


def test_without_the_extra_it_is_said_what_to_install_and_the_rest_is_as_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = {
        "8": tiff(noise(8, 3), 8, RGB), "16": tiff(noise(16, 3), 16, RGB), "gray16": tiff(noise(16, 1), 16, GRAY),
        "planes": tiff(noise(8, 3), 8, RGB, planar=True), "big-endian": tiff(noise(8, 1), 8, GRAY, order=">"),
    }  # fmt: skip
    if features.check("libtiff"):
        plain["big-endian"] = encode(noise(8, 3).astype(np.uint8), "TIFF", compression="tiff_lzw")
    others = {
        "a TIFF of 16-bit samples in planes": tiff(noise(16, 3), 16, RGB, planar=True),
        "a TIFF of 16-bit samples, whose zero is white,": tiff(noise(16, 1), 16, GRAY_0),
        "a TIFF of 12-bit samples": tiff(noise(12, 1), 12, GRAY),
    }
    before = {name: decoded(data) for name, data in plain.items()}
    rows = {name: decoded(data) for name, data in others.items()}
    (tmp_path / "src").mkdir()
    for number, data in enumerate((*plain.values(), *others.values())):
        (tmp_path / f"src/{number}.tif").write_bytes(data)
    config = BuildConfig(device="cpu", workers=0, size=(HEIGHT, WIDTH), dtype="uint8", layout="NHWC", max_rejects="90%")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tifffile", None)
        for name, data in plain.items():
            np.testing.assert_array_equal(decoded(data), before[name])
        for name, data in others.items():
            code, detail = rejected(data)
            assert code == "undecodable"
            assert detail.startswith(f"{name} needs tifffile and imagecodecs (")
            assert detail.endswith("; run: pip install 'tifffile>=2024.8.30' 'imagecodecs>=2024.9.22'")
        report = gpu_npz.build(tmp_path / "src", tmp_path / "out", config)
        assert (report.rows, report.rejects_by_code) == (5, {"undecodable": 3})
        assert estimate(tmp_path / "src", config, seconds=0).sample.unreadable == {"undecodable": 3}
    retry(tmp_path / "out", config)
    data = gpu_npz.open_dataset(tmp_path / "out")
    for row, expected in zip(data[5:], rows.values(), strict=True):
        np.testing.assert_array_equal(row, expected)


def test_a_build_and_what_looks_at_it_take_both_kinds(tmp_path: Path) -> None:
    files = {
        "0.tif": tiff(noise(8, 3, 0), 8, RGB),
        "1.tif": tiff(noise(16, 3, 1), 16, RGB, planar=True, tags={274: (3, [6])}),
        "2.tif": tiff(noise(12, 1, 2), 12, GRAY_0), "3.tif": UNREADABLE["float16"][1],
    }  # fmt: skip
    src = tmp_path / "src"
    src.mkdir()
    for name, data in files.items():
        (src / name).write_bytes(data)
    for depth in (8, 16):
        config = BuildConfig(device="cpu", workers=0, size=8, bit_depth=depth, dtype=f"uint{depth}", normalize="none")
        report = gpu_npz.build(src, tmp_path / f"out{depth}", config)
        assert (report.rows, report.rejects_by_code) == (3, {"undecodable": 1})
        (reject,) = (tmp_path / f"out{depth}/rejects.jsonl").read_text().splitlines()
        assert json.loads(reject)["detail"].startswith("a TIFF of float16 samples")
        data, preprocess = gpu_npz.open_dataset(tmp_path / f"out{depth}"), Preprocess(config, (8, 8))
        for row, name in enumerate(data.paths[:]):
            np.testing.assert_array_equal(preprocess(src / name), data[row])
            if name != "1.tif":  # Pillow gives nobody the samples of planes, or of depths that it does not know
                continue
        sample = estimate(src, config, seconds=0).sample
        assert (sample.formats, sample.unreadable, sample.sixteen_bit, sample.turned) == (
            {"TIFF": 3},
            {"undecodable": 1},
            2,
            1,
        )
        assert sample.sizes[0] in ((HEIGHT, WIDTH), (WIDTH, HEIGHT))
    item = Item(0, "1.tif", None)
    assert first_size(FolderSource(src), [item], BuildConfig(resize_mode="none")) == (WIDTH, HEIGHT)
    unturned = BuildConfig(resize_mode="none", exif_orientation=False)
    assert first_size(FolderSource(src), [item], unturned) == (HEIGHT, WIDTH)


def test_an_open_picture_gives_what_its_file_gives(tmp_path: Path) -> None:
    (tmp_path / "planes.tif").write_bytes(tiff(noise(16, 3), 16, RGB, planar=True))
    (tmp_path / "white.tif").write_bytes(tiff(noise(16, 1), 16, GRAY_0))
    for depth in (8, 16):
        preprocess = Preprocess(BuildConfig(size=9, bit_depth=depth, dtype=f"uint{depth}"), (9, 9))
        for name in ("planes.tif", "white.tif"):
            with Image.open(tmp_path / name) as picture:
                np.testing.assert_array_equal(preprocess(picture), preprocess(tmp_path / name))


def test_decoding_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    rejected(tiff(noise(16, 3), 16, RGB, planar=True, compression=DEFLATE, tags={279: (4, [9, 9])}))
    decoded(tiff(noise(16, 3), 16, RGB, planar=True, tags={42113: (1, list(b"nothing\0"))}))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_header_alone_says_by_which_library_a_file_is_read() -> None:
    assert Tiff(tiff(noise(8, 3), 8, RGB)).by_pillow(16)
    deep = Tiff(tiff(noise(16, 3), 16, RGB))
    assert (deep.by_pillow(8), deep.by_pillow(16), deep.bits, deep.size) == (True, False, 16, (HEIGHT, WIDTH))
    assert not Tiff(tiff(noise(16, 3), 16, RGB, planar=True)).by_pillow(8)
