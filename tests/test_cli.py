"""The command line: what goes where, exit codes, interruptions, and what is loaded when."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import numpy as np
import pytest
from support import MakeTree, contents, python

import gpu_npz
from gpu_npz.audit import doctor
from gpu_npz.builder.build import build
from gpu_npz.cli.console import wrapped
from gpu_npz.cli.main import COMMANDS, cli, run
from gpu_npz.config import BuildConfig, Group, load_toml
from gpu_npz.machine import environment
from gpu_npz.machine.environment import Missing

ROOT = Path(__file__).parents[1]
SMALL = ["--size", "16", "--shard-size", "2", "--workers", "0", "--device", "cpu"]
HEAVY = ("torch", "keras", "tensorflow", "cupy", "nvidia.dali", "ray", "PIL", "pydantic")


@pytest.fixture
def src(make_tree: MakeTree) -> str:
    """Eight pictures in two classes, and two bad files."""
    good = {f"{name}/{number}.jpg": "jpeg" for name in "ab" for number in range(4)}
    return str(make_tree({**good, "a/bad.jpg": "half", "b/bad.jpg": "text"}))


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


# What goes where


def test_a_build_says_which_labels_it_has(src: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(name: str, *arguments: str) -> tuple[str, str]:
        assert run(["build", *arguments, str(tmp_path / name), *SMALL, "--max-rejects", "100%"]) == 0
        captured = capsys.readouterr()
        return captured.out.splitlines()[0], captured.err

    line, warned = said("one", f"{src}/a")
    assert line.startswith(f"{tmp_path}/one: 4 images (no labels) in ")
    assert f"if 'a' is a class, give the folder of all classes, '{src}'; add --labels none if" in warned
    line, warned = said("none", f"{src}/a", "--labels", "none")
    assert "(no labels)" in line
    assert not warned
    (tmp_path / "t.csv").write_text(
        "path,grade,age\n" + "".join(f"a/{number}.jpg,1,{number}.5\n" for number in range(4))
    )
    line, warned = said("table", str(tmp_path / "t.csv"), "--root", src, "--labels", "grade,age")
    assert line.startswith(f"{tmp_path}/table: 4 images (labels: grade, age) in ")
    assert not warned


def test_a_build_says_what_it_made_on_stdout_and_nothing_on_stderr(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", src, out, *SMALL]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(f"{out}: 8 images of 2 classes in 5 shards, ")
    assert lines[1] == "  rejects     2 (1 not-an-image, 1 truncated); rejects.jsonl names them"
    assert "  with        pillow on the CPU, no worker processes, batches of 2" in lines
    assert any(line.startswith("  bottleneck  ") for line in lines)
    assert any("--shuffle SEED" in line for line in lines)
    assert captured.err == ""


def test_the_rate_of_a_single_batch_is_said_to_include_the_start_up(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", src, out, *SMALL]) == 0
    assert "images/s (start-up " in capsys.readouterr().out
    assert run(["build", src, out, *SMALL, "--overwrite", "--batch-size", "32", "--shard-size", "32"]) == 0
    assert "images/s including the start-up" in capsys.readouterr().out


def test_the_same_command_on_a_finished_dataset_says_so_and_exits_0(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", src, out, *SMALL]) == 0
    before = contents(out)
    capsys.readouterr()
    assert run(["build", src, out, *SMALL]) == 0
    assert "complete; nothing was left to build" in capsys.readouterr().out
    assert contents(out) == before


def test_json_is_alone_on_stdout_and_has_the_report(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", src, out, *SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["complete"], report["rows"], report["rejects"]) == (True, 8, 2)
    assert report["rejects_by_code"] == {"not-an-image": 1, "truncated": 1}
    assert run(["info", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(out, "dataset.json").read_text())
    assert run(["verify", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_progress_as_json_lines_ends_with_the_report(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", src, out, *SMALL, "--max-rejects", "100%", "--progress", "json"]
    assert run(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines if line["event"] != "progress"] == ["started", *["shard"] * 5, "finished"]
    assert (lines[0]["items"], lines[0]["items_done"]) == (10, 0)
    (last,) = [line for line in lines if line["event"] == "progress" and line["items_done"] == 10]
    assert last["rejects"] == 2
    assert sum(line["rows"] for line in lines if line["event"] == "shard") == 8
    assert (lines[-1]["report"]["rows"], lines[-1]["report"]["complete"]) == (8, True)
    assert run([*arguments, "--json"]) == 2
    assert "omit --json: the last line has the report" in capsys.readouterr().err


def test_progress_as_json_lines_names_the_side_of_a_split(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [src, out, *SMALL, "--split", "val=0.5", "--max-rejects", "0"]
    assert run(["build", *arguments, "--progress", "json"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ended = {line["side"]: line["report"]["rejects"] for line in lines if line["event"] == "finished"}
    assert sum(ended.values()) >= 1
    assert {line["side"] for line in lines} <= {"train", "val"}


def test_a_resumed_build_says_how_much_is_built_already(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", src, out, *SMALL, "--max-rejects", "100%"]
    assert run(arguments) == 0
    assert "resuming" not in capsys.readouterr().err
    os.remove(Path(out, "shard-00001.npz"))
    assert run(arguments) == 0
    assert "resuming: 8 of 10 items are built already\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four five", ["one two three", "four five"]),
        ("  hint    one two three", ["  hint    one", "          two", "          three"]),
        ("made with  one two", ["made with  one", "           two"]),
        ("  " + "/long" * 5 + " end", ["  " + "/long" * 5, "  end"]),
        ("one\n\n  two", ["one", "", "  two"]),
    ],
)
def test_text_wraps_on_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "15")
    terminal = SimpleNamespace(isatty=lambda: True)
    assert wrapped(text, terminal).split("\n") == expected  # type: ignore[arg-type]
    assert wrapped(text, SimpleNamespace(isatty=lambda: False)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["first build", "json"])
def test_quiet_prints_nothing_but_json_where_that_is_asked_for(
    src: str, out: str, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    for _ in range(2):
        assert run(["build", src, out, *SMALL, "--quiet", *more]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert json.loads(captured.out)["rows"] == 8 if more else captured.out == ""


@pytest.mark.parametrize("more", [[], ["--quiet"], ["--json"]], ids=str)
def test_a_gpu_that_is_not_there_is_warned_of_on_stderr(
    src: str, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(["build", src, out, *SMALL, "--device", "0", *more]) == 0
    captured = capsys.readouterr()
    assert "gpu-npz: no GPU found, using the CPU with pillow" in captured.err
    assert "NO GPU" not in captured.out


def test_progress_on_a_terminal_goes_to_stderr(src: str, out: str) -> None:
    pty = pytest.importorskip("pty")
    terminal, screen = pty.openpty()
    try:
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        command = [sys.executable, "-m", "gpu_npz", "build", src, out, *SMALL]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=screen, env=environ, text=True)
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(screen)
        os.close(terminal)
    assert result.returncode == 0
    assert "building" in shown
    assert "Traceback" not in shown
    assert result.stdout.startswith(f"{out}: 8 images")


def test_names_that_are_not_utf8_are_printed_as_escapes(src: str, tmp_path: Path) -> None:
    renamed, out = src + "\udcff", str(tmp_path / "out\udcfe")
    os.rename(src, renamed)
    os.rename(f"{renamed}/b", f"{renamed}/caf\udce9")
    steps = [["build", renamed, out, *SMALL], ["info", out], ["verify", out], ["build", renamed + "x", out]]
    result = python("-c", f"from gpu_npz.cli.main import run\nprint([run(step) for step in {steps!a}])")
    assert result.stdout.endswith("[0, 0, 0, 1]\n")
    assert result.stdout.count("out\\udcfe: ") == 2
    assert "caf\\udce9" in result.stdout
    assert "images\\udcffx': No such file or directory" in result.stderr
    assert "Traceback" not in result.stderr


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "SRC"], "Missing argument 'OUT'"),
        (["build", "SRC", "OUT", "--sice", "16"], "No such option '--sice'"),
        (["build", "SRC", "OUT", "--size", "0"], "size: got '0'; allowed: N or HxW, each side 1 to 16384"),
        (["build", "SRC", "OUT", "--dtype", "int8"], "dtype: got 'int8'; allowed: float32, float16, uint8"),
        (["build", "SRC", "OUT", "--device", "0", "--backend", "pillow"], "--backend pillow cannot use GPU 0"),
        (["build", "SRC", "OUT", "--config", "gone.toml"], "gone.toml: No such file or directory"),
        (["build", "SRC", "SRC/out"], "lies inside SRC"),
        (["bild", "SRC", "OUT"], "No such command 'bild'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2_and_says_what_is_allowed(
    src: str, out: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [argument.replace("SRC", src).replace("OUT", out) for argument in arguments]
    assert run(given) == 2
    captured = capsys.readouterr()
    assert message in captured.err.replace("\n", " ")
    assert captured.out == ""
    assert not os.path.exists(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "SRC/gone", "OUT"], "No such file or directory; give SRC as a folder, an archive or a table"),
        (["build", "SRC", "SRC/a/0.jpg/out"], "lies inside SRC"),
        (["info", "SRC"], "is not a dataset (dataset.json is missing); give the OUT of a build"),
        (["verify", "OUT"], "is not a dataset (it does not exist); give the OUT of a build"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_failure_is_an_exit_code_and_one_message_without_a_traceback(
    src: str, out: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code = run([argument.replace("SRC", src).replace("OUT", out) for argument in arguments])
    captured = capsys.readouterr()
    assert code == (2 if "inside" in message else 1)
    assert captured.err.startswith("gpu-npz: ")
    assert message in captured.err
    assert captured.out == ""


def test_a_gpu_that_was_required_and_is_not_there_is_1(
    src: str, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(["build", src, out, "--device", "0", "--require-gpu"]) == 1
    assert "no NVIDIA GPU is visible" in capsys.readouterr().err


def test_too_many_rejects_are_3_and_a_higher_limit_ends_the_build(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", src, out, *SMALL, "--max-rejects", "1"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 of 10 items were rejected (1 not-an-image, 1 truncated); --max-rejects 1 allows 1" in captured.err
    assert run(["build", src, out, *SMALL, "--max-rejects", "20%"]) == 0


def test_a_damaged_dataset_is_1_and_named(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", src, out, *SMALL, "--quiet"]) == 0
    assert run(["verify", out]) == 0
    assert capsys.readouterr().out.endswith(": OK\n")
    with open(f"{out}/shard-00001.npz", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    assert run(["verify", out]) == 1
    captured = capsys.readouterr()
    assert "shard-00001.npz: " in captured.out
    assert "DAMAGED, 1 problem" in captured.out


# Interruptions


# A file server that has forgotten the file of this name.
STALE = """
import errno, os
real = os.open
def stale(path, *options, **more):
    if os.fsdecode(path).endswith("b/3.jpg"):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return real(path, *options, **more)
