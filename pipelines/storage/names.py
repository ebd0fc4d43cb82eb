"""How files on a disk get and lose their names so that a process that was stopped in between does no harm.

No call here replaces a file. A look and an unlink are two steps, between which a process may sleep while another one
takes OUT over; so a file is first renamed aside, then looked at, then removed or put back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from typing import Literal, NamedTuple

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_BESIDE = re.compile(r"\.(.+)\.(?:([0-9a-f]{16})-[0-9a-f]{8}|\d+-\d+)\.(tmp|old)")  # without a token: of old versions
_NOBODY = "0" * 16


class TemporaryName(NamedTuple):
    """What a name for a moment says: whose file it is, under which lock's token ("" if none), and whether it was moved.

    A file that was moved aside belongs where it was unless its name is taken; any other is unfinished.
    """

    base: str
    owner: str
    moved: bool

    @classmethod
    def of(cls, name: str) -> TemporaryName | None:
        """None for a name that is none of these."""
        found = _BESIDE.fullmatch(name)
        return found and cls(found[1], "" if found[2] in (None, _NOBODY) else found[2], found[3] == "old")


def temporary_name(path: str, owner: str, kind: Literal["tmp", "old"] = "tmp") -> str:
    """A new name for a moment in the same folder; `owner` is the token of the lock under which it is used, or ""."""
    folder, base = os.path.split(path)
    return os.path.join(folder, f".{base}.{owner or _NOBODY}-{secrets.token_hex(4)}.{kind}")


def create(temporary: str, path: str) -> None:
    """Gives a file a second name. Raises FileExistsError if that is taken.

    Where there are no hard links (FAT, some FUSE and SMB mounts), it loses the first, and who takes the name between
    the look and the rename loses his file.
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
    """Renames a file; whether there was one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rename(path, aside)
        return True
    return False


def put_back(aside: str, path: str) -> None:
    """Gives a file that was moved aside its name again, unless a newer one has it by now."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # the latter: another process has put it back
        create(aside, path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
