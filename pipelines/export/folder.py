"""Exports a dataset as image files in class folders, as torchvision's ImageFolder and `gpu-npz build` read them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..storage.local import LocalStorage
from .arrays import Progress
from .encoder import Encoder
from .names import column_names, file_name, numbered, portable, repeated
from .place import ignores_case, new_folder
from .rows import ExportedRows, Sample, in_order

TABLE = "metadata.csv"


def write_folder(
    rows: ExportedRows, dest: str, encoder: Encoder, content: dict[str, Any], threads: int, progress: Progress
) -> int:
    """Writes each row to a file, and returns how many files were there already.

    A file is `CLASS/NAME`, with a name made of the row's path; without classes, `NAME`. Whole numbers are classes, too,
    padded with zeros. Other labels are in `metadata.csv`, by file names.

    Args:
        rows: the rows.
        dest: the folder.
        encoder: makes a file of a stored image.
        content: as for `new_folder`.
        threads: how many threads encode and write.
        progress: called with the number of rows done and the total number of rows.

    Raises:
        FormatError: a shard is missing or damaged.
        StorageError: the folder has other files, or cannot be written.
        MismatchError: the folder has been begun with other content.
    """
    with new_folder(dest, content) as storage:
        alike = ignores_case(storage)
        folders = _class_folders(rows, ignore_case=alike)
        for folder in folders.values():
            storage.remove_temporaries(folder)
        name_of = _naming(rows, folders, encoder.extension, ignore_case=alike)
        there = 0

        def write(sample: Sample) -> bool:
            name = name_of(sample.position, sample.path)
            if storage.size(name) is not None:
                return False
            storage.write(name, encoder(sample.image()))
            return True

        with ThreadPoolExecutor(threads, "gpu-npz-export") as pool:
            for sample, written in in_order(pool, write, rows.samples(), 2 * threads):
                there += not written
                progress(sample.position + 1, len(rows))
        if rows.labels is not None and not rows.by_class and storage.size(TABLE) is None:
            _write_table(storage, rows, name_of)
        return there


def _class_folders(rows: ExportedRows, *, ignore_case: bool) -> dict[int, str]:
    """The folder of each label that occurs; empty if labels are not classes or whole numbers."""
    if rows.labels is None or not rows.by_class:
        return {}
    present = np.unique(rows.labels).tolist()
    names = rows.manifest.classes
    if names is None:
        width = max(len(str(label)) for label in present)
        return {label: f"{label:0{width}d}" for label in present}
    folders = [portable(names[label]) for label in present]
    doubles = repeated(folders, len(folders), ignore_case=ignore_case)
    return {
        label: numbered(folder, label) if number in doubles else folder
        for number, (label, folder) in enumerate(zip(present, folders, strict=True))
    }


def _naming(
    rows: ExportedRows, folders: dict[int, str], extension: str, *, ignore_case: bool
) -> Callable[[int, str], str]:
    """A function that gives the file of a row, relative to DEST, by its position and its path."""
    classes = rows.manifest.classes

    def stem(position: int, path: str) -> str:
        if rows.labels is None or not folders:
            return file_name(path, None)
        label = int(rows.labels[position])
        return f"{folders[label]}/{file_name(path, classes[label] if classes is not None else None)}"

    stems = (stem(position, path) for position, path in rows.paths())
    doubles = repeated(stems, len(rows), ignore_case=ignore_case)

    def name_of(position: int, path: str) -> str:
        name = stem(position, path)
        return f"{numbered(name, position) if position in doubles else name}.{extension}"

    return name_of


def _write_table(storage: LocalStorage, rows: ExportedRows, name_of: Callable[[int, str], str]) -> None:
    temporary = storage.temporary(TABLE)
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file_name", *column_names([column.name for column in rows.columns], "file_name")])
            table.writerows([name_of(position, path), *rows.label(position)] for position, path in rows.paths())
            file.flush()
            os.fsync(file.fileno())
        storage.publish(temporary, TABLE)
    finally:
        storage.discard(temporary)
