"""Where OUT is: every file that a build makes is written, published, locked and removed here, or in `objects.py`.

In a folder, a file under its final name is whole: it is written under a temporary name in the same folder, flushed to
the disk and renamed, and the folder is flushed too.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from .errors import StorageError
from .locks import FileLock, is_live

LOCK = "lock"
PRIVATE = ".gpu-npz"  # the folder in OUT with all that resume and repair need
_TEMPORARY = re.compile(r"\..+\.\d+-\d+\.tmp")
_ADVICE = {
    errno.ENOSPC: "free some space, then run the same command to resume",
    errno.EDQUOT: "free some of your quota, then run the same command to resume",
    errno.EFBIG: "choose a smaller --shard-size or raise the file size limit (ulimit -f)",
    errno.EACCES: "make it writable or choose another OUT",
    errno.EPERM: "make it writable or choose another OUT",
    errno.EROFS: "the filesystem is read-only; choose another OUT",
    errno.ENOTDIR: "OUT must be a folder; choose another OUT",
}


_URL = re.compile(r"([a-z][\w+.:-]*):/(/?)")


class Held(Protocol):
    """A lock that this process holds."""

    def require_held(self) -> None:
        """Raises LockedError if another process has taken it for stale."""


class Storage(Protocol):
    """OUT. Names are relative to it, POSIX; a file under its final name is whole.

    Where OUT cannot be used, every method raises StorageError, which says what to do.
    """

    @property
    def root(self) -> str:
        """OUT itself, a path or a URL."""

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
        """Removes what killed builds left unfinished in a folder. Only for the holder of the lock."""

    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> AbstractContextManager[Held]:
        """Holds OUT for one build, or a part of it.

        Args:
            name: which lock: they do not know of each other.
            wait_s: how long to wait for whoever holds it.

        Raises:
            LockedError: another build holds it.
        """

    def live_locks(self) -> list[str]:
        """The names of the locks that somebody holds."""

    def explained(self, name: str) -> AbstractContextManager[None]:
        """Raises an OSError from its body as a StorageError that says what to do about `name`."""


def open_storage(out: str | os.PathLike[str]) -> Storage:
    """OUT: a folder, or s3://bucket/path and the like on an object store.

    Raises:
        StorageError: no such store, or its client is not installed.
    """
    text = os.fspath(out)
    url = _URL.match(text)
    if url is None or (url[1] == "file" and url[2]):
        return LocalStorage(text.removeprefix("file://"))
    from .objects import PACKAGES, ObjectStorage

    if url[2]:
        return ObjectStorage(text)
    if url[1] in PACKAGES:
        raise StorageError(f"OUT {text!r} lacks a slash, as pathlib.Path leaves it; give {url[1]}://... as a str")
    return LocalStorage(text)


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether this names a place on an object store rather than a path."""
    url = _URL.match(os.fspath(place))
    return url is not None and bool(url[2]) and url[1] != "file"


class LocalStorage:
    """OUT as a folder of a local or shared filesystem. Names are relative to it, POSIX."""

    _count = itertools.count()

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self._made: list[str] = []

    def path(self, name: str) -> str:
        """The path of a file under its final name."""
        return os.path.join(self.root, name)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None if there is none."""
        with self.explained(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(self.path(name)).st_size
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if there is none."""
        with (
            self.explained(name),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            open(self.path(name), "rb", opener=open_regular) as file,
        ):
            return file.read()
        return None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[str]:
        """The path of a file, to be opened within the body."""
        yield self.path(name)

    def names(self, folder: str = "") -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if there is no such folder."""
        with self.explained(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(self.path(folder)))
        return []

    def is_folder(self, name: str) -> bool:
        """Whether this is a folder in OUT; a link to one, which leads elsewhere, is not."""
        return os.path.isdir(self.path(name)) and not os.path.islink(self.path(name))

    def temporary(self, name: str) -> str:
        """The path of a new temporary file beside `name`, whose folder exists from now on."""
        folder, base = os.path.split(self.path(name))
        with self.explained(name):
            os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f".{base}.{os.getpid()}-{next(self._count)}.tmp")

    def publish(self, temporary: str, name: str) -> None:
        """Gives a temporary file, already flushed to the disk, its final name."""
        with self.explained(name):
            os.rename(temporary, self.path(name))
            self._flush_folder(os.path.dirname(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in one step: it is there whole or not at all."""
        temporary = self.temporary(name)
        try:
            with self.explained(name), open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.publish(temporary, name)
        except BaseException:
            self.discard(temporary)
            raise

    def discard(self, temporary: str) -> None:
        """Removes a temporary file, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def remove(self, name: str) -> None:
        """Removes a file or an empty folder, if it is there."""
        path = self.path(name)
        with self.explained(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)

    def remove_temporaries(self, folder: str) -> None:
        """Removes what killed builds left unfinished in a folder. Only for the holder of the lock."""
        for name in self.names(folder):
            if _TEMPORARY.fullmatch(name):
                self.remove(os.path.join(folder, name))

    @contextlib.contextmanager
    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> Iterator[FileLock]:
        """Holds OUT for one build, or a part of it; `locks.py` has the rules.

        Args:
            name: which lock: they do not know of each other.
            wait_s: how long to wait for whoever holds it.

        Raises:
            LockedError: another build holds it.
            StorageError: OUT cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with self.explained(f"{PRIVATE}/{name}"):
                held = stack.enter_context(FileLock(self.path(f"{PRIVATE}/{name}"), self.root, wait_s, self._made))
            yield held

    def live_locks(self) -> list[str]:
        """The names of the locks that somebody holds."""
        found = (name for name in self.names(PRIVATE) if name == LOCK or name.startswith(f"{LOCK}-"))
        return [name for name in found if is_live(self.path(f"{PRIVATE}/{name}"))]

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Raises an OSError from its body as a StorageError that says what to do about `name`."""
        try:
            yield
        except OSError as exc:
            advice = _ADVICE.get(exc.errno or 0, "see to the disk, then run the same command to resume")
            raise StorageError(f"{self.path(name)!r}: {exc.strerror or exc}; {advice}") from exc

    @staticmethod
    def _flush_folder(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | bytes | os.PathLike[str], flags: int) -> int:
    """Opens a file as `os.open` does, without waiting; raises OSError for pipes, devices and sockets."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")
