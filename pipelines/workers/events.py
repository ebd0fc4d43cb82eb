"""What a worker is given, and what it reports: small objects that can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..dataset.commits import CommitRecord
from ..machine.tuning import Tuning
from ..sources.base import Source
from ..sources.rejects import Code, Reject
from ..storage.holders import Fence
from .messages import Heard


@dataclass(frozen=True)
class Progress:
    """A batch of a shard has been decoded and goes to the disk. Negative numbers take back what was lost.

    `changed` counts files that were written to, or went, since the worker began: what was read of them may be a part.
    `reject` is one of the batch's; `sixteen_bit` is the path of an image of which 8 of 16 bits a channel were kept.
    """

    shard: int
    items: int
    rejects: int
    source_bytes: int
    changed: int = 0
    reject: Reject | None = None
    sixteen_bit: str | None = None


@dataclass(frozen=True)
class Committed:
    """A shard is done."""

    record: CommitRecord


@dataclass(frozen=True)
class WorkerEnded:
    """What a worker took.

    Attributes:
        stage_seconds: how long it was busy with each stage. Stages overlap, and several shards are written at once.
        memory_bytes: the most main memory that its process has held.
        gpu_memory_bytes: memory of the GPU that it held at its end, with what DALI and CuPy keep to use again; 0 on a
            CPU. Another process on the same GPU is counted in.
    """

    stage_seconds: dict[str, float]
    memory_bytes: int
    gpu_memory_bytes: int


@dataclass(frozen=True)
class Decoding:
    """In isolated mode: the item that is about to be decoded, None once it is done. For the engine alone."""

    index: int | None


class Pulse(NamedTuple):
    """How a worker fares, every second about: its process, main memory that it holds, open files, threads.

    Zeros where the system does not tell.
    """

    process: int
    memory_bytes: int
    open_files: int
    threads: int


Event = Progress | Committed | WorkerEnded | Decoding | Pulse | Heard


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; small, and can be pickled.

    `gpu` is a device number, None for the CPU. `provenance` is what the shards so far were made with, None if any will
    do. `isolated` decodes one image at a time and says which, and makes rejects of `skipped` items, by index with code
    and detail, without a look at them; its batches hold one item each. `fence` is the lock under which it works.
    """

    out: str
    source: Source
    gpu: int | None
    tuning: Tuning
    provenance: dict[str, Any] | None
    isolated: bool = False
    skipped: Mapping[int, tuple[Code, str]] = field(default_factory=dict)
    fence: Fence | None = None
