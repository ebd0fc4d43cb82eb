"""Worker processes on this machine. Only shard numbers and events travel between them, never pixels."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ..errors import GpuNpzError, ShardError
from ..worker import Event, Task, work

_JOIN_S = 10.0


def run(task: Task, shards: Sequence[int], workers: int) -> Iterator[Event]:
    """Builds `shards` with `workers` processes (one worker: in this process) and yields what happens.

    A worker asks for a shard when it needs one, so fast workers take more. Leaving the iterator early stops them all.

    Raises:
        GpuNpzError: what a worker failed with; ShardError if it died.
    """
    if workers == 1:
        yield from work(task, shards)
        return
    spawn = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(workers):
            here, there = spawn.Pipe()
            process: BaseProcess = spawn.Process(target=_serve, args=(there, task), name="gpu-npz-worker", daemon=True)
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


def _dispatch(pool: dict[Connection, BaseProcess], shards: Iterator[int]) -> Iterator[Event]:
    while pool:
        for connection in wait(list(pool)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                process = pool.pop(connection)
                process.join()
                connection.close()
                if process.exitcode:
                    raise ShardError(_epitaph(process)) from None
                continue
            if isinstance(message, BaseException):
                raise message
            if message is None:
                with contextlib.suppress(BrokenPipeError):  # it died meanwhile: the next recv says so
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
        for event in work(task, asked()):
            connection.send(event)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        os._exit(0)  # the parent is gone or has stopped; whatever is unfinished has a temporary name
    except GpuNpzError as exc:
        connection.send(exc)
    except BaseException:
        connection.send(ShardError(f"a worker process failed:\n{traceback.format_exc()}"))


def _epitaph(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        cause = f"was killed by {name}" + (" (the system may be out of memory)" if code == -signal.SIGKILL else "")
    else:
        cause = f"ended with code {code}"
    return f"a worker process {cause}; run the same command to resume, with fewer --workers if memory is short"
