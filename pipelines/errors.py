"""Every error that this package raises.

    GpuNpzError                 exit 1
    ├── UsageError              exit 2   an option, setting or combination that is not allowed
    ├── BackendError            exit 1   the device or decoder asked for cannot be used on this machine
    ├── SourceError             exit 1   SRC cannot be listed or read
    ├── StorageError            exit 1   OUT cannot be used: in use, not ours, no permission, no space
    │   └── LockedError                  another build holds OUT
    ├── MismatchError           exit 1   OUT was started with other settings or another decoder
    ├── ImageError              exit 1   an image given to Preprocess cannot be decoded
    ├── FormatError             exit 1   a file in OUT is not what the format says
    ├── IncompleteError         exit 1   OUT has no manifest yet
    ├── ShardError              exit 1   a shard could not be built; the same command resumes
    │   └── RejectedError                an item was rejected under `--on-reject fail`
    └── RejectLimitError        exit 3   more rejects than `--max-rejects` allows

A bad image is counted and reported as a `Reject`; it raises an exception only under `--on-reject fail`.
"""

from __future__ import annotations

from typing import Any


class GpuNpzError(Exception):
    """The base of all errors of this package; `exit_code` is the exit status of the command line."""

    exit_code = 1


class UsageError(GpuNpzError):
    """An option, a setting or a combination of them that is not allowed."""

    exit_code = 2


class BackendError(GpuNpzError):
    """The device or the decoder that was asked for cannot be used on this machine."""


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
    """A shard, a manifest or a record is not what the format says.

    Attributes:
        path: the file at fault, with which the message begins; None if `problem` is the whole message.
        problem: what is wrong, and what to do.
    """

    def __init__(self, problem: str, path: str | None = None) -> None:
        super().__init__(problem if path is None else f"{path}: {problem}")
        self.problem = problem
        self.path = path


class IncompleteError(GpuNpzError):
    """OUT holds no finished dataset yet."""


class ShardError(GpuNpzError):
    """A shard could not be built, for a reason other than its images."""


class RejectedError(ShardError):
    """An item was rejected, and `on_reject` is `fail`."""


class RejectLimitError(GpuNpzError):
    """More items were rejected than `max_rejects` allows; the shards are kept. `report` is the BuildReport."""

    exit_code = 3

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def install_command(extra: str) -> str:
    """The command that installs what an extra of this package needs, by the names of those packages.

    It does not name the extra itself, since the package may have been installed from a checkout.
    """
    import importlib.metadata
    import re

    try:
        lines = importlib.metadata.requires("gpu-npz") or []
    except importlib.metadata.PackageNotFoundError:  # it is imported from a checkout
        lines = []
    needed = [line.partition(";")[0].strip() for line in lines if re.search(f"extra == ['\"]{extra}['\"]", line)]
    return f"pip install {' '.join(map(repr, needed or [f'gpu-npz[{extra}]']))}"
