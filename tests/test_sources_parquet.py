"""Images inside of Parquet files: the same dataset as of the same images in folders, and no file that is trusted."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, MakeTree, growth_of, items, labelled, opened, read_shards, refusal, reject

import gpu_npz
from gpu_npz.errors import SourceError, UsageError
from gpu_npz.sources.access.files import Files
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.rejects import BadItem
from gpu_npz.sources.tables import parquet
from gpu_npz.sources.tables.arrow import open_parquet, rows
from gpu_npz.sources.tables.parquet import ParquetSource

arrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])


def write(
    path: Path, images: list[Any], rows: int = 7, names: dict[str, list[str]] | None = None, **columns: Any
) -> Path:
    """A file as `datasets` writes it: `images` are bytes, None, or a dictionary with bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": each, "path": None} if isinstance(each, bytes) else each for each in images]
    table = arrow.table({"image": arrow.array(structs, STRUCT), **columns})
    if names is not None:
        features = {name: {"names": each, "_type": "ClassLabel"} for name, each in names.items()}
        info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """300 rows in three row groups, each of 2,000 bytes that say which row it is."""
    rows = [b"%06d" % number + os.urandom(1994) for number in range(300)]
    return write(tmp_path / "n.parquet", rows, 100, label=list(range(300)))


# What is listed and read


@pytest.mark.parametrize("form", ["one", "folder", "pattern"])
def test_a_build_of_parquet_is_that_of_the_same_images_in_folders(
    tree: Path, tmp_path: Path, form: str, make_dataset: MakeDataset
) -> None:
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    classes = sorted(path.name for path in tree.iterdir())
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    labels = [classes.index(path.relative_to(tree).parts[0]) for path in paths]
    make = functools.partial(write, names={"label": classes})
    if form == "one":
        source = str(make(tmp_path / "all.parquet", rows, label=labels))
    else:
        for number, span in enumerate((slice(0, 15), slice(15, 40))):
            make(tmp_path / f"train-{number:05}-of-00002.parquet", rows[span], label=labels[span])
        source = str(tmp_path) if form == "folder" else f"{tmp_path}/train-{{00000..00001}}-of-00002.parquet"
    ours, plain = make_dataset(source), make_dataset(tree)
    assert gpu_npz.open_dataset(ours).class_names == gpu_npz.open_dataset(plain).class_names
    for name in ("images", "labels", "index", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name), read_shards(plain, name))
    name = "all.parquet" if form == "one" else "train-00000-of-00002.parquet"
    assert read_shards(ours, "paths")[2] == f"{name}/000002"


def test_a_shuffled_build_has_the_images_that_its_paths_say(
    numbers: Path, tmp_path: Path, make_tree: MakeTree, make_dataset: MakeDataset
) -> None:
    root = make_tree({f"{number:02}.jpg": "jpeg" for number in range(30)})
    rows = [(root / f"{number:02}.jpg").read_bytes() for number in range(30)]
    out = make_dataset(write(tmp_path / "s.parquet", rows), shuffle=1)
    plain = read_shards(make_dataset(root))
    order = [int(path.split("/")[1]) for path in read_shards(out, "paths")]
    assert order != sorted(order)
    np.testing.assert_array_equal(read_shards(out), plain[order])


