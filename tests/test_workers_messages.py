"""What libraries write to a worker's stderr: known messages are counted and their files named, all else is shown."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MakeTree, cpu_config, file_bytes

from gpu_npz.builder.build import build
from gpu_npz.builder.report import BuildReport
from gpu_npz.cli.main import run
from gpu_npz.workers import message_files
from gpu_npz.workers.messages import Output, known

Start = Callable[[str], tuple[subprocess.Popen[bytes], Output]]
NOTHING: Counter[str] = Counter()


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(program)`: a process that runs it, and its output."""
    processes: list[tuple[subprocess.Popen[bytes], Output]] = []

    def begin(program: str) -> tuple[subprocess.Popen[bytes], Output]:
        command = [sys.executable, "-c", f"import os, sys, time\n{program}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        processes.append((process, Output(process.stdout)))
        return processes[-1]

    yield begin
    for process, output in processes:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
        output.close()
    for thread in threading.enumerate():
        if thread.name == "gpu-npz-output":
            thread.join(60)
            assert not thread.is_alive()


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of all that was logged."""
    return [line for record in caplog.records for line in record.getMessage().splitlines()]


# What is known


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Corrupt JPEG data: 58 extraneous bytes before marker 0xd9",
         "Corrupt JPEG data: # extraneous bytes before marker #"),
        ("Corrupt JPEG data: found marker 0xd4 instead of RST3", "Corrupt JPEG data: found marker # instead of RST#"),
        ("Warning: unknown JFIF revision number 2.01", "Warning: unknown JFIF revision number #"),
        ("Invalid progressive/lossless parameters Ss=1 Se=115 Ah=1 Al=0",
         "Invalid progressive/lossless parameters Ss=# Se=# Ah=# Al=#"),
        ("Premature end of JPEG file", "Premature end of JPEG file"),
        ("[ERROR] [jpeg_parser] Invalid marker", "[ERROR] [jpeg_parser] Invalid marker"),
        ("[WARNING] [jpeg2k_parser] odd", "[WARNING] [jpeg#k_parser] odd"),
        ("libpng warning: iCCP: known incorrect sRGB profile", "libpng warning: iCCP: known incorrect sRGB profile"),
        ("[ERROR] [nvjpeg_cuda_decoder] Could not decode jpeg code stream - out of memory", None),
        ("Insufficient memory (case 4)", None),
        ("Corrupt JPEG data: something new", None),
        ("Traceback (most recent call last):", None),
        ("free(): invalid pointer", None),
    ],
)  # fmt: skip
def test_a_message_is_known_by_its_words_whatever_its_numbers(line: str, message: str | None) -> None:
    assert known(line) == message


def test_known_messages_are_counted_and_all_other_lines_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    process, output = start(
        r"""
os.write(2, b"\x1b[0;31m[ERROR] \x1b[0m[jpeg_parser] Invalid marker\nBogus DQT index 6\nBogus DQT index 9\n")
os.write(2, b"\x1b[1mnever seen\x1b[0m \xff\n\n")
os.write(1, b"on stdout\nno line's end")
"""
    )
    process.wait()
    found = output.close()
    assert found == Counter({"Bogus DQT index #": 2, "[ERROR] [jpeg_parser] Invalid marker": 1})
    assert shown(caplog) == ["output of a worker process:", r"  never seen \xff", "  on stdout", "  no line's end"]
    assert output.close() == NOTHING


def test_what_was_written_before_is_known_and_a_line_is_logged_when_it_ends(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process, output = start(
        r"""
os.write(2, b"Bogus DHT index 1\nhalf a li")
sys.stdin.read()
os.write(2, b"ne\n")
"""
    )
    while not output.unread:
        time.sleep(0.01)
    assert output.known() == Counter({"Bogus DHT index #": 1})
    assert output.known() == NOTHING
    assert shown(caplog) == []
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    output.close()
    assert shown(caplog) == ["output of a worker process:", "  half a line"]


def test_a_process_that_writes_more_than_a_pipe_holds_waits_for_nobody(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process, output = start('sys.stderr.write("Bogus DAC index 5\\n" * 100_000 + "unknown\\n" * 5000)')
    assert process.wait(60) == 0
    assert output.close() == Counter({"Bogus DAC index #": 100_000})
    assert shown(caplog)[-1] == "  (and 4000 more lines)"


def test_the_last_lines_of_a_process_that_dies_are_kept_known_or_not(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process, output = start(
        r"""
sys.stderr.write("".join(f"line {number}\n" for number in range(20)) + "Bogus DAC index 5\nterminate called")
os.abort()
"""
    )
    process.wait()
    assert output.close(died=True) == Counter({"Bogus DAC index #": 1})
    assert shown(caplog) == ["output of a worker process:", *(f"  line {number}" for number in range(12))]
    last = [*(f"  line {number}" for number in range(12, 20)), "  Bogus DAC index 5", "  terminate called"]
    assert output.last_words.splitlines() == ["", "It wrote last:", *last]


def test_a_pipe_that_a_child_of_the_process_keeps_open_is_not_waited_for(start: Start) -> None:
    process, output = start('os.write(2, b"Bogus DAC index 5\\n"); os.fork() or time.sleep(5)')
    process.wait()
    assert output.close() == Counter({"Bogus DAC index #": 1})


# In builds


settings = functools.partial(cpu_config, workers=1, shard_size=16, max_rejects="100%")


@pytest.fixture
def noisy(make_tree: MakeTree) -> Path:
    """40 pictures, 4 of which libjpeg writes messages about."""
    pytest.importorskip("nvidia.dali")
    files: dict[str, str | bytes] = {f"{'ab'[number % 2]}/{number:02}.jpg": "jpeg" for number in range(36)}
    good = file_bytes("jpeg", seed=3)
    files["a/05-extra.jpg"] = good[:-2] + bytes(range(1, 60)) + good[-2:]
    files["b/17-half.jpg"] = "half-with-eoi"
    files["b/18-half.jpg"] = "half-with-eoi"
    files["b/99-version.jpg"] = good.replace(b"JFIF\0\1\1", b"JFIF\0\2\1")
    return make_tree(files)


NAMED = {
    "Corrupt JPEG data: # extraneous bytes before marker #": ("a/05-extra.jpg",),
    "Corrupt JPEG data: premature end of data segment": ("b/17-half.jpg", "b/18-half.jpg"),
    "Warning: unknown JFIF revision number #": ("b/99-version.jpg",),
}


def named(report: BuildReport) -> dict[str, tuple[str, ...]]:
    return {message.text: tuple(sorted(message.files)) for message in report.messages}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"workers": 2, "batch_size": 2, "shuffle": 1},
        {"prefetch": 4, "open_shards": 2, "batch_size": 4, "shard_size": 8},
        {"normalize": "dataset"},
    ],
    ids=str,
)
def test_the_files_that_dalis_libraries_write_messages_about_are_named(
    noisy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], values: dict[str, Any]
) -> None:
    report = build(noisy, tmp_path / "out", settings(backend="dali", **values))
    assert named(report) == NAMED
    assert all(message.all_files and message.count == len(message.files) for message in report.messages)
    assert report.rejects == 0
    assert capfd.readouterr() == ("", "")
    stored = json.loads((tmp_path / "out/.gpu-npz/report.json").read_bytes())["messages"]
    assert stored == [{**vars(message), "files": list(message.files)} for message in report.messages]


def test_a_quiet_build_writes_nothing_and_another_names_some_of_the_files(
    noisy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["build", os.fspath(noisy), "--device", "cpu", "--backend", "dali", "--size", "16", "--workers", "1"]
    assert run([*command, os.fspath(tmp_path / "quiet"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert run([*command, os.fspath(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "message     2 x 'Corrupt JPEG data: premature end of data segment': b/17-half.jpg, b/18-half.jpg\n" in out


def test_no_more_is_decoded_again_than_a_share_of_the_build(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(message_files, "_FEW", 20)
    report = build(noisy, tmp_path / "out", settings(backend="dali", batch_size=4))
    assert sum(message.count for message in report.messages) == 4
    assert 0 < sum(len(message.files) for message in report.messages) < 4
    assert not any(message.all_files for message in report.messages)
    command = ["build", os.fspath(noisy), os.fspath(tmp_path / "other"), "--device", "cpu", "--backend", "dali"]
    assert run([*command, "--size", "16", "--workers", "1", "--batch-size", "4"]) == 0
    assert "a/05-extra.jpg, maybe others\n" in capfd.readouterr().out


def test_a_build_without_messages_decodes_nothing_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("gpu_npz.workers.local.find_message_files")
    assert build(tree, tmp_path / "out", settings(backend="pillow", workers=2)).messages == ()
