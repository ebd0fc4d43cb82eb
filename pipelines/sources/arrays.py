"""Images as one array in NumPy's .npy or .npz, read in place, each alone."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import shutil
import struct
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from ..errors import SourceError, UsageError
from ..rejects import MAX_ENCODED_BYTES
from ..storage import is_remote
from .archives import GROUP_ITEMS, place_of, read_piece
from .base import Group, Item
from .files import Files
from .labels import Found, Listed, number_array
from .netpbm import encoded
from .zip import LOCAL_HEADER_BYTES, data_offset

log = logging.getLogger(__name__)
_CHANNELS = (1, 3, 4)
_MAX_HEADER_BYTES = 1 << 16
_MAX_LABEL_BYTES = 1 << 30
_MOST_DEFLATED = 1032  # bytes that one byte of deflate data can become (https://zlib.net/zlib_tech.html)
_IMAGES = ("images", "x", "X", "x_train", "X_train", "train_images", "data", "arr_0")
_LABELS = ("labels", "y", "y_train", "targets")


@dataclass(frozen=True)
class _Array:
    """An array as its header has it, which `checked` has yet to believe.

    Attributes:
        where: the file, and its name there, for messages.
        fortran: whether its elements are in Fortran order.
        start: of its elements, in bytes from the beginning of the .npy.
        held: how many bytes the .npy has.
        member: the .npy in an .npz; None where it is a file of its own.
    """

    where: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    held: int
    member: zipfile.ZipInfo | None = None

    @property
    def size(self) -> int:
        """Of its elements, in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def checked(self) -> _Array:
        """Itself. Raises SourceError if its elements are not all there, in C order, as plain bytes."""
        if self.dtype.hasobject:
            raise SourceError(
                f"{self.where} holds Python objects, which are a pickle and are never loaded; make one array of "
                "numbers or texts of them (of images np.stack(images)), and save that"
            )
        if any(side < 0 for side in self.shape) or self.start + self.size > self.held:
            raise SourceError(
                f"{self.where}: {self.dtype} {str(self.shape)[:200]} does not fit into {self.held} bytes; it is "
                "damaged or cut: copy or make it again"
            )
        if self.fortran and len(self.shape) > 1:
            raise SourceError(
                f"{self.where} is in Fortran order; save it in C order: np.save(file, np.ascontiguousarray(array))"
            )
        return self


