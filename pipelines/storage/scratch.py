"""Local temporary folders for files that are uploaded to an object store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import weakref

_SCRATCH = re.compile(r"gpu-npz-scratch-.+")


def scratch_folder(owner: object) -> str:
    """Creates a folder for temporary files. It is flocked while the process lives, and removed with `owner`."""
    while True:
        path = tempfile.mkdtemp(prefix="gpu-npz-scratch-")
        with contextlib.suppress(FileNotFoundError):  # another build removed it before it was flocked
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # without flock, no other build removes it either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.isdir(path):
                break
            os.close(descriptor)

    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # a forked process has the object, too
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    weakref.finalize(owner, remove)
    return path


def remove_scratch() -> None:
    """Removes the folders that killed processes left on this machine, by their missing flock."""
    root = tempfile.gettempdir()
    for name in filter(_SCRATCH.fullmatch, os.listdir(root)):
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):  # of another user, or of a live build
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
