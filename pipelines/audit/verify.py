"""Checks that a dataset matches its manifest: checksums, shapes, value ranges and counts."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.identity import dataset_id
from ..dataset.layout import INDEX, MANIFEST, REJECTS, shard_files, shard_name
from ..dataset.manifest import Manifest, reject_of, shard_table_digest
from ..errors import FormatError, UsageError
from ..machine.environment import usable_cpus
from ..npz.reader import NpzReader
from ..preprocess.normalize import row_shape, statistics, table, value_range
from ..readers.dataset import column_fault, open_index, open_shard
from ..sources.base import LabelColumn
from ..storage import open_storage
from ..storage.base import Storage, is_remote

_ROWS_AT_ONCE = 64
_FETCHED_SHARDS = 4  # shards of an object store that are on the local disk at the same time
_MISSING_SHARDS = 100_000  # do not look for more than this one by one: the manifest that names them is damaged


@dataclass(frozen=True)
class Problem:
    """A problem found in a dataset.

    Attributes:
        file: the file's name within the dataset.
        what: a description of the problem.
    """

    file: str
    what: str


@dataclass(frozen=True)
class Verification:
    """The result of verifying a dataset.

    Attributes:
        path: the dataset's folder or URL.
        shards: the number of shards in the manifest.
        rows: the number of rows in the manifest.
        bytes: the total size of the shards that were read, in bytes.
        problems: the problems found; empty if the dataset is intact.
    """

    path: str
    shards: int
    rows: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {**asdict(self), "ok": self.ok}


def verify(path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Reads a whole dataset and compares it with its manifest and index.

    It checks every CRC-32; the position, dataset id, size and ZIP directory of each shard; shapes and dtypes; that
    values are finite and within the range that the settings allow; that labels are in range; and that each item of the
    plan is exactly one row or one reject.

    Args:
        path: the dataset's folder or URL.
        progress: called with the number of shards checked and the total number of shards.

    Raises:
        IncompleteError: the build has not finished.
        FormatError: the manifest is missing, cannot be read or contradicts itself.
    """
    storage = open_storage(path)
    manifest = Manifest.load(storage.root)
    _require_consistent(manifest, storage.path(MANIFEST))
    shards = manifest.counts.shards
    problems: list[Problem] = []
    index: NpzReader | None
    try:
        index = open_index(storage, manifest)
        problems += [Problem(INDEX, what) for what in _index_faults(index, manifest)]
        if problems:
            index = None
    except FormatError as exc:
        index = None
        problems.append(Problem(INDEX, exc.problem))
    problems += [Problem(REJECTS, what) for what in _reject_faults(storage, manifest, index)]
    found = shard_files(storage)
    if index is None and shards > len(found) + _MISSING_SHARDS:
        raise FormatError(
            f"{storage.path(MANIFEST)}: it names {shards} shards, of which {len(found)} are here; damaged"
        )
    expected = {shard_name(shard, shards) for shard in range(shards)}
    problems += [Problem(name, "not a shard of this dataset; move it away") for name in found if name not in expected]
    checker = _ShardChecker(storage, manifest, index)
    with ThreadPoolExecutor(shards_at_once(storage)) as pool:
        for shard, faults in enumerate(pool.map(checker.faults, range(shards))):
            problems += [Problem(shard_name(shard, shards), what) for what in faults]
            if progress:
                progress(shard + 1, shards)
    return Verification(storage.root, shards, manifest.counts.rows, checker.bytes_checked, tuple(problems))


def shards_at_once(storage: Storage) -> int:
    """Returns how many shards to read concurrently when reading all of them."""
    return min(usable_cpus(), _FETCHED_SHARDS) if is_remote(storage.root) else usable_cpus()


