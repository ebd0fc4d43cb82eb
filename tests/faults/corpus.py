"""Image files that are made to do harm, by kind of file and kind of damage: the same ones for the same seed."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import tifffile
from PIL import Image, features

SIDE = (40, 56)
TRUNCATIONS, FLIPS = 200, 2000
SPLICES = (2, 4, 16, 64, 256)
_EXPLICIT, _DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
_RLE, _JPEG = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50"
_FRAMES = 3


def corpus(
    seed: int = 0, *, truncations: int = TRUNCATIONS, flips: int = FLIPS, splices: Sequence[int] = SPLICES
) -> Iterator[tuple[str, str, str, bytes]]:
    """Kind, damage, file name and content of each file.

    Args:
        seed: of pictures and damage.
        truncations: cuts of each kind, at equal distances from its first byte to its last but one.
        flips: files of each kind in which one to eight bytes have another value.
        splices: how many bytes of each other kind replace the first ones of a file, in a file each.
    """
    chance = random.Random(seed)
    # Not every build of Pillow has every codec.
    kinds = {kind: each for kind, each in KINDS.items() if kind != "webp" or features.check("webp")}
    wholes = {kind: make(seed) for kind, (_, make) in kinds.items()}
    for kind, whole in wholes.items():
        extension = kinds[kind][0]
        for number in range(truncations):
            yield kind, "cut", f"{number:04}.{extension}", whole[: len(whole) * number // truncations]
        for number in range(flips):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 8))):
                data[chance.randrange(len(data))] = chance.randrange(256)
            yield kind, "flipped", f"{number:04}.{extension}", bytes(data)
        others = [other for name, other in wholes.items() if name != "webp"]
        for number, other in enumerate(others):
            for at, length in enumerate(splices):
                yield kind, "spliced", f"{number}-{at}.{extension}", other[:length] + whole[length:]
    for kind, damage, make in CRAFTED:
        if kind in kinds:
            yield kind, damage, f"0.{kinds[kind][0]}", make(wholes[kind])


def pixels(seed: int) -> Any:
    """A picture with smooth parts and noise: uint8, R, G, B."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(SIDE[0]) * 3, np.arange(SIDE[1]) * 2)[..., None] + np.array([0, 40, 90])
    return (ramp + rng.integers(0, 60, (*SIDE, 3))).clip(0, 255).astype(np.uint8)


def encoded(form: str, seed: int, **options: object) -> bytes:
    """A picture as a file of Pillow's."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, form, **options)
    return file.getvalue()


def deep(seed: int) -> Any:
    """The picture in 16 bits."""
    return pixels(seed).astype(np.uint16) * 257 - np.uint16(seed)


def png(samples: Any) -> bytes:
    """A picture in 16 bits as a file of libpng's."""
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(samples)))


