"""Rows of datasets by number: what a dataset and a selection of its rows have in common, and such selections.

A view costs row numbers, not copies of images. Readers take a dataset or a view alike.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, Literal, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UsageError
from ..npz.format import is_text
from ..sources.base import LabelColumn, label_form
from .inference import Preprocess

Numbers = NDArray[np.int64]
RowIndex = SupportsIndex | slice | Sequence[int] | NDArray[np.integer[Any]]
_SHOWN = 10  # classes or columns that a message names


class Rows(abc.ABC):
    """What a dataset and a view of datasets have in common: see `Dataset` for the attributes."""

    path: str
    labels: NDArray[Any] | None
    class_names: tuple[str, ...] | None
    label_columns: tuple[LabelColumn, ...]
    index: Numbers
    valid: NDArray[np.bool_] | None
    shard_rows: Numbers

    @property
    @abc.abstractmethod
    def datasets(self) -> tuple[Rows, ...]:
        """The datasets to which the rows belong."""

    @property
    @abc.abstractmethod
    def id(self) -> str:
        """Identifies these rows, in this order."""

    @property
    @abc.abstractmethod
    def preprocess(self) -> Preprocess:
        """The preprocessing of all rows, to apply to other images at inference, or to compare with a dataset."""

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image: (C, H, W) or (H, W, C)."""

    @property
    @abc.abstractmethod
    def layout(self) -> Literal["NCHW", "NHWC"]:
        """The order of the axes of stored images."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """The dtype of stored images."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    @abc.abstractmethod
    def deflated(self) -> bool:
        """Whether stored images are compressed."""

    @property
    @abc.abstractmethod
    def has_cache(self) -> bool:
        """Whether shards are fetched from an object store into a cache."""

    @abc.abstractmethod
    def __getitem__(self, rows: RowIndex) -> NDArray[Any]: ...

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))

    @abc.abstractmethod
    def column(self, name: str, rows: RowIndex) -> NDArray[Any]:
        """The entries of one array of the shards for some rows; see `Dataset.column`."""

    @abc.abstractmethod
    def read(self, rows: Numbers, out: NDArray[Any], *, normalize: bool = False, threads: int = 1) -> None:
        """Reads images into memory that exists already, as stored or normalized; see `Dataset.read`."""

    @property
    def paths(self) -> Sequence[str]:
        """The source path of each row, read from its shard on access."""
        return _Paths(self)

    def normalized(self, rows: RowIndex) -> NDArray[np.float32]:
        """Images as normalized float32, (C, H, W) or (H, W, C), with a leading N unless `rows` is a single row.

        If the dataset stores uint8 pixels, the values are exactly those that a float32 build of the same images stores;
        blank rows stay zero. If it stores float32, this is `dataset[rows]`.
        """
        images = self[rows]
        values = self.preprocess.values(images)
        if self.valid is not None and values is not images:
            values[~self.valid[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)]] = 0
        return values

    def subset(self, rows: slice | Sequence[int] | NDArray[Any]) -> View:
        """A view of some rows, in the given order. Changes to the array `rows` do not change the view.

        Args:
            rows: row numbers, of which negative ones count from the end and equal ones give the row several times; a
                slice; or a bool array (N,).

        Raises:
            IndexError: a row is out of range, or a bool array has another length.
            TypeError: `rows` is of another type.
        """
        if not isinstance(rows, slice):
            wanted = np.asarray(rows)
            if wanted.ndim == 0:
                raise TypeError(f"rows: got {rows!r}; allowed: a list of row numbers, a slice or a bool array")
            if wanted.dtype == np.bool_:
                if wanted.shape != self.index.shape:
                    raise IndexError(f"rows: got bool {wanted.shape}; allowed: bool {self.index.shape}, one per row")
                rows = np.flatnonzero(wanted)
        return View(self.datasets, self.places[numbers_of(rows, len(self))])

    def where(self, **columns: Any) -> View:
        """A view of the rows with given labels, in their order: `data.where(label="cat")`.

        Labels stay as they are: `class_names` does not change. Other conditions are written with `subset`, such as
        `data.subset(data.labels[:, 1] > 30)`.

        Args:
            columns: the wanted labels by column, a value or several; a row needs one of them in each column. The only
                column of a dataset can be called `label`. A class is given by its name or number.

        Raises:
            UsageError: there is no such column or class, or a value is of another kind.
        """
        if not columns:
            raise UsageError("where: got no column; give one, such as where(label=...)")
        chosen = np.ones(len(self), bool)
        for name, wanted in columns.items():
            chosen &= _matches(self, name, wanted)
        return self.subset(chosen)

    @abc.abstractmethod
    def fill(self, rows: Numbers | None = None, *, wait: bool = False) -> None:
        """Begins to fetch the shards of some rows into the cache; see `Dataset.fill`."""

    def by_shard(self) -> Rows:
        """The same rows, in an order in which those of each shard are next to each other."""
        return self

    def epoch_rows(self, epoch: int) -> Numbers:
        """The rows that readers use in an epoch, blank ones among them: all rows, unless this is a mix."""
        return np.arange(len(self))

    def bounds(self, rows: Numbers) -> Numbers:
        """Where shards begin and end in `rows`, ascending: shard k has those from bounds[k] up to bounds[k + 1]."""
        ends = np.cumsum(self.shard_rows)
        found: Numbers = np.searchsorted(rows, np.concatenate([[0], ends]))
        return found

    @property
    def places(self) -> Numbers:
        """The number of each row in the concatenation of `datasets`, int64 (N,)."""
        return np.arange(len(self))


