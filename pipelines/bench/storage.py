"""Compares file formats on the same images: writing, reading one at random, reading all in order, and size.

All formats store equal rows, which is checked bit for bit before anything is timed. Writes end on the disk. Reads come
from the page cache and are copied, so that a memory map that is never accessed has no advantage. One thread reads and
one thread writes.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..builder.build import build
from ..config import BuildConfig
from ..dataset.space import format_bytes, free_space
from ..errors import BackendError, FormatError, SourceError, UsageError
from ..machine.environment import available_memory
from ..preprocess.normalize import levels, row_shape, table
from ..preprocess.pillow import versions
from ..readers.dataset import open_dataset
from ..sources.arrays.cifar import Cifar
from . import loaders
from .formats import FORMATS, OURS, OURS_DEFLATED, Array, Format, Images
from .rates import Row, Tick, Way, in_turns, linked, machine

IMAGES = 1_000
ROUNDS = 3
RANDOM, IN_ORDER = "read one at random", "read all in order"
_BATCH_SIZE = 64
LOADER = f"DataLoader, {_BATCH_SIZE} a batch"
_READS_S = 1.0  # of one way, one round
_READS = 2_000
_WRITES = 20  # stores of one image, and as many images as that in small stores
_PLAINLY = 1.03
_COPIES = len(FORMATS) + 2  # also of the images themselves, and of what is being written
_MEMORY_SHARE = 0.8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation:
    """One operation, measured with every format.

    Attributes:
        name: the operation.
        images: how many images are stored.
        rows: one per format. Its baseline is our shards, or our deflated shards if the format is compressed.
    """

    name: str
    images: int
    rows: tuple[Row, ...]

    def share(self, row: Row) -> float:
        """A format's rate divided by its baseline's, median of all rounds; 1 for the baseline itself."""
        other = next((other for other in self.rows if other.name in row.baselines), row)
        return statistics.median(a / b for a, b in zip(row.rates, other.rates, strict=True))


@dataclass(frozen=True)
class StorageMeasurement:
    """A whole run.

    Attributes:
        operations: writes of increasing numbers of images, then reads.
        stored_bytes: the size of all images in each format, by its name.
        left_out: formats whose library is missing, and what to install.
        settings: the number of images, their shape, dtype, bytes, and so on.
        machine: what it was measured on.
    """

    operations: tuple[Operation, ...]
    stored_bytes: dict[str, int]
    left_out: tuple[str, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def beaten(self) -> tuple[str, ...]:
        """One sentence for each case in which another format is plainly better than ours."""
        found = [
            f"{operation.name}: {row.name} is {share:.2f} times as fast as {row.baselines[0]}"
            for operation in self.operations
            for row in operation.rows
            if (share := operation.share(row)) > _PLAINLY
        ]
        for name, taken in self.stored_bytes.items():
            (ours,) = _baseline(name) or (name,)
            if taken * _PLAINLY < self.stored_bytes[ours]:
                found.append(f"size: {name} takes {taken / self.stored_bytes[ours]:.2f} of what {ours} takes")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        operations = [
            {
                "name": operation.name,
                "images": operation.images,
                "rows": [
                    {
                        "name": row.name,
                        "median": row.median,
                        "rates": row.rates,
                        "shares": dict.fromkeys(row.baselines, operation.share(row)),
                    }
                    for row in operation.rows
                ],
            }
            for operation in self.operations
        ]
        return {
            "operations": operations,
            "stored_bytes": self.stored_bytes,
            "better_than_ours": self.beaten(),
            "left_out": self.left_out,
            "settings": self.settings,
            "machine": self.machine,
        }


def measure(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    images: int = IMAGES,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> StorageMeasurement:
    """Stores images in every format whose library is installed, and measures writing, reading and size.

    Args:
        src: a folder as for `build`; its files are linked until there are enough. They are decoded by Pillow.
        config: the settings of the build whose rows are stored.
        images: how many images; fewer, with a warning, if disk or memory cannot hold them in all formats.
        rounds: how often everything is measured; the formats take turns within a round.
        folder: where to write; the system's temporary folder if None.
        say: called with the name of what is measured next.

    Raises:
        UsageError: `resize_mode` is `none`, or not even one image fits.
        SourceError: as `build`.
        FormatError: a format returned different rows.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: formats are compared on images of one size; choose another mode")
    on_cpu = {"device": "cpu", "backend": "pillow", "max_rejects": "100%", "compress": "none"}
    config = BuildConfig(**{**config.model_dump(), **on_cpu})
    left_out = tuple(filter(None, (each.missing() for each in FORMATS)))
    formats = [each for each in FORMATS if each.missing() is None]
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        place = Path(name)
        stored = _built(src, config, _as_many_as_fit(images, config, place), place, say)
        for each in formats:
            if each not in (OURS, OURS_DEFLATED):
                (place / each.name).mkdir()
                say(f"storing {each.name}")
                each.write(stored, place / each.name)
            say(f"checking {each.name}")
            _require_equal(each, stored, place / each.name)
        stored_bytes = {each.name: _bytes_below(place / each.name) for each in formats}
        operations = []
        for count in _counts(len(stored)):
            few, plural = stored.first(count), "" if count == 1 else "s"
            written = _ways({each.name: _writing(each, few, place / "written") for each in formats})
            operations.append(Operation(f"write {count} image{plural}", count, in_turns(written, rounds, say)))
        for what, way in ((RANDOM, _at_random), (IN_ORDER, _in_order)):
            read = _ways({each.name: way(each, stored, place / each.name) for each in formats})
            operations.append(Operation(what, len(stored), in_turns(read, rounds, say)))
        try:
            loaded = _loading(loaders.Loading(place / "src", place / OURS.name, place, _BATCH_SIZE, workers=0))
        except BackendError as exc:
            left_out = (*left_out, f"DataLoader is left out ({exc})")
        else:
            operations.append(Operation(LOADER, len(stored), in_turns(loaded, rounds, say)))
    settings = {
        "images": len(stored),
        "shape": list(stored.rows.shape[1:]),
        "dtype": config.dtype,
        "image_bytes": stored.rows[0].nbytes,
        "shard_rows": stored.shard_rows,
    }
    libraries = {each.library: version(each.library) for each in formats if each.library}
    return StorageMeasurement(tuple(operations), stored_bytes, left_out, settings, machine({**versions(), **libraries}))


