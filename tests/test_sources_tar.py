"""Tars as sources: which members are items, that they are read in place, and what of a hostile or a cut one is said."""

from __future__ import annotations

import io
import logging
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, items, labelled, pack, read_shards

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.config import BuildConfig
from gpu_npz.errors import MismatchError, ShardError, SourceError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.archives.tar import TarSource, kind_of
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.rejects import MAX_ENCODED_BYTES, BadItem


def raw(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A tar with these headers as they are, even if they lie."""
    blocks = [header(info) + content + bytes(-len(content) % 512) for info, content in members]
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


def header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.USTAR_FORMAT)


def info_of(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def opened(path: Path | str, **settings: Any) -> TarSource:
    return TarSource(os.fspath(path), BuildConfig(**settings), settings.pop("classes", None))


# TableListing and reading


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place_and_classes_are_first_folders(tmp_path: Path, form: int) -> None:
    deep = "b/" + "/".join(["long-folder-name"] * 8) + "/x.png"
    files = {"./b/2.jpg": os.urandom(700), "b/notes.txt": b"n", "a/1.JPG": b"1", deep: os.urandom(512), "a/0.jpg": b""}
    source = opened(pack(tmp_path / "t.tar", files, form))
    assert source.class_names == ("a", "b")
    assert labelled(source) == [("b/2.jpg", 1), ("a/1.JPG", 0), (deep, 1), ("a/0.jpg", 0)]
    copy = pickle.loads(pickle.dumps(source))
    contents = [files.get(item.path, files.get("./" + item.path)) for item in items(source)]
    assert [copy.read(item) for item in items(source)] == [source.read(item) for item in items(source)] == contents
    with pytest.raises(BadItem, match="zero bytes"):
        read_item(source, items(source)[3])


def test_names_that_are_no_utf8_stay_what_they_are(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/\xff.jpg")
    assert labelled(opened(pack(tmp_path / "t.tar", {name: b"1"}, tarfile.GNU_FORMAT))) == [(name, 0)]


def test_a_class_is_a_folder_even_without_images_and_hidden_names_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in (".", "./b", "./empty", "./.git"):
            tar.addfile(info_of(name, type=tarfile.DIRTYPE))
        for name in ("./b/1.jpg", "./b/._1.jpg", "./.git/2.jpg", "c/readme.txt"):
            tar.addfile(info_of(name))
    source = opened(tmp_path / "t.tar")
    assert source.class_names == ("b", "c", "empty")
    assert labelled(source) == [("b/1.jpg", 0)]


def test_images_in_no_folder_have_no_labels_and_a_mixture_is_refused(tmp_path: Path) -> None:
    flat = pack(tmp_path / "flat.tar", {"2.jpg": b"2", "1.jpg": b"1", "docs/readme.txt": b""})
    assert opened(flat).class_names is None
    assert labelled(opened(flat)) == [("2.jpg", None), ("1.jpg", None)]
    with pytest.raises(SourceError, match="has no labels; leave --classes-from out"):
        open_source(flat, classes=["a"])
    mixed = pack(tmp_path / "mixed.tar", {"2.jpg": b"2", "a/1.jpg": b"1"})
    with pytest.raises(SourceError, match=r"images in no folder \('2\.jpg', \.\.\.\) and images in folders"):
        opened(mixed)
    assert labelled(opened(mixed, labels="none")) == [("2.jpg", None), ("a/1.jpg", None)]


def test_several_tars_stand_before_the_paths_and_share_their_classes(tmp_path: Path) -> None:
    for number in range(3):
        pack(tmp_path / f"t-{number}.tar", {f"c{number % 2}/1.jpg": b"%d" % number})
    source = open_source(f"{tmp_path}/t-{{0..2}}.tar")
    assert labelled(source) == [("t-0.tar/c0/1.jpg", 0), ("t-1.tar/c1/1.jpg", 1), ("t-2.tar/c0/1.jpg", 0)]
    assert [source.read(item) for item in items(source)] == [b"0", b"1", b"2"]
    assert labelled(open_source(f"{tmp_path}/*.tar")) == labelled(source)


def test_classes_are_numbered_by_a_list_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    tar = str(pack(tmp_path / "t.tar", {"a/1.jpg": b"1", "c/1.jpg": b"1"}))
    assert labelled(TarSource(tar, BuildConfig(), ["c", "b", "a"])) == [("a/1.jpg", 2), ("c/1.jpg", 0)]
    with pytest.raises(SourceError, match="1 classes that are not in the given list: 'c'"):
        TarSource(tar, BuildConfig(), ["a"])
    with pytest.raises(UsageError, match="contradict"):
        open_source(tar, BuildConfig(labels="none"), ["a"])
    with pytest.raises(UsageError, match=r"--labels t\.csv: labels of a tar are class-dir"):
        opened(tar, labels="t.csv")


def test_links_devices_and_sparse_files_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = {"linkname": "/etc/passwd"}
    kinds = {tarfile.SYMTYPE: secret, tarfile.LNKTYPE: secret, tarfile.CHRTYPE: {}, tarfile.FIFOTYPE: {}}
    others = [(info_of(f"a/{number}.jpg", type=kind, **more), b"") for number, (kind, more) in enumerate(kinds.items())]
    path = raw(tmp_path / "t.tar", *others, (info_of("a/good.jpg", size=3), b"abc"))
    sparse = info_of("a/sparse.jpg", size=3, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "x"})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(b"abc"))
    with caplog.at_level(logging.WARNING):
        source = opened(path)
        assert [source.read(item) for item in items(source)] == [b"abc"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{str(path)!r}: 5 links, devices or sparse files ('a/0.jpg', ...) are omitted; to use them, unpack it and "
        "give the folder as SRC"
    ]


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.tar", {"a/1.jpg": b"1", "a/2.jpg": b"2", "./a//1.jpg": b"3"})
    with pytest.raises(SourceError, match=r"holds 'a/1\.jpg' twice; unpack it and create it again"):
        opened(path)


def test_listing_touches_headers_alone(tmp_path: Path) -> None:
    size, path = 20 << 30, tmp_path / "t.tar"
    with open(path, "wb") as file:
        for number in range(5):
            file.write(header(info_of(f"a/{number}.jpg", size=0)).replace(b"00000000000\0", _base256(size), 1))
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    _rewrite_checksums(path, [number * (size + 512) for number in range(5)])
    source = opened(path)
    assert [item.place for item in items(source)] == [(0, 512 + n * (size + 512), size) for n in range(5)]
    with pytest.raises(BadItem, match=f"{size} bytes; at most {MAX_ENCODED_BYTES}"):
        source.read(items(source)[0])


def _base256(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


def _rewrite_checksums(path: Path, offsets: list[int]) -> None:
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            block = bytearray(file.read(512))
            block[124:136] = b"\x80" + (20 << 30).to_bytes(11, "big")
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            file.seek(offset)
            file.write(block)


def test_kinds_are_told_by_the_first_members(tmp_path: Path) -> None:
    samples = pack(tmp_path / "1.tar", {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"1"})
    assert kind_of(str(samples)) == "webdataset"
    assert kind_of(str(pack(tmp_path / "2.tar", {"n01440764.tar": b"", "n01443537.tar": b""}))) == "imagenet"
    assert kind_of(str(pack(tmp_path / "3.tar", {"ILSVRC2012_val_00000001.JPEG": b""}))) == "imagenet"
    assert kind_of(str(pack(tmp_path / "4.tar", {"a/1.jpg": b"", "a/2.jpg": b"", "a/2.xml": b""}))) == "tar"


# Hostile, damaged, cut


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "a/..", "//a/b.jpg"])
def test_names_that_lead_out_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = pack(tmp_path / "t.tar", {"a/1.jpg": b"1", name: b"2"})
    with pytest.raises(SourceError, match="leads out of the archive") as caught:
        opened(path)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_no_file_could_have_are_refused(tmp_path: Path, form: int) -> None:
    path = pack(tmp_path / "t.tar", {"a/" + "b" * 100_000 + ".jpg": b"1"}, form)
    with pytest.raises(SourceError, match="a name of 100006 bytes; at most 4096 are allowed"):
        opened(path)


def test_a_zero_byte_in_a_name_is_refused(tmp_path: Path) -> None:
    record = b"18 path=a/\0b1.jpg\n"
    path = raw(tmp_path / "t.tar", (info_of("p", type=b"x", size=len(record)), record), (info_of("a/1.jpg"), b""))
    with pytest.raises(SourceError, match="zero byte in its name"):
        opened(path)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_of_absurd_size_are_refused_and_not_read(tmp_path: Path, kind: bytes) -> None:
    path = raw(tmp_path / "t.tar", (info_of("p", type=kind, size=4 << 30), b""))
    with pytest.raises(SourceError, match=r"is truncated: it ends at byte 1536, within a header|within 'p'"):
        opened(path)
    os.truncate(path, 9 << 30)
    with pytest.raises(SourceError, match=f"a header of {4 << 30} bytes at byte 512; at most 1048576 are allowed"):
        opened(path)


@pytest.mark.parametrize(
    "record",
    [b"17 size=99999999\n", b"30 size=" + b"9" * 21 + b"\n"],
)
def test_a_size_beyond_the_end_is_a_cut_tar(tmp_path: Path, record: bytes) -> None:
    path = raw(tmp_path / "t.tar", (info_of("p", type=b"x", size=len(record)), record), (info_of("a/1.jpg"), b""))
    with pytest.raises(SourceError, match=r"is truncated: it ends at byte \d+, within 'a/1\.jpg', which has \d+ bytes"):
        opened(path)


@pytest.mark.parametrize("record", [b"10 size=-5\n"[:10] + b"\n", b"9 size=x\n", b"99 size=1\n", b"0 \n", b"junk"])
def test_nonsense_in_a_pax_header_is_damage(tmp_path: Path, record: bytes) -> None:
    path = raw(tmp_path / "t.tar", (info_of("p", type=b"x", size=len(record)), record), (info_of("a/1.jpg"), b""))
    with pytest.raises(SourceError, match=r"is damaged at byte \d+, after its beginning"):
        opened(path)


def test_negative_sizes_are_damage(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.tar", {"a/1.jpg": b"1", "a/2.jpg": b"2"}, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    for field in (b"\xff" * 12, b"-0000000777\0"):
        data[1024 + 124 : 1024 + 136] = field
        data[1024 + 148 : 1024 + 156] = b" " * 8
        data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"damaged at byte 1024, after 'a/1\.jpg'"):
            opened(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, form: int) -> None:
    long_name = "b/" + "x/" * 60 + "2.jpg"
    path = pack(tmp_path / "t.tar", {"a/1.jpg": os.urandom(600), long_name: os.urandom(1500)}, form)
    data = path.read_bytes()
    end = data.rindex(path.read_bytes().rstrip(b"\0")[-1:]) + 1
    end += -end % 512
    for cut in [*range(0, end + 1, 512), *range(100, end, 512)]:
        path.write_bytes(data[:cut])
        with pytest.raises(SourceError, match=r"is truncated: it ends .*; download or make it again"):
            opened(path)
    path.write_bytes(data[: end + 512])
    assert len(items(opened(path))) == 2


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.tar", {f"a/{number}.jpg": b"1" for number in range(3)}, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[2048] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"damaged at byte 2048, after 'a/1\.jpg': there is no header of a tar"):
        opened(path)


def test_what_follows_the_end_mark_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(tmp_path / "t.tar", {"a/1.jpg": b"1"})
    opened(path)
    assert not caplog.records
    os.truncate(path, 4 << 20)
    opened(path)
    assert "ends at byte 1024 of 4194304, as tar reads it; what follows is omitted" in caplog.text


def test_a_tar_behind_another_is_named_however_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (pack(tmp_path / f"{name}.tar", {f"{name}/1.jpg": b"1"}).read_bytes() for name in "ab")
    for padding in (0, 8192):
        caplog.clear()
        (tmp_path / "c.tar").write_bytes(first + bytes(padding) + second)
        assert labelled(opened(tmp_path / "c.tar")) == [("a/1.jpg", 0)]
        assert (
            "as tar reads it; what follows is omitted: if tars were joined with cat, give them one by one"
            in caplog.text
        )


@pytest.mark.parametrize(
    ("mode", "name", "command"),
    [("gz", "t.tar.gz", "gunzip -k"), ("bz2", "t.tbz2", "bunzip2 -k"), ("xz", "t.tar", "unxz -k")],
)
def test_a_compressed_tar_is_refused_with_the_command(tmp_path: Path, mode: Any, name: str, command: str) -> None:
    with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
        tar.addfile(info_of("a/1.jpg"))
    with pytest.raises(SourceError, match=f"is compressed, .*; run: {command} '{name}' and give the .tar"):
        open_source(tmp_path / name)


def test_a_folder_of_an_archive_is_taken_where_root_says_so(
    tmp_path: Path, make_dataset: MakeDataset, tree: Path
) -> None:
    files = {f"./data/{path.relative_to(tree)}": path.read_bytes() for path in sorted(tree.rglob("*.jpg"))}
    path = pack(tmp_path / "t.tar", {**files, "other/x/1.jpg": b"1", "data.jpg": b"2"})
    ours, plain = make_dataset(path, root="data/"), make_dataset(tree)
    assert gpu_npz.open_dataset(ours).class_names == gpu_npz.open_dataset(plain).class_names
    assert {*gpu_npz.open_dataset(ours).paths[:]} == {*gpu_npz.open_dataset(plain).paths[:]}
    assert compare(ours, 10).problems == ()
    with pytest.raises(MismatchError, match="root: existing data, requested other"):
        gpu_npz.build(path, ours, BuildConfig(root="other", size="12x16", dtype="float32", shard_size=7, device="cpu"))
    with pytest.raises(SourceError, match="no images below --root dat; give a folder"):
        opened(path, root="dat")
    with pytest.raises(SourceError, match="leads out"):
        opened(path, root="../x")


def test_no_tar_and_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"text " * 300)
    with pytest.raises(SourceError, match="is no tar"):
        opened(tmp_path / "t.tar")
    with pytest.raises(SourceError, match=r"holds no images \(.*\.jpg"):
        opened(pack(tmp_path / "u.tar", {"a/b.txt": b"1"}))
    with pytest.raises(SourceError, match="No such file"):
        opened(tmp_path / "gone.tar")


def test_places_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", ())
    source = opened(pack(tmp_path / "t.tar", {"a/1.jpg": b"1"}))
    for place in ((), (0, 0), (1, 512, 1), (-1, 512, 1), (0, -1, 1), (0, 512, -1), (0, 512, 2**62)):
        with pytest.raises(BadItem):
            read_item(source, Item(0, "a/1.jpg", None, place))
    with pytest.raises(ShardError, match="has become shorter"):
        read_item(source, Item(0, "a/1.jpg", None, (0, 2**40, 5)))
    (tmp_path / "t.tar").unlink()
    with pytest.raises(SourceError, match="is missing; restore it"):
        read_item(opened_again(source), items_place())


def opened_again(source: TarSource) -> TarSource:
    copy: TarSource = pickle.loads(pickle.dumps(source))
    return copy


def items_place() -> Item:
    return Item(0, "a/1.jpg", None, (0, 512, 1))


# Whole builds


def tar_of(folder: Path, path: Path) -> Path:
    """A tar of a folder tree, in the order in which a folder source lists it."""
    with tarfile.open(path, "w") as tar:
        for top in sorted(folder.iterdir()):
            names = [(root, name) for root, _, files in os.walk(top) for name in files]
            for root, name in sorted(names):
                tar.add(Path(root, name), Path(root, name).relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize(
    "settings", [{}, {"workers": 1}, {"backend": "dali", "device": "cpu"}], ids=["pillow", "worker", "dali"]
)
def test_a_tar_builds_what_its_folder_builds(
    tmp_path: Path, tree: Path, make_dataset: MakeDataset, settings: dict[str, Any]
) -> None:
    if "backend" in settings:
        pytest.importorskip("nvidia.dali")
    there, here = make_dataset(tree, **settings), make_dataset(tar_of(tree, tmp_path / "t.tar"), **settings)
    assert gpu_npz.Dataset(here).class_names == gpu_npz.Dataset(there).class_names
    for name in ("paths", "labels", "source_bytes", "images"):
        np.testing.assert_array_equal(read_shards(here, name), read_shards(there, name))


def test_a_tar_of_another_size_does_not_resume(tmp_path: Path, tree: Path, make_dataset: MakeDataset) -> None:
    path = tar_of(tree, tmp_path / "t.tar")
    out = make_dataset(path)
    os.truncate(path, path.stat().st_size + 512)
    config = {"device": "cpu", "workers": 0, "shard_size": 7, "size": "12x16", "max_rejects": "100%"}
    (out / "dataset.json").unlink()
    with pytest.raises(MismatchError, match=r"'t\.tar' of .* has changed since the plan was made: \d+ bytes then"):
        gpu_npz.build(path, out, BuildConfig(**config))
