"""JPEGs whose headers contradict themselves, or each other: the same ones for the same seed."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

Segment = tuple[int, bytes]  # marker and body; the last one of a file is SOS with all that follows, less EOI
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SIZES = (1, 8, 15, 16, 17, 32, 48, 64, 96, 112, 120, 128, 160, 192, 240, 512, 4000, 65_535)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colors with noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 255 / height, np.arange(width) * 255 / width)[..., None] / 2
    return (ramp + rng.integers(0, 64, (height, width, 3))).clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int, seed: int, mode: str = "RGB", **options: object) -> bytes:
    """A picture as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(picture(height, width, seed)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def segments(data: bytes) -> list[Segment]:
    """What an intact JPEG consists of."""
    found, position = [], 2
    while True:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            return [*found, (marker, data[position + 4 : -2])]
        found.append((marker, data[position + 4 : position + 2 + length]))
        position += 2 + length


def joined(parts: list[Segment]) -> bytes:
    """The file of these segments."""
    scan = parts[-1][1]
    heads = [_segment(marker, body) for marker, body in parts[:-1]]
    return b"".join([b"\xff\xd8", *heads, b"\xff\xda", struct.pack(">H", 2 + _scan_header(scan)), scan, b"\xff\xd9"])


def _segment(marker: int, body: bytes) -> bytes:
    if marker == 0x01 or 0xD0 <= marker <= 0xD9:
        return bytes([0xFF, marker])  # which has no length
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _scan_header(scan: bytes) -> int:
    return 4 + 2 * scan[0] if scan else 0


def exif(orientation: int, *, order: str = "<", kind: int = 3, before: bytes = b"", count: int | None = None) -> bytes:
    """The body of an APP1 segment with EXIF.

    Args:
        orientation: the value.
        order: "<" for little-endian, ">" for big-endian.
        kind: its type in TIFF: 1 BYTE, 3 SHORT, 4 LONG.
        before: entries that stand before it, of 12 bytes each.
        count: how many entries the directory claims to have; as many as there are unless given.
    """
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}.get(kind, "I"), orientation)
    entries = before + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    number = len(entries) // 12 if count is None else count
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, number) + entries + bytes(4)


def frame(height: int, width: int, components: int = 3, precision: int = 8, factors: bytes = b"\x22\x11\x11") -> bytes:
    """The body of a SOF segment."""
    parts = b"".join(bytes([n + 1, factors[n % len(factors)], min(n, 1)]) for n in range(components))
    return struct.pack(">BHHB", precision, height, width, components) + parts


def adobe(transform: int) -> bytes:
    """The body of an APP14 segment."""
    return b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def mutated(seed: int) -> bytes:
    """A JPEG with one to four faults, mostly in its header."""
    chance = random.Random(seed)
    height, width = chance.choice(((48, 64), (64, 96), (120, 160), (17, 33), (200, 120)))
    mode = chance.choice(("RGB",) * 6 + ("L", "CMYK"))
    options: dict[str, object] = {"quality": chance.choice((30, 75, 95)), "progressive": chance.random() < 0.25}
    if mode == "RGB":
        options["subsampling"] = chance.choice((0, 1, 2))
    if chance.random() < 0.2:
        options["restart_marker_rows"] = 1
    parts = segments(jpeg(height, width, seed % 7, mode, **options))
    for _ in range(chance.choice((1, 1, 2, 3, 4))):
        chance.choice(_FAULTS)(parts, chance)
    data = joined(parts)
    return chance.choice(_OUTSIDE)(data, chance) if chance.random() < 0.25 else data


def _place(parts: list[Segment], chance: random.Random) -> int:
    return chance.randrange(len(parts))  # before the scan


def _orientations(parts: list[Segment], chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 2, 3))):
        body = exif(
            chance.randrange(10),
            order=chance.choice("<>"),
            kind=chance.choice((1, 3, 3, 3, 4, 2, 7)),
            before=chance.choice((b"", b"\xff" * 12, bytes(12), chance.randbytes(12), chance.randbytes(24))),
            count=chance.choice((None, None, 0, 1, 10_000)),
        )
        parts.insert(_place(parts, chance), (0xE1, body))


def _another_frame(parts: list[Segment], chance: random.Random) -> None:
    body = frame(
        chance.choice(_SIZES), chance.choice(_SIZES), chance.choice((1, 2, 3, 3, 4)), chance.choice((8, 8, 12))
    )
    parts.insert(_place(parts, chance), (chance.choice(_FRAMES), body))


def _hidden_frame(parts: list[Segment], chance: random.Random) -> None:
    """A marker without a length, behind which one parser finds a segment and another a frame inside of an APPn."""
    body = frame(chance.choice(_SIZES), chance.choice(_SIZES))
    hidden = bytes([0xFF, chance.choice(_FRAMES)]) + struct.pack(">H", len(body) + 2) + body
    at = _place(parts, chance)
    lead = chance.randrange(0, 6)
    parts[at:at] = [
        (chance.choice((0x01, *range(0xD0, 0xD8))), b""),
        (chance.choice((0xE5, 0xFE, 0xE2)), bytes(lead) + hidden + chance.randbytes(chance.randrange(8))),
    ]


