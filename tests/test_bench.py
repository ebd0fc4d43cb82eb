"""The benches run, tiny, so that they cannot rot. What they measure is asserted nowhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_npz.bench import pipeline, sweep
from gpu_npz.bench.rates import Tick, in_turns
from gpu_npz.cli.main import run

BACKENDS = [
    ["--backend", "pillow", "--device", "cpu"],
    ["--backend", "dali", "--device", "cpu"],
    pytest.param(["--device", "0", "--require-gpu"], marks=pytest.mark.gpu),
]
STAGES = ["read", "decode", "resize", "normalize", "write"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that must end well and gives what it prints, as JSON where it is that."""

    def call(*arguments: str) -> Any:
        assert run(list(arguments)) == 0
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return call


@pytest.mark.parametrize("backend", BACKENDS, ids=" ".join)
def test_bench_pipeline_measures_each_stage_and_whole_builds(
    backend: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    if "dali" in backend:
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(pipeline, "_WRITER_BATCH_ROWS", 2)
    options = ["--images", "50", "--rounds", "2", "--folder", str(tmp_path), "--size", "32", "--batch-size", "8"]
    result = printed("bench", "pipeline", str(tree), *backend, *options, "--json")
    rows = {row["name"]: row for row in result["rows"]}
    on_gpu, by_pillow = "--require-gpu" in backend, "pillow" in backend
    expected = STAGES[:-1] + ["transfer"] * on_gpu + STAGES[-1:]
    assert list(rows)[: len(expected)] == expected
    assert {"build float32", "build float16", "build uint8", "savez", "bare write", "shard writer"} <= rows.keys()
    assert ("loop uint8" in rows) == by_pillow
    assert "usual script" in rows["all cores float32"]["shares"] if by_pillow else "usual script" not in rows
    for before, name in itertools.pairwise(expected):
        assert before in rows[name]["shares"]
    assert "resize" in rows["build uint8"]["shares"]
    assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in rows.values())
    assert (result["settings"]["images"], result["settings"]["batch_size"]) == (50, 8)
    assert {"processor", "cores", "numpy", "pillow", "libjpeg", "device"} <= result["machine"].keys()
    assert not list(tmp_path.iterdir())
    text = printed("bench", "pipeline", str(tree), *backend, *options)
    assert "of savez" in text
    assert "of resize" in text


@pytest.mark.parametrize("backend", BACKENDS, ids=" ".join)
def test_a_sweep_tries_options_of_the_backend_but_those_that_are_given(
    backend: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    if "dali" in backend:
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(sweep, "_FIRST_IMAGES", {"cuda": 64, "cpu": 16})
    monkeypatch.setattr(sweep, "_MAX_IMAGES", 64)
    options = ["--sweep", "--size", "32", "--open-shards", "1", "--folder", str(tmp_path)]
    result = printed("bench", "pipeline", str(tree), *backend, *options, "--json")
    tried = {name for trial in result["trials"] for name in trial["options"]}
    assert "batch_size" in tried
    assert "open_shards" not in tried
    assert ("workers" in tried) == ("pillow" in backend)
    assert ("prefetch" in tried) == ("pillow" not in backend)
    assert ("hw_decoder_load" in tried) == ("--require-gpu" in backend)
    assert result["default"]["open_shards"] == 1
    assert not list(tmp_path.iterdir())


def test_a_sweep_prints_the_options_that_were_plainly_faster(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    rates = iter([100.0] * 3 + [150.0, 120.0, 90.0] + [100.0, 150.0] * 3)
    monkeypatch.setattr(sweep, "_MAX_IMAGES", 64)
    monkeypatch.setattr(sweep, "rate", lambda way: (next(rates), 0.0))
    options = ["--sweep", "--device", "cpu", "--folder", str(tmp_path), "--open-shards", "1"]
    text = printed("bench", "pipeline", str(tree), *options)
    assert text.endswith("1.50 times as fast as a build's own choice:\n    --batch-size 16\n")
    rates = iter([100.0] * 3 + [150.0, 120.0, 90.0] + [100.0, 101.0] * 3)  # it was chance
    assert "nothing was plainly faster" in printed("bench", "pipeline", str(tree), *options)


def test_a_sweep_that_has_no_time_left_tries_nothing_more(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_MAX_IMAGES", 64)
    assert [trial.options for trial in sweep.sweep(tree, seconds=0, folder=str(tmp_path)).trials] == [{}, {}, {}]


def test_the_first_round_and_the_first_batch_of_each_way_do_not_count() -> None:
    rounds = []

    def way(tick: Tick) -> None:
        rounds.append(len(rounds))
        for _ in range(3):
            tick(10)

    (row,) = in_turns({"way": ((), way)}, 2, lambda text: None)
    assert (len(rounds), len(row.rates)) == (3, 2)


def test_resize_mode_none_is_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "pipeline", str(tree), "--resize-mode", "none"]) == 2
    assert "choose another mode" in capsys.readouterr().err
