"""JPEGs that would take their decoder very long."""

from __future__ import annotations

from ..rejects import BadItem

_MAX_SCANS = 256  # as nvImageCodec: each scan of a progressive JPEG costs a pass over the whole image


def check_scans(data: bytes) -> None:
    """Raises BadItem if data is a JPEG of too many scans."""
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > _MAX_SCANS and (scans := _scans(data)) > _MAX_SCANS:
        raise BadItem("decode", "undecodable", f"{scans} scans; at most {_MAX_SCANS}")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has before its end; what is appended to it does not count (ITU-T T.81, B.1.1)."""
    position, scans = 2, 0
    while 0 <= (position := data.find(b"\xff", position)) <= len(data) - 4:
        marker = data[position + 1]
        if marker == 0xD9:
            break
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # a stuffed byte, or a marker without a segment
            position += 2
        else:
            scans += marker == 0xDA
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return scans


def sof_type(data: bytes) -> int | None:
    """The n of the first frame header SOFn of a JPEG (ITU-T T.81, table B.1): 3 is lossless. None if it has none."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, and one that is reserved
            return marker - 0xC0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
