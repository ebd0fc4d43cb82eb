"""One of n parts of a build, as one of n jobs: every n-th shard, so that all parts are of about the same size."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import LockedError
from ..storage.base import LOCK, Storage
from . import schedulers

PLAN_WAIT_S = 86_400.0  # for the first of several parts, which lists and may measure, or the last, which finishes


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1 on; `origin` says where that was read."""

    number: int
    count: int
    origin: str

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def of(cls, setting: str, environ: Mapping[str, str]) -> Part:
        """The part that a `part` setting means.

        `auto` and `auto/n` read the variables of a cluster's scheduler; see `schedulers.place`.

        Raises:
            UsageError: as `schedulers.place`.
        """
        first, _, second = setting.partition("/")
        if first != "auto":
            return cls(int(first), int(second), f"--part {setting}")
        place = schedulers.place(environ, int(second) if second else None)
        return cls(place.number + 1, place.count, place.origin)

    @property
    def lock(self) -> str:
        """The name of the lock that the part holds while it is at work."""
        return f"{LOCK}-part-{self.number}-of-{self.count}"

    def shards(self, shard_count: int) -> range:
        """The part's shards."""
        return range(self.number - 1, shard_count, self.count)


def live_parts(storage: Storage) -> list[str]:
    """The parts of a build that are at work in OUT, by their locks."""
    return [name for name in storage.live_locks() if name != LOCK]


def require_no_parts(storage: Storage) -> None:
    """Raises LockedError where parts of a build are at work; ends the locks of those that another host left over."""

    def look(part: str) -> None:
        with storage.lock(part):
            pass

    try:
        with ThreadPoolExecutor() as pool:  # each may have to be watched for a while
            list(pool.map(look, live_parts(storage)))
    except LockedError as exc:
        raise LockedError(f"a part of the build is at work: {exc}") from exc
