"""Makes file names of paths and class names, which may be anything: valid on any filesystem, and unique."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from ..sources.base import is_hidden, is_image

_MOST_BYTES = 160  # filesystems take 255, of which an extension, a number and a temporary name need up to 60
# Control characters, bytes that are not UTF-8 (PEP 383), and the tilde, which is kept for the numbers of `numbered`.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff~]")


def portable(text: str) -> str:
    """A file name, without an extension, of a class name, or of a path whose slashes become underscores.

    Control characters and bytes that are not UTF-8 become `%XX`. Of a long text, the end is kept. The name is not
    hidden, so `gpu-npz build` lists it.
    """
    name = _escaped(text).strip("/").replace("/", "_")
    name = name.encode()[-_MOST_BYTES:].decode("utf-8", "ignore")
    return f"_{name}" if not name or is_hidden(name.encode()) else name


def file_name(path: str, folder: str | None) -> str:
    """The name of an image's file, without an extension.

    Args:
        path: the image's path in its source.
        folder: the name of its class; paths that begin with it lose it.
    """
    if folder is not None:
        path = path.removeprefix(f"{folder}/")
    escaped = _escaped(path)
    return portable(os.path.splitext(path)[0] if is_image(escaped.encode()) else path)


def _escaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", text)


def numbered(name: str, number: int) -> str:
    """A name that is unique if the number is."""
    return f"{name}~{number}"


def column_names(names: Sequence[str], taken: str) -> list[str]:
    """The names of label columns beside a field `taken`: a column of this name gets the suffix `_label`."""
    found = list(names)
    if taken in found:
        other = f"{taken}_label"
        while other in found:
            other += "_label"
        found[found.index(taken)] = other
    return found


def repeated(names: Iterable[str], count: int, *, ignore_case: bool) -> set[int]:
    """The positions of names that an earlier one equals.

    Takes 32 bytes per name. Names with the same 64-bit hash count as equal.

    Args:
        names: the names.
        count: how many there are.
        ignore_case: whether names that differ in case, or in how letters are composed, are equal.
    """
    alike = (unicodedata.normalize("NFKC", name.casefold()) for name in names) if ignore_case else names
    hashes = np.fromiter(map(_hash, alike), np.uint64, count)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return set(order[1:][ordered[1:] == ordered[:-1]].tolist())


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
