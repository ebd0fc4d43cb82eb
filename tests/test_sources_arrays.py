"""Arrays as sources: that rows become the images they are, where labels are found, and what is said of bad files."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import MakeDataset, build_cpu, cpu_config, flip_bit, items, read_shards

import gpu_npz
from gpu_npz.audit.verify import verify
from gpu_npz.builder.build import build_split
from gpu_npz.builder.estimate import estimate
from gpu_npz.builder.maintenance import repair
from gpu_npz.builder.planning import Measuring
from gpu_npz.config import BuildConfig
from gpu_npz.errors import MismatchError, ShardError, SourceError, UsageError
from gpu_npz.sources import open_source, sides_of_source
from gpu_npz.sources.base import Item, Source, read_item
from gpu_npz.sources.rejects import BadItem

RANDOM = np.random.default_rng(0)
GRAY, RGB, RGBA = (RANDOM.integers(0, 256, (6, 9, 7, *more), np.uint8) for more in ((), (3,), (4,)))
LABELS = np.array([2, 0, 1, 1, 0, 2])
NAMES = ("airplane", "automobile", "bird")


def pictures(source: Source) -> list[Image.Image]:
    return [Image.open(io.BytesIO(read_item(source, item))) for item in items(source)]


def labels_of(source: Source) -> list[Any]:
    return [item.label for item in items(source)]


def save(path: Path, array: Any, **more: Any) -> str:
    """An .npy, or an .npz of several arrays, which are stored."""
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, **array, **more)
    return str(path)


def header(shape: object, descr: object = "|u1", fortran: bool = False) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


# NumPy


@pytest.mark.parametrize(
    ("array", "pixels"),
    [
        (GRAY, GRAY),
        (GRAY[..., None], GRAY),
        (GRAY[:, None], GRAY),
        (RGB, RGB),
        (np.ascontiguousarray(RGB.transpose(0, 3, 1, 2)), RGB),
        (RGBA, RGBA),
        (np.ascontiguousarray(RGBA.transpose(0, 3, 1, 2)), RGBA),
        (GRAY.astype(np.uint16) * 257 - 3, GRAY.astype(np.uint16) * 257 - 3),
        (GRAY.astype(">u2") * 200, GRAY.astype(np.uint16) * 200),
    ],
    ids=["HW", "HW1", "1HW", "RGB", "planar RGB", "RGBA", "planar RGBA", "uint16", "big-endian uint16"],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_rows_are_the_images_that_they_are(tmp_path: Path, name: str, array: Any, pixels: Any) -> None:
    location = save(tmp_path / name, array if name == "a.npy" else {"pictures": array})
    source = open_source(location)
    assert source.kind == "numpy"
    assert [item.path for item in items(source)] == [f"{row:05d}" for row in range(6)]
    assert (np.stack([np.asarray(picture) for picture in pictures(source)]) == pixels).all()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(item) for item in items(source)] == [source.read(item) for item in items(source)]
    assert source.files == ((name, os.path.getsize(location)),)


def test_a_uint16_ppm_has_maxval_65535_and_its_high_byte_first(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "a.npy", RGB.astype(np.uint16) * 251))
    pixels = (RGB[0].astype(np.uint16) * 251).astype(">u2").tobytes()
    assert source.read(items(source)[0]) == b"P6\n7 9\n65535\n" + pixels


def test_a_deflated_array_is_inflated_once_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=RGB, labels=LABELS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path / "a.npz"))
    assert "each process that reads it decompresses it once" in caplog.text
    copy = pickle.loads(pickle.dumps(source))
    for each in (source, copy):
        assert (np.stack([np.asarray(picture) for picture in pictures(each)]) == RGB).all()
    assert labels_of(source) == labels_of(copy) == LABELS.tolist()
    item = items(source)[5]
    os.rename(tmp_path / "a.npz", tmp_path / "b.npz")
    assert (np.asarray(Image.open(io.BytesIO(source.read(item)))) == RGB[5]).all()  # from what was inflated
    assert os.listdir(tmp_path) == ["b.npz"]


def test_a_deflated_array_that_is_damaged_is_an_error_of_reading(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.tile(RGB, (40, 10, 10, 1)))
    source = open_source(str(tmp_path / "a.npz"))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(OSError, match="array 'images'"):
        source.read(items(source)[0])


def test_rows_that_do_not_exist_are_missing_and_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    location = save(tmp_path / "a.npy", RGB)
    source = open_source(location)
    for place in [(6,), (-1,), (2**60,), (), (0, 0)]:
        with pytest.raises(BadItem) as caught:
            source.read(Item(0, "x", None, place))
        assert caught.value.code == "missing"
    os.truncate(location, 400)
    with pytest.raises(OSError, match="cut off"):
        source.read(items(source)[5])


def test_the_array_of_images_is_found_by_dimensions_name_or_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mnist = {"x_train": GRAY, "y_train": LABELS, "x_test": GRAY[:2], "y_test": LABELS[:2]}
    location = save(tmp_path / "mnist.npz", mnist)
    assert labels_of(open_source(location)) == LABELS.tolist()
    left = f"{location!r}: using the images in 'x_train'; 'x_test' may hold images, too: "
    assert left + f"to use them, give SRC as {location}/x_test" in caplog.text
    test = open_source(location + "/x_test.npy")
    assert labels_of(test) == LABELS[:2].tolist()
    assert test.location == location + "/x_test.npy"
    medical = {
        "val_images": RGB[:3],
        "val_labels": LABELS[:3, None],
        "train_images": RGB,
        "train_labels": LABELS[:, None],
    }
    location = save(tmp_path / "medical.npz", medical)
    assert labels_of(open_source(location)) == LABELS.tolist()
    assert labels_of(open_source(location + "/val_images.npy")) == LABELS[:3].tolist()
    with pytest.raises(SourceError, match=r"no array 'other'; it has 'val_images' uint8 \(3, 9, 7, 3\), "):
        open_source(location + "/other.npy")
    with pytest.raises(SourceError, match=r"several arrays have the dimensions of images.*b\.npz/NAME\.npy says which"):
        open_source(save(tmp_path / "b.npz", {"one": RGB, "two": RGB}))
    with pytest.raises(SourceError, match=r"no array has the dimensions of images; it has 'one' uint8 \(3,\)"):
        open_source(save(tmp_path / "b.npz", {"one": np.zeros(3, np.uint8)}))
    with pytest.raises(SourceError, match="it has none"):
        open_source(save(tmp_path / "b.npz", {}))


def test_labels_of_other_images_are_not_taken(tmp_path: Path) -> None:
    arrays = {"x_train": RGB, "y_train": LABELS, "x_val": RGB[::-1], "x_test": RGB, "y_test": LABELS[::-1],
              "labels": LABELS}  # fmt: skip
    location = save(tmp_path / "a.npz", arrays)
    assert labels_of(open_source(f"{location}/x_train.npy")) == LABELS.tolist()
    assert labels_of(open_source(f"{location}/x_test.npy")) == LABELS[::-1].tolist()
    assert labels_of(open_source(f"{location}/x_val.npy")) == [None] * 6


def test_labels_are_those_of_the_file_that_was_named_in_whatever_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    save(tmp_path / "y.npy", LABELS)
    save(tmp_path / "other/y.npy", LABELS[::-1])
    location = save(tmp_path / "x.npy", RGB)
    monkeypatch.chdir(tmp_path)
    copy = pickle.dumps(open_source(location, BuildConfig(labels="y.npy")))
    monkeypatch.chdir(tmp_path / "other")
    assert labels_of(pickle.loads(copy)) == LABELS.tolist()


def test_labels_are_another_array_or_another_file_or_none(tmp_path: Path) -> None:
    texts = np.array(["b", "a", "c", "c", "a", "b"])
    arrays = {"images": RGB, "labels": LABELS, "texts": texts, "bytes": texts.astype("S"), "short": LABELS[:5],
              "flags": LABELS > 0, "depths": LABELS / 2}  # fmt: skip
    location = save(tmp_path / "a.npz", arrays)

    def labelled(labels: str | None, classes: Any = None) -> tuple[list[Any], Any]:
        source = open_source(location, BuildConfig(labels=labels), classes)
        return labels_of(source), source.class_names

    assert labelled(None) == (LABELS.tolist(), None)
    assert labelled(None, NAMES) == (LABELS.tolist(), NAMES)
    assert labelled("none") == ([None] * 6, None)
    assert labelled("texts") == labelled("bytes") == ([1, 0, 2, 2, 0, 1], ("a", "b", "c"))
    assert labelled("texts", ["c", "b", "a"]) == ([1, 2, 0, 0, 2, 1], ("c", "b", "a"))
    assert labelled("flags")[0] == [1, 0, 1, 1, 0, 1]
    assert labelled("depths")[0] == [1.0, 0.0, 0.5, 0.5, 0.0, 1.0]
    with pytest.raises(SourceError, match=r"array 'short' has shape .*one number or text for each of the 6 images"):
        labelled("short")
    with pytest.raises(SourceError, match="no array 'other'; it has 'images'"):
        labelled("other")
    with pytest.raises(UsageError, match="contradict"):
        labelled("none", NAMES)

    location = save(tmp_path / "a.npy", RGB)
    save(tmp_path / "l.npy", LABELS)
    assert labelled(None) == ([None] * 6, None)
    assert labelled(str(tmp_path / "l.npy"), NAMES) == (LABELS.tolist(), NAMES)
    with pytest.raises(UsageError, match=r"another FILE\.npy, or none"):
        labelled("labels")
    with pytest.raises(SourceError, match="has no labels; leave --classes-from out"):
        labelled(None, NAMES)


def labels_in(tmp_path: Path, arrays: dict[str, Any], labels: str | None = None, classes: Any = None) -> list[Any]:
    """Labels, names of classes, and names and kinds of columns, of an .npz of these arrays."""
    source = open_source(save(tmp_path / "a.npz", arrays), BuildConfig(labels=labels), classes)
    return [labels_of(source), source.class_names, [(each.name, each.kind) for each in source.columns]]


INTEGERS = [("labels", "integer")]


@pytest.mark.parametrize(
    ("images", "name"),
    [
        *[("images", name) for name in ("label", "Labels", "target", "targets", "Y", "y", "class", "category")],
        *[("pictures", name) for name in ("labels", "y", "y_train", "train_labels")],
        ("images", "image_labels"), ("X_train", "y_train"), ("x_test", "y_test"), ("Xtrain", "ytrain"),
        ("x_train", "y"),
        ("trainX", "trainY"), ("images_val", "labels_val"), ("TestImages", "TestLabels"), ("data", "target"),
        ("left", "left_labels"), ("arr_0", "arr_1"), ("arr_1", "arr_0"), ("arr_0", "labels"),
    ],
)  # fmt: skip
def test_labels_are_recognised_by_the_usual_names(tmp_path: Path, images: str, name: str) -> None:
    assert labels_in(tmp_path, {images: RGB, name: LABELS, "ids": np.arange(6)})[0] == LABELS.tolist()


def test_arrays_without_names_are_images_and_the_labels_behind_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", RGB, LABELS, RGB[::-1], LABELS[::-1], np.arange(3))
    assert labels_of(open_source(tmp_path / "a.npz")) == LABELS.tolist()
    assert labels_of(open_source(f"{tmp_path}/a.npz/arr_2.npy")) == LABELS[::-1].tolist()
    np.savez(tmp_path / "a.npz", RGB, RGB, LABELS, LABELS)
    assert labels_of(open_source(tmp_path / "a.npz")) == [None] * 6


ONE_HOT = np.eye(4)[LABELS]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_hot_rows_are_classes(tmp_path: Path, dtype: Any, order: Any) -> None:
    arrays = {"images": RGB, "labels": np.asarray(ONE_HOT.astype(dtype), order=order)}
    assert labels_in(tmp_path, arrays) == [LABELS.tolist(), ("0", "1", "2", "3"), []]
    assert labels_in(tmp_path, arrays, "labels:class") == [LABELS.tolist(), ("0", "1", "2", "3"), []]
    assert labels_in(tmp_path, arrays, classes=["a", "b", "c", "d"])[:2] == [LABELS.tolist(), ("a", "b", "c", "d")]
    with pytest.raises(SourceError, match="one-hot rows of 4 classes, and --classes-from names 3; give as many"):
        labels_in(tmp_path, arrays, classes=NAMES)
    columns = [(f"labels_{number}", "integer") for number in range(4)]
    assert labels_in(tmp_path, arrays, "labels:integer") == [ONE_HOT.tolist(), None, columns]
    location = save(tmp_path / "a.npy", RGB)
    alone = save(tmp_path / "y.npy", arrays["labels"])
    assert labels_of(open_source(location, BuildConfig(labels=alone))) == LABELS.tolist()
    assert labels_of(open_source(location, BuildConfig(labels=f"{alone}:float"))) == ONE_HOT.tolist()


def changed(values: Any, place: tuple[int, int], value: Any) -> Any:
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        changed(ONE_HOT, (1, 0), 0.9),
        changed(ONE_HOT, (1, 1), 1),
        changed(ONE_HOT, (1, 0), 0),
        changed(ONE_HOT, (1, 1), 1e-7),
        ONE_HOT * 255,
        ONE_HOT * 2 - 1,
        RANDOM.integers(0, 2, (6, 14)),
    ],
    ids=["soft", "two", "none", "almost", "255", "-1", "14"],
)
def test_rows_that_are_not_one_hot_are_columns(tmp_path: Path, values: Any) -> None:
    kind = "float" if values.dtype.kind == "f" else "integer"
    columns = [(f"labels_{number}", kind) for number in range(values.shape[1])]
    assert labels_in(tmp_path, {"images": RGB, "labels": values}) == [values.tolist(), None, columns]
    with pytest.raises(UsageError, match="--classes-from names one column's classes"):
        labels_in(tmp_path, {"images": RGB, "labels": values}, classes=NAMES)


def test_columns_of_texts_and_kinds_that_are_said(tmp_path: Path) -> None:
    texts = np.array([["a", "x"], ["b", "y"]] * 3)
    assert labels_in(tmp_path, {"images": RGB, "y": texts})[::2] == [
        [[0, 0], [1, 1]] * 3, [("y_0", "class"), ("y_1", "class")]
    ]  # fmt: skip
    halves = {"images": RGB, "y": LABELS.astype(float)}
    assert labels_in(tmp_path, halves)[2] == [("y", "float")]
    assert labels_in(tmp_path, halves, "y:integer") == [LABELS.tolist(), None, [("y", "integer")]]
    assert labels_in(tmp_path, halves, "y:class") == [LABELS.tolist(), ("0", "1", "2"), []]
    assert labels_in(tmp_path, {"images": RGB, "labels": LABELS[:, None]}) == [LABELS.tolist(), None, INTEGERS]


@pytest.mark.parametrize(
    ("values", "way"),
    [
        (LABELS[:5], "fix it, or say --labels NAME for another array, or --labels none"),
        (np.r_[LABELS, 0], "fix it"),
        (ONE_HOT.T, r"its axes are in the wrong order: save array\.T"),
        (LABELS[None], r"its axes are in the wrong order: save array\.T"),
        (np.zeros((6, 0)), "fix it"),
        (np.zeros((6, 9, 7), np.uint8), "fix it"),
        (np.int64(3), "fix it"),
    ],
    ids=["few", "many", "KN", "1N", "N0", "NHW", "scalar"],
)
@pytest.mark.parametrize("name", ["labels", "y_train"])
def test_labels_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path, name: str, values: Any, way: str) -> None:
    arrays = {"images" if name == "labels" else "x_train": RGB, name: values}
    shapes = re.escape(f"has shape {np.shape(values)}, and '{tmp_path}/a.npz': array '{next(iter(arrays))}' has (6, 9,")
    for labels in (None, name):
        with pytest.raises(SourceError, match=rf"array '{name}' {shapes}.*each of the 6 images, \(6,\).*{way}"):
            labels_in(tmp_path, arrays, labels)
    assert labels_in(tmp_path, arrays, "none")[0] == [None] * 6


def test_several_arrays_with_usual_names_are_not_guessed_at(tmp_path: Path) -> None:
    arrays = {"images": RGB, "label": LABELS, "target": LABELS / 2}
    with pytest.raises(
        SourceError, match=r"'label', 'target' have usual names of labels; --labels label takes that one"
    ):
        labels_in(tmp_path, arrays)
    assert labels_in(tmp_path, arrays, "label")[0] == LABELS.tolist()


def test_arrays_that_are_left_over_are_named_where_none_has_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = {"images": RGB, "grades": LABELS, "label_names": np.array(NAMES)}
    assert labels_in(tmp_path, arrays)[0] == [None] * 6
    assert "usual name of labels ('grades' int64 (6,), 'label_names' <U10 (3,)); --labels NAME takes" in caplog.text
    caplog.clear()
    assert labels_in(tmp_path, arrays, "grades")[0] == LABELS.tolist()
    assert labels_in(tmp_path, arrays, "none")[0] == [None] * 6
    assert labels_in(tmp_path, {**arrays, "labels": LABELS})[0] == LABELS.tolist()
    assert labels_in(tmp_path, {"arr_0": RGB})[0] == [None] * 6
    assert not caplog.records


HUGE = 1 << 40
BAD_ARRAYS: dict[str, tuple[bytes, str]] = {
    "float": (header((1, 5, 5), "<f4") + bytes(100), r"has float32 \(1, 5, 5\), with .*: use --scale 255"),
    "complex": (header((1, 5, 5), "<c8") + bytes(200), r"has complex64 \(1, 5, 5\); allowed are uint8 and uint16"),
    "int64": (header((1, 5, 5), "<i8") + bytes(200), r"has int64 \(1, 5, 5\); allowed are uint8 and uint16"),
    "uint32": (header((1, 5, 5), "<u4") + bytes(100), "allowed are uint8 and uint16"),
    "record": (header((1, 5, 5), [("a", "|u1")]) + bytes(25), "allowed are uint8 and uint16"),
    "objects": (header((2,), "|O") + pickle.dumps([1, 2]), r"Python objects, which are a pickle.*np\.stack"),
    "Fortran": (header((2, 5, 5), "|u1", True) + bytes(50), "Fortran order; images are in C order"),
    "cut": (header((2, 5, 5)) + bytes(49), "does not fit into .*; it is damaged or cut"),
    "absurd": (header((HUGE, HUGE, HUGE)) + bytes(50), "does not fit into"),
    "negative": (header((-2, -5, 5)) + bytes(50), "does not fit into"),
    "no images": (header((0, 5, 5)), "no image at all; give an array with images"),
    "no rows": (header((3, 0, 5)), "no image at all"),
    "flat": (header((2, 25)) + bytes(50), r"allowed are \(N, H, W\), \(N, H, W, C\) and \(N, C, H, W\)"),
    "scalar": (header(()) + bytes(1), r"allowed are \(N, H, W\)"),
    "one image": (header((5, 6, 3)) + bytes(90), r"looks like one image of 3 channels; .* as array\[None\]"),
    "one with alpha": (header((5, 6, 4)) + bytes(120), r"looks like one image of 4 channels; allowed are \(N, H, W\)"),
    "one gray image": (header((5, 6, 1), "<u2") + bytes(60), r"looks like one image of 1 channels"),
    "5 channels": (header((1, 5, 5, 5)) + bytes(125), "C being 1, 3 or 4"),
    "either": (header((1, 3, 5, 3)) + bytes(45), "channels could be first or last"),
    "deep alpha": (header((1, 5, 5, 4), "<u2") + bytes(200), "alpha is allowed with uint8 only"),
    "no header": (b"\x93NUMPY\x01\x00\xff\xff", r"no \.npy that can be read"),
    "version 9": (header((1, 5, 5)).replace(b"\x01\x00", b"\x09\x00", 1), r"no \.npy that can be read"),
    "a program": (header("__import__('os')") + bytes(9), r"no \.npy that can be read"),
    "unclosed": (b"\x93NUMPY\x01\x00\x05\x00{'a':", r"no \.npy that can be read"),
    "text": (b"This is no array.", r"begins with b'This i'; copy it again|no \.npy that can be read"),
    "empty": (b"", r"the file is empty; copy or make it again|no \.npy that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ARRAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_arrays_are_refused_with_what_is_allowed(tmp_path: Path, what: str, packed: bool) -> None:
    data, message = BAD_ARRAYS[what]
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", data)
    else:
        path.write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(f"{path}/images.npy" if packed else str(path))
    assert str(path) in str(caught.value)


def test_an_image_larger_than_any_should_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(header((1, 1 << 15, 1 << 15)))
    os.truncate(path, (1 << 30) + 500)  # which takes no space on the disk
    with pytest.raises(SourceError, match="images of 1073741824 bytes; at most 536870911 are allowed"):
        open_source(str(path))


@pytest.mark.parametrize(
    "labels", [np.frombuffer(b"\xff" * 24, "<U1"), np.zeros(6, "<U1"), np.frombuffer(b"\0\xd8\0\0" * 6, "<U1")]
)
def test_labels_that_are_no_texts_are_refused(tmp_path: Path, labels: Any) -> None:
    location = save(tmp_path / "a.npz", {"images": RGB, "labels": labels})
    with pytest.raises(SourceError, match=r"no (text|label|UTF-8)"):
        open_source(location)


def test_labels_that_are_no_npy_or_are_a_pickle_are_refused(tmp_path: Path) -> None:
    images = save(tmp_path / "a.npy", RGB)
    np.savez(tmp_path / "l.npz", y=LABELS)
    os.rename(tmp_path / "l.npz", tmp_path / "l.npy")
    with pytest.raises(SourceError, match=r"is an \.npz; give an \.npy"):
        open_source(images, BuildConfig(labels=str(tmp_path / "l.npy")))
    np.save(tmp_path / "l.npy", np.array([None] * 6, object))
    with pytest.raises(SourceError, match="never loaded"):
        open_source(images, BuildConfig(labels=str(tmp_path / "l.npy")))


def test_what_is_wrong_with_other_arrays_does_not_matter(tmp_path: Path) -> None:
    fortran = np.asfortranarray(LABELS.reshape(2, 3))
    arrays = {"images": RGB, "labels": LABELS, "notes": np.array([{}], object), "fortran": fortran}
    assert labels_of(open_source(save(tmp_path / "a.npz", arrays))) == LABELS.tolist()
    for labels, message in ((LABELS.astype(object), "Python objects"), (LABELS.astype("M8[s]"), "numbers or texts")):
        location = save(tmp_path / "a.npz", {"images": RGB, "labels": labels})
        with pytest.raises(SourceError, match=rf"array 'labels'.*{message}"):
            open_source(location)
        assert labels_of(open_source(location, BuildConfig(labels="none"))) == [None] * 6


def test_damaged_npz_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, {"images": RGB})
    whole = path.read_bytes()
    central = whole.index(b"PK\1\2")
    bomb = bytearray(whole)
    bomb[central + 20 : central + 28] = struct.pack("<II", 9, 1 << 30)  # its sizes, deflated and inflated
    bomb[central + 10] = zipfile.ZIP_DEFLATED
    strange, encrypted = bytearray(whole), bytearray(whole)
    strange[central + 10] = zipfile.ZIP_LZMA
    encrypted[central + 8] |= 1
    for data, message in (
        (whole[: len(whole) // 2], r"is no \.npz, damaged or cut"),
        (whole[:-1], r"damaged or cut \(there is no whole end record\)"),
        (bytes(bomb), "1073741824 bytes from 9"),
        (bytes(strange), "compressed in another way"),
        (bytes(encrypted), "is encrypted"),
        (b"PK\5\6", r"is no \.npz"),
    ):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=message):
            open_source(str(path))
    with pytest.raises(SourceError, match=r"c\.npz.*No such file"):
        open_source(str(tmp_path / "c.npz"))


@pytest.mark.parametrize("name", ["labels", "class_names"])
def test_stored_labels_and_names_with_another_crc_are_refused(tmp_path: Path, name: str) -> None:
    arrays = {"images": RGB, "labels": LABELS, "class_names": np.array(list("abcdefghijklmnopqrstuvwxyz"))}
    location = Path(save(tmp_path / "a.npz", arrays))
    flip_bit(location, location.read_bytes().index(arrays[name].tobytes()))
    with pytest.raises(SourceError, match=f"array '{name}': its CRC-32"):
        open_source(str(location))


def test_a_file_with_two_arrays_that_could_be_its_image_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "src/cat").mkdir(parents=True)
    np.savez(tmp_path / "src/cat/0.npz", a=RGB[0], b=RGB[1])
    source = open_source(str(tmp_path / "src"))
    with pytest.raises(BadItem, match=r"it has no array with .*, or several without a usual name; its arrays: 'a' "):
        source.read(items(source)[0])


def test_a_file_of_one_image_with_another_crc_is_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "src/cat/0.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, image=RGB[0])
    flip_bit(path, path.read_bytes().index(RGB[0].tobytes()))
    source = open_source(str(tmp_path / "src"))
    with pytest.raises(BadItem, match="CRC-32"):
        source.read(items(source)[0])


# Several files, and downsampled ImageNet


def test_files_are_read_in_the_order_of_their_names_and_rows(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        save(tmp_path / f"part_{number}.npz", {"images": RGB + np.uint8(number), "labels": LABELS + number})
    np.savez_compressed(tmp_path / "part_2.npz", images=RGB + np.uint8(2), labels=LABELS + 2)
    order = (0, 10, 2)
    for location in (str(tmp_path), f"{tmp_path}/part_*.npz", f"{tmp_path}/part_*.npz/images.npy"):
        source = open_source(location)
        assert source.kind == "numpy"
        found = items(source)
        assert [item.path for item in found] == [f"part_{part}/{row:05d}" for part in order for row in range(6)]
        assert labels_of(source) == [label + part for part in order for label in LABELS.tolist()]
        pixels = np.concatenate([RGB + np.uint8(part) for part in order])
        copy = pickle.loads(pickle.dumps(source))
        assert (np.stack([np.asarray(picture) for picture in pictures(copy)]) == pixels).all()
        assert [name for name, _ in source.files] == [f"part_{part}.npz" for part in order]
    source = open_source(f"{tmp_path}/part_{{0,2,10}}.npz")
    assert [item.path[:8] for item in items(source)][::6] == ["part_0/0", "part_2/0", "part_10/"]
    for place in [(3, 0), (-1, 0), (0, 6), (0,), ()]:
        with pytest.raises(BadItem) as caught:
            source.read(Item(0, "x", None, place))
        assert caught.value.code == "missing"


def test_files_of_one_stem_keep_their_extensions(tmp_path: Path) -> None:
    (tmp_path / "a.b").mkdir()
    for name in ("a.npy", "b.npy", "a.NPY"):
        save(tmp_path / name.replace("NPY", "x.npy"), RGB)
    os.rename(tmp_path / "a.x.npy", tmp_path / "a.npz")
    paths = [item.path for item in items(open_source(f"{tmp_path}/*.np[yz]", BuildConfig(source="numpy")))]
    assert paths[::6] == ["a.npy/00000", "a.npz/00000", "b.npy/00000"]
    assert len({*paths}) == 18


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": RGB}, r"b\.npz' has the arrays 'images' uint8 .*a\.npz' 'images' .* 'labels'"),
        ({"pictures": RGB, "labels": LABELS}, r"b\.npz' has the arrays 'pictures'"),
        ({"images": RGB.astype(np.uint16), "labels": LABELS}, r"b\.npz': array 'images' has uint16"),
        ({"images": RGB[:, :8], "labels": LABELS}, r"b\.npz': array 'images' has uint8 \(6, 8, 7, 3\), and .*a\.npz"),
        ({"images": RGB, "labels": LABELS[:5]}, r"b\.npz': array 'labels' has shape \(5,\)"),
        ({"images": RGB, "labels": LABELS / 2}, r"b\.npz': array 'labels' has float64"),
        ({"images": RGB, "labels": np.array(list("abcdef"))}, r"b\.npz': array 'labels' has <U1"),
        ({"images": RGB, "labels": np.eye(6)}, r"b\.npz': array 'labels' has float64"),
    ],
)
def test_a_file_that_differs_from_the_first_is_named(tmp_path: Path, arrays: Any, message: str) -> None:
    save(tmp_path / "a.npz", {"images": RGB, "labels": LABELS})
    save(tmp_path / "b.npz", arrays)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_a_folder_with_sides_of_a_split_or_with_labels_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x_test.npy", RGB)
    save(tmp_path / "x_train.npy", RGB)
    with pytest.raises(SourceError, match=r"'x_test\.npy', 'x_train\.npy', which look like the sides of a split"):
        open_source(tmp_path)
    assert len(items(open_source(f"{tmp_path}/x_*.npy"))) == 12
    os.rename(tmp_path / "x_test.npy", tmp_path / "images.npy")
    save(tmp_path / "x_train.npy", LABELS)
    with pytest.raises(SourceError, match=r"x_train\.npy' has int64 \(6,\).*images alone as SRC, and --labels FILE"):
        open_source(tmp_path)
    save(tmp_path / "labels.npy", np.r_[LABELS, LABELS])
    save(tmp_path / "x_train.npy", RGB)
    labels = BuildConfig(labels=str(tmp_path / "labels.npy"))
    assert labels_of(open_source(f"{tmp_path}/{{images,x_train}}.npy", labels)) == [*LABELS.tolist()] * 2


def planes(images: Any) -> Any:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


SQUARES = RANDOM.integers(0, 256, (6, 8, 8, 3), np.uint8)


def test_rows_of_downsampled_imagenet_are_planes_and_its_labels_classes(tmp_path: Path) -> None:
    arrays = {"data": planes(SQUARES), "labels": LABELS + 1, "mean": planes(SQUARES).mean(axis=0)}
    source = open_source(save(tmp_path / "a.npz", arrays))
    assert (np.stack([np.asarray(picture) for picture in pictures(source)]) == SQUARES).all()
    assert (labels_of(source), source.class_names) == (LABELS.tolist(), ("1", "2", "3"))
    few = {"data": planes(SQUARES), "labels": np.array([2, 2, 3, 3, 2, 3])}
    assert labels_in(tmp_path, few, classes=("1", "2", "3"))[:2] == [[1, 1, 2, 2, 1, 2], ("1", "2", "3")]
    assert labels_in(tmp_path, arrays, classes=NAMES)[:2] == [LABELS.tolist(), NAMES]
    assert labels_in(tmp_path, {**arrays, "labels": LABELS}, classes=NAMES)[:2] == [LABELS.tolist(), NAMES]
    with pytest.raises(SourceError, match="from 1 to 3 for 4 names of classes, which could be"):
        labels_in(tmp_path, arrays, classes=(*NAMES, "cat"))
    assert labels_in(tmp_path, arrays, "labels:integer")[0] == (LABELS + 1).tolist()
    for array in (planes(SQUARES)[:, :-1], planes(SQUARES).astype(np.uint16), planes(SQUARES[:, :2, :2])):
        with pytest.raises(SourceError, match="no array has the dimensions of images"):
            open_source(save(tmp_path / "a.npz", {"data": array}))
    with pytest.raises(SourceError, match=r"turn rows of pixels into images with array\.reshape"):
        open_source(save(tmp_path / "a.npy", planes(SQUARES)))


def test_an_array_of_class_names_names_numbers_texts_and_one_hot_rows(tmp_path: Path) -> None:
    names = {"class_names": np.array(["cat", "ant", "bee"])}
    named = [LABELS.tolist(), ("cat", "ant", "bee")]
    texts = names["class_names"][LABELS]
    for labels in (LABELS, LABELS.astype(float), np.eye(3)[LABELS], texts, texts.astype("S"), LABELS[:, None]):
        assert labels_in(tmp_path, {"images": RGB, "labels": labels, **names})[:2] == named
    assert labels_in(tmp_path, {"images": RGB, "labels": LABELS, "class_names": texts[:0].astype("S3")})[1] is None
    arrays = {"images": RGB, "labels": LABELS, **names}
    assert labels_in(tmp_path, arrays, classes=("ant", "bee", "cat"))[0] == [(each + 2) % 3 for each in LABELS.tolist()]
    assert labels_in(tmp_path, arrays, "labels:integer")[:2] == [LABELS.tolist(), None]
    flat = {"data": planes(SQUARES), "labels": LABELS + 1, **names}
    assert labels_in(tmp_path, flat)[:2] == named
    for bad, message in (
        ({"labels": LABELS + 1}, "there are names for 3 classes, 0 to 2"),
        ({"labels": np.array(list("abcdef"))}, "classes that the array class_names does not name"),
        ({"class_names": np.array(["a", "a", "b"])}, "an empty name, or one twice"),
    ):
        with pytest.raises(SourceError, match=message):
            labels_in(tmp_path, {**arrays, **bad})


# Floats


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("scale", ["255", "signed"])
def test_floats_that_were_levels_become_them_again(
    tmp_path: Path, dtype: str, scale: Any, caplog: pytest.LogCaptureFixture
) -> None:
    every = np.arange(256).reshape(1, 16, 16).repeat(3, 0)
    values = (every / 255 if scale == "255" else every / 127.5 - 1).astype(dtype)
    config = BuildConfig(scale=scale)
    for saved in (save(tmp_path / "a.npy", values), save(tmp_path / "a.npz", {"images": values})):
        source = open_source(saved, config)
        copy = pickle.loads(pickle.dumps(source))
        assert (np.stack([np.asarray(picture) for picture in pictures(copy)]) == every).all()
    np.savez_compressed(tmp_path / "a.npz", images=values)
    caplog.clear()
    source = open_source(tmp_path / "a.npz", config)
    assert (np.stack([np.asarray(picture) for picture in pictures(source)]) == every).all()
    assert "rounded" not in caplog.text
    other = "signed" if scale == "255" else "255"
    with pytest.raises(SourceError, match=rf"with values from .* in 3 sampled images; .*: use --scale {scale}"):
        open_source(saved, BuildConfig())
    if scale == "255":
        open_source(saved, BuildConfig(scale=other))
        assert "--scale 255 is for 0 to 1" in caplog.text
    else:
        with pytest.raises(SourceError, match=r"--scale 255 is for 0 to 1: use --scale signed"):
            open_source(saved, BuildConfig(scale=other))


def test_scale_is_for_floats_and_for_arrays_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--scale 255 is for floats; .* has uint8 \(6, 9, 7, 3\): omit it"):
        open_source(save(tmp_path / "a.npy", RGB), BuildConfig(scale=255))
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="--scale requires SRC of the kind numpy"):
        open_source(tmp_path / "a", BuildConfig(scale="signed"))
    for values, way in ((RGB.astype(np.float32), r"save array\.round"), (RGB * 9.0, "scale them to 0 to 1")):
        for scale in ("none", "255", "signed"):
            with pytest.raises(SourceError, match=way):
                open_source(save(tmp_path / "a.npy", values), BuildConfig(scale=scale))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -0.01, 1.003])
def test_an_image_with_a_value_out_of_range_is_a_reject(tmp_path: Path, value: float) -> None:
    values = RGB / np.float32(255)
    values[2, 4, 5, 1] = value
    source = open_source(save(tmp_path / "a.npy", values), BuildConfig(scale="255"))
    found = items(source)
    with pytest.raises(BadItem, match=r"it has the value .*; --scale 255 takes 0 to 1") as caught:
        read_item(source, found[2])
    assert caught.value.code == "undecodable"
    assert (np.asarray(Image.open(io.BytesIO(read_item(source, found[3])))) == RGB[3]).all()
    values[2, 4, 5, 1] = 1.0019  # rounds to 255
    assert len(pictures(open_source(save(tmp_path / "a.npy", values), BuildConfig(scale="255")))) == 6


def test_floats_between_the_levels_are_rounded_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = RANDOM.random((6, 5, 5))
    source = open_source(save(tmp_path / "a.npy", values), BuildConfig(scale="255"))
    assert caplog.text.count("some lie between the levels of 0 to 255 and are rounded, which loses information") == 1
    assert (np.stack([np.asarray(picture) for picture in pictures(source)]) == np.rint(values * 255)).all()


def test_scale_is_stored_where_it_is_given_and_changes_no_other_dataset(tmp_path: Path) -> None:
    levels, floats = save(tmp_path / "l.npy", RGB), save(tmp_path / "f.npy", RGB / 255)
    plain = build_cpu(Path(levels), tmp_path / "plain", dtype="uint8")
    scaled = build_cpu(Path(floats), tmp_path / "scaled", dtype="uint8", scale="255")
    assert (read_shards(plain) == read_shards(scaled)).all()
    settings = [json.loads((out / "dataset.json").read_text())["settings"] for out in (plain, scaled)]
    assert ["scale" in each for each in settings] == [False, True]
    assert not gpu_npz.verify(scaled).problems
    save(Path(floats), RGB / 127.5 - 1)
    with pytest.raises(MismatchError, match="scale: existing 255, requested signed"):
        build_cpu(Path(floats), scaled, dtype="uint8", scale="signed")


# One image per file


def test_one_float_image_per_file_needs_a_scale_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(tmp_path / "a/0.npy", GRAY[0] / 255)
    save(tmp_path / "a/1.npy", GRAY[1])
    save(tmp_path / "a/2.npz", {"image": np.full((5, 5), 2.0)})
    with pytest.raises(SourceError, match=r"'a/0\.npy' has float64 \(9, 7\), .*: use --scale 255"):
        open_source(tmp_path)
    source = open_source(tmp_path, BuildConfig(scale="255"))
    first, *others = items(source)
    assert (np.asarray(Image.open(io.BytesIO(read_item(source, first)))) == GRAY[0]).all()
    for item, detail in zip(others, ("--scale 255 is for floats; it has uint8", "it has the value 2"), strict=True):
        with pytest.raises(BadItem, match=detail):
            read_item(source, item)


def test_an_image_of_too_many_pixels_is_rejected_before_it_is_decompressed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(tmp_path / "a/0.npy", GRAY[0])
    np.savez_compressed(tmp_path / "a/1.npz", image=np.zeros((3000, 3000), np.uint8))
    source = open_source(tmp_path, BuildConfig(size=8, max_pixels=1_000_000))
    small, large = items(source)
    read_item(source, small)
    tracemalloc.start()
    with pytest.raises(BadItem, match="9000000 pixels; at most 1000000") as caught:
        read_item(source, large)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert (caught.value.stage, caught.value.code) == ("decode", "too-large")


def test_class_folders_of_arrays_are_read_like_those_of_images(tmp_path: Path, make_dataset: MakeDataset) -> None:
    ours, theirs = tmp_path / "arrays", tmp_path / "images"
    for row, label in enumerate(LABELS):
        for folder in (ours, theirs):
            (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        image = (RGB[row], GRAY[row], RGB[row].transpose(2, 0, 1), RGBA[row], np.asfortranarray(RGB[row]), GRAY[row])[
            row
        ]
        shown = RGB[row] if row == 2 else image
        Image.fromarray(np.ascontiguousarray(shown)).save(theirs / NAMES[label] / f"{row}.png")
        if row % 2:
            saving = np.savez_compressed if row == 3 else np.savez
            saving(ours / NAMES[label] / f"{row}.npz", image=image, label=label, mask=np.zeros((2, 2, 2, 2)))
        else:
            save(ours / NAMES[label] / f"{row}.npy", image)
    (ours / "bird" / "notes.txt").write_text("no image")
    source = open_source(ours)
    assert (source.kind, source.class_names, source.file_per_item) == ("numpy", NAMES, False)
    assert [item.path for item in items(source)] == [
        f"{NAMES[c]}/{row}.np{'yz'[row % 2]}" for c, row in sorted(zip(LABELS, range(6), strict=True))
    ]
    assert dict(source.left_out) == {".txt": 1}
    one, other = make_dataset(ours, dtype="uint8"), make_dataset(theirs, dtype="uint8")
    assert (read_shards(one) == read_shards(other)).all()
    assert read_shards(one, "labels").tolist() == read_shards(other, "labels").tolist()
    assert not gpu_npz.verify(one).problems
    with pytest.raises(UsageError, match="whose labels are class-dir or none"):
        open_source(ours, BuildConfig(labels="labels"))
    Image.new("RGB", (4, 4)).save(ours / "bird" / "a.png")
    assert open_source(ours).kind == "folder"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (header((5, 5), "<i4") + bytes(100), "it has int32 (5, 5); allowed are uint8 and uint16"),
        (header((5, 5)) + bytes(24), "does not fit into"),
        (header((5,)) + bytes(5), "allowed are (H, W)"),
        (header((2,), "|O"), "Python objects"),
        (b"PK\3\4" + bytes(100), "no .npz"),
        (b"text", "neither an .npz nor an .npy"),
    ],
)
def test_a_file_that_holds_no_image_is_a_reject(tmp_path: Path, content: bytes, detail: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/bad.npy").write_bytes(content)
    (tmp_path / "a/empty.npy").write_bytes(b"")
    source = open_source(tmp_path)
    with pytest.raises(BadItem) as caught:
        read_item(source, items(source)[0])
    assert caught.value.code == "undecodable"
    assert detail in caught.value.detail
    with pytest.raises(BadItem, match="zero bytes"):
        read_item(source, items(source)[1])


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "deflated.npz"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_build_from_an_array_is_one_from_the_same_images(
    tmp_path: Path, make_dataset: MakeDataset, name: str, bits: int
) -> None:
    deep = bits == 16
    array = GRAY.astype(np.uint16) * 257 - 3 if deep else RGB
    labels: Any = "labels"
    if name == "a.npy":
        save(tmp_path / name, array)
        labels = save(tmp_path / "labels.npy", LABELS)
    else:
        (np.savez_compressed if name == "deflated.npz" else np.savez)(tmp_path / name, images=array, labels=LABELS)
    folder = tmp_path / "folder"
    for row, label in enumerate(LABELS):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array[row]).save(folder / f"{label}/{row}.png")
    settings = {"bit_depth": bits, "dtype": f"uint{bits}"}
    ours = make_dataset(tmp_path / name, labels=labels, **settings)
    theirs = make_dataset(folder, **settings)
    order = np.argsort(LABELS, kind="stable")
    assert (read_shards(ours)[order] == read_shards(theirs)).all()
    assert read_shards(ours, "labels").tolist() == LABELS.tolist()
    assert read_shards(ours).std() > 0


# Advice that works when it is followed


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "deflated.npz"])
def test_an_array_in_fortran_order_is_converted_by_the_code_in_the_message(tmp_path: Path, name: str) -> None:
    array, suffix = np.asfortranarray(RGB), Path(name).suffix
    if name == "a.npy":
        np.save(tmp_path / name, array)
    else:
        (np.savez if name == "a.npz" else np.savez_compressed)(tmp_path / name, pictures=array, labels=LABELS)
    with pytest.raises(SourceError, match="is in Fortran order") as caught:
        open_source(tmp_path / name)
    code, new = str(caught.value).partition("in Python: ")[2], f"{tmp_path}/new{suffix}"
    exec(code, {"np": np, "OLD": tmp_path / name, "NEW": new})
    source = open_source(new)
    assert (np.stack([np.asarray(picture) for picture in pictures(source)]) == RGB).all()
    assert labels_of(source) == ([None] * 6 if suffix == ".npy" else LABELS.tolist())


@pytest.mark.parametrize(
    ("array", "pixels"),
    [
        (GRAY > 99, (GRAY > 99) * np.uint8(255)),
        (np.rec.fromarrays([RGB[..., channel] for channel in range(3)], names="r,g,b"), RGB),
        (RGB.astype(np.int64), RGB),
    ],
    ids=["bool", "fields", "int64"],
)
def test_an_array_of_another_dtype_becomes_pixels_by_the_code_in_the_message(
    tmp_path: Path, array: Any, pixels: Any
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(SourceError, match="allowed are uint8 and uint16") as caught:
        open_source(tmp_path / "a.npy")
    code = re.search(r"array\.astype\('uint8'\)( \* 255)?|np\.stack\(.*-1\)", str(caught.value))
    assert code is not None
    np.save(tmp_path / "b.npy", eval(code[0], {"np": np, "array": array}))
    assert (np.stack([np.asarray(picture) for picture in pictures(open_source(tmp_path / "b.npy"))]) == pixels).all()


BEYOND = np.array([0, 1, 2, 3, 4, 2**63 + 5], np.uint64)


@pytest.mark.parametrize("labels", ["an array", "a file"])
@pytest.mark.parametrize("kind", ["", ":integer", ":float"])
@pytest.mark.parametrize(
    "values",
    [BEYOND, BEYOND + np.uint64(2**63), np.stack([BEYOND, BEYOND], 1), np.where(LABELS > 1, np.inf, LABELS)],
    ids=["some beyond int64", "all beyond int64", "columns", "infinite"],
)
def test_labels_that_no_number_can_hold_are_refused_with_an_option_that_works(
    tmp_path: Path, labels: str, kind: str, values: Any
) -> None:
    if labels == "an array":
        location, given = save(tmp_path / "a.npz", {"images": RGB, "ids": values}), "ids"
    else:
        location, given = save(tmp_path / "a.npy", RGB), save(tmp_path / "labels.npy", values)
    with pytest.raises(
        SourceError, match=r"has (\d{19,}|inf) for image \d; labels are finite floats, or integers"
    ) as caught:
        open_source(location, BuildConfig(labels=given + kind))
    advice = re.search(r"say --labels (\S+)", str(caught.value))
    assert advice is not None
    source = open_source(location, BuildConfig(labels=advice[1]))
    if values.ndim == 1:
        assert source.class_names is not None
        assert [source.class_names[label] for label in labels_of(source)] == [*map(str, values.tolist())]
    else:
        assert [column.kind for column in source.columns] == ["class", "class"]


def test_an_array_in_a_folder_of_an_npz_is_named_with_the_folder(tmp_path: Path) -> None:
    arrays = {"a/images": RGB, "b/images": GRAY, "ünï/labels": LABELS}
    location = save(tmp_path / "a.npz", arrays)
    for name in ("a/images", "b/images"):
        assert len(items(open_source(f"{location}/{name}.npy", BuildConfig(labels="ünï/labels")))) == 6
    (tmp_path / "dir.npz/sub").mkdir(parents=True)
    assert len(items(open_source(save(tmp_path / "dir.npz/sub/x.npy", RGB)))) == 6


@pytest.mark.parametrize(
    ("arrays", "way"),
    [
        ({}, r"save arrays with np\.savez"),
        ({"images": np.array([None, RGB[0]], dtype=object)}, r"np\.stack\(list\(images\)\)"),
        ({"images": RGB.reshape(6, -1)}, r"array\.reshape\(len\(array\), H, W, C\)"),
        ({"images": RGB[0, :, :, 0]}, r"or one image with array\[None\]"),
    ],
)
def test_a_file_without_images_is_refused_with_how_to_make_some(
    tmp_path: Path, arrays: dict[str, Any], way: str
) -> None:
    with pytest.raises(SourceError, match=rf"no array has the dimensions of images.*{way}"):
        open_source(save(tmp_path / "a.npz", arrays))


# Damage in stored images, which no single row can show


def damage(path: Path, at: bytes) -> int:
    """Flips a bit of a file behind the place of `at`, and returns where."""
    place = path.read_bytes().index(at) + 5
    flip_bit(path, place)
    return place


def test_a_flipped_bit_in_stored_images_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    location, out = tmp_path / "a.npz", tmp_path / "out"
    save(location, {"images": RGB, "labels": LABELS})
    place, events = damage(location, RGB[4].tobytes()), []
    for settings in ({}, {"normalize": "dataset"}):
        with pytest.raises(
            SourceError, match=r"a\.npz': array 'images': its CRC-32 does not match its data; it is dam"
        ):
            gpu_npz.build(location, out, cpu_config(**settings), progress=events.append)
        assert not out.exists()
    assert not [event for event in events if isinstance(event, Measuring)]
    build_cpu(location, out, preflight=False)
    flip_bit(location, place)
    assert not np.array_equal(read_shards(out), read_shards(build_cpu(location, tmp_path / "sound")))


def test_a_deflated_array_with_a_flipped_bit_is_never_built(tmp_path: Path) -> None:
    location = tmp_path / "a.npz"
    np.savez_compressed(location, images=RGB)
    flip_bit(location, 600)
    with pytest.raises(ShardError, match=r"array 'images': its .*; it is damaged or cut"):
        build_cpu(location, tmp_path / "out", labels="none")


def test_only_the_files_of_the_shards_that_are_built_are_compared(tmp_path: Path) -> None:
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", images=RGB + np.uint8(number), labels=LABELS)
    pattern, out = tmp_path / "*.npz", tmp_path / "out"
    build_cpu(pattern, out, shard_size=6, part="1/3")
    damage(tmp_path / "0.npz", RGB[1].tobytes())
    place = damage(tmp_path / "2.npz", (RGB[1] + np.uint8(2)).tobytes())
    build_cpu(pattern, out, shard_size=6, part="2/3")
    with pytest.raises(SourceError, match=r"2\.npz': array 'images': its CRC-32"):
        build_cpu(pattern, out, shard_size=6, part="3/3")
    flip_bit(tmp_path / "2.npz", place)
    build_cpu(pattern, out, shard_size=6, part="3/3")
    assert len(read_shards(out)) == 18


def test_a_repair_from_a_damaged_file_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    location = tmp_path / "a.npz"
    save(location, {"images": RGB, "labels": LABELS})
    out = build_cpu(location, tmp_path / "out", shard_size=3)
    flip_bit(out / "shard-00001.npz", 5000)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    place = damage(location, RGB[4].tobytes())
    with pytest.raises(SourceError, match="its CRC-32 does not match"):
        repair(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    flip_bit(location, place)
    assert repair(out).shards == (1,)
    assert verify(out).ok


# Sides of a split that a file has


def test_sides_of_a_file_become_datasets_with_the_classes_of_train(tmp_path: Path) -> None:
    names = np.array(["a", "b", "c"])
    location = save(
        tmp_path / "pathmnist.npz",
        {"test_images": GRAY[:4], "test_labels": names[LABELS[:4], None], "train_images": GRAY, "val_images": GRAY[1:3],
         "train_labels": names[LABELS, None], "val_labels": names[LABELS[1:3], None]},
    )  # fmt: skip
    config = cpu_config(splits="all", dtype="uint8", normalize="dataset", channels="gray")
    reports = build_split(location, tmp_path / "out", config)
    assert {side: report.rows for side, report in reports.items()} == {"train": 6, "val": 2, "test": 4}
    for side, labels in (("train", LABELS), ("val", LABELS[1:3]), ("test", LABELS[:4])):
        data = gpu_npz.open_dataset(tmp_path / "out" / side)
        assert (data.labels.tolist(), data.class_names) == (labels.tolist(), ("a", "b", "c"))
        assert data.manifest.normalization == gpu_npz.open_dataset(tmp_path / "out/train").manifest.normalization
    alone = build_cpu(Path(f"{location}/train_images.npy"), tmp_path / "alone", dtype="uint8", channels="gray",
                      normalize="dataset")  # fmt: skip
    assert (alone / "shard-00000.npz").read_bytes() == (tmp_path / "out/train/shard-00000.npz").read_bytes()
    again = build_split(location, tmp_path / "out", config)
    assert [report.built_items for report in again.values()] == [0, 0, 0]
    with pytest.raises(UsageError, match="call build_split, or name one array"):
        gpu_npz.build(location, tmp_path / "other", config)
    with pytest.raises(UsageError, match=r"plan each by itself.*pathmnist\.npz/train_images\.npy, .*val_images"):
        estimate(location, config)


def test_sides_of_several_files_are_those_of_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.npz", {"x_train": RGB, "y_train": LABELS, "x_test": RGB[:1], "y_test": LABELS[:1]})
    for location in (tmp_path, f"{tmp_path}/*.npz"):
        found = sides_of_source(location, BuildConfig())
        assert found == {"train": f"{tmp_path}/*.npz/x_train.npy", "test": f"{tmp_path}/*.npz/x_test.npy"}
        assert [len(items(open_source(each))) for each in found.values()] == [12, 2]


@pytest.mark.parametrize(
    ("arrays", "labels", "message"),
    [
        ({"images": RGB, "labels": LABELS}, None, r"has 'images' .*x_train and x_test.*--split val=0\.1"),
        ({"x_train": RGB, "y_train": LABELS}, None, "each side needs one array of images"),
        ({"x_val": RGB, "x_test": RGB}, None, "each side needs one array of images"),
        ({"x_train": RGB, "train_images": RGB, "x_test": RGB}, None, "each side needs one array of images"),
        ({"x_train": LABELS, "x_test": LABELS}, None, "each side needs one array of images"),
        ({"x_train": RGB, "y_train": LABELS, "x_test": RGB}, None, "labels for some sides, but none for 'x_test'"),
        ({"x_train": RGB, "x_test": RGB}, "labels", "each side has labels of its own"),
    ],
)
def test_a_file_without_sides_is_refused_with_what_it_has(
    tmp_path: Path, arrays: Any, labels: str | None, message: str
) -> None:
    config = cpu_config(splits="all", labels=labels)
    location = save(tmp_path / "a.npz", arrays)
    with pytest.raises((SourceError, UsageError), match=message):
        build_split(location, tmp_path / "out", config)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_sides_need_an_npz_and_labels_of_one_kind(tmp_path: Path) -> None:
    config = cpu_config(splits="all")
    with pytest.raises(SourceError, match=r"is no \.npz; give one with"):
        build_split(save(tmp_path / "a.npy", RGB), tmp_path / "out", config)
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="of the kind folder: build each side by itself"):
        build_split(tmp_path / "images", tmp_path / "out", config)
    location = save(tmp_path / "b.npz", {"x_train": RGB, "y_train": LABELS, "x_val": RGB, "y_val": LABELS / 2})
    with pytest.raises(SourceError, match=r"x_val\.npy' has y_val \(float\), and .*x_train\.npy' y_train \(integer"):
        build_split(location, tmp_path / "out", config)
    with pytest.raises(UsageError, match=r"--split val=0\.1 divides SRC, and --splits all takes the sides"):
        BuildConfig(split="val=0.1", splits="all")


# CIFAR

ROWS = RANDOM.integers(0, 256, (6, 3, 32, 32), np.uint8)


def dumped(content: dict[str, Any], protocol: int = 4) -> bytes:
    return pickle.dumps(content, protocol)


def batch(rows: Any = ROWS, labels: Any = LABELS, protocol: int = 4, **more: Any) -> bytes:
    return dumped({"labels": list(map(int, labels)), "data": rows.reshape(-1, 3072), **more}, protocol)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """A CIFAR-10 whose batches differ: batch n begins with image n - 1, the test batch with image 5."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(dumped({"label_names": list(NAMES)}))
    for number, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(batch(np.roll(ROWS, -number, 0), np.roll(LABELS, -number)))
    return folder


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(dumped({"fine_label_names": list(NAMES), "coarse_label_names": ["fly", "nest"]}))
    for name, rows in (("train", ROWS), ("test", ROWS[::-1].copy())):
        content = {"fine_labels": LABELS.tolist(), "coarse_labels": [0, 1, 0, 1, 0, 1], "data": rows.reshape(6, 3072)}
        (folder / name).write_bytes(dumped(content))
    return folder


