"""Labels in sidecar tables of a folder, and folders that are just folders."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, labelled, opened, read_shards, refusal

import gpu_npz
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.selection import listed
from gpu_npz.errors import SourceError
from gpu_npz.sources import labels as labels_module
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import BadItem


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_equal_texts_are_kept_once_and_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_MAX_TEXTS", 2)
    one = labels_module.shared()
    first = [one(str(number)) for number in range(1000, 1003)]
    again = [one(str(number)) for number in range(1000, 1003)]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    assert [one(value) for value in (None, 1.5, "1002")] == [None, 1.5, "1002"]


# Folders


def test_folders_are_just_folders_where_there_are_no_labels(tmp_path: Path) -> None:
    root = touch(tmp_path, "z.jpg", "b/1.jpg", "a/deep/2.jpg", "a/notes.txt")
    source = opened(root, labels="none")
    assert (source.class_names, source.columns, source.kind) == (None, (), "folder")
    assert labelled(source) == [("z.jpg", None), ("a/deep/2.jpg", None), ("b/1.jpg", None)]
    assert "or use --labels none" in refusal(root)
    assert "contradict each other" in refusal(root, ["a"], labels="none")


def test_class_folders_are_what_is_meant_without_a_word(tmp_path: Path) -> None:
    root = touch(tmp_path, "b/1.jpg", "a/2.jpg")
    for source in (FolderSource(root), FolderSource(root, None, "class-dir"), opened(root, labels="class-dir")):
        assert (source.class_names, labelled(source)) == (("a", "b"), [("a/2.jpg", 0), ("b/1.jpg", 1)])


def test_a_build_without_labels_has_the_pixels_of_one_with_labels(tree: Path, make_dataset: MakeDataset) -> None:
    bare, plain = make_dataset(tree, labels="none"), make_dataset(tree)
    assert gpu_npz.open_dataset(bare).labels is None
    for name in ("images", "paths"):
        np.testing.assert_array_equal(read_shards(bare, name), read_shards(plain, name))


# One table


def test_a_build_by_a_table_has_the_pixels_of_one_by_folders_in_the_tables_order(
    tree: Path, tmp_path: Path, make_dataset: MakeDataset
) -> None:
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    rows = [f"{path},{path.split('/')[0]},{number}" for number, path in enumerate(paths)]
    written = table(tmp_path / "l.csv", "file,fruit,number", *reversed(rows))
    ours, plain = make_dataset(tree, labels=f"{written}:fruit,number"), make_dataset(tree)
    for name in ("images", "paths", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name)[::-1], read_shards(plain, name))
    np.testing.assert_array_equal(
        read_shards(ours, "labels")[::-1], np.stack([read_shards(plain, "labels"), np.arange(40)], axis=1)
    )
    columns = gpu_npz.open_dataset(ours).label_columns
    assert [(each.name, each.kind) for each in columns] == [("fruit", "class"), ("number", "integer")]
    config = gpu_npz.BuildConfig(
        device="cpu", shard_size=7, size="12x16", max_rejects="100%", labels=f"{written}:fruit,number"
    )
    again = gpu_npz.build(tree, ours, config)
    assert again.rows == 40


def test_a_table_has_the_usual_columns_or_those_that_are_named_with_their_kinds(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "z.jpg", "a/1.jpg")
    path = table(tmp_path / "l.tsv", "path\tlabel\tage\tsite", "z.jpg\tx\t30\ts1", "a/1.jpg\ty\t40\ts2")
    assert labelled(opened(root, labels=str(path))) == [("z.jpg", 0), ("a/1.jpg", 1)]
    assert labelled(opened(root, labels=f"{path}:age")) == [("z.jpg", 30), ("a/1.jpg", 40)]
    source = opened(root, labels=f"{path}:age:class,label")
    assert [(each.name, each.kind) for each in source.columns] == [("age", "class"), ("label", "class")]
    assert labelled(opened(root, ["y", "x"], labels=str(path))) == [("z.jpg", 1), ("a/1.jpg", 0)]
    (group,) = opened(root, labels=str(path), split="v=0.5/v", split_by="site").groups()
    assert group.keys == [b"s1", b"s2"]
    copy = pickle.loads(pickle.dumps(source))
    assert labelled(copy) == labelled(source) == labelled(source)
    assert read_item(copy, Item(0, "a/1.jpg", None)) == b"a/1.jpg"


def test_images_without_a_row_are_counted_and_rows_without_an_image_are_rejects(tmp_path: Path) -> None:
    root = touch(tmp_path, "1.jpg", "2.jpg", "a/3.jpg", "notes.txt")
    path = table(tmp_path / "l.csv", "path,label", "gone.jpg,1", "2.jpg,2")
    message = refusal(root, labels=str(path))
    assert f"2 of 3 images have no row in '{path}', '1.jpg' for one, relative to SRC, and rows there " in message
    assert "rows there begin with 'gone.jpg'; add or fix rows, or move the images away" in message
    table(path, "path,label")
    message = refusal(root, labels=f"{path}:label")
    assert f"3 of 3 images have no row in '{path}', '1.jpg' for one, relative to SRC, and there are no rows" in message
    table(path, "path,label", "gone.jpg,1", "2.jpg,2", "a/3.jpg,3", "1.jpg,4")
    source = opened(root, labels=str(path))
    assert labelled(source) == [("gone.jpg", 1), ("2.jpg", 2), ("a/3.jpg", 3), ("1.jpg", 4)]
    with pytest.raises(BadItem) as caught:
        read_item(source, Item(0, "gone.jpg", None))
    assert caught.value.code == "missing"


def test_a_table_that_leads_out_of_the_folder_or_is_none_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "1.jpg")
    path = table(tmp_path / "l.csv", "path,label", "../images/1.jpg,1", "../2.jpg,2")
    assert "row 1 has the path '../images/1.jpg', which leads out of" in refusal(root, labels=str(path))
    table(path, "path,label", "1.jpg,1", "./1.jpg,2")
    assert "row 1 and row 2 both have the path '1.jpg'" in refusal(root, labels=str(path))
    table(path, "path,label", "1.jpg,1")
    assert "no column 'x'; it has 'path', 'label'" in refusal(root, labels=f"{path}:x")
    assert "No such file" in refusal(root, labels=f"{tmp_path}/gone.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder; give a table" in refusal(root, labels=f"{tmp_path}/folder.csv")
    for labels in ("folder", "labels", "json:x", ".csv"):
        assert f"--labels '{labels}' of a folder; allowed: class-dir, none, a table" in refusal(root, labels=labels)
    unnamed = table(tmp_path / "u.csv", "path,klass", "1.jpg,1")
    assert f"none with a usual name of labels; say --labels {unnamed}:klass" in refusal(root, labels=str(unnamed))


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (("1e3", "1e3", "2.5"), [1000.0, 1000.0, 2.5]),
        ((" 5", "\x1e1", "2\u3000"), [5, 1, 2]),
        (("12345678901234567890", "12345678901234567891", "7"), None),  # identifiers, and no floats
    ],
)
def test_texts_of_digits_are_numbers_where_they_fit(tmp_path: Path, texts: tuple[str, ...], values: Any) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    path = table(tmp_path / "l.csv", "path,label", *(f"{row}.jpg,{text}" for row, text in enumerate(texts)))
    if values is not None:
        assert [label for _, label in labelled(opened(root, labels=str(path)))] == values
    else:
        assert "both texts" in refusal(root, labels=str(path))
        found = labelled(opened(root, labels=f"{path}:label:class"))
        assert len({label for _, label in found}) == 3


WHOLE: list[Any] = ["1", "1.0", "1e0", " 1", "+1", "01", "1.", "10e-1", "0001.000", 1, 1.0, "\uff11"]


@pytest.mark.parametrize("spelled", WHOLE, ids=repr)
def test_a_whole_number_is_one_in_every_spelling(tmp_path: Path, spelled: Any) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg")
    rows = ({"path": "0.jpg", "label": spelled}, {"path": "1.jpg", "label": 2})
    path = table(tmp_path / "l.jsonl", *map(json.dumps, rows))
    found = opened(root, labels=f"{path}:label:integer")
    (group,) = found.groups()
    assert group.labels is not None
    assert (group.labels.dtype, group.labels.tolist(), found.columns[0].kind) == (np.int64, [1, 2], "integer")
    named = opened(root, ["zero", "one", "two"], labels=str(path))
    assert [label for _, label in labelled(named)] == [1, 2]


@pytest.mark.parametrize(
    "spelled", ["1.5", "1e-1", "1_0", "0x1", "1.0e19", "9223372036854775808", "1e9999999", "inf", "one", 1.5, 2.0**60],
    ids=repr,
)  # fmt: skip
def test_what_is_no_whole_number_is_refused_as_one(tmp_path: Path, spelled: Any) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg")
    rows = ({"path": "0.jpg", "label": 2}, {"path": "1.jpg", "label": spelled})
    path = table(tmp_path / "l.jsonl", *map(json.dumps, rows))
    message = f"column 'label' has {spelled!r} for row 2, which is no whole number; fix it, or say --labels label:class"
    assert message in refusal(root, labels=f"{path}:label:integer")


@pytest.mark.parametrize("kind", ["", ":integer", ":float"])
def test_decimal_commas_are_refused_as_such_beside_numbers_too(tmp_path: Path, kind: str) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg")
    path = table(tmp_path / "l.csv", "path;label", "0.jpg;2", "1.jpg;1,0")
    message = "column 'label' has decimal commas ('1,0' for row 2); write points, or say --labels label:class"
    assert message in refusal(root, labels=f"{path}:label{kind}")


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (("1.0", "10.0", "2.0"), ("1", "2", "10")),
        (("1", "1.0", "+1"), ("1",)),
        (("01", "02", "10"), ("01", "02", "10")),  # identifiers
        (("1.0", "1.5", "2.0"), ("1.0", "1.5", "2.0")),  # versions, say
        (("1.0", "1", "x"), ("1", "1.0", "x")),
    ],
)
def test_classes_of_whole_numbers_have_one_name_a_number(
    tmp_path: Path, texts: tuple[str, ...], names: tuple[str, ...]
) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    path = table(tmp_path / "l.csv", "path,label", *(f"{row}.jpg,{text}" for row, text in enumerate(texts)))
    assert opened(root, labels=f"{path}:label:class").class_names == names


@pytest.mark.parametrize("extension", [".csv", ".jsonl"])
def test_blanks_around_a_text_make_no_other_class_and_no_other_patient(tmp_path: Path, extension: str) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    rows = [("cat", " p1"), (" cat", "p1"), ("big dog\t", "p2 ")]
    lines = {
        ".csv": ["path, label, patient", *(f"{row}.jpg,{label},{key}" for row, (label, key) in enumerate(rows))],
        ".jsonl": [
            json.dumps({"path": f"{row}.jpg", "label": label, "patient": key}) for row, (label, key) in enumerate(rows)
        ],
    }
    path = table(tmp_path / f"l{extension}", *lines[extension])
    source = opened(root, labels=str(path), split="v=0.5/v", split_by="patient")
    assert (source.class_names, [label for _, label in labelled(source)]) == (("big dog", "cat"), [1, 1, 0])
    assert [key for group in source.groups() for key in group.keys or ()] == [b"p1", b"p1", b"p2"]
    assert [label for _, label in labelled(opened(root, ["cat", "big dog"], labels=str(path)))] == [0, 0, 1]


def test_whole_numbers_are_classes_by_a_list_however_they_are_written(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    path = table(tmp_path / "l.csv", "path,label", "0.jpg,1.0", "1.jpg,0.0", "2.jpg,1.0")
    source = opened(root, ["no", "yes"], labels=str(path))
    (group,) = source.groups()
    assert (source.class_names, source.columns) == (("no", "yes"), ())
    assert group.labels is not None
    assert (group.labels.dtype, group.labels.tolist()) == (np.int64, [1, 0, 1])
    assert listed(source, gpu_npz.BuildConfig(labels=str(path), per_class=1))["order"].tolist() == [0, 1]
    assert "label:float and --classes-from contradict each other" in refusal(
        root, ["no", "yes"], labels=f"{path}:label:float"
    )
    table(path, "path,label", "0.jpg,1.0", "1.jpg,0.5", "2.jpg,1.0")
    assert "column 'label' has 0.5 for row 2; there are names for 2 classes" in refusal(
        root, ["no", "yes"], labels=str(path)
    )


def test_a_table_is_the_one_that_was_named_in_whatever_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path / "images", "1.jpg")
    table(tmp_path / "l.csv", "path,label", "1.jpg,1")
    table(tmp_path / "images" / "l.csv", "path,label", "1.jpg,2")
    monkeypatch.chdir(tmp_path)
    copy = pickle.dumps(opened(root, labels="l.csv"))
    monkeypatch.chdir(root)
    assert labelled(pickle.loads(copy)) == [("1.jpg", 1)]


def test_labels_that_change_while_the_folder_is_in_use_are_an_error(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "1.jpg")
    path = table(tmp_path / "l.csv", "path,label", "1.jpg,a")
    source = opened(root, labels=str(path))
    labelled(source)
    table(path, "path,label", "1.jpg,b")
    with pytest.raises(SourceError, match=r"has changed meanwhile; run the command again"):
        labelled(source)


# A table in every folder


def test_a_table_in_every_folder_has_names_of_its_files_and_labels(tmp_path: Path) -> None:
    root = touch(tmp_path / "im[a]ges", "z.jpg", "b/1.jpg", "b/2.jpg", "a/{deep}/1.jpg")
    table(root / "labels.csv", "picture,age,w", "z.jpg,3,0.5")
    table(root / "b" / "labels.csv", "age,w,file", "1,2.5,2.jpg", "2,3,1.jpg", "9,9,gone.jpg")
    table(root / "a" / "{deep}" / "labels.csv", "picture,age,w", "1.jpg,7,7")
    table(root / "bare" / "labels.csv", "picture,age,w", "gone.jpg,8,8")
    source = opened(root, labels="csv:labels.csv")
    assert labelled(source) == [
        ("z.jpg", [3, 0.5]), ("a/{deep}/1.jpg", [7, 7]), ("b/2.jpg", [1, 2.5]), ("b/1.jpg", [2, 3]),
        ("b/gone.jpg", [9, 9]), ("bare/gone.jpg", [8, 8]),
    ]  # fmt: skip
    assert [(each.name, each.kind) for each in source.columns] == [("age", "integer"), ("w", "float")]
    assert read_item(source, Item(0, "b/2.jpg", None)) == b"b/2.jpg"
    assert labelled(pickle.loads(pickle.dumps(source))) == labelled(source)


def test_one_column_of_texts_in_every_folder_is_classes_over_all_of_them(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.jpg", "b/1.jpg")
    for folder, label in (("a", "dog"), ("b", "cat")):
        table(root / folder / "l.jsonl", f'{{"path": "1.jpg", "label": "{label}"}}')
    source = opened(root, labels="csv:l.jsonl")
    assert (source.class_names, labelled(source)) == (("cat", "dog"), [("a/1.jpg", 1), ("b/1.jpg", 0)])


def patients(root: Path, head: str, *rows: str) -> Path:
    """A folder with a table `l.csv` for each row, which names the file that stands there."""
    for number, row in enumerate(rows):
        touch(root, f"{number}/1.jpg")
        table(root / f"{number}" / "l.csv", head, row)
    return root


def test_a_table_in_every_folder_has_the_usual_column_of_labels_or_those_that_are_named(tmp_path: Path) -> None:
    root = patients(tmp_path, "Label,age,File,site,note", "x,30,1.jpg,s1,a", "y,40,1.jpg,s2,b")
    source = opened(root, labels="csv:l.csv")
    assert (source.class_names, labelled(source)) == (("x", "y"), [("0/1.jpg", 0), ("1/1.jpg", 1)])
    source = opened(root, labels="csv:l.csv:age:float,site")
    assert [(each.name, each.kind) for each in source.columns] == [("age", "float"), ("site", "class")]
    assert labelled(source) == [("0/1.jpg", [30, 0]), ("1/1.jpg", [40, 1])]
    assert labelled(pickle.loads(pickle.dumps(source))) == labelled(source)
    assert "no column 'x'; it has 'Label', 'age', 'File'" in refusal(root, labels="csv:l.csv:age,x")
    root = patients(tmp_path / "two", "file,label,target", "1.jpg,1,2")
    assert "say --labels csv:l.csv:label, or csv:l.csv:A,B, or none" in refusal(root, labels="csv:l.csv")
    path = table(tmp_path / "all.csv", "file,label,target", "0/1.jpg,1,2")
    assert f"say --labels {path}:label, or {path}:A,B, or none" in refusal(root, labels=str(path))


def test_without_a_usual_name_all_columns_are_labels_but_those_of_files_and_of_the_split(tmp_path: Path) -> None:
    root = patients(tmp_path, ",patient,slice,edema,mass", "0,p1,1.jpg,0,1", "1,p2,1.jpg,1,0")
    settings: dict[str, Any] = {"labels": "csv:l.csv", "split": "v=0.5/v", "split_by": "patient"}
    source = opened(root, **settings)
    assert [(each.name, each.kind) for each in source.columns] == [("edema", "integer"), ("mass", "integer")]
    assert labelled(source) == [("0/1.jpg", [0, 1]), ("1/1.jpg", [1, 0])]
    assert [each for group in source.groups() for each in group.keys or ()] == [b"p1", b"p2"]
    root = patients(tmp_path / "bare", "patient,slice", "p1,1.jpg")
    assert "has the columns 'patient', 'slice'; it needs one of file names and one of labels, beside 'patient'" in (
        refusal(root, **settings)
    )
    root = patients(tmp_path / "alone", "slice", "1.jpg")
    assert "has the columns 'slice'; it needs one of file names and one of labels" in refusal(root, labels="csv:l.csv")


def test_tables_that_do_not_fit_are_refused_with_the_folder(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    table(root / "a" / "l.csv", "path,x", "1.jpg,1")
    table(root / "b" / "l.csv", "path,y", "2.jpg,1")
    assert "the labels 'x' in 'a/' and 'y' in 'b/'; give all the same" in refusal(root, labels="csv:l.csv")
    table(root / "b" / "l.csv", "path,x", "2.jpg,1")
    assert "/c' has images and no 'l.csv'; add one" in refusal(root, labels="csv:l.csv")
    table(root / "c" / "l.csv", "path,x", "other.jpg,1")
    message = refusal(root, labels="csv:l.csv")
    assert f"1 of 3 images have no row in '{root}/a/l.csv' or in 2 more tables, 'c/3.jpg' for one" in message
    table(root / "c" / "l.csv", "path,x", "3.jpg,1", "3.jpg,2")
    assert "row 1 of '" in (message := refusal(root, labels="csv:l.csv"))
    assert "c/l.csv' and row 2 of '" in message
    table(root / "c" / "l.csv", "path,x", "3.jpg,")
    assert "no label for row 1 of '" in (message := refusal(root, labels="csv:l.csv"))
    assert "/c/l.csv'" in message
    for path in ("../b/2.jpg", "x/3.jpg", "/3.jpg"):
        table(root / "c" / "l.csv", "path,x", f"{path},1")
        assert f"row 1 has '{path}'; a table in every folder has names of files" in refusal(root, labels="csv:l.csv")
    table(root / "c" / "l.csv", "path,x", "..,1")
    assert "row 1 has the path '..'" in refusal(root, labels="csv:l.csv")
    for name in ("", "a/l.csv", "../l.csv", "l", "l.csv.old", ":x"):
        assert "give the name that a table has in each folder" in refusal(root, labels=f"csv:{name}")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    assert "no folder with images or with a table 'l.csv'" in refusal(tmp_path / "empty", labels="csv:l.csv")


def test_another_machine_sees_the_same_folder_and_its_labels(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "1.jpg", "a/2.jpg")
    source = FolderSource(root, labels="none")
    source._root_identity = (0, 0)
    with pytest.raises(SourceError, match="is missing"):
        source.check()
    other = source.anew()
    other.check()
    assert labelled(other) == [("1.jpg", None), ("a/2.jpg", None)]
    source.location = str(tmp_path / "gone")
    with pytest.raises(SourceError, match="gone/': No such file or directory"):
        source.anew()


def test_a_table_that_has_changed_since_the_build_began_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = touch(tmp_path / "images", "1.jpg", "2.jpg")
    config = BuildConfig(device="cpu", size=8, workers=0, root=str(root), max_rejects="100%", labels="label")
    path = table(tmp_path / "l.csv", "path,label", "1.jpg,x", "2.jpg,y")
    build(path, tmp_path / "out", config)
    build(path, tmp_path / "out", config)
    assert "has changed since" not in caplog.text
    table(path, "path,label", "1.jpg,y", "2.jpg,x")
    build(path, tmp_path / "out", config)
    assert f"the table of '{path}' has changed since the build started" in caplog.text
    caplog.clear()
    settings = {"root": None, "labels": str(path)}
    build(root, tmp_path / "two", config.model_copy(update=settings))
    table(path, "path,label", "2.jpg,y", "1.jpg,x")
    build(root, tmp_path / "two", config.model_copy(update=settings))
    assert f"the table of '{root}' has changed since the build started" in caplog.text


def test_labels_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "1.jpg")
    path = tmp_path / "l.csv"
    path.write_bytes("path,label\n1.jpg,grün\n".encode("latin-1"))
    assert "column 'label' has 'gr\\udcfcn', which is no UTF-8 text; save it as such" in refusal(root, labels=str(path))
