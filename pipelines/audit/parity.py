"""Measures how much two decoders differ on the same images, in 8-bit levels, by kind of image.

The expected differences are not zero. All decoders obtain the same coefficients from a JPEG, but each has its own
inverse DCT and chroma upsampling (ITU-T T.81 specifies neither exactly), and resizing rounds once or twice.

- DALI's CPU operators share libjpeg-turbo's arithmetic with Pillow. Only the resize differs, by a mean of about
  0.2 levels.
- The decoders of a GPU have their own arithmetic. A mean of up to 1 level is expected.
- torchvision's transforms call Pillow's resize with the same sizes, so the results are bit-identical, with two
  exceptions: what torchvision does not support (see `_TorchvisionDecoder`), and JPEGs of at least four times the target
  size, which the Pillow side decodes at half the scale or less (`draft`). The latter differ by a mean of about 1 level.

Normalization uses a lookup table and is bit-identical.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin

from ..config import BuildConfig, gpu_numbers
from ..dataset.built import open_images
from ..dataset.image_size import image_size
from ..dataset.plan import Plan
from ..dataset.selection import listed
from ..errors import BackendError, UsageError
from ..machine.environment import Choice, choose, inspect
from ..machine.tuning import Tuning
from ..preprocess.base import DecodedBatch, Decoder, on_host
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry, Placement
from ..preprocess.pillow import PillowDecoder, versions
from ..preprocess.resize import resolved
from ..sources.base import Item, Source, read_item
from ..sources.rejects import BadItem

Side = Literal["pillow", "simd", "dali-cpu", "dali-gpu", "torchvision"]
KINDS = ("4:4:4", "4:2:2", "4:2:0", "other subsampling", "gray", "CMYK", "progressive", "EXIF turned", "not JPEG")
_SUBSAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
_WORST = 5


@dataclass(frozen=True)
class Difference:
    """The absolute differences of one kind of image, in levels of 0 to 255.

    Attributes:
        kind: one of `KINDS`, or `all`.
        images: the number of images compared.
        mean: the mean over all pixels and channels.
        p99: the 99th percentile.
        max: the largest difference.
    """

    kind: str
    images: int
    mean: float
    p99: int
    max: int


@dataclass(frozen=True)
class Parity:
    """The result of comparing two decoders.

    Attributes:
        sides: the provenance of each decoder, by name.
        images: the number of images that both sides decoded.
        kinds: the differences of each kind of image, and of all images as the kind `all`.
        missing_kinds: the kinds of JPEG that were not tested, because no image was of that kind.
        worst: the path and the mean difference of the images that differ most, largest first.
        verdicts: the path of each item that one side decoded and the other rejected, with the verdict of each side:
            `decoded` or a reject code.
    """

    sides: dict[str, dict[str, Any]]
    images: int
    kinds: tuple[Difference, ...]
    missing_kinds: tuple[str, ...]
    worst: tuple[tuple[str, float], ...]
    verdicts: tuple[tuple[str, str, str], ...]

    @property
    def mean(self) -> float:
        """The mean difference over all images, in levels of 0 to 255."""
        return next((found.mean for found in self.kinds if found.kind == "all"), 0.0)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)


@dataclass
class _Tally:
    images: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, difference: NDArray[np.uint8]) -> None:
        self.images += 1
        self.counts += np.bincount(difference.ravel(), minlength=256)

    def result(self, kind: str) -> Difference:
        total = int(self.counts.sum())
        mean = float(self.counts @ np.arange(256)) / total
        p99 = int(np.searchsorted(np.cumsum(self.counts), 0.99 * total))
        return Difference(kind, self.images, mean, p99, int(np.flatnonzero(self.counts)[-1]))


class _Findings:
    """The running totals of a comparison."""

    def __init__(self) -> None:
        self._tallies = {kind: _Tally() for kind in ("all", *KINDS)}
        self._worst: list[tuple[str, float]] = []
        self._verdicts: list[tuple[str, str, str]] = []

    def compare(self, source: Source, one: DecodedBatch, other: DecodedBatch) -> None:
        """Compares the results of two decoders for the same batch."""
        first, second = ({item.index: row for item, row in _rows(decoded)} for decoded in (one, other))
        for item in one.batch.items:
            if (item.index in first) != (item.index in second):
                self._verdicts.append((item.path, _verdict(one, item), _verdict(other, item)))
            elif item.index in first:
                self._add(source, item, first[item.index], second[item.index])

    def _add(self, source: Source, item: Item, row: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
        difference = np.maximum(row, other) - np.minimum(row, other)
        for kind in ("all", *_kinds(source, item)):
            self._tallies[kind].add(difference)
        worst = [*self._worst, (item.path, float(difference.mean()))]
        self._worst = sorted(worst, key=lambda found: -found[1])[:_WORST]

    def result(self, sides: dict[str, dict[str, Any]]) -> Parity:
        return Parity(
            sides=sides,
            images=self._tallies["all"].images,
            kinds=tuple(tally.result(kind) for kind, tally in self._tallies.items() if tally.images),
            missing_kinds=tuple(kind for kind in KINDS if not self._tallies[kind].images and kind != "not JPEG"),
            worst=tuple(self._worst),
            verdicts=tuple(self._verdicts),
        )


def parity(
    src: str | os.PathLike[str],
    config: BuildConfig,
    sides: tuple[Side, Side],
    *,
    images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Decodes and resizes the same images with two decoders and compares the results.

    Args:
        src: the images, in any form that `build` accepts.
        config: the settings of the decoders, such as size and resize mode. `device` selects the GPU, and `shuffle`
            selects which images are used if there are more than `images`.
        sides: the two decoders to compare.
        images: the number of images to use, from the start of the plan.
        progress: called with the number of images done and the total number of images.

    Raises:
        UsageError: both sides are the same, or torchvision does not support the resize mode.
        BackendError: a decoder cannot be used on this machine.
        SourceError: SRC cannot be read or contains no images.
    """
    if sides[0] == sides[1]:
        raise UsageError(f"both sides are {sides[0]}; choose two different decoders")
    config = config.model_copy(update={"limit": images, "labels": "none"})  # labels do not affect pixels
    source = open_images(src, config)
    arrays = listed(source, config)
    plan = Plan(arrays, len(arrays["name_ends"]))
    size = image_size(plan, source, config)
    row_bytes = math.prod(size) * config.channel_count
    tuning = Tuning.of(config, Choice("dali"), row_bytes=row_bytes, shard_rows=plan.shard_rows, shards=1)
    config = config.model_copy(update={"batch_size": tuning.batch_size})  # both sides use the same batches
    found = _Findings()
    with contextlib.ExitStack() as stack:
        decoders = [stack.enter_context(_decoder(side, config, size, source)) for side in sides]
        described = dict(zip(sides, (decoder.provenance() for decoder in decoders), strict=True))
        first, second = (decoder.decode(plan.batches(0, tuning.batch_size)) for decoder in decoders)
        done = 0
        for one, other in zip(first, second, strict=True):
            found.compare(source, one, other)
            done += len(one.batch.items)
            if progress:
                progress(done, plan.item_count)
    return found.result(described)


