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

from ..base import as_text

_OPCODES = frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE",
     "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING",
     "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
     "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT",
     "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"]
)  # fmt: skip
_MOST_NESTED = 100
_MOST_OPCODES = 1_000_000  # each may make an object of some hundred bytes; CIFAR-100 has 350,000
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def load(data: bytes) -> Any:
    """What the bytes of a pickle hold; texts of Python 2 as bytes, arrays as `Array`.

    Raises:
        ValueError: they are no pickle, are damaged, or hold anything else.
    """
    try:
        _look_through(data)
        return _Unpickler(data).load()
    # What pickle raises for nonsense is no closed list; nothing of the file has run that could raise anything else.
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}"[:300]) from exc


def _look_through(data: bytes) -> None:
    """Reads all opcodes, none of which runs.

    Raises:
        ValueError: the file ends before what it announces; there are too many opcodes; tuples are nested so deep that
            to hash one would end the process.
    """
    stack: list[int] = []  # how deep the tuples are nested in each value; a mark is -1
    memo: dict[int, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if number >= _MOST_OPCODES:
            raise ValueError(f"more than {_MOST_OPCODES} opcodes")
        if opcode.name not in _OPCODES:
            raise ValueError(f"opcode {opcode.name} is not allowed")
        if opcode.name in _PUTS and not 0 <= int(argument or 0) <= number:  # the memo is an array of that length
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
    """Takes off a stack what an opcode does, with the mark if it wants one."""
    count = len(opcode.stack_before)
    taken: list[int] = []
    if pickletools.markobject in opcode.stack_before:
        while (depth := stack.pop()) >= 0:
            taken.append(depth)
        count -= 2  # the mark, and what stands for all above it
    return taken + [stack.pop() for _ in range(count)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        # No text has to be encoded twice, so what comes of it is no longer than the file.
        self._stand_ins = {**_STAND_INS, ("_codecs", "encode"): _Encode(len(data))}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._stand_ins[module.replace("numpy._core", "numpy.core"), name]
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
        if not isinstance(code, (bytes, str)) or len(code) > 16:
            raise ValueError("a dtype without a short name")
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
            raise ValueError(f"an array that is not (N, {row_bytes}) in C order")
        if not isinstance(data, bytes) or type(shape[0]) is not int or len(data) != shape[0] * row_bytes:
            raise ValueError("an array with data of another length")
        return data


class _Reconstruct:
    """Stands for numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"): an array before it has its state."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> Array:
        return Array()


class _Encode:
    """Stands for _codecs.encode, as Python 3 pickles bytes for Python 2."""

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
