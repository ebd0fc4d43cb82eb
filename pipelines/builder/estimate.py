"""Before a long build: what it would make and take, by a look at the items and a short measured run."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config import BuildConfig
from ..dataset.commits import committed
from ..dataset.image_size import image_size
from ..dataset.job import Job
from ..dataset.layout import JOB, is_unbuilt, shard_name
from ..dataset.manifest import class_list
from ..dataset.plan import Plan, collect
from ..dataset.selection import listed
from ..dataset.space import free_space, held_bytes, lack_of_space, output_bytes
from ..errors import BackendError, MismatchError, StorageError
from ..machine import environment
from ..machine.environment import Choice
from ..machine.tuning import Tuning
from ..preprocess.normalize import row_shape, table
from ..sources import open_source
from ..sources.base import Group, LabelColumn, Source, as_bytes
from ..sources.rejects import Reject
from ..storage import open_storage
from ..storage.base import Storage
from ..storage.local import LocalStorage
from ..workers.events import Committed, Progress, Task, WorkerEnded
from ..workers.worker import work
from .headers import Sample, sample_headers, spread
from .planning import backend, hints, inspect, places, require_revision, require_scaled, resume, warnings

SECONDS = 3.0
_MEASURED_ITEMS = 20_000
_MEASURED_SHARD_BYTES = 1 << 27  # measured shards are deleted one by one, so that a few of these are all it takes
_MANY_SHARDS = 100_000
# A worker that has decoded nothing but tiny images: Python, NumPy and the decoder's library; DALI's without CUDA's.
_PROCESS_BYTES = {"pillow": 60 * 10**6, "dali": 220 * 10**6}

_MEASURES_FIRST = "--normalize dataset decodes every image once before the build: it takes nearly twice the duration"

OnStage = Callable[[str, float, "float | None"], None]


@dataclass(frozen=True)
class Measured:
    """A short run of one worker: how many items in how many seconds, after the first batch, and the GPU's memory.

    Of the shards that it built, `stored_row_bytes` is what a row took, images and all, or 0 if there was none;
    `rejects` is how many items had none, and `reject` one of these.
    """

    items: int
    seconds: float
    images_per_second: float
    gpu_memory_bytes: int
    stored_row_bytes: float
    rejects: int
    reject: Reject | None


@dataclass(frozen=True)
class Estimate:
    """What a build would do. Sizes in bytes; of the whole dataset, whatever `part` says.

    Attributes:
        source: where the images are.
        items: how many.
        sides: how many of them each side of a split gets; empty without one.
        classes: how many; None without labels, and where these are not classes of one column.
        columns: the columns of labels where they are not.
        smallest_class, largest_class: name and number of items.
        sample: what the headers say.
        image_size: height and width of a stored image.
        row_bytes, shard_rows, shards: of the output.
        shards_left: how many are not built yet; None where OUT was not begun, or with other settings.
        output_bytes: all files together, if no item is rejected; of compressed images by the measured run, or the most.
        free_bytes: of the filesystem where OUT lies or will lie; None where it does not tell.
        backend, device, tuning: what the build would take.
        worker_memory_bytes, memory_bytes: main memory of a worker and of all; estimates.
        measured: a short run of one worker; None if it was left out.
        duration_s: of the build, or of what is left of it, by that run; an estimate.
        warnings: what to think over before the build.
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
    measured: Measured | None
    duration_s: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON values."""
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
    """Says what `build` with the same arguments would do; writes nothing to `out`.

    Args:
        src: a folder of class folders, or of images.
        config: the settings; the defaults if None.
        out: where the dataset shall be; for its free space the current folder counts if None.
        seconds: how long to decode, normalize and write for a rate, about; 0 leaves that out.
        folder: where that writes, and deletes what it wrote; the system's temporary folder if None.
        progress: called with the stage, what of it is done, and its total where that is known.

    Raises:
        UsageError, BackendError, SourceError: as `build`.
        StorageError: `out` holds files that no build made, or a dataset where a split makes several.
        FormatError: `out` is damaged.
        ShardError: the measured run failed for a reason that lies outside the images.
    """
    config = given = config or BuildConfig()
    require_scaled(config)
    measures_first = config.normalize == "dataset" and config.mean is None
    if measures_first:
        config = BuildConfig(**{**config.model_dump(), "normalize": "unit"})  # the same work
    source = open_source(src, config, class_list(config.classes_from))
    place, outs = os.getcwd(), {}
    if out is not None:
        place, outs = open_storage(out).root, places(src, out, config)
    choice = environment.choose(config, inspect(config))
    table(config)  # a value that the dtype cannot hold shows here
    progress("listing", 0, None)
    sides: dict[str, int] = {}
    arrays = listed(source, config, sides)
    sample = sample_headers(Plan(arrays, 1), source, config, choice, lambda *done: progress("reading headers", *done))
    size = image_size(Plan(arrays, 1), source, config)
    shape = row_shape(config, *size)
    row_bytes = math.prod(shape) * np.dtype(config.dtype).itemsize
    plan = Plan(arrays, config.shard_rows(row_bytes))
    shard_rows = min(plan.shard_rows, plan.item_count)
    tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=shard_rows, shards=plan.shard_count)
    if config.side is not None:
        sides[config.side] = plan.item_count
    shards = {side: -(-sides[side] // plan.shard_rows) for side in config.sides} or {"": plan.shard_count}
    left, unfit = _left(outs, source, given, shards)
    label_columns = 1 if source.class_names is not None else len(source.columns)
    needed = output_bytes(plan, config, shape, label_columns=label_columns)
    memory = _memory(tuning, choice, row_bytes, math.prod(shape), sample)
    measured, trouble = None, None
    if seconds > 0 and config.engine == "ray":
        trouble = "the duration is not known: with --engine ray it depends on the nodes, and nothing is measured here"
    elif seconds > 0 and left != 0:
        try:
            measured = _measure(plan, source, config, choice, tuning, size, row_bytes, seconds, folder, progress)
        except StorageError as exc:
            trouble = f"the duration is not known: {exc}; --folder DIR measures elsewhere"
    if measured and measured.stored_row_bytes and config.deflate_level is not None:
        needed = int(plan.item_count * measured.stored_row_bytes)
    workers = max(1, tuning.workers)
    share = 1.0 if left is None else left / sum(shards.values())
    held = sum(held_bytes(storage.root) for storage in outs.values())
    smallest, largest = _classes(plan, source)
    return Estimate(
        source=source.location,
        items=plan.item_count,
        sides=sides,
        classes=None if source.class_names is None else len(source.class_names),
        columns=source.columns,
        smallest_class=smallest,
        largest_class=largest,
        sample=sample,
        image_size=size,
        row_bytes=row_bytes,
        shard_rows=plan.shard_rows,
        shards=sum(shards.values()),
        shards_left=left,
        output_bytes=needed,
        free_bytes=free_space(place)[0],
        backend=choice.backend,
        device=choice.device,
        tuning=tuning,
        worker_memory_bytes=memory,
        memory_bytes=workers * memory,
        measured=measured,
        duration_s=share * plan.item_count / (measured.images_per_second * workers) if measured else None,
        warnings=tuple(
            warning
            for warning in (
                choice.warning,
                *unfit,
                lack_of_space(place, needed - held, sum(shards.values())),
                _MEASURES_FIRST if measures_first and left is None else None,
                *warnings(config),
                *hints(config, needed, plan.shard_count, labelled=source.class_names is not None),
                *_warnings(config, plan, sample),
                _rejected(measured),
                trouble,
            )
            if warning
        ),
    )


# The items


def _classes(plan: Plan, source: Source) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """The smallest and the largest class, each with its number of items."""
    if source.class_names is None:
        return None, None
    counts = np.bincount(plan.labels(), minlength=len(source.class_names))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return (source.class_names[smallest], int(counts[smallest])), (source.class_names[largest], int(counts[largest]))


def _left(
    outs: dict[str, Storage], source: Source, config: BuildConfig, shards: dict[str, int]
) -> tuple[int | None, list[str]]:
    """How many shards a build that goes on would build, None if none would; and why one that was begun would not."""
    left, unfit, resumed = dict(shards), [], False
    for side, storage in outs.items():
        if storage.size(JOB) is None or config.overwrite:
            continue
        mine = config.sides.get(side, config)
        try:
            job = resume(storage, source, mine)
            records = committed(storage, job)
            missing = job.plan.shard_count - len(records)
            if missing:
                require_revision(records)
                backend(job, mine)
            left[side], resumed = missing, True
        except (MismatchError, BackendError) as exc:
            # A build replaces a plan of other settings that has no shard yet.
            if isinstance(exc, BackendError) or not is_unbuilt(storage) or storage.live_locks():
                unfit.append(f"{storage.root!r}: {exc}")
    return (sum(left.values()) if resumed and not unfit else None), unfit


# What it takes


def _memory(tuning: Tuning, choice: Choice, row_bytes: int, row_pixels: int, sample: Sample) -> int:
    """Main memory of a worker; what a GPU holds does not count, but for the rows that go there and back."""
    batches = 0 if choice.gpus else 2 if choice.backend == "pillow" else tuning.prefetch + 1
    heaviest = sample.heaviest.decode_bytes if sample.heaviest else 0
    at_once = tuning.threads if choice.backend == "dali" and not choice.gpus else 1
    rows = (tuning.open_shards + 2) * row_bytes + batches * row_pixels
    return _PROCESS_BYTES[choice.backend] + tuning.batch_size * rows + at_once * heaviest


def _measure(
    plan: Plan,
    source: Source,
    config: BuildConfig,
    choice: Choice,
    tuning: Tuning,
    size: tuple[int, int],
    row_bytes: int,
    seconds: float,
    folder: str | None,
    progress: OnStage,
) -> Measured:
    """Lets one worker build shards of items spread over the plan, in a temporary folder, until the time is over."""
    groups = []
    for item in spread(plan, _MEASURED_ITEMS, 0.5):
        parent, slash, name = as_bytes(item.path).rpartition(b"/")
        own = None if plan.arrays.get("labels") is None else np.array([item.label])
        places = np.array([item.place], np.int64) if item.place else None
        label = item.label if isinstance(item.label, int) and own is None else -1
        groups.append(Group(parent + slash, [name], label, own, places))
    small = Plan(collect(groups), min(plan.shard_rows, max(tuning.batch_size, _MEASURED_SHARD_BYTES // row_bytes)))
    settings = config.model_copy(update={"on_reject": "skip"})
    items, first_items, begin, first, last, gpu_memory = 0, 0, time.perf_counter(), 0.0, 0.0, 0
    rows = stored_bytes = 0
    rejects: list[Reject] = []

    def shards() -> Iterator[int]:
        for shard in range(small.shard_count):
            if last - first > seconds:
                return  # so that the worker comes to its end, and says what it took
            yield shard

    with tempfile.TemporaryDirectory(prefix="gpu-npz-plan-", dir=folder) as place:
        storage = LocalStorage(place)
        Job.create(storage, small, settings, choice, source=source, image_size=size)
        task = Task(place, source, choice.gpu, tuning, None)
        with contextlib.closing(work(task, shards())) as events:
            for event in events:
                if isinstance(event, Committed):
                    rows, stored_bytes = rows + event.record.rows, stored_bytes + event.record.bytes
                    rejects += event.record.rejects
                    storage.remove(shard_name(event.record.shard, small.shard_count))
                elif isinstance(event, WorkerEnded):
                    gpu_memory = event.gpu_memory_bytes
                elif isinstance(event, Progress) and last - first <= seconds:
                    last = time.perf_counter()
                    if first:
                        items += event.items
                    else:  # a decoder's start is the same for a million images
                        first, first_items = last, event.items
                    progress("measuring", min(last - first, seconds), seconds)
    if not items:  # one batch was all
        items, first = first_items, begin
    stored_row_bytes = stored_bytes / rows if rows else 0.0
    rate, reject = items / (last - first), rejects[0] if rejects else None
    return Measured(items, last - first, rate, gpu_memory, stored_row_bytes, len(rejects), reject)


def _rejected(measured: Measured | None) -> str | None:
    """What the headers did not tell."""
    if measured is None or measured.reject is None:
        return None
    reject = measured.reject
    return (
        f"{measured.rejects} items of the short run were rejected ({reject.path!r} for one: {reject.code}, "
        f"{reject.detail})"
    )


def _warnings(config: BuildConfig, plan: Plan, sample: Sample) -> Iterator[str]:
    rejects = sample.over_max_pixels + sum(sample.unreadable.values())
    expected = rejects * plan.item_count // sample.items
    if expected > config.reject_limit(plan.item_count):
        yield (
            f"{rejects} of {sample.items} sampled items would be rejected, so some {expected} in all; --max-rejects "
            f"{config.max_rejects} allows {config.reject_limit(plan.item_count)}: mend them, or raise it"
        )
    if sample.over_max_pixels:
        yield (
            f"{sample.over_max_pixels} of {sample.items} sampled images have more than --max-pixels "
            f"{config.max_pixels} and would be rejected; raise it if memory allows"
        )
    if sample.sixteen_bit and config.bit_depth == 8:
        yield (
            f"{sample.sixteen_bit} of {sample.items} sampled images have 16 bits a channel, of which 8 are kept; "
            "--bit-depth 16 keeps them all"
        )
    if plan.shard_count > _MANY_SHARDS:
        yield f"{plan.shard_count} shards are slow to list and to check; a larger --shard-size makes fewer"
