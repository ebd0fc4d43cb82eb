"""build(): plan, engine, manifest, report."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import environment
from .config import MIN_STD, BuildConfig
from .counting import count_source, mean_of, std_of
from .engines import local, ray
from .environment import Choice, Machine
from .errors import (
    BackendError,
    FormatError,
    LockedError,
    MismatchError,
    RejectLimitError,
    SourceError,
    StorageError,
    UsageError,
)
from .job import Job
from .manifest import CommitRecord, class_list, committed, finish, write_rejects
from .normalize import row_shape, table
from .output import INDEX, JOB, MANIFEST, PLAN, REJECTS, REPORT, clear, remove_temporaries, require_own
from .parts import Part
from .plan import Plan, collect
from .sources.base import Source
from .sources.folder import FolderSource
from .space import require_space
from .storage import LOCK, PRIVATE, Storage, is_remote, open_storage
from .tuning import Tuning
from .worker import Committed, Event, Task, WorkerEnded

log = logging.getLogger(__name__)
_PROBED_ITEMS = 16
_PLAN_WAIT_S = 3600.0  # for the first of several parts, which lists the source, or for the last, which finishes


@dataclass(frozen=True)
class Measuring:
    """With `--normalize dataset`, before anything is built: how many items of how many have been measured."""

    items_done: int
    items: int


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

    `worker_memory_bytes` and `gpu_memory_bytes` are the most that a worker of this run has held (see `WorkerEnded`).
    """

    out: str
    complete: bool
    part: str | None
    missing_shards: int
    items: int
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
    hints: tuple[str, ...]

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
    config = config or BuildConfig()
    start = time.perf_counter()
    storage = open_storage(out)
    check_places(src, storage)
    part = None if config.part is None else Part.of(config.part, os.environ)
    if part and config.overwrite:
        raise UsageError(
            "--part and --overwrite: the parts would delete each other's shards; delete OUT, then start them"
        )
    classes = class_list(config.classes_from) if config.classes_from is not None else None
    source = FolderSource(src, classes)
    require_own(storage)
    with contextlib.ExitStack() as stack:
        if config.engine == "ray" and (config.overwrite or storage.size(MANIFEST) is None):
            stack.enter_context(ray.cluster(config.ray_address))  # once for all that follows
        with contextlib.ExitStack() as planning:
            held = planning.enter_context(storage.lock(wait_s=_PLAN_WAIT_S if part else 0.0))

            def told(event: Started | Measuring | Event) -> None:
                held.require_held()
                if progress:
                    progress(event)

            if not part:
                require_no_parts(storage)
            if not live_parts(storage):
                remove_temporaries(storage)
            begin = config.overwrite or storage.size(JOB) is None
            job = _begin(storage, source, config, told) if begin else _resume(storage, source, config)
            if part:
                log.warning("building part %s (%s)", part, part.origin)
                held = stack.enter_context(storage.lock(f"{LOCK}-part-{part.number}-of-{part.count}"))
            else:
                stack.push(planning.pop_all())

        return run(storage, job, source, config, told, start=start, part=part)


def check_places(src: str | os.PathLike[str], storage: Storage) -> None:
    """Raises UsageError where OUT lies inside SRC, whose next listing would find it."""
    if is_remote(storage.root):
        return
    source, out = os.path.realpath(src), os.path.realpath(storage.root)
    if os.path.commonpath([source, out]) == source and os.path.isdir(source):
        raise UsageError(f"OUT {storage.root!r} lies inside SRC {os.fspath(src)!r}; choose an OUT outside of it")


def common_size(plan: Plan, source: Source, config: BuildConfig) -> tuple[int, int]:
    """Height and width of the first image that can be decoded. Raises SourceError if there is none."""
    from .decode.pillow import first_size

    items = (item for batch in range(plan.item_count) for item in plan.items(batch, batch + 1))
    size = first_size(source, items, config)
    if size is None:
        raise SourceError(
            f"{source.location!r}: no image can be decoded, so --resize-mode none finds no size; give --size"
        )
    return size


def inspect(config: BuildConfig) -> Machine:
    """What is usable where the workers of a build run: on this machine, or on the nodes of a Ray cluster."""
    if config.engine == "ray":
        return ray.inspect(config.ray_address, dali=config.backend == "dali")
    return environment.inspect(config.device)


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


