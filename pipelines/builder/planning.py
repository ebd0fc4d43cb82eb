"""Plans a build: creates a new job or resumes the one in OUT, and checks where it may be built."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
# A shard stores every path at the length of its longest one, with 4 bytes per character.
_MAX_PATHS_BYTES = 256 << 20
_MOST_PADDING = 8
_LARGE_BYTES = 10**9  # float32 datasets that are larger than this get a hint


@dataclass(frozen=True)
class Measuring:
    """Progress of `--normalize dataset`, which measures the source before anything is built.

    Attributes:
        items_done: how many items have been measured.
        items: how many items there are.
    """

    items_done: int
    items: int


def check_places(src: str | os.PathLike[str], storage: Storage) -> None:
    """Checks that OUT is not inside SRC, where the next listing would find its files.

    Raises:
        UsageError: OUT is inside SRC.
        SourceError: `location_of` rejects SRC.
    """
    source, out = location_of(src), storage.root
    if is_remote(source) != is_remote(out):
        return
    if is_remote(source):
        inside = f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    else:
        source, out = os.path.realpath(source), os.path.realpath(out)
        inside = os.path.commonpath([source, out]) == source and os.path.isdir(source)
    if inside:
        raise UsageError(f"OUT {storage.root!r} lies inside SRC {os.fspath(src)!r}; choose an OUT outside of SRC")


def places(src: str | os.PathLike[str], out: str | os.PathLike[str], sides: Collection[str]) -> dict[str, Storage]:
    """Opens the datasets of a build, by side of a split; a single dataset, without sides, has the key "".

    Raises:
        UsageError: they would be inside SRC.
        StorageError: they contain files that no build made, or OUT is a dataset although a split creates several.
    """
    storage = open_storage(out)
    if sides and storage.size(JOB) is not None:
        raise StorageError(f"{storage.root!r} is a dataset already; choose another OUT for the sides of the split")
    found = {side: open_storage(storage.path(side)) for side in sides} or {"": storage}
    for each in found.values():
        check_places(src, each)
        require_own(each)
    return found


def inspect(config: BuildConfig) -> Machine:
    """Inspects the machine on which the workers of a build run: this one, or the nodes of a Ray cluster."""
    if config.engine == "ray":
        return ray.inspect(config)
    return environment.inspect(config)


def planned(
    storage: Storage,
    source: Source,
    config: BuildConfig,
    progress: Callable[[Measuring], None],
    *,
    part: Part | None = None,
    beside: Job | None = None,
) -> tuple[Job, bool]:
    """Resumes the job of OUT or creates a new one, and removes temporary files that killed builds left.

    A job with other settings is replaced if it has no shard yet.

    Args:
        storage: OUT; the caller must hold its lock.
        source: the images.
        config: the settings.
        progress: called with the progress of `--normalize dataset`.
        part: the part that will be built; all shards if None.
        beside: the job of another side of the same split; None if there is none yet.

    Returns:
        The job, and whether it is new.

    Raises:
        UsageError, BackendError, SourceError, StorageError, FormatError: as for `build`.
        MismatchError: OUT has shards with other settings, or `beside` has other items.
    """
    job: Job | None = None
    if storage.size(JOB) is not None and not config.overwrite:
        try:
            job = resume(storage, source, config)
            _require_same_backend(job, config)
        except MismatchError:
            if is_replaceable(storage):
                log.warning("%r has a plan with other settings, but no shard yet; the plan is replaced", storage.root)
                job = None
            elif job is None:
                raise  # another backend does not matter if nothing is left to build; if something is, `backend` raises
    remove_temporaries(storage)
    if job is not None:
        return job, False
    return _begin(storage, source, config, progress, part, beside), True


def is_replaceable(storage: Storage) -> bool:
    """Whether OUT has at most a plan: no shard, not even an unfinished one of a killed build, and no running part."""
    try:
        require_no_parts(storage)
    except LockedError:
        return False
    return is_unbuilt(storage)


def withdraw(storage: Storage) -> None:
    """Removes a plan that has no shard yet, unless another build has locked OUT and may use the plan."""
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
    """Lists the source, divides it into shards, chooses the backend, and stores all this in OUT as a new job."""
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
        table(config)  # raises before the listing if the dtype cannot hold a value
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
        require_sound(source, plan, config, range(plan.shard_count))
        config = _measured(plan, source, config, size, choice, progress)
    if config.overwrite or storage.size(JOB) is not None:
        clear(storage)  # only after everything else has succeeded
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
    """Raises StorageError if these shards do not fit on OUT's disk, where `freed_bytes` will be freed first."""
    if config.preflight and config.deflate_level is None:  # the size of compressed images is unknown
        space.require_space(
            storage.root,
            rows=sum(len(plan.shard_range(shard)) for shard in shards),
            row_bytes=row_bytes,
            shards=len(shards),
            dtype=config.dtype,
            pixel_dtype=config.pixel_dtype,
            freed_bytes=freed_bytes,
        )


