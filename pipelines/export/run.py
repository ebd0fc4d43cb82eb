"""`export_dataset`: a finished dataset in the format of other tools."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import StorageError, UsageError
from ..machine.environment import usable_cpus
from ..storage import open_storage
from ..storage.base import is_remote
from .arrays import write_npy, write_npz
from .encoder import Encoder, ImageFormat
from .folder import write_folder
from .rows import ExportedRows
from .webdataset import write_tars

Kind = Literal["npz", "npy", "folder", "webdataset"]
_LEAST_THREADS = 4  # they also wait for the disk


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: DEST.
        kind: the format.
        images: how many images DEST has.
        existing: how many of them an earlier export had written.
        blank: how many rows were left out because `--on-reject blank` left them empty.
    """

    path: str
    kind: Kind
    images: int
    existing: int
    blank: int

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)


def export_dataset(
    out: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    kind: Kind,
    *,
    keys: tuple[str, str] = ("images", "labels"),
    image_format: ImageFormat = "png",
    quality: int = 95,
    samples: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Copies a finished dataset into the format of other tools.

    `npz` and `npy` have the values as stored, in the dataset's layout. `folder` and `webdataset` have images, whose
    pixels are recovered exactly from the stored values. Files appear under their names when they are whole. An export
    to a folder that was stopped is completed by the same call; nothing is overwritten.

    Args:
        out: the dataset's folder.
        dest: the file, which ends with .npz or .npy, or the folder to make.
        kind: `npz`: one file with the arrays images, labels and paths; `npy`: one file with the images, and
            NAME-labels.npy beside it; `folder`: a file per image in class folders; `webdataset`: tars of samples.
        keys: for `npz`: the names of the images and the labels.
        image_format: for `folder` and `webdataset`.
        quality: the quality of JPEG files, 1 to 100.
        samples: for `webdataset`: how many samples a tar has.
        progress: called with the number of images done and the total number of images.

    Raises:
        UsageError: an argument is not allowed, the dataset has no rows, or pixels cannot be recovered.
        IncompleteError: the build has not finished.
        FormatError: `out` is not a dataset, or is damaged.
        StorageError: `dest` exists or cannot be written, or one of the two is not on a disk.
        MismatchError: `dest` is another export that was begun.
        LockedError: another export writes to `dest`.
    """
    if is_remote(dest):
        raise StorageError(
            f"DEST {os.fspath(dest)!r}: exports are written to a disk; export there, then copy the result"
        )
    place = open_storage(dest).root
    if kind in ("npz", "npy") and not place.endswith(f".{kind}"):
        raise UsageError(f"DEST {place!r}: --as {kind} makes one file, whose name must end with .{kind}")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality: got {quality}; allowed: 1 to 100")
    if samples < 1:
        raise UsageError(f"--shard-size: got {samples}; allowed: a positive number")
    rows, existing = ExportedRows(out), 0
    root = os.path.realpath(rows.path)
    if os.path.commonpath([root, os.path.realpath(place)]) == root:
        raise UsageError(f"DEST {place!r} lies inside the dataset; choose a place outside of {rows.path!r}")
    step = progress or _silent
    if kind == "npz":
        write_npz(rows, place, keys, step)
    elif kind == "npy":
        write_npy(rows, place, step)
    else:
        encoder = Encoder(rows.manifest, image_format, quality)
        content = {
            "dataset": rows.manifest.id,
            "shards": rows.manifest.shard_table_digest,
            "as": kind,
            "format": image_format,
            "quality": quality if image_format == "jpeg" else None,
        }
        threads = max(_LEAST_THREADS, usable_cpus())
        if kind == "folder":
            existing = write_folder(rows, place, encoder, content, threads, step)
        else:
            content["shard-size"] = samples
            existing = write_tars(rows, place, encoder, samples, content, threads, step)
    return Exported(place, kind, len(rows), existing, rows.blank)


def _silent(done: int, total: int) -> None:
    pass
