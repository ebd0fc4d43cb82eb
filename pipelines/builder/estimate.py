"""Before a long build: what it would make and take, by a look at the items and a short measured run."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
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
from ..preprocess.resize import resolved
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
    given = config or BuildConfig()
    require_scaled(given)
    measures_first = given.normalize == "dataset" and given.mean is None
    config = BuildConfig(**{**given.model_dump(), "normalize": "unit"}) if measures_first else given  # the same work
    source = open_source(src, config, class_list(config.classes_from))
    place = os.getcwd() if out is None else open_storage(out).root
    outs = {} if out is None else places(src, out, config)
    found = _inspect(source, config, progress)
    plan, tuning = found.plan, found.tuning
    left, unfit = _left(outs, source, given, counts := found.shards)
    measured, trouble = _try_measuring(found, left, seconds, folder, progress)
    needed = found.output_bytes(measured)
    held = sum(held_bytes(storage.root) for storage in outs.values())
    shards = sum(counts.values())
    share = 1.0 if left is None else left / shards
    smallest, largest = _classes(plan, source)
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


def _duration(items: float, measured: Measured | None, tuning: Tuning) -> float | None:
    return items / (measured.images_per_second * max(1, tuning.workers)) if measured else None


# What a build would work on


@dataclass(frozen=True)
class _Inspection:
    """What a build would work on, and with.

    `sides` has the number of items of each side of a split. `image_size` is the height and width of a row.
    """

    source: Source
    config: BuildConfig
    choice: Choice
    plan: Plan
    sides: dict[str, int]
    sample: Sample
    image_size: tuple[int, int]
    tuning: Tuning

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """The shape of a row."""
        return row_shape(self.config, *self.image_size)

    @property
    def row_bytes(self) -> int:
        """The size of a row."""
        return _row_bytes(self.config, self.image_size)

    @property
    def shards(self) -> dict[str, int]:
        """How many shards each side of a split has; those of a single dataset under ""."""
        counts = {side: self.sides[side] for side in self.config.sides}
        rows = {side: self.config.for_items(items).shard_rows(self.row_bytes) for side, items in counts.items()}
        return {side: -(-items // rows[side]) for side, items in counts.items()} or {"": self.plan.shard_count}

    def output_bytes(self, measured: Measured | None) -> int:
        """The size of the dataset; of compressed images as measured, or at most."""
        if measured and measured.stored_row_bytes and self.config.deflate_level is not None:
            return int(self.plan.item_count * measured.stored_row_bytes)
        label_columns = 1 if self.source.class_names is not None else len(self.source.columns)
        return output_bytes(self.plan, self.config, self.row_shape, label_columns=label_columns)


def _inspect(source: Source, config: BuildConfig, progress: OnStage) -> _Inspection:
    """Lists the source, reads a sample of its headers, and plans the build."""
    choice, config = environment.choose(config, inspect(config)), resolved(config)
    table(config)  # raises for a value that the dtype cannot hold
    progress("listing", 0, None)
    sides: dict[str, int] = {}
    arrays = listed(source, config, sides)
    items = Plan(arrays, 1)
    sample = sample_headers(items, source, config, choice, lambda *done: progress("reading headers", *done))
    size = image_size(items, source, config)
    row_bytes = _row_bytes(config, size)
    largest = max((sides[side] for side in config.sides), default=items.item_count)
    plan = Plan(arrays, config.for_items(largest).shard_rows(row_bytes))
    if config.side is not None:
        sides[config.side] = plan.item_count
    tuning = Tuning.of(
        config,
        choice,
        row_bytes=row_bytes,
        shard_rows=min(plan.shard_rows, plan.item_count),
        shards=plan.shard_count,
    )
    return _Inspection(source, config, choice, plan, sides, sample, size, tuning)


def _row_bytes(config: BuildConfig, size: tuple[int, int]) -> int:
    return math.prod(row_shape(config, *size)) * np.dtype(config.dtype).itemsize


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
    """How many shards a build that goes on would build, None if none would; and why one that was begun would not.

    `shards` gets the number of shards of each dataset that was begun.
    """
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
            left[side], shards[side], resumed = missing, job.plan.shard_count, True
        except (MismatchError, BackendError) as exc:
            # A build replaces a plan of other settings that has no shard yet.
            if isinstance(exc, BackendError) or not is_unbuilt(storage) or storage.live_locks():
                unfit.append(f"{storage.root!r}: {exc}")
    return (sum(left.values()) if resumed and not unfit else None), unfit


# What it takes


def _memory(found: _Inspection) -> int:
    """Main memory of a worker. On a GPU only the rows that are copied to it and back take main memory."""
    choice, tuning = found.choice, found.tuning
    batches = 0 if choice.gpus else 2 if choice.backend == "pillow" else tuning.batches_ahead + 1
    heaviest = found.sample.heaviest.decode_bytes if found.sample.heaviest else 0
    at_once = tuning.threads if choice.backend == "dali" and not choice.gpus else 1
    rows = (tuning.open_shards + 2) * found.row_bytes + batches * math.prod(found.row_shape)
    return _PROCESS_BYTES[choice.backend] + tuning.batch_size * rows + at_once * heaviest


def _try_measuring(
    found: _Inspection, left: int | None, seconds: float, folder: str | None, progress: OnStage
) -> tuple[Measured | None, str | None]:
    """A short run, and why there is none where a duration was asked for; `left` shards are to be built."""
    if seconds <= 0:
        return None, None
    if found.config.engine == "ray":
        return (
            None,
            "the duration is not known: with --engine ray it depends on the nodes, and nothing is measured here",
        )
    if left == 0:
        return None, None
    try:
        return _measure(found, seconds, folder, progress), None
    except StorageError as exc:
        return None, f"the duration is not known: {exc}; --folder DIR measures elsewhere"


@dataclass
class _Timing:
    """Times batches for so many seconds after the first one, which is left out: it takes the decoder's start too."""

    seconds: float
    begin: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    first_items: int = 0
    items: int = 0

    @property
    def elapsed(self) -> float:
        """Seconds from the first batch to the last one that was counted."""
        return self.last - self.first

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self.elapsed > self.seconds

    def add(self, items: int) -> None:
        """Counts a batch that has just been decoded."""
        self.last = time.perf_counter()
        if self.first:
            self.items += items
        else:
            self.first, self.first_items = self.last, items

    def result(self) -> tuple[int, float]:
        """How many items in how many seconds. If there was only one batch, it counts, with the decoder's start."""
        return (self.items, self.elapsed) if self.items else (self.first_items, self.last - self.begin)


