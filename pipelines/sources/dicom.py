"""DICOM files, of which each frame is an item: how many a file holds (PS3.3, C.7.6.6)."""

from __future__ import annotations

import importlib
import io
import os
from typing import Any, BinaryIO

from ..errors import BackendError
from ..rejects import BadItem

EXTENSIONS = (b".dcm", b".dicom")


def require_pydicom() -> Any:
    """pydicom. Raises BackendError if it cannot be imported."""
    try:
        return importlib.import_module("pydicom")
    except ImportError as exc:
        raise BackendError(f"DICOM files need pydicom ({exc}); run: pip install 'gpu-npz[dicom]'") from exc


def frame_count(file: bytes | str | os.PathLike[str] | BinaryIO) -> int:
    """How many images a DICOM file holds, by its header alone.

    Args:
        file: its content, its path, or the open file.

    Raises:
        BackendError: pydicom is missing.
        BadItem: the header cannot be read.
        OSError: the file cannot be read.
    """
    pydicom = require_pydicom()
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        header = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return max(1, int(header.get("NumberOfFrames") or 1))
    except OSError:
        raise
    except Exception as exc:  # pydicom meets damaged files with many kinds of exception
        raise BadItem("decode", "undecodable", str(exc) or type(exc).__name__) from exc
