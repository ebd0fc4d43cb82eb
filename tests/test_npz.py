"""The shard file: everybody can read what NpzWriter writes, and NpzReader takes nothing else."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arrays_of

from gpu_npz.errors import FormatError
from gpu_npz.npz.format import (
    ALIGNMENT,
    NPY_HEADER_BYTES,
    Directory,
    Member,
    data_offset,
    directory_bytes,
    member_header,
)
from gpu_npz.npz.reader import NpzReader
from gpu_npz.npz.writer import NpzWriter

Arrays = Mapping[str, NDArray[Any]]

needs_unzip = pytest.mark.skipif(shutil.which("unzip") is None, reason="there is no unzip here")


def sample(rows: int) -> dict[str, NDArray[Any]]:
    """One array of every kind that this format holds."""
    generator = np.random.default_rng(rows)
    names = ["a/b.jpg", "\u65e5\u672c/\u00e9.png", "\udcff\udc80.jpg", "", "x" * 40]
    return {
        "images": generator.normal(size=(rows, 3, 4, 5)).astype(np.float32),
        "half": generator.normal(size=(rows, 4, 5, 1)).astype(np.float16),
        "pixels": generator.integers(0, 256, (rows, 7), np.uint8),
        "labels": generator.integers(-9, 9, rows),
        "targets": generator.normal(size=(rows, 3)),
        "columns": generator.integers(-(2**62), 2**62, (rows, 2)),
        "valid": generator.integers(0, 2, rows).astype(bool),
        "paths": np.array([names[row % len(names)] for row in range(rows)], None if rows else "<U1"),
    }


def write(path: Path, arrays: Arrays, comment: str = "a comment") -> Directory:
    with NpzWriter(path) as file:
        for name, array in arrays.items():
            file.add(name, array)
        return file.close(comment)


def assert_same(found: Mapping[str, Any], expected: Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def read(path: Path) -> dict[str, NDArray[Any]]:
    reader = NpzReader(path)
    return {name: reader[name] for name in reader.directory.members}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.npz"


# What the writer writes


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numpy_zipfile_and_our_reader_find_every_array_whole(path: Path, rows: int) -> None:
    arrays = sample(rows)
    directory = write(path, arrays)
    assert_same(arrays_of(path), arrays)
    assert_same(read(path), arrays)
    assert NpzReader(path).directory == directory
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.comment == b"a comment"
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}


@needs_unzip
@pytest.mark.parametrize("rows", [0, 5])
def test_unzip_finds_no_fault(path: Path, rows: int) -> None:
    write(path, sample(rows))
    result = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No errors detected" in result.stdout


def test_it_reads_as_what_numpy_writes_itself(tmp_path: Path) -> None:
    arrays = sample(4)
    write(tmp_path / "ours.npz", arrays)
    np.savez(tmp_path / "theirs.npz", **arrays)  # type: ignore[arg-type]
    assert_same(arrays_of(tmp_path / "ours.npz"), arrays_of(tmp_path / "theirs.npz"))


def test_the_data_of_every_array_lies_at_a_multiple_of_4096(path: Path) -> None:
    # Names of every length around the point where the padding field would not fit in the gap.
    arrays = {"n" * length: np.arange(length, dtype=np.uint8) for length in range(1, 80)} | sample(3)
    write(path, arrays)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    for entry, array in zip(entries, arrays.values(), strict=True):
        name_bytes, field_bytes = struct.unpack_from("<HH", content, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_bytes + field_bytes + NPY_HEADER_BYTES
        assert start % ALIGNMENT == 0, entry.filename
        assert content[start : start + array.nbytes] == array.tobytes(), entry.filename


@pytest.mark.parametrize("bare_end", range(4096 - 12, 4096 + 3))
def test_padding_fits_wherever_a_header_happens_to_end(path: Path, bare_end: int) -> None:
    # The second local header, its name and its NPY header take 30 + 5 + 20 + 128 bytes.
    first = np.zeros((bare_end - 183) % 4096, np.uint8)
    write(path, {"a": first, "b": np.arange(9)})
    assert NpzReader(path).directory.members["b"].data_offset % 4096 == 0
    assert_same(arrays_of(path), {"a": first, "b": np.arange(9)})


def test_every_npy_header_has_128_bytes_and_is_what_numpy_reads(path: Path) -> None:
    arrays = sample(123)
    write(path, arrays)
    with zipfile.ZipFile(path) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy") as member:
                assert np.lib.format.read_magic(member) == (1, 0)
                assert np.lib.format.read_array_header_1_0(member) == (array.shape, False, array.dtype)
                assert member.tell() == NPY_HEADER_BYTES
                assert NPY_HEADER_BYTES + array.nbytes == file.getinfo(f"{name}.npy").file_size


def test_rows_written_one_by_one_make_the_same_bytes_as_all_at_once(tmp_path: Path) -> None:
    arrays = sample(11)
    write(tmp_path / "at-once.npz", arrays)
    with NpzWriter(tmp_path / "streamed.npz") as file:
        for name, array in arrays.items():
            file.begin(name, array.dtype, array.shape[1:])
            file.append(array[:0])
            for row in range(4):
                file.append(array[row : row + 1])
            file.append(array[4:])
        file.close("a comment")
    assert (tmp_path / "streamed.npz").read_bytes() == (tmp_path / "at-once.npz").read_bytes()


def test_an_array_that_is_written_in_many_pieces_is_whole(path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (9, 1 << 20), np.uint8)  # pieces have 4 MiB
    write(path, {"images": rows, "labels": np.arange(9)})
    assert NpzReader(path).crc_matches("images")
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    np.testing.assert_array_equal(NpzReader(path)["images"], rows)


def test_equal_arrays_make_equal_bytes_and_no_time_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", sample(3))
    os.utime(tmp_path / "a.npz", (0, 0))
    write(tmp_path / "b.npz", sample(3))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_an_older_longer_file_leaves_nothing_behind(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"\xff" * 100_000)
    write(path, sample(2))
    write(tmp_path / "new.npz", sample(2))
    assert path.read_bytes() == (tmp_path / "new.npz").read_bytes()


def test_rows_in_any_order_of_axes_or_bytes_are_stored_plain(path: Path) -> None:
    plain = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    swapped = plain.astype(">f4")
    write(path, {"transposed": np.ascontiguousarray(plain.T).T, "swapped": swapped, "sparse": np.repeat(plain, 2)[::2]})
    assert_same(arrays_of(path), {"transposed": plain, "swapped": plain, "sparse": plain.reshape(-1)})


def test_a_file_without_arrays_is_a_file(path: Path) -> None:
    write(path, {})
    assert arrays_of(path) == {}
    assert NpzReader(path).directory.members == {}
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_the_digest_changes_with_every_array_and_with_the_comment(tmp_path: Path) -> None:
    digests = {write(tmp_path / "a.npz", sample(3)).digest, write(tmp_path / "b.npz", sample(3), "another").digest}
    for name, array in sample(3).items():
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[0] ^= 1
        digests.add(write(tmp_path / f"{name}.npz", {**sample(3), name: changed}).digest)
    assert len(digests) == 2 + len(sample(3))


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (np.zeros((2, 3), np.float64), "float64"),
        (np.zeros((2, 3), np.int32), "int32"),
        (np.zeros((2, 4), np.float32), "(2, 4)"),
        (np.zeros(3, np.float32), "(3,)"),
        (np.zeros((2, 3, 1), np.float32), "(2, 3, 1)"),
        (np.float32(0).reshape(()), "()"),
    ],
)
def test_rows_of_another_type_or_shape_are_refused(path: Path, rows: NDArray[Any], fault: str) -> None:
    with NpzWriter(path) as file:
        file.begin("images", np.dtype("float32"), (3,))
        with pytest.raises(ValueError, match=r"images: got .*; this member has rows of float32 \(3,\)") as caught:
            file.append(rows)
        file.append(np.ones((1, 3), np.float32))
        file.close()
    assert fault in str(caught.value)
    assert_same(arrays_of(path), {"images": np.ones((1, 3), np.float32)})


@pytest.mark.parametrize("dtype", ["O", "M8[s]", "c8", "S3", "f4,i4", "V4", "U0"])
def test_types_that_the_reader_would_refuse_are_not_written(path: Path, dtype: str) -> None:
    with NpzWriter(path) as file, pytest.raises(ValueError, match=r"odd: .*stored are numbers, bools and text"):
        file.begin("odd", np.dtype(dtype), ())


def test_a_name_is_written_once(path: Path) -> None:
    with NpzWriter(path) as file:
        file.add("a", np.arange(3))
        with pytest.raises(ValueError, match="a: a second one"):
            file.add("a", np.arange(3))


def test_what_was_never_closed_is_no_file(path: Path) -> None:
    with NpzWriter(path) as file:
        file.add("images", np.zeros((3, 4096), np.uint8))
        file.add("labels", np.arange(3))
    with pytest.raises(FormatError, match="no end record"):
        NpzReader(path)


def test_sizes_and_offsets_beyond_4_gib_are_in_the_directory(path: Path) -> None:
    kind, size = np.dtype(np.uint8), 5 << 30
    images = Member("images", 0, 4096, kind, (size,), 1)
    labels = Member("labels", 4096 + size, data_offset(4096 + size, "labels"), kind, (9,), 2)
    offset = labels.data_offset + 9
    with path.open("wb") as file:  # a hole in place of the data takes no room on the disk
        for member in (images, labels):
            file.seek(member.header_offset)
            file.write(member_header(member))
        file.seek(offset)
        file.write(directory_bytes([images, labels], offset, ""))
    assert NpzReader(path).directory.members == {"images": images, "labels": labels}
    assert NpzReader(path)["images"][-1] == 0
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    assert [entry.file_size for entry in entries] == [size + NPY_HEADER_BYTES, 9 + NPY_HEADER_BYTES]
    assert [entry.header_offset for entry in entries] == [0, labels.header_offset]


@pytest.mark.large
def test_arrays_and_offsets_beyond_4_gib_are_read_by_everybody(path: Path) -> None:
    if shutil.disk_usage(path.parent).free < 10e9:
        pytest.skip("NOT TESTED: less than 10 GB free in the temporary folder")
    block = np.random.default_rng(0).integers(0, 256, (64, 1024, 1024), np.uint8)
    labels, blocks = np.arange(65 * 64), 65
    try:
        with NpzWriter(path) as file:
            file.begin("images", block.dtype, block.shape[1:])
            for number in range(blocks):
                block[:, 0, 0] = number
                file.append(block)
            file.add("labels", labels)
            directory = file.close("large")
        assert directory.members["images"].npy_bytes > 2**32
        assert directory.members["labels"].header_offset > 2**32
        with np.load(path, allow_pickle=False) as loaded_lazily:
            np.testing.assert_array_equal(loaded_lazily["labels"], labels)
        reader = NpzReader(path)
        assert reader.directory == directory
        np.testing.assert_array_equal(reader["labels"], labels)
        np.testing.assert_array_equal(reader["images"][-1, 1:], block[-1, 1:])
        np.testing.assert_array_equal(reader["images"][::64, 0, 0], range(blocks))
        assert reader.crc_matches("labels")
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        if shutil.which("unzip") is not None:
            result = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
    finally:
        path.unlink(missing_ok=True)


# What the reader gives


def test_arrays_are_views_of_the_map(path: Path) -> None:
    write(path, sample(5))
    reader = NpzReader(path)
    for name in sample(5):
        assert np.shares_memory(reader[name], reader[name])
        assert not reader[name].flags.owndata


def test_views_can_be_written_to_without_changing_the_file(path: Path) -> None:
    write(path, sample(5))
    content = path.read_bytes()
    reader = NpzReader(path)
    reader["images"][:] = 7
    assert (reader["images"] == 7).all()
    assert_same(read(path), sample(5))
    del reader
    gc.collect()
    assert path.read_bytes() == content


def test_views_outlive_the_reader_and_the_name_of_the_file(path: Path) -> None:
    write(path, sample(5))
    images, paths = (NpzReader(path)[name] for name in ("images", "paths"))
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(images, sample(5)["images"])
    np.testing.assert_array_equal(paths, sample(5)["paths"])


def test_an_array_that_is_not_there_is_an_error_that_names_those_that_are(path: Path) -> None:
    write(path, {"images": np.zeros(3), "labels": np.arange(3)})
    reader = NpzReader(path)
    assert "labels" in reader
    assert "valid" not in reader
    assert reader.get("valid") is None
    with pytest.raises(FormatError, match=r"file\.npz: no array 'valid'; it holds images, labels"):
        reader["valid"]


def test_a_file_that_cannot_be_opened_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NpzReader(tmp_path / "missing.npz")


# What the reader refuses


def small(path: Path) -> Directory:
    return write(path, {name: sample(2)[name] for name in ("images", "labels", "paths")})


def headers(directory: Directory) -> list[int]:
    """Where everything lies that is not an array's data."""
    members = directory.members.values()
    before = [position for member in members for position in range(member.header_offset, member.data_offset)]
    return [*before, *range(directory.offset, directory.file_bytes)]


