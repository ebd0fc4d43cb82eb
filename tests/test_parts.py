"""Job arrays: parts of one build, in any order and at the same time, and the dataset that they make together."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import contents, cpu_config, file_bytes

import gpu_npz
from gpu_npz.builder.build import build
from gpu_npz.builder.maintenance import finalize
from gpu_npz.builder.parts import Part
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.errors import IncompleteError, LockedError, MismatchError, RejectLimitError, UsageError
from gpu_npz.storage import heartbeats
from gpu_npz.storage.local import LocalStorage

settings = functools.partial(cpu_config, shard_size=4, max_rejects="50%", shuffle=3)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 files in 8 shards, some of them bad."""
    root = tmp_path_factory.mktemp("images")
    for number in range(30):
        path = root / f"class-{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file_bytes("half" if number % 11 == 5 else "jpeg", seed=number % 7, size=(40, 50)))
    return root


@pytest.fixture(scope="module")
def undisturbed(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build(src, out, settings())
    return contents(out)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 2, 3, 1)], ids=str)
def test_parts_in_any_order_make_the_dataset_that_one_build_makes(
    order: tuple[int, ...], src: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for place, number in enumerate(order, 1):
        report = build(src, tmp_path / "out", settings(part=f"{number}/3"))
        assert report.part == f"{number}/3"
        assert report.complete == (place == len(order))
        assert report.missing_shards == 8 - sum({1: 3, 2: 3, 3: 2}[done] for done in set(order[:place]))
    assert contents(tmp_path / "out") == undisturbed
    assert build(src, tmp_path / "out", settings(part="1/3")).built_shards == 0
    assert build(src, tmp_path / "out", settings()).complete


def test_parts_at_the_same_time_make_the_dataset_that_one_build_makes(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    options = ["--device", "cpu", "--size", "16", "--shard-size", "4", "--max-rejects", "50%", "--shuffle", "3"]
    command = [sys.executable, "-m", "gpu_npz", "build", str(src), str(tmp_path / "out"), *options, "--workers", "0"]
    jobs = [
        subprocess.Popen(
            [*command, "--part", "auto"],
            env={**os.environ, "SLURM_PROCID": str(number), "SLURM_NTASKS": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, said
    assert "building part 3/4 (SLURM_PROCID=2, SLURM_NTASKS=4)" in said[2][1]
    assert contents(tmp_path / "out") == undisturbed
    assert gpu_npz.verify(tmp_path / "out").ok


def test_a_plain_build_never_takes_a_part_by_itself(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    report = build(src, tmp_path / "out", settings())
    assert (report.part, report.complete, report.built_shards) == (None, True, 8)


def test_a_plain_build_and_finalize_wait_for_no_part_but_say_so(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(src, out, settings(part="1/3"))
    with LocalStorage(out).lock("lock-part-2-of-3"):
        with pytest.raises(LockedError, match=r"a part of the build is still running: .* is in use by process"):
            build(src, out, settings())
        with pytest.raises(IncompleteError, match=r"3 of 8 shards are built.*still running: lock-part-2-of-3"):
            finalize(out)
        with pytest.raises(LockedError):
            build(src, out, settings(part="2/3"))
        assert not build(src, out, settings(part="3/3")).complete
    assert build(src, out, settings(part="2/3")).complete


def test_a_plain_build_ends_the_lock_of_a_part_that_another_host_left_over(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "STALE_S", 0.3)
    out = tmp_path / "out"
    build(src, out, settings(part="1/3"))
    for number in (2, 3):
        lock = {"host": "node-17", "process": 4711, "beat": number}
        LocalStorage(out).write(f".gpu-npz/lock-part-{number}-of-3", json.dumps(lock).encode())
    build(src, out, settings())
    assert contents(out) == undisturbed


def test_parts_with_other_settings_are_refused(src: Path, tmp_path: Path) -> None:
    build(src, tmp_path / "out", settings(part="1/3"))
    with pytest.raises(MismatchError, match="dtype: existing float32, requested uint8"):
        build(src, tmp_path / "out", settings(part="2/3", dtype="uint8"))
    with pytest.raises(UsageError, match="--part and --overwrite"):
        build(src, tmp_path / "out", settings(part="2/3", overwrite=True))


def test_finalize_publishes_what_is_whole(
    src: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    build(src, out, settings(part="1/2"))
    with pytest.raises(
        IncompleteError, match="4 of 8 shards are built, and shard 1 is not; run the same gpu-npz build"
    ):
        finalize(out)
    with pytest.raises(RejectLimitError):
        build(src, out, settings(part="2/2", max_rejects="0"))
    with pytest.raises(IncompleteError, match="give a higher --max-rejects"):
        finalize(out, BuildConfig(max_rejects="0"))
    assert run(["finalize", str(out), "--max-rejects", "50%"]) == 0
    assert "27 images in 8 shards; complete" in capsys.readouterr().out
    assert contents(out) == undisturbed


def test_parts_that_were_built_in_other_environments_are_not_mixed_by_accident(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(src, out, settings(part="1/2"))
    monkeypatch.setattr(
        "gpu_npz.builder.run._expected_provenance", lambda records, config: None
    )  # both began at the same time
    monkeypatch.setattr("gpu_npz.preprocess.pillow.versions", lambda: {"pillow": "another"})
    with pytest.raises(MismatchError, match="several environments"):
        build(src, out, settings(part="2/2"))
    assert build(src, out, settings(part="2/2", accept_environment=True)).complete


GRID_ENGINE = {"SGE_TASK_ID": "14", "SGE_TASK_FIRST": "10", "SGE_TASK_LAST": "17", "SGE_TASK_STEPSIZE": "2"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "3"}


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, "1/8"),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, "8/8"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "6/8"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "RANK": "1", "WORLD_SIZE": "2"}, "1/3"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "2/2"),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, "4/4"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "5"}, "1/5"),
        ({"LSB_JOBINDEX": "5", "LSB_JOBINDEX_END": "5"}, "5/5"),
        ({"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0", "RANK": "1", "WORLD_SIZE": "2"}, "2/2"),
        (GRID_ENGINE, "3/4"),
        ({"SGE_TASK_ID": "undefined", "RANK": "1", "WORLD_SIZE": "2"}, "2/2"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "1", "AWS_BATCH_JOB_ARRAY_SIZE": "5", "RANK": "1", "WORLD_SIZE": "5"}, "2/5"),
    ],
)
def test_auto_reads_what_schedulers_and_launchers_set(environ: dict[str, str], part: str) -> None:
    found = Part.of("auto", environ)
    assert str(found) == part
    assert any(f"{name}={value}" in found.origin for name, value in environ.items())
    if len({"SLURM_ARRAY_TASK_ID", "SLURM_PROCID"} & environ.keys()) < 2:
        assert str(Part.of(f"auto/{part.partition('/')[2]}", environ)) == part


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, "1/8"),
        ({"JOB_COMPLETION_INDEX": "7"}, "8/8"),
        ({"PBS_ARRAY_INDEX": "1"}, "1/8"),
        ({"PBS_ARRAY_INDEX": "8"}, "8/8"),
    ],
)
def test_auto_with_a_count_serves_schedulers_that_only_number_jobs(environ: dict[str, str], part: str) -> None:
    assert str(Part.of(BuildConfig(part="AUTO/08").part or "", environ)) == part
    with pytest.raises(UsageError, match=r"does not say how many jobs it has; give the number: --part auto/N"):
        Part.of("auto", environ)


