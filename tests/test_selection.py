"""What a plan takes of a listing: so many of each class, sides of a split that share nothing."""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pack

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.builder.build import build, build_split
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.job import Job
from gpu_npz.dataset.plan import Plan
from gpu_npz.dataset.selection import listed
from gpu_npz.errors import FormatError, MismatchError, SourceError, StorageError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Group, Item, LabelColumn, Source
from gpu_npz.storage.local import LocalStorage


class Listing(Source):
    """Items that are listed and never read."""

    kind = "folder"
    location = "/listing"

    def __init__(self, *groups: Group, columns: tuple[LabelColumn, ...] = ()) -> None:
        self._groups = groups
        self.columns = columns

    def groups(self) -> Any:
        return iter(self._groups)

    def read(self, item: Item) -> bytes:
        raise NotImplementedError


def classes(*sizes: int) -> Listing:
    """So many items in each class."""
    return Listing(
        *(Group(b"%d/" % label, [b"%d.jpg" % at for at in range(size)], label) for label, size in enumerate(sizes))
    )


def taken(source: Source, **settings: Any) -> list[Item]:
    plan = Plan(listed(source, BuildConfig(**settings)), 1024)
    return plan.items(0, plan.item_count)


def sides(source: Source, split: str, **settings: Any) -> dict[str, list[str]]:
    names = ["train", *(part.partition("=")[0] for part in split.split(","))]
    return {name: [item.path for item in taken(source, split=f"{split}/{name}", **settings)] for name in names}


def folders(paths: list[str]) -> Counter[str]:
    return Counter(path.rpartition("/")[0] for path in paths)


@pytest.mark.parametrize("settings", [{}, {"shuffle": 3}, {"limit": 50}, {"shuffle": 3, "limit": 50}, {"per_class": 9}])
@pytest.mark.parametrize("split", ["val=0.1", "val=0.2,test=0.3"])
@pytest.mark.parametrize("split_by", [None, "label", "random", "folder"])
def test_each_item_is_on_one_side(settings: dict[str, Any], split: str, split_by: str | None) -> None:
    source = classes(30, 5, 1, 12, 40, 7)
    found = sides(source, split, split_by=split_by, **settings)
    together = [path for paths in found.values() for path in paths]
    assert sorted(together) == sorted(item.path for item in taken(source, **settings))
    assert len(together) == len({*together})
    order = [item.path for item in taken(source, **settings)]
    for paths in found.values():
        assert paths == sorted(paths, key=order.index)


def test_each_class_gives_its_share_and_keeps_one_to_train_on() -> None:
    source = classes(100, 50, 30, 1, 1, 9, 10)
    found = sides(source, "val=0.1")
    assert folders(found["val"]) == {"0": 10, "1": 5, "2": 3, "5": 1, "6": 1}
    assert len(found["train"]) == 201 - 20
    many = sides(classes(*[4] * 50), "val=0.1")
    assert len(many["val"]) == 20  # to the item, although a tenth of four is none


def test_random_takes_the_share_to_the_item() -> None:
    found = sides(classes(*[3] * 50), "val=0.1,test=0.02", split_by="random")
    assert {name: len(paths) for name, paths in found.items()} == {"train": 132, "val": 15, "test": 3}


def test_a_folder_is_never_torn_apart() -> None:
    rng = np.random.default_rng(0)
    source = Listing(
        *(Group(b"p%03d/" % patient, [b"%d.png" % at for at in range(rng.integers(1, 40))]) for patient in range(200))
    )
    found = sides(source, "val=0.1,test=0.2", split_by="folder")
    patients = {name: {*folders(paths)} for name, paths in found.items()}
    assert not patients["train"] & patients["val"]
    assert not patients["test"] & (patients["train"] | patients["val"])
    total = sum(map(len, found.values()))
    assert abs(len(found["val"]) - 0.1 * total) < 40
    assert abs(len(found["test"]) - 0.2 * total) < 40


def test_a_split_that_leaves_a_class_nothing_to_train_on_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sides(classes(10, 10, 10), "val=0.3", split_by="folder")
    assert [record.getMessage() for record in caplog.records] == [
        "--split val=0.3/train: train has no item of 1 of the 3 classes ('2'); --split-by label gives it some of each"
    ]
    caplog.clear()
    sides(classes(10, 10, 10), "val=0.3")
    assert not caplog.records


