"""What tests of sources share: what a source lists, what it refuses, and tars."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gpu_npz.config import BuildConfig
from gpu_npz.errors import SourceError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, Source, read_item
from gpu_npz.sources.rejects import BadItem


def opened(location: Path | str, classes: list[str] | None = None, **settings: Any) -> Source:
    return open_source(location, BuildConfig(**settings), classes)


def items(source: Source) -> list[Item]:
    """All items; those without a label have None."""
    found: list[Item] = []
    for group in source.groups():
        for row, name in enumerate(group.names):
            label = group.label if group.labels is None else group.labels[row].tolist()
            place = () if group.places is None else tuple(group.places[row].tolist())
            found.append(Item(len(found), os.fsdecode(group.folder + name), None if label == -1 else label, place))
    return found


def labelled(source: Source) -> list[tuple[str, Any]]:
    """Path and label of all items."""
    return [(item.path, item.label) for item in items(source)]


def refusal(location: Path | str, classes: list[str] | None = None, **settings: Any) -> str:
    """What is said where a source cannot be opened or listed."""
    with pytest.raises((SourceError, UsageError)) as caught:
        items(opened(location, classes, **settings))
    return str(caught.value)


def reject(source: Source, item: Item) -> tuple[str, str]:
    """Code and detail with which an item is rejected when it is read."""
    with pytest.raises(BadItem) as caught:
        read_item(source, item)
    return caught.value.code, caught.value.detail


def pack(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these files, in this order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
