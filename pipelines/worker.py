"""Joins the stages for one device: shards in, committed shards out, in one stream that never drains between two."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decode import make_decoder
from .decode.base import Decoded
from .errors import MismatchError, RejectedError, ShardError
from .geometry import Geometry
from .job import Job
from .manifest import CommitRecord
from .normalize import CudaNormalizer, Normalizer
from .plan import Batch
from .sink import Rows, ShardSink
from .sources.base import Source
from .storage import LocalStorage


@dataclass(frozen=True)
class Progress:
    """A batch has been decoded and goes to the disk."""

    items: int
    rejects: int
    source_bytes: int


@dataclass(frozen=True)
class Committed:
    """A shard is done."""

    record: CommitRecord


@dataclass(frozen=True)
class StageSeconds:
    """How long a worker was busy with each stage, once it has ended."""

    seconds: dict[str, float]


Event = Progress | Committed | StageSeconds


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; small, and can be pickled.

    `gpu` is a device number, None for the CPU; `threads` is how many the decoder may have, if it has any.
    `environment` is what the shards so far were made with, None if any will do.
    """

    out: str
    source: Source
    gpu: int | None
    batch_size: int
    threads: int
    environment: dict[str, Any] | None


def work(task: Task, shards: Iterable[int]) -> Generator[Event, None, None]:
    """Builds shards and says what happens. Closing the generator early publishes nothing that is unfinished.

    Raises:
        MismatchError: another decoder, version or GPU model made the shards so far.
        RejectedError: an item was rejected under `--on-reject fail`.
        ShardError: a shard failed for a reason that lies outside its images.
        StorageError: OUT cannot be written.
    """
    storage = LocalStorage(task.out)
    job = Job.open(storage)
    normalizer = Normalizer(job.settings) if task.gpu is None else CudaNormalizer(job.settings, task.gpu)
    geometry = Geometry.of(job.settings, job.record.image_size)
    decoder = make_decoder(
        job.record.backend,
        job.settings,
        geometry,
        task.source,
        batch_size=task.batch_size,
        threads=task.threads,
        gpu=task.gpu,
        stream=getattr(normalizer, "stream", None),
    )
    _require_environment(task.environment, environment := decoder.environment())
    seconds = {"read": 0.0, "decode": 0.0, "normalize": 0.0}
    batches = (batch for shard in shards for batch in job.plan.batches(shard, task.batch_size))
    try:
        sink = ShardSink(storage, job, environment, normalizer.allocate, task.batch_size)
    except MemoryError as exc:
        raise ShardError(f"no memory for batches of {task.batch_size} images; lower --batch-size or --workers") from exc
    with decoder, sink:
        for decoded in decoder.decode(batches):
            if decoded.rejects and job.settings.on_reject == "fail":
                reject = decoded.rejects[0]
                raise RejectedError(
                    f"{reject.path!r} is rejected at {reject.stage}: {reject.code} ({reject.detail}); mend the "
                    "file and run the same command, or start anew with --overwrite and --on-reject skip or blank"
                )
            for name, spent in decoded.seconds.items():
                seconds[name] += spent
            buffer = sink.buffer()
            start = time.perf_counter()
            rows = _rows(decoded, buffer, normalizer, blank=job.settings.on_reject == "blank")
            seconds["normalize"] += time.perf_counter() - start
            sink.put(rows)
            batch = decoded.batch
            yield Progress(len(batch.items), len(decoded.rejects), int(decoded.source_bytes.sum()))
            yield from map(Committed, sink.committed())
    yield from map(Committed, sink.committed())
    yield StageSeconds({**seconds, **sink.seconds})


def _rows(decoded: Decoded, buffer: NDArray[Any], normalizer: Normalizer | CudaNormalizer, *, blank: bool) -> Rows:
    batch: Batch = decoded.batch
    count = len(decoded.kept)
    images = buffer[:count]
    ready = normalizer.apply(decoded.pixels, images)
    valid = np.ones(count, bool)
    kept = decoded.kept
    if blank and decoded.rejects:
        ready()
        valid = np.isin(np.arange(len(batch.items)), kept)
        kept = np.arange(len(batch.items))
        images = buffer[: len(kept)]
        images[valid] = images[:count].copy()
        images[~valid] = 0
    return Rows(
        shard=batch.shard,
        images=images,
        items=[batch.items[position] for position in kept.tolist()],
        source_bytes=decoded.source_bytes[kept],
        valid=valid,
        rejects=decoded.rejects,
        last=batch.last,
        ready=ready,
        buffer=buffer,
    )


def _require_environment(expected: dict[str, Any] | None, found: dict[str, Any]) -> None:
    if expected is None or expected == found:
        return
    names = sorted({*expected, *found})
    differences = [
        f"  {name}: {expected.get(name)} made them, {found.get(name)} is here"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    raise MismatchError(
        "the shards so far were made in another environment, whose pixels may differ:\n" + "\n".join(differences) + "\n"
        "resume where they were made, or add --accept-environment to mix the two"
    )