@pytest.mark.parametrize(
    ("setting", "environ", "said"),
    [
        ("auto", {}, "none of SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX, .* is set to a usable number"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "usable number"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "usable number"),
        (
            "auto",
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"},
            "without gaps",
        ),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "4"}, "without gaps"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, r"none of the 4 numbers .* \(completions: N\)"),
        ("auto/4", {"PBS_ARRAY_INDEX": "0"}, r"none of the 4 numbers from 1 .* \(-J 1-N\)"),
        ("auto/4", {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "5"}, "has 5 jobs"),
        ("auto/4", {"RANK": "0", "WORLD_SIZE": "2"}, "there are 2 processes"),
    ],
)
def test_auto_that_finds_nothing_usable_says_why(setting: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Part.of(setting, environ)


@pytest.mark.parametrize("value", ["auto/0", "auto/", "auto/x", "0/3", "4/3", "1/1/1", "automatic", ""])
def test_other_values_of_part_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match=r"i/n with i from 1 to n, auto or auto/n"):
        BuildConfig(part=value)


def test_every_shard_is_in_exactly_one_part() -> None:
    for count in (1, 3, 10):
        shards = [shard for number in range(count) for shard in Part(number + 1, count, "").shards(8)]
        assert sorted(shards) == list(range(8))


