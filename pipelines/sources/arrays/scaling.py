"""Floats from 0 to 1, or from -1 to 1, as levels of 0 to 255."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from ..rejects import BadItem

log = logging.getLogger(__name__)
Scale = Literal["none", "255", "signed"]
_RANGES = {"255": "0 to 1", "signed": "-1 to 1"}
_MOST_REMAINDER = 0.1  # levels; 1/255 in float16 is off by up to 0.06


def to_levels(values: NDArray[Any], scale: Scale) -> NDArray[np.uint8]:
    """The nearest level of each float: 255 * value, or 127.5 * (value + 1) for `signed`; halves become even.

    Raises:
        BadItem: a value rounds to no level of 0 to 255, or is not a number.
    """
    levels = _levels(values, scale)
    wrong = ~_within(levels)
    if wrong.any():
        raise BadItem(
            "read", "undecodable", f"it has the value {values[wrong][0]:g}; --scale {scale} takes {_RANGES[scale]}"
        )
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def require_scale(sample: NDArray[Any], scale: Scale, got: str) -> None:
    """Checks a sample of the images in an array of floats, and warns if rounding would lose information.

    Args:
        sample: some images, (n, ...).
        scale: the setting.
        got: the array, its dtype and shape, for messages.

    Raises:
        SourceError: `scale` is not given, or none of these images is in its range.
    """
    fitting = {each: _within(_levels(sample, each)).reshape(len(sample), -1).all(axis=1) for each in _RANGES}
    finite = sample[np.isfinite(sample)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
    seen = f"{got}, with values from {low:.6g} to {high:.6g} in {len(sample)} sampled images"
    best = next((each for each in _RANGES if 2 * fitting[each].sum() > len(sample)), None)
    if best is not None:
        way = f"use --scale {best}"
    elif low >= 0 and 1 < high <= 255:
        way = "if these are levels, save array.round().astype('uint8')"
    else:
        way = "scale them to 0 to 1, and use --scale 255, or save them as uint8"
    if scale == "none":
        raise SourceError(
            f"{seen}; floats must be scaled to levels of 0 to 255, by --scale 255 (for 0 to 1) or --scale signed (for "
            f"-1 to 1): {way}"
        )
    fit = fitting[scale]
    if not fit.any():
        raise SourceError(f"{seen}; --scale {scale} is for {_RANGES[scale]}: {way}")
    if scale == "signed" and fitting["255"].all():
        log.warning("%s; --scale signed takes -1 to 1, so that 0 becomes gray; --scale 255 is for 0 to 1", seen)
    levels = _levels(sample[fit], scale)
    if np.abs(levels - np.rint(levels)).max() > _MOST_REMAINDER:
        log.warning("%s; some lie between the levels of 0 to 255 and are rounded, which loses information", seen)


def _levels(values: NDArray[Any], scale: str) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact * 255 if scale == "255" else (exact + 1) * 127.5


def _within(levels: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether levels round to one of 0 to 255; NaN does not."""
    return (levels >= -0.5) & (levels <= 255.5)
