"""Normalizes pixels in the stored dtype and layout with NumPy; `normalize_cuda.py` does it on a GPU.

A pixel has one of 256 levels (65,536 in 16 bits), so every normalization is a table with one value per level and
channel. For most kinds, each entry is the exact number rounded once to the stored type, half to even. In 16 bits, 65535
replaces 255:

    mean-std    (level / 255 - mean) / std; also for imagenet, unit, signed and dataset
    window      (level - LO) / (HI - LO), clipped to 0..1
    log         log(1 + level) / log(1 + 255)
    none        level

Four kinds use the statistics of each image, over all n values of its pixels in all channels: m is their mean, s their
standard deviation. So every image has its own table, the same for all channels. Sums over an image are exact integers;
the table is computed in float64 and rounded once to the stored type:

    standardize (level - m) / max(s, 1 / sqrt(n)): tf.image.per_image_standardization of the levels as floats
    minmax      (level - min) / (max - min), 0 if max equals min: scikit-learn's minmax_scale of all values
    maxabs      level / max, 0 if max is 0: scikit-learn's maxabs_scale
    l2          level / sqrt(sum of squares), 0 if the sum is 0: scikit-learn's normalize with norm="l2"

The ImageNet statistics are those of torchvision's models: mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225 for R,
G, B.

A table says what the values are. Looking them up is not the fastest way to compute them: where float32 arithmetic gives
every entry of the table exactly, as with these statistics, it is used (`Quotient`).
"""

from __future__ import annotations

import decimal
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig, Channels, Layout
from ..errors import UsageError

if TYPE_CHECKING:
    Array = NDArray[Any]
    Exact = Callable[[int], Fraction]

_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0,) * 3, (1.0,) * 3),
    "signed": ((0.5,) * 3, (0.5,) * 3),
}
_PER_IMAGE = ("standardize", "minmax", "maxabs", "l2")
_LARGE_PLANE = 64 * 64  # pixels; from there on, a lookup for each channel of an image is as fast
_PIXELS_TOGETHER = 1 << 16
_LINE = 1 << 12  # values that arithmetic gets at a time
_ULPS = 4  # the error bound of the float64 values of `_formulas`, in units in the last place
_DIGITS = decimal.Context(prec=50)


def table(config: BuildConfig, dtype: str | None = None) -> Array | None:
    """The value of every level: (channels, 256), in the stored order of channels; None for per-image kinds.

    In 16 bits, the shape is (channels, 65536).

    Args:
        config: the settings of the build.
        dtype: overrides the dtype of `config`; a reader asks for float32 tables of a uint8 dataset.

    Raises:
        UsageError: float16 cannot hold a value, and `clip` is not set.
    """
    kind = np.dtype(dtype or config.dtype)
    if kind.kind == "u":
        return np.tile(np.arange(config.max_level + 1).astype(kind), (config.channel_count, 1))
    if config.normalize in _PER_IMAGE:
        return None
    formulas = _formulas(config)
    most = float(np.finfo(kind).max)
    for channel, (values, _) in enumerate(formulas):
        level = int(np.abs(values).argmax())
        if abs(values[level]) > most and not config.clip:
            raise UsageError(
                f"{kind} cannot hold {values[level]:.6g}, the value of level {level} in channel {channel}, but "
                f"{-most:g} to {most:g}; choose --dtype float32, another normalization, or --clip to cut values off"
            )
    return np.stack([_rounded(values.clip(-most, most), exact, kind) for values, exact in formulas])


@dataclass(frozen=True)
class Sums:
    """The statistics of an image that the per-image kinds use: exact integers over the values of all channels.

    Attributes:
        count: how many values.
        total: their sum.
        squares: the sum of their squares.
        low: the smallest value.
        high: the largest value.
    """

    count: int
    total: int
    squares: int
    low: int
    high: int

    @classmethod
    def of(cls, image: Array) -> Sums:
        """The statistics of the pixels of one image, (C, H, W) or (H, W, C)."""
        squares = int(np.einsum("ijk,ijk->", image, image, dtype=np.int64))
        return cls(image.size, int(image.sum(dtype=np.int64)), squares, int(image.min()), int(image.max()))


