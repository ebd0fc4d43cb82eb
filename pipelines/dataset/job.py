"""The job of OUT: its plan, settings and backend, which are fixed when a build begins and stored in OUT/.gpu-npz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ..config import MAX_SIDE, BuildConfig, Resizer, as_option
from ..errors import FormatError, MismatchError, SourceError
from ..machine.environment import BackendName, Choice
from ..preprocess.normalize import row_shape
from ..sources.base import LabelColumn, Source, label_form
from ..storage.base import Storage
from .identity import dataset_id, shard_comment
from .layout import JOB, PLAN, refuse_several
from .plan import Plan
from .records import from_json, loads, open_npz, read_json, store_arrays, to_json


class JobRecord(BaseModel):
    """The content of job.json.

    Attributes:
        version: the version of this record.
        id: the id of the dataset.
        settings: the identity settings of the build.
        backend: the decoder.
        device: the kind of device that decodes.
        resizer: the library that resizes on the CPU.
        source_kind: `Source.kind`.
        source_location: `Source.location` when the build began.
        source_root: `Source.root`.
        source_files: `Source.files`.
        source_listing: `Source.listing`.
        class_names: the names of classes by number; None if labels are not classes of one column.
        columns: the label columns, unless `class_names` describes the only one.
        image_size: height and width of a stored image, in pixels.
        items: the number of items.
        shard_rows: the number of items per shard.
        plan_digest: the digest of the plan.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    id: str
    settings: dict[str, Any]
    backend: BackendName
    device: Literal["cpu", "cuda"]
    resizer: Resizer = "pillow"  # the only one in older builds
    source_kind: str
    source_location: str
    source_root: str | None = None
    source_files: tuple[tuple[str, int], ...] = ()
    source_listing: str | None = None
    class_names: tuple[str, ...] | None
    columns: tuple[LabelColumn, ...] = ()
    image_size: tuple[Annotated[int, Field(ge=1, le=MAX_SIDE)], Annotated[int, Field(ge=1, le=MAX_SIDE)]]
    items: int = Field(ge=1)
    shard_rows: int = Field(ge=1)
    plan_digest: str


