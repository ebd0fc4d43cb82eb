"""verify --deep: rows beside their source files decoded again, and what was changed on either side."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import build_cpu, file_bytes, pack

import gpu_npz
from gpu_npz.audit.compare import MEAN_LEVELS, compare
from gpu_npz.builder.maintenance import repair
from gpu_npz.cli.main import run
from gpu_npz.errors import FormatError, IncompleteError, MismatchError, SourceError, UsageError
from gpu_npz.npz.reader import NpzReader
from gpu_npz.preprocess.base import DECODING_REVISION


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """12 files in two classes, one of which is bad."""
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes("half" if number == 4 else "jpeg", seed=number, size=(60, 70)))
    return tmp_path / "images"


build = functools.partial(build_cpu, size="24x32", shard_size=5)


def alter(out: Path, row: int, change: Callable[[np.ndarray], object]) -> None:
    """Changes the pixels of a row, whose CRC-32 is none of this comparison's business."""
    data = gpu_npz.open_dataset(out)
    shard, at = data._find(row)
    path = data.shard(shard).path
    member = NpzReader(path).directory.members["images"]
    pixels = np.memmap(path, data.dtype, "r+", member.data_offset, member.shape)
    change(pixels[at])
    pixels.flush()


def other_versions(out: Path) -> None:
    """Makes the dataset one of another Pillow."""
    manifest = out / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"pillow": "', '"pillow": "1.'))


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "uint8", "shuffle": 3},
        {"dtype": "float16", "layout": "NHWC", "channels": "bgr", "resize_mode": "pad"},
        {"dtype": "float32", "channels": "gray", "normalize": "signed", "resize_mode": "center-crop"},
        {"on_reject": "blank"},
        {"normalize": "standardize", "dtype": "float16", "channels": "bgr"},
        {"normalize": "maxabs", "on_reject": "blank", "dtype": "uint8"},
        {"backend": "dali"},
    ],
    ids=str,
)
def test_a_sound_dataset_is_what_its_files_give_bit_for_bit(values: dict[str, Any], src: Path, tmp_path: Path) -> None:
    backend = values.get("backend", "pillow")
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    out = build(src, tmp_path / "out", **values)
    for count in (4, 11, 10**12):
        found = compare(out, count)
        assert (found.rows, found.exact, found.mean, found.max) == (min(count, 11), True, 0, 0)
        assert found.problems == ()
        assert found.environment["backend"] == backend


