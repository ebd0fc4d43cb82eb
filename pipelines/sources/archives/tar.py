"""Tars in the ustar, pax and GNU formats, read in place by offset.

The formats are described in POSIX.1-2008 (pax, "ustar Interchange Format") and in the GNU tar manual ("Basic Tar
Format"). The standard library's tarfile treats a damaged header as the end of the archive, reads headers of any size,
and keeps every member in memory. The walk here does not, and reports an archive that is damaged or truncated.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from ...errors import SourceError
from ..access.files import Files, place_of, read_piece
from ..base import IMAGE_EXTENSIONS, Item, as_text, is_hidden
from .base import ArchiveSource, Member

log = logging.getLogger(__name__)
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_HEADER_BYTES = 1 << 20  # of a pax header or a long name; real ones have some hundred bytes
_MAX_PADDING = 1 << 20  # after the end mark; by default, tar writes up to 10 kB
_FILES = (b"0", b"\0", b"7")
# Headers that extend the next member's, or all following ones (g, which never has names or sizes). K: a link's target.
_EXTENDED = (b"x", b"X", b"L", b"K", b"g")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_COMPRESSED = {
    b"\x1f\x8b": "gunzip -k", b"BZh": "bunzip2 -k", b"\xfd7zXZ\0": "unxz -k", b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4", b"\x1f\x9d": "uncompress -k",
}  # fmt: skip
_INSPECTED = 100  # members at the beginning, by which the kind of a tar is detected
_SIDECARS = {b"cls", b"json", b"txt"}


class TarSource(ArchiveSource):
    """The images in tars. An item's place: the number of the tar, the offset of the data, and its size in bytes."""

    kind = "tar"
    _extension = ".tar"

    def _members(self, number: int) -> Iterator[Member]:
        with self._files.opened(number) as file:
            for name, kind, (offset, size) in members(file, 0, self._files.size(number), self._files.path(number)):
                yield Member(name, kind, (number, offset, size))

    def read(self, item: Item) -> bytes:
        """The bytes of a member. Raises as `read_piece`."""
        number, offset, size = place_of(item, 3)
        return read_piece(self._files, number, offset, size)


def kind_of(location: str) -> str:
    """The kind of a tar, by its first members: imagenet, webdataset or tar. Raises SourceError as `members`."""
    files = Files(location, "*.tar")
    with files.opened(0) as file:
        walk = members(file, 0, files.size(0), files.path(0))
        first = [name.removeprefix(b"./") for name, kind, _ in itertools.islice(walk, _INSPECTED) if kind == "file"]
    names = [name for name in first if not is_hidden(name)]
    if names and re.fullmatch(rb"n\d{8}\.tar|ILSVRC2012_val_\d{8}\.JPEG", names[0]):
        return "imagenet"
    samples: dict[bytes, set[bytes]] = {}
    for name in names:
        key, extension = split_key(name)
        samples.setdefault(key, set()).add(extension)
    for key, found in samples.items():
        if key and found & _SIDECARS and any(b"." + extension in IMAGE_EXTENSIONS for extension in found):
            return "webdataset"
    return "tar"


