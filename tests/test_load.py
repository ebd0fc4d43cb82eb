"""gpu_npz.load: any NPZ or NPY as mapped arrays; hostile files are errors, never crashes, pickles or other data."""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_npz
from gpu_npz.errors import FormatError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "images": RANDOM.integers(0, 256, (20, 5, 7, 3), np.uint8),
    "labels": np.arange(20),
    "big": RANDOM.random((3, 4)).astype(">f4"),
    "fortran": np.asfortranarray(RANDOM.random((3, 4))),
    "texts": np.array(["a", "bc", "Zürich"]),
    "bytes": np.array([b"a", b"bc"]),
    "flags": np.array([True, False]),
    "scalar": np.float16(2.5),
    "empty": np.zeros((0, 3, 2)),
    "record": np.array([(1, 2.5), (3, 4.5)], [("a", "<i2"), ("b", "<f8")]),
    "unicode record": np.array([(1,)], [("ü中", "<i4")]),
    "when": np.array(["2020-01-01"], "M8[D]"),
}


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


# What NumPy wrote


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_is_the_one_that_numpy_wrote_and_read_only(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    arrays = gpu_npz.load(tmp_path / "a.npz")
    assert list(arrays) == list(ARRAYS)
    assert len(arrays) == len(ARRAYS)
    for name, array in ARRAYS.items():
        found = arrays[name]
        assert same(found, array), name
        assert found is arrays[name]
        assert not found.flags.writeable
        assert found.flags.aligned
        assert found.flags.f_contiguous == np.asarray(array).flags.f_contiguous
    assert "other" not in arrays
    with pytest.raises(KeyError):
        arrays["other"]
    copy = pickle.loads(pickle.dumps(arrays))
    assert same(copy["images"], ARRAYS["images"])
    assert "images uint8 (20, 5, 7, 3)" in repr(arrays)


@pytest.mark.parametrize("name", ["images", "big", "fortran", "scalar", "empty", "record", "unicode record"])
def test_an_npy_is_a_file_of_one_array_without_a_name(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[name])
    arrays = gpu_npz.load(str(tmp_path / "a.npy"))
    assert list(arrays) == ["arr_0"]
    assert same(arrays["arr_0"], ARRAYS[name])


def test_stored_arrays_are_mapped_and_those_that_are_not_aligned_are_copied_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, padding in (("aligned", 0), ("shifted", 1)):
            info = zipfile.ZipInfo(f"{name}.npy")
            start = archive.fp.tell() + 30 + len(info.filename) + 4  # type: ignore[union-attr]
            extra = -start % 64 + padding
            info.extra = struct.pack("<HH", 0xD935, extra) + bytes(extra)
            archive.writestr(info, npy(np.arange(100.0)))
    with caplog.at_level(logging.INFO, "gpu_npz"):
        arrays = gpu_npz.load(tmp_path / "a.npz")
        assert [info.unmappable is None for info in arrays.infos.values()] == [True, False]
        for array in arrays.values():
            assert same(array, np.arange(100.0))
    assert caplog.text.count("is copied") == 1
    assert "array 'shifted' is copied, since it is not aligned: at byte " in caplog.text
    file = bytearray((tmp_path / "a.npz").read_bytes())
    mapped = arrays["aligned"]
    place = arrays.infos["aligned"].data_offset
    file[place : place + 8] = struct.pack("<d", 7.0)
    with open(tmp_path / "a.npz", "r+b") as open_file:
        open_file.write(file)
    assert mapped[0] == 7.0  # a view of the file, not a copy


def test_objects_are_never_loaded_and_do_not_hide_other_arrays(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images=ARRAYS["images"], objects=np.array([{}], object))
        arrays = gpu_npz.load(tmp_path / "a.npz")
        assert same(arrays["images"], ARRAYS["images"])
        with pytest.raises(FormatError, match=r"a\.npz: array 'objects': it holds Python objects, which are a pickle"):
            arrays["objects"]
    np.save(tmp_path / "a.npy", np.array([{}], object))
    with pytest.raises(FormatError, match="never loaded"):
        gpu_npz.load(tmp_path / "a.npy")["arr_0"]
    structured = np.zeros(1, [("a", "<i4"), ("b", "O")])
    np.savez(tmp_path / "a.npz", a=structured)
    with pytest.raises(FormatError, match="never loaded"):
        gpu_npz.load(tmp_path / "a.npz")["a"]


def test_what_is_no_file_on_a_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="copy it first, and load the copy"):
        gpu_npz.load("s3://bucket/a.npz")
    with pytest.raises(FileNotFoundError):
        gpu_npz.load(tmp_path / "a.npz")
    with pytest.raises(OSError, match=r"."):
        gpu_npz.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"."):
        gpu_npz.load(tmp_path / "pipe")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(FormatError, match="the file is empty"):
        gpu_npz.load(tmp_path / "empty.npz")