class View(Rows):
    """Rows of one or several datasets, which are read on demand. It has the attributes and methods of a `Dataset`.

    `path` names the folders of all its `datasets`, each of which has a `manifest` of its own. A view is pickled as
    these folders and the row numbers.

    Args:
        datasets: preprocessed and stored alike, with labels of the same columns.
        places: the numbers of the rows in the concatenation of all datasets, int64 (N,).
    """

    def __init__(self, datasets: Iterable[Rows], places: Numbers) -> None:
        self._datasets = tuple(datasets)
        self.path = " + ".join(dict.fromkeys(each.path for each in self._datasets))
        self._places = places
        self._ends = np.cumsum([len(each) for each in self._datasets])
        self._starts = self._ends - [len(each) for each in self._datasets]
        labels, columns = joined_labels(self._datasets)
        unnamed = self._datasets[0].class_names is None
        self.labels = None if labels is None else labels[places]
        self.class_names = None if unnamed else columns[0].classes
        self.label_columns = columns if unnamed else ()
        self.index = np.concatenate([each.index for each in self._datasets])[places]
        self.valid = None
        if any(each.valid is not None for each in self._datasets):
            flags = [np.ones(len(each), bool) if each.valid is None else each.valid for each in self._datasets]
            self.valid = np.concatenate(flags)[places]
        cuts = np.flatnonzero(np.diff(self._shards_of(places))) + 1
        self.shard_rows = np.diff(np.concatenate([[0], cuts, [len(places)]]))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.path!r}: {len(self)} images {self.image_shape} {self.dtype}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return View, (self._datasets, self._places)

    @property
    def datasets(self) -> tuple[Rows, ...]:
        """The datasets to which the rows belong."""
        return self._datasets

    @property
    def places(self) -> Numbers:
        """The number of each row in the concatenation of `datasets`, int64 (N,)."""
        return self._places

    @property
    def id(self) -> str:
        """Identifies these rows, in this order: a SHA-256 of the datasets' ids and the row numbers."""
        digest = hashlib.sha256(repr([each.id for each in self._datasets]).encode())
        digest.update(self._places.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of all rows, to apply to other images at inference, or to compare with a dataset."""
        return self._datasets[0].preprocess

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image: (C, H, W) or (H, W, C)."""
        return self._datasets[0].image_shape

    @property
    def layout(self) -> Literal["NCHW", "NHWC"]:
        """The order of the axes of stored images."""
        return self._datasets[0].layout

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the images."""
        return self._datasets[0].dtype

    @property
    def deflated(self) -> bool:
        """Whether the images of a dataset are compressed."""
        return any(each.deflated for each in self._datasets)

    @property
    def has_cache(self) -> bool:
        """Whether shards of a dataset are fetched into a cache."""
        return any(each.has_cache for each in self._datasets)

    def __getitem__(self, rows: RowIndex) -> NDArray[Any]:
        if type(rows) is int and 0 <= rows < len(self):  # a fast path, as in `Dataset`
            place = int(self._places[rows])
            number = int(np.searchsorted(self._ends, place, side="right"))
            return self._datasets[number][place - int(self._starts[number])]
        return self.column("images", rows)

    def column(self, name: str, rows: RowIndex) -> NDArray[Any]:
        """The entries of one array of the shards for some rows, as `Dataset.column`; `labels` are those of the view."""
        numbers = numbers_of(rows, len(self))
        own: NDArray[Any] | None = {"labels": self.labels, "valid": self.valid}.get(name)
        if own is not None:
            found: NDArray[Any] = own[numbers]
            return found
        places = self._places[numbers]
        if places.ndim == 0:
            number = int(np.searchsorted(self._ends, places, side="right"))
            return self._datasets[number].column(name, int(places - self._starts[number]))
        pieces = [
            (mine, self._datasets[number].column(name, _span(places[mine] - self._starts[number])))
            for number, mine in self._by_dataset(places)
        ]
        if len(pieces) == 1:
            return pieces[0][1]
        dtype = np.result_type(*(values for _, values in pieces))  # strings, whose width differs
        out = np.empty((len(places), *pieces[0][1].shape[1:]), dtype)
        for mine, values in pieces:
            out[mine] = values
        return out

    def read(self, rows: Numbers, out: NDArray[Any], *, normalize: bool = False, threads: int = 1) -> None:
        """Reads images into memory that exists already, as stored or normalized; see `Dataset.read`."""
        places = self._places[rows]
        which = np.searchsorted(self._ends, places, side="right")
        cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(places)]
        for start, stop in itertools.pairwise(cuts):  # runs of rows of the same dataset
            if start < stop:
                number = int(which[start])
                mine = places[start:stop] - self._starts[number]
                self._datasets[number].read(mine, out[start:stop], normalize=normalize, threads=threads)

    def by_shard(self) -> Rows:
        """The same rows, in an order in which those of each shard are next to each other."""
        shards = self._shards_of(self._places)
        if (np.diff(shards) >= 0).all():
            return self
        return self.subset(np.argsort(shards, kind="stable"))

    def fill(self, rows: Numbers | None = None, *, wait: bool = False) -> None:
        """Begins to fetch the shards of some rows into the caches of their datasets; see `Dataset.fill`."""
        if not self.has_cache:
            return
        places = self._in_each_shard if rows is None else self._places[rows]
        for number, own in self._by_dataset(places):
            self._datasets[number].fill(places[own] - int(self._starts[number]), wait=wait)

    @functools.cached_property
    def _in_each_shard(self) -> Numbers:
        """The places of one row in each shard of the view, since readers ask for all shards at each batch."""
        first = np.sort(np.unique(self._shards_of(self._places), return_index=True)[1])
        found: Numbers = self._places[first]
        return found

    def _shards_of(self, places: Numbers) -> Numbers:
        """The number of each row's shard, counted over all datasets."""
        ends = np.cumsum(np.concatenate([each.shard_rows for each in self._datasets]))
        shards: Numbers = np.searchsorted(ends, places, side="right")
        return shards

    def _by_dataset(self, places: Numbers) -> list[tuple[int, Any]]:
        """Each dataset that has some of the rows, with which of them are its; the first one if there are none."""
        which = np.searchsorted(self._ends, places, side="right")
        used = np.unique(which).tolist()
        if len(used) <= 1:
            return [(used[0] if used else 0, slice(None))]
        return [(number, which == number) for number in used]


class _Paths(Sequence[str]):
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, rows: int) -> str: ...

    @overload
    def __getitem__(self, rows: slice) -> list[str]: ...

    def __getitem__(self, rows: int | slice) -> str | list[str]:
        found = self._rows.column("paths", rows if isinstance(rows, slice) else [operator.index(rows)])
        if not is_text(found):
            raise FormatError("a path is no text; run gpu-npz verify", self._rows.path)
        paths: list[str] = found.tolist()
        return paths if isinstance(rows, slice) else paths[0]


