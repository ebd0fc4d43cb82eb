"""The local engine: worker processes on this machine, which exchange only shard numbers and events, never pixels.

A worker that dies or hangs is replaced, and its unfinished shards are built again. A worker that has grown too large
ends by itself between two shards and is replaced, too. A shard that loses its worker twice is built in isolation mode:
one image at a time, in a process that reports which image it is about to decode. An image that crashes or hangs this
process is rejected. A death by SIGKILL is never blamed on an image, since the system kills processes with SIGKILL when
memory is short.
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
from .events import Committed, CurrentItem, Event, Progress, Task, taken_back
from .message_files import AHEAD, Suspect, find_message_files
from .messages import DecoderMessages, Output
from .shard_queue import ShardQueue
from .worker import remove_leftovers, requested_shards, work

log = logging.getLogger(__name__)
_JOIN_S = 10.0
_LOOK_S = 1.0
_MAX_LOSSES = 5  # of one shard, if no image is to blame
_MAX_DEATHS = 100
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}


def run(task: Task, shards: Sequence[int], gpus: Sequence[int], timeout_s: float) -> Generator[Event, None, None]:
    """Builds `shards` with `task.tuning.workers` processes (if 0, in this process) and yields events.

    A worker asks for a shard when it needs one, so fast workers build more shards. If a worker is lost, a negative
    Progress cancels the progress of its unfinished shards. Closing the generator early stops all workers.

    Args:
        task: the task of all workers; each gets its own `gpu`.
        shards: the numbers of the shards to build.
        gpus: device numbers, assigned to the workers in turn; empty for the CPU.
        timeout_s: a worker that has been silent for longer is considered hung.

    Raises:
        GpuNpzError: the error of a worker; ShardError if workers die repeatedly.
    """
    tasks = [dataclasses.replace(task, gpu=gpu) for gpu in gpus or (None,)]
    if task.tuning.workers == 0:
        yield from (event for event in work(tasks[0], shards) if not isinstance(event, CurrentItem))
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
        yield find_message_files(first_task, workers.suspects, workers.built_items, timeout_s)


@dataclasses.dataclass
class _LocalWorker:
    """A worker process and its state, as its parent knows it.

    Attributes:
        process: the process.
        task: its task.
        output: what it writes to stdout and stderr.
        progress: the events of each of its unfinished shards.
        decoding: in isolation mode, the index of the item that is being decoded.
        dismissed: whether its last request for a shard was answered with None; None before its first request.
        suspected: how many of its next batches may be the cause of known messages.
        silent_s: how long it has been silent, in seconds.
        hung: whether it was killed because it was silent for too long.
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

    @property
    def starting(self) -> bool:
        """Whether it has not requested a shard yet."""
        return self.dismissed is None


class _LocalWorkers:
    """The worker processes of one build.

    Attributes:
        built_items: how many items the workers have reported.
        suspects: batches about which decoders may have written known messages.
        skipped: items that have crashed or hung their decoder: code and detail by index.
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
        with contextlib.suppress(ConnectionError):  # it has died already, as the first recv will show
            here.send(task)

    def stop(self) -> None:
        """Stops all workers."""
        for connection, worker in self._workers.items():
            connection.close()  # ends the worker
            if worker.starting:
                worker.process.kill()  # it does not notice before it has loaded everything, and it has no shard
        for worker in self._workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_JOIN_S)
            worker.process.kill()
            worker.process.wait()
            worker.output.close()

    def events(self) -> Iterator[Event]:
        """The events of all workers, until all shards are built. It does not wait for workers that still start then."""
        while self._workers and (len(self._shards) or not all(worker.starting for worker in self._workers.values())):
            begin = time.monotonic()
            ready = wait(list(self._workers), _LOOK_S)
            self._watch(ready, min(time.monotonic() - begin, 2 * _LOOK_S))  # if the machine slept, no worker hung
            for talking, worker in self._workers.items():
                # Before its next event is received: what a worker writes about a batch is in the pipe before the event.
                if (talking in ready or worker.output.unread) and (counts := worker.output.known()):
                    worker.suspected = AHEAD + worker.task.tuning.batches_ahead
                    yield DecoderMessages(counts)
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = self._workers[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):  # OSError if it died in the middle of a message
                    del self._workers[connection]
                    connection.close()
                    code = worker.process.wait()
                    if counts := worker.output.close(died=code != 0):
                        yield DecoderMessages(counts)
                    if code or worker.progress or worker.starting:
                        yield from self._lost(worker, code)
                    elif not worker.dismissed and self._shards.left(isolated=worker.task.isolated):
                        log.info("a worker process uses too much memory; another one replaces it")
                        self.start(worker.task)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    with contextlib.suppress(ConnectionError):  # it has died meanwhile, as the next recv will show
                        connection.send(self._next(worker))
                elif isinstance(message, CurrentItem):
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
        """The next shard for a worker; None if there is none for it."""
        shard = self._shards.take(isolated=worker.task.isolated)
        worker.dismissed = shard is None
        if shard is not None:
            worker.progress[shard] = []
        return shard

    def _watch(self, ready: Sequence[object], elapsed_s: float) -> None:
        """Kills the workers that have been silent for too long."""
        for connection, worker in self._workers.items():
            worker.silent_s = 0.0 if connection in ready else worker.silent_s + elapsed_s
            if worker.silent_s > self._timeout_s and not worker.hung:
                worker.hung = True
                worker.process.kill()

    def _lost(self, worker: _LocalWorker, code: int) -> Iterator[Event]:
        """Puts the shards of a dead worker back and starts a new worker.

        Raises:
            ShardError: continuing is pointless.
        """
        self._deaths += 1
        cause = f"did not respond for {self._timeout_s:.0f} s" if worker.hung else _cause(code)
        last = worker.output.last_words
        if (code >= 0 and not worker.progress) or self._deaths > _MAX_DEATHS:  # the former if it cannot even start
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
            "a worker process %s%s; another one takes over its %d unfinished shards%s",
            cause, while_decoding, len(worker.progress), last,
        )  # fmt: skip
        if self._shards.left(isolated=True):
            tuning = dataclasses.replace(worker.task.tuning, batch_size=1, prefetch=1, open_shards=1)
            self.start(dataclasses.replace(worker.task, tuning=tuning, isolated=True, skipped=dict(self.skipped)))
        if self._shards.left(isolated=False) and not worker.task.isolated:
            self.start(worker.task)


def serve(descriptor: int) -> None:
    """What a worker process runs, with its end of the pipe.

    It receives a Task. Then it sends events, None to request a shard, and an error if it failed.
    """
    connection = Connection(descriptor)

    def ask() -> int | None:
        connection.send(None)
        shard: int | None = connection.recv()
        return shard

    subprocesses.end_with_parent(descriptor)
    from PIL import Image

    from ..preprocess import pillow  # noqa: F401  # every decoder needs it, and the parent may still be planning

    Image.preinit()  # loads the usual formats
    try:
        task = connection.recv()
        with contextlib.closing(_messages(task, requested_shards(ask, task.tuning.open_shards))) as messages:
            for message in messages:
                connection.send(message)
    except (ConnectionError, EOFError):
        raise SystemExit(1) from None  # the parent has ended; if not, this must count as a failure


def _messages(task: Task, shards: Iterator[int]) -> Generator[Event | GpuNpzError, None, None]:
    """The events of a worker, and the error if it failed."""
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
    advice = "run the same command to resume, with fewer --workers if there is not enough memory"
    return f"a worker process{times} {cause}; {advice}"
