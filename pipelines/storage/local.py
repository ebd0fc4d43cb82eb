"""OUT as a folder. `LocalStorage` writes, publishes, locks and removes every file there.

A file under its final name is complete: it is written under a temporary name in the same folder, flushed to the disk
and renamed, and then the folder is flushed, too.

A process that works under a lock, because it took the lock or because it is a worker with the lock's `Fence`, changes
nothing once the lock is lost. The rule is in README.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from ..errors import LockedError, StorageError
from .base import LOCK, open_regular
from .file_lock import FileLock, is_live
from .holders import PRIVATE, Fence, Holder, fenced, require_held
from .names import TemporaryName, create, move_aside, put_back, temporary_name

_ADVICE = {
    errno.ENOSPC: "free some space, then run the same command to resume",
    errno.EDQUOT: "free some of your quota, then run the same command to resume",
    errno.EFBIG: "choose a smaller --shard-size or raise the file size limit (ulimit -f)",
    errno.EACCES: "make it writable or choose another OUT",
    errno.EPERM: "make it writable or choose another OUT",
    errno.EROFS: "the filesystem is read-only; choose another OUT",
    errno.ENOTDIR: "OUT must be a folder; choose another OUT",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class LocalStorage:
    """OUT as a folder of a local or shared filesystem. Names are relative to it, POSIX.

    Args:
        root: the folder.
        under: as for `open_storage`.
        called: what messages call the folder.
    """

    def __init__(self, root: str | os.PathLike[str], under: Fence | None = None, *, called: str = "OUT") -> None:
        self.root = os.path.abspath(root)
        self._called = called
        self._made: list[str] = []
        self._fences = [under] if under else []

    @property
    def fence(self) -> Fence | None:
        """The lock taken last, for workers that work under it; None without a lock."""
        return self._fences[-1] if self._fences else None

    def path(self, name: str) -> str:
        """The path of a file under its final name."""
        return os.path.join(self.root, name)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        with self.explained(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(self.path(name)).st_size
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        with (
            self.explained(name),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            open(self.path(name), "rb", opener=open_regular) as file,
        ):
            return file.read()
        return None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[str]:
        """The path of a file, to be opened in the body."""
        yield self.path(name)

    def names(self, folder: str = "") -> list[str]:
        """The names of files and folders in a folder, sorted; empty if the folder does not exist."""
        with self.explained(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(self.path(folder)))
        return []

    def is_folder(self, name: str) -> bool:
        """Whether this is a folder in OUT; a symbolic link to a folder is not."""
        return os.path.isdir(self.path(name)) and not os.path.islink(self.path(name))

    def temporary(self, name: str) -> str:
        """The path of a new temporary file in the folder of `name`, which is created if necessary."""
        path = self.path(name)
        with self.explained(name):
            if not os.path.isdir(os.path.dirname(path)):
                self.require_held()
                os.makedirs(os.path.dirname(path), exist_ok=True)
        return temporary_name(path, self._owner)

    def publish(self, temporary: str, name: str) -> None:
        """Moves a temporary file, already flushed to the disk, to its final name.

        Under a lock, an existing file is replaced only while the lock is held, and the new file is removed again if the
        lock is lost afterwards.
        """
        with self.explained(name):
            if self._fences:
                self._publish_held(temporary, self.path(name))
            else:
                os.rename(temporary, self.path(name))
            self._flush_folder(os.path.dirname(self.path(name)))

    def _publish_held(self, temporary: str, path: str) -> None:
        aside, own = temporary_name(path, self._owner, "old"), _identity(temporary)
        moved = False
        try:
            self.require_held()
            while True:
                try:
                    create(temporary, path)
                    break
                except FileExistsError:
                    if _identity(path) == own:  # over NFS, the response to a successful link may be lost
                        break
                moved = move_aside(path, aside) or moved
                self.require_held()
        except BaseException:
            if moved:
                put_back(aside, path)
            raise
        try:
            self.require_held()
        except LockedError:
            self._remove(path, lambda moved: _identity(moved) == own)
            raise
        self.discard(aside)
        self.discard(temporary)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file atomically."""
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
        """Removes a temporary file if it exists."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def remove(self, name: str) -> None:
        """Removes a file or an empty folder if it exists."""
        path = self.path(name)
        self.require_held()
        with self.explained(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.isdir(path) and not os.path.islink(path):
                os.rmdir(path)
            elif self._fences:
                self._remove(path, self._is_allowed)
            else:
                os.unlink(path)

    def _is_allowed(self, _: str) -> bool:
        self.require_held()
        return True

    def _remove(self, path: str, is_right: Callable[[str], bool]) -> None:
        """Removes a file if `is_right` accepts it after it was moved aside; else puts it back."""
        aside, right = temporary_name(path, self._owner, "old"), False
        if move_aside(path, aside):
            try:
                right = is_right(aside)
            finally:
                with contextlib.suppress(FileNotFoundError):  # a new holder has cleaned up
                    if right:
                        os.unlink(aside)
                    else:
                        put_back(aside, path)

    def remove_temporaries(self, folder: str) -> None:
        """Removes unfinished files of this build and of killed ones from a folder, but not those of other held locks.

        Only for the holder of a lock, while nothing else works under it.
        """
        found = {name: file for name in self.names(folder) if (file := TemporaryName.of(name))}
        own = {fence.token for fence in self._fences}
        others = {self._holder(lock).token for lock in self.live_locks()} - own if found else set()
        for name, file in found.items():
            if file.owner not in others and (file.owner or not others):
                self._end(folder, name, file)

    def remove_leftovers(self, name: str) -> None:
        """Removes the unfinished parts of a file that a dead worker under our lock left."""
        folder, base = os.path.split(name)
        for other in self.names(folder):
            if (file := TemporaryName.of(other)) and (file.base, file.owner) == (base, self._owner):
                self._end(folder, other, file)

    def _end(self, folder: str, name: str, file: TemporaryName) -> None:
        path = self.path(os.path.join(folder, name))
        with self.explained(name), contextlib.suppress(FileNotFoundError):
            if file.moved:
                put_back(path, os.path.join(os.path.dirname(path), file.base))
            else:
                os.unlink(path)

    @contextlib.contextmanager
    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> Iterator[None]:
        """Holds a lock on OUT for one build, or for a part of one; `file_lock.py` has the rules.

        Args:
            name: of the lock; locks of different names are independent.
            wait_s: how long to wait for another holder.

        Raises:
            LockedError: another build holds the lock, or has taken it over in the meantime.
            StorageError: OUT cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with self.explained(f"{PRIVATE}/{name}"):
                token = stack.enter_context(FileLock(self.path(f"{PRIVATE}/{name}"), self.root, wait_s, self._made))
            with fenced(self, self._fences, Fence(name, token)):
                yield

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""
        require_held(self, self._fences)

    def live_locks(self) -> list[str]:
        """The names of the locks that are held."""
        found = (name for name in self.names(PRIVATE) if name == LOCK or name.startswith(f"{LOCK}-"))
        return [name for name in found if is_live(self.path(f"{PRIVATE}/{name}"))]

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Raises an OSError from its body as a StorageError that names the file and says what to do."""
        try:
            yield
        except OSError as exc:
            advice = _ADVICE.get(exc.errno or 0, "check the disk, then run the same command to resume")
            advice = advice.replace("OUT", self._called)
            raise StorageError(f"{self.path(name)!r}: {exc.strerror or exc}; {advice}") from exc

    def _holder(self, lock: str) -> Holder:
        return Holder.parse(self.read(f"{PRIVATE}/{lock}"))

    @property
    def _owner(self) -> str:
        return self.fence.token if self.fence else ""

    @staticmethod
    def _flush_folder(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: str) -> tuple[int, ...]:
    """Identifies a file, also against a later file with the same inode number; empty if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return ()
