"""Images as one array in an .npy or .npz. Each image is read in place, on its own."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import numpy as np

from ...config import BuildConfig
from ...errors import SourceError, UsageError
from ...storage.base import is_remote
from ..access.files import GROUP_ITEMS, Files, place_of, read_piece
from ..base import Group, Item
from ..labels import KINDS, Kind, LabelledSource, Listing, array_labels
from ..rejects import MAX_ENCODED_BYTES
from ..tables.columns import LABEL_COLUMNS
from . import npy
from .netpbm import encoded
from .npy import Array

log = logging.getLogger(__name__)
_CHANNELS = (1, 3, 4)
_IMAGES = ("images", "image", "imgs", "img", "x", "data")  # words in names of arrays, the most likely first
_LABELS = frozenset((*LABEL_COLUMNS, "targets", "y"))
_WORD = re.compile(r"[xyXY](?=train|val|test|dev)|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_UNNAMED = re.compile(r"arr_(\d+)")  # what numpy.savez calls positional arrays


class NumpySource(LabelledSource[Listing]):
    """The images of one array in an .npy or .npz (`a.npz`, or `a.npz/x_test.npy` for a particular array).

    The array is uint8 or uint16, (N, H, W), (N, H, W, C) or (N, C, H, W), where C is 1, 3 (RGB) or 4 (uint8 with
    alpha). An array of three dimensions whose last one is 1, 3 or 4 is probably a single image, and is refused. uint16
    keeps its 16 bits with `--bit-depth 16`. In an .npz, the images are the only array with three or four dimensions, or
    the first with a usual name (images, image, imgs, img, x, data; the same with train; arr_0).

    Labels are numbers or text, (N,), or (N, K) for K columns, named `NAME_0` and so on. One-hot rows, with one 1 among
    zeros, are classes. `--labels NAME` names an array of the .npz and `--labels FILE.npy` a file; both accept a kind
    (`NAME:integer` keeps one-hot rows as columns). `none` means no labels. By default, labels are the array whose name
    is that of the images with label, labels, class, target, targets, category or y instead of their word (y_train for
    x_train, test_labels for test_images), or that word alone; or arr_1 for arr_0. Case is ignored.

    Nothing is mapped or loaded in advance: each row is read on demand. Rows of an array that np.savez_compressed
    deflated cannot be read alone, so each process that reads it inflates it once into an unnamed temporary file
    (TMPDIR).

    Items are named `00000` and so on. An item's place: its row.

    Raises:
        SourceError: the file is unreadable, damaged or truncated; there is no such array; or labels do not fit the
            images.
        UsageError: settings contradict each other.
    """

    kind = "numpy"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._asked, self._classes = _label_spec(config.labels), classes
        path, wanted = location, ""
        if match := re.fullmatch(r"(.+\.npz)/([^/]+)\.npy", location, re.IGNORECASE | re.DOTALL):
            path, wanted = match.groups()
        self._files = Files(path, "*.np[yz]")
        if len(self._files) > 1:
            raise SourceError(f"{location!r} are {len(self._files)} files; give one .npy or .npz")
        self.location = self._files.location + (f"/{wanted}.npy" if wanted else "")
        self.files = self._files.stamps
        self.reads_at_once = self._files.reads_at_once
        self._reset()
        arrays = npy.arrays(self._files)
        self._name = _choose(arrays, wanted, self.location)
        self._array = arrays[self._name].checked()
        self._planar, self._channels = _layout(self._array)
        self._count, *self._row_shape = self._array.shape
        self._row_bytes = self._array.dtype.itemsize * math.prod(self._row_shape)
        if self._row_bytes > MAX_ENCODED_BYTES:
            raise SourceError(
                f"{self._array.where}: images of {self._row_bytes} bytes; at most {MAX_ENCODED_BYTES} are allowed"
            )
        member = self._array.member
        self._deflated = member is not None and member.compress_type != zipfile.ZIP_STORED
        # The offset of the elements in the file that rows are read from.
        self._start = self._array.start
        if member is not None and not self._deflated:
            self._start += npy.member_start(self._files, member)
        if self._deflated:
            log.warning(
                "%s is compressed, so each process that reads it decompresses it once, into %d MB in %s; to avoid "
                "this, save it with np.savez, which does not compress",
                self._array.where, self._array.size >> 20, tempfile.gettempdir(),
            )  # fmt: skip
        self._take_labels()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_lock", "_inflated", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._inflated: BinaryIO | None = None

    def groups(self) -> Iterator[Group]:
        """The images in the order of their rows. Raises SourceError if the labels have changed since."""
        found = self._listed().labels
        for start in range(0, self._count, GROUP_ITEMS):
            rows = np.arange(start, min(start + GROUP_ITEMS, self._count), dtype=np.int64)
            yield Group(
                b"",
                [b"%05d" % row for row in rows.tolist()],
                labels=None if found is None else found.values[rows],
                places=rows[:, None],
            )

    def read(self, item: Item) -> bytes:
        """The image as PGM, PPM or PNG. Raises OSError or BadItem as `read_piece`."""
        (row,) = place_of(item, 1)
        start = self._start + row * self._row_bytes if 0 <= row < self._count else -1
        if self._deflated and start >= 0:
            data = os.pread(self._temporary().fileno(), self._row_bytes, start)
        else:
            data = read_piece(self._files, 0, start, self._row_bytes)
        if len(data) < self._row_bytes:
            raise OSError(errno.EIO, "the temporary file has become shorter")
        pixels = np.frombuffer(data, self._array.dtype).reshape(self._row_shape)
        pixels = pixels.transpose(1, 2, 0) if self._planar else pixels
        return encoded(pixels.reshape(*pixels.shape[:2], self._channels))

    def check(self) -> None:
        """Raises SourceError if the file is gone or no longer readable."""
        self._files.check()

    def _temporary(self) -> BinaryIO:
        """The inflated .npy."""
        if self._pid != os.getpid():  # after a fork, the lock may be held by a thread that does not exist here
            self._reset()
        with self._lock:
            if self._inflated is None:
                self._inflated = self._inflate()
                weakref.finalize(self, self._inflated.close)
            return self._inflated

    def _inflate(self) -> BinaryIO:
        assert self._array.member is not None
        size, place = self._array.start + self._array.size, tempfile.gettempdir()
        if shutil.disk_usage(place).free < size:
            raise OSError(errno.ENOSPC, f"no space for {size} bytes in {place}; set TMPDIR to a larger folder")
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the source
        try:
            with (
                self._files.opened(0) as packed,
                zipfile.ZipFile(packed) as archive,
                archive.open(self._array.member.filename) as member,
            ):
                while left := size - file.tell():
                    if not (data := member.read(min(left, 1 << 20))):
                        raise OSError(errno.EIO, f"{self._array.where} ends early; it is damaged or cut")
                    file.write(data)
                member.read(1)  # at the end, this verifies the CRC-32
            file.flush()
        except (SourceError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as exc:
            file.close()
            raise OSError(errno.EIO, f"{self._array.where}: {exc}") from exc
        except BaseException:
            file.close()
            raise
        made: BinaryIO = file
        return made

    def _list(self) -> Listing:
        arrays = npy.arrays(self._files)
        name, kind = self._asked or (self._usual_labels(arrays), None)
        if name in (None, "none"):
            return Listing(None)
        files, column, array = self._files, name, arrays.get(name)
        if array is None and name.lower().endswith(".npy"):
            files, column = Files(name), "labels"
            array = npy.arrays(files).get("")
            if array is None:
                raise SourceError(f"--labels {name} is an .npz; give an .npy, or an .npz as SRC with its images, too")
        elif self._array.member is None:
            raise UsageError(f"--labels {name}: labels of an .npy are another FILE.npy, or none")
        elif array is None:
            raise SourceError(f"{self.location!r} has no array {name!r}; it has {_shown(arrays)}")
        self._require_fit(array)
        values = npy.values(files, array)
        values = values[:, 0] if values.shape[1:] == (1,) else values
        return Listing(array_labels(column, values, self.location, self._classes, kind=kind))

    def _usual_labels(self, arrays: Mapping[str, Array]) -> str | None:
        """The array that holds the labels, judging by its name. Raises SourceError if there are several."""
        found = _named_labels(self._name, arrays)
        if len(found) > 1:
            listed = ", ".join(map(repr, found))
            raise SourceError(
                f"{self.location!r}: {listed} have usual names of labels; --labels {found[0]} takes that one"
            )
        others = {name: array for name, array in arrays.items() if name != self._name and not _like_images(array)}
        if not found and others:
            log.warning(
                "%r is built without labels: none of its other arrays has a usual name of labels (%s); --labels NAME "
                "takes one of them, and --labels none is for images without labels",
                self.location, _shown(others),
            )  # fmt: skip
        return found[0] if found else None

    def _require_fit(self, labels: Array) -> None:
        shape, count = labels.shape, self._count
        if len(shape) in (1, 2) and shape[0] == count and 0 not in shape:
            return
        way = "fix it, or say --labels NAME for another array, or --labels none"
        if len(shape) == 2 and shape[1] == count:
            way = "its axes are in the wrong order: save array.T"
        raise SourceError(
            f"{labels.where} has shape {shape}, and {self._array.where} has {self._array.shape}; labels are one number "
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


def _words(name: str) -> frozenset[str]:
    """The words in a name: `train` and `x` in `X_train`, `xtrain` and `trainX`."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _like_images(array: Array) -> bool:
    return len(array.shape) in (3, 4)


