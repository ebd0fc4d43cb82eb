"""Labels from tables, text or JSON: the kind of each column, and its numbers."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import SourceError, UsageError
from .base import LabelColumn, Source, as_text, numbered

Kind = Literal["class", "integer", "float"]
LabelSpec = list[tuple[str, "Kind | None"]]  # label columns, each with the kind given for it, if any
KINDS = ("class", "integer", "float")
_MAX_TEXTS = 100_000
_MAX_LABEL = 4096  # characters


@dataclass(frozen=True)
class Labels:
    """The labels of all items of a source.

    Attributes:
        class_names, columns: as for `Source`.
        values: int64 or float64 (N,), or (N, K) for K columns.
    """

    class_names: tuple[str, ...] | None
    columns: tuple[LabelColumn, ...]
    values: NDArray[Any]


@dataclass(frozen=True)
class Listing:
    """The minimum that `LabelledSource._list` returns: labels, or None if there are none."""

    digest: ClassVar[str | None] = None  # see `Source.listing`
    labels: Labels | None


class _HasLabels(Protocol):
    @property
    def labels(self) -> Labels | None: ...
    @property
    def digest(self) -> str | None: ...


L = TypeVar("L", bound=_HasLabels)


class LabelledSource(Source, Generic[L]):
    """A source that must read all labels to find its classes.

    The listing read by the constructor is used once, and then released. It may be large, so it is not pickled.
    """

    _listing: L | None = None

    @abc.abstractmethod
    def _list(self) -> L:
        """Reads the labels, and what else the source needs for its groups."""

    def _take_labels(self) -> None:
        """For the constructor: reads the labels and sets the classes."""
        self._listing = self._list()
        self.listing = self._listing.digest
        if labels := self._listing.labels:
            self.class_names, self.columns = labels.class_names, labels.columns

    def _listed(self) -> L:
        """For `groups`: the listing, reread after the first call. Raises SourceError if the classes have changed."""
        listing, self._listing = self._listing or self._list(), None
        labels = listing.labels
        if labels and (labels.class_names, labels.columns) != (self.class_names, self.columns):
            raise SourceError(f"{self.location!r} has changed meanwhile; run the command again")
        return listing

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listing": None}


def shared() -> Callable[[Any], Any]:
    """A function that returns one shared object for equal strings, and anything else unchanged.

    Millions of rows may have few distinct labels. The function raises ValueError if a string is too long for a label.
    """
    texts: dict[str, str] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if len(value) > _MAX_LABEL:
            raise ValueError(f"has a label of {len(value)} characters; at most {_MAX_LABEL} are allowed")
        return texts.setdefault(value, value) if len(texts) < _MAX_TEXTS else texts.get(value, value)

    return one


def label_spec(text: str) -> LabelSpec:
    """Parses `--labels A,B:float`: column names, each with its kind, if given.

    Raises:
        UsageError: a name is empty or occurs twice.
    """
    found: LabelSpec = []
    for part in text.split(","):
        name, colon, kind = part.strip().rpartition(":")
        known: Kind | None = next((each for each in KINDS if colon and each == kind), None)  # type: ignore[misc]
        found.append((name if known else part.strip(), known))
    names = [name for name, _ in found]
    if not all(names) or len({*names}) < len(names):
        raise UsageError(f"--labels {text!r}: give each column once, as in A,B or A:class,B:float")
    return found


def read_labels(
    asked: Sequence[tuple[str, Kind | None]],
    values: Sequence[Iterable[Any]],
    *,
    location: str,
    where: Callable[[int], str],
    classes: Sequence[str] | None = None,
    known: Mapping[str, Sequence[str]] | None = None,
    option: str | None = None,
) -> Labels:
    """Converts the labels of all items to numbers.

    Numbers are kept. Text, without surrounding blanks, becomes classes, which are numbered in the order of their bytes,
    or numerically if all are integers. A column of kind integer, or whose numbers have names, may spell integers in any
    form, such as `1.0` or `1e0`.

    Args:
        asked: name and kind of each column; None to infer the kind from the values.
        values: the values of each column, one per item: text, numbers, or None.
        location: the source, for messages.
        where: describes an entry by its index, for messages: "row 12", "'a/1.jpg'".
        classes: the names of classes by number, for a single column. Integers (also `2.0`) are indices into it.
        known: for some columns, the names that the source itself gives to integers. Ignored if the column's kind is
            given as integer or float.
        option: what `--labels` takes for all of the columns, for messages; the name of each column if None.

    Raises:
        SourceError: a value is missing or of another kind than the others, or a class is not in the list.
        UsageError: `classes` are given for several columns, or for one of kind float.
    """
    if classes is not None and len(asked) > 1:
        raise UsageError(f"--classes-from names one column's classes, and {location!r} has {len(asked)}; omit it")
    columns: list[LabelColumn] = []
    numbers: list[NDArray[Any]] = []
    for (name, kind), entries in zip(asked, values, strict=True):
        if classes is not None and kind == "float":
            raise UsageError(f"--labels {name}:float and --classes-from contradict each other; omit one of them")
        stripped = [entry.strip() if isinstance(entry, str) else entry for entry in entries]
        column, found = _Column(name, stripped, location, where, option or name).read(
            kind, classes, (known or {}).get(name)
        )
        columns.append(column)
        numbers.append(found)
    if {"float", "integer"} <= {column.kind for column in columns}:
        _refuse_inexact(columns, numbers, location)
    stacked = numbers[0] if len(numbers) == 1 else np.stack(numbers, axis=1)
    if len(columns) == 1 and columns[0].classes is not None:
        return Labels(columns[0].classes, (), stacked)
    return Labels(None, tuple(columns), stacked)


def _refuse_inexact(columns: Sequence[LabelColumn], numbers: Sequence[NDArray[Any]], location: str) -> None:
    """Raises SourceError for an integer that float64, the common type of all columns, cannot represent exactly."""
    for column, values in zip(columns, numbers, strict=True):
        inexact = values[(values > 2**53) | (values < -(2**53))] if column.kind == "integer" else values[:0]
        if len(inexact):
            raise SourceError(
                f"{location!r}: column {column.name!r} has {inexact[0]}, which float64 cannot hold, and labels beside "
                "a column of floats are stored as such; leave one of them out"
            )


def array_labels(
    name: str,
    values: NDArray[Any],
    location: str,
    classes: Sequence[str] | None,
    *,
    names: Sequence[str] | None = None,
    kind: Kind | None = None,
    option: str | None = None,
) -> Labels:
    """As `read_labels`, for labels in one array.

    Args:
        name: of the column, or the prefix of the names of several columns.
        values: (N,), or (N, K) for K columns. One-hot rows are classes, unless `kind` says otherwise.
        location, classes: as for `read_labels`.
        names: the names that the source gives to the integers of a single column, if any.
        kind: given for the labels, if any.
        option: what `--labels` takes for the array, for messages; `name` if None.

    Raises:
        SourceError, UsageError: as `read_labels`.
    """
    if values.ndim == 2 and kind in (None, "class") and _is_one_hot(values):
        count = values.shape[1]
        if classes is not None and len(classes) != count:
            raise SourceError(
                f"{location!r}: {name!r} has one-hot rows of {count} classes, and --classes-from names {len(classes)}; "
                "give as many names"
            )
        known = tuple(map(str, range(count)) if classes is None else classes)
        return Labels(known, (), values.argmax(axis=1).astype(np.int64))
    single = values.ndim == 1
    asked = [(name, kind)] if single else [(f"{name}_{number}", kind) for number in range(values.shape[1])]
    if classes is None and names is None and (numbers := _numbers(values, kind)) is not None:
        found: Kind = "float" if numbers.dtype == np.float64 else "integer"
        return Labels(None, tuple(LabelColumn(name=each, kind=found) for each, _ in asked), numbers)
    try:
        listed = [values.tolist()] if single else values.T.tolist()
    except (SystemError, ValueError) as exc:  # invalid code points
        raise SourceError(f"{location!r}: {name!r} has labels that are no text; save them again") from exc
    if values.dtype.kind == "S":
        listed = [[*map(as_text, column)] for column in listed]
    elif values.dtype.kind == "b":
        listed = [[*map(int, column)] for column in listed]
    meaning = None if names is None else {name: names}
    return read_labels(
        asked,
        listed,
        location=location,
        where=lambda row: f"image {row}",
        classes=classes,
        known=meaning,
        option=option or name,
    )


def _numbers(values: NDArray[Any], kind: Kind | None) -> NDArray[Any] | None:
    """What `read_labels` makes of an array, converted as a whole; None if each entry needs to be checked."""
    if values.dtype.kind == "f" and kind in (None, "float") and np.isfinite(values).all():
        return values.astype(np.float64)
    if values.dtype.kind in "biu" and kind in (None, "integer") and (values <= np.int64(2**63 - 1)).all():
        return values.astype(np.int64)
    return None


def _is_one_hot(values: NDArray[Any]) -> bool:
    """Whether each row of an array (N, K) has exactly one 1 among zeros."""
    if values.dtype.kind not in "biuf":
        return False
    ones = np.count_nonzero(values == 1, axis=1)
    return bool((ones == 1).all() and (np.count_nonzero(values, axis=1) == 1).all())


_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_PLAIN = re.compile(r"-?\d+")
_DTYPES = {"integer": np.int64, "float": np.float64}


@dataclass(frozen=True)
class _Column:
    """One column of labels.

    Attributes:
        name: of the column.
        entries: a label for each item: text without surrounding blanks, a number, or None.
        location: the source, for messages.
        where: says which item an entry belongs to, for messages.
        option: what `--labels` takes for the column, for messages.
    """

    name: str
    entries: Sequence[Any]
    location: str
    where: Callable[[int], str]
    option: str

    def read(
        self, kind: Kind | None, classes: Sequence[str] | None, known: Sequence[str] | None
    ) -> tuple[LabelColumn, NDArray[Any]]:
        """The column and its labels, int64 or float64 (N,); see `read_labels`."""
        names = None if known is None or kind not in (None, "class") else tuple(known)
        found = self._kind(kind if names is None else None)
        if names is not None and found != "class":
            texts = [names[index] for index in self._indices(names)]
            return self._as_classes(texts, names if classes is None else classes)
        if found == "class":
            return self._as_classes(_texts(self.entries), classes)
        if classes is not None:
            column = LabelColumn(name=self.name, kind="class", classes=tuple(classes))
            return column, np.array(self._indices(classes), np.int64)
        as_number = float if found == "float" else whole_number
        numbers = np.array([as_number(entry) for entry in self.entries], _DTYPES[found])
        return LabelColumn(name=self.name, kind=found), numbers

    def _as_classes(self, texts: Sequence[str], classes: Sequence[str] | None) -> tuple[LabelColumn, NDArray[np.int64]]:
        """Numbers the texts of all entries by the names of classes given, or else by these texts, sorted."""
        try:
            found = sorted({*texts}, key=str.encode)
        except UnicodeEncodeError as exc:
            raise SourceError(
                f"{self.location!r}: column {self.name!r} has {exc.object!r}, which is no UTF-8 text; save it as such"
            ) from exc
        if all(_kind_of(text) == "integer" for text in found):
            found.sort(key=int)
        names = tuple(found if classes is None else classes)
        by_name = numbered(list(names), found, self.location)
        column = LabelColumn(name=self.name, kind="class", classes=names)
        return column, np.array([by_name[text] for text in texts], np.int64)

    def _kind(self, wanted: Kind | None) -> Kind:
        """The kind of the column, `wanted` if given. Raises SourceError if not all of its entries have it."""
        self._require_complete()
        if wanted == "class" or not self.entries:
            return wanted or "class"
        kinds = [_kind_of(entry) for entry in self.entries]
        if "class" in kinds:
            self._refuse_texts(wanted, kinds)
            return "class"
        if wanted == "integer":
            for row, entry in enumerate(self.entries):
                if whole_number(entry) is None:
                    raise self._no_number(wanted, row)
            return wanted
        return "integer" if "float" not in kinds and wanted != "float" else "float"

    def _require_complete(self) -> None:
        missing = [row for row, entry in enumerate(self.entries) if is_missing(entry)]
        if missing:
            more = f", and in {len(missing) - 1} more" if len(missing) > 1 else ""
            what = "NaN" if isinstance(self.entries[missing[0]], float) else "no label"
            raise SourceError(
                f"{self.location!r}: column {self.name!r} has {what} for {self.where(missing[0])}{more}; fill it in, "
                "or remove the rows"
            )

    def _refuse_texts(self, wanted: Kind | None, kinds: Sequence[Kind]) -> None:
        """Raises SourceError if the texts among the entries should be numbers, or are numbers that cannot be stored."""
        texts = [row for row, kind in enumerate(kinds) if kind == "class"]
        beyond = next((row for row in texts if isinstance(self.entries[row], (int, float))), None)
        if beyond is not None:
            raise SourceError(
                f"{self.location!r}: column {self.name!r} has {self.entries[beyond]!r} for {self.where(beyond)}; "
                f"labels are finite floats, or integers of int64, from {-(2**63)} to {2**63 - 1}: save such, or say "
                f"--labels {self.option}:class to make each different number a class"
            )
        first = f"{self.entries[texts[0]]!r} for {self.where(texts[0])}"
        if all(_DECIMAL_COMMA.fullmatch(str(self.entries[row])) for row in texts):
            raise SourceError(
                f"{self.location!r}: column {self.name!r} has decimal commas ({first}); write points, or say --labels "
                f"{self.option}:class"
            )
        if wanted is not None:
            raise self._no_number(wanted, texts[0])
        number = next((row for row, kind in enumerate(kinds) if kind != "class"), None)
        if number is not None:
            raise SourceError(
                f"{self.location!r}: column {self.name!r} has both texts ({first}) and numbers "
                f"({self.entries[number]!r} for {self.where(number)}); fix it, or say --labels {self.option}:class"
            )

    def _no_number(self, wanted: Kind, row: int) -> SourceError:
        return SourceError(
            f"{self.location!r}: column {self.name!r} has {self.entries[row]!r} for {self.where(row)}, which is no "
            f"{'whole ' if wanted == 'integer' else ''}number; fix it, or say --labels {self.option}:class"
        )

    def _indices(self, names: Sequence[str]) -> list[int]:
        """The entries, which are numbers, as indices of names. Raises SourceError if one is not."""
        indices = []
        for row, entry in enumerate(self.entries):
            number = whole_number(entry)
            if number is None or not 0 <= number < len(names):
                raise SourceError(
                    f"{self.location!r}: column {self.name!r} has {entry} for {self.where(row)}; there are names for "
                    f"{len(names)} classes, 0 to {len(names) - 1}: fix it, or say --labels none"
                )
            indices.append(number)
        return indices


def is_missing(entry: Any) -> bool:
    """Whether a value is missing: null, NaN, or blank."""
    if entry is None or (isinstance(entry, str) and not entry.strip()):
        return True
    return isinstance(entry, float) and math.isnan(entry)


def whole_number(entry: Any) -> int | None:
    """A label as a 64-bit integer, in any spelling: `1`, `1.0`, `1e0`, ` +1`, `01`; None if it is not an integer.

    A float beyond 2**53 is not, since it may also represent neighbouring integers.
    """
    if isinstance(entry, (int, np.integer)):
        number = int(entry)
    elif isinstance(entry, (float, np.floating)):
        value = float(entry)
        if not (abs(value) <= 2**53 and value.is_integer()):
            return None
        number = int(value)
    else:
        try:
            exact = Decimal(str(entry))
        except InvalidOperation:
            return None
        # Without a bound, ten bytes of text could become an integer of gigabytes.
        if "_" in str(entry) or not exact.is_finite() or exact.adjusted() > 20 or exact != exact.to_integral_value():
            return None
        number = int(exact)
    return number if -(2**63) <= number < 2**63 else None


def _kind_of(entry: Any) -> Kind:
    if isinstance(entry, (int, np.integer)):
        return "integer" if whole_number(entry) is not None else "class"
    if isinstance(entry, (float, np.floating)):
        return "float" if math.isfinite(entry) else "class"
    text = str(entry)
    try:
        # An identifier of twenty digits must not become a float, which would equal other identifiers.
        return "integer" if -(2**63) <= int(text) < 2**63 and "_" not in text else "class"
    except ValueError:
        pass
    try:
        return "float" if math.isfinite(float(text)) and "_" not in text else "class"
    except ValueError:
        return "class"


def _texts(entries: Sequence[Any]) -> list[str]:
    """Labels as names of classes. If all are integers, `1.0` and `1` become the same name."""
    texts = [str(entry) for entry in entries]
    if all(map(_PLAIN.fullmatch, texts)):
        return texts
    wholes = [whole_number(entry) for entry in entries]
    if None in wholes:
        return texts
    return [text if _PLAIN.fullmatch(text) else str(whole) for text, whole in zip(texts, wholes, strict=True)]
