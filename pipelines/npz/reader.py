"""Opens an NPZ of this format as a memory map: arrays without a copy, rows without reading the rest."""

from __future__ import annotations

import math
import mmap
import os
import sys
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from ..errors import FormatError
from ..storage import open_regular
from .format import NPY_HEADER_BYTES, Directory, Member, read_directory

_PIECE_BYTES = 1 << 22


class NpzReader:
    """One file, mapped copy-on-write: what its arrays' views change stays in memory.

    The map lives as long as any array taken from it. It needs no closing, and holds one file descriptor before
    Python 3.13, none from then on.

    Raises:
        FormatError: the file is damaged, cut off or not of this format.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        descriptor = open_regular(self.path, os.O_RDONLY)
        try:
            if not os.fstat(descriptor).st_size:
                raise FormatError(f"{self.path}: the file is empty; build or copy it again")
            untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY, **untracked)
        finally:
            os.close(descriptor)
        self._buffer = memoryview(self._map)
        self.directory: Directory = read_directory(self._buffer, self.path)

    def __contains__(self, name: str) -> bool:
        return name in self.directory.members

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The array `name`, a view of the map."""
        member = self._member(name)
        count = math.prod(member.shape)
        if not count or not member.dtype.itemsize:
            return np.empty(member.shape, member.dtype)
        return np.frombuffer(self._map, member.dtype, count, member.data_offset).reshape(member.shape)

    def get(self, name: str) -> NDArray[Any] | None:
        """The array `name`, None if there is none."""
        return self[name] if name in self else None

    def crc_matches(self, name: str) -> bool:
        """Reads the whole member and compares its CRC-32 with the directory's."""
        member = self._member(name)
        start, crc = member.data_offset - NPY_HEADER_BYTES, 0
        stop = start + member.npy_bytes
        for position in range(start, stop, _PIECE_BYTES):
            crc = crc32(self._buffer[position : min(position + _PIECE_BYTES, stop)], crc)
        return crc == member.crc32

    def _member(self, name: str) -> Member:
        try:
            return self.directory.members[name]
        except KeyError:
            held = ", ".join(self.directory.members)
            raise FormatError(f"{self.path}: no array {name!r}; it holds {held}") from None
