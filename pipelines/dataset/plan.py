"""The plan of a build, which assigns items to shards. It is made once, stored in OUT, and reopened on resume.

On disk and in memory, a plan takes about 30 bytes per item: all names in one array of bytes, the end of each name, and
one entry per folder for its path and label. It is stored as an NPZ whose arrays are memory-mapped, so opening it does
not read the names.

| array | type, shape | |
|---|---|---|
| `names`, `name_ends` | uint8 (bytes,), int64 (listed,) | the names of the items in listing order |
| `folders`, `folder_ends` | uint8 (bytes,), int64 (groups,) | the folder of each group of items, such as `n01440764/` |
| `group_ends`, `group_labels` | int64 (groups,) | the end of each group in the listing; its label, -1 for none |
| `labels` | int64 or float64 (listed,) or (listed, K) | the labels of listed items, if each has its own |
| `places` | int64 (listed, numbers) | where the source finds each listed item, if not by its path |
| `order` | int64 (items,) | the listed item at each position of the plan, if it differs from listing order |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..sources.base import Batch, Group, Item, as_text

_ARRAYS = (
    "names", "name_ends", "folders", "folder_ends", "group_ends", "group_labels", "labels", "places", "order",
)  # fmt: skip
_OPTIONAL = {"labels", "places", "order"}


class Plan:
    """The ordered items of a build, divided into shards of `shard_rows` items; the last shard may be shorter.

    Args:
        arrays: the arrays in this module's table, in memory or mapped from a file.
        shard_rows: the number of items per shard.

    Attributes:
        item_count: the number of items.
        shard_count: the number of shards.

    Raises:
        FormatError: the arrays are inconsistent.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], shard_rows: int) -> None:
        if (fault := _fault(arrays)) is not None:
            raise FormatError(
                f"the plan's arrays do not fit each other ({fault}); run the build again with --overwrite"
            )
        self.arrays = arrays
        self.shard_rows = shard_rows
        self._order = arrays.get("order")
        self.item_count = len(arrays["name_ends"] if self._order is None else self._order)
        self.shard_count = -(-self.item_count // shard_rows)

    def shard_range(self, shard: int) -> range:
        """The indices of the items of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.item_count))

    def batches(self, shard: int, batch_size: int) -> Iterator[Batch]:
        """Yields the items of a shard in batches of up to `batch_size`."""
        span = self.shard_range(shard)
        for start in range(span.start, span.stop, batch_size):
            stop = min(start + batch_size, span.stop)
            yield Batch(shard, self.items(start, stop), stop == span.stop)

    def items(self, start: int, stop: int) -> list[Item]:
        """The items with indices from `start` up to, but not including, `stop`."""
        listed = self._listed(start, stop)
        groups = np.searchsorted(self.arrays["group_ends"], listed, side="right")
        names, folders = self.arrays["names"], self.arrays["folders"]
        labels = self._labels(listed, groups).tolist()
        places = self.arrays["places"][listed].tolist() if "places" in self.arrays else None
        several = "labels" in self.arrays and self.arrays["labels"].ndim == 2
        unlabelled = -1 if "labels" not in self.arrays else None
        rows = zip(*_spans(self.arrays["name_ends"], listed), *_spans(self.arrays["folder_ends"], groups), strict=True)
        items = []
        for index, (name_start, name_end, folder_start, folder_end) in enumerate(rows, start):
            path = folders[folder_start:folder_end].tobytes() + names[name_start:name_end].tobytes()
            label = tuple(labels[index - start]) if several else labels[index - start]
            place = () if places is None else tuple(places[index - start])
            text = as_text(path)
            items.append(Item(index, text, None if label == unlabelled else label, place))
        return items

    def places(self, shards: Iterable[int]) -> NDArray[np.int64] | None:
        """Where the source finds the items of these shards, int64 (items, numbers); None if it does so by paths."""
        if "places" not in self.arrays:
            return None
        listed = [self._listed(span.start, span.stop) for span in map(self.shard_range, shards)]
        return self.arrays["places"][np.concatenate(listed)] if listed else self.arrays["places"][:0]

    def labels(self) -> NDArray[Any]:
        """The label of every item in plan order.

        Returns:
            int64 (item_count,), -1 for none. If each item has its own labels: int64 or float64 (item_count,), or
            (item_count, K) for K columns.
        """
        listed = self._listed(0, self.item_count)
        return self._labels(listed, np.searchsorted(self.arrays["group_ends"], listed, side="right"))

    def _labels(self, listed: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[Any]:
        return self.arrays["labels"][listed] if "labels" in self.arrays else self.arrays["group_labels"][groups]

    def longest_paths(self) -> Iterator[tuple[int, int, int]]:
        """Yields the number of each shard, the length of its longest path, and the total length; lengths in bytes."""
        names, folders = (np.diff(self.arrays[name], prepend=0) for name in ("name_ends", "folder_ends"))
        for shard in range(self.shard_count):
            span = self.shard_range(shard)
            listed = self._listed(span.start, span.stop)
            groups = np.searchsorted(self.arrays["group_ends"], listed, side="right")
            lengths = names[listed] + folders[groups]
            yield shard, int(lengths.max()), int(lengths.sum())

    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of everything that determines the position of each item."""
        digest = hashlib.sha256(str(self.shard_rows).encode())
        for name in _ARRAYS:
            if name in self.arrays:
                array = np.ascontiguousarray(self.arrays[name])
                digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
                digest.update(array.view(np.uint8).data if array.size else b"")
        return digest.hexdigest()

    def _listed(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop) if self._order is None else self._order[start:stop]


def same_listing(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the arrays of two plans have the same listing, even if the plans select different items from it."""
    return all(np.array_equal(one.get(name, ()), other.get(name, ())) for name in _ARRAYS if name != "order")


def collect(
    groups: Iterable[Group], *, shuffle: int | None = None, limit: int | None = None
) -> dict[str, NDArray[Any]]:
    """Turns the listing of a source into the arrays of a plan.

    Args:
        groups: the listing. Groups are not kept, so a generator saves memory.
        shuffle: the seed of the order; None for listing order. Items are sorted by PCG64's raw 64-bit output, one
            number per item. NumPy guarantees that this stream never changes, so a seed gives the same order everywhere.
        limit: the number of items to take, after the shuffle; all if None. Without a shuffle, the listing stops there.

    Returns:
        The arrays in this module's table.
    """
    names, folders = bytearray(), bytearray()
    name_lengths: list[NDArray[np.uint16]] = []
    folder_ends: list[int] = []
    group_ends: list[int] = []
    group_labels: list[int] = []
    labels: list[NDArray[Any]] = []
    places: list[NDArray[Any] | int] = []  # of each group; for a group without places, its number of items
    count = 0
    for group in groups:
        kept = group.names if limit is None or shuffle is not None else group.names[: limit - count]
        names += b"".join(kept)
        name_lengths.append(np.fromiter(map(len, kept), np.uint16, len(kept)))
        folders += group.folder
        count += len(kept)
        folder_ends.append(len(folders))
        group_ends.append(count)
        group_labels.append(group.label)
        if group.labels is not None:
            labels.append(group.labels[: len(kept)])
        places.append(len(kept) if group.places is None else group.places[: len(kept)])
        if shuffle is None and count == limit:
            break
    arrays: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(names, np.uint8),
        "name_ends": np.cumsum(np.concatenate([*name_lengths, np.empty(0, np.uint16)]), dtype=np.int64),
        "folders": np.frombuffer(folders, np.uint8),
        "folder_ends": np.array(folder_ends, np.int64),
        "group_ends": np.array(group_ends, np.int64),
        "group_labels": np.array(group_labels, np.int64),
    }
    if labels:
        arrays["labels"] = np.concatenate(labels)
    if found := [part for part in places if not isinstance(part, int)]:
        none = np.full((1, found[0].shape[1]), -1)
        arrays["places"] = np.concatenate([none.repeat(part, 0) if isinstance(part, int) else part for part in places])
    if shuffle is not None:
        arrays["order"] = np.argsort(np.random.PCG64(shuffle).random_raw(count), kind="stable")[:limit]
    return arrays


def _fault(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    """The reason why the arrays are not a valid plan; None if they are."""
    if missing := set(_ARRAYS) - _OPTIONAL - arrays.keys():
        return f"no {', '.join(sorted(missing))}"
    for name, array in arrays.items():
        kinds, dimensions = ("if", (1, 2)) if name in ("labels", "places") else ("iu", (1,))
        if array.dtype.kind not in kinds or array.ndim not in dimensions:
            return f"{name} is {array.dtype} {array.shape}"
    items, groups = len(arrays["name_ends"]), len(arrays["group_ends"])
    if not items or not groups:
        return "no items"
    lengths = {"folder_ends": groups, "group_labels": groups, "labels": items, "places": items}
    for name, length in lengths.items():
        if name in arrays and len(arrays[name]) != length:
            return f"{name} has {len(arrays[name])} entries, not {length}"
    if arrays["names"].dtype != np.uint8 or arrays["folders"].dtype != np.uint8:
        return "names or folders are no bytes"
    stops = {"name_ends": len(arrays["names"]), "folder_ends": len(arrays["folders"]), "group_ends": items}
    for name, stop in stops.items():
        ends = arrays[name]
        if ends[0] < 0 or ends[-1] != stop or (ends[1:] < ends[:-1]).any():
            return f"{name} do not rise to {stop}"
    order = arrays.get("order")
    if order is not None and not (len(order) and int(order.min()) >= 0 and int(order.max()) < items):
        return f"order is not of the {items} items"
    return None


def _spans(ends: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    starts = np.where(positions > 0, ends[positions - 1], 0)
    return starts.tolist(), ends[positions].tolist()
