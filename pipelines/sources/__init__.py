"""Collections of images: one module for each form lists its items and reads their bytes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from ..config import BuildConfig
from ..errors import SourceError, UsageError
from ..storage.base import is_remote
from .base import Source, as_text, full_location, location_of
from .detect import detected_kind
from .folders.folder import FolderSource
from .tables.columns import key_column
from .tables.paths import relative_path

_KINDS_WITH = {
    "image_column": ("table", "parquet"),
    "root": ("folder", "table", "tar", "zip"),
    "follow_links": ("folder", "table"),
    "scale": ("numpy",),
}
# The module of each kind, imported on demand, and its class or function, which is called with (src, config, classes).
_SOURCES = {
    "remote": ("folders.remote", "RemoteSource"),
    "tar": ("archives.tar", "TarSource"),
    "webdataset": ("archives.webdataset", "WebDatasetSource"),
    "imagenet": ("archives.imagenet", "ImageNetSource"),
    "zip": ("archives.zip", "ZipSource"),
    "table": ("tables.table", "TableSource"),
    "parquet": ("tables.parquet", "ParquetSource"),
    "cifar": ("arrays.cifar", "CifarSource"),
    "numpy": ("arrays.per_file", "open_arrays"),
}


def open_source(
    src: str | os.PathLike[str], config: BuildConfig | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Opens SRC as the kind that `config.source` names, or that is detected.

    Args:
        src: a path, a pattern of paths (`shard-{000..099}.tar`, `*.parquet`), or an fsspec URL.
        config: its `source`, `labels`, `image_column`, `root` (for a folder: the subfolder to use), `follow_links` and
            `split_by` are used.
        classes: the names of classes by number; found in the collection if None.

    Raises:
        SourceError: SRC cannot be listed or read, lacks the labels, or has none although `classes` are given.
        UsageError: the settings contradict each other.
    """
    config = config or BuildConfig()
    if classes is not None and config.labels == "none":
        raise UsageError("--labels none and --classes-from contradict each other; omit one of them")
    source = _opened(src, config, classes)
    if classes is not None and source.class_names is None:
        raise SourceError(
            f"{source.location!r} has no labels; leave --classes-from out, or say by --labels where they are"
        )
    return source


def sides_of_source(src: str | os.PathLike[str], config: BuildConfig) -> dict[str, str]:
    """The SRC of each side of a split that SRC itself has, train first; for `--splits all`.

    Raises:
        UsageError: SRC is not of a kind that can have sides.
        SourceError: it has none, or cannot be read.
    """
    location = location_of(src)
    kind = detected_kind(location, config.image_column) if config.source == "auto" else config.source
    if kind != "numpy":
        raise UsageError(
            f"--splits all requires an .npz that has arrays such as x_train and x_test; {location!r} is of the kind "
            f"{kind}: build each side by itself, or divide it with --split val=0.1"
        )
    from .arrays.numpy_source import sides_of

    return sides_of(location, config.labels)


def require_settings(config: BuildConfig, kind: str, location: str) -> None:
    """Raises UsageError if a setting is given that does not go with this kind of SRC."""
    for name, kinds in _KINDS_WITH.items():
        if getattr(config, name) != BuildConfig.model_fields[name].default and kind not in kinds:
            raise UsageError(
                f"--{name.replace('_', '-')} requires SRC of the kind {' or '.join(kinds)}; {location!r} is of "
                f"the kind {kind}"
            )


def _opened(src: str | os.PathLike[str], config: BuildConfig, classes: Sequence[str] | None) -> Source:
    location = location_of(src)
    kind = detected_kind(location, config.image_column) if config.source == "auto" else config.source
    require_settings(config, kind, location)
    if kind == "folder" and config.root is not None:
        location = _within(location, config.root)
    if kind == "folder" and is_remote(location):
        kind = "remote"
    if kind == "folder":
        follow = config.follow_links is not False
        return FolderSource(location, classes, config.labels, key_column(config), follow_links=follow)
    module, name = _SOURCES[kind]
    source: Any = getattr(importlib.import_module(f".{module}", __name__), name)
    made: Source = source(location, config, classes)
    return made


def _within(location: str, root: str) -> str:
    """The location of the folder in SRC that `--root` names. Raises UsageError if it is outside SRC."""
    top = full_location(location)
    if os.path.normpath(root) == ".":
        return top
    try:
        return f"{top.rstrip('/')}/{as_text(relative_path(root, top))}"
    except ValueError as exc:
        raise UsageError(f"--root {root}: SRC {exc}; give the path of a folder in SRC") from exc
