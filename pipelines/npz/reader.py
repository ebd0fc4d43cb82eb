"""Memory-maps an NPZ of this format: arrays need no copy, and a row is read or inflated without the others."""

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
_RAW = -15  # zlib's windowBits for a stream without a header and a checksum
_FLUSHED = b"\0\0\xff\xff"  # the end of a full flush: an empty stored block


class DeflatedRows:
    """The rows of a deflated array. A row is inflated when it is read, independently of the others.

    Attributes:
        shape: the shape of the array, (N, *row_shape).
        dtype: the dtype of the array.
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
        """Returns a new array: a row, of `row_shape`, or the rows of a slice, (rows, *row_shape).

        Raises:
            FormatError: the bytes of a row are damaged.
        """
        span = range(len(self))[rows]
        numbers = span if isinstance(span, range) else (span,)
        out = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for place, row in enumerate(numbers):
            self.read(row, out[place])
        return out if isinstance(span, range) else out[0]

    def read(self, row: int, out: NDArray[Any]) -> None:
        """Inflates a row into an array.

        Args:
            row: the number of the row, 0 to N - 1.
            out: receives the row; an array of `row_shape`.

        Raises:
            FormatError: the bytes of the row are damaged.
        """
        out[...] = np.frombuffer(self.inflated(row), self.dtype).reshape(self.shape[1:])

    def inflated(self, row: int) -> bytes:
        """Returns the bytes of one row. Raises FormatError if they are damaged."""
        run = self._runs[self._ends[row] : self._ends[row + 1]]
        return inflated(run, self._row_bytes, f"{self._name}: row {row}", self._path)


def inflated(run: memoryview, row_bytes: int, row: str, path: str) -> bytes:
    """Inflates the run of one row.

    Args:
        run: its bytes.
        row_bytes: the size of the row.
        row: the row's name, for the message.
        path: the file, for the message.

    Raises:
        FormatError: the run is damaged.
    """
    stream = decompressobj(_RAW)
    try:
        data: bytes = stream.decompress(run, row_bytes + 1)  # limits memory, whatever the run contains
        whole = not (stream.eof or stream.unconsumed_tail) and run[-4:] == _FLUSHED
        # The final block ends the stream only if the run ends at a block boundary. The next row then begins at
        # the same place when the whole member is inflated at once.
        whole = whole and not stream.decompress(DEFLATE_END, 1) and stream.eof
    except IsalError as exc:  # type: ignore[misc]  # mypy sees isal as untyped
        raise FormatError(f"{row} is damaged ({exc}); copy the file again", path) from exc
    if len(data) != row_bytes or not whole:
        raise FormatError(f"{row} is damaged (not {row_bytes} bytes); copy the file again", path)
    return data


def require_rowindex(ends: NDArray[Any], member: Member, path: str) -> None:
    """Raises FormatError if an array is not the row index of a deflated member of the file `path`."""
    runs_bytes = member.end - member.data_offset
    if (
        ends.dtype != np.int64
        or ends.shape != (member.shape[0] + 1,)
        or (ends[0], ends[-1]) != (0, runs_bytes - len(DEFLATE_END))
        or (ends[1:] < ends[:-1]).any()  # np.diff could overflow
    ):
        raise FormatError(f"{rowindex(member.name)} does not fit {member.name}; copy the file again", path)


RowArray = NDArray[Any] | DeflatedRows


@dataclass(frozen=True)
class CachedDirectory:
    """The directory that a reader has read, and the file that it belongs to.

    Attributes:
        identity: device, inode, size in bytes, and modification time in nanoseconds.
        directory: the content of the file.
    """

    identity: tuple[int, int, int, int]
    directory: Directory


class NpzReader:
    """Maps one file copy-on-write: changes to its arrays stay in memory.

    The map exists as long as any of its arrays and need not be closed. It holds one file descriptor before Python 3.13,
    and none in later versions.

    Args:
        path: the file.
        before: the directory that another reader of the same file has read; it is reused unless the file has changed.

    Raises:
        FormatError: the file is damaged, truncated or not of this format.
        OSError: the file cannot be opened.
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
        """The array `name`, as a view of the map. Raises FormatError if it is missing or deflated."""
        member = self._member(name)
        if member.runs_bytes is not None:
            raise FormatError(f"{name} is deflated, so there is no view of it; read it by rows", self.path)
        count = math.prod(member.shape)
        if not count or not member.dtype.itemsize:
            return np.empty(member.shape, member.dtype)
        return np.frombuffer(self._map, member.dtype, count, member.data_offset).reshape(member.shape)

    def get(self, name: str) -> NDArray[Any] | None:
        """The array `name`; None if the file does not contain it. Raises FormatError if it is deflated."""
        return self[name] if name in self else None

    def rows(self, name: str) -> RowArray:
        """The rows of the array `name`: a view of the map, or `DeflatedRows` if it is deflated.

        Raises:
            FormatError: the array is missing, or its row index is damaged.
        """
        if name not in self._rows:  # cached: creating a view costs more than reading a row
            member = self._member(name)
            self._rows[name] = self[name] if member.runs_bytes is None else self._deflated(member)
        return self._rows[name]

    def _deflated(self, member: Member) -> DeflatedRows:
        ends = self[rowindex(member.name)]
        require_rowindex(ends, member, self.path)
        return DeflatedRows(member, self._buffer[member.data_offset : member.end], ends, self.path)

    def crc_matches(self, name: str) -> bool:
        """Reads the whole member and returns whether its CRC-32 matches the directory's.

        Raises:
            FormatError: the array is missing, or rows of a deflated member are damaged.
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