def cifar_files(cifar: Cifar, place: Path, images: int) -> Path:
    """Writes the first images of CIFAR to class folders, as PNG files for `measure`; returns `place`."""
    for number, (pixels, label) in enumerate(zip(cifar.pixels[:images], cifar.labels.tolist(), strict=False)):
        folder = place / f"{label:03}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:08}.png")
    return place


def _built(
    src: str | os.PathLike[str], config: BuildConfig, images: int, place: Path, say: Callable[[str], None]
) -> Images:
    """Builds our two formats, and returns the images that they contain."""
    values = table(config)
    if values is None or config.bit_depth != 8:
        raise UsageError(
            f"bit_depth {config.bit_depth}, normalize {config.normalize}: the PNG files that are compared hold the "
            "8-bit levels behind the values; choose 8, and a normalization that does not go by each image's own"
        )
    source = linked(src, place / "src", images)
    for ours, compress in ((OURS, "none"), (OURS_DEFLATED, "deflate")):
        say(f"building {ours.name}")
        build(source, place / ours.name, BuildConfig(**{**config.model_dump(), "compress": compress}))
    dataset = open_dataset(place / OURS.name)
    if not len(dataset):
        raise SourceError(f"{os.fspath(src)!r}: no image of it can be decoded; gpu-npz build says why, file by file")
    rows = np.array(dataset[:])
    pixels = levels(values, rows, config.layout)
    if config.layout == "NCHW":
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return Images(rows, pixels, config, config.for_items(len(rows)).shard_rows(rows[0].nbytes))


