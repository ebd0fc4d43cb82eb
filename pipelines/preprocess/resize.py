"""Resizing with SIMD by cykooz-resizer, an optional part; without it, Pillow resizes.

Its bilinear filter differs from Pillow's by one level of 255 in about every seventh value and by two at most. Its
bicubic and Lanczos differ by up to 25 and 47 levels at sharp edges, so they are used only if asked for.
"""

from __future__ import annotations

import functools
import importlib
import logging
import platform
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..errors import BackendError, install_command

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)
_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
_PIXEL_TYPES = {1: "U8", 4: "U8x4"}  # by number of channels


def is_simd() -> bool:
    """Whether the imported PIL is Pillow-SIMD, whose versions are those of Pillow with the suffix `.postN`."""
    import PIL

    return ".post" in PIL.__version__


def resolved(config: BuildConfig) -> BuildConfig:
    """The settings with a `resizer` of auto replaced by simd or pillow, as this machine has them.

    Raises:
        BackendError: simd is asked for and cannot be imported.
    """
    if config.resizer == "simd":
        require_simd()
    if config.resizer != "auto":
        return config
    fits = config.interpolation == "bilinear" and config.bit_depth == 8
    found = "simd" if fits and not is_simd() and _library() is not None else "pillow"
    return config.model_copy(update={"resizer": found})


def require_simd() -> None:
    """Raises BackendError if cykooz-resizer cannot be imported."""
    if _library() is None:
        raise BackendError(
            f"--resizer simd needs cykooz-resizer, which cannot be imported; run: {install_command('simd')}"
        )


def advice(config: BuildConfig) -> str | None:
    """How to resize faster on this machine with these settings; None if nothing can be gained, or Pillow was chosen."""
    has_wheel = sys.platform == "darwin" or (platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc")
    fits = config.interpolation == "bilinear" and config.bit_depth == 8 and config.resize_mode != "none"
    if config.resizer != "auto" or not has_wheel or not fits or is_simd() or _library() is not None:
        return None
    command = install_command("simd")
    return f"{command} makes resizing on the CPU faster, for datasets that you build from then on"


class SimdResizer:
    """Resizes 8-bit samples of one or four channels. Threads may share it.

    Args:
        interpolation: bilinear, bicubic or lanczos.
    """

    def __init__(self, interpolation: str) -> None:
        self._library = _library()
        assert self._library is not None
        kind = getattr(self._library.FilterType, _FILTERS[interpolation])
        self._algorithm = self._library.ResizeAlg.convolution(kind)
        self._own = threading.local()  # threads that share a resizer wait for each other

    @property
    def version(self) -> str:
        """Name and version of the library, which decide the pixels."""
        from importlib.metadata import version  # takes its time to load

        return f"cykooz-resizer {version('cykooz-resizer')}"

    def resize(self, samples: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        """Samples (H, W, 1) or (H, W, 4), resized to (height, width, 1) or (height, width, 4). Raises MemoryError."""
        library = self._library
        if not hasattr(self._own, "resizer"):
            self._own.resizer = library.Resizer(), library.ResizeOptions(self._algorithm, use_alpha=False)
        resizer, options = self._own.resizer
        rows, columns, channels = samples.shape
        pixel_type = getattr(library.PixelType, _PIXEL_TYPES[channels])
        # Pixels are passed as bytes: `resize_pil` reads Pillow's C structures, whose layout depends on its version.
        # Where memory is short, Rust ends the process; NumPy raises MemoryError.
        np.empty(2 * channels * (rows * columns + width * height), np.uint8)
        source = library.ImageData(columns, rows, pixel_type, samples.tobytes())
        target = library.ImageData(width, height, pixel_type)
        resizer.resize(source, target, options)
        return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, channels)


def samples_of(image: Image.Image) -> NDArray[np.uint8]:
    """The samples of an L image (H, W, 1), or of an RGB image (H, W, 4) with an undefined fourth channel.

    Four channels are resized twice as fast as three.
    """
    data = image.tobytes("raw", "RGBX") if image.mode == "RGB" else image.tobytes()
    return np.frombuffer(data, np.uint8).reshape(image.height, image.width, -1)


def simd_resizer(config: BuildConfig) -> SimdResizer | None:
    """The resizer of these settings; None for Pillow's, also where simd is missing, of which one warning tells."""
    if config.resizer == "simd" and _library() is None:
        _warn_once()
        return None
    return SimdResizer(config.interpolation) if resolved(config).resizer == "simd" else None


@functools.cache
def _warn_once() -> None:
    log.warning(
        "the dataset was resized by cykooz-resizer, which is not installed here, so Pillow resizes; some pixels "
        "differ by a level or two of 255. To get the same pixels, run: %s",
        install_command("simd"),
    )


@functools.cache
def _library() -> Any:
    """The module cykooz_resizer; None if it cannot be imported."""
    try:
        return importlib.import_module("cykooz_resizer")
    except ImportError:
        return None