def tiff(pixels: Any, **options: Any) -> bytes:
    """A picture as a file of tifffile's."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, rowsperstrip=None if "tile" in options else 16, **options)
    return file.getvalue()


def planar(seed: int, **options: Any) -> bytes:
    """The picture in 16 bits as a TIFF of three planes."""
    return tiff(np.moveaxis(deep(seed), 2, 0), photometric="rgb", planarconfig="separate", **options)


def dicom(seed: int, syntax: str = _EXPLICIT, *, frames: int = 1) -> bytes:
    """The picture in 12 bits as DICOM that is rescaled and windowed; as JPEG in 8 bits, of three colours."""
    stored = np.stack([deep(seed + frame)[..., 0] >> 4 for frame in range(frames)])
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = _EXPLICIT if syntax == _RLE else syntax
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.PatientName, file.Modality = "Nobody", "CT"
    file.Rows, file.Columns = SIDE
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.RescaleSlope, file.RescaleIntercept, file.WindowCenter, file.WindowWidth = "1.5", "-1024", "700", "4000"
    item = pydicom.Dataset()
    item.WindowCenter, item.WindowWidth = "800", "3000"
    group = pydicom.Dataset()
    group.FrameVOILUTSequence = [item]
    file.SharedFunctionalGroupsSequence = [group]
    if frames > 1:
        file.NumberOfFrames = frames
    file.PixelData = stored.astype("<u2").tobytes()
    file["PixelData"].VR = "OW"
    if syntax == _RLE:
        file.compress(_RLE)
    if syntax == _JPEG:
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PlanarConfiguration = 3, "YBR_FULL_422", 0
        file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
        file.PixelData = pydicom.encaps.encapsulate([encoded("JPEG", seed, quality=85)])
        file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


KINDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "jpeg": ("jpg", lambda seed: encoded("JPEG", seed, quality=85)),
    "jpeg progressive": ("jpg", lambda seed: encoded("JPEG", seed, quality=85, progressive=True)),
    "png": ("png", lambda seed: encoded("PNG", seed)),
    "bmp": ("bmp", lambda seed: encoded("BMP", seed)),
    "tiff": ("tif", lambda seed: encoded("TIFF", seed)),
    "tiff lzw": ("tif", lambda seed: encoded("TIFF", seed, compression="tiff_lzw")),
    "webp": ("webp", lambda seed: encoded("WEBP", seed, quality=80)),
    "gif": ("gif", lambda seed: encoded("GIF", seed)),
    "png gray16": ("png", lambda seed: png(deep(seed)[..., 0])),
    "png rgb16": ("png", lambda seed: png(deep(seed))),
    "png trns": ("png", lambda seed: _png_with(png(deep(seed)), b"tRNS", bytes(6))),
    "tiff tiled": ("tif", lambda seed: tiff(pixels(seed), tile=(16, 32), compression="zlib", photometric="rgb")),
    "tiff gray12": ("tif", lambda seed: tiff(deep(seed)[..., 0] >> 4, bitspersample=12)),
    "tiff gray16": ("tif", lambda seed: tiff(deep(seed)[..., 0])),
    "tiff gray16 deflate": ("tif", lambda seed: tiff(deep(seed)[..., 0], compression="zlib")),
    "tiff white16": ("tif", lambda seed: tiff(deep(seed)[..., 0], photometric="miniswhite", compression="packbits")),
    "tiff rgb16": ("tif", lambda seed: tiff(deep(seed), photometric="rgb")),
    "tiff rgb16 lzw": ("tif", lambda seed: tiff(deep(seed), photometric="rgb", compression="lzw")),
    "tiff planar16": ("tif", lambda seed: planar(seed)),
    "tiff planar16 zstd": ("tif", lambda seed: planar(seed, compression="zstd", predictor=True)),
    "dicom": ("dcm", dicom),
    "dicom deflated": ("dcm", lambda seed: dicom(seed, _DEFLATED)),
    "dicom rle": ("dcm", lambda seed: dicom(seed, _RLE)),
    "dicom frames": ("dcm", lambda seed: dicom(seed, frames=_FRAMES)),
    "dicom jpeg": ("dcm", lambda seed: dicom(seed, _JPEG)),
}


def _jpeg_frame(data: bytes) -> int:
    """Where a JPEG's frame header begins (ITU-T T.81, B.2.2)."""
    return next(at for at in range(len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC2))


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _jpeg(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: _patched(data, _jpeg_frame(data) + at, new)


def _png_size(width: int, height: int) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]

    return make


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png_with(data: bytes, name: bytes, content: bytes) -> bytes:
    """A chunk behind the header."""
    return data[:33] + _chunk(name, content) + data[33:]


def _deflated_zeros(gigabytes: int, before: bytes = b"") -> bytes:
    """Deflate data of what is given and so many zeros, in some megabytes a gigabyte."""
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    begin = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return begin + piece * (64 * gigabytes) + packer.flush()


def _png_bomb(depth: int, colour: int, bytes_a_pixel: float) -> Callable[[bytes], bytes]:
    """30,000 x 30,000 black pixels."""
    side = 30_000
    size = int(side * (1 + side * bytes_a_pixel))

    def make(data: bytes) -> bytes:
        content = b"\x78\xda" + _deflated_zeros(-(-size >> 30)) + bytes(4)
        header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
        return data[:8] + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")

    return make


def _png_two_sizes(data: bytes) -> bytes:
    """A header of 30,000 x 30,000 pixels, and the true one behind it."""
    return data[:8] + _chunk(b"IHDR", struct.pack(">II", 30_000, 30_000) + data[24:29]) + data[8:]


def _ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def _app1(data: bytes, exif: bytes) -> bytes:
    block = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", min(len(block) + 2, 0xFFFF)) + block + data[2:]


def _many_entries(data: bytes) -> bytes:
    entries = [(0x0112, 3, 1, 1)] + [(0x9000 + number % 4096, 4, 1, number) for number in range(5_400)]
    return _app1(data, b"II*\0" + struct.pack("<I", 8) + _ifd(entries))


