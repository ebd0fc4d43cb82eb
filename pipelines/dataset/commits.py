"""Commit records. A record is written after its shard is complete, so its existence proves that the shard is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import FormatError
from ..sources.rejects import Reject
from ..storage.base import Storage
from .job import Job
from .layout import commit_files, commit_name, shard_name
from .records import from_json, to_json

_READERS = 16  # an object store takes tens of milliseconds to answer a request
Count = Annotated[int, Field(ge=0, lt=2**63)]


class CommitRecord(BaseModel):
    """The record of a shard, written after the shard is complete and has its final name.

    Attributes:
        version: the version of this record.
        id: the id of the dataset.
        shard: the number of the shard.
        rows: the number of rows in the shard.
        bytes: the size of the shard's file.
        digest: the SHA-256 of the shard's ZIP directory, which contains the CRC-32 of every member, in hexadecimal.
        provenance: the decoder that made the shard, with its versions; its key in JSON is `environment`.
        rejects: the rejects of the shard.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    id: str
    shard: int
    rows: int
    bytes: int
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    provenance: dict[str, Any] = Field(alias="environment")
    rejects: tuple[Reject, ...]


def commit(storage: Storage, record: CommitRecord, shards: int) -> None:
    """Writes the record of a complete shard; `shards` is the number of shards in the dataset."""
    storage.write(commit_name(record.shard, shards), to_json(record))


def committed(storage: Storage, job: Job, *, whole: bool = True) -> dict[int, CommitRecord]:
    """Reads the commit records of this job, by shard number.

    Args:
        storage: OUT.
        job: the job of OUT.
        whole: whether to leave out the records of shards whose file is missing or does not have the recorded size.

    Raises:
        FormatError: a record is damaged.
    """
    shards = job.plan.shard_count
    known = set(commit_files(storage))
    found = [shard for shard in range(shards) if commit_name(shard, shards) in known]

    def look(shard: int) -> CommitRecord | None:
        name = commit_name(shard, shards)
        items = len(job.plan.shard_range(shard))
        record = from_json(CommitRecord, storage.read(name) or b"", storage.path(name), items)
        lost = whole and storage.size(shard_name(shard, shards)) != record.bytes
        if record.id != job.record.id or record.shard != shard or lost:
            return None
        _require_complete(record, job, storage.path(name))
        return record

    with ThreadPoolExecutor(_READERS) as pool:
        return {record.shard: record for record in pool.map(look, found) if record is not None}


def _require_complete(record: CommitRecord, job: Job, label: str) -> None:
    """Raises FormatError unless the rows and rejects in the record account for every item of the shard."""
    items, rejects = job.plan.shard_range(record.shard), {reject.index for reject in record.rejects}
    rows = len(items) - (0 if job.settings.on_reject == "blank" else len(rejects))
    if record.rows != rows or len(rejects) != len(record.rejects) or not all(index in items for index in rejects):
        raise FormatError(
            f"{label}: rows and rejects are not the shard's {len(items)} items; delete the file to rebuild"
        )
