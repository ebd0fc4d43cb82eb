"""Which shards of a build are left for its workers, and how often each one has lost its worker."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

_DOUBTFUL = 2  # losses after which a shard is built in isolation mode


class ShardQueue:
    """Hands out shards and takes back those whose worker was lost.

    From its second loss on, a shard is handed out only to workers in isolation mode.

    Args:
        shards: what to build; handed out in this order.
        max_losses: losses after which a shard is hopeless.
    """

    def __init__(self, shards: Iterable[int], *, max_losses: int) -> None:
        self._ordinary = deque(shards)
        self._doubtful: deque[int] = deque()
        self._losses: Counter[int] = Counter()
        self._max_losses = max_losses

    def __len__(self) -> int:
        """How many shards no worker has."""
        return len(self._ordinary) + len(self._doubtful)

    def left(self, *, isolated: bool) -> int:
        """How many shards are left for workers in isolation mode, or for all other workers."""
        return len(self._doubtful if isolated else self._ordinary)

    def take(self, *, isolated: bool) -> int | None:
        """The next shard for a worker; None if none is left for it.

        Args:
            isolated: whether the worker is in isolation mode.
        """
        shards = self._doubtful if isolated else self._ordinary
        return shards.popleft() if shards else None

    def put_back(self, shard: int, *, lost: bool = True) -> None:
        """Returns a shard to the front of the queue.

        Args:
            shard: one that `take` gave.
            lost: whether this counts as a loss; not if an item is known to have caused it.
        """
        self._losses[shard] += lost
        (self._doubtful if self._losses[shard] >= _DOUBTFUL else self._ordinary).appendleft(shard)

    def is_hopeless(self, shard: int) -> bool:
        """Whether a shard has been lost so often that building it again is pointless."""
        return self._losses[shard] >= self._max_losses
