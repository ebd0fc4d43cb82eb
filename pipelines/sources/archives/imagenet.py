"""ILSVRC2012 as downloaded: ILSVRC2012_img_train.tar, which contains one tar per class, and ILSVRC2012_img_val.tar."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...config import BuildConfig
from ...errors import SourceError, UsageError, install_command
from ..base import as_text, is_hidden, numbered
from .base import Member, log
from .tar import TarSource, members

_CLASSES, _TRAIN_IMAGES, _VAL_IMAGES = 1000, 1_281_167, 50_000
_CLASS_TAR = re.compile(rb"(?:.*/)?(n\d{8})\.tar")
_VAL_IMAGE = re.compile(rb"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
_TABLE_IMAGE = re.compile(r"(?:ILSVRC2012_val_)?(\d{1,8})", re.ASCII)  # without folder and extension
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MAPPING, _META = "map_clsloc.txt", "meta.mat"
_MAX_TABLE_BYTES = 64 << 20  # Kaggle's LOC_val_solution.csv has 2 MB


class ImageNetSource(TarSource):
    """The images of ILSVRC2012's train or val tar. Classes are WordNet ids, sorted.

    Train: items are named like `n01440764/n01440764_10026.JPEG`. Val: `--labels` names the ground truth, which is the
    folder that ILSVRC2012_devkit_t12.tar.gz unpacks to, or a table with two columns: the name or number of a file, and
    the WordNet id.

    Raises:
        SourceError: it is neither tar, damaged or truncated; or the ground truth is unreadable or lacks an image.
        UsageError: `--labels` has a form of other sources.
    """

    kind = "imagenet"

    def _members(self, number: int) -> Iterator[Member]:
        archive, size = self._files.path(number), self._files.size(number)
        with self._files.opened(number) as file:
            for name, kind, (offset, length) in members(file, 0, size, archive):
                match = _CLASS_TAR.fullmatch(name)
                if match is None or kind != "file":
                    yield Member(name, kind, (number, offset, length))
                    continue
                yield Member(match[1], "folder")
                inner = f"{archive}/{match[1].decode()}.tar"
                for image, image_kind, place in members(file, offset, offset + length, inner):
                    yield Member(match[1] + b"/" + image, image_kind, (number, *place))

    def _number_classes(self, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._truth: dict[int, int] | None = None
        first = [*itertools.islice((member.name for member in self._members(0) if not is_hidden(member.name)), 1)]
        if not first or not _VAL_IMAGE.fullmatch(first[0]):
            if first and not re.match(rb"n\d{8}(/|$)", first[0]):
                raise SourceError(
                    f"{self.location!r} begins with {as_text(first[0][:200])!r}; "
                    "ILSVRC2012's train tar has n01440764.tar and so on, its val tar ILSVRC2012_val_00000001.JPEG; "
                    "for others say --source tar"
                )
            super()._number_classes(config, classes)
            if (len(self._found.folders), self._found.images) != (_CLASSES, _TRAIN_IMAGES):
                log.warning(
                    "%r has %d images of %d classes; ILSVRC2012's train tar has %d of %d",
                    self.location, self._found.images, len(self._found.folders), _TRAIN_IMAGES, _CLASSES,
                )  # fmt: skip
            return
        if config.labels is None or config.labels == "class-dir":
            raise UsageError(
                f"{self.location!r} has no labels of its own; --labels DEVKIT, the folder that "
                "ILSVRC2012_devkit_t12.tar.gz unpacks to, or --labels FILE, a table of file names and ids, or none"
            )
        super()._number_classes(config.model_copy(update={"labels": "none"}), None)
        if self._found.images != _VAL_IMAGES:
            log.warning("%r has %d images; ILSVRC2012's val tar has %d", self.location, self._found.images, _VAL_IMAGES)
        if config.labels == "none":
            return
        truth, found = ground_truth(config.labels)
        self.class_names = tuple(found if classes is None else classes)
        numbers = numbered(list(self.class_names), found, config.labels)
        self._truth = {image: numbers[wnid] for image, wnid in truth.items()}

    def _label(self, path: bytes) -> int | None:
        if self._truth is None:
            return super()._label(path)
        match = _VAL_IMAGE.fullmatch(path)
        return None if match is None else self._truth.get(int(match[1]))


def ground_truth(location: str) -> tuple[dict[int, str], list[str]]:
    """Reads the ground truth of the validation images.

    Args:
        location: the devkit's folder, or a table.

    Returns:
        The WordNet id of each image by its number, and all WordNet ids, sorted.

    Raises:
        SourceError: it cannot be read, or has another form.
    """
    if not os.path.isdir(location):
        truth = _table(location)
        return truth, sorted({*truth.values()})
    folder = next((each for each in (Path(location, "data"), Path(location)) if (each / _TRUTH).is_file()), None)
    if folder is None:
        raise SourceError(
            f"{location!r} has no data/{_TRUTH}; give the folder that ILSVRC2012_devkit_t12.tar.gz unpacks to"
        )
    wnids = _mapping(folder)
    truth = {}
    for number, line in enumerate(_text(folder / _TRUTH).split(), 1):
        wnid = wnids.get(int(line)) if line.isdecimal() and len(line) < 10 else None
        if wnid is None:
            raise SourceError(
                f"{os.fspath(folder / _TRUTH)!r}: line {number} has {line[:50]!r}, which is no class of the "
                f"{len(wnids)} beside it; unpack the devkit again"
            )
        truth[number] = wnid
    return truth, sorted({*wnids.values()})


def _mapping(folder: Path) -> dict[int, str]:
    """WordNet ids by ILSVRC2012_ID, from the devkit."""
    if (folder / _MAPPING).is_file():
        rows = [line.split() for line in _text(folder / _MAPPING).splitlines() if line.strip()]
        wrong = next((row for row in rows if not (len(row) > 1 and _is_wnid(row[0]) and row[1].isdecimal())), None)
        if wrong is not None:
            raise SourceError(
                f"{os.fspath(folder / _MAPPING)!r} has {' '.join(wrong)[:80]!r}; lines are: n02119789 1 kit_fox"
            )
        return {int(row[1]): row[0] for row in rows}
    path = folder / _META
    if not path.is_file():
        raise SourceError(f"{os.fspath(folder)!r} has neither {_META} nor {_MAPPING}; unpack the devkit again")
    try:
        from scipy.io import loadmat
    except ImportError as exc:
        raise SourceError(f"{os.fspath(path)!r} needs scipy; run: {install_command('imagenet')}") from exc
    try:
        synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
        # Fields: ILSVRC2012_ID, WNID, words, gloss, num_children, ... (the devkit's readme.txt, section 2.2).
        found = {int(row[0]): str(row[1]) for row in synsets.tolist() if int(row[4]) == 0}
    except Exception as exc:  # scipy raises an open list of errors for a damaged file
        raise SourceError(f"{os.fspath(path)!r} cannot be read ({exc}); unpack the devkit again") from exc
    if not found or not all(map(_is_wnid, found.values())):
        raise SourceError(f"{os.fspath(path)!r} names no WordNet ids; unpack the devkit again")
    return found


def _table(location: str) -> dict[int, str]:
    truth: dict[int, str] = {}
    for number, line in enumerate(_text(Path(location)).splitlines(), 1):
        name, _, rest = re.sub(r"[,\t ]+", " ", line.strip()).partition(" ")
        digits = _TABLE_IMAGE.fullmatch(os.path.splitext(os.path.basename(name.strip('"')))[0])
        wnid = rest.strip('"').partition(" ")[0]
        if digits and _is_wnid(wnid):
            if truth.setdefault(int(digits[1]), wnid) != wnid:
                raise SourceError(f"{location!r}: line {number} gives image {int(digits[1])} another label; fix it")
        elif line.strip() and number > 1:  # the first line may be a header
            raise SourceError(
                f"{location!r}: line {number} is {line[:80]!r}; allowed are a file's name or its number, and a "
                "WordNet id: ILSVRC2012_val_00000001.JPEG,n01751748"
            )
    if not truth:
        raise SourceError(f"{location!r} has no labels; give a table with lines such as: 1,n01751748")
    return truth


def _is_wnid(text: str) -> bool:
    return re.fullmatch(r"n\d{8}", text) is not None


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TABLE_BYTES + 1)
        if len(data) > _MAX_TABLE_BYTES:
            raise SourceError(f"{os.fspath(path)!r} has more than {_MAX_TABLE_BYTES} bytes; give a table of labels")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "no text in UTF-8"
        raise SourceError(
            f"{os.fspath(path)!r}: {reason}; --labels wants the devkit's folder, or a table of file names and ids"
        ) from exc
