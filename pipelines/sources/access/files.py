"""Files that hold many items each, on a disk or on an fsspec store: found by a pattern, read at any offset.

A file is opened only when it is read, and few stay open, so that there may be thousands.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import itertools
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, cast

from ...errors import SourceError
from ...storage.base import is_remote, open_regular
from ..base import Item, full_location
from ..rejects import MAX_ENCODED_BYTES, BadItem
from .read_ahead import reserve
from .stores import (
    BLOCK_BYTES,
    READS_AT_ONCE,
    as_source_errors,
    as_system_errors,
    ask_store,
    from_web,
    is_web,
    store_of,
    without_query,
)

GROUP_ITEMS = 8192  # items of a file in one Group
_OPEN_FILES = 64
_MAX_FILES = 1_000_000
_MAX_DIGITS = 18
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_GLOB = re.compile(r"[*?\[]")
_LIVE: weakref.WeakSet[Files] = weakref.WeakSet()


class Files:
    """Numbered files. Can be shared by threads, and pickled; each process opens the files itself.

    Args:
        location: a file, a pattern (`a-{000..099}.tar`, `{train,val}.tar`, `*.tar`), or a URL of these.
        inside: if `location` is a folder, the pattern of the names to use.

    Attributes:
        names: of the files, relative to their common folder; sorted if a pattern found them.
        stamps: name and size of each file, as for `Source.files`.

    Raises:
        SourceError: there is no such file, or its parts cannot be read.
    """

    def __init__(self, location: str, inside: str = "*") -> None:
        self.location = full_location(location)
        self._remote = is_remote(self.location)
        self._reset()
        found = self._found(inside)
        if not found:
            raise SourceError(f"{location!r}: there is no such file; give a file, a pattern in quotes, or a URL")
        self._paths = list(found)
        named = [*map(without_query, self._paths)]
        start = os.path.commonprefix(named).rfind("/") + 1  # noqa: RUF071  # commonpath makes one slash of "://"
        self.names = [name[start:] for name in named]
        self.stamps = tuple(zip(self.names, found.values(), strict=True))

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock", "_fs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._fs: Any = None
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        weakref.finalize(self, _close, self._open)
        _LIVE.add(self)

    @property
    def reads_at_once(self) -> int:
        """See `Source.reads_at_once`."""
        return READS_AT_ONCE if self._remote else 1

    def path(self, number: int) -> str:
        """The path or the URL of a file, for messages."""
        return self._paths[number]

    def size(self, number: int) -> int:
        """The size of a file in bytes."""
        return self.stamps[number][1]

    def read(self, number: int, start: int, size: int) -> bytes:
        """`size` bytes of a file from `start` on; fewer only at the end of the file, by its size when it was found.

        Raises:
            OSError: with the system's errno; from a remote store ENOENT, EACCES, ENOTSUP if a web server does not
                support ranges, or EIO for anything else. Also EIO if the file has shrunk.
        """
        if not 0 <= number < len(self._paths) or start < 0:
            raise OSError(errno.EINVAL, f"no byte {start} of a file {number}")
        size = min(size, self.stamps[number][1] - start)
        if size <= 0:
            return b""
        data = self._read_remote(number, start, size) if self._remote else self._read_local(number, start, size)
        if len(data) != size:
            raise OSError(errno.EIO, f"{len(data)} of {size} bytes came; the file has changed or was cut off")
        return data

    def _read_remote(self, number: int, start: int, size: int) -> bytes:
        path = self._paths[number]
        with as_system_errors():
            if is_web(path):
                data, total = from_web(self._store, path, start, size)
                if total not in (None, self.stamps[number][1]):
                    raise OSError(errno.EIO, f"its size is now {total} bytes; the file has changed")
                return data
            reserve(size)
            return bytes(self._store.cat_file(path, start=start, end=start + size))

    def _read_local(self, number: int, start: int, size: int) -> bytes:
        with self._lock:  # held while reading, so that the descriptor is not closed and reused
            descriptor = self._open.get(number)
            if descriptor is None:
                descriptor = open_regular(self._paths[number], os.O_RDONLY)
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[number] = descriptor
            data = os.pread(descriptor, size, start)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
                data += more
            return data

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[BinaryIO]:
        """Opens a file for sequential or random reads.

        Raises:
            SourceError: it cannot be opened; for a remote file also if a read in the body keeps failing.
        """
        try:
            if self._remote:
                file = cast(BinaryIO, io.BufferedReader(FileOf(self, number), BLOCK_BYTES))
            else:
                file = open(self._paths[number], "rb", opener=open_regular)  # noqa: SIM115  # closed below
        except OSError as exc:
            raise self._open_error(self._paths[number], exc) from exc
        with file:
            yield file

    def check(self) -> None:
        """Raises SourceError if a file is gone or no longer readable."""
        for number, path in enumerate(self._paths):
            try:
                if self._remote:
                    ask_store(partial(self.read, number, 0, 1))
                else:
                    os.close(open_regular(path, os.O_RDONLY))
            except OSError as exc:
                if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise SourceError(f"{path!r} is missing; restore it, then run the same command to resume") from exc
                if exc.errno in (errno.EACCES, errno.EPERM):
                    raise SourceError(
                        f"{path!r}: {exc.strerror}; make it readable, then run the same command to resume"
                    ) from exc
                raise SourceError(f"{path!r}: {exc.strerror}; check it, then run the same command to resume") from exc

    @property
    def _store(self) -> Any:
        if self._fs is None:
            self._fs = store_of(self.location)
        return self._fs

    def _found(self, inside: str) -> dict[str, int]:
        """The paths of all files, with their sizes."""
        if not self._remote:
            if os.path.isdir(self.location):
                paths = sorted(glob.glob(os.path.join(glob.escape(self.location), inside)))
            elif os.path.lexists(self.location):  # even if its name looks like a pattern
                paths = [self.location]
            else:
                paths = [
                    path
                    for each in _expanded(self.location)
                    for path in (sorted(glob.glob(each)) if _GLOB.search(each) else [each])
                ]
            return {path: self._local_size(path) for path in paths}
        found: dict[str, int | None] = {}
        for each in _expanded(self.location):
            found.update(self._found_remote(each, inside))
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            sizes = pool.map(lambda path, size: self._web_size(path) if size is None else size, found, found.values())
            return dict(zip(found, sizes, strict=True))

    def _found_remote(self, url: str, inside: str) -> dict[str, int | None]:
        """The URLs of files, with their sizes; None for files on a web server, which has to be asked for each."""
        with as_source_errors(url):
            if _GLOB.search(without_query(url)):
                return self._matching(url)
            if is_web(url):
                return {url: None}
            info = ask_store(lambda: self._store.info(url))
            if info["type"] == "directory":
                return self._matching(f"{url.rstrip('/')}/{inside}")
            return {url: int(info["size"])}

    def _matching(self, pattern: str) -> dict[str, int | None]:
        matches: dict[str, dict[str, Any]] = ask_store(lambda: self._store.glob(pattern, detail=True))
        return {
            self._store.unstrip_protocol(path): None if is_web(pattern) else int(info["size"])
            for path, info in sorted(matches.items())
            if info["type"] == "file"
        }

    def _local_size(self, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as exc:
            raise self._open_error(path, exc) from exc

    def _web_size(self, url: str) -> int:
        try:
            size = ask_store(lambda: from_web(self._store, url, 0, 1)[1])
        except OSError as exc:
            raise self._open_error(url, exc) from exc
        if size is None:
            raise SourceError(
                f"{url!r}: the server does not report its size, so parts of it cannot be read; download it first"
            )
        return size

    @staticmethod
    def _open_error(path: str, exc: OSError) -> SourceError:
        return SourceError(f"{path!r}: {exc.strerror or exc}; give a file, a pattern in quotes, or a URL")


def _reset_all() -> None:
    for files in list(_LIVE):
        files._reset()


os.register_at_fork(after_in_child=_reset_all)  # another thread may have held a lock when the process forked


class FileOf(io.RawIOBase):
    """A file of `Files` as a seekable stream. A read that keeps failing raises SourceError."""

    def __init__(self, files: Files, number: int) -> None:
        self._files, self._number, self._at = files, number, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, self._files.size(self._number))[whence] + offset
        if start < 0:
            raise ValueError(f"seek to {start}")
        self._at = start
        return start

    def readinto(self, buffer: Any) -> int:
        try:
            data = ask_store(lambda: self._files.read(self._number, self._at, len(buffer)))
        except OSError as exc:
            raise self._files._open_error(self._files.path(self._number), exc) from exc
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()


def _expanded(pattern: str) -> Iterable[str]:
    """Expands `{000..099}` and `{a,b}` like bash. Raises SourceError if there are more than a million names."""
    try:
        names = list(itertools.islice(_each(pattern), _MAX_FILES + 1))
    except (ValueError, RecursionError) as exc:
        raise SourceError(
            f"{pattern[:200]!r}: its {{...}} are too many, or have numbers of more than {_MAX_DIGITS} digits; give "
            "fewer files at a time"
        ) from exc
    if len(names) > _MAX_FILES:
        raise SourceError(f"{pattern[:200]!r} expands to more than {_MAX_FILES} files; give fewer at a time")
    return names


def _each(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, choice = match.groups()
    parts: Iterable[str]
    if choice is not None:
        parts = choice.split(",")
    elif max(len(first), len(last)) > _MAX_DIGITS:
        raise ValueError(f"a number of {max(len(first), len(last))} digits")
    else:
        padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(last) >= int(first) else -1
        parts = (f"{number:0{width}}" for number in range(int(first), int(last) + step, step))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for part in parts:
        yield from _each(head + part + tail)


def read_piece(files: Files, number: int, start: int, size: int) -> bytes:
    """Exactly `size` bytes of an archive from `start` on.

    Raises:
        BadItem: there is no such place, or `size` is larger than any image should be.
        OSError: as `Files.read`; EIO if the archive has shrunk.
    """
    if not 0 <= number < len(files) or start < 0 or size < 0:
        raise BadItem("read", "missing", "its place in the archives does not exist")
    if size > MAX_ENCODED_BYTES:
        raise BadItem("read", "too-large", f"{size} bytes; at most {MAX_ENCODED_BYTES}")
    data = files.read(number, start, size) if size else b""
    if len(data) < size:
        raise OSError(errno.EIO, f"{files.names[number]} ends within it: it has become shorter")
    return data


def place_of(item: Item, numbers: int) -> tuple[int, ...]:
    """The place of an item. Raises BadItem if it does not consist of that many numbers."""
    if len(item.place) != numbers:
        raise BadItem("read", "missing", "its place in the archives is not known")
    return item.place
