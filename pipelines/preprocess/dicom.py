"""Decodes DICOM frames with pydicom, and rescales and windows them to levels as DICOM PS3.3 says.

A stored value becomes x = slope * value + intercept (C.11.1.1.2), for CT in Hounsfield units. The range from LO to HI
is mapped to the levels 0 to `top`, 255 or 65535; values outside are clipped:

    level = round(top * (x - LO) / (HI - LO)), halves to even

MONOCHROME1 is inverted, since it shows its lowest value as white (C.7.6.3.1.2). LO and HI are the setting
`dicom_window`. Without it they come from the first window of the file, with center c and width w:

    c - 0.5 - (w - 1) / 2 and c - 0.5 + (w - 1) / 2    LINEAR, the default function (C.11.2.1.2.1)
    c - w / 2 and c + w / 2                            LINEAR_EXACT (C.11.2.1.3.2)

Without a window, they are the lowest and highest value of the frame. Lookup tables (VOI LUT Sequence) are ignored.
Enhanced files have slope and window in functional groups, for all frames or for each frame. RGB and YBR images are
decoded as colours.

Compressed frames have headers of their own. Their size is compared with the file's header first, so that pydicom's
decoders never allocate memory for a size that the file does not declare.
"""

from __future__ import annotations

import importlib
import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..config import BuildConfig
from ..sources.dicom_frames import FRAME_NAMES, blamed_on_truncation, frames_of, read_dicom, require_attributes
from ..sources.rejects import BadItem
from .jpeg import read_header

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")  # pydicom converts them to RGB
_GRAYS = ("MONOCHROME1", "MONOCHROME2")
_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_NAMES = (
    *FRAME_NAMES, "PhotometricInterpretation", "PlanarConfiguration", "BitsStored", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    *_GROUPS, *_PIXELS,
)  # fmt: skip
_MAX_GROUPS_BYTES = 8 << 20  # of functional groups; parsed, they take up to 250 times as much memory
_RLE = "1.2.840.10008.1.2.5"
_SMALL_BYTES = 1 << 20  # RLE data of this size decodes to at most 64 MB (PS3.5, G.3.1)


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM, by its prefix (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width from the header, in pixels.

    Raises:
        BackendError: pydicom is missing.
        Exception: whatever pydicom raises for a damaged file.
    """
    header = read_dicom(io.BytesIO(data), ["Rows", "Columns"])
    with blamed_on_truncation(header):
        require_attributes(header, "Rows", "Columns")
        return int(header.Rows), int(header.Columns)


class DicomFile:
    """A DICOM file whose attributes have been read, so that its frames can be decoded one by one.

    Attributes:
        size: height and width, in pixels.
        frames: how many frames it has.

    Raises:
        BadItem: a kind that is not supported.
        Exception: whatever pydicom raises for a damaged file.
    """

    def __init__(self, data: bytes) -> None:
        self._file = file = read_dicom(io.BytesIO(data), _NAMES, pixels=True)
        with blamed_on_truncation(file):
            require_attributes(file, "Rows", "Columns", "PhotometricInterpretation")
            self.size = int(file.Rows), int(file.Columns)
            self.frames = frames_of(file, len(data))
            kind = str(file.PhotometricInterpretation)
        if kind not in (*_GRAYS, *_COLOURS):
            raise BadItem("decode", "undecodable", f"photometric interpretation {kind}")
        for name in _GROUPS:
            if name in file and (size := getattr(file.get_item(name), "length", 0)) > _MAX_GROUPS_BYTES:
                raise BadItem("decode", "undecodable", f"{name} of {size} bytes; at most {_MAX_GROUPS_BYTES}")

    def decode(self, frame: int, config: BuildConfig) -> NDArray[Any]:
        """The levels of a frame: (H, W), or (H, W, 3) in R,G,B; uint8, or uint16 in 16 bits.

        Raises:
            BadItem: the frame is of a kind that is not supported, or truncated.
            Exception: whatever pydicom raises for a damaged file, or if it has no plugin that decompresses it.
        """
        if not any(name in self._file for name in _PIXELS[:3]):
            raise BadItem("decode", "truncated", "a DICOM file that ends before its PixelData")
        with blamed_on_truncation(self._file):
            _check_frame(self._file, frame, self.frames)
            return _levels(self._file, frame, config)


def _levels(file: Any, frame: int, config: BuildConfig) -> NDArray[Any]:
    kind = str(file.PhotometricInterpretation)
    stored = importlib.import_module("pydicom.pixels").pixel_array(file, index=frame)
    top = config.max_level
    levels = stored.astype(np.float64)
    with np.errstate(all="ignore"):
        if kind in _COLOURS:
            levels /= 2 ** int(file.BitsStored) - 1
        else:
            _rescale(file, frame, levels)
            low, high = config.dicom_window or _window(file, frame) or (levels.min(), levels.max())
            if low == high and np.isfinite(low):
                levels = (levels > low).astype(np.float64)
            else:
                levels -= low
                levels /= high - low
    if not np.isfinite(levels).all():
        raise BadItem("decode", "undecodable", "values, or a window of them, beyond all finite numbers")
    np.clip(levels, 0, 1, out=levels)
    levels *= top
    np.rint(levels, out=levels)
    if kind == "MONOCHROME1":
        np.subtract(top, levels, out=levels)
    found: NDArray[Any] = levels.astype(config.pixel_dtype)
    return found


def _check_frame(file: Any, frame: int, count: int) -> None:
    """Raises BadItem if a compressed frame does not have the size that the file's header says."""
    syntax = file.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    tables = [file.get(name) for name in _PIXELS[3:]]
    data = importlib.import_module("pydicom.encaps").get_frame(
        file.PixelData,
        frame,
        number_of_frames=count,
        extended_offsets=tuple(tables) if all(tables) else None,
    )
    size = (int(file.Columns), int(file.Rows))
    if syntax == _RLE:
        _check_rle(data, size[0] * size[1])
        return
    read_header(data)  # raises BadItem for a JPEG that would take very long
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "JPEG2000")) as image:  # as pydicom does
            found = image.size
    except UnidentifiedImageError:  # JPEG-LS and so on, which pydicom decodes with other libraries if installed
        return
    if found != size:
        detail = f"an image of {found[0]} x {found[1]} pixels, where the header has {size[0]} x {size[1]}"
        raise BadItem("decode", "undecodable", detail)


