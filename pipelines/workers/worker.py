"""Joins the stages for one device: shards in, committed shards out, in one stream that never drains between two."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.job import Job
from ..dataset.layout import shard_name
from ..dataset.plan import Plan
from ..errors import MismatchError, RejectedError, ShardError
from ..machine.tuning import Tuning
from ..preprocess.base import Decoded, Decoder
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import Normalizer
from ..preprocess.normalize_cuda import CudaNormalizer
from ..sources.base import Batch, Source, read_item
from ..sources.rejects import BadItem, Reject, clean
from ..storage import open_storage
from .events import Committed, Decoding, Event, Progress, Pulse, Task, WorkerEnded
from .sink import Rows, ShardSink

_PULSE_S = 1.0
# What a worker may grow by before another one takes its place, for libraries leak: libjpeg-turbo inside DALI keeps the
# buffer of every image in whose data it gives up.
_MAX_GROWTH_BYTES = 1 << 30
_SETTLED_SHARDS = 4  # after which it has all the memory that it needs, even if a shard is a single batch


def work(task: Task, shards: Iterable[int]) -> Generator[Event, None, None]:
    """Builds shards and says what happens. Closing the generator early publishes nothing that is unfinished.

    Raises:
        MismatchError: another decoder, version or GPU model made the shards so far.
        RejectedError: an item was rejected under `--on-reject fail`.
        ShardError: a shard failed for a reason that lies outside its images.
        StorageError: OUT cannot be written.
    """
    storage = open_storage(task.out, task.fence)
    job = Job.open(storage)
    began_ns = time.time_ns()
    with _explained(task), contextlib.ExitStack() as stack:
        normalizer = Normalizer(job.settings) if task.gpu is None else CudaNormalizer(job.settings, task.gpu)
        decoder = make_decoder(
            job.record.backend,
            job.settings,
            Geometry.of(job.settings, job.record.image_size),
            task.source,
            tuning=task.tuning,
            gpu=task.gpu,
            stream=getattr(normalizer, "stream", None),
        )
        provenance = provenance_of(decoder, job)
        require_provenance(task.provenance, provenance)
        seconds = {"read": 0.0, "decode": 0.0, "normalize": 0.0}
        sink = ShardSink(storage, job, provenance, normalizer.allocate, task.tuning)
        stack.enter_context(decoder)
        stack.enter_context(sink)
        pulse_s = 0.0
        batches = interleaved(job.plan, shards, task.tuning)
        for decoded in _in_isolation(decoder, batches, task) if task.isolated else decoder.decode(batches):
            if isinstance(decoded, Decoding):
                yield decoded
                continue
            if decoded.rejects and job.settings.on_reject == "fail":
                reject = decoded.rejects[0]
                raise RejectedError(
                    f"{reject.path!r} is rejected at {reject.stage}: {reject.code} ({reject.detail}); mend the "
                    "file and run the same command, or start anew with --overwrite and --on-reject skip or blank"
                )
            for name, spent in decoded.seconds.items():
                seconds[name] += spent
            buffer = sink.buffer()
            start = time.perf_counter()
            rows = _rows(decoded, buffer, normalizer, blank=job.settings.on_reject == "blank")
            seconds["normalize"] += time.perf_counter() - start
            sink.put(rows)
            counts = len(decoded.batch.items), len(decoded.rejects), int(decoded.source_bytes.sum())
            changed = _changed(task.source, decoded, began_ns)
            yield Progress(
                decoded.batch.shard, *counts, changed, next(iter(decoded.rejects), None), decoder.sixteen_bit
            )
            yield from map(Committed, sink.committed())
            if time.monotonic() >= pulse_s:
                yield _pulse()
                pulse_s = time.monotonic() + _PULSE_S
        gpu_memory_bytes = normalizer.device_bytes()
    yield from map(Committed, sink.committed())
    yield WorkerEnded({**seconds, **sink.seconds}, _peak_bytes(), gpu_memory_bytes)


def remove_leftovers(task: Task, shards: Iterable[int]) -> None:
    """Removes what a worker that is no more left unfinished of shards, before others build them."""
    storage = open_storage(task.out, task.fence)
    count = Job.open(storage).plan.shard_count
    for shard in shards:
        storage.remove_leftovers(shard_name(shard, count))


def asked(ask: Callable[[], int | None], open_shards: int) -> Iterator[int]:
    """The shards that a worker asks for, until there are none, or its process should be replaced by a fresh one.

    That is when it has grown by a gigabyte since it ended its first few shards. macOS does not say.

    Args:
        ask: gives the next shard, None if there is none.
        open_shards: how many a worker takes before it ends one.
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


