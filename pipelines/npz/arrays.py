"""The arrays in any NPZ or NPY file, whoever wrote it: what they are, and where their bytes lie.

ZIP records follow PKWARE's APPNOTE 6.3.10, NPY headers NumPy's NEP 1. No number in a file is used before it was
compared with the file's size, and nothing in a file is executed. Members are stored or deflated, also with data
descriptors and zip64; encrypted ones, and those of other methods, are refused, and so are members that overlap or have
the same name.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from ..errors import FormatError

ReadAt = Callable[[int, int], "bytes | memoryview"]  # (offset, size): that many bytes; fewer only at the file's end

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_ENTRY = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR64 = struct.Struct("<4sLQL")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_PLAIN_FLAGS = 0x6 | _DESCRIPTOR | _UTF8  # 0x6: how well it was deflated
_FULL16, _FULL = 0xFFFF, 0xFFFFFFFF
_ZIP64_ID = 1
_MAX_COMMENT_BYTES = 0xFFFF
_MAX_DIRECTORY_BYTES = 16 << 20
_MAX_HEADER_BYTES = 1 << 16
_MAX_HEADER_TEXT = 10_000  # as numpy.load: Python's parser may crash on longer text
_PIECE_BYTES = 1 << 20
_MOST_DEFLATED = 1032  # maximum compression ratio of deflate (https://zlib.net/zlib_tech.html)
_NPY = b"\x93NUMPY"
_LONG = re.compile(r"(?<=\d)L\b")  # Python 2 on Windows wrote shapes such as (10L, 3)
_DAMAGED = "it is damaged or cut: copy or make it again"


@dataclass(frozen=True)
class ArrayInfo:
    """An array as its headers describe it; `complete` verifies the claims. Sizes and offsets are in bytes.

    Attributes:
        name: of the array, without `.npy`; empty if the file is an .npy.
        dtype, shape: of the array.
        fortran: whether its elements are in Fortran order.
        header_bytes: the size of the NPY header.
        npy_bytes: the size of the NPY header and the elements, inflated.
        begin: the offset of the NPY header in the file, or of the deflated data that begins with it.
        packed_bytes: the size of the NPY header and the elements in the file.
        deflated: whether they are deflated.
        crc32: of the inflated NPY header and elements; None if the file is an .npy.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    header_bytes: int
    npy_bytes: int
    begin: int
    packed_bytes: int
    deflated: bool = False
    crc32: int | None = None

    @property
    def data_bytes(self) -> int:
        """The size of its elements."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def data_offset(self) -> int:
        """The offset of its elements in the file, or in the inflated .npy if it is deflated."""
        return self.header_bytes + (0 if self.deflated else self.begin)

    @property
    def unmappable(self) -> str | None:
        """Why the elements cannot be used where they lie in the file; None if they can."""
        if self.dtype.hasobject:
            return "Python objects"
        if self.deflated:
            return "deflated"
        if self.data_offset % self.dtype.alignment:
            return f"not aligned: at byte {self.data_offset}"
        return None

    def complete(self) -> ArrayInfo:
        """The array itself. Raises FormatError if its elements are incomplete, or are Python objects."""
        if self.dtype.hasobject:
            raise FormatError(
                "it holds Python objects, which are a pickle and are never loaded; make one array of numbers or texts "
                "of them (of images np.stack(images)), and save that"
            )
        bound = self.dtype.itemsize * math.prod(max(side, 1) for side in self.shape)  # NumPy limits it if a side is 0
        taken = self.header_bytes + self.data_bytes
        fits = taken <= self.npy_bytes if self.crc32 is None else taken == self.npy_bytes  # an .npy may hold more
        if min(self.shape, default=0) < 0 or bound >= 1 << 63 or not fits:
            how = "does not fill" if 0 <= taken < self.npy_bytes else "does not fit into"
            raise FormatError(f"{self.dtype} {str(self.shape)[:200]} {how} {self.npy_bytes} bytes; {_DAMAGED}")
        return self


class _Member(NamedTuple):
    """A member of a ZIP, as its directory describes it."""

    name: str
    flags: int
    method: int
    crc32: int
    packed: int
    size: int
    offset: int  # of its local header


def read_arrays(read: ReadAt, size: int) -> dict[str, ArrayInfo]:
    """The arrays in an .npz by name, or the array of an .npy under an empty name.

    Args:
        read: reads from the file.
        size: of the file, in bytes.

    Raises:
        FormatError: it is neither, damaged, truncated or ambiguous, or compressed in another way than NumPy's.
    """
    if not size:
        raise FormatError("the file is empty; copy or make it again")
    begin = bytes(read(0, len(_NPY)))
    if begin[:4] not in (b"PK\3\4", b"PK\5\6"):
        if begin != _NPY:
            raise FormatError(
                f"it is neither an .npz nor an .npy that can be read, since it begins with {begin!r}; copy it again, "
                "or save it with np.savez or np.save"
            )
        return {"": _array("", bytes(read(0, min(size, _MAX_HEADER_BYTES))), size, 0, size)}
    try:
        members, end = _directory(read, size)
    except (struct.error, ValueError) as exc:
        raise FormatError(f"it is no .npz, damaged or cut ({exc}); copy or make it again") from exc
    found: dict[str, ArrayInfo] = {}
    members.sort(key=lambda member: member.offset)
    starts = [*(member.offset for member in members), end]
    for member, stop in zip(members, starts[1:], strict=True):
        if not member.name.endswith(".npy"):
            _require_room(member, member.offset + _LOCAL.size, stop)
            continue
        name = member.name.removesuffix(".npy")
        try:
            if name in found:
                raise FormatError("the file has two arrays of this name; make it again with one of them")
            found[name] = _member_array(read, name, member, stop)
        except FormatError as exc:
            raise FormatError(f"array {name[:200]!r}: {exc.problem}") from exc.__cause__
    return found


def content(read: ReadAt, array: ArrayInfo) -> Iterator[bytes | memoryview]:
    """The NPY header and the elements of an array, inflated if necessary, piece by piece.

    Raises:
        FormatError: they are damaged: another size, or in an .npz another CRC-32. What was yielded before is then
            worthless.
    """
    size = array.npy_bytes if array.crc32 is not None else array.header_bytes + array.data_bytes
    crc, done = 0, 0
    for piece in _inflated(read, array) if array.deflated else _stored(read, array.begin, size):
        crc, done = crc32(piece, crc), done + len(piece)
        yield piece
    if done != size:
        raise FormatError(f"it has {done} bytes instead of {size}; {_DAMAGED}")
    if array.crc32 not in (None, crc):
        raise FormatError(f"its CRC-32 does not match its data; {_DAMAGED}")


def _stored(read: ReadAt, begin: int, size: int) -> Iterator[bytes | memoryview]:
    for at in range(begin, begin + size, _PIECE_BYTES):
        yield read(at, min(_PIECE_BYTES, begin + size - at))


def _inflated(read: ReadAt, array: ArrayInfo) -> Iterator[bytes]:
    """Yields at most as many bytes as the array should have."""
    inflater, done, at = zlib.decompressobj(-zlib.MAX_WBITS), 0, array.begin
    end, waiting = array.begin + array.packed_bytes, b""
    try:
        while not inflater.eof:
            if not waiting:
                waiting = bytes(read(at, min(_PIECE_BYTES, end - at)))
                at += len(waiting)
            piece = inflater.decompress(waiting, min(_PIECE_BYTES, array.npy_bytes - done + 1))
            if not (piece or waiting or inflater.eof) or done + len(piece) > array.npy_bytes:
                break
            waiting = inflater.unconsumed_tail
            done += len(piece)
            yield piece
    except zlib.error as exc:
        raise FormatError(f"its deflated data is damaged ({exc}); copy or make it again") from exc
    if not inflater.eof:
        raise FormatError(f"it does not inflate to {array.npy_bytes} bytes; {_DAMAGED}")


def _directory(read: ReadAt, size: int) -> tuple[list[_Member], int]:
    """The members of a ZIP, and the offset at which its directory begins.

    Raises:
        FormatError, ValueError, struct.error: it is damaged.
    """
    start = max(0, size - _END.size - _MAX_COMMENT_BYTES)
    tail = bytes(read(start, size - start))
    place = tail.rfind(b"PK\5\6")
    _check(0 <= place <= len(tail) - _END.size, "there is no whole end record")
    _, disk, first, here, count, length, offset, comment = _END.unpack_from(tail, place)
    stop = start + place
    _check(stop + _END.size + comment == size, "bytes are missing or left over behind the end record")
    short = (disk, first, here, count, length, offset)
    if place >= _LOCATOR64.size and tail[place - _LOCATOR64.size :].startswith(b"PK\6\7"):
        locator = stop - _LOCATOR64.size
        end64 = int(_LOCATOR64.unpack_from(tail, place - _LOCATOR64.size)[2])
        _check(end64 + _END64.size <= locator, "the zip64 end record is not where it should be")
        signature, length64, _, _, *wide = _END64.unpack(read(end64, _END64.size))
        _check(signature == b"PK\6\6" and end64 + 12 + length64 == locator, "the zip64 end record is damaged")
        fulls = (_FULL16, _FULL16, _FULL16, _FULL16, _FULL, _FULL)
        fit = all(each in (long, full) for each, long, full in zip(short, wide, fulls, strict=True))
        _check(fit, "the two end records contradict each other")
        disk, first, here, count, length, offset = wide
        stop = end64
    _check((disk, first) == (0, 0) and here == count, "it is one of several parts")
    _check(offset + length == stop, "the directory is not where it should be")
    _check(length <= _MAX_DIRECTORY_BYTES, f"its directory has {length} bytes; at most {_MAX_DIRECTORY_BYTES} are read")
    entries = bytes(read(offset, length))
    members, at = [], 0
    for _ in range(count):
        member, at = _entry(entries, at)
        members.append(member)
    _check(at == len(entries), "the directory is longer than its members")
    return members, offset


def _entry(entries: bytes, at: int) -> tuple[_Member, int]:
    """The member whose directory entry begins at `at`, and the offset of the next entry."""
    (
        signature, _, _, flags, method, _, _, crc, packed, size,
        name_bytes, extra_bytes, comment_bytes, disk, _, _, offset,
    ) = _ENTRY.unpack_from(entries, at)  # fmt: skip
    at += _ENTRY.size
    raw, extra = entries[at : at + name_bytes], entries[at + name_bytes : at + name_bytes + extra_bytes]
    at += name_bytes + extra_bytes + comment_bytes
    _check(signature == b"PK\1\2" and at <= len(entries), "the directory is damaged")
    wide = iter(_zip64(extra) if _FULL in (packed, size, offset) else ())
    size, packed, offset = (next(wide, -1) if each == _FULL else each for each in (size, packed, offset))
    _check(min(size, packed, offset) >= 0 and disk in (0, _FULL16), "the directory is damaged")
    name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    _check("\0" not in name, "the name of a member has a zero byte")  # other readers would cut the name there
    return _Member(name, flags, method, crc, packed, size, offset), at


def _zip64(extra: bytes) -> tuple[int, ...]:
    """The 64-bit numbers of a zip64 extra field (section 4.5.3); none if there is no such field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == _ZIP64_ID:
            return struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4)
        extra = extra[4 + length :]
    return ()


