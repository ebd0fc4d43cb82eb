"""Which columns of a table are used: paths, labels, and the key that a split keeps together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ..labels import KINDS, LabelSpec, label_spec

log = logging.getLogger(__name__)

PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")


def usual(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns that have one of the names, ignoring case, in the order of the names."""
    return [column for name in names for column in columns if column.lower() == name]


def require(name: str, columns: Sequence[str], location: str) -> str:
    """The given name. Raises SourceError unless exactly one column has it."""
    if columns.count(name) != 1:
        what = "no" if name not in columns else "more than one"
        raise SourceError(f"{location!r} has {what} column {name!r}; it has {_shown(columns)}")
    return name


def path_column(asked: str | None, columns: Sequence[str], location: str) -> str:
    """The column of paths: the one asked for, or else the one with the first of the usual names."""
    found = asked or next(iter(usual(PATH_COLUMNS, columns)), None)
    if found is None:
        raise SourceError(
            f"{location!r} has no column {', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}; it has "
            f"{_shown(columns)}; name one of them so, or say --image-column NAME where SRC is the table; if that is a "
            "row already, add a line of column names before it"
        )
    return require(found, columns, location)


def label_columns(labels: str | None, columns: Sequence[str], location: str) -> LabelSpec:
    """The label columns of SRC, as `named_columns`; none for `--labels none`. Warns if it finds none."""
    if labels == "none":
        return []
    found = named_columns(labels, columns, location)
    if not found and len(columns) > 1:
        log.warning(
            "%r has no column with a usual name of labels, but %s; the dataset gets no labels unless --labels A,B "
            "names columns",
            location, _shown(columns),
        )  # fmt: skip
    return found


def named_columns(names: str | None, columns: Sequence[str], location: str, before: str = "") -> LabelSpec:
    """The label columns of a table: those named, as in A,B:float, or else the one with a usual name, if any.

    Args:
        names: of the label columns, or None.
        columns: all columns of the table.
        location: the table.
        before: what precedes `names` in `--labels`, for messages.

    Raises:
        SourceError: there is no such column, or two have usual names.
        UsageError: as `label_spec`, or an unknown kind.
    """
    if names is None:
        found = [require(name, columns, location) for name in usual(LABEL_COLUMNS, columns)]
        if len(found) > 1:
            raise SourceError(
                f"{location!r} has the columns {_shown(found)}; say --labels {before}{found[0]}, or "
                f"{before}A,B, or none"
            )
        return [(name, None) for name in found]
    asked = label_spec(names)
    for name, _ in asked:
        column, colon, kind = name.rpartition(":")
        if colon and name not in columns and column in columns:
            raise UsageError(f"--labels {before}{name}: {kind!r} is no kind of labels; allowed: {', '.join(KINDS)}")
        require(name, columns, location)
    return asked


def key_column(config: BuildConfig) -> str | None:
    """The column that `--split-by` names, if any."""
    return None if config.split_by in (None, "label", "random", "folder") else config.split_by


def _shown(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns[:30])) + (", ..." if len(columns) > 30 else "")