def _changed_frame(parts: list[Segment], chance: random.Random) -> None:
    found = [number for number, (marker, body) in enumerate(parts) if marker in _FRAMES and len(body) > 6]
    if not found:
        return
    at = chance.choice(found)
    marker, body = parts[at]
    changed = bytearray(body)
    field = chance.randrange(5)
    if field == 0:
        changed[1:5] = struct.pack(">HH", chance.choice(_SIZES), chance.choice(_SIZES))
    elif field == 1:
        changed[0] = chance.choice((2, 7, 8, 12, 16))
    elif field == 2:
        changed[5] = chance.choice((0, 1, 2, 3, 4, 255))
    elif field == 3:
        changed[chance.randrange(6, len(changed))] = chance.choice((0, 1, 2, 0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 255))
    else:
        marker = chance.choice(_FRAMES)
    parts[at] = marker, bytes(changed)


def _changed_scan(parts: list[Segment], chance: random.Random) -> None:
    marker, body = parts[-1]
    changed = bytearray(body)
    if chance.random() < 0.4:
        changed[chance.randrange(min(10, len(changed)))] = chance.randrange(256)
    else:
        at = chance.randrange(12, len(changed)) if len(changed) > 12 else 0
        kind = chance.choice((0xD8, 0xD9, 0xDC, 0xC0, 0xC2, 0xE1, 0x01, *range(0xD0, 0xD8), 0xDA, 0xC4, 0xDB))
        changed[at:at] = _segment(kind, frame(chance.choice(_SIZES), chance.choice(_SIZES)))
    parts[-1] = marker, bytes(changed)


def _colors(parts: list[Segment], chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2))):
        parts.insert(
            _place(parts, chance), (0xEE, adobe(chance.choice((0, 1, 2, 3)))[: chance.choice((12, 12, 11, 20))])
        )
    if chance.random() < 0.5:
        parts[:] = [part for part in parts if part[0] != 0xE0]


def _others(parts: list[Segment], chance: random.Random) -> None:
    """Segments that a frame has no use for, or that come twice."""
    kind = chance.choice((0xDC, 0xCC, 0xDE, 0xDF, 0xF0, 0xFD, 0x02, 0xC8, 0xDD, 0xD8, 0xD9, 0xE1, 0xE2, 0xEE, 0xFE))
    parts.insert(_place(parts, chance), (kind, chance.randbytes(chance.choice((0, 1, 2, 4, 6, 40)))))


def _moved(parts: list[Segment], chance: random.Random) -> None:
    if len(parts) < 3:
        return
    part = parts[_place(parts[:-1], chance)]
    action = chance.randrange(3)
    if action != 1:
        parts.insert(_place(parts, chance), part)
    if action != 0:
        parts.remove(part)
    if not any(0xC0 <= marker <= 0xC2 for marker, _ in parts):
        parts.insert(0, (0xC0, frame(48, 64)))


def _thumbnail(parts: list[Segment], chance: random.Random) -> None:
    """A JPEG of another size inside of EXIF, or as a second picture (CIPA DC-007)."""
    small = jpeg(chance.choice((8, 300)), chance.choice((16, 400)), 3)[: chance.choice((60_000, 500))]
    body = exif(chance.randrange(1, 9)) + small if chance.random() < 0.5 else b"MPF\0II*\0" + small
    parts.insert(_place(parts, chance), (0xE1 if body.startswith(b"E") else 0xE2, body))


_FAULTS: tuple[Callable[[list[Segment], random.Random], None], ...] = (
    _orientations, _another_frame, _hidden_frame, _hidden_frame, _changed_frame, _changed_scan, _changed_scan, _colors,
    _others, _moved, _thumbnail,
)  # fmt: skip


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(2, min(len(changed), chance.choice((40, 700, len(changed)))))] = chance.randrange(256)
    return bytes(changed)


def _other_length(data: bytes, chance: random.Random) -> bytes:
    at = data.find(b"\xff", chance.randrange(2, 600))
    return (
        data[: at + 2] + struct.pack(">H", chance.choice((0, 1, 2, 3, 17, 0xFFFF))) + data[at + 4 :] if at > 0 else data
    )


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(4, len(data))] + b"\xff\xd9"


def _doubled(data: bytes, chance: random.Random) -> bytes:
    return data + jpeg(chance.choice((16, 300)), chance.choice((16, 500)), 5)


def _filled(data: bytes, chance: random.Random) -> bytes:
    at = data.find(b"\xff", chance.randrange(2, 600))
    return data[:at] + b"\xff" * chance.randrange(1, 9) + data[at:]


_OUTSIDE: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flipped, _other_length, _cut, _doubled, _filled)


def pairs(height: int, width: int) -> Iterator[tuple[int, int, bytes]]:
    """A JPEG with two EXIF segments for every pair of orientations."""
    plain = segments(jpeg(height, width, 2))
    for first in range(1, 9):
        for second in range(1, 9):
            yield first, second, joined([(0xE1, exif(first)), (0xE1, exif(second)), *plain])
