"""Tables of images: what their rows name, under which labels, and which tables are refused."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from support import MakeDataset, file_bytes, growth_of, items, labelled, opened, read_shards, refusal

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.config import BuildConfig
from gpu_npz.errors import SourceError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.rejects import BadItem
from gpu_npz.sources.tables.rows import Table
from gpu_npz.sources.tables.table import TableSource

Rows = list[tuple[str, Any]]


def table(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    arrow.parquet = pytest.importorskip("pyarrow.parquet")
    arrow.parquet.write_table(arrow.table(columns), path, row_group_size=7)
    return path


def as_csv(path: Path, columns: dict[str, list[Any]], delimiter: str = ",") -> Path:
    lines = [delimiter.join(columns), *(delimiter.join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    return table(path, "\n".join(lines) + "\n")


def as_json(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return table(path, "".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, dict[str, list[Any]]], Path]] = {
    ".csv": as_csv,
    ".tsv": lambda path, columns: as_csv(path, columns, "\t"),
    ".jsonl": as_json,
    ".ndjson": as_json,
    ".parquet": write_parquet,
}
each_form = pytest.mark.parametrize("extension", WRITERS)


# What is listed


@each_form
def test_a_table_of_a_tree_builds_what_the_tree_builds(
    tree: Path, tmp_path: Path, extension: str, make_dataset: MakeDataset
) -> None:
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    labels = [path.split("/")[0] for path in paths]
    written = WRITERS[extension](tmp_path / f"all{extension}", {"path": paths, "label": labels})
    ours, plain = make_dataset(written, root=str(tree)), make_dataset(tree)
    assert gpu_npz.open_dataset(ours).class_names == gpu_npz.open_dataset(plain).class_names
    for name in ("images", "labels", "paths", "index", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name), read_shards(plain, name))
    assert (ours / "rejects.jsonl").read_bytes() == (plain / "rejects.jsonl").read_bytes()


@each_form
def test_several_columns_of_labels_make_named_columns(tmp_path: Path, extension: str) -> None:
    columns = {"id": [1, 2, 3], "age": [30, 41, 7], "file_name": ["b.jpg", "a.jpg", "c/d.png"], "w": [0.5, 1.0, -2.5]}
    source = opened(WRITERS[extension](tmp_path / f"t{extension}", columns), labels="age,w")
    assert labelled(source) == [("b.jpg", [30, 0.5]), ("a.jpg", [41, 1.0]), ("c/d.png", [7, -2.5])]
    assert [(column.name, column.kind) for column in source.columns] == [("age", "integer"), ("w", "float")]
    assert source.class_names is None
    assert source.file_per_item


@each_form
def test_texts_are_classes_and_each_listing_is_the_same_in_another_process_too(tmp_path: Path, extension: str) -> None:
    columns = {"path": ["1.jpg", "2.jpg", "3.jpg"], "class": ["pear", "apple", "pear"]}
    source = opened(WRITERS[extension](tmp_path / f"t{extension}", columns))
    copy = pickle.loads(pickle.dumps(source))
    assert source.class_names == copy.class_names == ("apple", "pear")
    assert labelled(source) == labelled(source) == labelled(copy) == [("1.jpg", 1), ("2.jpg", 0), ("3.jpg", 1)]


def test_a_table_travels_without_its_rows(tmp_path: Path) -> None:
    paths = [f"{number:030}.jpg" for number in range(3000)]
    source = opened(as_csv(tmp_path / "t.csv", {"path": paths}))
    assert len(pickle.dumps(source)) < 5000
    assert sum(len(group.names) for group in source.groups()) == 3000


def test_a_table_that_gets_other_labels_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    source = opened(as_csv(tmp_path / "t.csv", {"path": ["1.jpg"], "label": ["a"]}))
    list(source.groups())
    as_csv(tmp_path / "t.csv", {"path": ["1.jpg"], "label": ["b"]})
    with pytest.raises(SourceError, match="has changed meanwhile; run the command again"):
        list(source.groups())


def test_labels_are_left_out_or_numbered_by_a_list(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"path": ["1.jpg", "2.jpg"], "label": ["b", "a"]})
    assert labelled(opened(path, labels="none")) == [("1.jpg", None), ("2.jpg", None)]
    source = open_source(path, BuildConfig(), ["z", "b", "a"])
    assert (source.class_names, labelled(source)) == (("z", "b", "a"), [("1.jpg", 1), ("2.jpg", 2)])
    with pytest.raises(SourceError, match=r"are not in the given list: 'a'"):
        open_source(path, BuildConfig(), ["b"])
    with pytest.raises(UsageError, match="contradict each other"):
        open_source(path, BuildConfig(labels="none"), ["b"])
    path = as_csv(tmp_path / "u.csv", {"path": ["1.jpg", "2.jpg"]})
    assert "has no labels; leave --classes-from out, or say by --labels" in refusal(path, ["b"])


def test_byte_order_marks_blank_lines_quotes_and_foreign_bytes_are_ordinary(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbfpath, label\r\n\r\n"a, b.jpg",1\r\ncaf\xe9.jpg,2\r\n"line\nbreak.jpg",3\r\n'
    assert labelled(opened(table(tmp_path / "t.csv", text))) == [
        ("a, b.jpg", 1), ("caf\udce9.jpg", 2), ("line\nbreak.jpg", 3)
    ]  # fmt: skip
    text = b'\xef\xbb\xbf{"path": "a.jpg", "label": 1}\n\n {"label": 2, "path": "\\u00e9.jpg"}\r\n'
    assert labelled(opened(table(tmp_path / "t.jsonl", text))) == [("a.jpg", 1), ("é.jpg", 2)]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_are_seen_in_the_line_of_names(tmp_path: Path, delimiter: str) -> None:
    columns = {"path": ["1.jpg", '"2;\t,.jpg"'], "label": ["a,b", "c"], "w": [1, 2]}
    path = as_csv(tmp_path / "t.csv", columns, delimiter)
    assert labelled(opened(path)) == [("1.jpg", 0), ("2;\t,.jpg", 1)]
    path.write_text("\n\n" + path.read_text() + "3.jpg\n")
    assert "line 6 has 1 values, the first 3" in refusal(path)
    assert labelled(opened(table(tmp_path / "u.csv", f"path,a{delimiter}b\n1.jpg,2\n"), labels=f"a{delimiter}b")) == [
        ("1.jpg", 2)
    ]
    path = as_csv(tmp_path / "t.tsv", {"path;label": ["1.jpg;a"]}, "\t")
    assert "it has 'path;label'" in refusal(path)


def test_a_table_may_have_any_name_and_a_file_of_another_name_may_be_a_table(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t[1]{2,3}*.csv", {"path": ["1.jpg"]})
    assert labelled(opened(path)) == [("1.jpg", None)]
    assert "is no table; give one file with one of .csv .tsv" in refusal(table(tmp_path / "t.txt", ""), source="table")


def test_the_path_column_is_found_by_its_name_or_given(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"img": ["1.jpg"], "FileName": ["2.jpg"], "photo": ["3.jpg"], "LABEL": ["4"]})
    assert labelled(opened(path)) == [("2.jpg", 4)]
    assert labelled(opened(path, image_column="photo")) == [("3.jpg", 4)]
    assert "no column 'x'; it has 'img', 'FileName', 'photo', 'LABEL'" in refusal(path, image_column="x")
    path = as_csv(tmp_path / "u.csv", {"photo": ["3.jpg"]})
    assert "has no column path, file, " in (message := refusal(path))
    assert "it has 'photo'; name one of them so, or say --image-column NAME where SRC is the table" in message


def test_paths_are_relative_to_the_table_or_to_root_and_full_ones_below_it_are_made_relative(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"a")
    (root / "deep" / "b.jpg").write_bytes(b"b")
    written = as_csv(tmp_path / "lists" / "t.csv", {"path": ["./x/../a.jpg", f"{root}/deep//b.jpg", "gone.jpg"]})
    source = opened(written, root=str(root))
    assert [path for path, _ in labelled(source)] == ["a.jpg", "deep/b.jpg", "gone.jpg"]
    assert read_item(source, Item(0, "a.jpg", None)) == b"a"
    assert read_item(source, Item(1, "deep/b.jpg", None)) == b"b"
    assert source.local_path(Item(1, "deep/b.jpg", None)) == os.fsencode(root / "deep" / "b.jpg")
    with pytest.raises(BadItem) as caught:
        read_item(source, Item(2, "gone.jpg", None))
    assert caught.value.code == "missing"
    shutil.move(written, root / "t.csv")
    assert read_item(opened(root / "t.csv"), Item(0, "a.jpg", None)) == b"a"
    shutil.rmtree(root)
    with pytest.raises(SourceError, match="is missing; restore it"):
        read_item(source, Item(0, "a.jpg", None))


def test_a_column_says_what_a_split_must_keep_together(tmp_path: Path) -> None:
    columns = {"path": ["1.jpg", "2.jpg", "3.jpg"], "patient": ["p1", "p2", "p1"], "label": [1, 2, 3]}
    path = as_csv(tmp_path / "t.csv", columns)
    (group,) = opened(path, split="v=0.5/v", split_by="patient").groups()
    assert list(group.keys or ()) == [b"p1", b"p2", b"p1"]
    assert labelled(opened(path, split="v=0.5/v", split_by="patient"))[0] == ("1.jpg", 1)
    assert next(opened(path, split="v=0.5/v", split_by="label").groups()).keys is None
    assert "no column 'scanner'; it has 'path', 'patient', 'label'" in refusal(
        path, split="v=0.5/v", split_by="scanner"
    )
    path = as_csv(tmp_path / "u.csv", {"path": ["1.jpg", "2.jpg"], "patient": ["p1", ""]})
    assert "row 2 has no patient, by which --split-by" in refusal(path, split="v=0.5/v", split_by="patient")


def test_many_rows_come_in_several_groups(tmp_path: Path) -> None:
    count = 25_000
    path = as_csv(tmp_path / "t.csv", {"path": [f"{number}.jpg" for number in range(count)], "label": [*range(count)]})
    source = opened(path)
    assert max(len(group.names) for group in source.groups()) <= 10_000
    assert labelled(source) == [(f"{number}.jpg", number) for number in range(count)]


# What is refused


@each_form
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("../a.jpg", r"row 3 has the path '\.\./a\.jpg', which leads out of"),
        ("x/../../a.jpg", "row 3 has the path .* which leads out of"),
        ("..", "row 3 has the path .* which leads out of"),
        (".", "row 3 has the path .* which leads out of"),
        ("/etc/passwd", "row 3 has the path '/etc/passwd', which is not below"),
        ("https://example.org/a.jpg", "row 3 has the path .* which is not below"),
        ("a" * 5000, "row 3 has a path of 5000 bytes; at most 4096 are allowed"),
        (" ", "row 3 has no path"),
        ("1.jpg", r"row 1 and row 3 both have the path '1\.jpg'; keep one"),
        ("x/../1.jpg", r"row 1 and row 3 both have the path '1\.jpg'; keep one"),
    ],
)
def test_a_path_that_leads_elsewhere_or_is_none_is_refused_with_its_row(
    tmp_path: Path, extension: str, path: str, what: str
) -> None:
    written = WRITERS[extension](tmp_path / f"t{extension}", {"path": ["1.jpg", "2.jpg", path, "4.jpg"]})
    with pytest.raises(SourceError, match=what):
        opened(written)


def test_a_full_path_may_be_a_url_of_files(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"path": [f"file://{tmp_path}/a/1.jpg", "2.jpg", f"{tmp_path}/3%20.jpg"]})
    assert [name for name, _ in labelled(opened(path))] == ["a/1.jpg", "2.jpg", "3%20.jpg"]
    for name in (
        "file:///etc/passwd",
        f"file://{tmp_path}/../1.jpg",
        f"file://localhost{tmp_path}/1.jpg",
        "file://1.jpg",
    ):
        as_csv(path, {"path": ["1.jpg", name]})
        message = f"row 2 has the path '{name}', which is not below '{tmp_path}'; 1 of 2 paths are absolute"
        assert message in refusal(path)


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:,", ""])
@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0", b"MM\0*"])
def test_images_in_the_cells_of_a_table_are_refused_with_what_to_do(tmp_path: Path, start: str, content: bytes) -> None:
    for size in (60, 500_000):
        cell = start + base64.b64encode(content + bytes(size)).decode()
        written = [
            as_csv(tmp_path / "t.csv", {"image": ["1.jpg", f'"{cell}"']}),
            as_json(tmp_path / "t.jsonl", {"image": ["1.jpg", cell]}),
        ]
        for path in written:
            message = refusal(path)
            if (path.suffix, size) == (".csv", 500_000):
                assert (
                    "line 3 is not valid CSV (field larger than field limit (131072)); leave long columns out; "
                    in message
                )
            else:
                assert "row 2 has an image in place of a path ('" in message
            assert "images themselves are read from files or from Parquet: write them there" in message
            assert len(message) < 400


def test_a_kind_of_labels_that_is_none_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"path": ["1.jpg"], "label": [1], "a:b": [2]})
    assert "--labels label:clas: 'clas' is no kind of labels; allowed: class, integer, float" in refusal(
        path, labels="label:clas"
    )
    (tmp_path / "1.jpg").touch()
    for labels in (f"{path}:label:text", "csv:t.csv:label:text"):
        assert f"--labels {labels}: 'text' is no kind" in refusal(tmp_path, labels=labels)
    assert labelled(opened(path, labels="a:b")) == labelled(opened(path, labels="a:b:integer")) == [("1.jpg", 2)]
    assert "has no column 'x:clas'" in refusal(path, labels="x:clas")


def test_an_absolute_path_that_leads_out_of_root_by_dots_is_refused(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "top" / "t.csv", {"path": [f"{tmp_path}/top/../a.jpg"]})
    assert "which is not below" in refusal(path)


@pytest.mark.parametrize("value", [None, 7, ["a.jpg"], {"a": 1}, "a\0.jpg", "\ud800.jpg"])
def test_a_path_that_is_no_path_is_refused_with_its_row(tmp_path: Path, value: Any) -> None:
    assert "row 2 has " in refusal(as_json(tmp_path / "t.jsonl", {"path": ["1.jpg", value]}))


def test_wrong_labels_are_refused_with_their_row(tmp_path: Path) -> None:
    def of(*labels: Any, **settings: Any) -> str:
        paths = [f"{number}.jpg" for number in range(len(labels))]
        return refusal(as_json(tmp_path / "t.jsonl", {"path": paths, "label": [*labels]}), **settings)

    assert "both texts ('a' for row 1) and numbers (2 for row 2)" in of("a", 2)
    assert "no label for row 2, and in 1 more" in of("a", None, " ")
    assert "has 1.5 for row 1, which is no whole number" in of(1.5, labels="label:integer")
    assert "row 2 has a list as label; allowed: texts and numbers" in of("a", ["b"])
    assert "no column 'x'; it has 'path', 'label'" in of("a", labels="label,x")
    both = as_csv(tmp_path / "u.csv", {"path": ["1.jpg"], "label": [1], "target": [2]})
    assert "has the columns 'label', 'target'; say --labels label, or A,B, or none" in refusal(both)
    twice = as_csv(tmp_path / "v.csv", {"path": ["1.jpg"], "label": [1]})
    table(twice, "path,label,label\n1.jpg,2,3\n")
    assert "has more than one column 'label'" in refusal(twice)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("t.csv", b"", "is empty; a table starts with the names of its columns"),
        ("t.jsonl", b"\n\n", "is empty"),
        ("t.csv", b"path,label\n1.jpg,2\n3.jpg\n", "line 3 has 1 values, the first 2; fix it"),
        ("t.csv", b"path,label\n1.jpg,2,3\n", "line 2 has 3 values, the first 2; fix it"),
        ("t.csv", b'path,label\n1.jpg,2\n"3.jpg', r"line 3 is not valid CSV \(unexpected end of data\)"),
        ("t.csv", b"path\n" + b"a" * 200_000, r"line 2 is not valid CSV \(field larger than field limit"),
        ("t.csv", b"path\n1.jpg\n2\0.jpg\n", "line 3 has a NUL byte; save the table as UTF-8 text"),
        ("t.csv", "path\n1.jpg\n".encode("utf-16"), "line 1 has a NUL byte; save the table as UTF-8 text"),
        ("t.jsonl", b'{"path": "1.jpg"}\n{"path": "2.j', "line 2 is no JSON .* it may be cut"),
        ("t.jsonl", b'{"path": "1.jpg"}\n["2.jpg"]\n', "line 2 is no JSON object; write lines such as"),
        ("t.jsonl", b'{"path": "1.jpg"}\n' + b"[" * 100_000, "line 2 is no JSON"),
        ("t.jsonl", b'{"path": "1.jpg", "label": ' + b"9" * 100_000 + b"}", "line 1 is no JSON"),
        ("t.jsonl", b'{"path": "1.jpg"}\n\0\n', "line 2 has a NUL byte"),
        ("t.parquet", b"", "it is no whole Parquet file"),
        ("t.parquet", b"PAR1 no Parquet", "it is no whole Parquet file"),
    ],
)
def test_a_damaged_table_is_refused_with_the_line(tmp_path: Path, name: str, text: bytes, what: str) -> None:
    with pytest.raises(SourceError, match=what):
        opened(table(tmp_path / name, text), source="table")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a process alone")
@pytest.mark.parametrize("extension", [".csv", ".jsonl"])
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"t{extension}"
    with open(path, "wb") as file:
        file.write({".csv": b"path\n", ".jsonl": b'{"path": "1.jpg"}\n'}[extension] + b'"' * 5_000_000)
        file.truncate(1 << 30)
    grown, message = growth_of(
        "import sys\n"
        "from gpu_npz.errors import SourceError\n"
        "from gpu_npz.sources import open_source\n"
        "# from here\n"
        "try: open_source(sys.argv[1])\n"
        "except SourceError as exc: print(exc)\n",
        path,
    )
    assert "line 2 is longer than 4194304 bytes; leave long columns out" in message
    assert grown < 100_000_000


def test_a_record_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.sources.tables.rows._MAX_LINE_BYTES", 40_000)
    path = table(tmp_path / "t.csv", "path,label\n1.jpg,1\n" + '"\n",' * 11_000 + "\n2.jpg,1\n")
    message = refusal(path)
    assert "ends no record within 40000 bytes; it may lack a quote" in message
    assert re.search(r"line 1\d{4} ", message)
    lines = "\n".join(f'"{number}\n.jpg",1' for number in range(7_000))
    assert len(labelled(opened(table(path, f"path,label\n{lines}\n")))) == 7_000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    assert "t.csv' is a folder; give a table, a file with one of .csv" in refusal(tmp_path / "t.csv")
    assert "No such file or directory" in refusal(tmp_path / "gone.csv")
    os.mkfifo(tmp_path / "u.csv")
    assert "not a regular file" in refusal(tmp_path / "u.csv")


def test_a_table_of_parquet_needs_columns_of_texts_and_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"path": ["1.jpg"], "label": [[1, 2]], "data": [{"a": 1}]})
    assert "column 'label' is of the type list<" in (message := refusal(path, source="table"))
    assert "allowed: texts and numbers" in message
    assert "column 'data' is of the type struct<" in refusal(path, source="table", image_column="data", labels="none")


# Far away


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store of fsspec that has URLs, in this process alone."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def test_a_table_and_its_images_may_be_urls(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/set/t.csv", b"path,label\na/1.jpg,x\nmemory://set/b/2.jpg,y\ngone.jpg,x\nempty.jpg,x\n")
    memory.pipe("/set/a/1.jpg", b"one")
    memory.pipe("/set/b/2.jpg", b"two")
    memory.pipe("/set/empty.jpg", b"")
    source = opened("memory://set/t.csv")
    assert labelled(source) == [("a/1.jpg", 0), ("b/2.jpg", 1), ("gone.jpg", 0), ("empty.jpg", 0)]
    assert not source.file_per_item
    assert source.reads_at_once > 1
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert read_item(copy, Item(0, "a/1.jpg", None)) == b"one"
        assert read_item(copy, Item(1, "b/2.jpg", None)) == b"two"
        for name, code in (("gone.jpg", "missing"), ("empty.jpg", "empty")):
            with pytest.raises(BadItem) as caught:
                read_item(copy, Item(2, name, None))
            assert caught.value.code == code
    local = as_csv(tmp_path / "t.csv", {"path": ["a/1.jpg"]})
    assert read_item(opened(local, root="memory://set/"), Item(0, "a/1.jpg", None)) == b"one"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server of HTTP, and the folder that it serves; it knows ranges no better than Python's own does."""
    pytest.importorskip("aiohttp")
    root = tmp_path / "web"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", root
        server.shutdown()
        thread.join()


