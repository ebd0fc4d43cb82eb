"""CIFAR-10 and CIFAR-100 in the Python version, pickled by Python 2 (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ...storage.base import is_remote
from ..access.files import Files, place_of, read_piece
from ..base import Group, Item, as_text
from ..labels import LabelledSource, Listing, array_labels
from . import pickles
from .netpbm import encoded

SIDE = 32
ROW_BYTES = 3 * SIDE * SIDE
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "batches.meta": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "meta": {"train": ("train",), "test": ("test",)},
}
_MAX_BYTES = 1 << 30  # the largest original file has 155 MB


@dataclass(frozen=True)
class Cifar:
    """One part, train or test, of a collection.

    Attributes:
        pixels: uint8 (N, 32, 32, 3), RGB.
        labels: int64 (N,); for CIFAR-100, the fine labels.
        class_names: by label.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class CifarBatch:
    """One file.

    Attributes:
        name: of the file.
        data: pixels of N images, uint8 in the layout (N, 3, 32, 32): N * 3072 bytes.
        offset: of `data` in the file; -1 if the file does not contain it in one piece.
        labels: int64 (N,).
    """

    name: str
    data: bytes
    offset: int
    labels: NDArray[np.int64]


def parts(folder: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The file names of each part, train and test, of the collection in a folder.

    Raises:
        SourceError: it is neither CIFAR-10 nor CIFAR-100.
    """
    return _PARTS[_meta(folder).name]


def read_cifar(folder: str | os.PathLike[str], part: Literal["train", "test"] = "train") -> Cifar:
    """Reads CIFAR-10 (data_batch_1 to 5, test_batch, batches.meta) or CIFAR-100 (train, test, meta).

    Args:
        folder: what cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to.
        part: the images to read.

    Raises:
        SourceError: a file is missing, damaged, or contains anything but arrays, numbers and names.
    """
    names = class_names(folder)
    found = [read_batch(folder, file, len(names)) for file in parts(folder)[part]]
    pixels = np.concatenate([channels_last(batch.data) for batch in found])
    return Cifar(pixels, np.concatenate([batch.labels for batch in found]), names)


def class_names(folder: str | os.PathLike[str], *, coarse: bool = False) -> tuple[str, ...]:
    """The names of classes by label; for CIFAR-100, the fine or coarse ones. Raises SourceError as `read_cifar`."""
    meta = _meta(folder)
    key = "label_names" if meta.name == "batches.meta" else f"{_level(coarse)}_label_names"
    names = _list(meta, _load(meta, _bytes(meta)), key)
    if not names or not all(isinstance(name, (bytes, str)) for name in names):
        raise _damaged(meta, f"{key} is not a list of names")
    return tuple(_text(name) for name in names)


def read_batch(folder: str | os.PathLike[str], name: str, classes: int, *, coarse: bool = False) -> CifarBatch:
    """Reads one file of a collection that has `classes` classes. Raises SourceError as `read_cifar`."""
    path = Path(folder, name)
    key = "labels" if _meta(folder).name == "batches.meta" else f"{_level(coarse)}_labels"
    raw = _bytes(path)
    found = _load(path, raw)
    array, labels = found.get("data"), _list(path, found, key)
    if not isinstance(array, pickles.Array):
        raise _damaged(path, "data is not an array")
    try:
        data = array.data(ROW_BYTES)
    except ValueError as exc:
        raise _damaged(path, str(exc)) from exc
    rows = len(data) // ROW_BYTES
    if len(labels) != rows or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _damaged(path, f"{key} is not a list of {rows} numbers from 0 to {classes - 1}")
    return CifarBatch(name, data, raw.find(data), np.array(labels, np.int64))


def channels_last(data: bytes) -> NDArray[np.uint8]:
    """`CifarBatch.data`, or the part of some images, as uint8 (N, 32, 32, 3), RGB."""
    planes = np.frombuffer(data, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _level(coarse: bool) -> str:
    return "coarse" if coarse else "fine"


def _meta(folder: str | os.PathLike[str]) -> Path:
    found = next((Path(folder, name) for name in _PARTS if Path(folder, name).exists()), None)
    if found is None:
        raise SourceError(
            f"{os.fspath(folder)!r} has neither batches.meta (CIFAR-10) nor meta (CIFAR-100); give the folder that "
            "cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to"
        )
    return found


def _list(path: Path, found: dict[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list):
        raise _damaged(path, f"it has no list {key!r}")
    return value


def _text(name: bytes | str) -> str:
    return as_text(name) if isinstance(name, bytes) else name


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(
        f"{os.fspath(path)!r}: {what}; not a file of the Python version of CIFAR; unpack the archive again"
    )


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise SourceError(f"{os.fspath(path)!r}: {exc.strerror}; unpack the archive again") from exc
    if len(data) > _MAX_BYTES:
        raise _damaged(path, f"it has more than {_MAX_BYTES} bytes")
    return data


def _load(path: Path, data: bytes) -> dict[str, Any]:
    """The dictionary that a file contains, with its keys as text."""
    try:
        found = pickles.load(data)
    except ValueError as exc:
        raise _damaged(path, f"not a readable pickle ({exc})") from exc
    if not isinstance(found, dict) or not all(isinstance(key, (bytes, str)) for key in found):
        raise _damaged(path, "it does not contain a dictionary whose keys are names")
    return {_text(key): value for key, value in found.items()}


@dataclass(frozen=True)
class _CifarListing(Listing):
    """Also holds the name, the offset of the pixels, and the number of images of each file."""

    files: list[tuple[str, int, int]]


class CifarSource(LabelledSource[_CifarListing]):
    """CIFAR-10 or CIFAR-100, unpacked from the Python archive: its folder for the training images, or one of its files.

    `cifar-10-batches-py` stands for data_batch_1 to 5, `cifar-10-batches-py/test_batch` for the test images; likewise
    `cifar-100-python` and `cifar-100-python/test`. `--labels` is `coarse` for the 20 classes of CIFAR-100, or `none`.

    Items are named `data_batch_1/00000` and so on. An item's place: the number of the file and the offset of its
    pixels.

    Raises:
        SourceError: it is neither; or a file is missing, damaged, or does not contain its pixels in one piece.
        UsageError: `--labels` has a form of other sources.
    """

    kind = "cifar"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        if is_remote(location):
            raise SourceError(f"{location!r}: CIFAR is read from a local folder; download and unpack it")
        self.location = os.path.abspath(location)
        folder, name = (self.location, "") if os.path.isdir(self.location) else os.path.split(self.location)
        collection = parts(folder)
        known = [file for files in collection.values() for file in files]
        if name and name not in known:
            raise SourceError(
                f"{location!r} is not a CIFAR file with images; give the folder, or one of {', '.join(known)} in it"
            )
        allowed = ("coarse", "none") if "train" in known else ("none",)
        if config.labels not in (None, *allowed):
            raise UsageError(
                f"--labels {config.labels}: {location!r} has {' or '.join(allowed)}, or its own where it is left out"
            )
        self._folder, self._asked, self._classes = folder, config.labels, classes
        self._names = (name,) if name else collection["train"]
        # For the folder of CIFAR-100, only `train`. The pattern finds files in the order of `parts`.
        self._files = Files(self.location, "data_batch_[1-5]" if len(self._names) > 1 else "train")
        self.files = self._files.stamps
        self._take_labels()

    def _list(self) -> _CifarListing:
        coarse = self._asked == "coarse"
        names = class_names(self._folder, coarse=coarse)
        files, labels = [], []
        for file in self._names:
            batch = read_batch(self._folder, file, len(names), coarse=coarse)
            if not len(batch.labels) or batch.offset < 0:
                what = "has no images" if not len(batch.labels) else "does not have its pixels as one piece"
                raise SourceError(f"{os.path.join(self._folder, file)!r} {what}; unpack the original archive again")
            files.append((file, batch.offset, len(batch.labels)))
            labels.append(batch.labels)
        if self._asked == "none":
            return _CifarListing(None, files)
        return _CifarListing(
            array_labels("labels", np.concatenate(labels), self.location, self._classes, names=names), files
        )

    def groups(self) -> Iterator[Group]:
        """The images, one group per file. Raises SourceError as the constructor, or if the classes have changed."""
        listing, done = self._listed(), 0
        for number, (file, offset, count) in enumerate(listing.files):
            offsets = offset + ROW_BYTES * np.arange(count, dtype=np.int64)
            yield Group(
                os.fsencode(file) + b"/",
                [b"%05d" % row for row in range(count)],
                labels=None if listing.labels is None else listing.labels.values[done : done + count],
                places=np.stack([np.full(count, number, np.int64), offsets], axis=1),
            )
            done += count

    def read(self, item: Item) -> bytes:
        """The image as a PPM, 32 x 32. Raises OSError or BadItem as `read_piece`."""
        number, offset = place_of(item, 2)
        return encoded(channels_last(read_piece(self._files, number, offset, ROW_BYTES))[0])

    def check(self) -> None:
        """Raises SourceError if a file is gone or no longer readable."""
        self._files.check()
