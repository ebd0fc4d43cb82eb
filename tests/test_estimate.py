"""Before a build: what `plan` says of it, and a disk that is too small for it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import MakeTree

from gpu_npz.builder import headers
from gpu_npz.builder.build import build, build_split
from gpu_npz.builder.estimate import _PROCESS_BYTES, Estimate, estimate
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.dataset import space
from gpu_npz.dataset.space import require_space
from gpu_npz.errors import SourceError, StorageError, UsageError

CPU: dict[str, Any] = {"device": "cpu", "size": 32, "shard_size": "16"}
FLAGS = ["--device", "cpu", "--size", "32", "--shard-size", "16"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, as a test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(folder))
    return folder


Fill = Callable[..., list[str]]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Fill:
    """`disk(free=1000)`: every filesystem now has so many bytes free; returns the paths that are asked about."""
    asked: list[str] = []

    def fill(free: int, *, blocks: int = 10**6, files: int = 0, free_files: int = 0) -> list[str]:
        def statvfs(path: str) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=blocks, f_files=files, f_favail=free_files)

        monkeypatch.setattr(os, "statvfs", statvfs)
        return asked

    return fill


def look(src: Path, out: Path | None = None, **settings: Any) -> Estimate:
    return estimate(src, BuildConfig(**{**CPU, **settings}), out, seconds=0)


def written(out: Path) -> int:
    """The size of all files that a build made, but for the report."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "report.json")


# What a estimate says


