"""OUT on an object store, through fsspec: S3 and compatible stores (s3://), Google Cloud Storage (gs://).

An object appears atomically: by one put, or by the last request of a multipart upload. So there are no temporary
objects and nothing to rename. A shard is written to a local temporary folder (TMPDIR), uploaded, and compared with the
object: by size, and by the MD5 that the store computed, or, if it reports no comparable MD5 (as for an encrypted
bucket), by reading the object back. The commit record follows, as everywhere.

Under a lock, no put replaces an object: each creates one only if the name is free (If-None-Match, also at the end of a
multipart upload). An object in the way is deleted before, if the lock is held and the object has not changed since it
was checked (If-Match). Objects carry the token of the lock under which they were made, so that a process that finds its
lock lost can remove its own. Some servers ignore these conditions; then the checks of the lock before and after each
put are the only protection.

Other fsspec filesystems (sftp, hdfs) expose a file under its final name while it is being written, and are refused.
`memory://` exists in one process: for tests, and for builds with `--workers 0`.

Clients are configured as usual: by the environment, ~/.aws, and fsspec's files and variables (FSSPEC_S3_ENDPOINT_URL).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import LockedError, StorageError, install_command
from .base import LOCK
from .clients import (
    EXTRAS,
    PACKAGES,
    client,
    code,
    dataset_advice,
    decoded,
    digests,
    is_transient,
    renewed,
    write_advice,
)
from .holders import PRIVATE, Fence, fenced, require_held
from .object_lock import Lease, is_live, leftovers
from .retries import Answer, with_retries
from .scratch import remove_scratch, scratch_folder

log = logging.getLogger(__name__)
ATTEMPTS = 6
RETRY_S = 0.5  # then twice as long each time
PART_BYTES = 16 << 20  # of a multipart upload; a smaller object than two parts is uploaded in one put
_PARTS = 4  # uploaded concurrently, for each shard
_MAX_PARTS = 10_000
_KEPT_BYTES = 1 << 20  # up to this size, a deleted object is kept until the lock has been checked again
_MARK = "gpu-npz-lock"  # user metadata on S3: the token under which an object was made
_CHANGED = ("PreconditionFailed", "412")
_BEHIND_THE_END = ("InvalidRange", "416")
_REOPEN = "it has changed since the dataset was opened; open the dataset again"
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")  # RFC 9110, section 14.4
_UPLOADS = re.compile(r"(shard-\d{5,}|index|plan)\.npz")  # files that may be large


class Part(NamedTuple):
    """Some bytes of a file.

    Attributes:
        data: the bytes.
        tag: the ETag of the file; "" if the store is not S3.
        size: the size of the file in bytes; None if the store does not say.
    """

    data: bytes
    tag: str = ""
    size: int | None = None


class ObjectStorage:
    """OUT as a prefix of a bucket. Names are relative to it, POSIX; see `storage.base.Storage` for each method.

    Args:
        root: `s3://bucket/path`.
        under, only_read: as for `storage.open_storage`.

    Raises:
        StorageError: the store is not supported, or its client is not installed.
    """

    _count = itertools.count()

    def __init__(self, root: str, under: Fence | None = None, *, only_read: bool = False) -> None:
        self.root = root.rstrip("/")
        protocol, _, place = self.root.partition("://")
        if protocol not in PACKAGES:
            raise StorageError(
                f"OUT {root!r}: {protocol}:// cannot hold a dataset; give a folder, s3://bucket/path or gs://bucket/path"
            )
        if not place.split("/")[0]:
            raise StorageError(f"OUT {root!r} names no bucket; give {protocol}://bucket/path")
        try:
            self._client, self._process = client(protocol), os.getpid()
        except ImportError as exc:
            raise StorageError(
                f"OUT {root!r} needs {PACKAGES[protocol]}, which cannot be imported ({exc}); "
                f"run: {install_command(EXTRAS.get(protocol, 's3'))}"
            ) from exc
        self._key = self._files._strip_protocol(self.root).rstrip("/")
        self._s3 = PACKAGES[protocol] == "s3fs"
        self._advice = dataset_advice if only_read else write_advice
        self._fences = [under] if under else []
        self._scratch = ""
        self._conditional: bool | None = None

    @property
    def _files(self) -> Any:
        if self._process != os.getpid():
            self._client = renewed(self._client, self.root.partition("://")[0])
            self._process = os.getpid()
        return self._client

    @property
    def fence(self) -> Fence | None:
        """The lock taken last, for workers that work under it; None without a lock."""
        return self._fences[-1] if self._fences else None

    def path(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.root}/{name}" if name else self.root

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            info = self._ask(name, lambda: self._files.info(self._at(name)))
            return int(info["size"]) if info["type"] == "file" else None
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._ask(name, lambda: self._files.cat_file(self._at(name))))
        return None

    def fetch(self, name: str, start: int, stop: int, tag: str = "") -> Part:
        """Some bytes of a file, by one request.

        Args:
            name: of the file.
            start: the offset of the first byte.
            stop: the offset behind the last byte, more than `start`. If the file ends before, fewer bytes are returned.
            tag: the ETag that the file had in an earlier request; "" accepts any.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the file was replaced since then; or as for every method.
        """
        if not self._s3:
            return Part(bytes(self._ask(name, lambda: self._files.cat_file(self._at(name), start=start, end=stop))))

        def get() -> Part:
            from fsspec.asyn import sync

            files = self._files
            bucket, key, _ = files.split_path(self._at(name))
            condition = {"IfMatch": tag} if tag else {}
            wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", **condition}
            try:
                data, part, found = sync(files.loop, _get, files, wanted)
            except OSError as exc:
                if code(exc) in _BEHIND_THE_END:
                    return Part(b"")
                if code(exc) in _CHANGED:
                    raise self._error(name, exc, _REOPEN) from exc
                raise
            if tag and found != tag:  # some servers ignore the condition
                raise StorageError(f"{self.path(name)!r}: another object has replaced it; {_REOPEN}")
            span = _CONTENT_RANGE.fullmatch(part)
            if span is None or int(span[1]) != start or int(span[2]) >= stop:
                raise StorageError(
                    f"{self.path(name)!r}: the server sends {part or 'the whole object'}, and not bytes "
                    f"{start}-{stop - 1} of it; copy the dataset to a disk, and open it there"
                )
            if len(data) != int(span[2]) + 1 - start:
                raise OSError(errno.EPIPE, f"{len(data)} bytes came of {part}")
            return Part(data, found, int(span[3]) if span[3].isdecimal() else None)

        return self._ask(name, get)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[str]:
        """The path of a local copy of a file, valid in the body. Raises FileNotFoundError if it does not exist."""
        copy = self.temporary(name)
        try:
            self._ask(name, lambda: self._files.get_file(self._at(name), copy))
            yield copy
        except FileNotFoundError as exc:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name)) from exc
        finally:
            self.discard(copy)

    def names(self, folder: str = "") -> list[str]:
        """The names of files and folders in a folder, sorted; empty if the folder does not exist."""
        start = f"{self._at(folder)}/"
        with contextlib.suppress(FileNotFoundError):
            found = self._ask(folder, lambda: self._files.ls(self._at(folder), detail=False))
            below = {name.rstrip("/").removeprefix(start) for name in found if name.startswith(start)}
            return sorted(below - {""})
        return []

    def is_folder(self, name: str) -> bool:
        """Whether there are files in such a folder."""
        return bool(self.names(name))

    def temporary(self, name: str) -> str:
        """The path of a new local file in which to write the content of `name`."""
        with self.explained(name):
            if not self._scratch:
                self._scratch = scratch_folder(self)
        return os.path.join(self._scratch, f"{os.path.basename(name)}.{next(self._count)}")

    def publish(self, temporary: str, name: str) -> None:
        """Uploads a file, verifies the object, and removes the local file."""
        size = os.path.getsize(temporary)
        part = max(PART_BYTES, -(-size // _MAX_PARTS))
        known = digests(temporary, part)
        options = {"chunksize": part, "max_concurrency": _PARTS} if self._s3 else {}

        def put(**more: Any) -> None:
            self._files.put_file(temporary, self._at(name), **options, **more)

        self._put(name, put, lambda: self._arrived(name, temporary, size, known), check=True)
        self.discard(temporary)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in one put."""

        def put(**more: Any) -> None:
            self._files.pipe_file(self._at(name), content, **more)

        self._put(name, put, lambda: bool(self._files.cat_file(self._at(name)) == content), check=False)

    def _put(self, name: str, put: Callable[..., None], is_whole: Callable[[], bool], *, check: bool) -> None:
        """Creates an object, and replaces an existing one if the locks are held.

        Args:
            name: of the file.
            put: uploads the object; takes further options of the client.
            is_whole: whether the object now has the right content.
            check: whether to call `is_whole` after the upload.
        """

        def attempt() -> None:
            if not self._fences:
                put()
            else:
                for _ in range(ATTEMPTS):
                    if self._is_made(name, lambda: put(mode="create", **self._mark()), put):
                        break
                    if self._is_ours(name) and is_whole():
                        return  # the response to an earlier attempt was lost
                    self._displace(name)
                else:
                    raise OSError(errno.EBUSY, "another object keeps replacing it")
            if check and not is_whole():
                self._displace(name)
                raise OSError(errno.EPIPE, "the stored object differs from the data that was sent")

        self.require_held()
        self._written(name, attempt)
        try:
            self.require_held()
        except LockedError:
            self._ask(name, lambda: self._clear(name, lambda: self._is_ours(name)))
            raise

    def discard(self, temporary: str) -> None:
        """Removes a temporary file if it exists."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def remove(self, name: str) -> None:
        """Removes a file if it exists. A folder disappears with its last file."""
        if self._fences:
            self._ask(name, lambda: self._displace(name))
            self.require_held()
        else:
            self.delete(name)

    def remove_temporaries(self, folder: str) -> None:
        """Removes what killed builds left: temporary folders on this machine, parts of locks, unfinished uploads.

        Only for the holder of a lock, while nothing else works under it.
        """
        if folder == "":
            remove_scratch()
        elif folder == PRIVATE:
            for name in leftovers(self, folder, self.names(folder)):
                self.delete(f"{folder}/{name}")
        if not {*self.live_locks()} - {fence.lock for fence in self._fences}:
            self._abort_uploads(f"{self._at(folder)}/")

    def remove_leftovers(self, name: str) -> None:
        """Removes the unfinished parts of a file that a dead worker under our lock left."""
        remove_scratch()
        self._abort_uploads(self._at(name))

    def _abort_uploads(self, prefix: str) -> None:
        """Aborts multipart uploads with this prefix, not in subfolders, if permissions allow to list them."""
        if not self._s3:
            return
        bucket, key, _ = self._files.split_path(prefix)
        with contextlib.suppress(OSError):
            found = self._files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, Delimiter="/")
            self.require_held()  # so none of the listed ones belongs to a build that takes over later
            for upload in found.get("Uploads", []):
                folder, _, name = upload["Key"].rpartition("/")
                if folder == key.rpartition("/")[0] and _UPLOADS.fullmatch(name):  # some servers ignore the delimiter
                    which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._files.call_s3("abort_multipart_upload", Bucket=bucket, **which)

    @contextlib.contextmanager
    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> Iterator[None]:
        """Holds a lock on OUT for one build, or for a part of one; `object_lock.py` has the rules."""
        with Lease(self, f"{PRIVATE}/{name}", wait_s) as token, fenced(self, self._fences, Fence(name, token)):
            yield

    def live_locks(self) -> list[str]:
        """The names of the locks that are held."""
        found = (name for name in self.names(PRIVATE) if name == LOCK or name.startswith(f"{LOCK}-"))
        return [name for name in found if is_live(self.read(f"{PRIVATE}/{name}"))]

    def require_held(self) -> None:
        """Raises LockedError if a lock under which this object works is lost."""
        require_held(self, self._fences)

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Raises an OSError from its body, about the temporary folder, as a StorageError that says what to do."""
        try:
            yield
        except OSError as exc:
            raise StorageError(
                f"{self.path(name)!r} is made in {self._scratch or tempfile.gettempdir()!r}: {exc.strerror or exc}; "
                "free some space there or set TMPDIR to a folder with room for the open shards, then run the same "
                "command to resume"
            ) from exc

    def put(self, name: str, content: bytes) -> None:
        """Writes a small file in one put, without checking the locks."""
        self._written(name, lambda: self._files.pipe_file(self._at(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a small file in one put if it does not exist, and says whether it did."""
        return self.size(name) is None and self._created(name, content)

    def creates_once(self, name: str) -> bool:
        """Whether the server respects If-None-Match, tried on an existing file that nobody else writes."""
        if self._conditional is None:
            self._conditional = not self._created(name, self.read(name) or b"")
        return self._conditional

    def _created(self, name: str, content: bytes) -> bool:
        def put(**more: Any) -> None:
            self._files.pipe_file(self._at(name), content, **more)

        return self._written(name, lambda: self._is_made(name, lambda: put(mode="create"), put))

    def _is_made(self, name: str, create: Callable[[], None], put: Callable[[], None]) -> bool:
        """Creates an object if the name is free, and says whether it did."""
        try:
            create()
        except FileExistsError:
            return False
        except OSError as exc:
            if exc.errno == errno.ENOSYS:  # the server does not support If-None-Match
                put()
                return True
            # Servers report a failed condition, or a race for the name, in several ways.
            if isinstance(exc, (FileNotFoundError, PermissionError)) or not self._files.exists(self._at(name)):
                raise
            return False
        return True

    def _mark(self) -> dict[str, Any]:
        """The options that mark an upload as made under our lock."""
        return {"Metadata": {_MARK: self.fence.token}} if self._s3 and self.fence else {}

    def _is_ours(self, name: str) -> bool:
        """Whether an object was made under our lock, as far as the store can tell."""
        if not self._s3 or not self.fence:
            return False
        bucket, key, _ = self._files.split_path(self._at(name))
        with contextlib.suppress(FileNotFoundError):
            head = self._files.call_s3("head_object", Bucket=bucket, Key=key)
            return bool(head.get("Metadata", {}).get(_MARK) == self.fence.token)
        return False

    def _displace(self, name: str) -> None:
        """Deletes an object, if the locks are held.

        If they are lost in the meantime, If-Match does not tell the object that was checked from an equal one of the
        other build (rejects.jsonl names no dataset). Then the object is created again, unless it is too large to keep.
        """
        with contextlib.suppress(FileNotFoundError):
            small = self._files.info(self._at(name))["size"] < _KEPT_BYTES
            kept = self._files.cat_file(self._at(name)) if small else None
            if self._clear(name, self.require_held):
                try:
                    self.require_held()
                except LockedError:
                    if kept is not None:
                        self._created(name, kept)
                    raise

    def _clear(self, name: str, look: Callable[[], bool | None]) -> bool:
        """Deletes an object as it is now, unless `look` returns False or raises. A later object stays.

        Returns:
            Whether it was deleted.
        """
        with contextlib.suppress(FileNotFoundError):
            tag = self._files.info(self._at(name)).get("ETag")
            if look() is False:
                return False
            try:
                if self._s3 and tag:
                    bucket, key, _ = self._files.split_path(self._at(name))
                    self._files.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=tag)
                    return True
            except OSError as exc:
                if exc.errno == errno.EINVAL:  # another object has replaced it
                    return False
                if exc.errno != errno.ENOSYS:
                    raise
            self._files.rm_file(self._at(name))
            return True
        return False

    def delete(self, name: str, content: bytes | None = None) -> None:
        """Removes a file if it exists and, if given, has this content, without checking the locks."""
        if content is None:
            with contextlib.suppress(FileNotFoundError):
                self._ask(name, lambda: self._files.rm_file(self._at(name)))
        else:
            self._ask(name, lambda: self._clear(name, lambda: bool(self._files.cat_file(self._at(name)) == content)))

    def _at(self, name: str) -> str:
        return f"{self._key}/{name}" if name else self._key

    def _arrived(self, name: str, temporary: str, size: int, known: set[str]) -> bool:
        info = self._files.info(self._at(name))
        if info["size"] != size:
            return False
        if {str(info.get("ETag", "")).strip('"'), decoded(info.get("md5Hash"))} & known:
            return True
        # No checksum, or another kind: with SSE-KMS, an ETag is not an MD5.
        with open(temporary, "rb") as file:
            for start in range(0, size, PART_BYTES):
                stop = min(size, start + PART_BYTES)
                if self._files.cat_file(self._at(name), start=start, end=stop) != file.read(PART_BYTES):
                    return False
        return True

    def _written(self, name: str, action: Callable[[], Answer]) -> Answer:
        try:
            return self._ask(name, action)
        except FileNotFoundError as exc:
            raise self._error(name, exc, "the bucket does not exist; create it, or choose another OUT") from exc

    def _ask(self, name: str, action: Callable[[], Answer]) -> Answer:
        """The result of a request, with retries. FileNotFoundError counts as a result."""
        attempts = itertools.count(2)

        def may_pass(exc: Exception) -> bool:
            transient = is_transient(exc)
            if transient:
                log.info("%s: %s; attempt %d of %d", self.path(name), exc, next(attempts), ATTEMPTS)
            return transient

        delays_s = (RETRY_S * 2**number * random.uniform(0.5, 1.5) for number in range(ATTEMPTS - 1))
        try:
            return with_retries(action, delays_s, may_pass)
        except StorageError:  # from a check of the lock
            raise
        except Exception as exc:  # the error classes belong to clients, which may not be installed
            if isinstance(exc, FileNotFoundError) and code(exc) != "NoSuchBucket":
                raise
            raise self._error(name, exc, self._advice(exc)) from exc

    def _error(self, name: str, exc: Exception, advice: str) -> StorageError:
        text = " ".join(str(exc).split()) or type(exc).__name__
        return StorageError(f"{self.path(name)!r}: {text}; {advice}")


async def _get(files: Any, wanted: dict[str, Any]) -> tuple[bytes, str, str]:
    """The bytes, the range and the ETag of the answer to a GET of a range. s3fs' own calls cannot pass If-Match."""
    answer = await files._call_s3("get_object", **wanted)
    try:
        part = str(answer.get("ContentRange", ""))
        return (await answer["Body"].read() if part else b""), part, str(answer.get("ETag", ""))
    finally:
        answer["Body"].close()