@dataclass(frozen=True)
class Job:
    """A plan, and everything else that determines the content of its shards.

    Attributes:
        record: the content of job.json.
        plan: the items and shards.
        settings: the identity settings and the resizer.
    """

    record: JobRecord
    plan: Plan
    settings: BuildConfig

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """The shape of a stored image: (C, H, W) or (H, W, C)."""
        return row_shape(self.settings, *self.record.image_size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of stored images."""
        return np.dtype(self.settings.dtype)

    @property
    def labelled(self) -> bool:
        """Whether the shards contain labels."""
        return self.record.class_names is not None or bool(self.record.columns)

    def label_array(self, labels: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
        """Converts the labels of N items to the stored form.

        Returns:
            int64 (N,), or (N, K) for K columns; float64 if any column is a float.
        """
        kind, shape = label_form(self.record.columns)
        return np.asarray(labels, kind).reshape(len(labels), *shape)

    def require_source(self, source: Source) -> None:
        """Raises MismatchError if the files of the source have changed, so that the places in the plan may be wrong."""
        then, now = dict(self.record.source_files), dict(source.files)
        if len(then) == len(now) == 1:  # a single file may have been renamed
            now = dict(zip(then, now.values(), strict=True))
        if then != now:
            name = next(name for name in (*then, *now) if then.get(name) != now.get(name))
            sizes = [f"{size} bytes" if (size := files.get(name)) is not None else "missing" for files in (then, now)]
            raise MismatchError(
                f"{name!r} of {source.location!r} has changed since the plan was made: {sizes[0]} then, {sizes[1]} "
                "now; restore it, choose another OUT, or start over with --overwrite"
            )

    def comment(self, shard: int) -> str:
        """The ZIP comment of a shard's file, which identifies it."""
        return shard_comment(self.record.id, shard)

    @classmethod
    def create(
        cls,
        storage: Storage,
        plan: Plan,
        config: BuildConfig,
        choice: Choice,
        *,
        source: Source,
        image_size: tuple[int, int],
    ) -> Job:
        """Stores a new job in OUT.

        Args:
            storage: OUT.
            plan: the items.
            config: the settings; the identity settings and the resizer are stored.
            choice: the backend of the whole build.
            source: the images.
            image_size: height and width of a stored image, in pixels.

        Raises:
            SourceError: the source has too many files or classes.
            StorageError: OUT cannot be written.
        """
        settings, digest = config.stored_identity(), plan.digest()
        labels = source.class_names, source.columns
        record = JobRecord(
            id=dataset_id(settings, *labels, image_size, digest),
            settings=settings,
            backend=choice.backend,
            device=choice.device,
            resizer=config.resizer,
            source_kind=source.kind,
            source_location=source.location,
            source_root=source.root,
            source_files=source.files,
            source_listing=source.listing,
            class_names=source.class_names,
            columns=source.columns,
            image_size=image_size,
            items=plan.item_count,
            shard_rows=plan.shard_rows,
            plan_digest=digest,
        )
        content = to_json(record)
        try:
            loads(content)
        except ValueError as exc:
            raise SourceError(
                f"{source.location!r} has {len(source.files)} files and {len(source.class_names or ())} classes, too "
                f"many for one dataset ({exc}); build it in several parts, each with its own OUT"
            ) from exc
        store_arrays(storage, PLAN, plan.arrays, f"gpu-npz plan {record.id}")
        storage.write(JOB, content)  # written last: if it exists, the plan is complete
        return cls.open(storage)

    @classmethod
    def open(cls, storage: Storage) -> Job:
        """Loads the job of OUT.

        Raises:
            FormatError: OUT has no job, or the job is damaged.
        """
        content = read_json(storage, JOB)
        if content is None:
            refuse_several(storage)
            raise FormatError(f"{storage.path(JOB)!r} is missing; {storage.root!r} was not created by gpu-npz build")
        label = storage.path(JOB)
        record = from_json(JobRecord, content, label)
        labels = record.class_names, record.columns
        if record.id != dataset_id(record.settings, *labels, record.image_size, record.plan_digest):
            raise FormatError(
                f"{label}: its id does not match its settings, so the file was altered; use --overwrite to start over"
            )
        try:
            reader = open_npz(storage, PLAN)
        except OSError as exc:
            raise FormatError(f"{storage.path(PLAN)!r}: {exc.strerror}; run the build again with --overwrite") from exc
        plan = Plan({name: reader[name] for name in reader.directory.members}, record.shard_rows)
        if plan.item_count != record.items:
            raise FormatError(f"{storage.path(PLAN)!r} has {plan.item_count} items, job.json says {record.items}")
        return cls(record, plan, BuildConfig(**record.settings, resizer=record.resizer))

    def require_same(self, config: BuildConfig, source: Source) -> None:
        """Checks that a build with these settings and this source may resume the job.

        Args:
            config: the settings of the resuming build.
            source: the images of the resuming build.

        Raises:
            MismatchError: the build would create other shards; the message names every difference.
        """
        asked, stored = config.identity(), self.settings.identity()
        if asked["size"] is None:
            asked["size"] = stored["size"]
        if asked["shard_size"] == "auto":  # resolved when the job began
            asked["shard_size"] = stored["shard_size"]
        if asked["normalize"] == "dataset" and asked["mean"] is None:  # measured when the job began
            asked |= {name: stored[name] for name in ("mean", "std")}
        differences = [
            f"  {name.replace('_', '-')}: existing {_option(name, stored[name])}, "
            f"requested {_option(name, asked[name])}"
            for name in stored
            if asked[name] != stored[name]
        ]
        record, names = self.record, source.class_names
        if source.kind != record.source_kind:
            differences.append(f"  source: existing {record.source_kind}, found {source.kind}")
        if source.files and source.root != record.source_root:  # root selects which members of the files are read
            differences.append(f"  root: existing {record.source_root}, requested {source.root}")
        if (names is None) != (record.class_names is None) or (config.classes_from and names != record.class_names):
            differences.append(
                f"  classes: existing {shown_classes(record.class_names)}, requested {shown_classes(names)}"
            )
        if source.columns != record.columns:
            existing, requested = (", ".join(map(str, columns)) for columns in (record.columns, source.columns))
            differences.append(f"  labels: existing {existing or 'none'}, requested {requested or 'none'}")
        if differences:
            otherwise = "delete OUT and start all parts again" if config.part else "--overwrite to start over"
            raise MismatchError(
                "OUT was started with other settings:\n" + "\n".join(differences) + "\n"
                f"give the same settings to resume, another OUT, or {otherwise}"
            )


def _option(name: str, value: Any) -> str:
    return "none" if value is None else as_option(name, value)


def shown_classes(names: Sequence[str] | None) -> str:
    """A summary of class names for messages."""
    return "no labels" if names is None else f"{len(names)} classes ({', '.join(names[:3])}, ...)"