def _named_labels(images: str, arrays: Mapping[str, Array]) -> list[str]:
    """The arrays that, judging by their names, hold the labels of an array of images; there should be at most one.

    If several arrays hold images, each has its own labels, and names of just a label word do not count.
    """
    alone = sum(map(_like_images, arrays.values())) == 1
    own = _words(images).difference(_IMAGES)
    parts = [own, *([frozenset[str](), frozenset({"train"}) - own] if alone else [])]
    others = [name for name in arrays if name != images]
    for part in parts:
        named = [name for name in others if _words(name) & _LABELS and _words(name) - _LABELS - {*_IMAGES} == part]
        if named:
            return named
    unnamed = [name for name in others if _UNNAMED.fullmatch(name) and not _like_images(arrays[name])]
    if (match := _UNNAMED.fullmatch(images)) is None:
        return []
    following = f"arr_{int(match[1]) + 1}"
    return unnamed if alone and len(unnamed) == 1 else [name for name in unnamed if name == following]


def _choose(arrays: dict[str, Array], wanted: str, location: str) -> str:
    if wanted:
        if wanted not in arrays:
            raise SourceError(f"{location!r}: there is no array {wanted!r}; it has {_shown(arrays)}")
        return wanted
    if "" in arrays:
        return ""
    many = [name for name, array in arrays.items() if _like_images(array)]
    usual = [{word, *part} for part in ((), ("train",)) for word in _IMAGES]
    found = [name for words in (*usual, {"arr", "0"}) for name in many if _words(name) == words]
    name = many[0] if len(many) == 1 else next(iter(found), None)
    if name is not None and len(many) > 1:
        others = [other for other in many if other != name]
        log.warning(
            "%r: the images are those of %r; %s may be some, too: give SRC as %s/%s.npy to have them",
            location, name, ", ".join(map(repr, others)), location, others[0],
        )  # fmt: skip
    if name is None:
        raise SourceError(
            f"{location!r}: {'no array has' if not many else 'several arrays have'} the dimensions of images; it has "
            f"{_shown(arrays)}; allowed is (N, H, W), (N, H, W, C) or (N, C, H, W), and {location}/NAME.npy says which"
        )
    return name


