"""Encodes PNG files of 8 or 16 bits, gray or RGB (W3C PNG specification, third edition).

Pillow writes no 16-bit RGB, and takes twenty times as long to compress photos by 5% more: here NumPy filters all rows
by the Average filter (9.2), and ISA-L compresses them.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_MAGIC = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB = 0, 2  # colour types (11.2.1)
_AVERAGE = 3
_LEVEL = 2  # of ISA-L


def png(pixels: NDArray[Any]) -> bytes:
    """The PNG file of an image.

    Args:
        pixels: uint8 or uint16, (H, W) for gray or (H, W, 3) in R,G,B.
    """
    height, width = pixels.shape[:2]
    big = pixels.astype(pixels.dtype.newbyteorder(">"), order="C")  # samples are big-endian (7.1)
    samples = big.view(np.uint8).reshape(height, width, -1)
    around = np.zeros((height + 1, width + 1, samples.shape[2]), np.uint16)
    around[1:, 1:] = samples
    lines = np.empty((height, 1 + samples[0].size), np.uint8)
    lines[:, 0] = _AVERAGE
    predicted = (around[1:, :-1] + around[:-1, 1:]) >> 1
    lines[:, 1:] = (samples - predicted).astype(np.uint8).reshape(height, -1)  # modulo 256
    kind = _GRAY if pixels.ndim == 2 else _RGB
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, kind, 0, 0, 0)
    data: bytes = isal_zlib.compress(lines, _LEVEL)
    return _MAGIC + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", isal_zlib.crc32(content, isal_zlib.crc32(name)))
    )