def require_sound(source: Source, plan: Plan, config: BuildConfig, shards: Iterable[int]) -> None:
    """Raises SourceError if the files of these shards are damaged in a way that reading an item cannot notice."""
    if config.preflight and (places := plan.places(shards)) is not None:
        source.require_sound(places)


def _require_even_paths(plan: Plan, source: Source) -> None:
    """Raises SourceError if one long path makes the array `paths` of a shard much larger than the paths themselves."""
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
    """Raises MismatchError if SRC has changed between two sides of a split, which could then share or lose items."""
    there, names = beside.plan.arrays, beside.record.class_names
    if not same_listing(there, arrays) or names != source.class_names:
        raise MismatchError(
            f"{source.location!r} has changed since another side of this split was begun: {len(there['name_ends'])} "
            f"items, {shown_classes(names)}, then; {len(arrays['name_ends'])} items, "
            f"{shown_classes(source.class_names)}, now. Restore it and run the same command, or rebuild all sides "
            "with --overwrite"
        )


def require_same_labels(train: Source, source: Source) -> None:
    """Raises SourceError if a side of a split that SRC has is labelled in another way than its train side."""
    kinds, trained = ([(each.kind, each.classes) for each in columns] for columns in (source.columns, train.columns))
    if (source.class_names is None) == (train.class_names is None) and kinds == trained:  # names differ: y_test
        return
    mine, its = (
        f"{len(each.class_names)} classes" if each.class_names is not None else ", ".join(map(str, each.columns))
        for each in (source, train)
    )
    raise SourceError(
        f"{source.location!r} has {mine or 'no labels'}, and {train.location!r} {its or 'no labels'}; make their "
        "labels alike, or use --labels none"
    )


