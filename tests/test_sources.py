"""Folders of images: what is listed, in which order and under which label; and which trouble is a file's own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import opened

import gpu_npz
from gpu_npz.errors import ShardError, SourceError, UsageError
from gpu_npz.sources.access.local import statuses
from gpu_npz.sources.base import IMAGE_EXTENSIONS, Item, files_left_out, read_item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import MAX_ENCODED_BYTES, BadItem

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has neither /proc nor names that are not UTF-8")


def listed(source: FolderSource) -> list[tuple[str, int]]:
    """All items as (path, label)."""
    return [(os.fsdecode(group.folder + name), group.label) for group in source.groups() for name in group.names]


def paths(source: FolderSource) -> list[str]:
    return [path for path, _ in listed(source)]


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", (0.0, 0.0, 0.0))


def touch(root: Path, *names: str | bytes) -> Path:
    """Files with one byte each; the listing looks at names alone."""
    for name in names:
        target = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(b"x")
    return root


# SRC

no_names = pytest.mark.parametrize("name", ["a\0b", "a\ud800", ""], ids=["NUL", "surrogate", "empty"])
NO_NAME = "is empty, has a NUL byte, or is no text; give a path or a URL"


@no_names
@pytest.mark.parametrize("extension", ["", ".tar", ".zip", ".csv", ".parquet", ".npy"])
def test_what_can_be_no_name_is_refused_as_src(tmp_path: Path, name: str, extension: str) -> None:
    extension = extension if name else ""
    for src in (name + extension, f"file://{name}{extension}"):
        with pytest.raises(SourceError, match=NO_NAME):
            opened(src)
        with pytest.raises(SourceError, match=NO_NAME):
            gpu_npz.build(src, tmp_path / "out")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800"], ids=["NUL", "surrogate"])
def test_what_can_be_no_name_is_refused_as_a_table_or_as_root(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "t.csv").write_text("path,label\na/1.jpg,1\n")
    for src, settings in (
        (tmp_path, {"labels": f"{name}.csv"}),
        (tmp_path, {"labels": f"csv:{name}.csv"}),
        (tmp_path / "t.csv", {"root": name}),
    ):
        with pytest.raises(SourceError, match=NO_NAME):
            opened(src, **settings)


def test_out_in_a_src_by_its_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies inside SRC"):
        gpu_npz.build(f"file://{tmp_path}", tmp_path / "out")


# TableListing


def test_classes_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    names = ["n02", "n01", "Zebra", "apple", "10", "9", "ä", "z z", "über", "\U0001d4b3", "\uff21"]
    touch(tmp_path, *(f"{name}/a.jpg" for name in names))
    # torchvision.datasets.folder.find_classes: sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    classes = sorted(entry.name for entry in os.scandir(tmp_path) if entry.is_dir())
    source = FolderSource(tmp_path)
    assert source.class_names == tuple(classes)
    assert listed(source) == [(f"{name}/a.jpg", number) for number, name in enumerate(classes)]


def test_class_folders_are_a_folder_whatever_else_stands_beside_them(tmp_path: Path) -> None:
    for name in ("cats", "meta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    (tmp_path / "embeddings.parquet").touch()
    source = opened(tmp_path)
    assert (source.kind, source.class_names) == ("folder", ("cats", "meta"))


def test_images_deeper_in_a_class_belong_to_it_and_follow_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "b/z.jpg", "b/deep/er/2.jpg", "b/deep/3.jpg", "b/aaa/1.jpg", "a/10.jpg", "a/9.jpg")
    assert listed(FolderSource(tmp_path)) == [
        ("a/10.jpg", 0),
        ("a/9.jpg", 0),
        ("b/z.jpg", 1),
        ("b/aaa/1.jpg", 1),
        ("b/deep/3.jpg", 1),
        ("b/deep/er/2.jpg", 1),
    ]


def test_each_listing_gives_the_same(tree: Path) -> None:
    source = FolderSource(tree)
    assert source.class_names == ("apples", "berries", "cherries")
    assert len(listed(source)) == 40
    assert listed(source) == listed(source) == listed(FolderSource(str(tree) + "/"))


def test_a_folder_of_images_alone_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a.png", "notes.txt", "scripts/run.sh")
    source = FolderSource(tmp_path)
    assert source.class_names is None
    assert listed(source) == [("a.png", -1), ("b.jpg", -1)]


def test_images_beside_folders_of_images_are_refused_with_both_named(tmp_path: Path) -> None:
    touch(tmp_path, "stray.jpg", "cats/deep/a.jpg")
    with pytest.raises(SourceError, match=r"both images \('stray\.jpg', \.\.\.\) and folders of images \('cats'"):
        FolderSource(tmp_path)


def test_extensions_count_in_any_case_and_nothing_else_is_an_image(tmp_path: Path) -> None:
    images = {f"a/{number}{extension.decode()}" for number, extension in enumerate(IMAGE_EXTENSIONS)}
    images |= {"a/A.JPG", "a/b.JpEg", "a/c.Png", "a/d.tar.jpg", "a/-.webp"}
    touch(tmp_path, *images, "a/e.jpg.txt", "a/jpg", "a/f.svg", "a/g", "a/h.jpg~", "a/Thumbs.db", "a/i.json")
    assert set(paths(FolderSource(tmp_path))) == images


def test_files_of_other_names_are_counted_anew_by_each_listing(tmp_path: Path) -> None:
    names = "b/IM0001", "b/c/1.2.840.10008", "b/2.AVIF", "b/.hidden.txt", "c.txt", "b/1.jpg"
    source = FolderSource(touch(tmp_path, *names))
    for _ in range(2):
        assert len(listed(source)) == 1
        assert source.left_out == {"": 2, ".avif": 1, ".txt": 1}
    assert files_left_out(source.left_out) == (
        "4 files are ignored because of their names (2 without extension, 1 .txt, 1 .avif)"
    )


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.jpg", ".hidden/2.jpg", "a/.git/3.jpg", ".4.jpg")
    source = FolderSource(tmp_path)
    assert source.class_names == ("a",)
    assert paths(source) == ["a/1.jpg"]


def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/readme.txt", "c/2.jpg")
    source = FolderSource(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert listed(source) == [("a/1.jpg", 0), ("c/2.jpg", 2)]


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "cats.jpg/1.jpg", "dogs.jpg/pack.png/2.jpg")
    assert listed(FolderSource(tmp_path)) == [("cats.jpg/1.jpg", 0), ("dogs.jpg/pack.png/2.jpg", 1)]


def test_links_to_folders_and_images_are_followed(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    root = touch(tmp_path / "root", "a/0.jpg")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "more").symlink_to(elsewhere / "deep")
    (root / "a" / "3.jpg").symlink_to(elsewhere / "1.jpg")
    assert listed(FolderSource(root)) == [
        ("a/0.jpg", 0),
        ("a/3.jpg", 0),
        ("a/more/2.jpg", 0),
        ("b/1.jpg", 1),
        ("b/deep/2.jpg", 1),
    ]


def test_links_that_lead_back_up_are_reported_and_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path, "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    (root / "a" / "deep" / "top").symlink_to(root)
    (root / "a" / "deep" / "up").symlink_to("..")
    (root / "b" / "self").symlink_to(".")
    with caplog.at_level(logging.WARNING):
        assert paths(FolderSource(root)) == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"]
    assert [record.getMessage().split("'")[1] for record in caplog.records] == [
        "a/deep/top/", "a/deep/up/", "b/self/"
    ]  # fmt: skip


def test_a_dangling_link_is_an_item_that_is_rejected_as_missing(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.jpg")
    (root / "a" / "2.jpg").symlink_to("gone.jpg")
    (root / "a" / "gone-folder").symlink_to("gone")
    source = FolderSource(root)
    assert paths(source) == ["a/1.jpg", "a/2.jpg"]
    assert reject_of(source, "a/2.jpg") == ("missing", "No such file or directory")


def test_a_link_to_itself_is_an_item_that_is_rejected_as_unreadable(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.jpg")
    (root / "a" / "2.jpg").symlink_to("2.jpg")
    (root / "a" / "folder").symlink_to("folder")
    source = FolderSource(root)
    assert paths(source) == ["a/1.jpg", "a/2.jpg"]
    assert reject_of(source, "a/2.jpg")[0] == "unreadable"


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(public_folder: Path) -> None:
    closed = touch(public_folder, "a/1.jpg", "b/2.jpg") / "b"
    source = FolderSource(public_folder)
    closed.chmod(0)
    try:
        with nobody(), pytest.raises(SourceError, match=r"/b/': Permission denied; make it readable or move it away"):
            list(source.groups())
        closed.chmod(0o755)
        public_folder.chmod(0)
        with nobody(), pytest.raises(SourceError, match="Permission denied"):
            FolderSource(public_folder)
    finally:
        public_folder.chmod(0o755)
        closed.chmod(0o755)


@pytest.mark.parametrize("content", [(), ("notes.txt",), (".hidden/1.jpg",)], ids=["empty", "text", "hidden"])
def test_a_folder_with_nothing_in_it_is_refused_with_the_extensions(tmp_path: Path, content: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match=r"holds no images \(.* \.jpg .*; give a folder of class folders"):
        FolderSource(touch(tmp_path, *content))


def test_folders_without_images_list_nothing(tmp_path: Path) -> None:
    source = FolderSource(touch(tmp_path, "a/notes.txt", "b/c/d.pdf"))
    assert listed(source) == []


def test_a_file_or_nothing_at_all_is_refused_as_source(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    with pytest.raises(SourceError, match=r"1\.jpg/?': Not a directory; give SRC as a folder, an archive or a table"):
        FolderSource(tmp_path / "1.jpg")
    with pytest.raises(
        SourceError, match=r"gone/?': No such file or directory; give SRC as a folder, an archive or a table"
    ):
        FolderSource(tmp_path / "gone")


@linux
def test_any_name_that_the_system_allows_is_listed_and_read(tmp_path: Path) -> None:
    stems = (b"two words", b"line\nbreak", b"\xff\xfe", b"a" * 251, b"quote'\"", "日本".encode())
    names = [stem + b".jpg" for stem in stems]
    folders = [b"class one", b"class\ntwo", b"caf\xe9", b"b" * 255]
    touch(tmp_path, *(folder + b"/" + name for folder in folders for name in names))
    source = FolderSource(tmp_path)
    found = paths(source)
    assert [os.fsencode(path) for path in found] == [
        folder + b"/" + name for folder in sorted(folders) for name in sorted(names)
    ]
    assert source.class_names == tuple(map(os.fsdecode, sorted(folders)))
    assert all(read_item(source, Item(0, path, None)) == b"x" for path in found)


def test_classes_are_numbered_by_a_list_where_one_is_given(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "c/2.jpg")
    source = FolderSource(tmp_path, ["c", "b", "a"])
    assert source.class_names == ("c", "b", "a")
    assert listed(source) == [("a/1.jpg", 2), ("c/2.jpg", 0)]


def test_classes_that_the_list_does_not_have_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "x/2.jpg", "y/3.jpg")
    with pytest.raises(SourceError, match=r"are not in the given list: 'x', 'y'; omit these items"):
        FolderSource(tmp_path, ["a", "b"])
    with pytest.raises(SourceError, match=r"given list: 'c0', 'c1', 'c2', 'c3', 'c4', \.\.\.;"):
        FolderSource(touch(tmp_path / "many", *(f"c{number}/1.jpg" for number in range(9))), ["a"])


def test_a_list_of_classes_for_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no labels; leave --classes-from out"):
        opened(touch(tmp_path, "1.jpg"), ["a"])


def test_a_class_that_comes_while_the_source_is_in_use_is_an_error(tmp_path: Path) -> None:
    source = FolderSource(touch(tmp_path, "b/1.jpg"))
    touch(tmp_path, "a/1.jpg")
    with pytest.raises(SourceError, match="'a' has come into"):
        list(source.groups())


def test_listing_looks_at_folders_but_at_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counting(name: str) -> None:
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *rest, **named: calls.append(path) or function(path, *rest, **named))

    for name in ("stat", "lstat", "open", "access"):
        counting(name)
    counts = []
    for files in (1, 50):
        root = touch(tmp_path / str(files), *(f"{folder}/{file}.jpg" for folder in "abc" for file in range(files)))
        calls.clear()
        assert len(listed(FolderSource(root))) == 3 * files
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 3 + 4


# Reading


def reject_of(source: FolderSource, path: str) -> tuple[str, str]:
    with pytest.raises(BadItem) as caught:
        read_item(source, Item(0, path, None))
    assert caught.value.stage == "read"
    return caught.value.code, caught.value.detail


def test_a_files_bytes_are_read_in_full(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "1.jpg").write_bytes(data)
    assert read_item(FolderSource(tmp_path), Item(0, "a/1.jpg", None)) == data


def test_missing_and_empty_files_are_rejects(tmp_path: Path) -> None:
    source = FolderSource(touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg"))
    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    assert reject_of(source, "a/1.jpg") == ("missing", "No such file or directory")
    assert reject_of(source, "a/2.jpg") == ("empty", "zero bytes")
    (tmp_path / "b" / "3.jpg").unlink()
    (tmp_path / "b").rmdir()
    (tmp_path / "b").write_bytes(b"now a file")
    assert reject_of(source, "b/3.jpg") == ("missing", "Not a directory")


def test_a_file_without_permission_is_a_reject(public_folder: Path) -> None:
    source = FolderSource(touch(public_folder, "a/1.jpg"))
    (public_folder / "a" / "1.jpg").chmod(0)
    with nobody():
        assert reject_of(source, "a/1.jpg") == ("unreadable", "Permission denied")


def test_what_is_not_a_regular_file_is_left_out_and_never_hangs_a_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = touch(tmp_path / "root", "a/1.jpg")
    os.mkfifo(tmp_path / "pipe")
    (root / "a" / "2.jpg").symlink_to(tmp_path / "pipe")
    (root / "a" / "3.jpg").symlink_to("/dev/null")
    source = FolderSource(root)
    assert paths(source) == ["a/1.jpg"]
    assert [record.getMessage().endswith(".jpg' is not a file and is ignored") for record in caplog.records] == [
        True
    ] * 2
    assert reject_of(source, "a/2.jpg") == ("unreadable", "not a regular file")
    assert reject_of(source, "a/3.jpg") == ("unreadable", "not a regular file")
    (root / "a" / "1.jpg").unlink()
    (root / "a" / "1.jpg").mkdir()
    assert reject_of(source, "a/1.jpg")[0] == "unreadable"


def test_a_file_larger_than_any_image_is_a_reject_and_is_not_read(tmp_path: Path) -> None:
    source = FolderSource(touch(tmp_path, "a/1.jpg"))
    os.truncate(tmp_path / "a" / "1.jpg", MAX_ENCODED_BYTES + 1)
    code, detail = reject_of(source, "a/1.jpg")
    assert code == "too-large"
    assert detail == f"{MAX_ENCODED_BYTES + 1} bytes; at most {MAX_ENCODED_BYTES}"


@linux
@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/self/status", "/proc/self/pagemap", "/sys/kernel/notes"])
def test_a_link_to_what_the_kernel_makes_up_is_a_reject_and_is_not_read(tmp_path: Path, path: str) -> None:
    if not os.path.isfile(path):
        pytest.skip(f"no {path} here")
    root = touch(tmp_path, "a/1.jpg")
    (root / "a" / "2.jpg").symlink_to(path)
    assert reject_of(FolderSource(root), "a/2.jpg") == (
        "unreadable", "a file that the kernel makes up, as in /proc or /sys"
    )  # fmt: skip


@linux
def test_folders_beyond_the_longest_path_are_left_out_and_do_not_stop_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = touch(tmp_path / "root", "a/1.jpg")
    monkeypatch.chdir(root / "a")
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    Path("2.jpg").touch()
    assert paths(FolderSource(root)) == ["a/1.jpg"]
    assert ["is nested too deeply" in record.getMessage() for record in caplog.records] == [True]


@pytest.fixture
def bad_sectors(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files whose content gives EIO, by their names."""
    real, bad = os.read, set[str]()

    def read(descriptor: int, count: int) -> bytes:
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", read)
    return bad