def _begin(storage: Storage, source: Source, config: BuildConfig, progress: Tell) -> Job:
    if storage.size(MANIFEST) is not None and not config.overwrite:
        raise StorageError(
            f"{storage.root!r} holds a finished dataset without the {PRIVATE} that resuming needs; choose another OUT, "
            "or --overwrite to build it anew"
        )
    choice = environment.choose(config, inspect(config))
    if choice.warning:
        log.warning("%s", choice.warning)
    if config.normalize != "dataset":
        table(config)  # a value that the dtype cannot hold shows here, before anything is listed
    arrays = collect(source.groups(), shuffle=config.shuffle, limit=config.limit)
    if not len(arrays["name_ends"]):
        raise SourceError(f"{source.location!r} holds no images; SRC is a folder of class folders or of images")
    height, width = config.size or common_size(Plan(arrays, 1), source, config)
    row_bytes = math.prod(row_shape(config, height, width)) * np.dtype(config.dtype).itemsize
    plan = Plan(arrays, config.shard_rows(row_bytes))
    if config.normalize == "dataset" and config.mean is None:
        config = _measured(plan, source, config, (height, width), choice, progress)
    if config.overwrite:
        clear(storage)  # not before all else has turned out right
    return Job.create(
        storage,
        plan,
        config,
        choice,
        source=(source.kind, source.location),
        class_names=source.class_names,
        image_size=(height, width),
    )


def _measured(
    plan: Plan, source: Source, config: BuildConfig, size: tuple[int, int], choice: Choice, progress: Tell
) -> BuildConfig:
    """The settings with mean and standard deviation of the source's own pixels."""
    tally = count_source(plan.arrays, source, config, size, choice, lambda *done: progress(Measuring(*done)))
    counts = tally.counts.tolist()
    if not all(map(sum, counts)):
        raise SourceError(f"{source.location!r}: no image can be decoded, so --normalize dataset finds no statistics")
    mean, std = [float(mean_of(channel)) for channel in counts], [std_of(channel) for channel in counts]
    if min(std) < MIN_STD:
        raise UsageError(
            f"--normalize dataset: a channel of {source.location!r} has one level alone (std {min(std):g}); choose "
            "another --normalize"
        )
    log.info("mean %s and std %s of %d items", mean, std, plan.item_count)
    config = BuildConfig(**{**config.model_dump(), "mean": mean, "std": std})
    table(config)
    return config


def _resume(storage: Storage, source: Source, config: BuildConfig) -> Job:
    job = Job.open(storage)
    job.require_same(config, source.class_names)
    if job.plan.digest() != job.record.plan_digest:
        raise FormatError(f"{storage.path(PLAN)!r} is damaged; restore it, or build anew with --overwrite")
    if source.location != job.record.source_location:
        require_moved(job, source)
    return job


def backend(job: Job, config: BuildConfig) -> Choice:
    """The backend that the plan was made with, or an error: once planned, a build never falls back.

    Raises:
        MismatchError: another one is asked for.
        BackendError: it cannot be used here.
    """
    record = job.record
    other = config.backend not in ("auto", record.backend)
    other |= config.device == "cpu" if record.device == "cuda" else config.require_gpu
    if other:
        raise MismatchError(
            f"OUT was begun with backend {record.backend} on {record.device}; --backend {config.backend} and --device "
            f"{config.device} ask for another; leave them out to resume, or start anew with --overwrite"
        )
    device = config.device if record.device == "cuda" else "cpu"
    same = {"backend": record.backend, "device": device, "require_gpu": record.device == "cuda"}
    config = config.model_copy(update=same)
    try:
        return environment.choose(config, inspect(config))
    except BackendError as exc:
        raise BackendError(
            f"OUT was begun with backend {record.backend} on {record.device}, which cannot be used here: {exc}\n"
            "resume where it can, or start anew with --overwrite"
        ) from exc


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
    built_items = sum(len(plan.shard_range(shard)) for shard in todo)
    row_bytes = math.prod(job.row_shape) * job.dtype.itemsize
    choice = backend(job, config) if todo else Choice(record.backend)
    shard_rows = min(plan.shard_rows, plan.item_count)
    tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=shard_rows, shards=len(todo))
    items = sum(len(plan.shard_range(shard)) for shard in mine)
    progress(Started(items, items - built_items, record.backend, record.device, tuning.workers))
    ended: list[WorkerEnded] = []
    if todo:
        if records and record.device == "cpu" and config.device not in ("auto", "cpu"):
            log.warning(
                "OUT was begun on the CPU and goes on there, not on GPU %s; --overwrite starts anew", config.device
            )
        if config.preflight and job.settings.deflate_level is None:  # how far images shrink is not known
            shards = len(todo)
            require_space(storage.root, rows=built_items, row_bytes=row_bytes, shards=shards, dtype=job.settings.dtype)
        storage.remove(MANIFEST)  # a dataset that lost a shard is not complete while it is built again
        task = Task(storage.root, source, None, tuning, _environment(records, config))
        with contextlib.closing(_events(task, todo, choice, config)) as events:
            for event in events:
                if isinstance(event, Committed):
                    records[event.record.shard] = event.record
                elif isinstance(event, WorkerEnded):
                    ended.append(event)
                progress(event)
    if part:
        with storage.lock(wait_s=_PLAN_WAIT_S):
            records = committed(storage, job)  # the other parts', too
            complete = len(records) == plan.shard_count and publish(storage, job, records, config)
    else:
        complete = publish(storage, job, records, config)
    stages: Counter[str] = Counter()
    for worker in ended:
        stages.update(worker.stage_seconds)
    rejects = Counter(reject.code for commit in records.values() for reject in commit.rejects)
    seconds = time.perf_counter() - start
    report = BuildReport(
        out=storage.root,
        complete=complete,
        part=str(part) if part else None,
        missing_shards=plan.shard_count - len(records),
        items=plan.item_count,
        rows=sum(commit.rows for commit in records.values()),
        rejects=rejects.total(),
        rejects_by_code=dict(sorted(rejects.items())),
        shards=plan.shard_count,
        dataset_bytes=sum(commit.bytes for commit in records.values()),
        backend=record.backend,
        device=record.device,
        tuning=tuning,
        built_shards=len(todo),
        built_items=built_items,
        seconds=seconds,
        images_per_second=built_items / seconds,
        stage_seconds=dict(stages),
        bottleneck=_bottleneck(stages, tuning),
        worker_memory_bytes=max((worker.memory_bytes for worker in ended), default=0),
        gpu_memory_bytes=max((worker.gpu_memory_bytes for worker in ended), default=0),
        hints=_hints(job, list(records.values())),
    )
    if todo:
        _store_report(storage, report)
    if not complete and not report.missing_shards:
        raise RejectLimitError(_too_many(storage, report, config), report)
    return report