def test_the_arrays_of_a_shard_are_those_that_a_build_wrote() -> None:
    golden = Path(__file__).parent / "golden"
    for path in sorted(golden.glob("*/*.npz")):
        arrays = gpu_npz.load(path)
        with np.load(path) as file:
            assert all(same(arrays[name], file[name]) for name in file.files)
        assert all(info.unmappable in (None, "deflated") for info in arrays.infos.values())


# Other writers


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Stream(io.RawIOBase):
    """A file that cannot seek, for which zipfile writes data descriptors."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_data_descriptors_zip64_comments_and_other_members_are_understood(tmp_path: Path, method: int) -> None:
    stream = Stream()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.comment = b"a comment"
        archive.writestr("notes.txt", "not an array")
        for name, array in ARRAYS.items():
            with archive.open(f"{name}.npy", "w", force_zip64=name == "images") as member:
                member.write(npy(array))
    (tmp_path / "a.npz").write_bytes(stream.data)
    arrays = gpu_npz.load(tmp_path / "a.npz")
    assert list(arrays) == list(ARRAYS)
    assert all(same(arrays[name], array) for name, array in ARRAYS.items())


def test_a_zip64_directory_is_understood(tmp_path: Path) -> None:
    data = one_array()
    end, count, length, offset = ends_of(data)
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
    end64 += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    short = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "a.npz"
    path.write_bytes(data[:end] + end64 + short)
    assert same(gpu_npz.load(path)["a"], np.arange(9))
    for damage in (
        end64.replace(struct.pack("<Q", offset), struct.pack("<Q", 1 << 60)),
        end64.replace(struct.pack("<Q", length), struct.pack("<Q", 1 << 60)),
        end64.replace(struct.pack("<4sLQ", b"PK\6\7", 0, end), struct.pack("<4sLQ", b"PK\6\7", 0, 1 << 62)),
        end64.replace(struct.pack("<QQ", count, count), struct.pack("<QQ", 1 << 62, 1 << 62)),
    ):
        assert damage != end64
        path.write_bytes(data[:end] + damage + short)
        with pytest.raises(FormatError):
            gpu_npz.load(path)
    path.write_bytes(data[:end] + end64 + short[:8] + struct.pack("<HH", 7, 7) + short[12:])
    with pytest.raises(FormatError, match="the two end records contradict each other"):
        gpu_npz.load(path)


# Hostile files


def one_array(method: int = zipfile.ZIP_STORED, content: bytes | None = None) -> bytes:
    """An NPZ of one array, `a`, written without a zip64 field."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.npy", npy(np.arange(9)) if content is None else content)
    return buffer.getvalue()


def ends_of(data: bytes) -> tuple[int, int, int, int]:
    """Where the end record is; the number of members, and size and offset of the directory in it."""
    end = data.rindex(b"PK\5\6")
    _, _, _, _, count, length, offset, _ = struct.unpack_from("<4sHHHHLLH", data, end)
    return end, count, length, offset


def patched(data: bytes, where: bytes, offset: int, value: bytes) -> bytes:
    """The data with other bytes at an offset from the last occurrence of a signature."""
    place = data.rindex(where) + offset
    return data[:place] + value + data[place + len(value) :]


def header(fields: str, version: bytes = b"\1\0") -> bytes:
    text = fields.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<L", len(text)) + text


def described(shape: str, descr: str = "'<i8'") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


