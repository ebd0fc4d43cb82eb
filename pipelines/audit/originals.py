"""The images that a dataset was made from, where they are now."""

from __future__ import annotations

import os

from ..errors import SourceError
from ..job import JobRecord, from_json
from ..manifest import Manifest
from ..output import JOB
from ..sources.base import Source
from ..sources.folder import FolderSource
from ..storage import Storage


def originals(storage: Storage, manifest: Manifest, source: str | os.PathLike[str] | None) -> Source:
    """The source of a finished dataset, of which the folder .gpu-npz may be missing.

    Args:
        storage: where the dataset is.
        manifest: the dataset's.
        source: where the images are; if None, where they were when the build began.

    Raises:
        SourceError: they are not there, or it is not known where they were.
    """
    if source is not None:
        return FolderSource(source, manifest.classes)
    content = storage.read(JOB)
    if content is None:
        raise SourceError(f"{storage.path(JOB)!r}, which says where the images are, is missing; give --source SRC")
    return source_of(from_json(JobRecord, content, storage.path(JOB)), None)


def source_of(record: JobRecord, source: str | os.PathLike[str] | None) -> Source:
    """The source of a job: `source` if it is given, else where it was when the build began; raises as `originals`."""
    try:
        return FolderSource(source or record.source_location, record.class_names)
    except SourceError as exc:
        if source is not None:
            raise
        raise SourceError(f"{exc}. If the images have moved, give --source SRC") from exc
