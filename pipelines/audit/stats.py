"""Computes the exact level histograms, means and standard deviations of an image collection or a dataset.

A pixel has one of 256 levels, or one of 65,536 with 16 bits, so integer counts of the levels lose no precision.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import TRAIN, BuildConfig
from ..dataset.built import open_images
from ..dataset.image_size import image_size
from ..dataset.manifest import Manifest, class_list
from ..dataset.plan import Plan
from ..dataset.selection import listed
from ..errors import FormatError, SourceError
from ..machine.environment import choose, inspect
from ..preprocess.normalize import levels, table, tells_levels
from ..readers.dataset import column_fault, open_index, open_shard, require_fit
from ..sources.base import LabelColumn, countable
from ..storage import open_storage
from ..workers.counting import count_levels, count_source, mean_of, std_of
from .verify import shards_at_once

log = logging.getLogger(__name__)
_ROWS_AT_ONCE = 64
_CHANNELS = {1: ("gray",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class Statistics:
    """The levels of all pixels of all images, by channel.

    Attributes:
        path: SRC or OUT.
        images: the number of images counted.
        rejects_by_code: the number of items that could not be decoded, by reject code.
        channels: the names of the channels: red, green and blue, or gray. All other attributes and properties by
            channel use this order, which is also the order of `--mean` and `--std`, even if a dataset stores BGR.
        histograms: for each channel, the number of pixels at each level, 0 to 255 or 0 to 65535.
        class_counts: the number of images of each class by name, in label order. If labels are integers, the number
            of images of each value that occurs, by the value as text. None if there are no labels, labels of another
            kind, or several label columns.
        side: the side of a split that was counted; None if all items were counted.
    """

    path: str
    images: int
    rejects_by_code: dict[str, int]
    channels: tuple[str, ...]
    histograms: tuple[tuple[int, ...], ...]
    class_counts: dict[str, int] | None
    side: str | None = None

    @functools.cached_property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel, for pixels scaled to 0..1."""
        return tuple(float(mean_of(counts)) for counts in self.histograms)

    @functools.cached_property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel over all pixels of all images, for pixels scaled to 0..1."""
        return tuple(std_of(counts) for counts in self.histograms)

    @property
    def min(self) -> tuple[int, ...]:
        """The lowest level of each channel."""
        return tuple(next(level for level, count in enumerate(counts) if count) for counts in self.histograms)

    @property
    def max(self) -> tuple[int, ...]:
        """The highest level of each channel."""
        return tuple(max(level for level, count in enumerate(counts) if count) for counts in self.histograms)

    def to_json(self) -> dict[str, Any]:
        """Returns the statistics as JSON values."""
        names = ("mean", "std", "min", "max")
        columns = zip(self.channels, *(getattr(self, name) for name in names), self.histograms, strict=True)
        return {
            "path": self.path,
            "side": self.side,
            "images": self.images,
            "rejects_by_code": self.rejects_by_code,
            "channels": [dict(zip(("name", *names, "histogram"), column, strict=True)) for column in columns],
            "class_counts": self.class_counts,
        }


def of_source(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Decodes and resizes the images of `src` as a build would, on all cores or the first GPU, and counts their levels.

    Args:
        src: a folder of class folders, or a folder of images.
        config: the settings, as for `build`. Settings for normalization and storage have no effect. With a split, only
            the items of train are counted unless the setting names another side, because the statistics of train
            normalize all sides.
        progress: called with the number of items done and the total number of items.

    Raises:
        UsageError: as for `build`.
        BackendError: as for `build`.
        SourceError: SRC cannot be read, or no image in it can be decoded.
        ShardError: a process died, or an error occurred that no image caused.
    """
    config = config or BuildConfig()
    config = config.sides.get(TRAIN, config)
    source = open_images(src, config, class_list(config.classes_from))
    choice = choose(config, inspect(config))
    if choice.warning:
        log.warning("%s", choice.warning)
    plan = Plan(listed(source, config), 1)
    size, counted = image_size(plan, source, config), countable(source.class_names, source.columns)
    tally = count_source(plan, source, config, size, choice, progress, labels=counted)
    if not tally.counts.any():
        codes = ", ".join(f"{count} {code}" for code, count in sorted(tally.rejects.items()))
        raise SourceError(f"{source.location!r}: none of {plan.item_count} items can be decoded ({codes})")
    return Statistics(
        path=source.location,
        images=plan.item_count - tally.rejects.total(),
        rejects_by_code=dict(sorted(tally.rejects.items())),
        channels=_CHANNELS[config.channel_count],
        histograms=_histograms(tally.counts),
        class_counts=_class_counts(source.class_names, source.columns, tally.labels),
        side=config.side,
    )


