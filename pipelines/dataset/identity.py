"""The id of a dataset, and the ZIP comments that store it in the dataset's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..sources.base import LabelColumn


def dataset_id(
    settings: dict[str, Any],
    class_names: Sequence[str] | None,
    columns: Sequence[LabelColumn],
    image_size: tuple[int, int],
    plan_digest: str,
) -> str:
    """The id of a dataset: 32 hexadecimal digits of a SHA-256 of everything that determines it, except the decoder.

    Args:
        settings: the identity settings of the build.
        class_names: the names of classes by number; None if labels are not classes of one column.
        columns: the label columns, unless `class_names` describes the only one.
        image_size: height and width of a stored image, in pixels.
        plan_digest: the digest of the plan.
    """
    parts = [1, settings, class_names, image_size, plan_digest]
    if columns:
        parts.append([column.model_dump() for column in columns])
    identity = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def shard_comment(dataset_id: str, shard: int) -> str:
    """The ZIP comment of a shard's file."""
    return f"gpu-npz 1 dataset={dataset_id} shard={shard}"


def index_comment(dataset_id: str) -> str:
    """The ZIP comment of index.npz."""
    return f"gpu-npz 1 dataset={dataset_id} index"
