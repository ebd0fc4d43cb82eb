"""The sample types of images that Pillow has opened, and their conversion to 8-bit pixels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..sources.rejects import BadItem

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOURED = ("RGB", "RGBX", "RGBA", "LA")
_DEEP_FORMATS = ("PNG", "PPM", "TIFF")  # in a BMP, 16 bits are those of all three colours together
# Image formats that are not decoded, by the first bytes of a file.
_OTHERS = {
    "AVIF": rb".{4}ftypavi[fs]", "HEIF": rb".{4}ftyp(hei|hev|mif1|msf1)", "JPEG XL": rb"\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "OpenEXR": rb"\x76\x2f\x31\x01", "Photoshop": rb"8BPS\0",
    "ICO": rb"\0\0\x01\0",
}  # fmt: skip


def format_of(data: bytes) -> str | None:
    """The name of the data's format if it is a known image format that is not decoded; else None."""
    return next((name for name, pattern in _OTHERS.items() if re.match(pattern, data, re.DOTALL)), None)


def sixteen_bit_samples(image: Image.Image) -> tuple[str, int] | None:
    """Pillow's raw mode and the largest sample of an image that Pillow would reduce from 16 to 8 bits; else None.

    Call it before the image is loaded. CMYK is never reported: only Pillow converts it, always in 8 bits.
    """
    tiles = getattr(image, "tile", ()) if image.mode in _COLOURED and image.format in _DEEP_FORMATS else ()
    arguments = tiles[0][3] if tiles else ""
    raw_mode, *rest = (arguments,) if isinstance(arguments, str) else arguments
    most = rest[0] if image.format == "PPM" and rest else 65_535 if ";16" in str(raw_mode) else 255
    return (str(raw_mode), int(most)) if most > 255 else None


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has 16 bits per channel, as far as Pillow reports it."""
    gray = image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return gray or sixteen_bit_samples(image) is not None


def is_gray16(image: Image.Image) -> bool:
    """Whether an image is gray with samples of up to 16 bits. Raises BadItem if samples exceed the header's 16 bits."""
    if image.mode in _SIXTEEN_BIT:
        return True
    if image.mode != "I" or image.format not in ("PNG", "PPM", None):
        return False
    low, high = image.getextrema()
    if low < 0 or high > 65_535:
        raise BadItem("decode", "undecodable", "samples of more than 16 bits")
    return True


def opacity(image: Image.Image) -> NDArray[np.bool_] | None:
    """Which pixels of a 16-bit gray image are opaque, bool (H, W); None if no level is transparent."""
    level = image.info.get("transparency")
    return None if level is None else np.asarray(np.asarray(image) != level)


def plain(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """The image as 8-bit L or RGB: alpha composited onto the background, 16-bit gray scaled, the rest converted.

    Args:
        image: a loaded image.
        mode: "L" or "RGB".
        background: R, G and B behind transparent pixels, 0 to 255.

    Raises:
        BadItem: the samples have 32 bits.
    """
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image if image.mode == "L" or mode == "RGB" else image.convert(mode)
    if is_gray16(image):
        scale = ((np.arange(65_536) + 128) // 257).astype(np.uint8)  # round(v * 255 / 65535)
        levels = Image.fromarray(scale[np.asarray(image)])
        if (opaque := opacity(image)) is None:
            return levels
        image = Image.merge("LA", (levels, Image.fromarray(opaque * np.uint8(255))))
    if image.mode in ("I", "F"):
        raise BadItem("decode", "undecodable", f"samples of 32 bits (mode {image.mode})")
    if image.mode == "La":  # gray that is premultiplied by alpha
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        canvas.alpha_composite(layer)
        image = canvas
    return image.convert(mode)


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Pixels (H, W, ...) turned upright, as `pillow.upright` does with images."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