def image_table(config: BuildConfig, sums: Sums, dtype: str | None = None) -> Array:
    """The value of every level of one image under a per-image kind: (256,), the same for all channels; see `table`."""
    n, start, step = sums.count, 0.0, 1.0
    if config.normalize == "standardize":
        variance = (n * sums.squares - sums.total**2) / n**2  # a quotient of integers, rounded once
        start, step = sums.total / n, max(math.sqrt(variance), 1 / math.sqrt(n))
    elif config.normalize == "minmax":
        start, step = sums.low, sums.high - sums.low
    elif config.normalize == "maxabs":
        step = sums.high
    else:
        step = math.sqrt(sums.squares)
    values = (np.arange(config.max_level + 1) - start) / (step or 1)
    return values.astype(dtype or config.dtype)


def tables(config: BuildConfig, stored: Array, dtype: str = "float32") -> Array:
    """The tables for stored pixels: (channels, 256), or (images, 1, 256) under a per-image kind.

    Args:
        config: the settings with which the pixels were stored.
        stored: uint8 (..., C, H, W) or (..., H, W, C).
        dtype: of the tables, float32 or float16.
    """
    if (same := table(config, dtype)) is not None:
        return same
    images = stored.reshape(-1, *stored.shape[-3:])
    own = [image_table(config, Sums.of(image), dtype) for image in images]
    return np.array(own, dtype).reshape(len(own), 1, config.max_level + 1)


