"""DICOM: each frame's levels are those of the written formulas, whatever the file's encoding."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import decode, encode, file_bytes, pack, pillow_of

import gpu_npz
from gpu_npz import BuildConfig, Preprocess
from gpu_npz.audit.compare import compare
from gpu_npz.bench.pictures import paint
from gpu_npz.builder.estimate import estimate
from gpu_npz.cli.main import run
from gpu_npz.dataset.plan import Plan
from gpu_npz.dataset.selection import _noted, listed
from gpu_npz.errors import BackendError, ImageError
from gpu_npz.preprocess.dicom import DicomFile, is_dicom
from gpu_npz.preprocess.pillow import dicom_size, first_size
from gpu_npz.sources import open_source
from gpu_npz.sources.dicom_frames import FRAME_NAMES, frame_count, read_dicom
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import BadItem

pydicom = pytest.importorskip("pydicom")
HEIGHT, WIDTH = 12, 10
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
RLE, DEFLATED = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99"


def dicom(stored: NDArray[Any], syntax: str = EXPLICIT, **attributes: Any) -> bytes:
    """A Secondary Capture of stored values (H, W), (H, W, 3) or, with NumberOfFrames, (N, H, W)."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = EXPLICIT if syntax == RLE else syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = pydicom.Dataset()
    file.file_meta = meta
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colours = stored.shape[-1] == 3
    file.Rows, file.Columns = stored.shape[-3:-1] if colours else stored.shape[-2:]
    file.SamplesPerPixel = 3 if colours else 1
    file.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        file.PlanarConfiguration = 0
    file.BitsAllocated = file.BitsStored = 8 * stored.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(file, name, value)
    if "BitsStored" in attributes:
        file.HighBit = file.BitsStored - 1
    file.PixelData = stored.astype(stored.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
    file["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    if syntax == RLE:
        file.compress(RLE)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


def values(dtype: str, seed: int = 0, shape: tuple[int, ...] = (HEIGHT, WIDTH)) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    stored = np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape, dtype)
    stored.flat[:2] = limits.min, limits.max
    return stored


decoder_of = functools.partial(pillow_of, size=(HEIGHT, WIDTH))
decoded = functools.partial(decode, name="scan.dcm", size=(HEIGHT, WIDTH))


def windowed(x: NDArray[Any], low: float, high: float, top: int) -> NDArray[Any]:
    """Levels by the formula in dicom.py's docstring, in gray as R, G and B."""
    scaled = np.rint(top * np.clip((x.astype(np.float64) - low) / (high - low), 0, 1))
    return np.repeat(scaled[..., None], 3, axis=2)


def voi(x: NDArray[Any], center: float, width: float, top: int) -> NDArray[Any]:
    """PS3.3, C.11.2.1.2.1, as its pseudocode has it, from 0 to `top`."""
    x = x.astype(np.float64)
    between = ((x - (center - 0.5)) / (width - 1) + 0.5) * top
    found = np.where(x <= center - 0.5 - (width - 1) / 2, 0, np.where(x > center - 0.5 + (width - 1) / 2, top, between))
    return np.repeat(np.rint(found)[..., None], 3, axis=2)


DEPTHS = pytest.mark.parametrize("depth", [8, 16])


def top_of(depth: int) -> int:
    return 2**depth - 1


@DEPTHS
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, RLE, DEFLATED])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_without_a_window_the_frame_s_own_values_are_the_range(dtype: str, syntax: str, depth: int) -> None:
    stored = values(dtype)
    limits = np.iinfo(dtype)
    found = decoded(dicom(stored, syntax), bit_depth=depth)
    assert found.dtype == f"uint{depth}"
    np.testing.assert_array_equal(found, windowed(stored, limits.min, limits.max, top_of(depth)))


@DEPTHS
def test_values_are_rescaled_and_seen_through_the_file_s_first_window(depth: int) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH), np.uint16)
    ct = {"RescaleSlope": "1.5", "RescaleIntercept": "-1024", "BitsStored": 12}
    units = stored * 1.5 - 1024
    data = dicom(stored, WindowCenter=["40", "600"], WindowWidth=["400", "1600"], **ct)
    np.testing.assert_array_equal(decoded(data, bit_depth=depth), voi(units, 40, 400, top_of(depth)))
    exact = dicom(stored, WindowCenter="40", WindowWidth="400", VOILUTFunction="LINEAR_EXACT", **ct)
    np.testing.assert_array_equal(decoded(exact, bit_depth=depth), windowed(units, -160, 240, top_of(depth)))
    step = dicom(stored, WindowCenter="40.5", WindowWidth="1", **ct)
    np.testing.assert_array_equal(decoded(step, bit_depth=depth)[..., 0], (units > 40) * top_of(depth))
    given = decoded(data, bit_depth=depth, dicom_window=(-1000, 400.5))
    np.testing.assert_array_equal(given, windowed(units, -1000, 400.5, top_of(depth)))


