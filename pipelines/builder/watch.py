"""What a build looks at while it goes on: how many items are rejected, whether the disk fills, how its workers fare."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

from ..dataset.space import format_bytes, free_space
from ..errors import StorageError
from ..sources.rejects import Reject
from ..workers.events import Event, Progress, Pulse

log = logging.getLogger(__name__)
_EARLY_REJECTS = 500  # before a build that rejects most of what it meets is stopped
_FLOOR_BYTES = 1 << 28  # what all workers write in some seconds
_LOOK_S = 2.0
_MOMENTS = 400  # of a timeline; beyond, every second one goes, and moments lie twice as far apart


@dataclass(frozen=True)
class Moment:
    """A build and one of its workers at some time of a run.

    Attributes:
        seconds: since the run began.
        items: done by then, by all workers.
        worker: whose figures follow, by its process number.
        memory_bytes, open_files, threads: that it has.
    """

    seconds: float
    items: int
    worker: int
    memory_bytes: int
    open_files: int
    threads: int


class Watch:
    """Is told all that happens in a run.

    Args:
        reject_limit: how many rejects the plan may have.
        storage_root: OUT, whose filesystem is looked at; None for none.

    Attributes:
        items, rejects: of this run so far.
        reject: one of this run, None before there is any.
        codes: of the rejects of this run, by one of each batch: those of commit records are not all.
    """

    def __init__(self, reject_limit: int, storage_root: str | None) -> None:
        self.items = self.rejects = 0
        self.reject: Reject | None = None
        self.codes: Counter[str] = Counter()
        self._sixteen_bit = False
        self._limit = reject_limit
        self._root = storage_root
        free_bytes = free_space(storage_root)[0] if storage_root else None
        self._floor = min(_FLOOR_BYTES, (free_bytes or 0) // 20)  # a small disk may be filled further
        self._begin = self._looked = time.monotonic()
        self._moments: list[Moment] = []
        self._apart_s = 0.0

    def see(self, event: Event) -> None:
        """Takes an event in.

        Raises:
            StorageError: the disk is nearly full.
        """
        if isinstance(event, Progress):
            self.items += event.items
            self.rejects += event.rejects
            if event.reject:
                self.reject = self.reject or event.reject
                self.codes[event.reject.code] += event.rejects
            if event.sixteen_bit and not self._sixteen_bit:
                self._sixteen_bit = True
                log.warning(
                    "%r, for one, has 16 bits a channel, of which 8 are kept; --bit-depth 16 keeps them all",
                    event.sixteen_bit,
                )
            self._look()
        elif isinstance(event, Pulse):
            now = time.monotonic() - self._begin
            if not self._moments or now - self._moments[-1].seconds >= self._apart_s:
                self._moments.append(Moment(now, self.items, *event))
            if len(self._moments) > _MOMENTS:
                self._moments = self._moments[::2]
                self._apart_s = 2 * now / _MOMENTS

    @property
    def hopeless(self) -> bool:
        """Whether the limit is passed and most items were rejected: the source is not what somebody thinks it is."""
        return self.rejects > max(self._limit, _EARLY_REJECTS, self.items // 2)

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """Moments of the run, in order, at about equal distances."""
        return tuple(self._moments)

    def _look(self) -> None:
        if self._root is None or time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        free_bytes, _ = free_space(self._root)
        if free_bytes is not None and free_bytes < self._floor:
            raise StorageError(
                f"{self._root!r}: its filesystem has {format_bytes(free_bytes)} free, less than the "
                f"{format_bytes(self._floor)} that a build leaves; stopped before it is full. Free some space, then "
                "run the same command to resume (--no-preflight does not look)"
            )
