"""Remote files on object stores and web servers, through fsspec: reads, retries, and errors as errnos."""

from __future__ import annotations

import contextlib
import errno
import posixpath
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

from ...errors import SourceError, install_command
from ...storage.clients import EXTRAS, client, read_advice
from ...storage.retries import Answer, with_retries
from .. import base
from ..rejects import MAX_ENCODED_BYTES, BadItem
from .read_ahead import SHARE, NoRoomError, Share, reserve

READS_AT_ONCE = 16
BLOCK_BYTES = 8 << 20  # read at a time from a file that is read sequentially
_WEB = ("http", "https")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")  # RFC 9110, section 14.4
_MOST_REDIRECTS = 10
_PASSED_ON = (errno.EIO, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTSUP)  # ours, and s3fs's for client errors
_LATER = (408, 421, 425, 429)  # client error statuses that may pass
# What aiohttp raises for an invalid address, which is the item's fault.
_BAD_ADDRESS = re.compile(r"InvalidU|NonHttpUrl|TooManyRedirects")


def store_of(url: str) -> Any:
    """The fsspec filesystem for a URL. Raises SourceError if its package is not installed, or the protocol unknown."""
    protocol = url.partition("://")[0]
    try:
        return client(protocol)
    except ImportError as exc:
        extra = EXTRAS.get(protocol, "http")
        raise SourceError(f"{url!r} needs {exc.name or 'fsspec'}; run: {install_command(extra)}") from exc
    except ValueError as exc:
        raise SourceError(f"{url!r}: {exc}; give a path, s3://, gs:// or https://") from exc


def fetch(store: Any, url: str, size: int | None = None, *, within: str | None = None) -> bytes:
    """All bytes of a remote file that is one item.

    Args:
        store: from `store_of`.
        url: of the file.
        size: in bytes, if known, which saves a request.
        within: the URL of a folder that must contain the file and the targets of redirects.

    Raises:
        OSError: ENOENT, EACCES, EINVAL if the server refuses this URL in particular, or EIO for anything else,
            including a truncated body.
        BadItem: larger than any image should be, or outside the folder.
    """
    with as_system_errors():
        if is_web(url):
            return from_web(store, url, within=within)[0]
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
    """Up to `size` + 1 bytes, to detect a larger object. Stores refuse a range of an empty object."""
    reserve(size)
    return bytes(store.cat_file(url, start=0, end=size + 1)) if size else b""


def from_web(
    store: Any, url: str, start: int | None = None, size: int = MAX_ENCODED_BYTES, *, within: str | None = None
) -> tuple[bytes, int | None]:
    """`size` bytes of a file on a web server from `start` on, and the file's size if the server reports it.

    If `start` is None, the whole file, of at most `size` bytes. Unlike fsspec's `cat_file`, this checks that the server
    sent what was asked for. Redirects are followed only to http(s) (by aiohttp) and only inside the folder `within`. A
    server without ranges may send a small file whole. Compressed responses, which may expand a thousandfold, are
    refused.
    """
    from fsspec.asyn import sync

    return cast("tuple[bytes, int | None]", sync(store.loop, _from_web, store, url, start, size, within, SHARE.get()))


@contextlib.asynccontextmanager
async def _answer(store: Any, url: str, headers: dict[str, str], within: str | None) -> AsyncIterator[Any]:
    """A web server's response, after redirects. Raises BadItem if they lead out of the folder `within`."""
    session = await store.set_session()
    options = dict(store.kwargs)
    headers = {**options.pop("headers", {}), **headers, "Accept-Encoding": "identity"}
    address = store.encode_url(url)
    if within is None:
        async with session.get(address, headers=headers, **options) as answer:
            yield answer
        return
    options["allow_redirects"] = False
    for _ in range(_MOST_REDIRECTS):
        if not _is_within(address, store.encode_url(within)):
            raise BadItem("read", "unreadable", f"it leads out of SRC, to {address.scheme}://{address.host or ''}")
        async with session.get(address, headers=headers, **options) as answer:
            if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
                yield answer
                return
            address = address.join(type(address)(answer.headers["Location"]))
    raise BadItem("read", "unreadable", f"more than {_MOST_REDIRECTS} redirects")


def _is_within(address: Any, folder: Any) -> bool:
    """Whether a yarl URL is below another one, as a server resolves it; https may replace http."""
    same = address.scheme in ("https", folder.scheme) and address.host == folder.host
    same &= address.port == folder.port or (address.is_default_port() and folder.is_default_port())
    path, top = (posixpath.normpath(each.path.replace("\\", "/")) for each in (address, folder))
    return bool(same and path.startswith(top.rstrip("/") + "/"))


