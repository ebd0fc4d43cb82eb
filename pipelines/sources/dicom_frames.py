"""DICOM files, of which each frame is an item: how many a file holds (PS3.3, C.7.6.6), read within limits.

pydicom inflates a deflated file whatever comes of it, and makes objects of some hundred times the size of the data
elements and items of sequences that a file claims. So it reads through `_Bounded`, and is given deflated ones inflated.
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

from ..errors import BackendError
from .rejects import MAX_ENCODED_BYTES, BadItem

EXTENSIONS = (b".dcm", b".dicom")
_MAX_FRAMES = 100_000  # an item each; files that exist have some thousands
_MAX_READS = 500_000  # each element, and each item of a sequence, takes one or some
_MAX_BYTES = MAX_ENCODED_BYTES + (1 << 20)  # that are read, some of them twice
_SLICE_BYTES = 1 << 14  # of deflate data, which become 16 MB at most
_MOST_DEFLATED = 1032  # bytes that one byte of deflate data can become (https://zlib.net/zlib_tech.html)
FRAME_NAMES = ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
# What stands before the data set of a file that is explicit VR, little endian (PS3.10, 7.1).
_EXPLICIT = bytes(128) + b"DICM\2\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0"


def split_frame(path: bytes) -> tuple[bytes, int | None]:
    """File and number of a frame, of whose path, `scan.dcm/0003`, these are the parts; of another path itself, None."""
    file, _, number = path.rpartition(b"/")
    is_frame = file.lower().endswith(EXTENSIONS) and number.isdigit() and len(number) < 10
    return (file, int(number)) if is_frame else (path, None)


def require_pydicom() -> Any:
    """pydicom. Raises BackendError if it cannot be imported."""
    try:
        return importlib.import_module("pydicom")
    except ImportError as exc:
        raise BackendError(f"DICOM files need pydicom ({exc}); run: pip install 'gpu-npz[dicom]'") from exc


def read_dicom(file: BinaryIO, names: Sequence[str], *, pixels: bool = False) -> Any:
    """Some attributes of a DICOM file as a `pydicom.FileDataset`, and whether it `was_deflated` or `was_cut`.

    Args:
        file: read from where it stands.
        names: keywords of the attributes.
        pixels: whether those from the pixels on are among them.

    Raises:
        BackendError: pydicom is missing.
        BadItem: it has more elements, or inflates to more bytes, than any image should; or it is cut off.
        Exception: whatever pydicom raises for a damaged file.
    """

    def read(data: BinaryIO) -> Any:
        bounded = _Bounded(data)
        try:
            found = pydicom.dcmread(bounded, stop_before_pixels=not pixels, specific_tags=list(names))
        except (_Deflated, BadItem):
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
    except _Deflated as found:
        content = found.inflated()
        try:
            header = read(io.BytesIO(_EXPLICIT + content))
        except _Deflated as exc:
            raise BadItem("decode", "undecodable", "deflated data within deflated data") from exc
        header.was_deflated = True
    return header


@contextlib.contextmanager
def blamed_on_its_end(header: Any) -> Iterator[None]:
    """Raises whatever its body raises for the header's sake as a BadItem, if the file is cut off."""
    try:
        yield
    except (BadItem, MemoryError):
        raise
    except Exception as exc:  # pydicom interprets values when they are asked for, and raises many kinds
        if header.was_cut:
            raise BadItem("decode", "truncated", f"a DICOM file that ends too early ({exc})") from exc
        raise


def require_attributes(header: Any, *names: str) -> None:
    """Raises BadItem if the file does not say how it is encoded, or lacks one of these attributes of an image."""
    meta = getattr(header, "file_meta", {})
    for place, name in ((meta, "TransferSyntaxUID"), *((header, name) for name in names)):
        if place.get(name) in (None, ""):
            if header.was_cut:
                raise BadItem("decode", "truncated", f"a DICOM file that ends before its {name}")
            raise BadItem("decode", "undecodable", f"a DICOM file without {name}, which an image needs")


def frame_count(file: bytes | str | os.PathLike[str] | BinaryIO) -> int:
    """How many images a DICOM file holds, by its header alone.

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
            # pydicom warns of each odd value, without a file name; what matters of that is in the rejects.
            warnings.filterwarnings("ignore", module=r"pydicom\.")
            header = read_dicom(source, FRAME_NAMES)
        with blamed_on_its_end(header):
            return frames_of(header, source.seek(0, os.SEEK_END))
    except (BackendError, BadItem, MemoryError):
        raise
    except Exception as exc:  # pydicom meets damaged files with many kinds of exception
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise BadItem("decode", "undecodable", str(exc) or type(exc).__name__) from exc


def frames_of(header: Any, size: int) -> int:
    """How many images a DICOM file of so many bytes holds, by `FRAME_NAMES` of it. Raises BadItem if it cannot."""
    require_attributes(header)
    count = max(1, int(header.get("NumberOfFrames") or 1))
    if count > _MAX_FRAMES:
        raise BadItem("decode", "too-large", f"{count} frames in a file; at most {_MAX_FRAMES}")
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        least = 8  # the head of a fragment
    else:
        rows, columns, samples, bits = (int(header.get(name) or 1) for name in FRAME_NAMES[1:])
        least = max(1, rows * columns * min(samples, 2) * bits // 8)  # 2 of YBR_FULL_422 (PS3.3, C.7.6.3.1.2)
    if count > 1 and count * least > size * (_MOST_DEFLATED if header.was_deflated else 1):
        raise BadItem("decode", "truncated", f"{count} frames of at least {least} bytes in a file of {size}")
    return count


class _Deflated(Exception):
    """Raised through pydicom where it is going to inflate a data set (PS3.5, A.5)."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def inflated(self) -> bytes:
        """Raises BadItem if it becomes too large, which is found without keeping it; zlib.error if it is damaged."""
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for start in range(0, len(self._data), _SLICE_BYTES):
            size += len(inflater.decompress(self._data[start : start + _SLICE_BYTES]))
            if size > MAX_ENCODED_BYTES:
                detail = f"{len(self._data)} deflated bytes, which inflate to more than {MAX_ENCODED_BYTES}"
                raise BadItem("decode", "too-large", detail)
        return zlib.decompress(self._data, -zlib.MAX_WBITS)


class _Bounded:
    """A file of which pydicom may read so much, so many times, and does not get what it would inflate.

    Attributes:
        cut: whether pydicom was given less than it asked for; at the end of a whole file it asks once, for a tag.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads, self._bytes, self._ends = file, 0, 0, 0
        self.cut = False
        self.seek, self.tell = file.seek, file.tell
        start = self.tell()
        self._end = self.seek(0, os.SEEK_END)
        self.seek(start)

    def read(self, size: int | None = None) -> bytes:
        """Some bytes, as pydicom reads all but deflate data; these it reads to the end of the file."""
        self._reads += 1
        if self._reads > _MAX_READS:
            raise BadItem("decode", "undecodable", f"more than {_MAX_READS} data elements, or parts of them")
        left = self._end - self.tell()
        if size is not None and left < size:
            self._ends += 1
            self.cut |= left != 0 or self._ends > 1
        left = max(0, left)
        wanted = left if size is None else min(size, left)  # of a claimed size, memory is taken in advance
        self._bytes += wanted
        if self._bytes > _MAX_BYTES:
            raise BadItem("decode", "too-large", f"more than {MAX_ENCODED_BYTES} bytes to be read")
        data = self._file.read(wanted)
        if size is None:
            raise _Deflated(data)
        return data
