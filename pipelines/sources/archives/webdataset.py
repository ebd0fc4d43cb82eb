"""WebDataset: tars of samples. The files of a sample are consecutive and share their name up to its first dot.

See https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ..access.files import GROUP_ITEMS
from ..base import IMAGE_EXTENSIONS, Group, as_text, is_hidden
from ..labels import KINDS, Kind, LabelledSource, Listing, label_spec, read_labels, shared
from .base import Names, log, path_of, warn_of_others
from .tar import TarSource, members, split_key

_MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class _WebDatasetListing(Listing):
    """Also holds a hash of each image's path."""

    paths: array[int]


class WebDatasetSource(TarSource, LabelledSource[_WebDatasetListing]):
    """The images of the samples in tars.

    The image of a sample is its file with an image extension (`a.jpg`, but not `a.mask.png`). `--labels` says where
    labels are: in the files cls (default) or txt, or in field FIELD of the json file (json:FIELD; dots in FIELD
    separate nested keys). With several tars, an item's path begins with the tar's name. An item's place: the number of
    the tar, the offset of the image in it, and its size in bytes.

    Raises:
        SourceError: a tar is missing, damaged or truncated; a sample has two images, or lacks the label; a name occurs
            twice.
        UsageError: `--labels` has a form of other sources.
    """

    kind = "webdataset"

    def _number_classes(self, config: BuildConfig, classes: Sequence[str] | None) -> None:
        named = [] if config.labels == "none" else label_spec(config.labels or "cls")
        self._asked, self._classes = [_label_column(*each) for each in named], classes
        self._take_labels()

    def _list(self) -> _WebDatasetListing:
        values: list[list[Any]] = [[] for _ in self._asked]
        paths = array("q")
        one = shared()
        for number in range(len(self._files)):
            for path, row in self._inventory_of_samples(number):
                paths.append(hash(path))
                for column, value in zip(values, row, strict=True):
                    column.append(one(value))
        columns = [(name.removeprefix("json:"), kind) for name, kind in self._asked]
        if not columns:
            return _WebDatasetListing(None, paths)
        where = self._sample
        labels = read_labels(columns, values, location=self.location, where=where, classes=self._classes)
        return _WebDatasetListing(labels, paths)

    def groups(self) -> Iterator[Group]:
        """The images, up to GROUP_ITEMS per group. Raises SourceError if a tar has changed since it was listed."""
        listing, done = self._listed(), 0
        found = listing.labels
        for number, prefix in enumerate(self._prefixes):
            images = self._images(number)
            while chunk := list(itertools.islice(images, GROUP_ITEMS)):
                # Labels must not be assigned to other images.
                if listing.paths[done : done + len(chunk)] != array("q", [hash(path) for path, _ in chunk]):
                    raise SourceError(f"{self._files.path(number)!r} has changed meanwhile; run the command again")
                labels = None if found is None else found.values[done : done + len(chunk)]
                done += len(chunk)
                places = np.array([place for _, place in chunk], np.int64)
                yield Group(prefix, [path for path, _ in chunk], labels=labels, places=places)

    def _inventory_of_samples(self, number: int) -> Iterator[tuple[bytes, list[Any]]]:
        """Reads a tar: the image's path and the labels of each sample that has an image."""
        archive = self._files.path(number)
        names, without, first = Names(archive), 0, b""
        with self._files.opened(number) as file:
            for key, sample in _samples(file, self._files.size(number), archive, warn=True):
                image = _image(key, sample, archive)
                if image is None:
                    without, first = without + 1, first or key
                    continue
                names.add(image[0])
                yield image[0], [_label(file, key, sample, name, archive) for name, _ in self._asked]
        if without:
            log.warning("%r: %d samples without an image (%r, ...) are omitted", archive, without, as_text(first))
        names.require_unique(path for path, _ in self._images(number))

    def _images(self, number: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        archive = self._files.path(number)
        with self._files.opened(number) as file:
            for key, sample in _samples(file, self._files.size(number), archive):
                image = _image(key, sample, archive)
                if image is not None:
                    yield image[0], (number, *image[1])

    def _sample(self, row: int) -> str:
        images = itertools.chain.from_iterable(self._images(number) for number in range(len(self._files)))
        return repr(as_text(next(itertools.islice(images, row, None))[0]))


Sample = dict[bytes, tuple[bytes, tuple[int, ...]]]  # path and (offset, size) of each file, by extension


def _samples(file: BinaryIO, size: int, archive: str, *, warn: bool = False) -> Iterator[tuple[bytes, Sample]]:
    """The samples of a tar, each with its key, which is never empty."""
    current, sample = b"", Sample()
    others, other = 0, b""
    for name, kind, place in members(file, 0, size, archive):
        if kind != "file":
            others, other = (others + 1, other or name) if kind == "other" else (others, other)
            continue
        path = path_of(name, archive)
        key, extension = split_key(path)
        if not key or not extension or is_hidden(path):
            continue
        if key != current:
            if sample:
                yield current, sample
            current, sample = key, {}
        if extension in sample:
            raise SourceError(
                f"{archive!r}: sample {as_text(key)!r} has {as_text(extension)!r} twice; make the tar again"
            )
        sample[extension] = path, place
    if sample:
        yield current, sample
    if others and warn:
        warn_of_others(archive, others, other)


def _image(key: bytes, sample: Sample, archive: str) -> tuple[bytes, tuple[int, ...]] | None:
    found = [extension for extension in sample if b"." + extension in IMAGE_EXTENSIONS]
    if len(found) > 1:
        raise SourceError(
            f"{archive!r}: sample {as_text(key)!r} has {len(found)} images ({', '.join(map(as_text, found))}); "
            "leave one, or say --source tar to take each"
        )
    return sample[found[0]] if found else None


def _label_column(name: str, kind: Kind | None) -> tuple[str, Kind | None]:
    if name == "json" and kind is not None:  # json:class names the field `class`, not a kind
        name, kind = f"json:{kind}", None
    if name in ("cls", "txt") or (name.startswith("json:") and all(name.removeprefix("json:").split("."))):
        return name, kind or ("class" if name == "txt" else None)
    raise UsageError(
        f"--labels {name}: labels of a WebDataset are cls, txt, json:FIELD (a.b for one within another) or none; also "
        f"with a kind ({', '.join(KINDS)}), as in cls:class"
    )


def _label(file: BinaryIO, key: bytes, sample: Sample, label: str, archive: str) -> Any:
    extension, _, field = label.partition(":")
    where = f"{archive!r}: sample {as_text(key)!r}"
    if extension.encode() not in sample:
        raise SourceError(
            f"{where} has no .{extension} beside it, only {', '.join(map(as_text, sample))}; --labels cls, txt, "
            "json:FIELD or none says where labels are (the files of a sample must follow each other in the tar)"
        )
    path, (offset, size) = sample[extension.encode()]
    if size > _MAX_LABEL_BYTES:
        raise SourceError(f"{where}: its .{extension} has {size} bytes; a label has at most {_MAX_LABEL_BYTES}")
    try:
        file.seek(offset)
        text = file.read(size).decode("utf-8")
        if not field:
            return text
        value = json.loads(text)
        for part in field.split("."):
            value = value[part]
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{where}: {as_text(path)!r} cannot be read ({exc}); fix it") from exc
    except (KeyError, TypeError, IndexError) as exc:
        raise SourceError(f"{where} has no field {field!r} in {as_text(path)!r}; fill it in, or give another") from exc
    if isinstance(value, (dict, list)):
        raise SourceError(f"{where}: field {field!r} is no single value; name one within it, as in json:a.b")
    return value
