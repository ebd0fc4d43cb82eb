"""A finished dataset as a source: the same pixels, labels and paths, or a reason why not."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import build_cpu, cpu_config, flip_bit, items, read_shards

import gpu_npz
from gpu_npz.builder.build import build_split
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.built import open_images
from gpu_npz.errors import (
    FormatError,
    IncompleteError,
    MismatchError,
    SourceError,
    StorageError,
    UsageError,
)
from gpu_npz.npz.reader import NpzReader
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.rejects import BadItem

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (10, 16, 16, 3), np.uint8)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for row, pixels in enumerate(PIXELS):
        folder = tmp_path / "tree" / CLASSES[row % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row}.png")
    return tmp_path / "tree"


@pytest.mark.parametrize("compress", ["none", "deflate"])
@pytest.mark.parametrize("member", ["images", "labels", "paths"])
def test_a_flipped_bit_in_a_shard_is_refused_before_anything_is_built(
    tree: Path, tmp_path: Path, compress: str, member: str
) -> None:
    src = build_cpu(tree, tmp_path / "src", dtype="uint8", shard_size=5, compress=compress)
    shard = src / "shard-00001.npz"
    flip_bit(shard, NpzReader(shard).directory.members[member].data_offset + 1)
    with pytest.raises((SourceError, FormatError), match=r"shard-00001.*verify"):
        build_cpu(src, tmp_path / "out", dtype="uint8")
    assert not (tmp_path / "out").exists()


def facts(out: Path) -> list[Any]:
    data = gpu_npz.open_dataset(out)
    return [list(data.paths), None if data.labels is None else data.labels.tolist(), data.class_names]


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "uint8"},
        {"dtype": "uint8", "layout": "NHWC", "channels": "bgr", "compress": "deflate"},
        {"dtype": "float32"},
        {"dtype": "float32", "normalize": "dataset", "channels": "bgr"},
        {"dtype": "float32", "normalize": "log", "layout": "NHWC"},
        {"dtype": "float16", "normalize": "signed"},
        {"dtype": "float16", "normalize": "none"},
        {"dtype": "uint8", "normalize": "standardize"},
        {"dtype": "uint8", "channels": "gray", "normalize": "unit"},
        {"dtype": "uint16", "bit_depth": 16},
        {"dtype": "float32", "bit_depth": 16, "normalize": "unit"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_dataset_of_a_dataset_is_the_dataset_of_the_images(tree: Path, tmp_path: Path, settings: Any) -> None:
    first = build_cpu(tree, tmp_path / "first", shard_size="4", shuffle=3, **settings)
    deep = {"bit_depth": 16} if "bit_depth" in settings else {}
    gray = {"channels": "gray"} if settings.get("channels") == "gray" else {}
    others = {"dtype": "uint16" if deep else "uint8", "normalize": "unit", "shard_size": "3", **deep, **gray}
    direct = build_cpu(tree, tmp_path / "direct", shuffle=3, **others)
    ours = build_cpu(first, tmp_path / "ours", **others)
    assert (read_shards(ours) == read_shards(direct)).all()
    assert facts(ours) == facts(direct)
    assert not gpu_npz.verify(ours).problems
    assert gpu_npz.build(first, ours, cpu_config(**others)).built_items == 0
    assert json.loads((ours / ".gpu-npz/job.json").read_text())["source_kind"] == "dataset"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"normalize": "standardize"}, r"values depend on each image \(--normalize standardize\)"),
        ({"normalize": "window", "window": (20, 200)}, r"256 levels do not have 256 values in it \(--normalize window"),
        ({"bit_depth": 16, "dtype": "float16", "normalize": "unit"}, "65536 levels do not have 65536 values"),
    ],
)
def test_a_dataset_whose_pixels_are_lost_is_refused_with_the_reason(
    tree: Path, tmp_path: Path, settings: Any, why: str
) -> None:
    out = build_cpu(tree, tmp_path / "out", **settings)
    with pytest.raises(SourceError, match=why):
        build_cpu(out, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_labels_and_classes_are_those_of_the_dataset_or_none_or_numbered_anew(tree: Path, tmp_path: Path) -> None:
    out = build_cpu(tree, tmp_path / "out", dtype="uint8", per_class=2)
    assert [item.label for item in items(open_images(out))] == [0, 0, 1, 1, 2, 2]
    assert [item.label for item in items(open_images(out, BuildConfig(labels="none")))] == [None] * 6
    source = open_images(out, classes=("cat", "bee", "ant", "dog"))
    assert [item.label for item in items(pickle.loads(pickle.dumps(source)))] == [2, 2, 1, 1, 0, 0]
    with pytest.raises(SourceError, match="1 classes that are not in the given list: 'cat'"):
        open_images(out, classes=("ant", "bee"))
    with pytest.raises(UsageError, match="its own labels, or none, are used"):
        open_images(out, BuildConfig(labels="class-dir"))
    with pytest.raises(UsageError, match="--scale requires SRC of the kind numpy"):
        open_images(out, BuildConfig(scale="255"))
    (tmp_path / "table.csv").write_text("path,age,depth\nant/0.png,7,0.5\nbee/1.png,9,1.5\n")
    table = build_cpu(tmp_path / "table.csv", tmp_path / "table", root=str(tree), labels="age,depth", dtype="uint8")
    again = gpu_npz.open_dataset(build_cpu(table, tmp_path / "again", dtype="uint8"))
    assert (again.labels.tolist(), again.label_columns) == (
        [[7.0, 0.5], [9.0, 1.5]], gpu_npz.open_dataset(table).label_columns
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"--classes-from numbers classes, and .* has age \(integer\), depth"):
        open_images(table, classes=CLASSES)


def test_blank_rows_are_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "bee/1.png").write_bytes(b"no image")
    out = build_cpu(tree, tmp_path / "out", dtype="uint8", on_reject="blank")
    assert gpu_npz.open_dataset(out).valid.tolist().count(False) == 1
    paths = [item.path for item in items(open_images(out))]
    assert len(paths) == 9
    assert "bee/1.png" not in paths


def test_only_a_finished_dataset_is_a_source(tree: Path, tmp_path: Path) -> None:
    out = build_cpu(tree, tmp_path / "out", dtype="uint8")
    shutil.copytree(out, tmp_path / "begun")
    (tmp_path / "begun/dataset.json").unlink()
    with pytest.raises(IncompleteError, match="run the same gpu-npz build again"):
        open_images(tmp_path / "begun")
    with pytest.raises(FormatError, match="is not a dataset"):
        open_images(tree, BuildConfig(source="dataset"))
    with pytest.raises(StorageError, match="copy it first"):
        open_images("s3://bucket/out", BuildConfig(source="dataset"))
    (tree / "dataset.json").write_text("{}")  # as other tools write it
    assert open_images(tree).kind == "folder"
    build_split(tree, tmp_path / "sides", cpu_config(split="val=0.3", dtype="uint8"))
    with pytest.raises(FormatError, match=r"is not a dataset, but holds train, val; give one of them"):
        open_images(tmp_path / "sides")
    assert len(items(open_images(tmp_path / "sides/train"))) == 7
    shutil.rmtree(out / ".gpu-npz")
    assert len(items(open_images(out))) == 10


def test_a_damaged_or_changed_dataset_stops_a_build(tree: Path, tmp_path: Path) -> None:
    out = build_cpu(tree, tmp_path / "out", shard_size="4")
    source = open_images(out)
    first = items(source)[0]
    for place in [(3, 0), (-1, 0), (0, 4), (0,)]:
        with pytest.raises(BadItem) as caught:
            source.read(Item(0, "x", None, place))
        assert caught.value.code == "missing"
    other = build_cpu(out, tmp_path / "other", dtype="uint8")
    shard = out / "shard-00000.npz"
    whole = bytearray(shard.read_bytes())
    shard.write_bytes(whole[:4096] + b"\x7f" + whole[4097:])  # a value that no pixel has
    with pytest.raises(OSError, match="row 0 has values that no pixel has"):
        open_images(out).read(first)
    shard.unlink()
    with pytest.raises(OSError, match="is missing"):
        open_images(out).read(first)
    with pytest.raises(SourceError, match=r"shard-00000\.npz.*No such file"):
        build_cpu(out, tmp_path / "third", dtype="uint8")
    shutil.copy(out / "shard-00001.npz", shard)
    with pytest.raises(FormatError, match="it is not shard 0 of this dataset"):
        build_cpu(out, tmp_path / "third", dtype="uint8")
    shutil.rmtree(out)
    build_cpu(tree, out, dtype="uint8", shard_size="4")
    with pytest.raises(MismatchError, match="has changed since the plan was made"):
        build_cpu(out, other, dtype="uint8")
    shutil.rmtree(out)
    with pytest.raises(SourceError, match="is missing; restore it"):
        source.check()


def test_a_row_is_read_as_its_pixels(tree: Path, tmp_path: Path) -> None:
    source = open_images(build_cpu(tree, tmp_path / "out", dtype="uint8", channels="bgr"))
    for item in items(source):
        picture = np.asarray(Image.open(io.BytesIO(read_item(source, item))))
        assert (picture == PIXELS[int(Path(item.path).stem)]).all()
