"""Tables (CSV, TSV, JSON lines, Parquet) as SRC, with a path and labels in each row."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ...config import BuildConfig
from ...errors import SourceError
from ...storage.base import is_remote
from ..access.local import LocalFiles
from ..access.stores import READS_AT_ONCE, ask_store, fetch, is_web, store_of, without_query
from ..base import Group, Item, full_location
from ..labels import LabelledSource
from .columns import key_column, label_columns, path_column
from .paths import TableRoot
from .rows import Table, TableListing


class TableSource(LabelledSource[TableListing]):
    """The images that a table names, in the order of its rows.

    Paths are relative to the table's folder, or to `config.root`; either may be a URL. Absolute paths and URLs are
    accepted if they are below that folder. On a disk, symbolic links must not lead out of it unless
    `config.follow_links` is set. Labels are the columns that `config.labels` names, or the one with a usual name. On a
    disk, the frames of a DICOM file are items as in a folder, each with the labels of its row.

    Raises:
        SourceError: the table cannot be read or lacks a column; or a row has no path, a path outside the root, the path
            of another row, or an invalid label.
    """

    kind = "table"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._table: Table | None = (table := Table(location))
        self.location = table.location
        self.root = None if config.root is None else full_location(config.root)
        self._root = self.root or full_location(os.path.dirname(without_query(self.location)))
        self.file_per_item = not is_remote(self._root)
        if self.file_per_item and not os.path.isdir(self._root):
            raise SourceError(f"{self._root!r} is no folder; --root says what the paths of a table are relative to")
        self._files = LocalFiles(os.fsencode(self._root)) if self.file_per_item else None
        self.reads_at_once = 1 if self.file_per_item else READS_AT_ONCE
        self._path_column = path_column(config.image_column, table.columns, self.location)
        self._follow_links = config.follow_links
        self._asked = label_columns(config.labels, table.columns, self.location)
        self._key = key_column(config)
        self._classes = classes
        self._take_labels()

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_table": None}  # a table from the web holds a temporary file
        state.pop("_store", None)
        return state

    def groups(self) -> Iterator[Group]:
        """The items. The table is reread after the first call.

        Raises:
            SourceError: as the constructor, or the labels have changed since.
        """
        groups = self._listed().groups()
        return groups if self._files is None else map(self._files.with_frames, groups)

    def _list(self) -> TableListing:
        listing = TableListing(self.location, self._asked, self._key)
        root = TableRoot(self._root, follow_links=self._files is None or bool(self._follow_links))
        listing.add(self._table or Table(self.location), self._path_column, root.path)
        return listing.finish(self._classes)

    def frame(self, item: Item) -> int | None:
        """As `LocalFiles.frame`; None if the files are not on a disk."""
        return None if self._files is None else self._files.frame(item)

    def read(self, item: Item) -> bytes:
        """The bytes of the file; raises OSError or BadItem."""
        if self._files is not None:
            return self._files.read(item)
        return fetch(self._store, f"{self._root}/{item.path}", within=self._root)

    def local_path(self, item: Item) -> bytes:
        """The file's absolute path."""
        assert self._files is not None, "not file_per_item"
        return self._files.path(item)

    def others_readable(self, item: Item) -> bool:
        """As `LocalFiles.others_readable`; False if the files are not on a disk."""
        return self._files is not None and self._files.others_readable(item)

    def check(self) -> None:
        """Raises SourceError if the root of the paths is gone, or a store refuses every request."""
        if self.file_per_item and not os.path.isdir(self._root):
            raise SourceError(f"{self._root!r} is missing; restore it, then run the same command to resume")

        if self._files is None and not is_web(self._root):
            try:
                ask_store(lambda: self._store.info(self._root))
            except OSError as exc:  # other errors may concern listing, for which permission is not needed
                if exc.errno == errno.EINVAL:
                    raise SourceError(f"{self._root!r}: {exc.strerror}; log in again, then resume") from exc

    @functools.cached_property
    def _store(self) -> Any:
        return store_of(self._root)
