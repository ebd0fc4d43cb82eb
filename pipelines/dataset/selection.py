"""Selects and orders the items of a plan: first shuffle, `per_class` and `limit`, then a side of a split.

A split depends on the items but not on their order. The sides of one seed never share an item, and together they
contain the items that a build without `--split` would select.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import TRAIN, BuildConfig
from ..errors import UsageError
from ..sources.base import Group, Source, as_bytes, as_text, extensions, files_left_out, is_side, no_images, some
from ..sources.dicom_frames import split_frame
from ..sources.tables.rows import EXTENSIONS as TABLES
from .plan import Plan, collect

log = logging.getLogger(__name__)
Positions = NDArray[np.int64]
_LOOKED_AT = 1000


def listed(source: Source, config: BuildConfig, counts: dict[str, int] | None = None) -> dict[str, NDArray[Any]]:
    """Lists a source and selects items according to the settings.

    Args:
        source: the images.
        config: the settings. With a split but no side, the items of all sides are selected.
        counts: receives the number of items of each side of such a split, train first.

    Returns:
        The arrays of a plan, as `collect` returns them.

    Raises:
        SourceError: the source has no items.
        UsageError: the settings do not fit the source: classes or a column are missing, or a side has no item.
    """
    counts = counts if config.sides else None
    if config.per_class is None and config.side is None and counts is None:
        arrays = collect(source.groups(), shuffle=config.shuffle, limit=config.limit)
    else:
        keys: list[NDArray[np.int64]] = []
        arrays = collect(_noted(source.groups(), config.split_by, keys), shuffle=config.shuffle)
        if len(arrays["name_ends"]):
            arrays["order"] = _selected(source, config, arrays, np.concatenate(keys) if keys else None, counts)
    if not len(arrays["name_ends"]):
        raise no_images(source.location, source.left_out)
    _warn_of_listing(source, config, arrays)
    return arrays


def _warn_of_listing(source: Source, config: BuildConfig, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Logs which files were left out of the listing, and classes that look wrong."""
    if source.left_out:
        log.warning(
            "%r: %s; images have one of %s, and a table may name files of any name",
            source.location,
            files_left_out(source.left_out),
            extensions(),
        )
    if source.outside:
        log.warning(
            "%r: %d items are outside of it, behind symbolic links; use --no-follow-links to omit them",
            source.location,
            source.outside,
        )
    if source.unfollowed:
        log.warning("%r: %d symbolic links are omitted (--no-follow-links)", source.location, source.unfollowed)
    if source.impossible:
        log.warning(
            "%r: %d names that no folder could have are left out, with all that is below them (%s); copy that to keys "
            "without //, /./ and /../",
            source.location, len(source.impossible), some(source.impossible),
        )  # fmt: skip
    if source.bare:
        log.warning(
            "%r: %d class folders have no images, but keep their class numbers (%s); remove those that are no classes",
            source.location, len(source.bare), some(source.bare),
        )  # fmt: skip
    if config.labels is None and source.kind in ("folder", "tar", "zip"):
        if "labels" not in arrays and (arrays["group_labels"] < 0).all():
            log.warning("%r has images and no class folders, so the dataset has no labels; %s", *_unlabelled(source))
        elif (doubt := _doubtful_classes(source, arrays)) is not None:
            log.warning("%r: the only classes are %s; if the classes should be the folders below, %s", *doubt)


def _unlabelled(source: Source) -> tuple[str, str]:
    """The arguments of a warning about missing class folders: the location, and where labels could come from."""
    folder, name = os.path.split(source.location)
    above = source.kind == "folder" and not folder.endswith(("/", ":"))
    way = f"if {name!r} is a class, give the folder of all classes, {folder!r}; " if above else ""
    tables = [extension for extension in TABLES if source.left_out.get(extension)]
    if tables and source.file_per_item:
        way += f"if a table there has labels ({', '.join(tables)}), --labels FILE names it; "
    return source.location, f"{way}add --labels none if it has none"


