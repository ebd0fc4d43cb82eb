"""Makes pictures to try a build on: a few hundred with the sizes of ImageNet, and a few broken files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw

Field = NDArray[np.floating[Any]]  # a number per pixel
Motif = Callable[[int, int, np.random.Generator], Image.Image]  # (height, width, random) -> a mask of mode L

# (height, width) to choose from at random: mostly the usual sizes of ImageNet.
_SIZES = (
    *[(375, 500)] * 7, *[(500, 375)] * 3, *[(333, 500)] * 3, *[(500, 333)] * 2, (500, 500), (281, 500), (400, 300),
    (480, 640), (120, 160), (64, 80),
)  # fmt: skip
_LARGE = (1200, 1600)
_SUBSAMPLING = ("4:2:0", "4:2:0", "4:4:4", "4:2:0", "4:2:2")
# How a picture is stored if this orientation (Exif 2.32, tag 0x0112) turns it upright.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_NOISE_LEVELS = 9.0  # standard deviation; without noise, a JPEG would have almost no data


@dataclass(frozen=True)
class DemoImages:
    """The result of `make_images`.

    Attributes:
        folder: the tree, with one folder per class.
        class_names: the classes, sorted.
        images: how many pictures can be decoded.
        bad: the path of each file that cannot be decoded, relative to `folder`, by what is wrong with it.
    """

    folder: Path
    class_names: tuple[str, ...]
    images: int
    bad: Mapping[str, str]


def make_images(folder: Path, *, count: int = 300, seed: int = 0, broken: bool = True) -> DemoImages:
    """Writes a tree of class folders: `count` pictures of the kinds that collections contain, and four broken files.

    Most are JPEGs of about 500 x 375 pixels; some of them are progressive, gray or rotated by EXIF. From a dozen
    pictures on, one is CMYK and one is a PNG with the name of a JPEG.

    Args:
        folder: gets the class folders; created if missing. Its other content is kept.
        count: the number of pictures, without the broken files.
        seed: decides the pictures. With the same version of Pillow, the same seed gives the same files.
        broken: whether to write the broken files.
    """
    class_names = sorted(MOTIFS)
    for name in class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        motif = class_names[number % len(class_names)]
        (folder / motif / f"{motif}_{number:04d}.jpg").write_bytes(_picture(number, motif, seed))
    if not broken:
        return DemoImages(folder, tuple(class_names), count, {})
    whole = _picture(count, "stripes", seed)
    bad = {
        "cut in half": ("circles/half.jpg", whole[: len(whole) // 2]),
        "empty": ("clouds/empty.jpg", b""),
        "a text": ("hills/notes.jpg", b"Remember to take the pictures of the hills.\n"),
        "without its last two bytes": ("stripes/no_end.jpg", whole[:-2]),
    }
    for path, data in bad.values():
        (folder / path).write_bytes(data)
    return DemoImages(folder, tuple(class_names), count, {what: path for what, (path, _) in bad.items()})


def paint(height: int, width: int, seed: int, motif: str | None = None) -> NDArray[np.uint8]:
    """A picture with gradients, edges and noise like a photograph: uint8 (height, width, 3), R,G,B.

    Args:
        height: in pixels.
        width: in pixels.
        seed: decides the picture.
        motif: what it shows, one of `MOTIFS`; chosen by the seed if None.
    """
    random = np.random.default_rng([seed, height, width])
    draw = MOTIFS[motif or sorted(MOTIFS)[int(random.integers(len(MOTIFS)))]]
    dark, light = random.integers(0, 110, (2, 2, 3)), random.integers(140, 256, (2, 2, 3))
    back, front = (dark, light) if random.random() < 0.5 else (light, dark)
    picture = np.asarray(
        Image.composite(_smooth(front, height, width), _smooth(back, height, width), draw(height, width, random))
    )
    noise = random.normal(0, _NOISE_LEVELS, (97, 101, 3)).round().astype(np.int16)
    tiles = np.tile(noise, (-(-height // 97), -(-width // 101), 1))[:height, :width]
    tiles += picture
    return np.clip(tiles, 0, 255, out=tiles).astype(np.uint8)


def _picture(number: int, motif: str, seed: int) -> bytes:
    random = np.random.default_rng([seed, number])
    # The periods of the kinds and the number of classes have no common divisor, so every class gets every kind.
    size = _LARGE if number % 97 == 40 else _SIZES[int(random.integers(len(_SIZES)))]
    image = Image.fromarray(paint(*size, int(random.integers(2**31)), motif))
    options: dict[str, Any] = {"quality": int(random.integers(75, 96))}
    file_format = "JPEG"
    if number == 10:
        file_format, options = "PNG", {"compress_level": 1}
    elif number == 11:
        image = image.convert("CMYK")
    elif number % 23 == 4:
        image = image.convert("L")
    else:
        options["subsampling"] = _SUBSAMPLING[int(random.integers(len(_SUBSAMPLING)))]
        options["progressive"] = number % 13 == 3
        if number % 29 == 7:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation = (
                2 + (number // 29 + 4) % 7
            )  # the first one is 6, the most common
            image = image.transpose(_STORED[orientation])
            options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _smooth(colours: NDArray[np.int64], height: int, width: int) -> Image.Image:
    return Image.fromarray(colours.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def _grid(height: int, width: int, random: np.random.Generator) -> tuple[Field, Field]:
    """Coordinates of every pixel in units of the shorter side, rotated by a random angle around a random center."""
    angle = random.uniform(0, np.pi)
    y = (np.arange(height, dtype=np.float32) - random.uniform(0.3, 0.7) * height) / min(height, width)
    x = (np.arange(width, dtype=np.float32) - random.uniform(0.3, 0.7) * width) / min(height, width)
    across, along = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return y[:, None] * across + x * along, x * across - y[:, None] * along


def _edges(field: Field) -> Image.Image:
    """A mask with soft borders of the area in which `field` is positive."""
    field *= 900
    field += 128
    return Image.fromarray(np.clip(field, 0, 255, out=field).astype(np.uint8))


def _stripes(height: int, width: int, random: np.random.Generator) -> Image.Image:
    return _edges(np.sin(_grid(height, width, random)[0] * random.uniform(15, 50)))


def _checks(height: int, width: int, random: np.random.Generator) -> Image.Image:
    y, x = _grid(height, width, random)
    scale = random.uniform(10, 25)
    return _edges(np.sin(y * scale) * np.sin(x * scale))


def _rings(height: int, width: int, random: np.random.Generator) -> Image.Image:
    return _edges(np.sin(np.hypot(*_grid(height, width, random)) * random.uniform(25, 60)))


def _spirals(height: int, width: int, random: np.random.Generator) -> Image.Image:
    y, x = _grid(height, width, random)
    arms = random.integers(2, 6)
    return _edges(np.sin(np.hypot(y, x) * random.uniform(15, 30) + np.arctan2(y, x) * np.float32(arms)))


def _waves(height: int, width: int, random: np.random.Generator) -> Image.Image:
    y, x = _grid(height, width, random)
    return _edges(np.sin((y + np.sin(x * random.uniform(8, 14)) * 0.08) * random.uniform(25, 50)))


def _clouds(height: int, width: int, random: np.random.Generator) -> Image.Image:
    sky = np.zeros((height, width), np.float32)
    for cells in (4, 8, 16, 32):
        coarse = random.random((cells, cells), np.float32) / np.float32(cells)
        sky += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    sky -= sky.mean()
    return Image.fromarray(np.clip(sky * 1400 + 128, 0, 255).astype(np.uint8))


def _hills(height: int, width: int, random: np.random.Generator) -> Image.Image:
    x = np.arange(width, dtype=np.float32) / width
    land = np.zeros((height, width), np.uint8)
    for distance in range(3):
        ridge = 0.35 + 0.2 * distance + 0.08 * np.sin(x * random.uniform(5, 14) + random.uniform(0, 6))
        land[np.arange(height)[:, None] > ridge * height] = 85 * (distance + 1)
    return Image.fromarray(land)


def _drawn(shape: Callable[[ImageDraw.ImageDraw, float, float, float, np.random.Generator], None]) -> Motif:
    """A motif of about a dozen such shapes; `shape` gets a center and a radius in pixels."""

    def draw(height: int, width: int, random: np.random.Generator) -> Image.Image:
        mask = Image.new("L", (width, height))
        pencil = ImageDraw.Draw(mask)
        for _ in range(random.integers(6, 15)):
            radius = random.uniform(0.06, 0.22) * min(height, width)
            shape(pencil, random.uniform(0, width), random.uniform(0, height), radius, random)
        return mask

    return draw


def _circle(pencil: ImageDraw.ImageDraw, x: float, y: float, radius: float, random: np.random.Generator) -> None:
    pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(random.integers(150, 256)))


def _triangle(pencil: ImageDraw.ImageDraw, x: float, y: float, radius: float, random: np.random.Generator) -> None:
    angles = random.uniform(0, 2 * np.pi) + np.arange(3) * (2 * np.pi / 3)
    corners = [(x + radius * float(np.cos(angle)), y + radius * float(np.sin(angle))) for angle in angles]
    pencil.polygon(corners, fill=int(random.integers(150, 256)))


def _star(pencil: ImageDraw.ImageDraw, x: float, y: float, radius: float, random: np.random.Generator) -> None:
    angles = random.uniform(0, 2 * np.pi) + np.arange(10) * (np.pi / 5)
    lengths = np.where(np.arange(10) % 2, 0.4, 1) * radius
    corners = list(zip((x + lengths * np.cos(angles)).tolist(), (y + lengths * np.sin(angles)).tolist(), strict=True))
    pencil.polygon(corners, fill=int(random.integers(150, 256)))


MOTIFS: Mapping[str, Motif] = {
    "checks": _checks,
    "circles": _drawn(_circle),
    "clouds": _clouds,
    "hills": _hills,
    "rings": _rings,
    "spirals": _spirals,
    "stars": _drawn(_star),
    "stripes": _stripes,
    "triangles": _drawn(_triangle),
    "waves": _waves,
}
