"""Images in archives, read where they lie: which members are items, and the class of each. Nothing is extracted."""

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
_MAX_NAME_BYTES = 4096  # Linux's PATH_MAX


class Member(NamedTuple):
    """What an archive has under a name; `place` is as of `Item`, and empty unless it is a file that can be read."""

    name: bytes
    kind: Literal["file", "folder", "other"]
    place: tuple[int, ...] = ()


@dataclass
class Inventory:
    """What all archives of a source hold.

    Attributes:
        folders: of the first level, those without images, too; with the folders in each that is called as a side is.
        filled: those with images.
        loose, filed: the first image in no folder, and the first one in a folder.
        images: how many there are.
        others: files whose names are not those of images, by their extension.
    """

    folders: dict[bytes, set[bytes]] = field(default_factory=dict)
    filled: set[bytes] = field(default_factory=set)
    loose: bytes | None = None
    filed: bytes | None = None
    images: int = 0
    others: Counter[str] = field(default_factory=Counter)


class ArchiveSource(Source):
    """The images in one archive, or in several of them, which then stand before their paths: `a.tar/cats/1.jpg`.

    As in a folder tree, the first folder within the archive, or within its folder `config.root`, is the class, and
    classes are numbered in the order of their names' bytes; images in no folder have no labels; `--labels none` takes
    all images without labels. Items are in the order of the archives and of their members. Hidden names are skipped
    (`is_hidden`); links, devices and sparse files are left out with a warning.

    Raises:
        SourceError: an archive is missing, damaged, cut, or without images; holds an absolute name, one with `..`, one
            of more than 4096 bytes, or a name twice; or has images beside folders of images, or sides of a split for
            classes.
        UsageError: `--labels` is for another form.
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
        """Looks through all archives, and sets `class_names` unless there are no labels."""
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
                f"folders ({as_text(inventory.filed)!r}, ...); move those into a folder of their class, or say "
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
        """All that an archive holds, in its order. Raises SourceError if it is damaged or cut."""

    def _label(self, path: bytes) -> int | None:
        """The label of an image within an archive, where there are classes; None if it has none."""
        return self._numbers.get(path.partition(b"/")[0])

    def groups(self) -> Iterator[Group]:
        """The images, some thousand at a time.

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
            raise SourceError(f"{as_text(path)!r} of {self.location!r} has no label; give one that knows it")
        return label

    def _images(self, number: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        for path, member in self._below_root(number):
            if member.kind == "file" and is_image(path):
                yield path, member.place

    def _below_root(self, number: int) -> Iterator[tuple[bytes, Member]]:
        """Files and folders of an archive, each with its path relative to `root`; all else with its name."""
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
    """The names in one archive, of which each must stand there once; 8 bytes a name are kept."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._hashes = array("q")

    def add(self, path: bytes) -> None:
        """One more name."""
        self._hashes.append(hash(path))

    def require_unique(self, paths: Iterator[bytes]) -> None:
        """Raises SourceError if a name was added twice; `paths` are all of them again, asked for if it looks so."""
        hashes = np.sort(np.frombuffer(self._hashes, np.int64))
        repeated = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}
        seen: set[bytes] = set()
        for path in paths if repeated else ():
            if hash(path) in repeated:
                if path in seen:
                    raise SourceError(
                        f"{self._archive!r} holds {as_text(path)!r} twice; make it again with one of them, from what "
                        "it unpacks to"
                    )
                seen.add(path)


def path_of(name: bytes, archive: str) -> bytes:
    """The path that a member's name means, relative to the archive.

    Raises:
        SourceError: it leads out of the archive, or is none that a file could have.
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
    raise SourceError(f"{archive!r}: member {as_text(name[:200])!r} {what}; make the archive again without it")


def is_image(path: bytes) -> bool:
    """Whether a path is an item: by its extension, and unless a part of it is hidden."""
    return has_extension(path) and not is_hidden(path)


def warn_of_others(archive: str, count: int, first: bytes) -> None:
    """Says that members which are no files were left out."""
    log.warning(
        "%r: %d links, devices or sparse files (%r, ...) are left out; unpack it and give the folder to have them",
        archive,
        count,
        as_text(first[:200]),
    )
