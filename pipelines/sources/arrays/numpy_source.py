"""Images as the rows of arrays in .npy or .npz files. Each image is read in place, on its own."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ...npz.arrays import content
from ...storage.base import is_remote
from ..access.files import GROUP_ITEMS, Files, place_of, read_piece
from ..base import Group, Item, some, split_sides
from ..labels import KINDS, Kind, LabelledSource, Listing
from . import npy
from .choice import class_names_array, image_array, image_sides, is_flat, label_array, shown
from .inflation import Inflated
from .labelling import class_names, labels_of
from .npy import Array, as_damage
from .rows import rows_of
from .scaling import require_scale

log = logging.getLogger(__name__)
_PATTERN = "*.np[yz]"  # of the files in a folder
_SAMPLED = 32  # images of floats that are looked at
_SAMPLED_BYTES = 64 << 20  # of them, at most
_IN_NPZ = re.compile(r"(.+\.npz)/(.+)\.npy", re.IGNORECASE | re.DOTALL)


class NumpySource(LabelledSource[Listing]):
    """The images of an array in an .npy or .npz (`a.npz`, or `a.npz/x_test.npy` for a particular array).

    The array is uint8 or uint16, (N, H, W), (N, H, W, C) or (N, C, H, W), where C is 1, 3 (RGB) or 4 (uint8 with
    alpha), or floats with `--scale`. An array of three dimensions whose last one is 1, 3 or 4 is probably a single
    image, and is refused. uint16 keeps its 16 bits with `--bit-depth 16`. In an .npz, the images are the only array
    with three or four dimensions, or the first with a usual name (images, image, imgs, img, x, data; the same with
    train; arr_0).

    SRC may also be a folder of such files, or a pattern (`part_*.npz`, `part_*.npz/x_test.npy`). All of them have
    arrays of the same names, and images of the same dtype and shape. The order is that of the files, by the bytes of
    their names, and then of the rows.

    Labels are numbers or text, (N,), or (N, K) for K columns, named `NAME_0` and so on. One-hot rows, with one 1 among
    zeros, are classes. `--labels NAME` names an array of the .npz and `--labels FILE.npy` a file, which has the labels
    of all rows; both accept a kind (`NAME:integer` keeps one-hot rows as columns). `none` means no labels. By default,
    labels are the array whose name is that of the images with label, labels, class, target, targets, category or y
    instead of their word (y_train for x_train, test_labels for test_images), or that word alone; or arr_1 for arr_0.
    Case is ignored. An array `class_names` has the names of classes by number.

    An array `data` of uint8 (N, 3 * side * side), as in downsampled ImageNet, has rows of three planes; its labels,
    which count from 1, are classes.

    Nothing is mapped or loaded in advance: each row is read on demand. Rows have no checksum of their own, so a build
    first reads each array in an .npz once and compares it with its CRC-32 (`require_sound`); an .npy has none. Rows of
    an array that np.savez_compressed deflated cannot be read alone, so each process that reads it inflates it once,
    checked, into an unnamed temporary file (TMPDIR).

    Items are named `00000` and so on; with several files, `part_0/00000`. An item's place: its row; with several files,
    the number of the file and the row.

    Raises:
        SourceError: a file is unreadable, damaged or truncated; there is no such array; labels do not fit the images;
            or files differ.
        UsageError: settings contradict each other.
    """

    kind = "numpy"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._asked, self._classes = _label_spec(config.labels), classes
        path, wanted = location, ""
        if (match := _IN_NPZ.fullmatch(location)) and not os.path.isdir(match[1]):
            path, wanted = match.groups()
        self._files = Files(path, _PATTERN)
        self.location = self._files.location + (f"/{wanted}.npy" if wanted else "")
        self.files = self._files.stamps
        self.reads_at_once = self._files.reads_at_once
        if len(self._files) > 1 and os.path.isdir(self._files.location):
            _refuse_sides(self._files)
        first = npy.arrays(self._files)
        self._name = image_array(first, wanted, self.location)
        self._flat = is_flat(self._name, first[self._name])
        self._format = rows_of(first[self._name].checked(), config.scale, flat=self._flat)
        found = [first, *(self._like(first, number) for number in range(1, len(self._files)))]
        self._arrays = [arrays[self._name] for arrays in found]
        if self._format.dtype.kind == "f":
            array = self._arrays[0]
            require_scale(self._sample(), config.scale, f"{array.where} has {array.dtype} {array.shape}")
        self._inflated = Inflated(self._files)
        self._sound: set[int] = set()  # the numbers of the files whose images were compared with their CRC-32
        if deflated := [array.info.npy_bytes for array in self._arrays if array.info.deflated]:
            log.warning(
                "%s is compressed, so each process that reads it decompresses it once, into %d MB in %s; to avoid "
                "this, save it with np.savez, which does not compress",
                self._arrays[0].where if len(self._files) == 1 else repr(self.location), sum(deflated) >> 20,
                tempfile.gettempdir(),
            )  # fmt: skip
        self._label_arrays = self._find_labels(found)
        self._names_arrays = [named for arrays in found if (named := class_names_array(arrays)) is not None]
        self._take_labels()

    @property
    def array_names(self) -> tuple[str, str]:
        """The names of the arrays with the images and the labels; empty for an .npy, and if there are no labels."""
        return self._name, self._column if self._label_arrays else ""

    def _like(self, first: Mapping[str, Array], number: int) -> dict[str, Array]:
        """The arrays of a file. Raises SourceError if they do not continue those of the first file."""
        found, path, one = npy.arrays(self._files, number), self._files.path(number), self._files.path(0)
        if found.keys() != first.keys():
            raise SourceError(
                f"{path!r} has the arrays {shown(found)}, and {one!r} {shown(first)}; build files with other arrays "
                "by themselves, or make their names the same"
            )
        mine, its = found[self._name].checked(), first[self._name]
        if (mine.dtype, mine.shape[1:], mine.info.fortran) != (its.dtype, its.shape[1:], its.info.fortran):
            order = " in Fortran order" if mine.info.fortran else ""
            raise SourceError(
                f"{mine.where} has {mine.dtype} {mine.shape}{order}, and {its.where} {its.dtype} {its.shape}; images "
                "of one SRC have one dtype and shape: build that file by itself, or convert it"
                + ("; for labels in an .npy give the images alone as SRC, and --labels FILE.npy" * (not self._name))
            )
        return found

    def _sample(self) -> NDArray[Any]:
        """Some of the images, (n, ...): of all files, or if the first is deflated, the first ones in it."""
        size, starts = self._format.row_bytes, np.cumsum([0, *(array.shape[0] for array in self._arrays)])
        count = max(1, min(_SAMPLED, _SAMPLED_BYTES // size, int(starts[-1])))
        if (info := self._arrays[0].info).deflated:
            count, data = min(count, self._arrays[0].shape[0]), bytearray()
            with self._files.opened(0) as packed, as_damage(self._arrays[0]):
                for piece in content(npy.reading(packed), info):
                    data += piece
                    if len(data) >= info.header_bytes + count * size:
                        break
            del data[: info.header_bytes]
        else:
            data = bytearray()
            for row in np.linspace(0, starts[-1] - 1, count).astype(np.int64).tolist():
                number = int(np.searchsorted(starts, row, side="right")) - 1
                begin = self._arrays[number].info.data_offset + (row - int(starts[number])) * size
                with as_damage(self._arrays[number]):
                    data += self._files.read(number, begin, size)
        return np.frombuffer(data[: count * size], self._format.dtype).reshape(count, -1)

    def groups(self) -> Iterator[Group]:
        """The images in the order of files and rows. Raises SourceError if the labels have changed since."""
        found, done = self._listed().labels, 0
        several = len(self._files) > 1
        for number, (folder, array) in enumerate(zip(self._folders(), self._arrays, strict=True)):
            for start in range(0, array.shape[0], GROUP_ITEMS):
                rows = np.arange(start, min(start + GROUP_ITEMS, array.shape[0]), dtype=np.int64)
                yield Group(
                    folder,
                    [b"%05d" % row for row in rows.tolist()],
                    labels=None if found is None else found.values[done + rows],
                    places=np.stack([np.full_like(rows, number), rows], axis=1) if several else rows[:, None],
                )
            done += array.shape[0]

    def _folders(self) -> list[bytes]:
        """The first part of the items' paths in each file: its name without extension, if all of these differ."""
        names = self._files.names
        if len(names) == 1:
            return [b""]
        stems = [os.path.splitext(name)[0] for name in names]
        return [os.fsencode(name) + b"/" for name in (stems if len({*stems}) == len(names) else names)]

    def read(self, item: Item) -> bytes:
        """The image as PGM, PPM or PNG. Raises OSError or BadItem as `read_piece`; BadItem for floats out of range."""
        number, row = place_of(item, 2) if len(self._files) > 1 else (0, *place_of(item, 1))
        size, array = self._format.row_bytes, self._arrays[number] if 0 <= number < len(self._arrays) else None
        if array is None or not 0 <= row < array.shape[0]:
            data = read_piece(self._files, number, -1, size)  # raises that it is missing
        elif array.info.deflated:
            data = self._inflated.read(array, array.info.data_offset + row * size, size)
        else:
            data = read_piece(self._files, number, array.info.data_offset + row * size, size)
        return self._format.encode(data)

    def check(self) -> None:
        """Raises SourceError if a file is gone or no longer readable."""
        self._files.check()

    def require_sound(self, places: NDArray[np.int64]) -> None:
        """Compares the arrays of these items with their CRC-32, once each; those that are inflated are checked then.

        Args:
            places: of items, (N, 1), or (N, 2) with several files.

        Raises:
            SourceError: an array is damaged, or cannot be read.
        """
        numbers = np.unique(places[:, 0]).tolist() if len(self._files) > 1 else [0]
        for array in (self._arrays[number] for number in numbers if number not in self._sound):
            if array.in_npz and not array.info.deflated:
                log.info("comparing %s, %d bytes, with its CRC-32", array.where, array.info.npy_bytes)
                with as_damage(array), self._files.opened(array.number) as file:
                    for _ in content(npy.reading(file), array.info):
                        pass
            self._sound.add(array.number)

    def _find_labels(self, found: Sequence[Mapping[str, Array]]) -> list[tuple[Files, Array]]:
        """The arrays with the labels, and the files that they are in; none if there are no labels."""
        first = found[0]
        name = self._asked[0] if self._asked else label_array(self._name, first, self.location)
        self._column = name or ""
        if name in (None, "none"):
            return []
        if name not in first and name.lower().endswith(".npy"):
            self._column, files = "labels", Files(name)
            array = npy.arrays(files).get("")
            if array is None:
                raise SourceError(f"--labels {name} is an .npz; give an .npy, or an .npz as SRC with its images, too")
            _require_fit(array, sum(each.shape[0] for each in self._arrays), self._arrays[0])
            return [(files, array)]
        if not self._arrays[0].in_npz:
            raise UsageError(f"--labels {name}: labels of an .npy are another FILE.npy, or none")
        if name not in first:
            raise SourceError(f"{self.location!r} has no array {name!r}; it has {shown(first)}")
        for arrays, images in zip(found, self._arrays, strict=True):
            _require_fit(arrays[name], images.shape[0], images)
            mine, its = arrays[name], first[name]
            if (mine.dtype.kind, mine.shape[1:]) != (its.dtype.kind, its.shape[1:]):
                raise SourceError(
                    f"{mine.where} has {mine.dtype} {mine.shape}, and {its.where} {its.dtype} {its.shape}; labels of "
                    "one SRC have one type and as many columns: convert them, or use --labels none"
                )
        return [(self._files, arrays[name]) for arrays in found]

    def _list(self) -> Listing:
        if not self._label_arrays:
            return Listing(None)
        pieces: list[NDArray[Any]] = [npy.values(files, array) for files, array in self._label_arrays]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        values = values[:, 0] if values.shape[1:] == (1,) else values
        kind = self._asked[1] if self._asked else None
        labels = labels_of(
            self._column,
            values,
            self.location,
            kind=kind,
            names=class_names(self._files, self._names_arrays),
            classes=self._classes,
            from_one=self._flat,
            option=self._asked[0] if self._asked else self._column,
        )
        return Listing(labels)


