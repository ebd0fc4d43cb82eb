"""Worker processes on this machine. Only shard numbers and events travel between them, never pixels."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ..errors import GpuNpzError, ShardError
from ..worker import Event, Task, work

_JOIN_S = 10.0


def run(task: Task, shards: Sequence[int], workers: int) -> Generator[Event, None, None]:
    """Builds `shards` with `workers` processes (one worker: in this process) and yields what happens.

    A worker asks for a shard when it needs one, so fast workers take more. Closing the generator early stops them all.

    Raises:
        GpuNpzError: what a worker failed with; ShardError if it died.
    """
    if workers == 1:
        yield from work(task, shards)
        return
    spawn = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_held():
            for _ in range(workers):
                here, there = spawn.Pipe()
                process: BaseProcess = spawn.Process(
                    target=_serve, args=(there, task), name="gpu-npz-worker", daemon=True
                )
                process.start()
                there.close()
                pool[here] = process
        yield from _dispatch(pool, iter(shards))
    finally:
        for connection in pool:
            connection.close()  # a worker that sends to nobody ends
        for process in pool.values():
            process.join(_JOIN_S)
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds SIGINT back here and, until they ignore it, in the processes that are started meanwhile."""
    resource_tracker.ensure_running()  # else the first start does it, and lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dispatch(pool: dict[Connection, BaseProcess], shards: Iterator[int]) -> Iterator[Event]:
    while pool:
        for connection in wait(list(pool)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):  # OSError where it died in the middle of a message
                process = pool.pop(connection)
                process.join()
                connection.close()
                if process.exitcode:
                    raise ShardError(_epitaph(process)) from None
                continue
            if isinstance(message, BaseException):
                raise message
            if message is None:
                with contextlib.suppress(ConnectionError):  # it died meanwhile: the next recv says so
                    connection.send(next(shards, None))
            else:
                yield message


def _serve(connection: Connection, task: Task) -> None:
    """What a worker process runs: it sends None for "give me a shard", events, and an error if there was one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides

    def asked() -> Iterator[int]:
        while True:
            connection.send(None)
            shard = connection.recv()
            if shard is None:
                return
            yield shard

    try:
        with contextlib.closing(_messages(task, asked())) as messages:
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


def _epitaph(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        cause = f"was killed by {name}" + (" (the system may be out of memory)" if code == -signal.SIGKILL else "")
    else:
        cause = f"ended with code {code}"
    return f"a worker process {cause}; run the same command to resume, with fewer --workers if memory is short"
