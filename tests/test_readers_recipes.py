"""The recipes of the pages for libraries without a reader of their own, each run in a process of its own.

The libraries are no part of the test extra; `.ci/run` installs them and runs this file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support import MakeDataset, python, readme_example


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, uint8 NCHW. Read only."""
    return make_dataset(dtype="uint8")


def run(library: str, pixels: Path, folder: Path, ending: str = "") -> str:
    """What the recipe for a library prints with batches of 16, and what the lines after it print."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"NOT TESTED: {library} is not installed")
    code = readme_example(f"import {library}").replace("/data/train-npz", str(pixels)).replace("256", "16")
    return python("-c", code + ending, cwd=folder, timeout=300).stdout


def test_jax_gets_all_rows_in_each_epoch(pixels: Path, tmp_path: Path) -> None:
    printed = run("jax", pixels, tmp_path).splitlines()
    assert printed == [f"({n}, 3, 12, 16) float32 ({n},)" for n in (16, 16, 8, 16, 16, 8)]


def test_grain_gets_all_rows_in_each_epoch(pixels: Path, tmp_path: Path) -> None:
    *printed, last = run("grain", pixels, tmp_path, "print(*rows)\n").splitlines()
    assert printed == ["(16, 3, 12, 16) float32 (16,)"] * 5
    rows = [int(row) for row in last.split()]
    first, second = rows[:40], rows[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_lightning_trains_on_whole_batches(pixels: Path, tmp_path: Path) -> None:
    printed = run("lightning", pixels, tmp_path, "print()\nprint(trainer.global_step, trainer.num_training_batches)\n")
    assert printed.splitlines()[-1] == "4 2"
