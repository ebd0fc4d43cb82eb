"""Turns stored rows back into image files: levels from values, then PNG or JPEG."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..dataset.manifest import Manifest
from ..errors import UsageError
from ..preprocess.normalize import as_decoded, levels, table, tells_levels
from .png import png

ImageFormat = Literal["png", "jpeg"]
_MOST_PIXELS_A_SIDE = 65_500  # of Pillow's JPEG encoder
_ADVICE = (
    "export npz or npy, which take the stored values as they are, or build with --dtype uint8, which stores pixels"
)


class Encoder:
    """Encodes the stored images of a dataset, in any number of threads.

    Args:
        manifest: the manifest of the dataset.
        image_format: `png` keeps every pixel; `jpeg` does not, and has 8 bits.
        quality: the quality of JPEG files, 1 to 100.

    Attributes:
        extension: the extension of the files.

    Raises:
        UsageError: the levels of pixels cannot be recovered from the stored values, or do not fit into a JPEG.
    """

    def __init__(self, manifest: Manifest, image_format: ImageFormat, quality: int) -> None:
        config = manifest.config
        values = table(config)
        if values is None:
            raise UsageError(
                f"images are stored with --normalize {config.normalize}: each by its own statistics, from which its "
                f"pixels cannot be recovered; {_ADVICE}"
            )
        if not tells_levels(values):
            raise UsageError(
                f"some of the {values.shape[1]} levels of pixels have the same {config.dtype} value with --normalize "
                f"{config.normalize}, so they cannot be recovered; {_ADVICE}"
            )
        if image_format == "jpeg" and config.bit_depth != 8:
            raise UsageError(f"JPEG has 8 bits, and these images have {config.bit_depth}; choose --format png")
        if image_format == "jpeg" and max(manifest.images.size) > _MOST_PIXELS_A_SIDE:
            raise UsageError(f"JPEG has at most {_MOST_PIXELS_A_SIDE} pixels a side; choose --format png")
        self._table, self._images = values, manifest.images
        self._quality = None if image_format == "png" else quality
        self.extension = "png" if image_format == "png" else "jpg"

    def __call__(self, stored: NDArray[Any]) -> bytes:
        """The file of one stored image, (C, H, W) or (H, W, C)."""
        layout = self._images.layout
        pixels = as_decoded(levels(self._table, stored, layout), layout, self._images.channels)
        if self._quality is None:
            return png(pixels)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=self._quality)
        return buffer.getvalue()
