"""NumPy files: the arrays in an .npy or .npz. What their headers claim is checked before it is used."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from ..access.files import Files
from ..archives.zip import LOCAL_HEADER_BYTES, data_offset

_MAX_HEADER_BYTES = 1 << 16
_MAX_VALUE_BYTES = 1 << 30
_MOST_DEFLATED = 1032  # maximum compression ratio of deflate (https://zlib.net/zlib_tech.html)


@dataclass(frozen=True)
class Array:
    """An array as its header describes it; `checked` verifies the claims.

    Attributes:
        where: the file and the array's name, for messages.
        dtype, shape: of the array.
        fortran: whether its elements are in Fortran order.
        start: offset of the elements in the .npy, in bytes.
        held: the size of the .npy in bytes.
        member: the .npy in an .npz; None if it is a separate file.
    """

    where: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    held: int
    member: zipfile.ZipInfo | None = None

    @property
    def size(self) -> int:
        """The size of its elements in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def checked(self) -> Array:
        """The array itself. Raises SourceError if its elements are incomplete, or Python objects."""
        if self.dtype.hasobject:
            raise SourceError(
                f"{self.where} holds Python objects, which are a pickle and are never loaded; make one array of "
                "numbers or texts of them (of images np.stack(images)), and save that"
            )
        if any(side < 0 for side in self.shape) or self.start + self.size > self.held:
            raise SourceError(
                f"{self.where}: {self.dtype} {str(self.shape)[:200]} does not fit into {self.held} bytes; it is "
                "damaged or cut: copy or make it again"
            )
        return self


def arrays(files: Files) -> dict[str, Array]:
    """The arrays in an .npz by name, or the array of an .npy under an empty name.

    Raises:
        SourceError: it is neither, damaged or truncated.
    """
    path = files.path(0)
    with files.opened(0) as file:
        if file.read(4) not in (b"PK\3\4", b"PK\5\6"):
            file.seek(0)
            return {"": _header(file, files.size(0), repr(path))}
        try:
            found = {}
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith(".npy"):
                        continue
                    name = info.filename.removesuffix(".npy")
                    where = f"{path!r}: array {name[:200]!r}"
                    _check_member(info, where, files.size(0))
                    with archive.open(info) as member:
                        found[name] = _header(member, info.file_size, where, info)
            return found
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            struct.error,
            EOFError,
            OSError,
            zlib.error,
        ) as exc:
            raise SourceError(f"{path!r} is no .npz, damaged or cut ({exc}); copy or make it again") from exc


def _check_member(info: zipfile.ZipInfo, where: str, end: int) -> None:
    if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(f"{where} is encrypted or compressed in another way than NumPy's; save it with np.savez")
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else info.compress_size * _MOST_DEFLATED
    if info.header_offset + info.compress_size > end or info.file_size > most:
        raise SourceError(
            f"{where}: {info.file_size} bytes from {info.compress_size} at byte {info.header_offset} of a file of "
            f"{end} bytes; it is damaged or cut: copy or make it again"
        )


def _header(file: Any, size: int, where: str, member: zipfile.ZipInfo | None = None) -> Array:
    """Parses the header of an .npy of `size` bytes (NumPy's NEP 1), without acting on what it claims."""
    head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(head)
    except Exception as exc:  # NumPy and Python's parser raise an open list of errors for a damaged header
        reason = f"{type(exc).__name__}: {exc}"[:200]
        raise SourceError(f"{where} is no .npy that can be read ({reason}); save it again with np.save") from exc
    return Array(where, dtype, shape, fortran, head.tell(), size, member)


def member_start(files: Files, member: zipfile.ZipInfo) -> int:
    """The offset of a stored member's bytes in the file. Raises SourceError if it is damaged or truncated."""
    offset = data_offset(files.read(0, member.header_offset, LOCAL_HEADER_BYTES))
    if offset is None or member.header_offset + offset + member.file_size > files.size(0):
        raise SourceError(f"{files.path(0)!r} is damaged or cut; copy or make it again")
    return member.header_offset + offset


def values(files: Files, array: Array) -> NDArray[Any]:
    """Reads an array of labels. Raises SourceError if it is not of numbers or text, damaged, or too large."""
    if array.checked().dtype.kind not in "biufSU" or not array.dtype.itemsize:
        raise SourceError(f"{array.where} has {array.dtype}; labels are numbers or texts: convert it, or --labels none")
    if array.size > _MAX_VALUE_BYTES:
        raise SourceError(f"{array.where}: {array.size} bytes of labels; at most {_MAX_VALUE_BYTES} are allowed")
    try:
        with files.opened(0) as file:
            if array.member is None:
                file.seek(array.start)
                data = file.read(array.size)
            else:
                with zipfile.ZipFile(file) as archive, archive.open(array.member.filename) as member:
                    data = member.read(array.start + array.size)[array.start :]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as exc:
        raise SourceError(f"{array.where} is damaged ({exc}); copy or make it again") from exc
    if len(data) < array.size:
        raise SourceError(f"{array.where} is cut; copy or make it again")
    return np.frombuffer(data, array.dtype).reshape(array.shape, order="F" if array.fortran else "C")