def test_a_table_on_the_web_builds_what_the_tree_builds(
    tree: Path,
    web: tuple[str, Path],
    make_dataset: MakeDataset,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url, root = web
    shutil.copytree(tree, root / "set")
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    columns = {"path": [f"{url}/set/{path}" for path in paths], "label": [path.split("/")[0] for path in paths]}
    as_csv(root / "set" / "t.csv", columns)
    ours, plain = make_dataset(f"{url}/set/t.csv"), make_dataset(tree)
    for name in ("images", "labels", "paths", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name), read_shards(plain, name))
    (root / "set" / paths[0]).unlink()
    (root / "set" / paths[1]).write_bytes(b"")
    source = pickle.loads(pickle.dumps(opened(f"{url}/set/t.csv")))
    assert len(labelled(source)) == len(paths)
    for path, code in zip(paths, ("missing", "empty"), strict=False):
        with pytest.raises(BadItem) as caught:
            read_item(source, Item(0, path, None))
        assert caught.value.code == code
    capfd.readouterr()
    assert f"{url}/set/gone.csv'" in refusal(f"{url}/set/gone.csv")
    assert "row 1 has the path" in refusal(f"{url}/set/t.csv", root=f"{url}/other")


@pytest.mark.parametrize("path", ["memory://other/1.jpg", "memory://set/../1.jpg", "/set/1.jpg", "../1.jpg"])
def test_a_url_that_is_not_below_the_roots_is_refused(memory: Any, path: str) -> None:
    memory.pipe("/set/t.csv", f"path\n{path}\n".encode())
    assert "row 1 has the path" in refusal("memory://set/t.csv")


