"""Estimates the output of a build and the disk space, memory and time that it needs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..config import BuildConfig
from ..dataset.built import open_images
from ..dataset.manifest import class_list
from ..dataset.space import free_space, held_bytes, lack_of_space
from ..errors import StorageError, UsageError
from ..machine.tuning import Tuning
from ..sources import sides_of_source
from ..sources.base import LabelColumn
from ..storage import open_storage
from .headers import Sample
from .inspection import Inspection, OnStage, extreme_classes, inspect_source, shards_left
from .planning import hints, places, require_scaled, warnings
from .short_run import ShortRun, measure

SECONDS = 3.0
_MANY_SHARDS = 100_000
# Memory of a worker that has decoded only tiny images: Python, NumPy and the decoder's library; for DALI without CUDA.
_PROCESS_BYTES = {"pillow": 60 * 10**6, "dali": 220 * 10**6}

_MEASURES_FIRST = "--normalize dataset decodes every image once before the build: the build takes nearly twice as long"


@dataclass(frozen=True)
class Estimate:
    """An estimate of a build. Sizes are in bytes and describe the whole dataset, even if `part` is set.

    Attributes:
        source: the location of the images.
        items: the number of items.
        sides: the number of items of each side of a split; empty without a split.
        classes: the number of classes; None without labels, or if labels are not classes of one column.
        columns: the label columns, if labels are not classes of one column.
        smallest_class: the name of the smallest class and its number of items; None without classes.
        largest_class: the same for the largest class.
        sample: a summary of the headers of sampled images.
        image_size: height and width of a stored image, in pixels.
        row_bytes: the size of a row.
        shard_rows: the number of rows per shard.
        shards: the number of shards.
        shards_left: how many shards are not built yet; None if OUT was not begun, or was begun with other settings.
        output_bytes: the size of all files if no item is rejected. For compressed images it is measured, or the
            largest possible size.
        free_bytes: the free space on OUT's filesystem; None if unknown.
        backend: the decoder that the build would use.
        device: the device that the build would use, `cpu` or `cuda`.
        tuning: the batch size, the number of workers, and so on.
        worker_memory_bytes: an estimate of the main memory of one worker.
        memory_bytes: an estimate of the main memory of all workers.
        measured: the result of a short run of one worker; None if there was none.
        duration_s: an estimate of the duration of the build, or of the rest of it, from the short run; None if unknown.
        warnings: points to consider before the build.
    """

    source: str
    items: int
    sides: dict[str, int]
    classes: int | None
    columns: tuple[LabelColumn, ...]
    smallest_class: tuple[str, int] | None
    largest_class: tuple[str, int] | None
    sample: Sample
    image_size: tuple[int, int]
    row_bytes: int
    shard_rows: int
    shards: int
    shards_left: int | None
    output_bytes: int
    free_bytes: int | None
    backend: str
    device: str
    tuning: Tuning
    worker_memory_bytes: int
    memory_bytes: int
    measured: ShortRun | None
    duration_s: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The estimate as a dict of values that `json` can serialize."""
        return {**asdict(self), "columns": [column.model_dump() for column in self.columns]}


def estimate(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    seconds: float = SECONDS,
    folder: str | None = None,
    progress: OnStage = lambda stage, done, total: None,
) -> Estimate:
    """Estimates what `build` would do with the same arguments. Writes nothing to `out`.

    Args:
        src: the images, as for `build`.
        config: the settings; the defaults if None.
        out: OUT, as for `build`; if None, the free space is that of the current folder.
        seconds: the approximate duration of a short run that measures the rate; 0 for no such run.
        folder: where the short run writes its shards and deletes them again; the system's temporary folder if None.
        progress: called with the name of the stage, the amount done, and the total, or None if it is unknown.

    Raises:
        UsageError, BackendError, SourceError: as for `build`.
        StorageError: `out` holds files that no build made, or a dataset although a split creates several.
        FormatError: `out` is damaged.
        ShardError: the short run failed for a reason that no image caused.
    """
    given = config or BuildConfig()
    require_scaled(given)
    _refuse_sides(src, given)
    measures_first = given.normalize == "dataset" and given.mean is None
    config = BuildConfig(**{**given.model_dump(), "normalize": "unit"}) if measures_first else given  # the same work
    source = open_images(src, config, class_list(config.classes_from))
    place = os.getcwd() if out is None else open_storage(out).root
    outs = {} if out is None else places(src, out, config.sides)
    found = inspect_source(source, config, progress)
    plan, tuning = found.plan, found.tuning
    left, unfit = shards_left(outs, source, given, counts := found.shards)
    measured, trouble = _try_measuring(found, left, seconds, folder, progress)
    needed = found.output_bytes(measured.stored_row_bytes if measured else 0.0)
    held = sum(held_bytes(storage.root) for storage in outs.values())
    shards = sum(counts.values())
    share = 1.0 if left is None else left / shards
    smallest, largest = extreme_classes(plan, source)
    doubts = (
        found.choice.warning,
        *unfit,
        lack_of_space(place, needed - held, shards),
        _MEASURES_FIRST if measures_first and left is None else None,
        *_advice(found, needed),
        _rejected(measured),
        trouble,
    )
    return Estimate(
        source=source.location,
        items=plan.item_count,
        sides=found.sides,
        classes=None if source.class_names is None else len(source.class_names),
        columns=source.columns,
        smallest_class=smallest,
        largest_class=largest,
        sample=found.sample,
        image_size=found.image_size,
        row_bytes=found.row_bytes,
        shard_rows=plan.shard_rows,
        shards=shards,
        shards_left=left,
        output_bytes=needed,
        free_bytes=free_space(place)[0],
        backend=found.choice.backend,
        device=found.choice.device,
        tuning=tuning,
        worker_memory_bytes=_memory(found),
        memory_bytes=max(1, tuning.workers) * _memory(found),
        measured=measured,
        duration_s=_duration(share * plan.item_count, measured, tuning),
        warnings=tuple(doubt for doubt in doubts if doubt),
    )


