"""Determines the image size of a dataset, from the settings or from its first image."""

from __future__ import annotations

from ..config import BuildConfig
from ..errors import SourceError
from ..sources.base import Source
from .plan import Plan


def image_size(plan: Plan, source: Source, config: BuildConfig) -> tuple[int, int]:
    """Height and width of every row in pixels, from the settings or else from the first image that can be decoded.

    Raises:
        SourceError: no image can be decoded.
    """
    if config.size is not None:
        return config.size

    from ..preprocess.pillow import first_size

    size = first_size(source, (item for at in range(plan.item_count) for item in plan.items(at, at + 1)), config)
    if size is None:
        raise SourceError(
            f"{source.location!r}: no image can be decoded, so --resize-mode none has no size to use; give --size"
        )
    return size