def test_cifar_10_is_read_in_place_and_the_test_batch_as_a_file(cifar10: Path) -> None:
    source = open_source(cifar10)
    assert (source.kind, source.class_names) == ("cifar", NAMES)
    found = items(source)
    assert [found[0].path, found[29].path] == ["data_batch_1/00000", "data_batch_5/00005"]
    assert labels_of(source) == [label for number in range(5) for label in np.roll(LABELS, -number).tolist()]
    rows = np.concatenate([np.roll(ROWS, -number, 0) for number in range(5)]).transpose(0, 2, 3, 1)
    copy = pickle.loads(pickle.dumps(source))
    assert (np.stack([np.asarray(picture) for picture in pictures(copy)]) == rows).all()
    assert [name for name, _ in source.files] == [f"data_batch_{number}" for number in range(1, 6)]
    test = open_source(cifar10 / "test_batch")
    assert items(test)[0].path == "test_batch/00000"
    assert (np.asarray(pictures(test)[0]) == ROWS[5].transpose(1, 2, 0)).all()
    with pytest.raises(BadItem, match="does not exist"):
        source.read(Item(0, "x", None, (5, 0)))


def test_cifar_100_has_fine_labels_coarse_ones_or_none(cifar100: Path, cifar10: Path) -> None:
    def labelled(src: Path, labels: str | None, classes: Any = None) -> tuple[list[Any], Any]:
        source = open_source(src, BuildConfig(labels=labels), classes)
        return labels_of(source), source.class_names

    assert labelled(cifar100, None) == (LABELS.tolist(), NAMES)
    assert labelled(cifar100, "coarse") == ([0, 1, 0, 1, 0, 1], ("fly", "nest"))
    assert labelled(cifar100, "none") == ([None] * 6, None)
    assert labelled(cifar100, None, NAMES[::-1]) == ((2 - LABELS).tolist(), NAMES[::-1])
    test = open_source(cifar100 / "test")
    assert (np.asarray(pictures(test)[0]) == ROWS[5].transpose(1, 2, 0)).all()
    with pytest.raises(UsageError, match=r"--labels coarse: .* has none, or its own"):
        labelled(cifar10, "coarse")
    with pytest.raises(UsageError, match=r"--labels x: .* has coarse or none"):
        labelled(cifar100, "x")
    with pytest.raises(UsageError, match="contradict"):
        labelled(cifar100, "none", NAMES)


