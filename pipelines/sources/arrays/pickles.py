"""Loads untrusted pickles of numbers, text, lists, dictionaries and byte arrays, and refuses anything else.

A pickle is a program, so it is scanned before it runs: it may contain only opcodes that such data needs, and no length
beyond the end of the file. The five functions and classes that arrays need are replaced by stand-ins; any other name is
refused. The parts of an array are checked before the array is made.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from ..base import as_text

_OPCODES = frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE",
     "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING",
     "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
     "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT",
     "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"]
)  # fmt: skip
_MOST_NESTED = 100
_MOST_OPCODES = 1_000_000  # each may create an object of some hundred bytes; CIFAR-100 has 350,000
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def load(data: bytes) -> Any:
    """The content of a pickle. Strings of Python 2 become bytes, arrays become `Array`.

    Raises:
        ValueError: it is not a pickle, is damaged, or contains anything else.
    """
    try:
        _scan(data)
        return _Unpickler(data).load()
    # For invalid data, pickle raises many kinds of errors. No code of the file has run that could raise others.
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}"[:300]) from exc


def _scan(data: bytes) -> None:
    """Reads all opcodes without running them.

    Raises:
        ValueError: an opcode is not allowed; the data ends too early; there are too many opcodes; or tuples are nested
            so deep that hashing one would overflow the stack.
    """
    stack: list[int] = []  # the depth of nested tuples in each value; -1 for a mark
    memo: dict[int, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if number >= _MOST_OPCODES:
            raise ValueError(f"more than {_MOST_OPCODES} opcodes")
        if opcode.name not in _OPCODES:
            raise ValueError(f"opcode {opcode.name} is not allowed")
        if opcode.name in _PUTS and not 0 <= int(argument or 0) <= number:  # pickle allocates a memo of that length
            raise ValueError(f"a memo entry {argument} after {number} opcodes")
        if opcode.name == "MARK":
            stack.append(-1)
        elif opcode.name in (*_PUTS, "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif opcode.name != "STOP":
            taken = _taken(stack, opcode)
            depth = max(taken, default=0) + ("TUPLE" in opcode.name)
            if depth > _MOST_NESTED:
                raise ValueError(f"tuples in tuples, more than {_MOST_NESTED} deep")
            stack += [depth] * len(opcode.stack_after)


def _taken(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Pops from the stack what an opcode pops, including its mark, if any."""
    count = len(opcode.stack_before)
    taken: list[int] = []
    if pickletools.markobject in opcode.stack_before:
        while (depth := stack.pop()) >= 0:
            taken.append(depth)
        count -= 2  # the mark, and the placeholder for all values above it
    return taken + [stack.pop() for _ in range(count)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        # No text needs to be encoded twice, so the results together are no longer than the file.
        self._stand_ins = {**_STAND_INS, ("_codecs", "encode"): _Encode(len(data))}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._stand_ins[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise ValueError(f"it names {module}.{name}"[:200] + ", which is not allowed and was not loaded") from None


class _Name:
    """Replaces a class that is named but never called. Stand-ins have no attributes that a pickle could set."""

    __slots__ = ()


class _Dtype:
    """Replaces numpy.dtype, both the class and its instances. Holds only the name."""

    __slots__ = ("code",)

    def __init__(self, code: str = "") -> None:
        self.code = code

    def __call__(self, code: bytes | str, *flags: Any) -> _Dtype:
        if not isinstance(code, (bytes, str)) or len(code) > 16:
            raise ValueError("a dtype without a short name")
        return _Dtype(as_text(code) if isinstance(code, bytes) else code)

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and fields, which bytes do not have."""


class Array:
    """Replaces an array. Holds its pickled state, unchecked."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def data(self, row_bytes: int) -> bytes:
        """The bytes of its elements. Raises ValueError unless the array is uint8 (N, row_bytes) in C order."""
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array without a state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1", "B", "uint8"):
            raise ValueError(f"an array of type {getattr(dtype, 'code', '?')!r}"[:200] + ", not uint8")
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != row_bytes or fortran:
            raise ValueError(f"an array that is not (N, {row_bytes}) in C order")
        if not isinstance(data, bytes) or type(shape[0]) is not int or len(data) != shape[0] * row_bytes:
            raise ValueError("an array with data of another length")
        return data


class _Reconstruct:
    """Replaces numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"), which makes an array without state."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> Array:
        return Array()


class _Encode:
    """Replaces _codecs.encode, by which Python 3 pickles bytes for Python 2."""

    __slots__ = ("_left",)

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes

    def __call__(self, text: str, encoding: str | bytes = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise ValueError("text encoded in another way than as latin1")
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("a text that is encoded again and again")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _Dtype(),
}
