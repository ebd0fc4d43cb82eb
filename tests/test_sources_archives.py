"""WebDataset, ILSVRC2012's tars and zips: what is read in place is what a folder of the same files gives."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_npz
from gpu_npz.config import BuildConfig
from gpu_npz.errors import GpuNpzError, SourceError, UsageError
from gpu_npz.plan import Plan
from gpu_npz.rejects import BadItem
from gpu_npz.selection import listed
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, LabelColumn, Source

Files = dict[str, bytes]


def tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tarred(files))
    return path


def tarred(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(path: Path, files: Files, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opened(path: Path | str, classes: list[str] | None = None, **settings: Any) -> Source:
    return open_source(path, BuildConfig(**settings), classes)


def items(source: Source) -> list[Item]:
    plan = Plan(listed(source, BuildConfig()), 1024)
    return plan.items(0, plan.item_count)


def labelled(source: Source) -> list[tuple[str, Any]]:
    return [(item.path, item.label) for item in items(source)]


def refusal(path: Path | str, **settings: Any) -> str:
    with pytest.raises((SourceError, UsageError)) as caught:
        list(opened(path, **settings).groups())
    return str(caught.value)


def reject(source: Source, item: Item) -> tuple[str, str]:
    with pytest.raises(BadItem) as caught:
        source.read(item)
    return caught.value.code, caught.value.detail


@pytest.fixture(scope="module")
def images(tree: Path) -> Files:
    """Every file of a tree of class folders, by its path."""
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["zip", "deflated zip", "webdataset"])
def test_it_builds_what_its_folder_builds(
    images: Files, make_dataset: Callable[..., Path], read_shards: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    settings: dict[str, Any] = {}
    if form == "webdataset":
        classes = sorted({path.split("/")[0] for path in images})
        (tmp_path / "classes").write_text("\n".join(classes))
        settings = {"classes_from": str(tmp_path / "classes")}
        samples: Files = {}
        for number, (path, content) in enumerate(images.items()):
            samples[f"{number:05}.{path.rpartition('.')[2]}"] = content
            samples[f"{number:05}.cls"] = b"%d" % classes.index(path.split("/")[0])
        src = tar(tmp_path / "s.tar", samples)
        assert opened(src, classes).kind == "webdataset"
    else:
        src = zipped(tmp_path / "i.zip", images, zipfile.ZIP_STORED if form == "zip" else zipfile.ZIP_DEFLATED)
    ours, plain = make_dataset(src, workers=1, **settings), make_dataset()
    for name in ("images", "labels", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name), read_shards(plain, name))
    assert gpu_npz.verify(ours).ok
    assert gpu_npz.open_dataset(ours).class_names == gpu_npz.open_dataset(plain).class_names


# WebDataset


def test_samples_have_labels_from_files_and_fields(tmp_path: Path) -> None:
    files = {}
    for key, label in (("x/1", 3), ("x/2", 0), ("y/1", 3)):
        files |= {f"{key}.jpg": key.encode(), f"{key}.cls": b"%d\n" % label, f"{key}.txt": b"name %d" % label}
        files[f"{key}.json"] = json.dumps({"a": {"b": label / 2}, "c": str(label), "none": None}).encode()
    path = tar(tmp_path / "s.tar", files)
    paths = ["x/1.jpg", "x/2.jpg", "y/1.jpg"]
    source = opened(path)
    assert labelled(source) == list(zip(paths, [3, 0, 3], strict=True))
    assert source.columns == (LabelColumn(name="cls", kind="integer"),)
    assert [source.read(item) for item in items(source)] == [b"x/1", b"x/2", b"y/1"]
    texts = opened(path, labels="txt")
    assert (texts.class_names, labelled(texts)[1]) == (("name 0", "name 3"), ("x/2.jpg", 0))
    assert [label for _, label in labelled(opened(path, labels="json:a.b,cls"))] == [(1.5, 3), (0.0, 0), (1.5, 3)]
    assert labelled(opened(path, labels="none")) == [(each, None) for each in paths]
    assert labelled(opened(path, ["a", "b", "c", "d"])) == list(zip(paths, [3, 0, 3], strict=True))
    assert "has no .seg" in refusal(path, labels="json:x").replace("has no field 'x'", "has no .seg")
    assert "labels of a WebDataset are cls, txt, json:FIELD" in refusal(path, labels="seg")
    assert "has no label for 'x/1.jpg'" in refusal(path, labels="json:none")


def test_samples_that_are_not_whole_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ok = {"1.jpg": b"1", "1.cls": b"1"}
    assert "sample '2' has no .cls beside it" in refusal(tar(tmp_path / "a.tar", {**ok, "2.jpg": b"2", "2.txt": b""}))
    assert "sample '2' has 2 images" in refusal(tar(tmp_path / "b.tar", {**ok, "2.jpg": b"2", "2.png": b"2"}))
    assert "a label has at most" in refusal(tar(tmp_path / "c.tar", {"1.jpg": b"1", "1.cls": bytes((1 << 20) + 1)}))
    text = tar(tmp_path / "d.tar", {**ok, "2.jpg": b"1", "2.cls": b"cat"})
    assert "both texts" in refusal(text)
    assert len(items(opened(tar(tmp_path / "e.tar", {**ok, "2.cls": b"1"})))) == 1
    assert "1 samples without an image" in caplog.text
    assert "cannot be read" in refusal(tar(tmp_path / "f.tar", {**ok, "1.json": b"{"}), labels="json:a")


def test_shards_are_found_by_a_pattern(tmp_path: Path) -> None:
    for number in range(12):
        tar(tmp_path / f"shard-{number:03}.tar", {"0.jpg": b"%d" % number, "0.cls": b"%d" % number})
    source = opened(f"{tmp_path}/shard-{{000..011}}.tar")
    assert labelled(source) == [(f"shard-{number:03}.tar/0.jpg", number) for number in range(12)]
    assert [source.read(item) for item in items(source)] == [b"%d" % number for number in range(12)]
    assert labelled(opened(f"{tmp_path}/*.tar")) == labelled(source)
    assert "No such file" in refusal(f"{tmp_path}/gone-{{000..011}}.tar")


# ILSVRC2012


WNIDS = ("n01440764", "n01443537", "n02119789")


def train(path: Path, wnids: tuple[str, ...] = (WNIDS[1], WNIDS[0])) -> Path:
    inner = {
        f"{wnid}.tar": tarred({f"{wnid}_{number}.JPEG": f"{wnid} {number}".encode() for number in (7, 3)})
        for wnid in wnids
    }
    return tar(path, inner)


def test_the_train_tar_is_read_within_its_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = opened(train(tmp_path / "ILSVRC2012_img_train.tar"))
    assert (source.kind, source.class_names) == ("imagenet", (WNIDS[0], WNIDS[1]))
    assert labelled(source) == [
        (f"{wnid}/{wnid}_{number}.JPEG", label) for wnid, label in ((WNIDS[1], 1), (WNIDS[0], 0)) for number in (7, 3)
    ]
    assert source.read(items(source)[2]) == f"{WNIDS[0]} 7".encode()
    assert "has 4 images of 2 classes; ILSVRC2012's train tar has 1281167 of 1000" in caplog.text


def val(path: Path) -> Path:
    return tar(path, {f"ILSVRC2012_val_{number:08}.JPEG": b"%d" % number for number in (2, 1, 3)})


def test_the_val_tar_has_its_labels_from_the_devkit_or_a_table(tmp_path: Path) -> None:
    path = val(tmp_path / "ILSVRC2012_img_val.tar")
    data = tmp_path / "devkit" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n2\n")
    (data / "map_clsloc.txt").write_text(f"{WNIDS[2]} 1 kit_fox\n{WNIDS[0]} 3 tench\n{WNIDS[1]} 2 goldfish\n")
    expected = [("ILSVRC2012_val_00000002.JPEG", 0), ("ILSVRC2012_val_00000001.JPEG", 1)]
    source = opened(path, labels=str(tmp_path / "devkit"))
    assert source.class_names == WNIDS
    assert labelled(source)[:2] == expected
    io_ = pytest.importorskip("scipy.io")
    (data / "map_clsloc.txt").unlink()
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(1, WNIDS[2], "kit fox", "", 0), (2, WNIDS[1], "goldfish", "", 0), (3, WNIDS[0], "tench", "", 0)]
    rows.append((4, "n00001740", "entity", "", 3))
    io_.savemat(data / "meta.mat", {"synsets": np.array(rows, fields).reshape(-1, 1)})
    assert labelled(opened(path, labels=str(tmp_path / "devkit"))) == labelled(source)
    (tmp_path / "t.csv").write_text(
        "ImageId,PredictionString\n"
        + "".join(
            f"ILSVRC2012_val_{number:08},{wnid} 1 2 3 4\n"
            for number, wnid in ((1, WNIDS[1]), (2, WNIDS[0]), (3, WNIDS[1]))
        )
    )
    assert labelled(opened(path, labels=str(tmp_path / "t.csv")))[:2] == expected
    assert labelled(opened(path, [*WNIDS[::-1]], labels=str(tmp_path / "t.csv")))[:2] == [
        (expected[0][0], 2), (expected[1][0], 1),
    ]  # fmt: skip
    assert labelled(opened(path, labels="none"))[0] == (expected[0][0], None)


def test_what_the_val_tar_lacks_is_said(tmp_path: Path) -> None:
    path = val(tmp_path / "val.tar")
    assert "has no labels of its own; --labels DEVKIT" in refusal(path)
    assert "No such file" in refusal(path, labels=str(tmp_path / "gone.csv"))
    assert "has no data/ILSVRC2012_validation_ground_truth.txt" in refusal(path, labels=str(tmp_path))
    (tmp_path / "t.csv").write_text(f"1,{WNIDS[0]}\n2,dog\n")
    assert "line 2 is '2,dog'" in refusal(path, labels=str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text(f"1,{WNIDS[0]}\n2,{WNIDS[0]}\n")
    assert "has no label" in refusal(path, labels=str(tmp_path / "t.csv"))
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n9\n")
    (tmp_path / "map_clsloc.txt").write_text(f"{WNIDS[2]} 1 kit_fox\n")
    assert "line 2 has '9', which is no class of the 1 beside it" in refusal(path, labels=str(tmp_path))
    (tmp_path / "map_clsloc.txt").unlink()
    (tmp_path / "meta.mat").write_bytes(b"no MATLAB file" * 40)
    pytest.importorskip("scipy.io")
    assert "cannot be read" in refusal(path, labels=str(tmp_path))


def test_a_train_tar_whose_inner_tar_is_cut_is_refused(tmp_path: Path) -> None:
    whole = tarred({"a_1.JPEG": bytes(2000)})
    message = refusal(tar(tmp_path / "t.tar", {f"{WNIDS[0]}.tar": whole[:1500]}), source="imagenet")
    assert f"{WNIDS[0]}.tar' is cut" in message
    assert "for others say --source tar" in refusal(tar(tmp_path / "o.tar", {"a/1.jpg": b"1"}), source="imagenet")


# Zip


def test_a_zip_has_the_classes_of_its_folders(tmp_path: Path) -> None:
    files = {"b/1.jpg": b"x" * 100, "a/deep/2.png": b"y", "a/notes.txt": b"", ".hidden/3.jpg": b""}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        source = opened(zipped(tmp_path / "i.zip", files, method))
        assert labelled(source) == [("b/1.jpg", 1), ("a/deep/2.png", 0)]
        assert [source.read(item) for item in items(source)] == [b"x" * 100, b"y"]


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg"])
def test_names_that_lead_out_of_a_zip_are_refused(tmp_path: Path, name: str) -> None:
    assert "leads out of the archive" in refusal(zipped(tmp_path / "i.zip", {"a/1.jpg": b"1", name: b"2"}))


def test_a_zip_that_lies_about_a_member_makes_a_reject_of_it(tmp_path: Path) -> None:
    path = zipped(tmp_path / "i.zip", {"a/1.jpg": bytes(5000)}, zipfile.ZIP_DEFLATED)
    (item,) = items(opened(path))
    number, offset, stored, size, crc = item.place
    source = opened(path)
    assert reject(source, item._replace(place=(number, offset, stored, 10, crc)))[0] == "undecodable"
    assert reject(source, item._replace(place=(number, offset, stored, size + 1, crc)))[0] == "truncated"
    assert reject(source, item._replace(place=(number, offset, stored, size, crc ^ 1)))[0] == "undecodable"
    assert reject(source, item._replace(place=(number, offset + 1, stored, size, crc)))[0] == "undecodable"
    assert reject(source, item._replace(place=(number, offset, stored, 1 << 40, crc)))[0] == "too-large"
    assert reject(source, item._replace(place=()))[0] == "missing"


def test_a_bomb_is_refused_and_never_inflated(tmp_path: Path) -> None:
    path = zipped(tmp_path / "i.zip", {"a/1.jpg": bytes(1 << 20), "a/2.jpg": b"2"}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", directory + 4)
    shared = bytearray(data)
    struct.pack_into("<I", shared, second + 42, 0)  # both members at the same place
    path.write_bytes(shared)
    assert "a zip bomb" in refusal(path)
    struct.pack_into("<I", data, directory + 24, 100)  # a size of 100 bytes, which it exceeds
    path.write_bytes(data)
    source = opened(path)
    assert reject(source, items(source)[0]) == (
        "undecodable", "it inflates to more than the 100 bytes that the zip's directory has",
    )  # fmt: skip


def test_a_zip_cut_anywhere_is_refused_or_gives_whole_members(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "i.zip", {"a/1.jpg": b"1" * 300, "b/2.jpg": b"2" * 300}).read_bytes()
    for end in range(0, len(whole), 7):
        (tmp_path / "cut.zip").write_bytes(whole[:end])
        with pytest.raises(GpuNpzError):
            items(opened(tmp_path / "cut.zip"))


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "i.zip", {"a/1.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted; unzip it" in refusal(path)
