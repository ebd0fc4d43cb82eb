"""PNG: removes chunks that do not affect pixels, and decodes 16-bit samples (W3C PNG specification, third edition)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..machine.environment import require_bits16
from ..sources.rejects import BadItem

_MAGIC = b"\x89PNG\r\n\x1a\n"
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PALETTE = 3  # the colour type of images with a palette (11.2.1)
_ANCILLARY = 0x20  # bit 5 of the first letter of a chunk's name (5.4)
_DEPTHS = {"L;2": 2, "L;4": 4, "L": 8, "RGB": 8}  # bits per sample, by Pillow's raw mode


def is_png(data: bytes) -> bool:
    """Whether a file is PNG by its signature (5.2)."""
    return data.startswith(_MAGIC)


def without_extras(data: bytes) -> bytes:
    """A PNG without the ancillary chunks that do not affect pixels; the same object if it has none.

    Pillow refuses a whole file if one of these chunks is invalid: a text or colour profile beyond its limits, or a
    wrong CRC. Of an animation, only the default image is kept, which all decoders show.

    Raises:
        BadItem: the pixels are missing or truncated, there are two headers, or the palette is missing.
    """
    view, kept, found = memoryview(data), bytearray(), set()
    begin, position = 0, len(_MAGIC)
    while position + 8 <= len(data) and b"IEND" not in found:
        name = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if name in _CRITICAL:
            if name == b"IHDR" and name in found:
                raise BadItem("decode", "undecodable", "a PNG of two headers")
            found.add(name)
        elif name not in found and _decides(name, view[position + 4 : end]):
            found.add(name)  # only the first of several is kept
        elif name[0] & _ANCILLARY:
            kept += view[begin:position]
            begin = end
        position = end
    if b"IDAT" not in found:
        if b"IEND" in found:
            raise BadItem("decode", "undecodable", "a PNG without pixels")
        raise BadItem("decode", "truncated", f"{len(data)} bytes, which end before the pixels begin")
    if data[12:16] == b"IHDR" and data[25] == _PALETTE and b"PLTE" not in found:
        raise BadItem("decode", "undecodable", "a PNG of palette indices without a palette")
    return b"".join((kept, view[begin:])) if kept else data


def _decides(name: bytes, chunk: memoryview) -> bool:
    """Whether an ancillary chunk (name, content, CRC) affects pixels; an eXIf chunk with a wrong CRC does not."""
    return name == b"tRNS" or (name == b"eXIf" and zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big"))


def set_transparency(image: Image.Image) -> None:
    """Scales the transparent colour of a PNG that is not loaded yet, so that it matches the samples that Pillow gives.

    Pillow scales 2-bit and 4-bit samples to 8 bits, but leaves the transparent colour unscaled (11.3.1.1).
    """
    colour, depth = image.info.get("transparency"), _DEPTHS.get(image.tile[0][3]) if image.tile else None
    if colour is None or depth is None:
        return
    top = (1 << depth) - 1
    scaled = [(level & top) * 255 // top for level in (colour if isinstance(colour, tuple) else (colour,))]
    image.info["transparency"] = tuple(scaled) if isinstance(colour, tuple) else scaled[0]


def samples16(data: bytes) -> NDArray[np.uint16]:
    """The samples of a 16-bit PNG: uint16 (H, W, 1), (H, W, 3), or (H, W, 4) if it has alpha or a transparent colour.

    Raises:
        BackendError: imagecodecs is missing.
        BadItem: imagecodecs decodes it to other than 16-bit samples.
        Exception: whatever imagecodecs raises for a damaged file.
    """
    found: NDArray[Any] = require_bits16("a transparent colour of 16-bit samples").imagecodecs.png_decode(data)
    if found.dtype != np.uint16:
        raise BadItem("decode", "undecodable", f"imagecodecs finds samples of type {found.dtype}, not of 16 bits")
    samples = found.reshape(*found.shape[:2], -1)
    return samples[..., [0, 0, 0, 1]] if samples.shape[2] == 2 else samples
