"""A folder tree: each folder of the first level is a class, unless tables beside the images have labels."""

from __future__ import annotations

import copy
import errno
import functools
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import SourceError
from ..rejects import MAX_ENCODED_BYTES, BadItem
from .base import IMAGE_EXTENSIONS, Group, Item, Source, numbered
from .beside import list_tables
from .rows import Listing

log = logging.getLogger(__name__)


class FolderSource(Source):
    """The images below a folder. Order: the images of a folder, then its subfolders, each sorted by their names' bytes.

    Hidden names are skipped, symbolic links followed. `labels` says where labels are:

    - `class-dir`, or None: a folder of the first level is a class, images deeper in it belong to that class, and
      classes are numbered in sorted order (or as `classes` says). A folder of images without such folders has none.
    - `none`: nowhere; images and folders of images may stand beside each other.
    - `FILE.csv`, `FILE.csv:A,B` (or another table): in a table with paths relative to the folder; its columns as
      `rows.label_columns` finds them. The items are those of the table, in its order.
    - `csv:NAME`: in a table NAME in each folder of images, with a column of file names, the first unless its name says
      which; all others are labels. The order in a folder is that of its table.

    Args:
        location: SRC.
        classes: the names of classes by number; found if None.
        labels: see above.
        key: the column of a table that `Group.keys` has.

    Raises:
        SourceError: not a folder, unreadable, without images; images beside folders of images where folders are
            classes; tables that are missing, damaged, or without a row for an image.
        UsageError: `labels` is none of these.
    """

    kind = "folder"
    file_per_item = True

    def __init__(
        self,
        location: str | os.PathLike[str],
        classes: Sequence[str] | None = None,
        labels: str | None = None,
        key: str | None = None,
    ) -> None:
        self.location = os.path.abspath(location)
        self._root = os.fsencode(self.location)
        names, folders = _scan(self._root, b"")
        self._root_identity = _identity(self._root)
        self._labels = labels or "class-dir"
        self._key = key
        self._classes = classes
        self._listing: Listing | None = None
        if not names and not folders:
            raise SourceError(
                f"{self.location!r} holds no images and no folders; SRC is a folder of class folders or of images "
                f"({_extensions()})"
            )
        if self._labels not in ("class-dir", "none"):
            self._listing = self._list()
            if found := self._listing.labels:
                self.class_names, self.columns = found.class_names, found.columns
            return
        self._flat = bool(names) or self._labels == "none"
        if self._flat:
            if self._labels == "class-dir":
                self._refuse_mixture(names, folders)
            if classes is not None:
                raise SourceError(f"{self.location!r} has no class folders; leave --classes-from out")
            return
        texts = [_text(folder) for folder in folders]
        self.class_names = tuple(texts if classes is None else classes)
        self._numbers = numbered(list(self.class_names), texts, self.location)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listing": None}

    def groups(self) -> Iterator[Group]:
        """The images, one folder at a time; each folder is read once, and no file is looked at.

        Raises:
            SourceError: a folder cannot be read, or a class has come after the classes were numbered.
        """
        if self._labels == "none":
            yield from self._walk(b"", -1)
        elif self._labels != "class-dir":
            yield from self._tabled()
        elif self._flat:
            yield Group(b"", _scan(self._root, b"")[0])
        else:
            for folder in _scan(self._root, b"")[1]:
                label = self._numbers.get(_text(folder))
                if label is None:
                    raise SourceError(
                        f"{_text(folder)!r} has come into {self.location!r} meanwhile; run the command again"
                    )
                yield from self._walk(folder + b"/", label)

    def anew(self) -> FolderSource:
        """The same folder as another machine sees it, where a shared filesystem has another device number."""
        other = copy.copy(self)
        other._root = os.fsencode(self.location)
        other._root_identity = _identity(other._root)
        return other

    def _tabled(self) -> Iterator[Group]:
        listing, self._listing = self._list() if self._listing is None else self._listing, None
        found = listing.labels
        if found and (found.class_names, found.columns) != (self.class_names, self.columns):
            raise SourceError(f"the labels of {self.location!r} have changed meanwhile; run the command again")
        paths = (group.folder + name for group in self._walk(b"", -1) for name in group.names)
        count, example = listing.lacking(paths)
        if count:
            raise SourceError(
                f"{self.location!r}: {count} images have no row in {self._labels!r}, {_text(example)!r} for one; add "
                "rows, or move the images away"
            )
        yield from listing.groups()

    def _list(self) -> Listing:
        folders = functools.partial(self._walk, b"", -1)
        return list_tables(self._labels, self.location, folders, key=self._key, classes=self._classes)

    def _walk(self, top: bytes, label: int, table: str | None = None) -> Iterator[Group]:
        """A class's folders that have images or a file `table`, each once: links may lead in several ways to one."""
        seen = {self._root_identity} if top else set()
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            identity = _identity(os.path.join(self._root, folder))
            if identity in seen:
                log.warning("%r leads to a folder that was listed already; its images are taken once", _text(folder))
                continue
            seen.add(identity)
            names, folders = _scan(self._root, folder)
            if names or (table is not None and os.path.lexists(os.path.join(self._root, folder, os.fsencode(table)))):
                yield Group(folder, names, label)
            waiting += [folder + name + b"/" for name in reversed(folders)]

    def _refuse_mixture(self, names: list[bytes], folders: list[bytes]) -> None:
        for folder in folders:
            if next(self._walk(folder + b"/", -1), None):
                raise SourceError(
                    f"{self.location!r} holds both images ({_text(names[0])!r}, ...) and folders of images "
                    f"({_text(folder)!r}, ...); move the images into a folder of their class, or out, or "
                    "say --labels none"
                )

    def read(self, item: Item) -> bytes:
        """The bytes of the file, read in full.

        Raises:
            OSError: as the system says.
            BadItem: not a regular file, or larger than any image should be.
        """
        return read_file(self.local_path(item))

    def local_path(self, item: Item) -> bytes:
        """The file's absolute path."""
        return self._root + b"/" + item.path.encode("utf-8", "surrogateescape")

    def check(self) -> None:
        """Raises SourceError if the folder itself is gone (an unmounted disk is no reason to reject its files)."""
        try:
            # An unmounted disk leaves the folder that it was mounted on.
            here = _identity(self._root) == self._root_identity
        except SourceError:
            here = False
        if not here:
            raise SourceError(f"{self.location!r} is gone; mount it again, then run the same command to resume")


