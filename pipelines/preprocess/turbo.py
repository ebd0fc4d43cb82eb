"""Decodes JPEGs with simplejpeg, an optional part that saves what Pillow spends besides calling libjpeg-turbo.

Both give the same pixels, since both call libjpeg-turbo with its accurate IDCT and its smooth upsampling.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .jpeg import JpegHeader


def is_installed() -> bool:
    """Whether simplejpeg can be imported."""
    return _library() is not None


def version() -> str:
    """Name and version of the library."""
    return f"simplejpeg {_library().__version__}"


def decode(data: bytes, header: JpegHeader, factor: int) -> NDArray[np.uint8] | None:
    """The pixels of a plain color JPEG: (H, W, 4), red, green, blue and an undefined channel.

    Args:
        data: the whole file.
        header: its header, which is `plain` and has 3 components.
        factor: 1, 2, 4 or 8: how much smaller to decode it, sides rounded up, as Pillow's `Image.draft` does.

    Returns:
        The pixels; None if libjpeg-turbo has a warning or an error about the data.

    Raises:
        MemoryError: there is not enough memory.
    """
    least = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    try:
        pixels: NDArray[np.uint8] = _library().decode_jpeg(data, "RGBX", min_factor=factor, **least)
    except ValueError:
        return None
    return pixels


@functools.cache
def _library() -> Any:
    """The module simplejpeg; None if it cannot be imported."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None
