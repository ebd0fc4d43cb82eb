"""The plan: which item stands where, the same everywhere, small, and never made twice."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import MakeTree

from gpu_npz.builder.build import build
from gpu_npz.builder.planning import planned
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.job import Job
from gpu_npz.dataset.plan import Plan, collect
from gpu_npz.errors import FormatError, SourceError
from gpu_npz.machine.environment import Choice
from gpu_npz.npz.reader import NpzReader
from gpu_npz.npz.writer import NpzWriter
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Group, Item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.storage.local import LocalStorage

GROUPS = [
    Group(b"apples/", [b"a.jpg", b"b.jpg", b"c.jpg"], 0),
    Group(b"apples/red/", [b"a.jpg", b"dd.png"], 0),
    Group(b"berries/", [b"e.jpg", b"f.jpg", b"g.jpg", b"h.jpg", b"i.jpg"], 1),
    Group(b"cherries/", [b"j.jpg", b"k.jpg"], 2),
]
PATHS = [(group.folder + name).decode() for group in GROUPS for name in group.names]
LABELS = [group.label for group in GROUPS for _ in group.names]


def plan(shard_rows: int = 4, *, groups: list[Group] | None = None, **options: Any) -> Plan:
    return Plan(collect(groups or GROUPS, **options), shard_rows)


def everything(made: Plan) -> list[Item]:
    return made.items(0, made.item_count)


# Order, labels, paths


def test_items_stand_in_the_order_in_which_they_are_listed() -> None:
    made = plan()
    assert everything(made) == [Item(*each) for each in zip(range(12), PATHS, LABELS, strict=True)]
    assert made.labels().tolist() == LABELS


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (4, 6), (11, 12), (3, 12)])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_a_part_of_the_plan_is_the_same_as_in_the_whole(start: int, stop: int, shuffle: int | None) -> None:
    made = plan(shuffle=shuffle)
    assert made.items(start, stop) == everything(made)[start:stop]


def test_a_source_without_labels_gives_items_without_labels() -> None:
    made = plan(groups=[Group(b"", [b"b.jpg", b"c.jpg"], -1)])
    assert everything(made) == [Item(0, "b.jpg", None), Item(1, "c.jpg", None)]
    assert made.labels().tolist() == [-1, -1]


def test_folders_without_images_do_not_shift_anything() -> None:
    groups = [Group(b"a/", [], 0), Group(b"b/", [b"1.jpg"], 1), Group(b"c/", [], 2), Group(b"d/", [b"2.jpg"], 3)]
    assert everything(plan(groups=groups)) == [Item(0, "b/1.jpg", 1), Item(1, "d/2.jpg", 3)]


def test_names_that_are_not_utf8_and_very_long_ones_come_back_as_they_were() -> None:
    names = [b"\xff\xfe.jpg", "ü𝒳.jpg".encode(), b"x" * 251 + b".jpg"]
    made = plan(groups=[Group(b"caf\xe9/" + b"deep/" * 100, names, 0)])
    assert [os.fsencode(item.path) for item in everything(made)] == [b"caf\xe9/" + b"deep/" * 100 + n for n in names]
    assert everything(made)[0].path.endswith("\udcff\udcfe.jpg")


# Shards and batches


@pytest.mark.parametrize(("shard_rows", "lengths"), [(4, [4, 4, 4]), (5, [5, 5, 2]), (12, [12]), (100, [12])])
def test_shards_are_full_but_for_the_last_and_have_every_item_once(shard_rows: int, lengths: list[int]) -> None:
    made = plan(shard_rows)
    ranges = [made.shard_range(shard) for shard in range(made.shard_count)]
    assert [len(span) for span in ranges] == lengths
    assert [index for span in ranges for index in span] == list(range(12))


@pytest.mark.parametrize("shard_rows", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 256])
@pytest.mark.parametrize("shuffle", [None, 0])
def test_batches_never_cross_a_shard_and_together_are_the_plan(
    shard_rows: int, batch_size: int, shuffle: int | None
) -> None:
    made = plan(shard_rows, shuffle=shuffle)
    seen: list[Item] = []
    for shard in range(made.shard_count):
        batches = list(made.batches(shard, batch_size))
        assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert all(batch.shard == shard and 0 < len(batch.items) <= batch_size for batch in batches)
        assert [item.index for batch in batches for item in batch.items] == list(made.shard_range(shard))
        seen += [item for batch in batches for item in batch.items]
    assert seen == everything(made)


# Shuffle and limit


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_a_shuffle_is_a_permutation_that_keeps_every_label_with_its_path(seed: int) -> None:
    made = everything(plan(shuffle=seed))
    assert [item.path for item in made] != PATHS
    assert sorted((item.path, item.label) for item in made) == sorted(zip(PATHS, LABELS, strict=True))
    assert [item.index for item in made] == list(range(12))


def test_a_seed_means_the_same_order_everywhere_and_for_ever() -> None:
    assert collect(GROUPS, shuffle=0)["order"].tolist() == [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]
    assert collect(GROUPS, shuffle=2**63)["order"].tolist() == [9, 5, 4, 11, 3, 6, 8, 1, 0, 10, 2, 7]
    assert plan(shuffle=0).digest() == plan(shuffle=0).digest() != plan(shuffle=1).digest()


def test_a_limit_after_a_shuffle_takes_the_front_of_the_shuffled_order() -> None:
    whole = everything(plan(shuffle=3))
    for limit in (1, 5, 12, 99):
        assert everything(plan(shuffle=3, limit=limit)) == whole[:limit]


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 11, 12, 99])
def test_a_limit_without_a_shuffle_takes_the_first_items(limit: int) -> None:
    made = plan(limit=limit)
    assert everything(made) == everything(plan())[:limit]
    assert made.labels().tolist() == LABELS[:limit]


@pytest.mark.parametrize(("limit", "listed"), [(3, 1), (4, 2), (5, 2), (6, 3)])
def test_a_limit_without_a_shuffle_ends_the_listing_early(limit: int, listed: int) -> None:
    asked: list[bytes] = []

    def groups() -> Iterator[Group]:
        for group in GROUPS:
            asked.append(group.folder)
            yield group

    collect(groups(), limit=limit)
    assert len(asked) == listed


# Digest


def test_equal_plans_have_equal_digests() -> None:
    assert plan().digest() == plan().digest()


@pytest.mark.parametrize(
    "other",
    [
        {"shard_rows": 5},
        {"limit": 11},
        {"shuffle": 0},
        {"groups": GROUPS[::-1]},
        {"groups": [*GROUPS[:3], Group(b"cherries/", [b"j.jpg", b"k.jpg"], 3)]},
        {"groups": [*GROUPS[:3], Group(b"cherry/", [b"j.jpg", b"k.jpg"], 2)]},
        {"groups": [*GROUPS[:3], Group(b"cherries/", [b"j.jpg", b"K.jpg"], 2)]},
        {"groups": [*GROUPS[:3], Group(b"cherries/", [b"j.jp", b"gk.jpg"], 2)]},
        {"groups": [*GROUPS[:3], Group(b"cherriesj", [b".jpg", b"k.jpg"], 2)]},
        {"groups": [*GROUPS, Group(b"dates/", [b"l.jpg"], 2)]},
    ],
    ids=str,
)
def test_the_digest_changes_with_anything_that_decides_which_item_stands_where(other: dict[str, Any]) -> None:
    assert plan(**{"shard_rows": 4, **other}).digest() != plan().digest()


# Stored and opened again


def stored(folder: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays as they come back from a file."""
    with NpzWriter(folder / "plan.npz") as file:
        for name, array in arrays.items():
            file.add(name, array)
        file.close()
    reader = NpzReader(folder / "plan.npz")
    return {name: reader[name] for name in reader.directory.members}


