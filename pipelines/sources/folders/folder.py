"""Folder trees: each top-level folder is a class, and all images below it belong to that class."""

from __future__ import annotations

import abc
import copy
import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from shlex import quote

import numpy as np

from ...errors import SourceError, UsageError
from ..access.local import Inside, LocalFiles
from ..base import (
    IMAGE_EXTENSIONS,
    Group,
    Item,
    Source,
    as_bytes,
    as_text,
    extension_of,
    is_hidden,
    is_image,
    no_images,
    numbered,
    refuse_sides,
    split_sides,
)
from ..labels import LabelledSource
from ..tables.rows import EXTENSIONS, TableListing
from ..tables.sidecar import absolute_labels, list_sidecars

log = logging.getLogger(__name__)
LABELS = ("class-dir", "none")
_PATH_MAX = 4096  # of Linux, with the terminating zero byte; folders with longer paths cannot be listed


@dataclass(frozen=True)
class Scan:
    """The content of one folder, sorted by name.

    Attributes:
        names: of images.
        folders: names of subfolders.
        others: how many files have other names, by extension.
        sizes: of the images, in bytes; empty if the listing does not include sizes.
        outside: how many of the images are outside the source, reached through symbolic links.
        unfollowed: how many symbolic links were skipped.
        impossible: names, skipped, that no folder could have.
    """

    names: list[bytes]
    folders: list[bytes]
    others: Counter[str]
    sizes: list[int] = field(default_factory=list)
    outside: int = 0
    unfollowed: int = 0
    impossible: list[str] = field(default_factory=list)


class TreeSource(Source):
    """The images below a folder, on any store.

    Items are ordered: the images of a folder, then its subfolders, both sorted by the bytes of their names. Hidden
    names are skipped (`is_hidden`); symbolic links are followed. An item's place is its size, if the listing includes
    sizes. `labels` says where labels come from:

    - `class-dir`, or None: each top-level folder is a class and contains its images at any depth. Classes are numbered
      in sorted order, or as in `classes`. A folder of images without subfolders has no labels. If None, sides of a
      split that contain the same folders are refused.
    - `none`: there are no labels; a folder may contain both images and folders of images.

    Raises:
        SourceError: not a folder, unreadable, or without images; with `class-dir`, images next to folders of images, or
            sides of a split.
        UsageError: `labels` has another value.
    """

    kind = "folder"
    left_out: Counter[str]
    impossible: list[str]

    def __init__(self, location: str, classes: Sequence[str] | None = None, labels: str | None = None) -> None:
        self.location = location
        self._labels = labels or "class-dir"
        if self._labels not in LABELS:
            raise UsageError(f"--labels {labels} of {location!r}; allowed here: {', '.join(LABELS)}")
        top = self._scan(b"")
        self._root_identity = self._identity(b"")
        self._count_anew()
        if not top.names and not top.folders:
            raise no_images(self.location, top.others)
        self._flat = bool(top.names) or self._labels == "none"
        if self._flat:
            if self._labels == "class-dir":
                self._refuse_mixture(top)
            return
        found = [as_text(folder) for folder in top.folders]
        if labels is None:
            sides = {side: map(as_text, self._scan(as_bytes(side) + b"/").folders) for side in split_sides(found)}
            refuse_sides(self.location, sides, lambda side: f"gpu-npz build {quote(f'{self.location}/{side}')}")
        self.class_names = tuple(found if classes is None else classes)
        self._numbers = numbered(list(self.class_names), found, self.location)

    @abc.abstractmethod
    def _scan(self, folder: bytes) -> Scan:
        """Lists a folder. Raises SourceError if it cannot be listed."""

    @abc.abstractmethod
    def _identity(self, folder: bytes) -> Hashable:
        """Identifies a folder, whichever path leads to it. Raises SourceError if it does not exist."""

    def groups(self) -> Iterator[Group]:
        """The images, one group per folder. Each folder is listed once; no file is opened.

        Raises:
            SourceError: a folder cannot be read, or a class was added after the classes were numbered.
        """
        self._count_anew()
        self.bare = bare = []
        if self._labels == "none":
            yield from self._walk(b"", -1)
            return
        top = self._scan(b"")
        self._count(top)
        if self._flat:
            yield _group(b"", top, -1)
        else:
            for folder in top.folders:
                label = self._numbers.get(as_text(folder))
                if label is None:
                    raise SourceError(
                        f"{as_text(folder)!r} has come into {self.location!r} meanwhile; run the command again"
                    )
                images = 0
                for group in self._walk(folder + b"/", label):
                    images += len(group.names)
                    yield group
                if not images:
                    bare.append(as_text(folder))

    def _walk(self, top: bytes, label: int, also: Callable[[bytes], bool] = lambda folder: False) -> Iterator[Group]:
        """The folders that contain images or that `also` selects, each once even if several links lead to it."""
        seen = {self._root_identity} if top else set()
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            identity = self._identity(folder)
            if identity in seen:
                log.warning(
                    "%r leads to a folder that is listed already; its images are used only once", as_text(folder)
                )
                continue
            seen.add(identity)
            found = self._scan(folder)
            self._count(found)
            if found.names or also(folder):
                yield _group(folder, found, label)
            waiting += [folder + name + b"/" for name in reversed(found.folders)]

    def _count_anew(self) -> None:
        self.left_out = Counter()
        self.outside = self.unfollowed = 0
        self.impossible = []

    def _count(self, found: Scan) -> None:
        self.left_out += found.others
        self.outside += found.outside
        self.unfollowed += found.unfollowed
        self.impossible += found.impossible

    def _refuse_mixture(self, top: Scan) -> None:
        for folder in top.folders:
            if next(self._walk(folder + b"/", -1), None):
                raise SourceError(
                    f"{self.location!r} holds both images ({as_text(top.names[0])!r}, ...) and folders of images "
                    f"({as_text(folder)!r}, ...); move the images into a folder of their class or elsewhere, "
                    "or use --labels none"
                )


