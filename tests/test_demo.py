"""The demo does what it says, twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpu_npz
from gpu_npz.cli.main import run


def test_the_demo_makes_builds_and_verifies_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    assert run(["demo", str(folder), "--images", "40"]) == 0
    said = capsys.readouterr().out
    assert "40 pictures in 10 classes" in said
    assert "1 empty, 1 not-an-image, 2 truncated" in said
    assert "1 shard: OK" in said
    assert len(gpu_npz.open_dataset(folder / "dataset")) == 40
    assert run(["demo", str(folder), "--images", "40"]) == 0
    assert "nothing was left to build" in capsys.readouterr().out


def test_the_broken_files_of_the_demo_are_its_rejects(tmp_path: Path) -> None:
    from gpu_npz.bench.pictures import make_images

    made = make_images(tmp_path / "images", count=20)
    config = gpu_npz.BuildConfig(device="cpu", backend="pillow", workers=0, size=32)
    report = gpu_npz.build(made.folder, tmp_path / "out", config)
    lines = (tmp_path / "out/rejects.jsonl").read_text()
    assert report.rejects == len(made.bad)
    assert all(f'"{path}"' in lines for path in made.bad.values())


def test_the_demo_writes_into_no_folder_that_is_somebody_elses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["demo", str(tmp_path)]) == 2
    assert "choose a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
