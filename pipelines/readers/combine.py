"""Several datasets as one: all rows one after the other, or in given proportions in each epoch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .dataset import Dataset
from .views import Numbers, Rows, View, columns_of

Openable = str | os.PathLike[str] | Rows


def opened(source: Openable, cache: str | os.PathLike[str] | None = None, cache_size: int | str | None = None) -> Rows:
    """The dataset at a path; what is open already stays as it is.

    Raises:
        UsageError: a cache is given for what is open already.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    if not isinstance(source, Rows):
        return Dataset(source, cache=cache, cache_size=cache_size)
    if cache is not None or cache_size is not None:
        raise UsageError("cache: got an open dataset; give cache and cache_size to gpu_npz.open_dataset instead")
    return source


def concat(sources: Sequence[Openable]) -> View:
    """The rows of several datasets as one, in the order given.

    Classes are matched by name: the classes are those of the first dataset, then those that the second one adds, and so
    on, and `labels` are numbers in this list. So the labels of the first dataset stay as they are.

    Args:
        sources: paths of datasets, datasets or views. All of them must be preprocessed alike, have the same dtype and
            layout, and label columns of the same names and kinds.

    Raises:
        UsageError: they differ in one of these, or are a `mix`.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    if isinstance(sources, (str, os.PathLike, Rows)) or not (given := [opened(each) for each in sources]):
        raise UsageError(f"concat: got {sources!r}; allowed: a list of at least one path or dataset")
    _require_alike("concat", given)
    starts = np.cumsum([0, *(sum(map(len, each.datasets)) for each in given)])
    places = [each.places + start for each, start in zip(given, starts[:-1], strict=True)]
    return View([data for each in given for data in each.datasets], np.concatenate(places))


def mix(weights: Mapping[Any, float], *, seed: int = 0) -> Mix:
    """Several datasets of which each epoch of a reader draws rows in given proportions.

        stream = ShardIterable(gpu_npz.mix({"/data/a": 0.7, "/data/b": 0.3}), shuffle=True)

    An epoch has as many rows as the proportions allow without repeating one: it uses all rows of the dataset that is
    smallest for its weight, and n random ones of the N rows of any other. Consecutive epochs use different rows until
    fewer than n are left, after N // n epochs; then a new round begins. Which rows an epoch has depends only on `seed`
    and its number, which the readers' `set_epoch` sets. Blank rows are never used.

    An unshuffled epoch has the proportions in every part; a shuffled stream has them in every buffer.

    Args:
        weights: the weight of each dataset, given by its path, as a dataset or a view; they need not add up to 1.
        seed: decides which rows each epoch has. The order of a shuffled epoch depends on the reader's seed.

    Raises:
        UsageError: a weight is not a positive number, an epoch would have no row of a dataset, or the datasets differ,
            as for `concat`. Mixes cannot be mixed again.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(
            f"mix: got {weights!r}; allowed: weights by dataset, such as {{'/data/a': 0.7, '/data/b': 0.3}}"
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"mix: got the seed {seed!r}; allowed: an integer of 0 or more")
    for source, weight in weights.items():
        number = isinstance(weight, (int, float, np.integer, np.floating)) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise UsageError(f"mix: got the weight {weight!r} for {source!r}; allowed: a number above 0")
    return Mix([opened(source) for source in weights], [float(weight) for weight in weights.values()], int(seed))