def _measure(found: _Inspection, seconds: float, folder: str | None, progress: OnStage) -> Measured:
    """Lets one worker build shards of items spread over the plan, in a temporary folder, until the time is over."""
    tuning = found.tuning
    shard_rows = max(tuning.batch_size, _MEASURED_SHARD_BYTES // found.row_bytes)
    plan = _spread_plan(found.plan, min(found.plan.shard_rows, shard_rows))
    settings = found.config.model_copy(update={"on_reject": "skip"})
    timing = _Timing(seconds)
    rows = stored_bytes = gpu_memory = 0
    rejects: list[Reject] = []

    def shards() -> Iterator[int]:
        for shard in range(plan.shard_count):
            if timing.over:
                return  # lets the worker end, and report its memory
            yield shard

    with tempfile.TemporaryDirectory(prefix="gpu-npz-plan-", dir=folder) as place:
        storage = LocalStorage(place)
        Job.create(storage, plan, settings, found.choice, source=found.source, image_size=found.image_size)
        task = Task(place, found.source, found.choice.gpu, tuning, None)
        with contextlib.closing(work(task, shards())) as events:
            for event in events:
                if isinstance(event, Committed):
                    rows, stored_bytes = rows + event.record.rows, stored_bytes + event.record.bytes
                    rejects += event.record.rejects
                    storage.remove(shard_name(event.record.shard, plan.shard_count))
                elif isinstance(event, WorkerEnded):
                    gpu_memory = event.gpu_memory_bytes
                elif isinstance(event, Progress) and not timing.over:
                    timing.add(event.items)
                    progress("measuring", min(timing.elapsed, seconds), seconds)
    items, duration = timing.result()
    return Measured(
        items=items,
        seconds=duration,
        images_per_second=items / duration,
        gpu_memory_bytes=gpu_memory,
        stored_row_bytes=stored_bytes / rows if rows else 0.0,
        rejects=len(rejects),
        reject=rejects[0] if rejects else None,
    )


def _spread_plan(plan: Plan, shard_rows: int) -> Plan:
    """A plan of items at equal distances in another one, with their labels."""
    groups = []
    for item in spread(plan, _MEASURED_ITEMS, 0.5):
        parent, slash, name = as_bytes(item.path).rpartition(b"/")
        own = None if plan.arrays.get("labels") is None else np.array([item.label])
        places = np.array([item.place], np.int64) if item.place else None
        label = item.label if isinstance(item.label, int) and own is None else -1
        groups.append(Group(parent + slash, [name], label, own, places))
    return Plan(collect(groups), shard_rows)


def _rejected(measured: Measured | None) -> str | None:
    """What the headers did not tell."""
    if measured is None or measured.reject is None:
        return None
    reject = measured.reject
    return (
        f"{measured.rejects} items of the short run were rejected ({reject.path!r} for one: {reject.code}, "
        f"{reject.detail})"
    )


def _advice(found: _Inspection, needed_bytes: int) -> Iterator[str]:
    """What to think over about the settings, the size of the dataset, and the sampled images."""
    config, plan, sample = found.config, found.plan, found.sample
    yield from warnings(config)
    yield from hints(config, needed_bytes, plan.shard_count, labelled=found.source.class_names is not None)
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