@pytest.mark.parametrize("options", [{}, {"shuffle": 7}, {"shuffle": 7, "limit": 5}, {"limit": 5}], ids=str)
def test_a_plan_that_was_stored_is_the_same_plan(tmp_path: Path, options: dict[str, Any]) -> None:
    made = plan(**options)
    again = Plan(stored(tmp_path, dict(made.arrays)), 4)
    assert everything(again) == everything(made)
    assert again.digest() == made.digest()


@pytest.mark.parametrize("shuffle", [None, 0])
def test_a_large_plan_takes_at_most_40_bytes_an_item(tmp_path: Path, shuffle: int | None) -> None:
    def groups() -> Iterator[Group]:
        for label in range(200):
            yield Group(b"n%08d/" % label, [b"n%08d_%d.JPEG" % (label, 100 * n) for n in range(1000)], label)

    made = Plan(collect(groups(), shuffle=shuffle), 1024)
    assert made.item_count == 200_000
    assert sum(array.nbytes for array in made.arrays.values()) <= 40 * 200_000
    stored(tmp_path, dict(made.arrays))
    assert (tmp_path / "plan.npz").stat().st_size <= 40 * 200_000


DAMAGES: dict[str, tuple[str, Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "names cut off": ("names", lambda names: names[:-1]),
    "names of another type": ("names", lambda names: names.view(np.int8)),
    "folders cut off": ("folders", lambda folders: folders[:-1]),
    "an end lost": ("name_ends", lambda ends: ends[:-1]),
    "no item": ("name_ends", lambda ends: ends[:0]),
    "a group lost": ("group_ends", lambda ends: ends[:-1]),
    "a group too long": ("group_ends", lambda ends: ends + 1),
    "an empty group list": ("group_ends", lambda ends: ends[:0]),
    "a label lost": ("group_labels", lambda labels: labels[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_arrays_that_do_not_fit_each_other_are_refused(damage: str) -> None:
    name, change = DAMAGES[damage]
    arrays = collect(GROUPS)
    with pytest.raises(FormatError, match=r"do not fit each other \(.+\); run the build again with --overwrite"):
        Plan({**arrays, name: change(arrays[name])}, 4)


@pytest.mark.parametrize("name", ["names", "name_ends", "folders", "folder_ends", "group_ends", "group_labels"])
def test_arrays_of_which_one_is_missing_are_refused(name: str) -> None:
    arrays = collect(GROUPS)
    del arrays[name]
    with pytest.raises(FormatError):
        Plan(arrays, 4)


@pytest.mark.parametrize("kind", ["cut", "gone", "empty", "of another build"])
def test_a_damaged_plan_of_an_output_is_refused(make_tree: MakeTree, tmp_path: Path, kind: str) -> None:
    src, out = make_tree({"a/1.jpg": "jpeg", "b/2.jpg": "jpeg"}), tmp_path / "out"
    build(src, out, SETTINGS)
    path = out / ".gpu-npz/plan.npz"
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "of another build":
        stored(path.parent, collect(GROUPS))
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "cut" else b"")
    with pytest.raises(FormatError, match=r"plan\.npz"):
        build(src, out, SETTINGS)


# Never made again

SETTINGS = BuildConfig(size=16, shard_size=2, workers=0, device="cpu")


def test_a_build_that_goes_on_does_not_list_its_source_again(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = make_tree({f"{name}/{number}.jpg": "jpeg" for name in "ab" for number in range(3)}), tmp_path / "out"
    build(src, out, SETTINGS)
    whole = {path.name: path.read_bytes() for path in out.glob("*.npz")}
    (out / "shard-00001.npz").unlink()
    (src / "a/00.jpg").write_bytes(b"would be the second item of a new plan")
    monkeypatch.setattr(FolderSource, "groups", lambda _: pytest.fail("the source was listed again"))
    assert build(src, out, SETTINGS).built_shards == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.npz")} == whole


def test_a_plan_whose_images_are_gone_when_it_goes_on_still_has_them(make_tree: MakeTree, tmp_path: Path) -> None:
    src, out = make_tree({f"{name}/{number}.jpg": "jpeg" for name in "ab" for number in range(3)}), tmp_path / "out"
    build(src, out, SETTINGS)
    (out / "shard-00002.npz").unlink()
    (src / "b/1.jpg").unlink()
    report = build(src, out, SETTINGS)
    assert (report.items, report.rows, report.rejects_by_code) == (6, 5, {"missing": 1})


def test_a_job_has_the_plan_that_it_was_made_with(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name in "abc":
        (tmp_path / "src" / name).mkdir(parents=True)
    source = FolderSource(tmp_path / "src")
    job = Job.create(storage, plan(shuffle=1), SETTINGS, Choice("pillow"), source=source, image_size=(16, 16))
    again = Job.open(storage)
    assert again.record == job.record
    assert again.record.plan_digest == again.plan.digest() == plan(shuffle=1).digest()
    assert everything(again.plan) == everything(plan(shuffle=1))


def test_a_path_that_would_make_a_shard_much_larger_is_refused_and_long_ones_alike_are_not(tmp_path: Path) -> None:
    def job_of(names: list[str], shard_size: int) -> Job:
        (tmp_path / "t.csv").write_text("\n".join(["path", *names]))
        config = BuildConfig(size=8, device="cpu", shard_size=shard_size)
        source = open_source(tmp_path / "t.csv", config)
        return planned(LocalStorage(tmp_path / "out"), source, config, lambda _: None)[0]

    short, long = [f"{number}.jpg" for number in range(20_000)], "/".join(["x" * 200] * 20)
    with pytest.raises(SourceError, match=r"a path of 4023 bytes .* shard of 20001 rows, .* at most 268\.4 MB") as no:
        job_of([*short, f"{long}.jpg"], 100_000)
    (rows,) = re.findall(r"--shard-size (\d+) or less", str(no.value))
    assert job_of([*short, f"{long}.jpg"], int(rows)).plan.shard_count == 2
    shutil.rmtree(tmp_path / "out")
    assert job_of([f"{long}/{name}" for name in short], 100_000).plan.shard_count == 1
