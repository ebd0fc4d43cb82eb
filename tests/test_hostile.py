"""Files that are made to do harm: to the decoder, to the listing, and to what lies beside OUT."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features
from support import MakeTree, edit_json, encode, reject_lines

import gpu_npz
from gpu_npz import BuildConfig
from gpu_npz.cli.main import run
from gpu_npz.errors import FormatError
from gpu_npz.sources.folders.folder import FolderSource

SETTINGS = BuildConfig(device="cpu", backend="pillow", workers=0, size=16, shard_size=4, max_rejects="100%")


def build(src: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    gpu_npz.build(src, out, SETTINGS.model_copy(update=settings))
    return reject_lines(out)


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_a_webp_is_judged_by_its_header_before_its_canvas_is_allocated(make_tree: MakeTree, tmp_path: Path) -> None:
    good = encode(pixels(40, 60), "WEBP", quality=80)
    lossless = encode(pixels(40, 60), "WEBP", lossless=True)
    canvas = b"\xff\xff\x00" * 2  # 65,536 x 65,536, in 24 bits each
    huge = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + canvas
    huge = b"RIFF" + (4 + len(huge)).to_bytes(4, "little") + b"WEBP" + huge
    src = make_tree({"a/1.webp": good, "a/2.webp": lossless, "a/3.webp": huge, "a/4.webp": good[:-9]})
    rejects = build(src, tmp_path / "out")
    assert [(reject["path"], reject["code"]) for reject in rejects] == [
        ("a/3.webp", "too-large"),
        ("a/4.webp", "truncated"),
    ]
    assert "65536 x 65536" in rejects[0]["detail"]


def test_a_progressive_jpeg_with_thousands_of_scans_is_not_decoded(make_tree: MakeTree, tmp_path: Path) -> None:
    data = encode(pixels(40, 60), progressive=True)
    start = data.rindex(b"\xff\xda")
    src = make_tree({"a/1.jpg": data[:-2] + data[start:-2] * 300 + data[-2:], "a/2.jpg": data})
    (reject,) = build(src, tmp_path / "out")
    assert (reject["path"], reject["code"]) == ("a/1.jpg", "undecodable")
    assert "more than 256 scans" in reject["detail"]


def test_what_is_appended_to_a_jpeg_is_not_taken_for_scans(make_tree: MakeTree, tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 256, 25_000_000, np.uint8).tobytes()  # as phones append one
    assert film.count(b"\xff\xda") > 256
    src = make_tree(
        {"a/1.jpg": encode(pixels(40, 60)) + film, "a/2.jpg": encode(pixels(40, 60), progressive=True) + film}
    )
    assert build(src, tmp_path / "out") == []


def test_a_large_sixteen_bit_image_is_scaled_as_a_small_one(make_tree: MakeTree, tmp_path: Path) -> None:
    levels = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    src = make_tree({"a/1.png": encode(Image.fromarray(levels), "PNG")})
    build(src, tmp_path / "out", size=(256, 256), dtype="uint8")
    stored = gpu_npz.open_dataset(tmp_path / "out")[0]
    assert np.array_equal(stored[0].ravel(), np.round(levels.ravel() / 257).astype(np.uint8))


def test_a_web_of_links_between_folders_is_listed_once(make_tree: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    src = make_tree({f"web/{number}/image.jpg": "jpeg" for number in range(9)})
    for here in range(9):
        for there in range(9):
            if here != there:
                (src / f"web/{here}/to-{there}").symlink_to(src / f"web/{there}")
    with caplog.at_level(logging.WARNING):
        groups = list(FolderSource(src).groups())
    assert sum(len(group.names) for group in groups) == 9
    assert "its images are used only once" in caplog.text


def test_folders_may_be_as_deep_as_a_path_allows(make_tree: MakeTree) -> None:
    src = make_tree({"a/1.jpg": "1x1"})
    descriptor = os.open(src / "a", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        assert [group.names for group in FolderSource(src).groups()] == [[b"1.jpg"]]
    finally:
        # Too deep for shutil.rmtree, with which pytest cleans.
        subprocess.run(["rm", "-rf", src / "a" / "d"], check=True)


def test_a_dataset_inside_another_and_a_link_out_of_it_survive_overwrite(make_tree: MakeTree, tmp_path: Path) -> None:
    src, out, outside = make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out", tmp_path / "outside"
    build(src, out)
    build(src, out / "2024")
    outside.mkdir()
    for name in ("shard-77777.npz", ".a.1-1.tmp"):
        (outside / name).write_text("mine")
    (out / "00").symlink_to(outside)
    build(src, out, overwrite=True)
    assert gpu_npz.verify(out).ok
    assert gpu_npz.verify(out / "2024").ok
    assert sorted(path.name for path in outside.iterdir()) == [".a.1-1.tmp", "shard-77777.npz"]


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -5},
        {"rows": 10**30},
        {"rejects": []},
        {"rejects": [{"path": "x", "index": 10**6, "stage": "read", "code": "missing", "detail": ""}]},
    ],
    ids=["negative rows", "huge rows", "no rejects", "foreign reject"],
)
def test_a_commit_record_that_contradicts_its_shard_is_not_believed(
    make_tree: MakeTree, tmp_path: Path, change: dict[str, Any]
) -> None:
    src, out = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "half"}), tmp_path / "out"
    build(src, out)
    edit_json(out / ".gpu-npz/commits/shard-00000.json", lambda record: record.update(change))
    (out / "dataset.json").unlink()
    with pytest.raises(FormatError, match=r"shard-00000\.json: .*delete the file to rebuild"):
        build(src, out)
    (out / ".gpu-npz/commits/shard-00000.json").unlink()
    build(src, out)
    assert gpu_npz.verify(out).ok


@pytest.mark.parametrize(
    "change",
    [{"shard_rows": 0}, {"shard_rows": 10**30}, {"image_size": [10**6, 1]}, {"settings": {}}, {"id": "é"}],
    ids=["no rows", "huge rows", "image size", "settings", "id"],
)
def test_a_job_that_was_altered_is_not_believed(make_tree: MakeTree, tmp_path: Path, change: dict[str, Any]) -> None:
    src, out = make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out"
    build(src, out)
    edit_json(out / ".gpu-npz/job.json", lambda record: record.update(change))
    with pytest.raises(FormatError, match=r"job\.json|plan\.npz"):
        build(src, out)


@pytest.mark.parametrize("name", ["dataset.json", "index.npz", "shard-00000.npz", "rejects.jsonl"])
def test_a_pipe_in_place_of_a_file_is_named_and_waited_for_by_nobody(
    make_tree: MakeTree, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    build(make_tree({"a/1.jpg": "jpeg"}), out)
    (out / name).unlink()
    os.mkfifo(out / name)
    assert run(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert "not a regular file" in captured.out + captured.err


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"version": 1e400}', b"null", b"\xff"])
@pytest.mark.parametrize("name", ["dataset.json", ".gpu-npz/job.json"])
def test_json_that_is_made_to_crash_a_parser_is_only_damaged(
    make_tree: MakeTree, tmp_path: Path, name: str, content: bytes
) -> None:
    src, out = make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out"
    build(src, out)
    (out / name).write_bytes(content)
    if name == "dataset.json":
        with pytest.raises(FormatError):
            gpu_npz.open_dataset(out)
    else:
        with pytest.raises(FormatError):
            build(src, out)


def test_names_reach_the_terminal_without_their_control_characters(
    make_tree: MakeTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    build(make_tree({"\x1b[31mred\x07/1.jpg": "jpeg", "two\nlines/2.jpg": "jpeg"}), out)
    assert run(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31mred\\x07, two\\nlines" in said
    assert "\x1b" not in said
    shutil.copy(out / "dataset.json", out / "index.npz")
    assert run(["verify", str(out)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_the_report_of_a_build_with_too_many_rejects_is_printed_all_the_same(
    make_tree: MakeTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "text"})
    options = ["--device", "cpu", "--size", "16", "--max-rejects", "0", "--json"]
    assert run(["build", str(src), str(tmp_path / "out"), *options]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["complete"] is False
    assert "--max-rejects 0 allows 0" in captured.err
