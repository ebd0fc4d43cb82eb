"""Encoded images to pixels: one protocol, one module a library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import BuildConfig
from ..machine.environment import BackendName
from ..machine.tuning import Tuning
from ..sources.base import Source
from .base import Decoder
from .geometry import Geometry

if TYPE_CHECKING:
    from .pillow import PillowDecoder


def make_decoder(
    backend: BackendName,
    config: BuildConfig,
    geometry: Geometry,
    source: Source,
    *,
    tuning: Tuning,
    gpu: int | None = None,
    stream: Any = None,
) -> Decoder:
    """The decoder of that name; its library is loaded here.

    Args:
        backend: which one.
        config: the settings of the build.
        geometry: where pixels go.
        source: gives the items.
        tuning: the largest batch that it will meet, how many threads it may have, and so on.
        gpu: the device's number, None for the CPU.
        stream: CuPy's stream on which the pixels will be used.
    """
    if backend == "pillow":
        return pillow_decoder(config, geometry, source)
    from .dali import DaliDecoder

    return DaliDecoder(config, geometry, source, tuning=tuning, device=gpu, stream=stream)


def pillow_decoder(config: BuildConfig, geometry: Geometry, source: Source | None) -> PillowDecoder:
    """Pillow's, for pixels of as many bits as the settings say; without a source, for single images."""
    if config.bit_depth == 16:
        from .pillow_16bit import SixteenBitDecoder

        return SixteenBitDecoder(config, geometry, source)
    from .pillow import PillowDecoder

    return PillowDecoder(config, geometry, source)
