"""Which files a build makes in OUT, under which names, and how they are told from foreign and unfinished ones."""

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
_BEGUN = re.compile(r"\.?shard-\d{5,}\.(npz|json)(\..+\.(tmp|old))?")  # a shard or its record, also an unfinished one
_RECORD = re.compile(r"shard-\d{5,}\.json")
_FOLDER = re.compile(r"\d{2,}")


def shard_name(shard: int, shards: int) -> str:
    """Where a shard lies in OUT; above 10,000 shards in folders of 1,000."""
    width = max(5, len(str(shards - 1)))
    name = f"shard-{shard:0{width}}.npz"
    return name if shards <= _FLAT_SHARDS else f"{shard // _SHARDS_A_FOLDER:0{width - 3}}/{name}"


def commit_name(shard: int, shards: int) -> str:
    """Where a shard's commit record lies in OUT."""
    return f"{COMMITS}/{shard_name(shard, shards).removesuffix('.npz')}.json"


def shard_files(storage: Storage) -> list[str]:
    """Every file in OUT that has a shard's name, sorted."""
    folders = ["", *_numbered(storage, "")]
    return [
        posixpath.join(folder, name) for folder in folders for name in storage.names(folder) if _SHARD.fullmatch(name)
    ]


def commit_files(storage: Storage) -> list[str]:
    """Every commit record in OUT."""
    names = []
    for folder in (COMMITS, *_numbered(storage, COMMITS)):
        names += [f"{folder}/{name}" for name in storage.names(folder) if _RECORD.fullmatch(name)]
    return names


def is_unbuilt(storage: Storage) -> bool:
    """Whether no shard of OUT was begun: there is none, and no temporary file of one that a killed build left."""
    names = (name for folder in _folders(storage) for name in storage.names(folder))
    return storage.size(MANIFEST) is None and not any(map(_BEGUN.fullmatch, names))


def require_own(storage: Storage) -> None:
    """Raises StorageError for a folder with files in it that no build made: a mistyped OUT must not be written to."""
    foreign = [name for name in storage.names() if name != PRIVATE]
    if foreign and storage.size(JOB) is None and storage.size(MANIFEST) is None:
        raise StorageError(
            f"{storage.root!r} is not empty and holds no dataset of gpu-npz ({foreign[0]!r}, ...); choose a new or "
            "empty folder"
        )


def refuse_several(storage: Storage) -> None:
    """Raises FormatError for a folder that holds the datasets of a split, each in a folder of its own."""

    def begun(side: str) -> bool:
        return any(storage.size(f"{side}/{file}") is not None for file in (JOB, MANIFEST))

    # Of every folder that somebody takes for a dataset, this is asked; its names may be those of a million images.
    if not begun(TRAIN):
        return
    if sides := [name for name in storage.names() if "." not in name and begun(name)]:
        raise FormatError(
            f"{storage.root!r} is no dataset, but holds {', '.join(sides)}; give one of these, such as "
            f"{storage.path(sides[0])!r}"
        )


def remove_temporaries(storage: Storage) -> None:
    """Removes what killed builds left unfinished. Only for the holder of the lock."""
    for folder in _folders(storage):
        storage.remove_temporaries(folder)


def clear(storage: Storage) -> None:
    """Removes what builds made and nothing else. Only for the holder of the lock.

    The manifest goes first, since what is left is no dataset any more, and the job last: it tells that OUT is our own.
    """
    remove_temporaries(storage)
    files = [*commit_files(storage), *shard_files(storage)]
    for name in (MANIFEST, *files, INDEX, REJECTS, REPORT, PLAN, JOB):
        storage.remove(name)
    for folder in {posixpath.dirname(name) for name in files} - {""}:
        if not storage.names(folder):
            storage.remove(folder)


def _folders(storage: Storage) -> list[str]:
    """Every folder in which a build makes files."""
    return ["", PRIVATE, COMMITS, *_numbered(storage, ""), *_numbered(storage, COMMITS)]


def _numbered(storage: Storage, parent: str) -> list[str]:
    """The folders of 1,000 shards or records in a folder; no links, which lead elsewhere, no datasets of their own."""
    paths = [posixpath.join(parent, name) for name in storage.names(parent) if _FOLDER.fullmatch(name)]
    return [path for path in paths if storage.is_folder(path) and not {PRIVATE, MANIFEST} & set(storage.names(path))]
