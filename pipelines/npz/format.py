"""The bytes of a shard: a ZIP of NPY members, stored or deflated, with the data of each array aligned to 4096 bytes.

ZIP records follow PKWARE's APPNOTE 6.3.10 (4.3.7 local header, 4.3.12 central directory, 4.3.14 to 4.3.16 end records,
4.5.3 zip64 extra field), written as `numpy.savez` writes them: version 45, a zip64 field in every local header. The
padding is an extra field with the id 0xD935, which Android uses for alignment. NPY headers have version 1.0 and always
128 bytes (numpy.lib.format), so that a header can be overwritten once the number of rows is known.

    | local header, name, zip64 field, padding | NPY header, 128 bytes | data ... | next member ... | directory | end |
    0                                                                  4096

A deflated member (RFC 1951) keeps its NPY header in one stored block of 5 + 128 bytes, so that it can be overwritten as
well. Its data consists of one run of blocks per row and an empty final block of two bytes. Each run ends with a full
flush, so it can be inflated on its own. The array `<name>.rowindex`, int64 (N + 1,), holds the byte offset of each run,
relative to the first one, and the offset at which the last run ends.

    | ... padding | 00 80 00 7F FF, NPY header | run of row 0 | run of row 1 | ... | 03 00 | next member ...
    0                                          4096

The directory holds the CRC-32 of every member, so its SHA-256 (`Directory.digest`) identifies the whole file: every
other byte follows from the directory, and the reader rejects a file in which one does not. It also rejects files that
`numpy.savez` itself writes, because their data is not aligned. Deflate can encode the same data in many ways, and
reading a row does not check any CRC-32. The run of a row must inflate to exactly the row's bytes and end with a flush;
`NpzReader.crc_matches` checks the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from isal.isal_zlib import crc32, crc32_combine
from numpy.typing import NDArray

from ..errors import FormatError

Form = tuple[np.dtype[Any], tuple[int, ...]]  # dtype and shape
_FormOf = Callable[[str, int, int, int], Form]
ALIGNMENT = 4096
NPY_HEADER_BYTES = 128
_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_ENTRY = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR64 = struct.Struct("<4sLQL")
_ZIP64_FIELD = struct.Struct("<HHQQ")
DEFLATE_END = b"\3\0"
_DEFLATED = 8
_MAX_RATIO = 1032  # deflate's highest compression ratio, from zlib's technical notes
_STORED_BLOCK = struct.pack("<BHH", 0, NPY_HEADER_BYTES, NPY_HEADER_BYTES ^ 0xFFFF)
_NPY_PREFIX = b"\x93NUMPY\x01\x00"
# A pattern parses the header, because NumPy's reader uses Python's parser, which raises a dozen kinds of errors.
_NPY_FIELDS = re.compile(rb"\{'descr': '([<|][biufU]\d{1,6})', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n")
_VERSION = 45  # 4.5: zip64
_UNIX = 3 << 8
_DOS_DATE = 0x21  # 1980-01-01: a fixed date, so that equal data gives equal bytes
_MODE = 0o100644 << 16
_FULL = 0xFFFFFFFF
_ZIP32_LIMIT = 0x7FFFFFFF  # as in zipfile: some readers interpret larger sizes as negative
_PADDING_ID = 0xD935
_MAX_DIRECTORY_BYTES = 1 << 16
_MAX_COMMENT_BYTES = 0xFFFF


@dataclass(frozen=True)
class Member:
    """One array of a file. Offsets and sizes are in bytes; offsets count from the start of the file.

    Attributes:
        name: the name of the array, without `.npy`.
        header_offset: where its local header begins.
        data_offset: where its data begins, a multiple of 4096.
        dtype: its dtype.
        shape: its shape.
        crc32: the CRC-32 of the inflated member, NPY header included.
        runs_bytes: the size in bytes of all runs and the final block of a deflated member; None if it is stored.
    """

    name: str
    header_offset: int
    data_offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    crc32: int
    runs_bytes: int | None = None

    @property
    def npy_bytes(self) -> int:
        """The inflated size of the NPY header and the data."""
        return NPY_HEADER_BYTES + self.data_bytes

    @property
    def packed_bytes(self) -> int:
        """The size of the NPY header and the data in the file, compressed if the member is deflated."""
        if self.runs_bytes is None:
            return self.npy_bytes
        return len(_STORED_BLOCK) + NPY_HEADER_BYTES + self.runs_bytes

    @property
    def end(self) -> int:
        """The offset at which the member ends."""
        return self.data_offset + (self.data_bytes if self.runs_bytes is None else self.runs_bytes)

    @property
    def data_bytes(self) -> int:
        """The inflated size of the data, without the NPY header."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def data_crc32(self) -> int:
        """The CRC-32 of the inflated data, without the NPY header."""
        return self.crc32 ^ crc32_combine(crc32(npy_header(self.dtype, self.shape)), 0, self.data_bytes)


