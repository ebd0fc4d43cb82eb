"""What tells one dataset from another: its id, and the comments that carry the id in its files."""

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
    """What tells a dataset from others: SHA-256, cut to 32 digits, over everything but the decoder that decides it."""
    parts = [1, settings, class_names, image_size, plan_digest]
    if columns:
        parts.append([column.model_dump() for column in columns])
    identity = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def shard_comment(dataset_id: str, shard: int) -> str:
    """The end comment of a shard's file."""
    return f"gpu-npz 1 dataset={dataset_id} shard={shard}"


def index_comment(dataset_id: str) -> str:
    """The end comment of index.npz."""
    return f"gpu-npz 1 dataset={dataset_id} index"
