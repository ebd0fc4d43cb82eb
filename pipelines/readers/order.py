"""Which rows an epoch takes, and in which order: the same for every framework, by seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .dataset import Dataset

Places = NDArray[np.int64]


def kept_rows(data: Dataset, keep_blank: bool) -> Places:
    """The rows to train on, ascending: all but the zero rows of `--on-reject blank`, or those too."""
    if data.valid is None or keep_blank:
        return np.arange(len(data))
    return np.flatnonzero(data.valid)


def part(count: int, number: int, parts: int) -> tuple[int, int]:
    """Start and stop of one of `parts` runs of `count` entries: each entry once, and lengths differ by one at most."""
    return count * number // parts, count * (number + 1) // parts


def shuffled(rows: Places, seed: int | None, epoch: int) -> Places:
    """The rows in an order of this seed and epoch; as they are if `seed` is None."""
    return rows if seed is None else np.random.default_rng((seed, epoch)).permutation(rows)


def windows(bounds: Places, start: int, stop: int, size: int, seed: int | None, epoch: int) -> Iterator[Places]:
    """Places of one shard after the other, up to `size` at a time: shards shuffled, then each window in itself.

    A window depends on nothing that came before it, so a stream can go on at any.

    Args:
        bounds: shard k has the places from bounds[k] up to bounds[k + 1].
        start: where in the sequence of all shards to begin, and where the first window begins.
        stop: where to end.
        size: places a window.
        seed: of the order; None leaves shards and places as they are.
        epoch: of the order.
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
