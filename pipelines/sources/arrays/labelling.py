"""Labels in arrays: with names of classes beside them, and those that count from 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from ..access.files import Files
from ..base import as_text, numbered
from ..labels import Kind, Labels, array_labels
from . import npy
from .npy import Array


def labels_of(
    column: str,
    values: NDArray[Any],
    location: str,
    *,
    kind: Kind | None,
    names: Sequence[str] | None,
    classes: Sequence[str] | None,
    from_one: bool,
    option: str,
) -> Labels:
    """The labels of images; see `array_labels`.

    Args:
        column: the name of the column, or the prefix of several.
        values: (N,), or (N, K) for K columns.
        location: SRC, for messages.
        kind: given for the labels, if any.
        names: the names of classes by number, from the file; they name integers and one-hot rows, and number texts.
        classes: the names of classes by number that `--classes-from` gives.
        from_one: whether integers are classes that count from 1, as in downsampled ImageNet. Without names, each number
            is the name of its class.
        option: what `--labels` takes for these labels, for messages.

    Raises:
        SourceError, UsageError: as `array_labels`; or `names` do not fit the labels.
    """
    if kind in ("integer", "float"):
        names = None
    if values.ndim == 2:
        if classes is None and names is not None and len(names) == values.shape[1]:
            classes = names
        return array_labels(column, values, location, classes, kind=kind, option=option)
    if from_one and kind is None and values.dtype.kind in "iu":
        given = names or classes
        if given is None or {*map(str, np.unique(values).tolist())} <= {*given}:
            kind = "class"
        else:
            values = _from_zero(column, values, location, len(given), option)
    if names is not None and values.dtype.kind in "US":
        if classes is None:
            try:
                numbered(list(names), sorted({*map(str, np.unique(values.astype("U")).tolist())}), location)
            except (SourceError, UnicodeDecodeError) as exc:
                raise SourceError(
                    f"{location!r}: {column!r} has classes that the array class_names does not name; complete it, or "
                    "use --labels none"
                ) from exc
            classes = names
        names = None
    return array_labels(column, values, location, classes, names=names, kind=kind, option=option)


def _from_zero(column: str, values: NDArray[Any], location: str, count: int, option: str) -> NDArray[Any]:
    """Labels from 1 to `count` as those from 0; labels that begin at 0 as they are."""
    low, high = int(values.min()), int(values.max())
    if low >= 1 and high < count:
        raise SourceError(
            f"{location!r}: {column!r} has labels from {low} to {high} for {count} names of classes, which could be "
            f"those of 0 to {count - 1} or of 1 to {count}; use --labels {option}:integer for the former, or give "
            f"--classes-from the dataset that was built of all classes"
        )
    return values - 1 if low >= 1 and high == count else values


def class_names(files: Files, found: Sequence[Array]) -> tuple[str, ...] | None:
    """The names of classes in the arrays `class_names` of all files; None if there are none.

    Raises:
        SourceError: they are damaged, contradict each other, or a name occurs twice.
    """
    if not found:
        return None
    first: tuple[str, ...] = ()
    for array in found:
        values = npy.values(files, array)
        try:
            texts = [as_text(name) if isinstance(name, bytes) else str(name) for name in values.tolist()]
        except (SystemError, ValueError) as exc:  # invalid code points
            raise SourceError(f"{array.where} has names that are no text; save them again") from exc
        names = tuple(name.strip() for name in texts)
        if not all(names) or len({*names}) < len(names):
            raise SourceError(f"{array.where} has an empty name, or one twice; give each class once")
        if first and names != first:
            raise SourceError(f"{array.where} has other names of classes than {found[0].where}; build them apart")
        first = names
    return first or None