class FolderSource(TreeSource, LabelledSource[TableListing]):
    """The images below a folder on a disk; see `TreeSource`.

    Each frame of a multi-frame DICOM file is an item, such as `scan.dcm/0003`, and its place is the frame's number.
    The headers of DICOM files are read when they are listed. Labels can also come from sidecar tables:

    - `FILE.csv`, `FILE.csv:A,B` (or another table format): one table with paths relative to the folder. Its label
      columns are found by `columns.named_columns`. The items are those of the table, in its order.
    - `csv:NAME.csv`, `csv:NAME.csv:A,B`: a table of that name in each folder of images, with a column of file names,
      which is the one with a usual name, or else the first. Label columns are found in the same way; if none has a
      usual name, all other columns except `key` are labels. Items of a folder are in the order of its table.

    Args:
        location: SRC.
        classes: the names of classes by number; found if None.
        labels: see above.
        key: the table column for `Group.keys`.
        follow_links: if False, symbolic links are skipped, and table paths that lead out of the folder are refused.

    Raises:
        SourceError: as `TreeSource`; or a table is missing, damaged, or lacks a row for an image.
    """

    file_per_item = True
    extensions = IMAGE_EXTENSIONS  # of the files that are items

    def __init__(
        self,
        location: str | os.PathLike[str],
        classes: Sequence[str] | None = None,
        labels: str | None = None,
        key: str | None = None,
        *,
        follow_links: bool = True,
    ) -> None:
        self._root = os.path.abspath(os.fsencode(location))
        self._follow_links = follow_links
        self._links = _Links(self._root)
        self._files = LocalFiles(self._root)
        self._key, self._classes = key, classes
        self._sidecars = None if labels is None or labels in LABELS else absolute_labels(labels)
        if self._sidecars is None:
            super().__init__(os.path.abspath(location), classes, labels)
        else:
            super().__init__(os.path.abspath(location), None, "none")
            self._take_labels()

    def anew(self) -> FolderSource:
        """The same folder opened on another machine, on which a shared filesystem has another device number."""
        other = copy.copy(self)
        other._root = os.path.abspath(os.fsencode(self.location))
        other._files, other._links = LocalFiles(other._root), _Links(other._root)
        other._root_identity = other._identity(b"")
        return other

    def _list(self) -> TableListing:
        assert self._sidecars is not None

        def folders(name: str) -> Iterator[Group]:
            table = os.fsencode(name)
            return self._walk(b"", -1, lambda folder: os.path.lexists(os.path.join(self._root, folder, table)))

        return list_sidecars(
            self._sidecars,
            self.location,
            folders,
            key=self._key,
            classes=self._classes,
            follow_links=self._follow_links,
        )

    def _groups_of_sidecars(self) -> Iterator[Group]:
        """The items that the sidecar tables name. Raises SourceError if they do not name every image."""
        listing = self._listed()
        self._count_anew()
        listing.require_rows(group.folder + name for group in self._walk(b"", -1) for name in group.names)
        # Tables may name files with any extension; count as left out only files that no table names.
        self.left_out -= Counter({extension: self.left_out[extension] for extension in EXTENSIONS})
        for group in listing.groups():
            self.left_out -= Counter(extension_of(name) for name in group.names if not is_image(name))
        yield from listing.groups()

    def _scan(self, folder: bytes) -> Scan:
        return _scan(self._root, folder, self._links if self._follow_links else None, self.extensions)

    def _identity(self, folder: bytes) -> tuple[int, int]:
        return _identity(os.path.join(self._root, folder))

    def groups(self) -> Iterator[Group]:
        """As `TreeSource`, but the headers of DICOM files are read."""
        return map(self._files.with_frames, super().groups() if self._sidecars is None else self._groups_of_sidecars())

    def frame(self, item: Item) -> int | None:
        """As `LocalFiles.frame`."""
        return self._files.frame(item)

    def read(self, item: Item) -> bytes:
        """The bytes of the file; raises as `LocalFiles.read`."""
        return self._files.read(item)

    def local_path(self, item: Item) -> bytes:
        """The file's absolute path."""
        return self._files.path(item)

    def others_readable(self, item: Item) -> bool:
        """As `LocalFiles.others_readable`."""
        return self._files.others_readable(item)

    def check(self) -> None:
        """Raises SourceError if the folder itself is gone, such as after its disk was unmounted."""
        try:
            # After an unmount, the mount point remains, but is another folder.
            here = self._identity(b"") == self._root_identity
        except SourceError:
            here = False
        if not here:
            raise SourceError(f"{self.location!r} is missing; mount it again, then run the same command to resume")