def _doubtful_classes(source: Source, arrays: Mapping[str, NDArray[Any]]) -> tuple[str, str, str] | None:
    """The arguments of a warning about classes that look one level too high: the location, the classes, and advice."""
    names = source.class_names or ()
    sides = len(names) > 0 and all(map(is_side, names))
    if not sides and len(names) == 1:
        looked_at = Plan(arrays, 1).items(0, min(_LOOKED_AT, len(arrays.get("order", arrays["name_ends"]))))
        files = (as_text(split_frame(b"/" + as_bytes(item.path))[0]) for item in looked_at)
        sides = all("/" in file.partition(f"/{names[0]}/")[2] for file in files)  # .../class/folder/image
    if not sides:
        return None
    way = "give SRC one level deeper" if source.kind == "folder" else f"--root {names[0]} takes those in that one"
    return source.location, ", ".join(map(repr, names)), way


def _noted(groups: Iterator[Group], split_by: str | None, keys: list[NDArray[np.int64]]) -> Iterator[Group]:
    """Yields the groups unchanged and appends a number for each item to `keys`. A split keeps equal numbers together.

    In a split by label or at random, the number identifies the item, or the file if the item is a frame. Otherwise it
    identifies the item's folder or its value in the column that `split_by` names; nothing is appended if the source
    lacks this column.

    Args:
        groups: the listing.
        split_by: the setting.
        keys: receives int64 (items,) for each group.
    """
    numbers: dict[bytes, int] = {}
    new = itertools.count()
    for group in groups:
        names = group.keys
        if split_by == "folder":
            names = [_folder(group.folder + name) for name in group.names]
        if names is not None:
            keys.append(np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64))
        elif split_by in (None, "label", "random"):
            files = (split_frame(group.folder + name) for name in group.names)
            together = [next(new) if frame is None else numbers.setdefault(file, next(new)) for file, frame in files]
            keys.append(np.array(together, np.int64))
        yield group


def _folder(path: bytes) -> bytes:
    """The folder of an item's file."""
    return split_frame(path)[0].rpartition(b"/")[0]


def _selected(
    source: Source,
    config: BuildConfig,
    arrays: Mapping[str, NDArray[Any]],
    keys: NDArray[np.int64] | None,
    counts: dict[str, int] | None,
) -> Positions:
    """The positions of the selected items in plan order, int64 (items,); `counts` receives the sizes of the sides."""
    count = len(arrays["name_ends"])
    classes = _class_numbers(arrays)
    order = _limited(source, config, arrays.get("order", np.arange(count)), classes)
    if config.side is None and counts is None:
        return order
    taken = np.sort(order)  # so that a split does not depend on the order of the items
    sides = _sides(source, config, taken, keys, classes, count)
    names = [*config.shares, TRAIN]
    _require_every_side(source, config, sides, names)
    if classes is not None and config.side in (None, TRAIN):
        _warn_of_untrained(source, config, classes[taken], sides == names.index(TRAIN))
    if counts is not None:
        counts.update((name, int((sides == names.index(name)).sum())) for name in config.sides)
    side_of = np.full(count, -1)
    side_of[taken] = sides
    return order if config.side is None else order[side_of[order] == names.index(config.side)]


