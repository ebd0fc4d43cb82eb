"""Locks as files in OUT, on local disks and on shared filesystems.

A lock file names its holder: host, process, boot and container (`place`), and a random token. It contains a heartbeat,
a counter. Whether the holder of an existing lock file is dead is decided as follows:

- If it was a process of this host name, boot and container, by the kernel's flock, which ends with the process. If
  flock does not work here, or the process still exists, by the heartbeat, as in all other cases.
- By the heartbeat: once it changes, the holder is alive, and a process that does not want to wait gives up. If it does
  not change for STALE_S (heartbeats.py), the holder is dead. Then its file is renamed away, which only one of several
  waiters can do, and a new one is created.

If flock fails (ENOSYS, EOPNOTSUPP, ENOLCK), only the heartbeat decides.

A lock file appears with its content: it is written under another name and linked. A holder whose token is no longer in
it was considered dead (if its host was suspended, for example), and must not publish anything more: holders.py.

Folders that were created for a lock are removed with it if they are empty, so that a refused build leaves no empty OUT.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import threading
import time
from dataclasses import replace
from typing import NamedTuple

from ..errors import LockedError
from . import heartbeats
from .heartbeats import HeartbeatWatch, warn_of_wait
from .holders import Holder, is_gone
from .names import create, move_aside, put_back, temporary_name

log = logging.getLogger(__name__)
_LOOK_S = 0.2
_LINGER_S = 5.0
_MOST_VANISHED = 100
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class _OtherLock(NamedTuple):
    """A lock file of another holder; `flocked` says whether its flock is taken."""

    status: os.stat_result
    holder: Holder
    flocked: bool


class FileLock:
    """A lock file. Use as a context manager, which returns the lock's token.

    Args:
        path: the lock file.
        root: what is locked, for messages.
        wait_s: how long to wait for another holder. Finding out whether a holder on another host is alive takes
            HEARTBEAT_S or more, or STALE_S if it is dead.
        made: the folders that locks of this OUT have created, outer ones first; the last lock removes them.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """

    _told = False  # whether the warning that flock does not work was logged

    def __init__(self, path: str, root: str, wait_s: float, made: list[str]) -> None:
        self._path = path
        self._root = root
        self._wait_s = wait_s
        self._made_folders = made
        self._own = Holder.own()
        self._descriptor = -1
        self._vanished = 0  # how often the folder was missing when the file was created
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="gpu-npz-lock", daemon=True)

    def __enter__(self) -> str:
        try:
            self._descriptor = self._take()
        except BaseException:
            self._remove_folders()
            raise
        self._heart.start()
        return self._own.token

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._heart.join()
        if self._is_ours():  # before the descriptor is closed, since only the holder may remove the file
            self._remove(os.fstat(self._descriptor))
        os.close(self._descriptor)
        self._remove_folders()

    def _take(self) -> int:
        """The descriptor of the lock file, once it is ours. Raises LockedError if it is another's."""
        deadline = time.monotonic() + self._wait_s
        watch: HeartbeatWatch | None = None
        while True:
            descriptor = self._create()
            if descriptor is not None:
                return descriptor
            found = self._open()
            if isinstance(found, int):
                return found
            if found is None:
                continue
            holder = found.holder
            if watch is None:
                watch = HeartbeatWatch(holder)
                if not found.flocked and not holder.gone:
                    warn_of_wait(repr(self._path), holder)
            watch.look(holder)
            # A killed build may have been starting a worker, which inherits the flock until its program runs.
            lingers = found.flocked and holder.here and is_gone(holder.process) and watch.silent_s < _LINGER_S
            if not lingers and time.monotonic() >= deadline and (found.flocked or watch.alive):
                raise LockedError(self._refusal(holder))
            if not found.flocked and (holder.gone or watch.stale):
                self._remove(found.status, holder)
                continue
            time.sleep(0.01 if lingers else _LOOK_S)

    def _open(self) -> int | _OtherLock | None:
        """Opens the lock file that is there.

        Returns:
            Its descriptor if it was left over and is now ours, else its holder; None if it no longer exists.
        """
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            stack.callback(os.close, descriptor)
            status, holder = os.fstat(descriptor), _read(descriptor)
            flocked = self._flock(descriptor)
            if flocked is not False and not self._is_at_path(descriptor):
                return None
            if flocked and (holder.gone or (holder.here and not holder.place)):
                _write(descriptor, self._own)
                os.ftruncate(descriptor, len(self._own.to_json()))
                stack.pop_all()
                return descriptor
        return _OtherLock(status, holder, flocked is False)

    def _create(self) -> int | None:
        """Creates a new lock file, already flocked, and returns its descriptor; None if a file exists."""
        self._make_folders()
        temporary = temporary_name(self._path, self._own.token)
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # Another holder may have removed the empty folder; else it is a dangling link, or takes no files (/proc).
            self._vanished += 1
            if self._vanished > _MOST_VANISHED:
                raise
            return None
        try:
            self._flock(descriptor)
            _write(descriptor, self._own)
            create(temporary, self._path)
        except (FileExistsError, FileNotFoundError):  # the latter: the holder has cleaned up
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return descriptor

    def _flock(self, descriptor: int) -> bool | None:
        """Whether flock succeeds; None if the filesystem does not support it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in _NO_FLOCK:
                raise
            if not FileLock._told:
                FileLock._told = True
                log.warning(
                    "the filesystem of %r has no flock (%s): only heartbeats show whether a build is alive, so the "
                    "lock of one that crashed on another host is taken over after %g s",
                    self._root, exc.strerror, heartbeats.STALE_S,
                )  # fmt: skip
            return None
        return True

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
            except OSError:  # not empty
                return
            self._made_folders.pop()

    def _remove(self, status: os.stat_result, holder: Holder | None = None) -> None:
        """Removes a lock file if it is still this file and, if given, still names this holder. A newer file stays."""
        aside = temporary_name(self._path, self._own.token)
        if not move_aside(self._path, aside):
            return  # another waiter was faster
        with contextlib.suppress(FileNotFoundError):  # a new holder has cleaned up
            with open(aside, "rb") as file:
                same = os.path.samestat(os.fstat(file.fileno()), status)
                same = same and holder in (None, Holder.parse(file.read()))
            if same:
                os.unlink(aside)
            else:
                put_back(aside, self._path)

    def _beat(self) -> None:
        beats = itertools.count(1)
        while not self._over.wait(heartbeats.HEARTBEAT_S):
            if not self._is_ours():
                return
            with contextlib.suppress(OSError):  # the next beat may succeed
                _write(self._descriptor, replace(self._own, beat=next(beats)))

    def _is_ours(self) -> bool:
        """Whether the file at the path is ours; also true if that cannot be determined at the moment."""
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
    """Whether a lock file may be held: by its flock if the holder is on this host, else because it exists."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        holder = _read(descriptor)
        if not holder.here:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or flock is not supported
            return not holder.gone
    return bool(holder.place) and not holder.gone


def _read(descriptor: int) -> Holder:
    return Holder.parse(os.pread(descriptor, 4096, 0))


def _write(descriptor: int, holder: Holder) -> None:
    """Overwrites the content of a lock file in one write, whose length never shrinks."""
    os.pwrite(descriptor, holder.to_json(), 0)