class NumpySource(Listed[Found]):
    """The images of one array in an .npy, or in an .npz (`a.npz`, or `a.npz/x_test.npy` for a certain one).

    The array is uint8 or uint16, (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1, 3 (R,G,B) or 4 (uint8 with alpha);
    three dimensions of which the last is 1, 3 or 4 are taken for one image without its N, and refused.
    uint16 keeps its 16 bits with `--bit-depth 16`. In an .npz it is the only one of that many dimensions, or the first
    with a usual name (images, x, x_train, train_images, data, arr_0). Labels are one number or text an image:
    `--labels NAME` of another array in the .npz, by default the one with the matching or a usual name (labels, y,
    y_train, targets) if it has N entries; `--labels FILE.npy` for an .npy; or `none`.

    Nothing is mapped or loaded: a row is read when it is asked for. An array that np.savez_compressed deflated has no
    rows to be read, so every process that reads it inflates it once, into a temporary file without a name (TMPDIR).

    Items are `00000` and so on. An item's place: its row.

    Raises:
        SourceError: it cannot be read, is damaged or cut, or no such array, or its labels do not fit.
        UsageError: settings that contradict each other.
    """

    kind = "numpy"

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        self._asked, self._classes = config.labels, classes
        if config.labels and config.labels.lower().endswith(".npy") and not is_remote(config.labels):
            self._asked = os.path.abspath(config.labels)  # another process may work in another folder
        path, wanted = location, ""
        if match := re.fullmatch(r"(.+\.npz)/([^/]+)\.npy", location, re.IGNORECASE | re.DOTALL):
            path, wanted = match.groups()
        self._files = Files(path, "*.np[yz]")
        if len(self._files) > 1:
            raise SourceError(f"{location!r} are {len(self._files)} files; give one .npy or .npz")
        self.location = self._files.location + (f"/{wanted}.npy" if wanted else "")
        self.files = self._files.stamps
        self.reads_at_once = self._files.reads_at_once
        self._start_anew()
        arrays = _arrays(self._files)
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
        # From where on the elements stand in the file that rows are read from.
        self._start = self._array.start
        if member is not None and not self._deflated:
            self._start += _member_start(self._files, member)
        if self._deflated:
            log.warning(
                "%s is compressed, so each process that reads it inflates it once, into %d MB in %s; np.savez, which "
                "does not compress, spares that",
                self._array.where, self._array.size >> 20, tempfile.gettempdir(),
            )  # fmt: skip
        self._take_labels()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_lock", "_inflated", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._inflated: BinaryIO | None = None

    def groups(self) -> Iterator[Group]:
        """The images in the order of their rows. Raises SourceError if the labels have changed meanwhile."""
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
        """Raises SourceError if the file is gone or may not be read any more."""
        self._files.check()

    def _temporary(self) -> BinaryIO:
        """The .npy as it was before it was deflated."""
        if self._pid != os.getpid():  # forked: the lock may be held by a thread that is not there any more
            self._start_anew()
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
                member.read(1)  # which compares the CRC-32 if this was all
            file.flush()
        except (SourceError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as exc:
            file.close()
            raise OSError(errno.EIO, f"{self._array.where}: {exc}") from exc
        except BaseException:
            file.close()
            raise
        made: BinaryIO = file
        return made

    def _list(self) -> Found:
        given = self._given_labels(_arrays(self._files))
        return Found(None if given is None else number_array(*given, self.location, self._classes))

    def _given_labels(self, arrays: dict[str, _Array]) -> tuple[str, NDArray[Any]] | None:
        """The array that has the labels, and what it is called as a column: by `--labels`, or by its name."""
        labels, images = self._asked, self._name
        if labels == "none":
            return None
        if labels is None:
            # Of several arrays of images, each has its own labels: usual names say which only where there is one.
            alone = sum(len(array.shape) in (3, 4) for array in arrays.values()) == 1
            own = images.replace("images", "labels"), re.sub("^x", "y", images, flags=re.IGNORECASE)
            names = (*own, *_LABELS) if alone or images in ("images", "x", "X") else own
            labels = next((name for name in names if name in arrays and self._fits(arrays[name])), None)
            return None if labels is None else (labels, _values(self._files, arrays[labels]))
        files = self._files
        if self._array.member is None:
            if not labels.lower().endswith(".npy"):
                raise UsageError(f"--labels {labels}: labels of an .npy are another FILE.npy, or none")
            files = Files(labels)
            found_there = _arrays(files)
            if "" not in found_there:
                raise SourceError(f"--labels {labels} is an .npz; give an .npy, or an .npz as SRC with its images, too")
            labels, arrays = "labels", {"labels": found_there[""]}
        if labels not in arrays:
            raise SourceError(f"{self.location!r} has no array {labels!r}; {_shown(arrays)}")
        if not self._fits(arrays[labels]):
            raise SourceError(
                f"{arrays[labels].where} has shape {arrays[labels].shape}; labels are one number or text for each of "
                f"the {self._count} images"
            )
        return labels, _values(files, arrays[labels])

    def _fits(self, array: _Array) -> bool:
        return array.shape in ((self._count,), (self._count, 1))


def _arrays(files: Files) -> dict[str, _Array]:
    """The arrays of an .npz by name, or that of an .npy by an empty name.

    Raises:
        SourceError: it is neither, damaged or cut.
    """
    path = files.path(0)
    with files.opened(0) as file:
        if file.read(4) not in (b"PK\3\4", b"PK\5\6"):
            file.seek(0)
            return {"": _header(file, files.size(0), repr(path))}
        try:
            found = {}
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith(".npy"):
                        continue
                    name = info.filename.removesuffix(".npy")
                    where = f"{path!r}: array {name[:200]!r}"
                    _check_member(info, where, files.size(0))
                    with archive.open(info) as member:
                        found[name] = _header(member, info.file_size, where, info)
            return found
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            struct.error,
            EOFError,
            OSError,
            zlib.error,
        ) as exc:
            raise SourceError(f"{path!r} is no .npz, damaged or cut ({exc}); copy or make it again") from exc