class _ShardChecker:
    def __init__(self, storage: Storage, manifest: Manifest, index: NpzReader | None) -> None:
        self._storage = storage
        self._manifest = manifest
        self._index = index
        self._ends = np.cumsum(index["shard_rows"]) if index else None
        self._low, self._high = value_range(manifest.config, math.prod(manifest.images.shape))
        self.bytes_checked = 0

    def faults(self, shard: int) -> list[str]:
        try:
            reader = open_shard(self._storage, self._manifest, shard)
            self.bytes_checked += reader.directory.file_bytes
            damaged = [name for name in reader.directory.members if not reader.crc_matches(name)]
            if damaged:
                return [f"damaged: the CRC-32 of {name} does not match its data" for name in damaged]
            faults = list(self._column_faults(reader)) or list(self._value_faults(reader))
            return [*self._table_faults(reader, shard), *faults]
        except FormatError as exc:
            return [exc.problem]

    def _table_faults(self, reader: NpzReader, shard: int) -> Iterator[str]:
        """Compares a shard with its entries in the index and yields the differences."""
        if self._index is None or self._ends is None:
            return
        rows, size = int(self._index["shard_rows"][shard]), int(self._index["shard_bytes"][shard])
        if reader.directory.file_bytes != size:
            yield f"{reader.directory.file_bytes} bytes; the index says {size}"
        if reader.directory.digest != self._index["shard_digest"][shard].tobytes().hex():
            yield "its zip directory differs from the committed one: the file was replaced by another intact file"
        if len(reader.rows("images")) != rows:
            yield f"{len(reader.rows('images'))} rows; the index says {rows}"
            return
        span = slice(int(self._ends[shard]) - rows, int(self._ends[shard]))
        for name in ("index", "labels", "valid"):
            if (name in reader) != (name in self._index):
                yield f"{name} is {'there' if name in reader else 'missing'}, unlike in the index"
            elif name in reader and not np.array_equal(reader[name], self._index[name][span]):
                yield f"{name} differs from the index"

    def _column_faults(self, reader: NpzReader) -> Iterator[str]:
        more = {"labels": self._manifest.labelled, "valid": "valid" in reader}
        for name in ("index", "source_bytes", "paths", *(name for name, there in more.items() if there)):
            if fault := column_fault(reader, name, self._manifest):
                yield fault
            elif name == "labels" and len(reader[name]):
                yield from self._label_faults(reader[name].reshape(len(reader[name]), -1))

    def _label_faults(self, labels: NDArray[Any]) -> Iterator[str]:
        """Yields a message for each class column of `labels`, (N, K), that has values out of range."""
        columns = self._manifest.columns or (LabelColumn(name="", kind="class", classes=self._manifest.classes),)
        for column, values in zip(columns, labels.T, strict=True):
            if column.kind == "class" and (values.min() < 0 or values.max() >= len(column.classes or ())):
                of = f" of {column.name}" if column.name else ""
                yield f"labels{of} {values.min()} to {values.max()}; there are {len(column.classes or ())} classes"

    def _value_faults(self, reader: NpzReader) -> Iterator[str]:
        images, valid = reader.rows("images"), reader.get("valid")
        if images.dtype.kind == "u" and valid is None:
            return
        axis = 1 if self._manifest.images.layout == "NCHW" else 3
        for start in range(0, len(images), _ROWS_AT_ONCE):
            rows = images[start : start + _ROWS_AT_ONCE]
            if valid is not None:
                blank = ~valid[start : start + _ROWS_AT_ONCE]
                if rows[blank].any():
                    yield f"a blank row among rows {start} to {start + len(rows) - 1} is not zero"
                rows = rows[~blank]
            planes = np.moveaxis(rows, axis, 0)
            for channel, plane in enumerate(planes if rows.size else ()):
                low, high = float(plane.min()), float(plane.max())
                if not (self._low[channel] <= low and high <= self._high[channel]):  # also true if a value is NaN
                    yield (
                        f"channel {channel} of rows {start} to {start + len(rows) - 1} has values from {low:g} to "
                        f"{high:g}; the settings give {self._low[channel]:g} to {self._high[channel]:g}"
                    )