def notices(path: Path, expected: Directory) -> bool:
    """Whether reading the whole file shows that something is wrong with it; anything but FormatError is raised."""
    try:
        reader = NpzReader(path)
    except FormatError:
        return True
    for name in reader.directory.members:
        reader[name].copy()
    matching = [reader.crc_matches(name) for name in reader.directory.members]
    return not all(matching) or reader.directory.digest != expected.digest


@pytest.fixture
def patch(path: Path) -> Iterator[Callable[[int, bytes], None]]:
    """`patch(position, content)` overwrites a part of `path`."""
    path.touch()
    descriptor = os.open(path, os.O_WRONLY)
    yield lambda position, content: (os.pwrite(descriptor, content, position), None)[1]
    os.close(descriptor)


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    directory = small(path)
    with path.open("r+b") as file:
        for length in reversed(range(directory.file_bytes)):
            file.truncate(length)
            with pytest.raises(FormatError, match=r"file\.npz: "):
                NpzReader(path)


def test_a_changed_byte_in_any_header_or_in_the_directory_is_noticed(
    path: Path, patch: Callable[[int, bytes], None]
) -> None:
    directory = small(path)
    content, seeded = path.read_bytes(), random.Random(0)
    unnoticed = []
    for position in headers(directory):
        byte = content[position]
        masks = [1 << bit for bit in range(8)] if byte else [seeded.randrange(1, 256)]  # most zeros are padding
        for mask in masks:
            patch(position, bytes([byte ^ mask]))
            if not notices(path, directory):
                unnoticed.append((position, mask))
        patch(position, bytes([byte]))
    assert unnoticed == []
    assert not notices(path, directory)


