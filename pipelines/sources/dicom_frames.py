"""Frames of DICOM files, each of which is an item: how many a file contains (PS3.3, C.7.6.6), read within limits.

pydicom inflates a deflated file without a limit, and the objects that it makes of data elements and sequence items can
be a hundred times larger than the file. So it reads through `_LimitedFile`, and deflated files are inflated before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from ..errors import BackendError, install_command
from .rejects import MAX_ENCODED_BYTES, BadItem

EXTENSIONS = (b".dcm", b".dicom")
_MAX_FRAMES = 100_000  # per file, an item each; real files have some thousands
_MAX_READS = 500_000  # each element and each sequence item takes one or more reads
_MAX_BYTES = MAX_ENCODED_BYTES + (1 << 20)  # read in total, some of them twice
_SLICE_BYTES = 1 << 14  # of deflate data, which inflate to 16 MB at most
_MOST_DEFLATED = 1032  # maximum compression ratio of deflate (https://zlib.net/zlib_tech.html)
FRAME_NAMES = ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
# Preamble and file meta information of a file in explicit VR, little endian (PS3.10, 7.1).
_EXPLICIT = bytes(128) + b"DICM\2\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0"


def split_frame(path: bytes) -> tuple[bytes, int | None]:
    """Splits the path of a frame, such as `scan.dcm/0003`, into file and frame number; None for any other path."""
    file, _, number = path.rpartition(b"/")
    is_frame = file.lower().endswith(EXTENSIONS) and number.isdigit() and len(number) < 10
    return (file, int(number)) if is_frame else (path, None)


def require_pydicom() -> Any:
    """pydicom. Raises BackendError if it cannot be imported."""
    try:
        return importlib.import_module("pydicom")
    except ImportError as exc:
        raise BackendError(f"DICOM files need pydicom ({exc}); run: {install_command('dicom')}") from exc


def read_dicom(file: BinaryIO, names: Sequence[str], *, pixels: bool = False) -> Any:
    """Some attributes of a DICOM file.

    Args:
        file: read from its current position.
        names: keywords of the attributes.
        pixels: whether to read on to the pixel data and beyond.

    Returns:
        A `pydicom.FileDataset` with the additional attributes `was_deflated` and `was_cut` (truncated).

    Raises:
        BackendError: pydicom is missing.
        BadItem: it has more elements, or inflates to more bytes, than any image should; or it is truncated.
        Exception: whatever pydicom raises for a damaged file.
    """

    def read(data: BinaryIO) -> Any:
        bounded = _LimitedFile(data)
        try:
            found = pydicom.dcmread(bounded, stop_before_pixels=not pixels, specific_tags=list(names))
        except (_DeflateData, BadItem):
            raise
        except Exception as exc:
            if bounded.cut:
                raise BadItem("decode", "truncated", f"a DICOM file that ends too early ({exc})") from exc
            raise
        found.was_cut = bounded.cut
        return found

    pydicom = require_pydicom()
    try:
        header = read(file)
        header.was_deflated = False
    except _DeflateData as found:
        content = found.inflated()
        try:
            header = read(io.BytesIO(_EXPLICIT + content))
        except _DeflateData as exc:
            raise BadItem("decode", "undecodable", "deflated data within deflated data") from exc
        header.was_deflated = True
    return header


@contextlib.contextmanager
def blamed_on_truncation(header: Any) -> Iterator[None]:
    """Raises errors from its body as a BadItem, if the file is truncated."""
    try:
        yield
    except (BadItem, MemoryError):
        raise
    except Exception as exc:  # pydicom interprets values on access, and raises many kinds of errors
        if header.was_cut:
            raise BadItem("decode", "truncated", f"a DICOM file that ends too early ({exc})") from exc
        raise


def require_attributes(header: Any, *names: str) -> None:
    """Raises BadItem if the file lacks its transfer syntax or one of these attributes."""
    meta = getattr(header, "file_meta", {})
    for place, name in ((meta, "TransferSyntaxUID"), *((header, name) for name in names)):
        if place.get(name) in (None, ""):
            if header.was_cut:
                raise BadItem("decode", "truncated", f"a DICOM file that ends before its {name}")
            raise BadItem("decode", "undecodable", f"a DICOM file without {name}, which an image needs")


def frame_count(file: bytes | str | os.PathLike[str] | BinaryIO) -> int:
    """The number of images in a DICOM file, from its header.

    Args:
        file: its content, its path, or the open file.

    Raises:
        BackendError: pydicom is missing.
        BadItem: the header cannot be read, or claims more frames than the file has room for.
        OSError: the file cannot be read.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return frame_count(opened)
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with warnings.catch_warnings():
            # pydicom warns of each odd value without naming the file; real problems become rejects.
            warnings.filterwarnings("ignore", module=r"pydicom\.")
            header = read_dicom(source, FRAME_NAMES)
        with blamed_on_truncation(header):
            return frames_of(header, source.seek(0, os.SEEK_END))
    except (BackendError, BadItem, MemoryError):
        raise
    except Exception as exc:  # pydicom raises many kinds of exceptions for damaged files
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise BadItem("decode", "undecodable", str(exc) or type(exc).__name__) from exc


