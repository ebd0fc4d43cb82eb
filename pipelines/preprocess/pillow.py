"""Decodes and resizes images with Pillow, or with Pillow-SIMD if that is installed in its place.

With the SIMD resizer, simplejpeg decodes ordinary JPEGs, if it is installed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from ..config import BuildConfig
from ..errors import UsageError
from ..sources.base import Batch, Item, Source, read_item
from ..sources.dicom_frames import require_pydicom
from ..sources.rejects import BadItem, Reject, Stage
from . import turbo
from .base import DECODING_REVISION, DecodedBatch, with_reads
from .dicom import DicomFile, is_dicom, size_of
from .geometry import Geometry, Placement
from .jpeg import read_header
from .pillow_files import as_bad_item, enough_memory, file_of, opened, orientation_of, pillow_settings
from .png import is_png, samples16, without_extras
from .resize import is_simd, samples_of, simd_resizer
from .samples import is_sixteen_bit, plain, sixteen_bit_samples, turned
from .tiff import Tiff, is_tiff

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
# Exif 2.32, table 6, tag 0x0112: how to turn a stored image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LOSSLESS = 0xC3  # SOF3 (ITU-T T.81, table B.1)


class PillowDecoder:
    """Decodes images one by one; `decode_image` does all of the preprocessing up to uint8 pixels.

    Args:
        config: the settings of the build.
        geometry: the resize mode and the output size.
        source: reads the items; None if only single images are decoded.

    Attributes:
        sixteen_bit: the path of an image that was reduced from 16 to 8 bits per channel; None if there was none. DICOM
            files are not counted, since their window selects the levels.
    """

    # Formats whose files may give other pixels than a PIL image that was opened elsewhere.
    _whole_files: tuple[str, ...] = ("JPEG", "MPO", "PNG", "TIFF")

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source | None) -> None:
        self._config = config
        self._geometry = geometry
        self._source = source
        self._mode = "L" if config.channels == "gray" else "RGB"
        self._filter = _FILTERS[config.interpolation]
        self._simd = simd_resizer(config)
        self._turbo = self._simd is not None and self._mode == "RGB" and turbo.is_installed()
        self._may_draft = config.reduces_jpegs
        self.sixteen_bit: str | None = None
        self._frames = threading.local()

    def __enter__(self) -> PillowDecoder:
        pillow_settings.change()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pillow_settings.restore()

    def provenance(self) -> dict[str, Any]:
        """The libraries whose versions decide the pixels."""
        return {"backend": "pillow", "device": "cpu", "decoding_revision": DECODING_REVISION, **self.libraries}

    @property
    def libraries(self) -> dict[str, Any]:
        """As `versions`, and the versions of the resizer and of the JPEG decoder that are used besides Pillow."""
        resizer = {} if self._simd is None else {"resizer": self._simd.version}
        return {**versions(), **resizer, **({"jpeg_decoder": turbo.version()} if self._turbo else {})}

    def decode(self, batches: Iterable[Batch]) -> Iterator[DecodedBatch]:
        """See `Decoder.decode`."""
        assert self._source is not None
        for batch, reads in with_reads(self._source, batches):
            pixels = self._empty(len(batch.items))
            source_bytes = np.zeros(len(batch.items), np.int64)
            kept: list[int] = []
            rejects: list[Reject] = []
            begin, reading = time.perf_counter(), 0.0
            for position, (item, read) in enumerate(zip(batch.items, reads, strict=True)):
                start = time.perf_counter()
                try:
                    data = read()
                    reading += time.perf_counter() - start
                    source_bytes[position] = len(data)
                    pixels[position] = self.decode_image(data, item.path, self._source.frame(item))
                    kept.append(position)
                except BadItem as bad:
                    rejects.append(bad.of(item.path, item.index))
            seconds = {"read": reading, "decode": time.perf_counter() - begin - reading}
            yield DecodedBatch(batch, pixels, np.array(kept, np.int64), source_bytes, rejects, seconds)

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """See `Decoder.bare`."""
        assert self._source is not None
        for batch, reads in with_reads(self._source, batches):
            for item, read in zip(batch.items, reads, strict=True):
                with contextlib.suppress(BadItem):
                    data = read()
                    frame = self._source.frame(item)
                    if last == "resize":
                        self.decode_image(data, item.path, frame)
                    elif last == "decode":
                        self._decode_only(data, item.path, frame)
            yield batch

    def _decode_only(self, data: bytes, path: str, frame: int | None) -> None:
        if self._elsewhere(data, path, frame) is None and not (self._turbo and self._plain_jpeg(data, path)):
            with opened(self.prepared(data), path) as image:
                self._upright(image)

    def _empty(self, count: int) -> NDArray[Any]:
        """Memory for `count` images (N, H, W, C), whose planes are contiguous if those of the stored images are."""
        height, width, channels = self._geometry.height, self._geometry.width, self._config.channel_count
        if self._config.layout == "NHWC":
            return np.empty((count, height, width, channels), self._config.pixel_dtype)
        return np.empty((count, channels, height, width), self._config.pixel_dtype).transpose(0, 2, 3, 1)

    def decode_image(self, data: bytes, path: str, frame: int | None = None) -> NDArray[Any]:
        """The pixels of one encoded image: uint8, or uint16 in 16 bits, (H, W, C), C = 3 in R,G,B or 1 in gray.

        The array may be a view with any strides.

        Args:
            data: the encoded image.
            path: the item's path, for messages.
            frame: the number of a frame in a DICOM file; None if it has only one. See `dicom.py`.

        Raises:
            BadItem: the data is not an image, is damaged or too large.
            BackendError: the image is DICOM, and pydicom is missing.
            ShardError: there is not enough memory.
        """
        levels = self._elsewhere(data, path, frame)
        if levels is not None:
            return self.pixels_of(levels, path)
        if self._turbo and (found := self._plain_jpeg(data, path)) is not None:
            return self._resized_by_simd(*found)
        with opened(self.prepared(data), path) as image:
            if self.sixteen_bit is None and self._config.bit_depth == 8 and is_sixteen_bit(image):
                self.sixteen_bit = path
            picture, place = self._upright(image)
        with enough_memory(path):
            return self._place(picture, place)

    def _plain_jpeg(self, data: bytes, path: str) -> tuple[NDArray[np.uint8], Placement] | None:
        """The whole upright pixels (H, W, 4) of an ordinary color JPEG, as `turbo.decode`, and its placement.

        None for all other files, and for damaged data, which Pillow decodes or refuses with a reason. Raises as
        `decode_image`.
        """
        header = read_header(data)
        if header is None or not header.plain or header.components != 3:
            return None
        self._check_pixels(header.width, header.height)
        orientation = header.orientation if self._config.exif_orientation else 1
        place, factor = self._placed(header.height, header.width, orientation)
        with enough_memory(path):
            pixels = turbo.decode(data, header, factor)
        if pixels is None:
            return None
        whole = turned(pixels.view(np.uint32), orientation)  # NumPy moves numbers faster than lines of four
        return np.ascontiguousarray(whole).view(np.uint8), place

    def _elsewhere(self, data: bytes, path: str, frame: int | None) -> NDArray[Any] | None:
        """The upright levels of a file that another library decodes: DICOM, and some TIFF. None for all other files."""
        if is_dicom(data):
            return self._of_dicom(data, path, frame)
        tiff = self.tiff_elsewhere(data)
        if tiff is None:
            return None
        if self.sixteen_bit is None and self._config.bit_depth == 8 < tiff.bits:
            self.sixteen_bit = path
        with as_bad_item(path):
            return turned(tiff.decode(self._config.bit_depth), tiff.orientation if self._config.exif_orientation else 1)

    def tiff_elsewhere(self, data: bytes) -> Tiff | None:
        """The TIFF if Pillow does not decode it correctly; None for all other files.

        Raises:
            BadItem: as in `prepared`, or tifffile is missing.
        """
        tiff = self._tiff(data) if is_tiff(data) else None
        if tiff is None or tiff.by_pillow(self._config.bit_depth):
            return None
        with as_bad_item("a TIFF"):
            tiff.require_tifffile()
        return tiff

    def _tiff(self, data: bytes) -> Tiff:
        tiff = Tiff(data)
        self._check_pixels(*reversed(tiff.size))
        tiff.check_segments()
        return tiff

    def _of_dicom(self, data: bytes, path: str, frame: int | None) -> NDArray[Any]:
        require_pydicom()
        last, self._frames.last = getattr(self._frames, "last", None), None
        with as_bad_item(path):
            file = last[1] if last and last[0] is data else DicomFile(data)
        if file.frames > 1:
            if frame is None:
                detail = f"a DICOM file of {file.frames} frames, which are items only on a disk, with a name in .dcm"
                raise BadItem("decode", "undecodable", detail)
            self._frames.last = data, file  # its next frame is likely to come next
        height, width = file.size
        self._check_pixels(width, height)
        with as_bad_item(path):
            return file.decode(frame or 0, self._config)

    def pixels_of(self, picture: Image.Image | NDArray[Any], path: str) -> NDArray[Any]:
        """As `decode_image`, for an open image or for pixels, which are not changed.

        Args:
            picture: a PIL image; or uint8 (H, W), (H, W, 1), (H, W, 3), (H, W, 4), or uint16 (H, W).
            path: the item's path, for messages.

        Raises:
            UsageError: an array of another shape or dtype.
            BadItem, ShardError: as in `decode_image`.
        """
        image = picture if isinstance(picture, Image.Image) else _from_array(picture)
        with as_bad_item(path):
            data = file_of(image) if image.format in self._whole_files else None
        if data is not None:
            return self.decode_image(data, path)
        with as_bad_item(path):
            self._check_pixels(*image.size)
            own = image.copy()
            own.format = image.format  # which decides the meaning of the samples
            whole, place = self._upright(own)
        with enough_memory(path):
            return self._place(whole, place)

    def upright_size(self, data: bytes, path: str) -> tuple[int, int]:
        """Height and width of an image after the EXIF rotation, if enabled. Decodes it; raises as `decode_image`."""
        levels = self._elsewhere(data, path, 0)
        if levels is not None:
            height, width = levels.shape[:2]
            return height, width
        with opened(self.prepared(data), path) as image:
            self._check_pixels(*image.size)
            image.load()
            turned = self._config.exif_orientation and orientation_of(image) >= 5
            width, height = image.size
            return (width, height) if turned else (height, width)

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._config.max_pixels:
            raise BadItem("decode", "too-large", f"{width} x {height} pixels; at most {self._config.max_pixels}")

    def prepared(self, data: bytes) -> bytes:
        """The data that Pillow is given. Raises BadItem for files that Pillow must not open."""
        if is_png(data):
            return without_extras(data)
        if is_tiff(data):
            tiff = self._tiff(data)
            return data if self._config.exif_orientation else tiff.unturned()
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            self._check_webp(data)
        else:
            read_header(data)  # raises BadItem for a JPEG that would take very long
        return data

    def _check_webp(self, data: bytes) -> None:
        # Pillow's WebP plug-in allocates the whole canvas when it opens a file, and has one message for all errors.
        size = _webp_size(data)
        if size:
            self._check_pixels(*size)
        if 8 + int.from_bytes(data[4:8], "little") > len(data) + 1:  # some writers leave out the last padding byte
            raise BadItem("decode", "truncated", f"{len(data)} bytes, fewer than its header says")
        if size:
            with enough_memory("a WebP image"):
                np.empty(8 * size[0] * size[1], np.uint8)  # canvas and pixels: if this fails, the file is not bad

    def _upright(self, image: Image.Image) -> tuple[Image.Image, Placement]:
        """The whole upright image, 8-bit L or RGB, and its placement."""
        exact = file_of(image) if "transparency" in image.info and sixteen_bit_samples(image) else None
        orientation, place = self._loaded(image)
        if exact is not None:  # a transparent colour of 16-bit samples, which Pillow has reduced to 8 bits
            image = Image.fromarray((samples16(exact) >> 8).astype(np.uint8))
        return plain(upright(image, orientation), self._mode, self._config.background), place

    def _loaded(self, image: Image.Image) -> tuple[int, Placement]:
        """Loads an image within the limits; returns its orientation and the placement of the upright image.

        A JPEG may be decoded at a half of its size or less.
        """
        config = self._config
        self._check_pixels(*image.size)
        if image.format != "JPEG":
            # Load before reading EXIF: loading turns a TIFF upright, and a PNG may have its EXIF after the pixels.
            image.load()
        width, height = image.size
        orientation = orientation_of(image) if config.exif_orientation else 1
        place, factor = self._placed(height, width, orientation)
        # libjpeg-turbo decodes lossless JPEGs only at full size.
        if factor > 1 and image.format == "JPEG" and not _is_lossless(image):
            image.draft(None, (width // factor, height // factor))
        image.load()
        return orientation, place

    def _placed(self, height: int, width: int, orientation: int) -> tuple[Placement, int]:
        """The placement of a stored image of this size, and by which factor a JPEG is decoded smaller: 1, 2, 4 or 8.

        A reduced JPEG has at least twice the sides of the resized image. Raises as `_placement`.
        """
        if orientation >= 5:
            height, width = width, height
        place = self._placement(height, width)
        ratio = min(height // (2 * place.height), width // (2 * place.width)) if self._may_draft else 1
        return place, next((factor for factor in (8, 4, 2) if factor <= ratio), 1)

    def _placement(self, height: int, width: int) -> Placement:
        """The placement of an upright image of this size. Raises BadItem if it exceeds the limits."""
        place, most = self._geometry.place(height, width), self._config.max_pixels
        if self._geometry.mode == "none" and (height, width) != (self._geometry.height, self._geometry.width):
            expected = f"{self._geometry.height} x {self._geometry.width}"
            raise BadItem("resize", "wrong-size", f"{height} x {width} pixels (height x width); expected {expected}")
        if place.height * place.width > most:
            detail = f"{height} x {width} pixels become {place.height} x {place.width}; at most {most}"
            raise BadItem("resize", "too-large", detail)
        return place

    def _place(self, image: Image.Image, place: Placement) -> NDArray[Any]:
        if image.size != (place.width, place.height):
            if self._simd and image.mode == self._mode:  # straight to an array, without a copy by Pillow
                return self._resized_by_simd(samples_of(image), place)
            image = self._resized(image, place)
        if image.mode != self._mode:
            image = image.convert(self._mode)
        return self._on_canvas(np.asarray(image).reshape(place.height, place.width, -1), place)

    def _resized(self, image: Image.Image, place: Placement) -> Image.Image:
        if self._simd:  # a gray image in a build of colors
            return Image.fromarray(self._simd.resize(samples_of(image), place.height, place.width).squeeze(2))
        return image.resize((place.width, place.height), self._filter)

    def _resized_by_simd(self, samples: NDArray[np.uint8], place: Placement) -> NDArray[np.uint8]:
        """As `decode_image`, from samples as in `SimdResizer.resize`."""
        assert self._simd is not None
        if samples.shape[:2] != (place.height, place.width):
            samples = self._simd.resize(samples, place.height, place.width)
        placed = self._on_canvas(samples[..., : self._config.channel_count], place)
        pixels: NDArray[np.uint8] = self._empty(1)[0]
        for channel in range(pixels.shape[2]):  # NumPy is slow at lines of three
            pixels[..., channel] = placed[..., channel]
        return pixels

    def _on_canvas(self, pixels: NDArray[Any], place: Placement) -> NDArray[Any]:
        """Resized pixels (height, width, C), cropped or padded to the output size."""
        height, width = self._geometry.height, self._geometry.width
        if place.height >= height and place.width >= width:
            return pixels[-place.top : height - place.top, -place.left : width - place.left]
        level = self._config.pad_value * (self._config.max_level // 255)
        canvas = np.full((height, width, pixels.shape[2]), level, pixels.dtype)
        canvas[place.top : place.top + place.height, place.left : place.left + place.width] = pixels
        return canvas


def first_size(source: Source, items: Iterable[Item], config: BuildConfig) -> tuple[int, int] | None:
    """Height and width of the first of `items` that can be decoded; None if none can be."""
    with PillowDecoder(config, Geometry("none", 1, 1), source) as decoder:
        for item in items:
            with contextlib.suppress(BadItem):
                return decoder.upright_size(read_item(source, item), item.path)
    return None


def versions() -> dict[str, Any]:
    """The versions of the imported Pillow and of its JPEG library."""
    turbo = features.check_feature("libjpeg_turbo")
    jpeg = features.version_feature("libjpeg_turbo") if turbo else features.version_codec("jpg")
    return {
        "pillow": PIL.__version__,
        "pillow_simd": is_simd(),
        "libjpeg": f"{'libjpeg-turbo' if turbo else 'libjpeg'} {jpeg}",
    }


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the first chunk of a WebP file (RFC 9649, sections 2.5 to 2.7); None if it is invalid."""
    kind, body = data[8:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"WEBPVP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _from_array(pixels: NDArray[Any]) -> Image.Image:
    if not isinstance(pixels, np.ndarray):
        raise UsageError(
            f"got an object of type {type(pixels).__name__}; allowed: a path, bytes, a PIL image, or a NumPy array"
        )
    kind = (pixels.dtype.name, pixels.ndim, pixels.shape[2] if pixels.ndim == 3 else 1)
    if kind not in {("uint8", 2, 1), ("uint8", 3, 1), ("uint8", 3, 3), ("uint8", 3, 4), ("uint16", 2, 1)}:
        raise UsageError(
            f"got {pixels.dtype} {pixels.shape}; allowed: uint8 (H, W), (H, W, 1), (H, W, 3) in R,G,B, (H, W, 4) with "
            "alpha, or uint16 (H, W)"
        )
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if kind == ("uint8", 3, 1) else pixels))


def dicom_size(data: bytes, path: str) -> tuple[int, int]:
    """Height and width of a DICOM file, from its header; raises as `PillowDecoder.decode_image`."""
    require_pydicom()
    with as_bad_item(path):
        return size_of(data)


def _is_lossless(image: Image.Image) -> bool:
    """Whether a JPEG that is not loaded yet is lossless."""
    header = read_header(file_of(image) or b"")
    return header is not None and header.frame == _LOSSLESS


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image, turned upright from an EXIF orientation of 1 to 8."""
    return image.transpose(_UPRIGHT[orientation]) if orientation > 1 else image
