"""What the rows of an array are, images in one of several layouts, and how each becomes an encoded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError, UsageError
from ..rejects import MAX_ENCODED_BYTES
from .choice import flat_side
from .netpbm import encoded
from .npy import Array
from .scaling import Scale, to_levels

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class RowFormat:
    """The format of one image in an array.

    Attributes:
        dtype: uint8 or uint16; or float16, float32 or float64 with a `scale`.
        shape: (H, W), (H, W, C) or (C, H, W).
        planar: whether channels come first.
        channels: 1, 3 (RGB) or 4 (RGB and alpha).
        fortran: whether its elements are in Fortran order.
        scale: how floats become levels.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    planar: bool
    channels: int
    fortran: bool = False
    scale: Scale = "none"

    @property
    def row_bytes(self) -> int:
        """The size of the image in the array."""
        return self.dtype.itemsize * math.prod(self.shape)

    def pixels(self, data: bytes) -> NDArray[Any]:
        """The image of these bytes, (H, W, C), uint8 or uint16. Raises BadItem for values out of range."""
        pixels = np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")
        pixels = pixels.transpose(1, 2, 0) if self.planar else pixels
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        return to_levels(pixels, self.scale) if pixels.dtype.kind == "f" else pixels

    def encode(self, data: bytes) -> bytes:
        """The image of these bytes as PGM, PPM or PNG. Raises BadItem for values out of range."""
        return encoded(self.pixels(data))


def rows_of(array: Array, scale: Scale, *, flat: bool = False) -> RowFormat:
    """The format of the rows of an array (N, H, W), (N, H, W, C) or (N, C, H, W).

    Args:
        array: whose first axis are the images.
        scale: the setting.
        flat: whether rows are three planes of a square image, one after the other.

    Raises:
        SourceError: these are not images.
        UsageError: `scale` is given, and they are not floats.
    """
    shape, got = array.shape, f"{array.where} has {array.dtype} {array.shape}"
    if array.info.fortran and len(shape) > 1:
        name = array.info.name
        copy = (
            f"a = dict(np.load(OLD)); a[{name!r}] = np.ascontiguousarray(a[{name!r}]); np.savez(NEW, **a)"
            if array.in_npz
            else "np.save(NEW, np.ascontiguousarray(np.load(OLD)))"
        )
        raise SourceError(
            f"{array.where} is in Fortran order; images are in C order: save it as such in Python: {copy}"
        )
    if flat:
        side = flat_side(array)
        return _required(array, RowFormat(array.dtype, (3, side, side), planar=True, channels=3, scale=scale), got)
    if len(shape) == 3 and shape[2] in _CHANNELS:
        raise SourceError(
            f"{got}, which looks like one image of {shape[2]} channels; allowed are (N, H, W), (N, H, W, C) and (N, C, "
            "H, W): save one image as array[None], gray ones that are so narrow as array[..., None]"
        )
    allowed = "(N, H, W), (N, H, W, C) and (N, C, H, W), C being 1, 3 or 4"
    if len(shape) == 2:
        allowed += "; turn rows of pixels into images with array.reshape(len(array), H, W, C)"
    return _required(array, _format(array, shape[1:], scale, got, allowed), got)


def image_of(array: Array, scale: Scale) -> RowFormat:
    """The format of an array that is one image: (H, W), (H, W, C) or (C, H, W).

    Raises:
        SourceError: it is not an image.
        UsageError: `scale` is given, and it is not of floats.
    """
    got = f"{array.where} has {array.dtype} {array.shape}"
    found = _format(array, array.shape, scale, got, "(H, W), (H, W, C) and (C, H, W), C being 1, 3 or 4")
    return _required(array, found, got)


def _format(array: Array, shape: tuple[int, ...], scale: Scale, got: str, allowed: str) -> RowFormat:
    """The format of an image of this shape; `got` and `allowed` are for messages."""
    first, last = len(shape) == 3 and shape[0] in _CHANNELS, len(shape) == 3 and shape[2] in _CHANNELS
    if first and last:
        raise SourceError(f"{got}, where channels could be first or last; save it as (N, H, W) or with more columns")
    if len(shape) != 2 and not first and not last:
        raise SourceError(f"{got}; allowed are {allowed}")
    channels = shape[0] if first else shape[2] if last else 1
    return RowFormat(array.dtype, shape, first, channels, array.info.fortran, scale)


def _way_to_levels(dtype: np.dtype[Any]) -> str:
    """How to make pixels of an array whose dtype is not allowed."""
    if dtype.kind == "b":
        return "save array.astype('uint8') * 255"
    if dtype.kind in "iu":
        return "save array.astype('uint8') if values are 0 to 255, .astype('uint16') up to 65535; scale others first"
    if dtype.kind == "f":
        return "save array.astype('float32')"
    if dtype.names:
        return "save its fields as channels, np.stack([array[name] for name in array.dtype.names], axis=-1)"
    return "convert it to one of these"


def _required(array: Array, found: RowFormat, got: str) -> RowFormat:
    """The format itself. Raises SourceError for another dtype, and for an array without images, or too large ones."""
    dtype = found.dtype
    floats = dtype.kind == "f" and dtype.itemsize <= 8
    if not floats and (dtype.kind != "u" or dtype.itemsize > 2):
        raise SourceError(
            f"{got}; allowed are uint8 and uint16, and float16, float32 and float64 with --scale: "
            + _way_to_levels(dtype)
        )
    if found.scale != "none" and not floats:
        raise UsageError(f"--scale {found.scale} is for floats; {got}: omit it")
    if 0 in array.shape:
        raise SourceError(f"{got}, which is no image at all; give an array with images")
    if found.channels == 4 and dtype.newbyteorder("=") == np.uint16:
        raise SourceError(f"{got}; alpha is allowed with uint8 only: omit it, array[..., :3], or convert to uint8")
    if found.row_bytes > MAX_ENCODED_BYTES:
        raise SourceError(f"{array.where}: images of {found.row_bytes} bytes; at most {MAX_ENCODED_BYTES} are allowed")
    return found
