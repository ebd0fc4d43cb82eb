"""Locks on object stores, with heartbeats, since no kernel releases the lock of a dead process there.

There are three kinds of objects, each written in one put:

    .gpu-npz/lock           the holder (holders.py), created only if it does not exist (If-None-Match)
    .gpu-npz/beat-<token>   a number that the holder increments every HEARTBEAT_S
    .gpu-npz/claim-<token>  created only if it does not exist: the right to end that holder's lock

A lock is stale if its holder was a process of this system that no longer exists, or if its heartbeat does not change
for STALE_S (heartbeats.py). The waiter that creates the claim replaces the stale lock by its own. A holder that was
only slow finds another token in the lock, and publishes nothing more.

Some servers ignore If-None-Match. This is detected; then the lock is read again after SETTLE_S, and the last writer
holds it. Two processes can hold such a lock only if a put took longer than that, and one of them notices at its next
heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from typing import Protocol

from ..errors import LockedError, StorageError
from . import heartbeats
from .heartbeats import HeartbeatWatch, warn_of_wait
from .holders import Holder

log = logging.getLogger(__name__)
SETTLE_S = 2.0
_LOOK_S = 0.5
_DOUBT_S = 1.0  # of waiting before it is logged


class Objects(Protocol):
    """The operations of an object store that a lock needs."""

    root: str

    def path(self, name: str) -> str:
        """The URL of an object."""

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""

    def put(self, name: str, content: bytes) -> None:
        """Writes an object in one step."""

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object in one step if it does not exist, and says whether it did."""

    def creates_once(self, name: str) -> bool:
        """Whether `create` is atomic; if not, two callers may both succeed. `name` is an existing object of ours."""

    def delete(self, name: str, content: bytes | None = None) -> None:
        """Removes an object if it exists and, if given, has this content."""


class Lease:
    """A lock object. Use as a context manager, which returns the lock's token.

    Args:
        store: the object store.
        name: of the lock object.
        wait_s: how long to wait for a live holder. Finding out whether it is alive takes up to HEARTBEAT_S more, or
            STALE_S if it is dead.

    Raises:
        LockedError: another process holds it.
        StorageError: the store cannot be used.
    """

    def __init__(self, store: Objects, name: str, wait_s: float = 0.0) -> None:
        self._store = store
        self._name = name
        self._wait_s = wait_s
        own = Holder.own()
        self._token = own.token
        self._content = own.to_json()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="gpu-npz-lease", daemon=True)

    def __enter__(self) -> str:
        self._store.put(self._sibling("beat", self._token), b"0")
        try:
            self._take()
        except BaseException:
            self._store.delete(self._sibling("beat", self._token))
            raise
        self._heart.start()
        return self._token

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._heart.join()
        with contextlib.suppress(StorageError):  # what remains is taken over once it is stale
            claim = self._sibling("claim", self._token)
            if self._store.create(claim, self._content):
                self._store.delete(self._name, self._content)
                self._store.delete(claim)
            self._store.delete(self._sibling("beat", self._token))

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(heartbeats.HEARTBEAT_S):
            with contextlib.suppress(StorageError):  # the next beat may succeed
                if self._store.read(self._name) != self._content:
                    return
                number += 1
                self._store.put(self._sibling("beat", self._token), str(number).encode())

    def _take(self) -> None:
        """Returns once the lock is ours. Raises LockedError if it is another's."""
        start, warned = time.monotonic(), False
        watched: bytes | None = None
        while (content := self._create()) is not None:
            holder = Holder.parse(content)
            if not holder.token:
                raise LockedError(self._refusal(holder))
            beat = self._store.read(self._sibling("beat", holder.token))
            if content != watched:
                watched, watch, claimed = content, HeartbeatWatch(beat), False
            watch.look(beat)
            stale = watch.stale
            if stale or holder.gone:
                if self._taken_over(content, beat, holder.token):
                    log.warning("%s: taken over from process %s, which is gone", self._store.root, holder.process)
                    return
                if stale and claimed:  # the lock did not change for another STALE_S: the claimer died, too
                    self._store.delete(self._sibling("claim", holder.token))
                if stale:
                    claimed = not claimed
                    watch.restart()
            waited_s = time.monotonic() - start
            if watch.alive and waited_s >= self._wait_s:
                raise LockedError(self._refusal(holder))
            if waited_s > _DOUBT_S and not warned:
                warned = True
                warn_of_wait(self._store.path(self._name), holder)
            pause_s = min(_LOOK_S, heartbeats.HEARTBEAT_S)
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # out of step with other waiters

    def _create(self) -> bytes | None:
        """Creates the lock if there is none. Returns None once it is ours, else the content of another's."""
        while True:
            if self._store.create(self._name, self._content) and self._settled():
                return None
            content = self._store.read(self._name)
            if content == self._content:  # the response to our own put was lost
                return None
            if content is not None:
                return content

    def _taken_over(self, content: bytes, beat: bytes | None, token: str) -> bool:
        """Replaces a stale lock by ours; False if another waiter is doing so, or the holder is alive."""
        claim, heart = self._sibling("claim", token), self._sibling("beat", token)
        if not self._store.create(claim, self._content):
            return False
        try:
            if not self._settled(claim) or (self._store.read(self._name), self._store.read(heart)) != (content, beat):
                return False
            self._store.put(self._name, self._content)
            self._store.delete(heart)
            return self._settled()
        finally:
            if self._store.read(claim) == self._content:
                self._store.delete(claim)

    def _settled(self, name: str | None = None) -> bool:
        """Whether an object that was just created is ours; takes SETTLE_S if the store does not create atomically."""
        if self._store.creates_once(self._sibling("beat", self._token)):
            return True
        time.sleep(SETTLE_S)
        return self._store.read(name or self._name) == self._content

    def _sibling(self, kind: str, token: str) -> str:
        return f"{self._name.rpartition('/')[0]}/{kind}-{token}"

    def _refusal(self, holder: Holder) -> str:
        place = self._store.path(self._name)
        rest = "" if holder.token else f"; if no build is running, delete {place!r}"
        return (
            f"{self._store.root!r} is in use by process {holder.process or '?'} on host "
            f"{holder.host or '?'} ({place!r}); wait for it, or stop it and run the same command{rest}"
        )


def is_live(content: bytes | None) -> bool:
    """Whether the holder that a lock names may be alive; false only for processes of this system that are gone."""
    return content is not None and not Holder.parse(content).gone


def leftovers(store: Objects, folder: str, names: list[str]) -> list[str]:
    """The heartbeats and claims in a folder that belong to no lock there."""
    tokens = {Holder.parse(store.read(f"{folder}/{name}")).token for name in names if name.startswith("lock")}
    ours = [name.partition("-") for name in names]
    return ["".join(name) for name in ours if name[0] in ("beat", "claim") and name[2] not in tokens]