def test_tables_know_their_columns(tmp_path: Path) -> None:
    found = Table(str(as_csv(tmp_path / "t.csv", {"a": [1], "b": [2]})))
    assert (found.columns, list(found.rows(["b", "a"])), list(found.rows(["b"]))) == (
        ("a", "b"),
        [("2", "1")],
        [("2",)],
    )
    assert TableSource.kind == "table"


def labels_of(out: Path) -> NDArray[Any]:
    labels = gpu_npz.open_dataset(out).labels
    assert labels is not None
    return np.asarray(labels)


def test_missing_files_are_rejects_of_a_build(tree: Path, tmp_path: Path, make_dataset: MakeDataset) -> None:
    first = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.jpg"))[0]
    out = make_dataset(as_csv(tmp_path / "t.csv", {"path": [first, "gone.jpg"], "a": [1, 2], "b": [0.5, 1]}),
                       root=str(tree), labels="a,b")  # fmt: skip
    assert labels_of(out).tolist() == [[1.0, 0.5]]
    (line,) = (out / "rejects.jsonl").read_text().splitlines()
    assert (json.loads(line)["path"], json.loads(line)["code"]) == ("gone.jpg", "missing")


def test_classes_that_are_whole_numbers_are_numbered_by_them(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"path": ["1.jpg", "2.jpg", "3.jpg"], "label": [10, 2, 1]})
    assert opened(path, labels="label:class").class_names == ("1", "2", "10")
    path = as_csv(tmp_path / "t.csv", {"path": ["1.jpg", "2.jpg", "3.jpg"], "label": [10, 2, "NA"]})
    assert opened(path, labels="label:class").class_names == ("10", "2", "NA")


