"""File formats in which people store images, one small class per format. Their libraries are imported on first use.

All of them write so that the data is on the disk when `write` returns, and read so that each row is a copy.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import DEFLATE_LEVEL, BuildConfig
from ..dataset.layout import shard_name
from ..npz.writer import NpzWriter
from ..preprocess.normalize import NumpyNormalizer
from ..readers.dataset import open_dataset

Array = NDArray[Any]
_BATCH_ROWS = 32
_PNG_LEVEL = _GZIP_LEVEL = 1
_LMDB_SLACK_BYTES = 1 << 24


@dataclass(frozen=True)
class Images:
    """The images to store.

    Attributes:
        rows: (N, C, H, W) or (N, H, W, C), as a build stores them.
        pixels: the same images before normalization, uint8 (N, H, W, 3), R,G,B.
        config: the settings that turn the pixels into the rows.
        shard_rows: the number of rows in a shard, for formats that have shards.
    """

    rows: Array
    pixels: NDArray[np.uint8]
    config: BuildConfig
    shard_rows: int

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> Images:
        """Views of the first `count` images."""
        return Images(self.rows[:count], self.pixels[:count], self.config, self.shard_rows)

    def shards(self) -> Iterator[tuple[int, Array]]:
        """The number and the rows of each shard."""
        for number, start in enumerate(range(0, len(self), self.shard_rows)):
            yield number, self.rows[start : start + self.shard_rows]


@dataclass(frozen=True)
class Reader:
    """Reads one row by its number, or all rows in order; each row is a copy."""

    row: Callable[[int], Array]
    in_order: Callable[[], Iterator[Array]]

    @classmethod
    def by_rows(cls, count: int, row: Callable[[int], Array]) -> Reader:
        """A reader that reads all rows in order by calling `row` for each."""
        return cls(row, lambda: map(row, range(count)))


class Format(abc.ABC):
    """One way to store images.

    Attributes:
        name: the name in the results.
        compressed: whether rows are compressed; such formats are compared with deflated shards.
        library: the library that it needs; None if it needs none.
    """

    name: str
    compressed = False
    library: str | None = None

    @abc.abstractmethod
    def write(self, images: Images, place: Path) -> None:
        """Stores the images in the empty folder `place`."""

    @abc.abstractmethod
    def reading(self, images: Images, place: Path) -> AbstractContextManager[Reader]:
        """Opens the images that were stored in `place`."""

    def missing(self) -> str | None:
        """The missing library and how to install it; None if nothing is missing."""
        if self.library is None:
            return None
        try:
            importlib.import_module(self.library)
        except ImportError as exc:
            return f"{self.name} is left out ({exc}); run: pip install {self.library}"
        return None


class Png(Format):
    """One file per image. It contains the pixels, which are normalized when they are read."""

    name = "png files"
    compressed = True

    def write(self, images: Images, place: Path) -> None:
        for number, pixels in enumerate(images.pixels):
            path = place / f"{number:08}.png"
            Image.fromarray(pixels).save(path, compress_level=_PNG_LEVEL)
            _flush(path)

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        normalizer, first = NumpyNormalizer(images.config), np.zeros(1, np.int64)
        shape, dtype = images.rows.shape[1:], images.rows.dtype

        def row(number: int) -> Array:
            with Image.open(place / f"{number:08}.png") as image:
                pixels = np.asarray(image)
            out = np.empty((1, *shape), dtype)
            normalizer.apply(pixels[None], first, out)
            found: Array = out[0]
            return found

        yield Reader.by_rows(len(images), row)


class Lmdb(Format):
    """One key per row; its value is the raw bytes."""

    name = "lmdb"
    library = "lmdb"

    def write(self, images: Images, place: Path) -> None:
        import lmdb

        page_bytes = 4096
        need = images.rows.nbytes + 2 * page_bytes * len(images) + _LMDB_SLACK_BYTES
        size = -(-need // page_bytes) * page_bytes
        with lmdb.open(os.fspath(place), map_size=size) as store, store.begin(write=True) as transaction:
            for number, row in enumerate(images.rows):
                transaction.put(_key(number), np.ascontiguousarray(row).data.cast("B"), append=True)

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        import lmdb

        shape, dtype = images.rows.shape[1:], images.rows.dtype

        def copied(value: Any) -> Array:
            row: Array = np.frombuffer(value, dtype).reshape(shape).copy()
            return row

        with (
            lmdb.open(os.fspath(place), readonly=True, lock=False) as store,
            store.begin(buffers=True) as transaction,
        ):
            yield Reader(
                lambda number: copied(transaction.get(_key(number))),
                lambda: map(copied, transaction.cursor().iternext(keys=False, values=True)),
            )


class Hdf5(Format):
    """One array, with one chunk per row."""

    name = "hdf5"
    library = "h5py"
    _options: dict[str, Any] = {}  # noqa: RUF012  # read only

    def write(self, images: Images, place: Path) -> None:
        import h5py

        path = place / "images.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=images.rows, chunks=(1, *images.rows.shape[1:]), **self._options)
        _flush(path)

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        import h5py

        # Without a cache of chunks, which could keep all rows of a small set decompressed.
        with h5py.File(place / "images.h5", "r", rdcc_nbytes=0) as file:
            yield Reader.by_rows(len(images), file["images"].__getitem__)


class Hdf5Gzip(Hdf5):
    """As `Hdf5`, with compressed chunks."""

    name = "hdf5 gzip"
    compressed = True
    _options = {"compression": "gzip", "compression_opts": _GZIP_LEVEL}  # noqa: RUF012  # read only


class Npy(Format):
    """One array, which is read through a memory map."""

    name = "npy"

    def write(self, images: Images, place: Path) -> None:
        np.save(place / "images.npy", images.rows)
        _flush(place / "images.npy")

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        # A plain array, because indexing an np.memmap is slow.
        stored = np.load(place / "images.npy", mmap_mode="r").view(np.ndarray)
        yield Reader.by_rows(len(images), lambda number: np.array(stored[number]))


class Npz(Format):
    """`numpy.savez`, with one file per shard; for each row, `numpy.load` reads the whole file."""

    name = "npz"

    def write(self, images: Images, place: Path) -> None:
        save = np.savez_compressed if self.compressed else np.savez
        for number, rows in images.shards():
            save(place / f"{number}.npz", images=rows)
            _flush(place / f"{number}.npz")

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        def loaded(shard: int) -> Array:
            with np.load(place / f"{shard}.npz") as file:
                found: Array = file["images"]
                return found

        def row(number: int) -> Array:
            shard, at = divmod(number, images.shard_rows)
            return np.array(loaded(shard)[at])

        def in_order() -> Iterator[Array]:
            for shard, _ in images.shards():
                yield from map(np.array, loaded(shard))

        yield Reader(row, in_order)


class NpzCompressed(Npz):
    """As `Npz`, with `numpy.savez_compressed`."""

    name = "npz compressed"
    compressed = True


class Shards(Format):
    """Shards of this package, read as a dataset that a build has made."""

    name = "gpu-npz"
    _deflate_level: int | None = None

    def write(self, images: Images, place: Path) -> None:
        count = -(-len(images) // images.shard_rows)
        for number, rows in images.shards():
            with NpzWriter(place / os.path.basename(shard_name(number, count))) as file:
                file.begin("images", rows.dtype, rows.shape[1:], deflate_level=self._deflate_level)
                for start in range(0, len(rows), _BATCH_ROWS):
                    file.append(rows[start : start + _BATCH_ROWS])
                file.close()

    @contextlib.contextmanager
    def reading(self, images: Images, place: Path) -> Iterator[Reader]:
        stored = open_dataset(place)
        if self.compressed:  # each row is decompressed into an array of its own
            yield Reader(stored.__getitem__, stored.__iter__)
        else:
            yield Reader(lambda number: np.array(stored[number]), lambda: map(np.array, stored))


class DeflatedShards(Shards):
    """As `Shards`, with `--compress deflate`."""

    name = "gpu-npz deflate"
    compressed = True
    _deflate_level = DEFLATE_LEVEL


OURS, OURS_DEFLATED = Shards(), DeflatedShards()
FORMATS: tuple[Format, ...] = (
    Png(), Lmdb(), Hdf5(), Hdf5Gzip(), Npy(), Npz(), NpzCompressed(), OURS, OURS_DEFLATED
)  # fmt: skip


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
