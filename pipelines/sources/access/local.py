"""Image files below a local folder: reading them, and the frames of multi-frame DICOM files."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.base import open_regular
from ..base import Group, Item, as_bytes
from ..dicom_frames import EXTENSIONS, frame_count, split_frame
from ..rejects import MAX_ENCODED_BYTES, BadItem

_WHOLE = -1  # the place of an item that is a whole file, in a group with frames
# Virtual filesystems of the kernel. Reading a file there may block, never end, or consume a log.
_VIRTUAL = frozenset(
    b"proc sysfs debugfs tracefs securityfs configfs cgroup cgroup2 bpf pstore efivarfs binfmt_misc fusectl selinuxfs "
    b"rpc_pipefs nfsd mqueue devpts".split()
)
# Filesystems on which the status of a file takes a round trip; those named fuse.something, too.
_NETWORK = frozenset(b"nfs nfs4 cifs smb3 smbfs ceph lustre gpfs beegfs afs 9p ocfs2 gfs2".split())
_AT_ONCE = 16
_statuses_lock = threading.Lock()
_MAX_CANDIDATES = 1000  # files among which to look for others to probe
_PROBED = 3
_PROBE_BYTES = 4096


class Inside:
    """Detects paths that symbolic links lead out of a folder. Each folder is listed once.

    Args:
        root: the folder's absolute path.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._folders: dict[bytes, tuple[bool, frozenset[bytes]]] = {}

    def holds(self, path: bytes) -> bool:
        """Whether a path relative to the folder resolves to a place inside it."""
        folder, _, name = path.rpartition(b"/")
        if folder not in self._folders:
            self._folders[folder] = self.holds_target(os.path.join(self._root, folder)), self._links(folder)
        inside, links = self._folders[folder]
        return inside and (name not in links or self.holds_target(os.path.join(self._root, path)))

    def holds_target(self, path: bytes) -> bool:
        """Whether an absolute path resolves to a place inside the folder."""
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real.rstrip(b"/") + b"/")

    @functools.cached_property
    def _real(self) -> bytes:
        return os.path.realpath(self._root)

    def _links(self, folder: bytes) -> frozenset[bytes]:
        with contextlib.suppress(OSError), os.scandir(os.path.join(self._root, folder)) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
        return frozenset()


class LocalFiles:
    """The files below a folder. A DICOM frame is an item such as `scan.dcm/0003`, whose place is the frame's number.

    Args:
        root: the folder's absolute path.
    """

    _last: tuple[tuple[bytes, int, int, int], bytes] | None = None

    def __init__(self, root: bytes) -> None:
        self._root = root

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root}

    def with_frames(self, group: Group) -> Group:
        """The same items, with each multi-frame DICOM file replaced by its frames. Reads the headers of DICOM files.

        An item that names a frame itself is kept.
        """
        together = b"/".join(group.names).lower()  # one search shows that most folders have no DICOM file
        if group.places is not None or not any(extension in together for extension in EXTENSIONS):
            return group
        names: list[bytes] = []
        frames: list[int] = []
        rows: list[int] = []
        for row, name in enumerate(group.names):
            path = group.folder + name
            file, frame = split_frame(path)
            if frame is None or not os.path.isfile(os.path.join(self._root, file)):
                frame = _WHOLE
            count = self._frames(path) if frame == _WHOLE and name.lower().endswith(EXTENSIONS) else 1
            names += [name] if count == 1 else [name + b"/%04d" % number for number in range(count)]
            frames += [frame] if count == 1 else range(count)
            rows += [row] * count
        if {*frames} == {_WHOLE}:
            return group
        labels = None if group.labels is None else group.labels[rows]
        keys = None if group.keys is None else [group.keys[row] for row in rows]
        return replace(group, names=names, labels=labels, keys=keys, places=np.array(frames, np.int64).reshape(-1, 1))

    def frame(self, item: Item) -> int | None:
        """The number of the frame in its file; None if the item is a whole file."""
        return item.place[0] if item.place and item.place[0] != _WHOLE else None

    def read(self, item: Item) -> bytes:
        """The bytes of the item's file. Consecutive frames of a file share one read.

        Raises:
            OSError: from the system.
            BadItem: not a regular file, or larger than any image should be.
        """
        path = self.path(item)
        if not item.place or item.place[0] == _WHOLE:
            return _read(path)
        status = os.stat(path)
        stamp = path, status.st_ino, status.st_size, status.st_mtime_ns
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != stamp:
            self._last = last = stamp, _read(path)
        return last[1]

    def others_readable(self, item: Item) -> bool:
        """Whether other files below the folder can be read now, preferably on the same filesystem."""
        path = self.path(item)
        try:
            device = os.stat(path).st_dev
            others = list(itertools.islice(self._others(path), _MAX_CANDIDATES))
            probed = [other for other, where in others if where == device] or [other for other, _ in others]
            for other in probed[:_PROBED]:
                _probe(other)
        except OSError:
            return False
        return bool(probed)

    def _others(self, path: bytes) -> Iterator[tuple[bytes, int]]:
        """Other regular, nonempty files with their device numbers: first from the file's folder, then from all."""
        for folder in (os.path.dirname(path), self._root):
            for where, _, names in os.walk(folder):
                for name in names:
                    other = os.path.join(where, name)
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(other)
                        regular = stat.S_ISREG(status.st_mode) and not _is_virtual(status)
                        if regular and status.st_size and other != path:
                            yield other, status.st_dev

    def path(self, item: Item) -> bytes:
        """The file's absolute path."""
        path = item.path if not item.place or item.place[0] == _WHOLE else item.path.rpartition("/")[0]
        return self._root + b"/" + as_bytes(path)

    def _frames(self, path: bytes) -> int:
        """The number of items in a file; 1 if it is unreadable or claims more frames than bytes, to become a reject."""
        try:
            with open(os.path.join(self._root, path), "rb", opener=open_regular) as file:
                count = frame_count(file)
                return count if count <= os.fstat(file.fileno()).st_size else 1
        except (OSError, BadItem):
            return 1


