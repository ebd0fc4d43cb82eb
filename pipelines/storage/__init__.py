"""Storage for OUT: a folder or an object store."""

from __future__ import annotations

import os

from ..errors import StorageError
from .base import URL, Storage
from .holders import Fence
from .local import LocalStorage


def open_storage(out: str | os.PathLike[str], under: Fence | None = None, *, only_read: bool = False) -> Storage:
    """Opens OUT: a folder, or a URL on an object store, such as s3://bucket/path.

    Args:
        out: a path or a URL.
        under: the lock of another process, on whose behalf this one works.
        only_read: whether this process will write nothing, so that errors of an object store only ask for what reading
            needs.

    Raises:
        StorageError: the store is not supported, or its client is not installed.
    """
    text = os.fspath(out)
    url = URL.match(text)
    if url is None or (url[1] == "file" and url[2]):
        return LocalStorage(text.removeprefix("file://"), under)
    from .clients import PACKAGES
    from .objects import ObjectStorage

    if url[2]:
        return ObjectStorage(text, under, only_read=only_read)
    if url[1] in PACKAGES:
        raise StorageError(
            f"OUT {text!r} has one slash too few, because pathlib.Path removes double slashes; give {url[1]}://... "
            "as a str"
        )
    return LocalStorage(text, under)
