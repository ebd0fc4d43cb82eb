"""The benches run, tiny, so that they cannot rot. What they measure is asserted nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_npz.bench import pipeline
from gpu_npz.cli.main import run


def test_bench_pipeline_compares_each_way_with_its_baseline(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "_WRITER_BATCH_ROWS", 2)
    options = ["--images", "50", "--rounds", "2", "--folder", str(tmp_path)]
    assert run(["bench", "pipeline", str(tree), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert {"loop float32", "build float32", "loop uint8", "build uint8", "savez", "shard writer"} <= rows.keys()
    assert all(len(row["rates"]) == 2 and row["ratio"] > 0 for row in rows.values())
    assert rows["build uint8"]["baseline"] == "loop uint8"
    assert {"processor", "numpy", "pillow", "libjpeg"} <= result["machine"].keys()
    assert not list(tmp_path.iterdir())
    assert run(["bench", "pipeline", str(tree), *options]) == 0
    assert "of savez" in capsys.readouterr().out
