"""Rejects that are tried again and shards that are rebuilt: only what changes, and the bytes of a fresh build."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import contents, cpu_config, edit_json, file_bytes, flip_bit

import gpu_npz
from gpu_npz.builder.build import build
from gpu_npz.builder.maintenance import repair, retry
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.errors import IncompleteError, MismatchError, RejectLimitError, SourceError

BACKENDS = ["pillow", "dali"]


settings = functools.partial(cpu_config, shard_size=5, max_rejects="50%")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """24 files in 5 shards; one of the second shard and two of the fourth are bad."""
    root = tmp_path / "images"
    for number in range(24):
        path = root / ("a" if number < 12 else "b") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes("half" if number in (7, 16, 17) else "jpeg", seed=number, size=(40, 50)))
    return root


@pytest.fixture
def out(src: Path, tmp_path: Path) -> Path:
    build(src, tmp_path / "out", settings())
    return tmp_path / "out"


def fresh(src: Path, tmp_path: Path, **values: Any) -> dict[str, bytes]:
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    build(src, tmp_path / "fresh", settings(**values))
    return contents(tmp_path / "fresh")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mended_file_becomes_a_row_and_only_its_shard_is_built_anew(backend: str, src: Path, tmp_path: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    out = tmp_path / "out"
    build(src, out, settings(backend=backend))
    assert retry(out).shards == ()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    (src / "b/16.jpg").write_bytes(file_bytes("jpeg", seed=16))
    result = retry(out)
    assert result.shards == (3,)
    assert result.report is not None
    assert (result.report.complete, result.report.rejects) == (True, 2)
    assert [name for name, time in before.items() if (out / name).stat().st_mtime_ns != time] == ["shard-00003.npz"]
    assert contents(out) == fresh(src, tmp_path, backend=backend)


def test_retry_finishes_a_build_that_had_too_many_rejects(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RejectLimitError):
        build(src, out, settings(max_rejects="1"))
    for name in ("a/07.jpg", "b/17.jpg"):
        (src / name).write_bytes(file_bytes("jpeg"))
    assert retry(out, BuildConfig(max_rejects="1")).shards == (1, 3)
    assert contents(out) == fresh(src, tmp_path)


def test_an_item_that_ended_its_decoder_is_tried_again_in_a_worker(out: Path, src: Path, tmp_path: Path) -> None:
    record = out / ".gpu-npz/commits/shard-00001.json"
    record.write_text(record.read_text().replace('"truncated"', '"crashed"'))
    assert retry(out, BuildConfig(workers=1)).shards == (1,)
    assert contents(out) == fresh(src, tmp_path)


def test_retry_of_a_build_that_has_not_ended_says_so(out: Path, src: Path) -> None:
    (out / ".gpu-npz/commits/shard-00002.json").unlink()
    with pytest.raises(IncompleteError, match="4 of 5 shards are built; run the same gpu-npz build again first"):
        retry(out)


def test_images_that_have_moved_are_named(out: Path, src: Path, tmp_path: Path) -> None:
    (src / "a/07.jpg").write_bytes(file_bytes("jpeg", seed=7))
    src.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="give --source SRC"):
        retry(out)
    assert retry(out, source=tmp_path / "moved").shards == (1,)


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[int, ...]]] = {
    "a flipped byte": (lambda out: flip_bit(out / "shard-00002.npz", 5000), (2,)),
    "a cut shard": (lambda out: os.truncate(out / "shard-00000.npz", 9000), (0,)),
    "shards lost": (lambda out: [(out / f"shard-0000{n}.npz").unlink() for n in (1, 4)], (1, 4)),
    "swapped shards": (lambda out: shutil.copy(out / "shard-00000.npz", out / "shard-00001.npz"), (1,)),
    "the index lost": (lambda out: (out / "index.npz").unlink(), ()),
    "a flipped byte in the index": (lambda out: flip_bit(out / "index.npz", 5000), ()),
    "the rejects lost": (lambda out: (out / "rejects.jsonl").unlink(), ()),
    "a damaged manifest": (lambda out: (out / "dataset.json").write_text("{}"), ()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_builds_what_is_damaged_anew_and_nothing_else(damage: str, out: Path, src: Path) -> None:
    whole = contents(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    harm, shards = DAMAGE[damage]
    harm(out)
    assert repair(out).shards == shards
    assert contents(out) == whole
    assert gpu_npz.verify(out).ok
    changed = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
    assert changed <= {f"shard-{shard:05}.npz" for shard in shards}
    assert repair(out).report is None


def test_a_source_that_has_changed_shows_in_the_repaired_dataset(out: Path, src: Path) -> None:
    (src / "a/01.jpg").write_bytes(file_bytes("text"))
    (out / "shard-00000.npz").unlink()
    result = repair(out)
    assert result.report is not None
    assert result.report.rejects == 4
    assert gpu_npz.verify(out).ok


def test_rows_that_would_be_lost_are_kept_unless_so_many_rejects_are_allowed(
    out: Path, src: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(out)
    for name in ("b/15.jpg", "b/18.jpg"):
        (src / name).unlink()
    (src / "b/16.jpg").write_bytes(file_bytes("jpeg", seed=16))
    message = r"2 images \('b/15.jpg' for one: missing, .*\) could be built before .* give --max-rejects 4; 3 allows 3"
    with pytest.raises(SourceError, match=message):
        retry(out, settings(max_rejects="3"))
    assert contents(out) == before
    shard = out / "shard-00003.npz"
    os.truncate(shard, 100)
    with pytest.raises(SourceError, match=r"2 images .* give --max-rejects 5; 3 allows 3"):
        repair(out, settings(max_rejects="3"))
    assert shard.stat().st_size == 100
    assert repair(out, settings(max_rejects="5")).shards == (3,)
    assert gpu_npz.verify(out).rows == 20
    assert "'b/15.jpg' for one: missing, No such file or directory) could be built before" in caplog.text
    assert "1 of the shards that were rebuilt are not what they were, shard-00003.npz for one" in caplog.text


def test_the_commands_say_what_they_did(out: Path, src: Path, capsys: Any) -> None:
    assert run(["retry", str(out)]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    (src / "a/07.jpg").write_bytes(file_bytes("jpeg", seed=7))
    assert run(["retry", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == [1]
    flip_bit(out / "shard-00003.npz", 4500)
    assert run(["verify", str(out)]) == 1
    assert run(["verify", str(out), "--source", str(src)]) == 2
    capsys.readouterr()
    assert run(["verify", str(out), "--repair"]) == 0
    assert "1 shard rebuilt" in capsys.readouterr().out
    assert run(["verify", str(out), "--repair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repaired_shards"] == []


@pytest.mark.parametrize(("name", "value"), [("decoding_revision", 1), ("pillow", "1.0")])
def test_a_dataset_that_another_decoder_made_is_left_whole(name: str, value: object, out: Path, src: Path) -> None:
    for path in (out / ".gpu-npz/commits").iterdir():
        edit_json(path, lambda record: record["environment"].update({name: value}))
    before = contents(out)
    (src / "a/07.jpg").write_bytes(file_bytes("jpeg", seed=7, size=(40, 50)))
    with pytest.raises(MismatchError):
        retry(out, settings())
    assert contents(out) == before
    os.truncate(out / "shard-00004.npz", 9000)
    before = contents(out)
    with pytest.raises(MismatchError):
        repair(out, settings())
    assert contents(out) == before
