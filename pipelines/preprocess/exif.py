"""Reads the EXIF orientation of an image: one rule for all decoders and file formats.

Only the first EXIF block of a file is read. In it, the orientation is the first entry of IFD0 with tag 0x0112 (Exif
2.32, table 4) that holds a single number of type BYTE, SHORT or LONG, in either byte order (TIFF 6.0, sections 2 and
8). Other entries are ignored, and a directory may claim more entries than the block has room for. An orientation is a
number from 1 to 8; any other value means 1, upright. XMP is ignored.
"""

from __future__ import annotations

import struct

EXIF_HEADER = b"Exif\0\0"
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION = 0x0112
_TYPES = {1: "B", 3: "H", 4: "I"}
_ENTRY_BYTES = 12


def orientation_in(block: bytes | memoryview) -> int:
    """The orientation, 1 to 8, in an EXIF block: a TIFF structure with or without the prefix `Exif\\0\\0`."""
    for _ in range(2):  # some files have the prefix twice
        if block[: len(EXIF_HEADER)] == EXIF_HEADER:
            block = block[len(EXIF_HEADER) :]
    order = _BYTE_ORDERS.get(bytes(block[:4]))
    if order is None or len(block) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", block, 4)
    if directory + 2 > len(block):
        return 1
    (count,) = struct.unpack_from(order + "H", block, directory)
    start = directory + 2
    room = (len(block) - start) // _ENTRY_BYTES
    for position in range(start, start + min(count, room) * _ENTRY_BYTES, _ENTRY_BYTES):
        tag, kind, numbers = struct.unpack_from(order + "HHI", block, position)
        if tag == _ORIENTATION and numbers == 1 and kind in _TYPES:
            (value,) = struct.unpack_from(order + _TYPES[kind], block, position + 8)
            return value if 1 <= value <= 8 else 1
    return 1
