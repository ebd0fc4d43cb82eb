"""Calculates the disk space of a dataset and checks whether it is available."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import BuildConfig
from ..errors import StorageError
from ..npz.format import Member, data_offset, directory_bytes
from ..storage.base import is_remote
from ..storage.local import LocalStorage
from .identity import index_comment, shard_comment
from .layout import shard_files
from .plan import Plan

_ID = "0" * 32  # only the length of an id matters here
_OTHER_FILES = 16
_COMMIT_BYTES = 4096  # a record takes one disk block
# The size of a row without its image, in its shard and in index.npz: a path of 64 characters, five numbers, two flags.
_ROW_BYTES = 4 * 64 + 5 * 8 + 2
_SHARD_BYTES = 7 * 4096 + _COMMIT_BYTES  # six members, each padded, the end records, and a commit record
_OTHER_BYTES = 1 << 16


def require_space(
    storage_root: str,
    *,
    rows: int,
    row_bytes: int,
    shards: int,
    dtype: str = "float32",
    pixel_dtype: str = "uint8",
    freed_bytes: int = 0,
) -> None:
    """Raises StorageError if the shards that are not built yet do not fit on OUT's filesystem.

    The required space is overestimated, by 0.2% for uint8 images of 224 x 224 and by less for larger rows. Object
    stores, and filesystems that do not report their free space, are not checked.

    Args:
        storage_root: OUT, which may not exist yet.
        rows: the number of items in the shards that are not built yet.
        row_bytes: the size of a stored image, in bytes.
        shards: the number of shards that are not built yet.
        dtype: the dtype of stored images.
        pixel_dtype: the dtype of pixels that are not normalized; the message says how much space these would take.
        freed_bytes: how many bytes will be deleted from the filesystem first.
    """
    lack = lack_of_space(storage_root, _at_most(rows, row_bytes, shards) - freed_bytes, shards)
    if lack is None:
        return
    item_bytes, pixel_bytes = np.dtype(dtype).itemsize, np.dtype(pixel_dtype).itemsize
    pixels = format_bytes(_at_most(rows, row_bytes * pixel_bytes // item_bytes, shards) - freed_bytes)
    smaller = f"--dtype {pixel_dtype} would take {pixels}; " if item_bytes > pixel_bytes else ""
    raise StorageError(f"{lack}. {smaller}free some space, choose another OUT, or start anyway with --no-preflight")


def output_bytes(plan: Plan, config: BuildConfig, shape: tuple[int, ...], *, label_columns: int) -> int:
    """The size in bytes of all files of an uncompressed dataset without rejects.

    The size of the shards and of index.npz is exact; that of the other files is estimated.

    Args:
        plan: the items and shards.
        config: the settings.
        shape: the shape of a stored image.
        label_columns: the number of label columns; 0 without labels.
    """
    flags = {"valid": bool} if config.on_reject == "blank" else {}

    def labels(rows: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"labels": (np.int64, (rows, label_columns) if label_columns > 1 else (rows,))} if label_columns else {}

    def shard(rows: int, path_characters: int) -> int:
        texts = {"paths": f"<U{max(1, path_characters)}"}
        numbers = {"index": np.int64, "source_bytes": np.int64}
        columns: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (kind, (rows,)) for name, kind in {**texts, **numbers, **flags}.items()
        }
        columns |= labels(rows)
        comment = shard_comment(_ID, plan.shard_count - 1)
        return _npz_bytes({"images": (config.dtype, (rows, *shape)), **columns}, comment)

    *full, last = _path_characters(plan)
    total = shard(len(plan.shard_range(plan.shard_count - 1)), last)
    total += sum(count * shard(plan.shard_rows, characters) for characters, count in Counter(full).items())
    row_columns = {name: (kind, (plan.item_count,)) for name, kind in {"index": np.int64, **flags}.items()} | labels(
        plan.item_count
    )
    numbers = dict.fromkeys(("shard_rows", "shard_bytes"), (np.int64, (plan.shard_count,)))
    index = {**row_columns, **numbers, "shard_digest": (np.uint8, (plan.shard_count, 32))}
    stored_plan = {name: (array.dtype, array.shape) for name, array in plan.arrays.items()}
    return total + _npz_bytes(index, index_comment(_ID)) + _npz_bytes(stored_plan) + 700 * plan.shard_count


def _npz_bytes(arrays: dict[str, tuple[Any, tuple[int, ...]]], comment: str = "") -> int:
    """The size in bytes of an NPZ file with these members, each given by its dtype and shape."""
    members: list[Member] = []
    position = 0
    for name, (dtype, shape) in arrays.items():
        members.append(Member(name, position, data_offset(position, name), np.dtype(dtype), shape, 0))
        position = members[-1].data_offset + members[-1].data_bytes
    return position + len(directory_bytes(members, position, comment))


def _path_characters(plan: Plan) -> Sequence[int]:
    """The length of the longest path of each shard in bytes of UTF-8, an upper bound of its length in characters."""
    names, folders, groups = (
        np.diff(plan.arrays[name], prepend=0) for name in ("name_ends", "folder_ends", "group_ends")
    )
    lengths = names + np.repeat(folders, groups)
    if "order" in plan.arrays:
        lengths = lengths[plan.arrays["order"]]
    found: list[int] = np.maximum.reduceat(lengths, np.arange(0, plan.item_count, plan.shard_rows)).tolist()
    return found


def _at_most(rows: int, row_bytes: int, shards: int) -> int:
    return rows * (row_bytes + _ROW_BYTES) + shards * _SHARD_BYTES + _OTHER_BYTES


def lack_of_space(place: str, needed_bytes: int, shards: int) -> str | None:
    """A message about missing space or inodes on the filesystem of `place`; None if everything fits."""
    free_bytes, free_files = free_space(place)
    if free_bytes is not None and needed_bytes > free_bytes:
        return f"{place!r} needs {format_bytes(needed_bytes)}, and its filesystem has {format_bytes(free_bytes)} free"
    files = 2 * shards + shards // 500 + _OTHER_FILES  # shards, their commit records, and folders of 1,000
    if free_files is not None and files > free_files:
        room = f"its filesystem has room for {free_files}"
        return f"{place!r} needs {files} files, and {room}; a larger --shard-size makes fewer"
    return None


def free_space(place: str) -> tuple[int | None, int | None]:
    """The free bytes and the free inodes on the filesystem of a path, which need not exist; None if not reported."""
    if is_remote(place):
        return None, None
    place = os.path.abspath(place)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    try:
        found = os.statvfs(place)
    except OSError:
        return None, None
    free_bytes = found.f_bavail * found.f_frsize if found.f_blocks else None  # some FUSE filesystems report no blocks
    return free_bytes, found.f_favail if found.f_files else None  # btrfs does not report inodes


def held_bytes(place: str) -> int:
    """The size in bytes of the shards in OUT from an earlier run, which a build keeps or deletes first."""
    if is_remote(place):
        return 0
    storage = LocalStorage(place)
    return sum(storage.size(name) or 0 for name in shard_files(storage))


def format_bytes(number: float) -> str:
    """A number of bytes with a unit, such as `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
