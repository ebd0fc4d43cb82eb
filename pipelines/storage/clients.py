"""The clients of object stores, by fsspec: how they are set up, and what their errors mean."""

from __future__ import annotations

import base64
import errno
import hashlib
import re
from typing import Any

from ..errors import StorageError

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
_TRANSIENT = {  # botocore's, aiohttp's and fsspec's own, by name: none of them need be installed
    "HTTPClientError", "EndpointConnectionError", "ConnectionError", "ConnectionClosedError", "ResponseParserError",
    "IncompleteReadError", "ClientPayloadError", "ClientConnectionError", "TimeoutError",
}  # fmt: skip
_TRANSIENT_ERRNO = {errno.EBUSY, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, getattr(errno, "EREMOTEIO", 121)}
_ANONYMOUS = re.compile(r"Credential|TokenRetrieval|SSOToken|RefreshError|ProfileNotFound")


def client(protocol: str, root: str) -> Any:
    """The filesystem of fsspec for a protocol. Raises StorageError if its package cannot be imported."""
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


def is_transient(exc: Exception) -> bool:
    """Whether asking again may help."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    number = exc.errno if isinstance(exc, OSError) else None
    return bool(names & _TRANSIENT) or number in _TRANSIENT_ERRNO or 500 <= int(getattr(exc, "code", 0) or 0) < 600


def advice(exc: Exception, transient: bool) -> str:
    """What to do about an error of a store."""
    if transient:
        return "the store does not answer; check the network and the endpoint, then run the same command to resume"
    if code(exc) == "NoSuchBucket":
        return "make the bucket, or give another OUT"
    if _ANONYMOUS.search(type(exc).__name__):
        return "log in (for S3: `aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if isinstance(exc, PermissionError):
        return "ask for the right to list the bucket, and to get, put and delete objects there, or give another OUT"
    return "check the store, then run the same command to resume"


def code(exc: BaseException) -> str:
    """The error code that S3 gave."""
    response = getattr(exc, "response", None) or getattr(exc.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def digests(path: str, part: int) -> set[str]:
    """The MD5 of a file, and what S3 says of it after a multipart upload: the MD5 of the MD5s of its parts."""
    whole, parts = hashlib.md5(usedforsecurity=False), []
    with open(path, "rb") as file:
        while piece := file.read(part):
            whole.update(piece)
            parts.append(hashlib.md5(piece, usedforsecurity=False).digest())
    return {whole.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"}


def decoded(text: str | None) -> str:
    """An MD5 in base64, as gs:// gives it, in hexadecimal digits; empty if there is none."""
    return base64.b64decode(text).hex() if text else ""
