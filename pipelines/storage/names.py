"""Renames files on a disk such that a process may be suspended between any two steps without harm.

No call here replaces a file. Between checking a file and unlinking it, a process may be suspended while another one
takes OUT over. So a file is first renamed aside, then checked, then removed or put back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from typing import Literal, NamedTuple

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_TEMPORARY = re.compile(r"\.(.+)\.(?:([0-9a-f]{16})-[0-9a-f]{8}|\d+-\d+)\.(tmp|old)")  # old versions had no token
_NOBODY = "0" * 16


class TemporaryName(NamedTuple):
    """A parsed temporary name.

    Attributes:
        base: the file's final name.
        owner: the token of the lock under which it was made; "" if none.
        moved: whether it is a file that was moved aside, which is put back unless its name is taken. Any other file is
            unfinished.
    """

    base: str
    owner: str
    moved: bool

    @classmethod
    def of(cls, name: str) -> TemporaryName | None:
        """Parses a name. None if it is not a temporary name."""
        found = _TEMPORARY.fullmatch(name)
        return found and cls(found[1], "" if found[2] in (None, _NOBODY) else found[2], found[3] == "old")


def temporary_name(path: str, owner: str, kind: Literal["tmp", "old"] = "tmp") -> str:
    """A new temporary name in the same folder. `owner` is the token of the lock under which it is used, or ""."""
    folder, base = os.path.split(path)
    return os.path.join(folder, f".{base}.{owner or _NOBODY}-{secrets.token_hex(4)}.{kind}")


def create(temporary: str, path: str) -> None:
    """Gives a file a second name. Raises FileExistsError if that name is taken.

    Without hard links (FAT, some FUSE and SMB mounts), the file is renamed instead, and a file that takes the name
    between the check and the rename is lost.
    """
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from exc
        os.rename(temporary, path)


def move_aside(path: str, aside: str) -> bool:
    """Renames a file, and says whether it existed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rename(path, aside)
        return True
    return False


def put_back(aside: str, path: str) -> None:
    """Gives a file that was moved aside its name back, unless a newer file has taken it."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # the latter: another process has put it back
        create(aside, path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
