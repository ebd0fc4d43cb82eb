"""The protocol that storage for OUT implements, on a folder or an object store."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import AbstractContextManager
from typing import Protocol

from .holders import Fence

LOCK = "lock"
URL = re.compile(r"([a-z][\w+.:-]*):/(/?)")


class Storage(Protocol):
    """OUT. Names are relative to it, POSIX; a file under its final name is complete.

    If OUT cannot be used, every method raises StorageError, which says what to do. Methods that change something raise
    LockedError if a lock under which this object works is lost.
    """

    @property
    def root(self) -> str:
        """OUT itself, a path or a URL."""

    @property
    def fence(self) -> Fence | None:
        """The lock taken last, for workers that work under it; None without a lock."""

    def path(self, name: str) -> str:
        """The path or URL of a file under its final name."""

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""

    def local(self, name: str) -> AbstractContextManager[str]:
        """The path of a file or of a local copy, valid in the body. Raises OSError if it does not exist."""

    def names(self, folder: str = "") -> list[str]:
        """The names of files and folders in a folder, sorted; empty if the folder does not exist."""

    def is_folder(self, name: str) -> bool:
        """Whether this is a folder in OUT; a link to one is not."""

    def temporary(self, name: str) -> str:
        """The path of a new local file in which to write the content of `name`."""

    def publish(self, temporary: str, name: str) -> None:
        """Moves a temporary file, already flushed to the disk, to its final name."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file atomically."""

    def discard(self, temporary: str) -> None:
        """Removes a temporary file if it exists."""

    def remove(self, name: str) -> None:
        """Removes a file or an empty folder if it exists."""

    def remove_temporaries(self, folder: str) -> None:
        """Removes unfinished files of this build and of killed ones from a folder, but not those of other held locks.

        Only for the holder of a lock, while nothing else works under it.
        """

    def remove_leftovers(self, name: str) -> None:
        """Removes the unfinished parts of a file that a dead worker under our lock left."""

    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Holds a lock on OUT for one build, or for a part of one.

        Args:
            name: of the lock; locks of different names are independent.
            wait_s: how long to wait for another holder.

        Raises:
            LockedError: another build holds the lock, or has taken it over in the meantime.
        """

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""

    def live_locks(self) -> list[str]:
        """The names of the locks that are held."""

    def explained(self, name: str) -> AbstractContextManager[None]:
        """Raises an OSError from its body as a StorageError that names the file and says what to do."""


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL rather than a path."""
    url = URL.match(os.fspath(place))
    return url is not None and bool(url[2]) and url[1] != "file"


def open_regular(path: str | bytes | os.PathLike[str], flags: int) -> int:
    """Like `os.open`, but never blocks, and raises OSError for pipes, devices and sockets."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
