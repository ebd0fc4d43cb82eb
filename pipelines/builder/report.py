"""The report of a build, the event that marks its start, and hints for the user."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import BuildConfig
from ..dataset.commits import CommitRecord
from ..dataset.job import Job
from ..dataset.layout import REJECTS, REPORT
from ..errors import LockedError, StorageError
from ..machine.tuning import Tuning
from ..preprocess.resize import advice
from ..sources.base import Source
from ..storage.base import Storage
from ..workers.events import Event
from ..workers.messages import Message
from .planning import Measuring, hints
from .watch import Moment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """A build has started or resumed.

    Attributes:
        items: the number of items in the plan, or in the part that is built.
        items_done: how many of them are in finished shards.
        backend: the decoder.
        device: `cpu` or `cuda`.
        workers: the number of workers.
    """

    items: int
    items_done: int
    backend: str
    device: str
    workers: int


OnEvent = Callable[[Started | Measuring | Event], None]


@dataclass(frozen=True)
class BuildReport:
    """The result of a build. Times are in seconds, sizes in bytes.

    The attributes from `built_shards` to `messages`, and `timeline`, describe this run; the others describe the whole
    dataset.

    Attributes:
        out: OUT, as a path or URL.
        complete: whether the dataset is finished.
        part: the part that was built, as `i/n`; None if the build has no parts.
        missing_shards: how many shards are not built yet.
        items: the number of items in the plan.
        classes: the number of classes; None without labels, or if labels are not classes of one column.
        label_columns: the names of the label columns, if labels are not classes of one column.
        rows: the number of rows in all shards built so far.
        rejects: the number of rejected items.
        rejects_by_code: the same by reject code.
        shards: the number of shards in the plan.
        dataset_bytes: the size of all shards built so far.
        backend: the decoder.
        device: `cpu` or `cuda`.
        tuning: the batch size, the number of workers, and so on.
        built_shards: how many shards this run built.
        built_items: how many items these shards cover, rejects included.
        seconds: the duration of the run.
        images_per_second: the rate from the first decoded batch to the last committed shard.
        startup_seconds: the time before the first decoded batch; 0 and part of the rate if there was only one batch.
        teardown_seconds: the time after the last committed shard; 0 and part of the rate if there was only one batch.
        stage_seconds: how long all workers were busy with each stage.
        bottleneck: the stage that the others wait for; None if nothing was built.
        worker_memory_bytes: the largest peak main memory of any worker (see `WorkerEnded`).
        gpu_memory_bytes: the largest GPU memory in use at the end of any worker (see `WorkerEnded`).
        changed_files: files that were removed or written to while this run read them (see `ShardCounts`).
        decoded_by: how many images each decoder decoded (see `ShardCounts`).
        spot_checks: how many images were decoded on a GPU and compared with Pillow's result (see `ShardCounts`).
        spot_check_differences: how many of them differ.
        messages: what decoders wrote to stderr.
        hints: advice for the user.
        timeline: the progress of the run and the resources of a worker, at about equal intervals.
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
    startup_seconds: float
    teardown_seconds: float
    stage_seconds: dict[str, float]
    bottleneck: str | None
    worker_memory_bytes: int
    gpu_memory_bytes: int
    changed_files: int
    decoded_by: dict[str, int]
    spot_checks: int
    spot_check_differences: int
    messages: tuple[Message, ...]
    hints: tuple[str, ...]
    timeline: tuple[Moment, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as a dict of values that `json` can serialize."""
        return asdict(self)


def bottleneck(stages: Counter[str], tuning: Tuning) -> str | None:
    """The stage that the others wait for: the longest stage of the busiest threads; None without stages."""
    threads = {("read", "decode", "normalize"): 1, ("transfer", "write", "check"): tuning.open_shards, ("commit",): 1}
    if not stages:
        return None
    busiest = max(threads, key=lambda names: sum(stages[name] for name in names) / threads[names])
    return max(busiest, key=lambda name: stages[name])


def hints_for(
    out: str, job: Job, records: Sequence[CommitRecord], config: BuildConfig, changed: int
) -> tuple[str, ...]:
    found = []
    if changed:
        rows = sum(record.rows for record in records)
        found.append(
            f"{changed} file{'s' * (changed > 1)} changed or went missing while the build read them, so their rows may "
            "be incomplete; when nothing writes to SRC any more, this command lists the rows that differ: "
            f"gpu-npz verify {shlex.quote(out)} --deep {rows}"
        )
    if job.record.backend == "pillow" and (faster := advice(config)):
        found.append(faster)
    total = sum(record.bytes for record in records)
    found += hints(job.settings, total, job.plan)
    return tuple(found)


def advice_on(source: Source, rejects_by_code: Mapping[str, int]) -> str:
    """Advice on what to do about rejects, as a sentence without its full stop."""
    if source.kind == "table" and max(rejects_by_code, key=lambda code: rejects_by_code[code]) == "missing":
        root = source.root or os.path.dirname(source.location)
        return (
            f"If paths or --root are wrong (files are looked for below {root!r}; do the names lack an extension?), "
            "give the right ones with --overwrite"
        )
    return "Look at some of the files"


def too_many_rejects(storage: Storage, source: Source, report: BuildReport, config: BuildConfig) -> str:
    codes = ", ".join(f"{count} {code}" for code, count in report.rejects_by_code.items())
    return (
        f"{report.rejects} of {report.items} items were rejected ({codes}); --max-rejects "
        f"{config.max_rejects} allows {config.reject_limit(report.items)}. All shards are built and kept; "
        f"{storage.path(REJECTS)!r} names the items. {advice_on(source, report.rejects_by_code)}; run the same command "
        "with a higher --max-rejects to finish at once"
    )


def store_report(storage: Storage, report: BuildReport) -> None:
    machine = {"host": socket.gethostname(), "machine": platform.machine(), "python": platform.python_version()}
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {**report.to_json(), "ended": ended, **machine}
    try:
        storage.write(REPORT, (json.dumps(content, indent=1) + "\n").encode("ascii"))
    except LockedError:
        raise
    except StorageError as exc:
        log.warning("the report was not written: %s", exc)
