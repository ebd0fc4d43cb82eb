"""Who holds a lock, and who works under it: the same for locks in folders and on object stores."""

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

PRIVATE = ".gpu-npz"  # the folder in OUT with all that resume and repair need
_LOOKS = 3  # at a lock that is missing: a process that is about to find out that it lost may have moved it for a moment
_LOOK_S = 0.1


@dataclass(frozen=True)
class Fence:
    """The right to change OUT: it lasts as long as a lock names this token."""

    lock: str
    token: str


@dataclass(frozen=True)
class Holder:
    """Who a lock names; empty and 0 where it does not say. `started` tells a process from a later one of its number."""

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
        """What a lock says; also one that an earlier version wrote, which had neither place nor token."""
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
        """Whether its process number is one of this host and container, as far as it says."""
        return self.host in ("", socket.gethostname()) and self.place in ("", place())

    @property
    def gone(self) -> bool:
        """Whether it was a process of this host and container, and is not there any more."""
        if not (self.place and self.here):
            return False
        state, started = _state(self.process)
        return is_gone(self.process) or state in "ZX" or 0 != self.started != started


class Fenced(Protocol):
    """OUT, as far as locks are read in it."""

    @property
    def root(self) -> str:
        """OUT itself."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if there is none."""

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""


def require_held(storage: Fenced, fences: Iterable[Fence]) -> None:
    """Raises LockedError where a lock does not name our token any more: this process was taken for dead."""
    for fence in fences:
        for look in range(_LOOKS):
            holder = Holder.parse(storage.read(f"{PRIVATE}/{fence.lock}"))
            if holder.token == fence.token:
                break
            if holder.host or look == _LOOKS - 1:
                who = (
                    f"process {holder.process} on host {holder.host}"
                    if holder.host
                    else "another build, which has ended since"
                )
                raise LockedError(
                    f"{storage.root!r} was taken over by {who}: this build gave no sign of life for too long, or its "
                    "lock was deleted. It changes nothing more and leaves OUT to the other; wait for that one, or "
                    "give another OUT"
                )
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def fenced(storage: Fenced, fences: list[Fence], fence: Fence) -> Iterator[None]:
    """What a storage does under a lock that it holds, which is among its `fences` for so long.

    Raises:
        LockedError: the lock is lost. What else went wrong is then a consequence.
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
    """Whether this host has no process of that number."""
    with contextlib.suppress(PermissionError):  # somebody else's, so it is there
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return True
    return False


def place() -> str:
    """What process numbers count in: this start of the system, and the container in it; "" where no Linux says so."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _state(process: int) -> tuple[str, int]:
    """A process's state letter and its start in clock ticks since the boot, by proc(5); "?" and 0 if nothing says."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
        return values[0].decode(), int(values[19])
    except (OSError, IndexError, ValueError):
        return "?", 0
