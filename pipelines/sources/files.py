"""Files that hold many items each, on a disk or behind fsspec: found by a pattern, read at any offset.

Nothing is opened before it is read, and few files stay open, so that thousands of them are no trouble.
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
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

from ..errors import SourceError
from ..rejects import MAX_ENCODED_BYTES, BadItem
from ..storage import is_remote, open_regular
from . import base

READS_AT_ONCE = 16  # of a store far away
_OPEN_FILES = 64
_BLOCK_BYTES = 8 << 20  # read ahead where a remote file is read from its beginning to its end
_MAX_FILES = 1_000_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_GLOB = re.compile(r"[*?\[]")
_WEB = ("http", "https")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")  # RFC 9110, section 14.4
_ANONYMOUS = re.compile(r"Credential|TokenRetrieval|SSOToken|RefreshError|ProfileNotFound")
_LIVE: weakref.WeakSet[Files] = weakref.WeakSet()
Answer = TypeVar("Answer")


class Files:
    """Some files, by number. May be shared by threads and pickled; each process opens them anew.

    Args:
        location: a file, a pattern (`a-{000..099}.tar`, `{train,val}.tar`, `*.tar`), or a URL of these.
        inside: a pattern of the names to take if `location` is a folder.

    Attributes:
        names: of each file, relative to the folder that holds them all; sorted by it where a pattern found them.
        stamps: name and size of each file, as `Source.files` wants them.

    Raises:
        SourceError: there is no such file, or no way to read parts of it.
    """

    def __init__(self, location: str, inside: str = "*") -> None:
        self.location = location if is_remote(location) else os.path.abspath(location.removeprefix("file://"))
        self._remote = is_remote(location)
        self._start_anew()
        found = self._found(inside)
        if not found:
            raise SourceError(f"{location!r}: there is no such file; give a file, a pattern in quotes, or a URL")
        self._paths = list(found)
        named = [path.partition("?")[0] if is_web(path) else path for path in self._paths]
        start = os.path.commonprefix(named).rfind("/") + 1  # noqa: RUF071  # commonpath makes one slash of "://"
        self.names = [name[start:] for name in named]
        self.stamps = tuple(zip(self.names, found.values(), strict=True))

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock", "_fs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    def _start_anew(self) -> None:
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
        """`size` bytes of a file from `start` on; fewer only where the file, as it was when it was found, ends.

        Raises:
            OSError: with an errno, as the system says; of a remote store ENOENT, EACCES, ENOTSUP from a web server that
                gives no parts of files, or EIO for all else. EIO, too, where the file has become shorter.
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
                data, total = _from_web(self._store, path, start, size)
                if total not in (None, self.stamps[number][1]):
                    raise OSError(errno.EIO, f"its size is now {total} bytes; the file has changed")
                return data
            return bytes(self._store.cat_file(path, start=start, end=start + size))

    def _read_local(self, number: int, start: int, size: int) -> bytes:
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
        """A file, to be read from its beginning on, or here and there.

        Raises:
            SourceError: it cannot be opened; of a remote file also where a read in the body fails for good.
        """
        try:
            if self._remote:
                file = cast(BinaryIO, io.BufferedReader(_Opened(self, number), _BLOCK_BYTES))
            else:
                file = open(self._paths[number], "rb", opener=open_regular)  # noqa: SIM115  # closed below
        except OSError as exc:
            raise self._gone(self._paths[number], exc) from exc
        with file:
            yield file

    def check(self) -> None:
        """Raises SourceError if a file is gone or may not be read any more."""
        for number, path in enumerate(self._paths):
            try:
                if self._remote:
                    patiently(partial(self.read, number, 0, 1))
                else:
                    os.close(open_regular(path, os.O_RDONLY))
            except OSError as exc:
                if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise SourceError(f"{path!r} is gone; bring it back, then run the same command to resume") from exc
                if exc.errno in (errno.EACCES, errno.EPERM):
                    raise SourceError(
                        f"{path!r}: {exc.strerror}; make it readable, then run the same command to resume"
                    ) from exc
                raise

    @property
    def _store(self) -> Any:
        if self._fs is None:
            self._fs = store_of(self.location)
        return self._fs

    def _found(self, inside: str) -> dict[str, int]:
        """The paths of all files, each with its size."""
        if not self._remote:
            if os.path.isdir(self.location):
                paths = sorted(glob.glob(os.path.join(glob.escape(self.location), inside)))
            elif os.path.lexists(self.location):  # whatever its name looks like
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
        """The URLs of files, each with its size; None where a web server has yet to be asked."""
        with as_source_errors(url):
            if _GLOB.search(url.partition("?")[0] if is_web(url) else url):
                return self._matching(url)
            if is_web(url):
                return {url: None}
            info = patiently(lambda: self._store.info(url))
            if info["type"] == "directory":
                return self._matching(f"{url.rstrip('/')}/{inside}")
            return {url: int(info["size"])}

    def _matching(self, pattern: str) -> dict[str, int | None]:
        matches: dict[str, dict[str, Any]] = patiently(lambda: self._store.glob(pattern, detail=True))
        return {
            self._store.unstrip_protocol(path): None if is_web(pattern) else int(info["size"])
            for path, info in sorted(matches.items())
            if info["type"] == "file"
        }

    def _local_size(self, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as exc:
            raise self._gone(path, exc) from exc

    def _web_size(self, url: str) -> int:
        try:
            size = patiently(lambda: _from_web(self._store, url, 0, 1)[1])
        except OSError as exc:
            raise self._gone(url, exc) from exc
        if size is None:
            raise SourceError(
                f"{url!r}: the server does not tell its size, so that no part of it can be read alone; download it "
                "first"
            )
        return size

    @staticmethod
    def _gone(path: str, exc: OSError) -> SourceError:
        return SourceError(f"{path!r}: {exc.strerror or exc}; give a file, a pattern in quotes, or a URL")


def _start_all_anew() -> None:
    for files in list(_LIVE):
        files._start_anew()


os.register_at_fork(after_in_child=_start_all_anew)  # a thread that the child does not have may hold a lock for ever


class _Opened(io.RawIOBase):
    """A remote file of `Files` as one to read and seek in."""

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
            data = patiently(lambda: self._files.read(self._number, self._at, len(buffer)))
        except OSError as exc:
            raise self._files._gone(self._files.path(self._number), exc) from exc
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def store_of(url: str) -> Any:
    """The filesystem of fsspec for a URL. Raises SourceError if what it needs is not installed."""
    protocol = url.partition("://")[0]
    try:
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}  # it would hold every name of a collection
        if protocol in ("s3", "s3a"):  # we try again by ourselves: see `base.read_item`
            given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **given}
        store = fsspec.filesystem(protocol, **options)
        if "config_kwargs" in options:
            store.retries = 1
        return store
    except ImportError as exc:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(protocol, "http")
        raise SourceError(f"{url!r} needs {exc.name or 'fsspec'}; run: pip install 'gpu-npz[{extra}]'") from exc
    except ValueError as exc:
        raise SourceError(f"{url!r}: {exc}; give a path, s3://, gs:// or https://") from exc


