"""DEST: files and folders that are made as a whole, by one export at a time, and are never overwritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from ..errors import MismatchError, StorageError
from ..storage.file_lock import FileLock
from ..storage.local import LocalStorage
from ..storage.names import TemporaryName

_MARK = ".gpu-npz-export.json"  # hidden, and no folder, which other tools would take for a class
_LOCK = ".gpu-npz-export.lock"


@contextlib.contextmanager
def new_files(*paths: str) -> Iterator[list[str]]:
    """Temporary files to be written and flushed in the body, which then get these names, in this order.

    Args:
        paths: the files, all in one folder; the last one is locked meanwhile.

    Raises:
        StorageError: one of the files exists, or cannot be written.
        LockedError: another export writes to it.
    """
    folder, locked = os.path.split(paths[-1])
    storage, names = LocalStorage(folder, called="DEST"), [os.path.basename(path) for path in paths]
    lock = FileLock(storage.path(f".{locked}.lock"), paths[-1], 0, [])
    with storage.explained(locked), lock, contextlib.ExitStack() as stack:
        for path in paths:
            if os.path.lexists(path):
                raise StorageError(
                    f"{path!r} already exists, and export does not overwrite files; remove it or choose another DEST"
                )
        temporaries = []
        for name in names:
            storage.remove_leftovers(name)  # of exports that were killed
            temporaries.append(storage.temporary(name))
            stack.callback(storage.discard, temporaries[-1])
        yield temporaries
        for temporary, name in zip(temporaries, names, strict=True):
            storage.publish(temporary, name)


@contextlib.contextmanager
def new_folder(dest: str, content: dict[str, Any]) -> Iterator[LocalStorage]:
    """A folder to be filled in the body, one whole file after another.

    Files under their final names are whole. If the folder has been begun with the same content, it is completed.

    Args:
        dest: the folder, which need not exist.
        content: JSON values that say what the folder is an export of.

    Raises:
        StorageError: the folder has other files, or cannot be written.
        MismatchError: it has been begun with other content.
        LockedError: another export writes to it.
    """
    storage = LocalStorage(dest, called="DEST")
    with storage.explained(""), FileLock(storage.path(_LOCK), dest, 0, []):
        found = storage.read(_MARK)
        if found is None:
            foreign = [name for name in storage.names() if name != _LOCK and not TemporaryName.of(name)]
            if foreign:
                raise StorageError(
                    f"{dest!r} is not empty and holds no export ({foreign[0]!r}, ...); choose a new or empty folder"
                )
            storage.write(_MARK, json.dumps(content, indent=1).encode() + b"\n")
        else:
            _require_same(found, content, dest)
        storage.remove_temporaries("")
        yield storage


def ignores_case(storage: LocalStorage) -> bool:
    """Whether the filesystem of a `new_folder` takes names for equal that differ in case only."""
    return storage.size(_MARK.upper()) is not None


def _require_same(found: bytes, content: dict[str, Any], dest: str) -> None:
    try:
        old = dict(json.loads(found))
    except (ValueError, TypeError, RecursionError):
        old = {}
    differences = [
        f"{key} {old.get(key)!r} there, {value!r} now" for key, value in content.items() if old.get(key) != value
    ]
    if differences:
        raise MismatchError(
            f"{dest!r} holds another export ({'; '.join(differences)}); give the same options to complete it, or "
            "choose another DEST"
        )
