"""Inspects the input of a build: the items of its source, a sample of their headers, and the shards built already."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..config import BuildConfig
from ..dataset.commits import committed
from ..dataset.image_size import image_size
from ..dataset.layout import JOB, is_unbuilt
from ..dataset.plan import Plan
from ..dataset.selection import listed
from ..dataset.space import output_bytes
from ..errors import BackendError, MismatchError
from ..machine import environment
from ..machine.environment import Choice
from ..machine.tuning import Tuning
from ..preprocess.normalize import row_shape, table
from ..preprocess.resize import resolved
from ..sources.base import Source
from ..storage.base import Storage
from .headers import Sample, sample_headers
from .planning import backend, inspect, require_revision, resume

OnStage = Callable[[str, float, "float | None"], None]


@dataclass(frozen=True)
class Inspection:
    """The input of a build, and the decoder that it would use.

    Attributes:
        source: the source, already listed.
        config: the settings.
        choice: the decoder and the GPUs.
        plan: the items and their shards.
        sides: the number of items of each side of a split; empty without a split.
        sample: a summary of the headers of sampled images.
        image_size: height and width of a stored image, in pixels.
        tuning: the batch size, the number of workers, and so on.
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
        """The shape of a stored image: (C, H, W) or (H, W, C)."""
        return row_shape(self.config, *self.image_size)

    @property
    def row_bytes(self) -> int:
        """The size of a stored image in bytes."""
        return _row_bytes(self.config, self.image_size)

    @property
    def shards(self) -> dict[str, int]:
        """The number of shards of each side of a split; that of a single dataset has the key ""."""
        counts = {side: self.sides[side] for side in self.config.sides}
        rows = {side: self.config.for_items(items).shard_rows(self.row_bytes) for side, items in counts.items()}
        return {side: -(-items // rows[side]) for side, items in counts.items()} or {"": self.plan.shard_count}

    def output_bytes(self, stored_row_bytes: float) -> int:
        """The size of the dataset in bytes.

        Args:
            stored_row_bytes: the measured size of a row, which is used only if images are compressed; 0 if unknown,
                which gives the largest possible size.
        """
        if stored_row_bytes and self.config.deflate_level is not None:
            return int(self.plan.item_count * stored_row_bytes)
        label_columns = 1 if self.source.class_names is not None else len(self.source.columns)
        return output_bytes(self.plan, self.config, self.row_shape, label_columns=label_columns)


def inspect_source(source: Source, config: BuildConfig, progress: OnStage) -> Inspection:
    """Lists the source, reads a sample of its headers, and plans the build.

    Args:
        source: the images.
        config: the settings.
        progress: called with the name of the stage, the amount done, and the total, or None if it is unknown.

    Raises:
        UsageError, BackendError, SourceError: as for `build`.
    """
    choice, config = environment.choose(config, inspect(config)), resolved(config)
    table(config)  # raises if the dtype cannot hold a value
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
    return Inspection(source, config, choice, plan, sides, sample, size, tuning)


def _row_bytes(config: BuildConfig, size: tuple[int, int]) -> int:
    return math.prod(row_shape(config, *size)) * np.dtype(config.dtype).itemsize


def extreme_classes(plan: Plan, source: Source) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """The smallest and the largest class: name and number of items of each; None without classes."""
    if source.class_names is None:
        return None, None
    counts = np.bincount(plan.labels(), minlength=len(source.class_names))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return (source.class_names[smallest], int(counts[smallest])), (source.class_names[largest], int(counts[largest]))


def shards_left(
    outs: dict[str, Storage], source: Source, config: BuildConfig, shards: dict[str, int]
) -> tuple[int | None, list[str]]:
    """Counts the shards that a resumed build would still build, and checks whether an existing OUT can be resumed.

    Args:
        outs: the datasets by side of a split; a single dataset has the key "".
        source: the images.
        config: the settings.
        shards: the number of shards of each dataset. It is corrected in place for datasets that were begun with another
            number.

    Returns:
        The number of shards left, or None if there is nothing to resume; and the reasons why an OUT cannot be resumed.
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
            # A build replaces a plan with other settings if it has no shard yet.
            if isinstance(exc, BackendError) or not is_unbuilt(storage) or storage.live_locks():
                unfit.append(f"{storage.root!r}: {exc}")
    return (sum(left.values()) if resumed and not unfit else None), unfit
