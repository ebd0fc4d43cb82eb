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
    """The source of a dataset.

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
    location = from_json(JobRecord, content, storage.path(JOB)).source_location
    try:
        return FolderSource(location, manifest.classes)
    except SourceError as exc:
        raise SourceError(f"{exc}. If the images have moved, give --source SRC") from exc
