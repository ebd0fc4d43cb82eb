"""Exports a dataset as WebDataset: tars of samples, whose files share their name up to its first dot.

See https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .arrays import Progress
from .encoder import Encoder
from .names import column_names
from .place import new_folder
from .rows import ExportedRows, Sample, in_order


def write_tars(
    rows: ExportedRows,
    dest: str,
    encoder: Encoder,
    samples: int,
    content: dict[str, Any],
    threads: int,
    progress: Progress,
) -> int:
    """Writes the rows to `shard-000000.tar` and so on, and returns how many rows are in tars that were there already.

    The key of a sample is its number. Its files: the image; `cls` with the number of the class, or the whole number
    that is the label; `json` with the row's `path` and, under the name of each label column, the name of the class or
    the number (`class` is the name of an only column of classes).

    Args:
        rows: the rows.
        dest: the folder.
        encoder: makes a file of a stored image.
        samples: how many samples a tar has.
        content: as for `new_folder`.
        threads: how many threads encode.
        progress: called with the number of rows done and the total number of rows.

    Raises:
        FormatError: a shard is missing or damaged.
        StorageError: the folder has other files, or cannot be written.
        MismatchError: the folder has been begun with other content.
    """
    there = 0
    with new_folder(dest, content) as storage, ThreadPoolExecutor(threads, "gpu-npz-export") as pool:
        for number, start in enumerate(range(0, len(rows), samples)):
            stop = min(start + samples, len(rows))
            name = f"shard-{number:06d}.tar"
            if storage.size(name) is not None:
                there += stop - start
                progress(stop, len(rows))
                continue
            found = in_order(pool, lambda sample: encoder(sample.image()), rows.samples(start, stop), 2 * threads)
            temporary = storage.temporary(name)
            try:
                with storage.explained(name), open(temporary, "wb") as file:
                    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                        for sample, image in found:
                            _add_sample(tar, rows, sample, encoder.extension, image)
                            progress(sample.position + 1, len(rows))
                    file.flush()
                    os.fsync(file.fileno())
                storage.publish(temporary, name)
            finally:
                storage.discard(temporary)
    return there


def _add_sample(tar: tarfile.TarFile, rows: ExportedRows, sample: Sample, extension: str, image: bytes) -> None:
    names = column_names([column.name for column in rows.columns], "path")
    columns = zip(names, rows.label(sample.position), strict=True)
    files = {extension: image}
    if rows.by_class and rows.labels is not None:
        files["cls"] = str(int(rows.labels[sample.position])).encode()
    files["json"] = json.dumps({"path": sample.path} | dict(columns)).encode()
    for name, data in files.items():
        info = tarfile.TarInfo(f"{sample.position:09d}.{name}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
