"""The names of a dataset's files in OUT, and how to tell them from foreign and unfinished files."""

from __future__ import annotations

import posixpath
import re

from ..config import TRAIN
from ..errors import FormatError, StorageError
from ..storage.base import Storage
from ..storage.holders import PRIVATE

MANIFEST = "dataset.json"
INDEX = "index.npz"
REJECTS = "rejects.jsonl"
JOB = f"{PRIVATE}/job.json"
PLAN = f"{PRIVATE}/plan.npz"
REPORT = f"{PRIVATE}/report.json"
COMMITS = f"{PRIVATE}/commits"
_FLAT_SHARDS = 10_000
_SHARDS_A_FOLDER = 1000
_SHARD = re.compile(r"shard-\d{5,}\.npz")
_BEGUN = re.compile(r"\.?shard-\d{5,}\.(npz|json)(\..+\.(tmp|old))?")  # a shard or its record, finished or not
_RECORD = re.compile(r"shard-\d{5,}\.json")
_FOLDER = re.compile(r"\d{2,}")


def shard_name(shard: int, shards: int) -> str:
    """The path of a shard in OUT. Datasets of more than 10,000 shards have folders of 1,000 shards."""
    width = max(5, len(str(shards - 1)))
    name = f"shard-{shard:0{width}}.npz"
    return name if shards <= _FLAT_SHARDS else f"{shard // _SHARDS_A_FOLDER:0{width - 3}}/{name}"


def commit_name(shard: int, shards: int) -> str:
    """The path of a shard's commit record in OUT."""
    return f"{COMMITS}/{shard_name(shard, shards).removesuffix('.npz')}.json"


def shard_files(storage: Storage) -> list[str]:
    """The paths of all files in OUT that have the name of a shard, sorted."""
    folders = ["", *_numbered(storage, "")]
    return [
        posixpath.join(folder, name) for folder in folders for name in storage.names(folder) if _SHARD.fullmatch(name)
    ]


def commit_files(storage: Storage) -> list[str]:
    """The paths of all commit records in OUT, folder by folder."""
    names = []
    for folder in (COMMITS, *_numbered(storage, COMMITS)):
        names += [f"{folder}/{name}" for name in storage.names(folder) if _RECORD.fullmatch(name)]
    return names


def is_unbuilt(storage: Storage) -> bool:
    """Whether OUT contains no shard, and no temporary file of a shard that a killed build left behind."""
    names = (name for folder in _folders(storage) for name in storage.names(folder))
    return storage.size(MANIFEST) is None and not any(map(_BEGUN.fullmatch, names))


def require_own(storage: Storage) -> None:
    """Raises StorageError if OUT contains files but no dataset: a build must not write to a mistyped OUT."""
    foreign = [name for name in storage.names() if name != PRIVATE]
    if foreign and storage.size(JOB) is None and storage.size(MANIFEST) is None:
        raise StorageError(
            f"{storage.root!r} is not empty and is not a gpu-npz dataset ({foreign[0]!r}, ...); choose a new or "
            "empty folder"
        )


def sides_of_split(storage: Storage) -> list[str]:
    """The folders in OUT that contain the datasets of a split, train first; empty if OUT is not a split."""

    def begun(side: str) -> bool:
        return any(storage.size(f"{side}/{file}") is not None for file in (JOB, MANIFEST))

    # Checked before the names are listed, which is slow for a folder of a million images.
    if not begun(TRAIN):
        return []
    return [TRAIN, *sorted(name for name in storage.names() if "." not in name and name != TRAIN and begun(name))]


def refuse_several(storage: Storage) -> None:
    """Raises FormatError if OUT contains the datasets of a split, each in its own folder."""
    if sides := sides_of_split(storage):
        raise FormatError(
            f"{storage.root!r} is not a dataset, but holds {', '.join(sides)}; give one of them, such as "
            f"{storage.path(sides[0])!r}"
        )


def remove_temporaries(storage: Storage) -> None:
    """Removes temporary files that killed builds left behind. The caller must hold the lock."""
    for folder in _folders(storage):
        storage.remove_temporaries(folder)


def clear(storage: Storage) -> None:
    """Removes the files that builds made, and no others. The caller must hold the lock.

    The manifest is removed first, since the rest is no longer a dataset, and the job last, since it marks OUT as ours.
    """
    remove_temporaries(storage)
    files = [*commit_files(storage), *shard_files(storage)]
    for name in (MANIFEST, *files, INDEX, REJECTS, REPORT, PLAN, JOB):
        storage.remove(name)
    for folder in {posixpath.dirname(name) for name in files} - {""}:
        if not storage.names(folder):
            storage.remove(folder)


def _folders(storage: Storage) -> list[str]:
    """All folders that a build writes to."""
    return ["", PRIVATE, COMMITS, *_numbered(storage, ""), *_numbered(storage, COMMITS)]


def _numbered(storage: Storage, parent: str) -> list[str]:
    """The folders of 1,000 shards or records in `parent`, excluding links and folders that are datasets."""
    paths = [posixpath.join(parent, name) for name in storage.names(parent) if _FOLDER.fullmatch(name)]
    return [path for path in paths if storage.is_folder(path) and not {PRIVATE, MANIFEST} & set(storage.names(path))]