def test_bad_cifar_is_refused(cifar10: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a CIFAR file with images; give the folder, or one of data_batch_1"):
        open_source(cifar10 / "batches.meta")
    with pytest.raises(SourceError, match="download and unpack it"):
        open_source("s3://bucket/cifar", BuildConfig(source="cifar"))
    for data, message in (
        (batch(protocol=2), "does not have its pixels as one piece; unpack the original archive again"),
        (batch(ROWS[:0], []), "has no images"),
        (batch(labels=[0]), "labels is not a list of 6 numbers"),
        (batch()[:9000], "unpack the archive again"),
        (dumped({"data": ROWS.reshape(-1, 3072), "labels": print}), "which is not allowed and was not loaded"),
    ):
        (cifar10 / "data_batch_3").write_bytes(data)
        with pytest.raises(SourceError, match=message) as caught:
            open_source(cifar10)
        assert "data_batch_3" in str(caught.value)
    (cifar10 / "data_batch_3").unlink()
    with pytest.raises(SourceError, match=r"data_batch_3.*No such file"):
        open_source(cifar10)
    with pytest.raises(SourceError, match="neither batches"):
        open_source(tmp_path, BuildConfig(source="cifar"))


def test_a_build_from_cifar_is_one_from_the_same_images(
    cifar10: Path, tmp_path: Path, make_dataset: MakeDataset
) -> None:
    folder = tmp_path / "folder"
    for row, label in enumerate(LABELS):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(ROWS[row].transpose(1, 2, 0)).save(folder / f"{NAMES[label]}/{row}.png")
    ours = make_dataset(cifar10 / "data_batch_1", dtype="uint8", workers=1)
    theirs = make_dataset(folder, dtype="uint8")
    order = np.argsort(LABELS, kind="stable")
    assert (read_shards(ours)[order] == read_shards(theirs)).all()
    assert (read_shards(ours, "labels")[order] == read_shards(theirs, "labels")).all()
    assert gpu_npz.open_dataset(ours).class_names == gpu_npz.open_dataset(theirs).class_names