os.open = stale
"""


@pytest.mark.parametrize(
    ("number", "code", "workers", "moment"),
    [
        (signal.SIGINT, 130, "1", "commits/shard-00000.json"),
        (signal.SIGTERM, 143, "1", "commits/shard-00000.json"),
        (signal.SIGINT, 130, "2", "commits/shard-00000.json"),
        (signal.SIGINT, 130, "2", "job.json"),  # while the workers start
    ],
)
def test_an_interrupted_build_says_how_to_go_on_and_then_makes_the_same_output(
    src: str, out: str, tmp_path: Path, number: signal.Signals, code: int, workers: str, moment: str
) -> None:
    # The last picture's disk fails: the build waits for it to recover, and is interrupted meanwhile.
    (tmp_path / "sitecustomize.py").write_text(STALE)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = ["build", src, out, *SMALL, "--workers", workers]
    with subprocess.Popen(
        [sys.executable, "-m", "gpu_npz", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while not Path(out, ".gpu-npz", moment).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)  # as a batch system does
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.strip() == "gpu-npz: stopped; what is committed stays, the same command resumes"
    assert not [name for name in contents(out) if name.endswith((".tmp", "lock", "dataset.json"))]
    assert run([*command[:-1], "1", "--quiet"]) == 0
    build(src, tmp_path / "undisturbed", BuildConfig(size=16, shard_size=2, workers=0, device="cpu"))
    assert contents(out) == contents(str(tmp_path / "undisturbed"))


# Runs a command and sends itself a signal: when a module is about to be loaded, or "" when the process ends.
SIGNALLED = """
import os, sys
number, moment, *sys.argv[1:] = int(sys.argv[1]), *sys.argv[2:]
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), number)
def end(code, leave=os._exit):
    os.kill(os.getpid(), number)
    leave(code)
