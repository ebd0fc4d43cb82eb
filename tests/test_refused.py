"""Builds that are refused leave nothing, and a plan without a shard stands in nobody's way."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import MakeTree, cpu_config, python

from gpu_npz.builder.build import build, build_split
from gpu_npz.builder.estimate import estimate
from gpu_npz.dataset.job import Job
from gpu_npz.errors import BackendError, GpuNpzError, LockedError, MismatchError, ShardError, StorageError
from gpu_npz.storage import file_lock
from gpu_npz.storage.local import LocalStorage

Kill = Callable[..., None]

# A build that is killed when it has stored its plan and no worker has begun.
KILLED = """
import os, signal, sys
import gpu_npz.builder.build
from gpu_npz.cli.main import run
gpu_npz.builder.build.run = lambda *of, **named: os.kill(os.getpid(), signal.SIGKILL)
run(["build", *sys.argv[1:], "--device", "cpu", "--size", "16", "--shard-size", "8"])
"""


settings = functools.partial(cpu_config, shard_size=8)


def files(folder: Path) -> dict[str, bytes]:
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An OUT that is not there, nor is the folder around it."""
    return tmp_path / "datasets/out"


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Every filesystem now has so many bytes free."""

    def fill(free: int) -> None:
        found = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=10**6, f_files=0, f_favail=0)
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return fill


@pytest.fixture
def killed(tree: Path, out: Path) -> Kill:
    """Begins a build in `out` that is killed right after it has stored its plan."""

    def kill(*options: str) -> None:
        python("-c", KILLED, tree, out, *options, status=-9)

    return kill


# Refused


@pytest.mark.parametrize("values", [{}, {"part": "1/2"}, {"split": "val=0.2"}], ids=str)
def test_a_build_that_does_not_fit_leaves_nothing_and_its_advice_works(
    tree: Path, out: Path, small_disk: Callable[[int], None], values: dict[str, Any]
) -> None:
    small_disk(400_000)
    start: Any = build_split if "split" in values else build
    with pytest.raises(StorageError, match="--dtype uint8 would take"):
        start(tree, out, settings(size=64, **values))
    assert not out.parent.exists()
    small_disk(10**9)
    start(tree, out, settings(size=64, dtype="uint8", **values))


def test_what_does_not_fit_is_refused_before_its_statistics_are_measured(
    tree: Path, out: Path, small_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("gpu_npz.builder.planning.count_source")
    small_disk(400_000)
    with pytest.raises(StorageError, match="would take"):
        build(tree, out, settings(size=64, normalize="dataset"))
    assert not out.parent.exists()


def test_an_overwrite_that_does_not_fit_deletes_nothing(
    tree: Path, out: Path, small_disk: Callable[[int], None]
) -> None:
    build(tree, out, settings(dtype="uint8"))
    before = files(out)
    small_disk(0)
    with pytest.raises(StorageError, match="needs"):
        build(tree, out, settings(overwrite=True, size=64))
    assert files(out) == before
    build(tree, out, settings(overwrite=True, preflight=False))


@pytest.mark.parametrize("values", [{"shard_size": "1B"}, {"device": "auto", "require_gpu": True}], ids=str)
@pytest.mark.parametrize("there", [False, True])
def test_a_build_that_cannot_begin_leaves_what_was_there(
    tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], there: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if there:
        out.mkdir(parents=True)
    with pytest.raises(GpuNpzError):
        build(tree, out, settings(**values))
    assert out.exists() == there
    assert not there or not list(out.iterdir())


@pytest.mark.parametrize("values", [{}, {"part": "2/2"}], ids=str)
def test_a_build_whose_workers_cannot_start_leaves_nothing(
    tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ShardError, match="ended with code 1"):
        build(tree, out, settings(workers=1, **values))
    assert not out.parent.exists()


def test_a_plan_that_somebody_else_has_taken_meanwhile_is_not_withdrawn(
    tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part is refused when the second has begun with the plan of the first."""

    def refused(storage: Any, *of: Any, **named: Any) -> None:
        stack.enter_context(storage.lock("lock-part-2-of-2"))
        raise BackendError("no room")

    monkeypatch.setattr("gpu_npz.builder.build.run", refused)
    with contextlib.ExitStack() as stack, pytest.raises(BackendError):
        build(tree, out, settings(part="1/2"))
    assert Job.open(LocalStorage(out)).record.items == 40