async def _from_web(
    store: Any, url: str, start: int | None, size: int, within: str | None, share: Share | None
) -> tuple[bytes, int | None]:
    headers = {} if start is None else {"Range": f"bytes={start}-{start + size - 1}"}
    async with _answer(store, url, headers, within) as answer:
        _require_success(answer, url)
        if start is None:
            data = await _whole(answer, size, share)
            return data, len(data)
        return await _part(answer, start, size, share)


def _require_success(answer: Any, url: str) -> None:
    """Raises OSError for a status that refuses the request permanently, or for a compressed body."""
    if answer.status in (404, 410):
        raise FileNotFoundError(url)
    if answer.status in (401, 403, 407, 451):
        raise PermissionError(url)
    if 400 <= answer.status < 500 and answer.status not in (*_LATER, 416):
        raise OSError(errno.EINVAL, f"HTTP status {answer.status}")
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise OSError(errno.EINVAL, f"the server compresses it ({encoding[:50]}), against the request")


async def _whole(answer: Any, size: int, share: Share | None) -> bytes:
    """The whole file. Raises BadItem if it has more than `size` bytes, OSError if the server failed."""
    if answer.status != 200:
        raise OSError(errno.EIO, f"HTTP status {answer.status}")
    length = answer.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > size:
        raise BadItem("read", "too-large", f"{length} bytes; at most {size}")
    data = await _body(answer, size, share)
    if len(data) > size:
        raise BadItem("read", "too-large", f"more than {size} bytes")
    return data


async def _part(answer: Any, start: int, size: int, share: Share | None) -> tuple[bytes, int | None]:
    """The requested part of a file, and the file's size if the server reports it. Raises OSError if it sent another."""
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    total = int(found[2]) if found and found[2] != "*" else None
    if answer.status == 416 and total is not None and total <= start:
        return b"", total
    if answer.status == 200:
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BLOCK_BYTES:
            raise OSError(errno.ENOTSUP, "the server does not give parts of a file (no Range); download it first")
        whole = await _body(answer, int(length), share)
        if len(whole) != int(length):
            raise OSError(errno.EIO, f"{len(whole)} bytes came where the server said {length}")
        return whole[start : start + size], len(whole)
    if answer.status != 206 or found is None or found[1] is None or int(found[1]) != start:
        raise OSError(errno.EIO, f"HTTP status {answer.status}, Content-Range {found and found[0]!r}")
    return await _body(answer, size, share), total


async def _body(answer: Any, size: int, share: Share | None) -> bytes:
    """The body of a response, read until it ends or exceeds `size` bytes."""
    data = bytearray()
    reserved = min(size, answer.content_length or 0)
    reserve(reserved, share)
    async for piece in answer.content.iter_chunked(1 << 20):
        data += piece
        if len(data) > reserved:
            reserve(len(piece), share)
            reserved += len(piece)
        if len(data) > size:
            break
    return bytes(data)


def ask_store(action: Callable[[], Answer]) -> Answer:
    """The result of a call to a store, retried while it fails with EIO. Raises OSError as `Files.read`."""

    def explained() -> Answer:
        with as_system_errors():
            return action()

    return with_retries(explained, base.RETRY_DELAYS_S, lambda exc: isinstance(exc, OSError) and exc.errno == errno.EIO)


@contextlib.contextmanager
def as_system_errors() -> Iterator[None]:
    """Raises a store's errors as OSError, with an errno that tells the file's fault from the store's."""
    try:
        yield
    except FileNotFoundError as exc:
        raise OSError(errno.ENOENT, "not there") from exc
    except PermissionError as exc:
        raise OSError(errno.EACCES, "no permission") from exc
    except (BadItem, MemoryError, NoRoomError, SourceError):
        raise
    except Exception as exc:  # aiohttp's and botocore's: an open list, and any of them may be temporary
        if isinstance(exc, OSError) and exc.errno in _PASSED_ON and exc.strerror:
            raise
        text = f"{type(exc).__name__}: {exc}".rstrip(": ")
        number = errno.EINVAL if _BAD_ADDRESS.match(type(exc).__name__) else errno.EIO
        raise OSError(number, text[:200]) from exc


@contextlib.contextmanager
def as_source_errors(url: str) -> Iterator[None]:
    """Raises a store's errors as a SourceError that says what to do."""
    try:
        with as_system_errors():
            yield
    except OSError as exc:
        raise SourceError(f"{url!r}: {exc.strerror}; {read_advice(exc)}") from exc


def is_web(url: str) -> bool:
    """Whether a URL is one of a web server."""
    return url.partition("://")[0] in _WEB


def without_query(location: str) -> str:
    """A web URL without its query; anything else unchanged."""
    return location.partition("?")[0] if is_web(location) else location
