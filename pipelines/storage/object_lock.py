"""Locks on object stores, which have no kernel to drop the lock of a process that died: each has a heartbeat.

Three kinds of object, each written in one put:

    .gpu-npz/lock           a holder (holders.py), made only if there is none (If-None-Match)
    .gpu-npz/beat-<token>   a number that the holder counts up every HEARTBEAT_S
    .gpu-npz/claim-<token>  made only if there is none: the right to end that holder's lock

A lock is stale if its holder was a process of this system that is gone, or if its heartbeat stays the same for STALE_S
while a waiter watches it by its own monotonic clock; clocks of two machines are never compared. Of several waiters the
one that makes the claim puts its own lock in the place of the stale one. A holder that was only slow finds another's
token there, and publishes nothing more.

Some servers ignore If-None-Match. That is noticed; then the lock is read again after SETTLE_S, and the last to write
has it. Two could hold such a lock only if a put took longer, and one of them would notice at its next heartbeat.
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
_DOUBT_S = 1.0  # before it is said that something is waited for


class Objects(Protocol):
    """What a lock needs of an object store."""

    root: str

    def path(self, name: str) -> str:
        """The URL of an object."""

    def read(self, name: str) -> bytes | None:
        """Its content, None if there is none."""

    def put(self, name: str, content: bytes) -> None:
        """Writes it in one step."""

    def create(self, name: str, content: bytes) -> bool:
        """Writes it in one step if there is none, and says whether that is so."""

    def creates_once(self, name: str) -> bool:
        """Whether `create` is one step here; if not, two may be told that they made it. `name` is there and is ours."""

    def delete(self, name: str, content: bytes | None = None) -> None:
        """Removes it, if it is there and, if given, has this content."""


class Lease:
    """The lock of one object. Use as a context manager, which gives the lock's token.

    Args:
        store: where it lies.
        name: the object.
        wait_s: how long to wait for a holder that lives. To see whether it does takes up to HEARTBEAT_S more, or
            STALE_S if it does not.

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
        self._store.put(self._beside("beat", self._token), b"0")
        try:
            self._take()
        except BaseException:
            self._store.delete(self._beside("beat", self._token))
            raise
        self._heart.start()
        return self._token

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._heart.join()
        with contextlib.suppress(StorageError):  # what stays is taken over when it is stale
            claim = self._beside("claim", self._token)
            if self._store.create(claim, self._content):
                self._store.delete(self._name, self._content)
                self._store.delete(claim)
            self._store.delete(self._beside("beat", self._token))

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(heartbeats.HEARTBEAT_S):
            with contextlib.suppress(StorageError):  # the next beat may come through
                if self._store.read(self._name) != self._content:
                    return
                number += 1
                self._store.put(self._beside("beat", self._token), str(number).encode())

    def _take(self) -> None:
        """Returns once the lock is ours. Raises LockedError as the class says."""
        start, warned = time.monotonic(), False
        watched: bytes | None = None
        while (content := self._create()) is not None:
            holder = Holder.parse(content)
            if not holder.token:
                raise LockedError(self._refusal(holder))
            beat = self._store.read(self._beside("beat", holder.token))
            if content != watched:
                watched, watch, claimed = content, HeartbeatWatch(beat), False
            watch.look(beat)
            stale = watch.stale
            if stale or holder.gone:
                if self._taken_over(content, beat, holder.token):
                    log.warning("%s: taken over from process %s, which is gone", self._store.root, holder.process)
                    return
                if stale and claimed:  # for another STALE_S, and it is still the same lock: the claimer died, too
                    self._store.delete(self._beside("claim", holder.token))
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
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # not in step with other waiters

    def _create(self) -> bytes | None:
        """Creates the lock if there is none. Returns None once it is ours, else the content of another's."""
        while True:
            if self._store.create(self._name, self._content) and self._settled():
                return None
            content = self._store.read(self._name)
            if content == self._content:  # the answer to our own put was lost
                return None
            if content is not None:
                return content

    def _taken_over(self, content: bytes, beat: bytes | None, token: str) -> bool:
        """Puts our lock in the place of a stale one; False if another waiter is about to, or its holder lives."""
        claim, heart = self._beside("claim", token), self._beside("beat", token)
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
        """Whether an object that was just made stays ours; at once where the store makes it only if there is none."""
        if self._store.creates_once(self._beside("beat", self._token)):
            return True
        time.sleep(SETTLE_S)
        return self._store.read(name or self._name) == self._content

    def _beside(self, kind: str, token: str) -> str:
        return f"{self._name.rpartition('/')[0]}/{kind}-{token}"

    def _refusal(self, holder: Holder) -> str:
        place = self._store.path(self._name)
        rest = "" if holder.token else f"; if no build is at work, delete {place!r}"
        return (
            f"{self._store.root!r} is in use by process {holder.process or '?'} on host "
            f"{holder.host or '?'} ({place!r}); wait for it, or stop it and run the same command{rest}"
        )


def is_live(content: bytes | None) -> bool:
    """Whether a lock's content names a holder that may live: all but processes of this system that are gone."""
    return content is not None and not Holder.parse(content).gone


def leftovers(store: Objects, folder: str, names: list[str]) -> list[str]:
    """Heartbeats and claims in a folder that belong to no lock there."""
    tokens = {Holder.parse(store.read(f"{folder}/{name}")).token for name in names if name.startswith("lock")}
    ours = [name.partition("-") for name in names]
    return ["".join(name) for name in ours if name[0] in ("beat", "claim") and name[2] not in tokens]
