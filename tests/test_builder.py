"""build(): every item once, the same bytes however it was run, and what happens when something is in the way."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeTree, contents, cpu_config, edit_json, file_bytes, progressed, reject_lines

import gpu_npz
from gpu_npz.builder.build import build, build_split
from gpu_npz.builder.estimate import estimate
from gpu_npz.builder.report import BuildReport, Started
from gpu_npz.builder.watch import Moment
from gpu_npz.config import BuildConfig, load_toml, settings_of
from gpu_npz.dataset.job import Job
from gpu_npz.dataset.manifest import Manifest
from gpu_npz.errors import (
    FormatError,
    IncompleteError,
    MismatchError,
    RejectedError,
    RejectLimitError,
    ShardError,
    SourceError,
    StorageError,
    UsageError,
)
from gpu_npz.machine.tuning import Tuning
from gpu_npz.npz.writer import NpzWriter
from gpu_npz.sources.access.local import LocalFiles
from gpu_npz.sources.base import Item
from gpu_npz.storage.local import LocalStorage
from gpu_npz.workers.events import Committed, Event, Progress, WorkerEnded
from gpu_npz.workers.worker import interleaved_batches

# 22 items in shards of four: the third shard has only bad files, the last one is short.
FILES = {
    "a/0.jpg": "jpeg", "a/1.jpg": "half", "a/2.jpg": "gray", "a/3.jpg": "empty",
    "a/4.jpg": "cmyk", "a/5.jpg": "text", "a/6.png": "palette", "a/deep/7.jpg": "exif-6",
    "b/0.jpg": "zeros", "b/1.jpg": "two-bytes", "b/2.jpg": "claims-65500", "b/3.jpg": "no-eoi",
    "b/4.jpg": "jpeg", "b/5.jpg": "progressive", "b/6.jpg": "png-named-jpg", "b/7.jpg": "jpeg",
    "caf\udce9/0.jpg": "jpeg", "caf\udce9/1.jpg": "gray16", "caf\udce9/\udcff.jpg": "text", "d/0.jpg": "jpeg",
}  # fmt: skip
ITEMS = 22  # and two links that lead nowhere
TEXT = "the content is not a known image format"
REJECTS = [
    ("a/1.jpg", 1, "decode", "truncated", None),  # None: the words are Pillow's, and change with it
    ("a/3.jpg", 3, "read", "empty", "zero bytes"),
    ("a/5.jpg", 5, "decode", "not-an-image", TEXT),
    ("b/0.jpg", 8, "decode", "not-an-image", TEXT),
    ("b/1.jpg", 9, "decode", "not-an-image", TEXT),
    ("b/2.jpg", 10, "decode", "too-large", "65500 x 65500 pixels; at most 89478485"),
    ("b/3.jpg", 11, "decode", "truncated", None),
    ("caf\udce9/\udcff.jpg", 18, "decode", "not-an-image", TEXT),
    ("d/gone.jpg", 20, "read", "missing", "No such file or directory"),
    ("d/loop.jpg", 21, "read", "unreadable", "Too many levels of symbolic links"),
]


settings = functools.partial(cpu_config, shard_size=4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with bad files in it. Read only: all tests share it."""
    root = tmp_path_factory.mktemp("mixed")
    for seed, (name, kind) in enumerate(FILES.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes(kind, seed=seed, size=(30, 40)))
    (root / "d/gone.jpg").symlink_to("nowhere.jpg")
    (root / "d/loop.jpg").symlink_to("loop.jpg")
    return root


