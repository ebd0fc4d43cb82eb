"""Small inputs that expand to much: no command takes a gigabyte of memory; `tests/faults/memory` takes all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from expanding import ROWS, measured

BOUND = 1_000_000_000
QUICK = {  # and what each says
    "Parquet, a label of 1 MB in 4,096 rows": "has a text of 1000000 bytes; at most 131072 are read",
    "Parquet, an image of 50 MB in 64 rows": "built",
    "web server, 122 kB of gzip for 120 MB": "64 rejects: unreadable, the server compresses it (gzip)",
    "CIFAR, 10 MB of one-byte opcodes": "more than 1000000 opcodes",
    "dataset.json of 30 MB": "30000046 bytes with 20000005 values; at most",
    "table, a name of 4,000 bytes in a shard of 60,000": "a path of 4023 bytes",
    "--classes-from that does not end": "more than 33554432 bytes",
    "--config that does not end": "more than 1048576 bytes",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_small_input_that_expands_to_much_takes_less_than_a_gigabyte(name: str, tmp_path: Path) -> None:
    for module in ("pyarrow", "aiohttp"):
        pytest.importorskip(module)
    found = measured(ROWS[name], tmp_path)
    assert QUICK[name] in found.said
    assert found.peak_bytes < BOUND
