"""Images in archives, read in place without extraction: which members are items, and the class of each."""

from __future__ import annotations

import abc
import itertools
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal, NamedTuple

import numpy as np

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ..access.files import GROUP_ITEMS, Files
from ..base import (
    Group,
    Source,
    as_bytes,
    as_text,
    extension_of,
    is_hidden,
    is_side,
    no_images,
    numbered,
    refuse_sides,
    split_sides,
)
from ..base import is_image as has_extension

log = logging.getLogger(__name__)
_MAX_NAME_BYTES = 4096  # PATH_MAX of Linux


class Member(NamedTuple):
    """An entry of an archive. `place` is as for `Item`, and empty unless the member is a readable file."""

    name: bytes
    kind: Literal["file", "folder", "other"]
    place: tuple[int, ...] = ()


@dataclass
class Inventory:
    """The content of all archives of a source.

    Attributes:
        folders: top-level folders, including those without images; with the subfolders of those named like a side of a
            split.
        filled: the top-level folders that contain images.
        loose, filed: the first image outside any folder, and the first one in a folder.
        images: how many there are.
        others: how many files have names that are not images', by extension.
    """

    folders: dict[bytes, set[bytes]] = field(default_factory=dict)
    filled: set[bytes] = field(default_factory=set)
    loose: bytes | None = None
    filed: bytes | None = None
    images: int = 0
    others: Counter[str] = field(default_factory=Counter)


