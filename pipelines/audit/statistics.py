"""What the pixels of a collection are like: how often each level occurs, and mean and deviation from that, exactly.

Every pixel is one of 256 levels, so counts of levels, which are integers, lose nothing. They are Pillow's
`Image.histogram`: half the time of `numpy.bincount`, and less than sums of squares take in NumPy.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import BuildConfig
from ..decode import make_decoder
from ..decode.base import Decoder
from ..decode.pillow import first_size
from ..environment import Choice, choose, inspect, usable_cpus
from ..errors import FormatError, ShardError, SourceError
from ..geometry import Geometry
from ..manifest import Manifest, class_list
from ..normalize import levels, table
from ..plan import Batch, Plan, collect
from ..readers.arrays import open_index, open_shard
from ..sources.base import Source
from ..sources.folder import FolderSource
from ..storage import is_remote, open_storage
from ..tuning import Tuning

log = logging.getLogger(__name__)
_RANGE_ITEMS = 1024  # of the plan, that a process is given at a time
_ROWS_AT_ONCE = 64
_FETCHED_SHARDS = 4  # of an object store, on the local disk at the same time
_CHANNELS = {1: ("gray",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class Statistics:
    """Levels of all pixels of all images, by channel.

    Attributes:
        path: SRC or OUT.
        images: how many were counted.
        rejects_by_code: items that could not be.
        channels: red, green, blue, or gray: the order of all that follows, which is that of `--mean` and `--std`, also
            where a dataset stores bgr.
        histograms: for each channel, how many pixels have each of the levels 0 to 255.
        class_counts: images of each class, by name in the order of labels; None where there are no labels.
    """

    path: str
    images: int
    rejects_by_code: dict[str, int]
    channels: tuple[str, ...]
    histograms: tuple[tuple[int, ...], ...]
    class_counts: dict[str, int] | None

    @functools.cached_property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel, of pixels scaled to 0..1."""
        return tuple(float(_mean(counts)) for counts in self.histograms)

    @functools.cached_property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, of pixels scaled to 0..1, over all pixels of all images."""
        return tuple(math.sqrt(_mean(counts, 2) - _mean(counts) ** 2) for counts in self.histograms)

    @property
    def min(self) -> tuple[int, ...]:
        """The lowest level of each channel."""
        return tuple(next(level for level in range(256) if counts[level]) for counts in self.histograms)

    @property
    def max(self) -> tuple[int, ...]:
        """The highest level of each channel."""
        return tuple(next(level for level in range(255, -1, -1) if counts[level]) for counts in self.histograms)

    def to_json(self) -> dict[str, Any]:
        """The statistics as JSON values."""
        names = ("mean", "std", "min", "max")
        columns = zip(self.channels, *(getattr(self, name) for name in names), self.histograms, strict=True)
        return {
            "path": self.path,
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
        config: as for `build`; how values are normalized and stored makes no difference.
        progress: called with items done and items in all.

    Raises:
        UsageError, BackendError: as `build`.
        SourceError: SRC cannot be read, or no image in it can be decoded.
        ShardError: trouble that is not an image's, or a process died.
    """
    config = config or BuildConfig()
    source = FolderSource(src, class_list(config.classes_from) if config.classes_from is not None else None)
    choice = choose(config, inspect(config.device))
    if choice.warning:
        log.warning("%s", choice.warning)
    arrays = collect(source.groups(), shuffle=config.shuffle, limit=config.limit)
    if not len(arrays["name_ends"]):
        raise SourceError(f"{source.location!r} holds no images; SRC is a folder of class folders or of images")
    items = Plan(arrays, 1).item_count
    plan = Plan(arrays, max(1, min(_RANGE_ITEMS, items // (4 * usable_cpus()))))
    one_by_one = (item for at in range(items) for item in plan.items(at, at + 1))
    size = config.size or first_size(source, one_by_one, config)
    if size is None:
        raise SourceError(f"{source.location!r}: no image can be decoded, so --resize-mode none finds no size")
    row_bytes = math.prod(size) * config.channel_count
    tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=plan.shard_rows, shards=plan.shard_count)
    tally = _Tally.empty(config.channel_count)
    with contextlib.closing(_counted(plan, _Work(config, size, source, tuning, choice))) as counted:
        for part in counted:
            tally.add(part)
            if progress:
                progress(tally.items, items)
    if not tally.counts.any():
        codes = ", ".join(f"{count} {code}" for code, count in sorted(tally.rejects.items()))
        raise SourceError(f"{source.location!r}: none of {items} items can be decoded ({codes})")
    names = source.class_names
    return Statistics(
        path=source.location,
        images=items - tally.rejects.total(),
        rejects_by_code=dict(sorted(tally.rejects.items())),
        channels=_CHANNELS[config.channel_count],
        histograms=_histograms(tally.counts),
        class_counts=None if names is None else {name: tally.labels[label] for label, name in enumerate(names)},
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
    values = table(manifest.config)
    if not np.array_equal(levels(values, values[..., None], "NCHW")[..., 0], np.tile(np.arange(256), (len(values), 1))):
        raise FormatError(
            f"{storage.root!r}: its {images.dtype} values do not tell the 256 levels apart; give SRC instead"
        )

    def counted(shard: int) -> NDArray[np.int64]:
        reader = open_shard(storage, manifest, shard)
        stored, valid = reader.rows("images"), reader.get("valid")
        counts = np.zeros((len(values), 256), np.int64)
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            span = slice(start, start + _ROWS_AT_ONCE)
            rows = stored[span] if valid is None else stored[span][valid[span]]
            pixels = levels(values, rows, images.layout)
            counts += count_levels(np.moveaxis(pixels, 1, 3) if images.layout == "NCHW" else pixels)
        return counts

    total, shards = np.zeros((len(values), 256), np.int64), manifest.counts.shards
    threads = min(usable_cpus(), _FETCHED_SHARDS) if is_remote(storage.root) else usable_cpus()
    with ThreadPoolExecutor(threads) as pool:
        for done, counts in enumerate(pool.map(counted, range(shards)), 1):
            total += counts
            if progress:
                progress(done, shards)
    if not total.any():
        raise FormatError(f"{storage.root!r} holds no images: all {manifest.counts.items} items were rejected")
    names, labels, valid = manifest.classes, index.get("labels"), index.get("valid")
    class_counts = None
    if names is not None and labels is not None:
        numbers = np.bincount(labels if valid is None else labels[valid], minlength=len(names))
        class_counts = dict(zip(names, numbers.tolist(), strict=True))
    return Statistics(
        path=storage.root,
        images=int(total[0].sum()) // (math.prod(images.shape) // len(values)),
        rejects_by_code=manifest.counts.rejects_by_code,
        channels=_CHANNELS[len(values)],
        histograms=_histograms(total[::-1] if images.channels == "bgr" else total),
        class_counts=class_counts,
    )


def count_levels(pixels: Any) -> NDArray[np.int64]:
    """How many pixels have each level: int64 (C, 256).

    Args:
        pixels: uint8 (N, H, W, C), C = 1 or 3; of NumPy, or of CuPy, which counts on its GPU.
    """
    count, height, width, channels = pixels.shape
    if not isinstance(pixels, np.ndarray):
        import cupy

        planes = (pixels[..., channel].ravel() for channel in range(channels))
        return np.stack([cupy.bincount(plane, minlength=256).get() for plane in planes]).astype(np.int64)
    if not count:
        return np.zeros((channels, 256), np.int64)
    tall = np.ascontiguousarray(pixels).reshape(count * height, width, channels)
    return np.array(Image.fromarray(tall[..., 0] if channels == 1 else tall).histogram(), np.int64).reshape(-1, 256)


def _mean(counts: tuple[int, ...], power: int = 1) -> Fraction:
    """The mean of a power of pixels scaled to 0..1."""
    return Fraction(sum(level**power * count for level, count in enumerate(counts)), 255**power * sum(counts))


def _histograms(counts: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts.tolist())


# Decoding by all cores


@dataclass
class _Tally:
    """What some items gave."""

    items: int
    counts: NDArray[np.int64]
    rejects: Counter[str] = field(default_factory=Counter)
    labels: Counter[int | None] = field(default_factory=Counter)

    @classmethod
    def empty(cls, channels: int) -> _Tally:
        return cls(0, np.zeros((channels, 256), np.int64))

    def add(self, other: _Tally) -> None:
        self.items += other.items
        self.counts += other.counts
        self.rejects += other.rejects
        self.labels += other.labels


@dataclass(frozen=True)
class _Work:
    """What a process needs to decode."""

    config: BuildConfig
    size: tuple[int, int]
    source: Source
    tuning: Tuning
    choice: Choice

    def decoder(self) -> Decoder:
        gpu = self.choice.gpu
        if gpu is not None:
            import cupy

            cupy.cuda.Device(gpu).use()
        geometry = Geometry.of(self.config, self.size)
        return make_decoder(self.choice.backend, self.config, geometry, self.source, tuning=self.tuning, gpu=gpu)


def _count(decoder: Decoder, batches: Iterable[Batch], channels: int) -> _Tally:
    tally = _Tally.empty(channels)
    for decoded in decoder.decode(batches):
        tally.items += len(decoded.batch.items)
        if decoded.rejects:
            tally.rejects.update(reject.code for reject in decoded.rejects)
        if kept := decoded.kept.tolist():
            tally.counts += count_levels(decoded.pixels if not decoded.rejects else decoded.pixels[decoded.kept])
            tally.labels.update(decoded.batch.items[position].label for position in kept)
    return tally


def _counted(plan: Plan, work: _Work) -> Generator[_Tally, None, None]:
    """The tallies of all ranges of the plan; a few of them are on their way at the same time."""
    processes = min(work.tuning.workers, 1) if work.choice.gpus else work.tuning.workers
    ranges = (list(plan.batches(number, work.tuning.batch_size)) for number in range(plan.shard_count))
    if not processes:
        with work.decoder() as decoder:
            yield from (_count(decoder, batches, work.config.channel_count) for batches in ranges)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (work,))
    waiting: deque[Future[_Tally]] = deque()
    try:
        for batches in ranges:
            waiting.append(pool.submit(_count_here, batches))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as exc:
        raise ShardError(
            "a process that decodes images died, of one of them or because memory is short; try fewer --workers. "
            "`gpu-npz build` finds an image that ends its decoder. A script of your own needs "
            "`if __name__ == '__main__':` around its call"
        ) from exc
    finally:
        pool.shutdown(cancel_futures=True)


_here: _Work | None = None


def _begin(work: _Work) -> None:
    """What a process begins with. The parent decides when it ends, even by its death."""
    global _here
    _here = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


@functools.cache
def _decoder_here() -> Decoder:
    assert _here is not None
    return _here.decoder().__enter__()  # open as long as the process lives


def _count_here(batches: list[Batch]) -> _Tally:
    assert _here is not None
    return _count(_decoder_here(), batches, _here.config.channel_count)
