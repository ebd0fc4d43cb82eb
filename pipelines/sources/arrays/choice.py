"""Which arrays of a file are images, labels and names of classes, by their names and shapes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

import numpy as np

from ...errors import SourceError
from ..tables.columns import LABEL_COLUMNS
from .npy import Array

log = logging.getLogger(__name__)
_IMAGES = ("images", "image", "imgs", "img", "x", "data")  # words in names of arrays, the most likely first
_LABELS = frozenset((*LABEL_COLUMNS, "targets", "y"))
_SIDES = {
    "train": frozenset({"train", "training"}),
    "val": frozenset({"val", "valid", "validation", "dev"}),
    "test": frozenset({"test", "testing"}),
}  # the names of sides of a split, and the words for each
_CLASS_NAMES = frozenset({"class", "names"})
_WORD = re.compile(r"[xyXY](?=train|val|test|dev)|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_UNNAMED = re.compile(r"arr_(\d+)")  # what numpy.savez calls positional arrays
_FLAT = "data"  # the key of the images in downsampled ImageNet (https://patrykchrabaszcz.github.io/Imagenet32)
_MIN_FLAT_SIDE = 8  # smaller rows are rather features than images


def image_array(arrays: Mapping[str, Array], wanted: str, location: str) -> str:
    """The name of the array that holds the images.

    Args:
        arrays: the arrays of the file.
        wanted: the name that SRC gives; empty to choose by names and shapes.
        location: SRC, for messages.

    Raises:
        SourceError: there is no such array, or no array or several could hold the images.
    """
    if wanted:
        if wanted not in arrays:
            raise SourceError(f"{location!r}: there is no array {wanted!r}; it has {shown(arrays)}")
        return wanted
    if "" in arrays:
        return ""
    many = [name for name, array in arrays.items() if _like_images(array)]
    if not many and _FLAT in arrays and flat_side(arrays[_FLAT]):
        return _FLAT
    usual = [{word, *part} for part in ((), ("train",)) for word in _IMAGES]
    found = [name for words in (*usual, {"arr", "0"}) for name in many if _words(name) == words]
    name = many[0] if len(many) == 1 else next(iter(found), None)
    if name is not None and len(many) > 1:
        others = [other for other in many if other != name]
        log.warning(
            "%r: using the images in %r; %s may hold images, too: to use them, give SRC as %s/%s.npy%s",
            location, name, ", ".join(map(repr, others)), location, others[0],
            ", or build all of them with --splits all" if _are_sides(_sides(arrays)) else "",
        )  # fmt: skip
    if name is None:
        raise SourceError(
            f"{location!r}: {'no array has' if not many else 'several arrays have'} the dimensions of images; it has "
            f"{shown(arrays)}; allowed is (N, H, W), (N, H, W, C) or (N, C, H, W)"
            + (f", and {location}/NAME.npy says which" if many else f": {_way_to_images(arrays)}")
        )
    return name


def _way_to_images(arrays: Mapping[str, Array]) -> str:
    """How to make a file that has images out of one that has none."""
    if any(array.dtype.hasobject for array in arrays.values()):
        return "turn an array of Python objects into one array with np.stack(list(images)), and save that"
    if not arrays:
        return "save arrays with np.savez(FILE, images=images, labels=labels)"
    return "turn rows of pixels into images with array.reshape(len(array), H, W, C), or one image with array[None]"


def single_image(arrays: Mapping[str, Array]) -> str | None:
    """The name of the array of a file that holds one image; None if no array or several could be it."""
    if "" in arrays:
        return ""
    able = [name for name, array in arrays.items() if len(array.shape) in (2, 3)]
    found = [name for words in (*({word} for word in _IMAGES), {"arr", "0"}) for name in able if _words(name) == words]
    return able[0] if len(able) == 1 else next(iter(found), None)


def label_array(images: str, arrays: Mapping[str, Array], location: str) -> str | None:
    """The array that holds the labels of the array `images`, judging by its name.

    Raises:
        SourceError: there are several.
    """
    found = _named_labels(images, arrays)
    if len(found) > 1:
        listed = ", ".join(map(repr, found))
        raise SourceError(f"{location!r}: {listed} have usual names of labels; --labels {found[0]} takes that one")
    others = {name: array for name, array in arrays.items() if name != images and not _like_images(array)}
    if not found and others:
        log.warning(
            "%r is built without labels: none of its other arrays has a usual name of labels (%s); --labels NAME "
            "takes one of them, and --labels none is for images without labels",
            location, shown(others),
        )  # fmt: skip
    return found[0] if found else None


def image_sides(arrays: Mapping[str, Array], location: str, *, labelled: bool) -> dict[str, str]:
    """The names of the arrays with the images of each side of a split, train first.

    Args:
        arrays: the arrays of the file.
        location: SRC, for messages.
        labelled: whether labels are wanted.

    Raises:
        SourceError: there are no such arrays, or only for one side; several for a side; or labels of some sides alone.
    """
    found = _sides(arrays)
    if not _are_sides(found):
        raise SourceError(
            f"--splits all: {location!r} has {shown(arrays)}; each side needs one array of images, named for it: "
            "x_train and x_test, or train_images, val_images and test_images. Rename them, or give one array as "
            "FILE.npz/NAME.npy, or divide SRC with --split val=0.1"
        )
    sides = {side: found[side][0] for side in _SIDES if side in found}
    lacking = [name for name in sides.values() if not _named_labels(name, arrays)]
    if labelled and 0 < len(lacking) < len(sides):
        raise SourceError(
            f"--splits all: {location!r} has labels for some sides, but none for {', '.join(map(repr, lacking))}; add "
            f"them (it has {shown(arrays)}), or use --labels none"
        )
    return sides


def _sides(arrays: Mapping[str, Array]) -> dict[str, list[str]]:
    """The names of the arrays that, judging by their names, hold the images of each side of a split."""
    found: dict[str, list[str]] = {}
    for name, array in arrays.items():
        part = _words(name).difference(_IMAGES)
        for side, words in _SIDES.items():
            if len(part) == 1 and part <= words and _like_images(array) and _words(name) & {*_IMAGES}:
                found.setdefault(side, []).append(name)
    return found


def _are_sides(found: Mapping[str, list[str]]) -> bool:
    """Whether there are sides of a split, with one array each, and train among them."""
    return len(found) > 1 and "train" in found and all(len(names) == 1 for names in found.values())


def class_names_array(arrays: Mapping[str, Array]) -> Array | None:
    """The array with the names of classes by number: text, (K,), and named `class_names`; None if there is none."""
    for name, array in arrays.items():
        if _words(name) == _CLASS_NAMES and array.dtype.kind in "US" and len(array.shape) == 1:
            return array
    return None


def flat_side(array: Array) -> int:
    """The side of the square images in an array (N, 3 * side * side) of uint8; 0 if it holds none."""
    if len(array.shape) != 2 or array.dtype != np.uint8:
        return 0
    side = math.isqrt(array.shape[1] // 3)
    return side if side >= _MIN_FLAT_SIDE and 3 * side * side == array.shape[1] else 0


def is_flat(name: str, array: Array) -> bool:
    """Whether an array holds images as those of downsampled ImageNet: rows of three planes, one after the other."""
    return name == _FLAT and flat_side(array) > 0


def shown(arrays: Mapping[str, Array]) -> str:
    """The arrays of a file, for messages."""
    listed = [f"{name!r} {array.dtype} {array.shape}" for name, array in arrays.items()]
    return ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "") or "none"


def _words(name: str) -> frozenset[str]:
    """The words in a name: `train` and `x` in `X_train`, `xtrain` and `trainX`."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _like_images(array: Array) -> bool:
    return len(array.shape) in (3, 4)


def _named_labels(images: str, arrays: Mapping[str, Array]) -> list[str]:
    """The arrays that, judging by their names, hold the labels of an array of images; there should be at most one.

    If several arrays hold images, each has its own labels, and names of just a label word do not count.
    """
    alone = sum(map(_like_images, arrays.values())) <= 1
    own = _words(images).difference(_IMAGES)
    parts = [own, *([frozenset[str](), frozenset({"train"}) - own] if alone else [])]
    others = [name for name in arrays if name != images]
    for part in parts:
        named = [name for name in others if _words(name) & _LABELS and _words(name) - _LABELS - {*_IMAGES} == part]
        if named:
            return named
    unnamed = [name for name in others if _UNNAMED.fullmatch(name) and not _like_images(arrays[name])]
    if (match := _UNNAMED.fullmatch(images)) is None:
        return []
    following = f"arr_{int(match[1]) + 1}"
    return unnamed if alone and len(unnamed) == 1 else [name for name in unnamed if name == following]
