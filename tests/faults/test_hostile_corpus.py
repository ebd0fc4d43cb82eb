"""A small part of the hostile corpus through each decoder; `tests/faults/hostile` takes all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import python

# A decoder reads these up to limits that other tests prove with less: it takes minutes.
SLOW = ("3,000,000 items", "bomb of elements", "1,000,000 chunks")


def test_no_file_harms_the_process_its_neighbours_or_the_agreement_of_the_backends(tmp_path: Path) -> None:
    for module in ("nvidia.dali", "imagecodecs", "tifffile", "pydicom"):
        pytest.importorskip(module)
    script = Path(__file__).parent / "hostile"
    options = ["--truncations", "12", "--flips", "25", "--splices", "4,64", "--seed", "1"]
    for damage in SLOW:
        options += ["--without", damage]
    python(script, *options, "--json", tmp_path / "result.json")
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    for found in summary.values():
        assert found["files"] > 2000
        assert found["unchanged"] == found["good neighbours"] > 250
        assert found["crashed"] == found["timed out"] == 0
        assert found["worker memory MB"] < 700  # see README.md
