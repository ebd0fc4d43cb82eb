"""Encoded images to pixels: one protocol, one module a library."""

from __future__ import annotations

from ..config import BuildConfig
from ..environment import BackendName
from ..geometry import Geometry
from ..sources.base import Source
from .base import Decoder


def make_decoder(
    backend: BackendName,
    config: BuildConfig,
    geometry: Geometry,
    source: Source,
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
    stream: int | None = None,
) -> Decoder:
    """The decoder of that name; its library is loaded here.

    Args:
        backend: which one.
        config: the settings of the build.
        geometry: where pixels go.
        source: gives the items.
        batch_size: the largest batch that it will meet.
        threads: how many it may have, if it has any.
        gpu: the device's number, None for the CPU.
        stream: handle of the CUDA stream on which the pixels will be used.
    """
    if backend == "pillow":
        from .pillow import PillowDecoder

        return PillowDecoder(config, geometry, source)
    from .dali import DaliDecoder

    return DaliDecoder(
        config, geometry, source, batch_size=batch_size, device=gpu, stream=stream, threads=threads
    )  # fmt: skip
