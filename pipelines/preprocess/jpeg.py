"""Parses a JPEG's header once, for every decoder (ITU-T T.81, annex B).

Each decoder has its own header parser. If two of them disagree, a buffer may be allocated for one image size while the
decoder writes another. So a JPEG is `plain` only if every parser must read its header alike, and only plain JPEGs go to
a decoder that works on many images in one process.
"""

from __future__ import annotations

import functools
import re
import struct
from typing import NamedTuple

from ..sources.rejects import BadItem
from .exif import EXIF_HEADER, orientation_in

_MAX_SCANS = 256  # as in nvImageCodec: each scan of a progressive JPEG costs a pass over the whole image
_MAX_SEGMENTS = 65_536  # markers included; an ICC profile takes up to 255, extended XMP a few thousand

_segment = struct.Struct(">BBH").unpack_from
_frame = struct.Struct(">BHHB").unpack_from
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # a marker with a length, or the end of the image

_SOI, _EOI, _SOS, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # these three are DHT, JPG and DAC
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # frames that decoders decode in one scan if it has all components
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))  # TEM, RST0 to RST7, SOI
_COLOR_BYTES = {0xE0: 16, _APP14: 14}  # the least length at which decoders use a JFIF or Adobe segment
# The markers that a plain JPEG's header may have: SOF0 to SOF2, DHT, DQT, DRI, APP0 to APP15, COM, and SOS at its end.
_PLAIN = frozenset((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE, _SOS))


class JpegHeader(NamedTuple):
    """What a JPEG contains before the data of its first scan.

    Attributes:
        frame: the second byte of the first SOF marker, 0xC0 for a baseline JPEG; None if there is none.
        height, width: pixels, as stored.
        precision: bits per sample.
        components: 1 for gray, 3 for color, 4 for CMYK or YCCK.
        adobe_transform: the color transform of the last Adobe marker: 0, 1 or 2; None if there is none.
        orientation: 1 to 8, from the first EXIF segment, as defined in `exif.py`.
        plain: whether it is a complete 8-bit JPEG in gray or YCbCr whose header every decoder reads alike.
    """

    frame: int | None
    height: int
    width: int
    precision: int
    components: int
    adobe_transform: int | None
    orientation: int
    plain: bool


def read_header(data: bytes | memoryview) -> JpegHeader | None:
    """The header of a JPEG; None if the data does not begin like a JPEG.

    After damaged data, parsing continues at the next marker, as in libjpeg.

    Args:
        data: the whole file.

    Raises:
        BadItem: so many segments or scans that decoders would take very long.
    """
    end = len(data)
    if end < 4 or data[0] != 0xFF or data[1] != _SOI:
        return None
    plain = data[end - 2] == 0xFF and data[end - 1] == _EOI
    frame = adobe_transform = orientation = None
    height = width = precision = components = segments = 0
    names = scanned = b""  # component identifiers: of the frame, and of its first scan
    position = 2
    while position + 4 <= end:
        prefix, marker, length = _segment(data, position)
        if prefix != 0xFF or marker in (0x00, 0xFF):
            plain = False
            found = _NEXT_MARKER.search(data, position)
            if found is None:
                break
            position = found.start()
            continue
        segments += 1
        if segments > _MAX_SEGMENTS:
            raise BadItem("decode", "undecodable", f"more than {_MAX_SEGMENTS} segments before the first scan")
        if marker not in _PLAIN:
            plain = False
            if marker in _WITHOUT_LENGTH:
                position += 2
                continue
        body, after = position + 4, position + 2 + length
        if after > end or length < 3 or marker == _EOI:
            plain = False
            break
        if marker == _SOS:
            scanned = bytes(data[body + 1 : after - 3 : 2])
            plain = plain and length == 6 + 2 * data[body] and _are_of(scanned, names)
            break
        if marker in _FRAMES:
            if frame is not None or length < 8:
                plain = False
            else:
                frame = marker
                precision, height, width, components = _frame(data, body)
                specifications = bytes(data[body + 6 : after])
                names = specifications[::3]
                plain = plain and height > 0 and width > 0 and _is_plain_frame(precision, components, specifications)
        elif marker == _APP1 and orientation is None and data[body : body + 6] == EXIF_HEADER:
            orientation = orientation_in(data[body + 6 : after])
        elif marker == _APP14 and data[body : body + 5] == b"Adobe":
            plain = plain and length >= 14 and adobe_transform is None
            adobe_transform = data[body + 11] if length >= 14 else adobe_transform
        position = after
    if not scanned or (components == 3 and adobe_transform not in (None, 1)):
        plain = False
    if not (frame in _SEQUENTIAL and len(scanned) == components):
        _check_scans(bytes(data))
    return JpegHeader(frame, height, width, precision, components, adobe_transform, orientation or 1, plain)


@functools.lru_cache  # most files of a collection share a few combinations
def _is_plain_frame(precision: int, components: int, specifications: bytes) -> bool:
    """Whether the parameters of a frame (B.2.2) are ordinary; `specifications` has three bytes per component."""
    names, factors, tables = specifications[::3], specifications[1::3], specifications[2::3]
    return (
        precision == 8
        and components in (1, 3)
        and len(specifications) == 3 * components
        and _are_of(names, names)
        and names != b"RGB"  # libjpeg reads this as R,G,B, other decoders as YCbCr
        and all(0 < factor >> 4 <= 4 and 0 < factor & 15 <= 4 for factor in factors)
        and max(tables) < 4
    )


@functools.lru_cache
def _are_of(some: bytes, names: bytes) -> bool:
    """Whether `some` is a non-empty list of distinct identifiers that are all in `names`."""
    return 0 < len(some) == len({*some} & {*names})


def without_metadata(data: bytes) -> bytes:
    """A JPEG without the segments that do not affect pixels; only the EXIF orientation is kept.

    Pillow refuses a whole file if one of these segments is invalid. JFIF and Adobe segments are kept, since they decide
    colors.
    """
    header = read_header(data)
    assert header is not None
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, header.orientation, 0)
    exif = EXIF_HEADER + struct.pack("<4sIH", b"II*\0", 8, 1) + entry + bytes(4)
    kept = [b"\xff\xd8\xff\xe1", struct.pack(">H", len(exif) + 2), exif]
    position = 2
    while position + 4 <= len(data):
        prefix, marker, length = _segment(data, position)
        after = position + 2 + length
        if prefix != 0xFF or marker == _SOS or marker < 0xC0 or marker in _WITHOUT_LENGTH or after > len(data):
            break
        decides = marker < 0xE0 or marker > 0xFE or length >= _COLOR_BYTES.get(marker, 1 << 16)
        kept += [data[position:after]] if decides else []
        position = after
    return b"".join([*kept, data[position:]])


def _check_scans(data: bytes) -> None:
    """Raises BadItem if a JPEG has too many scans before its end marker; data after that is ignored (B.1.1)."""
    if data.count(b"\xff\xda") <= _MAX_SCANS:
        return
    scans = segments = position = 0
    while (found := _SEGMENT.search(data, position)) and found.end() + 2 <= len(data):
        marker = data[found.end() - 1]
        segments += 1
        scans += marker == _SOS
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            what = f"{_MAX_SCANS} scans" if scans > _MAX_SCANS else f"{_MAX_SEGMENTS} segments"
            raise BadItem("decode", "undecodable", f"more than {what}")
        if marker == _EOI:
            return
        # When libjpeg looks for a restart marker, it takes markers below 0xC0 for markers without a length, too.
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
