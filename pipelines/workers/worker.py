"""Runs all stages for one device: builds shards in one continuous stream that does not drain between shards."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..dataset.job import Job
from ..dataset.layout import shard_name
from ..dataset.plan import Plan
from ..errors import MismatchError, RejectedError, ShardError
from ..machine.environment import block_while_waiting
from ..machine.tuning import Tuning
from ..preprocess.base import DecodedBatch, Decoder, Normalizer
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import NumpyNormalizer
from ..preprocess.normalize_cuda import CudaNormalizer
from ..preprocess.spot_check import SpotCheck
from ..sources.access.local import statuses
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import BadItem, Reject, clean
from ..storage import open_storage
from .events import CurrentItem, Event, Progress, Pulse, ShardCounts, Task, WorkerEnded
from .sink import RowImages, Rows, ShardSink

if TYPE_CHECKING:
    from ..preprocess.dali import DaliDecoder

_PULSE_S = 1.0
# How much a worker may grow before it is replaced, since libraries leak memory: libjpeg-turbo inside DALI keeps the
# buffer of every image whose data it fails to decode.
_MAX_GROWTH_BYTES = 1 << 30
_SETTLED_SHARDS = 4  # after which a worker has allocated all the memory it needs, even if a shard is a single batch


def work(task: Task, shards: Iterable[int]) -> Generator[Event, None, None]:
    """Builds shards and yields events. If the generator is closed early, unfinished shards are discarded.

    Args:
        task: what to build, and how.
        shards: the numbers of the shards; the next one is taken when its first batch can be started.

    Raises:
        MismatchError: another decoder, version or GPU model made the shards so far.
        RejectedError: an item was rejected under `--on-reject fail`.
        ShardError: a shard failed for a reason that no image caused.
        StorageError: OUT cannot be written.
    """
    storage = open_storage(task.out, task.fence)
    job = Job.open(storage)
    began_ns = time.time_ns()
    with _explained(task), contextlib.ExitStack() as stack:
        if task.gpu is not None:
            block_while_waiting(task.gpu)
        normalizer: Normalizer = (
            NumpyNormalizer(job.settings) if task.gpu is None else CudaNormalizer(job.settings, task.gpu)
        )
        decoder = make_decoder(
            job.record.backend,
            job.settings,
            Geometry.of(job.settings, job.record.image_size),
            task.source,
            tuning=task.tuning,
            gpu=task.gpu,
            stream=normalizer.stream,
        )
        provenance = provenance_of(decoder, job)
        require_provenance(task.provenance, provenance)
        seconds = {"read": 0.0, "decode": 0.0, "normalize": 0.0}
        sink = ShardSink(storage, job, provenance, normalizer.allocate, task.tuning, drop_cache=task.drop_cache)
        stack.enter_context(decoder)
        stack.enter_context(sink)
        check = _spot_check(task, decoder)
        pulse_s = 0.0
        batches = interleaved_batches(job.plan, shards, task.tuning)
        for decoded in _in_isolation(decoder, batches, task) if task.isolated else decoder.decode(batches):
            if isinstance(decoded, CurrentItem):
                yield decoded
                continue
            if decoded.rejects and job.settings.on_reject == "fail":
                reject = decoded.rejects[0]
                raise RejectedError(
                    f"{reject.path!r} is rejected at {reject.stage}: {reject.code} ({reject.detail}); fix the "
                    "file and run the same command, or start over with --overwrite and --on-reject skip or blank"
                )
            for name, spent in decoded.seconds.items():
                seconds[name] += spent
            buffer = sink.buffer()
            start = time.perf_counter()
            count = _counting(decoded, task.source, began_ns, check)
            sink.put(*_rows(decoded, buffer, normalizer, count, blank=job.settings.on_reject == "blank"))
            seconds["normalize"] += time.perf_counter() - start
            counts = len(decoded.batch.items), len(decoded.rejects), int(decoded.source_bytes.sum())
            yield Progress(decoded.batch.shard, *counts, next(iter(decoded.rejects), None), decoder.sixteen_bit)
            yield from sink.committed()
            if time.monotonic() >= pulse_s:
                yield _pulse()
                pulse_s = time.monotonic() + _PULSE_S
        gpu_memory_bytes = normalizer.device_bytes()
    yield from sink.committed()
    yield WorkerEnded({**seconds, **sink.seconds}, _peak_bytes(), gpu_memory_bytes)


def remove_leftovers(task: Task, shards: Iterable[int]) -> None:
    """Removes the unfinished files of shards whose worker was lost, before other workers build them."""
    storage = open_storage(task.out, task.fence)
    count = Job.open(storage).plan.shard_count
    for shard in shards:
        storage.remove_leftovers(shard_name(shard, count))


def requested_shards(ask: Callable[[], int | None], open_shards: int) -> Iterator[int]:
    """The shards of a worker, until none is left or the worker's process should be replaced by a fresh one.

    It should be replaced once it has grown by a gigabyte since it finished its first few shards. On macOS this is
    unknown, and the worker continues.

    Args:
        ask: returns the number of the next shard; None if none is left.
        open_shards: how many shards a worker takes before it finishes the first one.
    """
    taken, allowed = 0, sys.maxsize
    while _memory_bytes() <= allowed:
        shard = ask()
        if shard is None:
            return
        yield shard
        taken += 1
        if open_shards <= taken < open_shards + _SETTLED_SHARDS:
            allowed = _memory_bytes() + _MAX_GROWTH_BYTES


def interleaved_batches(plan: Plan, shards: Iterable[int], tuning: Tuning) -> Iterator[Batch]:
    """The batches of all shards; those of the open shards alternate, so that their threads write at the same time."""
    coming, turns = iter(shards), deque[Iterator[Batch]]()
    while True:
        while len(turns) < tuning.open_shards and (shard := next(coming, None)) is not None:
            turns.append(plan.batches(shard, tuning.batch_size))
        if not turns:
            return
        batches = turns.popleft()
        yield (batch := next(batches))
        if not batch.last:
            turns.append(batches)


def _in_isolation(decoder: Decoder, batches: Iterable[Batch], task: Task) -> Iterator[DecodedBatch | CurrentItem]:
    """Decodes batches of one item each, in isolation mode.

    Between the CurrentItem event with an index and the one without, nothing but the decoder runs. Each item is read
    before that, so that a disk that does not respond is not blamed on the image.
    """
    for batch in batches:
        (item,) = batch.items
        if item.index in task.skipped:
            reject = Reject(item.path, item.index, "decode", *task.skipped[item.index])
            yield DecodedBatch(batch, None, np.empty(0, np.int64), np.zeros(1, np.int64), [reject], {})
            continue
        with contextlib.suppress(BadItem):
            read_item(task.source, item)
        yield CurrentItem(item.index)
        for decoded in decoder.decode([batch]):
            yield CurrentItem(None)
            yield decoded


def _rows(
    decoded: DecodedBatch,
    buffer: NDArray[Any],
    normalizer: Normalizer,
    count: Callable[[], ShardCounts],
    *,
    blank: bool,
) -> tuple[Rows, RowImages]:
    """Starts to normalize a batch into `buffer`; with `blank`, its rejects get a row, too."""
    batch, kept = decoded.batch, decoded.kept
    valid = np.ones(len(kept), bool)
    if blank:
        valid = np.isin(np.arange(len(batch.items)), kept)
        kept = np.arange(len(batch.items))
    images = buffer[: len(kept)]
    whole = normalizer.apply(decoded.pixels, kept, images) if len(decoded.kept) else None

    def ready() -> None:
        if whole is not None:
            whole()
        if not valid.all():
            images[~valid] = 0

    rows = Rows(
        shard=batch.shard,
        items=[batch.items[position] for position in kept.tolist()],
        source_bytes=decoded.source_bytes[kept],
        valid=valid,
        rejects=decoded.rejects,
        last=batch.last,
    )
    return rows, RowImages(images, buffer, ready, count, decoded.encoded)


def _counting(
    decoded: DecodedBatch, source: Source, since_ns: int, check: SpotCheck | None
) -> Callable[[], ShardCounts]:
    """A function that counts a batch for the report; looking at its files may take long on a network filesystem."""
    items, source_bytes = decoded.batch.items, decoded.source_bytes
    by_dali = len(decoded.by_dali)
    decoders = Counter({"dali": by_dali, "pillow": len(decoded.kept) - by_dali})
    differences: Callable[[], int] | None = None
    if check is not None and (positions := check.choose(decoded)):
        differences = partial(check.differences, decoded, positions)

    def count() -> ShardCounts:
        changed = _changed_files(source, items, source_bytes, since_ns)
        if differences is None:
            return ShardCounts(changed, decoders)
        return ShardCounts(changed, decoders, len(positions), differences())

    return count


def _spot_check(task: Task, decoder: Decoder) -> SpotCheck | None:
    if task.gpu is None or not task.tuning.spot_check:
        return None
    return SpotCheck(cast("DaliDecoder", decoder))


def _changed_files(source: Source, items: Sequence[Item], source_bytes: NDArray[np.int64], since_ns: int) -> int:
    """How many files of a batch changed while the worker ran; see `_has_changed`."""
    if not source.file_per_item:
        return 0
    # Only the first frame of a file with several frames is checked.
    read = [(item, size) for item, size in zip(items, source_bytes.tolist(), strict=True) if not source.frame(item)]
    found = statuses([source.local_path(item) for item, _ in read])
    now_ns = time.time_ns()
    return sum(_has_changed(status, size, since_ns, now_ns) for status, (_, size) in zip(found, read, strict=True))


def _has_changed(status: os.stat_result | None, size: int, since_ns: int, now_ns: int) -> bool:
    """Whether a file was removed or resized after it was read, or written to since a point in time.

    Args:
        status: the file's status; None if it cannot be had.
        size: how many bytes were read; 0 if the file could not be read.
        since_ns, now_ns: nanoseconds since the epoch; later times of modification are those of a wrong clock.
    """
    if status is None:
        return size > 0
    return (size > 0 and size != status.st_size) or since_ns < status.st_mtime_ns <= now_ns


@contextlib.contextmanager
def _explained(task: Task) -> Iterator[None]:
    """Turns errors of the body that a lack of memory or a GPU causes into a ShardError with advice."""
    try:
        yield
    except MemoryError as exc:  # CuPy's, too
        raise ShardError(
            f"not enough memory for batches of {task.tuning.batch_size} images in {task.tuning.open_shards} open "
            "shards; lower --batch-size, --open-shards or --workers, and run the command again to resume"
        ) from exc
    except Exception as exc:
        if not type(exc).__module__.startswith("cupy"):
            raise
        raise ShardError(
            f"GPU {task.gpu} failed ({clean(str(exc))}); `nvidia-smi` shows its memory and the processes that use it, "
            "dmesg shows its errors (Xid). Run the same command to resume"
        ) from exc


def provenance_of(decoder: Decoder, job: Job) -> dict[str, Any]:
    """What decides the bytes of shards besides the settings: the decoder and the compression library."""
    if job.settings.deflate_level is None:
        return decoder.provenance()
    from importlib.metadata import version  # takes its time to load

    return {**decoder.provenance(), "isal": version("isal")}


def _pulse() -> Pulse:
    try:
        folders = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        return Pulse(os.getpid(), _memory_bytes(), *folders)
    except OSError:  # macOS
        return Pulse(os.getpid(), 0, 0, 0)


def _memory_bytes() -> int:
    """The main memory that this process holds; 0 if the system does not provide it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _peak_bytes() -> int:
    """The most main memory that this process has held."""
    try:  # On Linux, getrusage starts a child at the peak of its parent.
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, else kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_provenance(expected: dict[str, Any] | None, found: dict[str, Any]) -> None:
    """Raises MismatchError if the provenance differs from the expected one; None accepts any."""
    if expected is None or expected == found:
        return
    names = sorted({*expected, *found})
    differences = [
        f"  {name}: {expected.get(name)} then, {found.get(name)} now"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    raise MismatchError(
        "the existing shards were built in another environment, whose pixels may differ:\n"
        + "\n".join(differences)
        + "\n"
        "resume in that environment, or add --accept-environment to mix the two"
    )
