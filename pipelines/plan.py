"""Items to shards: made once, stored with the output, reopened on resume.

On disk and in memory a plan takes some 30 bytes an item: the names as one run of bytes, where each ends, and one entry a
folder for its path and label. It is stored as an NPZ whose arrays are memory-mapped, so opening it reads nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sources.base import Group


class Item(NamedTuple):
    """One source image: its place in the plan, its path relative to the source, its label or None."""

    index: int
    path: str
    label: int | None


@dataclass(frozen=True)
class Batch:
    """Consecutive items of one shard; `last` marks the shard's last batch. A shard has at least one batch."""

    shard: int
    items: list[Item]
    last: bool
