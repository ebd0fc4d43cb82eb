"""`build` and `build_split`: turn the settings into a plan, take the lock, and run the build."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence

from ..config import BuildConfig
from ..dataset.built import open_images
from ..dataset.job import Job
from ..dataset.layout import JOB, MANIFEST, require_own
from ..dataset.manifest import class_list
from ..errors import GpuNpzError, UsageError
from ..sources import sides_of_source
from ..sources.base import Source
from ..storage import open_storage
from ..workers import ray
from ..workers.events import Event
from .parts import PLAN_WAIT_S, Part, require_no_parts
from .planning import Measuring, check_places, places, planned, require_same_labels, require_scaled, withdraw
from .report import BuildReport, OnEvent, Started
from .run import run

log = logging.getLogger(__name__)


def build(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    progress: OnEvent | None = None,
) -> BuildReport:
    """Builds NPZ shards in `out` from the images in `src`, or resumes a build that was stopped.

    Args:
        src: a folder of class folders or images, or another source that `open_source` supports.
        out: a folder, which is created if it does not exist, or a URL such as `s3://bucket/path`.
        config: the settings; the defaults if None.
        progress: called with each event, in the calling thread.

    Raises:
        UsageError, BackendError, SourceError, StorageError, MismatchError, ShardError: see `gpu_npz.errors`.
        RejectLimitError: more items were rejected than `max_rejects` allows. All shards are built, unless most items
            were rejected and the build stopped early.
    """
    return _build(src, out, config or BuildConfig(), progress)


def _build(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: BuildConfig,
    progress: OnEvent | None,
    beside: Job | None = None,
    class_names: Sequence[str] | None = None,
) -> BuildReport:
    """Builds one dataset, as `build` does.

    Args:
        src, out, config, progress: as for `build`.
        beside: the job of another side of the same split of the same items.
        class_names: the classes in the order of their numbers, if `config.classes_from` does not give them.
    """
    if config.sides:
        raise UsageError(
            f"split {config.split} makes several datasets: call build_split, or name one: {config.split}/val"
        )
    if config.several:
        raise UsageError(f"splits {config.splits} makes several datasets: call build_split, or name one array as src")
    require_scaled(config)
    start = time.perf_counter()
    storage = open_storage(out)
    check_places(src, storage)
    part = None if config.part is None else Part.of(config.part, os.environ)
    if part and config.overwrite:
        raise UsageError(
            "--part and --overwrite: the parts would delete each other's shards; delete OUT yourself, then start the "
            "parts"
        )
    source = open_images(src, config, class_list(config.classes_from) or class_names)
    require_own(storage)
    untried = False  # whether this build has made a plan that no worker has started on
    try:
        with contextlib.ExitStack() as stack:
            if config.engine == "ray" and (config.overwrite or storage.size(MANIFEST) is None):
                stack.enter_context(ray.cluster(config.ray_address))  # used by all that follows
            with contextlib.ExitStack() as planning:
                planning.enter_context(storage.lock(wait_s=PLAN_WAIT_S if part else 0.0))

                def on_event(event: Started | Measuring | Event) -> None:
                    nonlocal untried
                    untried = untried and isinstance(event, Started)
                    if progress:
                        progress(event)

                if not part:
                    require_no_parts(storage)
                job, untried = planned(storage, source, config, on_event, part=part, beside=beside)
                if part:
                    log.warning("building part %s (%s)", part, part.origin)
                    stack.enter_context(storage.lock(part.lock))
                else:
                    stack.push(planning.pop_all())

            return run(storage, job, source, config, on_event, start=start, part=part)
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
    """Builds a dataset for each side of a split: first `out`/train, then the others, such as `out`/val.

    The sides are those of `config.split`, or those that SRC has (`config.splits`). All sides have the same class
    numbers. If `normalize` is "dataset", all sides use the statistics of train. Complete sides are not rebuilt.

    Args:
        src: as for `build`.
        out: as for `build`; the datasets are folders in it.
        config: the settings, with `split` or `splits`.
        progress: called with the name of the side and each event.

    Returns:
        The report of each side.

    Raises:
        UsageError: `config` has no split, or a side has no item.
        StorageError: `out` is itself a dataset.
        MismatchError: SRC has changed since the first side was begun.
        GpuNpzError: as for `build`.
    """
    if not config.several:
        raise UsageError("split: give it as val=0.1, or splits as all; build makes a single dataset")
    own = sides_of_source(src, config) if config.splits != "none" else {}
    alone = config.model_copy(update={"splits": "none"})
    class_names = _class_names(list(own.values()), alone)
    reports = {}
    first: Job | None = None
    if (whole := open_storage(out)).size(JOB) is not None:
        withdraw(whole)  # only if OUT has just the plan of a build without --split
    for side, storage in places(src, out, own or config.sides).items():
        on_event = functools.partial(progress, side) if progress else None
        if own:
            alone = config.model_copy(update={"splits": "none"})  # with the statistics of train
            reports[side] = _build(own[side], storage.root, alone, on_event, class_names=class_names)
        else:
            reports[side] = _build(src, storage.root, config.sides[side], on_event, first)
        if first is None:
            first = Job.open(storage)
            if config.normalize == "dataset":
                config = config.model_copy(update={"mean": first.settings.mean, "std": first.settings.std})
    return reports


def _class_names(sides: Sequence[str], config: BuildConfig) -> Sequence[str] | None:
    """The classes of the first of the sides that SRC has; None if it has none.

    Raises:
        SourceError: a side cannot be read, has other classes, or is labelled in another way.
    """
    first: Source | None = None
    given = class_list(config.classes_from)
    for location in sides:
        source = open_images(location, config, given or (first.class_names if first else None))
        first = first or source
        require_same_labels(first, source)
    return first.class_names if first else None
