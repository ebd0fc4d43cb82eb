"""CIFAR's files are pickles: genuine ones read, and nothing that a hostile one asks for happens."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_npz.errors import SourceError
from gpu_npz.sources.arrays.cifar import read_cifar

NAMES = [b"airplane", b"automobile", b"bird"]
# batches.meta is of protocol 0, as Python 2 wrote it.
META = (
    b"(dp1\nS'num_cases_per_batch'\np2\nI4\nsS'label_names'\np3\n(lp4\nS'airplane'\np5\naS'automobile'\naS'bird'\nas."
)


def text(value: bytes) -> bytes:
    """A Python 2 string, as protocol 2 has it."""
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def array(data: bytes, shape: bytes, dtype: bytes = b"u1") -> bytes:
    """A NumPy array as Python 2 pickled it."""
    begun = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85" + text(b"b") + b"\x87R"
    kind = (
        b"cnumpy\ndtype\n"
        + text(dtype)
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return begun + b"(K\x01" + shape + kind + b"\x89" + text(data) + b"tb"


def batch(data: bytes, labels: list[int], labels_key: bytes = b"labels") -> bytes:
    """A batch with bytes as keys, in the opcodes of Python 2's cPickle."""
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(labels_key) + listed + text(b"data") + data + b"u."


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
PLANES = PIXELS.transpose(0, 3, 1, 2).tobytes()
SHAPE = b"K\x04M\x00\x0c\x86"
GENUINE = batch(array(PLANES, SHAPE), [0, 1, 2, 0])


@pytest.fixture
def cifar(tmp_path: Path) -> Callable[..., Path]:
    """A folder of CIFAR-10 of which one file can be another."""

    def make(**files: bytes) -> Path:
        (tmp_path / "batches.meta").write_bytes(META)
        for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
            (tmp_path / name).write_bytes(files.get(name, GENUINE))
        return tmp_path

    return make


def test_batches_as_python_2_wrote_them_are_read(cifar: Callable[..., Path]) -> None:
    train, test = read_cifar(cifar()), read_cifar(cifar(), "test")
    assert (train.pixels.shape, train.pixels.dtype) == ((20, 32, 32, 3), np.uint8)
    assert (train.pixels == np.concatenate([PIXELS] * 5)).all()
    assert (test.labels.tolist(), test.labels.dtype) == ([0, 1, 2, 0], np.int64)
    assert test.class_names == ("airplane", "automobile", "bird")
    assert {opcode.name for opcode, _, _ in pickletools.genops(GENUINE)} >= {"BINSTRING", "REDUCE", "BUILD"}
    assert pickle.loads(GENUINE, encoding="bytes")[b"data"].shape == (4, 3072)


def test_a_batch_that_python_3_pickled_again_and_cifar_100_are_read(tmp_path: Path) -> None:
    rows = np.frombuffer(PLANES, np.uint8).reshape(4, 3072).copy()
    content = {"data": rows, "fine_labels": [2, 1, 0, 1], "coarse_labels": [0, 0, 0, 0]}
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": ["ä", "b", "c"]}, 2))
    for protocol in (2, 4):
        (tmp_path / "train").write_bytes(pickle.dumps(content, protocol))
        found = read_cifar(tmp_path)
        assert (found.pixels == PIXELS).all()
        assert (found.labels.tolist(), found.class_names[0]) == ([2, 1, 0, 1], "ä")


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def hostile(path: Path) -> dict[str, tuple[bytes, str]]:
    """By what it tries: a file, and what must be said of it."""
    touch = f"touch {path}"
    object_array = array(text(b"")[2:], b"K\x01\x85", b"O")
    return {
        "os.system": (pickle.dumps({b"data": Runs(os.system, touch)}, 2), "it names posix.system"),
        "eval": (pickle.dumps(Runs(eval, f"open({str(path)!r}, 'w')"), 2), "it names __builtin__.eval"),
        "getattr": (pickle.dumps(Runs(getattr, Runs(__import__, "os"), "system"), 2), "it names __builtin__.getattr"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "it names numpy.ndarray.__class__"),
        "inst": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "opcode INST is not allowed"),
        "new object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode NEWOBJ is not allowed"),
        "set code": (b"\x80\x02c_codecs\nencode\nN}U\x08__code__K\x01s\x86b.", "not a readable pickle"),
        "set a class": (b"\x80\x02cnumpy\nndarray\nN}U\x01xK\x01s\x86b.", "not a readable pickle"),
        "call ndarray": (b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", "not a readable pickle"),
        "huge bytes": (b"\x80\x02B\xff\xff\xff\xffabc.", "not a readable pickle"),
        "huge long": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not a readable pickle"),
        "huger bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.", "not a readable pickle"),
        "huge memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "a memo entry 2147483647"),
        "cut": (GENUINE[: len(GENUINE) // 2], "not a readable pickle"),
        "empty": (b"", "not a readable pickle"),
        "a list": (b"].", "it does not contain a dictionary"),
        "objects": (batch(object_array, [0]), "an array of type 'O', not uint8"),
        "no array": (batch(text(b"abc"), [0]), "data is not an array"),
        "no state": (batch(array(PLANES, SHAPE).partition(b"(K\x01" + SHAPE)[0], [0]), "an array without a state"),
        "flat": (batch(array(PLANES, b"M\x00\x30\x85"), [0] * 4), "an array that is not (N, 3072) in C order"),
        "too large": (batch(array(PLANES, b"J\xff\xff\xff\x7fM\x00\x0c\x86"), [0]), "with data of another length"),
        "negative": (batch(array(PLANES, b"J\xff\xff\xff\xffM\x00\x0c\x86"), [0]), "with data of another length"),
        "deep": (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "tuples in tuples, more than 100 deep"),
        "deep shape": (batch(array(PLANES, b"K\x01" + b"\x85" * 5000), [0]), "tuples in tuples"),
        "again and again": (b"\x80\x02c_codecs\nencode\nq\x00X\x00\x01\x00\x00" + b"a" * 256 + b"q\x01]"
                            + b"h\x00h\x01\x85Ra" * 1000 + b".", "a text that is encoded again and again"),
        "few labels": (batch(array(PLANES, SHAPE), [0]), "labels is not a list of 4 numbers from 0 to 2"),
        "label 3": (batch(array(PLANES, SHAPE), [0, 1, 2, 3]), "labels is not a list of 4 numbers"),
    }  # fmt: skip


@pytest.mark.parametrize("what", hostile(Path()))
def test_hostile_and_damaged_files_run_nothing_and_are_named(
    what: str, cifar: Callable[..., Path], tmp_path: Path
) -> None:
    data, message = hostile(tmp_path / "ran")[what]
    with pytest.raises(SourceError) as caught:
        read_cifar(cifar(data_batch_3=data))
    assert message in str(caught.value)
    assert "data_batch_3" in str(caught.value)
    assert "unpack" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert (read_cifar(cifar()).pixels[:4] == PIXELS).all()  # nothing was changed for the next file


def test_a_folder_that_is_not_cifar_and_a_missing_batch_are_named(cifar: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither batches"):
        read_cifar(tmp_path)
    (cifar() / "data_batch_4").unlink()
    with pytest.raises(SourceError, match=r"data_batch_4.*No such file"):
        read_cifar(tmp_path)
