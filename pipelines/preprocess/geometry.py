"""The integer formulas of the resize modes, shared by every decoder.

Libraries differ here: a 640x427 image whose shorter side is resized to 256 becomes 383 pixels long with torchvision's
rule and 384 with DALI's. So sizes and offsets are computed with these formulas and passed to the library as numbers.

With an image of h x w pixels (EXIF orientation applied) and an output of H x W:

    stretch      resize to H x W
    center-crop  cover Hc x Wc, where Hc = round(H / crop_pct), Wc = round(W / crop_pct), halves up:
                     h * Wc >= w * Hc:  resize to  (h * Wc // w) x Wc
                     otherwise:         resize to  Hc x (w * Hc // h)
                 then crop H x W at offset crop(resized - output), crop(d) = d / 2 rounded half to even
    pad          fit H x W:
                     h * W >= w * H:    resize to  H x max(1, (2 * w * H + h) // (2 * h))
                     otherwise:         resize to  max(1, (2 * h * W + w) // (2 * w)) x W
                 then place it at offset (output - resized) // 2 on a canvas of `pad_value`
    none         the image must be H x W already

For square outputs, center-crop is torchvision's `Resize(Hc)` and `CenterCrop(H)`, which truncates the longer side and
rounds the offset half to even (torchvision.transforms.functional, `_compute_resized_output_size` and `center_crop`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

from ..config import BuildConfig, ResizeMode


@dataclass(frozen=True)
class Placement:
    """What to do with one image: resize it to `height` x `width`, then put it at (`top`, `left`) of the output.

    Negative offsets crop (center-crop), positive offsets leave a border (pad).
    """

    height: int
    width: int
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class Geometry:
    """The resize mode of a build and its output size in pixels."""

    mode: ResizeMode
    height: int
    width: int
    crop_pct: float = 1.0

    @classmethod
    def of(cls, config: BuildConfig, image_size: tuple[int, int]) -> Geometry:
        """The geometry that `config` specifies; `image_size` is the (height, width) of the plan."""
        return cls(config.resize_mode, *image_size, config.crop_pct)

    @functools.cached_property
    def cover(self) -> tuple[int, int]:
        """(Hc, Wc): the size that a resized image covers before it is center-cropped."""
        pct = Fraction(str(self.crop_pct))
        return tuple(int(side / pct + Fraction(1, 2)) for side in (self.height, self.width))  # type: ignore[return-value]  # always two

    def place(self, height: int, width: int) -> Placement:
        """Where an image of `height` x `width` pixels goes; with mode `none`, it keeps its size."""
        if self.mode == "stretch":
            return Placement(self.height, self.width)
        if self.mode == "none":
            return Placement(height, width)
        if self.mode == "center-crop":
            cover_height, cover_width = self.cover
            if height * cover_width >= width * cover_height:
                resized = height * cover_width // width, cover_width
            else:
                resized = cover_height, width * cover_height // height
            return Placement(
                *resized, -_half_to_even(resized[0] - self.height), -_half_to_even(resized[1] - self.width)
            )
        if height * self.width >= width * self.height:
            resized = self.height, max(1, (2 * width * self.height + height) // (2 * height))
        else:
            resized = max(1, (2 * height * self.width + width) // (2 * width)), self.width
        return Placement(*resized, (self.height - resized[0]) // 2, (self.width - resized[1]) // 2)


def _half_to_even(difference: int) -> int:
    half = difference // 2
    return half + (half & 1) if difference & 1 else half
