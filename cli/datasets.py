"""Finds the datasets of a split, so that commands can process each of them."""

from __future__ import annotations

from typing import Any

from gpu_npz.cli.console import print_json
from gpu_npz.dataset.layout import sides_of_split
from gpu_npz.storage import open_storage


def datasets_in(out: str) -> dict[str, str]:
    """Returns the paths of the datasets in OUT by side, such as `train`.

    If OUT is not a split, the only entry is OUT itself, under the empty string, whether or not it is a dataset.
    """
    storage = open_storage(out)
    return {side: storage.path(side) for side in sides_of_split(storage)} or {"": out}


def print_sides(found: dict[str, Any]) -> None:
    """Prints the results for `datasets_in` as JSON: an object of all sides, or the result of a single dataset."""
    print_json(found.get("", found))