def sides_of(location: str, labels: str | None) -> dict[str, str]:
    """The SRC of each side of a split that a file has, or several files have, train first.

    Args:
        location: an .npz, a pattern of such, or a folder of them.
        labels: the setting.

    Raises:
        SourceError: as `image_sides`, or the file is unreadable.
        UsageError: `labels` names a single array.
    """
    if labels not in (None, "none"):
        raise UsageError(
            f"--labels {labels} and --splits all: each side has labels of its own, found by name, such as y_train; "
            "omit one of them, or use --labels none"
        )
    files = Files(location, _PATTERN)
    inside = f"{files.location}/*.npz" if os.path.isdir(files.location) else files.location
    if not inside.lower().endswith(".npz"):
        raise SourceError(f"--splits all: {location!r} is no .npz; give one with arrays such as x_train and x_test")
    found = image_sides(npy.arrays(files), location, labelled=labels is None)
    return {side: f"{inside}/{name}.npy" for side, name in found.items()}


def _refuse_sides(files: Files) -> None:
    """Raises SourceError if files in a folder are named like the sides of a split."""
    stems = {os.path.splitext(name)[0]: name for name in files.names}
    if sides := [stems[stem] for stem in split_sides(stems)]:
        raise SourceError(
            f"{files.location!r} has {some(sides)}, which look like the sides of a split: build each by itself, such "
            f"as {os.path.join(files.location, sides[0])!r}, or name the files that belong together by a pattern"
        )


def _require_fit(labels: Array, count: int, images: Array) -> None:
    shape = labels.shape
    if len(shape) in (1, 2) and shape[0] == count and 0 not in shape[1:]:
        return
    way = "fix it, or say --labels NAME for another array, or --labels none"
    if len(shape) == 2 and shape[1] == count:
        way = "its axes are in the wrong order: save array.T"
    raise SourceError(
        f"{labels.where} has shape {shape}, and {images.where} has {images.shape}; labels are one number "
        f"or text for each of the {count} images, ({count},), or a row for each, ({count}, K): {way}"
    )


def _label_spec(labels: str | None) -> tuple[str, Kind | None] | None:
    """The array or file that `--labels` names, and the kind given with it."""
    if labels is None:
        return None
    name, colon, kind = labels.rpartition(":")
    known = cast(Kind, kind) if colon and kind in KINDS else None
    name = name if known else labels
    if name.lower().endswith(".npy") and not is_remote(name):
        name = os.path.abspath(name)  # another process may have another working directory
    return name, known
