"""What the commands on a dataset do with a folder that contains the datasets of a split: all of them, one by one."""

from __future__ import annotations

from gpu_npz.dataset.layout import sides_of_split
from gpu_npz.storage import open_storage


def datasets_in(out: str) -> dict[str, str]:
    """The datasets in OUT by side, such as train; a single one, or what is none, by the empty string."""
    storage = open_storage(out)
    return {side: storage.path(side) for side in sides_of_split(storage)} or {"": out}
