"""Builds that go wrong at a chosen call, and what a disk holds after the power has failed there."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gpu_npz.audit.verify import verify
from gpu_npz.dataset.manifest import Manifest
from gpu_npz.storage import open_storage

SHIM = Path(__file__).parent / "shim"
OPTIONS = ["--size", "24", "--shard-size", "4", "--device", "cpu", "--max-rejects", "50%", "--shuffle", "1", "--quiet",
           "--workers", "2", "--open-shards", "2", "--batch-size", "2"]  # fmt: skip
TIMEOUT_S = 120


@dataclass(frozen=True)
class Run:
    """How a build ended: its exit code, what it said, and the calls that it made to files below OUT."""

    code: int
    said: str
    calls: list[dict[str, Any]]


def build(src: Path, out: Path, place: Path, *options: str, at: int = -1, kind: str = "kill") -> Run:
    """A build from the command line, which goes wrong at call number `at`.

    Args:
        src, out: as for the command.
        place: a folder for the log, and for what renames and unlinks destroy.
        options: more of the command's.
        at: the call; never if negative.
        kind: see shim/sitecustomize.py.
    """
    shutil.rmtree(place, ignore_errors=True)
    (place / "kept").mkdir(parents=True)
    paths = [os.fspath(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "FAULTS_UNDER": os.path.realpath(out),
        "FAULTS_LOG": os.fspath(place / "log"),
        "FAULTS_KEEP": os.fspath(place / "kept"),
        "FAULTS_AT": str(at),
        "FAULTS_KIND": kind,
    }
    command = [sys.executable, "-m", "gpu_npz", "build", os.fspath(src), os.fspath(out), *OPTIONS, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    calls = []
    with contextlib.suppress(FileNotFoundError):
        calls = [json.loads(line) for line in (place / "log").read_text().splitlines()]
    return Run(result.returncode, result.stderr, calls)


NAMING = "link rename unlink rmdir"  # what gives names and takes them
FIRST = ["--size", "24", "--shard-size", "4"]
_OF_LOCK = re.compile(r"/\.?(lock|claim-)[^/]*$|/\.gpu-npz$")
SECOND = ["--size", "20", "--shard-size", "8", "--overwrite"]  # fewer shards, so that one of the first would show


def takeover(src: Path, out: str, place: Path, at: int | str, *options: str) -> tuple[str | None, list[dict[str, Any]]]:
    """A build whose host sleeps from a call on until another host has taken OUT over with other settings.

    Args:
        src: the images.
        out: OUT, in a folder or on S3.
        place: an empty folder.
        at: the call before which the first build stops, see shim/sitecustomize.py; -1: never, and nobody takes over.
        options: more of the first build's.

    Returns:
        What is wrong, or None; and the calls that the first build made.
    """
    first = _Host("host-a", src, out, place, at, [*FIRST, *options])
    _, status = os.waitpid(first.process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        first.process.returncode = os.waitstatus_to_exitcode(status)
        fault = first.ended(first.process.returncode)
        return fault if at == -1 else f"it was not stopped: {fault}", first.calls()
    second = _Host("host-b", src, out, place, -1, SECOND)
    fault = second.ended(second.process.wait())
    for process in {call["pid"] for call in first.calls()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    code = first.process.wait()
    said, calls = first.said(), first.calls()
    if fault is None and (code != 1 or "was taken over by" not in said or "Traceback" in said):
        fault = f"the first ended with {code}: {said[-500:]}"
    return fault or _not_of_second(out), calls


class _Host:
    """A build on a host of its own."""

    def __init__(self, name: str, src: Path, out: str, place: Path, at: int | str, options: list[str]) -> None:
        self._place = place / name
        (self._place / "scratch").mkdir(parents=True)
        paths = [os.fspath(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "FAULTS_UNDER": out if "://" in out else os.path.realpath(out),
            "FAULTS_LOG": os.fspath(self._place / "log"),
            "FAULTS_CALLS": NAMING,
            "FAULTS_AT": str(at),
            "FAULTS_KIND": "stop",
            "FAULTS_HOST": name,
            "TMPDIR": os.fspath(self._place / "scratch"),
        }
        more = [*OPTIONS[4:], "--workers", "0", "--open-shards", "1", *options]
        command = [sys.executable, "-m", "gpu_npz", "build", os.fspath(src), out, *more]
        with (self._place / "said").open("w") as said:
            # In a session of its own: a stopped process goes on when what started its group ends.
            self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)

    def said(self) -> str:
        return (self._place / "said").read_text()

    def calls(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self._place / "log").read_text().splitlines()]
        return []

    def ended(self, code: int) -> str | None:
        return f"{self._place.name} ended with {code}: {self.said()[-500:]}" if code else None


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """An empty bucket of a server that lives for so long."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3").mkdir("bucket")
    try:
        yield "s3://bucket"
    finally:
        del fsspec.config.conf["s3"]
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before
        server.stop()