def test_a_row_that_differs_in_one_bit_is_found(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out")
    whole = gpu_npz.open_dataset(out)[6].copy()
    alter(out, 6, lambda image: image.view(np.uint32)[0, 0].__setitem__(0, image.view(np.uint32)[0, 0, 0] ^ 1))
    (problem,) = compare(out, 100).problems
    assert problem.file == "shard-00001.npz"
    assert problem.what == (
        f"row 6, {gpu_npz.open_dataset(out).paths[6]!r}: not what its source file gives, bit for bit: mean 0.000, "
        "max 0 levels"
    )
    assert not np.array_equal(whole, gpu_npz.open_dataset(out)[6])


def test_other_versions_are_compared_within_the_tolerance(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out", dtype="uint8")
    other_versions(out)
    alter(out, 1, lambda image: image.__setitem__(..., np.where(image < 255, image + 1, image)))
    found = compare(out, 100)
    assert (found.exact, found.problems, found.max) == (False, (), 1)
    assert 0 < found.mean <= 1 / 11
    alter(out, 1, lambda image: image.__setitem__(..., np.where(image < 245, image + 10, image)))
    found = compare(out, 100)
    assert found.max == 11
    (problem,) = found.problems
    assert problem.what.startswith("row 1, ")
    assert f"allowed: mean {MEAN_LEVELS}" in problem.what


@pytest.mark.parametrize("kind", ["standardize", "minmax", "maxabs", "l2"])
def test_values_by_an_image_s_own_statistics_are_compared_in_its_levels(kind: str, src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out", normalize=kind)
    other_versions(out)
    step = float(np.diff(np.unique(gpu_npz.open_dataset(out)[1])).min())  # of one level
    alter(out, 1, lambda image: image.__setitem__((0, 3), image[0, 3] + 3 * step))
    found = compare(out, 100)
    assert (found.exact, found.problems, found.max) == (False, (), 3)
    alter(out, 1, lambda image: image.__setitem__(..., image + 3 * step))
    (problem,) = compare(out, 100).problems
    assert problem.what.startswith("row 1, ")


def test_the_tolerance_tells_other_settings_and_other_images_apart(src: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in src.rglob("*.jpg")}
    for change in ({"channels": "bgr"}, {"resize_mode": "center-crop"}, {"exif_orientation": True, "shuffle": 1}):
        out = build(src, tmp_path / str(change), dtype="uint8")
        like = build(src, tmp_path / f"{change} like", dtype="uint8", **change)
        for name in ("shard-00000.npz", "shard-00001.npz", "shard-00002.npz"):  # its pixels in the other's place
            pixels, member = NpzReader(like / name)["images"], NpzReader(out / name).directory.members["images"]
            rows = min(len(pixels), member.shape[0])
            stored = np.memmap(out / name, np.uint8, "r+", member.data_offset, member.shape)
            stored[:rows] = pixels[:rows]
            stored.flush()
        other_versions(out)
        assert len(compare(out, 100).problems) >= 8, change
    assert first == {path.name: path.read_bytes() for path in src.rglob("*.jpg")}


def test_files_that_changed_or_are_gone_are_named(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out")
    size = (src / "a/00.jpg").stat().st_size
    (src / "a/00.jpg").write_bytes(file_bytes("jpeg", seed=99))
    (src / "a/02.jpg").unlink()
    (src / "b/01.jpg").write_bytes(b"no image" * 2)
    data = bytearray((src / "b/03.jpg").read_bytes())
    data[-300:-2] = bytes(298)
    (src / "b/03.jpg").write_bytes(data)
    found = compare(out, 100)
    what = {problem.what.split("'")[1]: problem.what for problem in found.problems}
    assert set(what) == {"a/00.jpg", "a/02.jpg", "b/01.jpg", "b/03.jpg"}
    assert f"the source file has changed: {(src / 'a/00.jpg').stat().st_size} bytes, {size} when" in what["a/00.jpg"]
    assert "the source file gives no image now: missing" in what["a/02.jpg"]
    assert "has changed: 16 bytes" in what["b/01.jpg"]
    assert "not what its source file gives" in what["b/03.jpg"]
    assert found.rows == 8


def test_a_seed_chooses_the_rows(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out")
    for number in range(11):
        alter(out, number, lambda image: image.__setitem__(..., 0))
    chosen = [[problem.what for problem in compare(out, 3, seed=seed).problems] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 3


def test_very_many_problems_are_counted(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.audit.compare._MOST_PROBLEMS", 2)
    out = build(src, tmp_path / "out")
    for path in src.rglob("*.jpg"):
        path.unlink()
    *_, last = problems = compare(out, 100).problems
    assert (len(problems), last.what) == (3, "9 more problems like these")


def test_images_that_have_moved_are_named_and_found(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out")
    src.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="give --source SRC"):
        compare(out, 1)
    shutil.rmtree(out / ".gpu-npz")
    with pytest.raises(SourceError, match=r"job\.json.* is missing; give --source SRC"):
        compare(out, 1)
    assert compare(out, 100, source=tmp_path / "moved").rows == 11


@pytest.mark.parametrize("name", ["c/1.jpg", "a/1.jpg", "1.jpg"], ids=["other classes", "other names", "no classes"])
def test_a_source_that_is_not_the_dataset_s_is_said_to_be_something_else(src: Path, tmp_path: Path, name: str) -> None:
    out, other = build(src, tmp_path / "out"), tmp_path / "other"
    (other / name).parent.mkdir(parents=True)
    (other / name).write_bytes(file_bytes("jpeg"))
    with pytest.raises(
        MismatchError, match=rf"built from '{src}', and '{other}' is something else, because it has none"
    ):
        compare(out, 1, source=other)
    with pytest.raises(MismatchError, match="is something else"):
        repair(out, source=other)


def test_damaged_and_unfinished_datasets_say_so(src: Path, tmp_path: Path) -> None:
    out = build(src, tmp_path / "out")
    with pytest.raises(UsageError, match="--deep: got 0"):
        compare(out, 0)
    os.truncate(out / "shard-00001.npz", 9000)
    found = compare(out, 100)
    assert [problem.file for problem in found.problems] == ["shard-00001.npz"]
    assert found.rows == 6
    os.truncate(out / "index.npz", 100)
    with pytest.raises(FormatError, match=r"index\.npz"):
        compare(out, 100)
    (out / "dataset.json").unlink()
    with pytest.raises(IncompleteError):
        compare(out, 100)


def test_the_command_counts_both_kinds_of_problems(src: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(build(src, tmp_path / "out"))
    assert run(["verify", out, "--deep", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("11 rows decoded again by backend pillow")
    assert "to be equal bit for bit: mean difference 0.000 levels, max 0" in lines[0]
    assert lines[1].endswith(": OK")
    (src / "a/02.jpg").unlink()
    other_versions(Path(out))
    assert run(["verify", out, "--deep", "100", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], len(result["problems"]), result["deep"]["rows"]) == (False, 1, 10)
    os.truncate(Path(out, "shard-00001.npz"), 9000)
    assert run(["verify", out, "--deep", "100"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("shard-00001.npz: ") == 1
    versions = f"backend pillow, device cpu, decoding_revision {DECODING_REVISION}, pillow 1."
    assert f"within a mean of 2 levels, since {versions}" in shown
    os.truncate(Path(out, "index.npz"), 100)
    assert run(["verify", out, "--deep", "100"]) == 1
    assert "--deep cannot read it" in capsys.readouterr().out
    assert run(["verify", out, "--source", "x"]) == 2
    assert "--repair and --deep" in capsys.readouterr().err


def test_labels_of_a_table_play_no_part_in_finding_the_images_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sorted(path.relative_to(src).as_posix() for path in src.rglob("*.jpg"))
    (tmp_path / "labels.csv").write_text("path,label,patient\n" + "".join(f"{row},{row[0]},{row}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    out = build(src, tmp_path / "out", labels="labels.csv", split="val=0.3/train", split_by="patient")
    (tmp_path / "labels.csv").unlink()
    monkeypatch.chdir(src)
    assert not compare(out, 5).problems


def test_a_source_with_other_files_is_refused_before_it_is_read(
    src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {path.relative_to(src).as_posix(): path.read_bytes() for path in sorted(src.rglob("*.jpg"))}
    out = build(pack(tmp_path / "t.tar", files), tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = pack(tmp_path / "other/t.tar", dict([*files.items()][:2]))
    with pytest.raises(MismatchError, match="has changed since the plan"):
        compare(out, 5, source=other)
    assert "SRC was" not in caplog.text
