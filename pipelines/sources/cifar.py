"""CIFAR-10 and CIFAR-100 as Python 2 pickled them (https://www.cs.toronto.edu/~kriz/cifar.html).

A pickle is a program, and these files come from a download. So theirs is looked through before it runs: only opcodes
that such files have, no length that the file does not hold. Where it names a function or a class, it gets a stand-in of
ours, for the four that arrays need; whatever else it names is refused. No array is made before its parts were checked.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import SourceError
from .base import as_text

SIDE = 32
ROW_BYTES = 3 * SIDE * SIDE
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "batches.meta": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "meta": {"train": ("train",), "test": ("test",)},
}
_MAX_BYTES = 1 << 30  # the largest of the real files has 155 MB
_OPCODES = frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE",
     "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING",
     "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
     "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT",
     "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"]
)  # fmt: skip
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


@dataclass(frozen=True)
class Cifar:
    """One part of a collection.

    Attributes:
        pixels: uint8 (N, 32, 32, 3), in R,G,B.
        labels: int64 (N,); of CIFAR-100 the fine ones.
        class_names: by label.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """One file.

    Attributes:
        name: of the file.
        data: pixels of N images, each as the R, the G and the B of 32 rows of 32: N * 3072 bytes.
        offset: where `data` stands in the file; -1 if the file has it in another form.
        labels: int64 (N,).
    """

    name: str
    data: bytes
    offset: int
    labels: NDArray[np.int64]


