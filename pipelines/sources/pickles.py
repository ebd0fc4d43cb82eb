"""Pickles from a download: of numbers, texts, lists, dictionaries and byte arrays, and nothing else.

A pickle is a program. So it is looked through before it runs: only opcodes that such data need, no length that the file
does not hold. Where it names a function or a class, it gets a stand-in of ours, for the four that arrays need; whatever
else it names is refused. No array is made before its parts were checked.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from .base import as_text

_OPCODES = frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE",
     "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING",
     "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
     "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT",
     "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"]
)  # fmt: skip
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def load(data: bytes) -> Any:
    """What the bytes of a pickle hold; texts of Python 2 as bytes, arrays as `Array`.

    Raises:
        ValueError: they are no pickle, are damaged, or hold anything else.
    """
    try:
        _look_through(data)
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    # What pickle raises for nonsense is no closed list; nothing of the file has run that could raise anything else.
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}"[:300]) from exc


def _look_through(data: bytes) -> None:
    """Reads all opcodes, none of which runs. Raises ValueError where the file ends before what it announces."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if opcode.name not in _OPCODES:
            raise ValueError(f"opcode {opcode.name} is not allowed")
        if opcode.name in _PUTS and not 0 <= int(argument or 0) <= number:  # the memo is an array of that length
            raise ValueError(f"a memo entry {argument} after {number} opcodes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise ValueError(f"it names {module}.{name}"[:200] + ", which is not allowed and was not loaded") from None


class _Name:
    """Stands for a class that is named and never called. No stand-in has attributes that a pickle could set."""

    __slots__ = ()


class _Dtype:
    """Stands for numpy.dtype: what is called, and what comes of it. Its name and no more."""

    __slots__ = ("code",)

    def __init__(self, code: str = "") -> None:
        self.code = code

    def __call__(self, code: bytes | str, *flags: Any) -> _Dtype:
        return _Dtype(as_text(code) if isinstance(code, bytes) else code)

    def __setstate__(self, state: Any) -> None:
        """Takes byte order and fields, of which bytes have none."""


class Array:
    """Stands for an array: what its state says, unchecked."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def data(self, row_bytes: int) -> bytes:
        """The bytes of its elements. Raises ValueError for any other array than uint8 (N, row_bytes) in C order."""
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array without a state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1", "B", "uint8"):
            raise ValueError(f"an array of type {getattr(dtype, 'code', '?')!r}"[:200] + ", not uint8")
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != row_bytes or fortran:
            raise ValueError(f"an array of shape {shape!r}"[:200] + f", not (N, {row_bytes}) in C order")
        if not isinstance(data, bytes) or type(shape[0]) is not int or len(data) != shape[0] * row_bytes:
            raise ValueError(f"an array of shape {shape!r}"[:200] + " with data of another length")
        return data


class _Reconstruct:
    """Stands for numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"): an array before it has its state."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> Array:
        return Array()


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
