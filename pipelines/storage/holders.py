"""The holder of a lock, and fencing of those who work under it, for folders and object stores alike."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

from ..errors import GpuNpzError, LockedError, StorageError

PRIVATE = ".gpu-npz"  # the folder in OUT with everything that resume and repair need
_LOOKS = 3  # at a missing lock: a process that is just learning that it lost it may have moved it for a moment
_LOOK_S = 0.1


@dataclass(frozen=True)
class Fence:
    """The right to change OUT, which lasts as long as the lock contains this token."""

    lock: str
    token: str


@dataclass(frozen=True)
class Holder:
    """The holder that a lock names. Unknown fields are empty or 0.

    Attributes:
        host: its host name.
        process: its process number.
        place: the boot and container in which that number is valid; see `place`.
        started: start time of the process, which tells it from a later process with its number.
        token: random, unique for each lock taken.
        beat: the heartbeat, a counter.
    """

    host: str = ""
    process: int = 0
    place: str = ""
    started: int = 0
    token: str = ""
    beat: int = 0

    @classmethod
    def own(cls) -> Holder:
        """This process, with a new token."""
        process = os.getpid()
        return cls(socket.gethostname(), process, place(), _state(process)[1], secrets.token_hex(8))

    @classmethod
    def parse(cls, content: bytes | None) -> Holder:
        """Parses the content of a lock, also one of an earlier version, which had neither place nor token."""
        try:
            values = json.loads(content or b"")
            started, beat = (int(values.get(name, 0)) for name in ("started", "beat"))
            place, token = (str(values.get(name, "")) for name in ("place", "token"))
            return cls(str(values["host"]), int(values["process"]), place, started, token, beat)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def to_json(self) -> bytes:
        """The content of a lock."""
        return json.dumps(asdict(self)).encode()

    @property
    def here(self) -> bool:
        """Whether its process number belongs to this host and container, as far as is known."""
        return self.host in ("", socket.gethostname()) and self.place in ("", place())

    @property
    def gone(self) -> bool:
        """Whether it was a process of this host and container that no longer exists."""
        if not (self.place and self.here):
            return False
        state, started = _state(self.process)
        return is_gone(self.process) or state in "ZX" or 0 != self.started != started


class FencedStorage(Protocol):
    """The part of `Storage` that fencing needs."""

    @property
    def root(self) -> str:
        """OUT itself."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""


def require_held(storage: FencedStorage, fences: Iterable[Fence]) -> None:
    """Raises LockedError if a lock no longer contains our token because this process was considered dead."""
    for fence in fences:
        for look in range(_LOOKS):
            holder = Holder.parse(storage.read(f"{PRIVATE}/{fence.lock}"))
            if holder.token == fence.token:
                break
            if holder.host or look == _LOOKS - 1:
                who = (
                    f"process {holder.process} on host {holder.host}"
                    if holder.host
                    else "another build, which has finished since"
                )
                raise LockedError(
                    f"{storage.root!r} was taken over by {who}: this build did not respond for too long, or its "
                    "lock was deleted. It has stopped and changes nothing more; wait for the other build, or choose "
                    "another OUT"
                )
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def fenced(storage: FencedStorage, fences: list[Fence], fence: Fence) -> Iterator[None]:
    """Runs the body under a lock, with its fence added to the storage's `fences`.

    Raises:
        LockedError: the lock is lost. It replaces other errors of the body, which are then a consequence.
    """
    fences.append(fence)
    try:
        yield
        storage.require_held()
    except LockedError:
        raise
    except GpuNpzError as exc:
        try:
            storage.require_held()
        except LockedError as lost:
            raise lost from exc
        except StorageError:
            pass
        raise
    finally:
        fences.remove(fence)


def is_gone(process: int) -> bool:
    """Whether this host has no process with that number."""
    with contextlib.suppress(PermissionError):  # another user's process, so it exists
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return True
    return False


def place() -> str:
    """The scope of process numbers: the boot of the system, and the container (PID namespace); "" except on Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _state(process: int) -> tuple[str, int]:
    """A process's state letter, and its start in clock ticks since boot (proc(5)); "?" and 0 if unknown."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
        return values[0].decode(), int(values[19])
    except (OSError, IndexError, ValueError):
        return "?", 0
