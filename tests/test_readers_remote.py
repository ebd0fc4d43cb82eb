"""Datasets in object stores: the rows of a folder by few requests, whole shards in a cache, errors, no wrong rows."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import multiprocessing
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, MakeTree, Proxy, build_cpu, edit_json, flip_bit, only_test_credentials

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import fsspec
from moto.server import ThreadedMotoServer

import gpu_npz
from gpu_npz.audit.preview import preview
from gpu_npz.errors import FormatError, StorageError, UsageError
from gpu_npz.npz.reader import NpzReader
from gpu_npz.readers import remote
from gpu_npz.storage import objects

pytestmark = pytest.mark.filterwarnings(
    r"ignore:datetime\.datetime\.utcnow:DeprecationWarning:(boto|moto)",
    # Python 3.12 and later warn of a fork while fsspec's thread runs; the child uses a loop of its own.
    r"ignore:This process .* is multi-threaded, use of fork\(\):DeprecationWarning",
)
_number = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


class Requests(Proxy):
    """A proxy that records the requests for shards: name, range and condition of each."""

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(server)
        self.shards: list[tuple[str, str, str]] = []
        self.rule = self.count

    def count(self, data: bytes) -> bytes:
        if found := re.match(rb"GET \S*/(shard-\d+\.npz)", data):
            fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in data.split(b"\r\n"))}
            ask = found[1], fields.get(b"range", b""), fields.get(b"if-match", b"")
            name, span, tag = (each.decode() for each in ask)
            self.shards.append((name, span.removeprefix("bytes="), tag))
        return data

    def taken(self) -> list[tuple[str, str, str]]:
        """The requests since the last call."""
        found, self.shards = self.shards, []
        return found


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Requests]:
    """The proxy through which stores are reached, with nobody's credentials, and short waits."""
    only_test_credentials(monkeypatch)
    monkeypatch.setattr(objects, "RETRY_S", 0.01)
    monkeypatch.setattr(objects, "ATTEMPTS", 3)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = Requests(server)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": found.url})
    yield found
    found.close()


@pytest.fixture(scope="module")
def stored(make_dataset: MakeDataset) -> Path:
    """40 rows of 12 x 16 pixels, uint8, in 6 shards. Read only."""
    return make_dataset(dtype="uint8")


@pytest.fixture(scope="module")
def deflated(make_dataset: MakeDataset) -> Path:
    """The same, deflated."""
    return make_dataset(dtype="uint8", compress="deflate")