sys.meta_path.insert(0, Finder)
from gpu_npz.cli.start import main
if not moment:
    os._exit = end
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["gpu_npz.cli.main", "click", "gpu_npz.cli.build", "numpy", "gpu_npz.builder.build"])
def test_a_signal_before_a_command_begins_ends_it_without_a_traceback(
    src: str, out: str, number: signal.Signals, moment: str
) -> None:
    result = python("-c", SIGNALLED, str(int(number)), moment, "build", src, out, *SMALL, status=128 + number)
    assert result.stdout == ""
    assert result.stderr == "gpu-npz: stopped\n"
    assert not Path(out).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_all_is_done_changes_nothing(number: signal.Signals, tmp_path: Path) -> None:
    result = python("-c", SIGNALLED, str(int(number)), "", "--version")
    assert result.stderr == ""
    python("-c", SIGNALLED, str(int(number)), "", "info", tmp_path, status=1)


# Runs a command that leaves a thread and an exit handler behind, and then returns or raises what is given.
LEAVING = """
import atexit, sys, threading, time
import gpu_npz.cli.main
from gpu_npz.cli.start import main
def run(arguments):
    atexit.register(print, "handler", end="")
    threading.Thread(target=lambda: (time.sleep(0.5), print("thread ", end=""))).start()
    return eval(arguments[0])
gpu_npz.cli.main.run = run
main()
"""


