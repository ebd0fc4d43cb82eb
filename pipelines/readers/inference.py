"""Applies the preprocessing of a dataset to single images, so that a model gets the same input at inference."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..dataset.manifest import Manifest
from ..errors import ImageError
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import NumpyNormalizer, Quotient, apply_table, row_shape, statistics, table, tables
from ..sources.dicom_frames import split_frame
from ..sources.rejects import BadItem

if TYPE_CHECKING:
    from PIL import Image

    from ..preprocess.pillow import PillowDecoder

_RESIZE = {
    "stretch": "resized to {size}, regardless of the aspect ratio",
    "center-crop": "resized to cover {cover}, then cropped to the {size} in the middle",
    "pad": "resized to fit into {size}, in the middle of a canvas of level {pad_value}",
    "none": "left at its size, which must be {size}",
}
# Settings that change what a model sees. Dtype and layout only change how the same values are stored.
_CONTRACT = (
    "channels", "bit_depth", "resize_mode", "interpolation", "reduced_decoding", "exif_orientation", "background",
    "dicom_window",
)  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """Turns images into rows, as a build with these settings does. Threads may share it, and it can be pickled.

        preprocess = Preprocess.from_dataset("/data/train-npz")
        row = preprocess("cat.jpg")

    Images are decoded with Pillow. A row is bit-identical to the stored one if the build used the same version of
    Pillow; rows that DALI made differ by a few tenths of a level on average, as `gpu-npz parity` shows.

    Attributes:
        config: the settings of the build.
        image_size: height and width of a row, in pixels.
    """

    config: BuildConfig
    image_size: tuple[int, int]

    @classmethod
    def from_dataset(cls, out: str | os.PathLike[str]) -> Preprocess:
        """The preprocessing of a finished dataset; only its manifest is read.

        Args:
            out: the dataset's folder or URL.

        Raises:
            IncompleteError: the build has not finished.
            FormatError: `out` is not a dataset, or is damaged.
        """
        return cls.of(Manifest.load(os.fspath(out)))

    @classmethod
    def of(cls, manifest: Manifest) -> Preprocess:
        """The preprocessing of the dataset with this manifest."""
        return cls(manifest.config, manifest.images.size)

    def __call__(self, image: str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]) -> NDArray[Any]:
        """The row that a build stores for an image: (C, H, W) or (H, W, C), in the dataset's dtype.

        Args:
            image: a path (for a DICOM frame as in a dataset, `scan.dcm/0003`); an encoded image; a PIL image; or
                pixels: uint8 (H, W), (H, W, 1), (H, W, 3) in R,G,B or (H, W, 4) with alpha, or uint16 (H, W); with
                `bit_depth` 16, any of these shapes in uint16. A path, bytes, or a PIL image that is not loaded yet give
                the stored row. Decoded pixels are resized from full size; for a large JPEG, that gives the stored row
                only if the build had `reduced_decoding` False.

        Raises:
            ImageError: the image cannot be decoded; the build would reject it.
            UsageError: an array of another shape or dtype.
            OSError: the file cannot be read.
        """
        pixels = self._pixels(image)
        normalizer = self._normalizer
        row = normalizer.allocate((1, *row_shape(self.config, *self.image_size)))
        normalizer.apply(pixels[None], np.zeros(1, np.int64), row)
        found: NDArray[Any] = row[0]
        return found

    def normalized(self, image: str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]) -> NDArray[np.float32]:
        """The normalized row as float32, even if the dataset stores uint8 pixels, as in `Dataset.normalized`.

        The argument and the errors are those of `__call__`.
        """
        return self.values(self(image))

    def values(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """The float32 values of stored rows (..., C, H, W) or (..., H, W, C): stored pixels are normalized."""
        if rows.dtype.kind != "u":
            return rows.astype(np.float32, copy=False)
        values: NDArray[np.float32] = apply_table(self.tables(rows), rows, self.config.layout, None, self._quotient)
        return values

    def write(self, rows: NDArray[Any], out: NDArray[Any], *, whole: NDArray[Any] | None = None) -> None:
        """Writes the values of stored rows (..., C, H, W) or (..., H, W, C) to `out`, float32 or float16 of this shape.

        The values are those of `values`; in float16, those that a float16 build of the same pixels stores.

        Args:
            row: (C, H, W) or (H, W, C), as stored.
            out: of the same shape.
            whole: the stored row of which `row` is a part, if its statistics are to be used.
        """
        if rows.dtype.kind != "u":
            np.copyto(out, rows, casting="same_kind")
        else:
            values = self.tables(rows if whole is None else whole, out.dtype.name)
            apply_table(values, rows, self.config.layout, out, self._quotient)

    def tables(self, rows: NDArray[Any], dtype: str = "float32") -> NDArray[Any]:
        """The value of every level of stored uint8 rows: (channels, 256), in the stored order of channels.

        If each image is normalized by its own statistics, the shape is (images, 1, 256).

        Args:
            rows: (..., C, H, W) or (..., H, W, C), as stored.
            dtype: of the values, float32 or float16.
        """
        if dtype not in self._tables:
            self._tables[dtype] = table(self.config, dtype)
        same = self._tables[dtype]
        return tables(self.config, rows, dtype) if same is None else same

    def describe(self) -> str:
        """The preprocessing in words, one step per line."""
        config, (height, width) = self.config, self.image_size
        cover = Geometry.of(config, self.image_size).cover
        resize = _RESIZE[config.resize_mode].format(
            size=f"{height} x {width}", cover=f"{cover[0]} x {cover[1]}", pad_value=config.pad_value
        )
        antialiased = "" if config.interpolation == "nearest" else ", antialiased"
        reduced = "; large JPEGs are decoded at a half or less first" if config.reduces_jpegs else ""
        names = {1: ("gray",), 3: tuple(config.channels)}[config.channel_count]
        values = self._formula(names)
        if config.dtype == config.pixel_dtype and config.normalize != "none":
            values = f"levels of 0 to {config.max_level} are stored; read as {values}"
        shape = (len(names), height, width) if config.layout == "NCHW" else (height, width, len(names))
        colours = f"transparent pixels on color {config.background}"
        if config.dicom_window is not None:
            colours += f"; DICOM window {config.dicom_window}"
        colour = {"rgb": "red, green, blue", "bgr": "blue, green, red", "gray": "gray"}[config.channels]
        return "\n".join(
            (
                f"rotated by EXIF orientation: {'yes' if config.exif_orientation else 'no'}",
                f"{config.bit_depth} bits per channel, {colour}; {colours}",
                f"{resize}, by {config.interpolation} interpolation{antialiased}{reduced}",
                f"values: {values}",
                f"stored as {config.dtype} of shape {shape}",
            )
        )

    def _formula(self, names: tuple[str, ...]) -> str:
        config, top = self.config, self.config.max_level
        if (found := statistics(config)) is not None:
            mean, std = (", ".join(f"{float(number):g}" for number in numbers) for numbers in found)
            return f"(level / {top} - mean) / std, with mean {mean} and std {std} for {', '.join(names)}"
        low, high = config.window or (0, 0)
        own = "of all values of the image"
        return {
            "none": f"levels of 0 to {top}, as they are",
            "log": f"log(1 + level) / log(1 + {top})",
            "standardize": f"(level - mean) / max(std, 1 / sqrt(count)) {own}",
            "minmax": f"(level - min) / (max - min) {own}",
            "maxabs": f"level / max {own}",
            "l2": f"level / sqrt(sum of squares) {own}",
            "window": f"(level - LO) / (HI - LO), clipped to 0 to 1, with LO {low:g} and HI {high:g}",
        }[config.normalize]

    def differences(self, other: Preprocess) -> list[str]:
        """The settings that make a model see different values with `other`; dtype and layout are ignored."""
        mine, its = self._contract(), other._contract()
        return [
            f"{name}: {mine.get(name)} and {its.get(name)}" for name in mine | its if mine.get(name) != its.get(name)
        ]

    def _contract(self) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {"size": "{}x{}".format(*self.image_size)}
        found |= {name.replace("_", "-"): getattr(config, name) for name in _CONTRACT}
        if config.resize_mode == "center-crop":
            found["crop-pct"] = config.crop_pct
        if config.resize_mode == "pad":
            found["pad-value"] = config.pad_value
        if (numbers := statistics(config)) is not None:
            found |= zip(("mean", "std"), (tuple(map(float, each)) for each in numbers), strict=True)
        else:
            found |= {"normalize": config.normalize, "window": config.window}
        return found

    def _pixels(self, image: Any) -> NDArray[Any]:
        decoder = self._decoder
        label = str(image) if isinstance(image, (str, os.PathLike)) else f"image of type {type(image).__name__}"
        try:
            with decoder:
                if isinstance(image, (str, os.PathLike)):
                    file, frame = split_frame(os.fsencode(image))
                    return decoder.decode_image(Path(os.fsdecode(file)).read_bytes(), label, frame)
                if isinstance(image, (bytes, bytearray, memoryview)):
                    return decoder.decode_image(bytes(image), label)
                return decoder.pixels_of(image, label)
        except BadItem as exc:
            raise ImageError(f"{label!r}: {exc.code} at {exc.stage} ({exc.detail}); the build would reject it") from exc

    @functools.cached_property
    def _decoder(self) -> PillowDecoder:
        from ..preprocess.decoders import pillow_decoder

        return pillow_decoder(self.config, Geometry.of(self.config, self.image_size), None)

    @functools.cached_property
    def _normalizer(self) -> NumpyNormalizer:
        return NumpyNormalizer(self.config)

    @functools.cached_property
    def _quotient(self) -> Quotient | None:
        return Quotient.of(self.config)

    @functools.cached_property
    def _tables(self) -> dict[str, NDArray[Any] | None]:
        """The tables that hold for all images, by dtype."""
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Preprocess, (self.config, self.image_size)
