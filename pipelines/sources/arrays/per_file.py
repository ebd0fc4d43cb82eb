"""Class folders of .npy or .npz files with one image each, and which of the two forms a SRC of arrays has."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence

import numpy as np

from ...config import BuildConfig
from ...errors import FormatError, SourceError, UsageError
from ...npz.arrays import content, read_arrays
from ..base import Item, Source, as_bytes, as_text, is_hidden
from ..folders.folder import LABELS, FolderSource
from ..rejects import BadItem
from .choice import shown, single_image
from .npy import Array
from .numpy_source import NumpySource
from .rows import RowFormat, image_of
from .scaling import Scale, require_scale


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
        self._scale, self._max_pixels = config.scale, config.max_pixels
        self._check_first()

    def _check_first(self) -> None:
        """Raises SourceError or UsageError if `--scale` does not fit the first file, unless that is damaged."""
        group = next((group for group in self.groups() if group.names), None)
        if group is None:
            return
        path = as_text(group.folder + group.names[0])
        form = None
        with contextlib.suppress(OSError, BadItem, FormatError, SourceError):
            form, data = _image(
                memoryview(super().read(Item(0, path, None))), self._scale, repr(path), self._max_pixels
            )
        if form is not None and form.dtype.kind == "f":
            sample = np.frombuffer(data, form.dtype).reshape(1, -1)
            require_scale(sample, self._scale, f"{path!r} has {form.dtype} {form.shape}")

    def read(self, item: Item) -> bytes:
        """The image as PGM, PPM or PNG.

        Raises:
            OSError: from the system.
            BadItem: the file is damaged, is no image, or has floats out of range.
        """
        if not (data := super().read(item)):
            return data  # which makes it an empty file
        try:
            form, pixels = _image(memoryview(data), self._scale, "it", self._max_pixels)
        except (FormatError, SourceError, UsageError) as exc:
            raise BadItem("read", "undecodable", str(exc)) from exc
        if form.dtype.kind == "f" and self._scale == "none":
            raise BadItem("read", "undecodable", f"it has {form.dtype} {form.shape}; floats need --scale")
        return form.encode(pixels)


def _image(data: memoryview, scale: Scale, where: str, max_pixels: int) -> tuple[RowFormat, bytes]:
    """The format and the bytes of the image in an .npy or .npz.

    Raises:
        FormatError, SourceError: there is none.
        UsageError: `scale` is given, and it is not of floats.
        BadItem: it has more than `max_pixels` pixels, which are not decompressed.
    """

    def read(offset: int, size: int) -> memoryview:
        return data[offset : offset + size]

    found = {name: Array(where, 0, info) for name, info in read_arrays(read, len(data)).items()}
    name = single_image(found)
    if name is None:
        raise SourceError(
            f"{where} has no array with the dimensions of an image, or several without a usual name; its arrays: "
            f"{shown(found)}"
        )
    info = found[name].info.complete()
    form = image_of(found[name], scale)
    if (pixels := math.prod(form.shape) // form.channels) > max_pixels:
        raise BadItem("decode", "too-large", f"{pixels} pixels; at most {max_pixels}")
    npy = b"".join(content(read, info))
    return form, npy[info.header_bytes : info.header_bytes + form.row_bytes]
