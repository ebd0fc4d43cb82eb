"""Builds by two workers in which one call to the disk goes wrong: the same command again gives the same output.

Every call and every kind of fault takes two hours: `tests/faults/run` does that. Here, some of each.
"""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

KINDS = ("kill", "power", "EIO", "ESTALE", "FROM:ENOSPC", "FROM:EROFS")
POINTS = 6


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(src: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The content of OUT, and how many calls made it."""
    place = tmp_path_factory.mktemp("undisturbed")
    run = harness.build(src, place / "out", place / "log")
    assert (run.code, run.said) == (0, "")
    content = harness.contents(place / "out")
    assert content["rejects.jsonl"].count(b"\n") == 3
    return content, len(run.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_makes_good_what_went_wrong(
    src: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path, kind: str
) -> None:
    content, calls = undisturbed
    assert calls > 150
    start = KINDS.index(kind) * calls // (POINTS * len(KINDS))  # each kind at other calls
    for at in range(start, calls, calls // POINTS):
        fault = harness.trial(src, tmp_path / str(at), content, at, kind)
        assert fault is None, f"{kind} at call {at}: {fault}"


def test_the_shim_finds_what_is_not_flushed(
    src: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Of a build that says that it has flushed and has not, power loss leaves less than a plain kill."""
    content, calls = undisturbed
    run = harness.build(src, tmp_path / "out", tmp_path / "log", at=calls - 5)
    unflushed = [call for call in run.calls if call["call"] != "fsync"]
    harness.power_loss(unflushed, -1)
    assert len(harness.contents(tmp_path / "out")) < len(content) // 2