def test_decimal_commas_are_no_classes(tmp_path: Path) -> None:
    columns = {"path": ["1.jpg", "2.jpg"], "label": ["0,1", "-1,25"]}
    path = as_csv(tmp_path / "t.csv", columns, ";")
    assert "column 'label' has decimal commas ('0,1' for row 1); write points" in refusal(path)
    assert opened(path, labels="label:class").class_names == ("-1,25", "0,1")


def test_a_root_that_is_no_folder_is_refused_with_the_option(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv", {"path": ["1.jpg"]})
    assert "gone' is no folder; --root says what" in refusal(path, root=str(tmp_path / "gone"))


def follow(message: str) -> Path:
    """Runs the command that a message ends with; the file that it writes."""
    command = message.partition(", for example with: ")[2]
    subprocess.run(["bash", "-euc", command], check=True)
    return Path(shlex.split(command)[-1])


@pytest.mark.parametrize("name", ["t.csv", "it's 1.tsv"])
@pytest.mark.parametrize(
    ("row", "first"),
    [(["a/1.jpg", "7"], "path,label"), (["7", "a/1.jpg"], "label,path"), (["a/1.jpg"], "path"),
     (["7", "a/1.jpg", "8"], "column1,path,column3")],
)  # fmt: skip
def test_a_table_without_names_is_refused_and_the_advice_names_them(
    tmp_path: Path, name: str, row: list[str], first: str
) -> None:
    delimiter = {".csv": ",", ".tsv": "\t"}[Path(name).suffix]
    lines = [delimiter.join(row), delimiter.join(row).replace("1.jpg", "2.jpg")]
    path = table(tmp_path / name, "\n".join(lines) + "\n")
    message = refusal(path)
    assert f"has no line of column names: its first line is a row already ({', '.join(map(repr, row))}); add" in message
    named = follow(message)
    assert "\ufeff" in follow(refusal(table(path, b"\xef\xbb\xbf" + path.read_bytes()))).read_text()
    assert labelled(opened(named))[0][0] == "a/1.jpg"
    named = follow(refusal(table(path, "\n".join(lines) + "\n")))
    assert named.read_text().splitlines() == [first.replace(",", delimiter), *lines]
    labels = [None, None] if first.count(",") != 1 else [7, 7]
    assert labelled(opened(named)) == [("a/1.jpg", labels[0]), ("a/2.jpg", labels[1])]
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for number in (1, 2):
        (root / f"a/{number}.jpg").touch()
    assert "has no line of column names" in refusal(root, labels=str(path))
    shutil.copy(path, root / "a" / "l.csv")
    assert "has no line of column names" in refusal(root, labels="csv:l.csv")


def test_a_table_of_numbers_for_names_is_read_and_one_without_a_path_says_what_it_may_lack(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", ",0,1\n0,1.jpg,5\n1,2.jpg,6\n")  # pandas, of a frame without names
    assert labelled(opened(path, image_column="0", labels="1")) == [("1.jpg", 5), ("2.jpg", 6)]
    assert "if that is a row already, add a line of column names before it" in refusal(path)


@each_form
@pytest.mark.parametrize("start", ["", "file://"])
@pytest.mark.parametrize(
    ("names", "deepest"),
    [
        (("a/1.jpg", "a/b/2.jpg", "ab/3.jpg"), ""),
        (("a/b/1.jpg", "a/b/c d/2.jpg"), "a/b"),
        (("a/it's/1.jpg",), "a/it's"),
    ],
)
def test_full_paths_are_refused_with_the_deepest_folder_of_all(
    tmp_path: Path, extension: str, start: str, names: tuple[str, ...], deepest: str
) -> None:
    root = tmp_path / "images"
    for name in names:
        table(root / name, b"x")
    columns = {"path": [f"{start}{root}/{name}" for name in names], "label": [*range(len(names))]}
    (tmp_path / "tables").mkdir()
    path = WRITERS[extension](tmp_path / "tables" / f"t{extension}", columns)
    common = str(root / deepest)
    message = refusal(path)
    assert f"row 1 has the path {f'{start}{root}/{names[0]}'!r}, which is not below '{tmp_path}/tables'" in message
    _, _, option = message.partition(f"; all {len(names)} paths are below {common!r}; say ")
    flag, value = shlex.split(option)
    assert (flag, value) == ("--root", common)
    found = labelled(opened(path, root=value))
    assert found == [(os.path.relpath(root / name, common), number) for number, name in enumerate(names)]
    os.mkdir(tmp_path / "other")
    assert message[-len(option) :] == refusal(path, root=str(tmp_path / "other"))[-len(option) :]
    (tmp_path / "other" / "1.jpg").touch()
    message = refusal(tmp_path / "other", labels=str(path))
    assert message.endswith(f"all {len(names)} paths are below {common!r}; give that folder as SRC")


@pytest.mark.parametrize(
    ("paths", "root"),
    [
        (["s3://b/c/1.jpg", "s3://b/c/d/2.jpg"], "s3://b/c"),
        (["s3://b/c/1.jpg", "s3://b/d/2.jpg"], "s3://b"),
        (["s3://b/1.jpg", "s3://bc/2.jpg"], None),
        (["s3://b/1.jpg", "https://b/2.jpg"], None),
        (["s3://b/1.jpg", "/b/2.jpg"], None),
        (["/b/2.jpg", "s3://b/1.jpg"], None),
        (["/bin/1.jpg", "/usr/2.jpg"], "/"),
    ],
)
def test_urls_have_a_folder_in_common_or_none(tmp_path: Path, paths: list[str], root: str | None) -> None:
    message = refusal(as_csv(tmp_path / "t.csv", {"path": paths}))
    if root is None:
        assert message.endswith("; the 2 paths have no folder in common; make a table for each place")
    else:
        assert message.endswith(f"; all 2 paths are below {root!r}; say --root {root}")


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["C:\\my data\\img\\a.jpg", "C:\\my data\\img\\b\\c.jpg"], ["a.jpg", "b/c.jpg"]),
        (["C:/d/img/a.jpg", "file:///C:/d/img/b/c.jpg"], ["a.jpg", "b/c.jpg"]),
        (["\\\\host\\share\\a.jpg", "\\\\host\\share\\b\\c.jpg"], ["a.jpg", "b/c.jpg"]),
        (["a.jpg", "b\\c.jpg"], None),
        (["img\\a.jpg", "img\\b\\c.jpg"], ["img/a.jpg", "img/b/c.jpg"]),
        (["C:\\img\\a.jpg", "D:\\img\\c.jpg"], ["C:/img/a.jpg", "D:/img/c.jpg"]),
        (["/no such/folder.1/a.jpg", "file:///no such/folder.1/b/c.jpg"], ["a.jpg", "b/c.jpg"]),
    ],
    ids=["backslashes", "slashes", "share", "mixed", "relative", "drives", "elsewhere"],
)
def test_paths_of_another_machine_are_refused_with_a_way_to_relative_ones(
    tmp_path: Path, paths: list[str], found: list[str] | None
) -> None:
    for extension, writer in WRITERS.items():
        path = writer(tmp_path / f"t{extension}", {"path": paths})
        message = refusal(path)
        assert "write all of them with slashes, relative to the folder that --root names" in message
        assert ("which is a Windows path" in message) == (not paths[0].startswith("/"))
        assert (", for example with: sed" in message) == (extension in (".csv", ".tsv") and found is not None)
    if found is not None:
        written = follow(refusal(tmp_path / "t.csv"))
        if paths[0][:2] + paths[1][:2] == "C:D:":
            assert "which is a Windows path" in refusal(written)
        else:
            assert [name for name, _ in labelled(opened(written))] == found


