"""A short run of one worker, to estimate how long a build would take."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..dataset.job import Job
from ..dataset.layout import shard_name
from ..dataset.plan import Plan, collect
from ..sources.base import Group, as_bytes
from ..sources.rejects import Reject
from ..storage.local import LocalStorage
from ..workers.events import Committed, Progress, Task, WorkerEnded
from ..workers.worker import work
from .headers import spread
from .inspection import Inspection, OnStage

_MEASURED_ITEMS = 20_000
_MEASURED_SHARD_BYTES = 1 << 27  # each measured shard is deleted at once, so little space is needed


@dataclass(frozen=True)
class ShortRun:
    """The measurements of a short run of one worker.

    Attributes:
        items: how many items it processed after the first batch, or in it if there was no other.
        seconds: how long these items took.
        images_per_second: the rate.
        gpu_memory_bytes: the GPU memory in use at the end of the run; 0 on a CPU.
        stored_row_bytes: the mean size of a row in the shards that it built; 0 if it built none.
        rejects: how many items were rejected.
        reject: one of the rejects; None if there is none.
    """

    items: int
    seconds: float
    images_per_second: float
    gpu_memory_bytes: int
    stored_row_bytes: float
    rejects: int
    reject: Reject | None


@dataclass
class _Timer:
    """Times batches for `seconds`. The first batch does not count, because it includes the decoder's start-up."""

    seconds: float
    begin: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    first_items: int = 0
    items: int = 0

    @property
    def elapsed(self) -> float:
        """The seconds from the first batch to the last one that was counted."""
        return self.last - self.first

    @property
    def over(self) -> bool:
        """Whether `seconds` have passed."""
        return self.elapsed > self.seconds

    def add(self, items: int) -> None:
        """Counts a batch that has just been decoded."""
        self.last = time.perf_counter()
        if self.first:
            self.items += items
        else:
            self.first, self.first_items = self.last, items

    def result(self) -> tuple[int, float]:
        """The number of items and their seconds. If there was only one batch, it counts, and so does the start-up."""
        return (self.items, self.elapsed) if self.items else (self.first_items, self.last - self.begin)


def measure(found: Inspection, seconds: float, folder: str | None, progress: OnStage) -> ShortRun:
    """Runs one worker that builds shards in a temporary folder, from items that are spread over the plan.

    Args:
        found: the inspected source, its plan and its settings.
        seconds: the approximate duration, in seconds.
        folder: where to create the temporary folder; the system's default if None.
        progress: called with "measuring", the seconds that have passed, and `seconds`.

    Raises:
        StorageError: the folder cannot be written.
        ShardError: the run failed for a reason that no image caused.
    """
    tuning = found.tuning
    shard_rows = max(tuning.batch_size, _MEASURED_SHARD_BYTES // found.row_bytes)
    plan = _spread_plan(found.plan, min(found.plan.shard_rows, shard_rows))
    settings = found.config.model_copy(update={"on_reject": "skip"})
    timing = _Timer(seconds)
    rows = stored_bytes = gpu_memory = 0
    rejects: list[Reject] = []

    def shards() -> Iterator[int]:
        for shard in range(plan.shard_count):
            if timing.over:
                return  # so that the worker ends and reports its memory
            yield shard

    with tempfile.TemporaryDirectory(prefix="gpu-npz-plan-", dir=folder) as place:
        storage = LocalStorage(place)
        Job.create(storage, plan, settings, found.choice, source=found.source, image_size=found.image_size)
        task = Task(place, found.source, found.choice.gpu, tuning, None)
        with contextlib.closing(work(task, shards())) as events:
            for event in events:
                if isinstance(event, Committed):
                    rows, stored_bytes = rows + event.record.rows, stored_bytes + event.record.bytes
                    rejects += event.record.rejects
                    storage.remove(shard_name(event.record.shard, plan.shard_count))
                elif isinstance(event, WorkerEnded):
                    gpu_memory = event.gpu_memory_bytes
                elif isinstance(event, Progress) and not timing.over:
                    timing.add(event.items)
                    progress("measuring", min(timing.elapsed, seconds), seconds)
    items, duration = timing.result()
    return ShortRun(
        items=items,
        seconds=duration,
        images_per_second=items / duration,
        gpu_memory_bytes=gpu_memory,
        stored_row_bytes=stored_bytes / rows if rows else 0.0,
        rejects=len(rejects),
        reject=rejects[0] if rejects else None,
    )


def _spread_plan(plan: Plan, shard_rows: int) -> Plan:
    """A plan of items at equal distances in `plan`, with their labels."""
    groups = []
    for item in spread(plan, _MEASURED_ITEMS, 0.5):
        parent, slash, name = as_bytes(item.path).rpartition(b"/")
        own = None if plan.arrays.get("labels") is None else np.array([item.label])
        places = np.array([item.place], np.int64) if item.place else None
        label = item.label if isinstance(item.label, int) and own is None else -1
        groups.append(Group(parent + slash, [name], label, own, places))
    return Plan(collect(groups), shard_rows)
