"""The rows of an epoch and their order, which depends only on seed and epoch and is the same for every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .views import Rows

Places = NDArray[np.int64]


def kept_rows(data: Rows, keep_blank: bool, epoch: int = 0) -> Places:
    """The rows to train on, int64, without the zero rows of `--on-reject blank` unless `keep_blank`.

    They are ascending, and only those of a mix depend on the epoch. Their number does not.
    """
    rows = data.epoch_rows(epoch)
    return rows if data.valid is None or keep_blank else rows[data.valid[rows]]


def part(count: int, number: int, parts: int) -> tuple[int, int]:
    """Start and stop of part `number` of `count` entries; the lengths of the `parts` parts differ by at most one."""
    return count * number // parts, count * (number + 1) // parts


def share(count: int, rank: int, world_size: int, drop_last: bool) -> tuple[int, int]:
    """Start and stop of a rank's part of an epoch of `count` images; with `drop_last`, all parts are equally long."""
    return part(count - count % world_size if drop_last else count, rank, world_size)


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
    places_at = _sequence(bounds, seed, epoch)
    for begin in range(start, stop, size):
        places = places_at(np.arange(begin, min(begin + size, stop)))
        yield places if seed is None else np.random.default_rng((seed, epoch, begin)).permutation(places)


def shards_in(bounds: Places, spans: Sequence[tuple[int, int]], seed: int | None, epoch: int) -> list[int]:
    """The shards of some spans of the sequence of `windows`, as reading all spans at the same pace needs them.

    Args:
        bounds: as for `windows`.
        spans: start and stop of each, as positions in the sequence.
        seed: as for `windows`.
        epoch: as for `windows`.
    """
    order = shuffled(np.arange(len(bounds) - 1), seed, epoch)
    sizes = np.diff(bounds)[order]
    ends = np.cumsum(sizes)
    distances: dict[int, int] = {}
    for start, stop in spans:
        for at in np.flatnonzero((ends > start) & (ends - sizes < stop) & (sizes > 0)).tolist():
            distance = max(0, int(ends[at] - sizes[at]) - start)
            distances[int(order[at])] = min(distance, distances.get(int(order[at]), distance))
    return sorted(distances, key=lambda shard: distances[shard])


def _sequence(bounds: Places, seed: int | None, epoch: int) -> Callable[[Places], Places]:
    """What turns positions in the sequence of all shards, shuffled by seed and epoch, into places."""
    order = shuffled(np.arange(len(bounds) - 1), seed, epoch)
    ends = np.cumsum(np.diff(bounds)[order])
    shift: Places = bounds[1:][order] - ends

    def places_at(positions: Places) -> Places:
        found: Places = positions + shift[np.searchsorted(ends, positions, side="right")]
        return found

    return places_at


class ElasticOrder:
    """The global batches of one epoch, which do not depend on how many ranks and workers share them.

    The sequence of all shards, shuffled by seed and epoch, is cut into lanes of equal length. In each lane, windows of
    `buffer` consecutive places are shuffled. Each step takes the next `global_batch / lanes` places of every lane; the
    places that are left form one smaller last step. Any step can be computed alone.

    Args:
        bounds: as for `windows`.
        global_batch: places per step.
        lanes: how many lanes; divides `global_batch`.
        buffer: places per window.
        seed: decides the order; None leaves shards and places in order.
        epoch: decides the order.
        drop_last: omit the last step if it is smaller.

    Attributes:
        steps: how many there are.
    """

    def __init__(
        self,
        bounds: Places,
        global_batch: int,
        lanes: int,
        buffer: int,
        seed: int | None,
        epoch: int,
        drop_last: bool = False,
    ) -> None:
        count = int(bounds[-1])
        self._whole = count // global_batch
        self.steps = self._whole if drop_last else -(-count // global_batch)
        self._lanes = [part(count, lane, lanes) for lane in range(lanes)]
        self._each = global_batch // lanes
        self._buffer, self._seed, self._epoch = buffer, seed, epoch
        self._places_at = _sequence(bounds, seed, epoch)
        self._windows: dict[int, tuple[int, Places]] = {}  # the latest window of each lane

    def step(self, number: int) -> Places:
        """The places of a step, lane by lane."""
        parts = []
        for lane, (start, stop) in enumerate(self._lanes):
            begin = number * self._each
            end = begin + self._each if number < self._whole else stop - start
            while begin < end:
                window, skipped = divmod(begin, self._buffer)
                parts.append(self._window(lane, window)[skipped:][: end - begin])
                begin += len(parts[-1])
        return np.concatenate(parts)

    def spans(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """Start and stop, in the sequence of all shards, of the windows that a rank has yet to read of each lane."""
        count, done = len(self._lanes), step * self._each
        lanes = self._lanes[count * rank // world_size : -(-count * (rank + 1) // world_size)]
        return [(min(start + done - done % self._buffer, stop), stop) for start, stop in lanes]

    def _window(self, lane: int, number: int) -> Places:
        if self._windows.get(lane, (-1,))[0] != number:
            start, stop = self._lanes[lane]
            begin = start + number * self._buffer
            places = self._places_at(np.arange(begin, min(begin + self._buffer, stop)))
            if self._seed is not None:
                places = np.random.default_rng((self._seed, self._epoch, lane, number)).permutation(places)
            self._windows[lane] = number, places
        return self._windows[lane][1]


def require_natural(**values: int) -> None:
    """Raises UsageError unless each value is an integer of at least one."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}: got {value!r}; allowed: an integer of 1 or more")


def require_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size. Raises UsageError unless both are given and the rank is below the world size."""
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(f"rank {rank}, world_size {world_size}: give both, the rank from 0 up to world_size - 1")
    return rank, world_size
