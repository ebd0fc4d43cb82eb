"""Exports a dataset as one plain .npz, or as .npy files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from isal.isal_zlib import crc32_combine
from numpy.typing import NDArray

from ..dataset.space import lack_of_space
from ..errors import StorageError, UsageError
from ..npz.writer import NpzWriter
from .place import new_files
from .rows import ExportedRows

Progress = Callable[[int, int], None]
_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)
_OTHERS = ("paths", "class_names", "label_names")
_TEXTS_AT_ONCE = 4096


def write_npz(rows: ExportedRows, dest: str, keys: tuple[str, str], progress: Progress) -> None:
    """Writes all rows to one .npz, in memory that does not grow with their number.

    Its arrays: the images as stored, (N, C, H, W) or (N, H, W, C); the labels, (N,) or (N, K), if there are any;
    `paths`, `<U` (N,); `class_names`, `<U` (classes,), if labels are classes; `label_names`, `<U` (K,), if there are
    several columns.

    Args:
        rows: the rows.
        dest: the file.
        keys: the names of the images and the labels.
        progress: called with the number of rows done and the total number of rows.

    Raises:
        UsageError: a name is not allowed.
        FormatError: a shard is missing or damaged.
        StorageError: the file exists, or cannot be written.
    """
    images, labels = keys
    if images == labels or any(not _NAME.fullmatch(key) or key in _OTHERS for key in keys):
        raise UsageError(
            f"--keys: got {','.join(keys)!r}; give two names, such as x_train,y_train, of letters, digits, dashes, "
            f"dots and underscores, other than {', '.join(_OTHERS)}"
        )
    _require_space(rows, dest)
    with new_files(dest) as (temporary,), NpzWriter(temporary) as file:
        file.begin(images, np.dtype(rows.manifest.images.dtype), rows.manifest.images.shape)
        width, crc = 1, 0
        checked = rows.blank > 0
        for span in rows.spans(images=checked):
            file.append(span.images)
            width = max(width, span.paths.dtype.itemsize // 4)
            if span.places.start == 0:
                shard = span.reader.directory.members["images"]
                crc = crc32_combine(crc, shard.data_crc32, shard.data_bytes)
            progress(span.position + span.places.stop - span.places.start, len(rows))
        if rows.labels is not None:
            file.add(labels, rows.labels)
        _add_texts(file, "paths", (span.paths for span in rows.spans(images=False)), width)
        for name, texts in _names(rows).items():
            width = max(map(len, texts), default=1) or 1
            parts = (texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE))
            _add_texts(file, name, (np.array(part) for part in parts), width)
        written = file.close().members[images].data_crc32
        # Without blank rows, the writer's checksum checks all shards, and they are read once only.
        if not checked and written != crc:
            rows.require_sound()


def _names(rows: ExportedRows) -> dict[str, list[str]]:
    if len(rows.columns) > 1:
        return {"label_names": [column.name for column in rows.columns]}
    classes = rows.columns[0].classes if rows.columns else None
    return {} if classes is None else {"class_names": list(classes)}


def _add_texts(file: NpzWriter, name: str, parts: Iterable[NDArray[Any]], width: int) -> None:
    file.begin(name, np.dtype(f"<U{width}"), ())
    for part in parts:
        file.append(part.astype(f"<U{width}"))


def write_npy(rows: ExportedRows, dest: str, progress: Progress) -> None:
    """Writes the images as stored to one .npy, and the labels, if there are any, to `NAME-labels.npy` beside it.

    The arguments and errors are those of `write_npz`.
    """
    _require_space(rows, dest)
    labels = rows.labels
    beside = [] if labels is None else [f"{os.path.splitext(dest)[0]}-labels.npy"]
    with new_files(*beside, dest) as (*others, images):
        if labels is not None:
            with open(others[0], "wb") as file:
                np.save(file, labels, allow_pickle=False)
                _flush(file)
        stored = rows.manifest.images
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(stored.dtype)),
            "fortran_order": False,
            "shape": (len(rows), *stored.shape),
        }
        with open(images, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for span in rows.spans():
                file.write(np.ascontiguousarray(span.images).reshape(-1).view(np.uint8).data)
                progress(span.position + span.places.stop - span.places.start, len(rows))
            _flush(file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _require_space(rows: ExportedRows, dest: str) -> None:
    """Raises StorageError if the images do not fit on the filesystem."""
    if lack := lack_of_space(dest, len(rows) * rows.image_bytes, 0):
        raise StorageError(f"{lack}; free some space or choose another DEST")