def test_a_backslash_in_the_name_of_a_file_is_a_part_of_it(tmp_path: Path) -> None:
    names = ["a\\1.jpg", "b/c\\2.jpg"]
    for name in names:
        table(tmp_path / name, b"x")
    assert [name for name, _ in labelled(opened(as_csv(tmp_path / "t.csv", {"path": names})))] == names
    as_csv(tmp_path / "b" / "l.csv", {"path": ["c\\2.jpg"], "label": [1]})
    assert labelled(opened(tmp_path / "b", labels="csv:l.csv")) == [("c\\2.jpg", 1)]
    as_csv(tmp_path / "b" / "l.csv", {"path": ["d\\2.jpg"], "label": [1]})
    assert "a table in every folder has names of files of that folder" in refusal(tmp_path / "b", labels="csv:l.csv")


def test_json_lines_have_the_columns_of_all_lines(tmp_path: Path) -> None:
    def of(*rows: Any, **settings: Any) -> Any:
        return opened(table(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), **settings)

    first = {"path": "1.jpg"}
    assert labelled(of(first, {"label": 4, "path": "2.jpg"}, labels="none")) == [("1.jpg", None), ("2.jpg", None)]
    for missing in (first, {**first, "label": None}, {**first, "label": " "}):
        with pytest.raises(SourceError, match="column 'label' has no label for row 1; fill it in, or remove the rows"):
            of(missing, {"label": 4, "path": "2.jpg"})
    rows = {"label": 1, **first}, {"score": 0.5, "path": "2.jpg", "label": 2}, {"path": "3.jpg", "label": 3, "a": [1]}
    assert [label for _, label in labelled(of(*rows))] == [1, 2, 3]
    with pytest.raises(SourceError, match="has the columns 'label', 'target'; say --labels label"):
        of({**first, "label": 1}, {"path": "2.jpg", "target": 2})
    with pytest.raises(SourceError, match="row 2 has no path"):
        of({**first, "label": 1}, {"file": "2.jpg", "label": 2})
    with pytest.raises(SourceError, match="row 2 has a dict as label"):
        of({**first, "label": 1}, {"path": "2.jpg", "label": {"id": 1}})


