"""A few sizes of `tests/faults/full`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import build_cpu, python


def test_a_build_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    result = python(Path(__file__).parent / "full", "--sizes", "4", "--json", tmp_path / "result", status=None)
    if result.returncode == 77:
        pytest.skip("a user may mount nothing here: " + result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "result").read_text()) == {"sizes": 4, "full": 4, "faults": []}


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_an_export_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(tmp_path: Path, kind: str) -> None:
    if not sys.platform.startswith("linux") or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("a user may mount nothing here")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(100) % 4)
    out = build_cpu(tmp_path / "x.npz", tmp_path / "out", size=32, dtype="uint8")
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    options = "--as webdataset --shard-size 20" if kind == "webdataset" else "--as folder"
    export = f"{sys.executable} -m gpu_npz export {out} {{}} {options}"
    script = f"""
        mount -t tmpfs -o size=300k tmpfs {disk}
        {export.format(disk / "e")}; echo $?
        find {disk} -name '.*.tmp' -o -name '*.lock'; find {disk} -name '*.[pt][na][gr]' | wc -l
        mount -o remount,size=16m tmpfs {disk}
        {export.format(disk / "e")}; echo $?
        cp -r {disk}/e {copy}
    """
    result = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=True)
    name = r"e/\d/000\d\d.png" if kind == "folder" else r"e/shard-00000\d.tar"
    assert re.search(rf"{name}': No space left on device; free some space, then run the same command", result.stderr)
    first, there, done, second = result.stdout.splitlines()
    assert (first, second) == ("1", "0")
    existing = int(there) * (20 if kind == "webdataset" else 1)
    assert 0 < existing < 100
    assert done == f"{disk}/e: exported 100 images ({kind}), of which {existing} existed already"
    whole = tmp_path / "whole"
    subprocess.run(export.format(whole).split(), check=True, capture_output=True)
    one, other = (
        {path.relative_to(at): path.read_bytes() for path in at.rglob("*") if path.is_file()} for at in (copy, whole)
    )
    assert one == other