def _group(folder: bytes, found: Scan, label: int) -> Group:
    places = np.array(found.sizes, np.int64).reshape(-1, 1) if found.sizes else None
    return Group(folder, found.names, label, places=places)


class _Links:
    """Detects listed folders and files that lie outside the source. Only symbolic links cost system calls."""

    def __init__(self, root: bytes) -> None:
        self._inside = Inside(root)
        self._outside: set[bytes] = set()

    def leads_out(self, folder: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Whether an entry of a folder lies outside the source. Remembers folders, for the entries below them."""
        if any(map(folder.startswith, self._outside)):
            return True
        out = entry.is_symlink() and not self._inside.holds_target(entry.path)
        if out and _is_folder(entry):
            self._outside.add(folder + entry.name + b"/")
        return out


def _scan(root: bytes, folder: bytes, links: _Links | None, extensions: frozenset[bytes]) -> Scan:
    """Lists a folder; symbolic links are skipped if `links` is None."""
    names: list[bytes] = []
    folders: list[bytes] = []
    others: Counter[str] = Counter()
    path = os.path.join(root, folder) if folder else root
    outside = unfollowed = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if links is None and entry.is_symlink():
                    unfollowed += 1
                    continue
                out = links is not None and links.leads_out(folder, entry)
                if _is_folder(entry):
                    if len(entry.path) < _PATH_MAX:
                        folders.append(name)
                    else:
                        log.warning("%r ... is nested too deeply (%d bytes) and is ignored", *_shown(entry.path))
                elif os.path.splitext(name)[1].lower() not in extensions:
                    others[extension_of(name)] += 1
                elif _may_be_image(entry):
                    names.append(name)
                    outside += out
    except OSError as exc:
        advice = "give SRC as a folder, an archive or a table" if not folder else "make it readable or move it away"
        raise SourceError(f"{as_text(path)!r}: {exc.strerror}; {advice}") from exc
    return Scan(sorted(names), sorted(folders), others, outside=outside, unfollowed=unfollowed)


def _shown(path: bytes) -> tuple[str, int]:
    return as_text(path[:200]), len(path)


def _may_be_image(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a file or a link to one, even a dangling link. Opening a pipe or device could block."""
    there = os.path.exists(entry.path) if entry.is_symlink() else True  # costs a stat for links only
    fits = not there or entry.is_file()
    if not fits:
        log.warning("%r is not a file and is ignored", as_text(entry.path))
    return fits


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as exc:
        if exc.errno == errno.ELOOP:  # treated like a dangling link: not a folder, and an image that becomes a reject
            return False
        raise


def _identity(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise SourceError(f"{as_text(path)!r}: {exc.strerror}; make it readable or move it away") from exc
    return status.st_dev, status.st_ino
