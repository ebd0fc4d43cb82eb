"""Starts processes that communicate through a pipe and whose stdout and stderr are read.

multiprocessing.Process is not used, since it would run the caller's script again in each process. Each process has its
own session, so that Ctrl-C in the terminal does not reach it; its parent decides when it ends. It also ends as soon as
the parent's end of the pipe is closed, even while it is computing.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

from .messages import Output

WORKER = "gpu_npz.workers.local"  # its name, because importing it takes long
_Process = tuple[subprocess.Popen[bytes], Connection, Output]
_prepared: dict[str, _Process] = {}  # by module


def start(module: str) -> _Process:
    """Starts a process that runs `serve(descriptor)` of a module, where `descriptor` is its end of a pipe.

    Args:
        module: the full name of the module, which must be importable with this process's sys.path.

    Returns:
        The process, our end of the pipe, and what the process writes to stdout and stderr.
    """
    return _prepared.pop(module, None) or _started(module)


@contextlib.contextmanager
def prepared(module: str) -> Iterator[None]:
    """Starts such a process ahead of its use: it imports its modules now, and the first `start` in the body returns it.

    If nothing starts it, it is killed at the end, or by `discard`.
    """
    with contextlib.suppress(OSError):  # too many processes: `start` reports that, if it is called at all
        _prepared[module] = _started(module)
    try:
        yield
    finally:
        discard(module)


def discard(module: str) -> None:
    """Kills the process that `prepared` has started, unless it is used."""
    if unused := _prepared.pop(module, None):
        _end(*unused)


def _started(module: str) -> _Process:
    here, there = multiprocessing.Pipe()
    call = f"from {__name__} import run; run({module!r}, {there.fileno()})"
    program = f"import sys; sys.path[:] = {sys.path!r}; {call}"
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[there.fileno()],
            start_new_session=True,
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},  # nothing here uses BLAS, and its threads start slowly
        )
    assert process.stdout is not None
    return process, here, Output(process.stdout)


@contextlib.contextmanager
def running(module: str) -> Iterator[tuple[Connection, Output]]:
    """Runs such a process while the body runs, and then kills it."""
    process, connection, output = start(module)
    try:
        yield connection, output
    finally:
        _end(process, connection, output)


def _end(process: subprocess.Popen[bytes], connection: Connection, output: Output) -> None:
    connection.close()
    process.kill()
    process.wait()
    output.close()


def run(module: str, descriptor: int) -> None:
    """What such a process runs. It ends without the interpreter's teardown, for which its parent would wait."""
    importlib.import_module(module).serve(descriptor)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_with_parent(descriptor: int) -> None:
    """Ends this process when the other end of its pipe is closed, by its parent or because its parent has ended.

    PR_SET_PDEATHSIG is not used: only Linux has it, and it also fires when the thread that started the process ends.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # reports only that the pipe was closed
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="gpu-npz-parent", daemon=True).start()