class ArchiveSource(Source):
    """The images in one or several archives. With several, an item's path begins with the archive's name.

    As in a folder tree, the top-level folder in the archive, or in its folder `config.root`, is the class. Classes are
    numbered in the order of their names' bytes. Images outside any folder have no labels; with `--labels none`, no
    image has. Items are in the order of the archives and of their members. Hidden names are skipped (`is_hidden`);
    links, devices and sparse files are skipped with a warning.

    Raises:
        SourceError: an archive is missing, damaged, truncated, or without images; contains a name that is absolute, has
            `..`, is longer than 4096 bytes, or occurs twice; or has images next to folders of images, or sides of a
            split instead of classes.
        UsageError: `--labels` has a form of other sources.
    """

    _extension: str

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._files = Files(location, f"*{self._extension}")
        self.location = self._files.location
        self.files = self._files.stamps
        self.reads_at_once = self._files.reads_at_once
        self._prefixes = [os.fsencode(name) + b"/" for name in self._files.names] if len(self._files) > 1 else [b""]
        self._numbers: dict[bytes, int] = {}
        top = b"" if config.root is None else path_of(as_bytes(config.root), self.location)
        self.root, self._top = (as_text(top), top + b"/") if top else (None, b"")
        self._number_classes(config, classes)

    def _number_classes(self, config: BuildConfig, classes: Sequence[str] | None) -> None:
        """Reads the directories of all archives, and sets `class_names` if there are labels."""
        if config.labels not in (None, "class-dir", "none"):
            raise UsageError(
                f"--labels {config.labels}: labels of a {self.kind} are class-dir (the first folder) or none; for "
                "others unpack it, or make a table of its paths"
            )
        self._found = inventory = self._inventory()
        if config.labels == "none":
            return
        if inventory.loose is not None and inventory.filed is not None:
            raise SourceError(
                f"{self.location!r} holds both images in no folder ({as_text(inventory.loose)!r}, ...) and images in "
                f"folders ({as_text(inventory.filed)!r}, ...); move the former into a folder of their class, or use "
                "--labels none"
            )
        if inventory.loose is not None:
            return
        found = [as_text(folder) for folder in sorted(inventory.folders)]
        if config.labels is None:
            top, src = as_text(self._top), quote(self.location)
            sides = {side: map(as_text, inventory.folders[as_bytes(side)]) for side in split_sides(found)}
            refuse_sides(self.location, sides, lambda side: f"gpu-npz build {src} --root {quote(top + side)}")
        self.bare = [name for name in found if as_bytes(name) not in inventory.filled]
        self.class_names = tuple(found if classes is None else classes)
        numbers = numbered(list(self.class_names), found, self.location)
        self._numbers = {as_bytes(name): number for name, number in numbers.items()}

    @abc.abstractmethod
    def _members(self, number: int) -> Iterator[Member]:
        """All members of an archive, in order. Raises SourceError if it is damaged or truncated."""

    def _label(self, path: bytes) -> int | None:
        """The label of an image by its path in the archive, if there are classes; None if it has none."""
        return self._numbers.get(path.partition(b"/")[0])

    def groups(self) -> Iterator[Group]:
        """The images, up to GROUP_ITEMS per group.

        Raises:
            SourceError: an archive is damaged, or has changed since the classes were numbered.
        """
        for number, prefix in enumerate(self._prefixes):
            images = self._images(number)
            while chunk := list(itertools.islice(images, GROUP_ITEMS)):
                labels = None
                if self.class_names is not None:
                    labels = np.array([self._known_label(path) for path, _ in chunk], np.int64)
                places = np.array([place for _, place in chunk], np.int64)
                yield Group(prefix, [path for path, _ in chunk], labels=labels, places=places)

    def check(self) -> None:
        """Raises SourceError if an archive is gone."""
        self._files.check()

    def _known_label(self, path: bytes) -> int:
        label = self._label(path)
        if label is None:
            raise SourceError(
                f"{as_text(path)!r} of {self.location!r} has no label; give --classes-from a file that lists it"
            )
        return label

    def _images(self, number: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        for path, member in self._below_root(number):
            if member.kind == "file" and is_image(path):
                yield path, member.place

    def _below_root(self, number: int) -> Iterator[tuple[bytes, Member]]:
        """An archive's files and folders below `root`, with paths relative to it; other members with their names."""
        for member in self._members(number):
            if member.kind == "other":
                yield member.name, member
            elif (path := path_of(member.name, self._files.path(number))).startswith(self._top):
                yield path[len(self._top) :], member

    def _inventory(self) -> Inventory:
        inventory = Inventory()
        for number in range(len(self._files)):
            self._inventory_of(number, inventory)
        if not inventory.images and self.root:
            raise SourceError(
                f"{self.location!r} holds no images below --root {self.root}; give a folder that has some"
            )
        if not inventory.images:
            raise no_images(self.location, inventory.others)
        self.left_out = inventory.others
        return inventory

    def _inventory_of(self, number: int, inventory: Inventory) -> None:
        others, other, names = 0, b"", Names(self._files.path(number))
        for path, member in self._below_root(number):
            if member.kind == "other":
                others, other = others + 1, other or member.name
                continue
            if is_hidden(path):
                continue
            folder, slash, below = path.partition(b"/")
            if folder and (slash or member.kind == "folder"):
                inner = inventory.folders.setdefault(folder, set())
                second, deeper, _ = below.partition(b"/")
                if second and (deeper or member.kind == "folder") and is_side(as_text(folder)):
                    inner.add(second)
            if member.kind != "file":
                continue
            if has_extension(path):
                names.add(path)
                inventory.images += 1
                if slash:
                    inventory.filed = inventory.filed or path
                    inventory.filled.add(folder)
                else:
                    inventory.loose = inventory.loose or path
            else:
                inventory.others[extension_of(path)] += 1
        if others:
            warn_of_others(self._files.path(number), others, other)
        names.require_unique(path for path, _ in self._images(number))


class Names:
    """Checks that the names in an archive are unique. Keeps a hash of 8 bytes per name."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._hashes = array("q")

    def add(self, path: bytes) -> None:
        """Adds a name."""
        self._hashes.append(hash(path))

    def require_unique(self, paths: Iterator[bytes]) -> None:
        """Raises SourceError if a name was added twice. `paths` yields all names again; used only if hashes collide."""
        hashes = np.sort(np.frombuffer(self._hashes, np.int64))
        repeated = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}
        seen: set[bytes] = set()
        for path in paths if repeated else ():
            if hash(path) in repeated:
                if path in seen:
                    raise SourceError(
                        f"{self._archive!r} holds {as_text(path)!r} twice; unpack it and create it again with only "
                        "one of them"
                    )
                seen.add(path)


def path_of(name: bytes, archive: str) -> bytes:
    """The normalized path of a member, relative to the archive.

    Raises:
        SourceError: it leads out of the archive, or no file could have it.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts:
        what = "leads out of the archive; names are relative and without `..`"
    elif len(name) > _MAX_NAME_BYTES:
        what = f"has a name of {len(name)} bytes; at most {_MAX_NAME_BYTES} are allowed"
    elif b"\0" in name:
        what = "has a zero byte in its name"
    else:
        return b"/".join(parts)
    raise SourceError(f"{archive!r}: member {as_text(name[:200])!r} {what}; create the archive again without it")


def is_image(path: bytes) -> bool:
    """Whether a path is an item: it has an image extension, and no component is hidden."""
    return has_extension(path) and not is_hidden(path)


def warn_of_others(archive: str, count: int, first: bytes) -> None:
    """Logs that members that are not files were skipped."""
    log.warning(
        "%r: %d links, devices or sparse files (%r, ...) are omitted; to use them, unpack it and give the folder as "
        "SRC",
        archive,
        count,
        as_text(first[:200]),
    )