def statuses(paths: Sequence[bytes]) -> list[os.stat_result | None]:
    """The status of each file; None if it cannot be had, for example because the file is missing.

    One thread at a time asks for them, since threads that compete for Python's lock after every call slow each other,
    and the main thread, down. On a network filesystem, where each call takes long, several threads ask.
    """
    first = next(filter(None, map(_status, paths)), None)
    if first is not None and first.st_dev in _devices(_is_network):
        with ThreadPoolExecutor(_AT_ONCE, "gpu-npz-status") as pool:
            return list(pool.map(_status, paths))
    with _statuses_lock:
        return list(map(_status, paths))


def _status(path: bytes) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a NUL byte
        return None


def is_plain(status: os.stat_result | None) -> bool:
    """Whether this is the status of a regular file on a disk, not larger than any image should be."""
    if status is None:
        return False
    try:
        _require_plain(status)
    except BadItem:
        return False
    return True


def _read(path: bytes) -> bytes:
    # O_NONBLOCK: a named pipe must not block the build; regular files ignore it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _require_plain(status)
        data = os.read(descriptor, status.st_size + 1)
        while len(data) <= MAX_ENCODED_BYTES and (more := os.read(descriptor, 1 << 20)):
            data += more
        return data
    finally:
        os.close(descriptor)


def _require_plain(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadItem("read", "unreadable", "not a regular file")
    if _is_virtual(status):
        raise BadItem("read", "unreadable", "a file that the kernel makes up, as in /proc or /sys")
    if status.st_size > MAX_ENCODED_BYTES:
        raise BadItem("read", "too-large", f"{status.st_size} bytes; at most {MAX_ENCODED_BYTES}")


def _is_virtual(status: os.stat_result) -> bool:
    return status.st_dev in _devices(_is_made_up)


def _is_made_up(kind: bytes) -> bool:
    return kind in _VIRTUAL


def _is_network(kind: bytes) -> bool:
    return kind in _NETWORK or kind.startswith(b"fuse")


@functools.cache
def _devices(fits: Callable[[bytes], bool]) -> frozenset[int]:
    """The device numbers of filesystems whose type fits, from proc_pid_mountinfo(5); empty on macOS."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            mount, _, source = line.partition(b" - ")
            if fits(source.split(b" ")[0]):
                found.add(os.makedev(*map(int, mount.split()[2].split(b":"))))
    return frozenset(found)


def _probe(path: bytes) -> None:
    """Reads the beginning of a file from the disk, not from the page cache. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if not os.read(descriptor, _PROBE_BYTES):
            raise OSError(errno.EIO, "nothing came")
    finally:
        os.close(descriptor)
