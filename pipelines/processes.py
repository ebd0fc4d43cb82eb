"""Processes of our own that talk to this one by a pipe.

Not multiprocessing.Process, which runs the caller's script again in each of them. A session of its own keeps the
terminal's Ctrl-C from such a process: the parent decides. It ends by itself when its parent is gone, at the latest when
it sends something.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection


def start(module: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that runs `serve(descriptor)` of a module, and our end of its pipe; `descriptor` is the other one.

    Args:
        module: its full name; it must be importable with this process's sys.path.
    """
    here, there = multiprocessing.Pipe()
    program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import serve; serve({there.fileno()})"
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            start_new_session=True,
        )
    return process, here
