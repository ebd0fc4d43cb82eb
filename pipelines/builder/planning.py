"""What a build is going to do: a new job, or the one that OUT was begun with, and where it may be done."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MIN_STD, BuildConfig, as_option
from ..dataset import space
from ..dataset.commits import CommitRecord
from ..dataset.image_size import image_size
from ..dataset.job import Job, shown_classes
from ..dataset.layout import JOB, MANIFEST, PLAN, clear, is_unbuilt, remove_temporaries, require_own
from ..dataset.originals import require_moved
from ..dataset.plan import Plan, same_listing
from ..dataset.selection import listed
from ..errors import (
    BackendError,
    FormatError,
    GpuNpzError,
    LockedError,
    MismatchError,
    SourceError,
    StorageError,
    UsageError,
)
from ..machine import environment
from ..machine.environment import Choice, Machine
from ..preprocess.base import DECODING_REVISION
from ..preprocess.normalize import row_shape, table
from ..preprocess.resize import require_simd, resolved
from ..sources.base import Source, location_of
from ..storage import open_storage
from ..storage.base import Storage, is_remote
from ..storage.holders import PRIVATE
from ..workers import ray
from ..workers.counting import count_source, mean_of, std_of
from .parts import Part, require_no_parts

log = logging.getLogger(__name__)
# A shard stores each path at the length of its longest one, with 4 bytes a character.
_MAX_PATHS_BYTES = 256 << 20
_MOST_PADDING = 8
_LARGE_BYTES = 10**9  # of float32, from which on it is worth a word


@dataclass(frozen=True)
class Measuring:
    """With `--normalize dataset`, before anything is built: how many items of how many have been measured."""

    items_done: int
    items: int


def check_places(src: str | os.PathLike[str], storage: Storage) -> None:
    """Raises UsageError where OUT lies inside SRC, whose next listing would find it; SourceError as `location_of`."""
    source, out = location_of(src), storage.root
    if is_remote(source) != is_remote(out):
        return
    if is_remote(source):
        inside = f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    else:
        source, out = os.path.realpath(source), os.path.realpath(out)
        inside = os.path.commonpath([source, out]) == source and os.path.isdir(source)
    if inside:
        raise UsageError(f"OUT {storage.root!r} lies inside SRC {os.fspath(src)!r}; choose an OUT outside of it")


def places(src: str | os.PathLike[str], out: str | os.PathLike[str], config: BuildConfig) -> dict[str, Storage]:
    """Where a build makes its datasets, by the side of a split; one dataset, which is no side, stands under "".

    Raises:
        UsageError: they would lie inside SRC.
        StorageError: there are files that no build made, or a dataset where a split makes several.
    """
    storage = open_storage(out)
    if config.sides and storage.size(JOB) is not None:
        raise StorageError(f"{storage.root!r} is a dataset; give --split an OUT of its own")
    found = {side: open_storage(storage.path(side)) for side in config.sides} or {"": storage}
    for each in found.values():
        check_places(src, each)
        require_own(each)
    return found


def inspect(config: BuildConfig) -> Machine:
    """What is usable where the workers of a build run: on this machine, or on the nodes of a Ray cluster."""
    if config.engine == "ray":
        return ray.inspect(config.ray_address, dali=config.backend == "dali")
    return environment.inspect(config.device)


def planned(
    storage: Storage,
    source: Source,
    config: BuildConfig,
    progress: Callable[[Measuring], None],
    *,
    part: Part | None = None,
    beside: Job | None = None,
) -> tuple[Job, bool]:
    """What OUT is built from, and whether that is new: the job that it was begun with, unless that has other settings
    and no shard yet. Removes what killed builds left unfinished.

    Args:
        storage: OUT, whose lock is held.
        source: the images.
        config: the settings.
        progress: told what is measured.
        part: the part that will be built; all if None.
        beside: another side of the same split, if there is one by now.

    Raises:
        UsageError, BackendError, SourceError, StorageError, FormatError: as `build`.
        MismatchError: OUT has shards of other settings, or `beside` is of other items.
    """
    job: Job | None = None
    if storage.size(JOB) is not None and not config.overwrite:
        try:
            job = resume(storage, source, config)
            _require_same_backend(job, config)
        except MismatchError:
            if is_replaceable(storage):
                log.warning("%r has a plan with other settings and no shard yet; the plan is replaced", storage.root)
                job = None
            elif job is None:
                raise  # another backend is no matter where nothing is left to build, and else `backend` raises
    remove_temporaries(storage)
    if job is not None:
        return job, False
    return _begin(storage, source, config, progress, part, beside), True


def is_replaceable(storage: Storage) -> bool:
    """Whether OUT has a plan at most: no shard, not even one that a killed build has begun, and no part at work."""
    try:
        require_no_parts(storage)
    except LockedError:
        return False
    return is_unbuilt(storage)


def withdraw(storage: Storage) -> None:
    """Removes a plan with which no build has got anywhere; whoever holds OUT by now may use it, and keeps it."""
    with contextlib.suppress(GpuNpzError), storage.lock():
        if is_replaceable(storage):
            clear(storage)


def _begin(
    storage: Storage,
    source: Source,
    config: BuildConfig,
    progress: Callable[[Measuring], None],
    part: Part | None,
    beside: Job | None,
) -> Job:
    """Lists the source, cuts it into shards, decides the backend, and stores that: from now on, OUT is this."""
    if storage.size(MANIFEST) is not None and not config.overwrite:
        raise StorageError(
            f"{storage.root!r} holds a finished dataset without the {PRIVATE} that resuming needs; choose another OUT, "
            "or --overwrite to rebuild it"
        )
    for doubt in warnings(config):
        log.warning("%s", doubt)
    choice, config = environment.choose(config, inspect(config)), resolved(config)
    if choice.warning:
        log.warning("%s", choice.warning)
    if config.normalize != "dataset":
        table(config)  # a value that the dtype cannot hold shows here, before anything is listed
    arrays = listed(source, config)
    if beside is not None:
        _require_same_items(beside, arrays, source)
    items = Plan(arrays, 1)
    config = config.for_items(items.item_count)
    size = image_size(items, source, config)
    row_bytes = math.prod(row_shape(config, *size)) * np.dtype(config.dtype).itemsize
    plan = Plan(arrays, config.shard_rows(row_bytes))
    shards = part.shards(plan.shard_count) if part else range(plan.shard_count)
    require_room(storage, plan, config, row_bytes, shards, space.held_bytes(storage.root))
    _require_even_paths(plan, source)
    if config.normalize == "dataset" and config.mean is None:
        config = _measured(plan, source, config, size, choice, progress)
    if config.overwrite or storage.size(JOB) is not None:
        clear(storage)  # not before all else has turned out right
    return Job.create(
        storage,
        plan,
        config,
        choice,
        source=source,
        image_size=size,
    )


def require_room(
    storage: Storage, plan: Plan, config: BuildConfig, row_bytes: int, shards: Sequence[int], freed_bytes: int = 0
) -> None:
    """Raises StorageError where these shards do not fit on OUT's disk, of which so many bytes will be freed first."""
    if config.preflight and config.deflate_level is None:  # how far images shrink is not known
        space.require_space(
            storage.root,
            rows=sum(len(plan.shard_range(shard)) for shard in shards),
            row_bytes=row_bytes,
            shards=len(shards),
            dtype=config.dtype,
            pixel_dtype=config.pixel_dtype,
            freed_bytes=freed_bytes,
        )