def test_a_question_mark_in_a_path_is_a_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a?b").mkdir()
    assert [item.path for item in items(opened(as_csv(tmp_path / "a?b/t.csv", {"path": ["1.jpg"]})))] == ["1.jpg"]


def test_a_whole_number_that_float64_cannot_hold_is_refused_beside_floats(tmp_path: Path) -> None:
    columns = {"path": ["1.jpg", "2.jpg"], "id": [2**53, 2**53 + 1], "score": [0.5, 1]}
    path = as_csv(tmp_path / "t.csv", columns)
    assert "column 'id' has 9007199254740993, which float64 cannot hold" in refusal(path, labels="id,score")
    assert labelled(opened(path, labels="id"))[1] == ("2.jpg", 2**53 + 1)
    columns["id"][1] = -(2**53)
    assert labelled(opened(as_csv(path, columns), labels="id,score"))[1] == ("2.jpg", [-(2.0**53), 1.0])


def test_a_root_that_is_far_away_is_kept_as_it_is(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/kept/1.jpg", file_bytes("jpeg"))
    written = as_csv(tmp_path / "t.csv", {"path": ["1.jpg"]})
    config = BuildConfig(root="memory://kept", device="cpu", workers=0, size=8)
    gpu_npz.build(written, tmp_path / "out", config)
    assert json.loads((tmp_path / "out/.gpu-npz/job.json").read_text())["source_root"] == "memory://kept"
    assert not compare(tmp_path / "out", 1).problems