def _claimed_entries(data: bytes) -> bytes:
    return _app1(data, b"II*\0" + struct.pack("<IH", 8, 10_000) + struct.pack("<HHII", 0x0112, 3, 1, 6))


def _nested_thumbnails(data: bytes) -> bytes:
    for _ in range(20):
        thumbnail = data if len(data) < 40_000 else data[:40_000]
        first = _ifd([(0x0112, 3, 1, 1)], 8 + 18)
        second = _ifd([(0x0201, 4, 1, 8 + 18 + 30), (0x0202, 4, 1, len(thumbnail))])
        data = _app1(data, b"II*\0" + struct.pack("<I", 8) + first + second + thumbnail)
    return data


def _cyclic_exif(data: bytes) -> bytes:
    return _app1(data, b"II*\0" + struct.pack("<I", 8) + _ifd([(0x0112, 3, 1, 6), (0x8769, 4, 1, 8)], 8))


def _tiff_cycle(data: bytes) -> bytes:
    """The directory says that it is followed by itself."""
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    return _patched(data, at + 2 + 12 * count, struct.pack("<I", at))


def _tiff_tag(tag: int, value: int) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        (at,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            if struct.unpack_from("<H", data, entry)[0] == tag:
                return _patched(data, entry + 2, struct.pack("<HII", 4, 1, value))
        return data

    return make


def _tiff_two_widths(data: bytes) -> bytes:
    """The directory, moved to the end, says a width of 30,000 first and the true one behind it."""
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries, following = data[at + 2 : at + 2 + 12 * count], data[at + 2 + 12 * count :][:4]
    wide = struct.pack("<HHII", 0x0100, 4, 1, 30_000)
    directory = struct.pack("<H", count + 1) + wide + entries + following
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


def _dicom_set(syntax: str = _EXPLICIT, **values: Any) -> Callable[[bytes], bytes]:
    """Attributes with other values."""

    def make(data: bytes) -> bytes:
        file = pydicom.dcmread(io.BytesIO(data))
        for name, value in values.items():
            setattr(file, name, value)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.save_as(buffer)
        return buffer.getvalue()

    return make


def _dicom_before(content: bytes) -> Callable[[bytes], bytes]:
    """Data elements at the beginning of the data set, before (0008,0016)."""

    def make(data: bytes) -> bytes:
        at = data.index(b"\x08\x00\x16\x00UI")
        return data[:at] + content + data[at:]

    return make


def _sequence(content: bytes) -> bytes:
    """The sequence (0008,0006) of undefined length."""
    return b"\x08\x00\x06\x00SQ\0\0\xff\xff\xff\xff" + content + b"\xfe\xff\xdd\xe0\0\0\0\0"


def _nested(depth: int) -> bytes:
    begin = b"\x08\x00\x06\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return begin * depth


def _elements(count: int) -> bytes:
    """So many empty data elements, each with another tag."""
    tags = np.arange(count, dtype=np.uint32)
    records = np.zeros(count, np.dtype([("group", "<u2"), ("element", "<u2"), ("rest", "S4")]))
    records["group"], records["element"], records["rest"] = 9 + 2 * (tags >> 16), tags & 0xFFFF, b"SH"
    return records.tobytes()


def _dicom_deflated(before: bytes, gigabytes: int) -> Callable[[bytes], bytes]:
    """A deflated data set that begins with what is given, and so many zeros."""

    def make(data: bytes) -> bytes:
        at = 144 + struct.unpack_from("<I", data, 140)[0]  # behind the meta information, whose length comes first
        return data[:at] + _deflated_zeros(gigabytes, before)

    return make


def _rle(make_segments: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Other segments in the only frame."""

    def make(data: bytes) -> bytes:
        file = pydicom.dcmread(io.BytesIO(data))
        frame = pydicom.encaps.get_frame(file.PixelData, 0, number_of_frames=1)
        count, *offsets = struct.unpack_from("<16I", frame)
        ends = [*offsets[1:count], len(frame)]
        segments = make_segments([frame[begin:end] for begin, end in zip(offsets, ends, strict=False)])
        starts = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
        header = struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments)))
        file.PixelData = pydicom.encaps.encapsulate([header + b"".join(segments)])
        buffer = io.BytesIO()
        file.save_as(buffer)
        return buffer.getvalue()

    return make


def _dicom_jpeg(make_jpeg: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Another JPEG inside."""

    def make(data: bytes) -> bytes:
        file = pydicom.dcmread(io.BytesIO(data))
        jpeg = pydicom.encaps.get_frame(file.PixelData, 0, number_of_frames=1)
        file.PixelData = pydicom.encaps.encapsulate([make_jpeg(jpeg.rstrip(b"\0"))])
        buffer = io.BytesIO()
        file.save_as(buffer)
        return buffer.getvalue()

    return make


def _scans(data: bytes) -> bytes:
    return data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 10_000 + data[-2:]


def _one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1), 99).save(file, "JPEG")
    return file.getvalue()


_ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"  # of no bytes
_PIXELS = struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OW", 0xFFFFFFF0)
CRAFTED: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("jpeg", "0x0", _jpeg(5, b"\0\0\0\0")),
    ("jpeg", "absurd size", _jpeg(5, b"\xff\xff\xff\xff")),
    ("jpeg", "header claims a larger size", _jpeg(5, b"\x08\x00\x08\x00")),
    ("jpeg", "arithmetic", _jpeg(1, b"\xc9")),
    ("jpeg", "lossless", _jpeg(1, b"\xc3")),
    ("jpeg", "hierarchical", _jpeg(1, b"\xc5")),
    ("jpeg", "12 bits", _jpeg(4, b"\x0c")),
    ("jpeg", "0 components", _jpeg(9, b"\0")),
    ("jpeg", "sampling 15x15", _jpeg(11, b"\xff")),
    ("jpeg", "no end marker", lambda data: data[:-2]),
    ("jpeg", "garbage after the end", lambda data: data + bytes(100_000)),
    ("jpeg", "10,000 scans", _scans),
    ("jpeg", "EXIF of 5,401 entries", _many_entries),
    ("jpeg", "EXIF that claims 10,000 entries", _claimed_entries),
    ("jpeg", "nested thumbnails", _nested_thumbnails),
    ("jpeg", "cyclic EXIF", _cyclic_exif),
    ("png", "0x0", _png_size(0, 0)),
    ("png", "absurd size", _png_size(2**31 - 1, 2**31 - 1)),
    ("png", "header claims a larger size", _png_size(5_000, 5_000)),
    ("png", "bomb", _png_bomb(1, 0, 1 / 8)),
    ("png", "bomb in a text chunk", lambda data: _png_with(data, b"zTXt", b"a\0\0\x78\xda" + _deflated_zeros(2))),
    ("png", "bomb in an ICC profile", lambda data: _png_with(data, b"iCCP", b"a\0\0\x78\xda" + _deflated_zeros(2))),
    ("png", "1,000,000 chunks", lambda data: data[:33] + _chunk(b"teXt", b"") * 1_000_000 + data[33:]),
    ("bmp", "0x0", lambda data: _patched(data, 18, bytes(8))),
    ("bmp", "absurd size", lambda data: _patched(data, 18, b"\xff\xff\xff\x7f" * 2)),
    ("bmp", "negative height", lambda data: _patched(data, 22, struct.pack("<i", -(2**31)))),
    ("tiff", "cyclic", _tiff_cycle),
    ("tiff", "absurd size", _tiff_tag(0x0100, 2**31 - 1)),
    ("tiff", "width 0", _tiff_tag(0x0100, 0)),
    ("tiff", "absurd strip", _tiff_tag(0x0117, 2**32 - 1)),
    ("tiff", "65,535 samples", _tiff_tag(0x0115, 65_535)),
    ("webp", "absurd size", lambda data: _patched(data, 26, b"\xff\x3f\xff\x3f")),
    ("gif", "absurd size", lambda data: _patched(data, 6, b"\xff\xff\xff\xff")),
    ("gif", "0x0", lambda data: _patched(data, 6, bytes(4))),
    ("png gray16", "bomb", _png_bomb(16, 0, 2)),
    ("png rgb16", "0x0", _png_size(0, 0)),
    ("png rgb16", "absurd size", _png_size(2**31 - 1, 2**31 - 1)),
    ("png rgb16", "header claims a larger size", _png_size(5_000, 5_000)),
    ("png rgb16", "two sizes", _png_two_sizes),
    ("png rgb16", "bomb", _png_bomb(16, 2, 6)),
    ("tiff", "absurd rows per strip", _tiff_tag(0x0116, 2**32 - 1)),
    ("tiff tiled", "tile of 26,000 x 16", _tiff_tag(0x0142, 26_000)),
    ("tiff tiled", "tile of 32 x 2**31", _tiff_tag(0x0143, 2**31)),
    ("tiff tiled", "tile of height 0", _tiff_tag(0x0143, 0)),
    ("tiff gray12", "absurd rows per strip", _tiff_tag(0x0116, 2**32 - 1)),
    ("tiff gray12", "header claims a larger size", _tiff_tag(0x0101, 5_000)),
    ("tiff white16", "absurd strip", _tiff_tag(0x0117, 2**32 - 1)),
    ("tiff planar16", "absurd size", _tiff_tag(0x0100, 2**31 - 1)),
    ("tiff planar16", "header claims a larger size", _tiff_tag(0x0101, 5_000)),
    ("tiff planar16", "65,535 samples", _tiff_tag(0x0115, 65_535)),
    ("tiff planar16", "two widths", _tiff_two_widths),
    ("tiff planar16 zstd", "cyclic", _tiff_cycle),
    ("tiff gray16", "absurd size", _tiff_tag(0x0100, 2**31 - 1)),
    ("tiff rgb16", "cyclic", _tiff_cycle),
    ("tiff rgb16", "absurd size", _tiff_tag(0x0100, 2**31 - 1)),
    ("tiff rgb16", "header claims a larger size", _tiff_tag(0x0101, 5_000)),
    ("tiff rgb16", "two widths", _tiff_two_widths),
    ("tiff rgb16", "width 0", _tiff_tag(0x0100, 0)),
    ("tiff rgb16", "absurd strip", _tiff_tag(0x0117, 2**32 - 1)),
    ("tiff rgb16", "65,535 samples", _tiff_tag(0x0115, 65_535)),
    ("tiff rgb16 lzw", "two widths", _tiff_two_widths),
    ("dicom", "0x0", _dicom_set(Rows=0, Columns=0)),
    ("dicom", "absurd size", _dicom_set(Rows=65_535, Columns=65_535)),
    ("dicom", "header claims a larger size", _dicom_set(Rows=5_000, Columns=5_000)),
    ("dicom", "65,535 samples", _dicom_set(SamplesPerPixel=65_535)),
    ("dicom", "64 bits", _dicom_set(BitsAllocated=64, BitsStored=64)),
    ("dicom", "2,000,000,000 frames", _dicom_set(NumberOfFrames=2_000_000_000)),
    ("dicom", "5,000 frames", _dicom_set(NumberOfFrames=5_000)),
    ("dicom", "slope NaN", _dicom_set(RescaleSlope="nan")),
    ("dicom", "slope 1e308", _dicom_set(RescaleSlope="1e308")),
    ("dicom", "nested sequences", _dicom_before(_nested(20_000))),
    ("dicom", "3,000,000 items", _dicom_before(_sequence(_ITEM * 3_000_000))),
    ("dicom", "3,000,000 elements", _dicom_before(_elements(3_000_000))),
    ("dicom deflated", "bomb", _dicom_deflated(_PIXELS, 4)),
    ("dicom deflated", "bomb before the pixels", _dicom_deflated(struct.pack("<HH2s2xI", 9, 1, b"OB", 2**32 - 2), 4)),
    ("dicom deflated", "bomb of elements", _dicom_deflated(_elements(3_000_000), 0)),
    ("dicom rle", "bomb", _rle(lambda segments: [b"\x81\0" * 5_000_000, segments[1]])),
    ("dicom rle", "15 segments", _rle(lambda segments: segments * 7 + segments[:1])),
    ("dicom rle", "empty segments", _rle(lambda segments: [b"", b""])),
    ("dicom rle", "absurd size", _dicom_set(Rows=65_535, Columns=65_535)),
    ("dicom jpeg", "header claims a larger size", _dicom_jpeg(_jpeg(5, b"\x08\x00\x08\x00"))),
    ("dicom jpeg", "absurd size", _dicom_jpeg(_jpeg(5, b"\xff\x00\xff\x00"))),
    ("dicom jpeg", "one pixel", _dicom_jpeg(lambda _: _one_pixel())),
    ("dicom jpeg", "10,000 scans", _dicom_jpeg(_scans)),
    ("dicom jpeg", "zeros instead of a JPEG", _dicom_jpeg(lambda data: bytes(len(data)))),
)
