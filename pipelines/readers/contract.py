"""Checks that all datasets which a process opens, for training and validation, are preprocessed alike."""

from __future__ import annotations

import logging

from .inference import Preprocess
from .views import Rows

log = logging.getLogger(__name__)
_seen: dict[str, Preprocess] = {}


def compare_with_others(data: Rows) -> None:
    """Warns, once per pair, if a dataset that this process opened before is preprocessed differently."""
    for each in data.datasets:
        _compare(each)


def _compare(data: Rows) -> None:
    if _seen.get(data.path) == data.preprocess:
        return
    for path, other in _seen.items():
        if differences := data.preprocess.differences(other):
            log.warning(
                "%r and %r are preprocessed differently, so a model that is trained on one gives wrong results on the "
                "other: %s",
                data.path, path, "; ".join(differences),
            )  # fmt: skip
    _seen[data.path] = data.preprocess
