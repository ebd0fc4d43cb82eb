"""Compressed shards: NumPy reads them as any NPZ, our readers inflate single rows; damage and bombs are found."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import random
import struct
import subprocess
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import build_cpu, file_bytes

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.audit.preview import preview
from gpu_npz.audit.stats import of_dataset
from gpu_npz.config import BuildConfig
from gpu_npz.errors import BackendError, FormatError, MismatchError, UsageError
from gpu_npz.npz import writer
from gpu_npz.npz.format import Directory, Member, rowindex
from gpu_npz.npz.reader import DeflatedRows, NpzReader
from gpu_npz.npz.writer import NpzWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.npz"


def pictures(rows: int) -> NDArray[np.float32]:
    """Rows that compress somewhat."""
    return np.random.default_rng(rows).integers(0, 40, (rows, 3, 8, 10)).astype(np.float32)


def write(path: Path, images: NDArray[Any], level: int = 1) -> Directory:
    with NpzWriter(path) as file:
        file.begin("images", images.dtype, images.shape[1:], deflate_level=level)
        for row in range(0, len(images), 2):
            file.append(images[row : row + 2])
        file.add("labels", np.arange(len(images)))
        return file.close("a comment")


def inflating(path: Path) -> DeflatedRows:
    rows = NpzReader(path).rows("images")
    assert isinstance(rows, DeflatedRows)
    return rows


# The file


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numpy_zip_tools_and_our_reader_find_every_row(path: Path, rows: int, level: int) -> None:
    images = pictures(rows)
    directory = write(path, images, level)
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["images", "images.rowindex", "labels"]
        np.testing.assert_array_equal(file["images"], images)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("images.npy").compress_size < 128 + images.nbytes + 40
    assert subprocess.run(["unzip", "-tq", path], capture_output=True, check=True)
    reader = NpzReader(path)
    assert reader.directory == directory
    assert all(reader.crc_matches(name) for name in directory.members)
    found = inflating(path)
    assert (len(found), found.shape, found.dtype) == (rows, images.shape, images.dtype)
    for row in range(-rows, rows):
        np.testing.assert_array_equal(found[row], images[row])
    for span in (slice(None), slice(1, 3), slice(None, None, -2), slice(7, 9)):
        np.testing.assert_array_equal(found[span], images[span])
    with pytest.raises(IndexError):
        found[rows]
    with pytest.raises(FormatError, match="images is deflated"):
        reader["images"]


def test_a_row_is_read_without_a_look_at_the_others(path: Path) -> None:
    member = write(path, images := pictures(4)).members["images"]
    ends = NpzReader(path)[rowindex("images")].tolist()
    content = bytearray(path.read_bytes())
    for row in (0, 1, 3):
        start, stop = (member.data_offset + end for end in ends[row : row + 2])
        content[start:stop] = b"\xff" * (stop - start)
    path.write_bytes(content)
    found = inflating(path)
    np.testing.assert_array_equal(found[2], images[2])
    for row in (0, 1, 3):
        with pytest.raises(FormatError, match=rf"images: row {row} is damaged .*copy the file again"):
            found[row]
    with pytest.raises(FormatError, match="row 0 is damaged"):
        NpzReader(path).crc_matches("images")


def test_a_changed_byte_is_noticed_or_changes_no_row(path: Path) -> None:
    member = write(path, images := pictures(3)).members["images"]
    content, seeded, noticed = path.read_bytes(), random.Random(0), 0
    for position in range(member.data_offset, member.end):
        changed = bytearray(content)
        changed[position] ^= 1 << seeded.randrange(8)
        path.write_bytes(changed)
        try:
            noticed += not (whole := NpzReader(path).crc_matches("images"))
        except FormatError:
            noticed, whole = noticed + 1, False
        if whole:  # bits in front of a stored block that mean nothing
            np.testing.assert_array_equal(inflating(path)[:], images)
    assert noticed > 0.98 * (member.end - member.data_offset)


INDEXES: dict[str, Callable[[NDArray[np.int64]], NDArray[Any]]] = {
    "one less": lambda ends: ends[:-1],
    "not from the start": lambda ends: np.concatenate([[1], ends[1:]]),
    "not to the end": lambda ends: np.concatenate([ends[:-1], [ends[-1] - 1]]),
    "backwards": lambda ends: ends[[0, 2, 1, 3]],
    "beyond": lambda ends: ends + (1 << 40) * np.array([0, 1, 1, 0]),
    "negative": lambda ends: ends * np.array([1, -1, 1, 1]),
    "around the end of int64": lambda ends: np.array([0, (1 << 63) - 1, -2, ends[-1]]),
    "floats": lambda ends: ends.astype(np.float64),
    "wrong axes": lambda ends: ends[:, None],
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_row_index_that_does_not_fit_is_refused(path: Path, what: str) -> None:
    write(path, pictures(3))
    forge(path, rows=3, index=INDEXES[what](NpzReader(path)[rowindex("images")].copy()))
    with pytest.raises(FormatError, match=r"images\.rowindex does not fit images"):
        NpzReader(path).rows("images")


def forge(path: Path, *, rows: int, index: NDArray[Any], runs: bytes | None = None, size: int = 3 * 8 * 10) -> None:
    """Writes a file that is right but for its row index, its runs, or what it says of its shape."""
    if runs is None:
        member = NpzReader(path).directory.members["images"]
        runs = path.read_bytes()[member.data_offset : member.end - 2]

    class Forged(NpzWriter):
        def add(self, name: str, array: NDArray[Any]) -> None:
            super().add(name, index if name == rowindex("images") else array)

    with Forged(path) as file:
        file.begin("images", np.dtype(np.float32), (size,) if size != 240 else (3, 8, 10), deflate_level=1)
        file._write(memoryview(runs), file._position)
        file._position += len(runs)
        file._row_ends.append(len(runs))
        file._rows = rows
        file.close("a comment")


def run_of(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)


def test_a_row_that_would_inflate_to_much_more_is_refused_with_little_memory(path: Path) -> None:
    bomb = run_of(bytes(200 << 20))
    forge(path, rows=1, index=np.array([0, len(bomb)]), runs=bomb)
    rows = inflating(path)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="row 0 is damaged"):
            rows[0]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("run", [b"", run_of(bytes(960))[:-4], run_of(bytes(959)), zlib.compress(bytes(960))[2:-4]])
def test_a_run_that_is_no_row_is_refused(path: Path, run: bytes) -> None:
    forge(path, rows=1, index=np.array([0, len(run)]), runs=run)
    with pytest.raises(FormatError, match="row 0 is damaged"):
        inflating(path)[0]


def test_a_run_that_ends_within_a_block_is_refused(path: Path) -> None:
    data = bytes(range(240)) * 4
    begun = struct.pack("<BHH", 0, 960, 960 ^ 0xFFFF) + data + b"\2\0\0\xff\xff"
    runs = begun + run_of(data)  # goes on with the block that has begun
    forge(path, rows=2, index=np.array([0, len(begun), len(runs)]), runs=runs)
    with pytest.raises(FormatError, match="row 0 is damaged"):
        inflating(path)[0]


def test_a_deflated_array_without_rows_to_speak_of_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def member(name: str, *values: Any) -> Member:
        found = Member(name, *values)
        return dataclasses.replace(found, shape=()) if name == "images" else found

    monkeypatch.setattr(writer, "Member", member)
    write(path, np.ones((1, 1), np.float32))
    with pytest.raises(FormatError, match=r"wrong shape \(\) of images\.npy"):
        NpzReader(path)


def test_an_array_that_cannot_be_in_so_few_bytes_is_refused(path: Path) -> None:
    run = run_of(bytes(960))
    forge(path, rows=40_000_000, index=np.array([0, len(run)]), runs=run)  # 38 GB, says the header
    with pytest.raises(FormatError, match=r"size of images\.npy: .* bytes cannot hold 38400000128"):
        NpzReader(path)


@pytest.mark.large
def test_more_than_4_gib_inflated_in_few_bytes(path: Path) -> None:
    row = np.zeros((1, 1 << 26), np.uint8)
    with NpzWriter(path) as file:
        file.begin("images", row.dtype, row.shape[1:], deflate_level=1)
        for number in range(65):
            row[0, -1] = number
            file.append(row)
        directory = file.close()
    assert directory.members["images"].npy_bytes > 2**32 > path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert NpzReader(path).directory == directory
    assert inflating(path)[64][-1] == 64


# A dataset


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures and a bad one."""
    root = tmp_path_factory.mktemp("images")
    for number in range(13):
        path = root / f"class-{number % 2}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file_bytes("half" if number == 5 else "jpeg", seed=number, size=(40, 50)))
    return root


