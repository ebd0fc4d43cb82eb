"""Decodes and resizes with 16 bits per channel, with Pillow where it keeps them, else with imagecodecs or tifffile.

Pillow reduces 16-bit colours to 8 bits. It still decodes every PNG and PPM first, so that the rejects do not depend on
the bit depth; imagecodecs then decodes such a PNG again, and NumPy reads such a PPM. tifffile decodes TIFF with more
than 8 bits; see `tiff.py`. 8-bit samples are scaled by 257, so that white stays white.

The other steps are the same as with 8 bits: alpha is composited onto the background; gray is (299 R + 587 G + 114 B) /
1000 (ITU-R BT.601-7), in integers rounded half up; Pillow's filters resize in 32-bit floats, plane by plane, and the
result is rounded half to even.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import BuildConfig
from ..machine.environment import require_bits16
from ..sources.base import Source
from .geometry import Geometry, Placement
from .pillow import PillowDecoder, upright
from .pillow_files import enough_memory, file_of
from .png import samples16
from .samples import is_gray16, opacity, plain, sixteen_bit_samples

_WHITE = 65_535
_LUMA = (299, 587, 114)


class SixteenBitDecoder(PillowDecoder):
    """As PillowDecoder, but gives uint16 pixels.

    Raises:
        BackendError: imagecodecs or tifffile is missing.
    """

    _whole_files = ("JPEG", "MPO", "PNG", "PPM", "TIFF")

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source | None) -> None:
        super().__init__(config, geometry, source)
        require_bits16("--bit-depth 16")

    def pixels_of(self, picture: Image.Image | NDArray[Any], path: str) -> NDArray[Any]:
        """See `PillowDecoder.pixels_of`; an array may also be uint16 (H, W, 1), (H, W, 3) or (H, W, 4).

        If a PIL image with 16-bit RGB samples is loaded already, Pillow has reduced it to 8 bits.
        """
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint16 and picture.shape[2:] in ((1,), (3,), (4,)):
            with enough_memory(path):
                self._check_pixels(picture.shape[1], picture.shape[0])
                place = self._placement(*picture.shape[:2])
                return self._place(self._planes(picture), place)
        return super().pixels_of(picture, path)

    def _upright(self, image: Image.Image) -> tuple[Any, Placement]:
        """The whole upright image as planes of 32-bit floats, and its placement."""
        kind = sixteen_bit_samples(image)  # must be read before loading, as must `tile`
        data = None if kind is None else file_of(image)
        tile: Any = next(iter(getattr(image, "tile", ())), None)
        orientation, place = self._loaded(image)
        if kind is not None and data is not None:
            samples = samples16(data) if image.format == "PNG" else _pnm(data, image.size, kind[1], tile)
        elif is_gray16(image):
            samples = np.asarray(image)[..., None]
            if (opaque := opacity(image)) is not None:
                samples = np.concatenate([samples.repeat(3, axis=2), opaque[..., None] * np.uint16(_WHITE)], axis=2)
        else:
            flat = plain(image, "RGB", self._config.background)
            samples = np.asarray(flat).reshape(flat.height, flat.width, -1) * np.uint16(257)
        return [upright(plane, orientation) for plane in self._planes(samples)], place

    def _planes(self, samples: NDArray[Any]) -> list[Image.Image]:
        """Samples (H, W, 1), (H, W, 3) or (H, W, 4) as planes: R, G and B, or a single gray plane."""
        if samples.shape[2] == 4:
            alpha = samples[..., 3:].astype(np.uint32)
            behind = np.array(self._config.background, np.uint32) * 257
            samples = (samples[..., :3] * alpha + behind * (_WHITE - alpha) + _WHITE // 2) // _WHITE
        if samples.shape[2] == 3 and self._mode == "L":
            samples = (samples.astype(np.uint32) @ np.array(_LUMA, np.uint32)[:, None] + 500) // 1000
        return [Image.fromarray(samples[..., at].astype(np.float32)) for at in range(samples.shape[2])]

    def _place(self, planes: Any, place: Placement) -> NDArray[Any]:
        size = (place.width, place.height)
        resized = [plane if plane.size == size else plane.resize(size, self._filter) for plane in planes]
        values = np.stack([np.asarray(plane) for plane in resized], axis=2)
        pixels = np.rint(values).clip(0, _WHITE).astype(np.uint16)
        return self._on_canvas(np.repeat(pixels, self._config.channel_count // len(planes), axis=2), place)


def _pnm(data: bytes, size: tuple[int, int], most: int, tile: Any) -> NDArray[np.uint16]:
    """The samples (H, W, 3) of a PPM, scaled to 16 bits. Pillow must have decoded it, which shows that it is complete.

    Args:
        data: the encoded file.
        size: width and height.
        most: the largest possible sample.
        tile: Pillow's tile, with the offset of the samples and whether they are text.
    """
    width, height = size
    if tile[0] == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", data[tile[2] :]).decode("ascii")
        found = np.fromstring(text, np.uint32, 3 * width * height, sep=" ")
    else:
        found = np.frombuffer(data, ">u2", 3 * width * height, tile[2]).astype(np.uint32)
    scaled = (np.minimum(found, most) * _WHITE + most // 2) // most
    return scaled.astype(np.uint16).reshape(height, width, 3)