def _refuse_sides(src: str | os.PathLike[str], config: BuildConfig) -> None:
    if config.splits != "none":
        sides = ", ".join(sides_of_source(src, config).values())
        raise UsageError(f"--splits {config.splits} makes several datasets; plan each by itself: SRC is one of {sides}")


def _duration(items: float, measured: ShortRun | None, tuning: Tuning) -> float | None:
    return items / (measured.images_per_second * max(1, tuning.workers)) if measured else None


def _memory(found: Inspection) -> int:
    """Estimates a worker's main memory in bytes. On a GPU, only rows that are copied to the host use main memory."""
    choice, tuning = found.choice, found.tuning
    batches = 0 if choice.gpus else 2 if choice.backend == "pillow" else tuning.batches_ahead + 1
    heaviest = found.sample.heaviest.decode_bytes if found.sample.heaviest else 0
    at_once = tuning.threads if choice.backend == "dali" and not choice.gpus else 1
    rows = (tuning.open_shards + 2) * found.row_bytes + batches * math.prod(found.row_shape)
    return _PROCESS_BYTES[choice.backend] + tuning.batch_size * rows + at_once * heaviest


def _try_measuring(
    found: Inspection, left: int | None, seconds: float, folder: str | None, progress: OnStage
) -> tuple[ShortRun | None, str | None]:
    """Returns a short run, or the reason why a requested one is missing; `left` is the number of shards to build."""
    if seconds <= 0:
        return None, None
    if found.config.engine == "ray":
        return (
            None,
            "the duration is unknown, because with --engine ray it depends on the nodes",
        )
    if left == 0:
        return None, None
    try:
        return measure(found, seconds, folder, progress), None
    except StorageError as exc:
        return None, f"the duration is unknown: {exc}; use --folder DIR to measure in another folder"


def _rejected(measured: ShortRun | None) -> str | None:
    """A warning about rejects in the short run, which the headers did not reveal; None if there were none."""
    if measured is None or measured.reject is None:
        return None
    reject = measured.reject
    return (
        f"{measured.rejects} items of the short run were rejected ({reject.path!r} for one: {reject.code}, "
        f"{reject.detail})"
    )


def _advice(found: Inspection, needed_bytes: int) -> Iterator[str]:
    """Yields advice about the settings, the size of the dataset, and the sampled images."""
    config, plan, sample = found.config, found.plan, found.sample
    yield from warnings(config)
    yield from hints(config, needed_bytes, plan)
    rejects = sample.over_max_pixels + sum(sample.unreadable.values())
    expected = rejects * plan.item_count // sample.items
    if expected > config.reject_limit(plan.item_count):
        yield (
            f"{rejects} of {sample.items} sampled items would be rejected, so about {expected} in all; --max-rejects "
            f"{config.max_rejects} allows {config.reject_limit(plan.item_count)}: fix them, or raise it"
        )
    if sample.over_max_pixels:
        yield (
            f"{sample.over_max_pixels} of {sample.items} sampled images have more than --max-pixels "
            f"{config.max_pixels} and would be rejected; raise it if memory allows"
        )
    if sample.sixteen_bit and config.bit_depth == 8:
        yield (
            f"{sample.sixteen_bit} of {sample.items} sampled images have 16 bits per channel, of which 8 are kept; "
            "--bit-depth 16 keeps all of them"
        )
    if plan.shard_count > _MANY_SHARDS:
        yield f"{plan.shard_count} shards are slow to list and to check; use a larger --shard-size"
