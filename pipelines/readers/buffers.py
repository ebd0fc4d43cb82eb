"""Memory for batches, which is used again as soon as nobody holds a batch in it: fresh memory costs page faults."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def fresh(size: int) -> Bytes:
    """A new buffer of so many bytes."""
    return np.empty(size, np.uint8)


def _always(_: Bytes) -> bool:
    return True


def _references(buffer: Bytes) -> int:
    return sys.getrefcount(buffer)


def _own_references() -> int:
    """What `_references` returns for an array that only a local variable of its caller holds."""
    buffer = np.empty(1, np.uint8)
    return _references(buffer)


class Buffers:
    """Lends memory for batches. What was lent comes back by itself when the last array in it is gone.

    Every view of an array, and every tensor that shares its memory, holds a reference to the array that owns the
    memory. A buffer with no reference but this object's is free. If none is free, a new one is made, so an array never
    changes while somebody holds it. Threads may share an object. Pickled, it is empty.

    Args:
        kept: how many buffers are kept. If more are in use, the oldest are left to their users.
        make: makes a buffer of so many bytes.
        is_free: whether a buffer that this process no longer uses is free everywhere.
    """

    def __init__(
        self,
        kept: int,
        make: Callable[[int], Bytes] = fresh,
        is_free: Callable[[Bytes], bool] = _always,
    ) -> None:
        self._buffers: deque[Bytes] = deque(maxlen=kept)
        self._make = make
        self._is_free = is_free

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, (self._buffers.maxlen, self._make, self._is_free)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of this shape and dtype with arbitrary content."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._free(size)[:size].view(dtype).reshape(shape)

    def _free(self, size: int) -> Bytes:
        for _ in range(len(self._buffers)):
            try:
                buffer = self._buffers.popleft()  # now no other thread finds it
            except IndexError:
                break
            free = _references(buffer) == _OWN and self._is_free(buffer)
            if free and len(buffer) < size:
                continue
            self._buffers.append(buffer)
            if free:
                return buffer
        buffer = self._make(size)
        self._buffers.append(buffer)
        return buffer


_OWN = _own_references()
