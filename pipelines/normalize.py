"""Pixels to values, dtype and layout: a table look-up, by NumPy or by CuPy, with equal results to the last bit.

A pixel is one of 256 levels, so every normalization is a table of 256 values a channel. Each entry is the exact
rational (x / 255 - mean) / std rounded once to the stored type, half to even. The ImageNet statistics are those of
torchvision's models: mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225 in the order R, G, B.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import BuildConfig, Layout
from .errors import UsageError

if TYPE_CHECKING:
    Array = NDArray[Any]

_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0,) * 3, (1.0,) * 3),
    "signed": ((0.5,) * 3, (0.5,) * 3),
}


def table(config: BuildConfig, dtype: str | None = None) -> Array:
    """The value of every level: shape (channels, 256), in the stored order of channels.

    Args:
        config: gives `normalize`, `mean`, `std`, `channels` and `dtype`.
        dtype: another type than the config's; a reader asks for float32 tables of a uint8 dataset.

    Raises:
        UsageError: float16 cannot hold a value.
    """
    kind = np.dtype(dtype or config.dtype)
    found = statistics(config)
    if kind == np.uint8 or found is None:
        return np.tile(np.arange(256).astype(kind), (config.channel_count, 1))
    rows = [[(Fraction(x, 255) - mean) / std for x in range(256)] for mean, std in zip(*found, strict=True)]
    largest = max(abs(value) for row in rows for value in row)
    if largest > float(np.finfo(kind).max):
        raise UsageError(f"{kind} cannot hold {float(largest):.6g}; choose --dtype float32 or another --mean and --std")
    return np.array([[_nearest(value, kind) for value in row] for row in rows], dtype=kind)


def statistics(config: BuildConfig) -> tuple[list[Fraction], list[Fraction]] | None:
    """Mean and standard deviation of each stored channel, of pixels scaled to 0..1; None where pixels stay as they are.

    Decimals are taken as they are written: a mean of 0.485 is 485/1000.
    """
    if config.normalize == "none":
        return None
    given = (config.mean or (), config.std or ()) if config.normalize == "mean-std" else _STATISTICS[config.normalize]
    means, stds = ([Fraction(str(number)) for number in numbers[: config.channel_count]] for numbers in given)
    return (means[::-1], stds[::-1]) if config.channels == "bgr" else (means, stds)


def _nearest(value: Fraction, dtype: np.dtype[Any]) -> Any:
    # By way of float64 a value can be rounded twice; so its neighbours are compared as exact rationals.
    guess = dtype.type(float(value))
    around = [np.nextafter(guess, dtype.type(side)) for side in (-np.inf, np.inf)]
    bits = f"u{dtype.itemsize}"
    return min(
        (number for number in (guess, *around) if np.isfinite(number)),
        key=lambda number: (abs(Fraction(float(number)) - value), int(number.view(bits)) & 1),
    )


def row_shape(config: BuildConfig, height: int, width: int) -> tuple[int, int, int]:
    """The shape of one stored image."""
    channels = config.channel_count
    return (channels, height, width) if config.layout == "NCHW" else (height, width, channels)


def apply_table(values: Array, stored: Array, layout: Layout) -> Array:
    """Stored uint8 images (..., C, H, W) or (..., H, W, C) as `values[channel, level]`, in the table's dtype.

    Raises:
        ValueError: other pixels than the table was made for.
    """
    axis = stored.ndim - 3 if layout == "NCHW" else stored.ndim - 1
    if stored.dtype != np.uint8 or axis < 0 or stored.shape[axis] != len(values):
        raise ValueError(f"stored: got {stored.dtype} {stored.shape}; need uint8 {layout} of {len(values)} channels")
    out = np.empty(stored.shape, values.dtype)
    source, target = np.moveaxis(stored, axis, 0), np.moveaxis(out, axis, 0)
    for channel, row in enumerate(values):
        target[channel] = row[source[channel]]
    return out


class Normalizer:
    """Turns decoded pixels into stored rows on the CPU."""

    def __init__(self, config: BuildConfig) -> None:
        self._table = table(config)
        self._planar = config.layout == "NCHW"
        self._plain = self._table.dtype == np.uint8
        self._swap = config.channels == "bgr"  # decoders give R,G,B; the table is in stored order already

    def allocate(self, shape: tuple[int, ...]) -> Array:
        """A buffer for stored rows."""
        return np.empty(shape, self._table.dtype)

    def apply(self, pixels: Array, out: Array) -> Callable[[], None]:
        """Writes the rows of `pixels`, uint8 (N, H, W, C) in R,G,B, to `out`, (N, *row shape) in the stored dtype.

        Returns a function that waits until `out` is whole; here it is already.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != len(self._table):
            raise ValueError(f"pixels: got {pixels.dtype} {pixels.shape}; need uint8 (N, H, W, {len(self._table)})")
        count, height, width, channels = pixels.shape
        rows = (count, channels, height, width) if self._planar else pixels.shape
        if out.shape != rows or out.dtype != self._table.dtype:
            raise ValueError(f"out: got {out.dtype} {out.shape}; need {self._table.dtype} {rows}")
        if self._swap:
            pixels = pixels[..., ::-1]
        if self._plain:
            np.copyto(out, pixels.transpose(0, 3, 1, 2) if self._planar else pixels)
        elif self._planar:
            # One contiguous plane at a time; mode="clip" spares a bounds check, and 256 entries make it exact.
            for image, row in zip(pixels, out, strict=True):
                for channel, values in enumerate(self._table):
                    np.take(values, image[..., channel], mode="clip", out=row[channel])
        else:
            plane = np.empty(pixels.shape[1:3], out.dtype)
            for image, row in zip(pixels, out, strict=True):
                for channel, values in enumerate(self._table):
                    row[..., channel] = np.take(values, image[..., channel], mode="clip", out=plane)
        return _done


