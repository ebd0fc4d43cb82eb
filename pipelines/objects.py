"""OUT on an object store, by fsspec: S3 and what speaks its protocol (s3://), Google Cloud Storage (gs://).

An object appears whole or not at all: one put, or a multipart upload that its last request completes. So there are no
temporaries in the store and nothing to rename. A shard is made in a local temporary folder (TMPDIR), uploaded, and
compared with what arrived: by size, and by the MD5 that the store computed; where it gives none that fits (an encrypted
bucket, say), by reading the object back. The commit record follows, as everywhere.

Other filesystems of fsspec (sftp, hdfs) show a file under its final name while it is being written: they are refused.
`memory://` lives in one process: for tests, and for builds with `--workers 0`.

Clients are set up as always: environment, ~/.aws, fsspec's own files and variables (FSSPEC_S3_ENDPOINT_URL).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import random
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .errors import StorageError
from .leases import Lease, is_live, leftovers
from .storage import LOCK, PRIVATE

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
ATTEMPTS = 6
RETRY_S = 0.5  # then twice as long each time
PART_BYTES = 16 << 20  # of a multipart upload; an object of less than two parts goes in one put
_PARTS = 4  # under way at a time, for each shard
_MAX_PARTS = 10_000
_SCRATCH = re.compile(r"gpu-npz-scratch-.+")
_TRANSIENT = {  # botocore's, aiohttp's and fsspec's own, by name: none of them need be installed
    "HTTPClientError", "EndpointConnectionError", "ConnectionError", "ConnectionClosedError", "ResponseParserError",
    "IncompleteReadError", "ClientPayloadError", "ClientConnectionError", "TimeoutError",
}  # fmt: skip
_TRANSIENT_ERRNO = {errno.EBUSY, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, getattr(errno, "EREMOTEIO", 121)}
_ANONYMOUS = re.compile(r"Credential|TokenRetrieval|SSOToken|RefreshError|ProfileNotFound")


class ObjectStorage:
    """OUT as a prefix of a bucket. Names are relative to it, POSIX; `storage.Storage` says what each method does.

    Args:
        root: `s3://bucket/path`.

    Raises:
        StorageError: no such store, or its client is not installed.
    """

    _count = itertools.count()

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        protocol, _, place = self.root.partition("://")
        if protocol not in PACKAGES:
            raise StorageError(
                f"OUT {root!r}: {protocol}:// cannot hold a dataset; give a folder, s3://bucket/path or gs://bucket/path"
            )
        if not place.split("/")[0]:
            raise StorageError(f"OUT {root!r} names no bucket; give {protocol}://bucket/path")
        self._files = _client(protocol, root)
        self._key = self._files._strip_protocol(self.root).rstrip("/")
        self._held: list[Lease] = []
        self._scratch = ""
        self._conditional: bool | None = None

    def path(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.root}/{name}" if name else self.root

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            info = self._asked(name, lambda: self._files.info(self._at(name)))
            return int(info["size"]) if info["type"] == "file" else None
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._asked(name, lambda: self._files.cat_file(self._at(name))))
        return None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[str]:
        """A path of a file's copy, to be opened within the body. Raises FileNotFoundError if there is none."""
        copy = self.temporary(name)
        try:
            self._asked(name, lambda: self._files.get_file(self._at(name), copy))
            yield copy
        except FileNotFoundError as exc:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name)) from exc
        finally:
            self.discard(copy)

    def names(self, folder: str = "") -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if there is no such folder."""
        start = f"{self._at(folder)}/"
        with contextlib.suppress(FileNotFoundError):
            found = self._asked(folder, lambda: self._files.ls(self._at(folder), detail=False))
            below = {name.rstrip("/").removeprefix(start) for name in found if name.startswith(start)}
            return sorted(below - {""})
        return []

    def is_folder(self, name: str) -> bool:
        """Whether there are files whose names begin so."""
        return bool(self.names(name))

    def temporary(self, name: str) -> str:
        """The path of a new local file in which the content of `name` is made."""
        with self.explained(name):
            if not self._scratch:
                self._scratch = _scratch_folder(self)
        return os.path.join(self._scratch, f"{os.path.basename(name)}.{next(self._count)}")

    def publish(self, temporary: str, name: str) -> None:
        """Uploads a file, whole, and sees that it arrived; then it is gone here."""
        self.require_held()
        size = os.path.getsize(temporary)
        part = max(PART_BYTES, -(-size // _MAX_PARTS))
        digests = _digests(temporary, part)
        options = {"chunksize": part, "max_concurrency": _PARTS} if self.root.startswith("s3") else {}

        def upload() -> None:
            self._files.put_file(temporary, self._at(name), **options)
            if not self._arrived(name, temporary, size, digests):
                self._files.rm_file(self._at(name))
                raise OSError(errno.EPIPE, "what arrived is not what was sent")

        self._written(name, upload)
        self.discard(temporary)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in one put."""
        self.require_held()
        self.put(name, content)

    def discard(self, temporary: str) -> None:
        """Removes a temporary file, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there; a folder ends with its last file."""
        self.require_held()
        self.delete(name)

    def remove_temporaries(self, folder: str) -> None:
        """Removes what killed builds left unfinished on this machine, and of locks. Only for the holder of the lock."""
        if folder == "":
            _remove_scratch()
        elif folder == PRIVATE:
            for name in leftovers(self, folder, self.names(folder)):
                self.delete(f"{folder}/{name}")

    @contextlib.contextmanager
    def lock(self, name: str = LOCK, *, wait_s: float = 0.0) -> Iterator[Lease]:
        """Holds OUT for one build, or a part of it; `leases.py` has the rules.

        Once the lock is lost, this object publishes nothing more.
        """
        with Lease(self, f"{PRIVATE}/{name}", wait_s) as lease:
            self._held.append(lease)
            try:
                yield lease
            finally:
                self._held.remove(lease)

    def live_locks(self) -> list[str]:
        """The names of the locks that somebody holds."""
        found = (name for name in self.names(PRIVATE) if name == LOCK or name.startswith(f"{LOCK}-"))
        return [name for name in found if is_live(self.read(f"{PRIVATE}/{name}"))]

    def require_held(self) -> None:
        """Raises LockedError if a lock that was taken through this object is lost."""
        for lease in list(self._held):
            lease.require_held()

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Raises an OSError from its body, which is the temporary folder's, as a StorageError that says what to do."""
        try:
            yield
        except OSError as exc:
            raise StorageError(
                f"{self.path(name)!r} is made in {self._scratch or tempfile.gettempdir()!r}: {exc.strerror or exc}; "
                "free some space there or set TMPDIR to a folder with room for the open shards, then run the same "
                "command to resume"
            ) from exc

    def put(self, name: str, content: bytes) -> None:
        """Writes a small file in one put, whatever became of the lock."""
        self._written(name, lambda: self._files.pipe_file(self._at(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a small file in one put if there is none, and says whether that is so."""
        return self.size(name) is None and self._created(name, content)

    def creates_once(self, name: str) -> bool:
        """Whether the server keeps to If-None-Match, tried with a file that is there and that nobody else writes."""
        if self._conditional is None:
            self._conditional = not self._created(name, self.read(name) or b"")
        return self._conditional

    def _created(self, name: str, content: bytes) -> bool:
        def attempt() -> bool:
            try:
                self._files.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
            except OSError as exc:
                if exc.errno == errno.ENOSYS:  # the server has no If-None-Match
                    self._files.pipe_file(self._at(name), content)
                    return True
                # Servers name a failed condition, or a race for the name, in several ways.
                if isinstance(exc, (FileNotFoundError, PermissionError)) or not self._files.exists(self._at(name)):
                    raise
                return False
            return True

        return self._written(name, attempt)

    def delete(self, name: str) -> None:
        """Removes a file, if it is there, whatever became of the lock."""
        with contextlib.suppress(FileNotFoundError):
            self._asked(name, lambda: self._files.rm_file(self._at(name)))

    def _at(self, name: str) -> str:
        return f"{self._key}/{name}" if name else self._key

    def _arrived(self, name: str, temporary: str, size: int, digests: set[str]) -> bool:
        info = self._files.info(self._at(name))
        if info["size"] != size:
            return False
        if {str(info.get("ETag", "")).strip('"'), _hex(info.get("md5Hash"))} & digests:
            return True
        # No checksum, or one of something else: with SSE-KMS an ETag is no MD5.
        with open(temporary, "rb") as file:
            for start in range(0, size, PART_BYTES):
                stop = min(size, start + PART_BYTES)
                if self._files.cat_file(self._at(name), start=start, end=stop) != file.read(PART_BYTES):
                    return False
        return True

    def _written(self, name: str, action: Callable[[], Answer]) -> Answer:
        try:
            return self._asked(name, action)
        except FileNotFoundError as exc:
            raise self._error(name, exc, "the bucket does not exist; make it, or give another OUT") from exc

    def _asked(self, name: str, action: Callable[[], Answer]) -> Answer:
        """What the store answers, asked again if it fails for a moment. FileNotFoundError is an answer, too."""
        for attempt in itertools.count(1):
            try:
                return action()
            except Exception as exc:  # the classes are the clients', of which only one is installed
                if isinstance(exc, FileNotFoundError) and _code(exc) != "NoSuchBucket":
                    raise
                transient = _is_transient(exc)
                if not transient or attempt >= ATTEMPTS:
                    raise self._error(name, exc, _advice(exc, transient)) from exc
                log.info("%s: %s; attempt %d of %d", self.path(name), exc, attempt + 1, ATTEMPTS)
            time.sleep(RETRY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        raise AssertionError

    def _error(self, name: str, exc: Exception, advice: str) -> StorageError:
        text = " ".join(str(exc).split()) or type(exc).__name__
        return StorageError(f"{self.path(name)!r}: {text}; {advice}")


def _client(protocol: str, root: str) -> Any:
    package = PACKAGES[protocol]
    extra = {"s3fs": "s3", "gcsfs": "gs"}.get(package, "s3")
    try:
        import fsspec

        kind: Any = fsspec.get_filesystem_class(protocol)
    except ImportError as exc:
        raise StorageError(
            f"OUT {root!r} needs {package}, which cannot be imported ({exc}); run: pip install 'gpu-npz[{extra}]'"
        ) from exc
    options: dict[str, Any] = {"use_listings_cache": False}  # by its options fsspec knows a client and uses it again
    if package == "s3fs":
        # We try again by ourselves; on top of each other, three such loops make minutes of a refused connection.
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **given}
    files = kind(**options)
    if package == "s3fs":
        files.retries = 1
    return files


def _is_transient(exc: Exception) -> bool:
    names = {kind.__name__ for kind in type(exc).__mro__}
    number = exc.errno if isinstance(exc, OSError) else None
    return bool(names & _TRANSIENT) or number in _TRANSIENT_ERRNO or 500 <= int(getattr(exc, "code", 0) or 0) < 600


def _advice(exc: Exception, transient: bool) -> str:
    if transient:
        return "the store does not answer; see to the network and the endpoint, then run the same command to resume"
    if _code(exc) == "NoSuchBucket":
        return "make the bucket, or give another OUT"
    if _ANONYMOUS.search(type(exc).__name__):
        return "log in (for S3: `aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if isinstance(exc, PermissionError):
        return "ask for the right to list the bucket, and to get, put and delete objects there, or give another OUT"
    return "see to the store, then run the same command to resume"


def _code(exc: BaseException) -> str:
    """The error code that S3 gave."""
    response = getattr(exc, "response", None) or getattr(exc.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _digests(path: str, part: int) -> set[str]:
    """The MD5 of a file, and what S3 says of it after a multipart upload: the MD5 of the MD5s of its parts."""
    whole, parts = hashlib.md5(usedforsecurity=False), []
    with open(path, "rb") as file:
        while piece := file.read(part):
            whole.update(piece)
            parts.append(hashlib.md5(piece, usedforsecurity=False).digest())
    return {whole.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"}


def _hex(text: str | None) -> str:
    return base64.b64decode(text).hex() if text else ""


def _scratch_folder(owner: object) -> str:
    """A folder for temporary files, flocked as long as its process lives and removed with its owner."""
    while True:
        path = tempfile.mkdtemp(prefix="gpu-npz-scratch-")
        with contextlib.suppress(FileNotFoundError):  # taken for a killed build's before it was flocked
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.isdir(path):
                break
            os.close(descriptor)

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)

    weakref.finalize(owner, remove)
    return path


def _remove_scratch() -> None:
    """Removes the folders that killed processes left on this machine."""
    root = tempfile.gettempdir()
    for name in filter(_SCRATCH.fullmatch, os.listdir(root)):
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):  # another user's, or a build's that lives
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