def test_what_has_no_name_of_an_image_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"a/1.jpg": b"", "a/IM0001": b"", "a/2.avif": b"", "b/.hidden": b"", "b/3.jpg": b""}
    for name, content in files.items():
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "images" / name).write_bytes(content)
    for src in (tmp_path / "images", pack(tmp_path / "images.tar", files)):
        caplog.clear()
        assert len(taken(open_source(src))) == 2
        (record,) = caplog.records
        assert ": 2 files are ignored because of their names (1 " in record.getMessage()
        assert "images have one of .bmp .dcm" in record.getMessage()


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("train/cat/1.jpg", "val/dog/2.jpg"), "'train', 'val'"),
        (("test/1.jpg", "train_set/2.jpg"), "'test', 'train_set'"),
        (("src/cat/1.jpg", "src/dog/2.jpg"), "'src'"),
        (("src/cat/1.jpg", "src/dog/2.jpg", "src/3.jpg"), None),
        (("train/1.jpg", "car/2.jpg"), None),
        (("train/1/2/3.jpg", "car/2.jpg"), None),
    ],
)
def test_classes_that_look_like_the_folder_above_are_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], classes: str | None
) -> None:
    source = open_source(pack(tmp_path / "images.tar", dict.fromkeys(names, b"")))
    taken(source)
    root = names[0].partition("/")[0]
    expected = (
        f"{source.location!r}: the only classes are {classes}; if the classes should be the folders below, --root "
        f"{root} takes those in that one"
    )
    assert [record.getMessage()[: len(expected)] for record in caplog.records] == [expected] * (classes is not None)


def saved(root: Path, *names: str) -> dict[str, Path]:
    """Files of these names, which may end with a slash, in a folder, a tar, a zip, and as a zip of the folder's own."""
    folder = root / "data set"
    for name in names:
        target = folder / name
        (target if name.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            target.touch()
    with tarfile.open(root / "a b.tar", "w") as tar, zipfile.ZipFile(root / "a b.zip", "w") as packed:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder), recursive=False)
            packed.write(path, path.relative_to(folder))
    return {"folder": folder, "tar": root / "a b.tar", "zip": root / "a b.zip"}


