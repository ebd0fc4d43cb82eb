"""Draws a contact sheet: a dataset's images converted back to pixels, or its rejects, each with a caption."""

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
from ..preprocess.normalize import as_decoded, levels, table
from ..preprocess.pillow import PillowDecoder
from ..preprocess.pillow_files import opened
from ..readers.dataset import Dataset, open_dataset
from ..sources.base import countable, read_item
from ..sources.rejects import BadItem
from ..storage import open_storage
from ..storage.base import Storage
from ..storage.local import LocalStorage

Show = Literal["random", "class", "rejects"]
COUNTS: dict[Show, int] = {"random": 64, "class": 8, "rejects": 64}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
TILE_SIDES = (16, 1024)
_SHEET_PIXELS = 1 << 25  # a sheet is held in memory, and should remain viewable
_THUMBNAIL_PIXELS = 1 << 25  # the most that are decoded for one reject
_GAP = 6
_LINE = 12  # line height of Pillow's default font, in pixels
_CAPTION = 2 * _LINE + 2
_UNREADABLE = (160, 160, 160)
_DEADLY = ("crashed", "timed-out")  # decoding these files could crash or hang this process

Picture = Callable[["Tile"], "Image.Image | None"]


@dataclass(frozen=True)
class Tile:
    """One image of a sheet: either a row of the dataset or a reject.

    Attributes:
        path: the path relative to the source.
        row: the position within the dataset; None for a reject.
        label: the label; None for a reject, and if the dataset has no single column of classes or integers.
        class_name: the name of the class; None if the label is a plain integer.
        code: the reject code; None for a row.
        index: the position of a reject in the plan; None for a row.
    """

    path: str
    row: int | None = None
    label: int | None = None
    class_name: str | None = None
    code: str | None = None
    index: int | None = None

    def caption(self) -> tuple[str, str]:
        """Returns the two lines of text below the image."""
        if self.row is None:
            return self.path, self.code or ""
        if self.label is None:
            return self.path, f"row {self.row}"
        return str(self.label) if self.class_name is None else f"{self.class_name} ({self.label})", f"row {self.row}"