def split_key(name: bytes) -> tuple[bytes, bytes]:
    """The key and the lower-case extension of a file in a WebDataset, split at the first dot of its base name."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return (folder + slash + stem if stem else b""), extension.lower()


def members(file: BinaryIO, start: int, end: int, archive: str) -> Iterator[Member]:
    """The members of a tar. Only headers are read.

    Args:
        file: contains the tar.
        start: offset of the tar in the file.
        end: upper bound of its end.
        archive: its name, for messages.

    Yields:
        Each member. Its place is the offset of its data in the file and their size, in bytes.

    Raises:
        SourceError: it is damaged, truncated, compressed, or not a tar.
    """
    position, last = start, "its beginning"
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while True:
        block = _read(file, position, min(_BLOCK, end - position), archive)
        if len(block) < _BLOCK:
            where = f"after {last}, at byte {end}, without the end mark of a tar"
            raise (position == start and _compressed(file, start, archive)) or _cut(archive, where)
        if block == _ZEROS:
            _warn_of_rest(file, position, end, archive)
            return
        kind = block[156:157]
        extended = kind in _EXTENDED
        try:
            size = _size(block, {} if extended else pax)
        except ValueError:
            raise _damaged(file, start, archive, position, last) from None
        name = b"" if extended else _name(block, pax, long_name)
        data = _data_offset(file, block, position, end, archive)
        if data + size > end:
            shown = repr(as_text(name[:200])) if name else "a header"
            raise _cut(archive, f"at byte {end}, within {shown}, which has {size} bytes from byte {data} on")
        position = data + -(-size // _BLOCK) * _BLOCK
        if extended:
            content = _extended_header(file, data, size, archive)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind in (b"x", b"X"):
                try:
                    pax = _records(content)
                except ValueError:
                    raise _damaged(file, start, archive, data, last) from None
            continue
        sparse = any(key.startswith(b"GNU.sparse.") for key in pax)
        long_name, pax = None, {}
        last = repr(as_text(name[:200]))
        if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
            yield Member(name, "folder", (data, 0))
        elif kind in _FILES and not sparse:
            yield Member(name, "file", (data, size))
        else:
            yield Member(name, "other", (data, size))


def _warn_of_rest(file: BinaryIO, position: int, end: int, archive: str) -> None:
    """Logs a warning if anything but padding follows the end mark."""
    rest = end - position
    if rest > _MAX_PADDING or _read(file, position, rest, archive).strip(b"\0"):
        log.warning(
            "%r ends at byte %d of %d, as tar reads it; what follows is omitted: if tars were joined with cat, "
            "give them one by one, or join them with tar --concatenate",
            archive, position, end,
        )  # fmt: skip


def _size(header: bytes, pax: dict[bytes, bytes]) -> int:
    """The size of a member's data in bytes. Raises ValueError if its header is damaged."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    size = int(pax[b"size"]) if b"size" in pax else _number(header[124:136])
    if _number(header[148:156]) != checksum or size < 0:
        raise ValueError
    return 0 if header[156:157] in _WITHOUT_DATA else size


def _data_offset(file: BinaryIO, header: bytes, position: int, end: int, archive: str) -> int:
    """Where a member's data begins: after its header and, in a sparse file, the map (GNU's "Storing Sparse Files")."""
    data = position + _BLOCK
    more = header[156:157] == b"S" and header[482]
    while more:
        block = _read(file, data, min(_BLOCK, end - data), archive)
        data += _BLOCK
        more = block[504] if len(block) == _BLOCK else 0
    return data


def _extended_header(file: BinaryIO, offset: int, size: int, archive: str) -> bytes:
    """The data of a pax header or a long name. Raises SourceError if it is too large."""
    if size > _MAX_HEADER_BYTES:
        raise SourceError(
            f"{archive!r}: a header of {size} bytes at byte {offset}; at most {_MAX_HEADER_BYTES} are allowed; "
            "make the archive again"
        )
    return _read(file, offset, size, archive)


def _read(file: BinaryIO, offset: int, size: int, archive: str) -> bytes:
    try:
        file.seek(offset)
        return file.read(max(size, 0))
    except OSError as exc:
        raise SourceError(f"{archive!r}: {exc.strerror or exc} at byte {offset}; run the command again") from exc


def _name(block: bytes, pax: dict[bytes, bytes], long_name: bytes | None) -> bytes:
    if b"path" in pax:
        return pax[b"path"]
    if long_name is not None:
        return long_name
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """A number in a header: octal digits, or GNU's base-256 if the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] & 0x40 else int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _records(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, each `LENGTH KEY=VALUE\\n`. Raises ValueError if they are damaged."""
    records = {}
    position = 0
    while position < len(content):
        space = content.index(b" ", position, position + 20)
        end = position + int(content[position:space])
        if not space < end <= len(content):
            raise ValueError
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        records[key] = value
        position = end
    return records


def _damaged(file: BinaryIO, start: int, archive: str, position: int, last: str) -> SourceError:
    if position == start:
        return _compressed(file, start, archive) or SourceError(
            f"{archive!r} is no tar; give a .tar, or --source KIND if it is something else"
        )
    return SourceError(
        f"{archive!r} is damaged at byte {position}, after {last}: there is no header of a tar; download or "
        "make it again"
    )


def _compressed(file: BinaryIO, start: int, archive: str) -> SourceError | None:
    first = _read(file, start, 8, archive)
    command = next((command for magic, command in _COMPRESSED.items() if first.startswith(magic)), None)
    if command is None:
        return None
    return SourceError(
        f"{archive!r} is compressed, so no file in it can be read separately; run: {command} "
        f"{os.path.basename(archive)!r} and give the .tar"
    )


def _cut(archive: str, where: str) -> SourceError:
    return SourceError(
        f"{archive!r} is truncated: it ends {where}; download or make it again, or, if it is whole but for its end "
        "mark, add 1,024 zero bytes"
    )
