"""A few sizes of `tests/faults/full`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import python


def test_a_build_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    result = python(Path(__file__).parent / "full", "--sizes", "4", "--json", tmp_path / "result", status=None)
    if result.returncode == 77:
        pytest.skip("a user may mount nothing here: " + result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "result").read_text()) == {"sizes": 4, "full": 4, "faults": []}
