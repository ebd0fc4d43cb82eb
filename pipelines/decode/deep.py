"""Decoding and resizing with 16 bits a channel: by Pillow where it keeps them, else by OpenCV.

Pillow cuts the samples of 16-bit RGB files to 8 bits. It still opens every file, so what is rejected does not depend
on the bit depth; OpenCV then decodes those files again. Samples of 8 bits are scaled by 257, so that white stays white.
All that follows is as in 8 bits: alpha on the background, gray as ITU-R BT.601-7 weighs it, (299 R + 587 G + 114 B) /
1000, in integers rounded half up; resizing by Pillow's filters in 32-bit floats, plane by plane, rounded half to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import BuildConfig
from ..environment import require_opencv
from ..geometry import Geometry, Placement
from ..rejects import BadItem
from ..sources.base import Source
from .pillow import PillowDecoder, deep_samples, enough_memory, file_of, is_gray16, plain, upright

_WHITE = 65_535
_NO_MEMORY = -4  # StsNoMem of OpenCV
_LUMA = (299, 587, 114)


class DeepDecoder(PillowDecoder):
    """As PillowDecoder, to uint16 pixels.

    Raises:
        BackendError: OpenCV is missing.
    """

    _whole_files = ("JPEG", "PNG", "PPM", "TIFF")

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source | None) -> None:
        super().__init__(config, geometry, source)
        self._opencv = require_opencv()
        self._opencv.utils.logging.setLogLevel(0)  # what it cannot decode is in the rejects

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
        kind = deep_samples(image)  # which loading forgets
        data = None if kind is None else file_of(image)
        orientation, place = self._loaded(image)
        if kind is not None and data is not None:
            samples = self._by_opencv(data, *kind)
        elif is_gray16(image):
            samples = np.asarray(image)[..., None]
        else:
            flat = plain(image, "RGB", self._config.background)
            samples = np.asarray(flat).reshape(flat.height, flat.width, -1) * np.uint16(257)
        # Pillow and OpenCV have turned a TIFF already, whose orientation counts as 1 from there on.
        return [upright(plane, orientation) for plane in self._planes(samples)], place

    def _by_opencv(self, data: bytes, raw_mode: str, most: int) -> NDArray[np.uint16]:
        """The samples of a file: (H, W, 3) in R,G,B, or (H, W, 4) with alpha, by which colours are not multiplied."""
        try:
            found = self._opencv.imdecode(np.frombuffer(data, np.uint8), self._opencv.IMREAD_UNCHANGED)
        except self._opencv.error as exc:
            if exc.code == _NO_MEMORY:  # which is not the file's fault
                raise MemoryError(exc.err) from exc
            raise
        if found is None or found.dtype != np.uint16 or found.ndim != 3 or found.shape[2] not in (3, 4):
            raise BadItem("decode", "undecodable", f"OpenCV finds no 16-bit samples ({raw_mode})")
        samples: NDArray[Any] = found[..., [2, 1, 0, 3][: found.shape[2]]]
        if most != _WHITE:
            samples = (samples.astype(np.uint32) * _WHITE + most // 2) // most
        if raw_mode.startswith("RGBX"):
            samples = samples[..., :3]
        elif raw_mode.startswith("RGBa"):
            alpha = np.maximum(samples[..., 3:], 1).astype(np.uint32)
            colours = (samples[..., :3].astype(np.uint32) * _WHITE + alpha // 2) // alpha
            samples = np.concatenate([np.minimum(colours, _WHITE), samples[..., 3:]], axis=2)
        return samples.astype(np.uint16)

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
