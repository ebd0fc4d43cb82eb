"""Encodes raw pixels in a format that every decoder supports."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encoded(pixels: NDArray[Any]) -> bytes:
    """Pixels as a binary PGM or PPM (https://netpbm.sourceforge.net/doc/ppm.html), or as a PNG if they have alpha.

    Args:
        pixels: uint8 or uint16 (H, W, 1) or (H, W, 3), which become PGM or PPM; uint8 (H, W, 4), which becomes PNG.
    """
    height, width, channels = pixels.shape
    if channels == 4:
        from PIL import Image  # loaded where it is needed, so that commands which decode nothing do not load it

        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()
    wide = pixels.dtype.itemsize == 2
    header = b"P%d\n%d %d\n%d\n" % (5 if channels == 1 else 6, width, height, 65_535 if wide else 255)
    return header + (pixels.astype(">u2") if wide else pixels).tobytes()
