"""TIFF 6.0 and BigTIFF: checks the first directory, and decodes the kinds that Pillow does not read correctly.

Only the first image of a multi-page TIFF is read. Pillow decodes every kind that it reads as the specification says.
tifffile, with the codecs of imagecodecs, decodes the rest: 16-bit gray whose zero is white, depths such as 6 or 12,
separate planes of 16 bits or with alpha, and 16-bit gray with alpha; and, if 16-bit levels are wanted, every TIFF with
more than 8 bits. With `top` as the largest possible sample, a sample becomes the level

    round(255 * value / top)      in 8 bits, for gray of any depth and for colours of up to 8 bits
    floor(value / 256)            in 8 bits, for 16-bit colours, as in Pillow; 9 to 15 bits are scaled to 16 first
    round(65535 * value / top)    in 16 bits

Colours that are premultiplied by alpha are divided by it, and images whose zero is white are inverted.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, features

from ..machine.environment import require_bits16
from ..sources.rejects import BadItem

_PREFIXES = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # Pillow also reads the wrong third and fourth
# Sizes in bytes of BYTE, SHORT and LONG (section 2) and LONG8 (BigTIFF), and of their signed variants; the values that
# are read here are never negative.
_TYPES = {1: 1, 3: 2, 4: 4, 16: 8, 6: 1, 8: 2, 9: 4, 17: 8}
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _PREDICTOR = 274, 277, 278, 284, 317
_TILE_WIDTH, _TILE_LENGTH, _INK_SET, _EXTRA, _FORMAT, _SUBSAMPLING = 322, 323, 332, 338, 339, 530
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets and byte counts
_TAGS = {
    _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR,
    _PREDICTOR, _TILE_WIDTH, _TILE_LENGTH, _INK_SET, _EXTRA, _FORMAT, _SUBSAMPLING, *_STRIPS, *_TILES,
}  # fmt: skip
_MAX_TAGS = 4096
_MAX_SAMPLES = 16
_BLOCK_SAMPLES = 1 << 20  # converted at a time, with about 16 bytes of memory each
_MAX_TILE_PIXELS = 1 << 22  # for a tile that is larger than its image; usual sizes are 256 x 256 to 1024 x 1024
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}
_RAW, _OLD_JPEG = 1, 6
_PACKED = {_RAW, 5, 8, 32946, 32773, 34925, 50000}  # and LZW, Deflate, Deflate, PackBits, LZMA, Zstandard
_ASSOCIATED, _UNASSOCIATED = 1, 2  # ExtraSamples: alpha with premultiplied colours, and plain alpha
_UNSIGNED, _FORMATS = 1, {2: "int", 3: "float", 5: "complex int", 6: "complex float"}  # SampleFormat


def is_tiff(data: bytes) -> bool:
    """Whether a file is TIFF or BigTIFF, by its first bytes."""
    return data[:4] in _PREFIXES


class Tiff:
    """A TIFF whose first directory has been read.

    Attributes:
        size: height and width as stored, in pixels.
        orientation: the EXIF orientation of the image, 1 to 8.
        bits: bits per sample.

    Raises:
        BadItem: the directory is truncated or contradictory, or neither library reads such samples correctly.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        self._large = 43 in data[2:4]  # BigTIFF
        self._entries: dict[int, tuple[int, int, int]] = {}  # by tag: type, count, and offset of the values
        self._read_directory()
        width, height = self._number(_WIDTH, 0), self._number(_LENGTH, 0)
        if not width or not height:
            raise _bad(f"{width} x {height} pixels")
        self.size = height, width
        self.orientation = turn if 1 <= (turn := self._number(_ORIENTATION, 1)) <= 8 else 1
        self._compression = self._number(_COMPRESSION, _RAW)
        self._photometric = self._number(_PHOTOMETRIC, _WHITE_IS_ZERO)
        if self._photometric not in (*_COLOURS, _PALETTE, _YCBCR, _LAB):
            raise _bad(f"photometric interpretation {self._photometric}")
        self._samples = self._number(_SAMPLES, 3 if self._compression == _OLD_JPEG else 1)
        self._planar = self._number(_PLANAR, 1) == 2 and self._samples > 1
        self._extra = self._values(_EXTRA, _MAX_SAMPLES)
        self.bits = self._check_samples()
        self._pillow_is_right = self._check_kind()

    @property
    def mode(self) -> str:
        """The Pillow mode that is closest to these samples."""
        return {_RGB: "RGB", _CMYK: "CMYK"}.get(self._photometric, "L" if self.bits <= 8 else "I;16")

    def by_pillow(self, depth: int) -> bool:
        """Whether Pillow gives the correct levels, for levels of `depth` bits (8 or 16)."""
        return self._pillow_is_right and (depth == 8 or self.bits <= 8 or self._photometric == _CMYK)

    def require_tifffile(self) -> Any:
        """The module tifffile. Raises BackendError if tifffile or imagecodecs cannot be imported."""
        planes = " in planes" if self._planar else ""
        white = ", whose zero is white," if self._photometric == _WHITE_IS_ZERO else ""
        return require_bits16(f"a TIFF of {self.bits}-bit samples{planes}{white}").tifffile

    def unturned(self) -> bytes:
        """The file with orientation 1, since Pillow always turns a TIFF upright."""
        if self.orientation == 1:
            return self._data
        kind, _, at = self._entries[_ORIENTATION]
        upright = (1).to_bytes(_TYPES[kind], self._order)
        return self._data[:at] + upright + self._data[at + len(upright) :]

    def decode(self, depth: int) -> NDArray[Any]:
        """The levels as stored, not turned upright: (H, W), (H, W, 3) in R,G,B or (H, W, 4) with alpha.

        Args:
            depth: 8 for uint8 levels; 16 for uint16, or uint8 if the samples have at most 8 bits.

        Raises:
            BackendError: tifffile or imagecodecs is missing.
            BadItem: tifffile cannot decode the image, or reads the directory differently.
            Exception: whatever tifffile raises for a damaged file that it cannot open.
        """
        samples, table = self._by_tifffile(), self._levels(depth)
        alpha, gray = self._alpha(), _COLOURS[self._photometric] == 1
        channels = 4 if alpha is not None else 1 if gray else 3
        levels = np.empty((*self.size, channels), table.dtype)
        step = max(1, _BLOCK_SAMPLES // (samples.shape[1] * samples.shape[2]))
        for row in range(0, len(samples), step):
            levels[row : row + step] = self._converted(samples[row : row + step], table, alpha)
        return levels[..., 0] if channels == 1 else levels

    def _converted(self, samples: NDArray[Any], table: NDArray[Any], alpha: int | None) -> NDArray[Any]:
        """The levels of some rows: gray or R,G,B, and alpha if there is any."""
        count = _COLOURS[self._photometric]
        colours: NDArray[Any] = table[samples[..., :count]]
        behind = None if alpha is None else table[samples[..., alpha : alpha + 1]]
        if behind is not None and alpha is not None and self._extra[alpha - count :][:1] == (_ASSOCIATED,):
            colours = _divided(colours, behind)
        if self._photometric == _WHITE_IS_ZERO:
            np.subtract(np.iinfo(colours.dtype).max, colours, out=colours)
        if self._photometric == _CMYK:
            height, width = colours.shape[:2]
            colours = np.asarray(Image.frombytes("CMYK", (width, height), colours.tobytes()).convert("RGB"))
        if behind is None:
            return colours
        return np.concatenate([colours.repeat(3 // colours.shape[2], axis=2), behind], axis=2)

    def _by_tifffile(self) -> NDArray[Any]:
        """The stored samples, unsigned (H, W, samples)."""
        with self.require_tifffile().TiffFile(io.BytesIO(self._data)) as file:
            page, (height, width) = file.pages[0], self.size
            shape = (self._samples, 1, height, width, 1) if self._planar else (1, 1, height, width, self._samples)
            if (page.shaped, page.bitspersample, page.compression) != (shape, self.bits, self._compression):
                raise _bad("tags that two libraries read differently")
            if self._compression == _RAW:
                page.predictor = 1  # predictors are only for compressed samples (section 14)
            try:
                found: NDArray[Any] = page.asarray(maxworkers=1, squeeze=False)
            except MemoryError:
                raise
            except Exception as exc:
                raise _bad(f"strips or tiles that tifffile cannot decode ({exc})") from exc
        samples: NDArray[Any] = found[:, 0, ..., 0].transpose(1, 2, 0) if self._planar else found[0, 0]
        if samples.dtype == np.bool_:
            samples = samples.view(np.uint8)
        elif self.bits not in (8, 16):  # summing up differences (a predictor) leaves carries in the upper bits
            samples = samples & samples.dtype.type((1 << self.bits) - 1)
        return samples

    def _levels(self, depth: int) -> NDArray[Any]:
        """The level of every possible sample, (2**bits,)."""
        top, deep = (1 << self.bits) - 1, self.bits > 8
        values = np.arange(top + 1, dtype=np.uint32)
        in_16, in_8 = (values * 65_535 + top // 2) // top, (values * 255 + top // 2) // top
        if deep and depth == 16 and self._photometric != _CMYK:
            levels: NDArray[Any] = in_16.astype(np.uint16)
        else:
            levels = (in_16 >> 8 if deep and _COLOURS[self._photometric] > 1 else in_8).astype(np.uint8)
        return levels

    def _alpha(self) -> int | None:
        """The position of the alpha sample, or None. An undeclared fourth sample of RGB is alpha, as in Pillow."""
        count = _COLOURS[self._photometric]
        if self._photometric == _RGB and not self._extra and self._samples == count + 1:
            return count
        more = self._extra[: self._samples - count]
        return next((count + at for at, kind in enumerate(more) if kind in (_ASSOCIATED, _UNASSOCIATED)), None)

    def _check_samples(self) -> int:
        """The bits per sample. Raises BadItem for samples that cannot be decoded."""
        if self._samples > _MAX_SAMPLES:
            raise _bad(f"{self._samples} samples a pixel; at most {_MAX_SAMPLES}")
        depths = sorted({*self._values(_BITS, self._samples)} or {1})
        formats = {*self._values(_FORMAT, self._samples)} - {_UNSIGNED}
        if len(depths) > 1:
            raise _bad(f"samples of {', '.join(map(str, depths))} bits in one pixel")
        if formats or not 1 <= depths[0] <= 16:
            kind = _FORMATS.get(max(formats), f"SampleFormat {max(formats)} of ") if formats else "uint"
            raise _bad(f"{kind}{depths[0]} samples; allowed are unsigned ones of up to 16 bits")
        return depths[0]

    def _check_kind(self) -> bool:
        """Whether Pillow gives the correct 8-bit levels. Raises BadItem if neither Pillow nor tifffile does."""
        kind, packed = self._photometric, self._compression in _PACKED
        name = f"{self.bits}-bit samples of photometric interpretation {kind} and compression {self._compression}"
        # Pillow reads only little-endian BigTIFF, and only tiles that are listed under the tags for tiles.
        known = not self._large or self._order == "little"
        if self._compression == _RAW:
            known = known and not {_TILE_WIDTH, _STRIPS[0]} <= self._entries.keys()
        else:
            known = known and features.check_codec("libtiff")
        if kind not in _COLOURS or not packed:
            if not known or self.bits > 8 or (self._planar and self._compression == _RAW):
                raise _bad(f"{name}, which Pillow does not read")
            return True
        if kind == _CMYK and self._number(_INK_SET, 1) != 1:
            raise _bad("inks other than cyan, magenta, yellow and black")
        more = self._samples - _COLOURS[kind]
        if more >= 0 and known and self._plain(more):
            return True
        if more < 0 or (kind < _RGB and (more > 1 or len(self._extra) < more)):
            raise _bad(f"{self._samples} samples a pixel of photometric interpretation {kind}")
        predictor = 1 if self._compression == _RAW else self._number(_PREDICTOR, 1)
        if predictor != 1 and (predictor != 2 or self.bits < 8):
            raise _bad(f"{name} with predictor {predictor}")
        return False

    def _plain(self, more: int) -> bool:
        """Whether Pillow reads such samples correctly; `more` of them are not colours."""
        kind, bits, extra, order = self._photometric, self.bits, self._extra, self._number(_FILL_ORDER, 1)
        prefix = b"II" if self._order == "little" else b"MM"
        if (prefix, kind, (_UNSIGNED,), order, (bits,) * self._samples, extra) not in TiffImagePlugin.OPEN_INFO:
            return False
        if self._planar:
            return bits == 8 and order == 1 and kind >= _RGB and extra in ((), (_UNASSOCIATED,)) and more == len(extra)
        return bits < 8 or (order == 1 and (bits == 8 or (bits == 16 and kind != _WHITE_IS_ZERO)))

    def check_segments(self) -> None:
        """Raises BadItem if strips or tiles are missing or truncated, or if tiles are far larger than the image.

        The memory and time of this check are proportional to the size of the file.
        """
        height, width = self.size
        tiled = _TILE_WIDTH in self._entries
        if tiled:
            wide, high = self._number(_TILE_WIDTH, 0), self._number(_TILE_LENGTH, 0)
            if wide * high > max(_MAX_TILE_PIXELS, 4 * width * height):
                raise _bad(f"tiles of {wide} x {high} pixels for an image of {width} x {height}")
        else:
            wide, high = width, min(self._number(_ROWS_PER_STRIP, height), height)
        if not wide or not high:
            raise _bad(f"tiles or strips of {wide} x {high} pixels")
        across, down, planes = -(-width // wide), -(-height // high), self._samples if self._planar else 1
        count = across * down * planes
        # Old writers list tiles under the tags for strips, as libtiff allows.
        names = _TILES if _TILES[0] in self._entries else _STRIPS
        offsets, sizes = (self._array(tag, count) for tag in names)
        subsampled = self._values(_SUBSAMPLING, 2) != (1, 1) and sizes.sum() != 3 * width * height
        if self._photometric == _YCBCR and self._compression == _RAW and subsampled:
            raise _bad("uncompressed YCbCr samples whose chroma is subsampled")
        sparse = not self._pillow_is_right and not (len(sizes) == count and offsets.all() and sizes.all())
        if sparse or (len(offsets) < count and (self._compression == _RAW or not self._pillow_is_right)):
            raise _bad(f"{np.count_nonzero(sizes)} strips or tiles with data; {count} are needed")
        if self._compression == _RAW:  # the declared sizes may be wrong
            rows = np.full(down, high) if tiled else np.minimum(high, height - high * np.arange(down))
            line = -(-wide * self._samples * self.bits // (8 * planes))
            sizes = np.tile(np.repeat(rows * line, across), planes).astype(np.uint64)
        room, number = np.uint64(len(self._data)), min(len(offsets), len(sizes))
        if (sizes > room).any() or (offsets[:number] > room - sizes[:number]).any():
            raise BadItem("decode", "truncated", f"{room} bytes, which end before the last strip or tile does")

    def _read_directory(self) -> None:
        pointer, entry = (8, 20) if self._large else (4, 12)
        start = self._integer(8 if self._large else 4, pointer)
        count = self._integer(start, 8 if self._large else 2)
        if count > _MAX_TAGS:
            raise _bad(f"{count} tags; at most {_MAX_TAGS}")
        start += 8 if self._large else 2
        self._require(start + count * entry)
        for at in range(start, start + count * entry, entry):
            tag = self._integer(at, 2)
            if tag not in _TAGS:
                continue
            kind, number, place = self._integer(at + 2, 2), self._integer(at + 4, pointer), at + entry - pointer
            if kind not in _TYPES:
                raise _bad(f"tag {tag} of type {kind}")
            if tag in self._entries:
                raise _bad(f"tag {tag} twice")
            if number * _TYPES[kind] > pointer:  # the values are stored elsewhere
                place = self._integer(place, pointer)
            self._entries[tag] = kind, number, place

    def _number(self, tag: int, default: int) -> int:
        values = self._values(tag, 1)
        return values[0] if values else default

    def _values(self, tag: int, most: int) -> tuple[int, ...]:
        """The first values of a tag, up to `most`; empty if the tag is missing."""
        kind, count, at = self._entries.get(tag, (3, 0, 0))
        return tuple(self._integer(at + _TYPES[kind] * value, _TYPES[kind]) for value in range(min(count, most)))

    def _array(self, tag: int, most: int) -> NDArray[np.uint64]:
        """As `_values`, for many values."""
        kind, count, at = self._entries.get(tag, (3, 0, 0))
        count = min(count, most)
        self._require(at + count * _TYPES[kind])
        order = "<" if self._order == "little" else ">"
        return np.frombuffer(self._data, f"{order}u{_TYPES[kind]}", count, at).astype(np.uint64)

    def _integer(self, at: int, size: int) -> int:
        self._require(at + size)
        return int.from_bytes(self._data[at : at + size], self._order)

    def _require(self, end: int) -> None:
        if end > len(self._data):
            raise BadItem("decode", "truncated", f"{len(self._data)} bytes, which end before the tags do")


def _divided(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Premultiplied colours, divided by alpha; 8-bit quotients are rounded down, as in Pillow."""
    top = np.iinfo(colours.dtype).max
    divisor = np.maximum(alpha, 1).astype(np.uint32)
    half = divisor // 2 if top > 255 else 0
    divided = (colours.astype(np.uint32) * top + half) // divisor
    found: NDArray[Any] = np.minimum(divided, top).astype(colours.dtype)
    return found


def _bad(what: str) -> BadItem:
    return BadItem("decode", "undecodable", f"a TIFF of {what}")
