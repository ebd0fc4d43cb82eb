"""Detects which kind of collection SRC is, from its name and its content."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator

from ..errors import SourceError
from ..storage.base import is_remote
from .access.stores import without_query
from .base import as_bytes, is_hidden, is_image

_LOOKED_AT = 1000  # files
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
                f"{location!r} is a file of unknown kind; give a folder, or a file with one of "
                f"{' '.join(_BY_EXTENSION)}; if it is one of these under another name, add --source KIND"
            )
        return kind
    if any(os.path.isfile(os.path.join(location, name)) for name in _CIFAR_FILES):
        return "cifar"
    return _kind_of_folder(location)


def _kind_of_folder(location: str) -> str:
    """`parquet` for a folder of such files, `numpy` for one of NumPy's or of class folders of them; else `folder`.

    A folder with an image is one of images; only some of the files below are looked at.
    """
    top: list[os.DirEntry[str]] = []
    # The source itself reports a folder that cannot be listed.
    with contextlib.suppress(OSError), os.scandir(location) as entries:
        top = [entry for entry in entries if not is_hidden(as_bytes(entry.name))]
    flat = not any(os.path.isdir(entry.path) for entry in top)
    if flat and any(entry.name.endswith(".parquet") for entry in top):
        return "parquet"
    arrays = False
    for name in itertools.islice(_files_in(location), _LOOKED_AT):
        if is_image(as_bytes(name)):
            return "folder"
        arrays = arrays or _BY_EXTENSION.get(os.path.splitext(name)[1].lower()) == "numpy"
    return "numpy" if arrays else "folder"


def _files_in(location: str) -> Iterator[str]:
    """The names of the files in a folder, and in those below it, without hidden ones."""
    waiting = [location]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if is_hidden(as_bytes(entry.name)):
                    continue
                if os.path.isdir(entry.path):
                    waiting.append(entry.path)
                else:
                    yield entry.name
