"""Files that an earlier version wrote read and verify for ever, and today's writer makes the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arrays_of

import gpu_npz
from gpu_npz.npz.reader import NpzReader
from gpu_npz.npz.writer import NpzWriter

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())

every_npz = pytest.mark.parametrize("file", EXPECTED["arrays"])
every_dataset = pytest.mark.parametrize("name", EXPECTED["datasets"])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def described(array: NDArray[Any]) -> str:
    return f"{array.dtype.str} {array.shape} {digest(array.tobytes())}"


def test_the_files_are_those_that_were_made() -> None:
    files = {path.relative_to(GOLDEN).as_posix(): path for path in GOLDEN.glob("*/*")}
    assert {name: digest(path.read_bytes()) for name, path in files.items()} == EXPECTED["files"]


@every_npz
def test_numpy_load_reads_every_array(file: str) -> None:
    assert {name: described(array) for name, array in arrays_of(GOLDEN / file).items()} == EXPECTED["arrays"][file]


@every_npz
def test_our_reader_reads_every_array(file: str) -> None:
    reader = NpzReader(GOLDEN / file)
    assert {name: described(reader.rows(name)[:]) for name in reader.directory.members} == EXPECTED["arrays"][file]
    assert all(reader.crc_matches(name) for name in reader.directory.members)


@pytest.mark.parametrize("file", [file for file in EXPECTED["arrays"] if not file.startswith("deflate/shard")])
def test_the_writer_makes_the_same_bytes_of_the_same_arrays(file: str, tmp_path: Path) -> None:
    with NpzWriter(tmp_path / "again.npz") as again:
        for name, array in arrays_of(GOLDEN / file).items():
            again.add(name, array)
        again.close(NpzReader(GOLDEN / file).directory.comment)
    assert (tmp_path / "again.npz").read_bytes() == (GOLDEN / file).read_bytes()


@every_dataset
def test_a_dataset_verifies(name: str) -> None:
    result = gpu_npz.verify(GOLDEN / name)
    assert result.problems == ()
    assert result.rows == len(EXPECTED["datasets"][name]["index"])


@every_dataset
def test_a_dataset_opens_with_all_that_it_had(name: str) -> None:
    dataset, expected = gpu_npz.open_dataset(GOLDEN / name), EXPECTED["datasets"][name]
    shards = [arrays_of(path)["images"] for path in sorted((GOLDEN / name).glob("shard-*.npz"))]
    np.testing.assert_array_equal(dataset[:], np.concatenate(shards))
    assert list(dataset.image_shape) == expected["shape"]
    assert dataset.dtype.name == expected["dtype"]
    assert (None if dataset.class_names is None else list(dataset.class_names)) == expected["classes"]
    assert dataset.paths[:] == list(dataset.paths) == expected["paths"]
    for column in ("labels", "valid", "index"):
        found = getattr(dataset, column)
        assert (None if found is None else found.tolist()) == expected[column]


@every_dataset
def test_a_dataset_normalizes_to_the_same_bits(name: str) -> None:
    images = gpu_npz.open_dataset(GOLDEN / name).normalized(slice(None))
    assert digest(np.ascontiguousarray(images).tobytes()) == EXPECTED["datasets"][name]["normalized"]


@every_dataset
def test_a_changed_golden_file_would_not_verify(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    content = bytearray((copy / "shard-00000.npz").read_bytes())
    content[4096] ^= 2
    (copy / "shard-00000.npz").write_bytes(content)
    assert [problem.file for problem in gpu_npz.verify(copy).problems] == ["shard-00000.npz"]
