"""What the headers of images say: sizes, kinds, and what decoding takes."""

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
_BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # Pillow keeps three channels as four
_DICOM_BYTES_A_PIXEL = 34  # as it is stored, then four times in float64
_TIFF_BYTES_A_PIXEL = 40  # by tifffile: samples, their levels and a picture of them, with alpha, in 16 bits
_DEEP_BYTES_A_PIXEL = 24  # samples of 16 bits, and planes of 32-bit floats
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True)
class Picture:
    """What the header of an image says; sides in pixels, upright. `decode_bytes` estimates what decoding it takes."""

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
    """Headers of items spread over the plan.

    Attributes:
        items: how many were looked at.
        unreadable: how many headers cannot be read, by reject code.
        over_max_pixels: how many images are larger than `max_pixels`.
        sizes: height and width of the smallest, the median and the largest image by pixels; empty if none can be read.
        encoded_bytes: of those that can be read, in the mean.
        modes, formats: how many images have each, as Pillow names them.
        progressive, turned, cmyk, gray: how many are progressive JPEGs, turned by EXIF, CMYK, gray.
        sixteen_bit: how many have 16 bits a channel and are not DICOM files.
        heaviest: the image that takes the most memory to decode, of those within `max_pixels`.
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
    """Reads some 1,000 headers, spread over the plan."""
    # Only Pillow decodes a JPEG at a half or less, and not where it stays as it is.
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
                if (bad.stage, bad.code) == ("decode", "too-large"):  # a WebP, which is not opened then
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
    """What a header says. Raises BadItem if it cannot be read."""
    if is_dicom(data):
        height, width = dicom_size(data, path)
        held = 2 * len(data) + _DICOM_BYTES_A_PIXEL * height * width
        share = len(data) // frame_count(data)  # of a frame
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
    """What Pillow takes to decode an image before it is resized, about."""
    pixels, scale = height * width, 1
    if image.format == "WEBP":
        return 16 * pixels  # the canvas, the frame and copies
    if image.format == "JPEG" and geometry is not None:
        place = geometry.place(height, width)
        fits = [by for by in (1, 2, 4, 8) if height // by >= 2 * place.height and width // by >= 2 * place.width]
        scale = max(fits, default=1)
    a_pixel = _BYTES_A_PIXEL.get(image.mode, 4) * (1 + turned)
    if image.mode in _ALPHA or "transparency" in image.info:
        a_pixel += 12  # as RGBA, on its background, as RGB
    elif image.mode not in ("L", "RGB"):
        a_pixel += 4
    coefficients = 6 * pixels if progressive else 0  # of the whole image, 16 bits each; half of it with 4:2:0
    return a_pixel * pixels // scale**2 + coefficients


def spread(plan: Plan, count: int, start: float = 0.0) -> Iterator[Item]:
    """Up to `count` items at equal distances, the first at `start` of a distance."""
    distance = max(1.0, plan.item_count / count)
    for number in range(min(count, plan.item_count)):
        position = int((number + start) * distance)
        yield from plan.items(position, position + 1)