def publish(storage: Storage, job: Job, records: Mapping[int, CommitRecord], config: BuildConfig) -> bool:
    """Makes a dataset of shards that are all there, unless too many items were rejected, and says whether it is one.

    Raises:
        MismatchError: the shards were made in several environments, and `accept_environment` is not set.
    """
    if all(storage.size(name) is not None for name in (MANIFEST, INDEX, REJECTS)):
        return True
    ordered = [records[shard] for shard in range(job.plan.shard_count)]
    made_with = {json.dumps(record.environment, sort_keys=True): record.shard for record in ordered}
    if len(made_with) > 1 and not config.accept_environment:
        raise MismatchError(
            "shards were made in several environments, whose pixels may differ:\n"
            + "\n".join(f"  shard {shard}, for one: {made}" for made, shard in made_with.items())
            + "\nadd --accept-environment to mix them, or start anew with --overwrite"
        )
    rejects = sum(len(record.rejects) for record in ordered)
    if rejects > config.reject_limit(job.plan.item_count):
        write_rejects(storage, ordered)
        return False
    finish(storage, job, ordered)
    return True


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


def _hints(job: Job, records: Sequence[CommitRecord]) -> tuple[str, ...]:
    hints = []
    total = sum(record.bytes for record in records)
    if job.settings.dtype == "float32" and total > 10**9:
        hints.append(
            f"--dtype uint8 would take {total / 4e9:.1f} GB instead of {total / 1e9:.1f} GB; readers then normalize, "
            "with equal values"
        )
    if job.labelled and job.settings.shuffle is None and len(records) > 1:
        hints.append(
            "shards are sorted by class; --shuffle SEED mixes the classes, so that shards can be read in order"
        )
    return tuple(hints)


def _too_many(storage: Storage, report: BuildReport, config: BuildConfig) -> str:
    codes = ", ".join(f"{count} {code}" for code, count in report.rejects_by_code.items())
    return (
        f"{report.rejects} of {report.items} items were rejected ({codes}); --max-rejects {config.max_rejects} allows "
        f"{config.reject_limit(report.items)}. All shards are built and stay; {storage.path(REJECTS)!r} names the "
        "items. Run the same command with a higher --max-rejects to finish at once"
    )


def _store_report(storage: Storage, report: BuildReport) -> None:
    machine = {"host": socket.gethostname(), "machine": platform.machine(), "python": platform.python_version()}
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {**report.to_json(), "ended": ended, **machine}
    storage.write(REPORT, (json.dumps(content, indent=1) + "\n").encode("ascii"))


def require_moved(job: Job, source: Source) -> None:
    """A source under another path must have at least some of the planned items."""
    probe = job.plan.items(0, min(_PROBED_ITEMS, job.plan.item_count))
    if not any(os.path.exists(source.local_path(item.path)) for item in probe):
        raise MismatchError(
            f"OUT was begun from {job.record.source_location!r}; {source.location!r} has none of its first "
            f"{len(probe)} items. Give the same images, or another OUT"
        )
    log.warning("SRC was %r when the build began and is %r now", job.record.source_location, source.location)