class Mix(View):
    """What `mix` returns: the rows of all its datasets, one after the other, of which each epoch has some.

    `len`, `labels`, `paths` and `[...]` concern all rows. Readers use those of `epoch_rows`.

    Attributes:
        counts: how many rows of each dataset an epoch has.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int) -> None:
        _require_alike("mix", sources)
        whole = concat(sources)
        super().__init__(whole.datasets, whole.places)
        self._sources, self._weights, self._seed = tuple(sources), tuple(weights), seed
        ends = np.cumsum([len(each) for each in sources])
        filled = np.ones(len(self), bool) if self.valid is None else self.valid
        self._drawn = []  # the rows of each dataset, shard by shard
        for each, end in zip(sources, ends, strict=True):
            rows = np.flatnonzero(filled[end - len(each) : end]) + end - len(each)
            self._drawn.append(rows[np.argsort(self.places[rows], kind="stable")])
        self.counts = _counts([len(rows) for rows in self._drawn], weights, [each.path for each in sources])
        self._shards = max(len(each.by_shard().shard_rows) for each in sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mix, (self._sources, self._weights, self._seed)

    @property
    def id(self) -> str:
        """Identifies the datasets, the weights and the seed."""
        parts = [*(each.id for each in self._sources), self._weights, self._seed]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def epoch_rows(self, epoch: int) -> Numbers:
        """The rows of an epoch, int64 (sum of `counts`,), never blank ones.

        Those of each dataset come shard by shard, and at equal distances.
        """
        rows = []
        for number, (own, count) in enumerate(zip(self._drawn, self.counts, strict=True)):
            turn, at = divmod(epoch, len(own) // count)
            order = np.random.default_rng((self._seed, number, turn)).permutation(len(own))
            rows.append(own[np.sort(order[at * count :][:count])])
        where = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        drawn: Numbers = np.concatenate(rows)[np.argsort(where, kind="stable")]
        return drawn

    def bounds(self, rows: Numbers) -> Numbers:
        """Cuts the rows of an epoch into pieces that take turns as shards do; each has all datasets' proportions."""
        pieces = max(1, min(self._shards, len(rows)))
        return np.arange(pieces + 1) * len(rows) // pieces

    def by_shard(self) -> Rows:
        """This mix: its order holds the proportions."""
        return self

    def subset(self, rows: slice | Sequence[int] | NDArray[Any]) -> View:
        """Not for a mix. Raises UsageError."""
        raise UsageError(
            "a mix has other rows in each epoch; select rows of its datasets first: mix({a.where(...): 0.7})"
        )


def _require_alike(what: str, sources: Sequence[Rows]) -> None:
    """Raises UsageError if datasets differ in what they must share, or are mixes."""
    if any(isinstance(each, Mix) for each in sources):
        raise UsageError(f"{what}: got a mix, which has other rows in each epoch; give its datasets to one mix")
    first = sources[0].datasets[0]
    columns = {column.name: column.kind for column in columns_of(first)}
    for other in (data for each in sources for data in each.datasets):
        differences = first.preprocess.differences(other.preprocess)
        for name in ("dtype", "layout"):
            mine, its = getattr(first, name), getattr(other, name)
            differences += [f"{name}: {mine} and {its}"] if mine != its else []
        if differences:
            raise UsageError(
                f"{what}: {first.path!r} and {other.path!r} are preprocessed differently: {'; '.join(differences)}; "
                "build one of them again with the settings of the other"
            )
        if columns != {column.name: column.kind for column in columns_of(other)}:
            mine, its = (", ".join(map(str, columns_of(each))) or "none" for each in (first, other))
            raise UsageError(
                f"{what}: {first.path!r} and {other.path!r} have different label columns: {mine}; and {its}; build one "
                "of them again with --labels"
            )


def _counts(available: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """How many rows of each dataset an epoch has: in proportion to the weights, to the nearest row."""
    for name, have in zip(names, available, strict=True):
        if not have:
            raise UsageError(f"mix: {name!r} has no row to draw; omit it")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 as 7/10
    rows = math.floor(min(have * sum(exact) / weight for have, weight in zip(available, exact, strict=True)))
    shares = [rows * weight / sum(exact) for weight in exact]
    counts = [math.floor(share) for share in shares]
    largest = sorted(range(len(shares)), key=lambda at: counts[at] - shares[at])  # the largest remainder first
    for at in largest[: rows - sum(counts)]:
        counts[at] += 1
    for name, have, count in zip(names, available, counts, strict=True):
        if not count:
            raise UsageError(
                f"mix: an epoch of {rows} rows would have none of {name!r}, which has {have} to draw from; give it "
                "a larger weight, or omit it"
            )
    return counts
