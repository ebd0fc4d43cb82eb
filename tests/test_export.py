"""Exports: what other tools read is what the dataset holds; names are safe; what was stopped is completed."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from support import (
    MakeDataset,
    MakeTree,
    arrays_of,
    build_cpu,
    file_bytes,
    flip_bit,
    growth_of,
    read_shards,
)

import gpu_npz
from gpu_npz.cli.main import run
from gpu_npz.errors import FormatError, IncompleteError, LockedError, MismatchError, StorageError, UsageError
from gpu_npz.export import encoder
from gpu_npz.export.names import file_name, portable, repeated
from gpu_npz.export.png import png
from gpu_npz.export.rows import Span
from gpu_npz.export.run import Kind
from gpu_npz.storage.names import temporary_name

KINDS: tuple[Kind, ...] = ("npz", "npy", "folder", "webdataset")


def export(out: Path, dest: Path, kind: Kind, **options: Any) -> Path:
    gpu_npz.export_dataset(out, dest, kind, **options)
    return dest


def place(folder: Path, kind: Kind) -> Path:
    """A new DEST for an export of this kind."""
    return folder / (f"new/export.{kind}" if kind in ("npz", "npy") else f"new/{kind}")


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of all image files below a folder, by their paths."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                found[path.relative_to(folder).as_posix()] = np.asarray(image)
    return found


def image_folder(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """What torchvision's ImageFolder finds: class names, and a path and class number for each image."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = []
    for number, name in enumerate(classes):
        files = [
            (os.path.join(folder, file), number)
            for folder, _, files in sorted(os.walk(root / name))
            for file in sorted(files)
            if file.lower().endswith((".jpg", ".png"))
        ]
        assert files, f"ImageFolder refuses {name}, which has no image"
        samples += files
    return classes, samples


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_path(out: Path) -> dict[str, np.ndarray]:
    """The stored images by source path without its extension."""
    data = gpu_npz.open_dataset(out)
    return {os.path.splitext(data.paths[row])[0]: data[row] for row in range(len(data))}


