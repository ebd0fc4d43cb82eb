"""Encoded images to pixels: one protocol, one module a library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import BuildConfig
from ..errors import SourceError
from ..geometry import Geometry
from ..machine.environment import BackendName
from ..machine.tuning import Tuning
from ..plan import Plan
from ..sources.base import Source
from .base import Decoder

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
    stream: int | None = None,
) -> Decoder:
    """The decoder of that name; its library is loaded here.

    Args:
        backend: which one.
        config: the settings of the build.
        geometry: where pixels go.
        source: gives the items.
        tuning: the largest batch that it will meet, how many threads it may have, and so on.
        gpu: the device's number, None for the CPU.
        stream: handle of the CUDA stream on which the pixels will be used.
    """
    if backend == "pillow":
        return pillow_decoder(config, geometry, source)
    from .dali import DaliDecoder

    return DaliDecoder(config, geometry, source, tuning=tuning, device=gpu, stream=stream)


def pillow_decoder(config: BuildConfig, geometry: Geometry, source: Source | None) -> PillowDecoder:
    """Pillow's, for pixels of as many bits as the settings say; without a source, for single images."""
    if config.bit_depth == 16:
        from .deep import DeepDecoder

        return DeepDecoder(config, geometry, source)
    from .pillow import PillowDecoder

    return PillowDecoder(config, geometry, source)


def image_size(plan: Plan, source: Source, config: BuildConfig) -> tuple[int, int]:
    """Height and width of every row: as the settings say, or those of the first image that can be decoded.

    Raises:
        SourceError: there is none.
    """
    if config.size is not None:
        return config.size
    from .pillow import first_size

    size = first_size(source, (item for at in range(plan.item_count) for item in plan.items(at, at + 1)), config)
    if size is None:
        raise SourceError(
            f"{source.location!r}: no image can be decoded, so --resize-mode none finds no size; give --size"
        )
    return size
