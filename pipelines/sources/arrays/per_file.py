"""Class folders of .npy or .npz files with one image each, and which of the two forms a SRC of arrays has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...config import BuildConfig
from ...errors import FormatError, SourceError, UsageError
from ...npz.arrays import inflated, read_arrays
from ..base import Item, Source, as_bytes, is_hidden
from ..folders.folder import LABELS, FolderSource
from ..rejects import BadItem
from .choice import shown, single_image
from .npy import Array
from .numpy_source import NumpySource
from .rows import image_of


def open_arrays(location: str, config: BuildConfig, classes: Sequence[str] | None) -> Source:
    """The images in NumPy's files: an `ArrayFolderSource` if SRC is a folder of folders, else a `NumpySource`."""
    if os.path.isdir(location) and _has_folders(location):
        return ArrayFolderSource(location, config, classes)
    return NumpySource(location, config, classes)


def _has_folders(location: str) -> bool:
    try:
        with os.scandir(location) as entries:
            return any(entry.is_dir() and not is_hidden(as_bytes(entry.name)) for entry in entries)
    except OSError as exc:
        raise SourceError(f"{location!r}: {exc.strerror}; make it readable, or give another SRC") from exc


class ArrayFolderSource(FolderSource):
    """Class folders, as `FolderSource`, of .npy or .npz files with one image each: (H, W), (H, W, C) or (C, H, W).

    In an .npz, the image is the only array with two or three dimensions, or the first with a usual name (images, image,
    imgs, img, x, data; arr_0). Other files are left out. A file that holds no image is a reject.

    Raises:
        SourceError, UsageError: as `TreeSource`.
    """

    kind = "numpy"
    file_per_item = False  # its files are no encoded images, so no decoder may open them by itself
    extensions = frozenset((b".npy", b".npz"))

    def __init__(self, location: str, config: BuildConfig, classes: Sequence[str] | None) -> None:
        if config.labels not in (None, *LABELS):
            raise UsageError(
                f"--labels {config.labels}: {location!r} has one image in each file, whose labels are "
                f"{' or '.join(LABELS)}; for other labels save all images as one array"
            )
        super().__init__(location, classes, config.labels)

    def read(self, item: Item) -> bytes:
        """The image as PGM, PPM or PNG.

        Raises:
            OSError: from the system.
            BadItem: the file is damaged, or is no image.
        """
        data = super().read(item)
        if not data:
            return data
        try:
            return _encoded(memoryview(data))
        except (FormatError, SourceError) as exc:
            raise BadItem("read", "undecodable", str(exc)) from exc


def _encoded(data: memoryview) -> bytes:
    """The image in an .npy or .npz, encoded. Raises FormatError or SourceError if there is none."""

    def read(offset: int, size: int) -> memoryview:
        return data[offset : offset + size]

    found = {name: Array("it", 0, info) for name, info in read_arrays(read, len(data)).items()}
    name = single_image(found)
    if name is None:
        raise SourceError(f"no array has the dimensions of an image; it has {shown(found)}")
    info = found[name].info.complete()
    form = image_of(found[name])
    npy: Any = b"".join(inflated(read, info)) if info.deflated else read(info.begin, info.npy_bytes)
    return form.encode(bytes(npy[info.header_bytes : info.header_bytes + form.row_bytes]))
