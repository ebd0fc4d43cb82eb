"""A contact sheet: images of a dataset as pixels again, or what was rejected, with a caption below each."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageFont

from ..dataset.layout import REJECTS
from ..dataset.manifest import Manifest, reject_of
from ..dataset.originals import Originals, originals
from ..errors import FormatError, ShardError, UsageError
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import levels, table
from ..preprocess.pillow import PillowDecoder
from ..preprocess.pillow_files import opened
from ..readers.dataset import Dataset, open_dataset
from ..sources.base import countable, read_item
from ..sources.rejects import BadItem
from ..storage.base import Storage
from ..storage.local import LocalStorage

Show = Literal["random", "class", "rejects"]
COUNTS: dict[Show, int] = {"random": 64, "class": 8, "rejects": 64}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
TILE_SIDES = (16, 1024)
_SHEET_PIXELS = 1 << 25  # a sheet is held in memory, and somebody wants to look at it
_THUMBNAIL_PIXELS = 1 << 25  # of a reject that are decoded for one
_GAP = 6
_LINE = 12  # of Pillow's default font
_CAPTION = 2 * _LINE + 2
_UNREADABLE = (160, 160, 160)
_DEADLY = ("crashed", "timed-out")  # not to be decoded in this process

Picture = Callable[["Tile"], "Image.Image | None"]


@dataclass(frozen=True)
class Tile:
    """One image of a sheet: a row of the dataset, or a reject with its code.

    `path` is relative to the source, `index` a reject's place in the plan. A label that is a whole number, and no
    class, has no `class_name`.
    """

    path: str
    row: int | None = None
    label: int | None = None
    class_name: str | None = None
    code: str | None = None
    index: int | None = None

    def caption(self) -> tuple[str, str]:
        """The two lines below the image; of a path, the end matters."""
        if self.row is None:
            return self.path, self.code or ""
        if self.label is None:
            return self.path, f"row {self.row}"
        return str(self.label) if self.class_name is None else f"{self.class_name} ({self.label})", f"row {self.row}"


@dataclass(frozen=True)
class Sheet:
    """What was drawn, and where.

    Attributes:
        path: the file.
        width, height: in pixels.
        tiles: line by line.
        left_out: how many classes, or rejects, are not on it; 0 for a sheet of random images.
    """

    path: str
    width: int
    height: int
    tiles: tuple[Tile, ...]
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """The sheet as JSON values."""
        return asdict(self)


def preview(
    out: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    show: Show = "random",
    count: int | None = None,
    seed: int = 0,
    source: str | os.PathLike[str] | None = None,
    tile: int = 128,
) -> Sheet:
    """Draws a contact sheet of a finished dataset.

    Values become the levels that they were made from; of values that were made by an image's own statistics, the lowest
    becomes black and the highest white. Bgr and gray become RGB. A reject is drawn as far as Pillow
    can decode it, and gray where it cannot.

    Args:
        out: the dataset's folder.
        target: the file to write, .png or .jpg; it is replaced if it is there.
        show: random images; some of each class, or of each number where labels are whole numbers; or rejected items.
        count: how many images, of each class with `class`; as `COUNTS` says if None.
        seed: which of them are drawn.
        source: where the images are now, for rejects; where they were when the build began if None.
        tile: side of the square in which an image is drawn, in pixels.

    Raises:
        UsageError: an argument is not allowed, or there is nothing of the kind to draw.
        IncompleteError: the build has not ended.
        FormatError: not a dataset, or damaged.
        SourceError: the source of the rejects is not there.
        StorageError: `target` cannot be written, or the dataset is not on a disk.
    """
    target = os.path.abspath(target)
    kind = FORMATS.get(os.path.splitext(target)[1].lower())
    if kind is None:
        raise UsageError(f"-o {target!r}: a sheet is an image; let its name end with {', '.join(FORMATS)}")
    if not TILE_SIDES[0] <= tile <= TILE_SIDES[1]:
        raise UsageError(f"--tile: got {tile}; allowed: {TILE_SIDES[0]} to {TILE_SIDES[1]}")
    most = _SHEET_PIXELS // ((tile + _GAP) * (tile + _CAPTION + _GAP))
    count = min(COUNTS[show], most) if count is None else count
    if not 1 <= count <= most:
        raise UsageError(f"--count: got {count}; allowed: 1 to {most} tiles of {tile} pixels on one sheet")
    if show != "rejects" and source is not None:
        raise UsageError("--source goes with --rejects; leave it out")
    data = open_dataset(out)
    if show == "class":
        groups, left_out = _by_class(data, count, most // count, seed)
        sheet = _drawn(groups, count, tile, _StoredPixels(data))
    elif show == "random":
        groups, left_out = _random(data, count, seed), 0
        sheet = _drawn(groups, 1, tile, _StoredPixels(data))
    else:
        storage = LocalStorage(data.path)
        groups, left_out = _rejects(storage, count, seed)
        with _Thumbnails(originals(storage, data.manifest, source), data.manifest, tile) as thumbnails:
            sheet = _drawn(groups, 1, tile, thumbnails)
    content = io.BytesIO()
    sheet.save(content, kind)
    folder, name = os.path.split(target)
    LocalStorage(folder).write(name, content.getvalue())
    return Sheet(target, sheet.width, sheet.height, tuple(itertools.chain(*groups)), left_out)


# Which


def _random(data: Dataset, count: int, seed: int) -> list[list[Tile]]:
    rows = np.arange(len(data)) if data.valid is None else np.flatnonzero(data.valid)
    if not len(rows):
        raise UsageError(f"{data.path!r} holds no images: all its items were rejected; --rejects shows them")
    return [[_tile(data, int(rows[at]))] for at in _some(len(rows), count, seed)]


def _by_class(data: Dataset, count: int, most: int, seed: int) -> tuple[list[list[Tile]], int]:
    """Some images of each class that has any, up to `most` classes; and how many more there are."""
    if data.labels is None:
        raise UsageError(f"{data.path!r} has no labels; leave --by class out")
    if not countable(data.class_names, data.label_columns):
        found = ", ".join(map(str, data.label_columns))
        raise UsageError(
            f"{data.path!r} has labels of other kinds, {found}; --by class takes one column of classes or whole "
            "numbers: leave it out"
        )
    valid = np.ones(len(data), bool) if data.valid is None else data.valid
    present = np.unique(data.labels[valid]).tolist()
    if not present:
        raise UsageError(f"{data.path!r} holds no images: all its items were rejected; --rejects shows them")
    groups = []
    for label in present[:most]:
        rows = np.flatnonzero(valid & (data.labels == label))
        groups.append([_tile(data, int(rows[at])) for at in _some(len(rows), count, seed)])
    return groups, max(0, len(present) - most)


def _rejects(storage: Storage, count: int, seed: int) -> tuple[list[list[Tile]], int]:
    """Some rejects, in the order of the plan; and how many more there are."""
    content = storage.read(REJECTS)
    if content is None:
        raise FormatError(f"{storage.path(REJECTS)!r} is missing; gpu-npz verify --repair rewrites it")
    lines = content.splitlines()
    if not lines:
        raise UsageError(f"no item of {storage.root!r} was rejected; leave --rejects out")
    try:
        rejects = [reject_of(lines[at]) for at in _some(len(lines), count, seed)]
    except ValueError as exc:
        raise FormatError(f"{storage.path(REJECTS)!r}: not a reject a line: {exc}; the file is damaged") from exc
    return [[Tile(reject.path, index=reject.index, code=reject.code)] for reject in rejects], max(0, len(lines) - count)


def _some(items: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(items), min(items, count)))


def _tile(data: Dataset, row: int) -> Tile:
    if data.labels is None or not countable(data.class_names, data.label_columns):
        return Tile(data.paths[row], row)
    label, names = int(data.labels[row]), data.class_names
    if names is not None and not 0 <= label < len(names):
        raise FormatError(f"{data.path!r}: row {row} has label {label} of {len(names)} classes; run gpu-npz verify")
    return Tile(data.paths[row], row, label=label, class_name=None if names is None else names[label])


# How it looks


class _StoredPixels:
    """A dataset's rows as pictures."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._table = table(data.manifest.config)

    def __call__(self, tile: Tile) -> Image.Image:
        assert tile.row is not None
        images = self._data.manifest.images
        stored = self._data[tile.row]
        values = self._table
        if values is None:
            ends = np.linspace(stored.min(), stored.max(), 256, dtype=np.float32)
            values = np.tile(ends, (1 if images.channels == "gray" else 3, 1))
        pixels = levels(values, stored, images.layout)
        if pixels.dtype != np.uint8:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if images.layout == "NCHW":
            pixels = pixels.transpose(1, 2, 0)
        pixels = pixels[..., ::-1] if images.channels == "bgr" else pixels
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if images.channels == "gray" else pixels))


