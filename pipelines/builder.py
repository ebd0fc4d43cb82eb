"""build(): plan, engine, manifest, report."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .config import BuildConfig
from .dataset.commits import CommitRecord, committed
from .dataset.job import Job
from .dataset.layout import JOB, MANIFEST, REJECTS, REPORT, remove_temporaries, require_own
from .dataset.manifest import class_list, publish
from .errors import GpuNpzError, LockedError, RejectLimitError, StorageError, UsageError
from .machine.environment import Choice
from .machine.tuning import Tuning
from .parts import Part, require_no_parts
from .planning import (
    Measuring,
    backend,
    check_places,
    places,
    planned,
    remarks,
    require_revision,
    require_room,
    require_scaled,
    withdraw,
)
from .sources import open_source
from .sources.base import Source
from .storage import open_storage
from .storage.base import Storage
from .watch import Moment, Watch
from .workers import local, ray
from .workers.events import Committed, Event, Task, WorkerEnded
from .workers.messages import Heard, Message, Messages

log = logging.getLogger(__name__)
_PLAN_WAIT_S = 86_400.0  # for the first of several parts, which lists and may measure, or the last, which finishes


@dataclass(frozen=True)
class Started:
    """A build begins or goes on: how many items there are, and how many of them are in shards that are done."""

    items: int
    items_done: int
    backend: str
    device: str
    workers: int


Tell = Callable[[Started | Measuring | Event], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did. Times in seconds, sizes in bytes; `built_*` counts this run, the rest the whole dataset.

    `classes` is None where labels are not classes; `label_columns` then names their columns, of which there are none
    without labels. `timeline` shows how this run went: items done by then, and what a worker held. `changed_files` were
    written to, or went, while this run read them; `messages` are what decoders wrote to stderr. `worker_memory_bytes`
    and `gpu_memory_bytes` are the most that a worker of it has held (see `WorkerEnded`).
    """

    out: str
    complete: bool
    part: str | None
    missing_shards: int
    items: int
    classes: int | None
    label_columns: tuple[str, ...]
    rows: int
    rejects: int
    rejects_by_code: dict[str, int]
    shards: int
    dataset_bytes: int
    backend: str
    device: str
    tuning: Tuning
    built_shards: int
    built_items: int
    seconds: float
    images_per_second: float
    stage_seconds: dict[str, float]
    bottleneck: str | None
    worker_memory_bytes: int
    gpu_memory_bytes: int
    changed_files: int
    messages: tuple[Message, ...]
    hints: tuple[str, ...]
    timeline: tuple[Moment, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def build(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    progress: Tell | None = None,
) -> BuildReport:
    """Builds NPZ shards in `out` from the images in `src`, or goes on with a build that was stopped.

    Args:
        src: a folder of class folders, or of images.
        out: a folder, made if it is not there; or `s3://bucket/path` and the like.
        config: the settings; the defaults if None.
        progress: called with what happens, from the calling thread.

    Raises:
        UsageError, BackendError, SourceError, StorageError, MismatchError, ShardError: see `gpu_npz.errors`.
        RejectLimitError: all shards are built, and more items were rejected than `max_rejects` allows.
    """
    return _build(src, out, config or BuildConfig(), progress, None)


def _build(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: BuildConfig,
    progress: Tell | None,
    beside: Job | None,
) -> BuildReport:
    """As `build`; `beside` is another side of the same split."""
    if config.sides:
        raise UsageError(
            f"split {config.split} makes several datasets: call build_split, or name one: {config.split}/val"
        )
    require_scaled(config)
    start = time.perf_counter()
    storage = open_storage(out)
    check_places(src, storage)
    part = None if config.part is None else Part.of(config.part, os.environ)
    if part and config.overwrite:
        raise UsageError(
            "--part and --overwrite: the parts would delete each other's shards; delete OUT, then start them"
        )
    source = open_source(src, config, class_list(config.classes_from))
    require_own(storage)
    untried = False  # a plan of this build, with which no worker has begun
    try:
        with contextlib.ExitStack() as stack:
            if config.engine == "ray" and (config.overwrite or storage.size(MANIFEST) is None):
                stack.enter_context(ray.cluster(config.ray_address))  # once for all that follows
            with contextlib.ExitStack() as planning:
                planning.enter_context(storage.lock(wait_s=_PLAN_WAIT_S if part else 0.0))

                def told(event: Started | Measuring | Event) -> None:
                    nonlocal untried
                    untried = untried and isinstance(event, Started)
                    if progress:
                        progress(event)

                if not part:
                    require_no_parts(storage)
                job, untried = planned(storage, source, config, told, part=part, beside=beside)
                if part:
                    log.warning("building part %s (%s)", part, part.origin)
                    stack.enter_context(storage.lock(part.lock))
                else:
                    stack.push(planning.pop_all())

            return run(storage, job, source, config, told, start=start, part=part)
    except GpuNpzError:
        if untried:
            withdraw(storage)
        raise


def build_split(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: BuildConfig,
    *,
    progress: Callable[[str, Started | Measuring | Event], None] | None = None,
) -> dict[str, BuildReport]:
    """Builds a dataset for each side of `config.split`, in `out`/train first and `out`/val and the like then.

    All have the same class numbers. With `normalize` dataset, the statistics are those of train. A side that is
    complete is not built again.

    Args:
        src, out, config: as for `build`.
        progress: called with the side and what happens.

    Raises:
        UsageError: nothing is split, or a side gets no item.
        StorageError: `out` is a dataset itself.
        MismatchError: SRC has changed since the first side was begun.
        As `build`.
    """
    if not config.sides:
        raise UsageError("split: give it as val=0.1; build makes a single dataset")
    reports = {}
    first: Job | None = None
    if (whole := open_storage(out)).size(JOB) is not None:
        withdraw(whole)  # a build without --split has got no further than its plan
    for side, storage in places(src, out, config).items():
        told = functools.partial(progress, side) if progress else None
        reports[side] = _build(src, storage.root, config.sides[side], told, first)
        if first is None:
            first = Job.open(storage)
            if config.normalize == "dataset":
                config = config.model_copy(update={"mean": first.settings.mean, "std": first.settings.std})
    return reports


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
        with storage.lock(wait_s=_PLAN_WAIT_S):
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
        bottleneck=_bottleneck(stages, tuning),
        worker_memory_bytes=max((each.memory_bytes for each in ended), default=0),
        gpu_memory_bytes=max((each.gpu_memory_bytes for each in ended), default=0),
        changed_files=watch.changed,
        messages=messages.found(),
        hints=_hints(job, list(records.values()), watch.changed),
        timeline=watch.timeline,
    )
    if todo:
        _store_report(storage, report)
    if watch.hopeless and report.missing_shards:
        assert watch.reject is not None  # most items were
        raise RejectLimitError(
            f"stopped early: {watch.rejects} of the {watch.items} items of this run were rejected "
            f"({watch.reject.path!r} for one: {watch.reject.code}, {watch.reject.detail}); --max-rejects "
            f"{config.max_rejects} allows {config.reject_limit(plan.item_count)} of {plan.item_count}. "
            f"{_look(source, watch.codes)}; run the same command with a higher --max-rejects to go on all the same",
            report,
        )
    if not complete and not report.missing_shards:
        raise RejectLimitError(_too_many(storage, source, report, config), report)
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


