"""Workers that die or hang: others take over, and an image that kills or hangs its decoder becomes one reject."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import cpu_config, file_bytes, progressed

import gpu_npz
from gpu_npz.builder.build import build
from gpu_npz.builder.report import Started
from gpu_npz.cli.main import run
from gpu_npz.errors import ShardError
from gpu_npz.machine.tuning import Tuning
from gpu_npz.storage.holders import is_gone
from gpu_npz.workers import local, subprocesses, worker

# Loaded by every worker before anything else of the package: a decoder that dies or hangs on some images.
SABOTAGE = """
import ctypes, logging, os, signal, time, warnings
import gpu_npz.workers.worker
from gpu_npz.preprocess.pillow import PillowDecoder
gpu_npz.workers.worker._MAX_GROWTH_BYTES, gpu_npz.workers.worker._SETTLED_SHARDS = 1 << 25, 1
leaked = []
whole = PillowDecoder.decode_image
def decode_image(self, data, path, frame=None):
    name = os.path.basename(path)
    if name.startswith("says"):
        os.write(2, b"some library in C\\n")
        warnings.warn("some library in Python")
        logging.getLogger("some").warning("some log record")
        print("some result", flush=True)
    if name.startswith("last-words"):
        os.write(2, b"Corrupt JPEG data: bad Huffman code\\nterminate called")
        os.abort()
    if name.startswith("crash"):
        ctypes.string_at(0)
    if name.startswith("abort"):
        os.abort()
    if name.startswith("hang"):
        time.sleep(3600)
    if name.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("busy") and not os.path.exists(os.path.join(os.environ["ONCE"], "over")):
        with open(os.path.join(os.environ["ONCE"], "busy"), "w") as file:
            file.write(str(os.getpid()))
        while not os.path.exists(os.path.join(os.environ["ONCE"], "over")):
            pass
    if name.startswith("leak"):
        leaked.append(b"x" * (1 << 24))
    if name.startswith("once"):
        marker = os.path.join(os.environ["ONCE"], name)
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGSEGV)
    return whole(self, data, path, frame)