def upload(folder: Path, protocol: str = "s3") -> str:
    """Copies a dataset to a bucket of its own, and returns its URL."""
    files, bucket = fsspec.filesystem(protocol, skip_instance_cache=True), f"bucket-read-{next(_number)}"
    files.mkdir(bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".gpu-npz/commits" not in str(path):
            files.pipe_file(f"{bucket}/some/out/{path.relative_to(folder)}", path.read_bytes())
    return f"{protocol}://{bucket}/some/out"


def replace(url: str, name: str, change: Callable[[bytes], bytes]) -> None:
    """Replaces an object of a dataset."""
    files = fsspec.filesystem(url.partition("://")[0], skip_instance_cache=True)
    files.pipe_file(f"{url}/{name}", change(files.cat_file(f"{url}/{name}")))


def settled(data: gpu_npz.Dataset) -> None:
    """Waits until nothing is fetched in the background any more."""
    assert data._remote is not None
    for thread in list(data._remote._threads):
        thread.join()


def flipped(position: int) -> Callable[[bytes], bytes]:
    """What flips one bit of the byte at `position`."""

    def flip(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        return bytes(damaged)

    return flip


def files_in(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.name != "lock")


# Rows


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
@pytest.mark.parametrize("form", ["stored", "deflated"])
@pytest.mark.parametrize("protocol", ["s3", "memory"])
def test_however_rows_are_asked_for_they_are_those_of_the_folder(
    request: pytest.FixtureRequest, proxy: Requests, tmp_path: Path, protocol: str, form: str, cached: bool
) -> None:
    folder = request.getfixturevalue(form)
    here = gpu_npz.open_dataset(folder)
    there = gpu_npz.open_dataset(upload(folder, protocol), cache=tmp_path / "cache" if cached else None)
    if cached:
        there.fill(wait=True)
    assert (len(there), there.class_names, there.image_shape) == (40, here.class_names, here.image_shape)
    np.testing.assert_array_equal(there.labels, here.labels)
    every: list[Any] = [0, -1, slice(None), slice(3, 6), slice(5, 30), slice(None, None, -3), slice(4, 4)]
    every += [[39, 0, 7, 7, 8, -1], [], np.arange(40)]
    for rows in every:
        np.testing.assert_array_equal(there[rows], here[rows])
        np.testing.assert_array_equal(there.normalized(rows), here.normalized(rows))
        for name in ("paths", "index", "source_bytes", "labels"):
            np.testing.assert_array_equal(there.column(name, rows), here.column(name, rows))
    np.testing.assert_array_equal(list(there), here[:])
    np.testing.assert_array_equal(there.shard(2).rows("images")[1::2], here[15:21:2])
    assert list(there.paths) == list(here.paths)
    there[3][:] = 5  # an array of its own, or a private map
    rows = np.array([5, 39, 5, 6, 20])
    for normalize, dtype in ((False, np.uint8), (True, np.float32)):
        out = [np.empty((5, *here.image_shape), dtype) for _ in range(2)]
        for data, each in zip((here, there), out, strict=True):
            data.read(rows, each, normalize=normalize)
        np.testing.assert_array_equal(*out)


def test_a_first_row_takes_two_requests_and_each_further_one_a_single_one_for_exactly_its_bytes(
    proxy: Requests, stored: Path
) -> None:
    data = gpu_npz.open_dataset(upload(stored))
    size, row_bytes = (stored / "shard-00001.npz").stat().st_size, 3 * 12 * 16
    assert proxy.taken() == []
    data[9]
    (end, row) = proxy.taken()
    assert end == ("shard-00001.npz", f"{size - 4096}-{size - 1}", "")
    tag = row[2]
    assert row == ("shard-00001.npz", f"{4096 + 2 * row_bytes}-{4096 + 3 * row_bytes - 1}", tag)
    assert re.fullmatch('"[0-9a-f]{32}.*"', tag)
    data[7]
    data.normalized(7)
    assert proxy.taken() == [("shard-00001.npz", f"4096-{4096 + row_bytes - 1}", tag)] * 2
    data[8:14]
    assert proxy.taken() == [("shard-00001.npz", f"{4096 + row_bytes}-{4096 + 7 * row_bytes - 1}", tag)]
    data[[13, 7, 10, 9, 10]]
    spans = [f"{4096 + a * row_bytes}-{4096 + b * row_bytes - 1}" for a, b in ((0, 1), (2, 4), (6, 7))]
    assert sorted(span for _, span, _ in proxy.taken()) == spans
    assert data.paths[7] == gpu_npz.open_dataset(stored).paths[7]
    assert len(proxy.taken()) == 1
    assert len(data.paths[8:14]) == 6
    assert proxy.taken() == []


def test_a_deflated_shard_takes_one_request_more_for_its_row_index(proxy: Requests, deflated: Path) -> None:
    data = gpu_npz.open_dataset(upload(deflated))
    data[9]
    end, index, row = proxy.taken()
    assert end[2] == ""
    assert index[2] == row[2] != ""
    data[7:14]
    ((_, span, _),) = proxy.taken()
    start, stop = map(int, span.split("-"))
    assert (start, stop - start) < (4097, 7 * 3 * 12 * 16)


def test_what_is_known_of_a_shard_outlasts_it(proxy: Requests, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.readers.dataset._OPEN_SHARDS", 1)
    data = gpu_npz.open_dataset(upload(stored))
    for row in (0, 39, 0, 39):
        data[row]
    assert len(proxy.taken()) == 6


def test_the_rows_of_a_batch_are_fetched_concurrently(proxy: Requests, stored: Path) -> None:
    data = gpu_npz.open_dataset(upload(stored))
    rows = np.arange(0, 40, 2)
    data[rows]
    proxy.taken()
    together = threading.Barrier(4)

    def meet(data: bytes) -> bytes:
        if b"shard-" in data and len(proxy.taken()) < 1 and not together.broken:
            together.wait(60)
        return data

    proxy.rule = meet
    np.testing.assert_array_equal(data[rows], gpu_npz.open_dataset(stored)[rows])
    assert not together.broken


def test_an_unfinished_dataset_is_read_as_far_as_it_is(
    proxy: Requests, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = gpu_npz.BuildConfig(size=16, shard_size=7, workers=0, device="cpu", limit=20)
    bucket = upload(tmp_path)
    gpu_npz.build(tree, bucket, settings)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.rm_file(f"{bucket}/dataset.json")
    files.rm_file(f"{bucket}/.gpu-npz/commits/shard-00000.json")
    data = gpu_npz.open_dataset(bucket, partial=True, cache=tmp_path / "cache")
    assert (len(data), len(data.shard_rows)) == (13, 2)
    np.testing.assert_array_equal(data[np.arange(13)], np.array(list(data)))
    assert files_in(tmp_path / "cache") == [".npz", ".npz"]


# Processes


def test_it_pickles_with_its_cache(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    data = gpu_npz.open_dataset(upload(stored), cache=tmp_path / "cache", cache_size="1GB")
    again = pickle.loads(pickle.dumps(data))
    assert again._options == data._options == (False, str(tmp_path / "cache"), "1GB")
    np.testing.assert_array_equal(list(again), list(data))


def _in_child(data: gpu_npz.Dataset, send: Any) -> None:
    send.send((data[3].tolist(), data[[20, 30]].tolist(), data.paths[39]))


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
def test_a_process_that_forks_after_use_and_its_child_both_go_on(
    proxy: Requests, stored: Path, tmp_path: Path, cached: bool
) -> None:
    data = gpu_npz.open_dataset(upload(stored), cache=tmp_path / "cache" if cached else None)
    expected = data[3].tolist(), data[[20, 30]].tolist(), data.paths[39]
    if cached:
        data.fill(wait=True)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    child = context.Process(target=_in_child, args=(data, send))
    child.start()
    assert receive.poll(60)
    assert receive.recv() == expected
    child.join()
    assert child.exitcode == 0
    assert (data[3].tolist(), data[[20, 30]].tolist(), data.paths[39]) == expected


# Faults of the store


def test_a_shard_that_is_replaced_is_told_and_never_mixed_with_the_old_one(
    proxy: Requests, stored: Path, tmp_path: Path
) -> None:
    url = upload(stored)
    plain, kept = gpu_npz.open_dataset(url), gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    plain[0], kept[0]
    replace(url, "shard-00000.npz", flipped(4096))
    for read in (lambda: plain[1], lambda: plain[[1, 3]], lambda: plain.paths[0], lambda: list(kept)):
        with pytest.raises(StorageError, match=r"shard-00000\.npz'.*it has changed since .*; open the dataset again"):
            read()
    settled(kept)
    assert files_in(tmp_path / "cache") == [".npz"] * 5


def test_servers_that_ignore_the_condition_are_seen_through(proxy: Requests, stored: Path) -> None:
    url = upload(stored)
    data = gpu_npz.open_dataset(url)
    data[0]
    replace(url, "shard-00000.npz", flipped(4096))
    proxy.rule = lambda sent: re.sub(rb"If-Match: [^\r]*\r\n", b"", sent)
    with pytest.raises(StorageError, match="another object has replaced it"):
        data[1]


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
def test_another_directory_than_the_index_names_is_refused(
    proxy: Requests, stored: Path, tmp_path: Path, cached: bool
) -> None:
    url = upload(stored)
    names = [f"shard-0000{number}.npz" for number in range(6)]
    content = (stored / names[0]).read_bytes()
    directory = NpzReader(stored / names[0]).directory.offset
    changes: list[Callable[[bytes], bytes]] = [
        lambda _: content[:-1],
        lambda _: content[: len(content) // 2],
        lambda _: content + b"\0",
        lambda _: (stored / names[1]).read_bytes(),
        lambda _: b"",
        lambda _: bytes(len(content)),
    ]
    # The CRC-32 of the images is in bytes 16 to 19 of their entry, and no other byte of the file follows from it.
    changes += [flipped(position) for position in (directory + 16, *range(directory, len(content), 97))]
    for change in changes:
        replace(url, names[0], lambda _, change=change: change(content))  # type: ignore[misc]
        data = gpu_npz.open_dataset(url, cache=tmp_path / "cache" if cached else None)
        if cached:
            data.fill([0], wait=True)
        for read in (lambda: data[0], lambda: data[[0, 3]], lambda: data.paths[0]):  # noqa: B023
            with pytest.raises(FormatError, match=r"shard-00000\.npz"):
                read()
        settled(data)
    if cached:
        assert files_in(tmp_path / "cache") == []


def test_a_missing_shard_is_named_with_the_command_that_restores_it(proxy: Requests, stored: Path) -> None:
    url = upload(stored)
    fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"{url}/shard-00002.npz")
    data = gpu_npz.open_dataset(url)
    data[0]
    for rows in (14, [3, 14], slice(7, 21)):
        with pytest.raises(FormatError, match=rf"{url}/shard-00002\.npz: .*missing; .*gpu-npz verify {url} --repair"):
            data[rows]


def test_columns_are_checked_by_their_checksum_and_deflated_rows_by_their_structure(
    proxy: Requests, stored: Path, deflated: Path
) -> None:
    paths = NpzReader(stored / "shard-00000.npz").directory.members["paths"]
    for position in (paths.header_offset + 2, paths.data_offset - 60, paths.data_offset + 4):
        url = upload(stored)
        replace(url, "shard-00000.npz", flipped(position))
        data = gpu_npz.open_dataset(url)
        data[0]
        with pytest.raises(FormatError, match=r"(header|CRC-32) of paths\.npy"):
            data.paths[0]
    members = NpzReader(deflated / "shard-00000.npz").directory.members
    for position in (members["images.rowindex"].data_offset + 9, members["images"].data_offset):
        url = upload(deflated)
        replace(url, "shard-00000.npz", flipped(position))
        with pytest.raises(FormatError, match=r"shard-00000\.npz: .*(rowindex|row 0)"):
            gpu_npz.open_dataset(url)[0]


def test_a_damaged_image_does_not_get_into_the_cache(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url = upload(stored)
    replace(url, "shard-00001.npz", flipped(5000))
    data = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(FormatError, match=r"shard-00001\.npz: the checksum of images is wrong"):
            list(data)
    settled(data)
    assert files_in(tmp_path / "cache") == [".npz"] * 5
    again = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    again.fill()
    settled(again)
    with pytest.raises(FormatError, match="the checksum of images is wrong"):
        again[8]


def test_a_manifest_with_impossible_images_is_refused(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    for images in ({"dtype": "object"}, {"dtype": "O"}, {"shape": [3, -12, -16]}, {"shape": [3, 12, 17]}):
        url = upload(stored)
        manifest = tmp_path / "dataset.json"
        manifest.write_bytes((stored / "dataset.json").read_bytes())
        edit_json(manifest, lambda record, images=images: record["images"].update(images))  # type: ignore[misc]
        replace(url, "dataset.json", lambda _: (tmp_path / "dataset.json").read_bytes())
        with pytest.raises(FormatError, match=r"images"):
            gpu_npz.open_dataset(url)[0]


def answer(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_moments_in_which_the_store_does_not_answer_pass(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url = upload(stored)
    turns = itertools.count()

    def unsteady(data: bytes) -> bytes | None:
        if b"GET /" not in data or b"shard-" not in data:
            return data
        return {0: answer("503 Slow Down", "SlowDown"), 1: None}.get(next(turns) % 3, data)

    proxy.rule = unsteady
    expected = gpu_npz.open_dataset(stored)[:]
    data = gpu_npz.open_dataset(url)
    for row in (0, 9, 3):
        np.testing.assert_array_equal(data[row], expected[row])
    kept = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    kept.fill([14], wait=True)
    np.testing.assert_array_equal(kept[14:21], expected[14:21])
    assert next(turns) > 8


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer("403 Forbidden", "AccessDenied"), "request permission to list the bucket and to get its objects"),
        (answer("503 Slow Down", "SlowDown"), "the object store does not respond; check the network"),
        (None, "the object store does not respond; check the network"),
    ],
    ids=["403", "503", "cut"],
)
def test_a_store_that_refuses_is_told_with_what_to_do(
    proxy: Requests, stored: Path, tmp_path: Path, reply: bytes | None, message: str
) -> None:
    url = upload(stored)
    data, kept = gpu_npz.open_dataset(url), gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    proxy.rule = lambda data: reply if b"shard-" in data else data
    for read in (lambda: data[0], lambda: data[[0, 9]], lambda: data.paths[0], lambda: list(kept)):
        with pytest.raises(StorageError, match=message) as caught:
            read()
        assert "OUT" not in str(caught.value)
    settled(kept)
    assert files_in(tmp_path / "cache") == []
    proxy.rule = lambda data: reply if data.startswith(b"GET") else data
    with pytest.raises(StorageError, match=message):
        gpu_npz.open_dataset(url)


# The cache


def test_iterating_fetches_each_shard_once_and_everything_is_mapped_from_then_on(
    proxy: Requests, stored: Path, tmp_path: Path
) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)[:]
    data = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    data[0]
    assert files_in(tmp_path / "cache") == []
    proxy.taken()
    np.testing.assert_array_equal(list(data), expected)
    sizes = [(stored / f"shard-0000{number}.npz").stat().st_size for number in range(6)]
    wholes = [span for _, span, _ in proxy.taken() if span.startswith("0-")]
    assert sorted(wholes) == sorted(f"0-{size - 1}" for size in sizes)
    settled(data)
    proxy.taken()
    np.testing.assert_array_equal(data[[0, 39, 20]], expected[[0, 39, 20]])
    again = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again[[0, 39, 20]], expected[[0, 39, 20]])
    shard = again.shard(2)
    assert isinstance(shard, NpzReader)
    assert np.shares_memory(again[15], shard["images"])
    assert again.paths[15] == data.paths[15]
    assert proxy.taken() == []
    cached = {path.read_bytes() for path in (tmp_path / "cache").glob("*.npz")}
    assert cached == {path.read_bytes() for path in stored.glob("shard-*.npz")}


def test_random_rows_fetch_no_whole_shard_unless_the_cache_is_filled(
    proxy: Requests, stored: Path, tmp_path: Path
) -> None:
    data = gpu_npz.open_dataset(upload(stored), cache=tmp_path / "cache")
    expected = gpu_npz.open_dataset(stored)[:]
    np.testing.assert_array_equal(data[np.arange(0, 40, 3)], expected[::3])
    data[0:30]
    assert files_in(tmp_path / "cache") == []
    data.fill()
    settled(data)
    assert files_in(tmp_path / "cache") == [".npz"] * 6
    proxy.taken()
    np.testing.assert_array_equal(data[np.arange(0, 40, 3)], expected[::3])
    np.testing.assert_array_equal(data[5], expected[5])
    assert proxy.taken() == []


def test_of_many_who_need_a_shard_one_fetches_it(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)[:]
    readers = [gpu_npz.open_dataset(url, cache=tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(list, readers):
            np.testing.assert_array_equal(found, expected)
    for data in readers:
        settled(data)
    assert sorted(name for name, span, _ in proxy.taken() if span.startswith("0-")) == [
        f"shard-0000{number}.npz" for number in range(6)
    ]
    assert files_in(tmp_path / "cache") == [".npz"] * 6


def test_a_full_cache_says_so_once_and_the_rest_is_read_by_rows(
    proxy: Requests, stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)[:]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes.txt").write_bytes(b"x" * 10**6)  # neither counts nor is touched
    size = max(path.stat().st_size for path in stored.glob("shard-*.npz"))
    data = gpu_npz.open_dataset(url, cache=cache, cache_size=3 * size)
    for _ in range(2):
        np.testing.assert_array_equal(list(data), expected)
    settled(data)
    np.testing.assert_array_equal(data[[39, 0, 20]], expected[[39, 0, 20]])
    found = sorted(cache.glob("*.npz"))
    assert 3 <= len(found) < 6
    assert sum(path.stat().st_size for path in found) <= 3 * size
    assert files_in(cache) == [".npz"] * len(found) + [".txt"]
    (record,) = (record for record in caplog.records if "cache" in record.getMessage())
    assert "give a larger cache_size" in record.getMessage()
    smaller = gpu_npz.open_dataset(url, cache=cache, cache_size=0)
    np.testing.assert_array_equal(list(smaller), expected)
    assert sorted(cache.glob("*.npz")) == found


def test_a_disk_that_gets_full_in_the_middle_of_a_shard_costs_the_cache_and_no_rows(
    proxy: Requests, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_PIECE_BYTES", 3000)
    real, written = os.pwrite, itertools.count()

    def full(descriptor: int, data: bytes, position: int) -> int:
        if next(written) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:1000], position)

    monkeypatch.setattr(os, "pwrite", full)
    data = gpu_npz.open_dataset(upload(stored), cache=tmp_path / "cache")
    np.testing.assert_array_equal(list(data), gpu_npz.open_dataset(stored)[:])
    settled(data)
    assert set(files_in(tmp_path / "cache")) <= {".npz"}
    (record,) = (record for record in caplog.records if "cache" in record.getMessage())
    assert "No space left on device" in record.getMessage()


def test_what_a_killed_process_left_is_taken_over(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)[:]
    digests = gpu_npz.open_dataset(url)._remote._digests  # type: ignore[union-attr]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f"{digests[0]}.part").write_bytes(b"\xff" * 10**6)
    size = max(path.stat().st_size for path in stored.glob("shard-*.npz"))
    data = gpu_npz.open_dataset(url, cache=cache, cache_size=10**6 + 6 * size)
    np.testing.assert_array_equal(list(data), expected)
    settled(data)
    assert files_in(cache) == [".npz"] * 6


def test_who_waits_for_a_process_that_fails_fetches_the_shard(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    data = gpu_npz.open_dataset(upload(stored), cache=tmp_path / "cache")
    part = tmp_path / "cache" / f"{data._remote._digests[0]}.part"  # type: ignore[union-attr]
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    data.fill([7, 0])
    with ThreadPoolExecutor(1) as pool:
        data.fill([0], wait=True)
        row = pool.submit(lambda: data[0])
        part.unlink()
        os.close(descriptor)
        np.testing.assert_array_equal(row.result(), gpu_npz.open_dataset(stored)[0])
    settled(data)
    assert files_in(tmp_path / "cache") == [".npz"] * 2


def test_copies_that_are_damaged_or_of_another_name_are_refused(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url = upload(stored)
    list(gpu_npz.open_dataset(url, cache=tmp_path / "cache"))
    digests = gpu_npz.open_dataset(url)._remote._digests  # type: ignore[union-attr]
    first, second = (tmp_path / "cache" / f"{digest}.npz" for digest in digests[:2])
    flip_bit(first, -3)
    second.write_bytes((tmp_path / "cache" / f"{digests[2]}.npz").read_bytes())
    data = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    for row, path in ((0, first), (7, second)):
        with pytest.raises(FormatError, match=rf"{path}: .*delete"):
            data[row]
        path.unlink()
        np.testing.assert_array_equal(data[row], gpu_npz.open_dataset(stored)[row])


@pytest.mark.parametrize("whole", [False, True], ids=["files", "folder"])
def test_a_cache_that_is_deleted_during_a_download_is_filled_anew(
    proxy: Requests,
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole: bool,
) -> None:
    cache, times, real = tmp_path / "cache", itertools.count(), os.pwrite

    def write(descriptor: int, data: bytes, position: int) -> int:
        if next(times) == 2:
            for path in cache.iterdir():
                path.unlink()
            if whole:
                cache.rmdir()
        return real(descriptor, data, position)

    monkeypatch.setattr(remote, "_DOWNLOADS", 1)
    monkeypatch.setattr(os, "pwrite", write)
    data = gpu_npz.open_dataset(upload(stored), cache=cache)
    data.fill()
    settled(data)
    assert files_in(cache) == [".npz"] * 4  # without the two that were complete
    np.testing.assert_array_equal(list(data), gpu_npz.open_dataset(stored)[:])
    assert files_in(cache) == [".npz"] * 6
    assert not caplog.records


def test_a_file_that_another_process_puts_in_place_of_a_deleted_one_stays(
    proxy: Requests, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real, begun = tmp_path / "cache", os.pwrite, []

    def write(descriptor: int, data: bytes, position: int) -> int:
        if not begun:
            (part,) = cache.glob("*.part")
            part.unlink()
            begun.append(os.open(part, os.O_RDWR | os.O_CREAT))  # as another process does
            fcntl.flock(begun[0], fcntl.LOCK_EX)
            os.ftruncate(begun[0], len(data))
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", write)
    data = gpu_npz.open_dataset(upload(stored), cache=cache)
    assert data._remote is not None
    assert data._remote._keep(0, wait=False) is None
    assert files_in(cache) == [".part"]
    os.close(begun[0])
    assert data._remote._keep(0, wait=True)
    np.testing.assert_array_equal(data[0], gpu_npz.open_dataset(stored)[0])


def test_a_copy_that_is_deleted_while_it_is_opened_is_read_from_the_store(
    proxy: Requests, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)
    list(gpu_npz.open_dataset(url, cache=tmp_path / "cache"))
    exists = os.path.exists

    def delete(path: str) -> bool:
        found = exists(path)
        if found and path.endswith(".npz"):
            os.unlink(path)
        return found

    monkeypatch.setattr(os.path, "exists", delete)
    data = gpu_npz.open_dataset(url, cache=tmp_path / "cache")
    np.testing.assert_array_equal(data[39], expected[39])


def test_settings_of_the_cache_are_checked_and_a_folder_needs_none(
    proxy: Requests, stored: Path, tmp_path: Path
) -> None:
    for size in ("much", "-1", "1.5GB", "10 parsecs", True):
        with pytest.raises(UsageError, match=r"cache_size: got .*; allowed: bytes, or a number with a unit"):
            gpu_npz.open_dataset(stored, cache=tmp_path / "cache", cache_size=size)
    with pytest.raises(UsageError, match="without cache: give the folder"):
        gpu_npz.open_dataset(stored, cache_size="1GB")
    data = gpu_npz.open_dataset(stored, cache=tmp_path / "cache", cache_size="500M")
    data.fill()
    np.testing.assert_array_equal(list(data), data[:])
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cache .*file/cache'.*give a folder on a local disk"):
        gpu_npz.open_dataset(upload(stored), cache=tmp_path / "file" / "cache")


# The readers of the frameworks


def torch_readers() -> Any:
    pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")
    from gpu_npz.readers import torch

    return torch


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
def test_streams_and_loaders_give_what_they_give_of_a_folder(
    proxy: Requests, stored: Path, tmp_path: Path, cached: bool
) -> None:
    readers, url = torch_readers(), upload(stored)
    options = {"cache": tmp_path / "cache", "cache_size": "1GB"} if cached else {}
    makes: list[Callable[..., Any]] = [
        lambda path, **more: readers.ShardIterable(path, **more),
        lambda path, **more: readers.ShardIterable(path, shuffle=True, buffer=10, rank=1, world_size=3, **more),
        lambda path, **more: readers.ShardIterable(path, shuffle=True, buffer=5, global_batch=16, **more),
        lambda path, **more: readers.loader(path, 9, device="cpu", **more),
        lambda path, **more: readers.loader(path, 9, device="cpu", shuffle=True, rank=0, world_size=2, **more),
    ]
    for make in makes:
        for (image, label), (other, its) in zip(make(stored), make(url, **options), strict=True):
            np.testing.assert_array_equal(image, other)
            np.testing.assert_array_equal(label, its)


@pytest.mark.parametrize("settings", [{}, {"shuffle": True, "buffer": 9}, {"shuffle": True, "global_batch": 8}])
def test_a_stream_with_a_cache_fetches_shards_and_no_rows(
    proxy: Requests, stored: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    readers, url = torch_readers(), upload(stored)
    stream = readers.ShardIterable(url, cache=tmp_path / "cache", **settings)
    proxy.taken()
    assert len(list(stream)) == len(stream)
    settled(stream.dataset.data)
    spans = {span.split("-")[0] == "0" for _, span, _ in proxy.taken()}
    found = proxy.taken()
    assert found == []
    assert files_in(tmp_path / "cache") == [".npz"] * 6
    assert spans == {True, False}  # shards, and their ends


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_read_remote_shards_and_share_the_cache(
    proxy: Requests, stored: Path, tmp_path: Path, start: str
) -> None:
    readers, url = torch_readers(), upload(stored)
    from torch.utils.data import DataLoader

    here = readers.ShardDataset(stored)
    there = readers.ShardDataset(url, cache=tmp_path / "cache")
    np.testing.assert_array_equal(there[3][0], here[3][0])
    if start == "spawn":
        os.environ["FSSPEC_S3_ENDPOINT_URL"] = proxy.url
    try:
        batches = DataLoader(
            there, batch_size=6, num_workers=2, multiprocessing_context=start, collate_fn=readers.collate
        )
        found = [images.clone() for images, _ in batches]
    finally:
        os.environ.pop("FSSPEC_S3_ENDPOINT_URL", None)
    np.testing.assert_array_equal(np.concatenate(found), [here[row][0] for row in range(40)])


def test_keras_reads_remote_shards(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("keras", reason="NOT TESTED: keras is not installed")
    from gpu_npz.readers.keras import ShardDataset

    here, there = ShardDataset(stored, 9), ShardDataset(upload(stored), 9, cache=tmp_path / "cache", cache_size="1GB")
    for number in range(len(here)):
        np.testing.assert_array_equal(here[number][0], there[number][0])
    settled(there.data)
    assert files_in(tmp_path / "cache") == [".npz"] * 6


def test_tensorflow_reads_remote_shards(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="NOT TESTED: tensorflow is not installed")
    from gpu_npz.readers.tensorflow import as_tf_dataset

    here, there = as_tf_dataset(stored, 9), as_tf_dataset(upload(stored), 9, cache=tmp_path / "cache")
    for (images, labels), (others, theirs) in zip(here, there, strict=True):
        np.testing.assert_array_equal(images, others)
        np.testing.assert_array_equal(labels, theirs)


def test_a_contact_sheet_of_a_dataset_in_a_store_is_that_of_the_folder(
    proxy: Requests, make_tree: MakeTree, tmp_path: Path
) -> None:
    src = make_tree({"a/0.jpg": "jpeg", "a/1.jpg": "gray", "b/0.jpg": "half"})
    out = build_cpu(src, tmp_path / "out", max_rejects="100%")
    url = upload(out)
    for show in ("random", "class", "rejects"):
        for place, name in ((out, "folder.png"), (url, "store.png")):
            preview(place, tmp_path / name, show=show, tile=32)
        assert (tmp_path / "store.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


def test_a_view_fetches_the_shards_of_its_rows_alone(proxy: Requests, stored: Path, tmp_path: Path) -> None:
    url, expected = upload(stored), gpu_npz.open_dataset(stored)[:]
    for name, rows, shards in (("all", None, {0, 2}), ("one", np.array([1]), {2})):
        data = gpu_npz.open_dataset(url, cache=tmp_path / name)
        view = gpu_npz.concat([stored, data]).subset([40, 54, 0])  # rows 0 and 14 of the store, row 0 of the folder
        view.fill(rows, wait=True)
        np.testing.assert_array_equal(view[[0, 1, 2]], expected[[0, 14, 0]])
        digests = data._remote._digests  # type: ignore[union-attr]
        for thread in data._remote._threads:  # type: ignore[union-attr]
            thread.join()
        assert {path.name for path in (tmp_path / name).glob("*.npz")} == {f"{digests[each]}.npz" for each in shards}