@linux
@pytest.mark.usefixtures("no_pauses")
def test_an_error_of_the_disk_that_one_file_alone_gives_is_a_reject(tmp_path: Path, bad_sectors: set[str]) -> None:
    source = FolderSource(touch(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    bad_sectors.add("1.jpg")
    assert reject_of(source, "a/1.jpg") == ("unreadable", "Input/output error")
    assert read_item(source, Item(0, "b/2.jpg", None)) == b"x"


@linux
@pytest.mark.usefixtures("no_pauses")
def test_an_error_of_the_disk_that_other_files_give_too_stops_the_shard(tmp_path: Path, bad_sectors: set[str]) -> None:
    source = FolderSource(touch(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    bad_sectors |= {"1.jpg", "2.jpg", "3.jpg"}
    with pytest.raises(ShardError, match=r"reading 'a/1\.jpg' failed 4 times: Input/output error; check .* resume"):
        read_item(source, Item(0, "a/1.jpg", None))


@linux
@pytest.mark.usefixtures("no_pauses")
def test_an_error_of_the_disk_on_the_only_file_stops_the_shard(tmp_path: Path, bad_sectors: set[str]) -> None:
    bad_sectors.add("1.jpg")
    with pytest.raises(ShardError, match="failed 4 times"):
        read_item(FolderSource(touch(tmp_path, "a/1.jpg")), Item(0, "a/1.jpg", None))


@pytest.mark.usefixtures("no_pauses")
def test_a_file_that_is_never_ready_is_a_reject_after_some_tries(tmp_path: Path) -> None:
    source = FlakySource(touch(tmp_path, "a/1.jpg"), *[errno.EAGAIN] * 5)
    assert reject_of(source, "a/1.jpg") == ("unreadable", "Resource temporarily unavailable")
    assert len(source.errors) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV, errno.ENAMETOOLONG])
def test_what_the_system_will_not_read_as_a_file_is_a_reject(tmp_path: Path, number: int) -> None:
    source = FlakySource(touch(tmp_path, "a/1.jpg"), number)
    assert reject_of(source, "a/1.jpg") == ("unreadable", os.strerror(number))


class FlakySource(FolderSource):
    """Fails with the given errors, one at a read, then reads."""

    def __init__(self, location: Path, *errors: int) -> None:
        super().__init__(location)
        self.errors = list(errors)

    def read(self, item: Item) -> bytes:
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().read(item)


@pytest.mark.usefixtures("no_pauses")
def test_trouble_that_goes_away_leaves_no_trace(tmp_path: Path) -> None:
    source = FlakySource(touch(tmp_path, "a/1.jpg"), errno.EIO, errno.ESTALE, errno.EMFILE)
    assert read_item(source, Item(0, "a/1.jpg", None)) == b"x"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT])
