"""Whole shards of remote datasets on a disk, shared by the processes of a machine.

    DIR/DIGEST.npz     a shard, named by the SHA-256 of its directory
    DIR/DIGEST.part    a shard that a process is fetching; the process holds its flock
    DIR/lock           flocked while a process reserves room

A shard gets its final name when it is complete, checked and flushed. A process that needs a shard which another one
fetches waits for its flock. What a killed process left is taken over by the next that fetches this shard, and counts
for the size of the cache until then. Nothing else is ever removed: a cache that evicted shards would fetch all of them
again in each epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator

from ..config import SHARD_UNITS, parse_bytes
from ..errors import FormatError, StorageError, UsageError

log = logging.getLogger(__name__)
_OURS = re.compile(r"[0-9a-f]{64}\.(npz|part)")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class ShardCache:
    """A folder with whole shards.

    Args:
        folder: the folder, which is created if necessary; several datasets may share it.
        limit: the most bytes that shards in it may take; None for no limit but the disk's.

    Attributes:
        folder: its absolute path.
        is_full: whether this process adds nothing any more.

    Raises:
        StorageError: the folder cannot be written, or its filesystem has no flock.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None) -> None:
        self.folder = os.path.abspath(folder)
        self.is_full = False
        self._limit = limit
        try:
            os.makedirs(self.folder, exist_ok=True)
            with self._locked():
                pass
        except OSError as exc:
            raise StorageError(
                f"cache {self.folder!r}: {exc.strerror or exc}; give a folder on a local disk that you may write to"
            ) from exc

    def path(self, digest: str) -> str:
        """The path of a shard with this digest, if it is in the cache."""
        return os.path.join(self.folder, f"{digest}.npz")

    def add(self, digest: str, size: int, fill: Callable[[int, str], None], *, wait: bool) -> bool | None:
        """Adds a shard unless it is there. Once there is no room, a warning says so.

        Args:
            digest: of the shard.
            size: in bytes.
            fill: writes the shard to a file, given its descriptor and its path, and checks it.
            wait: whether to wait for another process that fetches the shard.

        Returns:
            Whether the shard is there now. False means that there is no room; None, that another process fetches it.

        Raises:
            GpuNpzError: from `fill`.
        """
        try:
            while not os.path.exists(self.path(digest)):
                if self.is_full:
                    return False
                part = os.path.join(self.folder, f"{digest}.part")
                os.makedirs(self.folder, exist_ok=True)
                descriptor = os.open(part, _FLAGS, 0o666)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    if _is_at(descriptor, part):
                        self._complete(descriptor, part, digest, size, fill)
                except BlockingIOError:
                    return None
                except FileNotFoundError:  # somebody deleted the file or the folder meanwhile
                    continue
                finally:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may hold the descriptor, too
                    os.close(descriptor)
        except OSError as exc:  # of the disk: `fill` raises those of the store as other errors
            self._give_up(f"{exc.strerror or exc}")
        return os.path.exists(self.path(digest))

    def _complete(self, descriptor: int, part: str, digest: str, size: int, fill: Callable[[int, str], None]) -> None:
        """Fills a file whose flock is held and gives it its final name; else removes it.

        If somebody deletes the file meanwhile, another process may put one of its own in its place, which stays.
        """
        try:
            if not os.path.exists(self.path(digest)) and self._reserve(descriptor, part, size):
                fill(descriptor, part)
                os.fsync(descriptor)
                if _is_at(descriptor, part):
                    os.rename(part, self.path(digest))
        except FormatError:
            if _is_at(descriptor, part):
                raise
        finally:
            if _is_at(descriptor, part):
                os.unlink(part)

    def _reserve(self, descriptor: int, part: str, size: int) -> bool:
        """Gives a file its final size, with which it counts, if there is room for it."""
        os.ftruncate(descriptor, 0)
        with self._locked():
            used = 0
            for entry in os.scandir(self.folder) if self._limit is not None else ():
                with contextlib.suppress(FileNotFoundError):
                    used += entry.stat().st_size if _OURS.fullmatch(entry.name) else 0
            if self._limit is not None and used + size > self._limit:
                self._give_up(f"{used} of {self._limit} bytes are taken")
                return False
            os.ftruncate(descriptor, size)
        return True

    def _give_up(self, why: str) -> None:
        if not self.is_full:
            self.is_full = True
            log.warning(
                "cache %r: %s; the shards that are not there are read from the store by rows; to keep more of them, "
                "give a larger cache_size, or a folder with more space that you may write to",
                self.folder, why,
            )  # fmt: skip

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(os.path.join(self.folder, "lock"), _FLAGS, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def cache_limit(cache: str | os.PathLike[str] | None, cache_size: int | str | None) -> int | None:
    """The limit of a cache in bytes, as `Dataset` takes it; None for no limit.

    Raises:
        UsageError: a size that is not allowed, or a size without a folder.
    """
    if cache_size is None:
        return None
    try:
        limit = parse_bytes(str(cache_size))
    except ValueError as exc:
        units = ", ".join(SHARD_UNITS)
        raise UsageError(
            f"cache_size: got {cache_size!r}; allowed: bytes, or a number with a unit, such as 200GB ({units})"
        ) from exc
    if cache is None:
        raise UsageError(f"cache_size {cache_size!r} without cache: give the folder for the shards, too")
    return limit


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