# The examples of job files


JOBS = Path(__file__).parent.parent / "docker"


OPTIONS = [
    "--device", "cpu", "--size", "16", "--shard-size", "4", "--max-rejects", "50%", "--shuffle", "3", "--workers", "0",
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the command under test and a scontrol that records what it is called with."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (
        ("gpu-npz", f'exec {sys.executable} -m gpu_npz "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/requeued'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    return f"{commands}:{os.environ['PATH']}"


def test_the_slurm_example_builds_a_dataset_and_requeues_a_job_that_runs_out_of_time(
    src: Path, undisturbed: dict[str, bytes], path: str, tmp_path: Path
) -> None:
    script, out = JOBS / "slurm-array.sh", tmp_path / "out"
    (array,) = re.findall(r"^#SBATCH --array=1-(\d+)$", script.read_text(), re.MULTILINE)
    command = ["bash", script, src, out, *OPTIONS]

    def job(number: int, **environ: str) -> subprocess.Popen[str]:
        numbers = {"TASK_ID": str(number), "TASK_MIN": "1", "TASK_STEP": "1", "TASK_COUNT": array}
        slurm = {f"SLURM_ARRAY_{name}": value for name, value in numbers.items()}
        environ = {**os.environ, **slurm, "SLURM_JOB_ID": f"70{number}", "PATH": path, **environ}
        return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True)

    with LocalStorage(out).lock():  # the job waits for its turn to plan
        stopped = job(1)
        time.sleep(1.5)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate()[1]
    assert stopped.returncode == 128 + signal.SIGTERM, said
    assert (tmp_path / "requeued").read_text() == "requeue 701\n"
    jobs = [job(number) for number in range(1, int(array) + 1)]
    said_by = [each.communicate()[1] for each in jobs]
    assert [each.returncode for each in jobs] == [0] * int(array), said_by
    assert contents(out) == undisturbed
    assert (tmp_path / "requeued").read_text() == "requeue 701\n"


def test_the_kubernetes_example_builds_a_dataset_whose_pods_may_be_killed(
    src: Path, undisturbed: dict[str, bytes], path: str, tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((JOBS / "kubernetes-job.yaml").read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    pods, out = spec["completions"], tmp_path / "out"
    assert spec["completionMode"] == "Indexed"
    assert container["args"][-2:] == ["--part", f"auto/{pods}"]
    places = {"/data/train": str(src), "/data/train-npz": str(out)}
    arguments = [places.get(each, each) for each in container["args"]]
    command = [sys.executable, "-m", "gpu_npz", *arguments, *OPTIONS]

    def pod(number: int) -> subprocess.Popen[str]:
        environ = {**os.environ, "JOB_COMPLETION_INDEX": str(number)}
        return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)

    first = pod(0)
    said = first.communicate()[1]
    assert first.returncode == 0, said
    lost = pod(1)
    time.sleep(0.5)
    lost.kill()
    lost.communicate()
    jobs = [pod(number) for number in range(pods)]
    said_by = [each.communicate()[1] for each in jobs]
    assert [each.returncode for each in jobs] == [0] * pods, said_by
    assert contents(out) == undisturbed