@DEPTHS
@pytest.mark.parametrize("window", [{}, {"WindowCenter": "100", "WindowWidth": "50"}], ids=["range", "window"])
def test_monochrome1_is_inverted(window: dict[str, str], depth: int) -> None:
    stored = values("uint8")
    for setting in (None, (10, 30)):
        plain = decoded(dicom(stored, **window), bit_depth=depth, dicom_window=setting)
        inverted = dicom(stored, PhotometricInterpretation="MONOCHROME1", **window)
        np.testing.assert_array_equal(
            decoded(inverted, bit_depth=depth, dicom_window=setting), top_of(depth) - plain.astype(int)
        )


@DEPTHS
@pytest.mark.parametrize("syntax", [EXPLICIT, RLE])
def test_colours_are_kept(syntax: str, depth: int) -> None:
    stored = values("uint8", shape=(HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(
        decoded(dicom(stored, syntax), bit_depth=depth), stored * np.int64(top_of(depth) // 255)
    )
    deep = values("uint16", shape=(HEIGHT, WIDTH, 3))
    expected = deep if depth == 16 else np.rint(deep / 257)
    np.testing.assert_array_equal(decoded(dicom(deep, syntax), bit_depth=depth, dicom_window=(0, 9)), expected)
    data = dicom(stored, PhotometricInterpretation="YBR_FULL")
    red = stored[..., 0] + 1.402 * (stored[..., 2].astype(float) - 128)  # PS3.3, C.7.6.3.1.2
    found = decoded(data, bit_depth=depth)[..., 0] / (top_of(depth) / 255)
    assert np.abs(found - red.clip(0, 255)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_inside_has_the_pixels_that_pillow_gives_it(channels: int) -> None:
    if not pydicom.pixels.decoders.JPEGBaseline8BitDecoder.is_available:
        pytest.skip("pydicom knows no Pillow-SIMD")
    stored = paint(HEIGHT, WIDTH, 0) if channels == 3 else paint(HEIGHT, WIDTH, 0)[..., 0].copy()
    file, jpeg = pydicom.dcmread(io.BytesIO(dicom(stored))), encode(stored)
    file.PixelData = pydicom.encaps.encapsulate([jpeg])
    file["PixelData"].is_undefined_length = True
    file.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    file.PhotometricInterpretation = "YBR_FULL_422" if channels == 3 else "MONOCHROME2"
    buffer = io.BytesIO()
    file.save_as(buffer)
    found = decoded(buffer.getvalue(), dicom_window=(0, 255))
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, RLE])
def test_each_frame_is_an_image_with_a_range_of_its_own(syntax: str, tmp_path: Path) -> None:
    stored = np.stack([values("int16", seed) // (seed + 1) for seed in range(4)]).astype(np.int16)
    data = dicom(stored, syntax, NumberOfFrames=4, RescaleSlope="2", RescaleIntercept="7")
    for frame in (3, 0, 2):
        units = stored[frame] * 2.0 + 7
        np.testing.assert_array_equal(decoded(data, frame), windowed(units, units.min(), units.max(), 255))
    (tmp_path / "scan.dcm").write_bytes(data)
    with (tmp_path / "scan.dcm").open("rb") as file:
        assert frame_count(data) == frame_count(tmp_path / "scan.dcm") == frame_count(file) == 4
    assert frame_count(dicom(stored[0])) == 1
    with pytest.raises(BadItem) as caught:
        decoded(data, 4)
    assert caught.value.code == "undecodable"


def test_frames_are_counted_in_silence_where_values_are_odd() -> None:
    data = dicom(values("uint8", shape=(3, HEIGHT, WIDTH)), NumberOfFrames=3, SpecificCharacterSet="ISO_IR 100")
    odd = {
        "syntax": data.replace(EXPLICIT.encode() + b"\0", IMPLICIT.encode() + bytes(3)),
        "charset": data.replace(b"ISO_IR 100", b"ISO_XX 999"),
    }
    for name, content in odd.items():
        assert content != data, name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert frame_count(content) == 3, name
        assert not caught, name


def test_an_enhanced_file_has_slope_and_window_for_all_frames_or_for_each() -> None:
    def sequence(**attributes: Any) -> Any:
        item = pydicom.Dataset()
        for name, value in attributes.items():
            setattr(item, name, value)
        return pydicom.Sequence([item])

    def group(**sequences: Any) -> Any:
        return sequence(**sequences)[0]

    shared = sequence(PixelValueTransformationSequence=sequence(RescaleSlope="2", RescaleIntercept="-100"))
    frames = pydicom.Sequence(
        [group(FrameVOILUTSequence=sequence(WindowCenter=center, WindowWidth="300")) for center in ("0", "200")]
    )
    stored = np.random.default_rng(0).integers(0, 255, (2, HEIGHT, WIDTH), np.uint16)
    data = dicom(
        stored, NumberOfFrames=2, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=frames
    )
    for frame, center in enumerate((0, 200)):
        np.testing.assert_array_equal(decoded(data, frame), voi(stored[frame] * 2.0 - 100, center, 300, 255))


def test_a_frame_of_one_value_is_black() -> None:
    flat = np.full((HEIGHT, WIDTH), 99, np.uint8)
    assert not decoded(dicom(flat)).any()
    assert (decoded(dicom(flat, PhotometricInterpretation="MONOCHROME1")) == 255).all()


def test_frames_are_resized_and_placed_as_any_image() -> None:
    stored = values("uint8")
    with decoder_of(resize_mode="pad", size=(20, 20), channels="gray", normalize="unit", pad_value=9) as _:
        config = BuildConfig(resize_mode="pad", size=20, channels="gray", normalize="unit", pad_value=9, dtype="uint8")
        preprocess = Preprocess(config, (20, 20))
        np.testing.assert_array_equal(preprocess(dicom(stored)), preprocess(stored))


def half(data: bytes) -> bytes:
    return data[: len(data) - HEIGHT * WIDTH // 2]


BAD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "half": ("truncated", lambda: half(dicom(values("uint8")))),
    "no pixels": ("truncated", lambda: dicom(values("uint8"))[:300]),
    "prefix alone": ("truncated", lambda: bytes(128) + b"DICM"),
    "noise": ("truncated", lambda: bytes(128) + b"DICM" + bytes(range(256)) * 8),
    "palette": ("undecodable", lambda: dicom(values("uint8"), PhotometricInterpretation="PALETTE COLOR")),
    "sigmoid": (
        "undecodable",
        lambda: dicom(values("uint8"), WindowCenter="9", WindowWidth="9", VOILUTFunction="SIGMOID"),
    ),
    "table": (
        "undecodable", lambda: dicom(values("uint8"), ModalityLUTSequence=pydicom.Sequence([pydicom.Dataset()]))
    ),
    "too large": ("too-large", lambda: dicom(np.zeros((100, 100), np.uint8))),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_is_a_reject(kind: str) -> None:
    code, make = BAD[kind]
    for depth in (8, 16):
        with pytest.raises(BadItem) as caught:
            decoded(make(), bit_depth=depth, max_pixels=9_999)
        assert (caught.value.stage, caught.value.code) == ("decode", code)
        assert caught.value.detail


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, DEFLATED, RLE])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_file_that_is_cut_anywhere_is_truncated(syntax: str, frames: int) -> None:
    stored = values("uint16", shape=(frames, HEIGHT, WIDTH) if frames > 1 else (HEIGHT, WIDTH))
    data = dicom(stored, syntax, NumberOfFrames=frames)
    between = 0
    with decoder_of() as decoder:
        for end in range(132, len(data) - 12):  # what ends an RLE frame is not missed
            with pytest.raises(BadItem) as caught:
                decoder.decode_image(data[:end], "scan.dcm", 0)
            if caught.value.code != "truncated":  # it ends between two elements, as a whole file without an image may
                assert caught.value.detail.endswith(", which an image needs"), (end, caught.value.detail)
                between += 1
    assert between <= 12  # elements before the size


def test_a_file_without_an_image_is_not_truncated() -> None:
    file = pydicom.dcmread(io.BytesIO(dicom(values("uint8"))))
    for name in ("Rows", "Columns", "PixelData"):
        del file[name]
    buffer = io.BytesIO()
    file.save_as(buffer)
    for attempt in (lambda: decoded(buffer.getvalue()), lambda: dicom_size(buffer.getvalue(), "report.dcm")):
        with pytest.raises(BadItem) as caught:
            attempt()
        assert (caught.value.code, caught.value.detail) == (
            "undecodable", "a DICOM file without Rows, which an image needs",
        )  # fmt: skip


def test_whole_files_are_not_taken_for_cut_ones() -> None:
    for syntax in (IMPLICIT, EXPLICIT, DEFLATED, RLE):
        for pixels in (True, False):
            assert not read_dicom(io.BytesIO(dicom(values("uint16"), syntax)), FRAME_NAMES, pixels=pixels).was_cut


def deflated_bomb(content: bytes, megabytes: int) -> bytes:
    """A deflated file whose data set begins with `content`, and so many zeros behind it."""
    head = dicom(values("uint8"), DEFLATED)
    head = head[: 144 + int.from_bytes(head[140:144], "little")]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    begin = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + begin + piece * megabytes + packer.flush()


def refusals(data: bytes, path: Path) -> tuple[BadItem, BadItem]:
    """Why a file is not listed, and why it is not decoded, both in little memory."""
    path.write_bytes(data)
    found = []
    for attempt in (lambda: frame_count(path), lambda: decoded(data)):
        tracemalloc.start()
        try:
            with pytest.raises(BadItem) as caught:
                attempt()
            assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (64 << 20)
        finally:
            tracemalloc.stop()
        found.append(caught.value)
    return found[0], found[1]


@pytest.mark.parametrize("where", ["in the pixels", "before them"])
def test_a_file_that_inflates_to_gigabytes_is_not_inflated(where: str, tmp_path: Path) -> None:
    begin = b"\xe0\x7f\x10\0OW\0\0\xf0\xff\xff\xff" if where == "in the pixels" else b"\t\0\1\0OB\0\0\xfe\xff\xff\xff"
    for bad in refusals(deflated_bomb(begin, 1024), tmp_path / "scan.dcm"):
        assert (bad.code, bad.stage) == ("too-large", "decode")
        assert "inflate to more than 536870911" in bad.detail


def test_deflated_data_within_deflated_data_is_not_inflated(tmp_path: Path) -> None:
    meta = b"\2\0\x10\0UI\x16\0" + DEFLATED.encode()
    for bad in refusals(deflated_bomb(meta + b"\x08\0\5\0CS\0\0", 0), tmp_path / "scan.dcm"):
        assert bad.detail == "deflated data within deflated data"


@pytest.mark.parametrize("what", ["items", "elements"])
def test_a_file_of_too_many_items_or_elements_is_read_no_further(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.sources.dicom_frames._MAX_READS", 10_000)
    data = dicom(values("uint8"))
    at = data.index(b"\x08\0\x16\0UI")
    tags = np.arange(20_000).astype("<u4")
    elements = np.stack([9 + 2 * (tags >> 16), tags & 0xFFFF, np.full(len(tags), 0x4853), 0 * tags], axis=1)
    sequence = b"\x08\0\x06\0SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 6_000
    within = sequence if what == "items" else elements.astype("<u2").tobytes()
    (tmp_path / "scan.dcm").write_bytes(data[:at] + within + data[at:])
    for attempt in (lambda: frame_count(tmp_path / "scan.dcm"), lambda: decoded(data[:at] + within + data[at:])):
        with pytest.raises(BadItem, match="more than 10000 data elements, or parts of them"):
            attempt()


def test_no_more_of_a_file_is_read_than_any_image_should_have(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    assert frame_count(dicom(stored, DEFLATED)) == 1
    monkeypatch.setattr("gpu_npz.sources.dicom_frames._MAX_BYTES", 5_000)
    assert frame_count(dicom(stored)) == 1  # the header alone
    at = (data := dicom(stored, NumberOfFrames=1)).index(b"(\0\x08\0IS")
    long = data[:at] + b"(\0\6\0OB\0\0\xff\xff\xff\xff" + bytes(10_000)
    for attempt in (lambda: frame_count(dicom(stored, DEFLATED)), lambda: frame_count(long)):
        with pytest.raises(BadItem, match="bytes to be read") as caught:
            attempt()
        assert caught.value.code == "too-large"


def test_functional_groups_of_many_megabytes_are_not_looked_into() -> None:
    group = pydicom.Dataset()
    group.add_new((0x0009, 0x1001), "OB", bytes(9 << 20))
    with pytest.raises(BadItem, match=r"SharedFunctionalGroupsSequence of \d+ bytes; at most 8388608"):
        decoded(dicom(values("uint8"), SharedFunctionalGroupsSequence=pydicom.Sequence([group])))


def encapsulated(frame: bytes, syntax: str) -> bytes:
    """A file of another compressed frame."""
    file = pydicom.dcmread(io.BytesIO(dicom(values("uint8"))))
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = pydicom.encaps.encapsulate([frame])
    file["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    file.save_as(buffer)
    return buffer.getvalue()


def test_rle_data_for_more_pixels_than_the_header_has_are_not_decoded() -> None:
    header = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    with pytest.raises(BadItem, match=r"RLE data of more than .* bytes for 120 pixels"):
        decoded(encapsulated(header + b"\x81\0" * 1_000_000, RLE))
    padded = header + b"\x07" + bytes(range(8)) + b"\xc9\x99" * 2 + b"\x80" * (2 << 20)
    np.testing.assert_array_equal(decoded(encapsulated(padded, RLE), dicom_window=(0, 255))[0, :8, 0], range(8))


def test_a_jpeg_inside_is_of_the_header_s_size_and_of_few_scans() -> None:
    jpeg = pydicom.uid.JPEGBaseline8Bit
    large = encode(np.zeros((HEIGHT, 40), np.uint8))
    with pytest.raises(BadItem, match="an image of 40 x 12 pixels, where the header has 10 x 12"):
        decoded(encapsulated(large, jpeg))
    with pytest.raises(BadItem, match="an image of 1 x 1 pixels"):
        decoded(encapsulated(encode(np.zeros((1, 1), np.uint8)), jpeg))
    whole = encode(np.zeros((HEIGHT, WIDTH), np.uint8), progressive=True)
    with pytest.raises(BadItem, match="more than 256 scans"):
        decoded(encapsulated(whole[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 300 + whole[-2:], jpeg))


@pytest.mark.parametrize(
    "attributes",
    [{"RescaleSlope": "1e308"}, {"RescaleSlope": "nan"}, {"WindowCenter": "1e308", "WindowWidth": "1e308"}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_values_beyond_all_finite_numbers_are_a_reject(attributes: dict[str, str]) -> None:
    if "WindowCenter" in attributes:
        attributes = {**attributes, "RescaleIntercept": "-1e308", "RescaleSlope": "-1e308"}
    with pytest.raises(BadItem, match="beyond all finite numbers"):
        decoded(dicom(values("uint8"), **attributes))


def test_a_header_claims_no_more_frames_than_the_file_has_room_for() -> None:
    stored = values("uint16", shape=(4, HEIGHT, WIDTH))
    for syntax in (EXPLICIT, DEFLATED, RLE):
        assert frame_count(dicom(stored, syntax, NumberOfFrames=4)) == 4
    halved = dicom(values("uint8", shape=(4, HEIGHT, WIDTH, 3)), PhotometricInterpretation="YBR_FULL", NumberOfFrames=4)
    halved = (
        halved.replace(b"YBR_FULL", b"YBR_FULL_422 ").replace(b"CS\x08\0YBR", b"CS\x0c\0YBR").replace(b"422 ", b"422")
    )
    assert frame_count(halved[: len(halved) - 4 * HEIGHT * WIDTH]) == 4  # of two bytes a pixel
    for data in (dicom(stored, NumberOfFrames=9), dicom(stored, DEFLATED, NumberOfFrames=90_000)):
        for attempt in (lambda data=data: frame_count(data), lambda data=data: decoded(data)):
            with pytest.raises(BadItem, match=r"0* frames of at least 240 bytes in a file of"):
                attempt()


def test_a_damaged_sequence_is_a_reject_wherever_it_is_met() -> None:
    data = dicom(values("uint8"))
    at = data.index(b"\x08\0\x16\0UI")
    broken = data[:at] + b"\x08\0\x06\0SQ\0\0\xff\xff\xff\xff"
    for attempt in (lambda: frame_count(broken), lambda: decoder_of().decode_image(broken, "scan.dcm")):
        with pytest.raises(BadItem):
            attempt()


def test_pixels_over_the_limit_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.preprocess.dicom.DicomFile.decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(BadItem, match="100 x 100 pixels; at most 9999"):
        decoded(dicom(np.zeros((100, 100), np.uint8)), max_pixels=9_999)


def test_a_header_that_cannot_be_read_has_no_frames(tmp_path: Path) -> None:
    with pytest.raises(BadItem):
        frame_count(b"no DICOM at all" * 20)
    with pytest.raises(FileNotFoundError):
        frame_count(tmp_path / "missing.dcm")


def test_without_pydicom_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(values("uint8"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for attempt in (lambda: decoded(data), lambda: frame_count(data)):
        with pytest.raises(BackendError, match=r"DICOM files need pydicom .*; run: pip install 'pydicom>=3'"):
            attempt()


def test_a_build_takes_them_beside_other_images(tmp_path: Path) -> None:
    stored = values("int16")
    files = {"a/0.jpg": dicom(stored), "a/1.jpg": file_bytes("jpeg"), "b/2.jpg": half(dicom(stored))}
    for name, data in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    config = BuildConfig(
        size=(HEIGHT, WIDTH), dtype="uint8", layout="NHWC", dicom_window="-200,300", device="cpu", workers=0
    )
    report = gpu_npz.build(tmp_path / "src", tmp_path / "out", config)
    assert (report.rows, report.rejects_by_code) == (2, {"truncated": 1})
    data = gpu_npz.open_dataset(tmp_path / "out")
    np.testing.assert_array_equal(data[0], windowed(stored, -200, 300, 255))
    assert gpu_npz.verify(tmp_path / "out").ok
    preprocess = Preprocess.from_dataset(tmp_path / "out")
    np.testing.assert_array_equal(preprocess(tmp_path / "src/a/0.jpg"), data[0])
    other = Preprocess(config.model_copy(update={"dicom_window": None}), (HEIGHT, WIDTH))
    assert "; DICOM window (-200.0, 300.0)\n" in preprocess.describe()
    assert preprocess.differences(other) == ["dicom-window: (-200.0, 300.0) and None"]
    source = FolderSource(tmp_path / "src")
    items = list(source_items(source))
    assert first_size(source, items, BuildConfig(resize_mode="none")) == (HEIGHT, WIDTH)
    found = estimate(tmp_path / "src", config, seconds=0).sample
    assert (found.formats, found.unreadable) == ({"DICOM": 2, "JPEG": 1}, {})


def source_items(source: FolderSource) -> Any:
    return Plan(listed(source, BuildConfig()), 1).items(0, 1)


def test_odd_files_are_decoded_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    stored = values("uint8")
    file = pydicom.dcmread(io.BytesIO(dicom(stored)))
    file.PixelData += bytes(100)
    buffer = io.BytesIO()
    file.save_as(buffer)
    with pytest.warns(UserWarning, match="excess padding"):
        file.pixel_array  # noqa: B018
    np.testing.assert_array_equal(decoded(buffer.getvalue()), decoded(dicom(stored)))
    assert capfd.readouterr() == ("", "")
    assert is_dicom(buffer.getvalue())
    assert not is_dicom(b"DICM")


# Files among other items of a folder


def test_a_header_that_claims_more_frames_than_the_file_has_bytes_makes_one_reject(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/1.dcm").write_bytes(dicom(values("uint16", 0), NumberOfFrames=2_000_000_000))
    (tmp_path / "src/2.dcm").write_bytes(dicom(values("uint16", 0)))
    report = gpu_npz.build(tmp_path / "src", tmp_path / "out", BuildConfig(device="cpu", size=24, max_rejects="100%"))
    assert (report.items, report.rows, report.rejects) == (2, 1, 1)


def test_files_of_one_frame_are_items_of_an_archive(tmp_path: Path) -> None:
    stored = values("uint16")
    frames = dicom(np.stack([stored, stored]), NumberOfFrames=2)
    archive = pack(tmp_path / "t.tar", {"a/1.dcm": dicom(stored), "b/2.DICOM": frames})
    config = BuildConfig(device="cpu", size=(HEIGHT, WIDTH), dtype="uint8", layout="NHWC", dicom_window="-200,300")
    report = gpu_npz.build(archive, tmp_path / "out", config)
    assert (report.rows, report.rejects_by_code) == (1, {"undecodable": 1})
    assert "a DICOM file of 2 frames, which are items only on a disk" in (tmp_path / "out/rejects.jsonl").read_text()
    np.testing.assert_array_equal(gpu_npz.open_dataset(tmp_path / "out")[0], windowed(stored, -200, 300, 255))


def test_the_frames_of_a_file_in_a_folder_are_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.stack([values("uint16", seed) for seed in range(4)])
    for name, data in {
        "b/scan.dcm": dicom(stored, NumberOfFrames=4), "b/one.dcm": dicom(stored[2]), "a/1.dcm": dicom(stored[1]),
        "b/bad.dcm": b"no DICOM",
    }.items():  # fmt: skip
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    settings: dict[str, Any] = {"device": "cpu", "channels": "gray", "normalize": "none", "dtype": "uint8"}
    config = BuildConfig(**settings, size=f"{HEIGHT}x{WIDTH}", max_rejects="100%", dicom_window=(0, 65535))
    opened, begin = [], DicomFile.__init__
    monkeypatch.setattr(DicomFile, "__init__", lambda self, data: opened.append(len(data)) or begin(self, data))
    report = gpu_npz.build(tmp_path / "src", tmp_path / "out", config.model_copy(update={"workers": 0}))
    assert len(opened) == 3  # each file once, however many frames it has
    data = gpu_npz.open_dataset(tmp_path / "out")
    frames = [f"b/scan.dcm/{frame:04}" for frame in range(4)]
    assert data.paths[:] == ["a/1.dcm", "b/one.dcm", *frames]
    assert (report.rejects, data.labels.tolist()) == (1, [0, 1, 1, 1, 1, 1])
    for row, image in zip(data[:], [stored[1], stored[2], *stored], strict=True):
        np.testing.assert_array_equal(row[0], np.rint(image / 65535 * 255))
    keys: list[NDArray[np.int64]] = []
    groups = [*_noted(FolderSource(os.fspath(tmp_path / "src")).groups(), "folder", keys)]
    assert [group.folder for group in groups] == [b"a/", b"b/"]
    assert [{*each.tolist()} for each in keys] == [{0}, {1}]  # a split by folder keeps a file's frames with the others
    with pytest.raises(BadItem, match="4 frames, which are items only on a disk"):
        decoder_of().decode_image(dicom(stored, NumberOfFrames=4), "scan.dcm")
    assert compare(tmp_path / "out", 6).problems == ()
    preprocess = Preprocess.from_dataset(tmp_path / "out")
    np.testing.assert_array_equal(preprocess(tmp_path / "src/b/scan.dcm/0002"), data[4])
    with pytest.raises(ImageError, match="undecodable"):
        preprocess(tmp_path / "src/b/scan.dcm/0009")
    shutil.rmtree(tmp_path / "out/.gpu-npz")
    assert compare(tmp_path / "out", 6, source=tmp_path / "src").problems == ()
    source = FolderSource(tmp_path / "src")
    sample = estimate(tmp_path / "src", config, seconds=0).sample
    sizes = [os.path.getsize(tmp_path / "src" / name) for name in ("a/1.dcm", "b/one.dcm", "b/scan.dcm")]
    assert sample.encoded_bytes == (sizes[0] + sizes[1] + 4 * (sizes[2] // 4)) // 6  # a file's frames share its bytes
    first, second = (item for item in Plan(listed(source, config), 1).items(0, 6) if item.path in frames[:2])
    assert source.read(first) is source.read(second)
    assert len(pickle.dumps(source)) < 2000
    (tmp_path / "src/b/scan.dcm").write_bytes(b"changed")
    assert source.read(first) == b"changed"


def test_the_frames_of_a_file_that_a_table_names_have_the_labels_of_its_row(tmp_path: Path) -> None:
    stored = np.stack([values("uint16", seed) for seed in range(3)])
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/cine.dcm").write_bytes(dicom(stored, NumberOfFrames=3))
    (tmp_path / "scans/one.dcm").write_bytes(dicom(stored[1]))
    (tmp_path / "all.csv").write_text("path,age,sick,patient\nscans/cine.dcm,61.5,1,a\nscans/one.dcm,40,0,b\n")
    config = BuildConfig(
        device="cpu", size=(HEIGHT, WIDTH), channels="gray", normalize="none", dtype="uint8", labels="age,sick",
        dicom_window=(0, 65535), workers=0,
    )  # fmt: skip
    report = gpu_npz.build(tmp_path / "all.csv", tmp_path / "out", config)
    data = gpu_npz.open_dataset(tmp_path / "out")
    assert (report.rejects, data.paths[:]) == (0, [*(f"scans/cine.dcm/{n:04}" for n in range(3)), "scans/one.dcm"])
    np.testing.assert_array_equal(data.labels, [[61.5, 1], [61.5, 1], [61.5, 1], [40, 0]])
    for row, image in zip(data[:], [*stored, stored[1]], strict=True):
        np.testing.assert_array_equal(row[0], np.rint(image / 65535 * 255))
    by_patient = config.model_copy(update={"split": "val=0.5", "split_by": "patient"})
    (group,) = open_source(tmp_path / "all.csv", by_patient, None).groups()
    assert group.keys == [b"a", b"a", b"a", b"b"]
    assert compare(tmp_path / "out", 4).problems == ()


def test_a_table_may_name_single_frames(tmp_path: Path) -> None:
    stored = np.stack([values("uint16", seed) for seed in range(3)])
    (tmp_path / "cine.dcm").write_bytes(dicom(stored, NumberOfFrames=3))
    (tmp_path / "0001.dcm").mkdir()
    (tmp_path / "0001.dcm/0002").write_bytes(dicom(stored[1]))
    rows = [
        "cine.dcm/0002,5",
        "cine.dcm/0000,3",
        "cine.dcm/0003,1",
        "cine.dcm/99999999999999999999,1",
        "0001.dcm/0002,4",
    ]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    config = BuildConfig(
        device="cpu", size=(HEIGHT, WIDTH), channels="gray", normalize="none", dtype="uint8", dicom_window=(0, 65535),
        workers=0,
    )  # fmt: skip
    report = gpu_npz.build(tmp_path / "all.csv", tmp_path / "out", config)
    data = gpu_npz.open_dataset(tmp_path / "out")
    assert report.rejects_by_code == {"missing": 1, "undecodable": 1}
    assert "frame" in (tmp_path / "out/rejects.jsonl").read_text()
    assert data.paths[:] == ["cine.dcm/0002", "cine.dcm/0000", "0001.dcm/0002"]
    assert data.labels.tolist() == [5, 3, 4]
    for row, image in zip(data[:], stored[[2, 0, 1]], strict=True):
        np.testing.assert_array_equal(row[0], np.rint(image / 65535 * 255))


def test_frames_that_are_no_items_are_rejects_and_never_the_first_alone(tmp_path: Path) -> None:
    stored = np.stack([values("uint16", seed) for seed in range(3)])
    (tmp_path / "src").mkdir()
    for name in ("a.png", "IM0001"):
        (tmp_path / "src" / name).write_bytes(dicom(stored, NumberOfFrames=3))
    (tmp_path / "src/many.dcm").write_bytes(dicom(np.zeros((1, 1), "uint8"), NumberOfFrames=100_001) + bytes(100_001))
    (tmp_path / "all.csv").write_text("path\nIM0001\na.png\n")
    config = BuildConfig(device="cpu", size=8, workers=0, root=str(tmp_path / "src"), max_rejects="100%")
    report = gpu_npz.build(tmp_path / "all.csv", tmp_path / "table", config)
    assert report.rejects_by_code == {"undecodable": 2}
    report = gpu_npz.build(tmp_path / "src", tmp_path / "folder", config.model_copy(update={"root": None}))
    assert report.rejects_by_code == {"too-large": 1, "undecodable": 1}


def test_a_split_leaves_the_frames_of_a_file_together(tmp_path: Path) -> None:
    stored = np.stack([values("uint16", seed) for seed in range(3)])
    for number in range(20):
        path = tmp_path / "src" / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom(stored, NumberOfFrames=3) if number % 4 else dicom(stored[0]))
    for split_by in (None, "random"):
        settings = {"split": "val=0.3", "split_by": split_by}
        sides = []
        for side in ("train", "val"):
            config = BuildConfig(**{**settings, "split": f"val=0.3/{side}"})
            plan = Plan(listed(open_source(tmp_path / "src", config), config), 1024)
            sides.append({item.path.partition(".dcm")[0] for item in plan.items(0, plan.item_count)})
        assert [len(side) for side in sides] == [14, 6]
        assert not sides[0] & sides[1]


def test_the_command_for_statistics_takes_a_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.cli.stats.show_warnings", lambda: None)  # it takes the library's logger over
    (tmp_path / "src").mkdir()
    (tmp_path / "src/0.dcm").write_bytes(dicom(np.arange(64, dtype=np.uint16).reshape(8, 8)))
    given = ["--size", "8", "--device", "cpu", "--workers", "0", "--channels", "gray", "--dicom-window", "0,31"]
    assert run(["stats", str(tmp_path / "src"), *given, "--json"]) == 0
    (gray,) = json.loads(capsys.readouterr().out)["channels"]
    assert gray["histogram"][255] == 33