def test_a_changed_byte_in_an_array_is_noticed_by_its_crc_alone(
    path: Path, patch: Callable[[int, bytes], None]
) -> None:
    directory = small(path)
    content, seeded = path.read_bytes(), random.Random(0)
    for name, member in directory.members.items():
        for position in {member.data_offset, member.data_offset + member.data_bytes - 1} | {
            seeded.randrange(member.data_offset, member.data_offset + member.data_bytes) for _ in range(20)
        }:
            patch(position, bytes([content[position] ^ seeded.randrange(1, 256)]))
            reader = NpzReader(path)
            assert [other for other in directory.members if not reader.crc_matches(other)] == [name]
            patch(position, content[position : position + 1])


def test_random_damage_is_always_noticed_and_never_crashes(path: Path, patch: Callable[[int, bytes], None]) -> None:
    directory = small(path)
    content, seeded = path.read_bytes(), random.Random(0)
    places = [position for position in headers(directory) if content[position]]
    extremes = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"PK\5\6", b"\xff\xff\xff\x7f", b"(((((", b"9999", b"'")
    for _ in range(3000):
        changed = bytearray(content)
        for _ in range(seeded.randrange(1, 5)):
            position = seeded.choice(places)
            new = seeded.choice([*extremes, seeded.randbytes(seeded.randrange(1, 9))])[: len(content) - position]
            changed[position : position + len(new)] = new
        patch(0, changed)
        assert bytes(changed) == content or notices(path, directory)


