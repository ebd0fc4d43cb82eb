"""Decides which items of a batch DALI decodes, with their sizes, placement and orientation as plain numbers.

Everything comes from one parse of each header, so no decoder chooses a size or a rotation by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..sources.rejects import MAX_ENCODED_BYTES, BadItem
from .geometry import Geometry
from .jpeg import read_header

# By EXIF orientation: whether to transpose the stored image, then whether to flip it horizontally and vertically.
_TURNS = {
    1: (0, 0, 0),
    2: (0, 1, 0),
    3: (0, 1, 1),
    4: (0, 0, 1),
    5: (1, 0, 0),
    6: (1, 1, 0),
    7: (1, 1, 1),
    8: (1, 0, 1),
}


@dataclass(frozen=True)
class Route:
    """How the N items of a batch are decoded.

    Attributes:
        usable: bool (N,), whether DALI decodes the item; if not, the other arrays hold the numbers of a blank image.
        shapes: int32 (N, 2), height and width as stored, in pixels.
        sizes: float32 (N, 2), height and width to resize to, before the image is turned upright.
        starts: int32 (N, 2), row and column of the upright image at which the output begins; negative for a border.
        turns: int32 (N, 3), 0 or 1: whether to transpose, to flip horizontally, and to flip vertically, in this order.
    """

    usable: NDArray[np.bool_]
    shapes: NDArray[np.int32]
    sizes: NDArray[np.float32]
    starts: NDArray[np.int32]
    turns: NDArray[np.int32]


def route(encoded: Sequence[memoryview], config: BuildConfig, geometry: Geometry) -> Route:
    """The route of a batch, from the encoded bytes of each item."""
    blank = ((geometry.height, geometry.width), (geometry.height, geometry.width), (0, 0), _TURNS[1])
    found = [_of(data, config, geometry) for data in encoded]
    shapes, sizes, starts, turns = zip(*(numbers or blank for numbers in found), strict=True)
    return Route(
        np.array([numbers is not None for numbers in found], np.bool_),
        np.array(shapes, np.int32),
        np.array(sizes, np.float32),
        np.array(starts, np.int32),
        np.array(turns, np.int32),
    )


_Numbers = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int]]


def _of(data: memoryview, config: BuildConfig, geometry: Geometry) -> _Numbers | None:
    """Shape, size, start and turn of an image; None if DALI does not decode it."""
    if len(data) > MAX_ENCODED_BYTES:
        return None
    try:
        header = read_header(data)
    except BadItem:
        return None
    if header is None or not header.plain or header.height * header.width > config.max_pixels:
        return None
    shape = header.height, header.width
    turn = _TURNS[header.orientation if config.exif_orientation else 1]
    upright = shape[::-1] if turn[0] else shape
    if geometry.mode == "none" and upright != (geometry.height, geometry.width):
        return None
    place = geometry.place(*upright)
    if place.height * place.width > config.max_pixels:
        return None
    size = (place.width, place.height) if turn[0] else (place.height, place.width)
    return shape, size, (-place.top, -place.left), turn
