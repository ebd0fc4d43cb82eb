"""Opens image files with Pillow: allowed formats, Pillow's process-wide settings, and errors as BadItem."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from ..errors import BackendError, ShardError
from ..sources.rejects import BadItem
from .exif import EXIF_HEADER, orientation_in
from .jpeg import read_header, without_metadata
from .png import set_transparency
from .samples import format_of

# Pillow opens more formats: rare ones, whose parsers get little review, and PostScript, which it executes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
_UNSIGNED = ("DIB", "PPM")  # formats without a distinct signature
_ENDED = ("index out of range", "not enough image data")  # Pillow's messages for missing bytes
_LOGS = [logging.getLogger(name) for name in ("tifffile", "pydicom")]


class PillowSettings:
    """Process-wide settings of Pillow, tifffile and pydicom, in force while any decoder of this process is in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def change(self) -> None:
        """Called when a decoder is entered; the first one changes the settings."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            # Pillow's own limit warns and raises at fixed sizes. Decoders check `max_pixels` instead, before pixels
            # are allocated.
            self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            # Pillow also warns on stderr about unusual files, with damaged EXIF for example. Rejects say what matters.
            self._warnings = warnings.catch_warnings()
            self._warnings.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.|pydicom\.")
            self._silent = [log.disabled for log in _LOGS]
            for log in _LOGS:
                log.disabled = True

    def restore(self) -> None:
        """Called when a decoder is left; the last one restores the settings."""
        with self._lock:
            self._users -= 1
            if not self._users:
                Image.MAX_IMAGE_PIXELS = self._limit
                self._warnings.__exit__(None, None, None)
                for log, disabled in zip(_LOGS, self._silent, strict=True):
                    log.disabled = disabled


pillow_settings = PillowSettings()


@contextlib.contextmanager
def enough_memory(path: str) -> Iterator[None]:
    """Turns a MemoryError of its body into a ShardError that names the image."""
    try:
        yield
    except MemoryError as exc:
        raise ShardError(f"no memory to decode {path!r}; lower --workers or --max-pixels") from exc


@contextlib.contextmanager
def opened(data: bytes, path: str) -> Iterator[Image.Image]:
    """Opens an image and reads its header. Errors in the body become BadItem, as in `as_bad_item`.

    Args:
        data: the encoded image.
        path: the item's path, for messages.
    """
    with as_bad_item(path), _open(data) as image:
        if image.format == "PNG":
            set_transparency(image)
        if image.format == "MPO":  # a JPEG with more images after its end, as phones write them; only the first counts
            image.format = "JPEG"
        image.info.pop("xmp", None)  # Pillow would turn a TIFF without an orientation tag by its XMP
        try:
            yield image
        except OSError as exc:
            if image.format != "TIFF" or "decoder" not in str(exc):
                raise
            # Pillow gives no other reason if compressed samples are damaged or libtiff does not know the compression.
            detail = f"a TIFF of compression {image.info.get('compression')} that Pillow cannot decode ({exc})"
            raise BadItem("decode", "undecodable", detail) from exc


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # without a reason; the plug-in that accepts the first bytes gives one
        if read_header(data) is not None:
            with contextlib.suppress(UnidentifiedImageError):
                return Image.open(io.BytesIO(without_metadata(data)), formats=("JPEG",))
        for name in _FORMATS:
            reader, accepts = Image.OPEN[name]
            if name not in _UNSIGNED and accepts is not None and accepts(data[:16]) is True:
                try:
                    reader(io.BytesIO(data), "")
                except SyntaxError as exc:
                    if isinstance(exc.__cause__, (EOFError, IndexError, struct.error)):
                        raise exc.__cause__ from exc
                    detail = f"a {name} file whose header is damaged or of a kind that Pillow does not read ({exc})"
                    raise BadItem("decode", "undecodable", detail) from exc
        if (other := format_of(data)) is not None:
            detail = f"{other}, which is not supported; allowed are JPEG, PNG, WebP, GIF, BMP, TIFF, PPM and DICOM"
            raise BadItem("decode", "undecodable", detail) from None
        raise


@contextlib.contextmanager
def as_bad_item(path: str) -> Iterator[None]:
    """Turns an error of its body that the image caused into a BadItem.

    Raises:
        BadItem: the data is not an image, is damaged, or needs a library that is not installed.
        ShardError: there is not enough memory.
    """
    try:
        with enough_memory(path):
            yield
    except (BadItem, ShardError):
        raise
    except BackendError as exc:  # an optional library is missing, which most builds do not need
        raise BadItem("decode", "undecodable", str(exc)) from exc
    except UnidentifiedImageError as exc:
        raise BadItem("decode", "not-an-image", "the content is not a known image format") from exc
    except Exception as exc:
        # Pillow's plug-ins raise many kinds of exceptions for damaged or hostile data. The bytes are in memory by now,
        # so every error is a property of the file.
        text = str(exc) or type(exc).__name__
        if isinstance(exc, (EOFError, struct.error)) or text in _ENDED:
            text = "truncated: the data ends before the image does"
        truncated = "truncated" in text.lower()
        raise BadItem("decode", "truncated" if truncated else "undecodable", text) from exc


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an open image, 1 to 8, as defined in `exif.py`."""
    if image.format == "TIFF":  # Pillow always turns a TIFF upright
        return 1
    # Pillow joins the EXIF segments of a JPEG, but only the first one is used.
    segments = (body for name, body in getattr(image, "applist", ()) if name == "APP1")
    block = next((body for body in segments if body.startswith(EXIF_HEADER)), image.info.get("exif"))
    return orientation_in(block) if isinstance(block, bytes) else 1


def file_of(image: Image.Image) -> bytes | None:
    """The encoded file of an image that is not loaded yet, to be decoded as in a build; None if it is unavailable."""
    file = getattr(image, "fp", None)
    if file is None or not image.tile or image.tell():
        return None
    position = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(position)
    return data