@pytest.mark.parametrize(("result", "status"), [("0", 0), ("3", 3), ("1 / 0", 1)])
def test_threads_and_exit_handlers_finish_before_the_process_ends(result: str, status: int) -> None:
    ended = python("-c", LEAVING, result, status=status)
    assert ended.stdout == "thread handler"
    assert ("ZeroDivisionError" in ended.stderr) == (result == "1 / 0")


def test_a_signal_that_the_caller_ignores_is_ignored() -> None:
    program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN){SIGNALLED}"
    result = python("-c", program, str(int(signal.SIGINT)), "click", "--version")
    assert result.stderr == ""


def test_nothing_is_loaded_before_signals_are_taken() -> None:
    before = loaded("")
    assert loaded("import gpu_npz.cli.start") - before <= {
        "__future__", "_signal", "atexit", "gpu_npz", "gpu_npz.cli", "gpu_npz.cli.start", "importlib", "warnings",
        "importlib._bootstrap", "importlib._bootstrap_external",
    }  # fmt: skip


def test_the_library_leaves_signals_to_its_host(src: str, out: str) -> None:
    code = f"""
import signal, sys
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
import gpu_npz, gpu_npz.cli.start
from gpu_npz.cli.main import run
gpu_npz.build({src!r}, {out!r}, gpu_npz.BuildConfig(device="cpu", size=16, workers=0))
assert run(["info", {out!r}]) == 0
assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
"""
    python("-c", code)


# Settings


def test_every_setting_is_an_option_of_the_same_name_and_nothing_else_is() -> None:
    command = cli.get_command(click.Context(cli), "build")
    assert command is not None
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    own = {
        "preset": "--preset",
        "dry_run": "--dry-run",
        "config_file": "--config",
        "as_json": "--json",
        "progress_form": "--progress",
        "quiet": "--quiet",
    }
    assert set(options) == {*BuildConfig.model_fields, *own}
    for name, option in options.items():
        assert option.opts == [own.get(name, "--" + name.replace("_", "-"))]
        assert option.help
        if name not in own:
            assert option.help.startswith(BuildConfig.model_fields[name].description or "-")
            assert option.default is None  # what is not given is left to BuildConfig


