"""A limit on the total size of the reads that run ahead of a decoder.

A prefetch that finds no room fails immediately, before it receives its bytes, and its item is read later, when the
decoder needs it. So nothing waits for room, and memory depends neither on image sizes nor on the number of reads.
"""

from __future__ import annotations

import contextvars
import threading

ROOM_BYTES = 256 << 20


class NoRoomError(Exception):
    """There is no room for a prefetch. Raised in a source; caught where prefetches are started."""


class Room:
    """The bytes left for prefetches. Shared by threads."""

    def __init__(self, room_bytes: int = ROOM_BYTES) -> None:
        self._left = room_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Takes `size` bytes if that many are left, and says whether it did. A negative size gives bytes back."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True


class Share:
    """The part of a room that one prefetch has taken. `reserve`, in the same thread, takes more."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def take(self, size: int) -> None:
        """Takes `size` bytes of the room. Raises NoRoomError if fewer are left."""
        if not self._room.take(size):
            raise NoRoomError
        self._size += size

    def give_back(self) -> None:
        """Gives back all bytes taken."""
        self._room.take(-self._size)
        self._size = 0


SHARE: contextvars.ContextVar[Share | None] = contextvars.ContextVar("share", default=None)


def reserve(size: int, share: Share | None = None) -> None:
    """Called before `size` bytes are received. Raises NoRoomError if this is a prefetch and there is no room for them.

    `share` defaults to the current thread's; an event loop's thread has none.
    """
    share = share or SHARE.get()
    if share is not None:
        share.take(size)