def fetch(store: Any, url: str, size: int | None = None) -> bytes:
    """All bytes of a remote file that is one item.

    Args:
        store: as `store_of` gives it.
        url: the file's.
        size: in bytes, if that is known; saves a request.

    Raises:
        OSError: ENOENT, EACCES, or EIO for all else, a body that was cut off among it.
        BadItem: larger than any image should be.
    """
    with as_system_errors():
        if is_web(url):
            return _from_web(store, url)[0]
        if size and size <= MAX_ENCODED_BYTES:
            data = _some(store, url, size)
            if len(data) == size:
                return data
        size = int(store.info(url)["size"])  # it may have been replaced since it was listed
        if size > MAX_ENCODED_BYTES:
            raise BadItem("read", "too-large", f"{size} bytes; at most {MAX_ENCODED_BYTES}")
        data = _some(store, url, size)
        if len(data) != size:
            raise OSError(errno.EIO, f"{len(data)} of {size} bytes came")
        return data


def _some(store: Any, url: str, size: int) -> bytes:
    """A byte more than `size`, if there is one. Of an empty object, a store gives no range."""
    return bytes(store.cat_file(url, start=0, end=size + 1)) if size else b""


def _from_web(
    store: Any, url: str, start: int | None = None, size: int = MAX_ENCODED_BYTES
) -> tuple[bytes, int | None]:
    """`size` bytes of a file on a web server from `start` on, or all, and the file's size if the server tells it.

    fsspec's own `cat_file` takes what a server sends for what was asked. Redirects lead to http(s) alone, by aiohttp.
    A server that knows no ranges may send a small file whole, of which the part is taken.
    """
    from fsspec.asyn import sync

    return cast("tuple[bytes, int | None]", sync(store.loop, _asked_web, store, url, start, size))


