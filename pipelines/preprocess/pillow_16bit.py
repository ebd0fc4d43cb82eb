"""Decoding and resizing with 16 bits a channel: by Pillow where it keeps them, else by imagecodecs and tifffile.

Pillow cuts the samples of 16-bit colours to 8 bits. It still decodes every PNG and PPM, so that what is rejected does
not depend on the bit depth; imagecodecs then decodes such a PNG again, and NumPy reads such a PPM. TIFF of more than 8
bits is for tifffile; see `tiff.py`. Samples of 8 bits are scaled by 257, so that white stays white. All that follows is
as in 8 bits: alpha on the background, gray as ITU-R BT.601-7 weighs it, (299 R + 587 G + 114 B) / 1000, in integers
rounded half up; resizing by Pillow's filters in 32-bit floats, plane by plane, rounded half to even.
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
from .pillow import PillowDecoder, enough_memory, file_of, upright
from .png import samples16
from .samples import is_gray16, opacity, plain, sixteen_bit_samples

_WHITE = 65_535
_LUMA = (299, 587, 114)


class SixteenBitDecoder(PillowDecoder):
    """As PillowDecoder, to uint16 pixels.

    Raises:
        BackendError: imagecodecs or tifffile is missing.
    """

    _whole_files = ("JPEG", "PNG", "PPM", "TIFF")

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source | None) -> None:
        super().__init__(config, geometry, source)
        require_bits16("--bit-depth 16")

    def pixels_of(self, picture: Image.Image | NDArray[Any], path: str) -> NDArray[Any]:
        """See `PillowDecoder.pixels_of`; an array may also be uint16 (H, W, 1), (H, W, 3) or (H, W, 4).

        Of a PIL image with 16-bit RGB samples that is loaded already, Pillow has kept 8 bits.
        """
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint16 and picture.shape[2:] in ((1,), (3,), (4,)):
            with enough_memory(path):
                self._check_pixels(picture.shape[1], picture.shape[0])
                place = self._placement(*picture.shape[:2])
                return self._place(self._planes(picture), place)
        return super().pixels_of(picture, path)

    def _upright(self, image: Image.Image) -> tuple[Any, Placement]:
        """The whole image as planes of 32-bit floats, and where they go."""
        kind = sixteen_bit_samples(image)  # which loading forgets, as it does the place of the samples
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
        """Samples (H, W, 1), (H, W, 3) or (H, W, 4) as planes: R, G and B, or one where they are equal."""
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
    """The samples (H, W, 3) of a PPM that Pillow has decoded, so that it is known to be whole, scaled to 16 bits.

    Args:
        data: the file.
        size: width and height.
        most: the sample that is white.
        tile: Pillow's, which says where the samples are, and whether as text.
    """
    width, height = size
    if tile[0] == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", data[tile[2] :]).decode("ascii")
        found = np.fromstring(text, np.uint32, 3 * width * height, sep=" ")
    else:
        found = np.frombuffer(data, ">u2", 3 * width * height, tile[2]).astype(np.uint32)
    scaled = (np.minimum(found, most) * _WHITE + most // 2) // most
    return scaled.astype(np.uint16).reshape(height, width, 3)
