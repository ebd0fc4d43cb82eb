"""PNG: only what decides pixels is looked at, and the transparent colour is compared at the samples' full depth."""

from __future__ import annotations

import functools
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import decode, rejection

from gpu_npz.preprocess.png import without_extras
from gpu_npz.sources.rejects import BadItem

pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

HEIGHT, WIDTH = 8, 12
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types (11.2.1)
COUNTS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
Samples = NDArray[np.uint16]


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    found = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", found)


def png(
    samples: Samples, bits: int, colour: int, before: bytes = b"", behind: bytes = b"", end: bytes | None = None
) -> bytes:
    """A PNG of (H, W, samples) without filters; more chunks before or behind its pixels."""
    height, width, _ = samples.shape
    if bits < 8:
        digits = (samples.reshape(height, -1)[..., None] >> np.arange(bits)[::-1]) & 1
        lines = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        lines = samples.reshape(height, -1).astype(f">u{bits // 8}").view(np.uint8).reshape(height, -1)
    content = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    last = chunk(b"IEND", b"") if end is None else end
    return SIGNATURE + head + before + chunk(b"IDAT", content) + behind + last


def noise(bits: int, colour: int) -> Samples:
    return np.random.default_rng(bits).integers(0, 1 << bits, (HEIGHT, WIDTH, COUNTS[colour]), np.uint16)


decoded = functools.partial(decode, name="a.png", size=(HEIGHT, WIDTH))


def rejected(data: bytes) -> tuple[str, str]:
    return rejection(data, size=(HEIGHT, WIDTH))[1:]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize(
    ("bits", "colour"), [(1, GRAY), (2, GRAY), (4, GRAY), (8, GRAY), (16, GRAY), (8, RGB), (16, RGB)]
)
def test_the_transparent_colour_is_compared_at_full_depth(bits: int, colour: int, channels: str, depth: int) -> None:
    samples = noise(bits, colour)
    near = samples[2, 3].copy()
    near[-1] ^= 1  # in 16 bits, it has the same upper half
    samples[5, 6] = near
    # Bits above those of a sample are not looked at (11.3.1.1).
    above = 0 if bits == 16 else 0xFF << 8
    trns = chunk(b"tRNS", b"".join(struct.pack(">H", int(level) | above) for level in samples[2, 3]))
    settings: dict[str, Any] = {"bit_depth": depth, "background": "0,0,255", "channels": channels}
    settings |= {"normalize": "unit"} if channels == "gray" else {}
    found = decoded(png(samples, bits, colour, trns), **settings)
    opaque = decoded(png(samples, bits, colour), **settings)
    hidden = (samples == samples[2, 3]).all(axis=2)
    top = 255 if depth == 8 else 65535
    behind = np.array([0, 0, top]) if channels == "rgb" else np.array([round(0.114 * top)])
    np.testing.assert_array_equal(found[hidden], np.broadcast_to(behind, found[hidden].shape))
    np.testing.assert_array_equal(found[~hidden], opaque[~hidden])
    assert not hidden[5, 6]


def test_a_transparent_colour_of_16_bits_needs_the_extra_in_8_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = noise(16, RGB)
    data = png(samples, 16, RGB, chunk(b"tRNS", bytes(6)))
    without = decoded(png(samples, 16, RGB))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    code, detail = rejected(data)
    assert code == "undecodable"
    assert detail.startswith("a transparent colour of 16-bit samples needs tifffile and imagecodecs (")
    assert detail.endswith("run: pip install 'tifffile>=2024.8.30' 'imagecodecs>=2024.9.22'")
    np.testing.assert_array_equal(decoded(png(samples, 16, RGB)), without)


ZEROS = zlib.compress(bytes(70 << 20))  # more than Pillow inflates of any text, or of all of them
SHORT = ("gAMA", "cHRM", "sRGB", "pHYs", "sBIT", "bKGD", "tIME", "acTL")
DAMAGED = ("tEXt", "iCCP", "pHYs", "eXIf", "prIv", "abCd")
EXTRAS = {
    "text": chunk(b"tEXt", b"Comment\0" + b"a" * 3_000_000),
    "much text": b"".join(chunk(b"tEXt", b"%d\0" % n + b"a" * 1_000_000) for n in range(70)),
    "compressed text": chunk(b"zTXt", b"Comment\0\0" + ZEROS),
    "text of another method": chunk(b"zTXt", b"Comment\0\7" + ZEROS),
    "international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + ZEROS),
    "profile": chunk(b"iCCP", b"profile\0\0" + ZEROS),
    "profile of another method": chunk(b"iCCP", b"profile\0\7abc"),
    "no profile at all": chunk(b"iCCP", b""),
    **{f"short {name}": chunk(name.encode(), b"") for name in SHORT},
    **{f"CRC of {name}": chunk(name.encode(), bytes(9), crc=1) for name in DAMAGED},
    "a frame out of turn": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I", 7) + bytes(22)),
}  # fmt: skip


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize(("bits", "colour"), [(8, RGB), (16, RGB), (2, GRAY)])
def test_no_chunk_that_no_pixel_depends_on_makes_a_reject(bits: int, colour: int, kind: str, where: str) -> None:
    samples = noise(bits, colour)
    data = png(samples, bits, colour, **{where: EXTRAS[kind]})
    for depth in (8, 16):
        np.testing.assert_array_equal(
            decoded(data, bit_depth=depth), decoded(png(samples, bits, colour), bit_depth=depth)
        )


