"""Whether rows are still what their source files give: some are decoded again and compared.

With the decoder versions that built a dataset, a row must come out bit for bit. Other versions may round otherwise, in
the inverse DCT, the upsampling of chroma or the resize (`parity.py` has the expectations): a mean of up to 1 level. The
tolerance is twice that; another image, size, crop or order of channels differs by tens of levels.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..dataset.layout import INDEX, MANIFEST, shard_name
from ..dataset.manifest import Manifest
from ..dataset.originals import Originals, originals
from ..errors import FormatError, UsageError
from ..machine.environment import choose, inspect
from ..machine.tuning import Tuning
from ..npz.reader import NpzReader
from ..preprocess.base import DecodedBatch, on_host
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..preprocess.normalize import NumpyNormalizer, Sums, image_table, levels, table
from ..readers.dataset import column_fault, open_index, open_shard
from ..sources.base import Batch
from ..storage import open_storage
from ..storage.base import Storage
from .verify import Problem

MEAN_LEVELS = 2.0  # tolerance between versions of a decoder, of the mean of one image, of 255 levels
_MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Comparison:
    """Rows beside their source files, decoded again; differences in levels, of 0 to 255, or 65535 in 16 bits.

    Attributes:
        rows: how many were compared.
        exact: whether they had to be equal bit for bit, since decoder and versions are those of the build.
        environments: decoders and versions that built the dataset.
        environment: those that decoded again.
        mean: the mean difference over all pixels that were compared.
        max: the largest difference.
        problems: rows that are not what their files give, files that have changed or cannot be decoded any more; of
            very many, the first.
    """

    rows: int
    exact: bool
    environments: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    mean: float
    max: int
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return asdict(self)


def compare(
    path: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    source: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Decodes the source files of some rows again, by the backend and the settings of the build, and compares.

    Where the build took a GPU and there is none, DALI's CPU operators decode, within the tolerance.

    Args:
        path: the dataset's folder, or its URL.
        count: how many rows, at random; all if there are fewer.
        seed: which ones.
        source: where the images are now, if not where they were when the build began.
        progress: called with rows done and rows in all.

    Raises:
        UsageError: `count` is less than 1.
        IncompleteError: the build has not ended.
        FormatError: the manifest or the index cannot be read.
        SourceError: the images are not there.
        BackendError: the build's backend cannot be used here.
    """
    if count < 1:
        raise UsageError(f"--deep: got {count}; give how many rows to decode again, at least 1")
    storage = open_storage(path)
    manifest = Manifest.load(storage.root)
    index = open_index(storage, manifest)
    found, config = originals(storage, manifest, source), manifest.config
    choice = choose(_settings_of(manifest, storage), inspect())
    height, width = manifest.images.size
    row_bytes = height * width * config.channel_count
    tuning = Tuning.of(BuildConfig(), choice, row_bytes=row_bytes, shard_rows=count, shards=1)
    rows = _rows(index, count, seed)
    seen = _Findings(manifest)
    geometry = Geometry.of(config, (height, width))
    with make_decoder(choice.backend, config, geometry, found.source, tuning=tuning, gpu=choice.gpu) as decoder:
        provenance = decoder.provenance()
        # On a GPU, which of DALI's decoders takes an image depends on its batch.
        known = {"resizer": None, **provenance}
        same = all(known.items() <= {"resizer": None, **made}.items() for made in manifest.environments)
        exact = same and (not choice.gpus or config.reproducible)
        waiting: deque[_BatchRows] = deque()
        done = 0
        for decoded in decoder.decode(
            _batches(storage, manifest, found, index, rows, tuning.batch_size, waiting, seen)
        ):
            seen.add(decoded, waiting.popleft(), exact=exact)
            done += len(decoded.batch.items)
            if progress:
                progress(done, len(rows))
    return Comparison(
        rows=seen.rows,
        exact=exact,
        environments=manifest.environments,
        environment=provenance,
        mean=seen.difference / max(1, seen.pixels),
        max=seen.largest,
        problems=seen.problems(),
    )


@dataclass(frozen=True)
class _BatchRows:
    """Where the rows of a batch are: their shard, and their places in it and in the dataset."""

    reader: NpzReader
    name: str
    places: list[int]
    rows: list[int]


