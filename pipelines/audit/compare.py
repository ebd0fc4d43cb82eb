"""Decodes the source files of some rows again and compares the result with the stored rows.

The decoder versions that built a dataset must reproduce each row bit for bit. Other versions may round differently in
the inverse DCT, the chroma upsampling or the resize, by a mean of up to 1 level (`parity.py` explains the figures). The
tolerance is twice that. A different image, size, crop or channel order causes a difference of tens of levels.
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

MEAN_LEVELS = 2.0  # tolerated mean difference of an image between decoder versions, on a scale of 0 to 255
_MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Comparison:
    """The result of comparing stored rows with their source files, decoded again.

    Differences are absolute and in levels: 0 to 255, or 0 to 65535 for 16-bit images.

    Attributes:
        rows: the number of rows compared.
        exact: whether the rows had to match bit for bit, because this decoder and its versions built the dataset.
        environments: the decoders and versions that built the dataset.
        environment: the decoder and versions that decoded the files again.
        mean: the mean difference over all compared pixels.
        max: the largest difference.
        problems: rows that do not match their source files, and files that have changed or can no longer be decoded.
            If there are very many, only the first are kept, and a last entry gives the number of the others.
    """

    rows: int
    exact: bool
    environments: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    mean: float
    max: int
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON values."""
        return asdict(self)


def compare(
    path: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    source: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Decodes the source files of some rows again, with the build's backend and settings, and compares the results.

    If the build used a GPU and this machine has none, DALI's CPU operators decode the files, and the tolerance applies.

    Args:
        path: the dataset's folder or URL.
        count: the number of rows to choose at random; all rows are compared if there are fewer.
        seed: the seed of the random choice.
        source: the current location of the images; None if they have not moved since the build started.
        progress: called with the number of rows done and the total number of rows.

    Raises:
        UsageError: `count` is less than 1.
        IncompleteError: the build has not finished.
        FormatError: the manifest or the index cannot be read.
        SourceError: the images cannot be found.
        BackendError: the build's backend cannot be used on this machine.
    """
    if count < 1:
        raise UsageError(f"--deep: got {count}; give how many rows to decode again, at least 1")
    storage = open_storage(path)
    manifest = Manifest.load(storage.root)
    index = open_index(storage, manifest)
    found, config = originals(storage, manifest, source), manifest.config
    settings = _settings_of(manifest, storage)
    choice = choose(settings, inspect(settings))
    height, width = manifest.images.size
    row_bytes = height * width * config.channel_count
    tuning = Tuning.of(BuildConfig(), choice, row_bytes=row_bytes, shard_rows=count, shards=1)
    rows = _rows(index, count, seed)
    seen = _Findings(manifest)
    geometry = Geometry.of(config, (height, width))
    with make_decoder(choice.backend, config, geometry, found.source, tuning=tuning, gpu=choice.gpu) as decoder:
        provenance = decoder.provenance()
        # On a GPU, the batch determines which of DALI's decoders decodes an image.
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
    """The location of a batch's rows.

    Attributes:
        reader: the open shard.
        name: the shard's file name.
        places: the position of each row within the shard.
        rows: the position of each row within the dataset.
    """

    reader: NpzReader
    name: str
    places: list[int]
    rows: list[int]


class _Findings:
    """The running totals and problems of a comparison."""

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
        """Compares a decoded batch with its stored rows."""
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
        """Compares a row and returns what is wrong with it.

        Args:
            pixels: the image as decoded now, (H, W, C), uint8 or uint16.
            stored: the stored row, in the dataset's dtype and layout.
            exact: whether the two must match bit for bit.

        Returns:
            The difference in words; None if the row matches.
        """
        expected = self._normalizer.allocate((1, *stored.shape))
        self._normalizer.apply(pixels[None], np.zeros(1, np.int64), expected)
        values = self._table
        if values is None:  # normalized by each image's own statistics: use those of the image as decoded now
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
    """Returns settings that select the build's backend.

    Raises:
        FormatError: the manifest names an unknown backend, or none.
    """
    made = next(iter(manifest.environments), {})
    if made.get("backend") not in ("pillow", "dali"):
        raise FormatError(f"{storage.path(MANIFEST)}: it names no decoder that is known here; the file is damaged")
    return BuildConfig(
        backend=made["backend"],
        device="auto" if made.get("device") == "cuda" else "cpu",
        bit_depth=manifest.config.bit_depth,
    )


def _rows(index: NpzReader, count: int, seed: int) -> NDArray[np.int64]:
    """Returns up to `count` random rows in ascending order, (N,), int64; no blank rows, because they have no image."""
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
    """Yields the items of `rows` in batches, shard by shard.

    Args:
        storage: the dataset's storage.
        manifest: the dataset's manifest.
        found: the source files of the build.
        index: the dataset's index.
        rows: positions within the dataset, (N,), ascending.
        batch_size: the maximum number of items in a batch.
        waiting: receives the location of each batch's rows, before the batch is yielded.
        seen: receives the problems of shards that cannot be read.
    """
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
