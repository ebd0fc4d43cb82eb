"""Runs a build: finds the missing shards, builds them, publishes the dataset and writes the report."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import BuildConfig
from ..dataset.commits import CommitRecord, committed
from ..dataset.job import Job
from ..dataset.layout import MANIFEST, remove_temporaries
from ..dataset.manifest import publish
from ..errors import RejectLimitError, StorageError
from ..machine.environment import Choice, available_memory
from ..machine.tuning import Tuning
from ..sources.base import Source
from ..storage.base import Storage, is_remote
from ..workers import local, ray
from ..workers.events import Committed, Event, Progress, ShardCounts, Task, WorkerEnded
from ..workers.messages import DecoderMessages, Messages
from .pace import Stopwatch
from .parts import PLAN_WAIT_S, Part
from .planning import backend, require_revision, require_room, require_sound
from .report import (
    BuildReport,
    OnEvent,
    Started,
    advice_on,
    bottleneck,
    hints_for,
    store_report,
    too_many_rejects,
)
from .watch import Watch

log = logging.getLogger(__name__)


@dataclass
class _RunState:
    """The state of a run.

    Attributes:
        records: the commit records of all built shards by shard number, including those of earlier runs.
        watch: monitors rejects and disk space.
        stopwatch: measures the rate.
        built: the numbers of the shards that this run has built.
        ended: the reports of the workers that have ended.
        counts: the counts of the shards that this run has built.
        messages: what decoders wrote to stderr.
    """

    records: dict[int, CommitRecord]
    watch: Watch
    stopwatch: Stopwatch
    built: set[int] = field(default_factory=set)
    ended: list[WorkerEnded] = field(default_factory=list)
    counts: ShardCounts = field(default_factory=ShardCounts)
    messages: Messages = field(default_factory=Messages)

    def see(self, event: Event) -> None:
        """Records an event. Raises StorageError if the disk is nearly full."""
        self.watch.see(event)
        if isinstance(event, Committed):
            self.records[event.record.shard] = event.record
            self.built.add(event.record.shard)
            self.counts.add(event.counts)
            self.stopwatch.tick(0)
        elif isinstance(event, Progress):
            self.stopwatch.tick(event.items)
        elif isinstance(event, WorkerEnded):
            self.ended.append(event)
        elif isinstance(event, DecoderMessages):
            self.messages.add(event)


def run(
    storage: Storage,
    job: Job,
    source: Source,
    config: BuildConfig,
    progress: OnEvent,
    *,
    start: float,
    part: Part | None = None,
) -> BuildReport:
    """Builds the missing shards and publishes the dataset if it is then complete. The caller must hold the lock.

    Args:
        storage: OUT.
        job: the job of OUT.
        source: the images.
        config: only its operational settings are used.
        progress: called with each event.
        start: the value of `time.perf_counter()` when the build began.
        part: the part to build; all shards if None.

    Raises:
        GpuNpzError: as for `build`.
    """
    record, plan = job.record, job.plan
    records = committed(storage, job)
    shards = part.shards(plan.shard_count) if part else range(plan.shard_count)
    missing = [shard for shard in shards if shard not in records]
    items, missing_items = _item_count(job, shards), _item_count(job, missing)
    choice = backend(job, config) if missing else Choice(record.backend)
    tuning = Tuning.of(
        config,
        choice,
        row_bytes=_row_bytes(job),
        shard_rows=min(plan.shard_rows, plan.item_count),
        shards=len(missing),
    )
    progress(Started(items, items - missing_items, record.backend, record.device, tuning.workers))
    watch = Watch(config.reject_limit(plan.item_count), storage.root if config.preflight else None)
    state = _RunState(records, watch, Stopwatch(start))
    if missing:
        _require_resumable(storage, job, config, records, missing)
        require_sound(source, plan, config, missing)
        storage.remove(MANIFEST)  # a dataset with a lost shard is not complete until the shard is rebuilt
        provenance, drop_cache = _expected_provenance(records, config), _drops_cache(storage, job, config)
        task = Task(storage.root, source, None, tuning, provenance, fence=storage.fence, drop_cache=drop_cache)
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_leftovers, storage)  # once all workers have ended
            events = stack.enter_context(contextlib.closing(_run_workers(task, missing, choice, config)))
            for event in events:
                state.see(event)
                progress(event)
                if state.watch.hopeless:
                    break
    complete = _publish(storage, job, config, state, part)
    report = _report(storage, job, config, state, tuning, complete, part, time.perf_counter() - start)
    if missing:
        store_report(storage, report)
    _require_few_rejects(storage, source, config, state.watch, report)
    return report


def _item_count(job: Job, shards: Iterable[int]) -> int:
    return sum(len(job.plan.shard_range(shard)) for shard in shards)


def _row_bytes(job: Job) -> int:
    return math.prod(job.row_shape) * job.dtype.itemsize


def _require_resumable(
    storage: Storage, job: Job, config: BuildConfig, records: Mapping[int, CommitRecord], missing: Sequence[int]
) -> None:
    """Checks that the missing shards may be mixed with those in OUT and fit on its disk.

    Raises:
        MismatchError: another revision of the decoding code built the shards in OUT.
        StorageError: the missing shards do not fit.
    """
    require_revision(records)
    if records and job.record.device == "cpu" and config.device not in ("auto", "cpu"):
        log.warning(
            "this build was started on the CPU and continues there, not on GPU %s; use --overwrite to start over",
            config.device,
        )
    require_room(storage, job.plan, config, _row_bytes(job), missing)


def _drops_cache(storage: Storage, job: Job, config: BuildConfig) -> bool:
    """Whether to drop written shards from the page cache. Small datasets stay, so that training reads from memory."""
    if config.page_cache != "auto":
        return config.page_cache == "drop"
    memory = available_memory()
    size = _row_bytes(job) * job.plan.item_count
    return memory is not None and size > memory // 2 and not is_remote(storage.root)  # uploads read from the cache


def _expected_provenance(records: Mapping[int, CommitRecord], config: BuildConfig) -> dict[str, Any] | None:
    if config.accept_environment or not records:
        return None
    return records[min(records)].provenance


def _run_workers(
    task: Task, shards: Sequence[int], choice: Choice, config: BuildConfig
) -> Generator[Event, None, None]:
    if config.engine == "local":
        return local.run(task, shards, choice.gpus, config.worker_timeout)
    return ray.run(task, shards, workers=config.workers, address=config.ray_address, timeout_s=config.worker_timeout)


def _remove_leftovers(storage: Storage) -> None:
    """Removes temporary files of workers that died or were stopped."""
    with contextlib.suppress(StorageError):  # must not hide the error that stops the build
        remove_temporaries(storage)


def _publish(storage: Storage, job: Job, config: BuildConfig, state: _RunState, part: Part | None) -> bool:
    """Publishes the dataset if all of its shards are built. Returns whether it is complete."""
    if part:
        with storage.lock(wait_s=PLAN_WAIT_S):
            state.records = committed(storage, job)  # includes those of the other parts
            return len(state.records) == job.plan.shard_count and publish(storage, job, state.records, config)
    return not state.watch.hopeless and publish(storage, job, state.records, config)


def _report(
    storage: Storage,
    job: Job,
    config: BuildConfig,
    state: _RunState,
    tuning: Tuning,
    complete: bool,
    part: Part | None,
    seconds: float,
) -> BuildReport:
    record, plan, records = job.record, job.plan, state.records
    stages: Counter[str] = Counter()
    for worker in state.ended:
        stages.update(worker.stage_seconds)
    rejects = Counter(reject.code for commit in records.values() for reject in commit.rejects)
    pace = state.stopwatch.stop()
    return BuildReport(
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
        built_shards=len(state.built),
        built_items=_item_count(job, state.built),
        seconds=seconds,
        **asdict(pace),
        stage_seconds=dict(stages),
        bottleneck=bottleneck(stages, tuning),
        worker_memory_bytes=max((worker.memory_bytes for worker in state.ended), default=0),
        gpu_memory_bytes=max((worker.gpu_memory_bytes for worker in state.ended), default=0),
        changed_files=state.counts.changed_files,
        decoded_by=dict(state.counts.decoded_by),
        spot_checks=state.counts.spot_checks,
        spot_check_differences=state.counts.spot_check_differences,
        messages=state.messages.found(),
        hints=hints_for(storage.root, job, list(records.values()), config, state.counts.changed_files),
        timeline=state.watch.timeline,
    )


def _require_few_rejects(
    storage: Storage, source: Source, config: BuildConfig, watch: Watch, report: BuildReport
) -> None:
    """Raises RejectLimitError if rejects stopped the run or prevented the dataset from being published."""
    if watch.hopeless and report.missing_shards:
        assert watch.reject is not None  # most items were rejected
        raise RejectLimitError(
            f"stopped early: {watch.rejects} of the {watch.items} items of this run were rejected "
            f"({watch.reject.path!r} for one: {watch.reject.code}, {watch.reject.detail}); --max-rejects "
            f"{config.max_rejects} allows {config.reject_limit(report.items)} of {report.items}. "
            f"{advice_on(source, watch.codes)}; run the same command with a higher --max-rejects to continue",
            report,
        )
    if not report.complete and not report.missing_shards:
        raise RejectLimitError(too_many_rejects(storage, source, report, config), report)