def test_items_classes_and_shards_are_those_of_the_build(tree: Path, tmp_path: Path) -> None:
    found = look(tree)
    report = build(tree, tmp_path / "out", BuildConfig(**CPU, workers=0))
    assert (found.items, found.shards, found.backend) == (report.items, report.shards, report.backend)
    assert (found.classes, found.smallest_class, found.largest_class) == (3, ("apples", 10), ("berries", 20))
    assert (found.image_size, found.row_bytes, found.shard_rows) == ((32, 32), 3 * 32 * 32 * 4, 16)
    assert look(tree, workers=0).tuning == report.tuning
    assert look(tree, limit=3).items == 3


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        ({"mean": "123.675,116.28,103.53", "std": "58.395,57.12,57.375"}, "0.485,0.456,0.406 --std 0.229,0.224,0.225"),
        ({"mean": "127.5,127.5,127.5", "std": "127.5,127.5,127.5"}, "0.5,0.5,0.5 --std 0.5,0.5,0.5"),
        ({"mean": "0,0,0", "std": "255,255,255"}, "0.0,0.0,0.0 --std 1.0,1.0,1.0"),
        ({"mean": "102,51,255", "std": "1,1,1"}, "0.4,0.2,1.0 --std 0.00392157,0.00392157,0.00392157"),
        ({"mean": "102,51,255", "std": "0.2,0.2,0.2"}, "0.4,0.2,1.0 --std 0.2,0.2,0.2"),
        ({"mean": "0.4,0.4,0.4", "std": "51,51,51"}, "0.4,0.4,0.4 --std 0.2,0.2,0.2"),
        ({"channels": "gray", "mean": "102", "std": "51"}, "0.4 --std 0.2"),
        ({"channels": "gray", "mean": "26214", "std": "13107", "bit_depth": 16}, "0.4 --std 0.2"),
        ({"channels": "gray", "mean": "300", "std": "9"}, None),
    ],
)
def test_a_mean_and_a_std_of_levels_are_refused_with_those_to_give(
    tree: Path, tmp_path: Path, given: dict[str, Any], advised: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        look(tree, **given)
    message = str(caught.value)
    assert ": pixels are scaled to 0 to 1 first, so no mean or std is larger than 1; " in message
    with pytest.raises(UsageError, match="pixels are scaled"):
        build(tmp_path / "nothing", tmp_path / "out", BuildConfig(**given))
    assert not (tmp_path / "out").exists()
    if advised is None:
        assert message.endswith("; `gpu-npz stats SRC` finds those of your images")
        return
    level = 65535 if given.get("bit_depth") else 255
    assert message.endswith(f"; if these are for levels from 0 to {level}, give --mean {advised}")
    options = dict(zip(("mean", "std"), advised.split(" --std "), strict=True))
    assert look(tree, **{**given, **options}).items == 40
    assert look(tree, mean="1,0.4,0", std="1,1,1").items == 40


def test_the_sample_says_what_the_headers_say(make_tree: MakeTree) -> None:
    kinds = ["jpeg", "progressive", "gray", "cmyk", "exif-6", "alpha", "1x1", "half", "text", "empty", "two-bytes"]
    sample = look(make_tree({f"a/{kind}.jpg": kind for kind in kinds})).sample
    assert sample.items == 11
    assert sample.unreadable == {"empty": 1, "not-an-image": 2}  # that the half ends early, its header does not say
    assert sample.formats == {"JPEG": 7, "PNG": 1}
    assert sample.modes == {"RGB": 5, "L": 1, "CMYK": 1, "RGBA": 1}
    assert (sample.progressive, sample.turned, sample.cmyk, sample.gray) == (1, 1, 1, 1)
    assert sample.sizes[0] == (1, 1)
    assert sample.sizes[1:] in (((90, 120), (120, 90)), ((90, 120), (90, 120)))
    assert sample.heaviest is not None
    assert sample.heaviest.path == "a/alpha.jpg"
    assert sample.heaviest.decode_bytes == 16 * 90 * 120 + sample.heaviest.encoded_bytes


def test_exif_counts_for_the_sides_only_where_the_build_turns_images(make_tree: MakeTree) -> None:
    src = make_tree({"a/1.jpg": "exif-6"})
    assert look(src).sample.sizes[0] == (120, 90)
    assert look(src, exif_orientation=False).sample.sizes[0] == (90, 120)
    assert look(src, exif_orientation=False).sample.turned == 0


def test_a_large_plan_is_sampled_from_its_beginning_to_its_end(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = headers.read_item
    monkeypatch.setattr(headers, "read_item", lambda source, item: read.append(item.path) or real(source, item))
    monkeypatch.setattr(headers, "_SAMPLED_ITEMS", 8)
    assert look(tree).sample.items == 8
    assert {path.split("/")[0] for path in read} == {"apples", "berries", "cherries"}
    assert len(set(read)) == 8


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "uint8", "layout": "NHWC", "channels": "gray", "normalize": "none"},
        {"on_reject": "blank", "shuffle": 3, "limit": 33},
        {"dtype": "float16", "shard_size": "1MB"},
    ],
    ids=str,
)
def test_the_size_of_the_output_is_that_of_a_real_build(tree: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    given = {**CPU, "size": 64, **settings}
    report = build(tree, tmp_path / "out", BuildConfig(**given, workers=0))
    found = look(tree, **given)
    print(found.output_bytes, written(tmp_path / "out"), report.dataset_bytes)
    assert found.output_bytes == pytest.approx(written(tmp_path / "out"), rel=0.01)
    assert found.output_bytes >= report.dataset_bytes
    need = space._at_most(found.items, found.row_bytes, found.shards)
    assert need >= report.dataset_bytes


@pytest.mark.parametrize("folder", ["a/", ""], ids=["labels", "no labels"])
@pytest.mark.parametrize("shuffle", [None, 0])
def test_shards_are_computed_to_the_byte(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, shuffle: int | None
) -> None:
    # The long paths stand together, and by the shuffle in both full shards.
    src = make_tree({f"{folder}{number:02}{'x' * 200 * (number >= 16)}.jpg": "jpeg" for number in range(34)})
    settings = {**CPU, "shuffle": shuffle}
    report = build(src, tmp_path / "out", BuildConfig(**settings, workers=0))
    sizes = []
    real = space._npz_bytes
    monkeypatch.setattr(space, "_npz_bytes", lambda *given: sizes.append(real(*given)) or sizes[-1])
    look(src, **settings)
    made = [(tmp_path / "out" / f"shard-0000{number}.npz").stat().st_size for number in range(3)]
    assert sum(made) == report.dataset_bytes
    assert len({*made}) == (3 if shuffle is None else 2)
    assert {*made, (tmp_path / "out/index.npz").stat().st_size} <= {*sizes}
    assert len(sizes) == len({*made}) + 2  # index.npz and the plan


def test_the_estimate_of_require_space_is_within_one_percent_for_usual_rows() -> None:
    row_bytes, rows = 3 * 224 * 224, 1_281_167
    assert rows * row_bytes <= space._at_most(rows, row_bytes, 1252) <= 1.01 * rows * row_bytes


def test_memory_grows_with_what_a_worker_holds(tree: Path) -> None:
    base = look(tree, workers=1)
    assert look(tree, workers=1, batch_size=1).worker_memory_bytes < base.worker_memory_bytes
    assert look(tree, workers=2).memory_bytes == 2 * look(tree, workers=2).worker_memory_bytes
    assert base.tuning.batch_size == 16
    buffers = (base.tuning.open_shards + 2) * 16 * base.row_bytes
    assert base.worker_memory_bytes > buffers + _PROCESS_BYTES["pillow"]


def test_a_measured_run_leaves_nothing_behind_and_takes_rejects_as_they_are(
    make_tree: MakeTree, tmp_path: Path, temporary: Path
) -> None:
    src = make_tree({**{f"a/{number}.jpg": "jpeg" for number in range(7)}, "b/bad.jpg": "half"})
    before = {*tmp_path.rglob("*")}
    config = BuildConfig(**{**CPU, "shard_size": "2"}, on_reject="fail", workers=2)
    stages = {}
    found = estimate(src, config, tmp_path / "out", seconds=60, progress=lambda *told: stages.update({told[0]: told}))
    assert {*tmp_path.rglob("*")} == before
    assert found.measured is not None
    assert 0 < found.measured.items <= 8
    assert found.duration_s == pytest.approx(8 / (2 * found.measured.images_per_second))
    assert list(stages) == ["listing", "reading headers", "measuring"]


def test_a_measured_run_ends_when_its_time_is_over(
    tree: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.builder.short_run._MEASURED_SHARD_BYTES", 1)
    found = estimate(tree, BuildConfig(**CPU, batch_size=2), seconds=1e-9)
    assert found.measured is not None
    assert found.measured.items == 2
    assert not list(temporary.iterdir())


def test_a_measured_run_takes_room_for_a_few_shards_only(
    tree: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.builder.short_run._MEASURED_SHARD_BYTES", 1)
    most = 0

    def count(stage: str, done: float, total: float | None) -> None:
        nonlocal most
        most = max(most, len(list(temporary.rglob("shard-*.npz"))))

    estimate(tree, BuildConfig(**CPU, batch_size=1), seconds=60, progress=count)
    assert 0 < most < 10  # of 40


def test_a_run_that_cannot_be_measured_is_told_and_the_rest_stands(
    tree: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr("gpu_npz.builder.short_run.Job.create", full)
    found = estimate(tree, BuildConfig(**CPU))
    assert (found.measured, found.duration_s, found.items) == (None, None, 40)
    assert (
        "the duration is unknown: no space left on device; use --folder DIR to measure in another folder"
        in found.warnings
    )
    assert not list(temporary.iterdir())


def test_images_of_one_size_are_found_without_size(make_tree: MakeTree) -> None:
    src = make_tree({"1.jpg": "text", "2.jpg": "jpeg"})
    found = look(src, size=None, resize_mode="none")
    assert (found.image_size, found.classes, found.smallest_class) == ((90, 120), None, None)
    with pytest.raises(SourceError, match="no image can be decoded"):
        look(make_tree({"2.jpg": "text"}), size=None, resize_mode="none")


def test_a_split_is_told_by_its_sides_which_are_those_of_the_build(tree: Path, tmp_path: Path) -> None:
    config = BuildConfig(**CPU, workers=0, split="val=0.2,test=0.1")
    found = estimate(tree, config, tmp_path / "out", seconds=0)
    reports = build_split(tree, tmp_path / "out", config)
    assert found.sides == {side: report.items for side, report in reports.items()}
    assert (found.items, found.shards) == (40, sum(report.shards for report in reports.values()))
    assert look(tree, split="val=0.2").sides == {"train": 32, "val": 8}
    assert look(tree, split="val=0.2/val").sides == {"val": 8}
    assert look(tree, split="val=0.2/val").items == 8
    assert look(tree).sides == {}
    with pytest.raises(UsageError, match=r"'val' would get none of the 2 items of .*give larger shares"):
        look(tree, limit=2, split="val=0.2")


def test_columns_of_labels_are_told_where_they_are_not_classes(
    make_tree: MakeTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_tree({"1.jpg": "jpeg", "2.jpg": "jpeg"}).parent / "table.csv"
    src.write_text("path,grade,age\nimages/1.jpg,good,3\nimages/2.jpg,bad,4.5\n")
    assert run(["plan", os.fspath(src), "--labels", "grade,age", *FLAGS, "--no-measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{src}: 2 items", "  labels      grade (2 classes), age (float)"]
    assert run(["plan", os.fspath(src), "--labels", "grade,age", *FLAGS, "--no-measure", "--json"]) == 0
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert columns[0] == {"name": "grade", "kind": "class", "classes": ["bad", "good"]}


# Where OUT was begun


def test_what_is_left_of_a_build_is_told_and_its_duration_is_that_of_the_rest(tree: Path, tmp_path: Path) -> None:
    assert look(tree, tmp_path / "out").shards_left is None
    build(tree, tmp_path / "out", BuildConfig(**CPU, workers=0))
    done = estimate(tree, BuildConfig(**CPU), tmp_path / "out", seconds=60)
    assert (done.shards_left, done.measured) == (0, None)
    (tmp_path / "out/shard-00001.npz").unlink()
    found = estimate(tree, BuildConfig(**CPU, workers=1), tmp_path / "out", seconds=0.01)
    assert (found.shards, found.shards_left) == (3, 1)
    assert found.measured is not None
    assert found.duration_s == pytest.approx(40 / 3 / found.measured.images_per_second)
    assert look(tree, tmp_path / "out", overwrite=True).shards_left is None


def test_settings_with_which_out_was_not_begun_are_warned_of_by_name(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "out", BuildConfig(**CPU, workers=0))
    found = look(tree, tmp_path / "out", shard_size="8", backend="dali")
    assert found.shards_left is None
    assert warned(found, "OUT was started with other settings:\n  shard-size: existing 16, requested 8")
    (tmp_path / "out/shard-00001.npz").unlink()
    assert warned(look(tree, tmp_path / "out", backend="dali"), "OUT was started with backend pillow on cpu")


def test_what_is_left_of_a_split_counts_the_sides_that_were_not_begun(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, split = tmp_path / "out", {"split": "val=0.2"}
    build_split(tree, out, BuildConfig(**CPU, **split, workers=0, normalize="dataset"))
    assert look(tree, out, **split, normalize="dataset").shards_left == 0
    (out / "val").rename(tmp_path / "away")
    found = look(tree, out, **split, normalize="dataset")
    assert (found.shards, found.shards_left, found.sides) == (3, 1, {"train": 32, "val": 8})
    given = [os.fspath(tree), os.fspath(out), *FLAGS, "--no-measure", "--normalize", "dataset"]
    assert run(["plan", *given, "--split", "val=0.2"]) == 0
    shown = capsys.readouterr().out
    assert "  split       32 train, 8 val\n" in shown
    resumes = "  resumes     1 of 3 shards are left to build, and the settings are those of OUT\n"
    assert resumes in shown
    assert "decodes every image once before" not in shown
    assert warned(look(tree, out, **split), f"{os.fspath(out / 'train')!r}: OUT was started with other settings")
    assert look(tree, tmp_path / "away", split="val=0.2/val", normalize="dataset").shards_left == 0
    with pytest.raises(StorageError, match="is a dataset already; choose another OUT for the sides"):
        look(tree, out / "train", **split)


# Warnings


def warned(found: Estimate, text: str) -> bool:
    return any(text in warning for warning in found.warnings)


def test_a_build_that_is_well_set_up_gets_no_warning(make_tree: MakeTree) -> None:
    assert look(make_tree({f"a/{number}.jpg": "jpeg" for number in range(40)}), dtype="uint8", shuffle=0).warnings == ()


def test_float32_is_warned_of_with_the_size_of_uint8_where_that_saves_something(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not warned(look(tree), "--dtype uint8")
    monkeypatch.setattr("gpu_npz.builder.planning._LARGE_BYTES", 10**5)
    size = look(tree).output_bytes
    smaller = f"{space.format_bytes(size // 4)} instead of {space.format_bytes(size)}"
    assert smaller.count("kB") == 2
    assert warned(look(tree), f"--dtype uint8 would take about {smaller}; the readers then normalize")


def test_shards_sorted_by_class_are_warned_of_where_there_are_labels(tree: Path, make_tree: MakeTree) -> None:
    assert warned(look(tree), "--shuffle SEED")
    assert not warned(look(tree, shard_size="64"), "--shuffle SEED")
    assert not warned(look(make_tree({"1.jpg": "jpeg", "2.jpg": "jpeg"}), shard_size="1"), "--shuffle SEED")
    mixed = make_tree({"a.jpg": "jpeg", "b.jpg": "jpeg", "c.jpg": "jpeg"}).parent / "mixed.csv"
    for labels, hint in (("cat dog cat", False), ("cat cat dog", True)):
        rows = zip("abc", labels.split(), strict=True)
        mixed.write_text("path,label\n" + "".join(f"images/{name}.jpg,{label}\n" for name, label in rows))
        assert bool(warned(look(mixed, shard_size="1"), "--shuffle SEED")) is hint


def test_more_unreadable_headers_than_the_build_allows_are_warned_of(make_tree: MakeTree) -> None:
    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "text", "a/3.jpg": "empty"})
    assert warned(
        look(src, max_rejects="1"), "2 of 3 sampled items would be rejected, so about 2 in all; --max-rejects 1"
    )
    assert not warned(look(src, max_rejects="2"), "would be rejected")


def test_what_only_a_decoder_finds_is_told_by_the_measured_run(make_tree: MakeTree) -> None:
    found = estimate(make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "half"}), BuildConfig(**CPU), seconds=0.01)
    assert found.measured is not None
    assert (found.sample.unreadable, found.measured.rejects) == ({}, 1)
    (warning,) = found.warnings
    assert warning.startswith("1 items of the short run were rejected ('a/2.jpg' for one: truncated, ")


def test_images_over_max_pixels_are_warned_of_and_never_the_heaviest(make_tree: MakeTree) -> None:
    found = look(make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "claims-65500"}))
    assert warned(found, "1 of 2 sampled images have more than --max-pixels 89478485")
    assert found.sample.over_max_pixels == 1
    assert found.sample.sizes[-1] == (65_500, 65_500)
    assert found.sample.heaviest is not None
    assert found.sample.heaviest.path == "a/1.jpg"


def test_a_disk_that_is_too_small_is_warned_of(tree: Path, tmp_path: Path, disk: Fill) -> None:
    asked = disk(free=1000)
    found = look(tree, tmp_path / "not/there")
    assert found.free_bytes == 1000
    needs = f"needs {space.format_bytes(found.output_bytes)}, and its filesystem has 1.0 kB free"
    assert warned(found, f"{os.fspath(tmp_path / 'not/there')!r} {needs}")
    assert set(asked) == {os.fspath(tmp_path)}
    disk(free=10**9)
    assert not warned(look(tree, tmp_path / "not/there"), "needs")


def test_what_an_earlier_run_left_needs_no_room_again(tree: Path, tmp_path: Path, disk: Fill) -> None:
    build(tree, tmp_path / "out", BuildConfig(**CPU, workers=0))
    disk(free=100_000)
    assert warned(look(tree, tmp_path / "other"), "needs")
    assert not warned(look(tree, tmp_path / "out"), "needs")


def test_very_many_shards_are_warned_of(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.builder.estimate._MANY_SHARDS", 39)
    assert warned(look(tree, shard_size="1"), "40 shards are slow to list")
    assert not warned(look(tree, shard_size="2"), "slow to list")


def test_a_missing_gpu_is_warned_of(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warned(look(tree, device="0"), "no GPU found, using the CPU with pillow")


# Before a build


NEEDS = {"rows": 1000, "row_bytes": 4000, "shards": 10}


def test_a_disk_that_is_too_small_stops_the_build_with_figures_and_ways_out(tmp_path: Path, disk: Fill) -> None:
    asked = disk(free=1_000_000)
    with pytest.raises(StorageError) as caught:
        require_space(os.fspath(tmp_path / "a/b"), **NEEDS, dtype="float32")
    text = str(caught.value)
    assert "needs 4.7 MB, and its filesystem has 1.0 MB free" in text
    assert "--dtype uint8 would take 1.7 MB; free some space, choose another OUT, or start anyway with" in text
    assert text.endswith("--no-preflight")
    assert asked == [os.fspath(tmp_path)]
    with pytest.raises(StorageError, match=r"--dtype uint16 would take 2\.7 MB"):
        require_space(os.fspath(tmp_path), **NEEDS, pixel_dtype="uint16")
    with pytest.raises(StorageError, match=r"MB free\. free some space"):
        require_space(os.fspath(tmp_path), **NEEDS, dtype="uint8")


def test_a_disk_that_is_just_large_enough_is_enough_and_fewer_shards_need_less(tmp_path: Path, disk: Fill) -> None:
    enough = space._at_most(**NEEDS)
    disk(free=enough)
    require_space(os.fspath(tmp_path), **NEEDS)
    disk(free=enough - 1)
    with pytest.raises(StorageError):
        require_space(os.fspath(tmp_path), **NEEDS)
    require_space(os.fspath(tmp_path), rows=900, row_bytes=4000, shards=9)


def test_a_filesystem_without_room_for_so_many_files_stops_the_build(tmp_path: Path, disk: Fill) -> None:
    disk(free=10**12, files=1000, free_files=35)
    with pytest.raises(StorageError, match="needs 36 files, and its filesystem has room for 35; a larger --shard-size"):
        require_space(os.fspath(tmp_path), **NEEDS)
    disk(free=10**12, files=1000, free_files=36)
    require_space(os.fspath(tmp_path), **NEEDS)


def test_what_does_not_tell_its_free_space_is_not_checked(
    tmp_path: Path, disk: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(free=0, blocks=0)
    require_space(os.fspath(tmp_path), **NEEDS)
    asked = disk(free=0)
    before = len(asked)
    require_space("s3://bucket/out", **NEEDS)
    assert len(asked) == before

    def unknown(path: str) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "statvfs", unknown)
    require_space(os.fspath(tmp_path), **NEEDS)


# The command


def test_the_command_tells_people_what_matters(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", os.fspath(tree), os.fspath(tmp_path / "out"), *FLAGS, "--seconds", "0.01"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == f"{tree}: 40 items in 3 classes, 10 (apples) to 20 (berries) in one"
    rows = dict(line.split(None, 1) for line in lines[1:])
    assert list(rows) == ["sample", "sizes", "kinds", "heaviest", "output", "with", "memory", "duration", "warning"]
    assert rows["sample"] == "40 headers, all can be read"
    assert rows["output"].startswith("images of 32 x 32, 12.3 kB each; 3 shards of up to 16 rows, ")
    assert "images/s by one worker" in rows["duration"]
    assert not (tmp_path / "out").exists()


def test_json_has_it_all(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", os.fspath(tree), *FLAGS, "--json"]
    for unmeasured in (["--no-measure"], ["--seconds", "0"]):
        assert run([*command, *unmeasured]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["measured"], shown["duration_s"]) == (None, None)
        assert {**shown, "free_bytes": 0} == {**json.loads(json.dumps(look(tree).to_json())), "free_bytes": 0}
    assert run([*command, "--seconds", "0.01"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["images_per_second"] > 0


def test_unreadable_headers_and_folders_without_labels_are_told(
    make_tree: MakeTree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", os.fspath(make_tree({"1.jpg": "text", "2.jpg": "empty"})), *FLAGS, "--no-measure"]) == 0
    shown = capsys.readouterr().out
    assert ": 2 items, no labels\n" in shown
    assert "  sample      2 headers, 1 empty, 1 not-an-image cannot be read\n" in shown


def test_a_source_that_is_missing_or_empty_ends_with_1_and_a_bad_option_with_2(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty/class").mkdir(parents=True)
    assert run(["plan", os.fspath(tmp_path / "missing")]) == 1
    assert run(["plan", os.fspath(tmp_path / "empty")]) == 1
    assert "holds no images" in capsys.readouterr().err
    with pytest.raises(SourceError):
        estimate(tmp_path / "missing")
    assert run(["plan", os.fspath(tree), "--dtype", "float8"]) == 2
    assert "dtype: got 'float8'; allowed: float32, float16, uint8" in capsys.readouterr().err
    assert run(["plan", os.fspath(tree), "--seconds", "-1"]) == 2
    with pytest.raises(UsageError, match="one image takes 12288 bytes"):
        look(tree, shard_size="1kB")


def test_a_foreign_folder_as_out_is_refused_as_by_the_build(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not a gpu-npz dataset"):
        look(tree, tmp_path)


def test_an_out_inside_of_src_is_refused_as_by_build(make_tree: MakeTree) -> None:
    src = make_tree({"a/1.jpg": "jpeg"})
    with pytest.raises(UsageError, match="lies inside SRC"):
        estimate(src, BuildConfig(), src / "out", seconds=0)


def test_the_size_of_compressed_images_is_that_of_the_measured_ones(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree({f"a/{number}.jpg": "jpeg" for number in range(9)})
    config = BuildConfig(device="cpu", size=64, shard_size=3, workers=1, compress="deflate")
    report = build(src, tmp_path / "out", config)
    found = estimate(src, config, seconds=1)
    assert found.output_bytes == pytest.approx(report.dataset_bytes, rel=0.02)
    assert found.output_bytes < estimate(src, config, seconds=0).output_bytes / 1.2