def _done() -> None:
    pass


class CudaNormalizer:
    """Turns decoded pixels into stored rows on a GPU, on a stream of its own, and copies them to pinned host memory."""

    def __init__(self, config: BuildConfig, device: int) -> None:
        import cupy

        self._cupy = cupy
        cupy.cuda.Device(device).use()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._host_table = table(config)
        self._table = cupy.asarray(self._host_table)
        self._planar = config.layout == "NCHW"
        self._swap = config.channels == "bgr"
        # `i` counts the output's elements; each is found in the decoder's NHWC pixels and looked up in the table.
        self._kernel = cupy.ElementwiseKernel(
            "raw uint8 pixels, raw T values, int32 channels, int64 plane, int32 planar, int32 swap",
            "T out",
            """
            const long long image = i / (plane * channels);
            const long long rest = i - image * plane * channels;
            const int channel = planar ? (int)(rest / plane) : (int)(rest % channels);
            const long long position = planar ? rest % plane : rest / channels;
            const int from = swap ? channels - 1 - channel : channel;
            out = values[channel * 256 + pixels[(image * plane + position) * channels + from]];
            """,
            "gpu_npz_normalize",
        )

    @property
    def stream(self) -> int:
        """The CUDA stream, as a number: hand it to the decoder, so that the two are in order without waiting."""
        return int(self._stream.ptr)

    def allocate(self, shape: tuple[int, ...]) -> Array:
        """A pinned host buffer for stored rows, of exactly the size needed."""
        dtype = self._host_table.dtype
        count = int(np.prod(shape))
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(max(1, count * dtype.itemsize)), 0)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def apply(self, pixels: Any, out: Array) -> Callable[[], None]:
        """Enqueues kernel and copy for `pixels`, anything with DLPack on this GPU; see `Normalizer.apply`."""
        cupy = self._cupy
        with self._stream:
            source = cupy.from_dlpack(pixels)
            _, height, width, channels = source.shape
            rows = self._kernel(
                source, self._table, channels, height * width, int(self._planar), int(self._swap), size=out.size
            )  # fmt: skip
            rows.get(stream=self._stream, out=out.reshape(-1), blocking=False)
            event = cupy.cuda.Event(disable_timing=True)
            event.record(self._stream)

        def wait() -> None:
            nonlocal source, rows
            event.synchronize()
            source = rows = None  # both must live until the copy is done

        return wait
