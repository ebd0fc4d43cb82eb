"""WebDatasets as sources: which file of a sample is the image, and where its label comes from."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, items, labelled, pack, read_shards

from gpu_npz.config import BuildConfig
from gpu_npz.errors import SourceError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.archives.tar import kind_of
from gpu_npz.sources.archives.webdataset import WebDatasetSource


def opened(path: Path | str, labels: str | None = None, classes: list[str] | None = None) -> WebDatasetSource:
    return WebDatasetSource(os.fspath(path), BuildConfig(labels=labels), classes)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return pack(
        tmp_path / "t.tar",
        {
            "a.b/1.jpg": b"one", "a.b/1.cls": b"7\n", "a.b/1.txt": b" dog \n",
            "a.b/1.json": b'{"x": {"y": 2}, "n": "p"}',
            "2.cls": b"5", "2.PNG": b"two", "2.mask.png": b"no", "2.txt": b"cat",
            "2.json": b'{"x": {"y": 3.5}, "n": "q"}',
        },
    )  # fmt: skip


def test_whole_numbers_stay_what_they_are(samples: Path) -> None:
    source = open_source(samples)
    assert source.kind == "webdataset"
    assert source.class_names is None
    assert [(column.name, column.kind) for column in source.columns] == [("cls", "integer")]
    assert labelled(source) == [("a.b/1.jpg", 7), ("2.PNG", 5)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(item) for item in items(source)] == [b"one", b"two"]


@pytest.mark.parametrize(
    ("labels", "classes", "values"),
    [
        ("txt", ("cat", "dog"), [1, 0]),
        ("json:n", ("p", "q"), [0, 1]),
        ("json:x.y", None, [2.0, 3.5]),
        ("cls,json:x.y", None, [[7.0, 2.0], [5.0, 3.5]]),
        ("none", None, [None, None]),
    ],
)
def test_labels_stand_in_other_files(samples: Path, labels: str, classes: Any, values: list[Any]) -> None:
    source = opened(samples, labels)
    assert source.class_names == classes
    assert [item.label for item in items(source)] == values


def test_numbers_are_classes_where_names_are_given(samples: Path) -> None:
    names = [f"class {number}" for number in range(8)]
    assert opened(samples, None, names).class_names == tuple(names)
    with pytest.raises(SourceError, match=r"has 7 for 'a\.b/1\.jpg'; there are names for 3 classes"):
        opened(samples, None, names[:3])
    with pytest.raises(UsageError, match="contradict"):
        open_source(samples, BuildConfig(labels="none"), names)


def test_several_tars_stand_before_the_paths(tmp_path: Path) -> None:
    for number in range(2):
        pack(tmp_path / f"s-{number}.tar", {"1.jpg": b"%d" % number, "1.cls": b"%d" % number})
    source = open_source(f"{tmp_path}/s-{{0..1}}.tar")
    assert labelled(source) == [("s-0.tar/1.jpg", 0), ("s-1.tar/1.jpg", 1)]
    assert [source.read(item) for item in items(source)] == [b"0", b"1"]


def test_a_tar_that_changes_between_the_look_for_classes_and_the_listing_is_refused(tmp_path: Path) -> None:
    files = {f"{number}.{kind}": str(number).encode() for number in range(3) for kind in ("jpg", "cls")}
    source = opened(pack(tmp_path / "t.tar", files))
    pack(tmp_path / "t.tar", dict(reversed(files.items())))
    with pytest.raises(SourceError, match="has changed meanwhile"):
        items(source)


@pytest.mark.parametrize(
    "names", [("0.jpg", "0.mask.png", "0.cls"), ("0.cls", "0.depth.npy", "0.jpg"), ("./a/0.jpg", "./a/0.json")]
)
def test_a_tar_is_one_where_an_image_and_a_label_have_the_same_key(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert kind_of(str(pack(tmp_path / "t.tar", dict.fromkeys(names, b"1")))) == "webdataset"


def test_a_sample_without_an_image_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(tmp_path / "t.tar", {"1.cls": b"1", "2.jpg": b"", "2.cls": b"2", "3.txt": b""})
    assert labelled(opened(path)) == [("2.jpg", 2)]
    assert "2 samples without an image ('1', ...) are omitted" in caplog.text


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        ({"1.jpg": b"", "1.txt": b""}, None, r"sample '1' has no \.cls beside it, only jpg, txt"),
        ({"1.jpg": b"", "1.png": b"", "1.cls": b"1"}, None, r"sample '1' has 2 images \(jpg, png\)"),
        ({"1.jpg": b"", "1.JPG": b"", "1.cls": b"1"}, None, "sample '1' has 'jpg' twice"),
        ({"1.jpg": b"", "1.cls": b"1", "2.cls": b"", "./1.jpg": b"", "./1.cls": b"1"}, None, r"'1\.jpg' twice"),
        ({"1.jpg": b"", "1.cls": b"1" * (1 << 20) + b"1"}, None, r"its \.cls has 1048577 bytes; a label has at most"),
        ({"1.jpg": b"", "1.cls": b" "}, None, "has no label for '1.jpg'"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, None, "cannot be read"),
        ({"1.jpg": b"", "1.json": b"{"}, "json:a", "cannot be read"),
        ({"1.jpg": b"", "1.json": b"[" * 100_000}, "json:a", "cannot be read"),
        ({"1.jpg": b"", "1.json": b'{"b": 1}'}, "json:a", "has no field 'a'"),
        ({"1.jpg": b"", "1.json": b'{"a": 1}'}, "json:a.b", r"has no field 'a\.b'"),
        ({"1.jpg": b"", "1.json": b'{"a": [1]}'}, "json:a", "is no single value"),
        ({"../1.jpg": b"", "../1.cls": b"1"}, None, "leads out of the archive"),
    ],
)  # fmt: skip
def test_what_a_sample_lacks_is_named(tmp_path: Path, files: dict[str, bytes], labels: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(pack(tmp_path / "t.tar", files), labels)


@pytest.mark.parametrize("labels", ["class-dir", "json", "json:", "json:a..b", "labels.csv", "cls:clas"])
def test_labels_of_another_form_are_refused(samples: Path, labels: str) -> None:
    with pytest.raises(UsageError, match=r"cls, txt, json:FIELD .* also with a kind \(class, integer, float\)"):
        opened(samples, labels)


def test_a_webdataset_builds_what_its_folder_builds(tmp_path: Path, tree: Path, make_dataset: MakeDataset) -> None:
    files = {}
    for path in sorted(tree.rglob("*.jpg")):
        name = path.relative_to(tree).as_posix()
        files |= {name: path.read_bytes(), name.partition(".")[0] + ".txt": name.partition("/")[0].encode()}
    there, here = make_dataset(tree), make_dataset(pack(tmp_path / "t.tar", files), labels="txt")
    orders = [np.argsort(read_shards(out, "paths")) for out in (here, there)]
    for name in ("paths", "labels", "source_bytes", "images"):
        np.testing.assert_array_equal(read_shards(here, name)[orders[0]], read_shards(there, name)[orders[1]])
