"""Processes of our own that talk to this one by a pipe, and whose stdout and stderr are heard.

Not multiprocessing.Process, which runs the caller's script again in each of them. A session of its own keeps the
terminal's Ctrl-C from such a process: the parent decides. It ends as soon as the parent's end of the pipe is closed,
also while it only computes.
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
    """A process that runs `serve(descriptor)` of a module, our end of its pipe, and what it writes elsewhere.

    `descriptor` is the other end of the pipe.

    Args:
        module: its full name; it must be importable with this process's sys.path.
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
        )
    assert process.stdout is not None
    return process, here, Output(process.stdout)


@contextlib.contextmanager
def running(module: str) -> Iterator[tuple[Connection, Output]]:
    """Such a process for as long as the body runs, then it is killed."""
    process, connection, output = start(module)
    try:
        yield connection, output
    finally:
        connection.close()
        process.kill()
        process.wait()
        output.close()


def end_with_parent(descriptor: int) -> None:
    """Ends this process when the other end of its pipe is closed: by its parent, or with it, however that ended.

    Not by PR_SET_PDEATHSIG, which is for Linux alone and also fires when the thread ends that started the process.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # of a closed pipe alone
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="gpu-npz-parent", daemon=True).start()