@dataclass(frozen=True)
class Directory:
    """The content of a file, according to its central directory and its NPY headers.

    Attributes:
        members: the arrays by name, in the order of the file.
        comment: the ZIP comment.
        digest: the SHA-256 of the central directory and the end records, in hexadecimal.
        offset: where the central directory begins, in bytes.
        file_bytes: the size of the file.
    """

    members: dict[str, Member]
    comment: str
    digest: str
    offset: int
    file_bytes: int


def rowindex(name: str) -> str:
    """The name of the array that stores where each row of the deflated array `name` begins."""
    return f"{name}.rowindex"


def data_offset(position: int, name: str, *, deflated: bool = False) -> int:
    """The offset of a member's data, for a local header that begins at `position`; both in bytes."""
    bare = position + _LOCAL.size + len(_filename(name)) + _ZIP64_FIELD.size + NPY_HEADER_BYTES
    bare += len(_STORED_BLOCK) if deflated else 0
    padding = -bare % ALIGNMENT
    if 0 < padding < 6:  # an extra field of this kind takes at least six bytes
        padding += ALIGNMENT
    return bare + padding


def npy_header(dtype: np.dtype[Any], shape: Sequence[int]) -> bytes:
    """The NPY header before an array's data, 128 bytes. Raises FormatError if dtype and shape need more."""
    fields = (
        f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    )
    length = NPY_HEADER_BYTES - len(_NPY_PREFIX) - 2
    if len(fields) >= length:
        raise FormatError(f"an array of shape {tuple(shape)} and type {dtype} does not fit a 128-byte NPY header")
    return _NPY_PREFIX + struct.pack("<H", length) + fields.ljust(length - 1).encode("ascii") + b"\n"


def member_header(member: Member) -> bytes:
    """The bytes from `header_offset` to `data_offset`: local header, padding and NPY header."""
    filename, block = _filename(member.name), b"" if member.runs_bytes is None else _STORED_BLOCK
    fields = _ZIP64_FIELD.pack(1, 16, member.npy_bytes, member.packed_bytes)
    bare = member.header_offset + _LOCAL.size + len(filename) + len(fields) + len(block) + NPY_HEADER_BYTES
    if padding := member.data_offset - bare:
        fields += struct.pack("<HHH", _PADDING_ID, padding - 4, ALIGNMENT).ljust(padding, b"\0")
    local = _LOCAL.pack(
        b"PK\3\4", _VERSION, 0, _method(member), 0, _DOS_DATE, member.crc32, _FULL, _FULL, len(filename), len(fields)
    )  # fmt: skip
    return local + filename + fields + block + npy_header(member.dtype, member.shape)


def directory_bytes(members: Sequence[Member], offset: int, comment: str) -> bytes:
    """The central directory and the end records, for a directory that begins at `offset`."""
    entries = b"".join(_entry(member) for member in members)
    text = comment.encode("ascii")
    count, size = len(members), len(entries)
    end64 = b""
    if offset > _ZIP32_LIMIT:
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, offset)
        end64 += _LOCATOR64.pack(b"PK\6\7", 0, offset + size, 1)
    short = min(offset, _FULL) if not end64 else _FULL
    return entries + end64 + _END.pack(b"PK\5\6", 0, 0, count, count, size, short, len(text)) + text


def _entry(member: Member) -> bytes:
    filename = _filename(member.name)
    size, packed, offset, wide = member.npy_bytes, member.packed_bytes, member.header_offset, []
    if max(size, packed) > _ZIP32_LIMIT:
        wide, size, packed = [size, packed], _FULL, _FULL
    if offset > _ZIP32_LIMIT:
        wide, offset = [*wide, offset], _FULL
    fields = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    return (
        _ENTRY.pack(
            b"PK\1\2", _UNIX | _VERSION, _VERSION, 0, _method(member), 0, _DOS_DATE, member.crc32, packed, size,
            len(filename), len(fields), 0, 0, 0, _MODE, offset,
        )
        + filename
        + fields
    )  # fmt: skip