class _Thumbnails:
    """Rejected files as pictures, as far as Pillow can decode them; a context manager."""

    def __init__(self, found: Originals, manifest: Manifest, side: int) -> None:
        self._found = found
        self._decoder = PillowDecoder(manifest.config, Geometry("none", 1, 1), found.source)
        self._side = side

    def __enter__(self) -> _Thumbnails:
        self._decoder.__enter__()
        self._truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        return self

    def __exit__(self, *error: Any) -> None:
        ImageFile.LOAD_TRUNCATED_IMAGES = self._truncated
        self._decoder.__exit__(None, None, None)

    def __call__(self, tile: Tile) -> Image.Image | None:
        if tile.code in _DEADLY or tile.index is None:
            return None
        item = self._found.item(tile.index, tile.path)
        with contextlib.suppress(BadItem, ShardError):
            data = read_item(self._found.source, item)
            with opened(self._decoder.prepared(data), tile.path) as image:
                whole = image.width * image.height
                image.draft("RGB", (self._side, self._side))  # a JPEG at an eighth, where that is enough
                held = whole if image.info.get("progressive") else image.width * image.height
                if held <= _THUMBNAIL_PIXELS:
                    return image.convert("RGB")
        return None


def _drawn(groups: Sequence[Sequence[Tile]], places: int, side: int, picture: Picture) -> Image.Image:
    """The sheet, in lines from left to right. A group has so many `places`, which stay empty where it is smaller."""
    total = len(groups) * places if len(groups) > 1 else len(groups[0])
    columns = math.ceil(math.sqrt(total))
    if places <= columns:
        columns -= columns % places  # groups stand below each other
    width, height = side + _GAP, side + _CAPTION + _GAP
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + -(-total // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for at, tile in (
        (at * places + place, tile) for at, group in enumerate(groups) for place, tile in enumerate(group)
    ):
        left, top = _GAP + at % columns * width, _GAP + at // columns * height
        image = picture(tile)
        if image is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_UNREADABLE)
        else:
            image = _scaled(image, side)
            sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        for line, text in enumerate(tile.caption()):
            fitted = _fitted(text, side, font, from_end=line == 0 and text == tile.path)
            draw.text((left, top + side + 1 + line * _LINE), fitted, fill="black", font=font)
    return sheet


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """The image in a square; enlarged pixels stay squares."""
    longer = max(image.size)
    if longer == side:
        return image
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if longer < side else Image.Resampling.BILINEAR)


def _fitted(text: str, width: int, font: Any, *, from_end: bool) -> str:
    """A text in characters that every default font of Pillow has, cut to a width in pixels."""
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    shown = shown.encode("latin-1", "backslashreplace").decode("latin-1")
    fitted, kept = shown, min(len(shown), width)
    while font.getlength(fitted) > width and kept:
        kept -= 1
        fitted = f"..{shown[len(shown) - kept :]}" if from_end else f"{shown[:kept]}.."
    return fitted
