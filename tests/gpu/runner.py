"""Runs steps in processes of their own and stores all results in one JSON file after each step.

A step is a function that takes a `Context` and returns JSON values; "summary" in them is a list of lines. If a step
takes too long, its processes leave their stack traces in the JSON file and are killed. If it crashes, the others run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUMMARY_LINES = 40
_LINE_LENGTH = 160
_TAIL_CHARACTERS = 4000
_ABORTED_S = 2.0  # for writing stack traces


@dataclass(frozen=True)
class Context:
    """What all steps need.

    Attributes:
        src: a folder of images.
        place: a folder for files, in memory if there is room.
        device: "0" or "cpu".
        images: how many files the steps that measure have, in `place`/images.
    """

    src: str
    place: str
    device: str
    images: int

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a build on the device; without them, it might run on the CPU with only a warning."""
        return {"device": self.device, "backend": "dali", "require_gpu": self.on_gpu}

    @property
    def many(self) -> Path:
        """The folder with `images` files."""
        return Path(self.place, "images")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        call: its module and function, "module:function".
        limit_s: how long it may take.
        options: keyword arguments of the function.
        gpu: whether it is left out on a CPU.
    """

    call: str
    limit_s: float
    options: Mapping[str, Any] = field(default_factory=dict)
    gpu: bool = False

    @property
    def name(self) -> str:
        given = " ".join("default" if value is None else str(value) for value in self.options.values())
        return f"{self.call.partition(':')[2]} {given}".strip()


class Runner:
    """Runs steps one after the other, within a time limit for all of them.

    Args:
        context: passed to each step.
        folder: gets `results.json`.
        limit_s: for all steps, from now on.
    """

    def __init__(self, context: Context, folder: Path, limit_s: float) -> None:
        self._context = context
        self._path = folder / "results.json"
        self._start = time.monotonic()
        self._limit_s = limit_s
        self.results: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step]) -> None:
        """Runs the steps in order. One for which less than half of its time is left is not started."""
        for step in steps:
            started = time.monotonic() - self._start
            left_s = self._limit_s - started
            print(f"[{started:6.1f} s] {step.name}", flush=True)
            if step.gpu and not self._context.on_gpu:
                found: dict[str, Any] = {"outcome": "left out", "error": "needs a GPU"}
            elif left_s < step.limit_s / 2:
                found = {"outcome": "left out", "error": f"{left_s:.0f} s were left of all, and it may take more"}
            else:
                found = self._run(step, min(step.limit_s, left_s))
            seconds = time.monotonic() - self._start - started
            self.results.append({"step": step.name, "started": started, "seconds": seconds, **found})
            self._store()

    def summary(self) -> list[str]:
        """What to print at the end, in at most 40 lines."""
        total = time.monotonic() - self._start
        bad = [each["step"] for each in self.results if each["outcome"] not in ("ok", "left out")]
        lines = [f"{self._context.device}: {total:.0f} s; failed: {', '.join(bad) or 'nothing'}"]
        for each in self.results:
            shown = each.get("result", {}).get("summary") or [each.get("error", "").rpartition("\n")[2]]
            head = f"{each['step']} ({each['seconds']:.0f} s, {each['outcome']}): "
            lines += [head + shown[0], *(f"    {line}" for line in shown[1:])]
        if len(lines) > SUMMARY_LINES:
            left = f"... and {len(lines) - SUMMARY_LINES + 1} lines more in {self._path}"
            lines = [*lines[: SUMMARY_LINES - 1], left]
        return [line[:_LINE_LENGTH] for line in lines]

    def _run(self, step: Step, limit_s: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "stacks").mkdir()
            asked = {"call": step.call, "options": dict(step.options), "context": asdict(self._context)}
            (work / "asked.json").write_text(json.dumps(asked))
            paths = [str(HERE / "stacks"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "STEP_STACKS": str(work / "stacks")}
            with open(work / "log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, str(work / "asked.json"), str(work / "result.json")],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    process.wait(limit_s)
                    outcome = "ok" if process.returncode == 0 else "failed"
                except subprocess.TimeoutExpired:
                    outcome = "hung"
                    _abort(process)
            found: dict[str, Any] = {"outcome": outcome}
            if outcome == "ok":
                found["result"] = json.loads((work / "result.json").read_text())
            else:
                ended = f"more than {limit_s:.0f} s" if outcome == "hung" else f"exit status {process.returncode}"
                log = (work / "log").read_text(errors="replace").strip()[-_TAIL_CHARACTERS:]
                found["error"] = f"{ended}\n{log}".strip()
                stacks = ((path.name, path.read_text(errors="replace")) for path in (work / "stacks").iterdir())
                found["stacks"] = {process: text for process, text in stacks if text}
            return found

    def _store(self) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps({"context": asdict(self._context), "steps": self.results}, indent=1))
        temporary.replace(self._path)


def _abort(process: subprocess.Popen[bytes]) -> None:
    """Makes a process and all processes that it has started write their stack traces, and then kills them."""
    family = [*_children(process.pid), process.pid]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for each in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)
        if number == signal.SIGABRT:
            time.sleep(_ABORTED_S)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process may be stuck in the driver
        process.wait(_ABORTED_S)


def _children(parent: int) -> Iterator[int]:
    """The processes that a process has started, and theirs, in whichever session they are."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                child = int(status.parent.name)
                yield from _children(child)
                yield child


@contextlib.contextmanager
def workplace(room_bytes: int) -> Iterator[Path]:
    """A folder for files, in memory if there is room for so many bytes; deleted at the end."""
    in_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > room_bytes
    with tempfile.TemporaryDirectory(dir="/dev/shm" if in_memory else None, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _main(asked: str, result: str) -> None:
    """Runs a step in this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # stack traces are enough
    step = json.loads(Path(asked).read_text())
    module, _, function = step["call"].partition(":")
    found = getattr(importlib.import_module(module), function)(Context(**step["context"]), **step["options"])
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
