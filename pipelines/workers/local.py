"""Worker processes on this machine. Only shard numbers and events travel between them, never pixels.

A worker that dies or hangs is replaced, and the shards that it had begun are built again. A worker that has grown too
large ends by itself between two shards, and is replaced, too. A shard that loses its worker twice is built in isolated
mode: one image at a time in a process that says which one it is about to decode. An image that ends that process
becomes a reject; the death of a process by SIGKILL, as the system does it when memory is short, is never taken for an
image's fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import subprocess
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from ..dataset.job import Job
from ..errors import GpuNpzError, ShardError
from ..sources.rejects import Code
from ..storage import open_storage
from . import subprocesses
from .events import Committed, Decoding, Event, Progress, Task, taken_back
from .message_files import AHEAD, Suspect, named
from .messages import Heard, Output
from .shard_queue import ShardQueue
from .worker import asked, remove_leftovers, work

log = logging.getLogger(__name__)
_JOIN_S = 10.0
_LOOK_S = 1.0
_MAX_LOSSES = 5  # of one shard, without an image to blame
_MAX_DEATHS = 100
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}


def run(task: Task, shards: Sequence[int], gpus: Sequence[int], timeout_s: float) -> Generator[Event, None, None]:
    """Builds `shards` with as many processes as the task says (none: in this one) and yields what happens.

    A worker asks for a shard when it needs one, so fast workers take more. Progress that is lost with a worker is taken
    back by a negative Progress. Closing the generator early stops all workers.

    Args:
        task: what every worker needs to know; each gets its own `gpu`.
        shards: what to build.
        gpus: the workers take them in turn; none for the CPU.
        timeout_s: a worker without a sign of life for so long is taken to hang.

    Raises:
        GpuNpzError: what a worker failed with; ShardError if workers die again and again.
    """
    tasks = [dataclasses.replace(task, gpu=gpu) for gpu in gpus or (None,)]
    if task.tuning.workers == 0:
        yield from (event for event in work(tasks[0], shards) if not isinstance(event, Decoding))
        return
    workers = _LocalWorkers(shards, timeout_s)
    try:
        for number in range(task.tuning.workers):
            workers.start(tasks[number % len(tasks)])
        yield from workers.events()
    finally:
        workers.stop()
    if workers.suspects:
        first_task = dataclasses.replace(tasks[0], skipped=workers.skipped)
        yield named(first_task, workers.suspects, workers.built_items, timeout_s)


@dataclasses.dataclass
class _LocalWorker:
    """A process, what it was told, and what is known of it.

    Attributes:
        output: what it writes to stdout and stderr.
        progress: what it has done of each shard that it has begun and not committed.
        decoding: in isolated mode, the item that is being decoded.
        dismissed: whether it was told that there is no shard for it; None before it has asked for one.
        suspected: of how many of its next batches known messages may have been written.
        silent_s: how long it has said nothing.
        hung: whether it was stopped for that.
    """

    process: subprocess.Popen[bytes]
    task: Task
    output: Output
    progress: dict[int, list[Progress]] = dataclasses.field(default_factory=dict)
    decoding: int | None = None
    dismissed: bool | None = None
    suspected: int = 0
    silent_s: float = 0.0
    hung: bool = False


class _LocalWorkers:
    """The workers of one build, and the shards that are left for them.

    Attributes:
        built_items: how many items the workers have reported.
        suspects: batches about which decoders may have written known messages.
        skipped: items that have ended or hung their decoder.
    """

    def __init__(self, shards: Sequence[int], timeout_s: float) -> None:
        self.built_items = 0
        self.suspects: list[Suspect] = []
        self.skipped: dict[int, tuple[Code, str]] = {}
        self._workers: dict[Connection, _LocalWorker] = {}
        self._shards = ShardQueue(shards, max_losses=_MAX_LOSSES)
        self._deaths = 0
        self._timeout_s = timeout_s

    def start(self, task: Task) -> None:
        """Starts a worker."""
        process, here, output = subprocesses.start(__name__)
        self._workers[here] = _LocalWorker(process, task, output)
        with contextlib.suppress(ConnectionError):  # it died already: the first recv says so
            here.send(task)

    def stop(self) -> None:
        """Ends all workers."""
        for connection in self._workers:
            connection.close()  # a worker that sends to nobody ends
        for worker in self._workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_JOIN_S)
            worker.process.kill()
            worker.process.wait()
            worker.output.close()

    def events(self) -> Iterator[Event]:
        """What happens, until all shards are built."""
        while self._workers:
            begin = time.monotonic()
            ready = wait(list(self._workers), _LOOK_S)
            self._watch(ready, min(time.monotonic() - begin, 2 * _LOOK_S))  # a machine that slept is no hung worker
            for talking, worker in self._workers.items():
                # Before its message is taken: what a worker wrote about a batch is in the pipe when it says so.
                if (talking in ready or worker.output.unread) and (counts := worker.output.known()):
                    worker.suspected = AHEAD + worker.task.tuning.prefetch
                    yield Heard(counts)
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = self._workers[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):  # OSError where it died in the middle of a message
                    del self._workers[connection]
                    connection.close()
                    code = worker.process.wait()
                    if counts := worker.output.close(died=code != 0):
                        yield Heard(counts)
                    if code or worker.progress or worker.dismissed is None:
                        yield from self._lost(worker, code)
                    elif not worker.dismissed and self._shards.left(isolated=worker.task.isolated):
                        log.info("a worker process has grown too large; another takes its place")
                        self.start(worker.task)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    with contextlib.suppress(ConnectionError):  # it died meanwhile: the next recv says so
                        connection.send(self._next(worker))
                elif isinstance(message, Decoding):
                    worker.decoding = message.index
                else:
                    if isinstance(message, Committed):
                        worker.progress.pop(message.record.shard, None)
                    elif isinstance(message, Progress):
                        self.built_items += message.items
                        done = worker.progress[message.shard]
                        if worker.suspected:
                            self.suspects.append((message.shard, sum(step.items for step in done), message.items))
                            worker.suspected -= not connection.poll()
                        done.append(message)
                    yield message

    def _next(self, worker: _LocalWorker) -> int | None:
        """A shard for a worker, None if there is none for it; begins the one that it gets."""
        shard = self._shards.take(isolated=worker.task.isolated)
        worker.dismissed = shard is None
        if shard is not None:
            worker.progress[shard] = []
        return shard

    def _watch(self, ready: Sequence[object], elapsed_s: float) -> None:
        """Stops the workers that have said nothing for too long."""
        for connection, worker in self._workers.items():
            worker.silent_s = 0.0 if connection in ready else worker.silent_s + elapsed_s
            if worker.silent_s > self._timeout_s and not worker.hung:
                worker.hung = True
                worker.process.kill()

    def _lost(self, worker: _LocalWorker, code: int) -> Iterator[Event]:
        """Sees to the shards of a worker that has died, and to a new worker.

        Raises:
            ShardError: there is no point in going on.
        """
        self._deaths += 1
        cause = f"gave no sign of life for {self._timeout_s:.0f} s" if worker.hung else _cause(code)
        last = worker.output.last_words
        if (code >= 0 and not worker.progress) or self._deaths > _MAX_DEATHS:  # it cannot even start
            raise ShardError(_epitaph(cause, self._deaths) + last)
        blamed = worker.decoding if worker.hung or code in _CRASHES else None
        if blamed is not None:
            self.skipped[blamed] = ("timed-out", f"the decoder {cause}") if worker.hung else ("crashed", cause)
        remove_leftovers(worker.task, worker.progress)
        for shard, steps in worker.progress.items():
            self._shards.put_back(shard, lost=blamed is None)
            if self._shards.is_hopeless(shard):
                raise ShardError(_epitaph(cause, self._deaths) + last)
            if steps:
                yield taken_back(shard, steps)
        while_decoding = "" if worker.decoding is None else f" while it decoded {_path(worker.task, worker.decoding)!r}"
        log.warning(
            "a worker process %s%s; another takes over its %d shard(s)%s",
            cause, while_decoding, len(worker.progress), last,
        )  # fmt: skip
        if self._shards.left(isolated=True):
            tuning = dataclasses.replace(worker.task.tuning, batch_size=1, prefetch=1, open_shards=1)
            self.start(dataclasses.replace(worker.task, tuning=tuning, isolated=True, skipped=dict(self.skipped)))
        if self._shards.left(isolated=False) and not worker.task.isolated:
            self.start(worker.task)


def serve(descriptor: int) -> None:
    """What a worker process runs, given its end of the pipe.

    It takes a Task; then it sends None for "give me a shard", events, and an error if there was one.
    """
    connection = Connection(descriptor)

    def ask() -> int | None:
        connection.send(None)
        shard: int | None = connection.recv()
        return shard

    subprocesses.end_with_parent(descriptor)
    try:
        task = connection.recv()
        with contextlib.closing(_messages(task, asked(ask, task.tuning.open_shards))) as messages:
            for message in messages:
                connection.send(message)
    except (ConnectionError, EOFError):
        raise SystemExit(1) from None  # the parent has stopped; if it has not, it must not take this for a good end


def _messages(task: Task, shards: Iterator[int]) -> Generator[Event | GpuNpzError, None, None]:
    """What happens, and at last what it failed with."""
    try:
        yield from work(task, shards)
    except (ConnectionError, EOFError):
        raise
    except GpuNpzError as exc:
        yield exc
    except Exception:
        yield ShardError(f"a worker process failed:\n{traceback.format_exc()}")


def _path(task: Task, index: int) -> str:
    (item,) = Job.open(open_storage(task.out)).plan.items(index, index + 1)
    return item.path


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was killed by {name}" + (" (the system may be out of memory)" if code == -signal.SIGKILL else "")


def _epitaph(cause: str, deaths: int) -> str:
    times = f", the last of {deaths}," if deaths > 1 else ""
    return f"a worker process{times} {cause}; run the same command to resume, with fewer --workers if memory is short"