def hints(config: BuildConfig, output_bytes: int, plan: Plan) -> Iterator[str]:
    """Yields hints for settings that would suit most training on such a dataset better.

    Args:
        config: the settings.
        output_bytes: the size of the dataset.
        plan: the plan.
    """
    if config.dtype == "float32" and output_bytes > _LARGE_BYTES:
        smaller = space.format_bytes(output_bytes * config.bit_depth // 32)
        yield (
            f"--dtype {config.pixel_dtype} would take about {smaller} instead of {space.format_bytes(output_bytes)}; "
            "the readers then normalize, with the same values"
        )
    if config.shuffle is None and plan.shard_count > 1 and _is_sorted(plan.labels()):
        yield "shards are sorted by class; --shuffle SEED mixes the classes, so that shards can be read in order"


def _is_sorted(labels: NDArray[Any]) -> bool:
    """Whether labels of one column ascend and differ."""
    return labels.ndim == 1 and bool((labels[:-1] <= labels[1:]).all() and labels[0] < labels[-1])


def warnings(config: BuildConfig) -> Iterator[str]:
    """Yields warnings about settings that are allowed but are probably mistakes."""
    if config.normalize == "dataset" and config.mean is None and config.classes_from is not None:
        yield (
            "--normalize dataset measures these images; for a validation set, use the values of its training "
            "set, which `gpu-npz info` shows: --mean R,G,B --std R,G,B"
        )


def require_scaled(config: BuildConfig) -> None:
    """Raises UsageError for a mean or std in pixel levels: pixels are scaled to 0..1 first, so neither can exceed 1.

    Only builds check this; datasets that have such settings can still be read.
    """
    if config.mean is None or config.std is None or max(*config.mean, *config.std) <= 1:
        return
    given = {"mean": config.mean, "std": config.std}
    level = 255 if max(*config.mean, *config.std) <= 255 else config.max_level
    of_levels = {"mean": max(config.mean) > 1, "std": max(config.std) >= 1}  # in levels, a std of 1 is no scaling
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
        way = f"if these are for levels from 0 to {level}, give {advised}"
    raise UsageError(f"{refused}: pixels are scaled to 0 to 1 first, so no mean or std is larger than 1; {way}")


def _measured(
    plan: Plan,
    source: Source,
    config: BuildConfig,
    size: tuple[int, int],
    choice: Choice,
    progress: Callable[[Measuring], None],
) -> BuildConfig:
    """Returns the settings with the mean and standard deviation that are measured from the source's pixels."""
    if config.engine == "ray":  # the choice applies to the nodes, which may have a GPU that this machine lacks
        here = config.model_copy(update={"device": "cpu", "backend": "auto", "require_gpu": False})
        choice = environment.choose(here, environment.inspect(here))
    tally = count_source(plan, source, config, size, choice, lambda *done: progress(Measuring(*done)))
    counts = tally.counts.tolist()
    if not all(map(sum, counts)):
        raise SourceError(
            f"{source.location!r}: no image can be decoded, so --normalize dataset has nothing to measure"
        )
    mean, std = [float(mean_of(channel)) for channel in counts], [std_of(channel) for channel in counts]
    if min(std) < MIN_STD:
        raise UsageError(
            f"--normalize dataset: a channel of {source.location!r} has only one level (std {min(std):g}); choose "
            "another --normalize"
        )
    log.info("mean %s and std %s of %d items", mean, std, plan.item_count)
    config = BuildConfig(**{**config.model_dump(), "mean": mean, "std": std})
    table(config)
    return config


def resume(storage: Storage, source: Source, config: BuildConfig) -> Job:
    """Opens the job of OUT and checks that these settings and this source would build the same dataset.

    Raises:
        MismatchError: they would build another one.
        FormatError: the job or its plan is damaged.
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
            "the table of %r has changed since the build started; OUT keeps the images and labels from then, and "
            "--overwrite starts over with the current ones",
            source.location,
        )
    return job


def backend(job: Job, config: BuildConfig) -> Choice:
    """Returns the backend of the job. A planned build never falls back to another one.

    Raises:
        MismatchError: the settings request another backend.
        BackendError: the backend cannot be used here.
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
            f"OUT was started with backend {record.backend} on {record.device}, which cannot be used here: {exc}\n"
            "resume where it can, or start over with --overwrite"
        ) from exc


def _require_same_backend(job: Job, config: BuildConfig) -> None:
    record = job.record
    if config.resizer not in ("auto", record.resizer):
        raise MismatchError(
            f"OUT was started with --resizer {record.resizer}; --resizer {config.resizer} asks for another; omit it "
            "to resume, or start over with --overwrite"
        )
    other = config.backend not in ("auto", record.backend)
    other |= config.device == "cpu" if record.device == "cuda" else config.require_gpu
    if other:
        raise MismatchError(
            f"OUT was started with backend {record.backend} on {record.device}; --backend {config.backend} and "
            f"--device {config.device} ask for another; omit them to resume, or start over with --overwrite"
        )


def require_revision(records: Mapping[int, CommitRecord]) -> None:
    """Raises MismatchError if another revision of the decoding code built some shards; revisions are never mixed."""
    revisions = {record.provenance.get("decoding_revision", 1) for record in records.values()}
    if others := revisions - {DECODING_REVISION}:
        raise MismatchError(
            f"another version of gpu-npz made the shards so far (decoding revision {min(others)}, this one has "
            f"{DECODING_REVISION}), and it decodes some images differently. The two are never mixed: continue with "
            "that version, or build everything again with --overwrite"
        )