@pytest.mark.parametrize("position", [4, 6, 12, 14, 38])
def test_a_directory_that_says_more_than_the_writer_ever_does_is_refused(path: Path, position: int) -> None:
    directory = small(path)
    content = bytearray(path.read_bytes())
    content[directory.offset + position] ^= 1  # version, time, date, rights: no array depends on them
    path.write_bytes(content)
    with pytest.raises(FormatError, match="wrong directory"):
        NpzReader(path)


@pytest.mark.parametrize("size", [1, 21, 22, 4096, 100_000])
def test_a_file_of_zeros_is_refused(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(FormatError, match="no end record"):
        NpzReader(path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the file is empty"),
        (b"This is a text, whatever its name says.\n" * 200, "no end record"),
        (b"PK\5\6" + bytes(18), None),  # the shortest ZIP, whose comment is not that of any shard
        (b"PK\5\6" + b"\xff" * 18, "missing or left over"),
        (b"PK\5\6" + b"\xff" * 16 + b"\0\0", "not a shard of this format"),
        (b"\x93NUMPY\1\0" + bytes(500), "no end record"),
    ],
)
def test_what_is_no_npz_is_refused(path: Path, content: bytes, fault: str | None) -> None:
    path.write_bytes(content)
    if fault is None:
        assert NpzReader(path).directory.members == {}
        return
    with pytest.raises(FormatError, match=fault):
        NpzReader(path)


