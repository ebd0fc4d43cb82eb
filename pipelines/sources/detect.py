"""Detects which kind of collection SRC is, from its name and its content."""

from __future__ import annotations

import contextlib
import os
import re

from ..errors import SourceError
from ..storage.base import is_remote
from .access.stores import without_query
from .base import as_bytes, is_hidden

_CIFAR_FILES = ("batches.meta", "meta")
_BY_EXTENSION = {
    ".tar": "tar", ".zip": "zip", ".csv": "table", ".tsv": "table", ".jsonl": "table", ".ndjson": "table",
    ".parquet": "parquet", ".npy": "numpy", ".npz": "numpy",
}  # fmt: skip
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)  # refused by the source of tars


def detected_kind(location: str, image_column: str | None) -> str:
    """The kind of a collection, by its name; of a folder, by its entries; of a tar, by its first members."""
    extension = os.path.splitext(without_query(location).rstrip("/"))[1].lower()
    kind = "tar" if _COMPRESSED_TAR.search(location) else _BY_EXTENSION.get(extension, "folder")
    if kind == "tar":
        from .archives.tar import kind_of

        return kind_of(location)
    if kind == "parquet":
        from .tables.parquet import kind_of as kind_of_parquet

        return kind_of_parquet(location, image_column)
    if kind != "folder" or is_remote(location):
        return kind
    if not os.path.isdir(location):
        if os.path.isfile(location):
            if any(os.path.isfile(os.path.join(os.path.dirname(location), name)) for name in _CIFAR_FILES):
                return "cifar"
            raise SourceError(
                f"{location!r} is a file of unknown kind; SRC is a folder, or a file with one of "
                f"{' '.join(_BY_EXTENSION)}; --source KIND says what it is"
            )
        return kind
    if any(os.path.isfile(os.path.join(location, name)) for name in _CIFAR_FILES):
        return "cifar"
    parquet = False
    with (
        contextlib.suppress(OSError),
        os.scandir(location) as entries,
    ):  # the source itself reports a folder that cannot be listed
        for entry in entries:
            if is_hidden(as_bytes(entry.name)):
                continue
            if os.path.isdir(entry.path):
                return kind
            parquet = parquet or entry.name.endswith(".parquet")
    return "parquet" if parquet else kind
