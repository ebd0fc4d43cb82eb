"""One of the n parts of a build that n jobs share: every n-th shard, so that all parts have about the same size."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import LockedError
from ..storage.base import LOCK, Storage
from . import schedulers

PLAN_WAIT_S = 86_400.0  # until another part has listed and perhaps measured the source, or completed OUT


@dataclass(frozen=True)
class Part:
    """One part of a build.

    Attributes:
        number: the number of the part, counted from 1.
        count: the number of parts.
        origin: the option or the environment variables that the numbers come from, for messages.
    """

    number: int
    count: int
    origin: str

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def of(cls, setting: str, environ: Mapping[str, str]) -> Part:
        """Returns the part that a `part` setting selects.

        Args:
            setting: `i/n`, or `auto` or `auto/n` to read the variables of a cluster's scheduler (`schedulers.place`).
            environ: the environment variables.

        Raises:
            UsageError: `schedulers.place` cannot determine the part.
        """
        first, _, second = setting.partition("/")
        if first != "auto":
            return cls(int(first), int(second), f"--part {setting}")
        place = schedulers.place(environ, int(second) if second else None)
        return cls(place.number + 1, place.count, place.origin)

    @property
    def lock(self) -> str:
        """The name of the lock that the part holds while it runs."""
        return f"{LOCK}-part-{self.number}-of-{self.count}"

    def shards(self, shard_count: int) -> range:
        """The numbers of the part's shards, for a dataset of `shard_count` shards."""
        return range(self.number - 1, shard_count, self.count)


def live_parts(storage: Storage) -> list[str]:
    """The names of the locks that running parts of a build hold on OUT."""
    return [name for name in storage.live_locks() if name != LOCK]


def require_no_parts(storage: Storage) -> None:
    """Raises LockedError if parts of a build are running on OUT; releases locks that dead parts on other hosts left."""

    def look(part: str) -> None:
        with storage.lock(part):
            pass

    try:
        with ThreadPoolExecutor() as pool:  # it may take a while to find out whether a holder is alive
            list(pool.map(look, live_parts(storage)))
    except LockedError as exc:
        raise LockedError(f"a part of the build is still running: {exc}") from exc