def frames_of(header: Any, size: int) -> int:
    """The number of images in a DICOM file of `size` bytes, by its `FRAME_NAMES`. Raises BadItem if that cannot be."""
    require_attributes(header)
    count = max(1, int(header.get("NumberOfFrames") or 1))
    if count > _MAX_FRAMES:
        raise BadItem("decode", "too-large", f"{count} frames in a file; at most {_MAX_FRAMES}")
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        least = 8  # the header of a fragment
    else:
        rows, columns, samples, bits = (int(header.get(name) or 1) for name in FRAME_NAMES[1:])
        least = max(1, rows * columns * min(samples, 2) * bits // 8)  # YBR_FULL_422 stores 2 (PS3.3, C.7.6.3.1.2)
    if count > 1 and count * least > size * (_MOST_DEFLATED if header.was_deflated else 1):
        raise BadItem("decode", "truncated", f"{count} frames of at least {least} bytes in a file of {size}")
    return count


class _DeflateData(Exception):
    """Raised through pydicom when it is about to inflate a data set (PS3.5, A.5)."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def inflated(self) -> bytes:
        """The inflated data. Raises BadItem if it is too large, before it is kept; zlib.error if it is damaged."""
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for start in range(0, len(self._data), _SLICE_BYTES):
            size += len(inflater.decompress(self._data[start : start + _SLICE_BYTES]))
            if size > MAX_ENCODED_BYTES:
                detail = f"{len(self._data)} deflated bytes, which inflate to more than {MAX_ENCODED_BYTES}"
                raise BadItem("decode", "too-large", detail)
        return zlib.decompress(self._data, -zlib.MAX_WBITS)


class _LimitedFile:
    """A file for pydicom that limits the number and total size of reads, and raises `_DeflateData` for deflate data.

    Attributes:
        cut: whether the file ended early. At the end of a complete file, pydicom asks once more, for a tag.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads, self._bytes, self._ends = file, 0, 0, 0
        self.cut = False
        self.seek, self.tell = file.seek, file.tell
        start = self.tell()
        self._end = self.seek(0, os.SEEK_END)
        self.seek(start)

    def read(self, size: int | None = None) -> bytes:
        """Reads `size` bytes. Without a size, as pydicom reads deflate data alone, raises `_DeflateData` with it."""
        self._reads += 1
        if self._reads > _MAX_READS:
            raise BadItem("decode", "undecodable", f"more than {_MAX_READS} data elements, or parts of them")
        left = self._end - self.tell()
        if size is not None and left < size:
            self._ends += 1
            self.cut |= left != 0 or self._ends > 1
        left = max(0, left)
        wanted = left if size is None else min(size, left)  # file.read allocates the claimed size in advance
        self._bytes += wanted
        if self._bytes > _MAX_BYTES:
            raise BadItem("decode", "too-large", f"more than {MAX_ENCODED_BYTES} bytes to be read")
        data = self._file.read(wanted)
        if size is None:
            raise _DeflateData(data)
        return data
