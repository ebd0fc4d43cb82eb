"""Opens an NPZ of this format as a memory map: arrays without a copy, rows without reading or inflating the rest."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import IsalError, crc32, decompressobj
from numpy.typing import NDArray

from ..errors import FormatError
from ..storage.base import open_regular
from .format import DEFLATE_END, Directory, Member, npy_header, read_directory, rowindex

_PIECE_BYTES = 1 << 22
_RAW = -15  # zlib's windowBits for a stream without header and checksum
_FLUSHED = b"\0\0\xff\xff"  # how a full flush ends: an empty stored block


class DeflatedRows:
    """The rows of a deflated array. Each is inflated when it is asked for, on its own.

    Attributes:
        shape, dtype: as of the array.
    """

    def __init__(self, member: Member, runs: memoryview, ends: NDArray[np.int64], path: str) -> None:
        self.shape, self.dtype = member.shape, member.dtype
        self._runs = runs
        self._ends = ends
        self._row_bytes = member.dtype.itemsize * math.prod(member.shape[1:])
        self._path, self._name = path, member.name

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, rows: int | slice) -> NDArray[Any]:
        """A row, or rows of a slice, as an array of their own."""
        span = range(len(self))[rows]
        numbers = span if isinstance(span, range) else (span,)
        out = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for place, row in enumerate(numbers):
            self.read(row, out[place])
        return out if isinstance(span, range) else out[0]

    def read(self, row: int, out: NDArray[Any]) -> None:
        """Inflates row number `row` (0 to N - 1) into `out`, an array of its shape.

        Raises:
            FormatError: its bytes are damaged.
        """
        out[...] = np.frombuffer(self.inflated(row), self.dtype).reshape(self.shape[1:])

    def inflated(self, row: int) -> bytes:
        """The bytes of one row. Raises FormatError as `read`."""
        run = self._runs[self._ends[row] : self._ends[row + 1]]
        stream = decompressobj(_RAW)
        try:
            data: bytes = stream.decompress(run, self._row_bytes + 1)  # never more, whatever the run would give
            whole = not (stream.eof or stream.unconsumed_tail) and run[-4:] == _FLUSHED
            # Where no block has begun, the final one ends the stream: read in one go, the next row begins there, too.
            whole = whole and not stream.decompress(DEFLATE_END, 1) and stream.eof
        except IsalError as exc:  # type: ignore[misc]  # isal is not looked into
            raise FormatError(f"{self._name}: row {row} is damaged ({exc}); copy the file again", self._path) from exc
        if len(data) != self._row_bytes or not whole:
            raise FormatError(
                f"{self._name}: row {row} is damaged (not {self._row_bytes} bytes); copy the file again", self._path
            )
        return data


RowArray = NDArray[Any] | DeflatedRows


@dataclass(frozen=True)
class CachedDirectory:
    """What a reader has found in a file, and which file that was: device, inode, size and time of its last change."""

    identity: tuple[int, int, int, int]
    directory: Directory


class NpzReader:
    """One file, mapped copy-on-write: what its arrays' views change stays in memory.

    The map lives as long as any array taken from it. It needs no closing, and holds one file descriptor before
    Python 3.13, none from then on.

    Args:
        path: the file.
        before: what another reader of it has found, which is believed unless the file has changed since.

    Raises:
        FormatError: the file is damaged, cut off or not of this format.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], before: CachedDirectory | None = None) -> None:
        self.path = os.fspath(path)
        descriptor = open_regular(self.path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if not status.st_size:
                raise FormatError("the file is empty; build or copy it again", self.path)
            untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY, **untracked)
        finally:
            os.close(descriptor)
        self._buffer = memoryview(self._map)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        same = before is not None and before.identity == identity
        self.known = before if before and same else CachedDirectory(identity, read_directory(self._buffer, self.path))
        self.directory = self.known.directory
        self._rows: dict[str, RowArray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.directory.members

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The array `name`, a view of the map; raises FormatError if it is deflated."""
        member = self._member(name)
        if member.runs_bytes is not None:
            raise FormatError(f"{name} is deflated, which no view can show; it is read by rows", self.path)
        count = math.prod(member.shape)
        if not count or not member.dtype.itemsize:
            return np.empty(member.shape, member.dtype)
        return np.frombuffer(self._map, member.dtype, count, member.data_offset).reshape(member.shape)

    def get(self, name: str) -> NDArray[Any] | None:
        """The array `name`, None if there is none."""
        return self[name] if name in self else None

    def rows(self, name: str) -> RowArray:
        """The rows of array `name`: a view of the map, or what inflates them.

        Raises:
            FormatError: there is no such array, or where its rows lie is damaged.
        """
        if name not in self._rows:  # kept: to make a view again costs more than to take a row of it
            member = self._member(name)
            self._rows[name] = self[name] if member.runs_bytes is None else self._deflated(member, member.runs_bytes)
        return self._rows[name]

    def _deflated(self, member: Member, runs_bytes: int) -> DeflatedRows:
        name, ends = member.name, self[rowindex(member.name)]
        if (
            ends.dtype != np.int64
            or ends.shape != (member.shape[0] + 1,)
            or (ends[0], ends[-1]) != (0, runs_bytes - len(DEFLATE_END))
            or (ends[1:] < ends[:-1]).any()  # a difference could overflow
        ):
            raise FormatError(f"{rowindex(name)} does not fit {name}; copy the file again", self.path)
        return DeflatedRows(member, self._buffer[member.data_offset : member.end], ends, self.path)

    def crc_matches(self, name: str) -> bool:
        """Reads the whole member and compares its CRC-32 with the directory's.

        Raises:
            FormatError: rows of a deflated member are damaged.
        """
        member = self._member(name)
        crc = crc32(npy_header(member.dtype, member.shape))
        for piece in self._pieces(member):
            crc = crc32(piece, crc)
        return crc == member.crc32

    def _pieces(self, member: Member) -> Iterator[memoryview | bytes]:
        rows = self.rows(member.name)
        if isinstance(rows, DeflatedRows):
            yield from map(rows.inflated, range(len(rows)))
            if self._buffer[member.end - len(DEFLATE_END) : member.end] != DEFLATE_END:
                raise FormatError(f"the end of {member.name} is damaged; copy the file again", self.path)
        else:
            for position in range(member.data_offset, member.end, _PIECE_BYTES):
                yield self._buffer[position : min(position + _PIECE_BYTES, member.end)]

    def _member(self, name: str) -> Member:
        try:
            return self.directory.members[name]
        except KeyError:
            held = ", ".join(self.directory.members)
            raise FormatError(f"no array {name!r}; it holds {held}", self.path) from None
