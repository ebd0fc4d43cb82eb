"""Starts processes that communicate through a pipe and whose stdout and stderr are read.

multiprocessing.Process is not used, since it would run the caller's script again in each process. Each process has its
own session, so that Ctrl-C in the terminal does not reach it; its parent decides when it ends. It also ends as soon as
the parent's end of the pipe is closed, even while it is computing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

from .messages import Output


def start(module: str) -> tuple[subprocess.Popen[bytes], Connection, Output]:
    """Starts a process that runs `serve(descriptor)` of a module, where `descriptor` is its end of a pipe.

    Args:
        module: the full name of the module, which must be importable with this process's sys.path.

    Returns:
        The process, our end of the pipe, and what the process writes to stdout and stderr.
    """
    here, there = multiprocessing.Pipe()
    program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import serve; serve({there.fileno()})"
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
        connection.close()
        process.kill()
        process.wait()
        output.close()


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
