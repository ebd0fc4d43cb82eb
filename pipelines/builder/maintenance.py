"""Maintenance of an OUT that a build has begun: complete it, retry its rejects, rebuild damaged shards."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..audit.verify import Problem, verify
from ..config import BuildConfig
from ..dataset.commits import CommitRecord, committed
from ..dataset.job import Job
from ..dataset.layout import INDEX, MANIFEST, REJECTS, commit_name, remove_temporaries, shard_name
from ..dataset.manifest import Manifest, publish
from ..dataset.originals import source_of
from ..errors import FormatError, IncompleteError, SourceError
from ..machine.tuning import Tuning
from ..preprocess.base import Decoder
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..sources.base import Batch, Source
from ..sources.rejects import Reject
from ..storage import open_storage
from ..storage.base import Storage
from ..workers.worker import provenance_of, require_provenance
from .parts import live_parts, require_no_parts
from .planning import backend, require_revision, require_sound
from .report import BuildReport, OnEvent
from .run import run

log = logging.getLogger(__name__)
_DEADLY = ("crashed", "timed-out")  # rejects that only a separate worker may retry


@dataclass(frozen=True)
class RepairResult:
    """The result of `retry` or `repair`.

    Attributes:
        shards: the numbers of the shards that were rebuilt.
        report: the report of the build; None if there was nothing to do.
    """

    shards: tuple[int, ...]
    report: BuildReport | None

    def to_json(self) -> dict[str, Any]:
        """The result as a dict of values that `json` can serialize."""
        return {"shards": self.shards, "report": self.report and self.report.to_json()}


def finalize(out: str | os.PathLike[str], config: BuildConfig | None = None) -> Manifest:
    """Writes the files that complete the dataset in OUT, if all of its shards are built.

    Args:
        out: OUT, as a path or URL.
        config: only `max_rejects` and `accept_environment` are used; the defaults if None.

    Returns:
        The manifest of the dataset.

    Raises:
        IncompleteError: shards are missing, or too many items were rejected.
        LockedError: a build, or a part of one, is running.
        MismatchError: shards were built in different environments, and `accept_environment` is not set.
        FormatError: OUT was not begun by a build, or is damaged.
    """
    config = config or BuildConfig()
    storage = open_storage(out)
    job = Job.open(storage)
    with storage.lock():
        records = committed(storage, job)
        missing = [shard for shard in range(job.plan.shard_count) if shard not in records]
        if missing:
            parts = live_parts(storage)
            advice = (
                f"these parts are still running: {', '.join(parts)}" if parts else "run the same gpu-npz build again"
            )
            raise IncompleteError(
                f"{storage.root!r} is not complete: {len(records)} of {job.plan.shard_count} shards are built, and "
                f"shard {missing[0]} is not; {advice}"
            )
        if not publish(storage, job, records, config):
            rejects = sum(len(record.rejects) for record in records.values())
            raise IncompleteError(
                f"{storage.root!r}: {rejects} of {job.plan.item_count} items were rejected, and --max-rejects "
                f"{config.max_rejects} allows {config.reject_limit(job.plan.item_count)}; give a higher --max-rejects"
            )
    return Manifest.load(storage.root)


def retry(
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    progress: OnEvent | None = None,
) -> RepairResult:
    """Decodes the rejected items again, in case their files have been fixed, and rebuilds the shards that change.

    Args:
        out: OUT, as a path or URL.
        config: only its operational settings are used; the defaults if None.
        source: the current location of the images, if they have moved since the build began.
        progress: as for `build`.

    Raises:
        IncompleteError: shards are missing.
        SourceError: the images are missing, and `source` does not name their current location.
        GpuNpzError: as for `build`.
    """
    storage, job, images, settings = _opened(out, config, source)
    with _alone(storage):
        records = committed(storage, job)
        if len(records) < job.plan.shard_count:
            raise IncompleteError(
                f"{storage.root!r}: {len(records)} of {job.plan.shard_count} shards are built; run the same gpu-npz "
                "build again first"
            )
        rejected = {reject.index: reject.code for record in records.values() for reject in record.rejects}
        usable = {index for index, code in rejected.items() if code in _DEADLY}  # only a worker can tell
        tried = sorted(rejected.keys() - usable)
        usable |= {*tried} - {reject.index for reject in _rejects(job, images, settings, tried)}
        shards = sorted({index // job.plan.shard_rows for index in usable})
        if not shards:
            return RepairResult((), None)
        _require_rows(job, images, settings, [records[shard] for shard in shards], len(rejected) - len(usable))
        return _rebuild(storage, job, images, settings, shards, progress)


def repair(
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    progress: OnEvent | None = None,
    checked: Callable[[int, int], None] | None = None,
) -> RepairResult:
    """Verifies a dataset, rebuilds damaged and missing shards, and rewrites the files that complete it.

    Args:
        out: OUT, as a path or URL.
        config: only its operational settings are used; the defaults if None.
        source: the current location of the images, if they have moved since the build began.
        progress: as for `build`.
        checked: called with the number of verified shards and the number of all shards.

    Raises:
        IncompleteError: the build has not finished yet.
        GpuNpzError: as for `build`.
    """
    storage, job, images, settings = _opened(out, config, source)
    with _alone(storage):
        try:
            problems = verify(out, progress=checked).problems
        except FormatError as exc:
            problems = (Problem(MANIFEST, str(exc)),)
        if not problems:
            return RepairResult((), None)
        damaged = {problem.file for problem in problems}
        shards = job.plan.shard_count
        bad = [shard for shard in range(shards) if shard_name(shard, shards) in damaged]
        records = committed(storage, job, whole=False)
        before = [records[shard] for shard in bad if shard in records]
        _require_rows(job, images, settings, before, sum(len(record.rejects) for record in records.values()))
        rebuilt = _rebuild(storage, job, images, settings, bad, progress)
        records = committed(storage, job)
        others = [record.shard for record in before if records[record.shard].digest != record.digest]
        if others:
            log.warning(
                "%d of the shards that were rebuilt are not what they were, %s for one: files of SRC, or the "
                "decoder, have changed since",
                len(others),
                shard_name(others[0], shards),
            )
        return rebuilt


def _opened(
    out: str | os.PathLike[str], config: BuildConfig | None, source: str | os.PathLike[str] | None
) -> tuple[Storage, Job, Source, BuildConfig]:
    """Opens OUT, its job and its source. The settings are the job's; only operational ones come from `config`."""
    storage = open_storage(out)
    job = Job.open(storage)
    images = source_of(job, source)
    settings = BuildConfig(**{**(config or BuildConfig()).model_dump(), **job.settings.identity()})
    return storage, job, images, settings


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    with storage.lock():
        require_no_parts(storage)
        remove_temporaries(storage)
        yield