@pytest.mark.parametrize(
    ("save", "fault"),
    [
        (np.savez, "wrong place of the data of images.npy"),
        (np.savez_compressed, "wrong size of images.npy"),
    ],
)
def test_what_numpy_wrote_is_refused_since_its_arrays_are_not_aligned(
    path: Path, save: Callable[..., None], fault: str
) -> None:
    save(path, images=np.zeros((3, 4), np.float32), labels=np.arange(3))
    with pytest.raises(FormatError, match=f"{fault}.*; not a shard of this format, or damaged"):
        NpzReader(path)


# Files that are sound but for one lie


def forged(path: Path, npy_header: bytes, data: bytes = bytes(64)) -> None:
    """A file with one array whose NPY header is given, and whose every size, offset and CRC-32 is right."""
    directory = write(path, {"images": np.frombuffer(data, np.uint8)}, "")
    content, member = bytearray(path.read_bytes()), directory.members["images"]
    content[member.data_offset - NPY_HEADER_BYTES : member.data_offset] = npy_header
    crc = zlib.crc32(content[member.data_offset - NPY_HEADER_BYTES : member.data_offset + len(data)])
    struct.pack_into("<L", content, 14, crc)
    struct.pack_into("<L", content, directory.offset + 16, crc)
    path.write_bytes(content)


def npy_header(descr: str, shape: str, order: str = "False", version: bytes = b"\1\0") -> bytes:
    fields = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return b"\x93NUMPY" + version + struct.pack("<H", 118) + fields.ljust(117).encode("ascii") + b"\n"