def test_an_orientation_counts_where_its_crc_is_right() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    samples = noise(8, RGB)
    for place in ("before", "behind"):
        found = decoded(png(samples, 8, RGB, **{place: EXTRAS["text"] + chunk(b"eXIf", block)}))
        np.testing.assert_array_equal(found, samples[::-1, ::-1])
        np.testing.assert_array_equal(decoded(png(samples, 8, RGB, **{place: chunk(b"eXIf", block, crc=1)})), samples)


def test_a_file_that_is_cut_behind_its_pixels_has_them_all() -> None:
    samples = noise(8, RGB)
    data = png(samples, 8, RGB, behind=chunk(b"tEXt", b"Comment\0" + b"a" * 100), end=b"")
    for end in range(len(data) - 120, len(data)):
        np.testing.assert_array_equal(decoded(data[:end]), samples)


def test_a_file_that_is_cut_before_them_is_truncated() -> None:
    data = png(noise(8, RGB), 8, RGB, before=chunk(b"tEXt", b"Comment\0" + b"a" * 100))
    for end in range(4, len(data) - 30):
        code, detail = rejected(data[:end])
        assert code == ("truncated" if end >= 8 else "not-an-image"), (end, detail)


def test_the_still_image_of_an_animation_is_taken() -> None:
    samples = noise(8, RGB)
    other = zlib.compress(bytes(HEIGHT * (1 + 3 * WIDTH)))
    frame = struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0)
    later = struct.pack(">I", 1) + frame[4:]
    moving = chunk(b"fcTL", later) + chunk(b"fdAT", struct.pack(">I", 2) + other)
    for first in (b"", chunk(b"fcTL", frame)):  # the image is the first frame, or none of them
        data = png(samples, 8, RGB, chunk(b"acTL", struct.pack(">II", 2, 0)) + first, moving)
        np.testing.assert_array_equal(decoded(data), samples)
        np.testing.assert_array_equal(decoded(data, bit_depth=16), samples * np.uint16(257))


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (png(noise(4, PALETTE), 4, PALETTE), "without a palette"),
        (png(noise(4, PALETTE), 4, PALETTE, before=chunk(b"pLTE", bytes(48))), "without a palette"),
        (png(noise(8, RGB), 8, RGB, before=png(noise(8, RGB), 8, RGB)[8:33]), "two headers"),
        (png(noise(8, RGB), 8, RGB)[:33] + chunk(b"IEND", b""), "without pixels"),
        (png(noise(8, RGB), 9, RGB), "header is damaged or of a kind that Pillow does not read"),
    ],
    ids=["no palette", "a palette of another name", "two headers", "no pixels", "9 bits"],
)
def test_what_pixels_depend_on_must_be_there_once(data: bytes, detail: str) -> None:
    code, found = rejected(data)
    assert (code, detail in found) == ("undecodable", True), found


def test_a_wrong_crc_of_what_pixels_depend_on_is_a_reject() -> None:
    palette = chunk(b"PLTE", bytes(48))
    assert decoded(png(noise(4, PALETTE), 4, PALETTE, before=palette)).shape == (HEIGHT, WIDTH, 3)
    for name, content in ((b"PLTE", bytes(48)), (b"tRNS", bytes(3))):
        before = palette if name == b"tRNS" else b""
        with pytest.raises(BadItem):
            decoded(png(noise(4, PALETTE), 4, PALETTE, before=before + chunk(name, content, crc=1)))


def test_a_file_is_copied_only_where_something_is_left_out() -> None:
    trns, exif = chunk(b"tRNS", bytes(6)), chunk(b"eXIf", b"MM\0*")
    for before, behind in ((b"", b""), (b"", exif), (trns, b""), (trns, exif), (exif, b"")):
        data = png(noise(8, RGB), 8, RGB, before, behind)
        assert without_extras(data) is data
        assert without_extras(png(noise(8, RGB), 8, RGB, before + EXTRAS["text"], behind + EXTRAS["profile"])) == data
    rest = data + b"what stands behind the end"
    assert without_extras(rest) is rest
