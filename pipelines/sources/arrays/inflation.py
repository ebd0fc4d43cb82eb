"""Deflated arrays, whose rows cannot be read alone: each process inflates each of them once, into a temporary file."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import weakref
from typing import Any, BinaryIO

from ...errors import FormatError, SourceError
from ...npz.arrays import content
from ..access.files import Files
from . import npy
from .npy import Array


class Inflated:
    """The inflated arrays of a source, in one temporary file (TMPDIR). Can be shared by threads, and pickled."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._temporary: BinaryIO | None = None
        self._end = 0
        self._begins: dict[int, int] = {}  # where the array of each file begins in the temporary file

    def read(self, array: Array, offset: int, size: int) -> bytes:
        """`size` bytes of the inflated .npy from `offset` on.

        Raises:
            OSError: no space is left, or the array is damaged.
        """
        if self._pid != os.getpid():  # after a fork, the lock may be held by a thread that does not exist here
            self._reset()
        with self._lock:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the source
                weakref.finalize(self, self._temporary.close)
            if array.number not in self._begins:
                self._inflate(array, self._temporary)
        data = os.pread(self._temporary.fileno(), size, self._begins[array.number] + offset)
        if len(data) < size:
            raise OSError(errno.EIO, "the temporary file has become shorter")
        return data

    def _inflate(self, array: Array, target: BinaryIO) -> None:
        size, place = array.info.npy_bytes, tempfile.gettempdir()
        if shutil.disk_usage(place).free < size:
            raise OSError(errno.ENOSPC, f"no space for {size} bytes in {place}; set TMPDIR to a larger folder")
        target.seek(self._end)
        try:
            with self._files.opened(array.number) as packed:
                for piece in content(npy.reading(packed), array.info):
                    target.write(piece)
        except (SourceError, FormatError) as exc:
            raise OSError(errno.EIO, f"{array.where}: {exc}") from exc
        target.flush()
        self._begins[array.number], self._end = self._end, self._end + size
