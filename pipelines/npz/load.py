"""Opens any NPZ or NPY file as NumPy arrays that are memory-mapped, which `numpy.load` does for an .npy alone."""

from __future__ import annotations

import logging
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, StorageError
from ..storage.base import is_remote, open_regular
from .arrays import ArrayInfo, content, read_arrays

log = logging.getLogger(__name__)
UNNAMED = "arr_0"  # the name of an .npy's array, as numpy.savez calls it


class LoadedArrays(Mapping[str, NDArray[Any]]):
    """The arrays of one file, read-only, by name; that of an .npy is named `arr_0`. Pickled as the file's path.

    An array that lies in the file as it is in memory is a view of the mapped file: only what is used of it is read, and
    its CRC-32 is not checked. Others are read when they are first asked for, checked against their CRC-32, and kept:
    deflated ones (`numpy.savez_compressed`), and stored ones whose elements are not aligned for their dtype, which
    happens in files of `numpy.savez`. The logger names those that are copied for that reason.

    The map exists as long as any of its arrays. If another program shortens the file meanwhile, reading a view ends the
    process with SIGBUS.

    Attributes:
        path: the file.
        infos: dtype, shape and place of each array, by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        descriptor = open_regular(self.path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                raise FormatError("the file is empty; copy or make it again", self.path)
            untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, **untracked)
        finally:
            os.close(descriptor)
        self._buffer = memoryview(self._map)
        self._kept: dict[str, NDArray[Any]] = {}
        try:
            found = read_arrays(self._read, size)
        except FormatError as exc:
            raise FormatError(exc.problem, self.path) from exc
        self.infos: Mapping[str, ArrayInfo] = MappingProxyType({name or UNNAMED: found[name] for name in found})
        for name in self.infos:
            if not self.infos[name].dtype.hasobject:
                self._complete(name)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The array `name`, read-only.

        Raises:
            KeyError: there is no such array.
            FormatError: it holds Python objects, or is damaged.
        """
        if name not in self._kept:
            self._kept[name] = self._array(name)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos  # Mapping would load the array

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {info.dtype} {info.shape}" for name, info in self.infos.items())
        return f"<{type(self).__name__} {self.path!r}: {held}>"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return load, (self.path,)

    def _read(self, offset: int, size: int) -> memoryview:
        return self._buffer[offset : offset + size]

    def _complete(self, name: str) -> ArrayInfo:
        try:
            return self.infos[name].complete()
        except FormatError as exc:
            raise FormatError(f"array {name!r}: {exc.problem}", self.path) from exc

    def _array(self, name: str) -> NDArray[Any]:
        info = self._complete(name)
        if info.unmappable is None:
            return _view(info, self._buffer, info.data_offset)
        try:
            data = self._copied(info)
        except FormatError as exc:
            raise FormatError(f"array {name!r}: {exc.problem}", self.path) from exc
        if not info.deflated:
            log.info("%s: array %r is copied, since it is %s", self.path, name, info.unmappable)
        array = _view(info, data, info.header_bytes)
        array.flags.writeable = False
        return array

    def _copied(self, info: ArrayInfo) -> NDArray[np.uint8]:
        data, done = _aligned(info), 0
        for piece in content(self._read, info):
            data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return data


def load(file: str | os.PathLike[str]) -> LoadedArrays:
    """Opens any .npz or .npy, without pickle, as a read-only mapping of names to arrays; see `LoadedArrays`.

        arrays = gpu_npz.load("train.npz")
        arrays["images"][1000]  # mapped: nothing else is read

    Args:
        file: the path of the file.

    Raises:
        FormatError: it is neither, damaged, truncated, or compressed in another way than NumPy's.
        StorageError: it is not on a disk.
        OSError: it cannot be opened.
    """
    if is_remote(file):
        raise StorageError(f"{os.fspath(file)!r}: only files on a disk can be mapped; copy it first, and load the copy")
    return LoadedArrays(os.fspath(file).removeprefix("file://"))


def _aligned(info: ArrayInfo) -> NDArray[np.uint8]:
    """Memory for an NPY header and its elements, of which the elements are aligned for any dtype."""
    shift = -info.header_bytes % 64
    try:
        memory = np.empty(info.npy_bytes + shift + 64, np.uint8)
    except MemoryError as exc:
        raise FormatError(f"it needs {info.npy_bytes} bytes of memory; save it with np.savez, to be mapped") from exc
    shift += -memory.ctypes.data % 64
    return memory[shift : shift + info.npy_bytes]


def _view(info: ArrayInfo, data: Any, offset: int) -> NDArray[Any]:
    """The elements of an array, which begin in `data` at `offset`, as an array."""
    return np.ndarray(info.shape, info.dtype, data, offset, order="F" if info.fortran else "C")
