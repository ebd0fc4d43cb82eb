"""Opens the source images that a dataset was built from."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from ..config import BuildConfig
from ..errors import FormatError, MismatchError, SourceError
from ..sources.base import Item, Source, as_text, read_item
from ..sources.dicom_frames import split_frame
from ..sources.rejects import BadItem
from ..sources.tables.paths import relative_path
from ..storage.base import Storage
from .built import open_images
from .job import Job
from .layout import JOB
from .manifest import Manifest
from .plan import Plan

log = logging.getLogger(__name__)
_PROBED_ITEMS = 16
_NO_LABELS = {"labels": "none", "split": None, "split_by": None, "split_seed": 0}


@dataclass(frozen=True)
class Originals:
    """The source of a finished dataset.

    Attributes:
        source: the images.
        plan: the location of each item in the source; None if the plan is missing.
    """

    source: Source
    plan: Plan | None

    def item(self, index: int, path: str) -> Item:
        """Returns an item.

        Args:
            index: its position in the plan.
            path: its path, which locates the item if the plan is missing.

        Raises:
            SourceError: the source needs the plan to find the item, and the plan is missing.
            FormatError: the index or the path is invalid.
        """
        if self.plan is not None:
            if not 0 <= index < self.plan.item_count:
                raise FormatError(f"{path!r} is said to be item {index} of {self.plan.item_count}; run gpu-npz verify")
            return self.plan.items(index, index + 1)[0]
        if self.source.files:
            raise SourceError(
                f"{self.source.location!r}: the folder .gpu-npz, which says where in it {path!r} is, is missing; copy "
                "the dataset again, with it"
            )
        try:
            name = relative_path(path, self.source.location)
        except ValueError as exc:
            raise FormatError(f"item {index} {exc}") from exc
        _, frame = split_frame(name)
        return Item(index, as_text(name), None, () if frame is None else (frame,))


def originals(storage: Storage, manifest: Manifest, source: str | os.PathLike[str] | None) -> Originals:
    """Opens the source of a finished dataset. The folder .gpu-npz of the dataset may be missing.

    Args:
        storage: the dataset.
        manifest: the manifest of the dataset.
        source: the location of the images; if None, their location when the build began.

    Raises:
        SourceError: the images are missing, or their location is unknown.
        MismatchError: these are other images, or the files that contain them have changed.
    """
    if storage.size(JOB) is None:
        if source is None:
            raise SourceError(f"{storage.path(JOB)!r}, which says where the images are, is missing; give --source SRC")
        return Originals(open_images(source, manifest.config), None)
    job = Job.open(storage)
    return Originals(source_of(job, source), job.plan)


def source_of(job: Job, source: str | os.PathLike[str] | None) -> Source:
    """Opens the source of a job, without labels, because the plan contains the label of every item.

    Args:
        job: the job.
        source: the location of the images; if None, their location when the build began.

    Raises:
        SourceError, MismatchError: as for `originals`.
    """
    record = job.record
    given = {**record.settings, "source": record.source_kind, "root": record.source_root, **_NO_LABELS}
    if record.source_kind == "table":
        given["follow_links"] = True  # the plan already respects the setting
    config = BuildConfig(**given)
    try:
        found = open_images(source or record.source_location, config)
    except SourceError as exc:
        if source is not None:
            raise
        raise SourceError(f"{exc}. If the images have moved, give --source SRC") from exc
    job.require_source(found)
    if found.location != record.source_location:
        require_moved(job, found)
    return found


def require_moved(job: Job, source: Source) -> None:
    """Raises MismatchError if a source at a new location contains none of the first planned items."""
    probe = job.plan.items(0, min(_PROBED_ITEMS, job.plan.item_count))
    if not any(_is_there(source, item) for item in probe):
        raise MismatchError(
            f"OUT was built from {job.record.source_location!r}, and {source.location!r} is something else, because it "
            f"has none of the first {len(probe)} items. Give the same images, or choose another OUT"
        )
    log.warning("SRC was %r when the build began and is %r now", job.record.source_location, source.location)


def _is_there(source: Source, item: Item) -> bool:
    try:
        read_item(source, item)
    except BadItem as bad:
        return bad.code != "missing"
    return True
