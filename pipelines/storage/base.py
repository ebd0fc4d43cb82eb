"""What a place for OUT offers: the protocol of a folder and of an object store."""

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
    """OUT. Names are relative to it, POSIX; a file under its final name is whole.

    Where OUT cannot be used, every method raises StorageError, which says what to do; those that change something raise
    LockedError where a lock is lost under which this object works.
    """

    @property
    def root(self) -> str:
        """OUT itself, a path or a URL."""

    @property
    def fence(self) -> Fence | None:
        """The lock that was taken last, for workers that are to work under it; None without one."""

    def path(self, name: str) -> str:
        """The path or the URL of a file under its final name."""

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None if there is none."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if there is none."""

    def local(self, name: str) -> AbstractContextManager[str]:
        """A path of a file, or of a copy, to be opened within the body. Raises OSError if there is none."""

    def names(self, folder: str = "") -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if there is no such folder."""

    def is_folder(self, name: str) -> bool:
        """Whether this is a folder in OUT; a link to one is not."""

    def temporary(self, name: str) -> str:
        """The path of a new local file in which the content of `name` is made."""

    def publish(self, temporary: str, name: str) -> None:
        """Gives a temporary file, already flushed to the disk, its final name."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in one step: it is there whole or not at all."""

    def discard(self, temporary: str) -> None:
        """Removes a temporary file, if it is there."""

    def remove(self, name: str) -> None:
        """Removes a file or an empty folder, if it is there."""

    def remove_temporaries(self, folder: str) -> None:
        """Removes what killed builds, and this one, left unfinished in a folder; nothing of other locks that are held.

        Only for the holder of a lock, while nothing else works under it.
        """

    def remove_leftovers(self, name: str) -> None:
        """Removes what a worker under our lock, which is no more, left unfinished of a file."""

    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Holds OUT for one build, or a part of it.

        Args:
            name: which lock: they do not know of each other.
            wait_s: how long to wait for whoever holds it.

        Raises:
            LockedError: another build holds it, or has taken it over meanwhile.
        """

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""

    def live_locks(self) -> list[str]:
        """The names of the locks that somebody holds."""

    def explained(self, name: str) -> AbstractContextManager[None]:
        """Raises an OSError from its body as a StorageError that says what to do about `name`."""


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether this names a place on an object store rather than a path."""
    url = URL.match(os.fspath(place))
    return url is not None and bool(url[2]) and url[1] != "file"


def open_regular(path: str | bytes | os.PathLike[str], flags: int) -> int:
    """Opens a file as `os.open` does, without waiting; raises OSError for pipes, devices and sockets."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")
