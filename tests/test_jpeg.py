"""The header of a JPEG: what it says, and whether anything in it could be read in two ways."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import headers
import numpy as np
import pytest
from headers import Segment, adobe, exif, frame, joined, jpeg, segments
from PIL import Image

from gpu_npz.preprocess.jpeg import JpegHeader, read_header, without_metadata
from gpu_npz.sources.rejects import BadItem

Edit = Callable[[list[Segment]], object]


def header(data: bytes) -> JpegHeader:
    found = read_header(data)
    assert found is not None
    assert found == read_header(memoryview(np.frombuffer(data, np.uint8)))
    return found


def edited(edit: Edit, *, mode: str = "RGB") -> bytes:
    """A JPEG of 48 x 64 pixels after a change to its segments."""
    parts = segments(jpeg(48, 64, 0, mode))
    edit(parts)
    return joined(parts)


def insert(marker: int, body: bytes = b"", at: int = 1) -> Edit:
    return lambda parts: parts.insert(at, (marker, body))


def frame_edit(start: int, new: bytes) -> Edit:
    """Bytes of the frame's parameters: 0 is the precision, 1 the height, 3 the width, 5 the number of components."""

    def edit(parts: list[Segment]) -> None:
        at = next(number for number, (marker, _) in enumerate(parts) if marker == 0xC0)
        body = parts[at][1]
        parts[at] = 0xC0, body[:start] + new + body[start + len(new) :]

    return edit


def scan_edit(start: int, new: bytes) -> Edit:
    def edit(parts: list[Segment]) -> None:
        marker, body = parts[-1]
        parts[-1] = marker, body[:start] + new + body[start + len(new) :]

    return edit


def frame_type(marker: int) -> Edit:
    def edit(parts: list[Segment]) -> None:
        parts[:] = [(marker if kind == 0xC0 else kind, body) for kind, body in parts]

    return edit


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize(("mode", "components"), [("RGB", 3), ("L", 1)])
def test_jpegs_as_cameras_and_libraries_write_them_are_plain(
    mode: str, components: int, options: dict[str, int]
) -> None:
    extras = {"icc_profile": bytes(200_000), "comment": b"none", "exif": exif(8)}
    found = header(jpeg(48, 64, 1, mode, **options, **extras))
    assert (found.height, found.width, found.components, found.precision) == (48, 64, components, 8)
    assert found.frame == (0xC2 if options.get("progressive") else 0xC0)
    assert (found.orientation, found.adobe_transform, found.plain) == (8, None, True)


def test_several_pictures_in_a_file_and_rubbish_in_segments_leave_the_header_of_the_first() -> None:
    file = io.BytesIO()
    first, second = (Image.fromarray(headers.picture(*size, 0)) for size in ((48, 64), (24, 32)))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert header(file.getvalue())[:3] == (0xC0, 48, 64)
    assert header(jpeg(48, 64, 0) + jpeg(24, 32, 0))[:3] == (0xC0, 48, 64)
    thumbnail = exif(6) + jpeg(24, 32, 0)
    found = header(edited(insert(0xE1, thumbnail)))
    assert (found.height, found.width, found.orientation, found.plain) == (48, 64, 6, True)


def several(*edits: Edit) -> Edit:
    return lambda parts: [edit(parts) for edit in edits]