def test_trouble_that_is_not_the_files_is_tried_four_times(tmp_path: Path, number: int) -> None:
    source = FlakySource(touch(tmp_path, "a/1.jpg"), *[number] * 5)
    with pytest.raises(ShardError, match="failed 4 times"):
        read_item(source, Item(0, "a/1.jpg", None))
    assert len(source.errors) == 1


def test_a_source_that_vanished_is_an_error_and_its_files_are_no_rejects(tmp_path: Path) -> None:
    root = touch(tmp_path / "disk", "a/1.jpg")
    source = FolderSource(root)
    source.check()
    root.rename(tmp_path / "unplugged")
    with pytest.raises(SourceError, match="is missing; mount it again, then run the same command to resume"):
        read_item(source, Item(0, "a/1.jpg", None))
    root.mkdir()  # the folder that a disk was mounted on is still there without it
    with pytest.raises(SourceError, match="is missing"):
        read_item(source, Item(0, "a/1.jpg", None))


# The status of files


def test_the_status_of_files_comes_in_their_order_however_slow_the_filesystem_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:03d}.jpg" for number in range(100)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * number)
    paths = [os.fsencode(tmp_path / name) for name in [*names, "missing.jpg", "nul\0.jpg"]]
    expected = [*range(100), None, None]
    sizes = [status and status.st_size for status in statuses(paths)]
    assert sizes == expected
    real, threads = os.stat, set[int]()

    def slow(path: bytes) -> os.stat_result:
        threads.add(threading.get_ident())
        time.sleep(0.002)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr("gpu_npz.sources.access.local.os.stat", slow)
        patch.setattr("gpu_npz.sources.access.local._devices", lambda _: {real(tmp_path).st_dev})
        found = statuses(paths)
    assert [status and status.st_size for status in found] == expected
    assert len(threads) > 8
    assert statuses([]) == []


def test_a_folder_of_tars_is_refused_with_the_pattern_that_reads_them(tmp_path: Path) -> None:
    touch(tmp_path, "shard-000000.tar", "shard-000001.tar")
    with pytest.raises(SourceError, match=rf"for the images in tars, give '{tmp_path}/\*\.tar'"):
        FolderSource(tmp_path)
