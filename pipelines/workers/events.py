"""The task that a worker gets and the events that it reports: small objects that can be pickled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..dataset.commits import CommitRecord
from ..machine.tuning import Tuning
from ..sources.base import Source
from ..sources.rejects import Code, Reject
from ..storage.holders import Fence
from .messages import DecoderMessages


@dataclass(frozen=True)
class Progress:
    """A batch of a shard has been decoded and is being written. Negative numbers cancel progress that was lost.

    Attributes:
        shard: the shard's number.
        items: how many items the batch has.
        rejects: how many of them were rejected.
        source_bytes: the encoded size of all items.
        reject: the first reject of the batch; None if there is none.
        sixteen_bit: the path of an image that was reduced from 16 to 8 bits per channel; None if there was none so far.
    """

    shard: int
    items: int
    rejects: int
    source_bytes: int
    reject: Reject | None = None
    sixteen_bit: str | None = None


def taken_back(shard: int, steps: Sequence[Progress]) -> Progress:
    """The Progress that cancels all earlier steps of a shard."""
    return Progress(
        shard,
        -sum(step.items for step in steps),
        -sum(step.rejects for step in steps),
        -sum(step.source_bytes for step in steps),
    )


@dataclass
class ShardCounts:
    """What a worker counts while it builds a shard, for the report of the run.

    Attributes:
        changed_files: files that were removed or written to since the worker started, so that they may have been read
            only in part.
        decoded_by: how many images each decoder decoded, by its name: dali, pillow.
        spot_checks: images that were decoded on a GPU and compared with Pillow's.
        spot_check_differences: how many of them differ, also if they are decoded alone.
    """

    changed_files: int = 0
    decoded_by: Counter[str] = field(default_factory=Counter)
    spot_checks: int = 0
    spot_check_differences: int = 0

    def add(self, other: ShardCounts) -> None:
        """Adds the counts of other images."""
        self.changed_files += other.changed_files
        self.decoded_by.update(other.decoded_by)
        self.spot_checks += other.spot_checks
        self.spot_check_differences += other.spot_check_differences


@dataclass(frozen=True)
class Committed:
    """A shard has been committed."""

    record: CommitRecord
    counts: ShardCounts


@dataclass(frozen=True)
class WorkerEnded:
    """A worker has ended, with the time and memory that it used.

    Attributes:
        stage_seconds: how long it was busy with each stage. Stages overlap, and several shards are written at once.
        memory_bytes: the peak main memory of its process.
        gpu_memory_bytes: the GPU memory in use at its end, including the memory pools of DALI and CuPy and other
            processes on the same GPU; 0 on a CPU.
    """

    stage_seconds: dict[str, float]
    memory_bytes: int
    gpu_memory_bytes: int


@dataclass(frozen=True)
class CurrentItem:
    """In isolation mode: the index of the item that is about to be decoded; None once it is done.

    Engines do not pass it on.
    """

    index: int | None


class Pulse(NamedTuple):
    """The state of a worker, reported about once a second. Numbers that the system does not provide are 0.

    Attributes:
        process: the process ID.
        memory_bytes: the main memory that the process holds.
        open_files: how many file descriptors are open.
        threads: how many threads it has.
    """

    process: int
    memory_bytes: int
    open_files: int
    threads: int


Event = Progress | Committed | WorkerEnded | CurrentItem | Pulse | DecoderMessages


@dataclass(frozen=True)
class Task:
    """What a worker is to build, and how.

    Attributes:
        out: OUT, as a path or URL.
        source: reads the items.
        gpu: the device number; None for the CPU.
        tuning: the batch size, the number of threads, and so on.
        provenance: what made the committed shards; None if any will do.
        isolated: isolation mode: batches have one item each, and the worker reports each item before it decodes it.
        skipped: in isolation mode, items that are rejected without being decoded: code and detail by index.
        fence: the lock under which the worker writes.
        drop_cache: whether the page cache drops shards as they reach the disk.
    """

    out: str
    source: Source
    gpu: int | None
    tuning: Tuning
    provenance: dict[str, Any] | None
    isolated: bool = False
    skipped: Mapping[int, tuple[Code, str]] = field(default_factory=dict)
    fence: Fence | None = None
    drop_cache: bool = False
