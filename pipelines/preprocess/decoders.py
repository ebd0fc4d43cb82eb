"""Makes the decoder of a build; its library is imported only then."""

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
    """The decoder of a backend, whose library is imported here.

    Args:
        backend: "pillow" or "dali".
        config: the settings of the build.
        geometry: the resize mode and the output size.
        source: reads the items.
        tuning: limits such as the batch size and the number of threads.
        gpu: the device number; None for the CPU.
        stream: CuPy's stream on which the pixels will be used.
    """
    if backend == "pillow":
        return pillow_decoder(config, geometry, source)
    from .dali import DaliDecoder

    return DaliDecoder(config, geometry, source, tuning=tuning, device=gpu, stream=stream)


def pillow_decoder(config: BuildConfig, geometry: Geometry, source: Source | None) -> PillowDecoder:
    """The Pillow decoder for the bit depth of the settings; without a source it only decodes single images."""
    if config.bit_depth == 16:
        from .pillow_16bit import SixteenBitDecoder

        return SixteenBitDecoder(config, geometry, source)
    from .pillow import PillowDecoder

    return PillowDecoder(config, geometry, source)