@pytest.fixture(scope="module")
def whole(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed`, built undisturbed. Read only: all tests share it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    build(mixed, out, settings())
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def copied(whole: Path, out: Path) -> Path:
    """A copy of `whole`, to be damaged."""
    shutil.copytree(whole, out)
    return out


@pytest.fixture
def pictures(make_tree: MakeTree) -> Path:
    """Eight pictures in two classes, of one's own."""
    return make_tree({f"{name}/{number}.jpg": "jpeg" for name in "ab" for number in range(4)})


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("shard-*.npz"))


def column(out: Path, name: str) -> list[Any]:
    """One member of all shards, by plain NumPy."""
    return [entry for shard in shards(out) for entry in np.load(out / shard)[name].tolist()]


def planned(out: Path) -> list[Item]:
    plan = Job.open(LocalStorage(out)).plan
    return plan.items(0, plan.item_count)


# Every item once


@pytest.mark.parametrize("options", [{}, {"shuffle": 3}, {"shuffle": 3, "limit": 13}, {"limit": 13}], ids=str)
def test_every_planned_item_is_exactly_one_row_or_one_reject(mixed: Path, out: Path, options: dict[str, Any]) -> None:
    report = build(mixed, out, settings(**options))
    items = planned(out)
    assert len(items) == report.items == options.get("limit", ITEMS)
    rows = list(zip(column(out, "index"), column(out, "paths"), column(out, "labels"), strict=True))
    rejects = [(line["index"], line["path"]) for line in reject_lines(out)]
    assert sorted(rows + [(*each, None) for each in rejects]) == sorted(
        (item.index, item.path, None if (item.index, item.path) in rejects else item.label) for item in items
    )
    assert (report.rows, report.rejects) == (len(rows), len(rejects))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert gpu_npz.verify(out).ok


def test_rejects_are_listed_with_place_stage_code_and_detail(whole: Path) -> None:
    lines = reject_lines(whole)
    assert [list(line) for line in lines] == [["path", "index", "stage", "code", "detail"]] * len(REJECTS)
    for line, expected in zip(lines, REJECTS, strict=True):
        assert tuple(line.values())[:4] == expected[:4]
        assert line["detail"] == expected[4] or (expected[4] is None and "truncated" in line["detail"])
    manifest = Manifest.load(whole)
    assert manifest.counts.rejects_by_code == Counter(reject[3] for reject in REJECTS)
    assert (manifest.counts.items, manifest.counts.rows, manifest.counts.shards) == (ITEMS, ITEMS - len(REJECTS), 6)


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_files_that_are_written_to_while_a_build_reads_them_are_reported(
    make_tree: MakeTree, out: Path, backend: str
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    src = make_tree({f"a/{number}.jpg": "jpeg" for number in range(8)})
    config = settings(backend=backend, batch_size=1, max_rejects="100%")
    assert build(src, out, config).changed_files == 0

    def disturb(event: Started | Event) -> None:
        if isinstance(event, Progress):
            (src / "a/6.jpg").unlink(missing_ok=True)
            partial.write_bytes(whole[:-40])  # a download that goes on; moved, so that no reader sees it empty
            partial.replace(src / "a/7.jpg")

    whole, partial = (src / "a/7.jpg").read_bytes(), out.with_name("7.jpg.part")
    report = build(src, out.with_name("disturbed"), config, progress=disturb)
    assert (report.rejects_by_code, report.changed_files) == ({"missing": 1, "truncated": 1}, 1)
    assert report.hints[0].startswith("1 file changed or went missing while the build read them")
    assert report.hints[0].endswith(f"lists the rows that differ: gpu-npz verify {out.with_name('disturbed')} --deep 6")


def test_the_report_says_what_was_built(mixed: Path, out: Path) -> None:
    report = build(mixed, out, settings(batch_size=3))
    values = report.to_json()
    assert report == BuildReport(
        **{
            **values,
            "tuning": Tuning(**values["tuning"]),
            "timeline": tuple(Moment(**each) for each in values["timeline"]),
        }
    )
    assert report.timeline[0].worker == os.getpid()
    assert report.timeline[0].memory_bytes > 10**7
    assert report.timeline[0].open_files > 2
    assert report.worker_memory_bytes > 10**7
    assert (report.complete, report.out, report.backend, report.device) == (True, str(out), "pillow", "cpu")
    assert (report.shards, report.built_shards, report.built_items, report.tuning.workers) == (6, 6, ITEMS, 0)
    assert report.tuning.batch_size == 3
    assert report.dataset_bytes == sum((out / shard).stat().st_size for shard in shards(out))
    assert set(report.stage_seconds) == {"read", "decode", "normalize", "transfer", "write", "check", "commit"}
    assert report.bottleneck in report.stage_seconds
    assert "--shuffle SEED" in report.hints[-1]
    stored = json.loads((out / ".gpu-npz/report.json").read_text())
    assert stored.items() >= json.loads(json.dumps(report.to_json())).items()
    again = build(mixed, out, settings())
    assert (again.complete, again.built_shards, again.built_items, again.bottleneck) == (True, 0, 0, None)
    assert json.loads((out / ".gpu-npz/report.json").read_text()) == stored


def test_a_shard_of_nothing_but_rejects_is_a_shard_without_rows(whole: Path) -> None:
    shard = np.load(whole / "shard-00002.npz")
    assert shard["images"].shape == (0, 3, 16, 16)
    assert [len(shard[name]) for name in ("labels", "paths", "index", "source_bytes")] == [0] * 4


def test_images_of_one_folder_have_no_labels(make_tree: MakeTree, out: Path) -> None:
    report = build(make_tree({"b.jpg": "jpeg", "a.jpg": "jpeg", "c.jpg": "half"}), out, settings())
    assert report.rows == 2
    assert not any("--shuffle" in hint for hint in report.hints)
    assert column(out, "paths") == ["a.jpg", "b.jpg"]
    assert "labels" not in np.load(out / "shard-00000.npz")
    assert (Manifest.load(out).classes, gpu_npz.open_dataset(out).labels) == (None, None)
    assert gpu_npz.verify(out).ok


def test_names_that_are_not_utf8_survive_a_resumed_build(mixed: Path, copied: Path, whole: Path) -> None:
    assert Manifest.load(copied).classes == ("a", "b", "caf\udce9", "d")
    assert "caf\udce9/0.jpg" in column(copied, "paths")
    (copied / "shard-00000.npz").unlink()
    build(mixed, copied, settings())
    assert contents(copied) == contents(whole)


# The same bytes however it was run


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 7},
        {"batch_size": 32},
        {"workers": 2},
        {"open_shards": 2},
        {"open_shards": 64, "batch_size": 3},
        {"open_shards": 3, "batch_size": 1, "workers": 2},
    ],
    ids=str,
)
def test_the_output_is_the_same_however_it_was_run(
    mixed: Path, whole: Path, out: Path, options: dict[str, Any]
) -> None:
    build(mixed, out, settings(**options))
    assert contents(out) == contents(whole)


def test_batches_that_do_not_fit_into_a_shard_evenly_make_the_same_output(mixed: Path, tmp_path: Path) -> None:
    options = {"shard_size": 10, "shuffle": 1, "on_reject": "blank", "layout": "NHWC", "dtype": "float16"}
    made = []
    for batch_size in (1, 3, 32):
        build(mixed, tmp_path / str(batch_size), settings(batch_size=batch_size, open_shards=batch_size, **options))
        made.append(contents(tmp_path / str(batch_size)))
    assert made[0] == made[1] == made[2]


# Shards


@pytest.mark.parametrize(
    ("size", "dtype", "rows"),
    [("5", "float32", 5), ("99", "float32", 99), ("10kB", "float32", 3), ("10KiB", "uint8", 13), ("768B", "uint8", 1)],
)
def test_a_shard_has_the_rows_or_the_bytes_that_were_asked_for(
    mixed: Path, out: Path, size: str, dtype: str, rows: int
) -> None:
    report = build(mixed, out, settings(shard_size=size, dtype=dtype))
    assert Manifest.load(out).shard_items == rows
    assert report.shards == len(shards(out)) == -(-ITEMS // rows)
    assert gpu_npz.verify(out).ok


def test_a_shard_smaller_than_an_image_is_a_usage_error_and_begins_nothing(mixed: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="shard-size: got 767B, but one image takes 768 bytes"):
        build(mixed, out, settings(shard_size="767B", dtype="uint8"))
    assert contents(out) == {}


def test_above_ten_thousand_shards_they_lie_in_folders(tmp_path: Path, out: Path) -> None:
    # The build is stopped after its first shards: what is looked at is where they lie.
    src = tmp_path / "images"
    (src / "a").mkdir(parents=True)
    (src / "a/00000.jpg").write_bytes(file_bytes("jpeg"))
    for number in range(1, 10_001):
        os.link(src / "a/00000.jpg", src / f"a/{number:05}.jpg")

    class Enough(Exception):
        pass

    def stop(event: Started | Event) -> None:
        if isinstance(event, Committed):
            raise Enough

    config = settings(shard_size=1, size=1, dtype="uint8")
    with pytest.raises(Enough):
        build(src, out, config, progress=stop)
    assert (out / "00/shard-00000.npz").exists()
    assert (out / ".gpu-npz/commits/00/shard-00000.json").exists()
    with pytest.raises(IncompleteError, match=r"\d+ of 10001 shards"):
        Manifest.load(out)
    build(src, out, config.model_copy(update={"limit": 1, "overwrite": True}))
    assert sorted(contents(out)) == [
        ".gpu-npz/commits/shard-00000.json", ".gpu-npz/job.json", ".gpu-npz/plan.npz", "dataset.json", "index.npz",
        "rejects.jsonl", "shard-00000.npz",
    ]  # fmt: skip
    assert not (out / "00").exists()


# Rejects


def test_blank_rows_stand_for_rejects_and_are_marked(mixed: Path, whole: Path, out: Path) -> None:
    report = build(mixed, out, settings(on_reject="blank"))
    assert (report.rows, report.rejects) == (ITEMS, len(REJECTS))
    assert contents(out)["rejects.jsonl"] == contents(whole)["rejects.jsonl"]
    bad = [reject[1] for reject in REJECTS]
    valid = np.array(column(out, "valid"))
    assert np.flatnonzero(~valid).tolist() == bad
    assert column(out, "index") == list(range(ITEMS))
    images = np.concatenate([np.load(out / shard)["images"] for shard in shards(out)])
    assert not images[~valid].any()
    skipped = [np.load(whole / shard)["images"] for shard in shards(whole)]
    assert np.array_equal(images[valid], np.concatenate(skipped))
    sizes = {item.path: size for item, size in zip(planned(out), column(out, "source_bytes"), strict=True)}
    assert sizes["a/1.jpg"] == (mixed / "a/1.jpg").stat().st_size
    assert sizes["d/gone.jpg"] == sizes["a/3.jpg"] == 0
    assert gpu_npz.verify(out).ok


@pytest.mark.parametrize("workers", [1, 2])
def test_under_on_reject_fail_the_first_reject_stops_the_build(pictures: Path, out: Path, workers: int) -> None:
    good = (pictures / "b/3.jpg").read_bytes()
    (pictures / "b/3.jpg").write_bytes(good[:-100])
    config = settings(on_reject="fail", shard_size=2, workers=workers)
    with pytest.raises(RejectedError, match=r"'b/3\.jpg' is rejected at decode: truncated \(.*fix the file") as caught:
        build(pictures, out, config)
    assert caught.value.exit_code == 1
    assert "shard-00003.npz" not in shards(out)
    assert not (out / "dataset.json").exists()
    (pictures / "b/3.jpg").write_bytes(good)
    assert (build(pictures, out, config).rows, gpu_npz.verify(out).ok) == (8, True)


def test_too_many_rejects_leave_shards_and_list_and_a_higher_limit_finishes_at_once(
    mixed: Path, whole: Path, out: Path
) -> None:
    for _ in range(2):
        with pytest.raises(RejectLimitError, match=r"10 of 22 items .*allows 9.*higher --max-rejects") as caught:
            build(mixed, out, settings(max_rejects=9))
        assert caught.value.exit_code == 3
        assert contents(out) == {
            name: data for name, data in contents(whole).items() if name not in ("dataset.json", "index.npz")
        }
    with pytest.raises(IncompleteError):
        Manifest.load(out)
    before = {shard: (out / shard).stat().st_mtime_ns for shard in shards(out)}
    report = build(mixed, out, settings(max_rejects=10))
    assert (report.complete, report.built_shards) == (True, 0)
    assert {shard: (out / shard).stat().st_mtime_ns for shard in shards(out)} == before
    assert contents(out) == contents(whole)
    assert build(mixed, out, settings(max_rejects=0)).complete  # what is finished stays finished


def test_a_percentage_of_rejects_never_means_fewer_than_ten(mixed: Path, out: Path) -> None:
    assert build(mixed, out, settings(max_rejects="0%")).rejects == 10


def test_a_file_that_vanishes_after_planning_is_a_reject(pictures: Path, out: Path) -> None:
    def remove(event: Started | Event) -> None:
        if isinstance(event, Started):
            (pictures / "b/2.jpg").unlink()

    report = build(pictures, out, settings(), progress=remove)
    assert (report.rows, report.rejects_by_code) == (7, {"missing": 1})
    assert reject_lines(out)[0]["path"] == "b/2.jpg"


# Resume


def damage(out: Path, how: str) -> None:
    match how:
        case "shards lost":
            (out / "shard-00000.npz").unlink()
            (out / "shard-00004.npz").unlink()
        case "records lost":
            (out / ".gpu-npz/commits/shard-00001.json").unlink()
            (out / ".gpu-npz/commits/shard-00005.json").unlink()
        case "all shards lost":
            for path in [*out.glob("shard-*.npz"), *out.glob(".gpu-npz/commits/*")]:
                path.unlink()
        case "a shard cut":
            os.truncate(out / "shard-00001.npz", 5000)
        case "a shard grown":
            with open(out / "shard-00001.npz", "ab") as file:
                file.write(b"x")
        case "manifest lost":
            (out / "dataset.json").unlink()
        case "index lost":
            (out / "index.npz").unlink()
        case "rejects lost":
            (out / "rejects.jsonl").unlink()
        case "temporaries left":
            (out / "dataset.json").unlink()
            for name in ("shard-00000.npz", "dataset.json", ".gpu-npz/job.json", ".gpu-npz/commits/shard-00000.json"):
                path = out / name
                path.with_name(f".{path.name}.12345-6.tmp").write_bytes(b"half")
        case "a record of another shard":
            records = out / ".gpu-npz/commits"
            shutil.copy(records / "shard-00000.json", records / "shard-00001.json")
        case "a record of another dataset":
            edit_json(out / ".gpu-npz/commits/shard-00001.json", lambda record: record.update(id="0" * 32))


@pytest.mark.parametrize(
    ("how", "built"),
    [
        ("shards lost", 2), ("records lost", 2), ("all shards lost", 6), ("a shard cut", 1), ("a shard grown", 1),
        ("manifest lost", 0), ("index lost", 0), ("rejects lost", 0), ("temporaries left", 0),
        ("a record of another shard", 1), ("a record of another dataset", 1),
    ],
)  # fmt: skip
def test_what_is_lost_is_built_again_and_nothing_else(
    mixed: Path, whole: Path, copied: Path, how: str, built: int
) -> None:
    damage(copied, how)
    report = build(mixed, copied, settings(max_rejects=ITEMS, batch_size=3))
    assert (report.complete, report.built_shards) == (True, built)
    assert contents(copied) == contents(whole)


def test_a_build_that_lost_shards_to_two_workers_is_whole_again(mixed: Path, whole: Path, copied: Path) -> None:
    damage(copied, "shards lost")
    assert build(mixed, copied, settings(workers=2)).tuning.workers == 2
    assert contents(copied) == contents(whole)


def test_a_dataset_that_lost_a_shard_is_not_complete_while_it_is_built_again(mixed: Path, copied: Path) -> None:
    damage(copied, "shards lost")
    seen = []

    def look(event: Started | Event) -> None:
        if isinstance(event, Progress):
            seen.append((copied / "dataset.json").exists())

    build(mixed, copied, settings(), progress=look)
    assert set(seen) == {False}
    assert (copied / "dataset.json").exists()


OTHER: dict[str, dict[str, Any]] = {
    "reproducible": {"reproducible": True},
    "size": {"size": "16x17"},
    "resize_mode": {"resize_mode": "pad"},
    "crop_pct": {"crop_pct": 0.5},
    "pad_value": {"pad_value": 7},
    "interpolation": {"interpolation": "nearest"},
    "reduced_decoding": {"reduced_decoding": False},
    "exif_orientation": {"exif_orientation": False},
    "background": {"background": "1,2,3"},
    "dicom_window": {"dicom_window": "-100,300"},
    "max_pixels": {"max_pixels": 10**6},
    "channels": {"channels": "bgr"},
    "bit_depth": {"bit_depth": 16},
    "normalize": {"normalize": "unit"},
    "mean": {"mean": "0.5,0.5,0.5", "std": "1,1,1"},
    "std": {"mean": "0,0,0", "std": "0.1,0.2,0.3"},
    "window": {"window": "20,200"},
    "dtype": {"dtype": "uint8"},
    "clip": {"clip": True},
    "layout": {"layout": "NHWC"},
    "shard_size": {"shard_size": "5"},
    "compress": {"compress": "deflate"},
    "shuffle": {"shuffle": 0},
    "limit": {"limit": 21},
    "on_reject": {"on_reject": "blank"},
    "labels": {"labels": "none"},
    "per_class": {"per_class": 3},
    "split": {"split": "val=0.1/train"},
    "split_by": {"split": "val=0.1/train", "split_by": "random"},
    "split_seed": {"split": "val=0.1/train", "split_seed": 1},
}


@pytest.mark.parametrize("name", [name for name in settings_of("identity") if name not in ("image_column", "scale")])
def test_another_value_of_an_identity_setting_does_not_resume(mixed: Path, copied: Path, name: str) -> None:
    before = contents(copied)
    with pytest.raises(MismatchError) as caught:
        build(mixed, copied, settings(**OTHER[name]))
    lines = str(caught.value).splitlines()
    named = {line.split(":")[0].strip() for line in lines[1:-1]}
    changed = {*OTHER[name], *({"normalize"} if name in ("mean", "std", "window") else ())}
    changed |= {"classes"} if name == "labels" else set()
    assert named == {each.replace("_", "-") for each in changed}
    assert all(re.fullmatch(r"  [a-z-]+: existing .+, requested .+", line) for line in lines[1:-1])
    assert "--overwrite to start over" in lines[-1]
    assert contents(copied) == before


def test_every_difference_is_named_at_once(mixed: Path, copied: Path) -> None:
    changed = "(?s)layout: existing NCHW, requested NHWC.*limit: existing none, requested 3"
    with pytest.raises(MismatchError, match=changed):
        build(mixed, copied, settings(limit=3, layout="NHWC"))


def test_a_resume_need_not_repeat_the_size_that_was_found(make_tree: MakeTree, out: Path) -> None:
    src = make_tree({"a/1.jpg": "jpeg"})
    config = BuildConfig(resize_mode="none", workers=0, device="cpu")
    build(src, out, config)
    (out / "shard-00000.npz").unlink()
    assert build(src, out, config).built_shards == 1


@pytest.mark.parametrize("begun_with", ["auto", "1024", "5", "10kB"])
def test_shards_of_automatic_size_resume_whatever_size_the_build_began_with(
    make_tree: MakeTree, out: Path, begun_with: str
) -> None:
    src = make_tree({f"a/{number}.jpg": "jpeg" for number in range(6)})
    build(src, out, settings(shard_size=begun_with))
    before = contents(out)
    stored = Job.open(LocalStorage(str(out))).settings.shard_size
    assert stored == {"auto": "64", "10kB": "10000B"}.get(begun_with, begun_with)
    (out / "shard-00000.npz").unlink()
    assert build(src, out, settings(shard_size="auto")).built_shards == 1
    assert {**contents(out), ".gpu-npz/report.json": b""} == {**before, ".gpu-npz/report.json": b""}


def test_each_side_of_a_split_gets_shards_of_its_own_automatic_size(
    make_tree: MakeTree, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.config._AUTO_SHARD_ROWS", (8, 4, 2, 1))
    monkeypatch.setattr("gpu_npz.config._AUTO_SHARDS", 3)
    src = make_tree({f"a/{number}.jpg": "jpeg" for number in range(20)})
    reports = build_split(src, out, settings(shard_size="auto", split="val=0.2"))
    rows = {side: Job.open(LocalStorage(str(out / side))).record.shard_rows for side in reports}
    assert rows == {"train": 4, "val": 1}
    estimated = estimate(src, settings(shard_size="auto", split="val=0.2"), seconds=0)
    assert estimated.shards == sum(report.shards for report in reports.values())


@pytest.mark.parametrize(
    ("given", "memory", "dropped"),
    [("auto", 10**9, False), ("auto", 1000, True), ("auto", None, False), ("keep", 1000, False), ("drop", 10**9, True)],
)
def test_the_page_cache_drops_what_would_fill_it(
    mixed: Path, out: Path, monkeypatch: pytest.MonkeyPatch, given: str, memory: int | None, dropped: bool
) -> None:
    used = []

    def writer(path: str, *, drop_cache: bool) -> NpzWriter:
        used.append(drop_cache)
        return NpzWriter(path, drop_cache=drop_cache)

    monkeypatch.setattr("gpu_npz.builder.run.available_memory", lambda: memory)
    monkeypatch.setattr("gpu_npz.workers.sink.NpzWriter", writer)
    build(mixed, out, settings(page_cache=given, max_rejects="100%"))
    assert set(used) == {dropped}


def test_shards_of_another_environment_are_refused_unless_accepted(mixed: Path, copied: Path, whole: Path) -> None:
    for path in (copied / ".gpu-npz/commits").iterdir():
        edit_json(path, lambda record: record["environment"].update(pillow="9.5.0.post2"))
    assert build(mixed, copied, settings()).built_shards == 0  # nothing is made, so nothing is mixed
    (copied / "shard-00000.npz").unlink()
    with pytest.raises(MismatchError, match=r"pillow: 9\.5\.0\.post2 then, .* now") as caught:
        build(mixed, copied, settings())
    assert "--accept-environment" in str(caught.value)
    with pytest.raises(MismatchError):
        build(mixed, copied, settings(workers=2))
    assert not (copied / "shard-00000.npz").exists()
    assert build(mixed, copied, settings(accept_environment=True)).built_shards == 1
    assert len(Manifest.load(copied).environments) == 2
    assert (copied / "shard-00000.npz").read_bytes() == (whole / "shard-00000.npz").read_bytes()


def test_a_commit_record_without_the_key_environment_is_damaged(mixed: Path, copied: Path) -> None:
    path = min((copied / ".gpu-npz/commits").iterdir())
    edit_json(path, lambda record: record.update(provenance=record.pop("environment")))
    with pytest.raises(FormatError, match=rf"{path.name}.*environment; +Field required.*damaged"):
        build(mixed, copied, settings())


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_a_build_that_another_revision_of_the_decoding_code_began_is_not_continued(
    backend: str, mixed: Path, out: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    build(mixed, out, settings(backend=backend))
    (out / "shard-00000.npz").unlink()
    for path in (out / ".gpu-npz/commits").iterdir():
        record = json.loads(path.read_text())
        assert record["environment"].pop("decoding_revision") > 1
        path.write_text(json.dumps(record))
    for accept in (False, True):
        with pytest.raises(MismatchError, match=r"another version of gpu-npz made the shards so far .*--overwrite"):
            build(mixed, out, settings(backend=backend, accept_environment=accept))
    assert not (out / "shard-00000.npz").exists()
    assert build(mixed, out, settings(backend=backend, overwrite=True)).complete


@pytest.mark.parametrize("name", [".gpu-npz/job.json", ".gpu-npz/commits/shard-00001.json"])
def test_a_damaged_record_is_an_error_that_names_it(mixed: Path, copied: Path, name: str) -> None:
    (copied / name).write_text('{"version": 1')
    with pytest.raises(FormatError, match=f"{Path(name).name}.*damaged"):
        build(mixed, copied, settings())


# Start anew


def test_overwrite_deletes_what_builds_made_and_nothing_else(mixed: Path, copied: Path) -> None:
    foreign = ["notes.txt", "sub/shard-00000.npz", "12/mine.txt", ".gpu-npz/mine", "shard-1.npz", "shard-00000.npz.bak"]
    for name in foreign:
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("mine")
    report = build(mixed, copied, settings(shard_size=20, overwrite=True))
    assert (report.complete, report.built_shards) == (True, 2)
    assert shards(copied) == ["shard-00000.npz", "shard-00001.npz", "shard-1.npz"]
    assert {name: (copied / name).read_text() for name in foreign} == dict.fromkeys(foreign, "mine")
    assert gpu_npz.verify(copied).ok


def test_a_foreign_file_whose_name_is_a_number_stays_and_disturbs_nothing(mixed: Path, copied: Path) -> None:
    (copied / "2024").write_text("mine")
    assert build(mixed, copied, settings()).complete
    assert build(mixed, copied, settings(overwrite=True)).complete
    assert (copied / "2024").read_text() == "mine"


def test_a_foreign_empty_folder_whose_name_is_a_number_stays(mixed: Path, copied: Path) -> None:
    (copied / "2024").mkdir()
    build(mixed, copied, settings(overwrite=True))
    assert (copied / "2024").is_dir()


def test_an_overwrite_that_was_interrupted_is_simply_started_again(
    mixed: Path, whole: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalStorage.remove

    def interrupted(storage: LocalStorage, name: str) -> None:
        if name == "shard-00002.npz":
            raise KeyboardInterrupt
        real(storage, name)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(mixed, copied, settings(overwrite=True))
    build(mixed, copied, settings(overwrite=True))
    assert contents(copied) == contents(whole)


def test_an_overwrite_that_cannot_begin_deletes_nothing(
    mixed: Path, copied: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)
    with pytest.raises(SourceError):
        build(make_tree({"a/": b"", "b/": b""}), copied, settings(overwrite=True))
    with pytest.raises(UsageError):
        build(mixed, copied, settings(overwrite=True, shard_size="1B"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(gpu_npz.GpuNpzError):
        build(mixed, copied, settings(overwrite=True, device="auto", require_gpu=True))
    assert contents(copied) == before


def test_a_finished_dataset_without_what_resuming_needs_is_not_built_over(mixed: Path, copied: Path) -> None:
    shutil.rmtree(copied / ".gpu-npz")
    before = contents(copied)
    with pytest.raises(StorageError, match=r"finished dataset without the \.gpu-npz"):
        build(mixed, copied, settings(layout="NHWC"))
    assert contents(copied) == before
    assert build(mixed, copied, settings(layout="NHWC", overwrite=True)).built_shards == 6


# Classes


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """A second collection, with some of the classes of the first."""
    for name in ("b/1.jpg", "d/2.jpg"):
        (tmp_path / "val" / name).parent.mkdir(parents=True)
        (tmp_path / "val" / name).write_bytes(file_bytes("jpeg"))
    return tmp_path / "val"


def test_a_second_dataset_numbers_its_classes_as_the_first_one(whole: Path, val: Path, out: Path) -> None:
    build(val, out, settings(classes_from=str(whole)))
    assert column(out, "labels") == [1, 3]
    assert Manifest.load(out).classes == Manifest.load(whole).classes
    assert gpu_npz.verify(out).ok


def test_classes_come_from_a_file_with_a_name_a_line(val: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zebra\nd\n\nb\r\n")
    build(val, out, settings(classes_from=str(tmp_path / "names.txt")))
    assert column(out, "labels") == [2, 1]
    assert Manifest.load(out).classes == ("zebra", "d", "b")
    # A resume need not give it again; another list is refused.
    (out / "shard-00000.npz").unlink()
    assert build(val, out, settings()).built_shards == 1
    (tmp_path / "names.txt").write_text("b\nd\n")
    with pytest.raises(MismatchError, match=r"existing 3 classes \(zebra, d, b, \.\.\.\), requested 2 classes"):
        build(val, out, settings(classes_from=str(tmp_path / "names.txt")))


def test_a_class_that_the_list_does_not_have_is_named(val: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(SourceError, match="1 classes that are not in the given list: 'd'"):
        build(val, out, settings(classes_from=str(tmp_path / "names.txt")))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [("a\nb\na\n", "names 'a' twice"), ("\n \n", "names no class"), (None, "No such file or directory; give a")],
)
def test_a_list_of_classes_that_cannot_be_used_is_a_usage_error(
    val: Path, out: Path, tmp_path: Path, content: str | None, error: str
) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UsageError, match=error):
        build(val, out, settings(classes_from=str(tmp_path / "names.txt")))


def test_classes_do_not_come_from_a_dataset_that_has_none_or_is_not_finished(
    val: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/1.jpg").write_bytes(file_bytes("jpeg"))
    build(tmp_path / "flat", tmp_path / "flat-out", settings())
    with pytest.raises(UsageError, match="that dataset has no labels; omit the option"):
        build(val, out, settings(classes_from=str(tmp_path / "flat-out")))
    (tmp_path / "ages.csv").write_text("path,age\nflat/1.jpg,41\n")
    build(tmp_path / "ages.csv", tmp_path / "ages", settings(labels="age"))
    with pytest.raises(UsageError, match=r"that dataset has labels age \(integer\), no classes; omit the option"):
        build(val, out, settings(classes_from=str(tmp_path / "ages")))
    (tmp_path / "flat-out/dataset.json").unlink()
    with pytest.raises(IncompleteError):
        build(val, out, settings(classes_from=str(tmp_path / "flat-out")))
    with pytest.raises(FormatError):
        build(val, out, settings(classes_from=str(tmp_path / "flat")))
    (tmp_path / "names.txt").write_text("a\n")
    with pytest.raises(SourceError, match="has no labels; leave --classes-from out"):
        build(tmp_path / "flat", out, settings(classes_from=str(tmp_path / "names.txt")))


# Sizes


def test_without_resizing_all_images_have_the_first_readable_ones_size(tmp_path: Path, out: Path) -> None:
    sizes = {"a/0.jpg": (10, 20), "a/1.jpg": (24, 32), "a/2.jpg": (24, 33), "b/3.jpg": (24, 32)}
    for seed, (name, size) in enumerate(sizes.items()):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "half" if name == "a/0.jpg" else "jpeg"
        (tmp_path / "src" / name).write_bytes(file_bytes(kind, seed=seed, size=size))
    config = BuildConfig(resize_mode="none", dtype="uint8", workers=0, device="cpu")
    report = build(tmp_path / "src", out, config)
    assert report.rejects_by_code == {"truncated": 1, "wrong-size": 1}
    assert np.load(out / "shard-00000.npz")["images"].shape == (2, 3, 24, 32)
    assert reject_lines(out)[1]["detail"] == "24 x 33 pixels (height x width); expected 24 x 32"
    with pytest.raises(MismatchError, match="size"):
        build(tmp_path / "src", out, config.model_copy(update={"size": (10, 20)}))


def test_without_resizing_and_without_a_readable_image_there_is_no_size(make_tree: MakeTree, out: Path) -> None:
    src = make_tree({"a/1.jpg": "half", "a/2.jpg": "empty"})
    with pytest.raises(
        SourceError, match="no image can be decoded, so --resize-mode none has no size to use; give --size"
    ):
        build(src, out, BuildConfig(resize_mode="none", workers=0, device="cpu"))
    config = BuildConfig(resize_mode="none", size="8x9", workers=0, device="cpu", max_rejects="100%")
    assert build(src, out, config).rejects == 2


def test_a_dataset_without_a_row_is_nothing_that_a_small_share_of_rejects_allows(tmp_path: Path, out: Path) -> None:
    (tmp_path / "t.csv").write_text("path\n1\n2\n")
    with pytest.raises(RejectLimitError, match=r"allows 1\. All .* If paths or --root are wrong .*--overwrite; run"):
        build(tmp_path / "t.csv", out, settings())
    assert not (out / "dataset.json").exists()
    assert build(tmp_path / "t.csv", out, settings(max_rejects=2)).complete


# Places


def test_a_source_that_was_moved_goes_on(
    mixed: Path, copied: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(mixed, tmp_path / "moved", symlinks=True)
    damage(copied, "shards lost")
    build(tmp_path / "moved", copied, settings())
    assert contents(copied) == contents(whole)
    assert f"SRC was {str(mixed)!r} when the build began" in caplog.text


def test_a_source_given_by_another_name_is_the_same(
    pictures: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(pictures, out, settings())
    (out / "shard-00000.npz").unlink()
    monkeypatch.chdir(tmp_path)
    assert build(f"./{pictures.name}/", "out", settings()).built_shards == 1
    assert caplog.text == ""


def test_other_images_are_refused(pictures: Path, out: Path, tmp_path: Path) -> None:
    build(pictures, out, settings())
    other = tmp_path / "other"
    for name in "ab":
        (other / name).mkdir(parents=True)
        (other / name / "x.jpg").write_bytes(file_bytes("jpeg"))
    with pytest.raises(
        MismatchError, match=r"has none of the first 8 items\. Give the same images, or choose another OUT"
    ):
        build(other, out, settings())
    flat = tmp_path / "other/a"
    with pytest.raises(MismatchError, match=r"classes: existing 2 classes \(a, b, \.\.\.\), requested no labels"):
        build(flat, out, settings())


@pytest.mark.parametrize("below", ["", "out", "a", "a/deep/out"])
def test_an_out_inside_the_source_is_a_usage_error(pictures: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "link").symlink_to(pictures)
    for src in (pictures, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"lies inside SRC.*choose an OUT outside of SRC"):
            build(src, pictures / below, settings())
    with pytest.raises(UsageError):
        build(pictures, tmp_path / "link" / below, settings())
    assert sorted(os.listdir(pictures)) == ["a", "b"]


def test_an_out_beside_the_source_whose_name_only_begins_alike_is_fine(pictures: Path) -> None:
    assert build(pictures, pictures.with_name(pictures.name + "-out"), settings()).complete


def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(pictures: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=r"not empty and is not a gpu-npz dataset \('thesis\.tex', \.\.\.\)"):
            build(pictures, out, settings(overwrite=overwrite))
    assert os.listdir(out) == ["thesis.tex"]


def test_an_empty_folder_is_a_fine_out(pictures: Path, out: Path) -> None:
    out.mkdir()
    assert build(pictures, out, settings()).complete


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (None, "No such file or directory; give SRC as a folder, an archive or a table"),
        ({}, r"holds no images \(\.bmp .*\); give a folder of class folders"),
        ({"a/": b"", "b/": b""}, r"holds no images \(\.bmp .*\); give a folder of class folders"),
        ({"a/IM0001": b""}, r"; 1 files are ignored because of their names \(1 without extension\); give a folder"),
        ({"1.jpg": "jpeg", "a/2.jpg": "jpeg"}, "holds both images"),
    ],
)
def test_a_source_without_images_is_an_error_and_makes_no_dataset(
    make_tree: MakeTree, tmp_path: Path, out: Path, files: dict[str, Any] | None, error: str
) -> None:
    src = tmp_path / "gone" if files is None else make_tree(files)
    with pytest.raises(SourceError, match=error) as caught:
        build(src, out, settings())
    assert caught.value.exit_code == 1
    assert not out.exists() or contents(out) == {}


def test_a_source_that_is_a_file_is_an_error(make_tree: MakeTree, out: Path) -> None:
    with pytest.raises(SourceError, match="a file of unknown kind; give a folder, or a file with one of"):
        build(make_tree({"a/1.jpg": "jpeg"}) / "a/1.jpg", out, settings())


# Trouble that is no image's fault


def wait_for(path: Path) -> None:
    """Returns once a file is there; a build that never makes it fails the test by its time."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was never made"
        time.sleep(0.002)


def test_a_source_that_vanishes_during_a_build_is_an_error_and_makes_no_rejects(
    pictures: Path, out: Path, tmp_path: Path
) -> None:
    config = settings(shard_size=2)

    def unmount(event: Started | Event) -> None:
        if isinstance(event, Progress):
            wait_for(out / ".gpu-npz/commits/shard-00000.json")
            pictures.rename(tmp_path / "unmounted")

    with pytest.raises(SourceError, match="is missing; mount it again, then run the same command to resume"):
        build(pictures, out, config, progress=unmount)
    assert shards(out) == ["shard-00000.npz"]
    (tmp_path / "unmounted").rename(pictures)
    report = build(pictures, out, config)
    assert (report.rows, report.rejects, report.built_shards) == (8, 0, 3)


def test_an_input_error_stops_the_build_and_mending_the_disk_lets_the_same_call_finish(
    pictures: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", (0.0, 0.0))
    config = settings(shard_size=2)
    real = LocalFiles.read

    def stale(files: LocalFiles, item: Item) -> bytes:
        if item.path == "b/1.jpg":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(files, item)

    monkeypatch.setattr(LocalFiles, "read", stale)

    def commit_first(event: Started | Event) -> None:
        if isinstance(event, Progress):
            wait_for(out / ".gpu-npz/commits/shard-00000.json")

    with pytest.raises(ShardError, match=r"reading 'b/1\.jpg' failed 3 times: Stale file handle; check") as caught:
        build(pictures, out, config, progress=commit_first)
    assert caught.value.exit_code == 1
    assert "shard-00000.npz" in shards(out)
    assert not {"shard-00002.npz", "shard-00003.npz"} & {*shards(out)}
    assert not [name for name in contents(out) if name.endswith((".tmp", "lock", "dataset.json", "rejects.jsonl"))]
    monkeypatch.setattr(LocalFiles, "read", real)
    report = build(pictures, out, config)
    assert (report.complete, report.rows, report.rejects) == (True, 8, 0)
    build(pictures, tmp_path / "undisturbed", config)
    assert contents(out) == contents(tmp_path / "undisturbed")


def children() -> list[int]:
    """The processes that this one has started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            # Python's own tracker of semaphores, which other tests may have started, is none of a build.
            own = b"resource_tracker" in (status.parent / "cmdline").read_bytes()
            if int(parent) == os.getpid() and state != "Z" and not own:
                found.append(int(status.parent.name))
    return found


def test_a_worker_that_is_killed_is_named_with_its_signal_and_the_same_call_finishes(
    mixed: Path, whole: Path, out: Path
) -> None:
    def kill(event: Started | Event) -> None:
        if isinstance(event, Progress):
            for process in children():
                os.kill(process, signal.SIGKILL)

    with pytest.raises(ShardError, match=r"a worker process.* was killed by SIGKILL.*the same command to resume"):
        build(mixed, out, settings(workers=2), progress=kill)
    assert not children()
    assert not (out / "dataset.json").exists()
    assert build(mixed, out, settings()).complete
    assert contents(out) == contents(whole)


def test_what_a_worker_process_fails_with_reaches_the_caller(
    pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_plan(event: Started | Event) -> None:
        if isinstance(event, Started):
            (out / ".gpu-npz/plan.npz").unlink()

    with pytest.raises(FormatError, match=r"plan\.npz"):
        build(pictures, out, settings(workers=2, shard_size=2), progress=lose_plan)
    assert not children()


@pytest.mark.parametrize("failing", [0, 2])
def test_a_shard_that_fails_beside_others_stops_them_and_is_what_the_caller_hears_of(
    mixed: Path, whole: Path, out: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = LocalStorage.publish

    def full(storage: LocalStorage, temporary: str, name: str) -> None:
        if name == f"shard-{failing:05}.npz":
            raise StorageError("the disk is full")
        publish(storage, temporary, name)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "publish", full)
        with pytest.raises(StorageError, match="the disk is full"):
            build(mixed, out, settings(open_shards=3, batch_size=1))
    assert not [name for name in contents(out) if name.endswith(".tmp")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-npz")]
    build(mixed, out, settings())
    assert contents(out) == contents(whole)


def test_shards_take_turns_and_no_more_of_them_are_open_than_were_asked_for(mixed: Path, copied: Path) -> None:
    plan = Job.open(LocalStorage(copied)).plan
    tuning = Tuning(workers=1, batch_size=3, threads=1, pipelines=1, prefetch=1, open_shards=3, hw_decoder_load=None)
    batches = list(interleaved_batches(plan, range(plan.shard_count), tuning))
    assert sorted(item.index for batch in batches for item in batch.items) == list(range(plan.item_count))
    assert [batch.shard for batch in batches[:4]] == [0, 1, 2, 0]
    still_open: set[int] = set()
    for batch in batches:
        still_open.add(batch.shard)
        assert len(still_open) <= 3
        still_open -= {batch.shard} if batch.last else set()
    assert not still_open


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_callers_own_stops_all_workers_and_publishes_nothing_half(
    mixed: Path, whole: Path, out: Path, workers: int
) -> None:
    def broken(event: Started | Event) -> None:
        if isinstance(event, Progress):
            raise RuntimeError("the caller's own fault")

    with pytest.raises(RuntimeError, match="the caller's own fault"):
        build(mixed, out, settings(workers=workers), progress=broken)
    assert not children()
    assert not [name for name in contents(out) if name.endswith(".tmp")]
    build(mixed, out, settings())
    assert contents(out) == contents(whole)


# Progress


def events(src: Path, out: Path, config: BuildConfig) -> list[Started | Event]:
    seen: list[Started | Event] = []
    build(src, out, config, progress=seen.append)
    return seen


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"workers": 2}], ids=str)
def test_progress_adds_up_to_the_plan(mixed: Path, out: Path, options: dict[str, Any]) -> None:
    seen = events(mixed, out, settings(**options))
    workers = options.get("workers", 0)
    assert seen[0] == Started(ITEMS, 0, "pillow", "cpu", workers)
    source_bytes = sum(path.stat().st_size for path in mixed.rglob("*") if path.is_file())
    assert progressed(seen) == (ITEMS, len(REJECTS), source_bytes)
    records = [event.record for event in seen if isinstance(event, Committed)]
    assert sorted(record.shard for record in records) == list(range(6))
    ended = len([event for event in seen if isinstance(event, WorkerEnded)])
    assert 1 <= ended <= max(1, workers)  # a worker that is still starting when all shards are done is not waited for


def test_progress_of_a_resumed_build_adds_up_with_what_was_done(mixed: Path, copied: Path) -> None:
    damage(copied, "shards lost")
    seen = events(mixed, copied, settings())
    assert seen[0] == Started(ITEMS, ITEMS - 8, "pillow", "cpu", 0)
    assert progressed(seen)[0] == 8
    assert events(mixed, copied, settings()) == [Started(ITEMS, ITEMS, "pillow", "cpu", 0)]


# Settings


def test_settings_from_toml_build_the_same_dataset(mixed: Path, whole: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "build.toml").write_text('device = "cpu"\nsize = 16\nworkers = 1\nshard-size = 4\n')
    build(mixed, out, BuildConfig(**load_toml(tmp_path / "build.toml")))
    assert contents(out) == contents(whole)


def test_a_dtype_that_cannot_hold_the_values_is_refused_before_anything_is_begun(pictures: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        build(pictures, out, settings(dtype="float16", mean="0,0,0", std="1e-7,1e-7,1e-7"))
    assert contents(out) == {}


def test_workers_are_never_more_than_shards(pictures: Path, out: Path) -> None:
    assert build(pictures, out, settings(workers=64, shard_size=8)).tuning.workers == 1


# What stops a build before its end


def test_a_build_that_is_plainly_going_wrong_stops_early_and_goes_on_when_told(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.builder.watch._EARLY_REJECTS", 12)
    good = file_bytes("jpeg")
    src = make_tree({f"a/{number:03}.jpg": good if number % 4 == 0 else "text" for number in range(100)})
    config = settings(max_rejects="10", shard_size="8", batch_size=4)
    with pytest.raises(
        RejectLimitError, match=r"15 of the 20 items of this run were rejected \('a/001.jpg' for one: not-an-image, "
    ) as caught:
        build(src, tmp_path / "out", config)
    assert caught.value.report.missing_shards > 5
    assert not (tmp_path / "out/dataset.json").exists()
    report = build(src, tmp_path / "out", config.model_copy(update={"max_rejects": "100%"}))
    assert (report.complete, report.rows, report.rejects) == (True, 25, 75)


@pytest.mark.parametrize("options", [{}, {"part": "1/2"}, {"workers": 2}, {"split": "val=0.1/val"}], ids=str)
@pytest.mark.parametrize("shard_size", ["4", "1000"])
def test_a_build_that_stops_before_any_commit_says_what_to_do(
    make_tree: MakeTree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    shard_size: str,
) -> None:
    monkeypatch.setattr("gpu_npz.builder.watch._EARLY_REJECTS", 2)
    right, wrong = make_tree({f"a/{number:03}.jpg": "jpeg" for number in range(60)}), tmp_path / "wrong"
    wrong.mkdir()
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "".join(f"a/{number:03}.jpg,{number % 3}\n" for number in range(60)))
    config = settings(max_rejects="1", shard_size=shard_size, batch_size=4, **{**options, "root": str(wrong)})
    with pytest.raises(RejectLimitError, match=r"'a/\d+.jpg' for one: missing, No such file or directory") as caught:
        build(table, tmp_path / "out", config)
    assert f"If paths or --root are wrong (files are looked for below '{wrong}'; do the names" in str(caught.value)
    assert "give the right ones with --overwrite" in str(caught.value)
    report = caught.value.report
    assert report.missing_shards
    committed = len(list((tmp_path / "out/.gpu-npz/commits").glob("*.json")))
    assert report.built_shards <= committed  # a shard's thread may commit one more while the build stops
    assert report.built_items <= report.rejects <= 60
    fixed = {"root": str(right), "overwrite": "part" not in options}
    if "part" in options:
        shutil.rmtree(tmp_path / "out")
    report = build(table, tmp_path / "out", config.model_copy(update=fixed))
    assert (report.rejects, report.rows) == (0, report.built_items)
    make_tree({f"b/{number:03}.jpg": "text" for number in range(60)})
    with pytest.raises(RejectLimitError, match=r"not-an-image, .*Look at some of the files"):
        build(right / "b", tmp_path / "other", config.model_copy(update={"root": None}))


def test_a_build_with_some_rejects_over_the_limit_is_not_stopped_early(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.builder.watch._EARLY_REJECTS", 12)
    good = file_bytes("jpeg")
    src = make_tree({f"a/{number:03}.jpg": "text" if number % 3 == 0 else good for number in range(60)})
    with pytest.raises(RejectLimitError, match="20 of 60 items were rejected"):
        build(src, tmp_path / "out", settings(max_rejects="10", shard_size="8"))


def test_a_build_stops_before_others_fill_the_disk_and_goes_on_when_there_is_room(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.builder.watch._LOOK_S", 0.0)
    free = itertools.chain([10**12] * 2, itertools.repeat(10**6))
    monkeypatch.setattr("gpu_npz.builder.watch.free_space", lambda place: (next(free), None))
    with pytest.raises(StorageError, match=r"1\.0 MB free, less than the 268\.4 MB that a build leaves"):
        build(mixed, tmp_path / "out", settings())
    assert not (tmp_path / "out/dataset.json").exists()
    monkeypatch.undo()
    assert build(mixed, tmp_path / "out", settings()).complete