def _check_rle(data: bytes, pixels: int) -> None:
    """Raises BadItem if a segment decodes to much more than one byte per pixel (PS3.5, G.3.1 and G.5)."""
    if len(data) <= _SMALL_BYTES:
        return
    count, *offsets = struct.unpack_from("<16I", data)
    for start, end in zip(offsets[:count], [*offsets[1:count], len(data)], strict=False):
        position, size = start, 0
        while position < min(end, len(data)) and size <= 2 * pixels + _SMALL_BYTES:
            control = data[position]
            size += control + 1 if control < 128 else 257 - control if control > 128 else 0
            position += control + 2 if control < 128 else 2 if control > 128 else 1
        if size > 2 * pixels + _SMALL_BYTES:
            raise BadItem("decode", "undecodable", f"RLE data of more than {size} bytes for {pixels} pixels")


def _rescale(file: Any, frame: int, stored: NDArray[np.float64]) -> None:
    if "ModalityLUTSequence" in file:
        raise BadItem("decode", "undecodable", "a modality LUT, rather than slope and intercept")
    group = _group(file, frame, "PixelValueTransformationSequence", "RescaleSlope")
    stored *= float(group.get("RescaleSlope", 1))
    stored += float(group.get("RescaleIntercept", 0))


def _window(file: Any, frame: int) -> tuple[float, float] | None:
    """LO and HI of the file's first window; None if it has no window."""
    group = _group(file, frame, "FrameVOILUTSequence", "WindowCenter")
    center, width = (_first(group.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = str(group.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT") or width < 1:
        raise BadItem(
            "decode",
            "undecodable",
            f"a window of width {width:g} by the function {function}; allowed are LINEAR and LINEAR_EXACT, and with "
            "--dicom-window no window of the file is asked for",
        )
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return center - width / 2, center + width / 2


def _group(file: Any, frame: int, sequence: str, keyword: str) -> Any:
    """The dataset that holds an attribute of a frame: its functional group, the group of all frames, or the file."""
    frames, shared = (file.get(name) for name in _GROUPS)
    for group in (frames[frame] if frames else None, shared[0] if shared else None):
        if group is not None and (inner := group.get(sequence)) and keyword in inner[0]:
            return inner[0]
    return file


def _first(value: Any) -> float | None:
    """The first value of an attribute; None if it is absent or empty."""
    values = [] if value is None else [value] if isinstance(value, (int, float, str)) else list(value)
    return float(values[0]) if values else None