PillowDecoder.decode_image = decode_image
"""


@pytest.fixture
def sabotaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers decode with the sabotage above."""
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ONCE", str(tmp_path))
    start = local._LocalWorkers.start

    def start_sabotaged(self: Any, task: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            popen = subprocesses.subprocess.Popen
            patched.setattr(
                subprocesses.subprocess,
                "Popen",
                lambda command, **options: popen([*command[:2], edited(command[2])], **options),
            )
            start(self, task)

    def edited(program: str) -> str:
        before, call, rest = program.partition("from gpu_npz.workers.subprocesses import run;")
        return f"{before} import sabotage; {call}{rest}"

    monkeypatch.setattr(local._LocalWorkers, "start", start_sabotaged)


@pytest.fixture
def src(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tree of 24 good pictures, one bad one, and those that are named."""

    def make(*names: str) -> Path:
        root = tmp_path / "images"
        good = [f"{number:02}.jpg" for number in range(24)]
        for seed, name in enumerate([*good, *names]):
            path = root / ("a" if seed % 2 else "b") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file_bytes("jpeg", seed=seed % 5, size=(40, 50)))
        (root / "a/bad.jpg").write_bytes(file_bytes("half"))
        return root

    return make


settings = functools.partial(cpu_config, shard_size=5, workers=2, batch_size=2, max_rejects="100%")


def rejects(out: Path) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    return {os.path.basename(line["path"]): (line["code"], line["detail"]) for line in lines}


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize(("workers", "open_shards"), [(1, 1), (2, 1), (2, 3)])
def test_images_that_kill_the_decoder_become_rejects_and_all_others_rows(
    workers: int, open_shards: int, src: Callable[..., Path], tmp_path: Path
) -> None:
    root = src("crash-1.jpg", "crash-2.jpg", "abort.jpg")
    seen: list[Started | worker.Event] = []
    config = settings(workers=workers, open_shards=open_shards)
    report = build(root, tmp_path / "out", config, progress=seen.append)
    assert rejects(tmp_path / "out").keys() == {"bad.jpg", "crash-1.jpg", "crash-2.jpg", "abort.jpg"}
    assert rejects(tmp_path / "out")["crash-1.jpg"] == ("crashed", "was killed by SIGSEGV")
    assert rejects(tmp_path / "out")["abort.jpg"] == ("crashed", "was killed by SIGABRT")
    assert (report.rows, report.complete) == (24, True)
    assert progressed(seen)[:2] == (28, 4)  # what was lost with a worker does not count twice
    assert gpu_npz.verify(tmp_path / "out").ok
    for name in ("crash-1.jpg", "crash-2.jpg", "abort.jpg"):
        next(root.rglob(name)).write_bytes(b"no image")  # what is left, an undisturbed build has, too
    build(root, tmp_path / "undisturbed", settings(workers=0))
    ours, theirs = (gpu_npz.open_dataset(tmp_path / name) for name in ("out", "undisturbed"))
    assert list(ours.paths) == list(theirs.paths)
    np.testing.assert_array_equal(ours[:], theirs[:])


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize("on_reject", ["skip", "blank"])
def test_an_image_that_hangs_the_decoder_becomes_a_reject(
    on_reject: str, src: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_LOOK_S", 0.1)
    report = build(src("hang.jpg"), tmp_path / "out", settings(worker_timeout=3, on_reject=on_reject))
    assert rejects(tmp_path / "out")["hang.jpg"] == ("timed-out", "the decoder did not respond for 3 s")
    assert report.rejects == 2
    assert gpu_npz.verify(tmp_path / "out").ok


@pytest.mark.usefixtures("sabotaged")
def test_all_that_a_worker_writes_is_logged_and_nothing_of_it_printed(
    src: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    report = build(src("says.jpg"), tmp_path / "out", settings())
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    for text in ("some library in C", "UserWarning: some library in Python", "some log record", "some result"):
        assert sum(text in line for line in lines) == 1
    assert (report.rejects, report.messages) == (1, ())
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("sabotaged")
def test_the_last_lines_of_a_worker_that_dies_are_logged_with_the_file(
    src: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = build(src("last-words.jpg"), tmp_path / "out", settings())
    texts = [record.getMessage() for record in caplog.records if "was killed by SIGABRT" in record.getMessage()]
    last = "\nIt wrote last:\n  Corrupt JPEG data: bad Huffman code\n  terminate called"
    assert len(texts) == 3
    assert all(text.endswith(last) for text in texts)
    assert "while it decoded 'b/last-words.jpg'; another one takes over its 1 unfinished shards" in texts[-1]
    (message,) = report.messages
    assert (message.text, message.count) == ("Corrupt JPEG data: bad Huffman code", 3)


@pytest.mark.usefixtures("sabotaged")
def test_the_last_lines_are_part_of_an_error_that_ends_the_build(
    src: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_MAX_DEATHS", 1)
    with pytest.raises(ShardError, match=r"was killed by SIGABRT(?s:.)*\nIt wrote last:\n.*\n  terminate called$"):
        build(src("last-words.jpg"), tmp_path / "out", settings())


@pytest.mark.usefixtures("sabotaged")
def test_a_worker_that_dies_once_is_replaced_and_nothing_is_rejected(src: Callable[..., Path], tmp_path: Path) -> None:
    report = build(src("once-1.jpg", "once-2.jpg"), tmp_path / "out", settings())
    assert (report.rows, report.rejects) == (26, 1)
    assert (tmp_path / "once-1.jpg").exists()


@pytest.mark.usefixtures("sabotaged")
def test_what_a_worker_that_died_was_writing_is_gone_before_its_shard_is_built_again(
    src: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[set[str]] = []

    def look(event: Started | worker.Event) -> None:
        if isinstance(event, worker.Progress) and event.items < 0:
            seen.append({path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"})

    build(src("once-1.jpg"), tmp_path / "out", settings(workers=1), progress=look)
    assert seen
    assert not any(seen)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".old")]


PARENT = """
import sys
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
build(sys.argv[1], sys.argv[2], BuildConfig(size=16, shard_size=5, workers=1, device="cpu", max_rejects="100%"))
"""


def test_a_worker_that_only_computes_ends_with_its_parent(
    src: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    (tmp_path / "sitecustomize.py").write_text("import sabotage")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ONCE", str(tmp_path))
    marker = tmp_path / "busy"
    with subprocess.Popen([sys.executable, "-c", PARENT, src("busy.jpg"), tmp_path / "out"]) as parent:
        while not (marker.exists() and marker.read_text()):
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
    pid = int(marker.read_text())
    deadline = time.monotonic() + 60
    while not is_gone(pid) and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("sabotaged")
def test_a_worker_that_grows_too_large_is_replaced_between_two_shards(src: Callable[..., Path], tmp_path: Path) -> None:
    root = src(*(f"leak-{number}.jpg" for number in range(20)))
    seen: list[Started | worker.Event] = []
    report = build(root, tmp_path / "out", settings(workers=1), progress=seen.append)
    assert (report.rows, report.rejects, report.complete) == (44, 1, True)
    ended = [event for event in seen if isinstance(event, worker.WorkerEnded)]
    assert len(ended) > 2
    assert max(event.memory_bytes for event in ended) - min(event.memory_bytes for event in ended) < 1 << 28
    assert min(step.items for step in seen if isinstance(step, worker.Progress)) > 0  # nothing was lost
    build(root, tmp_path / "undisturbed", settings(workers=0))
    ours, theirs = (gpu_npz.open_dataset(tmp_path / name) for name in ("out", "undisturbed"))
    np.testing.assert_array_equal(ours[:], theirs[:])


@pytest.mark.usefixtures("sabotaged")
def test_a_process_that_the_system_kills_is_never_an_images_fault(src: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"was killed by SIGKILL \(the system may be out of memory\).*fewer --workers"):
        build(src("killed.jpg"), tmp_path / "out", settings())
    assert not (tmp_path / "out/dataset.json").exists()
    assert build(src(), tmp_path / "out", settings(workers=0)).rejects == 1


@pytest.mark.usefixtures("sabotaged")
def test_a_machine_on_which_everything_crashes_stops_the_build(
    src: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_MAX_DEATHS", 6)
    with pytest.raises(ShardError, match="the last of 7, was killed by SIGSEGV"):
        build(src(*(f"crash-{number}.jpg" for number in range(20))), tmp_path / "out", settings())


def test_a_worker_that_cannot_start_is_an_error_at_once(
    src: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocesses.sys, "executable", "/bin/false")
    with pytest.raises(ShardError, match="a worker process ended with code 1"):
        build(src(), tmp_path / "out", settings())


def test_a_worker_that_is_still_starting_when_all_shards_are_built_is_not_awaited(
    src: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if started:
            command = [*command[:2], f"import time; time.sleep(3600); {command[2]}"]
        return popen(command, **options)

    monkeypatch.setattr(subprocesses.subprocess, "Popen", start)
    report = build(src(), tmp_path / "out", settings(workers=3, worker_timeout=60))
    assert (report.rows, report.complete) == (24, True)
    assert [process.returncode for process in started] == [0, -signal.SIGKILL, -signal.SIGKILL]
    assert caplog.messages == []


def test_each_worker_has_a_gpu_of_its_own_and_they_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int | None] = []
    monkeypatch.setattr(local._LocalWorkers, "start", lambda self, task: started.append(task.gpu))
    monkeypatch.setattr(local._LocalWorkers, "events", lambda self: iter(()))
    tuning = Tuning(workers=5, batch_size=1, threads=1, pipelines=1, prefetch=1, open_shards=1, hw_decoder_load=None)
    task = worker.Task("out", None, None, tuning, None)  # type: ignore[arg-type]  # nobody reads it
    assert list(local.run(task, [0, 1], (2, 0), 1.0)) == []
    assert started == [2, 0, 2, 0, 2]
    assert signal.SIGKILL not in {-code for code in local._CRASHES}


def test_a_prepared_process_is_started_once_and_ends_if_it_is_not_used() -> None:
    with subprocesses.prepared(subprocesses.WORKER):
        ((unused, _, _),) = subprocesses._prepared.values()
        subprocesses.discard(subprocesses.WORKER)
        assert unused.returncode == -signal.SIGKILL
    with subprocesses.prepared(subprocesses.WORKER):
        ((prepared, _, _),) = subprocesses._prepared.values()
        process, connection, output = subprocesses.start(subprocesses.WORKER)
        assert process is prepared
        assert not subprocesses._prepared
    assert process.poll() is None  # who has started it ends it
    connection.close()
    assert process.wait(60) == 1
    output.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The worker processes that have been started, prepared ones included."""
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocesses._started

    def noted(module: str) -> Any:
        process = start(module)
        processes.append(process[0])
        return process

    monkeypatch.setattr(subprocesses, "_started", noted)
    return processes


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        (["--workers", "1"], [{0}]),
        (["--workers", "2"], [{0, -signal.SIGKILL}] * 2),  # one may start too late
        (["--workers", "0"], [{-signal.SIGKILL}]),
        (["--dry-run"], [{-signal.SIGKILL}]),
        (["--no-such-option"], [{-signal.SIGKILL}]),
        (["--help"], []),
    ],
)
def test_the_command_build_starts_one_worker_ahead(
    options: list[str],
    codes: list[set[int]],
    src: Callable[..., Path],
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
) -> None:
    common = ["--size", "16", "--device", "cpu", "--shard-size", "5", "--max-rejects", "100%"]
    run(["build", str(src()), str(tmp_path / "out"), *common, *options])
    assert len(started) == len(codes)
    ended = [process.returncode for process in started]
    assert all(code in allowed for code, allowed in zip(ended, codes, strict=True))
    assert 0 in ended or not any(0 in allowed for allowed in codes)
    assert not subprocesses._prepared


def test_a_build_that_is_refused_leaves_no_worker(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    assert run(["build", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert not (tmp_path / "out").exists()