def _decoder(side: Side, config: BuildConfig, size: tuple[int, int], source: Source) -> Decoder:
    if side == "torchvision":
        return _TorchvisionDecoder(config, Geometry.of(config, size), source)
    backend, _, place = side.partition("-")
    gpu = next(iter(gpu_numbers(config.device)), 0)
    device = str(gpu) if place == "gpu" else "cpu"
    asked: dict[str, Any] = {"backend": backend, "device": device, "require_gpu": place == "gpu"}
    if not place:
        asked |= {"backend": "pillow", "resizer": backend}  # both sides decode with Pillow and resize differently
    settings = resolved(BuildConfig(**{**config.model_dump(), **asked}))
    choice = choose(settings, inspect(settings))
    tuning = Tuning.of(settings, choice, row_bytes=1, shard_rows=settings.batch_size or 1, shards=1)
    return make_decoder(choice.backend, settings, Geometry.of(settings, size), source, tuning=tuning, gpu=choice.gpu)


class _TorchvisionDecoder(PillowDecoder):
    """Decodes images as a typical training script does: with torchvision's folder loader and its transforms.

    `stretch` becomes `Resize((H, W))`. `center-crop` becomes `Resize(Hc)` followed by `CenterCrop((H, W))`; it supports
    only square outputs, because `Resize` cannot cover a rectangle. For gray, `Grayscale()` comes first.

    The loader calls `convert("RGB")`, so it ignores the EXIF orientation, does not use `draft`, drops alpha and
    saturates 16-bit samples. Reading, limits and rejects are the same as in `PillowDecoder`.

    Raises:
        UsageError: torchvision does not support the resize mode.
        BackendError: torchvision cannot be imported.
    """

    def __init__(self, config: BuildConfig, geometry: Geometry, source: Source) -> None:
        super().__init__(config, geometry, source)
        self._size = (geometry.height, geometry.width)
        if geometry.mode == "pad":
            raise UsageError("--resize-mode pad: torchvision has nothing like it; choose stretch, center-crop or none")
        if geometry.mode == "center-crop" and geometry.height != geometry.width:
            raise UsageError(
                f"--resize-mode center-crop to {geometry.height}x{geometry.width}: torchvision's Resize covers squares "
                "alone; give a square --size, or choose stretch"
            )
        try:
            self._torchvision: Any = importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as exc:  # RuntimeError: it was built for another version of torch
            raise BackendError(
                f"parity: torchvision cannot be imported ({exc}); "
                "pip install torchvision, in the version that fits your torch"
            ) from exc
        transforms = self._torchvision.transforms
        steps = [transforms.Grayscale()] if config.channels == "gray" else []
        if geometry.mode != "none":
            target = geometry.cover[0] if geometry.mode == "center-crop" else self._size
            steps.append(transforms.Resize(target, transforms.InterpolationMode(config.interpolation), antialias=True))
        if geometry.mode == "center-crop":
            steps.append(transforms.CenterCrop(self._size))
        self._transform = transforms.Compose(steps)

    def provenance(self) -> dict[str, Any]:
        """Returns the versions of torchvision and of the Pillow that it uses."""
        return {"backend": "torchvision", "device": "cpu", "torchvision": self._torchvision.__version__, **versions()}

    def _upright(self, image: Image.Image) -> tuple[Image.Image, Placement]:
        self._check_pixels(*image.size)
        loaded = image.convert("RGB")
        place = self._geometry.place(loaded.height, loaded.width)
        self._check_pixels(place.width, place.height)
        if self._geometry.mode == "none" and (loaded.height, loaded.width) != self._size:
            raise BadItem("resize", "wrong-size", f"{loaded.height} x {loaded.width} pixels (height x width)")
        return loaded, place

    def _place(self, image: Image.Image, place: Placement) -> NDArray[np.uint8]:
        return np.asarray(self._transform(image)).reshape(*self._size, -1)


def _rows(decoded: DecodedBatch) -> Iterator[tuple[Item, NDArray[np.uint8]]]:
    pixels = on_host(decoded.pixels)
    for position in decoded.kept.tolist():
        yield decoded.batch.items[position], pixels[position]


def _verdict(decoded: DecodedBatch, item: Item) -> str:
    return next((reject.code for reject in decoded.rejects if reject.index == item.index), "decoded")


def _kinds(source: Source, item: Item) -> Iterator[str]:
    """Yields the kinds, out of `KINDS`, of an image that both sides decoded."""
    try:
        with Image.open(io.BytesIO(read_item(source, item))) as image:
            if not isinstance(image, JpegImagePlugin.JpegImageFile):
                yield "not JPEG"
                return
            if image.mode in ("L", "CMYK"):
                yield {"L": "gray", "CMYK": "CMYK"}[image.mode]
            else:
                yield _SUBSAMPLING.get(JpegImagePlugin.get_sampling(image), "other subsampling")
            if image.info.get("progressive"):
                yield "progressive"
            if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                yield "EXIF turned"
    except (BadItem, OSError, SyntaxError, ValueError):
        return  # both sides decoded it, so the file has changed since; do not count it under any kind
