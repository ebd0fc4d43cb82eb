"""build(): plan, engine, manifest, report."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from ..config import BuildConfig
from ..dataset.commits import CommitRecord, committed
from ..dataset.job import Job
from ..dataset.layout import MANIFEST, remove_temporaries
from ..dataset.manifest import publish
from ..errors import RejectLimitError, StorageError
from ..machine.environment import Choice
from ..machine.tuning import Tuning
from ..sources.base import Source
from ..storage.base import Storage
from ..workers import local, ray
from ..workers.events import Committed, Event, Task, WorkerEnded
from ..workers.messages import Heard, Messages
from .parts import PLAN_WAIT_S, Part
from .planning import (
    backend,
    require_revision,
    require_room,
)
from .report import BuildReport, Started, Tell, advice_on, bottleneck, hints_for, store_report, too_many_rejects
from .watch import Watch

log = logging.getLogger(__name__)


def run(
    storage: Storage,
    job: Job,
    source: Source,
    config: BuildConfig,
    progress: Tell,
    *,
    start: float,
    part: Part | None = None,
) -> BuildReport:
    """Builds what is not built yet, for whoever holds the lock; see `build`.

    Args:
        storage: OUT.
        job: what is being built.
        source: the images.
        config: its operational settings count.
        progress: told what happens.
        start: `time.perf_counter()` when all this began.
        part: which shards; all if None.
    """
    record, plan = job.record, job.plan
    records = committed(storage, job)
    mine = part.shards(plan.shard_count) if part else range(plan.shard_count)
    todo = [shard for shard in mine if shard not in records]
    items, todo_items = (sum(len(plan.shard_range(shard)) for shard in shards) for shards in (mine, todo))
    row_bytes = math.prod(job.row_shape) * job.dtype.itemsize
    choice = backend(job, config) if todo else Choice(record.backend)
    shard_rows = min(plan.shard_rows, plan.item_count)
    tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=shard_rows, shards=len(todo))
    progress(Started(items, items - todo_items, record.backend, record.device, tuning.workers))
    ended: list[WorkerEnded] = []
    built: set[int] = set()
    messages = Messages()
    watch = Watch(config.reject_limit(plan.item_count), storage.root if config.preflight else None)
    if todo:
        require_revision(records)
        if records and record.device == "cpu" and config.device not in ("auto", "cpu"):
            log.warning(
                "OUT was begun on the CPU and goes on there, not on GPU %s; --overwrite starts anew", config.device
            )
        require_room(storage, plan, config, row_bytes, todo)
        storage.remove(MANIFEST)  # a dataset that lost a shard is not complete while it is built again
        task = Task(storage.root, source, None, tuning, _environment(records, config), fence=storage.fence)
        with contextlib.ExitStack() as stack:
            stack.callback(_tidy, storage)  # once all workers have ended
            events = stack.enter_context(contextlib.closing(_events(task, todo, choice, config)))
            for event in events:
                watch.see(event)
                if isinstance(event, Committed):
                    records[event.record.shard] = event.record
                    built.add(event.record.shard)
                elif isinstance(event, WorkerEnded):
                    ended.append(event)
                elif isinstance(event, Heard):
                    messages.add(event)
                progress(event)
                if watch.hopeless:
                    break
    complete = False
    if part:
        with storage.lock(wait_s=PLAN_WAIT_S):
            records = committed(storage, job)  # the other parts', too
            complete = len(records) == plan.shard_count and publish(storage, job, records, config)
    elif not watch.hopeless:
        complete = publish(storage, job, records, config)
    stages: Counter[str] = Counter()
    for each in ended:
        stages.update(each.stage_seconds)
    rejects = Counter(reject.code for commit in records.values() for reject in commit.rejects)
    built_items = sum(len(plan.shard_range(shard)) for shard in built)
    seconds = time.perf_counter() - start
    report = BuildReport(
        out=storage.root,
        complete=complete,
        part=str(part) if part else None,
        missing_shards=plan.shard_count - len(records),
        items=plan.item_count,
        classes=None if record.class_names is None else len(record.class_names),
        label_columns=tuple(column.name for column in record.columns),
        rows=sum(commit.rows for commit in records.values()),
        rejects=rejects.total(),
        rejects_by_code=dict(sorted(rejects.items())),
        shards=plan.shard_count,
        dataset_bytes=sum(commit.bytes for commit in records.values()),
        backend=record.backend,
        device=record.device,
        tuning=tuning,
        built_shards=len(built),
        built_items=built_items,
        seconds=seconds,
        images_per_second=built_items / seconds,
        stage_seconds=dict(stages),
        bottleneck=bottleneck(stages, tuning),
        worker_memory_bytes=max((each.memory_bytes for each in ended), default=0),
        gpu_memory_bytes=max((each.gpu_memory_bytes for each in ended), default=0),
        changed_files=watch.changed,
        messages=messages.found(),
        hints=hints_for(job, list(records.values()), watch.changed),
        timeline=watch.timeline,
    )
    if todo:
        store_report(storage, report)
    if watch.hopeless and report.missing_shards:
        assert watch.reject is not None  # most items were
        raise RejectLimitError(
            f"stopped early: {watch.rejects} of the {watch.items} items of this run were rejected "
            f"({watch.reject.path!r} for one: {watch.reject.code}, {watch.reject.detail}); --max-rejects "
            f"{config.max_rejects} allows {config.reject_limit(plan.item_count)} of {plan.item_count}. "
            f"{advice_on(source, watch.codes)}; run the same command with a higher --max-rejects to go on all the same",
            report,
        )
    if not complete and not report.missing_shards:
        raise RejectLimitError(too_many_rejects(storage, source, report, config), report)
    return report


def _tidy(storage: Storage) -> None:
    """Removes what workers that died or were stopped left unfinished."""
    with contextlib.suppress(StorageError):  # nothing here may hide why a build stops
        remove_temporaries(storage)


def _events(task: Task, shards: Sequence[int], choice: Choice, config: BuildConfig) -> Generator[Event, None, None]:
    if config.engine == "local":
        return local.run(task, shards, choice.gpus, config.worker_timeout)
    return ray.run(task, shards, workers=config.workers, address=config.ray_address, timeout_s=config.worker_timeout)


def _environment(records: dict[int, CommitRecord], config: BuildConfig) -> dict[str, Any] | None:
    if config.accept_environment or not records:
        return None
    return records[min(records)].environment