def value_range(config: BuildConfig, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest and highest possible value of each channel, (channels,) each.

    Args:
        config: the settings of the build.
        count: values per image, in all channels.
    """
    if (values := table(config)) is not None:
        return values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)
    # Samuelson's inequality: no value is further from the mean than sqrt(n - 1) standard deviations.
    low, high = 0.0, 1.0
    if config.normalize == "standardize":
        high = float(np.nextafter(np.dtype(config.dtype).type(math.sqrt(count)), np.inf))  # a value may be rounded up
        low = -high
    return np.full(config.channel_count, low), np.full(config.channel_count, high)


def statistics(config: BuildConfig) -> tuple[list[Fraction], list[Fraction]] | None:
    """Mean and standard deviation of each stored channel, for pixels scaled to 0..1; None for kinds that use neither.

    Decimals are taken literally: a mean of 0.485 is 485/1000.

    Raises:
        UsageError: `normalize` is "dataset", and the statistics of the dataset have not been measured.
    """
    if config.normalize == "dataset" and config.mean is None:
        raise UsageError("--normalize dataset is for build, which measures first; give --mean and --std here")
    if config.normalize not in (*_STATISTICS, "mean-std", "dataset"):
        return None
    given = _STATISTICS.get(config.normalize) or (config.mean or (), config.std or ())
    means, stds = ([Fraction(str(number)) for number in numbers[: config.channel_count]] for numbers in given)
    return (means[::-1], stds[::-1]) if config.channels == "bgr" else (means, stds)


def _formulas(config: BuildConfig) -> list[tuple[NDArray[np.float64], Exact]]:
    """For each stored channel: the value of every level in float64, and a function that gives it exactly."""
    top = config.max_level
    if (found := statistics(config)) is not None:
        return [_line(top * mean, top * std, top) for mean, std in zip(*found, strict=True)]
    if config.normalize == "log":
        whole = _DIGITS.ln(top + 1)
        values = np.array([math.log1p(level) / math.log1p(top) for level in range(top + 1)])
        formula = values, lambda level: Fraction(_DIGITS.divide(_DIGITS.ln(level + 1), whole))
    elif config.window is not None:
        low, high = (Fraction(str(number)) for number in config.window)
        values, exact = _line(low, high - low, top)
        formula = values.clip(0, 1), exact  # 0 and 1 need no rounding
    else:
        formula = _line(Fraction(0), Fraction(1), top)
    return [formula] * config.channel_count


def _line(start: Fraction, step: Fraction, top: int) -> tuple[NDArray[np.float64], Exact]:
    """The formula (level - start) / step, as `_formulas` gives it."""
    factor, offset, divisor = _integers(start, step)
    values = [(level * factor - offset) / divisor for level in range(top + 1)]  # quotients of integers, rounded once
    return np.array(values), lambda level: (level - start) / step


def _integers(start: Fraction, step: Fraction) -> tuple[int, int, int]:
    """The smallest integers with (level - start) / step = (level * factor - offset) / divisor for every level."""
    factor = math.lcm(start.denominator, step.denominator)
    return factor, int(start * factor), int(step * factor)


def _rounded(values: NDArray[np.float64], exact: Exact, dtype: np.dtype[Any]) -> Array:
    """The exact values, rounded to `dtype`. `exact` is called only where float64 does not decide the rounding."""
    found = values.astype(dtype)
    margin = _ULPS * np.spacing(np.abs(values))
    for level in np.flatnonzero((values - margin).astype(dtype) != (values + margin).astype(dtype)).tolist():
        found[level] = _nearest(exact(level), dtype)
    return found


def _nearest(value: Fraction, dtype: np.dtype[Any]) -> Any:
    guess = dtype.type(float(value))
    around = [np.nextafter(guess, dtype.type(side)) for side in (-np.inf, np.inf)]
    bits = f"u{dtype.itemsize}"
    return min(
        (number for number in (guess, *around) if np.isfinite(number)),
        key=lambda number: (abs(Fraction(float(number)) - value), int(number.view(bits)) & 1),
    )


@dataclass(frozen=True)
class Quotient:
    """Float32 arithmetic with the values of a table: (level * factor - offset) / divisor.

    If the product, the difference and the divisor are integers up to 2**24, float32 holds them exactly, so that only
    the division rounds, as the table does. That is so for 8 bits and statistics of up to four decimals, and for
    ImageNet's in 16 bits. This is faster than a lookup, for which NumPy converts all pixels to int64.

    Attributes:
        numbers: factor, offset and divisor of each stored channel, float32 (3, C).
    """

    numbers: NDArray[np.float32]

    @classmethod
    def of(cls, config: BuildConfig) -> Quotient | None:
        """The arithmetic for `table(config, "float32")`; None if it would round more than once."""
        if (found := statistics(config)) is None:
            return None
        top = config.max_level
        numbers = [_integers(top * mean, top * std) for mean, std in zip(*found, strict=True)]
        exact = all(
            max(top * factor, abs(offset), abs(top * factor - offset), divisor) <= 1 << np.finfo(np.float32).nmant + 1
            for factor, offset, divisor in numbers
        )
        return cls(np.array(numbers, np.float32).T) if exact else None

    def write(self, stored: Array, layout: Layout, out: Array) -> None:
        """Writes the values of stored pixels to memory that exists already.

        Args:
            stored: (..., C, H, W) or (..., H, W, C), with any strides.
            layout: "NCHW" or "NHWC", the layout of `stored`.
            out: float32 of the same shape, with any strides; fastest if it is contiguous in one of the layouts.
        """
        if not out.flags.c_contiguous:
            layout, axis, place = ("NHWC", -3, -1) if layout == "NCHW" else ("NCHW", -1, -3)
            stored, out = np.moveaxis(stored, axis, place), np.moveaxis(out, axis, place)
        found = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        np.copyto(found, stored)
        factor, offset, divisor = self._operands(layout, out.shape[-3:])
        whole = found if layout == "NCHW" else found.reshape(-1, *factor.shape)
        np.multiply(whole, factor, out=whole)
        np.subtract(whole, offset, out=whole)
        np.divide(whole, divisor, out=whole)
        if found is not out:
            np.copyto(out, found)

    def _operands(self, layout: Layout, shape: tuple[int, ...]) -> Array:
        """The numbers as (3, C, 1, 1), or repeated as (3, lines, W, C) for NHWC: NumPy is slow at lines of C values."""
        if layout == "NCHW":
            return self.numbers[..., None, None]
        if shape not in self._repeated:
            height, width, channels = shape
            lines = next(n for n in range(min(height, max(1, _LINE // (width * channels))), 0, -1) if height % n == 0)
            self._repeated[shape] = np.tile(self.numbers[:, None, None], (1, lines, width, 1))
        return self._repeated[shape]

    @functools.cached_property
    def _repeated(self) -> dict[tuple[int, ...], Array]:
        return {}


def row_shape(config: BuildConfig, height: int, width: int) -> tuple[int, int, int]:
    """The shape of one stored image: (C, H, W) or (H, W, C)."""
    channels = config.channel_count
    return (channels, height, width) if config.layout == "NCHW" else (height, width, channels)


def apply_table(
    values: Array, stored: Array, layout: Layout, out: Array | None = None, quotient: Quotient | None = None
) -> Array:
    """Gives `values[channel, level]` for each stored pixel; the shape of `stored`, the dtype of `values`.

    Args:
        values: (channels, 256), or (images, 1, 256) if each image has its own table; 65536 levels for uint16 pixels.
        stored: uint8 or uint16 (..., C, H, W) or (..., H, W, C).
        layout: "NCHW" or "NHWC", the layout of `stored`.
        out: receives the values, with any strides if it is an image or a batch; a new array if None.
        quotient: arithmetic for the same values, which is used instead of the table if they are float32.

    Raises:
        ValueError: the table does not fit the dtype or shape of the pixels.
    """
    axis = stored.ndim - 3 if layout == "NCHW" else stored.ndim - 1
    count = math.prod(stored.shape[:-3])
    fit = values.shape[:-1] == ((stored.shape[axis],) if values.ndim == 2 else (count, 1))
    pixel = _pixel_dtype(values)
    if stored.dtype != pixel or axis < 0 or not fit:
        raise ValueError(f"stored: got {stored.dtype} {stored.shape}; need {pixel} {layout} for a table {values.shape}")
    if out is None:
        out = np.empty(stored.shape, values.dtype)
    images, rows = (array.reshape(-1, *stored.shape[-3:]) for array in (stored, out))
    if quotient is not None and out.dtype == np.float32:
        step = images_together(stored.shape[-3:])
        for start in range(0, len(images), step):
            quotient.write(images[start : start + step], layout, rows[start : start + step])
        return out
    if values.ndim == 2 and (layout == "NHWC" or math.prod(stored.shape[-2:]) < _LARGE_PLANE):
        _look_up_together(values, images, layout, rows)
        return out
    if layout == "NHWC":
        images, rows = images.transpose(0, 3, 1, 2), rows.transpose(0, 3, 1, 2)
    plane = None if out.flags.c_contiguous else np.empty(rows.shape[-2:], out.dtype)
    each: Iterable[Array] = itertools.repeat(values)
    if values.ndim > 2:
        each = np.broadcast_to(values, (len(images), images.shape[1], values.shape[-1]))
    for image, row, own in zip(images, rows, each, strict=False):
        look_up(own, image, row, plane)
    return out


def _look_up_together(values: Array, images: Array, layout: Layout, rows: Array) -> None:
    """As `apply_table`, with one lookup in the tables of all channels for several images.

    This is faster for small images, for each of which a call takes longer than its work, and for NHWC, where the values
    of a channel are not contiguous.
    """
    first = _first_places(*values.shape, images.shape[2] if layout == "NHWC" else None)
    step = images_together(images.shape[1:])
    for start in range(0, len(images), step):
        places, row = images[start : start + step] + first, rows[start : start + step]
        if row.flags.c_contiguous:
            np.take(values.ravel(), places, mode="clip", out=row)
        else:
            row[...] = np.take(values.ravel(), places, mode="clip")


@functools.lru_cache(maxsize=16)
def _first_places(channels: int, levels: int, width: int | None) -> Array:
    """Where the table of each channel begins in all tables: (C, 1, 1), or (width, C) for NHWC.

    NumPy adds a whole line faster than a few channels again and again.
    """
    first = np.arange(0, channels * levels, levels, dtype=np.min_scalar_type(channels * levels - 1))
    return first[:, None, None] if width is None else np.tile(first, (width, 1))


def images_together(shape: tuple[int, ...]) -> int:
    """How many images of this shape are looked up together, so that all arrays stay in the cache."""
    return max(1, _PIXELS_TOGETHER // max(1, math.prod(shape)))


def _pixel_dtype(values: Array) -> np.dtype[Any]:
    """The dtype of the pixels that a table is for."""
    return np.dtype(np.uint8 if values.shape[-1] == 256 else np.uint16)


def look_up(values: Array, source: Array, target: Array, plane: Array | None = None) -> None:
    """Writes `values[channel, level]` of one image `source` (C, H, W) to `target` (C, H, W).

    `plane` (H, W) is a scratch buffer, which is used if the planes of `target` are not contiguous. One contiguous plane
    at a time is twice as fast as whole batches with strides. mode="clip" writes without a buffered copy, and never
    clips, since the table has an entry for every level.
    """
    for row, pixels, out in zip(values, source, target, strict=True):
        if out.flags.c_contiguous:
            np.take(row, pixels, mode="clip", out=out)
        else:
            out[...] = np.take(row, pixels, mode="clip", out=plane)


def levels(values: Array, stored: Array, layout: Layout) -> Array:
    """Turns stored images back into pixels: for each value, the level whose table entry is nearest.

    This is the exact inverse of `apply_table` if all entries of the table differ. Stored pixels are returned unchanged.
    Most tables are linear apart from rounding, so the level is a quotient; other tables are interpolated linearly.

    Args:
        values: the table that was applied, (channels, 256).
        stored: (..., C, H, W) or (..., H, W, C); NaN becomes level 0.
        layout: "NCHW" or "NHWC", the layout of `stored`.
    """
    if stored.dtype.kind == "u":
        return stored
    out = np.empty(stored.shape, _pixel_dtype(values))
    axis = stored.ndim - 3 if layout == "NCHW" else stored.ndim - 1
    every = np.arange(values.shape[1])
    for source, target, row in zip(np.moveaxis(stored, axis, 0), np.moveaxis(out, axis, 0), values, strict=True):
        places = _quotients(row, source)
        if not np.array_equal(np.rint(_quotients(row, row)), every):
            places = np.interp(source.astype(np.float32), row.astype(np.float32), every)
        target[...] = np.clip(np.rint(np.nan_to_num(places)), 0, every[-1])
    return out


def tells_levels(values: Array) -> bool:
    """Whether `levels` recovers every level from a table, (channels, 256)."""
    found = levels(values, values[..., None], "NCHW")[..., 0]
    return np.array_equal(found, np.broadcast_to(np.arange(values.shape[1]), values.shape))


def as_decoded(pixels: Array, layout: Layout, channels: Channels) -> Array:
    """One image of stored pixels as decoders give it: (H, W, 3) in R,G,B, or (H, W) for gray; a view.

    Args:
        pixels: (C, H, W) or (H, W, C).
        layout: "NCHW" or "NHWC", the layout of `pixels`.
        channels: the stored order of channels.
    """
    upright = pixels.transpose(1, 2, 0) if layout == "NCHW" else pixels
    if channels == "gray":
        return upright[..., 0]
    return upright[..., ::-1] if channels == "bgr" else upright


def _quotients(row: Array, source: Array) -> Array:
    """The position of each value between the first and last entry of a row, from 0 to the index of the last entry."""
    low, high = row[[0, -1]].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # constant tables, damaged images
        places: Array = (source.astype(np.float32) - low) * (np.float32(len(row) - 1) / (high - low))
    return places


class NumpyNormalizer:
    """Turns decoded pixels into stored rows on the CPU; see `base.Normalizer`."""

    stream = None

    def __init__(self, config: BuildConfig) -> None:
        self._config = config
        self._table = table(config)
        self._quotient = Quotient.of(config) if config.dtype == "float32" else None
        self._dtype = np.dtype(config.dtype)
        self._planar = config.layout == "NCHW"
        self._swap = config.channels == "bgr"  # decoders give R,G,B; the table is in stored order

    def allocate(self, shape: tuple[int, ...]) -> Array:
        """See `Normalizer.allocate`."""
        return np.empty(shape, self._dtype)

    def apply(self, pixels: Array, kept: NDArray[np.int64], out: Array) -> Callable[[], None]:
        """See `Normalizer.apply`; `out` may be any array, and is complete when this returns."""
        channels = self._config.channel_count
        if pixels.dtype != self._config.pixel_dtype or pixels.ndim != 4 or pixels.shape[3] != channels:
            wanted = f"{self._config.pixel_dtype} (N, H, W, {channels})"
            raise ValueError(f"pixels: got {pixels.dtype} {pixels.shape}; need {wanted}")
        _, height, width, _ = pixels.shape
        rows = (len(kept), channels, height, width) if self._planar else (len(kept), height, width, channels)
        if out.shape != rows or out.dtype != self._dtype:
            raise ValueError(f"out: got {out.dtype} {out.shape}; need {self._dtype} {rows}")
        if self._swap:
            pixels = pixels[..., ::-1]
        if self._quotient is not None:
            step = images_together(out.shape[1:])
            for start in range(0, len(kept), step):
                some = pixels[kept[start : start + step]] if step > 1 else pixels[kept[start], None]  # one is a view
                some = some.transpose(0, 3, 1, 2) if self._planar else some
                self._quotient.write(some, self._config.layout, out[start : start + step])
            return _done
        plane = np.empty((height, width), out.dtype)
        for position, row in zip(kept.tolist(), out, strict=True):
            image, target = pixels[position].transpose(2, 0, 1), row if self._planar else row.transpose(2, 0, 1)
            if self._dtype.kind == "u":
                np.copyto(target, image)
            else:
                look_up(self._table_of(image), image, target, plane)
        return _done

    def _table_of(self, image: Array) -> Array:
        if self._table is not None:
            return self._table
        return np.tile(image_table(self._config, Sums.of(image)), (len(image), 1))

    def device_bytes(self) -> int:
        """See `Normalizer.device_bytes`."""
        return 0


def _done() -> None:
    pass
