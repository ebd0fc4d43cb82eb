"""The files that complete a dataset: rejects.jsonl, index.npz and, last, the manifest dataset.json."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..config import BuildConfig
from ..errors import FormatError, IncompleteError, MismatchError, UsageError
from ..preprocess.normalize import statistics
from ..sources.base import LabelColumn, as_text
from ..sources.rejects import Reject
from ..storage import open_storage
from ..storage.base import Storage, is_remote
from .commits import CommitRecord, Count, committed
from .identity import index_comment
from .job import Job
from .layout import INDEX, JOB, MANIFEST, REJECTS, refuse_several
from .records import MAX_JSON_BYTES, from_json, loads, read_json, store_arrays, to_json

FORMAT_VERSION = 1
_KNOWN = ("deflate",)  # the entries of `requires` that this version supports


_REJECT = TypeAdapter(Reject)


class Images(BaseModel):
    """The format of stored images.

    Attributes:
        shape: the shape of one image, without the batch axis: (C, H, W) or (H, W, C).
        dtype: the dtype.
        layout: the order of the axes, with the batch axis.
        channels: the order of the color channels, or `gray`.
    """

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, int, int]
    dtype: str
    layout: Literal["NCHW", "NHWC"]
    channels: Literal["rgb", "bgr", "gray"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.shape[1:] if self.layout == "NCHW" else self.shape[:2]
        return height, width


class Normalization(BaseModel):
    """The normalization of stored channels: a float value is (pixel / white - mean) / std, with white 255 or 65535.

    Readers apply it to stored pixels. The manifest has none for kinds of normalization without mean and std. The
    settings name the kind, and `preprocess/normalize.py` contains the formulas.

    Attributes:
        mean: the mean of each stored channel, for pixels scaled to 0..1.
        std: the standard deviation of each stored channel, for pixels scaled to 0..1.
    """

    model_config = ConfigDict(frozen=True)

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Counts(BaseModel):
    """The size of a dataset.

    Attributes:
        items: the number of items in the plan.
        rows: the number of rows in all shards.
        rejects: the number of rejected items.
        rejects_by_code: the number of rejected items by code.
        shards: the number of shards.
    """

    model_config = ConfigDict(frozen=True)

    items: Count
    rows: Count
    rejects: Count
    rejects_by_code: dict[str, Count]
    shards: Count


class Manifest(BaseModel):
    """The content of dataset.json. Readers ignore unknown keys and refuse unknown entries of `requires`.

    Attributes:
        format: the name of the format.
        version: the version of the format.
        requires: features that a reader must support.
        id: the id of the dataset.
        images: the format of stored images.
        normalization: the mean and std that readers apply; None for kinds of normalization without them.
        counts: the numbers of items, rows, rejects and shards.
        classes: the names of classes by number; None if labels are not classes of one column.
        columns: the label columns, unless `classes` describes the only one.
        shard_items: the number of items per shard.
        plan_digest: the digest of the plan.
        shard_table_digest: the SHA-256 of the shards' row counts, sizes and digests.
        rejects_digest: the SHA-256 of rejects.jsonl.
        settings: the identity settings of the build.
        environments: the provenance of the shards; more than one if environments were mixed.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["gpu-npz"] = "gpu-npz"
    version: int = FORMAT_VERSION
    requires: tuple[str, ...] = ()
    id: str
    images: Images
    normalization: Normalization | None = None
    counts: Counts
    classes: tuple[str, ...] | None
    columns: tuple[LabelColumn, ...] = ()
    shard_items: int
    plan_digest: str
    shard_table_digest: str
    rejects_digest: str
    settings: dict[str, Any]
    environments: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Loads the manifest of a finished dataset.

        Args:
            folder: the dataset, as a path or URL.

        Raises:
            IncompleteError: the build has not finished yet.
            FormatError: `folder` is not a dataset, is damaged, or was made by a later version.
        """
        storage = open_storage(folder, only_read=True)
        content = read_json(storage, MANIFEST)
        if content is None:
            raise _no_manifest(storage)
        label = storage.path(MANIFEST)
        try:
            head = loads(content)
            version, requires = int(head["version"]), list(head.get("requires", []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
            what = exc if isinstance(exc, ValueError) else repr(exc)  # a KeyError's text is only the key
            raise FormatError(f"{label}: {what}; not a gpu-npz dataset, or damaged") from exc
        unknown = [name for name in requires if name not in _KNOWN]
        if version > FORMAT_VERSION or unknown:
            wanted = f"format version {version}" + (f" with {unknown}" if unknown else "")
            raise FormatError(f"{label}: {wanted} is newer than this gpu-npz, which reads 1; install a newer gpu-npz")
        return from_json(cls, content, label)

    @property
    def labelled(self) -> bool:
        """Whether the shards contain labels."""
        return self.classes is not None or bool(self.columns)

    @property
    def deflated(self) -> bool:
        """Whether the images in shards are deflated."""
        return "deflate" in self.requires

    @property
    def config(self) -> BuildConfig:
        """The settings of the build. Raises FormatError if they are invalid."""
        resizer = "simd" if any("resizer" in made for made in self.environments) else "pillow"
        known = {name: value for name, value in self.settings.items() if name in BuildConfig.model_fields}
        try:
            return BuildConfig(**known, resizer=resizer)
        except UsageError as exc:
            raise FormatError(f"{MANIFEST}: settings: {'; '.join(str(exc).splitlines())}; it is damaged") from exc


def class_list(classes_from: str | None) -> tuple[str, ...] | None:
    """Reads class names, by number, from a finished dataset or from a text file with one name per line.

    Args:
        classes_from: the path or URL of the dataset, or the path of the text file; if None, the result is None as well.

    Raises:
        UsageError: the text file cannot be read, there are no classes, or a name occurs twice.
        IncompleteError, FormatError: as for `Manifest.load`.
    """
    if classes_from is None:
        return None
    path, option = Path(classes_from), f"--classes-from {classes_from!r}"
    if is_remote(classes_from) or path.is_dir():
        manifest = Manifest.load(classes_from)
        if manifest.classes is None:
            found = f"labels {', '.join(map(str, manifest.columns))}, no classes" if manifest.columns else "no labels"
            raise UsageError(f"{option}: that dataset has {found}; omit the option")
        return manifest.classes
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise OSError(errno.EFBIG, f"more than {MAX_JSON_BYTES} bytes")
        lines = as_text(content).split("\n")
    except OSError as exc:
        raise UsageError(
            f"{option}: {exc.strerror}; give a finished dataset or a text file with one name per line"
        ) from exc
    names = tuple(line.removesuffix("\r") for line in lines if line.strip())
    doubles = [name for name, count in Counter(names).items() if count > 1]
    if doubles or not names:
        fault = f"names {doubles[0]!r} twice" if doubles else "names no class"
        raise UsageError(f"{option} {fault}; list each class once, one name per line")
    return names


def write_rejects(storage: Storage, records: Iterable[CommitRecord]) -> str:
    """Writes rejects.jsonl, with one line per reject in plan order. Returns the SHA-256 of the file, in hexadecimal."""
    lines = (json.dumps(reject.to_json()) + "\n" for record in records for reject in record.rejects)
    content = "".join(lines).encode("ascii")
    storage.write(REJECTS, content)
    return hashlib.sha256(content).hexdigest()


def reject_of(line: bytes) -> Reject:
    """Parses a line of rejects.jsonl. Raises ValueError if it is not a reject."""
    try:
        return _REJECT.validate_python(json.loads(line))
    except RecursionError as exc:
        raise ValueError(str(exc)) from exc
    except ValidationError as exc:
        raise ValueError("; ".join(str(exc).splitlines()[:3])) from exc


def finish(storage: Storage, job: Job, records: Sequence[CommitRecord]) -> Manifest:
    """Writes the files that complete the dataset in OUT, the manifest last.

    Args:
        storage: OUT.
        job: the job of OUT.
        records: the commit records of all shards, in order.
    """
    rejects_digest = write_rejects(storage, records)
    index = _index(job, records)
    store_arrays(storage, INDEX, index, index_comment(job.record.id))
    manifest = _manifest(job, records, index, rejects_digest)
    storage.write(MANIFEST, to_json(manifest))
    return manifest


def publish(storage: Storage, job: Job, records: Mapping[int, CommitRecord], config: BuildConfig) -> bool:
    """Completes a dataset whose shards are all built, unless it has too many rejects.

    Args:
        storage: OUT.
        job: the job of OUT.
        records: the commit records of all shards, by shard number.
        config: only `max_rejects` and `accept_environment` are used.

    Returns:
        Whether the dataset is complete.

    Raises:
        MismatchError: shards differ in provenance, and `accept_environment` is not set.
    """
    if all(storage.size(name) is not None for name in (MANIFEST, INDEX, REJECTS)) and _is_of(storage, job):
        return True
    ordered = [records[shard] for shard in range(job.plan.shard_count)]
    made_with = {json.dumps(record.provenance, sort_keys=True): record.shard for record in ordered}
    if len(made_with) > 1 and not config.accept_environment:
        raise MismatchError(
            "the shards were built in several environments, whose pixels may differ:\n"
            + "\n".join(f"  shard {shard}, for one: {made}" for made, shard in made_with.items())
            + "\nadd --accept-environment to mix them, or start over with --overwrite"
        )
    rejects = sum(len(record.rejects) for record in ordered)
    if rejects > config.reject_limit(job.plan.item_count):
        write_rejects(storage, ordered)
        return False
    finish(storage, job, ordered)
    return True


def so_far(storage: Storage) -> tuple[Manifest, dict[str, NDArray[Any]], list[int]]:
    """Describes the committed shards of a build that may be unfinished.

    Returns:
        The manifest and the index that `finish` would write for these shards alone, and their numbers.

    Raises:
        FormatError: OUT was not begun by a build, or is damaged.
    """
    job = Job.open(storage)
    records = committed(storage, job)
    ordered = [records[shard] for shard in sorted(records)]
    index = _index(job, ordered)
    return _manifest(job, ordered, index, ""), index, sorted(records)


def _is_of(storage: Storage, job: Job) -> bool:
    """Whether the manifest belongs to the job. Also true if it is damaged, which `gpu-npz verify --repair` fixes."""
    try:
        return Manifest.load(storage.root).id == job.record.id
    except FormatError:
        return True


def _manifest(job: Job, records: Sequence[CommitRecord], index: Any, rejects_digest: str) -> Manifest:
    rejects = [reject for record in records for reject in record.rejects]
    found = statistics(job.settings)
    provenances = {json.dumps(record.provenance, sort_keys=True): record.provenance for record in records}
    return Manifest(
        requires=() if job.settings.deflate_level is None else ("deflate",),
        id=job.record.id,
        images=Images(
            shape=job.row_shape,
            dtype=job.settings.dtype,
            layout=job.settings.layout,
            channels=job.settings.channels,
        ),
        normalization=found and Normalization(mean=tuple(map(float, found[0])), std=tuple(map(float, found[1]))),
        counts=Counts(
            items=sum(len(job.plan.shard_range(record.shard)) for record in records),
            rows=sum(record.rows for record in records),
            rejects=len(rejects),
            rejects_by_code=dict(sorted(Counter(reject.code for reject in rejects).items())),
            shards=job.plan.shard_count,
        ),
        classes=job.record.class_names,
        columns=job.record.columns,
        shard_items=job.plan.shard_rows,
        plan_digest=job.record.plan_digest,
        shard_table_digest=shard_table_digest(index),
        rejects_digest=rejects_digest,
        settings=job.record.settings,
        environments=tuple(provenances[key] for key in sorted(provenances)),
    )


def shard_table_digest(index: Any) -> str:
    """The SHA-256, in hexadecimal, of the row counts, sizes and digests of all shards, as stored in index.npz."""
    digest = hashlib.sha256()
    for name in ("shard_rows", "shard_bytes", "shard_digest"):
        digest.update(np.ascontiguousarray(index[name]).tobytes())
    return digest.hexdigest()


def _index(job: Job, records: Sequence[CommitRecord]) -> dict[str, NDArray[Any]]:
    held = np.zeros(job.plan.item_count, bool)
    for record in records:
        span = job.plan.shard_range(record.shard)
        held[span.start : span.stop] = True
    valid = held.copy()
    valid[[reject.index for record in records for reject in record.rejects]] = False
    blank = job.settings.on_reject == "blank"
    rows = np.flatnonzero(held if blank else valid)
    index: dict[str, NDArray[Any]] = {"index": rows.astype(np.int64)}
    if job.labelled:
        index["labels"] = job.label_array(job.plan.labels()[rows])
    if blank:
        index["valid"] = valid[rows]
    index["shard_rows"] = np.array([record.rows for record in records], np.int64)
    index["shard_bytes"] = np.array([record.bytes for record in records], np.int64)
    digests = b"".join(bytes.fromhex(record.digest) for record in records)
    index["shard_digest"] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return index


def _no_manifest(storage: Storage) -> IncompleteError | FormatError:
    if storage.size(JOB) is None:
        refuse_several(storage)
        exists = is_remote(storage.root) or os.path.exists(storage.root)
        why = f"{MANIFEST} is missing" if exists else "it does not exist"
        return FormatError(f"{storage.root!r} is not a dataset ({why}); give the OUT of a build")
    job = Job.open(storage)
    done, shards = len(committed(storage, job)), job.plan.shard_count
    more = ", with a higher --max-rejects if it requires one" if done == shards else ""
    return IncompleteError(
        f"{storage.root!r} is not complete: {done} of {shards} shards; run the same gpu-npz build again{more}"
    )
