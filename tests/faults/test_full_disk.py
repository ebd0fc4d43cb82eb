"""A few sizes of `tests/faults/full`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_build_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "full"), "--sizes", "4", "--json", str(tmp_path / "result")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("a user may mount nothing here: " + result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "result").read_text()) == {"sizes": 4, "full": 4, "faults": []}
