"""Monitors a running build: the number of rejects, the free disk space, and the resources of its workers."""

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
_EARLY_REJECTS = 500  # fewer rejects never stop a build early
_FLOOR_BYTES = 1 << 28  # about as much as all workers write in a few seconds
_LOOK_S = 2.0
_MOMENTS = 400  # of a timeline; when there are more, every second one is dropped and the interval doubles


@dataclass(frozen=True)
class Moment:
    """The state of a run and of one of its workers at one time.

    Attributes:
        seconds: the time since the run began.
        items: how many items all workers had processed.
        worker: the process ID of the worker that the following numbers describe.
        memory_bytes: the main memory that the worker held.
        open_files: how many file descriptors it had open.
        threads: how many threads it had.
    """

    seconds: float
    items: int
    worker: int
    memory_bytes: int
    open_files: int
    threads: int


class Watch:
    """Monitors a run by its events.

    Args:
        reject_limit: the number of rejects that is allowed for the whole plan.
        storage_root: OUT, whose filesystem is checked for free space; None to skip this check.

    Attributes:
        items: how many items this run has processed so far.
        rejects: how many of them were rejected.
        reject: the first reject of this run; None if there is none yet.
        codes: the number of rejects of this run by code. All rejects of a batch count under the code of its first one.
            Commit records are not used, because they lack the rejects of unfinished shards.
    """

    def __init__(self, reject_limit: int, storage_root: str | None) -> None:
        self.items = self.rejects = 0
        self.reject: Reject | None = None
        self.codes: Counter[str] = Counter()
        self._sixteen_bit = False
        self._limit = reject_limit
        self._root = storage_root
        free_bytes = free_space(storage_root)[0] if storage_root else None
        self._floor = min(_FLOOR_BYTES, (free_bytes or 0) // 20)  # a small disk may be filled further than that
        self._begin = self._looked = time.monotonic()
        self._moments: list[Moment] = []
        self._apart_s = 0.0

    def see(self, event: Event) -> None:
        """Processes an event.

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
                    "%r, for one, has 16 bits per channel, of which 8 are kept; --bit-depth 16 keeps all of them",
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
        """Whether the limit is exceeded and most items were rejected, so that SRC is probably not what was intended."""
        return self.rejects > max(self._limit, _EARLY_REJECTS, self.items // 2)

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """Moments of the run, in order, at about equal intervals."""
        return tuple(self._moments)

    def _look(self) -> None:
        if self._root is None or time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        free_bytes, _ = free_space(self._root)
        if free_bytes is not None and free_bytes < self._floor:
            raise StorageError(
                f"{self._root!r}: its filesystem has {format_bytes(free_bytes)} free, less than the "
                f"{format_bytes(self._floor)} that a build leaves free, so it has stopped. Free some space, then "
                "run the same command to resume (--no-preflight turns this check off)"
            )