def test_a_lock_is_waited_for_while_its_folder_goes_and_comes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, gone, held = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with LocalStorage(out).lock(wait_s=60):
            held.set()

    def sleep(_: float) -> None:
        waiting.set()
        assert gone.wait(60)

    monkeypatch.setattr(file_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    thread = threading.Thread(target=wait)
    with LocalStorage(out).lock():
        thread.start()
        assert waiting.wait(60)
    assert not out.parent.exists()
    gone.set()
    thread.join()
    assert held.is_set()
    assert not out.parent.exists()


# A plan without a shard


@pytest.mark.parametrize(
    "values",
    [{"dtype": "uint8"}, {"shard_size": 5}, {"labels": "none"}, {"part": "1/2", "size": 8}, {"backend": "dali"}],
    ids=str,
)
def test_a_plan_without_a_shard_is_replaced_where_the_settings_differ(
    tree: Path, out: Path, killed: Kill, caplog: pytest.LogCaptureFixture, values: dict[str, Any]
) -> None:
    if "backend" in values:
        pytest.importorskip("nvidia.dali")
    killed()
    assert not any("other settings" in text for text in estimate(tree, settings(**values), out, seconds=0).warnings)
    report = build(tree, out, settings(**values))
    assert report.complete or "part" in values
    assert "has a plan with other settings, but no shard yet; the plan is replaced" in caplog.text
    for name in values.keys() - {"part", "backend"}:
        assert getattr(Job.open(LocalStorage(out)).settings, name) == getattr(settings(**values), name)


def test_a_plan_without_a_shard_is_kept_where_the_settings_are_the_same(
    tree: Path, out: Path, killed: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed()
    monkeypatch.delattr("gpu_npz.builder.planning.listed")
    assert build(tree, out, settings()).complete


def test_a_plan_without_a_shard_of_another_source_is_replaced(
    tree: Path, out: Path, killed: Kill, make_tree: MakeTree
) -> None:
    killed()
    assert build(make_tree({"dogs/a.jpg": "jpeg"}), out, settings()).rows == 1


@pytest.mark.parametrize(
    "name", ["shard-00000.npz", ".gpu-npz/commits/shard-00000.json", ".shard-00001.npz.4711-0.tmp"]
)
def test_a_plan_of_which_a_shard_was_begun_is_not_replaced(tree: Path, out: Path, killed: Kill, name: str) -> None:
    killed()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"")
    before = files(out / ".gpu-npz")
    with pytest.raises(MismatchError, match="dtype: existing float32, requested uint8"):
        build(tree, out, settings(dtype="uint8"))
    assert {**files(out / ".gpu-npz"), "lock": before["lock"]} == before
    assert (out / name).exists()


def test_the_plan_of_a_part_at_work_is_not_replaced(tree: Path, out: Path, killed: Kill) -> None:
    killed("--part", "1/3")
    with LocalStorage(out).lock("lock-part-1-of-3"):
        before = files(out)
        with pytest.raises(MismatchError, match="or delete OUT and start all parts again"):
            build(tree, out, settings(dtype="uint8", part="2/3"))
        with pytest.raises(LockedError, match="a part of the build is still running"):
            build(tree, out, settings(dtype="uint8"))
        assert files(out) == before
        assert any(
            "other settings" in text for text in estimate(tree, settings(dtype="uint8"), out, seconds=0).warnings
        )
    assert build(tree, out, settings(dtype="uint8")).complete


def test_the_plan_of_a_side_without_a_shard_is_replaced(tree: Path, out: Path, killed: Kill) -> None:
    killed("--split", "val=0.4")
    reports = build_split(tree, out, settings(split="val=0.2"))
    assert {side: report.rows for side, report in reports.items()} == {"train": 32, "val": 8}


def test_a_plan_without_a_shard_makes_way_for_a_split_and_a_dataset_does_not(
    tree: Path, out: Path, killed: Kill
) -> None:
    killed()
    assert build_split(tree, out, settings(split="val=0.2"))["val"].rows == 8
    with pytest.raises(StorageError, match="is a dataset already; choose another OUT for the sides"):
        build_split(tree, out / "train", settings(split="val=0.2"))
