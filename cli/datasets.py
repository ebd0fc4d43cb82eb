"""Finds the datasets of a split, so that commands can process each of them."""

from __future__ import annotations

from gpu_npz.dataset.layout import sides_of_split
from gpu_npz.storage import open_storage


def datasets_in(out: str) -> dict[str, str]:
    """Returns the paths of the datasets in OUT by side, such as `train`.

    If OUT is not a split, the only entry is OUT itself, under the empty string, whether or not it is a dataset.
    """
    storage = open_storage(out)
    return {side: storage.path(side) for side in sides_of_split(storage)} or {"": out}