IN_STRUCT = {"struct": arrow.binary(), "struct of a view": arrow.binary_view(), "struct of fixed": arrow.binary(3)}
FORMS = {
    "view": arrow.array([b"abc", b"def"], arrow.binary_view()),
    "fixed": arrow.array([b"abc", b"def"], arrow.binary(3)),
    "dictionary": arrow.array([b"abc", b"def"]).dictionary_encode(),
    "fixed dictionary": arrow.array([b"abc", b"def"], arrow.binary(3)).dictionary_encode(),
    **{
        name: arrow.array([{"bytes": b"abc"}, {"bytes": b"def"}], arrow.struct([("bytes", kind)]))
        for name, kind in IN_STRUCT.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_read_in_every_form_of_arrow(tmp_path: Path, form: str) -> None:
    labels = arrow.array(["x", "y"], arrow.string_view())
    pq.write_table(arrow.table({"photo": FORMS[form], "label": labels}), path := tmp_path / "t.parquet")
    source = opened(path)
    assert (source.kind, source.class_names) == ("parquet", ("x", "y"))
    assert [read_item(source, item) for item in items(source)] == [b"abc", b"def"]
    source = opened(path, image_column="photo")
    assert [read_item(source, item) for item in items(source)] == [b"abc", b"def"]


def test_bytes_of_a_fixed_size_are_no_images_beside_others_or_beside_paths(tmp_path: Path) -> None:
    uuids = arrow.array([bytes(16)], arrow.binary(16))
    pq.write_table(arrow.table({"id": uuids, "data": [b"image"]}), path := tmp_path / "t.parquet")
    assert read_item(opened(path), items(opened(path))[0]) == b"image"
    pq.write_table(arrow.table({"id": uuids, "path": arrow.array(["a.jpg"], arrow.string_view())}), path)
    assert [item.path for item in items(opened(path))] == ["a.jpg"]


@pytest.mark.parametrize(
    ("kind", "value", "way"),
    [
        (
            arrow.list_(STRUCT),
            [{"bytes": b"a"}],
            "one row for each, for example with explode of pandas",
        ),
        (arrow.large_list(arrow.binary()), [b"a"], "a row is one image: write one row for each"),
        (arrow.list_(arrow.binary(), 1), [b"a"], "a row is one image: write one row for each"),
        (arrow.list_(arrow.uint8()), [1, 2], "images are binary, or a struct with bytes"),
        (arrow.list_(arrow.list_(arrow.uint8())), [[1], [2]], "images are binary, or a struct with bytes"),
        (arrow.struct([("path", arrow.string())]), {"path": "a.jpg"}, "images are binary, or a struct with bytes"),
    ],
    ids=str,
)
def test_columns_of_something_like_images_are_refused_with_what_to_do(
    tmp_path: Path, kind: Any, value: Any, way: str
) -> None:
    column = arrow.array([value, value], kind)
    pq.write_table(arrow.table({"image": column, "label": [1, 2]}), path := tmp_path / "t.parquet")
    for settings in ({}, {"image_column": "image", "source": "parquet"}):
        message = refusal(path, **settings)
        assert f"column 'image' is of the type {str(kind).partition('<')[0]}<" in message
        assert way in message
    pq.write_table(arrow.table({"image": column, "file_name": ["a.jpg", "b.jpg"]}), path)
    if "row for each" not in way:
        assert [item.path for item in items(opened(path))] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("kind", [arrow.binary(), arrow.large_binary()])
def test_a_plain_column_of_bytes_is_read_too(tmp_path: Path, kind: Any) -> None:
    table = arrow.table({"img": arrow.array([b"a", b"b"], kind), "class": ["x", "y"], "other": [b"1", b"2"]})
    pq.write_table(table, path := tmp_path / "t.parquet")
    source = opened(path)
    assert source.class_names == ("x", "y")
    assert [(item.path, item.label) for item in items(source)] == [("t.parquet/000000", 0), ("t.parquet/000001", 1)]
    assert [read_item(source, item) for item in items(source)] == [b"a", b"b"]
    source = opened(path, image_column="other", labels="none")
    assert [(item.label, read_item(source, item)) for item in items(source)] == [(None, b"1"), (None, b"2")]


def test_any_row_is_read_in_any_order_by_any_thread(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_WINDOW_BYTES", 20_000)
    monkeypatch.setattr(parquet, "_OPEN_GROUPS", 2)
    source = opened(numbers)
    listed = items(source)
    assert len(listed) == 300
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = [*range(300)] if seed == 0 else np.random.default_rng(seed).permutation(300).tolist()
        wrong.extend(row for row in order if not read_item(source, listed[row]).startswith(b"%06d" % row))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_in_order_read_the_file_once_and_hold_little_of_it(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_WINDOW_BYTES", 20_000)
    begun: list[int] = []
    batches = parquet._batches
    monkeypatch.setattr(
        parquet, "_batches", lambda file, group, column: begun.append(group) or batches(file, group, column)
    )
    source = opened(numbers)
    assert isinstance(source, ParquetSource)
    for first in (0, 1):  # two readers, interleaved as two open shards are
        for row, item in enumerate(items(source)):
            assert read_item(source, item).startswith(b"%06d" % row)
            assert all(window._bytes <= 20_000 + 8_000 for window in source._windows.values())
        assert begun == [0, 1, 2] * (first + 1)


def test_a_source_travels_to_other_processes_without_what_it_holds(numbers: Path) -> None:
    source = opened(numbers)
    read_item(source, items(source)[250])
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 5000
    assert items(copy) == items(source)
    assert read_item(copy, items(copy)[17]).startswith(b"000017")
    assert source.files == ((numbers.name, numbers.stat().st_size),)


def test_names_of_classes_may_be_numbers_in_any_spelling(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [b"a", b"b"], names={"label": ["1.0", "2.0"]}, label=[1, 0])
    source = opened(path)
    assert [label for _, label in labelled(source)] == [1, 0]
    assert source.class_names == ("1.0", "2.0")


def test_names_of_classes_come_from_the_schema_or_from_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [b"a", b"b"], names={"label": ["cat", "dog", "eel"]}, label=[2, 0])
    source = opened(path)
    assert (source.class_names, [item.label for item in items(source)]) == (("cat", "dog", "eel"), [2, 0])
    source = opened(path, ["eel", "dog", "cat"])
    assert (source.class_names, [item.label for item in items(source)]) == (("eel", "dog", "cat"), [0, 2])
    assert "are not in the given list: 'cat', 'eel'" in refusal(path, ["dog"])
    source = opened(path, labels="label:integer")
    assert (source.class_names, source.columns[0].kind) == (None, "integer")
    source = opened(path, labels="label:float")
    assert (source.class_names, source.columns[0].kind, source.columns[0].classes) == (None, "float", None)
    (group,) = source.groups()
    assert group.labels is not None
    assert (group.labels.dtype, group.labels.tolist()) == (np.float64, [2.0, 0.0])
    assert opened(path, labels="label:class").class_names == ("cat", "dog", "eel")
    assert "contradict each other" in refusal(path, ["cat"], labels="none")
    assert "has no labels; leave --classes-from out" in refusal(write(tmp_path / "u.parquet", [b"a"]), ["cat"])
    write(path, [b"a", b"b"], names={"label": ["cat", "dog"]}, label=[2, -1])
    assert "has 2 for row 0 of 't.parquet'; there are names for 2 classes, 0 to 1" in refusal(path)


def test_several_columns_of_labels_keep_their_names(tmp_path: Path) -> None:
    names = {"fine": ["a", "b", "c"]}
    path = write(tmp_path / "t.parquet", [b"a", b"b"], names=names, fine=[2, 0], w=[0.5, 1.5], place=["x", "y"])
    source = opened(path, labels="fine,w,place")
    assert [item.label for item in items(source)] == [[2.0, 0.5, 0.0], [0.0, 1.5, 1.0]]
    assert [(each.name, each.kind, each.classes) for each in source.columns] == [
        ("fine", "class", ("a", "b", "c")), ("w", "float", None), ("place", "class", ("x", "y"))
    ]  # fmt: skip
    (group,) = opened(path, labels="fine", split="v=0.5/v", split_by="place").groups()
    assert group.keys == [b"x", b"y"]
    assert "has no column 'age'; it has 'image', 'fine', 'w', 'place'" in refusal(
        path, labels="fine", split="v=0.5/v", split_by="age"
    )


def test_a_shuffle_over_large_row_groups_warns_once(
    numbers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened(numbers, shuffle=1)
    assert not caplog.records
    monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", 100_000)
    with caplog.at_level(logging.WARNING):
        opened(numbers)
        assert not caplog.records
        items(opened(numbers, shuffle=1))
    (record,) = caplog.records
    assert "--shuffle rereads one of them for almost every image" in record.getMessage()


# What is refused


def test_rows_without_bytes_are_rejects(tmp_path: Path) -> None:
    rows = [b"a", None, {"bytes": None, "path": "/etc/passwd"}, b"", b"e"]
    source = opened(write(tmp_path / "t.parquet", rows, label=[1, 2, 3, 4, 5]))
    listed = items(source)
    why = "the row has no bytes; only those are read, never the file of its path"
    assert [reject(source, listed[row]) for row in (1, 2)] == [("missing", why)] * 2
    assert reject(source, listed[3])[0] == "empty"
    assert [read_item(source, listed[row]) for row in (0, 4)] == [b"a", b"e"]


def test_an_image_larger_than_any_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ENCODED_BYTES", 10)
    source = opened(write(tmp_path / "t.parquet", [b"a" * 11, b"b" * 10]))
    assert reject(source, items(source)[0]) == ("too-large", "11 bytes; at most 10")
    assert read_item(source, items(source)[1]) == b"b" * 10


def test_a_damaged_row_group_makes_rejects_of_its_own_rows_alone(numbers: Path) -> None:
    chunk = pq.ParquetFile(numbers).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with open(numbers, "r+b") as file:
        file.seek(start)
        file.write(os.urandom(5000))
    source = opened(numbers)
    listed = items(source)
    for row in (100, 150, 199):
        code, detail = reject(source, listed[row])
        assert code == "unreadable"
        assert str(numbers.parent) not in detail
    for row in (0, 99, 200, 299):
        assert read_item(source, listed[row]).startswith(b"%06d" % row)


def test_a_damaged_row_group_is_read_once_for_all_of_its_rows(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = pq.ParquetFile(numbers).metadata.row_group(1).column(0)
    with open(numbers, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(os.urandom(5000))
    begun: list[int] = []
    begin = parquet._batches
    monkeypatch.setattr(parquet, "_batches", lambda *of: (begun.append(of[1]), begin(*of))[1])
    source = opened(numbers)
    details = {reject(source, item)[1] for item in items(source)[100:200]}
    assert begun == [1]
    assert len(details) == 1
    again = pickle.loads(pickle.dumps(source))
    assert reject(again, items(again)[150])[1] in details


def test_a_row_group_is_read_again_where_the_system_failed_once(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(numbers)
    listed = items(source)
    with monkeypatch.context() as failing:
        failing.setattr(source._files, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EACCES, "denied")))
        with pytest.raises(OSError, match="Errno 13"):
            source.read(listed[150])
    assert read_item(source, listed[150]).startswith(b"%06d" % 150)


def test_a_place_that_is_not_there_is_a_reject_and_a_file_that_is_gone_stops_the_build(numbers: Path) -> None:
    source = opened(numbers)
    listed = items(source)
    for place in ((0, 0, 100), (0, 3, 0), (0, -1, 0), (0, 0, -1), (1, 0, 0), (-1, 0, 0)):
        assert reject(source, Item(0, "n.parquet/000000", None, place))[0] == "unreadable"
    copy = pickle.loads(pickle.dumps(source))
    numbers.rename(numbers.with_suffix(".away"))
    with pytest.raises(SourceError, match="is missing; restore it"):
        read_item(copy, listed[0])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "magic": lambda data: b"PAR1",
    "csv": lambda data: b"a,b\n1,2\n",
    "half": lambda data: data[: len(data) // 2],
    "no-end": lambda data: data[:-1],
    "footer-2gb": lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
    "footer-4gb": lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1",
    "no-footer": lambda data: data[:-8] + b"\0\0\0\0PAR1",
    "long-list": lambda data: data[:-200] + b"\x19\xfc" + b"\xff" * 190 + data[-8:],
    "zeros": lambda data: data[:-200] + bytes(192) + data[-8:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_whole_parquet_file_is_refused(numbers: Path, damage: Callable[[bytes], bytes]) -> None:
    numbers.write_bytes(damage(numbers.read_bytes()))
    assert "n.parquet'" in (message := refusal(numbers, source="parquet"))
    assert any(words in message for words in ("is no whole Parquet file", "it is damaged: get or write it again"))


@pytest.mark.parametrize("seed", range(8))
def test_a_footer_of_noise_ends_in_an_error_of_ours(numbers: Path, seed: int) -> None:
    data = bytearray(numbers.read_bytes())
    random = np.random.default_rng(seed)
    footer = int.from_bytes(data[-8:-4], "little")
    for at in random.integers(len(data) - 8 - footer, len(data) - 8, 40):
        data[at] = random.integers(256)
    numbers.write_bytes(bytes(data))
    with contextlib.suppress(SourceError, UsageError, BadItem):  # no other error, and no other rows
        source = opened(numbers, source="parquet")
        for item in items(source)[:300:50]:
            assert read_item(source, item).startswith(b"%06d" % item.index)


def test_rows_that_the_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(arrow.table({"image": arrow.nulls(2_000_000, STRUCT)}), path)
    size = path.stat().st_size
    assert size < 100_000
    assert f"says that it has 2000000 rows, 2000000 in its row groups, in {size} bytes; it is damaged" in refusal(path)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_texts_that_share_their_beginnings_may_be_more_than_the_file_has_bytes(
    tmp_path: Path, compression: str
) -> None:
    path, names = tmp_path / "t.parquet", [f"images/train/{number:08}.jpg" for number in range(50_000)]
    options = {"use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    pq.write_table(arrow.table({"path": names}), path, compression=compression, **options)
    assert compression == "none" or path.stat().st_size < len(names)
    file = open_parquet(Files(str(path)), 0)
    assert [name for (name,) in rows(file, str(path), ["path"])] == names


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a process alone")
def test_a_large_row_group_in_small_pages_is_read_without_holding_it(tmp_path: Path) -> None:
    image = os.urandom(1_000_000)
    rows = [number.to_bytes(4, "little") + image for number in range(300)]
    path = tmp_path / "t.parquet"  # Arrow holds one page, and writes as many rows to one as it is given at a time
    pq.write_table(arrow.table({"image": rows}), path, row_group_size=300, write_batch_size=1)
    grown, _ = growth_of(
        "import sys\n"
        "import pyarrow.parquet\n"
        "from gpu_npz.sources import open_source\n"
        "from gpu_npz.sources.base import Item, read_item\n"
        "source = open_source(sys.argv[1])\n"
        "# from here\n"
        "for row in range(300):\n"
        "    data = read_item(source, Item(row, '', None, (0, 0, row)))\n"
        "    assert int.from_bytes(data[:4], 'little') == row\n",
        path,
    )
    assert grown < 120_000_000


def test_columns_that_are_not_there_or_of_another_type_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [b"a"], label=[[1, 2]], b2=[b"x"], n=[1])
    assert "column 'label' is of the type list<" in refusal(path)
    assert "has no column 'x'; it has 'image', 'label', 'b2', 'n'" in refusal(path, labels="x")
    assert "has no column 'x'; it has" in refusal(path, image_column="x", source="parquet")
    assert "column 'n' is of the type int64; images are binary" in refusal(path, image_column="n", source="parquet")
    assert "column 'b2' is of the type binary; allowed: texts and numbers" in refusal(path, labels="b2")
    pq.write_table(arrow.table({"a": [b"1"], "c": [b"2"]}), path)
    assert "has 2 columns of bytes among 'a', 'c'; --image-column NAME says" in refusal(path)
    pq.write_table(arrow.table([[b"1"], [b"2"]], ["image", "image"]), path)
    assert "two columns of one name" in refusal(path)
    assert "--root requires SRC of the kind folder or table or tar or zip; " in refusal(
        write(path, [b"a"]), root=str(tmp_path)
    )


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [b"a"], names={"label": ["x", "y"]}, label=[1])
    write(tmp_path / "b.parquet", [b"a"], names={"label": ["y", "x"]}, label=[1])
    assert "b.parquet' has other names of classes than" in refusal(tmp_path)
    write(tmp_path / "b.parquet", [b"a"], other=[1])
    assert "b.parquet' has no column 'label'; it has 'image', 'other'" in refusal(tmp_path)
    pq.write_table(arrow.table({"label": [1]}), tmp_path / "b.parquet")
    assert "b.parquet' has no column 'image'" in refusal(tmp_path)
    write(tmp_path / "b.parquet", [b"a", b"b"], label=["x", None])
    (tmp_path / "a.parquet").unlink()
    assert "no label for row 1 of 'b.parquet'" in refusal(tmp_path)


def test_labels_that_change_while_the_files_are_in_use_are_an_error(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "t.parquet", [b"a"], label=["x"]))
    items(source)
    write(tmp_path / "t.parquet", [b"a"], label=["y"])
    with pytest.raises(SourceError):
        items(source)


def test_a_file_on_a_store_is_read_too(numbers: Path) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.pipe("/set/n.parquet", numbers.read_bytes())
    source = opened("memory://set/n.parquet")
    assert source.reads_at_once > 1
    for row in (0, 150, 299):
        assert read_item(source, items(source)[row]).startswith(b"%06d" % row)
    store.store.clear()