def assert_refused_in_little_memory(path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"file\.npz: "):
            NpzReader(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_forged_header_that_tells_the_truth_is_read(path: Path) -> None:
    forged(path, npy_header("'<f4'", "(4, 4)"))
    np.testing.assert_array_equal(NpzReader(path)["images"], np.zeros((4, 4), np.float32))
    assert NpzReader(path).crc_matches("images")
    assert arrays_of(path)["images"].shape == (4, 4)


@pytest.mark.parametrize(
    "header",
    [
        npy_header("'<f4'", "(10000000000,)"),  # 40 GB
        npy_header("'<f4'", "(4611686018427387920,)"),  # 64 bytes, counted in 64 bits
        npy_header("'<f4'", "(-4, -4)"),
        npy_header("'<f4'", "(4, 4.0)"),
        npy_header("'<f4'", "(4 4)"),
        npy_header("'<f4'", "(4, 4,)"),
        npy_header("'<f4'", "(04, 4)"),
        npy_header("'<f4'", "((((((((((((((((((((((((((((((((((((((((((((((((("),
        npy_header("'<f4'", "(16,", "__import__('os').getpid()"),
        npy_header("'<f4'", "(16L,)"),
        npy_header("'<f4'", "(16,)", "True"),
        npy_header("'<f4'", "(16,)", version=b"\2\0"),
        npy_header("'>f4'", "(16,)"),
        npy_header("'f4'", "(16,)"),
        npy_header("'<f3'", "(16,)"),
        npy_header("'|O'", "(8,)"),
        npy_header("'|O8'", "(8,)"),
        npy_header("'<M8[s]'", "(8,)"),
        npy_header("[('a', '<f4'), ('b', '|O')]", "(8,)"),
        b"\x93NUMPY\1\0" + struct.pack("<H", 118) + b"\xff" * 118,
        bytes(128),
    ],
)
def test_an_npy_header_that_does_not_fit_its_data_is_refused(path: Path, header: bytes) -> None:
    forged(path, header)
    assert_refused_in_little_memory(path)


def test_a_shape_that_the_file_is_too_small_for_is_named(path: Path) -> None:
    forged(path, npy_header("'<f4'", "(10000000000,)"))
    with pytest.raises(FormatError, match=r"wrong shape \(10000000000,\) of images\.npy, which has 192 bytes"):
        NpzReader(path)


@pytest.mark.parametrize(
    "header",
    [
        npy_header("'<U0'", "(1000000000000,)"),  # no bytes, until NumPy makes them one character each
        npy_header("'<f4'", "(0, 1000000000000000000000000000000)"),
        npy_header("'<f4'", "(4611686018427387904, 0, 4611686018427387904)"),
        npy_header("'<U999999999'", "(0,)"),
    ],
)
def test_an_empty_array_may_not_have_sides_that_numpy_cannot_count(path: Path, header: bytes) -> None:
    forged(path, header, b"")
    assert_refused_in_little_memory(path)


class _Trap:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.marker,)


def test_a_pickle_is_never_run(tmp_path: Path, path: Path) -> None:
    marker = tmp_path / "the-pickle-ran"
    data = pickle.dumps(np.array([_Trap(str(marker))], object))
    forged(path, npy_header("'|O'", "(1,)"), data)
    with pytest.raises(FormatError, match=r"wrong NPY header of images\.npy"):
        NpzReader(path)
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as file:
        file["images"]
    assert marker.exists(), "the pickle was none, so this test would prove nothing"


def rewritten(path: Path, directory: Directory, members: Sequence[Member]) -> None:
    """The file with another directory over the same arrays."""
    path.write_bytes(path.read_bytes()[: directory.offset] + directory_bytes(members, directory.offset, ""))


def test_a_name_that_stands_twice_in_the_directory_is_refused(path: Path) -> None:
    directory = small(path)
    images, labels, _ = directory.members.values()
    rewritten(path, directory, [images, labels, labels])
    with pytest.raises(FormatError, match=r"wrong second labels\.npy"):
        NpzReader(path)


def test_a_name_that_others_take_for_another_one_is_refused(path: Path) -> None:
    with NpzWriter(path) as file:
        file.add("labels", np.arange(3))
        file.add("labels.npy\0", np.arange(3) + 100)  # to zipfile, a second labels.npy
        file.close()
    with pytest.raises(FormatError, match="wrong directory entry"):
        NpzReader(path)


def test_arrays_that_the_directory_leaves_out_or_reorders_are_noticed(path: Path) -> None:
    directory = small(path)
    images, labels, paths = directory.members.values()
    content = path.read_bytes()
    for members in ([labels, paths], [images, paths], [images, labels], [labels, images, paths], []):
        path.write_bytes(content)
        rewritten(path, directory, members)
        with pytest.raises(FormatError, match="wrong place of"):
            NpzReader(path)


