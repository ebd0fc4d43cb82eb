"""Builds that are killed, and then go on: the output is that of a build that nothing disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import contents, file_bytes, python

from gpu_npz.audit.verify import verify
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig

SETTINGS = BuildConfig(size=24, shard_size=2, workers=0, device="cpu", max_rejects="50%", shuffle=1)
OPTIONS = ["--size", "24", "--shard-size", "2", "--device", "cpu", "--max-rejects", "50%", "--shuffle", "1", "--quiet"]
BAD = ("half", "empty", "text")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files in 30 shards, every seventh of them bad."""
    root = tmp_path_factory.mktemp("images")
    for number in range(60):
        kind = BAD[number % len(BAD)] if number % 7 == 3 else "jpeg"
        path = root / f"class-{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file_bytes(kind, seed=number % 10, size=(40, 50)))
    return root


@pytest.fixture(scope="module")
def undisturbed(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert build(src, out, SETTINGS).rejects == 9
    return contents(out)


def go_on(src: Path, out: Path, undisturbed: dict[str, bytes]) -> None:
    """Runs the same build to its end, and compares."""
    whole = {name for name in contents(out) if not name.endswith((".tmp", "lock"))}
    assert all((out / name).read_bytes() == undisturbed[name] for name in whole), "a final name was not whole"
    build(src, out, SETTINGS)
    assert contents(out) == undisturbed
    assert verify(out).ok


# Killed by the system, workers and all


def records(number: int) -> Callable[[Path], bool]:
    return lambda out: len(list(out.glob(".gpu-npz/commits/shard-*.json"))) >= number


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "it holds the lock": lambda out: (out / ".gpu-npz/lock").exists(),
    "it has a plan": lambda out: (out / ".gpu-npz/job.json").exists(),
    "a shard is being written": lambda out: any(out.glob(".shard-*.tmp")),
    "the first shard is committed": records(1),
    "some shards are committed": records(9),
    "most shards are committed": records(25),
    "all shards are committed": records(30),
    "the index is written": lambda out: (out / "index.npz").exists(),
}
LATE = ("most shards are committed", "all shards are committed", "the index is written")  # it may end before the signal


def wait(process: subprocess.Popen[bytes], out: Path, reached: Callable[[Path], bool]) -> None:
    """Waits for a moment of the build, which must not end before that is seen."""
    while not reached(out):
        assert process.poll() is None or reached(out), "the moment never came"
        time.sleep(0.0005)


@contextlib.contextmanager
def running(src: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A build by two workers with two open shards each, killed with them in the end."""
    options = [*OPTIONS, "--workers", "2", "--open-shards", "2"]
    command = [sys.executable, "-m", "gpu_npz", "build", os.fspath(src), os.fspath(out), *options]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_that_is_killed_with_its_workers_goes_on_to_the_same_output(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path, moment: str
) -> None:
    out, reached, chance = tmp_path / "out", MOMENTS[moment], random.Random(moment)
    with running(src, out) as process:
        wait(process, out, reached)
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.02))))
    assert process.returncode == -signal.SIGKILL or (process.returncode == 0 and moment in LATE)
    go_on(src, out, undisturbed)


def test_a_build_that_is_killed_again_and_again_ends_with_the_same_output(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in (3, 12, 20):
        with running(src, out) as process:
            wait(process, out, records(number))
        assert process.returncode == -signal.SIGKILL
    go_on(src, out, undisturbed)


def test_a_build_goes_on_at_once_beside_the_workers_that_outlive_a_killed_one(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(src, out) as process:
        wait(process, out, records(2))
        process.kill()
        process.wait()
        build(src, out, SETTINGS)
        assert process.stdout is not None
        assert process.stdout.read() == b""  # it ends when the last of them has
    assert contents(out) == undisturbed


# Killed between two system calls

KILLED_AT_EACH = """
import itertools, os, signal, sys
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
import gpu_npz.preprocess.pillow
call, step, src, out, settings = sys.argv[1:]
real = getattr(os, call)
for moment in itertools.count(0, int(step)):
    if not (child := os.fork()):
        calls = itertools.count()
        def deadly(*values):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*values)
        setattr(os, call, deadly)
        build(src, f"{out}/{moment}", BuildConfig.model_validate_json(settings))
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
print(moment)
"""


@pytest.mark.parametrize("open_shards", [1, 3])
@pytest.mark.parametrize(("call", "step"), [("link", 1), ("fsync", 5), ("pwrite", 13), ("pwritev", 7)])
def test_a_build_that_is_killed_before_a_system_call_goes_on_to_the_same_output(
    src: Path, tmp_path: Path, call: str, step: int, open_shards: int
) -> None:
    page_cache = "drop" if call == "pwritev" else "keep"
    update = {"limit": 6, "open_shards": open_shards, "batch_size": 1, "page_cache": page_cache}
    config = SETTINGS.model_copy(update=update)
    last = int(
        python("-c", KILLED_AT_EACH, call, str(step), src, tmp_path, config.model_dump_json()).stdout
    )  # the moment that never came: this one is undisturbed
    assert last >= 5 * step
    undisturbed = contents(tmp_path / str(last))
    assert "dataset.json" in undisturbed
    unfinished = 0
    for moment in range(0, last, step):
        out = tmp_path / str(moment)
        unfinished += not (out / "dataset.json").exists()
        build(src, out, config)
        assert contents(out) == undisturbed
    assert unfinished >= 4