def _as_many_as_fit(images: int, config: BuildConfig, place: Path) -> int:
    """How many images fit on the disk in all formats and, at the same time, in the page cache; at most `images`."""
    assert config.size is not None
    image_bytes = int(np.prod(row_shape(config, *config.size))) * np.dtype(config.dtype).itemsize * _COPIES
    free_bytes, _ = free_space(os.fspath(place))
    rooms = {"memory": available_memory(), f"the disk of {os.fspath(place.parent)!r}": free_bytes}
    for what, room in rooms.items():
        if room is None or images * image_bytes <= room * _MEMORY_SHARE:
            continue
        fit = int(room * _MEMORY_SHARE) // image_bytes
        needs = (
            f"{images} images in all formats take {format_bytes(images * image_bytes)}, and {what} has "
            f"{format_bytes(room)}"
        )
        if not fit:
            raise UsageError(f"{needs}: not one fits; choose a smaller --size, or --folder")
        log.warning("%s: %d are taken; --dtype uint8 or a smaller --size lets more fit", needs, fit)
        images = fit
    return images


def _counts(images: int) -> list[int]:
    """1, 10, 100 and so on, and finally `images`."""
    return [*itertools.takewhile(lambda count: 2 * count <= images, (10**power for power in range(9))), images]


def _ways(ways: Mapping[str, Way]) -> dict[str, tuple[tuple[str, ...], Way]]:
    return {name: (_baseline(name), way) for name, way in ways.items()}


def _baseline(name: str) -> tuple[str, ...]:
    """The name of our format of the same kind; empty for our own formats."""
    if name in (OURS.name, OURS_DEFLATED.name):
        return ()
    compressed = next(each.compressed for each in FORMATS if each.name == name)
    return (OURS_DEFLATED.name if compressed else OURS.name,)


def _writing(each: Format, images: Images, place: Path) -> Way:
    """Writes a new store of these images, or several if it is small. Deleting older stores first is not timed."""

    def way(tick: Tick) -> None:
        shutil.rmtree(place, ignore_errors=True)
        stores = [place / str(number) for number in range(max(1, _WRITES // len(images)))]
        for store in stores:
            store.mkdir(parents=True)
        tick(0)
        for store in stores:
            each.write(images, store)
        tick(len(images) * len(stores))

    return way


def _at_random(each: Format, images: Images, place: Path) -> Way:
    """Reads random rows, with a fixed seed, for at most a second; opening the store and the first row are not timed."""
    numbers = np.random.default_rng(0).integers(len(images), size=_READS).tolist()

    def way(tick: Tick) -> None:
        with each.reading(images, place) as reader:
            reader.row(numbers[0])
            tick(1)
            done, end = 0, time.perf_counter() + _READS_S
            for number in numbers:
                reader.row(number)
                done += 1
                if time.perf_counter() > end:
                    break
            tick(done)

    return way


def _in_order(each: Format, images: Images, place: Path) -> Way:
    """Reads an epoch, including opening the store."""

    def way(tick: Tick) -> None:
        with each.reading(images, place) as reader:
            tick(sum(1 for _ in reader.in_order()))

    return way


def _loading(loading: loaders.Loading) -> dict[str, tuple[tuple[str, ...], Way]]:
    """Epochs of PyTorch's DataLoader, in this process, over image files and over our shards."""

    def way(epochs: loaders.Epochs) -> Way:
        def load(tick: Tick) -> None:
            for images, _ in epochs(0):
                tick(len(images))

        return load

    files, ours = loaders.image_files(loading), loaders.shard_dataset(loading)
    return {"image files": ((OURS.name,), way(files)), OURS.name: ((), way(ours))}


def _require_equal(each: Format, images: Images, place: Path) -> None:
    """Raises FormatError if a format does not return every row bit for bit, in order and one by one."""
    with each.reading(images, place) as reader:
        found = 0
        for number, row in enumerate(reader.in_order()):
            found += _same(row, images.rows[number])
        last = len(images) - 1
        if found != len(images) or not _same(reader.row(last), images.rows[last]):
            raise FormatError(
                f"{each.name}: {len(images) - found} of {len(images)} rows came back changed or not at all"
            )


def _same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _bytes_below(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