def read_directory(buffer: memoryview, label: str) -> Directory:
    """Reads and validates the directory of a file; its offsets and sizes must be consistent with the file's size.

    Args:
        buffer: the bytes of the whole file.
        label: the name of the file in error messages.

    Raises:
        FormatError: the file is not of this format, or is damaged.
    """

    def form(name: str, offset: int, start: int, _: int) -> Form:
        name_bytes, field_bytes = _LOCAL.unpack_from(buffer, offset)[-2:]
        block = start - NPY_HEADER_BYTES - (offset + _LOCAL.size + name_bytes + field_bytes)
        _check(block in (0, len(_STORED_BLOCK)), f"place of the data of {name}")
        return _read_npy_header(bytes(buffer[start - NPY_HEADER_BYTES : start]), name)

    with _explained(label):
        directory = _read_directory(buffer, len(buffer), form)
        for member in directory.members.values():
            header = buffer[member.header_offset : member.data_offset]
            _check(member_header(member) == header, f"header of {member.name}.npy")
        return directory


def read_end(end: memoryview, file_bytes: int, forms: Mapping[str, Form], label: str) -> Directory:
    """Reads and validates the directory of a file of which only the end is known, not the headers of its members.

    Args:
        end: the last bytes of the file, which contain the directory.
        file_bytes: the size of the file.
        forms: the dtype and shape of members by name. Until `read_member` has read it, any other has the form of bytes,
            uint8 (data_bytes,).
        label: the name of the file in error messages.

    Raises:
        FormatError: the file is not of this format, or is damaged, or a member of `forms` has another size.
    """

    def form(name: str, _: int, __: int, size: int) -> Form:
        _check(size >= NPY_HEADER_BYTES, f"size of {name}")
        return forms.get(name.removesuffix(".npy"), (np.dtype(np.uint8), (size - NPY_HEADER_BYTES,)))

    with _explained(label):
        return _read_directory(end, file_bytes, form)


def read_member(member: Member, content: bytes, label: str) -> NDArray[Any]:
    """The array of a stored member, whose headers and CRC-32 are checked.

    Args:
        member: the member, according to the directory.
        content: the bytes of the file from `member.header_offset` to `member.end`.
        label: the name of the file in error messages.

    Raises:
        FormatError: the bytes are damaged, or the member is deflated.
    """
    start, filename = member.data_offset - member.header_offset, f"{member.name}.npy"
    with _explained(label):
        _check(member.runs_bytes is None, f"compression of {filename}")
        dtype, shape = _read_npy_header(content[start - NPY_HEADER_BYTES : start], filename)
        found = replace(member, dtype=dtype, shape=shape)
        _check(found.end == member.end and member_header(found) == content[:start], f"header of {filename}")
        _check(zlib.crc32(content[start - NPY_HEADER_BYTES :]) == member.crc32, f"CRC-32 of {filename}")
    array = np.empty(shape, dtype)
    if array.size:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8, offset=start)
    return array


def is_text(values: NDArray[Any]) -> bool:
    """Whether an array consists of strings `<U` whose code points Unicode has. NumPy makes invalid `str` of others."""
    codes = np.ascontiguousarray(values).reshape(-1)
    if codes.dtype.kind != "U" or not codes.nbytes:
        return codes.dtype.kind == "U"
    return bool(codes.view(np.uint32).max() <= sys.maxunicode)


@contextlib.contextmanager
def _explained(label: str) -> Iterator[None]:
    try:
        yield
    except (struct.error, ValueError, TypeError, OverflowError) as exc:
        raise FormatError(f"{exc or type(exc).__name__}; not a shard of this format, or damaged", label) from exc


