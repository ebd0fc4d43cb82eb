"""Sidecar tables, which hold the labels of a folder's images: one for all of them, or one in each folder."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence

from ...errors import SourceError, UsageError
from ...storage.base import is_remote
from ..base import Group, location_of
from ..labels import LabelSpec
from .columns import PATH_COLUMNS, named_columns, path_column, usual
from .paths import TableRoot, relative_path
from .rows import EXTENSIONS, Table, TableListing

_TABLE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, EXTENSIONS))}))(?::(.*))?", re.I | re.S)  # FILE.csv:A,B


def list_sidecars(
    labels: str,
    location: str,
    folders: Callable[[str], Iterator[Group]],
    *,
    key: str | None,
    classes: Sequence[str] | None,
    follow_links: bool,
) -> TableListing:
    """The items that the sidecar tables name, with their labels.

    Args:
        labels: `FILE.csv` for one table with paths relative to SRC, or `csv:NAME.csv` for a table in each folder with
            names of files in that folder; optionally followed by `:A,B`, the label columns. See `FolderSource`.
        location: SRC.
        folders: lists the folders that contain images or a file of the given name.
        key: as for `TableListing`.
        classes: as for `read_labels`.
        follow_links: whether symbolic links in paths may lead out of SRC.

    Raises:
        SourceError: a table is missing or damaged, or has other label columns than the first one.
        UsageError: `labels` has another form.
    """
    match = _TABLE.fullmatch(labels.removeprefix("csv:"))
    if labels.startswith("csv:"):
        if match is None or "/" in match[1]:
            raise UsageError(
                f"--labels {labels}: give the name that a table has in each folder, as in csv:labels.csv or "
                f"csv:labels.csv:A,B; tables have one of {' '.join(EXTENSIONS)}"
            )
        location_of(match[1])
        return _in_folders(match[1], match[2], location, folders(match[1]), key, follow_links).finish(classes)
    if match is None:
        raise UsageError(
            f"--labels {labels!r} of a folder; allowed: class-dir, none, a table FILE.csv or FILE.csv:A,B, or "
            f"csv:NAME or csv:NAME:A,B, a table in every folder; tables have one of {' '.join(EXTENSIONS)}"
        )
    table = Table(match[1])
    asked = named_columns(match[2], table.columns, table.location, f"{match[1]}:")
    if not asked:
        raise SourceError(
            f"--labels {labels}: it has the columns {', '.join(map(repr, table.columns))}, none with a usual name of "
            f"labels; say --labels {match[1]}:{table.columns[-1]}"
        )
    listing = TableListing(table.location, asked, key)
    listing.add(table, path_column(None, table.columns, table.location), TableRoot(location, None, follow_links).path)
    return listing.finish(classes)


def absolute_labels(labels: str) -> str:
    """`--labels` with an absolute path in `FILE.csv`, since another process may have another working directory."""
    match = None if labels.startswith("csv:") else _TABLE.fullmatch(labels)
    if match is None or is_remote(match[1]):
        return labels
    return os.path.abspath(match[1]) + (f":{match[2]}" if match[2] else "")


def _in_folders(
    name: str, names: str | None, location: str, folders: Iterator[Group], key: str | None, follow_links: bool
) -> TableListing:
    root = TableRoot(location, None, follow_links)
    listing: TableListing | None = None
    first: tuple[str, LabelSpec] = "", []
    for group in folders:
        folder = os.fsdecode(group.folder)
        path = os.path.join(location, folder, name)
        if not os.path.lexists(path):
            raise SourceError(f"{os.path.dirname(path)!r} has images and no {name!r}; add one, or move them away")
        table = Table(path)
        column, asked = _columns(table, names, f"csv:{name}:", key)
        if listing is None:
            listing, first = TableListing(location, asked, key), (folder, asked)
        if {*asked} != {*first[1]}:
            raise SourceError(
                f"{location!r}: {name!r} has the labels {_names_of(first[1])} in {first[0] or '.'!r} and "
                f"{_names_of(asked)} in {folder!r}; give all the same"
            )
        listing.add(table, column, functools.partial(_in_folder, folder=folder, root=root))
    if listing is None:
        raise SourceError(f"{location!r} has no folder with images or with a table {name!r}")
    return listing


def _columns(table: Table, names: str | None, before: str, key: str | None) -> tuple[str, LabelSpec]:
    """The file name column and the label columns of a folder's table."""
    asked = named_columns(names, table.columns, table.location, before)
    others = [each for each in table.columns if each and each != key and each not in dict(asked)]
    column = next(iter((*usual(PATH_COLUMNS, others), *others)), None)
    asked = asked or [(each, None) for each in others if each != column]
    if column is None or not asked:
        raise SourceError(
            f"{table.location!r} has the columns {', '.join(map(repr, table.columns))}; it needs one of file names and "
            f"one of labels{'' if key is None else f', beside {key!r}'}"
        )
    return column, asked


def _in_folder(text: str, folder: str, root: TableRoot) -> bytes:
    """The path relative to SRC of a file that a folder's table names. Raises ValueError if it is not in the folder."""
    if "/" in text or ("\\" in text and not os.path.lexists(os.path.join(root.root, folder, text))):
        raise ValueError(f"has {text!r}; a table in every folder has names of files of that folder alone")
    return root.path(folder + text) if text not in ("", ".", "..") else relative_path(text, root.root)


def _names_of(columns: LabelSpec) -> str:
    return ", ".join(repr(name) for name, _ in columns) or "none"
