"""What a build reports: its start, its result, and hints about both."""

from __future__ import annotations

import json
import logging
import os
import platform
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
    """A build begins or goes on: how many items there are, and how many of them are in shards that are done."""

    items: int
    items_done: int
    backend: str
    device: str
    workers: int


OnEvent = Callable[[Started | Measuring | Event], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did. Times in seconds, sizes in bytes; `built_*` counts this run, the rest the whole dataset.

    `images_per_second` is the rate from the first decoded batch to the last committed shard. `startup_seconds` come
    before that, `teardown_seconds` after; both are 0 and included in the rate if there was only one batch.

    `classes` is None where labels are not classes; `label_columns` then names their columns, of which there are none
    without labels. `timeline` shows how this run went: items done by then, and what a worker held. `changed_files` were
    written to, or went, while this run read them; see `ShardCounts` for this, `decoded_by` and the spot checks.
    `messages` are what decoders wrote to stderr. `worker_memory_bytes` and `gpu_memory_bytes` are the most that a
    worker of it has held (see `WorkerEnded`).
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
        """The report as JSON values."""
        return asdict(self)


def bottleneck(stages: Counter[str], tuning: Tuning) -> str | None:
    """The stage that the others wait for: the longest one of the busiest threads."""
    threads = {("read", "decode", "normalize"): 1, ("transfer", "write", "check"): tuning.open_shards, ("commit",): 1}
    if not stages:
        return None
    busiest = max(threads, key=lambda names: sum(stages[name] for name in names) / threads[names])
    return max(busiest, key=lambda name: stages[name])


def hints_for(job: Job, records: Sequence[CommitRecord], changed: int) -> tuple[str, ...]:
    found = []
    if changed:
        rows = sum(record.rows for record in records)
        found.append(
            f"{changed} files were written to, or went, while the build read them, so rows may be of parts of them; "
            f"when nothing writes to SRC any more, `gpu-npz verify OUT --deep {rows}` names those that differ"
        )
    if job.record.backend == "pillow" and (faster := advice(job.settings)):
        found.append(faster)
    total = sum(record.bytes for record in records)
    found += hints(job.settings, total, len(records), labelled=job.labelled)
    return tuple(found)


def advice_on(source: Source, rejects_by_code: Mapping[str, int]) -> str:
    """What to do about rejects."""
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
        f"{config.max_rejects} allows {config.reject_limit(report.items)}. All shards are built and stay; "
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