def _require_even_paths(plan: Plan, source: Source) -> None:
    """Raises SourceError where one long path would make a shard's `paths` much larger than its paths are."""
    for shard, longest, total in plan.longest_paths():
        rows = len(plan.shard_range(shard))
        most = max(_MAX_PATHS_BYTES, 4 * _MOST_PADDING * total)
        if 4 * longest * rows > most:
            span = plan.shard_range(shard)
            path = max((item.path for item in plan.items(span.start, span.stop)), key=len)
            raise SourceError(
                f"{source.location!r}: a path of {longest} bytes ({path[:100]!r}...) would take "
                f"{space.format_bytes(4 * longest * rows)} in a shard of {rows} rows, which stores each path at the "
                f"length of the longest; at most {space.format_bytes(most)} are allowed: give it a path of at most "
                f"{most // rows // 4} bytes, or say --shard-size {_MAX_PATHS_BYTES // longest // 4} or less"
            )


def _require_same_items(beside: Job, arrays: Mapping[str, NDArray[Any]], source: Source) -> None:
    """Raises MismatchError where sides of a split are of two listings: items would be on both sides, or on none."""
    there, names = beside.plan.arrays, beside.record.class_names
    if not same_listing(there, arrays) or names != source.class_names:
        raise MismatchError(
            f"{source.location!r} has changed since another side of this split was begun: {len(there['name_ends'])} "
            f"items, {shown_classes(names)}, then; {len(arrays['name_ends'])} items, "
            f"{shown_classes(source.class_names)}, now. Restore it and run the same command, or rebuild all sides "
            "with --overwrite"
        )


