"""What the pixels of a collection are like: how often each level occurs, and mean and deviation from that, exactly.

Every pixel is one of 256 levels, or 65,536 in 16 bits, so counts of levels, which are integers, lose nothing.
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
from ..dataset.image_size import image_size
from ..dataset.manifest import Manifest, class_list
from ..dataset.plan import Plan
from ..dataset.selection import listed
from ..errors import FormatError, SourceError
from ..machine.environment import choose, inspect
from ..preprocess.normalize import levels, table
from ..readers.dataset import column_fault, open_index, open_shard, require_fit
from ..sources import open_source
from ..sources.base import LabelColumn, countable
from ..storage import open_storage
from ..workers.counting import count_levels, count_source, mean_of, std_of
from .verify import shards_at_once

log = logging.getLogger(__name__)
_ROWS_AT_ONCE = 64
_CHANNELS = {1: ("gray",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class Statistics:
    """Levels of all pixels of all images, by channel.

    Attributes:
        path: SRC or OUT.
        side: of a split, whose items alone were taken; None for all.
        images: how many were counted.
        rejects_by_code: items that could not be.
        channels: red, green, blue, or gray: the order of all that follows, which is that of `--mean` and `--std`, also
            where a dataset stores bgr.
        histograms: for each channel, how many pixels have each of the levels 0 to 255, or 65535.
        class_counts: images of each class, by name in the order of labels; of each number that occurs, as text, where
            labels are whole numbers; None where there are no labels, other numbers, or several columns.
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
        """The mean of each channel, of pixels scaled to 0..1."""
        return tuple(float(mean_of(counts)) for counts in self.histograms)

    @functools.cached_property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, of pixels scaled to 0..1, over all pixels of all images."""
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
        """The statistics as JSON values."""
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
    """Decodes and resizes the images of `src` as a build would, by all cores or the first GPU, and counts their levels.

    Args:
        src: a folder of class folders, or of images.
        config: as for `build`; how values are normalized and stored makes no difference. Of a split train is taken,
            whose statistics normalize all sides, unless one is named.
        progress: called with items done and items in all.

    Raises:
        UsageError, BackendError: as `build`.
        SourceError: SRC cannot be read, or no image in it can be decoded.
        ShardError: trouble that is not an image's, or a process died.
    """
    config = config or BuildConfig()
    config = config.sides.get(TRAIN, config)
    source = open_source(src, config, class_list(config.classes_from))
    choice = choose(config, inspect(config.device))
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
    """Counts the levels of a finished dataset's images, which float values give back exactly; no image is decoded.

    Args:
        out: the dataset's folder, or its URL.
        progress: called with shards done and shards in all.

    Raises:
        IncompleteError: the build has not ended.
        FormatError: not a dataset, damaged, without images, or with values that do not tell levels apart.
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
    if not np.array_equal(
        levels(values, values[..., None], "NCHW")[..., 0], np.tile(np.arange(every), (len(values), 1))
    ):
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