def numbers_of(rows: Any, count: int) -> Numbers:
    """Rows as numbers from 0 up to `count` - 1, int64 (N,), or () for a single row.

    Args:
        rows: a row number, a slice, or a list or array of row numbers, of which negative ones count from the end.
        count: how many rows there are.

    Raises:
        IndexError: a row is out of range.
        TypeError: `rows` is of another type.
    """
    if isinstance(rows, slice):
        span = range(count)[rows]
        return np.arange(span.start, span.stop, span.step)
    wanted = np.asarray(rows)
    is_one = isinstance(rows, SupportsIndex) and wanted.ndim == 0
    if not is_one and (wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu")):
        raise TypeError(f"rows: got {wanted.dtype} {wanted.shape}; allowed: an integer, a slice or a list of integers")
    wrong = (wanted < -count) | (wanted >= count)
    if np.any(wrong):
        raise IndexError(f"row {wanted[wrong][0]} of a dataset with {count} rows")
    numbers: Numbers = np.array(wanted, np.int64)
    return np.where(numbers < 0, numbers + count, numbers)


def _span(rows: Numbers) -> RowIndex:
    """The rows as a slice if they follow one another, so that they need not be copied."""
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def columns_of(data: Rows) -> tuple[LabelColumn, ...]:
    """The columns of labels; a column of classes without a name is called `label`."""
    if data.class_names is None:
        return data.label_columns
    return (LabelColumn(name="label", kind="class", classes=data.class_names),)


def joined_labels(datasets: Sequence[Rows]) -> tuple[NDArray[Any] | None, tuple[LabelColumn, ...]]:
    """The labels of all rows, one dataset after the other, and their columns.

    The classes of a column are those of the first dataset, then those that the second one adds, and so on. A label
    counts in this list.

    Args:
        datasets: with columns of the same names, in any order, and kinds.
    """
    ours = [columns_of(each) for each in datasets]
    if not ours[0]:
        return None, ()
    joined, parts = [], []
    for column in ours[0]:
        numbers: dict[str, int] = {}
        values = []
        for data, columns in zip(datasets, ours, strict=True):
            assert data.labels is not None
            at = next(at for at, each in enumerate(columns) if each.name == column.name)
            found = data.labels if data.labels.ndim == 1 else data.labels[:, at]
            if (classes := columns[at].classes) is not None:
                new = [numbers.setdefault(name, len(numbers)) for name in classes]
                if new != list(range(len(new))):
                    found = np.array(new)[found.astype(np.int64)]
            values.append(found)
        joined.append(column.model_copy(update={"classes": tuple(numbers)}) if column.kind == "class" else column)
        parts.append(np.concatenate(values) if len(values) > 1 else values[0])
    dtype, shape = label_form(joined)
    labels = np.stack(parts, axis=1) if shape else parts[0]
    return labels.astype(dtype, copy=False), tuple(joined)


def _matches(data: Rows, name: str, wanted: Any) -> NDArray[np.bool_]:
    """Which rows have one of the wanted labels in a column."""
    columns = columns_of(data)
    if data.labels is None:
        raise UsageError(f"where({name}=...): the dataset has no labels; choose rows by number, with subset")
    names = [column.name for column in columns]
    at = 0 if len(columns) == 1 and name == "label" else names.index(name) if name in names else None
    if at is None:
        raise UsageError(f"where({name}=...): there is no such column; columns: {_some(names)}")
    values = list(wanted) if np.ndim(wanted) or isinstance(wanted, Set) else [wanted]
    numbers = [_label(columns[at], name, value) for value in values]
    return np.isin(data.labels if data.labels.ndim == 1 else data.labels[:, at], numbers)


def _label(column: LabelColumn, name: str, value: Any) -> Any:
    """A wanted label as it is stored. Raises UsageError if the column cannot have it."""
    classes = column.classes
    if isinstance(value, str) and classes is not None and value in classes:
        return classes.index(value)
    whole = isinstance(value, SupportsIndex) and not isinstance(value, (bool, np.bool_))
    if classes is not None:
        if whole and 0 <= int(value) < len(classes):
            return int(value)
        raise UsageError(
            f"where({name}={value!r}): there is no such class; classes: {_some(classes)}, or their numbers, from 0 to "
            f"{len(classes) - 1}"
        )
    if whole:
        return int(value)
    if column.kind == "float" and isinstance(value, (float, np.floating)):
        return float(value)
    raise UsageError(f"where({name}={value!r}): the labels are numbers of kind {column.kind}; give one, or several")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
