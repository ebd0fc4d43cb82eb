"""Worker processes on this machine. Only shard numbers and events travel between them, never pixels."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from ..errors import GpuNpzError, ShardError
from ..worker import Event, Task, work

_JOIN_S = 10.0
_Pool = dict[Connection, "subprocess.Popen[bytes]"]


def run(task: Task, shards: Sequence[int]) -> Generator[Event, None, None]:
    """Builds `shards` with as many processes as the task says (one: this process) and yields what happens.

    A worker asks for a shard when it needs one, so fast workers take more. Closing the generator early stops them all.

    Raises:
        GpuNpzError: what a worker failed with; ShardError if it died.
    """
    if task.tuning.workers == 1:
        yield from work(task, shards)
        return
    pool: _Pool = {}
    try:
        for _ in range(task.tuning.workers):
            _start(pool, task)
        yield from _dispatch(pool, iter(shards))
    finally:
        for connection in pool:
            connection.close()  # a worker that sends to nobody ends
        for process in pool.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_JOIN_S)
            process.kill()
            process.wait()


def _start(pool: _Pool, task: Task) -> None:
    # Not multiprocessing.Process, which runs the caller's script again in each worker. A session of its own keeps the
    # terminal's Ctrl-C from the worker: the parent decides.
    here, there = multiprocessing.Pipe()
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from gpu_npz.engines.local import serve; serve({there.fileno()})"
    )
    command = [sys.executable, "-c", program]
    with there:
        pool[here] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()], start_new_session=True
        )
    with contextlib.suppress(ConnectionError):  # it died already: the first recv says so
        here.send(task)


def _dispatch(pool: _Pool, shards: Iterator[int]) -> Iterator[Event]:
    while pool:
        for connection in wait(list(pool)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):  # OSError where it died in the middle of a message
                process = pool.pop(connection)
                connection.close()
                if code := process.wait():
                    raise ShardError(_epitaph(code)) from None
                continue
            if isinstance(message, BaseException):
                raise message
            if message is None:
                with contextlib.suppress(ConnectionError):  # it died meanwhile: the next recv says so
                    connection.send(next(shards, None))
            else:
                yield message


def serve(descriptor: int) -> None:
    """What a worker process runs, given its end of the pipe.

    It takes a Task; then it sends None for "give me a shard", events, and an error if there was one.
    """
    connection = Connection(descriptor)

    def asked() -> Iterator[int]:
        while True:
            connection.send(None)
            shard = connection.recv()
            if shard is None:
                return
            yield shard

    try:
        task = connection.recv()
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


def _epitaph(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        cause = f"was killed by {name}" + (" (the system may be out of memory)" if code == -signal.SIGKILL else "")
    else:
        cause = f"ended with code {code}"
    return f"a worker process {cause}; run the same command to resume, with fewer --workers if memory is short"
