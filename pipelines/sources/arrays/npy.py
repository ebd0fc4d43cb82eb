"""Arrays in NumPy's files, on a disk or a store; `npz/arrays.py` reads and checks their headers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import FormatError, SourceError
from ...npz.arrays import ArrayInfo, ReadAt, content, read_arrays
from ..access.files import Files

_MAX_VALUE_BYTES = 1 << 30


@dataclass(frozen=True)
class Array:
    """An array in a file.

    Attributes:
        where: the file and the array's name, for messages.
        number: of the file.
        info: what it is, and where its bytes lie; `checked` verifies the claims.
    """

    where: str
    number: int
    info: ArrayInfo

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its elements."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape

    @property
    def in_npz(self) -> bool:
        """Whether it is one of the arrays of an .npz."""
        return self.info.crc32 is not None

    def checked(self) -> Array:
        """The array itself. Raises SourceError if its elements are incomplete, or Python objects."""
        try:
            self.info.complete()
        except FormatError as exc:
            raise SourceError(f"{self.where}: {exc.problem}") from exc
        return self


def arrays(files: Files, number: int = 0) -> dict[str, Array]:
    """The arrays in an .npz by name, or the array of an .npy under an empty name.

    Raises:
        SourceError: it is neither, damaged or truncated.
    """
    path = files.path(number)
    with files.opened(number) as file:
        try:
            found = read_arrays(reading(file), files.size(number))
        except FormatError as exc:
            raise SourceError(f"{path!r}: {exc.problem}") from exc
        except OSError as exc:
            raise SourceError(f"{path!r}: {exc.strerror or exc}; check the disk, then run the command again") from exc
    wheres = {name: f"{path!r}: array {name[:200]!r}" if name else repr(path) for name in found}
    return {name: Array(wheres[name], number, info) for name, info in found.items()}


def reading(file: Any) -> ReadAt:
    """Reads at any offset of an open file."""

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        data: bytes = file.read(size)
        return data

    return read


@contextlib.contextmanager
def as_damage(array: Array) -> Iterator[None]:
    """Turns errors of reading an array into SourceError."""
    try:
        yield
    except FormatError as exc:
        raise SourceError(f"{array.where}: {exc.problem}") from exc
    except OSError as exc:
        raise SourceError(f"{array.where} cannot be read ({exc}); check the disk, then run the command again") from exc


def values(files: Files, array: Array) -> NDArray[Any]:
    """Reads an array of labels. Raises SourceError if it is not of numbers or text, damaged, or too large."""
    info = array.checked().info
    if info.dtype.kind not in "biufSU":
        raise SourceError(f"{array.where} has {info.dtype}; labels are numbers or texts: convert it, or --labels none")
    if info.data_bytes > _MAX_VALUE_BYTES:
        raise SourceError(f"{array.where}: {info.data_bytes} bytes of labels; at most {_MAX_VALUE_BYTES} are allowed")
    with as_damage(array), files.opened(array.number) as file:
        data = b"".join(content(reading(file), info))
    found = np.frombuffer(memoryview(data)[info.header_bytes :], info.dtype)
    return found.reshape(info.shape, order="F" if info.fortran else "C")