def test_arrays_that_overlap_are_refused(path: Path) -> None:
    inner_data = np.arange(8, dtype=np.uint8)
    inner = Member("inner", 4096, data_offset(4096, "inner"), inner_data.dtype, inner_data.shape, 0)
    crc = zlib.crc32(member_header(inner)[-NPY_HEADER_BYTES:] + inner_data.tobytes())
    inner = Member(inner.name, inner.header_offset, inner.data_offset, inner.dtype, inner.shape, crc)
    whole = np.frombuffer(member_header(inner) + inner_data.tobytes(), np.uint8)
    directory = write(path, {"outer": whole})
    outer = directory.members["outer"]
    assert outer.data_offset == inner.header_offset, "the inner array does not lie where its directory entry says"
    rewritten(path, directory, [outer, inner])
    with pytest.raises(FormatError, match=r"wrong place of inner\.npy .*overlap"):
        NpzReader(path)


def test_bytes_before_between_and_behind_the_arrays_are_refused(path: Path) -> None:
    directory = small(path)
    content = path.read_bytes()
    arrays, records = content[: directory.offset], content[directory.offset :]
    shifted = directory_bytes(list(directory.members.values()), directory.offset + 10, "a comment")
    for damaged in (b"#!/bin/sh\n" + content, content + b"\0", arrays + bytes(10) + shifted, arrays + b"\0" + records):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            NpzReader(path)


def test_a_directory_of_65535_entries_is_refused_without_reading_them(path: Path) -> None:
    directory = write(path, {"images": np.arange(3)}, "")
    content = path.read_bytes()
    entry = directory_bytes(list(directory.members.values()), directory.offset, "")[:-22]
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 65535, 65535, 65535 * len(entry), directory.offset, 0)
    path.write_bytes(content[: directory.offset] + entry * 65535 + end)
    assert_refused_in_little_memory(path)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 65535, 65535, len(entry), directory.offset, 0)
    path.write_bytes(content[: directory.offset] + entry + end)
    assert_refused_in_little_memory(path)


@pytest.mark.parametrize("position", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, -1])
def test_zip64_records_that_point_anywhere_are_refused(path: Path, position: int) -> None:
    directory = write(path, {"images": np.arange(3)}, "")
    arrays = path.read_bytes()[: directory.offset]
    entry = directory_bytes(list(directory.members.values()), directory.offset, "")[:-22]
    position = len(arrays) + len(entry) if position < 0 else position
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), position)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, position, 1)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0xFFFFFFFF, 0)
    path.write_bytes(arrays + entry + end64 + locator + end)
    assert_refused_in_little_memory(path)


# The page cache


@pytest.mark.skipif(sys.platform != "linux", reason="a flag of Linux")
@pytest.mark.parametrize("fault", [None, errno.EOPNOTSUPP, errno.EINVAL, NotImplementedError])
def test_dropping_the_page_cache_changes_no_byte_and_is_only_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    flags, rows = [], np.random.default_rng(0).integers(0, 256, (9, 300, 400), np.uint8)

    def pwritev(descriptor: int, pieces: list[memoryview], position: int, flag: int) -> int:
        flags.append(flag)
        if fault is not None:
            raise fault if fault is NotImplementedError else OSError(fault, os.strerror(fault))
        return os.pwrite(descriptor, pieces[0][: max(1, len(pieces[0]) // 2)], position)  # a short count

    monkeypatch.setattr(os, "pwritev", pwritev)
    for name, drop in (("kept", False), ("dropped", True)):
        with NpzWriter(tmp_path / name, drop_cache=drop) as file:
            file.add("images", rows)
            file.close()
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "dropped").read_bytes()
    assert set(flags) == {0x80}
    assert (len(flags) == 1) == (fault is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="a flag of Linux")
def test_an_error_of_the_disk_is_not_taken_for_a_missing_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwritev(*values: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", pwritev)
    with NpzWriter(tmp_path / "full", drop_cache=True) as file, pytest.raises(OSError, match="No space left"):
        file.add("images", np.zeros(3, np.uint8))
