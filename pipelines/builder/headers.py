"""Samples the headers of images: their sizes and formats, and the memory that decoding them needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import BuildConfig
from ..dataset.plan import Plan
from ..machine.environment import Choice
from ..preprocess.dicom import is_dicom
from ..preprocess.geometry import Geometry
from ..preprocess.pillow import PillowDecoder, dicom_size
from ..preprocess.pillow_files import opened, orientation_of
from ..preprocess.samples import is_sixteen_bit
from ..sources.base import Item, Source, read_item
from ..sources.dicom_frames import frame_count
from ..sources.rejects import BadItem

if TYPE_CHECKING:
    from PIL import Image

_SAMPLED_ITEMS = 1000
_BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # Pillow stores three channels as four
_DICOM_BYTES_A_PIXEL = 34  # the stored pixels, then four copies in float64
_TIFF_BYTES_A_PIXEL = 40  # in tifffile: samples, levels, 16-bit RGBA
_DEEP_BYTES_A_PIXEL = 24  # 16-bit samples and planes of 32-bit floats
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True)
class Picture:
    """The header of an image.

    Attributes:
        path: the path of the item.
        height: the height of the upright image, in pixels.
        width: the width of the upright image, in pixels.
        mode: the pixel format, as Pillow names it.
        format: the file format, as Pillow names it.
        progressive: whether it is a progressive JPEG.
        turned: whether its EXIF orientation is applied and is not upright.
        sixteen_bit: whether it has 16 bits per channel and is not a DICOM file.
        encoded_bytes: the encoded size; for DICOM, the share of one frame.
        decode_bytes: an estimate of the memory that decoding needs.
    """

    path: str
    height: int
    width: int
    mode: str
    format: str
    progressive: bool
    turned: bool
    sixteen_bit: bool
    encoded_bytes: int
    decode_bytes: int


@dataclass(frozen=True)
class Sample:
    """A summary of the headers of items that are spread evenly over the plan.

    Attributes:
        items: the number of items in the sample.
        unreadable: how many headers cannot be read, by reject code.
        over_max_pixels: how many images are larger than `max_pixels`.
        sizes: height and width in pixels of the smallest, the median and the largest image by area; empty if no header
            can be read.
        encoded_bytes: the mean encoded size of the images whose headers can be read.
        modes: how many images have each mode, as Pillow names them.
        formats: how many images have each format, as Pillow names them.
        progressive: how many images are progressive JPEGs.
        turned: how many images are rotated or mirrored because of their EXIF orientation.
        cmyk: how many images are CMYK.
        gray: how many images are gray.
        sixteen_bit: how many images have 16 bits per channel and are not DICOM files.
        heaviest: the image within `max_pixels` that needs the most memory to decode; None if there is none.
    """

    items: int
    unreadable: dict[str, int]
    over_max_pixels: int
    sizes: tuple[tuple[int, int], ...]
    encoded_bytes: int
    modes: dict[str, int]
    formats: dict[str, int]
    progressive: int
    turned: int
    cmyk: int
    gray: int
    sixteen_bit: int
    heaviest: Picture | None


def sample_headers(
    plan: Plan, source: Source, config: BuildConfig, choice: Choice, progress: Callable[[int, int], None]
) -> Sample:
    """Reads up to 1,000 headers at equal distances in the plan.

    Args:
        plan: the items.
        source: the images.
        config: the settings.
        choice: the decoder.
        progress: called with the number of headers done and the total.
    """
    # Only Pillow decodes JPEGs at a reduced scale, and only if the settings allow it.
    drafts = choice.backend == "pillow" and config.reduces_jpegs
    geometry = Geometry.of(config, config.size) if config.size and drafts else None
    unreadable: Counter[str] = Counter()
    over = 0
    pictures: list[Picture] = []
    total = min(_SAMPLED_ITEMS, plan.item_count)
    with PillowDecoder(config, Geometry("none", 1, 1), source) as decoder:
        for done, item in enumerate(spread(plan, _SAMPLED_ITEMS)):
            progress(done, total)
            try:
                pictures.append(_picture(read_item(source, item), item.path, decoder, config, geometry))
            except BadItem as bad:
                if (bad.stage, bad.code) == ("decode", "too-large"):  # a WebP, which is not opened in that case
                    over += 1
                else:
                    unreadable[bad.code] += 1
    pictures.sort(key=lambda picture: picture.height * picture.width)
    within = [picture for picture in pictures if picture.height * picture.width <= config.max_pixels]
    return Sample(
        items=total,
        unreadable=dict(sorted(unreadable.items())),
        over_max_pixels=over + len(pictures) - len(within),
        sizes=tuple((pictures[at].height, pictures[at].width) for at in (0, len(pictures) // 2, -1) if pictures),
        encoded_bytes=sum(picture.encoded_bytes for picture in pictures) // max(1, len(pictures)),
        modes=dict(Counter(picture.mode for picture in pictures).most_common()),
        formats=dict(Counter(picture.format for picture in pictures).most_common()),
        progressive=sum(picture.progressive for picture in pictures),
        turned=sum(picture.turned for picture in pictures),
        cmyk=sum(picture.mode == "CMYK" for picture in pictures),
        gray=sum(picture.mode in ("1", "L", "LA", "I", "I;16") for picture in pictures),
        sixteen_bit=sum(picture.sixteen_bit for picture in pictures),
        heaviest=max(within, key=lambda picture: picture.decode_bytes, default=None),
    )


def _picture(data: bytes, path: str, decoder: PillowDecoder, config: BuildConfig, geometry: Geometry | None) -> Picture:
    """Reads a header. Raises BadItem if it cannot be read."""
    if is_dicom(data):
        height, width = dicom_size(data, path)
        held = 2 * len(data) + _DICOM_BYTES_A_PIXEL * height * width
        share = len(data) // frame_count(data)  # of one frame
        return Picture(path, height, width, "I;16", "DICOM", False, False, False, share, held)
    if (tiff := decoder.tiff_elsewhere(data)) is not None:
        turned = config.exif_orientation and tiff.orientation > 1
        height, width = tiff.size[::-1] if turned and tiff.orientation >= 5 else tiff.size
        held = len(data) + _TIFF_BYTES_A_PIXEL * height * width
        return Picture(path, height, width, tiff.mode, "TIFF", False, turned, tiff.bits > 8, len(data), held)
    with opened(decoder.prepared(data), path) as image:
        orientation = orientation_of(image) if config.exif_orientation else 1
        width, height = image.size if orientation < 5 else image.size[::-1]
        progressive = image.format == "JPEG" and bool(image.info.get("progressive"))
        return Picture(
            path=path,
            height=height,
            width=width,
            mode=image.mode,
            format=image.format or "",
            progressive=progressive,
            turned=orientation > 1,
            sixteen_bit=is_sixteen_bit(image),
            encoded_bytes=len(data),
            decode_bytes=len(data)
            + _decode_bytes(image, height, width, progressive, orientation > 1, geometry)
            + (_DEEP_BYTES_A_PIXEL * height * width if config.bit_depth == 16 else 0),
        )


def _decode_bytes(
    image: Image.Image, height: int, width: int, progressive: bool, turned: bool, geometry: Geometry | None
) -> int:
    """Estimates the memory that Pillow needs to decode an image before resizing it, in bytes."""
    pixels, scale = height * width, 1
    if image.format == "WEBP":
        return 16 * pixels  # the canvas, the frame and their copies
    if image.format == "JPEG" and geometry is not None:
        place = geometry.place(height, width)
        fits = [by for by in (1, 2, 4, 8) if height // by >= 2 * place.height and width // by >= 2 * place.width]
        scale = max(fits, default=1)
    a_pixel = _BYTES_A_PIXEL.get(image.mode, 4) * (1 + turned)
    if image.mode in _ALPHA or "transparency" in image.info:
        a_pixel += 12  # converted to RGBA, composited on the background, converted to RGB
    elif image.mode not in ("L", "RGB"):
        a_pixel += 4
    coefficients = 6 * pixels if progressive else 0  # 16 bits each, for the whole image; half of that with 4:2:0
    return a_pixel * pixels // scale**2 + coefficients


def spread(plan: Plan, count: int, start: float = 0.0) -> Iterator[Item]:
    """Yields up to `count` items at equal distances; `start` is the first position as a fraction of the distance."""
    distance = max(1.0, plan.item_count / count)
    for number in range(min(count, plan.item_count)):
        position = int((number + start) * distance)
        yield from plan.items(position, position + 1)