def _shown(arrays: Mapping[str, Array]) -> str:
    listed = [f"{name!r} {array.dtype} {array.shape}" for name, array in arrays.items()]
    return ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "") or "none"


def _layout(array: Array) -> tuple[bool, int]:
    """Whether channels come before rows, and how many there are. Raises SourceError if these are not images."""
    shape, dtype = array.shape, array.dtype
    got = f"{array.where} has {dtype} {shape}"
    if array.fortran and len(shape) > 1:
        raise SourceError(
            f"{array.where} is in Fortran order; save it in C order: np.save(file, np.ascontiguousarray(array))"
        )
    if dtype.kind != "u" or dtype.itemsize > 2 or dtype.subdtype is not None:
        raise SourceError(
            f"{got}; allowed are uint8 and uint16: scale it to 0 to 255 (or 65535), round, and save "
            "it as .astype('uint8')"
        )
    first, last = len(shape) == 4 and shape[1] in _CHANNELS, len(shape) == 4 and shape[3] in _CHANNELS
    if first and last:
        raise SourceError(f"{got}, where channels could be first or last; save it as (N, H, W) or with more columns")
    if len(shape) == 3 and shape[2] in _CHANNELS:
        raise SourceError(
            f"{got}, which looks like one image of {shape[2]} channels; allowed are (N, H, W), (N, H, W, C) and (N, C, "
            "H, W): save one image as array[None], gray ones that are so narrow as array[..., None]"
        )
    if len(shape) != 3 and not first and not last:
        raise SourceError(f"{got}; allowed are (N, H, W), (N, H, W, C) and (N, C, H, W), C being 1, 3 or 4")
    if 0 in shape:
        raise SourceError(f"{got}, which is no image at all; give an array with images")
    channels = shape[1] if first else shape[3] if last else 1
    if channels == 4 and dtype.itemsize == 2:
        raise SourceError(f"{got}; alpha goes with uint8 alone: omit it, array[..., :3], or convert to uint8")
    return first, channels