def interleaved(plan: Plan, shards: Iterable[int], tuning: Tuning) -> Iterator[Batch]:
    """The batches of several shards in turn, as many as may be open, so that their threads write at the same time."""
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


def _in_isolation(decoder: Decoder, batches: Iterable[Batch], task: Task) -> Iterator[Decoded | Decoding]:
    """Decodes batches of one item each. Between a Decoding with an index and one without, only a decoder is at work.

    Reading comes before: a disk that does not answer is not the image's fault.
    """
    for batch in batches:
        (item,) = batch.items
        if item.index in task.skipped:
            reject = Reject(item.path, item.index, "decode", *task.skipped[item.index])
            yield Decoded(batch, None, np.empty(0, np.int64), np.zeros(1, np.int64), [reject], {})
            continue
        with contextlib.suppress(BadItem):
            read_item(task.source, item)
        yield Decoding(item.index)
        for decoded in decoder.decode([batch]):
            yield Decoding(None)
            yield decoded


def _rows(decoded: Decoded, buffer: NDArray[Any], normalizer: Normalizer | CudaNormalizer, *, blank: bool) -> Rows:
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

    return Rows(
        shard=batch.shard,
        images=images,
        items=[batch.items[position] for position in kept.tolist()],
        source_bytes=decoded.source_bytes[kept],
        valid=valid,
        rejects=decoded.rejects,
        last=batch.last,
        ready=ready,
        buffer=buffer,
    )


def _changed(source: Source, decoded: Decoded, since_ns: int) -> int:
    """How many files that a batch has read are gone, have another size, or were written to since then."""
    changed = 0
    if not source.file_per_item:
        return changed
    for item, size in zip(decoded.batch.items, decoded.source_bytes.tolist(), strict=True):
        if source.frame(item):
            continue  # of a file that was looked at for its first one
        try:
            status = os.stat(source.local_path(item))
        except (OSError, ValueError):  # a name with a NUL byte, say
            changed += size > 0
        else:
            changed += 0 != size != status.st_size or since_ns < status.st_mtime_ns <= time.time_ns()
    return changed


@contextlib.contextmanager
def _explained(task: Task) -> Iterator[None]:
    """Makes a ShardError of what goes wrong with memory, or with a GPU."""
    try:
        yield
    except MemoryError as exc:  # CuPy's, too
        raise ShardError(
            f"no memory for batches of {task.tuning.batch_size} images in {task.tuning.open_shards} open shards; "
            "lower --batch-size, --open-shards or --workers, and run the command again to resume"
        ) from exc
    except Exception as exc:
        if not type(exc).__module__.startswith("cupy"):
            raise
        raise ShardError(
            f"GPU {task.gpu} failed ({clean(str(exc))}); `nvidia-smi` shows its memory and who holds it, dmesg its "
            "errors (Xid). Run the same command to resume"
        ) from exc


def provenance_of(decoder: Decoder, job: Job) -> dict[str, Any]:
    """What decides the bytes of shards besides the settings: the decoder, and the library that compresses."""
    deflater = {} if job.settings.deflate_level is None else {"isal": importlib.metadata.version("isal")}
    return {**decoder.provenance(), **deflater}


def _pulse() -> Pulse:
    try:
        folders = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        return Pulse(os.getpid(), _memory_bytes(), *folders)
    except OSError:  # macOS
        return Pulse(os.getpid(), 0, 0, 0)


def _memory_bytes() -> int:
    """Main memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_provenance(expected: dict[str, Any] | None, found: dict[str, Any]) -> None:
    """Raises MismatchError if shards were made with another provenance; None if any will do."""
    if expected is None or expected == found:
        return
    names = sorted({*expected, *found})
    differences = [
        f"  {name}: {expected.get(name)} made them, {found.get(name)} is here"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    raise MismatchError(
        "the shards so far were made in another environment, whose pixels may differ:\n" + "\n".join(differences) + "\n"
        "resume where they were made, or add --accept-environment to mix the two"
    )