NAMED_RGB = several(
    *(frame_edit(6 + 3 * at, bytes([name])) for at, name in enumerate(b"RGB")),
    *(scan_edit(1 + 2 * at, bytes([name])) for at, name in enumerate(b"RGB")),
)
NOT_PLAIN: dict[str, bytes] = {
    "cut": jpeg(48, 64, 0)[:-2],
    "zeros behind": jpeg(48, 64, 0) + bytes(9),
    "no scan": joined(segments(jpeg(48, 64, 0)))[:200] + b"\xff\xd9",
    "no frame": edited(lambda parts: parts.remove(next(part for part in parts if part[0] == 0xC0))),
    "EOI before the scan": edited(insert(0xD9)),
    "a second SOI": edited(insert(0xD8)),
    "a stuffed byte": jpeg(48, 64, 0).replace(b"\xff\xdb", b"\xff\x00\xff\xdb", 1),
    "a fill byte": jpeg(48, 64, 0).replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    "rubbish between segments": jpeg(48, 64, 0).replace(b"\xff\xdb", b"abc\xff\xdb", 1),
    "CMYK": jpeg(48, 64, 0, "CMYK"),
    "CMYK without an Adobe marker": edited(
        lambda parts: parts.remove(next(part for part in parts if part[0] == 0xEE)), mode="CMYK"
    ),
    "height 0": edited(frame_edit(1, b"\0\0")),
    "width 0": edited(frame_edit(3, b"\0\0")),
    "0 components": edited(frame_edit(5, b"\0")),
    "2 components": edited(frame_edit(5, b"\2")),
    "4 components of which the frame has 3": edited(frame_edit(5, b"\4")),
    "12 bits": edited(frame_edit(0, b"\x0c")),
    "sampling by 0": edited(frame_edit(7, b"\x02")),
    "sampling by 5": edited(frame_edit(7, b"\x51")),
    "quantization table 4": edited(frame_edit(8, b"\4")),
    "two components of one name": edited(frame_edit(9, b"\1")),
    "R, G, B by name": edited(NAMED_RGB),
    "a scan of an unknown component": edited(scan_edit(1, b"\7")),
    "a scan of 4 components": edited(scan_edit(0, b"\4")),
    "a scan of none": edited(scan_edit(0, b"\0")),
    "R, G, B by the Adobe marker": edited(insert(0xEE, adobe(0))),
    "YCCK in 3 components": edited(insert(0xEE, adobe(2))),
    "a short Adobe marker": edited(insert(0xEE, b"Adobe\0\x64")),
    "two Adobe markers": edited(several(insert(0xEE, adobe(1)), insert(0xEE, adobe(1)))),
    "two frames": edited(insert(0xC0, frame(24, 32))),
    "two frames of two kinds": edited(insert(0xC3, frame(24, 32))),
    "DNL": edited(insert(0xDC, b"\0\x20")),
    "hierarchical": edited(insert(0xDE, frame(48, 64))),
    "arithmetic conditioning": edited(insert(0xCC, b"\0\0")),
    "a reserved marker": edited(insert(0xF0, b"\0\0")),
    **{f"a marker without a length, {marker:02x}": edited(insert(marker)) for marker in (0x01, 0xD0, 0xD7)},
    **{
        f"frame {marker:02x}": edited(frame_type(marker))
        for marker in (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
    },
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_two_decoders_could_read_differently_is_not_plain(kind: str) -> None:
    assert header(jpeg(48, 64, 0)).plain
    assert not header(NOT_PLAIN[kind]).plain


def test_a_frame_that_a_marker_without_a_length_hides_is_not_taken_for_the_frame() -> None:
    hidden = b"\xff\xc0\x00\x11" + frame(24, 32)
    parts = segments(jpeg(48, 64, 0))
    parts[1:1] = [(0x01, b""), (0xE5, bytes(2) + hidden)]
    found = header(joined(parts))
    assert (found.height, found.width, found.plain) == (48, 64, False)


@pytest.mark.parametrize("length", [0, 1, 2, 0xFFFF])
def test_a_segment_of_a_wrong_length_ends_the_header(length: int) -> None:
    data = edited(insert(0xFE, b"a comment"))
    at = data.index(b"\xff\xfe") + 2
    assert not header(data[:at] + struct.pack(">H", length) + data[at + 2 :]).plain


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG", bytes(99)])
def test_what_does_not_begin_as_a_jpeg_has_no_header(data: bytes) -> None:
    assert read_header(data) is None


def test_every_cut_of_a_jpeg_has_a_header_that_is_not_plain() -> None:
    data = jpeg(48, 64, 0, exif=exif(6))
    for end in range(4, 800):
        assert not header(data[:end]).plain
        header(data[:end] + b"\xff\xd9")


def test_too_many_scans_and_segments_are_refused_and_many_are_not() -> None:
    progressive = segments(jpeg(48, 64, 0, progressive=True))
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    progressive[-1] = 0xDA, progressive[-1][1] + scan * 300
    with pytest.raises(BadItem, match="more than 256 scans"):
        read_header(joined(progressive))
    assert header(edited(lambda parts: parts.extend([(0xFE, b"x")] * 60_000 + [parts.pop()]))).plain
    with pytest.raises(BadItem, match="more than 65536 segments"):
        read_header(edited(lambda parts: parts.extend([(0xFE, b"x")] * 66_000 + [parts.pop()])))


def test_scans_are_counted_behind_what_only_libjpeg_takes_for_markers() -> None:
    progressive = segments(jpeg(48, 64, 0, progressive=True))
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    progressive[-1] = 0xDA, progressive[-1][1] + (b"\xff\x02" + scan) * 300
    with pytest.raises(BadItem, match="more than 256 scans"):
        read_header(joined(progressive))


def test_without_metadata_a_jpeg_has_its_pixels_its_colors_and_its_orientation() -> None:
    for mode, extras in (("RGB", []), ("CMYK", []), ("RGB", [(0xEE, adobe(0))]), ("L", [])):
        plain = segments(jpeg(48, 64, 0, mode))
        more = [(0xE1, exif(6)), (0xE1, exif(3)), (0xE2, b"ICC_PROFILE\0"), (0xFE, b"none"), (0xEE, b"Adobe"), *extras]
        data = joined([*plain[:1], *more, *plain[1:]])
        bare = without_metadata(data)
        assert len(bare) < len(data)
        assert (read_header(bare) or header(data)).orientation == 6
        with Image.open(io.BytesIO(joined([*plain[:1], *extras, *plain[1:]]))) as expected:
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(bare))), np.asarray(expected))


def test_no_mutation_of_a_header_raises_anything_but_a_reject() -> None:
    for seed in range(1000):
        try:
            found = read_header(headers.mutated(seed))
        except BadItem:
            continue
        if found is not None and found.plain:
            assert found.height > 0 < found.width
            assert 1 <= found.orientation <= 8
