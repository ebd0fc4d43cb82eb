"""Every error that this package raises.

    GpuNpzError                 exit 1
    ├── UsageError              exit 2   an option, setting or combination that is not allowed
    ├── BackendError            exit 1   the requested device or decoder cannot be used on this machine
    ├── SourceError             exit 1   SRC cannot be listed or read
    ├── StorageError            exit 1   OUT cannot be used: in use, not ours, no permission, no space
    │   └── LockedError                  another build holds OUT
    ├── MismatchError           exit 1   OUT was started with other settings or another decoder
    ├── ImageError              exit 1   an image given to Preprocess cannot be decoded
    ├── FormatError             exit 1   a file in OUT does not conform to the format
    ├── IncompleteError         exit 1   OUT has no manifest yet
    ├── ShardError              exit 1   a shard could not be built; the same command resumes
    │   └── RejectedError                an item was rejected under `--on-reject fail`
    └── RejectLimitError        exit 3   more rejects than `--max-rejects` allows

A bad image is counted and reported as a `Reject`; it raises an exception only under `--on-reject fail`.
"""

from __future__ import annotations

from typing import Any


class GpuNpzError(Exception):
    """The base class of all errors of this package.

    Attributes:
        exit_code: the exit status of the command line.
    """

    exit_code = 1


class UsageError(GpuNpzError):
    """An option, a setting or a combination of settings is not allowed."""

    exit_code = 2


class BackendError(GpuNpzError):
    """The requested device or decoder cannot be used on this machine."""


class SourceError(GpuNpzError):
    """SRC cannot be listed or read."""


class StorageError(GpuNpzError):
    """OUT cannot be used."""


class LockedError(StorageError):
    """Another build holds OUT."""


class MismatchError(GpuNpzError):
    """OUT was started with other settings, another source or another decoder."""


class ImageError(GpuNpzError):
    """An image given to Preprocess cannot be decoded, or a build would reject it."""


class FormatError(GpuNpzError):
    """A shard, a manifest or a record does not conform to the format.

    Attributes:
        problem: what is wrong, and what to do about it.
        path: the file at fault, which the message starts with; None if `problem` is the whole message.
    """

    def __init__(self, problem: str, path: str | None = None) -> None:
        super().__init__(problem if path is None else f"{path}: {problem}")
        self.problem = problem
        self.path = path


class IncompleteError(GpuNpzError):
    """OUT does not contain a finished dataset yet."""


class ShardError(GpuNpzError):
    """A shard could not be built for a reason other than a bad image."""


class RejectedError(ShardError):
    """An item was rejected, and `on_reject` is `fail`."""


class RejectLimitError(GpuNpzError):
    """More items were rejected than `max_rejects` allows. The shards are kept.

    Attributes:
        report: the `BuildReport` of the build.
    """

    exit_code = 3

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def install_command(extra: str) -> str:
    """Returns the pip command that installs the packages required by one of this package's extras.

    The command lists the packages instead of the extra, because gpu-npz may have been installed from a checkout.
    """
    import importlib.metadata
    import re

    try:
        lines = importlib.metadata.requires("gpu-npz") or []
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout that is not installed
        lines = []
    needed = [line.partition(";")[0].strip() for line in lines if re.search(f"extra == ['\"]{extra}['\"]", line)]
    return f"pip install {' '.join(map(repr, needed or [f'gpu-npz[{extra}]']))}"
