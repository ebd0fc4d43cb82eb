"""How many bytes the reads that run ahead of a decoder may hold together.

A read that finds no room ends at once, before its bytes come, and its item is read when the decoder wants it. So
nothing waits for room, and memory depends neither on the sizes of images nor on how many are read at once.
"""

from __future__ import annotations

import contextvars
import threading

ROOM_BYTES = 256 << 20


class NoRoomError(Exception):
    """Raised and caught between a source and `with_reads`."""


class Room:
    """The bytes that are left for reads ahead. Threads share it."""

    def __init__(self, room_bytes: int = ROOM_BYTES) -> None:
        self._left = room_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Takes bytes, if so many are left; negative ones are given back."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True


class Share:
    """What one read has taken of a room; in its thread, `reserve` takes more."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def take(self, size: int) -> None:
        """Raises NoRoomError if there is not so much left."""
        if not self._room.take(size):
            raise NoRoomError
        self._size += size

    def give_back(self) -> None:
        """All that it has taken."""
        self._room.take(-self._size)
        self._size = 0


SHARE: contextvars.ContextVar[Share | None] = contextvars.ContextVar("share", default=None)


def reserve(size: int, share: Share | None = None) -> None:
    """Called before bytes come. Raises NoRoomError if this is a read ahead and they are too many.

    `share` is that of the thread unless given: the thread of an event loop has none.
    """
    share = share or SHARE.get()
    if share is not None:
        share.take(size)