def parts(folder: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The names of the files of each part, train and test, of the collection that a folder holds.

    Raises:
        SourceError: it holds neither CIFAR-10 nor CIFAR-100.
    """
    return _PARTS[_meta(folder).name]


def read_cifar(folder: str | os.PathLike[str], part: Literal["train", "test"] = "train") -> Cifar:
    """Reads CIFAR-10 (data_batch_1 to 5, test_batch, batches.meta) or CIFAR-100 (train, test, meta).

    Args:
        folder: what cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to.
        part: which images.

    Raises:
        SourceError: a file is missing, damaged, or holds anything but arrays, numbers and names.
    """
    names = class_names(folder)
    found = [read_batch(folder, file, len(names)) for file in parts(folder)[part]]
    pixels = np.concatenate([interleaved(batch.data) for batch in found])
    return Cifar(pixels, np.concatenate([batch.labels for batch in found]), names)


def class_names(folder: str | os.PathLike[str], *, coarse: bool = False) -> tuple[str, ...]:
    """The classes by label; of CIFAR-100 the fine or the coarse ones. Raises SourceError as `read_cifar`."""
    meta = _meta(folder)
    key = "label_names" if meta.name == "batches.meta" else f"{_level(coarse)}_label_names"
    names = _list(meta, _load(meta, _bytes(meta)), key)
    if not names or not all(isinstance(name, (bytes, str)) for name in names):
        raise _damaged(meta, f"{key} is not a list of names")
    return tuple(_text(name) for name in names)


def read_batch(folder: str | os.PathLike[str], name: str, classes: int, *, coarse: bool = False) -> Batch:
    """One file of a collection with so many classes. Raises SourceError as `read_cifar`."""
    path = Path(folder, name)
    key = "labels" if _meta(folder).name == "batches.meta" else f"{_level(coarse)}_labels"
    raw = _bytes(path)
    found = _load(path, raw)
    array, labels = found.get("data"), _list(path, found, key)
    if not isinstance(array, _Array):
        raise _damaged(path, "data is not an array")
    data = array.data(path)
    rows = len(data) // ROW_BYTES
    if len(labels) != rows or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _damaged(path, f"{key} is not a list of {rows} numbers from 0 to {classes - 1}")
    return Batch(name, data, raw.find(data), np.array(labels, np.int64))


def interleaved(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a batch, or of some of its images: uint8 (N, 32, 32, 3), in R,G,B."""
    planes = np.frombuffer(data, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _level(coarse: bool) -> str:
    return "coarse" if coarse else "fine"


def _meta(folder: str | os.PathLike[str]) -> Path:
    found = next((Path(folder, name) for name in _PARTS if Path(folder, name).exists()), None)
    if found is None:
        raise SourceError(
            f"{os.fspath(folder)!r} has neither batches.meta (CIFAR-10) nor meta (CIFAR-100); give the folder that "
            "cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to"
        )
    return found


def _list(path: Path, found: dict[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list):
        raise _damaged(path, f"it has no list {key!r}")
    return value


def _text(name: bytes | str) -> str:
    return as_text(name) if isinstance(name, bytes) else name


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{os.fspath(path)!r}: {what}; this is no file of CIFAR's python version: unpack it again")


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise SourceError(f"{os.fspath(path)!r}: {exc.strerror}; unpack the archive again") from exc
    if len(data) > _MAX_BYTES:
        raise _damaged(path, f"it has more than {_MAX_BYTES} bytes")
    return data


def _load(path: Path, data: bytes) -> dict[str, Any]:
    """The dictionary in the bytes of a file, keys as text; arrays are `_Array`."""
    try:
        _look_through(path, data)
        found = _Unpickler(path, data).load()
    # What pickle raises for nonsense is no closed list; nothing of the file has run that could raise anything else.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as exc:
        raise _damaged(path, f"no pickle that can be read ({type(exc).__name__}: {exc})"[:300]) from exc
    if not isinstance(found, dict) or not all(isinstance(key, (bytes, str)) for key in found):
        raise _damaged(path, "it holds no dictionary of names")
    return {_text(key): value for key, value in found.items()}


def _look_through(path: Path, data: bytes) -> None:
    """Reads all opcodes, none of which runs. Raises ValueError where the file ends before what it announces."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if opcode.name not in _OPCODES:
            raise _damaged(path, f"opcode {opcode.name} is not allowed")
        if opcode.name in _PUTS and not 0 <= int(argument or 0) <= number:  # the memo is an array of that length
            raise _damaged(path, f"a memo entry {argument} after {number} opcodes")


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise _damaged(
                self._path, f"it names {module}.{name}"[:200] + ", which is not allowed and was not loaded"
            ) from None


class _Name:
    """Stands for a class that is named and never called. No stand-in has attributes that a pickle could set."""

    __slots__ = ()


class _Dtype:
    """Stands for numpy.dtype: what is called, and what comes of it. Its name and no more."""

    __slots__ = ("code",)

    def __init__(self, code: str = "") -> None:
        self.code = code

    def __call__(self, code: bytes | str, *flags: Any) -> _Dtype:
        return _Dtype(_text(code))

    def __setstate__(self, state: Any) -> None:
        """Takes byte order and fields, of which bytes have none."""


class _Array:
    """Stands for an array: what its state says, unchecked."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def data(self, path: Path) -> bytes:
        """The bytes of its elements. Raises SourceError for any other array than uint8 (N, 3072) in C order."""
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5:
            raise _damaged(path, "an array without a state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1", "B", "uint8"):
            raise _damaged(path, f"an array of type {getattr(dtype, 'code', '?')!r}"[:200] + ", not uint8")
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != ROW_BYTES or fortran:
            raise _damaged(path, f"an array of shape {shape!r}"[:200] + f", not (N, {ROW_BYTES}) in C order")
        if not isinstance(data, bytes) or type(shape[0]) is not int or len(data) != shape[0] * ROW_BYTES:
            raise _damaged(path, f"an array of shape {shape!r}"[:200] + " with data of another length")
        return data


class _Reconstruct:
    """Stands for numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"): an array before it has its state."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> _Array:
        return _Array()


class _Encode:
    """Stands for _codecs.encode, as Python 3 pickles bytes for Python 2."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str | bytes = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise ValueError(f"encoded text by {encoding!r}"[:200])
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Encode(),
}
