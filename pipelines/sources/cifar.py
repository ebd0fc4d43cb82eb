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

_SIDE = 32
_ROW_BYTES = 3 * _SIDE * _SIDE
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


def read_cifar(folder: str | os.PathLike[str], part: Literal["train", "test"] = "train") -> Cifar:
    """Reads CIFAR-10 (data_batch_1 to 5, test_batch, batches.meta) or CIFAR-100 (train, test, meta).

    Args:
        folder: what cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to.
        part: which images.

    Raises:
        SourceError: a file is missing, damaged, or holds anything but arrays, numbers and names.
    """
    place = Path(folder)
    if (place / "batches.meta").exists():
        files = [f"data_batch_{number}" for number in range(1, 6)] if part == "train" else ["test_batch"]
        meta, names_key, labels_key = place / "batches.meta", "label_names", "labels"
    elif (place / "meta").exists():
        files, meta, names_key, labels_key = [part], place / "meta", "fine_label_names", "fine_labels"
    else:
        raise SourceError(
            f"{os.fspath(folder)!r} has neither batches.meta (CIFAR-10) nor meta (CIFAR-100); give the folder that "
            "cifar-10-python.tar.gz or cifar-100-python.tar.gz unpacks to"
        )
    names = _list(meta, _load(meta), names_key)
    if not names or not all(isinstance(name, (bytes, str)) for name in names):
        raise _damaged(meta, f"{names_key} is not a list of names")
    batches = [_batch(place / file, labels_key, len(names)) for file in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Cifar(pixels, labels, tuple(_text(name) for name in names))


def _batch(path: Path, labels_key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    found = _load(path)
    data, labels = found.get("data"), _list(path, found, labels_key)
    if not isinstance(data, _Array):
        raise _damaged(path, "data is not an array")
    rows = data.pixels(path)
    if len(labels) != len(rows) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _damaged(path, f"{labels_key} is not a list of {len(rows)} numbers from 0 to {classes - 1}")
    return rows, np.array(labels, np.int64)


def _list(path: Path, found: dict[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list):
        raise _damaged(path, f"it has no list {key!r}")
    return value


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{os.fspath(path)!r}: {what}; this is no file of CIFAR's python version: unpack it again")


def _load(path: Path) -> dict[str, Any]:
    """The dictionary in a file, keys as text; arrays are `_Array`."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise SourceError(f"{os.fspath(path)!r}: {exc.strerror}; unpack the archive again") from exc
    if len(data) > _MAX_BYTES:
        raise _damaged(path, f"it has more than {_MAX_BYTES} bytes")
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

    def pixels(self, path: Path) -> NDArray[np.uint8]:
        """As uint8 (N, 32, 32, 3). Raises SourceError for any other array than uint8 (N, 3072) in C order."""
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5:
            raise _damaged(path, "an array without a state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1", "B", "uint8"):
            raise _damaged(path, f"an array of type {getattr(dtype, 'code', '?')!r}"[:200] + ", not uint8")
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != _ROW_BYTES or fortran:
            raise _damaged(path, f"an array of shape {shape!r}"[:200] + f", not (N, {_ROW_BYTES}) in C order")
        if not isinstance(data, bytes) or type(shape[0]) is not int or len(data) != shape[0] * _ROW_BYTES:
            raise _damaged(path, f"an array of shape {shape!r}"[:200] + " with data of another length")
        planes = np.frombuffer(data, np.uint8).reshape(-1, 3, _SIDE, _SIDE)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


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