def _bottleneck(stages: Counter[str], tuning: Tuning) -> str | None:
    """The stage that the others wait for: the longest one of the busiest threads."""
    threads = {("read", "decode", "normalize"): 1, ("transfer", "write"): tuning.open_shards, ("commit",): 1}
    if not stages:
        return None
    busiest = max(threads, key=lambda names: sum(stages[name] for name in names) / threads[names])
    return max(busiest, key=lambda name: stages[name])


def _hints(job: Job, records: Sequence[CommitRecord], changed: int) -> tuple[str, ...]:
    hints = []
    if changed:
        rows = sum(record.rows for record in records)
        hints.append(
            f"{changed} files were written to, or went, while the build read them, so rows may be of parts of them; "
            f"when nothing writes to SRC any more, `gpu-npz verify OUT --deep {rows}` names those that differ"
        )
    total = sum(record.bytes for record in records)
    hints += remarks(job.settings, total, len(records), labelled=job.labelled)
    return tuple(hints)


def _look(source: Source, rejects_by_code: Mapping[str, int]) -> str:
    """What to do about rejects."""
    if source.kind == "table" and max(rejects_by_code, key=lambda code: rejects_by_code[code]) == "missing":
        root = source.root or os.path.dirname(source.location)
        return (
            f"If paths or --root are wrong (files are looked for below {root!r}; do the names lack an extension?), "
            "give the right ones with --overwrite"
        )
    return "Look at some of the files"


def _too_many(storage: Storage, source: Source, report: BuildReport, config: BuildConfig) -> str:
    codes = ", ".join(f"{count} {code}" for code, count in report.rejects_by_code.items())
    return (
        f"{report.rejects} of {report.items} items were rejected ({codes}); --max-rejects "
        f"{config.max_rejects} allows {config.reject_limit(report.items)}. All shards are built and stay; "
        f"{storage.path(REJECTS)!r} names the items. {_look(source, report.rejects_by_code)}; run the same command "
        "with a higher --max-rejects to finish at once"
    )


def _store_report(storage: Storage, report: BuildReport) -> None:
    machine = {"host": socket.gethostname(), "machine": platform.machine(), "python": platform.python_version()}
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {**report.to_json(), "ended": ended, **machine}
    try:
        storage.write(REPORT, (json.dumps(content, indent=1) + "\n").encode("ascii"))
    except LockedError:
        raise
    except StorageError as exc:
        log.warning("the report was not written: %s", exc)