def _class_numbers(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The class or whole number of each listed item; None without labels, for floats, and for several columns."""
    labels = arrays.get("labels")
    if labels is None:
        labels = np.repeat(arrays["group_labels"], np.diff(arrays["group_ends"], prepend=0))
        return None if (labels < 0).all() else labels
    return labels if labels.ndim == 1 and labels.dtype.kind == "i" else None


def _limited(source: Source, config: BuildConfig, order: Positions, classes: NDArray[Any] | None) -> Positions:
    """Applies `per_class` and `limit` to positions. Raises UsageError for `per_class` without classes."""
    if config.per_class is not None:
        if classes is None:
            raise UsageError(f"--per-class {config.per_class}: {source.location!r} has no classes; --limit N takes N")
        order = order[_place_in_class(classes[order]) < config.per_class]
    return order[: config.limit]


def _sides(
    source: Source,
    config: BuildConfig,
    taken: Positions,
    keys: NDArray[np.int64] | None,
    classes: NDArray[Any] | None,
    count: int,
) -> Positions:
    """Assigns a side to each item in `taken`: an index into `config.shares`, or `len(config.shares)` for train.

    Args:
        source: the images.
        config: the settings of the split.
        taken: the positions of the selected items, ascending.
        keys: the number that `_noted` gave to each listed item; None if the source lacks the column of `split_by`.
        classes: the class of each listed item; None without classes.
        count: the number of listed items.

    Raises:
        UsageError: the source lacks the classes or the column that `split_by` needs.
    """
    how = config.split_by or ("random" if classes is None else "label")
    if how == "label" and classes is None:
        raise UsageError(
            f"--split-by label: {source.location!r} has no single column of classes or whole numbers; choose random, "
            "folder or a table's column"
        )
    rank = np.random.PCG64(config.split_seed).random_raw(count)
    if how in ("label", "random"):
        assert keys is not None, "noted for these"
        _, first, place = np.unique(keys[taken], return_index=True, return_inverse=True)
        strata = classes[taken][first] if how == "label" and classes is not None else np.zeros(len(first), np.int64)
        return _by_label(strata, rank[taken][first], config.shares)[place]
    if keys is None:
        raise UsageError(
            f"--split-by {how}: {source.location!r} has no such column; choose label, random, folder, or a table's "
            "column"
        )
    return _by_key(keys[taken], rank, config.shares)


def _require_every_side(source: Source, config: BuildConfig, sides: Positions, names: Sequence[str]) -> None:
    """Raises UsageError if a side of the split has no item."""
    for number, name in enumerate(names):
        if not (sides == number).any():
            raise UsageError(
                f"--split {config.split}: {name!r} would get none of the {len(sides)} items of {source.location!r}; "
                "give larger shares, or another --split-by (with label, the only item of a class stays in train)"
            )


def _warn_of_untrained(source: Source, config: BuildConfig, labels: NDArray[Any], trained: NDArray[np.bool_]) -> None:
    lacking = np.setdiff1d(labels, labels[trained]).tolist()
    if lacking:
        names = [source.class_names[label] if source.class_names else str(label) for label in lacking]
        log.warning(
            "--split %s: train has no item of %d of the %d classes (%s); --split-by label gives it some of each",
            config.split,
            len(lacking),
            len(np.unique(labels)),
            ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else ""),
        )


def _place_in_class(labels: NDArray[Any]) -> Positions:
    """For each entry, the number of earlier entries with the same label."""
    by_label = np.argsort(labels, kind="stable")
    ordered = labels[by_label]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    places = np.empty(len(labels), np.int64)
    places[by_label] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    return places


def _by_label(labels: NDArray[Any], rank: NDArray[np.uint64], shares: Mapping[str, Fraction]) -> Positions:
    """Splits each label by the shares.

    Rounding errors are carried over to the next label. The only item of a label stays in train.

    Args:
        labels: the label of each item, (items,).
        rank: a random number for each item.
        shares: the share of each side except train.

    Returns:
        The side of each item: an index into `shares`, or `len(shares)` for train.
    """
    sides = np.full(len(labels), len(shares), np.int64)
    owed = [Fraction(0)] * len(shares)
    by_label = np.lexsort((rank, labels))
    ends = np.flatnonzero(np.r_[labels[by_label][1:] != labels[by_label][:-1], True]) + 1
    for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
        at = start
        for number, share in enumerate(shares.values()):
            owed[number] += share * (end - start)
            count = max(0, min(round(owed[number]), math.ceil(share * (end - start)), end - 1 - at))
            owed[number] -= count
            sides[by_label[at : at + count]] = number
            at += count
    return sides


def _by_key(keys: NDArray[np.int64], rank: NDArray[np.uint64], shares: Mapping[str, Fraction]) -> Positions:
    """Like `_by_label`, but keeps all items of a key on one side. A side gets random keys up to its share."""
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    side_of = np.full(len(found), len(shares), np.int64)
    order = np.argsort(rank[: len(found)], kind="stable")
    for number, share in enumerate(shares.values()):
        wanted, held = share * len(keys), 0
        for key in order[side_of[order] == len(shares)].tolist():
            count = int(counts[key])
            if held + Fraction(count, 2) <= wanted:
                side_of[key] = number
                held += count
    return side_of[inverse]