def _read_directory(buffer: memoryview, file_bytes: int, form: _FormOf) -> Directory:
    """The directory, found from the end of the file.

    Args:
        buffer: the last bytes of the file, or all of them.
        file_bytes: the size of the file.
        form: gives the dtype and shape of a member from its file name, the offsets of its header and of its data, and
            its inflated size.
    """
    before = file_bytes - len(buffer)
    tail_offset = max(0, len(buffer) - _END.size - _MAX_COMMENT_BYTES)
    tail = bytes(buffer[tail_offset:])
    position = tail.rfind(b"PK\5\6")
    if position < 0:
        raise ValueError("no end record (cut off, or no ZIP file)")
    _, _, _, _, count, size, offset, comment_bytes = _END.unpack_from(tail, position)
    end = tail_offset + position
    if end + _END.size + comment_bytes != len(buffer):
        raise ValueError("bytes are missing or left over behind the end record")
    stop = end
    if offset == _FULL:
        stop = end - _LOCATOR64.size
        locator, _, end64, _ = _LOCATOR64.unpack_from(buffer, stop)
        end64 -= before
        signature, _, _, _, _, _, _, count, size, offset = _END64.unpack_from(buffer, end64)
        _check(locator == b"PK\6\7" and signature == b"PK\6\6" and end64 + _END64.size == stop, "zip64 end record")
        stop = end64
    begin = offset - before
    _check(begin >= 0 and begin + size == stop and size <= _MAX_DIRECTORY_BYTES, "place of the directory")
    entries = bytes(buffer[begin:stop])
    members: dict[str, Member] = {}
    position = place = 0
    for _ in range(count):
        member, position = _read_entry(entries, position, form)
        _check(member.name not in members, f"second {member.name}.npy")
        _check(member.header_offset == place, f"place of {member.name}.npy (there is a gap, or two arrays overlap)")
        members[member.name] = member
        place = member.end
    _check(place == offset, "place of the directory")
    comment = bytes(buffer[end + _END.size :]).decode("ascii")
    _check(directory_bytes(list(members.values()), offset, comment) == buffer[begin:], "directory")
    return Directory(members, comment, hashlib.sha256(buffer[begin:]).hexdigest(), offset, file_bytes)


def _read_entry(entries: bytes, position: int, form: _FormOf) -> tuple[Member, int]:
    (
        signature, _, _, flags, method, _, _, crc32, packed, size,
        name_bytes, field_bytes, comment_bytes, _, _, _, offset,
    ) = _ENTRY.unpack_from(entries, position)  # fmt: skip
    position += _ENTRY.size
    filename = entries[position : position + name_bytes].decode("ascii")
    fields = entries[position + name_bytes : position + name_bytes + field_bytes]
    # Other ZIP readers truncate a name at its first zero byte, and would find this array under another name.
    _check(signature == b"PK\1\2" and filename.endswith(".npy") and filename.isprintable(), "directory entry")
    _check(flags == 0 and method in (0, _DEFLATED), f"compression of {filename}")
    wide = iter(struct.unpack(f"<{(len(fields) - 4) // 8}Q", fields[4:]) if fields else ())
    size, packed = (next(wide, -1) if short == _FULL else short for short in (size, packed))
    offset = next(wide, -1) if offset == _FULL else offset
    block = len(_STORED_BLOCK) if method else 0
    runs_bytes = packed - block - NPY_HEADER_BYTES if method else None
    _check(
        offset >= 0 and packed >= 0 and (packed == size if runs_bytes is None else runs_bytes >= len(DEFLATE_END)),
        f"size of {filename}",
    )
    name = filename.removesuffix(".npy")
    start = data_offset(offset, name, deflated=bool(method))
    dtype, shape = form(filename, offset, start, size)
    _check(runs_bytes is None or len(shape) > 0, f"shape () of {filename}, which is deflated by rows")
    member = Member(name, offset, start, dtype, shape, crc32, runs_bytes)
    _check(member.npy_bytes == size, f"shape {shape} of {filename}, which has {size} bytes")
    _check(size <= _MAX_RATIO * packed, f"size of {filename}: {packed} bytes cannot hold {size}")
    return member, position + name_bytes + field_bytes + comment_bytes


def _read_npy_header(header: bytes, filename: str) -> Form:
    fields = _NPY_FIELDS.fullmatch(header, len(_NPY_PREFIX) + 2)
    if fields is None:
        raise ValueError(f"wrong NPY header of {filename}")
    dtype = np.dtype(fields[1].decode("ascii"))
    shape = tuple(int(side) for side in fields[2].split(b",") if side.strip())
    # An empty array may have huge sides, but NumPy limits the product of those that are not zero.
    bound = dtype.itemsize * math.prod(max(side, 1) for side in shape)
    _check(0 < bound < 1 << 63, f"type or shape of {filename}")
    return dtype, shape


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"wrong {what}")


def _method(member: Member) -> int:
    return 0 if member.runs_bytes is None else _DEFLATED


def _filename(name: str) -> bytes:
    return f"{name}.npy".encode("ascii")