class _Findings:
    """What the comparison has found so far."""

    def __init__(self, manifest: Manifest) -> None:
        self._config = manifest.config
        self._table = table(self._config)
        self._normalizer = NumpyNormalizer(self._config)
        self._problems: list[Problem] = []
        self._more = 0
        self.rows = self.difference = self.pixels = self.largest = 0

    def problem(self, file: str, what: str) -> None:
        if len(self._problems) < _MOST_PROBLEMS:
            self._problems.append(Problem(file, what))
        else:
            self._more += 1

    def problems(self) -> tuple[Problem, ...]:
        more = [Problem(MANIFEST, f"{self._more} more problems like these")] if self._more else []
        return (*self._problems, *more)

    def add(self, decoded: DecodedBatch, stored: _BatchRows, *, exact: bool) -> None:
        """Compares a batch with its rows."""
        rejects = {reject.index: reject for reject in decoded.rejects}
        pixels = on_host(decoded.pixels)
        for position, item in enumerate(decoded.batch.items):
            place, now = stored.places[position], int(decoded.source_bytes[position])
            before = int(stored.reader["source_bytes"][place])
            label = f"row {stored.rows[position]}, {item.path!r}"
            if item.index in rejects and now in (0, before):
                reject = rejects[item.index]
                self.problem(
                    stored.name, f"{label}: the source file gives no image now: {reject.code} ({reject.detail})"
                )
            elif now != before:
                self.problem(
                    stored.name, f"{label}: the source file has changed: {now} bytes, {before} when it was built"
                )
            elif what := self._fault(pixels[position], stored.reader.rows("images")[place], exact=exact):
                self.problem(stored.name, f"{label}: {what}")

    def _fault(self, pixels: NDArray[Any], stored: NDArray[Any], *, exact: bool) -> str | None:
        """What is wrong with a row."""
        expected = self._normalizer.allocate((1, *stored.shape))
        self._normalizer.apply(pixels[None], np.zeros(1, np.int64), expected)
        values = self._table
        if values is None:  # by the statistics of the image as it is decoded now
            values = np.tile(image_table(self._config, Sums.of(pixels)), (self._config.channel_count, 1))
        one, other = (levels(values, image, self._config.layout) for image in (expected[0], stored))
        difference = np.maximum(one, other) - np.minimum(one, other)
        mean, largest = float(difference.mean()), int(difference.max())
        self.rows += 1
        self.pixels += difference.size
        self.difference += int(difference.sum(dtype=np.int64))
        self.largest = max(self.largest, largest)
        if exact and expected.tobytes() != stored.tobytes():
            return f"not what its source file gives, bit for bit: mean {mean:.3f}, max {largest} levels"
        allowed = MEAN_LEVELS * self._config.max_level / 255
        if mean > allowed:
            return f"not what its source file gives: mean {mean:.3f}, max {largest} levels; allowed: mean {allowed}"
        return None


def _settings_of(manifest: Manifest, storage: Storage) -> BuildConfig:
    """Settings that ask for the backend of the build."""
    made = next(iter(manifest.environments), {})
    if made.get("backend") not in ("pillow", "dali"):
        raise FormatError(f"{storage.path(MANIFEST)}: it names no decoder that is known here; the file is damaged")
    return BuildConfig(
        backend=made["backend"],
        device="auto" if made.get("device") == "cuda" else "cpu",
        bit_depth=manifest.config.bit_depth,
    )


def _rows(index: NpzReader, count: int, seed: int) -> NDArray[np.int64]:
    """Rows at random, ascending; never blank ones, for which there is no image."""
    valid = index.get("valid")
    rows = np.arange(len(index["index"])) if valid is None else np.flatnonzero(valid)
    if count < len(rows):
        rows = rows[sorted(random.Random(seed).sample(range(len(rows)), count))]
    return rows


def _batches(
    storage: Storage,
    manifest: Manifest,
    found: Originals,
    index: NpzReader,
    rows: NDArray[np.int64],
    batch_size: int,
    waiting: deque[_BatchRows],
    seen: _Findings,
) -> Iterator[Batch]:
    """The items of the rows, shard by shard; where each batch is stored goes to `waiting`."""
    ends = np.cumsum(index["shard_rows"])
    numbers = np.searchsorted(ends, rows, side="right")
    shards, starts = np.unique(numbers, return_index=True)
    for shard, mine in zip(shards.tolist(), np.split(rows, starts[1:]), strict=False):
        name = shard_name(shard, manifest.counts.shards)
        start, count = int(ends[shard]) - int(index["shard_rows"][shard]), int(index["shard_rows"][shard])
        try:
            reader = open_shard(storage, manifest, shard)
            if len(reader.rows("images")) != count:
                raise FormatError(f"{len(reader.rows('images'))} rows; {INDEX} says {count}")
            for column in ("index", "paths", "source_bytes"):
                if fault := column_fault(reader, column, manifest):
                    raise FormatError(fault)
        except FormatError as exc:
            seen.problem(name, exc.problem)
            continue
        for at in range(0, len(mine), batch_size):
            some = mine[at : at + batch_size].tolist()
            places = [row - start for row in some]
            items = [found.item(int(reader["index"][place]), str(reader["paths"][place])) for place in places]
            waiting.append(_BatchRows(reader, name, places, some))
            yield Batch(shard, items, at + batch_size >= len(mine))
