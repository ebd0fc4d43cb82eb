"""What a collection of images must offer, and how its bytes are read: which trouble is the file's, and which is not."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ..errors import ShardError, SourceError
from ..rejects import BadItem

IMAGE_EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .gif .tif .tiff .ppm .pgm .pbm .pnm".split()
)  # the file's content decides how it is decoded; the extension only whether it is an item
RETRY_DELAYS_S = (0.1, 0.5, 2.0)
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_UNREADABLE = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Group:
    """Items that stand together: the images of one folder.

    `folder` is relative to the source and ends with a slash, or is empty; `label` is -1 where there are no labels.
    """

    folder: bytes
    names: list[bytes]
    label: int


class Source(Protocol):
    """A collection of images. Paths of items are relative to it, POSIX, PEP 383 text."""

    kind: str
    location: str
    class_names: tuple[str, ...] | None

    def groups(self) -> Iterator[Group]:
        """All items in their natural order, listed anew at each call."""
        ...

    def read(self, path: str) -> bytes:
        """The encoded bytes of an item; raises OSError or BadItem."""
        ...

    def local_path(self, path: str) -> bytes:
        """Where an item lies on a local filesystem."""
        ...

    def check(self) -> None:
        """Raises SourceError if the collection as a whole is gone."""
        ...


def read_item(source: Source, path: str) -> bytes:
    """The encoded bytes of an item.

    Trouble that is not the file's (EIO, ESTALE, EMFILE, no memory, time-outs) is tried again, with growing pauses.

    Raises:
        BadItem: the file is missing, unreadable or empty: a property of the file.
        ShardError: the trouble did not go away.
    """
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            data = source.read(path)
        except (OSError, MemoryError) as exc:
            number = getattr(exc, "errno", None)
            reason = getattr(exc, "strerror", None) or type(exc).__name__
            if number in _MISSING:
                source.check()
                raise BadItem("read", "missing", reason) from exc
            if number in _UNREADABLE:
                raise BadItem("read", "unreadable", reason) from exc
            if delay_s is None:
                raise ShardError(
                    f"reading {path!r} failed {len(RETRY_DELAYS_S) + 1} times: {reason}; "
                    f"see to {source.location!r}, then run the same command to resume"
                ) from exc
            time.sleep(delay_s)
        else:
            if not data:
                raise BadItem("read", "empty", "zero bytes")
            return data
    raise AssertionError("unreachable")


def numbered(class_names: list[str], found: list[str], location: str) -> dict[str, int]:
    """The number of each class found, by a given list of names.

    Raises:
        SourceError: a name was found that the list does not have.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in found if name not in numbers]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise SourceError(
            f"{location!r} has {len(unknown)} classes that --classes-from does not name: {shown}; "
            "remove these folders or give a list that names them"
        )
    return {name: numbers[name] for name in found}
