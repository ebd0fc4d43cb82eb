"""Streams arrays into an NPZ: rows are written as they arrive, and headers once the number of rows is known.

ISA-L compresses the data. Its levels are 0 to 3; 1 and 2 are the useful ones.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import sys
from types import TracebackType
from typing import Any

import numpy as np
from isal.isal_zlib import DEFLATED, Z_FULL_FLUSH, compressobj, crc32, crc32_combine
from numpy.typing import NDArray

from .format import DEFLATE_END, Directory, Member, data_offset, directory_bytes, member_header, npy_header, rowindex

# The CRC and the write alternate on pieces that are small enough to stay in the CPU's cache.
_PIECE_BYTES = 1 << 22
_RWF_DONTCACHE = 0x80  # a flag of pwritev2(2), since Linux 6.14
_RAW = -15  # zlib's windowBits for a stream without a header and a checksum


class NpzWriter:
    """Writes one NPZ file, one member after another, in memory that does not grow with the number of rows.

    Only the row index of a deflated member grows. Use the writer as a context manager. The file is complete only after
    `close`; the caller then moves it to its final name.

        with NpzWriter(path) as file:
            file.begin("images", np.dtype("float32"), (3, 224, 224))
            file.append(rows)           # as often as needed
            file.add("labels", labels)
            directory = file.close("comment")

    Args:
        path: the file to write.
        drop_cache: asks the kernel to drop data from the page cache once it is on the disk; has no effect where this is
            not supported.

    Raises:
        OSError: the file cannot be opened or written, for example because the disk is full.
        ValueError: the file has a member of that name already, a dtype cannot be stored, or rows do not have the
            member's dtype and shape.
    """

    def __init__(self, path: str | os.PathLike[str], *, drop_cache: bool = False) -> None:
        self._flags = _RWF_DONTCACHE if drop_cache and sys.platform == "linux" else 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._members: list[Member] = []
        self._open: tuple[str, int, np.dtype[Any], tuple[int, ...]] | None = None
        self._deflate: Any = None
        self._row_ends = [0]
        self._rows = 0
        self._crc = 0

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Writes an array of shape (N, ...) as the member `name`."""
        self.begin(name, array.dtype, array.shape[1:])
        self.append(array)

    def begin(
        self, name: str, dtype: np.dtype[Any], row_shape: tuple[int, ...], *, deflate_level: int | None = None
    ) -> None:
        """Begins a member and ends the previous one.

        Args:
            name: the name of the array, without `.npy`.
            dtype: the dtype of the array; big-endian data is stored as little-endian.
            row_shape: the shape of a row; the array has the shape (N, *row_shape).
            deflate_level: the compression level, 0 to 3; None to store rows uncompressed.
        """
        self._end_member()
        if dtype.kind not in "biufU" or not dtype.itemsize or any(member.name == name for member in self._members):
            raise ValueError(f"{name}: a second one, or of type {dtype}; stored are numbers, bools and text")
        self._open = (name, self._position, dtype.newbyteorder("<"), row_shape)
        self._deflate = None if deflate_level is None else compressobj(deflate_level, DEFLATED, _RAW)
        self._position = data_offset(self._position, name, deflated=self._deflate is not None)
        self._row_ends = [0]
        self._rows = self._crc = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Appends rows to the open member: (N, *row_shape), in the member's dtype."""
        assert self._open is not None
        name, _, dtype, row_shape = self._open
        if rows.ndim == 0 or rows.shape[1:] != row_shape or rows.dtype.newbyteorder("<") != dtype:
            raise ValueError(f"{name}: got {rows.dtype} {rows.shape}; this member has rows of {dtype} {row_shape}")
        self._rows += len(rows)
        if not rows.size:
            return
        data = np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data
        piece_bytes = _PIECE_BYTES if self._deflate is None else len(data) // len(rows)
        for start in range(0, len(data), piece_bytes):
            piece = data[start : start + piece_bytes]
            self._crc = crc32(piece, self._crc)
            if self._deflate is not None:
                piece = memoryview(self._deflate.compress(piece) + self._deflate.flush(Z_FULL_FLUSH))
                self._row_ends.append(self._row_ends[-1] + len(piece))
            self._write(piece, self._position)
            self._position += len(piece)

    def close(self, comment: str = "") -> Directory:
        """Writes the directory with this ZIP comment, flushes the file to the disk, and returns the directory."""
        self._end_member()
        end = directory_bytes(self._members, self._position, comment)
        self._write(memoryview(end), self._position)
        os.fsync(self._descriptor)
        members = {member.name: member for member in self._members}
        file_bytes = self._position + len(end)
        return Directory(members, comment, hashlib.sha256(end).hexdigest(), self._position, file_bytes)

    def _end_member(self) -> None:
        if self._open is None:
            return
        name, offset, dtype, row_shape = self._open
        shape, deflated = (self._rows, *row_shape), self._deflate is not None
        runs_bytes = None
        if deflated:
            self._write(memoryview(DEFLATE_END), self._position)
            self._position += len(DEFLATE_END)
            runs_bytes = self._row_ends[-1] + len(DEFLATE_END)
        crc = crc32_combine(crc32(npy_header(dtype, shape)), self._crc, dtype.itemsize * math.prod(shape))
        member = Member(name, offset, data_offset(offset, name, deflated=deflated), dtype, shape, crc, runs_bytes)
        self._write(memoryview(member_header(member)), offset)
        self._members.append(member)
        self._open = None
        if deflated:
            self.add(rowindex(name), np.array(self._row_ends, np.int64))
            self._end_member()

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            count = self._write_some(data, position)
            data, position = data[count:], position + count

    def _write_some(self, data: memoryview, position: int) -> int:
        if self._flags:
            try:
                return os.pwritev(self._descriptor, [data], position, self._flags)
            except (OSError, NotImplementedError) as exc:
                if isinstance(exc, OSError) and exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._flags = 0  # not supported by the kernel, the filesystem or the C library
        return os.pwrite(self._descriptor, data, position)
