"""Whether the holder of a lock is alive, by its heartbeat, watched from outside.

The watcher measures how long the heartbeat stands still by its own monotonic clock: clocks of two hosts are never
compared.
"""

from __future__ import annotations

import logging
import time

from .holders import Holder

log = logging.getLogger(__name__)
HEARTBEAT_S = 10.0
STALE_S = 90.0


class HeartbeatWatch:
    """Watches one heartbeat.

    Args:
        beat: the heartbeat at the first look: any value that its owner keeps changing.

    Attributes:
        alive: whether the heartbeat has changed since the first look.
    """

    def __init__(self, beat: object) -> None:
        self.alive = False
        self._beat = beat
        self.restart()

    def restart(self) -> None:
        """Waits for another STALE_S before the heartbeat counts as stale."""
        self._since = time.monotonic()

    def look(self, beat: object) -> None:
        """Compares the heartbeat now with the one at the last look."""
        if beat != self._beat:
            self._beat, self.alive = beat, True
            self.restart()

    @property
    def silent_s(self) -> float:
        """How long the heartbeat has stood still, in seconds."""
        return time.monotonic() - self._since

    @property
    def stale(self) -> bool:
        """Whether the heartbeat has stood still for STALE_S, so that its owner counts as dead."""
        return self.silent_s >= STALE_S


def warn_of_wait(lock: str, holder: Holder) -> None:
    """Logs that a lock is being watched; `lock` is how to show its place."""
    log.warning(
        "%s is held by process %s on host %s; checking for up to %g s whether it is still running",
        lock, holder.process, holder.host, STALE_S,
    )  # fmt: skip