def _member_array(read: ReadAt, name: str, member: _Member, stop: int) -> ArrayInfo:
    """The array in a member. Raises FormatError if it is not stored or deflated as a whole before `stop`."""
    if member.flags & ~_PLAIN_FLAGS or member.method not in (_STORED, _DEFLATED):
        raise FormatError("it is encrypted or compressed in another way than NumPy's; save it with np.savez")
    deflated = member.method == _DEFLATED
    most = member.packed * _MOST_DEFLATED if deflated else member.packed
    if member.size > most or (not deflated and member.size < member.packed):
        raise FormatError(f"{member.size} bytes from {member.packed}; {_DAMAGED}")
    _require_room(member, member.offset + _LOCAL.size, stop)
    header = bytes(read(member.offset, _LOCAL.size))
    signature, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = _LOCAL.unpack(header)
    begin = member.offset + _LOCAL.size + name_bytes + extra_bytes
    _require_room(member, begin, stop)
    raw = bytes(read(member.offset + _LOCAL.size, name_bytes))
    same = raw.decode("utf-8" if flags & _UTF8 else "cp437", "replace") == member.name and method == member.method
    if not flags & _DESCRIPTOR:  # with a descriptor, what is not known yet is zero
        sizes = zip((packed, size), (member.packed, member.size), strict=True)
        same = same and crc == member.crc32 and all(each in (long, _FULL) for each, long in sizes)
    if signature != b"PK\3\4" or not same or flags & ~_PLAIN_FLAGS:
        raise FormatError(f"its local header at byte {member.offset} contradicts the directory; {_DAMAGED}")
    head = bytes(read(begin, min(member.packed, _MAX_HEADER_BYTES)))
    if deflated:
        try:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _MAX_HEADER_BYTES)
        except zlib.error as exc:
            raise FormatError(f"its deflated data is damaged ({exc}); copy or make it again") from exc
    return _array(name, head, member.size, begin, member.packed, deflated=deflated, crc32=member.crc32)