STORED, DEFLATED = one_array(), one_array(zipfile.ZIP_DEFLATED)
CENTRAL, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
BAD_ZIPS = {
    "cut": STORED[:-1],
    "half": STORED[: len(STORED) // 2],
    "more": STORED + b"\0",
    "no directory": LOCAL,
    "just an end": END,
    "encrypted": patched(patched(STORED, CENTRAL, 8, b"\1\0"), LOCAL, 6, b"\1\0"),
    "encrypted in its local header": patched(STORED, LOCAL, 6, b"\1\0"),
    "strong encryption": patched(STORED, CENTRAL, 8, b"\x41\0"),
    "bzip2": one_array(zipfile.ZIP_BZIP2),
    "lzma": one_array(zipfile.ZIP_LZMA),
    "another method in its local header": patched(STORED, LOCAL, 8, b"\x08\0"),
    "another name in its local header": patched(STORED, LOCAL, 30, b"b"),
    "another size in its local header": patched(STORED, LOCAL, 22, b"\1\1\1\0"),
    "another CRC-32 in its local header": patched(STORED, LOCAL, 14, b"\1\1\1\1"),
    "a local header with a name beyond the file": patched(STORED, LOCAL, 26, b"\xff\xff"),
    "a local header with a field beyond the file": patched(STORED, LOCAL, 28, b"\xff\xff"),
    "no local header": patched(STORED, LOCAL, 0, b"PKxx"),
    "size beyond the file": patched(STORED, CENTRAL, 20, struct.pack("<LL", 1 << 30, 1 << 30)),
    "a bomb": patched(DEFLATED, CENTRAL, 24, struct.pack("<L", 0xFFFFFFF0)),
    "stored, of two sizes": patched(STORED, CENTRAL, 24, struct.pack("<L", 10)),
    "offset beyond the file": patched(STORED, CENTRAL, 42, struct.pack("<L", 1 << 30)),
    "zip64 without a field": patched(STORED, CENTRAL, 20, b"\xff" * 8),
    "another disk": patched(STORED, END, 4, b"\1\0\1\0"),
    "more members than entries": patched(STORED, END, 8, b"\2\0\2\0"),
    "fewer members than entries": patched(STORED, END, 8, b"\0\0\0\0"),
    "a long directory": patched(STORED, END, 12, b"\xff\xff\xff\x00"),
    "a directory elsewhere": patched(STORED, END, 16, b"\1\0\0\0"),
    "an entry that is none": patched(STORED, CENTRAL, 0, b"PKxx"),
    "an entry with a name beyond the directory": patched(STORED, CENTRAL, 28, b"\xff\xff"),
    "a name with a zero byte": STORED.replace(b"a.npy", b"\0.npy"),
    "a name that is no text": patched(STORED, CENTRAL, 8, b"\0\x08").replace(b"a.npy", b"\xff.npy"),
    "deflated data cut": patched(DEFLATED, CENTRAL, 20, struct.pack("<L", 20)),
    "no deflated data": patched(DEFLATED, b"a.npy", 5, b"").replace(DEFLATED[35:50], b"\xff" * 15),
}


@pytest.mark.parametrize("what", BAD_ZIPS)
def test_a_hostile_npz_is_a_format_error(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(BAD_ZIPS[what])
    with pytest.raises(FormatError) as caught:
        gpu_npz.load(path)["a"]
    assert str(caught.value).startswith(f"{path}: ")


HUGE = str(1 << 62)
BAD_NPYS = {
    "cut": described("(9,)") + bytes(71),
    "negative and empty": described("(0, -9)"),
    "huge": described(f"({HUGE}, {HUGE})"),
    "huge and empty": described(f"(0, {HUGE}, {HUGE})"),
    "negative": described("(-9,)") + bytes(72),
    "twice negative": described("(-3, -3)") + bytes(72),
    "a bool": described("(True,)") + bytes(72),
    "a list": described("[9]") + bytes(72),
    "a float": described("(9.0,)") + bytes(72),
    "no shape": header("{'descr': '<i8', 'fortran_order': False}") + bytes(72),
    "more keys": header("{'descr': '<i8', 'fortran_order': False, 'shape': (9,), 'x': 1}") + bytes(72),
    "order 1": header("{'descr': '<i8', 'fortran_order': 1, 'shape': (9,)}") + bytes(72),
    "no type": described("(9,)", "'nonsense'") + bytes(72),
    "no size": described("(9,)", "'<U0'") + bytes(72),
    "a subarray": described("(9,)", "('<i4', (2,))") + bytes(72),
    "a program": described("__import__('os').abort()") + bytes(72),
    "unclosed": b"\x93NUMPY\1\0\x05\0{'a':",
    "nested": header("(" * 9000) + bytes(72),
    "a header beyond the file": b"\x93NUMPY\2\0\xff\xff\xff\xff{}",
    "a header of 60 kB": header(" " * 60_000 + "{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}") + bytes(8),
    "version 9": header("{'descr': '<i8', 'fortran_order': False, 'shape': (9,)}", b"\x09\0") + bytes(72),
    "text": b"This is no array.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", BAD_NPYS)
@pytest.mark.parametrize("form", ["npy", "stored", "deflated"])
def test_a_hostile_npy_is_a_format_error(tmp_path: Path, what: str, form: str) -> None:
    path, name = tmp_path / "a.npz", "arr_0" if form == "npy" else "a"
    methods = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    path.write_bytes(BAD_NPYS[what] if form == "npy" else one_array(methods[form], BAD_NPYS[what]))
    with pytest.raises(FormatError):
        gpu_npz.load(path)[name]


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
def test_every_version_of_the_header_and_shapes_of_python_2_are_read(tmp_path: Path, version: bytes) -> None:
    shape = "(9L,)" if version < b"\3\0" else "(9,)"
    fields = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}"
    (tmp_path / "a.npy").write_bytes(header(fields, version) + np.arange(9).tobytes())
    assert same(gpu_npz.load(tmp_path / "a.npy")["arr_0"], np.arange(9))


def test_two_arrays_of_one_name_and_arrays_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.arange(9)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(np.arange(9)[::-1]))
    with pytest.raises(FormatError, match="the file has two arrays of this name"):
        gpu_npz.load(path)
    end, _, length, offset = ends_of(STORED)
    entry = STORED[offset:end]
    for name in (b"b.npy", b"b.txt"):
        both = entry + entry.replace(b"a.npy", name)
        record = struct.pack("<4sHHHHLLH", END, 0, 0, 2, 2, 2 * length, offset, 0)
        path.write_bytes(STORED[:offset] + both + record)
        with pytest.raises(FormatError, match="reach over byte"):
            gpu_npz.load(path)


