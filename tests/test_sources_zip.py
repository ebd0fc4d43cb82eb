"""Zips as sources: members are read in place, and what lies about its size or is damaged costs no memory."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, items, labelled, read_shards, reject

from gpu_npz.config import BuildConfig
from gpu_npz.errors import SourceError
from gpu_npz.sources import open_source
from gpu_npz.sources.archives.zip import ZipSource
from gpu_npz.sources.base import Item
from gpu_npz.sources.rejects import MAX_ENCODED_BYTES


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def opened(path: Path, **settings: Any) -> ZipSource:
    return ZipSource(os.fspath(path), BuildConfig(**settings), None)


def central(data: bytearray, number: int) -> int:
    """Where the central directory's entry of a member begins."""
    position = -1
    for _ in range(number + 1):
        position = data.index(b"PK\1\2", position + 1)
    return position


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_in_place_and_classes_are_first_folders(tmp_path: Path, method: int) -> None:
    files = {"b/2.jpg": os.urandom(700) * 3, "b/ä.jpg": b"x", "a/deep/1.png": os.urandom(9), "notes.txt": b"n"}
    source = open_source(pack(tmp_path / "t.zip", {**files, "c/": b"", "__MACOSX/a/._1.jpg": b"m"}, method))
    assert source.class_names == ("a", "b", "c")
    assert [(item.path, item.label) for item in items(source)] == [("b/2.jpg", 1), ("b/ä.jpg", 1), ("a/deep/1.png", 0)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(item) for item in items(source)] == [files[item.path] for item in items(source)]


def test_dicom_files_are_images_as_in_a_folder(tmp_path: Path) -> None:
    source = opened(pack(tmp_path / "t.zip", {"a/1.dcm": b"1", "a/notes.txt": b"1"}))
    assert labelled(source) == [("a/1.dcm", 0)]


def test_a_zip_builds_what_its_folder_builds(tmp_path: Path, tree: Path, make_dataset: MakeDataset) -> None:
    files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in sorted(tree.rglob("*.jpg"))}
    there, here = make_dataset(tree), make_dataset(pack(tmp_path / "t.zip", files))
    assert sorted(read_shards(here, "paths")) == sorted(read_shards(there, "paths"))
    orders = [np.argsort(read_shards(out, "paths")) for out in (here, there)]
    for name in ("labels", "source_bytes", "images"):
        np.testing.assert_array_equal(read_shards(here, name)[orders[0]], read_shards(there, name)[orders[1]])


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="leads out of the archive"):
        opened(pack(tmp_path / "t.zip", {"a/1.jpg": b"1", name: b"2"}))


def foreign(path: Path, names: list[str], system: int) -> Path:
    """A zip as another system makes it, of members that hold their names."""
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.create_system = system
            made.writestr(info, name)
    return path


@pytest.mark.parametrize("system", [0, 10])
def test_backslashes_of_windows_are_slashes(tmp_path: Path, system: int) -> None:
    names = ["cat\\", "cat\\1.jpg", "dog\\old\\2.jpg", "dog/3\\4.jpg"]
    source = opened(foreign(tmp_path / "t.zip", names, system))
    assert source.class_names == ("cat", "dog")
    assert labelled(source) == [("cat/1.jpg", 0), ("dog/old/2.jpg", 1), ("dog/3\\4.jpg", 1)]
    assert source.read(items(source)[1]) == b"dog\\old\\2.jpg"
    for name in ("..\\1.jpg", "a\\..\\..\\1.jpg", "\\a\\1.jpg"):
        with pytest.raises(SourceError, match="leads out of the archive"):
            opened(foreign(tmp_path / "bad.zip", [name], system))
    assert labelled(opened(foreign(tmp_path / "unix.zip", ["cat\\1.jpg"], 3))) == [("cat\\1.jpg", None)]


def test_a_link_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    link = zipfile.ZipInfo("a/link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as made:
        made.writestr(link, "/etc/passwd")
        made.writestr("a/1.jpg", b"1")
    assert [item.path for item in items(opened(tmp_path / "t.zip"))] == ["a/1.jpg"]
    assert "1 links, devices or sparse files ('a/link.jpg', ...) are omitted" in caplog.text


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": b"1", "a//1.jpg": b"2"})
    with pytest.raises(SourceError, match=r"holds 'a/1\.jpg' twice"):
        opened(path)


def test_encrypted_members_and_other_methods_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": b"1"}, zipfile.ZIP_BZIP2)
    with pytest.raises(SourceError, match=r"compressed by method 12; allowed are stored \(0\) and deflated"):
        opened(path)
    data = bytearray(pack(path, {"a/1.jpg": b"1"}).read_bytes())
    data[central(data, 0) + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="is encrypted; unzip it and give the folder"):
        opened(path)
    data = bytearray(pack(path, {"./a/1.jpg": b"1"}).read_bytes())
    data[central(data, 0) + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="is encrypted; unzip it and give the folder"):
        opened(path)
    source = opened(pack(path, {"a/1.jpg": b"1"}))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    path.write_bytes(data)
    assert reject(source, items(source)[0])[0] == "unreadable"


def test_damage_is_a_reject_of_its_member_alone(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": b"good " * 99, "a/2.jpg": b"fine"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    source = opened(path)
    first, second = items(source)
    assert reject(source, first) == ("undecodable", "its CRC-32 is another: it is damaged")
    assert source.read(second) == b"fine"
    pack(path, {"a/1.jpg": os.urandom(99), "a/2.jpg": b"fine"})
    data = bytearray(path.read_bytes())
    data[:4] = b"none"
    data[30 + 7 :][:1] = b"\xff"
    path.write_bytes(data)
    source = opened(path)
    assert reject(source, items(source)[0]) == ("undecodable", "no zip member where the directory has one")


@pytest.mark.parametrize(
    ("size", "code", "detail"),
    [
        (10, "undecodable", "it inflates to more than the 10 bytes that the zip's directory has"),
        (50_000_000, "truncated", "40000000 bytes where the zip's directory has 50000000"),
        (MAX_ENCODED_BYTES + 1, "too-large", f"{MAX_ENCODED_BYTES + 1} bytes; at most {MAX_ENCODED_BYTES}"),
    ],
)
def test_sizes_that_lie_are_rejects(tmp_path: Path, size: int, code: str, detail: str) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": bytes(40_000_000)})
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, central(data, 0) + 24, size)
    path.write_bytes(data)
    source = opened(path)
    assert reject(source, items(source)[0]) == (code, detail)


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": b"1" * 99, "a/2.jpg": b"2" * 99}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, central(data, 1) + 42, 0)
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged or a zip bomb"):
        opened(path)


def test_a_size_beyond_the_end_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": b"1"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, central(data, 0) + 20, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(SourceError, match="where the next one begins or the zip ends"):
        opened(path)


def test_a_zip_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.zip", {"a/1.jpg": os.urandom(600), "b/2.jpg": b"2"})
    data = path.read_bytes()
    for cut in range(0, len(data), 50):
        path.write_bytes(data[:cut])
        with pytest.raises(SourceError, match="is no zip, damaged or cut"):
            opened(path)


def test_places_are_not_trusted(tmp_path: Path) -> None:
    source = opened(pack(tmp_path / "t.zip", {"a/1.jpg": b"1"}))
    for place in ((), (0, 0, 0), (1, 0, 1, 1, 0), (0, -5, 1, 1, 0), (0, 0, -1, 1, 0), (0, 0, 2**40, 1, 0)):
        assert reject(source, Item(0, "a/1.jpg", None, place))