def _require_room(member: _Member, begin: int, stop: int) -> None:
    """Raises FormatError if a member, whose data begins at `begin`, reaches over `stop`."""
    if begin + member.packed > stop:
        raise FormatError(
            f"{member.size} bytes from {member.packed} at byte {member.offset} reach over byte {stop}, where the next "
            f"member or the directory begins; {_DAMAGED}"
        )


def _array(
    name: str, head: bytes, npy_bytes: int, begin: int, packed: int, *, deflated: bool = False, crc32: int | None = None
) -> ArrayInfo:
    """Parses the NPY header at the beginning of `head`."""
    try:
        dtype, shape, fortran, header_bytes = _npy_header(head)
    except Exception as exc:  # Python's parser and NumPy raise an open list of errors for a damaged header
        reason = f"{type(exc).__name__}: {exc}"[:200]
        raise FormatError(f"it is no .npy that can be read ({reason}); save it again with np.save") from exc
    return ArrayInfo(name, dtype, shape, fortran, header_bytes, npy_bytes, begin, packed, deflated, crc32)


def _npy_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Dtype, shape, whether in Fortran order, and the size of the header in bytes."""
    _check(head[:6] == _NPY, "it does not begin as one")
    version = tuple(head[6:8])
    _check(version in ((1, 0), (2, 0), (3, 0)), f"its version is {version}")
    length_format = struct.Struct("<H" if version == (1, 0) else "<L")
    (length,) = length_format.unpack_from(head, 8)
    start = 8 + length_format.size
    _check(
        start + length <= len(head) and length <= _MAX_HEADER_TEXT,
        f"a header of {length} bytes; at most {_MAX_HEADER_TEXT} are read",
    )
    text = head[start : start + length].decode("utf-8" if version == (3, 0) else "latin1")
    fields = ast.literal_eval(_LONG.sub("", text) if version < (3, 0) else text)
    _check(
        isinstance(fields, dict) and fields.keys() == {"descr", "fortran_order", "shape"}, "the header has other keys"
    )
    shape, fortran = fields["shape"], fields["fortran_order"]
    dtype = np.lib.format.descr_to_dtype(fields["descr"])
    _check(
        isinstance(shape, tuple) and all(type(side) is int for side in shape), "the shape is not a tuple of integers"
    )
    _check(type(fortran) is bool, "fortran_order is neither True nor False")
    _check(dtype.subdtype is None and (dtype.itemsize > 0 or dtype.hasobject), f"{dtype} is not the type of an array")
    return dtype, shape, fortran, start + length


def _check(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)
