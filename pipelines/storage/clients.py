"""Clients of object stores, through fsspec, for SRC and for OUT: their options, and what their errors mean."""

from __future__ import annotations

import base64
import errno
import hashlib
import re
from typing import Any

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of gpu-npz, which install the packages
_TRANSIENT = {  # errors of botocore, aiohttp and fsspec, by name since none of these has to be installed
    "HTTPClientError", "EndpointConnectionError", "ConnectionError", "ConnectionClosedError", "ResponseParserError",
    "IncompleteReadError", "ClientPayloadError", "ClientConnectionError", "TimeoutError",
}  # fmt: skip
_TRANSIENT_ERRNO = {errno.EBUSY, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, getattr(errno, "EREMOTEIO", 121)}
_CONNECTIONS = 64  # to S3, of a process; botocore's 10 are fewer than the reads of one batch
_NO_CREDENTIALS = re.compile(r"Credential|TokenRetrieval|SSOToken|RefreshError|ProfileNotFound")
_LOG_IN = "log in (for S3: `aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_inherited: list[Any] = []


def client(protocol: str) -> Any:
    """The fsspec filesystem for a protocol, set up not to cache listings and, for S3, not to retry.

    Raises:
        ImportError: its package is missing.
        ValueError: fsspec knows no such protocol.
    """
    import fsspec

    # A cached listing would hold every name of a collection, and would miss what other processes write.
    options: dict[str, Any] = {"use_listings_cache": False}
    is_s3 = PACKAGES.get(protocol) == "s3fs"
    if is_s3:
        # Callers retry by themselves. Nested in each other, botocore's, s3fs's and our loops would spend minutes on a
        # refused connection.
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        retries = {"total_max_attempts": 1}
        options["config_kwargs"] = {"retries": retries, "max_pool_connections": _CONNECTIONS, **given}
    files = fsspec.filesystem(protocol, **options)
    if is_s3:
        files.retries = 1
    return files


def renewed(files: Any, protocol: str) -> Any:
    """A new client for a forked process, where the event loop of its parent's client does not run.

    The parent's client is kept: its end would close connections in the loop that both processes share.
    """
    _inherited.append(files)
    return client(protocol)


def is_transient(exc: Exception) -> bool:
    """Whether a retry may help after this error of a client."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    number = exc.errno if isinstance(exc, OSError) else None
    return bool(names & _TRANSIENT) or number in _TRANSIENT_ERRNO or 500 <= int(getattr(exc, "code", 0) or 0) < 600


def write_advice(exc: Exception) -> str:
    """What to do about an error of the store that holds OUT."""
    if is_transient(exc):
        return (
            "the object store does not respond; check the network and the endpoint, then run the same command to resume"
        )
    if code(exc) == "NoSuchBucket":
        return "create the bucket, or choose another OUT"
    if _lacks_credentials(exc):
        return f"{_LOG_IN})"
    if isinstance(exc, PermissionError):
        return "request permission to list the bucket and to get, put and delete objects in it, or choose another OUT"
    return "check the store, then run the same command to resume"


def dataset_advice(exc: Exception) -> str:
    """What to do about an error of the store that holds a dataset which is only read."""
    if is_transient(exc):
        return "the object store does not respond; check the network and the endpoint (for S3: FSSPEC_S3_ENDPOINT_URL)"
    if code(exc) == "NoSuchBucket":
        return "check the name of the bucket"
    if _lacks_credentials(exc):
        return f"{_LOG_IN}; FSSPEC_S3_ANON=true for a public bucket)"
    if isinstance(exc, PermissionError):
        return "request permission to list the bucket and to get its objects, or log in as another user"
    return "check the store and the name of the dataset"


def read_advice(exc: OSError) -> str:
    """What to do about an error of the store that holds SRC: an OSError with errno, caused by the client's error."""
    if _lacks_credentials(exc):
        return f"{_LOG_IN}; FSSPEC_S3_ANON=true for a public bucket)"
    if exc.errno == errno.EACCES:
        return "request permission to list and read it, or log in as another user"
    if exc.errno == errno.ENOENT:
        return "check the names of bucket and folder in SRC"
    return "check the network and the endpoint (for S3: FSSPEC_S3_ENDPOINT_URL), then run the command again"


def _lacks_credentials(exc: BaseException) -> bool:
    """Whether an error, or one that caused it, is about missing credentials."""
    found = bool(_NO_CREDENTIALS.search(type(exc).__name__))
    return found or (exc.__cause__ is not None and _lacks_credentials(exc.__cause__))


def code(exc: BaseException) -> str:
    """The error code in an S3 error; empty if it has none."""
    response = getattr(exc, "response", None) or getattr(exc.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def digests(path: str, part: int) -> set[str]:
    """The MD5 of a file, and its ETag on S3 after a multipart upload in parts of `part` bytes: an MD5 of their MD5s."""
    whole, parts = hashlib.md5(usedforsecurity=False), []
    with open(path, "rb") as file:
        while piece := file.read(part):
            whole.update(piece)
            parts.append(hashlib.md5(piece, usedforsecurity=False).digest())
    return {whole.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"}


def decoded(text: str | None) -> str:
    """Converts an MD5 from Base64, as gs:// reports it, to hexadecimal digits; empty if there is none."""
    return base64.b64decode(text).hex() if text else ""