def _require_rows(
    job: Job, source: Source, config: BuildConfig, records: Sequence[CommitRecord], other_rejects: int
) -> None:
    """Checks, before shards are rebuilt, that the loss of rows whose images can no longer be decoded is acceptable.

    Args:
        job: the job of the dataset.
        source: the images.
        config: the settings; `max_rejects` limits the rejects of the whole dataset.
        records: the commit records of the shards.
        other_rejects: how many other items of the dataset will be rejected in any case.

    Raises:
        SourceError: there would be more rejects than `max_rejects` allows.
    """
    indices: list[int] = []
    for record in records:
        known = {reject.index for reject in record.rejects}
        indices += [index for index in job.plan.shard_range(record.shard) if index not in known]
    lost = _rejects(job, source, config, indices)
    if not lost:
        return
    allowed = config.reject_limit(job.plan.item_count)
    what = f"{len(lost)} images ({lost[0].path!r} for one: {lost[0].code}, {lost[0].detail})"
    if len(lost) + other_rejects > allowed:
        raise SourceError(
            f"{what} could be built before and cannot be built now, so their rows would be lost. Nothing was changed. "
            f"Restore them, or give --max-rejects {len(lost) + other_rejects}; {config.max_rejects} allows {allowed}"
        )
    log.warning("%s could be built before and cannot be built now; their rows are lost", what)


def _require_decoder(job: Job, source: Source, config: BuildConfig, records: Mapping[int, CommitRecord]) -> None:
    """Raises MismatchError, before anything is removed, if shards built here could not be mixed with `records`."""
    require_revision(records)
    if records and config.engine == "local" and not config.accept_environment:
        decoder, _ = _decoder(job, source, config, 1)
        require_provenance(records[min(records)].provenance, provenance_of(decoder, job))


def _decoder(job: Job, source: Source, config: BuildConfig, items: int) -> tuple[Decoder, Tuning]:
    """The decoder of a dataset on this machine, not yet entered as a context, and its tuning for `items` items."""
    choice = backend(job, config.model_copy(update={"engine": "local"}))
    tuning = Tuning.of(config, choice, row_bytes=math.prod(job.row_shape), shard_rows=items, shards=1)
    geometry = Geometry.of(job.settings, job.record.image_size)
    return make_decoder(choice.backend, job.settings, geometry, source, tuning=tuning, gpu=choice.gpu), tuning


def _rejects(job: Job, source: Source, config: BuildConfig, indices: Sequence[int]) -> list[Reject]:
    """Decodes the items with these indices and returns the rejects."""
    if not indices:
        return []
    decoder, tuning = _decoder(job, source, config, len(indices))
    items = [item for index in indices for item in job.plan.items(index, index + 1)]
    batches = [
        Batch(0, items[start : start + tuning.batch_size], False) for start in range(0, len(items), tuning.batch_size)
    ]
    with decoder:
        return [reject for decoded in decoder.decode(batches) for reject in decoded.rejects]


def _rebuild(
    storage: Storage,
    job: Job,
    source: Source,
    config: BuildConfig,
    shards: Sequence[int],
    progress: OnEvent | None,
) -> RepairResult:
    start = time.perf_counter()
    _require_decoder(job, source, config, committed(storage, job))
    require_sound(source, job.plan, config, shards)
    if storage.size(MANIFEST) is not None:  # the rejects were accepted when the dataset was finished
        config = config.model_copy(update={"max_rejects": "100%"})
    for name in (MANIFEST, INDEX, REJECTS):
        storage.remove(name)
    for shard in shards:
        storage.remove(commit_name(shard, job.plan.shard_count))
    return RepairResult(tuple(shards), run(storage, job, source, config, progress or (lambda _: None), start=start))