@pytest.fixture
def classes(make_tree: MakeTree) -> Path:
    """Twelve images in two classes."""
    return make_tree({f"{'cats' if number % 2 else 'dogs'}/{number:02d}.jpg": "jpeg" for number in range(12)})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six images with two columns of labels, in a CSV."""
    root = tmp_path / "listed"
    root.mkdir()
    for seed, name in enumerate("abcdef"):
        (root / f"{name}.jpg").write_bytes(file_bytes("jpeg", seed=seed))
    lines = [f"{name}.jpg,{'AB'[at % 2]},{at / 4}" for at, name in enumerate("abcdef")]
    (root / "labels.csv").write_text("\n".join(["file,grade,age", *lines]) + "\n")
    return build_cpu(root / "labels.csv", tmp_path / "table", labels="grade:class,age:float", shard_size=4)


# Arrays


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "uint8"},
        {"dtype": "float32", "layout": "NHWC"},
        {"dtype": "float16", "normalize": "standardize"},
        {"dtype": "uint8", "compress": "deflate"},
        {"dtype": "uint8", "channels": "gray", "normalize": "unit", "labels": "none"},
    ],
    ids=str,
)
def test_an_npz_or_npy_holds_the_stored_arrays(
    make_dataset: MakeDataset, tmp_path: Path, settings: dict[str, Any]
) -> None:
    out = make_dataset(**settings)
    images, labelled = read_shards(out), settings.get("labels") != "none"
    found = arrays_of(export(out, tmp_path / "all.npz", "npz"))
    np.testing.assert_array_equal(found["images"], images, strict=True)
    np.testing.assert_array_equal(found["paths"], read_shards(out, "paths"))
    export(out, tmp_path / "all.npy", "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy", mmap_mode="r"), images, strict=True)
    assert (tmp_path / "all-labels.npy").exists() == ("labels" in found) == ("class_names" in found) == labelled
    if labelled:
        np.testing.assert_array_equal(found["labels"], read_shards(out, "labels"), strict=True)
        np.testing.assert_array_equal(np.load(tmp_path / "all-labels.npy"), found["labels"], strict=True)
        assert found["class_names"].tolist() == ["apples", "berries", "cherries"]
    with zipfile.ZipFile(tmp_path / "all.npz") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_build_from_an_npz_gives_the_same_rows(make_dataset: MakeDataset, tmp_path: Path) -> None:
    out = make_dataset(dtype="uint8")
    export(out, tmp_path / "x.npz", "npz", keys=("x_train", "y_train"))
    assert {"x_train", "y_train"} < arrays_of(tmp_path / "x.npz").keys()
    again = build_cpu(tmp_path / "x.npz", tmp_path / "again", size="12x16", dtype="uint8")
    for name in ("images", "labels"):
        np.testing.assert_array_equal(read_shards(again, name), read_shards(out, name))


def test_several_label_columns_stay_together(table: Path, tmp_path: Path) -> None:
    found = arrays_of(export(table, tmp_path / "x.npz", "npz"))
    np.testing.assert_array_equal(found["labels"], read_shards(table, "labels"), strict=True)
    assert (found["labels"].shape, found["label_names"].tolist()) == ((6, 2), ["grade", "age"])


def test_paths_are_as_wide_as_the_widest_of_all_shards(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree({"a/1.jpg": "jpeg", f"a/2{'x' * 90}.jpg": "jpeg", "a/3.jpg": "jpeg"})
    out = build_cpu(src, tmp_path / "out", shard_size=1)
    assert arrays_of(export(out, tmp_path / "x.npz", "npz"))["paths"].tolist() == list(gpu_npz.open_dataset(out).paths)


@pytest.mark.parametrize("keys", [("images", "images"), ("a/b", "y"), ("", "y"), ("x", "paths"), ("x", "é")])
def test_names_that_an_npz_cannot_have_are_refused(
    make_dataset: MakeDataset, tmp_path: Path, keys: tuple[str, str]
) -> None:
    with pytest.raises(UsageError, match=r"--keys: got .*; give two names, such as x_train,y_train"):
        export(make_dataset(), tmp_path / "x.npz", "npz", keys=keys)
    assert not [*tmp_path.iterdir()]


# Images


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (16, 31)])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_has_the_pixels_that_it_was_made_of(
    shape: tuple[int, int], channels: tuple[int, ...], dtype: type[np.unsignedinteger[Any]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (*shape, *channels), dtype, endpoint=True)
    np.testing.assert_array_equal(imagecodecs.png_decode(png(pixels)), pixels)
    if dtype is np.uint8 or not channels:  # Pillow reads RGB in 8 bits only
        with Image.open(io.BytesIO(png(pixels))) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)
            assert image.mode == {(np.uint8, 0): "L", (np.uint8, 1): "RGB"}.get((dtype, len(channels)), "I;16")


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "NCHW"), ("float16", "NHWC"), ("uint8", "NCHW")])
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_an_image_has_the_pixels_that_were_decoded(
    classes: Path, tmp_path: Path, channels: str, dtype: str, layout: str, kind: Kind
) -> None:
    gray = {"channels": "gray"} if channels == "gray" else {}
    plain = build_cpu(classes, tmp_path / "plain", dtype="uint8", layout="NHWC", normalize="none", **gray)
    out = build_cpu(classes, tmp_path / "out", channels=channels, dtype=dtype, layout=layout, normalize="signed")
    export(out, tmp_path / "export", kind)
    if kind == "webdataset":
        with tarfile.open(tmp_path / "export/shard-000000.tar") as tar:
            tar.extractall(tmp_path / "export", filter="data")
    found = [*pictures(tmp_path / "export").values()]
    expected = gpu_npz.open_dataset(plain)[:]
    np.testing.assert_array_equal(found, expected[..., 0] if channels == "gray" else expected)


@pytest.mark.parametrize("normalize", ["imagenet", "log", "unit", "none", "mean-std"])
def test_every_normalization_that_tells_the_levels_is_undone(classes: Path, tmp_path: Path, normalize: str) -> None:
    more: dict[str, Any] = {"mean": "0.1,0.2,0.3", "std": "0.4,0.5,0.6"} if normalize == "mean-std" else {}
    plain = build_cpu(classes, tmp_path / "plain", dtype="uint8", layout="NHWC")
    out = build_cpu(classes, tmp_path / "out", normalize=normalize, **more)
    found = pictures(export(out, tmp_path / "export", "folder"))
    np.testing.assert_array_equal([*found.values()], gpu_npz.open_dataset(plain)[:])


@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_sixteen_bits_stay_sixteen(make_tree: MakeTree, tmp_path: Path, channels: str, dtype: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (2, 16, 16, 3), np.uint16)
    src = make_tree({f"a/{number}.png": imagecodecs.png_encode(each) for number, each in enumerate(pixels)})
    settings = {"bit_depth": 16, "channels": channels, "normalize": "unit"}
    out = build_cpu(src, tmp_path / "out", dtype=dtype, **settings)
    export(out, tmp_path / "export", "folder")
    again = build_cpu(tmp_path / "export", tmp_path / "again", dtype=dtype, **settings)
    np.testing.assert_array_equal(read_shards(again), read_shards(out))
    first = imagecodecs.png_decode((tmp_path / "export/a/0.png").read_bytes())
    assert (first.dtype, first.ndim) == (np.uint16, 2 if channels == "gray" else 3)
    with pytest.raises(UsageError, match="JPEG has 8 bits, and these images have 16; choose --format png"):
        export(out, tmp_path / "jpeg", "folder", image_format="jpeg")


def test_a_jpeg_is_close_to_the_pixels_and_smaller_at_lower_quality(classes: Path, tmp_path: Path) -> None:
    out = build_cpu(classes, tmp_path / "out", dtype="uint8", layout="NHWC", size=64)
    sizes = []
    for quality in (95, 30):
        found = pictures(export(out, tmp_path / str(quality), "folder", image_format="jpeg", quality=quality))
        assert all(name.endswith(".jpg") for name in found)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(quality)).rglob("*.jpg")))
        difference = np.abs(np.array([*found.values()], int) - gpu_npz.open_dataset(out)[:]).mean()
        assert difference < 16, difference  # measured: 3.5 at quality 95, 6.6 at 30, in chroma of half resolution
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"normalize": "standardize"}, "each by its own statistics, from which its pixels cannot be recovered"),
        ({"normalize": "window", "window": "50,200"}, "some of the 256 levels .* have the same float32 value"),
        ({"normalize": "unit", "dtype": "float16", "bit_depth": 16}, "some of the 65536 levels .* the same float16"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_pixels_that_cannot_be_recovered_are_refused(
    classes: Path, tmp_path: Path, settings: dict[str, Any], reason: str, kind: Kind
) -> None:
    out = build_cpu(classes, tmp_path / "out", **settings)
    with pytest.raises(UsageError, match=f"{reason}.*; export npz or npy.*, or build with --dtype uint8"):
        export(out, tmp_path / "export", kind)
    assert not (tmp_path / "export").exists()
    assert export(out, tmp_path / "x.npz", "npz").exists()


# Folders


def test_a_folder_is_one_of_class_folders_for_image_folder_and_for_a_build(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = build_cpu(classes, tmp_path / "out", dtype="uint8", shuffle=1, shard_size=5)
    export(out, tmp_path / "export", "folder")
    names, samples = image_folder(tmp_path / "export")
    assert (names, len(samples)) == (["cats", "dogs"], 12)
    again = build_cpu(tmp_path / "export", tmp_path / "again", dtype="uint8")
    assert gpu_npz.open_dataset(again).class_names == gpu_npz.open_dataset(out).class_names
    stored, rebuilt = by_path(out), by_path(again)
    assert stored.keys() == rebuilt.keys()
    for path, image in stored.items():
        np.testing.assert_array_equal(rebuilt[path], image)


def test_whole_numbers_are_classes_whose_names_sort_like_the_numbers(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree({f"{number}.jpg": "jpeg" for number in range(12)})
    lines = [f"{number}.jpg,{number}" for number in range(12)]
    (root / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    out = build_cpu(root / "labels.csv", tmp_path / "out", labels="label:integer", dtype="uint8")
    export(out, tmp_path / "export", "folder")
    again = build_cpu(tmp_path / "export", tmp_path / "again", dtype="uint8")
    assert [*pictures(tmp_path / "export")][:2] == ["00/0.png", "01/1.png"]
    for name in ("images", "labels"):
        np.testing.assert_array_equal(read_shards(again, name), read_shards(out, name))


def test_other_labels_are_in_a_table_beside_the_images(table: Path, tmp_path: Path) -> None:
    export(table, tmp_path / "export", "folder")
    assert [*pictures(tmp_path / "export")] == [f"{name}.png" for name in "abcdef"]
    lines = (tmp_path / "export/metadata.csv").read_text().splitlines()
    assert lines[:3] == ["file_name,grade,age", "a.png,A,0.0", "b.png,B,0.25"]
    again = build_cpu(tmp_path / "export/metadata.csv", tmp_path / "again", labels="grade:class,age:float")
    np.testing.assert_array_equal(read_shards(again, "labels"), read_shards(table, "labels"))
    np.testing.assert_array_equal(read_shards(again), read_shards(table))


def test_without_labels_all_images_are_in_one_folder(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree({"a/1.jpg": "jpeg", "b/1.jpg": "jpeg", "b/c/1.jpg": "jpeg"})
    out = build_cpu(src, tmp_path / "out", labels="none")
    assert pictures(export(out, tmp_path / "export", "folder")).keys() == {"a_1.png", "b_1.png", "b_c_1.png"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.jpg", "a"),
        ("a.b.JPEG", "a.b"),
        ("scan.dcm/0003", "scan.dcm_0003"),
        ("../../etc/passwd", "_.._.._etc_passwd"),
        ("/etc/x.png", "etc_x"),
        ("..", "_.."),
        (".hidden.jpg", "_.hidden"),
        ("", "_"),
        ("/", "_"),
        (".jpg", "_.jpg"),
        ("Thumbs.db", "_Thumbs.db"),
        ("line\nfeed\x00\x9f.png", "line%0Afeed%00%9F"),
        ("latin-\udce9.jpg", "latin-%E9"),
        ("a~5.jpg", "a%7E5"),
        ("\ud800.jpg", "%00"),
        ("ü" * 100 + ".jpg", "ü" * 80),
        ("x" * 300 + "7.jpg", "x" * 159 + "7"),
    ],
)
def test_a_name_is_valid_in_one_folder(path: str, name: str) -> None:
    assert file_name(path, None) == name
    assert portable(name) == (name.replace("~", "%7E"))


def test_names_that_collide_get_numbers(make_tree: MakeTree, tmp_path: Path) -> None:
    long = "x" * 200
    files = [
        "a/1.jpg",
        "a/1.png",
        "a/b/1.jpg",
        "a/b_1.jpg",
        f"a/1{long}.jpg",
        f"a/2{long}.jpg",
        "a/~1.jpg",
        "a b/1.jpg",
    ]
    out = build_cpu(make_tree(dict.fromkeys(files, "jpeg")), tmp_path / "out", dtype="uint8")
    export(out, tmp_path / "export", "folder")
    again = build_cpu(tmp_path / "export", tmp_path / "again", dtype="uint8")
    names = {path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*.png")}
    numbered = {"a/1~1.png", "a/b_1~6.png", "a/" + "x" * 160 + "~3.png"}
    assert names == numbered | {"a/1.png", "a/b_1.png", "a/" + "x" * 160 + ".png", "a/%7E1.png", "a b/1.png"}

    def sorted_rows(dataset: Path) -> list[bytes]:
        return sorted(row.tobytes() for row in gpu_npz.open_dataset(dataset))

    assert sorted_rows(again) == sorted_rows(out)


def test_names_that_are_not_utf_8_are_escaped_in_files_and_kept_in_arrays(make_tree: MakeTree, tmp_path: Path) -> None:
    out = build_cpu(make_tree({"caf\udce9/1\udcff.jpg": "jpeg"}), tmp_path / "out")
    assert pictures(export(out, tmp_path / "export", "folder")).keys() == {"caf%E9/1%FF.png"}
    found = arrays_of(export(out, tmp_path / "x.npz", "npz"))
    assert (found["paths"].tolist(), found["class_names"].tolist()) == (["caf\udce9/1\udcff.jpg"], ["caf\udce9"])
    export(out, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        file = tar.extractfile("000000000.json")
        assert file is not None
        assert json.load(file) == {"path": "caf\udce9/1\udcff.jpg", "class": "caf\udce9"}


def test_a_path_that_is_no_text_is_an_error_of_its_shard() -> None:
    class Shard(dict[str, np.ndarray]):
        path = "shard-00000.npz"

    forged = np.array([0x110000], "<u4").view("<U1")
    with pytest.raises(FormatError, match=r"shard-00000\.npz: paths: .*; it is damaged"):
        list(Span(0, Shard(paths=forged), slice(0, 1)).texts())  # type: ignore[arg-type]


def test_names_that_differ_in_case_collide_only_where_the_filesystem_ignores_it() -> None:
    names = ["A", "a", "b", "\u00e9", "e\u0301"]
    assert repeated(names, 5, ignore_case=False) == set()
    assert repeated(names, 5, ignore_case=True) == {1, 4}


def test_class_names_become_folders_whatever_they_are(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree({f"{number}.jpg": "jpeg" for number in range(6)})
    named = ["a/b", "a_b", "..", ".git", "/etc", "café"]
    (root / "labels.csv").write_text("\n".join(["file,class", *(f"{n}.jpg,{name}" for n, name in enumerate(named))]))
    out = build_cpu(root / "labels.csv", tmp_path / "out")
    export(out, tmp_path / "export", "folder")
    folders = {path.parent.name for path in (tmp_path / "export").rglob("*.png")}
    assert len(folders) == 6
    assert {"a_b", "_..", "_.git", "etc", "café"} < folders
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "images", "out"]


# WebDataset


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_webdataset_s_own_reader_reads_the_tars(
    classes: Path, tmp_path: Path, image_format: encoder.ImageFormat
) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = build_cpu(classes, tmp_path / "out", dtype="uint8", layout="NHWC")
    export(out, tmp_path / "tars", "webdataset", samples=5, image_format=image_format)
    tars = sorted(str(path) for path in (tmp_path / "tars").glob("*.tar"))
    assert [os.path.basename(path) for path in tars] == [f"shard-00000{number}.tar" for number in range(3)]
    samples = [*webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")]
    gc.collect()  # it leaves files open, which only the next collection would report
    data = gpu_npz.open_dataset(out)
    assert data.labels is not None
    assert data.class_names is not None
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(12)]
    assert [sample["cls"] for sample in samples] == data.labels.tolist()
    for row, sample in enumerate(samples):
        assert sample["json"] == {"path": data.paths[row], "class": data.class_names[data.labels[row]]}
        if image_format == "png":
            np.testing.assert_array_equal(sample["png"], data[row])
        else:
            assert sample["jpg"].shape == data[row].shape


def test_a_build_reads_the_tars(classes: Path, table: Path, tmp_path: Path) -> None:
    out = build_cpu(classes, tmp_path / "out", dtype="uint8")
    export(out, tmp_path / "tars", "webdataset", samples=5)
    tars = Path(f"{tmp_path}/tars/shard-{{000000..000002}}.tar")
    again = build_cpu(tars, tmp_path / "again", dtype="uint8")
    for name in ("images", "labels"):
        np.testing.assert_array_equal(read_shards(again, name), read_shards(out, name))
    named = build_cpu(tars, tmp_path / "named", labels="json:class")
    assert gpu_npz.open_dataset(named).class_names == ("cats", "dogs")
    export(table, tmp_path / "columns", "webdataset")
    with tarfile.open(tmp_path / "columns/shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.png", "000000000.json"]
        file = tar.extractfile("000000001.json")
        assert file is not None
        assert json.load(file) == {"path": "b.jpg", "grade": "B", "age": 0.25}
    again = build_cpu(
        tmp_path / "columns/shard-000000.tar", tmp_path / "columns-again", labels="json:grade:class,json:age:float"
    )
    np.testing.assert_array_equal(read_shards(again, "labels"), read_shards(table, "labels"))


def test_label_columns_keep_the_names_of_other_fields_free(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(file_bytes("jpeg"))
    (tmp_path / "t.csv").write_text("file,path,file_name\na.jpg,1.5,2.5\n")
    out = build_cpu(tmp_path / "t.csv", tmp_path / "out", image_column="file", labels="path:float,file_name:float")
    export(out, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        file = tar.extractfile("000000000.json")
        assert file is not None
        assert json.load(file) == {"path": "a.jpg", "path_label": 1.5, "file_name": 2.5}
    export(out, tmp_path / "folder", "folder")
    lines = (tmp_path / "folder/metadata.csv").read_text().splitlines()
    assert lines == ["file_name,path,file_name_label", "a.png,1.5,2.5"]


# What is exported, and what is refused


@pytest.mark.parametrize("compress", ["none", "deflate"])
@pytest.mark.parametrize("kind", KINDS)
def test_blank_rows_are_left_out_and_counted(make_tree: MakeTree, tmp_path: Path, kind: Kind, compress: str) -> None:
    src = make_tree({f"a/{number}.jpg": "half" if number in (0, 3, 4, 9) else "jpeg" for number in range(10)})
    settings: dict[str, Any] = {"max_rejects": "100%", "shard_size": 4, "dtype": "uint8", "compress": compress}
    out = build_cpu(src, tmp_path / "out", on_reject="blank", **settings)
    plain = read_shards(build_cpu(src, tmp_path / "plain", **settings))
    dest = place(tmp_path, kind)
    report = gpu_npz.export_dataset(out, dest, kind, samples=4)
    assert (report.images, report.blank, report.existing) == (6, 4, 0)
    if kind == "webdataset":
        dest = Path(f"{dest}/shard-{{000000..000001}}.tar")
    settings["max_rejects"] = 0
    more = {"labels": dest.parent / "export-labels.npy"} if kind == "npy" else {}
    again = build_cpu(dest, tmp_path / "again", **settings, **{name: str(value) for name, value in more.items()})
    np.testing.assert_array_equal(read_shards(again), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_without_rows_is_refused(make_tree: MakeTree, tmp_path: Path, kind: Kind) -> None:
    out = build_cpu(make_tree({"a/1.jpg": "text"}), tmp_path / "out", max_rejects="100%")
    with pytest.raises(UsageError, match="holds no images: all its items were rejected"):
        export(out, place(tmp_path, kind), kind)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_build_is_refused(make_dataset: MakeDataset, tmp_path: Path, kind: Kind) -> None:
    out = make_dataset()
    (out / "dataset.json").unlink()
    with pytest.raises(IncompleteError, match="is not complete: 6 of 6 shards; run the same gpu-npz build again"):
        export(out, place(tmp_path, kind), kind)
    with pytest.raises(FormatError, match="is not a dataset"):
        export(tmp_path / "nothing", place(tmp_path, kind), kind)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("member", ["images", "paths"])
def test_a_damaged_shard_ends_the_export_and_no_file_has_its_rows(
    make_dataset: MakeDataset, tmp_path: Path, kind: Kind, member: str
) -> None:
    out = make_dataset(dtype="uint8")
    shard = out / "shard-00002.npz"
    with zipfile.ZipFile(shard) as archive:
        offset = archive.getinfo(f"{member}.npy").header_offset
    flip_bit(shard, (4096 if member == "images" else offset // 4096 * 4096 + 4096) + 40)
    dest = place(tmp_path, kind)
    with pytest.raises(
        FormatError, match=r"shard-00002.npz: its content is damaged; rebuild it: gpu-npz verify .* --r"
    ):
        export(out, dest, kind, samples=7)
    if kind in ("npz", "npy"):
        assert not dest.parent.exists()
    else:
        assert {"folder": len(pictures(dest)) <= 14, "webdataset": len([*dest.glob("*.tar")]) == 2}[kind]
        assert not [path for path in dest.rglob(".*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_destination_on_an_object_store_is_refused(make_dataset: MakeDataset, kind: Kind) -> None:
    with pytest.raises(StorageError, match="exports are written to a disk; export there, then copy the result"):
        export(make_dataset(), "s3://bucket/x.npz", kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_destination_inside_the_dataset_is_refused(make_dataset: MakeDataset, kind: Kind) -> None:
    out = make_dataset()
    before = sorted(out.rglob("*"))
    for folder in (out, out / ".gpu-npz", out / "new"):
        with pytest.raises(UsageError, match="lies inside the dataset; choose a place outside of"):
            export(out, place(folder, kind), kind)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_destination_behind_a_dangling_link_is_refused(make_dataset: MakeDataset, tmp_path: Path, kind: Kind) -> None:
    (tmp_path / "new").symlink_to(tmp_path / "unmounted")
    dest = tmp_path / "new" if kind in ("folder", "webdataset") else place(tmp_path, kind)
    with pytest.raises(StorageError, match="No such file or directory"):
        export(make_dataset(), dest, kind)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_file_has_the_extension_of_its_kind_and_is_never_overwritten(
    make_dataset: MakeDataset, tmp_path: Path, kind: Kind
) -> None:
    out = make_dataset()
    with pytest.raises(UsageError, match=rf"--as {kind} makes one file, whose name must end with \.{kind}"):
        export(out, tmp_path / "export", kind)
    dest = tmp_path / f"x.{kind}"
    dest.write_bytes(b"mine")
    with pytest.raises(
        StorageError, match="already exists, and export does not overwrite files; remove it or choose another"
    ):
        export(out, dest, kind)
    assert files_in(tmp_path) == {dest.name: b"mine"}
    if kind == "npy":
        dest.rename(tmp_path / "x-labels.npy")
        with pytest.raises(StorageError, match=r"x-labels\.npy' already exists"):
            export(out, dest, kind)
        assert not dest.exists()


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_folder_of_other_files_is_refused(make_dataset: MakeDataset, tmp_path: Path, kind: Kind) -> None:
    out = make_dataset()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"is not empty and holds no export \('mine.txt', ...\)"):
        export(out, tmp_path, kind)
    assert files_in(tmp_path) == {"mine.txt": b"mine"}
    with pytest.raises(StorageError, match="DEST must be a folder; choose another DEST"):
        export(out, tmp_path / "mine.txt", kind)
    other = make_dataset()
    before = files_in(other)
    with pytest.raises(StorageError, match="is not empty and holds no export"):
        export(out, other, kind)
    assert files_in(other) == before


def test_a_folder_of_another_export_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    out = make_dataset()
    export(out, tmp_path / "export", "folder")
    before = files_in(tmp_path / "export")
    with pytest.raises(
        MismatchError, match=r"holds another export .*format 'png' there, 'jpeg' now.* give the same opt"
    ):
        export(out, tmp_path / "export", "folder", image_format="jpeg")
    with pytest.raises(MismatchError, match="as 'folder' there, 'webdataset' now"):
        export(out, tmp_path / "export", "webdataset")
    with pytest.raises(MismatchError, match=r"dataset '.*' there, '.*' now"):
        export(make_dataset(limit=9), tmp_path / "export", "folder")
    assert files_in(tmp_path / "export") == before


def test_a_file_that_does_not_fit_on_the_disk_is_refused(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_dataset()
    monkeypatch.setattr("gpu_npz.dataset.space.free_space", lambda place: (1000, None))
    for kind in ("npz", "npy"):
        with pytest.raises(StorageError, match=r"needs 92.2 kB, and its filesystem has 1.0 kB free; free some space"):
            export(out, place(tmp_path, kind), kind)


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (400, 256, 256, 3), np.uint8))  # 79 MB
    settings: dict[str, Any] = {"size": 256, "dtype": "uint8", "shard_size": 20, "labels": "none"}
    out = build_cpu(tmp_path / "images.npy", tmp_path / "out", **settings)
    program = (
        "import sys, gpu_npz\nimport gpu_npz.export.run, PIL.JpegImagePlugin\n"
        "gpu_npz.export_dataset(*sys.argv[1:3], 'npz')\n# from here\ngpu_npz.export_dataset(*sys.argv[3:])\n"
    )
    small = build_cpu(tmp_path / "images.npy", tmp_path / "small", limit=20, **settings)
    for kind in KINDS:
        grown, _ = growth_of(program, small, tmp_path / f"{kind}.npz", out, place(tmp_path, kind), kind)
        assert grown < 30_000_000, (kind, grown)


# Stopping


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_stopped_export_is_completed_by_the_same_call(
    make_dataset: MakeDataset, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_dataset(dtype="uint8")
    whole = files_in(export(out, tmp_path / "whole", kind, samples=9))

    def stop(done: int, total: int) -> None:
        if done == 25:
            raise _Stop

    dest = tmp_path / "export"
    with pytest.raises(_Stop):
        export(out, dest, kind, samples=9, progress=stop)
    half = files_in(dest)
    assert half.items() < whole.items()
    times = {name: (dest / name).stat().st_mtime_ns for name in half}
    folder = dest / ("apples" if kind == "folder" else "")
    for killed in (temporary_name(str(folder / "1.png"), ""), temporary_name(str(dest / "shard-000003.tar"), "")):
        Path(killed).write_bytes(b"unfinished")
    report = gpu_npz.export_dataset(out, dest, kind, samples=9)
    assert files_in(dest) == whole
    assert {name: (dest / name).stat().st_mtime_ns for name in half} == times
    assert report.existing == (len(half) - 1 if kind == "folder" else 18)
    report = gpu_npz.export_dataset(out, dest, kind, samples=9)
    assert (report.images, report.existing) == (40, 40)
    assert files_in(dest) == whole


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_stopped_export_to_a_file_leaves_nothing(make_dataset: MakeDataset, tmp_path: Path, kind: Kind) -> None:
    def stop(done: int, total: int) -> None:
        if done > 20:
            raise _Stop

    out, dest = make_dataset(), place(tmp_path, kind)
    with pytest.raises(_Stop):
        export(out, dest, kind, progress=stop)
    assert not dest.parent.exists()
    dest.parent.mkdir()
    Path(temporary_name(str(dest), "")).write_bytes(b"unfinished")  # of an export that was killed
    export(out, dest, kind)
    assert {path.name for path in dest.parent.iterdir()} == {
        dest.name,
        *(["export-labels.npy"] if kind == "npy" else []),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_two_exports_to_one_place_do_not_meet(make_dataset: MakeDataset, tmp_path: Path, kind: Kind) -> None:
    out, dest, errors = make_dataset(), place(tmp_path, kind), []

    def other(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(LockedError, match="is in use by process") as caught:
                export(out, dest, kind)
            errors.append(caught.value)

    export(out, dest, kind, progress=other)
    assert len(errors) == 1
    assert not [*dest.parent.rglob("*.lock")]


def test_a_signal_stops_the_command_and_the_same_command_makes_the_rest(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((1000, 8, 8, 3), np.uint8), labels=np.arange(1000) % 10)
    out, dest = build_cpu(tmp_path / "x.npz", tmp_path / "out", size=8, dtype="uint8"), tmp_path / "export"
    command = [sys.executable, "-m", "gpu_npz", "export", str(out), str(dest), "--as", "folder"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not [*dest.glob("*/*.png")]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (
        130,
        "\ngpu-npz: stopped; finished files stay, the same command makes the others\n",
    )
    done = len(pictures(dest))
    assert 0 < done < 1000
    assert not [*dest.rglob(".*.tmp")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{dest}: exported 1000 images (folder), of which {done} existed already\n"
    assert len(pictures(dest)) == 1000


# The command


def test_the_command_says_what_it_made(
    make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(make_dataset(dtype="uint8"))
    dest = f"{tmp_path}/x.npz"
    assert run(["export", out, dest, "--as", "npz", "--keys", "x_train, y_train"]) == 0
    assert capsys.readouterr() == (f"{dest}: exported 40 images (npz)\n", "")
    assert "y_train" in arrays_of(Path(dest))
    options = ["--as", "webdataset", "--shard-size", "15", "--format", "jpeg", "--quality", "80", "--json"]
    assert run(["export", out, f"{tmp_path}/tars", *options]) == 0
    expected = {"path": f"{tmp_path}/tars", "kind": "webdataset", "images": 40, "existing": 0, "blank": 0}
    assert json.loads(capsys.readouterr().out) == expected
    assert len([*(tmp_path / "tars").glob("shard-*.tar")]) == 3


def test_the_command_exports_every_side_of_a_split(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(classes), str(out), "--split", "val=0.5", "--size", "8", "--workers", "0", "--quiet"]
    assert run([*arguments, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert run(["export", str(out), f"{tmp_path}/export", "--as", "folder"]) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path}/export/{side}: exported 6 images (folder)\n" for side in ("train", "val")
    )
    assert image_folder(tmp_path / "export/val")[0] == ["cats", "dogs"]
    assert run(["export", str(out), f"{tmp_path}/x.npz", "--as", "npz", "--json"]) == 0
    assert [each["images"] for each in json.loads(capsys.readouterr().out).values()] == [6, 6]
    assert {path.name for path in tmp_path.glob("*.npz")} == {"x-train.npz", "x-val.npz"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--as folder --keys a,b", "--keys requires --as npz; omit it"),
        ("--as npz --format png", "--format requires --as folder or webdataset; omit it"),
        ("--as folder --shard-size 5", "--shard-size requires --as webdataset; omit it"),
        ("--as folder --quality 5", "--quality requires --format jpeg; add it, or omit --quality"),
        ("--as npz --keys images", "--keys: got 'images'; give the names of the images and the labels"),
        ("--as zip", "'zip' is not one of 'npz', 'npy', 'folder', 'webdataset'"),
        ("", "Missing option '--as'"),
        ("--as folder --format jpeg --quality 101", "101 is not in the range 1<=x<=100"),
        ("--as webdataset --shard-size 0", "0 is not in the range x>=1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert run(["export", f"{tmp_path}/out", f"{tmp_path}/x.npz", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("values", [{"quality": 0}, {"quality": 101}, {"samples": 0}])
def test_numbers_out_of_range_are_refused(make_dataset: MakeDataset, tmp_path: Path, values: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"got -?\d+; allowed: "):
        export(make_dataset(), tmp_path / "x", "webdataset", **values)