def test_what_is_inflated_or_copied_is_checked_by_its_crc(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = one_array(method)
        crc = zlib.crc32(npy(np.arange(9)))
        path.write_bytes(data.replace(struct.pack("<L", crc), struct.pack("<L", crc ^ 1)))
        arrays = gpu_npz.load(path)
        assert arrays.infos["a"].unmappable is not None
        with pytest.raises(FormatError, match=r"a\.npz: array 'a': .*CRC-32"):
            arrays["a"]


def test_a_claim_of_more_than_the_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(DEFLATED)
    arrays = gpu_npz.load(path)

    def none(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np, "empty", none)
    with pytest.raises(FormatError, match="it needs 200 bytes of memory"):
        arrays["a"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_gives_an_error_or_the_same_arrays(tmp_path: Path, save: Callable[..., None]) -> None:
    small = {name: ARRAYS[name] for name in ("labels", "texts", "fortran")}
    save(tmp_path / "a.npz", **small)
    assert all(info.unmappable for info in gpu_npz.load(tmp_path / "a.npz").infos.values())  # so the CRC-32 is checked
    whole = (tmp_path / "a.npz").read_bytes()
    path, refused = tmp_path / "b.npz", 0
    for attempt in range(1500):
        data = bytearray(whole)
        place = int(RANDOM.integers(len(data)))
        data[place] = int(RANDOM.integers(256)) if attempt % 3 else data[place] ^ 1 << int(RANDOM.integers(8))
        path.write_bytes(data[:place] if attempt % 10 == 0 else data)
        try:
            arrays = gpu_npz.load(path)
            found = {name: arrays[name] for name in arrays}
        except FormatError:
            refused += 1
            continue
        # A name that differs in one letter is not damage that anything could find, if both headers have it.
        assert all(same(found[name], small[name]) for name in found if name in small), place
    assert refused > 500


def test_what_is_no_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file") as caught:
        gpu_npz.load(tmp_path)
    assert caught.value.filename == str(tmp_path)
