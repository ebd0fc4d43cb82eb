"""One of n parts of a build, as one of n jobs: every n-th shard, so that all parts are of about the same size."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import LockedError, UsageError
from ..storage.base import LOCK, Storage

PLAN_WAIT_S = 86_400.0  # for the first of several parts, which lists and may measure, or the last, which finishes
_ARRAY = (("MIN", "0"), ("STEP", "1"))


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

        `auto` reads a Slurm array's SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT, together with SLURM_PROCID and
        SLURM_NTASKS where each job of the array has several tasks; else these two alone; else RANK and WORLD_SIZE.

        Raises:
            UsageError: `auto`, and nothing of that is set, or the array has gaps.
        """
        if setting != "auto":
            number, count = map(int, setting.split("/"))
            return cls(number, count, f"--part {setting}")
        task, tasks = _numbers(environ, "SLURM_PROCID", "SLURM_NTASKS") or (0, 1)
        array = _numbers(environ, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        if array is not None:
            job, jobs = array
            low, step = (int(environ.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in _ARRAY)
            place, rest = divmod(job - low, step)
            if rest or not 0 <= place < jobs:
                raise UsageError(
                    f"--part auto: task {job} is none of a Slurm array's {jobs} tasks from {low} in steps of {step}; "
                    f"submit an array without gaps (--array=1-{jobs}), or give --part i/n"
                )
            return cls(place * tasks + task + 1, jobs * tasks, f"SLURM_ARRAY_TASK_ID={job}, of {jobs}, x {tasks} tasks")
        for rank, size in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
            if (found := _numbers(environ, rank, size)) is not None:
                return cls(found[0] + 1, found[1], f"{rank}={found[0]}, {size}={found[1]}")
        raise UsageError(
            "--part auto: neither SLURM_ARRAY_TASK_ID, nor SLURM_PROCID with SLURM_NTASKS, nor RANK with WORLD_SIZE is "
            "set; give --part i/n"
        )

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


def _numbers(environ: Mapping[str, str], rank: str, size: str) -> tuple[int, int] | None:
    """A rank and of how many; None where they are not set, or are no such numbers."""
    values = environ.get(rank, ""), environ.get(size, "")
    if not all(value.isascii() and value.isdigit() for value in values):
        return None
    number, count = map(int, values)
    return (number, count) if rank.startswith("SLURM_ARRAY") or number < count else None
