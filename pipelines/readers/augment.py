"""Which part of each image a reader gives: a random crop, flipped or not, or the middle.

Random parts are computed from a hash of the seed, the epoch and the row. So they are the same for any number of
workers, threads and ranks, in any order, and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .views import Numbers, Rows

Augment = Literal["rrc-flip"]
Size = int | tuple[int, int]
Boxes = NDArray[np.int64]  # (N, 5): top, left, height and width in pixels, and whether the image is flipped

# Those of torchvision's RandomResizedCrop, and its algorithm
_SCALE = 0.08, 1.0
_RATIO = 3 / 4, 4 / 3
_TRIES = 10
_DRAWS = 2 * _TRIES + 3

_WEYL = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64, as are the constants of `_mixed`


@dataclass(frozen=True)
class Crops:
    """Chooses the part of each image.

    Attributes:
        stored: height and width of stored images, in pixels.
        size: height and width to which a part is resized, in pixels.
        shape: the shape of a resized part: (C, H, W) or (H, W, C), as stored.
        augment: "rrc-flip" for random parts; None for the middle, of this size.
        seed: decides random parts.
    """

    stored: tuple[int, int]
    size: tuple[int, int]
    shape: tuple[int, int, int]
    augment: Augment | None
    seed: int

    def boxes(self, rows: Numbers, epoch: int) -> Boxes:
        """The part of each image, which its row and the epoch decide.

        Args:
            rows: row numbers, int64 (N,).
            epoch: the number of the epoch.
        """
        if self.augment is None:
            middle = [(have - want) // 2 for have, want in zip(self.stored, self.size, strict=True)]
            return np.tile(np.array([*middle, *self.size, 0]), (len(rows), 1))
        draws = uniform(self.seed, epoch, rows, _DRAWS)
        height, width = self._sides(draws[:, :_TRIES], draws[:, _TRIES : 2 * _TRIES])
        top = np.floor(draws[:, -3] * (self.stored[0] - height + 1))
        left = np.floor(draws[:, -2] * (self.stored[1] - width + 1))
        central = height == 0
        height[central], width[central] = self._central()
        top[central] = (self.stored[0] - height[central]) // 2
        left[central] = (self.stored[1] - width[central]) // 2
        return np.stack([top, left, height, width, draws[:, -1] < 0.5], axis=1).astype(np.int64)

    def _sides(self, first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Height and width of each part by the first try that lies in the image; zeros if there is none."""
        area = self.stored[0] * self.stored[1] * (_SCALE[0] + first * (_SCALE[1] - _SCALE[0]))
        low, high = map(math.log, _RATIO)
        ratio = np.exp(low + second * (high - low))
        width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (width > 0) & (width <= self.stored[1]) & (height > 0) & (height <= self.stored[0])
        chosen = np.arange(len(fits)), fits.argmax(axis=1)
        some = fits.any(axis=1)
        return height[chosen] * some, width[chosen] * some

    def _central(self) -> tuple[int, int]:
        """The largest part in the middle whose ratio is allowed."""
        height, width = self.stored
        if width / height < _RATIO[0]:
            return round(width / _RATIO[0]), width
        if width / height > _RATIO[1]:
            return height, round(height * _RATIO[1])
        return height, width


def crops_of(data: Rows, augment: Augment | None, size: Size | None, seed: int) -> Crops | None:
    """What readers crop: with `augment`, random parts; with `size` alone, the middle; None for whole images.

    Args:
        data: the rows.
        augment: "rrc-flip" or None.
        size: height and width, or one number for both; by default that of the stored images.
        seed: decides random parts.

    Raises:
        UsageError: a value is not allowed, the middle is larger than the images, or they are not stored as uint8.
    """
    if augment not in (None, "rrc-flip"):
        raise UsageError(f"augment: got {augment!r}; allowed: 'rrc-flip' or None")
    if augment is None and size is None:
        return None
    first = data.layout == "NCHW"
    height, width = data.image_shape[1:] if first else data.image_shape[:2]
    wanted = (height, width) if size is None else (size, size) if isinstance(size, int) else size
    if not (
        isinstance(wanted, (tuple, list))
        and len(wanted) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in wanted)
    ):
        raise UsageError(f"size: got {size!r}; allowed: a number of pixels above 0, or (height, width)")
    if augment is None and (wanted[0] > height or wanted[1] > width):
        raise UsageError(
            f"size: got {size!r}, more than the stored {height} x {width}, of which the middle would be cut out; give "
            "at most this size, or augment='rrc-flip', which resizes"
        )
    if data.dtype != np.uint8:
        raise UsageError(
            f"augment and size need stored pixels, and {data.path!r} stores {data.dtype}; build it with --dtype uint8"
        )
    shape = (data.image_shape[0], *wanted) if first else (*wanted, data.image_shape[2])
    return Crops((height, width), (wanted[0], wanted[1]), shape, augment, seed)


def uniform(seed: int, epoch: int, rows: Numbers, draws: int) -> NDArray[np.float64]:
    """Random numbers from 0 up to 1, float64 (N, draws), that only seed, epoch and row decide.

    A SplitMix64 generator for each row, whose state at the beginning is a hash of the three numbers.
    """
    state = np.zeros(1, np.uint64)
    for number in (seed, epoch):
        state = _mixed(state + np.array([int(number) % 2**64], np.uint64) + _WEYL)
    state = _mixed(state + rows.astype(np.uint64) + _WEYL)
    values = _mixed(state[:, None] + _WEYL * np.arange(1, draws + 1, dtype=np.uint64))
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return found
