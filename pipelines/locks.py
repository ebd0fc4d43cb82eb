"""Locks as files in OUT, on local disks and on filesystems that several hosts share.

A lock file names its holder's host and process, and counts heartbeats. The rule for one that is left over:

- Its host is this one: the kernel's flock decides, which ends with the process.
- Its host is another one, whose flock may not reach this host: it is watched. When its heartbeat changes, it is alive,
  and who will not wait gives up; when it has not changed for STALE_S by the watcher's own clock, it is dead: clocks of
  two hosts are never compared. Then its file is renamed away, which one of several waiters can do, and a new one made.

A lock file is there with its content or not at all: it is written under another name and linked. A holder that finds
another file in its place has been taken for dead (its host slept, say), and must publish nothing any more.

Folders that were made for a lock are removed with it if nothing else is in them, so that a build that was refused
leaves no empty OUT.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass

from .errors import LockedError

log = logging.getLogger(__name__)
HEARTBEAT_S = 10.0
STALE_S = 90.0
_LOOK_S = 0.2
_LINGER_S = 5.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_count = itertools.count()


@dataclass(frozen=True)
class Holder:
    """Who a lock file names; empty and 0 where it names nobody."""

    host: str
    process: int
    beat: int

    @classmethod
    def read(cls, descriptor: int) -> Holder:
        """What a lock file says."""
        try:
            values = json.loads(os.pread(descriptor, 4096, 0))
            return cls(str(values["host"]), int(values["process"]), int(values.get("beat", 0)))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls("", 0, 0)

    @property
    def elsewhere(self) -> bool:
        """Whether it is on another host."""
        return self.host not in ("", socket.gethostname())

    def write(self, descriptor: int) -> None:
        """Makes a lock file say this, in one write of a length that never shrinks."""
        text = json.dumps({"host": self.host, "process": self.process, "beat": self.beat})
        os.pwrite(descriptor, text.encode(), 0)


class FileLock:
    """The lock of one file. Use as a context manager; `require_held` says whether it still is.

    Args:
        path: the lock file.
        root: what is locked, for messages.
        wait_s: how long to wait for whoever holds it. To see whether a holder on another host lives takes HEARTBEAT_S
            or more, STALE_S if it does not.
        made: the folders that locks of this OUT have made, outer ones first; this one may be the last to need them.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str, root: str, wait_s: float, made: list[str]) -> None:
        self._path = path
        self._root = root
        self._wait_s = wait_s
        self._made_folders = made
        self._descriptor = -1
        self._lost = False
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="gpu-npz-lock", daemon=True)

    def __enter__(self) -> FileLock:
        try:
            self._descriptor = self._taken()
        except BaseException:
            self._remove_folders()
            raise
        self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._heart.join()
        if self._is_ours():  # before the descriptor is closed: only the holder removes it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        os.close(self._descriptor)
        self._remove_folders()

    def require_held(self) -> None:
        """Raises LockedError if another process has taken the lock for dead."""
        if self._lost:
            raise LockedError(
                f"{self._root!r}: {os.path.basename(self._path)!r} was taken over by another host, to which this one "
                "seemed dead; run the same command again to see what is left"
            )

    def _taken(self) -> int:
        deadline = time.monotonic() + self._wait_s
        watched: tuple[Holder, float] | None = None  # a holder, and since when its heart has not beaten
        alive = False
        while True:
            descriptor = self._made()
            if descriptor is not None:
                return descriptor
            with contextlib.ExitStack() as stack:
                try:
                    descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                stack.callback(os.close, descriptor)
                holder = Holder.read(descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = False
                except BlockingIOError:
                    held = True
                if not held and not holder.elsewhere and self._is_at_path(descriptor):
                    self._own().write(descriptor)
                    os.ftruncate(descriptor, os.pread(descriptor, 4096, 0).find(b"}") + 1)
                    stack.pop_all()
                    return descriptor
            if watched is None or watched[0] != holder:
                alive = watched is not None
                if holder.elsewhere and not held and not alive:
                    log.warning(
                        "%r is held by process %s on host %s; looking for up to %g s whether it lives",
                        self._path, holder.process, holder.host, STALE_S,
                    )  # fmt: skip
                watched = (holder, time.monotonic())
            silent_s = time.monotonic() - watched[1]
            # A worker that a killed build was just starting has its lock until the worker's program runs.
            lingers = held and not holder.elsewhere and is_gone(holder.process) and silent_s < _LINGER_S
            if not lingers and time.monotonic() >= deadline and (held or (holder.elsewhere and alive)):
                raise LockedError(self._refusal(holder))
            if holder.elsewhere and not held and silent_s >= STALE_S:
                self._remove_dead(holder)
                continue
            time.sleep(0.01 if lingers else _LOOK_S)

    def _made(self) -> int | None:
        """A new lock file, already locked; None if there is one."""
        self._make_folders()
        temporary = self._beside("new")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another holder has just removed the folder, which was empty
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._own().write(descriptor)
            os.link(temporary, self._path)
        except (FileExistsError, FileNotFoundError):  # the latter: the holder has tidied up
            os.close(descriptor)
            return None
        except OSError as exc:
            os.close(descriptor)
            if exc.errno not in _NO_LINKS:
                raise
            return self._made_without_links()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return descriptor

    def _made_without_links(self) -> int | None:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._own().write(descriptor)
            return descriptor
        return None

    def _make_folders(self) -> None:
        missing, folder = [], os.path.dirname(self._path)
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                os.mkdir(folder)
                self._made_folders.append(folder)

    def _remove_folders(self) -> None:
        while self._made_folders:
            try:
                os.rmdir(self._made_folders[-1])
            except FileNotFoundError:
                pass
            except OSError:  # something is in it
                return
            self._made_folders.pop()

    def _beside(self, what: str) -> str:
        """A name for a moment, which `LocalStorage.remove_temporaries` knows for one."""
        folder, base = os.path.split(self._path)
        return os.path.join(folder, f".{base}.{what}.{socket.gethostname()}.{os.getpid()}-{next(_count)}.tmp")

    def _remove_dead(self, holder: Holder) -> None:
        aside = self._beside("dead")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return  # another waiter was faster
        with contextlib.ExitStack() as stack:
            stack.callback(os.unlink, aside)
            descriptor = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if Holder.read(descriptor) != holder:  # the faster one's new lock: back with it
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)

    def _beat(self) -> None:
        beats = itertools.count(1)
        while not self._over.wait(HEARTBEAT_S):
            if not self._is_ours():
                self._lost = True
                return
            with contextlib.suppress(OSError):  # the next beat may come through
                self._own(next(beats)).write(self._descriptor)

    def _own(self, beat: int = 0) -> Holder:
        return Holder(socket.gethostname(), os.getpid(), beat)

    def _is_ours(self) -> bool:
        """Whether the file at the path is ours, or that cannot be seen at the moment."""
        try:
            return self._is_at_path(self._descriptor)
        except OSError:
            return True

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self._root!r} is in use by process {holder.process or '?'} on host {holder.host or '?'}; wait for it, "
            "or stop it and run the same command"
        )


def is_live(path: str) -> bool:
    """Whether somebody holds a lock file: on this host by the kernel's word, on another one by its being there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        if Holder.read(descriptor).elsewhere:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_gone(process: int) -> bool:
    """Whether this host has no process of that number."""
    with contextlib.suppress(PermissionError):  # somebody else's, so it is there
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
    return False
