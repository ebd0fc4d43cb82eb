"""Whether the datasets on which one process trains and validates are preprocessed alike."""

from __future__ import annotations

import logging

from .dataset import Dataset
from .inference import Preprocess

log = logging.getLogger(__name__)
_seen: dict[str, Preprocess] = {}


def compare_with_others(data: Dataset) -> None:
    """Warns, once for each pair, where a dataset that was opened before in this process is preprocessed otherwise."""
    if _seen.get(data.path) == data.preprocess:
        return
    for path, other in _seen.items():
        if differences := data.preprocess.differences(other):
            log.warning(
                "%r and %r are not preprocessed alike, so a model that is trained on one is wrong for the other: %s",
                data.path, path, "; ".join(differences),
            )  # fmt: skip
    _seen[data.path] = data.preprocess
