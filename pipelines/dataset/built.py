"""A finished dataset as a source of images: its stored pixels, for another size, dtype, normalization or order."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..errors import FormatError, SourceError, StorageError, UsageError
from ..npz.reader import NpzReader
from ..preprocess.normalize import apply_table, levels, table
from ..sources import open_source, require_settings
from ..sources.access.files import GROUP_ITEMS, place_of
from ..sources.arrays.netpbm import encoded
from ..sources.base import Group, Item, Source, as_bytes, location_of, numbered
from ..sources.rejects import BadItem
from ..storage import open_storage
from ..storage.base import is_remote
from .identity import index_comment, shard_comment
from .layout import INDEX, JOB, MANIFEST, refuse_several, shard_name
from .manifest import Manifest, shard_table_digest
from .records import open_npz
from .space import format_bytes

log = logging.getLogger(__name__)
_OPEN_SHARDS = 8
_REPAIR = "repair the dataset: gpu-npz verify --repair"
KIND = "dataset"


def open_images(
    src: str | os.PathLike[str], config: BuildConfig | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Opens SRC as `open_source` does, or as a `DatasetSource` if it is a dataset of gpu-npz on a disk.

    Raises:
        SourceError, UsageError: as `open_source` and `DatasetSource`.
        IncompleteError, FormatError: the dataset is not finished, or is damaged.
    """
    config, location = config or BuildConfig(), location_of(src)
    if config.source == KIND or (config.source == "auto" and _is_built(location)):
        require_settings(config, KIND, location)
        return DatasetSource(location, config, classes)
    return open_source(src, config, classes)


def _is_built(location: str) -> bool:
    """Whether a folder is a dataset, or holds those of a split. Other tools write a dataset.json, too."""

    def begun(folder: str) -> bool:
        there = [os.path.isfile(os.path.join(folder, name)) for name in (JOB, MANIFEST, INDEX)]
        return there[0] or all(there[1:])

    return not is_remote(location) and (begun(location) or begun(os.path.join(location, "train")))


