"""Zips, read in place by offset (PKWARE's APPNOTE.TXT, sections 4.3.7 and 4.3.12)."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator

from ...errors import SourceError
from ..access.files import place_of, read_piece
from ..base import Item
from ..rejects import MAX_ENCODED_BYTES, BadItem
from .base import ArchiveSource, Member, is_image, path_of

_LOCAL = struct.Struct(
    "<4s2xHH16xHH"
)  # local header, section 4.3.7: magic, flags, method, lengths of name and extra field
LOCAL_HEADER_BYTES = _LOCAL.size
_ENCRYPTED, _UTF8 = 0x1, 0x800
_UNIX = 3
_DOS = (0, 10, 14)  # FAT, NTFS, VFAT
_HUGE = 1 << 62  # larger than any accepted size, but fits an int64


class ZipSource(ArchiveSource):
    """The images in zips, stored or deflated.

    An item's place: the number of the zip, the offset of the local header, the compressed size, the size, the CRC-32.
    """

    kind = "zip"
    _extension = ".zip"

    def _members(self, number: int) -> Iterator[Member]:
        archive, end = self._files.path(number), self._files.size(number)
        with self._files.opened(number) as file:
            try:
                # The standard library reads the whole directory, some 600 bytes of memory per member while listing.
                with zipfile.ZipFile(file) as opened:
                    infos = opened.infolist()
            except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, OSError) as exc:
                raise SourceError(f"{archive!r} is no zip, damaged or cut ({exc}); download or make it again") from exc
        _refuse_overlaps(infos, archive, end)
        for info in infos:
            name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
            if info.create_system in _DOS and b"/" not in name:
                name = name.replace(b"\\", b"/")  # like unzip: old versions of .NET wrote backslashes
            mode = stat.S_IFMT(info.external_attr >> 16) if info.create_system == _UNIX else 0
            if name.endswith(b"/"):
                yield Member(name, "folder")
            elif mode not in (0, stat.S_IFREG):
                yield Member(name, "other")
            else:
                if is_image(path_of(name, archive)):
                    _refuse_unknown(info, archive)
                yield Member(
                    name, "file", (number, info.header_offset, info.compress_size, min(info.file_size, _HUGE), info.CRC)
                )

    def read(self, item: Item) -> bytes:
        """The bytes of a member, inflated.

        Raises:
            BadItem: it is damaged, encrypted, larger than any image should be, or contradicts the directory.
            OSError: as `read_piece`.
        """
        number, offset, stored, size, crc = place_of(item, 5)
        if size > MAX_ENCODED_BYTES:
            raise BadItem("read", "too-large", f"{size} bytes; at most {MAX_ENCODED_BYTES}")
        header = read_piece(self._files, number, offset, LOCAL_HEADER_BYTES)
        if (begin := data_offset(header)) is None:
            raise BadItem("read", "undecodable", "no zip member where the directory has one")
        _, flags, method, *_ = _LOCAL.unpack(header)
        if flags & _ENCRYPTED or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadItem("read", "unreadable", f"encrypted or compressed by method {method}")
        data = read_piece(self._files, number, offset + begin, stored)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflated(data, size)
        if len(data) != size:
            raise BadItem("read", "truncated", f"{len(data)} bytes where the zip's directory has {size}")
        if zlib.crc32(data) != crc:
            raise BadItem("read", "undecodable", "its CRC-32 is another: it is damaged")
        return data


def data_offset(header: bytes) -> int | None:
    """The offset of a member's data from the beginning of its local header; None if it is not a header."""
    magic, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
    return int(LOCAL_HEADER_BYTES + name_bytes + extra_bytes) if magic == b"PK\3\4" else None


def _inflated(data: bytes, size: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, size + 1)
    except zlib.error as exc:
        raise BadItem("read", "undecodable", f"damaged deflate data ({exc})") from exc
    if len(content) > size:
        raise BadItem("read", "undecodable", f"it inflates to more than the {size} bytes that the zip's directory has")
    return content


def _refuse_overlaps(infos: list[zipfile.ZipInfo], archive: str, end: int) -> None:
    """Raises SourceError if members overlap, as in zip bombs (https://www.bamsoftware.com/hacks/zipbomb/)."""
    inside = sorted(infos, key=lambda info: info.header_offset)
    for info, following in zip(inside, [*(each.header_offset for each in inside[1:]), end], strict=True):
        if info.header_offset < 0 or info.header_offset + LOCAL_HEADER_BYTES + info.compress_size > following:
            raise SourceError(
                f"{archive!r}: member {info.filename[:200]!r} has {info.compress_size} bytes from byte "
                f"{info.header_offset} on, which reaches into byte {following}, where the next one begins or the zip "
                "ends; it is damaged or a zip bomb: download or make it again"
            )


def _refuse_unknown(info: zipfile.ZipInfo, archive: str) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise SourceError(f"{archive!r}: {info.filename[:200]!r} is encrypted; unzip it and give the folder")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(
            f"{archive!r}: {info.filename[:200]!r} is compressed by method {info.compress_type}; allowed are stored "
            "(0) and deflated (8): unzip it and give the folder, or zip it again with zip -0"
        )
