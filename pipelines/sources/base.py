"""The interface of a collection of images, and reading an item: which errors are the file's fault and which are not."""

from __future__ import annotations

import abc
import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..errors import ShardError, SourceError
from ..storage.base import is_remote
from ..storage.retries import with_retries
from .rejects import BadItem

IMAGE_EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .gif .tif .tiff .ppm .pgm .pbm .pnm .dcm .dicom".split()
)  # the extension decides whether a file is an item; its content decides how it is decoded
RETRY_DELAYS_S = (0.1, 0.5, 2.0)
# Hidden names, and what macOS, Windows, ext4 and Synology leave in folders and archives.
_HIDDEN = re.compile(
    rb"(?:^|/)(?:\.|(?:__MACOSX|@eaDir|lost\+found|System Volume Information|\$RECYCLE\.BIN|desktop\.ini|thumbs\.db)"
    rb"(?:/|$))",
    re.IGNORECASE,
)
# The name of a side of a split, alone or as part of a name: `training_set`, `train2017`.
_SIDE = re.compile(
    r"(?<![^\W_])(?:train|training|val|valid|validation|dev|eval|evaluation|test|testing|holdout)(?=sets?(?![^\W_])|[\W\d_]|$)"
)
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_UNREADABLE = {
    errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ENODEV, errno.EOVERFLOW,  # from devices, or for a URL that a server refuses
}  # fmt: skip
# What reads from a bad sector or a failing disk raise; EBADMSG and EUCLEAN are checksum errors.
_DAMAGED = {getattr(errno, name, errno.EIO) for name in ("EIO", "EBADMSG", "EUCLEAN", "ENODATA", "EREMOTEIO")}


Label = int | float | tuple[int | float, ...]


class Item(NamedTuple):
    """One source image.

    Attributes:
        index: its position in the plan.
        path: relative to the source, POSIX.
        label: None if it has none, a tuple if there are several label columns.
        place: where its source finds it, if not by its path: numbers that only that source can interpret.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which an item does not need
    path: str
    label: Label | None
    place: tuple[int, ...] = ()


class LabelColumn(BaseModel):
    """One column of labels. Labels of kind `class` are indices into `classes`; others are the values given."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["class", "integer", "float"]
    classes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind if self.classes is None else f'{len(self.classes)} classes'})"


@dataclass(frozen=True)
class Group:
    """Items listed together: the images of one folder, or some of one archive.

    Attributes:
        folder: relative to the source; ends with a slash, or is empty.
        names: the rest of each item's path.
        label: the label of all items; -1 if there are none, or if each item has its own.
        labels: the label of each item: int64 or float64 (items,), or (items, K) for K columns.
        places: see `Item.place`: int64 (items, numbers).
        keys: what each item belongs to (such as a patient), which a split must keep together; without surrounding
            blanks.
    """

    folder: bytes
    names: list[bytes]
    label: int = -1
    labels: NDArray[Any] | None = None
    places: NDArray[Any] | None = None
    keys: Sequence[bytes] | None = None


@dataclass(frozen=True)
class Batch:
    """Consecutive items of one shard, which has at least one batch; `last` marks the shard's last one."""

    shard: int
    items: list[Item]
    last: bool