def of_dataset(out: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Counts the levels of a finished dataset's images without decoding any image.

    Stored float values are converted back to levels, exactly.

    Args:
        out: the dataset's folder or URL.
        progress: called with the number of shards done and the total number of shards.

    Raises:
        IncompleteError: the build has not finished.
        FormatError: `out` is not a dataset, is damaged or contains no images, or different levels cannot be
            distinguished in its stored values.
    """
    storage = open_storage(out)
    manifest = Manifest.load(storage.root)
    images, index = manifest.images, open_index(storage, manifest)
    require_fit(index, manifest.counts.rows, manifest.counts.shards, storage.root)
    values = table(manifest.config)
    if values is None:
        raise FormatError(
            f"{storage.root!r}: each image's values were made by its own statistics ({manifest.config.normalize}), and "
            "do not tell its levels any more; give SRC instead"
        )
    every = values.shape[1]
    if not tells_levels(values):
        raise FormatError(
            f"{storage.root!r}: its {images.dtype} values do not tell the {every} levels apart; give SRC instead"
        )

    def counted(shard: int) -> NDArray[np.int64]:
        reader = open_shard(storage, manifest, shard)
        stored, valid = reader.rows("images"), reader.get("valid")
        if valid is not None and (fault := column_fault(reader, "valid", manifest)):
            raise FormatError(f"{reader.path}: {fault}")
        counts = np.zeros((len(values), every), np.int64)
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            span = slice(start, start + _ROWS_AT_ONCE)
            rows = stored[span] if valid is None else stored[span][valid[span]]
            pixels = levels(values, rows, images.layout)
            counts += count_levels(np.moveaxis(pixels, 1, 3) if images.layout == "NCHW" else pixels)
        return counts

    total, shards = np.zeros((len(values), every), np.int64), manifest.counts.shards
    with ThreadPoolExecutor(shards_at_once(storage)) as pool:
        for done, counts in enumerate(pool.map(counted, range(shards)), 1):
            total += counts
            if progress:
                progress(done, shards)
    if not total.any():
        raise FormatError(f"{storage.root!r} holds no images: all {manifest.counts.items} items were rejected")
    labels, valid = index.get("labels"), index.get("valid")
    numbers: Counter[Any] = Counter()
    if labels is not None and countable(manifest.classes, manifest.columns):
        numbers.update((labels if valid is None else labels[valid]).tolist())
    return Statistics(
        path=storage.root,
        images=int(total[0].sum()) // (math.prod(images.shape) // len(values)),
        rejects_by_code=manifest.counts.rejects_by_code,
        channels=_CHANNELS[len(values)],
        histograms=_histograms(total[::-1] if images.channels == "bgr" else total),
        class_counts=_class_counts(manifest.classes, manifest.columns, numbers),
    )


def _class_counts(
    names: Sequence[str] | None, columns: Sequence[LabelColumn], numbers: Counter[Any]
) -> dict[str, int] | None:
    if names is not None:
        return {name: numbers[label] for label, name in enumerate(names)}
    return {str(number): numbers[number] for number in sorted(numbers)} if countable(names, columns) else None


def _histograms(counts: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts.tolist())