def _require_consistent(manifest: Manifest, label: str) -> None:
    """Checks the manifest for contradictions.

    Args:
        manifest: the manifest.
        label: the manifest's path, for error messages.

    Raises:
        FormatError: the manifest contradicts itself.
    """
    config = manifest.config
    try:
        table(config)
    except UsageError as exc:
        raise FormatError(f"{label}: settings: {exc}; the file is damaged") from exc
    images, settings = manifest.images, (config.dtype, config.layout, config.channels, config.compress != "none")
    size = config.size or images.size
    if (
        settings != (images.dtype, images.layout, images.channels, manifest.deflated)
        or row_shape(config, *size) != images.shape
    ):
        raise FormatError(f"{label}: {images!r} contradicts the settings; the file is damaged")
    found = statistics(config) or ((), ())
    said = manifest.normalization
    if said and [said.mean, said.std] != [tuple(map(float, numbers)) for numbers in found]:
        raise FormatError(f"{label}: {said!r} contradicts the settings; the file is damaged")
    counts, rejects = manifest.counts, sum(manifest.counts.rejects_by_code.values())
    rows = counts.items - (0 if config.on_reject == "blank" else rejects)
    shards = -(-counts.items // max(1, manifest.shard_items))
    if (counts.rows, counts.rejects, counts.shards) != (rows, rejects, shards):
        raise FormatError(
            f"{label}: {counts!r} contradicts itself or the {manifest.shard_items} items a shard; the file is damaged"
        )
    if manifest.id != dataset_id(manifest.settings, manifest.classes, manifest.columns, size, manifest.plan_digest):
        raise FormatError(f"{label}: its id is not that of these settings, classes and plan; the file was altered")


def _index_faults(index: NpzReader, manifest: Manifest) -> Iterator[str]:
    damaged = [name for name in index.directory.members if not index.crc_matches(name)]
    if damaged:
        yield f"damaged: the CRC-32 of {', '.join(damaged)} does not match"
        return
    counts = manifest.counts
    digests: NDArray[Any] = index["shard_digest"]
    if not len(index["shard_rows"]) == len(index["shard_bytes"]) == len(digests) == counts.shards:
        yield f"it does not have {counts.shards} shards, as the manifest says"
    elif shard_table_digest(index) != manifest.shard_table_digest:
        yield "its table of shards is not the manifest's: one of the two files belongs to another dataset"
    rows = index["index"]
    lengths = {len(index[name]) for name in ("index", "labels", "valid") if name in index}
    lengths.add(int(index["shard_rows"].sum()))
    if lengths != {counts.rows}:
        yield f"{' or '.join(map(str, sorted(lengths)))} rows; the manifest says {counts.rows}"
    if len(rows) and (rows[0] < 0 or rows[-1] >= counts.items or (np.diff(rows) <= 0).any()):
        yield f"the rows' places are not ascending within the plan's {counts.items} items"
    if manifest.labelled != ("labels" in index):
        yield "labels and the manifest's classes contradict each other"


def _reject_faults(storage: Storage, manifest: Manifest, index: NpzReader | None) -> Iterator[str]:
    content = storage.read(REJECTS)
    if content is None:
        yield "missing"
        return
    try:
        rejects = [reject_of(line) for line in content.splitlines()]
        places = np.array([reject.index for reject in rejects], np.int64)
    except (ValueError, OverflowError) as exc:
        yield f"not one reject per line: {exc}"
        return
    codes = Counter(reject.code for reject in rejects)
    if len(places) != manifest.counts.rejects:
        yield f"{len(places)} lines; the manifest says {manifest.counts.rejects}"
    elif codes != manifest.counts.rejects_by_code:
        yield f"codes {dict(sorted(codes.items()))}; the manifest says {manifest.counts.rejects_by_code}"
    elif hashlib.sha256(content).hexdigest() != manifest.rejects_digest:
        yield "its text was altered: the SHA-256 is not the manifest's"
    if index is None:
        return
    rows = index["index"] if "valid" not in index else index["index"][index["valid"]]
    places, items = np.sort(np.concatenate([rows, places])), manifest.counts.items
    wrong = np.flatnonzero(places != np.arange(len(places)))
    if len(wrong) or len(places) != items:
        item = min(wrong[0], places[wrong[0]]) if len(wrong) else min(len(places), items)
        yield f"item {item} of {items} in the plan does not have exactly one row or one reject"