@dataclass(frozen=True)
class Sheet:
    """A description of a contact sheet.

    Attributes:
        path: the file that was written.
        width: the width in pixels.
        height: the height in pixels.
        tiles: the tiles, row by row.
        left_out: the number of classes or rejects that did not fit on the sheet; 0 for a sheet of random images.
    """

    path: str
    width: int
    height: int
    tiles: tuple[Tile, ...]
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """Returns the sheet as JSON values."""
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

    Stored values are converted back to the levels that they came from. If the build normalized each image by its own
    statistics, the image's lowest value becomes black and its highest becomes white. BGR and gray images are drawn as
    RGB. A reject is drawn as far as Pillow can decode it; if Pillow cannot decode any of it, its tile is plain gray.

    Args:
        out: the dataset's folder or URL.
        target: the file to write, .png or .jpg; an existing file is replaced.
        show: `random` for random images; `class` for some images of each class, or of each label value if labels are
            integers; `rejects` for rejected items.
        count: the number of images, per class with `class`; None for the value in `COUNTS`.
        seed: the seed of the random choice.
        source: the current location of the images, for rejects; None if they have not moved since the build started.
        tile: the side of the square in which each image is drawn, in pixels.

    Raises:
        UsageError: an argument is not allowed, or there is nothing of the requested kind to draw.
        IncompleteError: the build has not finished.
        FormatError: `out` is not a dataset, or it is damaged.
        SourceError: the source of the rejects cannot be found.
        StorageError: `target` cannot be written, or a store does not answer.
    """
    target = os.path.abspath(target)
    kind = FORMATS.get(os.path.splitext(target)[1].lower())
    if kind is None:
        raise UsageError(f"-o {target!r}: the name of a contact sheet must end with {' or '.join(FORMATS)}")
    if not TILE_SIDES[0] <= tile <= TILE_SIDES[1]:
        raise UsageError(f"--tile: got {tile}; allowed: {TILE_SIDES[0]} to {TILE_SIDES[1]}")
    data = open_dataset(out)
    cell = (tile, tile) if show == "rejects" else _scaled_size(data.manifest.images.size[::-1], tile)
    most = _SHEET_PIXELS // ((cell[0] + _GAP) * (cell[1] + _CAPTION + _GAP))
    count = min(COUNTS[show], most) if count is None else count
    if not 1 <= count <= most:
        raise UsageError(f"--count: got {count}; allowed: 1 to {most} tiles of {tile} pixels on one sheet")
    if show != "rejects" and source is not None:
        raise UsageError("--source requires --rejects; omit it, or add --rejects")
    if show == "class":
        groups, left_out = _by_class(data, count, most // count, seed)
        sheet = _drawn(groups, cell, tile, _StoredPixels(data))
    elif show == "random":
        groups, left_out = _random(data, count, seed), 0
        sheet = _drawn(_lines(groups), cell, tile, _StoredPixels(data))
    else:
        storage = open_storage(data.path)
        groups, left_out = _rejects(storage, count, seed)
        with _Thumbnails(originals(storage, data.manifest, source), data.manifest, tile) as thumbnails:
            sheet = _drawn(_lines(groups), cell, tile, thumbnails)
    content = io.BytesIO()
    sheet.save(content, kind)
    folder, name = os.path.split(target)
    LocalStorage(folder).write(name, content.getvalue())
    return Sheet(target, sheet.width, sheet.height, tuple(itertools.chain(*groups)), left_out)


# Choosing the tiles


def _random(data: Dataset, count: int, seed: int) -> list[list[Tile]]:
    rows = np.arange(len(data)) if data.valid is None else np.flatnonzero(data.valid)
    if not len(rows):
        raise UsageError(f"{data.path!r} has no images, because all items were rejected; use --rejects to see them")
    return [[_tile(data, int(rows[at]))] for at in _some(len(rows), count, seed)]


def _by_class(data: Dataset, count: int, most: int, seed: int) -> tuple[list[list[Tile]], int]:
    """Returns tiles of up to `count` images of each non-empty class, for up to `most` classes.

    Returns:
        The tiles, in one group per class, and the number of classes left out.
    """
    if data.labels is None:
        raise UsageError(f"{data.path!r} has no labels; leave --by class out")
    if not countable(data.class_names, data.label_columns):
        found = ", ".join(map(str, data.label_columns))
        raise UsageError(
            f"{data.path!r} has labels of other kinds, {found}; --by class takes one column of classes or whole "
            "numbers: omit it"
        )
    valid = np.ones(len(data), bool) if data.valid is None else data.valid
    present = np.unique(data.labels[valid]).tolist()
    if not present:
        raise UsageError(f"{data.path!r} has no images, because all items were rejected; use --rejects to see them")
    groups = []
    for label in present[:most]:
        rows = np.flatnonzero(valid & (data.labels == label))
        groups.append([_tile(data, int(rows[at])) for at in _some(len(rows), count, seed)])
    return groups, max(0, len(present) - most)


def _rejects(storage: Storage, count: int, seed: int) -> tuple[list[list[Tile]], int]:
    """Returns tiles of up to `count` rejects in plan order, one per group, and the number of rejects left out."""
    content = storage.read(REJECTS)
    if content is None:
        raise FormatError(f"{storage.path(REJECTS)!r} is missing; gpu-npz verify --repair rewrites it")
    lines = content.splitlines()
    if not lines:
        raise UsageError(f"no item of {storage.root!r} was rejected; omit --rejects")
    try:
        rejects = [reject_of(lines[at]) for at in _some(len(lines), count, seed)]
    except ValueError as exc:
        raise FormatError(f"{storage.path(REJECTS)!r}: not one reject per line: {exc}; the file is damaged") from exc
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


# Drawing


class _StoredPixels:
    """Converts stored rows back to 8-bit images."""

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
        return Image.fromarray(np.ascontiguousarray(as_decoded(pixels, images.layout, images.channels)))


class _Thumbnails:
    """Decodes rejected files as far as Pillow can. A context manager: Pillow accepts truncated files inside it."""

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
                image.draft("RGB", (self._side, self._side))  # decodes a large JPEG at down to 1/8 scale
                held = whole if image.info.get("progressive") else image.width * image.height
                if held <= _THUMBNAIL_PIXELS:
                    return image.convert("RGB")
        return None


def _drawn(lines: Sequence[Sequence[Tile]], cell: tuple[int, int], side: int, picture: Picture) -> Image.Image:
    """Draws the sheet.

    Args:
        lines: the tiles of each line, from left to right.
        cell: the width and height in which each image is drawn, in pixels.
        side: the longer side of a tile's image, in pixels.
        picture: returns the image of a tile; None if it cannot be decoded.
    """
    width, height = cell[0] + _GAP, cell[1] + _CAPTION + _GAP
    sheet = Image.new("RGB", (_GAP + max(map(len, lines)) * width, _GAP + len(lines) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for line, column, tile in (
        (line, column, tile) for line, row in enumerate(lines) for column, tile in enumerate(row)
    ):
        left, top = _GAP + column * width, _GAP + line * height
        image = picture(tile)
        if image is None:
            draw.rectangle((left, top, left + cell[0] - 1, top + cell[1] - 1), fill=_UNREADABLE)
        else:
            image = _scaled(image, side)
            sheet.paste(image, (left + (cell[0] - image.width) // 2, top + (cell[1] - image.height) // 2))
        for number, text in enumerate(tile.caption()):
            fitted = _fitted(text, cell[0], font, from_end=number == 0 and text == tile.path)
            draw.text((left, top + cell[1] + 1 + number * _LINE), fitted, fill="black", font=font)
    return sheet


def _lines(groups: Sequence[Sequence[Tile]]) -> list[list[Tile]]:
    """Arranges all tiles in lines of equal length, in about as many lines as columns."""
    tiles = list(itertools.chain(*groups))
    columns = math.ceil(math.sqrt(len(tiles)))
    return [tiles[start : start + columns] for start in range(0, len(tiles), columns)]


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Scales an image so that its longer side is `side` pixels. Enlarging keeps sharp pixel edges."""
    longer = max(image.size)
    if longer == side:
        return image
    resampling = Image.Resampling.NEAREST if longer < side else Image.Resampling.BILINEAR
    return image.resize(_scaled_size(image.size, side), resampling)


def _scaled_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Scales width and height so that the longer one is `side`."""
    width, height = (max(1, round(length * side / max(size))) for length in size)
    return width, height


def _fitted(text: str, width: int, font: Any, *, from_end: bool) -> str:
    """Limits a text to the characters in all of Pillow's default fonts and cuts it to `width` pixels.

    Args:
        text: the text.
        width: the maximum width in pixels.
        font: the Pillow font that measures the text.
        from_end: whether to keep the end of the text instead of its start, as suits a path.
    """
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    shown = shown.encode("latin-1", "backslashreplace").decode("latin-1")
    fitted, kept = shown, min(len(shown), width)
    while font.getlength(fitted) > width and kept:
        kept -= 1
        fitted = f"..{shown[len(shown) - kept :]}" if from_end else f"{shown[:kept]}.."
    return fitted
