"""What OUT is being built from: plan, settings and backend, decided once and stored in OUT/.gpu-npz."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import MAX_SIDE, BuildConfig
from .environment import BackendName, Choice
from .errors import FormatError, MismatchError
from .normalize import row_shape
from .npz.reader import Known, NpzReader
from .npz.writer import NpzWriter
from .output import JOB, PLAN
from .plan import Plan
from .storage import Storage

Record = TypeVar("Record", bound=BaseModel)


class JobRecord(BaseModel):
    """The content of job.json."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    id: str
    settings: dict[str, Any]
    backend: BackendName
    device: Literal["cpu", "cuda"]
    source_kind: str
    source_location: str
    class_names: tuple[str, ...] | None
    image_size: tuple[Annotated[int, Field(ge=1, le=MAX_SIDE)], Annotated[int, Field(ge=1, le=MAX_SIDE)]]
    items: int = Field(ge=1)
    shard_rows: int = Field(ge=1)
    plan_digest: str


@dataclass(frozen=True)
class Job:
    """A plan with everything that decides what its shards hold."""

    record: JobRecord
    plan: Plan
    settings: BuildConfig

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """The shape of one stored image."""
        return row_shape(self.settings, *self.record.image_size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of stored images."""
        return np.dtype(self.settings.dtype)

    @property
    def labelled(self) -> bool:
        """Whether shards have labels."""
        return self.record.class_names is not None

    def comment(self, shard: int) -> str:
        """The end comment of a shard's file, which tells it from others."""
        return shard_comment(self.record.id, shard)

    @classmethod
    def create(
        cls,
        storage: Storage,
        plan: Plan,
        config: BuildConfig,
        choice: Choice,
        *,
        source: tuple[str, str],
        class_names: Sequence[str] | None,
        image_size: tuple[int, int],
    ) -> Job:
        """Stores a new plan; from now on, this is what OUT is.

        Args:
            storage: OUT.
            plan: the items.
            config: its identity settings are kept.
            choice: the backend, decided for the whole build.
            source: kind and location of SRC.
            class_names: by number; None where there are no labels.
            image_size: height and width of every image.
        """
        settings, digest = config.identity(), plan.digest()
        names = None if class_names is None else tuple(class_names)
        record = JobRecord(
            id=dataset_id(settings, names, image_size, digest),
            settings=settings,
            backend=choice.backend,
            device=choice.device,
            source_kind=source[0],
            source_location=source[1],
            class_names=names,
            image_size=image_size,
            items=plan.item_count,
            shard_rows=plan.shard_rows,
            plan_digest=digest,
        )
        store_arrays(storage, PLAN, plan.arrays, f"gpu-npz plan {record.id}")
        storage.write(JOB, to_json(record))  # last: its presence means that the plan is whole
        return cls.open(storage)

    @classmethod
    def open(cls, storage: Storage) -> Job:
        """The job that OUT was begun with.

        Raises:
            FormatError: there is none, or it is damaged.
        """
        content = storage.read(JOB)
        if content is None:
            raise FormatError(f"{storage.path(JOB)!r} is missing; {storage.root!r} was not begun by gpu-npz build")
        label = storage.path(JOB)
        record = from_json(JobRecord, content, label)
        if record.id != dataset_id(record.settings, record.class_names, record.image_size, record.plan_digest):
            raise FormatError(
                f"{label}: its id is not that of its settings; the file was altered. --overwrite starts anew"
            )
        try:
            reader = open_npz(storage, PLAN)
        except OSError as exc:
            raise FormatError(f"{storage.path(PLAN)!r}: {exc.strerror}; run the build again with --overwrite") from exc
        plan = Plan({name: reader[name] for name in reader.directory.members}, record.shard_rows)
        if plan.item_count != record.items:
            raise FormatError(f"{storage.path(PLAN)!r} has {plan.item_count} items, job.json says {record.items}")
        return cls(record, plan, BuildConfig(**record.settings))

    def require_same(self, config: BuildConfig, class_names: Sequence[str] | None) -> None:
        """Compares what a resuming build asks for.

        Args:
            config: the settings of the resuming build.
            class_names: its classes by number.

        Raises:
            MismatchError: it would make other shards; every difference is named.
        """
        asked, stored = config.identity(), self.settings.identity()
        if asked["size"] is None:
            asked["size"] = stored["size"]
        if asked["normalize"] == "dataset" and asked["mean"] is None:  # they were measured when it began
            asked |= {name: stored[name] for name in ("mean", "std")}
        differences = [
            f"  {name.replace('_', '-')}: {stored[name]} there, {asked[name]} asked for"
            for name in stored
            if asked[name] != stored[name]
        ]
        if (class_names is None) != (self.record.class_names is None) or (
            config.classes_from and tuple(class_names or ()) != self.record.class_names
        ):
            differences.append(f"  classes: {_names(self.record.class_names)} there, {_names(class_names)} asked for")
        if differences:
            raise MismatchError(
                "OUT was begun with other settings:\n" + "\n".join(differences) + "\n"
                "give the same settings to resume, another OUT, or --overwrite to start anew"
            )


def dataset_id(
    settings: dict[str, Any], class_names: Sequence[str] | None, image_size: tuple[int, int], plan_digest: str
) -> str:
    """What tells a dataset from others: SHA-256, cut to 32 digits, over everything but the decoder that decides it."""
    identity = json.dumps([1, settings, class_names, image_size, plan_digest], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def shard_comment(dataset_id: str, shard: int) -> str:
    """The end comment of a shard's file."""
    return f"gpu-npz 1 dataset={dataset_id} shard={shard}"


def index_comment(dataset_id: str) -> str:
    """The end comment of index.npz."""
    return f"gpu-npz 1 dataset={dataset_id} index"


def store_arrays(storage: Storage, name: str, arrays: Mapping[str, NDArray[Any]], comment: str) -> None:
    """Writes a whole NPZ in one step: it is there whole or not at all."""
    temporary = storage.temporary(name)
    try:
        with storage.explained(name), NpzWriter(temporary) as file:
            for member, array in arrays.items():
                file.add(member, array)
            file.close(comment)
        storage.publish(temporary, name)
    finally:
        storage.discard(temporary)


def open_npz(storage: Storage, name: str, before: Known | None = None) -> NpzReader:
    """An NPZ of OUT, mapped; errors name it by its place in OUT. Raises OSError if it cannot be opened.

    `before` is as for `NpzReader`.
    """
    with storage.local(name) as path:
        try:
            reader = NpzReader(path, before)
        except FormatError as exc:
            raise FormatError(str(exc).replace(path, storage.path(name))) from exc
    reader.path = storage.path(name)
    return reader


def to_json(record: BaseModel) -> bytes:
    """A record as indented JSON in ASCII; names that are not UTF-8 become escaped lone surrogates."""
    return (json.dumps(record.model_dump(), indent=1) + "\n").encode("ascii")


def from_json(kind: type[Record], content: bytes, label: str) -> Record:
    """A record from JSON; unknown keys are ignored.

    Raises:
        FormatError: not JSON, or not such a record.
    """
    try:
        return kind(**json.loads(content))
    except (ValueError, TypeError, ValidationError, RecursionError) as exc:
        text = "; ".join(str(exc).splitlines()[:3])
        raise FormatError(f"{label}: {text}; the file is damaged") from exc


def _names(names: Sequence[str] | None) -> str:
    return "no labels" if names is None else f"{len(names)} classes ({', '.join(names[:3])}, ...)"
