"""Files that hold many items each, on a disk or behind fsspec: found by a pattern, read at any offset.

Nothing is opened before it is read, and few files stay open, so that thousands of them are no trouble.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import re
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import SourceError
from ..storage import is_remote, open_regular

READS_AT_ONCE = 16  # of a store far away
_OPEN_FILES = 64
_BLOCK_BYTES = 8 << 20  # read ahead where a remote file is read from its beginning to its end
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_GLOB = re.compile(r"[*?\[]")


class Files:
    """Some files, by number. May be shared by threads and pickled; each process opens them anew.

    Args:
        location: a file, a pattern (`a-{000..099}.tar`, `{train,val}.tar`, `*.tar`), or a URL of these.
        inside: a pattern of the names to take if `location` is a folder.

    Attributes:
        names: of each file, relative to the folder that holds them all; sorted by it where a pattern found them.
        stamps: name and size of each file, as `Source.files` wants them.

    Raises:
        SourceError: there is no such file.
    """

    def __init__(self, location: str, inside: str = "*") -> None:
        self.location = location if is_remote(location) else os.path.abspath(location.removeprefix("file://"))
        self._remote = is_remote(location)
        self._fs: Any = None
        self._paths = self._found(inside)
        if not self._paths:
            raise SourceError(f"{location!r}: there is no such file; give a file, a pattern in quotes, or a URL")
        common = os.path.commonpath([os.path.dirname(path) for path in self._paths]) if self._paths else ""
        self.names = [path[len(common) :].lstrip("/") for path in self._paths]
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        sizes = [self.size(number) for number in range(len(self._paths))]
        self.stamps = tuple(zip(self.names, sizes, strict=True))

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None, "_fs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def reads_at_once(self) -> int:
        """See `Source.reads_at_once`."""
        return READS_AT_ONCE if self._remote else 1

    def path(self, number: int) -> str:
        """The path or the URL of a file, for messages."""
        return self._paths[number]

    def size(self, number: int) -> int:
        """The size of a file in bytes."""
        try:
            if self._remote:
                with as_system_errors():
                    size = self._store.info(self._paths[number]).get("size")
                if size is None:
                    raise SourceError(
                        f"{self._paths[number]!r}: the server does not tell its size, so that nothing in it can be "
                        "read alone; download it first"
                    )
                return int(size)
            return os.stat(self._paths[number]).st_size
        except OSError as exc:
            raise self._gone(number, exc) from exc

    def read(self, number: int, start: int, size: int) -> bytes:
        """Up to `size` bytes of a file from `start` on, fewer at its end.

        Raises:
            OSError: with an errno, as the system says; of a remote store ENOENT, EACCES, or EIO for all else.
        """
        if self._remote:
            with as_system_errors():
                return bytes(self._store.cat_file(self._paths[number], start=start, end=start + size))
        with self._lock:  # held while reading: the descriptor must not be another file's by then
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
        """A file, to be read from its beginning on, or here and there. Raises SourceError if it cannot be opened."""
        try:
            if self._remote:
                with as_system_errors():
                    file = self._store.open(self._paths[number], "rb", block_size=_BLOCK_BYTES)
            else:
                file = open(self._paths[number], "rb", opener=open_regular)  # noqa: SIM115  # closed below
        except OSError as exc:
            raise self._gone(number, exc) from exc
        with file:
            yield file

    def check(self) -> None:
        """Raises SourceError if a file is gone."""
        if not self._remote:
            for path in self._paths:
                if not os.path.exists(path):
                    raise SourceError(f"{path!r} is gone; bring it back, then run the same command to resume")

    @property
    def _store(self) -> Any:
        if self._fs is None:
            self._fs = store_of(self.location)
        return self._fs

    def _found(self, inside: str) -> list[str]:
        if not self._remote:
            if os.path.isdir(self.location):
                return sorted(glob.glob(os.path.join(glob.escape(self.location), inside)))
            if os.path.exists(self.location):  # whatever its name looks like
                return [self.location]
            expanded = _expanded(self.location)
            return list(
                itertools.chain(*(sorted(glob.glob(each)) if _GLOB.search(each) else [each] for each in expanded))
            )
        found: list[str] = []
        for each in _expanded(self.location):
            with _as_source_errors(each):
                found += sorted(self._store.glob(each)) if _GLOB.search(each.partition("?")[0]) else [each]
        return found

    def _gone(self, number: int, exc: OSError) -> SourceError:
        reason = exc.strerror or exc
        return SourceError(f"{self._paths[number]!r}: {reason}; give a file, a pattern in quotes, or a URL")


def store_of(url: str) -> Any:
    """The filesystem of fsspec for a URL. Raises SourceError if what it needs is not installed."""
    try:
        import fsspec

        protocol = url.partition("://")[0]
        return fsspec.filesystem(protocol)
    except ImportError as exc:
        extra = {"s3": "'gpu-npz[s3]'", "gs": "'gpu-npz[gs]'"}.get(url.partition("://")[0], "'fsspec[http]'")
        raise SourceError(f"{url!r} needs {exc.name or 'fsspec'}; run: pip install {extra}") from exc
    except ValueError as exc:
        raise SourceError(f"{url!r}: {exc}; give a path, s3://, gs:// or https://") from exc


@contextlib.contextmanager
def as_system_errors() -> Iterator[None]:
    """Gives what a store raises the errno that tells a file's own trouble from the store's."""
    try:
        yield
    except FileNotFoundError as exc:
        raise OSError(errno.ENOENT, "not there") from exc
    except PermissionError as exc:
        raise OSError(errno.EACCES, "no permission") from exc
    except MemoryError:
        raise
    except Exception as exc:  # aiohttp's, botocore's: no closed list, and all of them may go away
        raise OSError(errno.EIO, f"{type(exc).__name__}: {exc}"[:200]) from exc


@contextlib.contextmanager
def _as_source_errors(url: str) -> Iterator[None]:
    try:
        with as_system_errors():
            yield
    except OSError as exc:
        raise SourceError(f"{url!r}: {exc.strerror}; check the URL, credentials and network") from exc


def _expanded(pattern: str) -> list[str]:
    """The names that `{000..099}` and `{a,b}` stand for, as bash has them."""
    if match := _RANGE.search(pattern):
        first, last = match.groups()
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(last) >= int(first) else -1
        parts = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    elif match := _CHOICE.search(pattern):
        parts = match[1].split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [each for part in parts for each in _expanded(head + part + tail)]