def _check_member(info: zipfile.ZipInfo, where: str, end: int) -> None:
    if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(f"{where} is encrypted or compressed in another way than NumPy's; save it with np.savez")
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else info.compress_size * _MOST_DEFLATED
    if info.header_offset + info.compress_size > end or info.file_size > most:
        raise SourceError(
            f"{where}: {info.file_size} bytes from {info.compress_size} at byte {info.header_offset} of a file of "
            f"{end} bytes; it is damaged or cut: copy or make it again"
        )


def _header(file: Any, size: int, where: str, member: zipfile.ZipInfo | None = None) -> _Array:
    """The header of an .npy of so many bytes (NumPy's NEP 1), none of whose claims has been acted on."""
    head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(head)
    except Exception as exc:  # whatever NumPy and Python's parser raise for a damaged one: no closed list
        reason = f"{type(exc).__name__}: {exc}"[:200]
        raise SourceError(f"{where} is no .npy that can be read ({reason}); save it again with np.save") from exc
    return _Array(where, dtype, shape, fortran, head.tell(), size, member)


def _choose(arrays: dict[str, _Array], wanted: str, location: str) -> str:
    if wanted:
        if wanted not in arrays:
            raise SourceError(f"{location!r}: there is no array {wanted!r}; {_shown(arrays)}")
        return wanted
    if "" in arrays:
        return ""
    many = [name for name, array in arrays.items() if len(array.shape) in (3, 4)]
    name = many[0] if len(many) == 1 else next((name for name in _IMAGES if name in many), None)
    if name is not None and len(many) > 1:
        others = [other for other in many if other != name]
        log.warning(
            "%r: the images are those of %r; %s may be some, too: give SRC as %s/%s.npy to have them",
            location, name, ", ".join(map(repr, others)), location, others[0],
        )  # fmt: skip
    if name is None:
        raise SourceError(
            f"{location!r}: {'no array has' if not many else 'several arrays have'} the dimensions of images; "
            f"{_shown(arrays)}; allowed is (N, H, W), (N, H, W, C) or (N, C, H, W), and {location}/NAME.npy says which"
        )
    return name


def _shown(arrays: dict[str, _Array]) -> str:
    listed = [f"{name!r} {array.dtype} {array.shape}" for name, array in arrays.items()]
    return "it has " + (", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "") or "none")


def _layout(array: _Array) -> tuple[bool, int]:
    """Whether channels stand before rows, and how many there are. Raises SourceError if these are no images."""
    shape, dtype = array.shape, array.dtype
    got = f"{array.where} has {dtype} {shape}"
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
        raise SourceError(f"{got}; alpha goes with uint8 alone: leave it out, array[..., :3], or convert to uint8")
    return first, channels


def _member_start(files: Files, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin."""
    offset = data_offset(files.read(0, member.header_offset, LOCAL_HEADER_BYTES))
    if offset is None or member.header_offset + offset + member.file_size > files.size(0):
        raise SourceError(f"{files.path(0)!r} is damaged or cut; copy or make it again")
    return member.header_offset + offset


def _values(files: Files, array: _Array) -> NDArray[Any]:
    """All elements of an array of labels."""
    if array.checked().dtype.kind not in "biufSU" or not array.dtype.itemsize:
        raise SourceError(f"{array.where} has {array.dtype}; labels are numbers or texts: convert it, or --labels none")
    if array.size > _MAX_LABEL_BYTES:
        raise SourceError(f"{array.where}: {array.size} bytes of labels; at most {_MAX_LABEL_BYTES} are allowed")
    try:
        with files.opened(0) as file:
            if array.member is None:
                file.seek(array.start)
                data = file.read(array.size)
            else:
                with zipfile.ZipFile(file) as archive, archive.open(array.member.filename) as member:
                    data = member.read(array.start + array.size)[array.start :]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as exc:
        raise SourceError(f"{array.where} is damaged ({exc}); copy or make it again") from exc
    if len(data) < array.size:
        raise SourceError(f"{array.where} is cut; copy or make it again")
    return np.frombuffer(data, array.dtype).reshape(-1)
