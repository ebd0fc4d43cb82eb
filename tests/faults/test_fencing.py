"""Who has lost the lock publishes nothing: a build sleeps, another takes OUT over, and the first wakes up.

`tests/faults/fencing` tries every moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import pytest

DISK = [
    ("link", "/shard-00004.npz", False),  # a name that the second build does not have
    ("unlink", "/.shard-00001.npz", False),  # just published, not yet checked
    ("link", "/commits/shard-00000.json", False),
    ("link", "/dataset.json", False),
    ("link", "/report.json", False),
    ("rename", "/dataset.json", True),  # a removal
]
S3 = [("put_object", "/dataset.json", False), ("delete_object", "/shard-00000.npz", True)]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.pictures(tmp_path_factory.mktemp("src"))


def check(src: Path, out: str, place: Path, call: str, name: str, over: bool) -> None:
    if over:
        assert harness.takeover(src, out, place / "before", -1, "--size", "16")[0] is None
    fault, _ = harness.takeover(src, out, place, f"{call} {name}", *(["--overwrite"] if over else []))
    assert fault is None


@pytest.mark.parametrize(("call", "name", "over"), DISK)
def test_a_build_that_slept_before_a_call_leaves_the_folder_to_the_build_that_took_over(
    src: Path, tmp_path: Path, call: str, name: str, over: bool
) -> None:
    check(src, str(tmp_path / "out"), tmp_path / "place", call, name, over)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with harness.bucket() as url:
        yield url


@pytest.mark.parametrize(("call", "name", "over"), S3)
def test_a_build_that_slept_before_a_request_leaves_the_bucket_to_the_build_that_took_over(
    src: Path, bucket: str, tmp_path: Path, call: str, name: str, over: bool
) -> None:
    check(src, f"{bucket}/{tmp_path.name}", tmp_path / "place", call, name, over)
