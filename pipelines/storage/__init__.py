"""Where OUT lies: a folder or an object store."""

from __future__ import annotations

import os

from ..errors import StorageError
from .base import URL, Storage
from .holders import Fence
from .local import LocalStorage


def open_storage(out: str | os.PathLike[str], under: Fence | None = None) -> Storage:
    """OUT: a folder, or s3://bucket/path and the like on an object store.

    Args:
        out: where it is.
        under: the lock of another process, for which this one works.

    Raises:
        StorageError: no such store, or its client is not installed.
    """
    text = os.fspath(out)
    url = URL.match(text)
    if url is None or (url[1] == "file" and url[2]):
        return LocalStorage(text.removeprefix("file://"), under)
    from .clients import PACKAGES
    from .objects import ObjectStorage

    if url[2]:
        return ObjectStorage(text, under)
    if url[1] in PACKAGES:
        raise StorageError(f"OUT {text!r} lacks a slash, as pathlib.Path leaves it; give {url[1]}://... as a str")
    return LocalStorage(text, under)
