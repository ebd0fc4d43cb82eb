"""Files of images below a local folder: their bytes, and the frames of those that are DICOM files of several."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import Any

import numpy as np

from ..rejects import MAX_ENCODED_BYTES, BadItem
from ..storage import open_regular
from .base import Group, Item, as_bytes
from .dicom import EXTENSIONS, frame_count, split_frame

_WHOLE = -1  # the place of an item that is a whole file, beside others that are frames


class LocalFiles:
    """The files below a folder, of which a frame is an item `scan.dcm/0003`, whose place is the frame's number.

    Args:
        root: the folder's absolute path.
    """

    _last: tuple[tuple[bytes, int, int, int], bytes] | None = None

    def __init__(self, root: bytes) -> None:
        self._root = root

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root}

    def with_frames(self, group: Group) -> Group:
        """The same items, but of each DICOM file of several frames, whose header is read for it, the frames.

        An item that is named as a frame stays that one.
        """
        together = b"/".join(group.names).lower()  # most folders have none, which one look tells
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
        """The number of the frame in its file; None of an item that is a whole file."""
        return item.place[0] if item.place and item.place[0] != _WHOLE else None

    def read(self, item: Item) -> bytes:
        """The bytes of the file, read in full; of one that has frames, for all of them once, if they follow each other.

        Raises:
            OSError: as the system says.
            BadItem: not a regular file, or larger than any image should be.
        """
        path = self.path(item)
        if not item.place or item.place[0] == _WHOLE:
            return _read(path)
        status = os.stat(path)
        stamp = path, status.st_ino, status.st_size, status.st_mtime_ns
        last = self._last  # another thread may put another file there
        if last is None or last[0] != stamp:
            self._last = last = stamp, _read(path)
        return last[1]

    def path(self, item: Item) -> bytes:
        """The file's absolute path."""
        path = item.path if not item.place or item.place[0] == _WHOLE else item.path.rpartition("/")[0]
        return self._root + b"/" + as_bytes(path)

    def _frames(self, path: bytes) -> int:
        """How many items a file is; one that cannot be read, or claims more frames than bytes, is one: a reject."""
        try:
            with open(os.path.join(self._root, path), "rb", opener=open_regular) as file:
                count = frame_count(file)
                return count if count <= os.fstat(file.fileno()).st_size else 1
        except (OSError, BadItem):
            return 1


def _read(path: bytes) -> bytes:
    # O_NONBLOCK: a named pipe under an image's name must not hang the build; regular files ignore it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadItem("read", "unreadable", "not a regular file")
        if status.st_size > MAX_ENCODED_BYTES:
            raise BadItem("read", "too-large", f"{status.st_size} bytes; at most {MAX_ENCODED_BYTES}")
        data = os.read(descriptor, status.st_size + 1)
        while len(data) <= MAX_ENCODED_BYTES and (more := os.read(descriptor, 1 << 20)):
            data += more
        return data
    finally:
        os.close(descriptor)