async def _asked_web(store: Any, url: str, start: int | None, size: int) -> tuple[bytes, int | None]:
    session = await store.set_session()
    options = dict(store.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start is not None:
        headers["Range"] = f"bytes={start}-{start + size - 1}"
    async with session.get(store.encode_url(url), headers=headers, **options) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if answer.status in (401, 403, 407, 451):
            raise PermissionError(url)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        total = int(found[2]) if found and found[2] != "*" else None
        length = answer.headers.get("Content-Length", "")
        if start is None:
            if answer.status != 200:
                raise OSError(errno.EIO, f"HTTP status {answer.status}")
            if length.isdecimal() and int(length) > size:
                raise BadItem("read", "too-large", f"{length} bytes; at most {size}")
        elif answer.status == 416 and total is not None and total <= start:
            return b"", total
        elif answer.status == 200:
            if not length.isdecimal() or int(length) > _BLOCK_BYTES:
                raise OSError(errno.ENOTSUP, "the server does not give parts of a file (no Range); download it first")
            whole = await _body(answer, int(length))
            if len(whole) != int(length):
                raise OSError(errno.EIO, f"{len(whole)} bytes came where the server said {length}")
            return whole[start : start + size], len(whole)
        elif answer.status != 206 or found is None or found[1] is None or int(found[1]) != start:
            raise OSError(errno.EIO, f"HTTP status {answer.status}, Content-Range {found and found[0]!r}")
        data = await _body(answer, size)
        if start is None and len(data) > size:
            raise BadItem("read", "too-large", f"more than {size} bytes")
        return data, total


async def _body(answer: Any, size: int) -> bytes:
    """The body of an answer, which the server cut off if that says so; a little more than `size` bytes at most."""
    data = bytearray()
    async for piece in answer.content.iter_chunked(1 << 20):
        data += piece
        if len(data) > size:
            break
    return bytes(data)


def patiently(action: Callable[[], Answer]) -> Answer:
    """What an action gives, tried again where a store fails for a moment. Raises OSError as `Files.read`."""
    for delay_s in (*base.RETRY_DELAYS_S, None):
        try:
            with as_system_errors():
                return action()
        except OSError as exc:
            if exc.errno != errno.EIO or delay_s is None:
                raise
            time.sleep(delay_s)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def as_system_errors() -> Iterator[None]:
    """Gives what a store raises the errno that tells a file's own trouble from the store's."""
    try:
        yield
    except FileNotFoundError as exc:
        raise OSError(errno.ENOENT, "not there") from exc
    except PermissionError as exc:
        raise OSError(errno.EACCES, "no permission") from exc
    except (BadItem, MemoryError, SourceError):
        raise
    except Exception as exc:  # aiohttp's, botocore's: no closed list, and all of them may go away
        if isinstance(exc, OSError) and exc.errno in (errno.EIO, errno.ENOTSUP) and exc.strerror:
            raise
        text = f"{type(exc).__name__}: {exc}".rstrip(": ")
        raise OSError(errno.EIO, text[:200]) from exc


@contextlib.contextmanager
def as_source_errors(url: str) -> Iterator[None]:
    """Raises what goes wrong with a store in its body as a SourceError that says what to do."""
    try:
        with as_system_errors():
            yield
    except OSError as exc:
        raise SourceError(f"{url!r}: {exc.strerror}; {_advice(exc)}") from exc


def _advice(exc: OSError) -> str:
    causes: list[BaseException] = [exc]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    if any(_ANONYMOUS.search(type(each).__name__) for each in causes):
        return (
            "log in (for S3: `aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
            "FSSPEC_S3_ANON=true for a public bucket)"
        )
    if exc.errno == errno.EACCES:
        return "ask for the right to list and to get what is there, or log in as another user"
    if exc.errno == errno.ENOENT:
        return "see to the names of bucket and folder in SRC"
    return "see to the network and the endpoint (for S3: FSSPEC_S3_ENDPOINT_URL), then run the command again"


def is_web(url: str) -> bool:
    return url.partition("://")[0] in _WEB


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()


def _expanded(pattern: str) -> Iterable[str]:
    """The names that `{000..099}` and `{a,b}` stand for, as bash has them. Raises SourceError for a million."""
    names = list(itertools.islice(_each(pattern), _MAX_FILES + 1))
    if len(names) > _MAX_FILES:
        raise SourceError(f"{pattern!r} stands for more than {_MAX_FILES} files; give fewer at a time")
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
    else:
        padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(last) >= int(first) else -1
        parts = (f"{number:0{width}}" for number in range(int(first), int(last) + step, step))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for part in parts:
        yield from _each(head + part + tail)
