"""A small part of the hostile corpus through each decoder; `tests/faults/hostile` takes all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_no_file_harms_the_process_its_neighbours_or_the_agreement_of_the_backends(tmp_path: Path) -> None:
    for module in ("nvidia.dali", "imagecodecs", "tifffile", "pydicom"):
        pytest.importorskip(module)
    script = Path(__file__).parent / "hostile"
    options = ["--truncations", "12", "--flips", "25", "--seed", "1", "--json", str(tmp_path / "result.json")]
    result = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    for found in summary.values():
        assert found["files"] > 2000
        assert found["unchanged"] == found["good neighbours"] > 250
        assert found["crashed"] == found["timed out"] == 0
        assert found["worker memory MB"] < 700  # see README.md
