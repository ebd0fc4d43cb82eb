"""Builds by two workers in which one call to the disk goes wrong: the same command again gives the same output.

Every call and every kind of fault takes two hours: `tests/faults/run` does that. Here, some of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest

KINDS = ("kill", "power", "EIO", "ESTALE", "FROM:ENOSPC", "FROM:EROFS")
POINTS = 6


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(src: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The content of OUT, and the calls that made it."""
    place = tmp_path_factory.mktemp("undisturbed")
    run = harness.build(src, place / "out", place / "log")
    assert (run.code, run.said) == (0, "")
    content = harness.contents(place / "out")
    assert content["rejects.jsonl"].count(b"\n") == 3
    return content, run.calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_makes_good_what_went_wrong(
    src: Path, undisturbed: tuple[dict[str, bytes], list[dict[str, Any]]], tmp_path: Path, kind: str
) -> None:
    content, calls = undisturbed[0], len(undisturbed[1])
    assert calls > 150
    start = KINDS.index(kind) * calls // (POINTS * len(KINDS))  # each kind at other calls
    for at in range(start, calls, calls // POINTS):
        fault = harness.trial(src, tmp_path / str(at), content, at, kind)
        assert fault is None, f"{kind} at call {at}: {fault}"


def test_every_file_is_flushed_before_it_gets_its_name_and_its_folder_afterwards(
    undisturbed: tuple[dict[str, bytes], list[dict[str, Any]]],
) -> None:
    content, calls = undisturbed
    unflushed: set[str] = set()
    named: dict[str, str] = {}  # files with a new name in a folder that was not flushed since
    published = set()
    for call in calls:
        path, to = call["path"], call.get("to")
        if call["call"] in ("write", "pwrite", "pwritev", "ftruncate"):
            unflushed.add(path)
        elif call["call"] == "fsync":
            unflushed.discard(path)
            named = {name: folder for name, folder in named.items() if folder != path}
        elif to is not None and ".gpu-npz/lock" not in to and "/.lock." not in to:  # the lock need not survive
            assert path not in unflushed, f"{to} was not flushed before it got its name"
            named[to] = str(Path(to).parent)
            published.add(to)
    assert not named
    assert len(published) > len(content) - 1  # each file, the report too; the lock is gone


def test_the_shim_finds_what_is_not_flushed(
    src: Path, undisturbed: tuple[dict[str, bytes], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Of a build that says that it has flushed and has not, power loss leaves less than a plain kill."""
    content, calls = undisturbed[0], len(undisturbed[1])
    run = harness.build(src, tmp_path / "out", tmp_path / "log", at=calls - 5)
    unflushed = [call for call in run.calls if call["call"] != "fsync"]
    harness.power_loss(unflushed, -1)
    assert len(harness.contents(tmp_path / "out")) < len(content) // 2