def test_options_win_over_the_file_and_the_file_over_the_defaults(
    src: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build.toml").write_text(
        'size = 8\nlayout = "NHWC"\nshard-size = "3"\nexif_orientation = false\ndevice = "cpu"\nworkers = 1\n'
    )
    config = ["--config", str(tmp_path / "build.toml")]
    assert run(["build", src, out, *config, "--size", "9x10", "--exif-orientation", "--quiet"]) == 0
    assert run(["info", out, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["settings"]
    expected = {"size": [9, 10], "layout": "NHWC", "shard_size": "3", "exif_orientation": True, "dtype": "float32"}
    assert {name: made[name] for name in expected} == expected
    (tmp_path / "build.toml").write_text("sise = 8\n")
    assert run(["build", src, out, *config]) == 2
    assert "unknown setting 'sise'; did you mean 'size'?" in capsys.readouterr().err


# Other commands


def test_info_of_a_dataset_is_for_people(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", src, out, *SMALL, "--quiet"]) == 0
    assert run(["info", out]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert rows["images"].strip() == "8 of 16 x 16 pixels, rgb, float32, NCHW"
    assert re.fullmatch(r"5 of up to 2 items, \d+\.\d kB", rows["shards"].strip())
    assert rows["rejects"].strip() == "2 of 10 items (1 not-an-image, 1 truncated)"
    assert rows["classes"].strip() == "2: a, b; 4 images in each"
    settings = "--size 16x16 --resize-mode stretch --normalize imagenet --dtype float32 --layout NCHW --shard-size 2"
    assert rows["settings"].strip() == settings
    assert rows["normalized"].strip() == "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
    assert run(["build", src, out, *rows["settings"].split(), "--max-rejects", "50%", "--device", "cpu"]) == 0
    os.truncate(f"{out}/index.npz", 100)  # what needs it is left out
    assert run(["info", out]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (rows["shards"].strip(), rows["classes"].strip()) == ("5 of up to 2 items", "2: a, b")


def test_info_of_an_unfinished_build_says_how_far_it_is_and_what_to_do(
    src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", src, out, *SMALL, "--quiet"]) == 0
    os.unlink(f"{out}/dataset.json")
    os.unlink(f"{out}/shard-00003.npz")
    assert run(["info", out]) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("is not complete: 4 of 5 shards; run the same gpu-npz build again\n")
    rows = dict(line.split("  ", 1) for line in captured.out.splitlines())
    assert re.fullmatch(r"5 of up to 2 items, \d+\.\d kB; 4 are built", rows["shards"].strip())
    assert rows["images"].strip() == "6 of 16 x 16 pixels, rgb, float32, NCHW"
    assert rows["settings"].strip().startswith("--size 16x16 --resize-mode stretch")
    assert run(["info", out, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["built_shards"], found["counts"]["rows"], found["settings"]["size"]) == (4, 6, [16, 16])
    shutil.rmtree(f"{out}/.gpu-npz/commits")
    assert run(["info", out]) == 1
    captured = capsys.readouterr()
    assert "0 of 16 x 16 pixels" in captured.out
    assert "0 of 5 shards" in captured.err


def test_info_of_a_killed_build_says_how_far_it_is(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", src, out, *SMALL, "--quiet"]) == 0
    os.unlink(f"{out}/dataset.json")
    Path(out, ".gpu-npz/commits/.shard-00003.json.12345-6.tmp").write_bytes(b"half")
    assert run(["info", out]) == 1
    assert "is not complete: 5 of 5 shards" in capsys.readouterr().err


@pytest.fixture
def keras(tmp_path: Path) -> str:
    """An .npz as Keras has them, with arrays that cannot be mapped beside it."""
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), np.uint8)
    labels = np.arange(6) % 3
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2], notes=np.array([None]))
    return str(path)


def test_info_of_a_file_shows_its_arrays_and_what_a_build_takes(
    keras: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", keras]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["x_train"] == "uint8 (6, 9, 7, 3), 1.1 kB, stored, mappable"
    assert re.fullmatch(r"int64 \(2,\), 16 B, stored, not mappable \(not aligned: at byte \d+\)", lines["y_test"])
    assert lines["notes"] == "object (1,), 8 B, stored, not mappable (Python objects)"
    assert lines["a build"] == "6 images of 'x_train', y_train (integer) from 'y_train'"
    assert run(["info", keras, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arrays"]["x_test"] == {
        "shape": [2, 9, 7, 3], "dtype": "uint8", "bytes": 378, "stored": True, "mappable": True, "unmappable": None
    }  # fmt: skip
    assert found["build"] == {
        "images": "x_train", "labels": "y_train", "items": 6, "label_kind": "y_train (integer)", "problem": None
    }  # fmt: skip
    np.savez_compressed(tmp_path / "f.npz", images=np.zeros((2, 5, 5)))
    assert run(["info", str(tmp_path / "f.npz")]) == 0
    printed = capsys.readouterr().out
    assert "float64 (2, 5, 5), 400 B, deflated, not mappable (deflated)" in printed
    assert "a build  would fail: " in printed
    assert "--scale 255" in printed
    np.save(tmp_path / "a.npy", np.zeros((2, 5, 5), np.uint8))
    assert run(["info", str(tmp_path / "a.npy")]) == 0
    assert "a build  2 images of 'arr_0', no labels" in capsys.readouterr().out
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4")
    assert run(["info", str(tmp_path / "bad.npz")]) == 1
    assert "bad.npz: it is no .npz, damaged or cut" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe.npz")
    for name, problem in {"none.npz": "No such file or directory", "pipe.npz": "not a regular file"}.items():
        assert run(["info", str(tmp_path / name)]) == 1
        assert f"{name}': {problem}; give the OUT" in capsys.readouterr().err.replace("\n", " ")


def test_splits_all_builds_the_sides_that_a_file_has(
    keras: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", keras, out, *SMALL, "--splits", "all"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}/train: 6 images" in printed
    assert f"{out}/test: 2 images" in printed
    assert run(["build", keras, out, *SMALL, "--splits", "all", "--json"]) == 0
    assert {side: each["rows"] for side, each in json.loads(capsys.readouterr().out).items()} == {"train": 6, "test": 2}
    assert run(["build", keras, out, *SMALL, "--splits", "all", "--split", "val=0.1"]) == 2
    assert "--splits all takes the sides that it has; omit one of them" in capsys.readouterr().err
    assert run(["build", keras, f"{out}2", *SMALL, "--splits", "val"]) == 2
    assert "splits: got 'val'; allowed: none, all" in capsys.readouterr().err
    assert run(["build", keras, f"{out}2", *SMALL, "--splits", "all", "--dry-run"]) == 2
    assert f"plan each by itself: SRC is one of {keras}/x_train.npy, {keras}/x_test.npy" in capsys.readouterr().err
    assert run(["build", f"{out}/train", f"{out}2", *SMALL, "--size", "8", "--dtype", "uint8"]) == 0
    assert run(["verify", f"{out}2"]) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a", "c"], "classes that are not in the given list: 'c'"), ([0.5, 1.5], "there are names for 2 classes")],
)
def test_sides_that_do_not_fit_together_are_refused_before_any_is_built(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[Any], message: str
) -> None:
    images = np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "s.npz", x_train=images, y_train=["a", "b"], x_test=images, y_test=labels)
    assert run(["build", str(tmp_path / "s.npz"), out, *SMALL, "--splits", "all"]) == 1
    assert message in capsys.readouterr().err
    assert not os.path.exists(out) or os.listdir(out) == []


@pytest.fixture
def split(src: str, out: str) -> str:
    assert run(["build", src, out, *SMALL, "--split", "val=0.5", "--quiet"]) == 0
    return out


def test_retry_on_the_datasets_of_a_split_names_them_and_says_which_path_to_give(
    split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["retry", split]) == 1
    expected = f"{split!r} is not a dataset, but holds train, val; give one of them, such as {split + '/train'!r}"
    assert capsys.readouterr().err == f"gpu-npz: {expected}\n"


def test_info_and_stats_show_all_sides_of_a_split(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "stats"):
        assert run([command, split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found) == ["train", "val"]
        for side in found:
            assert run([command, f"{split}/{side}", "--json"]) == 0
            assert json.loads(capsys.readouterr().out) == found[side]
    assert run(["info", split]) == 0
    assert re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE) == ["train", "val"]
    os.unlink(f"{split}/val/dataset.json")
    assert run(["info", split]) == 1
    captured = capsys.readouterr()
    assert re.findall(r"^(\w+):$", captured.out, re.MULTILINE) == ["train", "val"]
    assert f"{split}/val' is not complete" in captured.err


def test_verify_checks_and_repairs_all_sides_of_a_split(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", split, "--deep", "3"]) == 0
    assert capsys.readouterr().out.count(": OK") == 2
    os.unlink(f"{split}/val/shard-00000.npz")
    assert run(["verify", split, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {side: each["ok"] for side, each in found.items()} == {"train": True, "val": False}
    assert run(["verify", split, "--repair", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {side: each["repaired_shards"] for side, each in found.items()} == {"train": [], "val": [0]}


def test_preview_draws_a_sheet_for_each_side_of_a_split(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["preview", split, "-o", str(tmp_path / "sheet.png")]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / f"sheet-{side}.png") for side in ("train", "val")
    ]
    assert (tmp_path / "sheet-train.png").stat().st_size > 0 < (tmp_path / "sheet-val.png").stat().st_size


def test_doctor_tells_what_is_there_and_how_to_get_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert all(list(finding) == ["what", "ok", "found", "remedy"] for finding in findings)
    by_name = {finding["what"]: finding for finding in findings}
    assert by_name["gpu-npz"]["found"].startswith(gpu_npz.__version__)
    assert not by_name["GPU"]["ok"]
    assert all(finding["ok"] or finding["remedy"] or finding["what"] in ("GPU", "DALI", "CuPy") for finding in findings)
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(finding["what"] in shown and finding["remedy"] in shown for finding in findings)


def test_doctor_tells_what_extras_are_for_and_recommends_no_gpu_packages_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(
        environment, "_trouble", lambda package, *_, **__: Missing(package.what, "not installed", "pip")
    )
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setitem(sys.modules, "pydicom", SimpleNamespace(__version__="3.0"))
    found = {finding.what: finding for finding in doctor.diagnose()}
    wanted = "not installed; optional, for --bit-depth 16, and TIFF that Pillow does not read"
    assert (found["imagecodecs"].ok, found["imagecodecs"].found) == (False, wanted)
    assert found["imagecodecs"].remedy == "pip install 'tifffile>=2024.8.30' 'imagecodecs>=2024.9.22'"
    assert (found["pydicom"].ok, found["pydicom"].found) == (True, "3.0, for DICOM files")
    assert (found["CuPy"].found, found["CuPy"].remedy) == ("not installed; only needed on a machine with a GPU", "")
    extras = load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert {extra for _, extra, _ in doctor._EXTRAS.values()} <= extras.keys()


def test_python_m_and_the_installed_command_are_the_same(tmp_path: Path) -> None:
    assert python("-m", "gpu_npz", "--version").stdout == f"gpu-npz {gpu_npz.__version__}\n"
    script = shutil.which("gpu-npz", path=os.path.dirname(sys.executable))
    if script is not None:
        result = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, f"gpu-npz {gpu_npz.__version__}\n")
    python("-m", "gpu_npz", "info", tmp_path, status=1)


# Help, and what is loaded when


def commands(group: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command and subcommand."""
    yield path
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield from commands(command, *path, name)


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_every_command_has_help_and_a_line_in_the_list(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"Usage: {' '.join(('gpu-npz', *path))} [")
    assert "." in shown.split(" Options: ")[0]
    if not path:
        assert all(f"{name} {summary}" in shown for name, summary in COMMANDS.items())


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has after some code."""
    result = python("-c", f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))")
    return {*result.stdout.splitlines()[-1].split()}


def test_importing_the_package_loads_nothing_heavier_than_numpy() -> None:
    modules = loaded("import gpu_npz\ndir(gpu_npz)")
    assert not modules & {*HEAVY, "click", "rich", "isal", "gpu_npz.builder.build"}


def test_help_loads_no_library_that_takes_its_time() -> None:
    modules = loaded("from gpu_npz.cli.main import run\nassert run(['--help']) == run(['--version']) == 0")
    assert not modules & {*HEAVY, "numpy", "rich", "isal", "gpu_npz.config"}


def test_the_help_of_all_commands_loads_no_gpu_and_no_image_library() -> None:
    code = "from gpu_npz.cli.main import COMMANDS, run\nassert not any(run([name, '--help']) for name in COMMANDS)"
    modules = loaded(code)
    assert not modules & {"torch", "cupy", "nvidia.dali", "ray", "PIL"}


def test_a_build_on_the_cpu_loads_no_gpu_library(src: str, out: str) -> None:
    modules = loaded(f"from gpu_npz.cli.main import run\nassert run({['build', src, out, *SMALL]!r}) == 0")
    assert not modules & {"torch", "cupy", "nvidia.dali", "ray"}


def test_rich_is_loaded_only_to_print_with_it(src: str, out: str) -> None:
    build = ["build", src, out, *SMALL]
    code = f"from gpu_npz.cli.main import run\nassert run({[*build, '--quiet']!r}) == run({['info', out]!r}) == 0"
    assert "rich" not in loaded(code)
    assert "rich.progress" not in loaded(f"from gpu_npz.cli.main import run\nassert run({build!r}) == 0")


def test_a_build_on_a_terminal_has_a_bar(src: str, out: str) -> None:
    here, there = os.openpty()
    command = [sys.executable, "-m", "gpu_npz", "build", src, out, *SMALL]
    with subprocess.Popen(
        command, stderr=there, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(there)
        shown = b""
        with contextlib.suppress(OSError):  # raised when the process has ended
            while data := os.read(here, 4096):
                shown += data
    os.close(here)
    assert process.returncode == 0
    assert "building" in shown.decode()
    assert "10/10" in shown.decode()


@pytest.mark.parametrize(
    "options",
    [
        ["-j", "1", "--img-size", "20"],
        ["-j1", "--image-size=20"],
        ["--jobs=1", "--image-size", "20"],
        ["--num-workers=1"],
    ],
)
def test_options_may_be_spelled_as_in_other_tools(
    options: list[str], src: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*options, "--device", "cpu", "--max-rejects", "50%", "--json"]
    assert run(["build", src, out, *options]) == 0
    assert json.loads(capsys.readouterr().out)["tuning"]["workers"] == 1
    size = 20 if any("size" in option for option in options) else 224
    assert gpu_npz.open_dataset(out).image_shape == (3, size, size)


def test_a_dry_run_shows_the_plan_and_writes_nothing(src: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", src, out, "--dry-run", "--device", "cpu", "--size", "16"]) == 0
    shown = capsys.readouterr().out
    assert "10 items" in shown
    assert "memory" in shown
    assert not os.path.exists(out)


@pytest.mark.parametrize(
    ("command", "hint"),
    [("biuld", "did you mean build"), ("verfy", "did you mean verify"), ("qqq", "the commands are build,")],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(
    command: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "x"]) == 2
    assert f"No such command {command!r}; {hint}" in capsys.readouterr().err


def test_the_help_of_build_lists_every_option_once_in_groups_the_common_ones_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["build", "--help"]) == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^(\S.* options):$", text, re.MULTILINE)
    groups = [name.capitalize().removesuffix("s") for name in get_args(Group)]
    assert titles == [f"{name} options" for name in groups] + [
        f"Advanced {name.lower()} options" for name in groups
    ] + ["Other options"]
    for name in BuildConfig.model_fields:
        option = "--" + name.replace("_", "-")
        assert len(re.findall(rf"^  {option}\b(?!-)", text, re.MULTILINE)) == 1, name
    sizes = [text.index(f"  {option} ") for option in ("--labels", "--size", "--workers", "--pad-value", "--preset")]
    assert sizes == sorted(sizes)
