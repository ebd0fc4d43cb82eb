"""DICOM images to levels, a frame at a time: rescaled and windowed as DICOM PS3.3 says, decoded by pydicom.

A stored value becomes x = slope * value + intercept (C.11.1.1.2), in CT Hounsfield units. The values between LO and HI
become the levels, 0 to 255 or 65535, those beyond are cut off, and MONOCHROME1 is inverted, for it shows its lowest
value as white (C.7.6.3.1.2):

    level = round(top * (x - LO) / (HI - LO)), halves to even

LO and HI are the setting `dicom_window`; else by the file's first window, of center c and width w,

    c - 0.5 - (w - 1) / 2 and c - 0.5 + (w - 1) / 2    LINEAR, and where no function is named (C.11.2.1.2.1)
    c - w / 2 and c + w / 2                            LINEAR_EXACT (C.11.2.1.3.2)

else the lowest and the highest value of the frame; tables (VOI LUT Sequence) are not looked at. Enhanced files have
slope and window in functional groups, for all frames or for each. RGB and YBR images are taken as colours.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..rejects import BadItem
from ..sources.dicom import require_pydicom

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")  # pydicom makes RGB of them
_GRAYS = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM by its prefix (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width by the header; raises what pydicom raises, and BackendError if it is missing."""
    header = require_pydicom().dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(header.Rows), int(header.Columns)


def decode_frame(data: bytes, frame: int, config: BuildConfig) -> NDArray[Any]:
    """The levels of one frame: (H, W), or (H, W, 3) in R,G,B; uint8, or uint16 in 16 bits.

    Raises:
        BadItem: not of a kind that is described above.
        Exception: whatever pydicom raises for a damaged file, or for want of a plugin that decompresses it.
    """
    pydicom = require_pydicom()
    file = pydicom.dcmread(io.BytesIO(data))
    kind = str(file.PhotometricInterpretation)
    if kind not in (*_GRAYS, *_COLOURS):
        raise BadItem("decode", "undecodable", f"photometric interpretation {kind}")
    stored = importlib.import_module("pydicom.pixels").pixel_array(file, index=frame)
    top = config.max_level
    if kind in _COLOURS:
        scaled = stored.astype(np.float64) / (2 ** int(file.BitsStored) - 1)
    else:
        values = _rescaled(file, frame, stored)
        low, high = config.dicom_window or _window(file, frame) or (values.min(), values.max())
        scaled = (values > low).astype(np.float64) if low == high else (values - low) / (high - low)
    levels = np.rint(scaled.clip(0, 1) * top)
    found: NDArray[Any] = (top - levels if kind == "MONOCHROME1" else levels).astype(config.pixel_dtype)
    return found


def _rescaled(file: Any, frame: int, stored: NDArray[Any]) -> NDArray[np.float64]:
    if "ModalityLUTSequence" in file:
        raise BadItem("decode", "undecodable", "a modality LUT, rather than slope and intercept")
    group = _group(file, frame, "PixelValueTransformationSequence", "RescaleSlope")
    return stored.astype(np.float64) * float(group.get("RescaleSlope", 1)) + float(group.get("RescaleIntercept", 0))


def _window(file: Any, frame: int) -> tuple[float, float] | None:
    """LO and HI of the file's first window; None if it has none."""
    group = _group(file, frame, "FrameVOILUTSequence", "WindowCenter")
    center, width = (_first(group.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = str(group.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT") or width < 1:
        raise BadItem("decode", "undecodable", f"a window of width {width:g} by the function {function}")
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return center - width / 2, center + width / 2


def _group(file: Any, frame: int, sequence: str, keyword: str) -> Any:
    """Where an attribute of a frame stands: in its functional group, in that of all frames, or in the file itself."""
    frames, shared = file.get("PerFrameFunctionalGroupsSequence"), file.get("SharedFunctionalGroupsSequence")
    for group in (frames[frame] if frames else None, shared[0] if shared else None):
        if group is not None and (inner := group.get(sequence)) and keyword in inner[0]:
            return inner[0]
    return file


def _first(value: Any) -> float | None:
    """The first of an attribute's values; None if it is absent or empty."""
    values = [] if value is None else [value] if isinstance(value, (int, float, str)) else list(value)
    return float(values[0]) if values else None