build = functools.partial(build_cpu, shard_size=5, batch_size=2)


@pytest.mark.parametrize("settings", [{}, {"dtype": "uint8", "on_reject": "blank"}, {"layout": "NHWC"}], ids=str)
def test_a_compressed_dataset_has_the_rows_of_a_stored_one(src: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    build(src, tmp_path / "stored", **settings)
    build(src, tmp_path / "out", compress="deflate", **settings)
    stored, found = gpu_npz.open_dataset(tmp_path / "stored"), gpu_npz.open_dataset(tmp_path / "out")
    assert gpu_npz.verify(tmp_path / "out").ok
    assert found.manifest.requires == ("deflate",)
    assert found.manifest.environments[0]["isal"]
    for rows in (0, -1, slice(None), slice(3, 11), slice(1, 3), slice(4, 4), slice(None, None, 3), [7, 7, 2, -1], []):
        np.testing.assert_array_equal(found[rows], stored[rows])
        np.testing.assert_array_equal(found.normalized(rows), stored.normalized(rows))
        np.testing.assert_array_equal(found.column("paths", rows), stored.column("paths", rows))
    found[0][:] = 7  # a copy
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))[0], stored[0])
    for shard in range(3):
        with np.load(tmp_path / f"out/shard-{shard:05}.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["images"], stored.shard(shard)["images"])


def test_what_looks_at_a_dataset_reads_a_compressed_one(src: Path, tmp_path: Path) -> None:
    build(src, tmp_path / "stored")
    build(src, out := tmp_path / "out", compress="deflate")
    found = compare(out, 100, source=src)
    assert (found.rows, found.exact, found.problems) == (12, True, ())
    assert of_dataset(out).histograms == of_dataset(tmp_path / "stored").histograms
    preview(out, tmp_path / "sheet.png", count=4)
    preview(tmp_path / "stored", tmp_path / "other.png", count=4)
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_workers_and_runs_make_the_same_bytes(src: Path, tmp_path: Path) -> None:
    build(src, tmp_path / "a", compress="deflate:2")
    build(src, tmp_path / "b", compress="deflate:2", workers=2, open_shards=2, batch_size=3)
    for path in sorted((tmp_path / "a").glob("[!.]*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_another_level_or_none_does_not_resume(src: Path, tmp_path: Path) -> None:
    build(src, tmp_path / "out", compress="deflate")
    with pytest.raises(MismatchError, match="compress: existing deflate:1, requested deflate:2"):
        build(src, tmp_path / "out", compress="deflate:2")
    with pytest.raises(MismatchError, match="compress: existing deflate:1, requested none"):
        build(src, tmp_path / "out")


@pytest.mark.parametrize("value", ["gzip", "deflate:4", "deflate:", "deflate:-1"])
def test_what_is_no_compression_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="allowed: none, deflate, or deflate:LEVEL with a level of 0 to 3"):
        BuildConfig(compress=value)


def test_a_damaged_row_is_told_and_all_others_read(src: Path, tmp_path: Path) -> None:
    build(src, out := tmp_path / "out", compress="deflate")
    shard = out / "shard-00001.npz"
    member = NpzReader(shard).directory.members["images"]
    content = bytearray(shard.read_bytes())
    content[member.data_offset + 20] ^= 0xFF
    shard.write_bytes(content)
    (problem,) = gpu_npz.verify(out).problems
    assert problem.file == "shard-00001.npz"
    dataset = gpu_npz.open_dataset(out)
    assert len(dataset[[0, 1, 2, 3, 6, 7]]) == 6
    (out / "shard-00001.npz").write_bytes((out / "shard-00000.npz").read_bytes())
    with pytest.raises(FormatError, match="belongs here"):
        gpu_npz.open_dataset(out)[5]


def test_a_stored_shard_among_compressed_ones_is_refused(src: Path, tmp_path: Path) -> None:
    build(src, out := tmp_path / "out", compress="deflate")
    with np.load(out / "shard-00000.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "images.rowindex"}
    comment = NpzReader(out / "shard-00000.npz").directory.comment
    with NpzWriter(out / "shard-00000.npz") as again:
        for name, array in arrays.items():
            again.add(name, array)
        again.close(comment)
    with pytest.raises(FormatError, match="its images are stored, unlike the manifest's"):
        gpu_npz.open_dataset(out)[0]
    manifest = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({**manifest, "requires": []}))
    with pytest.raises(FormatError, match="contradicts the settings"):
        gpu_npz.verify(out)


def test_batches_in_one_process_are_inflated_by_a_thread_per_core(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("gpu_npz.readers.torch", exc_type=BackendError)
    out = build_cpu(src, tmp_path / "out", compress="deflate", size="12x16", dtype="uint8")
    dataset = torch.ShardDataset(out)
    expected = dataset.data.normalized(slice(None))
    all_at_once, inflate = threading.Barrier(2), DeflatedRows.inflated
    begun: set[int] = set()

    def inflated(self: DeflatedRows, row: int) -> bytes:
        if threading.get_ident() not in begun:
            begun.add(threading.get_ident())
            all_at_once.wait(60)  # fails if a single thread inflates all rows
        return inflate(self, row)

    monkeypatch.setattr(torch, "usable_cpus", lambda: 2)
    monkeypatch.setattr(DeflatedRows, "inflated", inflated)
    rows = list(range(len(dataset)))[::-1]
    found = np.stack([image.numpy() for image, _ in dataset.__getitems__(rows)])
    np.testing.assert_array_equal(found, expected[::-1])
    assert len(begun) == 2