def remote(folder: Path) -> str:
    """The folder on a store of fsspec."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.rm("/bucket", recursive=True) if store.exists("/bucket") else None
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/{path.relative_to(folder)}", b"x")
    return "memory://bucket"


KINDS = ("folder", "tar", "zip", "remote")


def opened_as(kind: str, place: Path, *names: str, **settings: Any) -> Source:
    found = saved(place, *names)
    return open_source(remote(found["folder"]) if kind == "remote" else found[kind], BuildConfig(**settings))


SIDES = ("test/cat/3.jpg", "train/cat/1.jpg", "train/dog/2.jpg", "val/dog/2.jpg", "notes/a.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_sides_of_a_split_are_no_classes_unless_it_is_said(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError) as caught:
        opened_as(kind, tmp_path, *SIDES)
    message = str(caught.value)
    assert "has 'test', 'train', 'val' side by side, with the same folders in them ('cat', 'dog')" in message
    commands = re.findall(r"gpu-npz build (.+? OUT/\w+(?: --classes-from OUT/train)?)(?:, then|;)", message)
    train, test = ([*map(str, shlex.split(command))] for command in commands)
    settings = {"root": train[2]} if train[1] == "--root" else {}
    source = open_source(train[0], BuildConfig(**settings))
    assert (source.class_names, [item.path for item in taken(source)]) == (("cat", "dog"), ["cat/1.jpg", "dog/2.jpg"])
    assert test[:3] in (
        [train[0], "--root", "test"],
        [train[0].replace("/train", "/test"), "OUT/test", "--classes-from"],
    )
    assert opened_as(kind, tmp_path, labels="class-dir").class_names == ("notes", "test", "train", "val")
    assert len(taken(opened_as(kind, tmp_path, labels="none"), labels="none")) == 4
    source = opened_as(kind, tmp_path, root="val")
    assert (source.class_names, [item.path for item in taken(source)]) == (("dog",), ["dog/2.jpg"])


@pytest.mark.parametrize(
    ("names", "sides"),
    [
        (("Training/a/1.jpg", "Testing/a/2.jpg"), "'Testing', 'Training'"),
        (("training_set/a/1.jpg", "test_set/a/2.jpg"), "'test_set', 'training_set'"),
        (("train2017/a/1.jpg", "val2017/a/2.jpg", "car/1.jpg"), "'train2017', 'val2017'"),
        (("valid/a/1.jpg", "validation/b/2.jpg", "dev/a/3.jpg"), "'dev', 'valid', 'validation'"),
        (("train/car/1.jpg", "car/1.jpg", "bus/1.jpg"), None),
        (("train/a/1.jpg", "test/b/1.jpg"), None),
        (("train/1.jpg", "test/2.jpg"), None),
        (("train_station/a/1.jpg", "test_tube/a/1.jpg"), None),
        (("contest/a/1.jpg", "train/a/1.jpg"), None),
        (("train/.a/1.jpg", "train/1.jpg", "test/.a/2.jpg", "test/1.jpg"), None),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_side_is_called(tmp_path: Path, kind: str, names: tuple[str, ...], sides: str | None) -> None:
    if sides is None:
        assert opened_as(kind, tmp_path, *names).class_names
        return
    with pytest.raises(SourceError, match=f"has {sides} side by side"):
        opened_as(kind, tmp_path, *names)


def test_sides_in_a_folder_of_an_archive_are_built_with_both_folders_as_root(tmp_path: Path) -> None:
    names = [f"data/{name}" for name in SIDES]
    with pytest.raises(SourceError, match=r"gpu-npz build '.*a b\.zip' --root data/train OUT/train, then"):
        opened_as("zip", tmp_path, *names, root="data")
    assert opened_as("zip", tmp_path, root="data/train").class_names == ("cat", "dog")


def test_root_takes_a_folder_of_a_folder_and_none_out_of_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, *SIDES)["folder"]
    for root in ("train", "./train/", "val/../train", str(folder / "train")):
        source = open_source(folder, BuildConfig(root=root))
        assert (source.location, source.root, source.class_names) == (f"{folder}/train", None, ("cat", "dog"))
    for root in ("..", "../other", str(tmp_path), "s3://b/train", "a\0b"):
        with pytest.raises(UsageError, match=r"--root .*; give the path of a folder in SRC"):
            open_source(folder, BuildConfig(root=root))
    source = open_source(folder, BuildConfig(root=".", labels="class-dir"))
    assert source.class_names == ("notes", "test", "train", "val")
    with pytest.raises(SourceError, match=r"gone.*No such file or directory"):
        open_source(folder, BuildConfig(root="gone"))


def test_a_build_of_a_folder_by_root_is_that_of_the_folder(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "all" / "train")
    shutil.copytree(tree, tmp_path / "all" / "val")
    config = BuildConfig(device="cpu", size=8, workers=0)
    with pytest.raises(SourceError, match="'train', 'val' side by side"):
        build(tmp_path / "all", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    by_root = config.model_copy(update={"root": "train"})
    assert build(tmp_path / "all", tmp_path / "out", by_root).classes == 3
    assert build(tmp_path / "all", tmp_path / "out", by_root).built_shards == 0
    assert build(tmp_path / "all" / "train", tmp_path / "out", config).built_shards == 0
    assert gpu_npz.verify(tmp_path / "out").ok
    assert not compare(tmp_path / "out", 5).problems
    assert build(tmp_path / "all", tmp_path / "both", config.model_copy(update={"labels": "class-dir"})).classes == 2


CLUTTER = (
    "__MACOSX/cat/._1.jpg", "__MACOSX/cat/1.jpg", "__MACOSX/9.jpg", "cat/._1.jpg", "cat/.DS_Store", "cat/Thumbs.db",
    "cat/thumbs.db", "cat/desktop.ini", ".DS_Store", "._cat", "cat/__MACOSX/2.jpg", "@eaDir/1.jpg", "dog/@eaDir/x.jpg",
    ".cache/1.jpg", "$RECYCLE.BIN/1.jpg", "System Volume Information/1.jpg", "lost+found/",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_systems_leave_behind_is_neither_image_nor_class(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = opened_as(kind, tmp_path, "cat/1.jpg", "dog/2.jpg", *CLUTTER)
    assert source.class_names == ("cat", "dog")
    assert [(item.path, item.label) for item in taken(source)] == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]
    assert not source.left_out
    assert not caplog.records
    flat = opened_as(kind, tmp_path / "flat", "1.jpg", *CLUTTER[:11], labels="none")
    assert [item.path for item in taken(flat)] == ["1.jpg"]


def test_what_systems_leave_behind_does_not_hide_the_form_of_a_source(tmp_path: Path) -> None:
    samples = {"._1.jpg": b"", "._1.cls": b"", "1.jpg": b"", "1.cls": b"4", "__MACOSX/1.jpg": b"", "a/.b/2.jpg": b""}
    source = open_source(pack(tmp_path / "w.tar", samples))
    assert (source.kind, [(item.path, item.label) for item in taken(source)]) == ("webdataset", [("1.jpg", 4)])
    (tmp_path / "p" / "__MACOSX").mkdir(parents=True)
    (tmp_path / "p" / "._a.parquet").touch()
    (tmp_path / "p" / "a.parquet").touch()
    with pytest.raises(SourceError, match=r"a\.parquet.*is no whole Parquet file"):
        open_source(tmp_path / "p")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_class_folders_without_images_are_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source = opened_as(kind, tmp_path, "a/1.jpg", "b/", "c/.hidden.jpg", "d/e/", "f/deep/2.jpg")
    assert source.class_names == ("a", "b", "c", "d", "f")
    for _ in range(2):
        caplog.clear()
        assert [item.label for item in taken(source)] == [0, 4]
        (record,) = caplog.records
        assert "3 class folders have no images, but keep their class numbers" in record.getMessage()
        assert "('b', 'c', 'd'); remove those" in record.getMessage()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_one_class_is_said_to_have_no_labels(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = opened_as(kind, tmp_path, "1.jpg", "2.jpg", "metadata.csv")
    assert [item.label for item in taken(source)] == [None, None]
    (message,) = [text for record in caplog.records if "no labels" in (text := record.getMessage())]
    assert message.startswith(f"{source.location!r} has images and no class folders, so the dataset has no labels; ")
    above = f"if 'data set' is a class, give the folder of all classes, '{tmp_path}'; "
    assert (above in message) == ("if a table there has labels (.csv), --labels FILE" in message) == (kind == "folder")
    assert message.endswith("; add --labels none if it has none")
    caplog.clear()
    taken(opened_as(kind, tmp_path, labels="none"), labels="none")
    assert not any("no labels" in record.getMessage() for record in caplog.records)


def test_frames_are_not_doubted(caplog: pytest.LogCaptureFixture) -> None:
    source = Listing(Group(b"ct/", [b"1.dcm/0000", b"1.dcm/0001"], 0))
    source.class_names = ("ct",)
    taken(source)
    assert not caplog.records


def test_classes_of_a_table_are_not_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("path,label\ntrain/2020/1.jpg,train\n")
    taken(open_source(tmp_path / "t.csv"))
    assert not caplog.records


def test_the_keys_of_a_source_are_never_torn_apart() -> None:
    keys = [b"%d" % (at % 17) for at in range(100)]
    source = Listing(Group(b"", [b"%d.png" % at for at in range(100)], keys=keys))
    found = sides(source, "val=0.2", split_by="patient")
    of = {name: {int(path.split(".")[0]) % 17 for path in paths} for name, paths in found.items()}
    assert of["train"] | of["val"] == {*range(17)}
    assert not of["train"] & of["val"]
    assert 10 <= len(found["val"]) <= 30


def test_the_seed_of_a_split_decides_and_the_shuffle_does_not() -> None:
    source = classes(40, 40)
    val = sides(source, "val=0.25")["val"]
    assert {*sides(source, "val=0.25", shuffle=5)["val"]} == {*val}
    assert {*sides(source, "val=0.25", split_seed=1)["val"]} != {*val}


def test_per_class_takes_the_first_of_each_class() -> None:
    source = classes(5, 1, 3)
    assert folders([item.path for item in taken(source, per_class=2)]) == {"0": 2, "1": 1, "2": 2}
    assert [item.path for item in taken(source, per_class=1)] == ["0/0.jpg", "1/0.jpg", "2/0.jpg"]
    shuffled = [item.path for item in taken(source, shuffle=0)]
    first = [next(path for path in shuffled if path.startswith(f"{label}/")) for label in range(3)]
    assert {item.path for item in taken(source, shuffle=0, per_class=1)} == {*first}


def test_labels_of_their_own_are_split_by_too() -> None:
    labels = np.array([0] * 60 + [7] * 40)
    source = Listing(
        Group(b"", [b"%d.jpg" % at for at in range(100)], labels=labels),
        columns=(LabelColumn(name="grade", kind="integer"),),
    )
    val = sides(source, "val=0.1")["val"]
    assert Counter(int(path.split(".")[0]) >= 60 for path in val) == {False: 6, True: 4}


SEVERAL = Listing(
    Group(b"", [b"1.jpg", b"2.jpg"], labels=np.zeros((2, 3))),
    columns=tuple(LabelColumn(name=name, kind="float") for name in "abc"),
)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (classes(3, 3), {"split": "val=0.01/val"}, "'val' would get none of the 6 items of '/listing'; give larger"),
        (classes(1, 1), {"split": "val=0.5/val"}, r"2 items .*\(with label, the only item of a class stays in train\)"),
        (classes(3, 3), {"split": "val=0.2/val", "split_by": "patient"}, "no such column"),
        (SEVERAL, {"split": "val=0.5/val", "split_by": "label"}, "no single column"),
        (SEVERAL, {"per_class": 3}, "has no classes; --limit N takes N"),
    ],
)
def test_what_cannot_be_taken_is_said(source: Source, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        taken(source, **settings)


@pytest.mark.parametrize(
    "split", ["", "val", "val=", "val=0", "val=1", "val=0.5,test=0.5", "train=0.1", "val=.1,val=.2", "a/b=.1", "v=.1/x"]
)
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UsageError, match=r"split: got .*NAME=SHARE"):
        BuildConfig(split=split)


def test_a_split_is_read() -> None:
    config = BuildConfig(split=" val=.10, test=0.25/test")
    assert (config.split, config.side) == ("val=0.1,test=0.25/test", "test")
    assert {name: float(share) for name, share in config.shares.items()} == {"val": 0.1, "test": 0.25}
    with pytest.raises(UsageError, match="require --split"):
        BuildConfig(split_seed=1)


def test_no_digit_of_a_share_is_lost() -> None:
    config = BuildConfig(split="val=0.3333333,test=.6666666,tiny=0.00000001")
    assert config.split == "val=0.3333333,test=0.6666666,tiny=0.00000001"
    assert BuildConfig(**config.model_dump()) == config


SETTINGS: dict[str, Any] = {"device": "cpu", "size": 16, "workers": 0, "split": "val=0.25"}


def test_a_split_builds_datasets_with_the_same_classes(tree: Path, tmp_path: Path) -> None:
    told = set()
    reports = build_split(tree, tmp_path / "out", BuildConfig(**SETTINGS), progress=lambda side, event: told.add(side))
    assert [*reports] == ["train", "val"]
    assert told == {"train", "val"}
    train, val = (gpu_npz.open_dataset(tmp_path / "out" / side) for side in ("train", "val"))
    assert train.class_names == val.class_names
    whole = build(tree, tmp_path / "whole", BuildConfig(**{**SETTINGS, "split": None}))
    assert len(train) + len(val) == whole.rows
    assert not {*train.paths[:]} & {*val.paths[:]}
    again = build_split(tree, tmp_path / "out", BuildConfig(**SETTINGS))
    assert [report.built_shards for report in again.values()] == [0, 0]
    for side in reports:
        assert gpu_npz.verify(tmp_path / "out" / side).ok
    with pytest.raises(FormatError, match=r"is not a dataset, but holds train, val; give one of them, .*out/train"):
        gpu_npz.open_dataset(tmp_path / "out")
    with pytest.raises(StorageError, match="is a dataset already; choose another OUT for the sides"):
        build_split(tree, tmp_path / "whole", BuildConfig(**SETTINGS))
    with pytest.raises(MismatchError, match="split-seed: existing 0, requested 1"):
        build_split(tree, tmp_path / "out", BuildConfig(**SETTINGS, split_seed=1))
    with pytest.raises(UsageError, match="call build_split, or name one"):
        build(tree, tmp_path / "other", BuildConfig(**SETTINGS))


def test_sides_are_of_one_listing_or_of_none(tree: Path, tmp_path: Path) -> None:
    src, out = Path(shutil.copytree(tree, tmp_path / "src")), tmp_path / "out"
    build_split(src, out, BuildConfig(**SETTINGS))
    shutil.rmtree(out / "val")  # as it is where the build was stopped between the two
    picture = next(src.glob("*/*.jpg"))
    more = Path(shutil.copy(picture, picture.with_name("0.jpg")))
    with pytest.raises(MismatchError, match=r"changed since another side of this split was begun: .* all sides"):
        build_split(src, out, BuildConfig(**SETTINGS))
    assert not (out / "val/.gpu-npz/job.json").exists()
    more.unlink()
    assert build_split(src, out, BuildConfig(**SETTINGS))["val"].complete
    shutil.copy(picture, more)
    reports = build_split(src, out, BuildConfig(**SETTINGS, overwrite=True))
    whole = build(src, tmp_path / "whole", BuildConfig(**{**SETTINGS, "split": None}))
    assert sum(report.items for report in reports.values()) == whole.items


def test_statistics_are_those_of_train_on_both_sides(tree: Path, tmp_path: Path) -> None:
    build_split(tree, tmp_path, BuildConfig(**SETTINGS, normalize="dataset"))
    train, val = (Job.open(LocalStorage(tmp_path / side)).settings for side in ("train", "val"))
    assert train.mean is not None
    assert (train.mean, train.std) == (val.mean, val.std)
    build_split(tree, tmp_path, BuildConfig(**SETTINGS, normalize="dataset"))