def hints(config: BuildConfig, output_bytes: int, shards: int, *, labelled: bool) -> Iterator[str]:
    """What would be better for most of those who train on a dataset of this size and so many shards."""
    if config.dtype == "float32" and output_bytes > _LARGE_BYTES:
        smaller = space.format_bytes(output_bytes * config.bit_depth // 32)
        yield (
            f"--dtype {config.pixel_dtype} would take some {smaller} instead of {space.format_bytes(output_bytes)}; "
            "readers then normalize, with equal values"
        )
    if labelled and config.shuffle is None and shards > 1:
        yield "shards are sorted by class; --shuffle SEED mixes the classes, so that shards can be read in order"


def warnings(config: BuildConfig) -> Iterator[str]:
    """What may be asked for, and probably should not."""
    if config.normalize == "dataset" and config.mean is None and config.classes_from is not None:
        yield (
            "--normalize dataset measures these images; for a validation set give those of its training set, as "
            "`gpu-npz info` shows them: --mean R,G,B --std R,G,B"
        )


def require_scaled(config: BuildConfig) -> None:
    """Raises UsageError for a mean or a std of levels: pixels are scaled to 0..1 first, so neither can be above 1.

    Only a build is refused: a dataset that has such settings can be read.
    """
    if config.mean is None or config.std is None or max(*config.mean, *config.std) <= 1:
        return
    given = {"mean": config.mean, "std": config.std}
    level = 255 if max(*config.mean, *config.std) <= 255 else config.max_level
    of_levels = {"mean": max(config.mean) > 1, "std": max(config.std) >= 1}  # a std of 1 leaves levels as they are
    scaled = {
        name: tuple(float(f"{number / level:.6g}") for number in numbers) if of_levels[name] else numbers
        for name, numbers in given.items()
    }
    refused, advised = (
        " ".join(f"--{name} {as_option(name, numbers)}" for name, numbers in options.items())
        for options in (given, scaled)
    )
    way = "`gpu-npz stats SRC` finds those of your images"
    if max(*scaled["mean"], *scaled["std"]) <= 1:
        way = f"if these are of levels 0 to {level}, give {advised}"
    raise UsageError(f"{refused}: pixels are scaled to 0..1 before, so neither a mean nor a std is above 1; {way}")


def _measured(
    plan: Plan,
    source: Source,
    config: BuildConfig,
    size: tuple[int, int],
    choice: Choice,
    progress: Callable[[Measuring], None],
) -> BuildConfig:
    """The settings with mean and standard deviation of the source's own pixels."""
    if config.engine == "ray":  # the choice is for the nodes, and they may have a GPU where this machine has none
        here = config.model_copy(update={"device": "cpu", "backend": "auto", "require_gpu": False})
        choice = environment.choose(here, environment.inspect("cpu"))
    tally = count_source(plan, source, config, size, choice, lambda *done: progress(Measuring(*done)))
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


def resume(storage: Storage, source: Source, config: BuildConfig) -> Job:
    """The job that OUT was begun with, if these settings and this source would make the same of it.

    Raises:
        MismatchError: they would not.
        FormatError: it is damaged.
    """
    job = Job.open(storage)
    job.require_same(config, source)
    job.require_source(source)
    if job.plan.digest() != job.record.plan_digest:
        raise FormatError(f"{storage.path(PLAN)!r} is damaged; restore it, or rebuild with --overwrite")
    if source.location != job.record.source_location:
        require_moved(job, source)
    if job.record.source_listing is not None and source.listing != job.record.source_listing:
        log.warning(
            "the table of %r names other images or labels than when the build began; OUT keeps those of then, and "
            "--overwrite starts over with those of now",
            source.location,
        )
    return job


def backend(job: Job, config: BuildConfig) -> Choice:
    """The backend that the plan was made with, or an error: once planned, a build never falls back.

    Raises:
        MismatchError: another one is asked for.
        BackendError: it cannot be used here.
    """
    record = job.record
    _require_same_backend(job, config)
    device = config.device if record.device == "cuda" else "cpu"
    same = {"backend": record.backend, "device": device, "require_gpu": record.device == "cuda"}
    config = config.model_copy(update=same)
    try:
        if record.resizer == "simd" and config.engine == "local":
            require_simd()
        return environment.choose(config, inspect(config))
    except BackendError as exc:
        raise BackendError(
            f"OUT was begun with backend {record.backend} on {record.device}, which cannot be used here: {exc}\n"
            "resume where it can, or start over with --overwrite"
        ) from exc


def _require_same_backend(job: Job, config: BuildConfig) -> None:
    record = job.record
    if config.resizer not in ("auto", record.resizer):
        raise MismatchError(
            f"OUT was begun with --resizer {record.resizer}; --resizer {config.resizer} asks for another; leave it out "
            "to resume, or start over with --overwrite"
        )
    other = config.backend not in ("auto", record.backend)
    other |= config.device == "cpu" if record.device == "cuda" else config.require_gpu
    if other:
        raise MismatchError(
            f"OUT was begun with backend {record.backend} on {record.device}; --backend {config.backend} and --device "
            f"{config.device} ask for another; leave them out to resume, or start over with --overwrite"
        )


def require_revision(records: Mapping[int, CommitRecord]) -> None:
    """Raises MismatchError if another revision of the decoding code made committed shards: two are never mixed."""
    revisions = {record.provenance.get("decoding_revision", 1) for record in records.values()}
    if others := revisions - {DECODING_REVISION}:
        raise MismatchError(
            f"another version of gpu-npz made the shards so far (decoding revision {min(others)}, this one has "
            f"{DECODING_REVISION}), and it decodes some images differently. The two are never mixed: continue with "
            "that version, or build everything again with --overwrite"
        )