class Source(abc.ABC):
    """A collection of images. Paths of items are unique, relative to the collection, POSIX, PEP 383 text.

    Attributes:
        kind: the form of the collection.
        location: SRC.
        root: the setting, in a form that is valid from any working directory.
        class_names: the names of classes by number, if the only label column holds classes; else None.
        columns: the label columns, unless `class_names` describes the only one.
        files: name and size of each file that holds items at places. If a file changes, its places are void.
        file_per_item: whether each item is a file of its own, with a `local_path`.
        reads_at_once: how many reads to run concurrently; more than one if a read has a long latency.
        listing: a digest of the items and labels that tables name; None if no table is involved.
        left_out: how many files the last listing skipped because of their names, by `extension_of` the name.
        outside: how many items of the last listing are outside SRC, reached through symbolic links.
        unfollowed: how many symbolic links the last listing skipped because links are not followed.
        impossible: names in an object store that the last listing skipped because no folder could have them.
        bare: class folders in which the last listing found no image.
    """

    kind: str
    location: str
    root: str | None = None
    class_names: tuple[str, ...] | None = None
    columns: tuple[LabelColumn, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    file_per_item = False
    reads_at_once = 1
    listing: str | None = None
    left_out: Mapping[str, int] = MappingProxyType({})
    outside: int = 0
    unfollowed: int = 0
    impossible: Sequence[str] = ()
    bare: Sequence[str] = ()

    @abc.abstractmethod
    def groups(self) -> Iterator[Group]:
        """All items in their natural order. Each call lists them again."""

    @abc.abstractmethod
    def read(self, item: Item) -> bytes:
        """The encoded bytes of an item; raises OSError or BadItem."""

    def frame(self, item: Item) -> int | None:
        """The number of an item's image in a file of several images; None if the item is a whole file."""
        return None

    def local_path(self, item: Item) -> bytes:
        """The path of an item on a local filesystem. Only if `file_per_item`."""
        raise NotImplementedError

    def others_readable(self, item: Item) -> bool:
        """Whether other items can be read while this one gives EIO, so that the item is at fault. False if unknown."""
        return False

    def check(self) -> None:  # noqa: B027  # optional: most sources have nothing to check
        """Raises SourceError if the whole collection is gone or no longer readable."""

    def require_sound(self, places: NDArray[np.int64]) -> None:  # noqa: B027  # optional
        """Raises SourceError if files are damaged in a way that `read` cannot notice.

        Args:
            places: of the items that will be read, (N, numbers); see `Item.place`.
        """


def read_item(source: Source, item: Item) -> bytes:
    """The encoded bytes of an item.

    Errors that are not the file's fault (EIO, ESTALE, EMFILE, no memory, timeouts) are retried with growing delays. EIO
    is the file's fault if it persists while other files can be read.

    Raises:
        BadItem: the file is missing, unreadable or empty: a property of the file.
        ShardError: the error persisted.
    """
    try:
        data = with_retries(lambda: source.read(item), RETRY_DELAYS_S, _may_pass)
    except (OSError, MemoryError) as exc:
        number = getattr(exc, "errno", None)
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        if number in _MISSING:
            source.check()
            raise BadItem("read", "missing", reason) from exc
        # EAGAIN: a regular file gives it only while another process has a lease on it.
        own = number in _UNREADABLE or number == errno.EAGAIN
        if own or (number in _DAMAGED and source.others_readable(item)):
            source.check()
            raise BadItem("read", "unreadable", reason) from exc
        raise ShardError(
            f"reading {item.path!r} failed {len(RETRY_DELAYS_S) + 1} times: {reason}; "
            f"check {source.location!r}, then run the same command to resume"
        ) from exc
    if not data:
        raise BadItem("read", "empty", "zero bytes")
    return data


def _may_pass(exc: Exception) -> bool:
    number = exc.errno if isinstance(exc, OSError) else None
    return isinstance(exc, (OSError, MemoryError)) and number not in _MISSING | _UNREADABLE


def label_form(columns: Sequence[LabelColumn]) -> tuple[type[np.generic], tuple[int, ...]]:
    """Dtype and shape of one item's stored labels: int64, or float64 if any column is; (), or (K,) for K columns."""
    kind = np.float64 if any(column.kind == "float" for column in columns) else np.int64
    return kind, (len(columns),) if len(columns) > 1 else ()


def countable(class_names: Sequence[str] | None, columns: Sequence[LabelColumn]) -> bool:
    """Whether there is one label column, of classes or integers; see `Source`."""
    return class_names is not None or [column.kind for column in columns] == ["integer"]


def location_of(place: str | os.PathLike[str]) -> str:
    """A path, a pattern of paths or a URL as text, without `file://`.

    Raises:
        SourceError: it is not a valid name.
    """
    text = os.fspath(place).removeprefix("file://")
    try:
        possible = text and "\0" not in text and as_bytes(text)
    except UnicodeEncodeError:  # a surrogate outside PEP 383's range
        possible = False
    if not possible:
        raise SourceError(f"{text!r} is empty, has a NUL byte, or is no text; give a path or a URL")
    return text


def full_location(place: str | os.PathLike[str]) -> str:
    """As `location_of`, but a path is made absolute, since another process may have another working directory."""
    location = location_of(place)
    return location.rstrip("/") if is_remote(location) else os.path.abspath(location)


def as_text(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 become surrogates (PEP 383)."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The inverse of `as_text`."""
    return text.encode("utf-8", "surrogateescape")


def is_image(name: bytes) -> bool:
    """Whether a file of this name is an item, by its extension."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def is_hidden(path: bytes) -> bool:
    """Whether a file or folder is skipped silently because of a component of its path; see `_HIDDEN`."""
    return _HIDDEN.search(path) is not None


def extension_of(name: bytes) -> str:
    """A name's extension in lower case; empty if it does not look like a file type (`IM0001`, `1.2.840.113619`)."""
    extension = as_text(os.path.splitext(name)[1].lower())
    return extension if re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", extension) else ""


def files_left_out(left_out: Mapping[str, int]) -> str:
    """How many files were skipped because of their names, for messages."""
    shown = [f"{count} {extension or 'without extension'}" for extension, count in Counter(left_out).most_common(5)]
    kinds = ", ".join(shown) + (", ..." if len(left_out) > 5 else "")
    return f"{sum(left_out.values())} files are ignored because of their names ({kinds})"


def no_images(location: str, left_out: Mapping[str, int]) -> SourceError:
    """The error for a collection without items."""
    others = f"; {files_left_out(left_out)}" if left_out else ""
    if ".tar" in left_out:
        others += f"; for the images in tars, give {location + '/*.tar'!r}"
    return SourceError(
        f"{location!r} holds no images ({extensions()}){others}; give a folder of class folders or of images, an "
        "archive of either, or a table of paths, whose files may have any extension"
    )


def extensions() -> str:
    """The extensions of images, for messages."""
    return " ".join(sorted(map(as_text, IMAGE_EXTENSIONS)))


def is_side(name: str) -> bool:
    """Whether a folder is named like a side of a split: `train`, `Validation`, `test_set`, `train2017`."""
    return _SIDE.search(name.lower()) is not None


def split_sides(names: Iterable[str]) -> list[str]:
    """The names that are sides of the same split, such as `train` and `val`."""
    alike: dict[str, list[str]] = {}
    for name in names:
        rest, count = _SIDE.subn("*", name.lower())
        if count == 1:
            alike.setdefault(rest, []).append(name)
    return [name for group in alike.values() if len(group) > 1 for name in group]


def refuse_sides(location: str, folders: Mapping[str, Iterable[str]], command: Callable[[str], str]) -> None:
    """Raises SourceError if sides of a split would become classes.

    Args:
        location: SRC.
        folders: the names of the subfolders of each folder that is named like a side.
        command: gives the command that builds a side, up to OUT.
    """
    counts = Counter(name for inner in folders.values() for name in {*inner})
    common = sorted(name for name, count in counts.items() if count > 1)
    if common:
        first, second, *_ = sorted(folders, key=lambda side: "train" not in side.lower())
        raise SourceError(
            f"{location!r} has {', '.join(map(repr, folders))} side by side, with the same folders in them "
            f"({some(common)}): these look like the sides of a split, not like classes. Build each one separately: "
            f"{command(first)} {quote(f'OUT/{first}')}, then {command(second)} {quote(f'OUT/{second}')} --classes-from "
            f"{quote(f'OUT/{first}')}; or use --labels class-dir if they are classes"
        )


def numbered(class_names: list[str], found: list[str], location: str) -> dict[str, int]:
    """The number of each class found: its index in a given list of names.

    Raises:
        SourceError: the list lacks a name.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in found if name not in numbers]
    if unknown:
        raise SourceError(
            f"{location!r} has {len(unknown)} classes that are not in the given list: {some(unknown)}; "
            "omit these items, or give a list that names these classes"
        )
    return {name: numbers[name] for name in found}


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
