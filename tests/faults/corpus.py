"""Image files that are made to do harm, by kind of file and kind of damage: the same ones for the same seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, features

SIDE = (40, 56)
KINDS = {
    "jpeg": ("JPEG", {"quality": 85}),
    "jpeg progressive": ("JPEG", {"quality": 85, "progressive": True}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"quality": 80}),
    "gif": ("GIF", {}),
}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "GIF": "gif"}
TRUNCATIONS, FLIPS = 200, 2000


def corpus(
    seed: int = 0, *, truncations: int = TRUNCATIONS, flips: int = FLIPS
) -> Iterator[tuple[str, str, str, bytes]]:
    """Kind, damage, file name and content of each file.

    Args:
        seed: of pictures and damage.
        truncations: cuts of each kind, at equal distances from its first byte to its last but one.
        flips: files of each kind in which one to eight bytes have another value.
    """
    chance = random.Random(seed)
    for kind, (form, options) in KINDS.items():
        if not _can_be_made(form, **options):
            continue
        whole = encoded(form, seed, **options)
        extension = EXTENSIONS[form]
        for number in range(truncations):
            yield kind, "cut", f"{number:04}.{extension}", whole[: len(whole) * number // truncations]
        for number in range(flips):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 8))):
                data[chance.randrange(len(data))] = chance.randrange(256)
            yield kind, "flipped", f"{number:04}.{extension}", bytes(data)
        plain = [each for each in KINDS.values() if each[0] != "WEBP" and _can_be_made(each[0], **each[1])]
        others = [encoded(form, seed, **options) for form, options in plain]
        for number, other in enumerate(others):
            for at, length in enumerate((2, 4, 16, 64, 256)):
                yield kind, "spliced", f"{number}-{at}.{extension}", other[:length] + whole[length:]
    for kind, damage, make in CRAFTED:
        form = KINDS[kind][0]
        if _can_be_made(form):
            yield kind, damage, f"0.{EXTENSIONS[form]}", make(encoded(form, seed, **KINDS[kind][1]))


def _can_be_made(form: str, **options: object) -> bool:
    """Not every build of Pillow has every codec."""
    return (
        features.check({"WEBP": "webp", "TIFF": "libtiff"}[form])
        if form == "WEBP" or "compression" in options
        else True
    )


def encoded(form: str, seed: int, **options: object) -> bytes:
    """A picture with smooth parts and noise."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(SIDE[0]) * 3, np.arange(SIDE[1]) * 2)[..., None] + np.array([0, 40, 90])
    pixels = (ramp + rng.integers(0, 60, (*SIDE, 3))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def _jpeg_frame(data: bytes) -> int:
    """Where a JPEG's frame header begins (ITU-T T.81, B.2.2)."""
    return next(at for at in range(len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC2))


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _jpeg(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: _patched(data, _jpeg_frame(data) + at, new)


def _png_size(width: int, height: int) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]

    return make


def _png_bomb(data: bytes) -> bytes:
    """30,000 x 30,000 pixels of one colour, in a few kilobytes a gigabyte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    side = 30_000
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    content = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return data[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def _app1(data: bytes, exif: bytes) -> bytes:
    block = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", min(len(block) + 2, 0xFFFF)) + block + data[2:]


def _many_entries(data: bytes) -> bytes:
    entries = [(0x0112, 3, 1, 1)] + [(0x9000 + number % 4096, 4, 1, number) for number in range(5_400)]
    return _app1(data, b"II*\0" + struct.pack("<I", 8) + _ifd(entries))


def _claimed_entries(data: bytes) -> bytes:
    return _app1(data, b"II*\0" + struct.pack("<IH", 8, 10_000) + struct.pack("<HHII", 0x0112, 3, 1, 6))


def _nested_thumbnails(data: bytes) -> bytes:
    for _ in range(20):
        thumbnail = data if len(data) < 40_000 else data[:40_000]
        first = _ifd([(0x0112, 3, 1, 1)], 8 + 18)
        second = _ifd([(0x0201, 4, 1, 8 + 18 + 30), (0x0202, 4, 1, len(thumbnail))])
        data = _app1(data, b"II*\0" + struct.pack("<I", 8) + first + second + thumbnail)
    return data


def _cyclic_exif(data: bytes) -> bytes:
    return _app1(data, b"II*\0" + struct.pack("<I", 8) + _ifd([(0x0112, 3, 1, 6), (0x8769, 4, 1, 8)], 8))


def _tiff_cycle(data: bytes) -> bytes:
    """The directory says that it is followed by itself."""
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    return _patched(data, at + 2 + 12 * count, struct.pack("<I", at))


def _tiff_tag(tag: int, value: int) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        (at,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            if struct.unpack_from("<H", data, entry)[0] == tag:
                return _patched(data, entry + 2, struct.pack("<HII", 4, 1, value))
        return data

    return make


CRAFTED: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("jpeg", "0x0", _jpeg(5, b"\0\0\0\0")),
    ("jpeg", "absurd size", _jpeg(5, b"\xff\xff\xff\xff")),
    ("jpeg", "said to be larger", _jpeg(5, b"\x08\x00\x08\x00")),
    ("jpeg", "arithmetic", _jpeg(1, b"\xc9")),
    ("jpeg", "lossless", _jpeg(1, b"\xc3")),
    ("jpeg", "hierarchical", _jpeg(1, b"\xc5")),
    ("jpeg", "12 bits", _jpeg(4, b"\x0c")),
    ("jpeg", "0 components", _jpeg(9, b"\0")),
    ("jpeg", "sampling 15x15", _jpeg(11, b"\xff")),
    ("jpeg", "no end", lambda data: data[:-2]),
    ("jpeg", "rubbish behind its end", lambda data: data + bytes(100_000)),
    ("jpeg", "10,000 scans", lambda data: data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 10_000 + data[-2:]),
    ("jpeg", "EXIF of 5,401 entries", _many_entries),
    ("jpeg", "EXIF that claims 10,000 entries", _claimed_entries),
    ("jpeg", "nested thumbnails", _nested_thumbnails),
    ("jpeg", "cyclic EXIF", _cyclic_exif),
    ("png", "0x0", _png_size(0, 0)),
    ("png", "absurd size", _png_size(2**31 - 1, 2**31 - 1)),
    ("png", "said to be larger", _png_size(5_000, 5_000)),
    ("png", "bomb", _png_bomb),
    ("bmp", "0x0", lambda data: _patched(data, 18, bytes(8))),
    ("bmp", "absurd size", lambda data: _patched(data, 18, b"\xff\xff\xff\x7f" * 2)),
    ("bmp", "negative height", lambda data: _patched(data, 22, struct.pack("<i", -(2**31)))),
    ("tiff", "cyclic", _tiff_cycle),
    ("tiff", "absurd size", _tiff_tag(0x0100, 2**31 - 1)),
    ("tiff", "0 wide", _tiff_tag(0x0100, 0)),
    ("tiff", "absurd strip", _tiff_tag(0x0117, 2**32 - 1)),
    ("tiff", "65,535 samples", _tiff_tag(0x0115, 65_535)),
    ("webp", "absurd size", lambda data: _patched(data, 26, b"\xff\x3f\xff\x3f")),
    ("gif", "absurd size", lambda data: _patched(data, 6, b"\xff\xff\xff\xff")),
    ("gif", "0x0", lambda data: _patched(data, 6, bytes(4))),
)