class DatasetSource(Source):
    """The rows of a finished dataset on a disk, without the zero rows of `--on-reject blank`.

    An image is its stored pixels, 8 or 16 bits a channel. Of a dataset that stores floats, it is the pixels that they
    were made from, which is exact: each level has a value of its own. Where several levels have the same value, or the
    values depend on the image, the dataset is refused. Paths, labels and classes are those of the dataset.

    An item's place: the numbers of the shard and of the row in it.

    Args:
        location: the dataset's folder.
        config: of its settings, `labels` may be None or "none".
        classes: the names of classes by number, if they are to be numbered in another way.

    Raises:
        SourceError: the pixels cannot be recovered, or the dataset has other classes than `classes`.
        UsageError: the settings contradict each other.
        StorageError: the dataset is not on a disk.
        IncompleteError, FormatError: it is not finished, or is damaged.
    """

    kind = KIND

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        if is_remote(location):
            raise StorageError(f"{location!r}: a dataset is read from a disk; copy it first, and give the copy as SRC")
        if config.labels not in (None, "none"):
            raise UsageError(f"--labels {config.labels}: {location!r} is a dataset; its own labels, or none, are used")
        self._storage = open_storage(location)
        self.location = self._storage.root
        refuse_several(self._storage)
        self._manifest = manifest = Manifest.load(self.location)
        self._table = _invertible(manifest, self.location)
        index = open_npz(self._storage, INDEX)
        if (
            index.directory.comment != index_comment(manifest.id)
            or shard_table_digest(index) != manifest.shard_table_digest
        ):
            raise FormatError(f"{INDEX} is of another dataset; run gpu-npz verify", self.location)
        self._digests = [bytes(digest).hex() for digest in index["shard_digest"]]
        rows, sizes = index["shard_rows"].tolist(), index["shard_bytes"].tolist()
        self.files = tuple((shard_name(shard, len(rows)), size) for shard, size in enumerate(sizes))
        self._rows: list[int] = rows
        self._sound: set[int] = set()  # the shards whose content was compared with their CRC-32
        self._labelled = config.labels != "none" and manifest.labelled
        self._renumbered: NDArray[np.int64] | None = None
        if self._labelled:
            self.class_names, self.columns = manifest.classes, manifest.columns
            self._renumber(classes)
        elif classes is not None:
            raise SourceError(f"{self.location!r} has no labels; omit --classes-from")
        self._reset()

    def _renumber(self, classes: Sequence[str] | None) -> None:
        if classes is None:
            return
        if self.class_names is None:
            raise UsageError(
                f"--classes-from numbers classes, and {self.location!r} has {', '.join(map(str, self.columns))}; "
                "omit it"
            )
        numbers = numbered(list(classes), list(self.class_names), self.location)
        self._renumbered = np.array([numbers[name] for name in self.class_names], np.int64)
        self.class_names = tuple(classes)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, NpzReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def groups(self) -> Iterator[Group]:
        """The rows in their order. Raises FormatError or SourceError if a shard is missing or damaged."""
        for shard, count in enumerate(self._rows):
            try:
                reader = self._shard(shard)
            except OSError as exc:
                raise SourceError(f"{self._name(shard)!r}: {exc.strerror}; {_REPAIR}") from exc
            valid = reader.get("valid")
            kept = np.arange(count) if valid is None else np.flatnonzero(valid)
            for start in range(0, len(kept), GROUP_ITEMS):
                rows = kept[start : start + GROUP_ITEMS].astype(np.int64)
                labels = reader["labels"][rows] if self._labelled else None
                if labels is not None and self._renumbered is not None:
                    if labels.min() < 0 or labels.max() >= len(self._renumbered):
                        raise FormatError("it has labels without a class; run gpu-npz verify", reader.path)
                    labels = self._renumbered[labels]
                paths = [as_bytes(path) for path in reader["paths"][rows].tolist()]
                yield Group(b"", paths, labels=labels, places=np.stack([np.full_like(rows, shard), rows], axis=1))

    def read(self, item: Item) -> bytes:
        """The stored pixels as PGM or PPM, of 8 or 16 bits.

        Raises:
            BadItem: there is no such row.
            OSError: the shard cannot be read, or is damaged.
        """
        shard, row = place_of(item, 2)
        if not (0 <= shard < len(self._rows) and 0 <= row < self._rows[shard]):
            raise BadItem("read", "missing", "the dataset has no such row")
        try:
            stored = self._shard(shard).rows("images")[row]
        except FileNotFoundError as exc:
            raise OSError(errno.EIO, f"{self._name(shard)} is missing") from exc
        except FormatError as exc:
            raise OSError(errno.EIO, f"{exc}; {_REPAIR}") from exc
        pixels, images = stored, self._manifest.images
        if self._table is not None:
            pixels = levels(self._table, stored, images.layout)
            if not np.array_equal(apply_table(self._table, pixels, images.layout), stored):
                raise OSError(errno.EIO, f"{self._name(shard)}: row {row} has values that no pixel has; run verify")
        pixels = pixels.transpose(1, 2, 0) if images.layout == "NCHW" else pixels
        return encoded(pixels[..., ::-1] if images.channels == "bgr" else pixels)

    def check(self) -> None:
        """Raises SourceError if the dataset is gone."""
        if self._storage.size(MANIFEST) is None:
            raise SourceError(f"{self.location!r} is missing; restore it, then run the same command to resume")

    def require_sound(self, places: NDArray[np.int64]) -> None:
        """Compares the shards of these items with their CRC-32, once each.

        Args:
            places: of items, (N, 2).

        Raises:
            SourceError: a shard is damaged, or cannot be read.
        """
        shards = [shard for shard in np.unique(places[:, 0]).tolist() if shard not in self._sound]
        if shards:
            size = format_bytes(sum(self.files[shard][1] for shard in shards))
            log.info("comparing %s of shards of %s with their CRC-32", size, self.location)
        for shard in shards:
            try:
                reader = self._shard(shard)
                damaged = [name for name in reader.directory.members if not reader.crc_matches(name)]
            except (FormatError, OSError) as exc:
                raise SourceError(f"{self._name(shard)!r}: {exc}; {_REPAIR}") from exc
            if damaged:
                raise SourceError(
                    f"{self._name(shard)!r}: the CRC-32 of {', '.join(damaged)} does not match; {_REPAIR}"
                )
            self._sound.add(shard)

    def _name(self, shard: int) -> str:
        return self._storage.path(self.files[shard][0])

    def _shard(self, shard: int) -> NpzReader:
        """A shard. Raises FormatError if it is damaged or of another dataset, OSError if it cannot be opened."""
        with self._lock:
            if shard not in self._open:
                reader, images = open_npz(self._storage, self.files[shard][0]), self._manifest.images
                stored = reader.rows("images")
                shape = (self._rows[shard], *images.shape)
                found = (reader.directory.comment, reader.directory.digest, stored.shape, stored.dtype.name)
                wanted = (shard_comment(self._manifest.id, shard), self._digests[shard], shape, images.dtype)
                if found != wanted:
                    raise FormatError(f"it is not shard {shard} of this dataset; copy it again", reader.path)
                if len(self._open) >= _OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[shard] = reader
            return self._open[shard]


def _invertible(manifest: Manifest, location: str) -> NDArray[Any] | None:
    """The value of each level in a dataset of floats; None for a dataset of pixels. See `preprocess.normalize.table`.

    Raises:
        SourceError: pixels cannot be recovered from the values.
    """
    config = manifest.config
    if manifest.images.dtype == config.pixel_dtype:
        return None
    values = table(config)
    why = f"its values depend on each image (--normalize {config.normalize})"
    if values is not None:
        if all(len(np.unique(row)) == len(row) for row in values):
            return values
        why = f"{config.max_level + 1} levels do not have {config.max_level + 1} values in it"
        why += f" (--normalize {config.normalize}, {manifest.images.dtype})"
    raise SourceError(
        f"{location!r} stores {manifest.images.dtype}, and its pixels cannot be recovered exactly: {why}. Build from "
        f"the images that it was made of; a dataset with --dtype {config.pixel_dtype} keeps pixels"
    )