def moments(calls: list[dict[str, Any]]) -> list[int]:
    """The calls before which a build may be stopped, by their numbers: all but those that are about its lock."""
    return [number for number, call in enumerate(calls) if not _OF_LOCK.search(call.get("to") or call["path"])]


def _not_of_second(out: str) -> str | None:
    """What shows that a dataset is not the second build's, whole and alone; None if it is."""
    found, storage = verify(out), open_storage(out)
    if not found.ok:
        return f"verify: {found.problems}"
    if Manifest.load(out).settings["size"] != [20, 20]:
        return "the manifest is of the first build"
    private = {name.partition("-")[0] for name in storage.names(".gpu-npz")}
    left = {name for name in storage.names() if name.startswith(".")} | private
    if unexpected := left - {".gpu-npz", "job.json", "plan.npz", "report.json", "commits"}:
        return f"left over: {sorted(unexpected)}"
    return None


def pictures(root: Path) -> Path:
    """24 files in six shards, of which one in seven is bad."""
    for number in range(24):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "JPEG")
        whole = file.getvalue()
        bad = (whole[: len(whole) // 2], b"", b"no image")[number % 3]
        path = root / f"class-{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bad if number % 7 == 3 else whole)
    return root


def trial(src: Path, place: Path, undisturbed: dict[str, bytes], at: int, kind: str) -> str | None:
    """One build by two workers that goes wrong at call `at`, and the same by none; what is wrong, or None.

    Args:
        src: the images.
        place: an empty folder.
        undisturbed: the content of OUT where nothing went wrong.
        at: the call.
        kind: as for `build`, or `power`.
    """
    out = place / "out"
    first = build(src, out, place / "first", at=at, kind="kill" if kind == "power" else kind)
    if kind == "power":
        power_loss(first.calls, at)
    expected = (0, -signal.SIGKILL) if kind in ("kill", "power") else (0, 1)
    if first.code not in expected or "Traceback" in first.said or (first.code == 1 and "gpu-npz: " not in first.said):
        return f"it ended with {first.code}: {first.said[-500:]}"
    if kind != "power":
        early = {name for name, content in contents(out).items() if undisturbed.get(name, content) != content}
        if early - {".gpu-npz/lock"}:
            return f"not whole under their final names: {sorted(early)}"
    second = build(src, out, place / "second", "--workers", "0")  # which starts faster
    if second.code:
        return f"the same command again ended with {second.code}: {second.said[-500:]}"
    if (found := contents(out)) != undisturbed:
        names = sorted(name for name in {*found, *undisturbed} if found.get(name) != undisturbed.get(name))
        return f"other content: {names}"
    return None


def contents(out: Path | str) -> dict[str, bytes]:
    """Everything in OUT but the report, which has times in it."""
    files = {os.fspath(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    files.pop(".gpu-npz/report.json", None)
    return files


def power_loss(calls: list[dict[str, Any]], at: int) -> None:
    """Takes from the disk what was not flushed when call number `at` was made: the strictest reading of POSIX.

    A file that was written and not flushed since is empty. What was made, renamed or unlinked in a folder that was not
    flushed since is as it was before.
    """
    pending: list[dict[str, Any]] = []
    written: set[str] = set()
    for number, call in enumerate(calls):
        name, path = call["call"], call["path"]
        if number == at and name not in ("write", "pwrite", "pwritev"):
            continue  # it was not made
        if name in ("write", "pwrite", "pwritev", "ftruncate"):
            written.add(path)
        elif name == "fsync":
            written.discard(path)
            pending = [each for each in pending if os.path.dirname(each.get("to") or each["path"]) != path]
        else:
            pending.append(call)
            if name in ("rename", "link") and path in written:
                written.discard(path)
                written.add(call["to"])
    for path in written:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 0)
    for call in reversed(pending):
        with contextlib.suppress(OSError):  # of a process that was killed before it
            _undo(call)


def _undo(call: dict[str, Any]) -> None:
    name, path, to, kept = call["call"], call["path"], call.get("to"), call.get("kept")
    if name == "rename" and os.path.lexists(path):
        return  # its process was killed before it
    if name == "open":
        os.unlink(path)
    elif name == "mkdir":
        shutil.rmtree(path)
    elif name == "link":
        os.unlink(to)
    elif name == "rename":
        os.rename(to, path)
        if kept:
            os.link(kept, to)
    elif name == "unlink" and kept:
        os.link(kept, path)
    elif name == "rmdir":
        os.mkdir(path)
