"""Counts how often each level occurs in the pixels of a source, on all cores; integer counts are exact.

8-bit pixels are counted with Pillow's `Image.histogram`, which takes half the time of `numpy.bincount`, and less time
than NumPy takes for sums of squares.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..dataset.plan import Plan
from ..errors import GpuNpzError, ShardError
from ..machine.environment import Choice, block_while_waiting
from ..machine.tuning import Tuning
from ..preprocess.base import Decoder
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..sources.base import Batch, Source
from .messages import Output
from .subprocesses import running

_RANGE_ITEMS = 1024  # items of the plan that a process gets at a time


@dataclass
class Tally:
    """Counts over some items.

    Attributes:
        items: how many items were counted, rejects included.
        counts: how many pixels have each level, int64 (C, 256) or, in 16 bits, (C, 65536), channels in R,G,B.
        rejects: how many items were rejected, by code.
        labels: how many images have each label, if requested and if labels are classes or integers.
    """

    items: int
    counts: NDArray[np.int64]
    rejects: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)

    @classmethod
    def empty(cls, config: BuildConfig) -> Tally:
        """The tally of no items."""
        return cls(0, np.zeros((config.channel_count, config.max_level + 1), np.int64))

    def add(self, other: Tally) -> None:
        """Adds the counts of other items."""
        self.items += other.items
        self.counts += other.counts
        self.rejects += other.rejects
        self.labels += other.labels


def count_source(
    plan: Plan,
    source: Source,
    config: BuildConfig,
    size: tuple[int, int],
    choice: Choice,
    progress: Callable[[int, int], None] | None = None,
    *,
    labels: bool = False,
) -> Tally:
    """Decodes and resizes all items of a plan as in a build, on all cores or the first GPU, and counts their levels.

    This has not been tried on a GPU yet.

    Args:
        plan: the items; its shards are ignored.
        source: reads the items.
        config: the settings of the build; normalization, dtype and layout make no difference.
        size: height and width of a row, in pixels.
        choice: the backend and its resources.
        progress: called with the number of items done and the number of all items.
        labels: whether to count labels, too.

    Raises:
        ShardError: a process died, or failed for a reason that no image caused.
    """
    items = plan.item_count
    plan = Plan(plan.arrays, max(1, min(_RANGE_ITEMS, items // (4 * choice.cpus))))
    row_bytes = math.prod(size) * config.channel_count
    tuning = Tuning.of(config, choice, row_bytes=row_bytes, shard_rows=plan.shard_rows, shards=plan.shard_count)
    tally = Tally.empty(config)
    with contextlib.closing(_counted(plan, _Work(config, size, source, tuning, choice, labels))) as counted:
        for part in counted:
            tally.add(part)
            if progress:
                progress(tally.items, items)
    return tally


def mean_of(counts: Sequence[int], power: int = 1) -> Fraction:
    """The exact mean of pixels scaled to 0..1, or of a power of them.

    Args:
        counts: how many pixels have each level.
        power: the exponent.
    """
    return Fraction(
        sum(level**power * count for level, count in enumerate(counts)), (len(counts) - 1) ** power * sum(counts)
    )


def std_of(counts: Sequence[int]) -> float:
    """The population standard deviation of pixels scaled to 0..1; see `mean_of`."""
    return math.sqrt(mean_of(counts, 2) - mean_of(counts) ** 2)


def count_levels(pixels: Any) -> NDArray[np.int64]:
    """How many pixels have each level: int64 (C, 256), or (C, 65536) for uint16.

    Args:
        pixels: uint8 or uint16 (N, H, W, C), C = 1 or 3; a NumPy array, or a CuPy array, which is counted on its GPU.
    """
    count, height, width, channels = pixels.shape
    planes = (pixels[..., channel].ravel() for channel in range(channels))
    if not isinstance(pixels, np.ndarray):
        import cupy

        return np.stack([cupy.bincount(plane, minlength=256).get() for plane in planes]).astype(np.int64)
    if pixels.dtype != np.uint8:
        return np.stack([np.bincount(plane, minlength=65_536) for plane in planes])
    from PIL import Image

    if not count:
        return np.zeros((channels, 256), np.int64)
    tall = np.ascontiguousarray(pixels).reshape(count * height, width, channels)
    return np.array(Image.fromarray(tall[..., 0] if channels == 1 else tall).histogram(), np.int64).reshape(-1, 256)


@dataclass(frozen=True)
class _Work:
    """What a process needs for decoding."""

    config: BuildConfig
    size: tuple[int, int]
    source: Source
    tuning: Tuning
    choice: Choice
    labels: bool

    def decoder(self) -> Decoder:
        gpu = self.choice.gpu
        if gpu is not None:
            block_while_waiting(gpu)
            import cupy

            cupy.cuda.Device(gpu).use()
        geometry = Geometry.of(self.config, self.size)
        return make_decoder(self.choice.backend, self.config, geometry, self.source, tuning=self.tuning, gpu=gpu)


def _count(decoder: Decoder, batches: Iterable[Batch], work: _Work) -> Tally:
    tally = Tally.empty(work.config)
    for decoded in decoder.decode(batches):
        tally.items += len(decoded.batch.items)
        if decoded.rejects:
            tally.rejects.update(reject.code for reject in decoded.rejects)
        if kept := decoded.kept.tolist():
            tally.counts += count_levels(decoded.pixels if not decoded.rejects else decoded.pixels[decoded.kept])
            if work.labels:
                labels = (decoded.batch.items[position].label for position in kept)
                tally.labels.update(label for label in labels if isinstance(label, int))
    return tally


def _counted(plan: Plan, work: _Work) -> Generator[Tally, None, None]:
    """The tallies of all ranges of the plan; several ranges are counted at the same time."""
    processes = min(work.tuning.workers, 1) if work.choice.gpus else work.tuning.workers
    ranges = (list(plan.batches(number, work.tuning.batch_size)) for number in range(plan.shard_count))
    if not processes:
        with work.decoder() as decoder:
            yield from (_count(decoder, batches, work) for batches in ranges)
        return
    with contextlib.ExitStack() as stack:
        busy = dict(stack.enter_context(_process(work)) for _ in range(processes))
        for connection, output in busy.items():
            with _explained(output):
                connection.send(next(ranges))
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                output = busy[ready]
                with _explained(output):
                    tally = ready.recv()
                if isinstance(tally, GpuNpzError):
                    raise tally
                output.known()  # ignored: a build gets these messages again, and names their files
                yield tally
                if batches := next(ranges, []):
                    with _explained(output):
                        ready.send(batches)
                else:
                    del busy[ready]


@contextlib.contextmanager
def _process(work: _Work) -> Iterator[tuple[Connection, Output]]:
    """Runs a process that counts while the body runs; gives its pipe and its output."""
    with running(__name__) as (connection, output):
        with _explained(output):
            connection.send(work)
        yield connection, output


@contextlib.contextmanager
def _explained(output: Output) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as exc:
        output.close(died=True)
        raise ShardError(
            "a process that decodes images died, because of an image or for lack of memory; try fewer --workers. "
            f"`gpu-npz build` finds an image that crashes its decoder{output.last_words}"
        ) from exc


def serve(descriptor: int) -> None:
    """What such a process runs: receives its work, then lists of batches; sends a tally for each, or an error."""
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        work: _Work = connection.recv()
        try:
            with work.decoder() as decoder:
                while True:
                    connection.send(_count(decoder, connection.recv(), work))
        except GpuNpzError as exc:
            connection.send(exc)
