"""The runner of `tests/gpu/run`: each step in a process of its own, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runner import SUMMARY_LINES, Context, Runner, Step

STEPS = """
import ctypes, os, subprocess, sys, time

def well(context, number=0):
    return {"images": context.images, "summary": [f"number {number}", "second line"]}

def wrong(context):
    assert 1 + 1 == 3, "one and one are not three"

def crash(context):
    ctypes.string_at(0)

def hang_in_a_child(context):
    child = [sys.executable, "-c", "def deep_in_the_child():\\n import time; time.sleep(600)\\ndeep_in_the_child()"]
    process = subprocess.Popen(child, start_new_session=True)
    with open(os.path.join(context.place, "child"), "w") as file:
        file.write(str(process.pid))
    hang_with_the_gil()

def hang_with_the_gil():
    ctypes.PyDLL(None).sleep(600)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "tried.py").write_text(STEPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Runner(Context("SRC", str(tmp_path), "cpu", 7), tmp_path / "results", 60)


def test_a_step_that_crashes_or_raises_does_not_keep_the_others_from_running(runner: Runner, tmp_path: Path) -> None:
    steps = Step("tried:crash", 20), Step("tried:wrong", 20), Step("tried:well", 20, {"number": 3})
    runner.run([*steps, Step("tried:well", 20, gpu=True)])
    found = json.loads((tmp_path / "results/results.json").read_text())["steps"]
    assert [each["outcome"] for each in found] == ["failed", "failed", "ok", "left out"]
    assert "string_at" in "".join(found[0]["stacks"].values())
    assert "one and one are not three" in found[1]["error"]
    assert found[2]["result"]["images"] == 7
    summary = runner.summary()
    assert "failed: crash, wrong" in summary[0]
    assert any("well 3 " in line and "number 3" in line for line in summary)


def test_a_step_that_hangs_leaves_the_stacks_of_all_its_processes_and_is_killed(runner: Runner, tmp_path: Path) -> None:
    runner.run([Step("tried:hang_in_a_child", 3), Step("tried:well", 20)])
    hung, well = json.loads((tmp_path / "results/results.json").read_text())["steps"]
    assert (hung["outcome"], well["outcome"]) == ("hung", "ok")
    stacks = "".join(hung["stacks"].values())
    assert "hang_with_the_gil" in stacks
    assert "deep_in_the_child" in stacks
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30
    while _lives(child):
        assert time.monotonic() < deadline


def _lives(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_the_results_of_the_steps_so_far_are_stored_after_each(runner: Runner, tmp_path: Path) -> None:
    stored = []
    for number in range(2):
        runner.run([Step("tried:well", 20, {"number": number})])
        stored.append(len(json.loads((tmp_path / "results/results.json").read_text())["steps"]))
    assert stored == [1, 2]


def test_a_step_for_which_too_little_time_is_left_is_not_started(runner: Runner) -> None:
    runner.run([Step("tried:well", 1000)])
    assert runner.results[0]["outcome"] == "left out"
    assert "and it may take more" in runner.summary()[1]


def test_the_summary_has_at_most_40_lines(runner: Runner) -> None:
    runner.results = [
        {"step": "well", "outcome": "ok", "seconds": 1.0, "result": {"summary": ["x" * 1000, "y"]}} for _ in range(30)
    ]
    summary = runner.summary()
    assert len(summary) == SUMMARY_LINES
    assert max(map(len, summary)) <= 160


def test_the_script_runs_a_step_on_the_cpu_and_ends_with_its_summary(tree: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "run"
    arguments = [tree, tmp_path / "results", "--device", "cpu", "--steps", "machine"]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout
    assert {"machine", "files"} == {
        step["step"] for step in json.loads((tmp_path / "results/results.json").read_text())["steps"]
    }
