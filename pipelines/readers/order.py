"""The rows of an epoch and their order, which depends only on seed and epoch and is the same for every framework."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .dataset import Dataset

Places = NDArray[np.int64]


def kept_rows(data: Dataset, keep_blank: bool) -> Places:
    """The rows to train on, int64, ascending: without the zero rows of `--on-reject blank` unless `keep_blank`."""
    if data.valid is None or keep_blank:
        return np.arange(len(data))
    return np.flatnonzero(data.valid)


def part(count: int, number: int, parts: int) -> tuple[int, int]:
    """Start and stop of part `number` of `count` entries; the lengths of the `parts` parts differ by at most one."""
    return count * number // parts, count * (number + 1) // parts


def shuffled(rows: Places, seed: int | None, epoch: int) -> Places:
    """The rows, shuffled by seed and epoch; unchanged if `seed` is None."""
    return rows if seed is None else np.random.default_rng((seed, epoch)).permutation(rows)


def windows(bounds: Places, start: int, stop: int, size: int, seed: int | None, epoch: int) -> Iterator[Places]:
    """The places of all shards, shard by shard, in windows: the shards are shuffled, then the places in each window.

    A window does not depend on the windows before it, so a stream can resume at any window.

    Args:
        bounds: shard k has the places from bounds[k] up to bounds[k + 1].
        start: the position in the sequence of all shards at which the first window begins.
        stop: the position at which the last window ends.
        size: places per window.
        seed: decides the order; None leaves shards and places in order.
        epoch: decides the order.
    """
    order = shuffled(np.arange(len(bounds) - 1), seed, epoch)
    ends = np.cumsum(np.diff(bounds)[order])
    shift = bounds[1:][order] - ends
    for begin in range(start, stop, size):
        sequence = np.arange(begin, min(begin + size, stop))
        places = sequence + shift[np.searchsorted(ends, sequence, side="right")]
        yield places if seed is None else np.random.default_rng((seed, epoch, begin)).permutation(places)


def require_natural(**values: int) -> None:
    """Raises UsageError unless each value is an integer of at least one."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}: got {value!r}; allowed: an integer of 1 or more")