def read_file(path: bytes) -> bytes:
    """The bytes of a regular file, read in full.

    Raises:
        OSError: as the system says.
        BadItem: not a regular file, or larger than any image should be.
    """
    # O_NONBLOCK: a named pipe under an image's name must not hang the build; regular files ignore it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadItem("read", "unreadable", "not a regular file")
        if status.st_size > MAX_ENCODED_BYTES:
            raise BadItem("read", "too-large", f"{status.st_size} bytes; at most {MAX_ENCODED_BYTES}")
        data = os.read(descriptor, status.st_size + 1)
        while len(data) <= MAX_ENCODED_BYTES and (more := os.read(descriptor, 1 << 20)):
            data += more
        return data
    finally:
        os.close(descriptor)


def _scan(root: bytes, folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """The names of the images and of the folders in root/folder, sorted."""
    names: list[bytes] = []
    folders: list[bytes] = []
    path = os.path.join(root, folder) if folder else root
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    folders.append(name)
                elif os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and _may_be_image(entry):
                    names.append(name)
    except OSError as exc:
        advice = "give SRC as a folder" if not folder else "make it readable or move it away"
        raise SourceError(f"{_text(path)!r}: {exc.strerror}; {advice}") from exc
    return sorted(names), sorted(folders)


def _may_be_image(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a file, or a link to one, even one that is gone; opening a pipe or a device could wait for ever."""
    there = os.path.exists(entry.path) if entry.is_symlink() else True  # a stat for links alone
    fits = not there or entry.is_file()
    if not fits:
        log.warning("%r is no file and is left out", _text(entry.path))
    return fits


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as exc:
        if exc.errno == errno.ELOOP:  # as a link that leads nowhere: no folder, and as an image it is a reject
            return False
        raise


def _identity(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise SourceError(f"{_text(path)!r}: {exc.strerror}; make it readable or move it away") from exc
    return status.st_dev, status.st_ino


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _extensions() -> str:
    return " ".join(sorted(extension.decode() for extension in IMAGE_EXTENSIONS))
