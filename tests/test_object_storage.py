"""OUT on an object store: the same bytes as in a folder, whole objects or none, one build at a time, advice."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MakeTree, Proxy, assert_a_worker_needs_its_parents_lock, only_test_credentials, python, race

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import fsspec
from moto.server import ThreadedMotoServer

from gpu_npz.audit.verify import verify
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.job import Job
from gpu_npz.dataset.manifest import Manifest, class_list
from gpu_npz.errors import (
    FormatError,
    IncompleteError,
    LockedError,
    MismatchError,
    ShardError,
    StorageError,
    UsageError,
)
from gpu_npz.storage import heartbeats, holders, object_lock, objects, open_storage
from gpu_npz.storage.local import LocalStorage
from gpu_npz.storage.objects import ObjectStorage

pytestmark = pytest.mark.filterwarnings(
    r"ignore:datetime\.datetime\.utcnow:DeprecationWarning:(boto|moto)",
)
LOCK = ".gpu-npz/lock"
SETTINGS = BuildConfig(size=16, shard_size=2, workers=0, device="cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


@pytest.fixture
def proxy(server: tuple[str, int]) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody waits long, and no credentials but the test's are found."""
    monkeypatch.setattr(objects, "RETRY_S", 0.01)
    monkeypatch.setattr(objects, "ATTEMPTS", 3)
    monkeypatch.setattr(heartbeats, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(heartbeats, "STALE_S", 0.7)
    monkeypatch.setattr(object_lock, "SETTLE_S", 0.3)
    only_test_credentials(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()


_number = itertools.count()


@pytest.fixture
def out(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty OUT in a bucket of its own."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
    bucket = f"bucket-{next(_number)}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/some/out"


@pytest.fixture(params=["s3", "memory"])
def storage(request: pytest.FixtureRequest) -> ObjectStorage:
    if request.param == "s3":
        return ObjectStorage(request.getfixturevalue("out"))
    return ObjectStorage(f"memory://bucket-{next(_number)}/out")


@pytest.fixture
def src(make_tree: MakeTree) -> Path:
    tree = {f"{folder}/{number}.jpg": "jpeg" for folder in "ab" for number in range(3)}
    return make_tree({**tree, "b/broken.jpg": "half"})


def contents(out: str | Path) -> dict[str, bytes]:
    """Everything in OUT, by name."""
    storage, found = open_storage(out), {}

    def add(folder: str) -> None:
        for name in storage.names(folder):
            path = f"{folder}/{name}".lstrip("/")
            if storage.is_folder(path):
                add(path)
            else:
                found[path] = storage.read(path) or b""

    add("")
    return found


def puts(pattern: bytes) -> Callable[[bytes], bool]:
    return lambda data: re.match(rb"(PUT|POST) \S*" + pattern, data) is not None


# What a storage does


def test_a_place_is_a_folder_or_an_object_store_by_how_it_is_written(tmp_path: Path) -> None:
    assert open_storage(tmp_path).root == str(tmp_path)
    assert open_storage(f"file://{tmp_path}").root == str(tmp_path)
    assert isinstance(open_storage("a:b/c"), LocalStorage)
    assert open_storage("memory://bucket/out/").root == "memory://bucket/out"
    for place, message in {
        "sftp://host/out": r"sftp:// cannot hold a dataset; give a folder, s3://bucket/path or gs://bucket/path",
        "simplecache::s3://bucket/out": "cannot hold a dataset",
        "s3:///out": "names no bucket; give s3://bucket/path",
        "s3:/bucket/out": "because pathlib.Path removes double slashes; give s3://",
    }.items():
        with pytest.raises(StorageError, match=message):
            open_storage(place)


def test_a_client_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(StorageError, match=r"needs s3fs, .*run: pip install 's3fs>=2024\.12'"):
        open_storage("s3://bucket/out")
    with pytest.raises(StorageError, match=r"pip install 'gcsfs>=2024\.12'"):
        open_storage("gs://bucket/out")


def test_neither_the_package_nor_its_storage_loads_a_client() -> None:
    modules = "sys, gpu_npz.builder.run, gpu_npz.storage.objects"
    code = f"import {modules}; print(*{{'fsspec', 's3fs', 'botocore'}} & set(sys.modules))"
    assert python("-c", code).stdout == "\n"


def test_what_was_written_is_read_back(storage: ObjectStorage) -> None:
    storage.write("a/b/file.json", b"content")
    storage.write("empty", b"")
    temporary = storage.temporary("a/shard.npz")
    Path(temporary).write_bytes(b"shard")
    storage.publish(temporary, "a/shard.npz")
    assert not Path(temporary).exists()
    assert storage.read("a/b/file.json") == b"content"
    assert (storage.size("a/b/file.json"), storage.size("empty"), storage.read("empty")) == (7, 0, b"")
    assert (storage.names(), storage.names("a")) == (["a", "empty"], ["b", "shard.npz"])
    assert (storage.is_folder("a"), storage.is_folder("empty"), storage.is_folder("gone")) == (True, False, False)
    with storage.local("a/shard.npz") as path:
        assert Path(path).read_bytes() == b"shard"
    assert not Path(path).exists()
    storage.remove("a/shard.npz")
    storage.remove("a/shard.npz")
    assert storage.names("a") == ["b"]


def test_what_is_not_there_is_none_and_no_error(storage: ObjectStorage) -> None:
    storage.write("file", b"")
    for name in ("gone", "gone/below", "fil"):
        assert storage.read(name) is None
        assert storage.size(name) is None
        assert storage.names(name) == []
        storage.remove(name)
        with pytest.raises(FileNotFoundError, match=re.escape(storage.path(name))), storage.local(name):
            pass


def test_of_two_who_create_a_file_one_does(storage: ObjectStorage) -> None:
    assert storage.create("file", b"1")
    assert not storage.create("file", b"2")
    assert storage.read("file") == b"1"


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (10 << 20) - 1, 10 << 20, 12_345_678])
def test_a_shard_of_any_size_arrives_and_its_checksum_says_so(
    out: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    storage, content = ObjectStorage(out), os.urandom(size)
    temporary = storage.temporary("shard")
    Path(temporary).write_bytes(content)

    def read_back(*_: Any, **__: Any) -> None:
        raise AssertionError("its ETag is an MD5, nothing need be read back")

    with monkeypatch.context() as patched:
        patched.setattr(storage._files, "cat_file", read_back)
        storage.publish(temporary, "shard")
    assert storage.read("shard") == content


@pytest.mark.parametrize("what", ["content", "size"])
def test_a_shard_that_arrives_changed_is_sent_again_and_given_up_in_the_end(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ObjectStorage(f"memory://bucket-{next(_number)}/out")
    put_file, sent = storage._files.put_file, []

    def put(source: str, target: str, **_: Any) -> None:
        sent.append(target)
        put_file(source, target)
        if len(sent) < needed:
            storage._files.pipe_file(target, b"another" if what == "content" else b"short")

    monkeypatch.setattr(storage._files, "put_file", put)
    for needed in (3, 4):
        sent.clear()
        temporary = storage.temporary("shard")
        Path(temporary).write_bytes(b"content")
        if needed == 3:
            storage.publish(temporary, "shard")
            assert storage.read("shard") == b"content"
        else:
            with pytest.raises(
                StorageError,
                match=r"out/shard': .*the stored object differs from the data that was sent; the object store",
            ):
                storage.publish(temporary, "shard")
            assert storage.names() == []
        assert len(sent) == 3
        storage.remove("shard")


def test_temporary_files_go_with_their_storage_and_those_of_killed_builds_at_the_next(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    code = (
        "import os, pathlib, sys, tempfile; tempfile.tempdir = sys.argv[1]; "
        "from gpu_npz.storage.objects import ObjectStorage; "
        "s = ObjectStorage('memory://b/o'); pathlib.Path(s.temporary('shard')).touch(); os.kill(os.getpid(), 9)"
    )
    python("-c", code, scratch, status=-signal.SIGKILL)
    assert len(list(scratch.iterdir())) == 1
    ours, theirs = ObjectStorage("memory://b/o"), ObjectStorage("memory://b/o")
    live = Path(theirs.temporary("shard"))
    live.touch()
    ours.remove_temporaries("")
    assert live.exists()
    assert list(scratch.iterdir()) == [live.parent]
    del theirs
    assert list(scratch.iterdir()) == []


# Builds


def test_a_build_in_a_bucket_is_that_in_a_folder_to_the_byte(src: Path, out: str, tmp_path: Path) -> None:
    here, there = build(src, tmp_path / "out", SETTINGS), build(src, out, SETTINGS)
    assert (there.out, there.rows, there.rejects) == (out, here.rows, here.rejects)
    local, remote = contents(tmp_path / "out"), contents(out)
    for found in (local, remote):
        del found[".gpu-npz/report.json"]
    assert remote.keys() == local.keys()
    assert remote == local
    assert list((tmp_path / "scratch").rglob("*.npz*")) == []
    assert Manifest.load(out) == Manifest.load(tmp_path / "out")
    assert class_list(out) == ("a", "b")
    assert verify(out).to_json() == {**verify(tmp_path / "out").to_json(), "path": out}
    again = build(src, out, SETTINGS)
    assert (again.complete, again.built_shards) == (True, 0)


def test_overwriting_leaves_what_no_build_made(src: Path, out: str) -> None:
    build(src, out, SETTINGS)
    open_storage(out).write("notes.txt", b"precious")
    build(src, out, SETTINGS.model_copy(update={"shard_size": "4", "overwrite": True}))
    assert "shard-00003.npz" not in contents(out)
    assert contents(out)["notes.txt"] == b"precious"
    assert verify(out).ok


def test_a_refused_build_leaves_no_object(src: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="shard-size"):
        build(src, out, SETTINGS.model_copy(update={"shard_size": "1B"}))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ShardError, match="ended with code 1"):
        build(src, out, SETTINGS.model_copy(update={"workers": 1}))
    assert contents(out) == {}


@pytest.mark.parametrize("part", [None, "1/2"])
def test_a_plan_without_a_shard_is_replaced_in_a_bucket_too(
    src: Path, out: str, monkeypatch: pytest.MonkeyPatch, part: str | None
) -> None:
    def interrupted(*of: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gpu_npz.builder.build.run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(src, out, SETTINGS.model_copy(update={"part": part}))
    assert contents(out).keys() == {".gpu-npz/job.json", ".gpu-npz/plan.npz"}
    other = SETTINGS.model_copy(update={"dtype": "uint8", "part": part})
    with open_storage(out).lock("lock-part-2-of-2"), pytest.raises((MismatchError, LockedError)):
        build(src, out, other)
    build(src, out, other)
    with pytest.raises(MismatchError, match="dtype: existing uint8, requested float32"):
        build(src, out, SETTINGS.model_copy(update={"part": part}))


def test_a_foreign_prefix_is_not_written_to(src: Path, out: str) -> None:
    open_storage(out).write("notes.txt", b"precious")
    with pytest.raises(StorageError, match="is not empty and is not a gpu-npz dataset"):
        build(src, out, SETTINGS)
    assert contents(out) == {"notes.txt": b"precious"}


def test_a_dataset_that_lost_or_changed_objects_is_told_and_mended(src: Path, out: str) -> None:
    build(src, out, SETTINGS)
    storage = open_storage(out)
    shard = bytearray(storage.read("shard-00001.npz") or b"")
    shard[5000] ^= 1
    storage.write("shard-00001.npz", bytes(shard))
    storage.remove("shard-00002.npz")
    found = {problem.file: problem.what for problem in verify(out).problems}
    assert found.keys() == {"shard-00001.npz", "shard-00002.npz"}
    assert "CRC-32 of images" in found["shard-00001.npz"]
    assert found["shard-00002.npz"].startswith("No such file or directory; restore the file")
    storage.write("shard-00001.npz", storage.read("shard-00000.npz") or b"")
    assert verify(out).problems[0].what.startswith("it is 'gpu-npz 1 dataset=")  # and not where its copy was
    storage.write("shard-00001.npz", b"no shard at all")
    assert verify(out).problems[0].what.startswith("no end record")
    assert build(src, out, SETTINGS).built_shards == 2
    assert verify(out).ok


def test_a_plan_that_is_gone_or_damaged_is_named_by_its_url(src: Path, out: str) -> None:
    build(src, out, SETTINGS)
    storage = open_storage(out)
    storage.write(".gpu-npz/plan.npz", b"nonsense")
    with pytest.raises(FormatError, match=f"^{out}/.gpu-npz/plan.npz: no end record"):
        Job.open(storage)
    storage.remove(".gpu-npz/plan.npz")
    with pytest.raises(FormatError, match=f"{out}/.gpu-npz/plan.npz': No such file or directory; run"):
        Job.open(storage)


def test_the_clients_own_variables_say_where_a_store_is(
    src: Path, out: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(src, out, SETTINGS)
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", proxy.url)
    command = [sys.executable, "-m", "gpu_npz", "info", out, "--json"]
    assert json.loads(subprocess.check_output(command))["counts"]["items"] == 7


# Trouble


@pytest.mark.parametrize("name", ["shard-00001.npz", "dataset.json"])
def test_an_upload_that_is_cut_for_a_moment_is_sent_again(src: Path, out: str, proxy: Proxy, name: str) -> None:
    hit, cuts = puts(rb"\S*/" + name.encode()), iter(range(2))
    proxy.rule = lambda data: None if hit(data) and next(cuts, None) is not None else data
    assert build(src, out, SETTINGS).complete
    assert next(cuts, None) is None
    assert verify(out).ok


@pytest.mark.parametrize("name", ["plan.npz", "shard-00001.npz", "shard-00002.json", "dataset.json"])
def test_uploads_that_are_cut_again_and_again_leave_nothing_and_the_same_build_finishes(
    src: Path, out: str, proxy: Proxy, name: str, tmp_path: Path
) -> None:
    hit = puts(rb"\S*/" + name.encode())
    proxy.rule = lambda data: None if hit(data) else data
    with pytest.raises(
        StorageError, match=rf"/{name}': .*; the object store does not respond; .* same command to resume"
    ):
        build(src, out, SETTINGS)
    left = contents(out)
    assert not [path for path in left if path.endswith(name) or path.startswith((LOCK, ".gpu-npz/beat"))]
    for path in left:
        if path.startswith(".gpu-npz/commits/"):
            assert f"{Path(path).stem}.npz" in left
    with pytest.raises((IncompleteError, FormatError)):
        Manifest.load(out)
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
    proxy.rule = lambda data: data
    assert build(src, out, SETTINGS).complete
    assert verify(out).ok


def test_a_multipart_upload_that_is_cut_leaves_no_object(
    out: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    storage = ObjectStorage(out)
    temporary = storage.temporary("shard")
    Path(temporary).write_bytes(bytes(12 << 20))
    proxy.rule = lambda data: None if re.match(rb"PUT \S*partNumber=2", data) else data
    with pytest.raises(StorageError, match="the object store does not respond"):
        storage.publish(temporary, "shard")
    assert storage.names() == []
    proxy.rule = lambda data: data
    storage.publish(temporary, "shard")
    assert storage.size("shard") == 12 << 20


def test_a_build_that_is_killed_while_it_uploads_goes_on(src: Path, out: str, proxy: Proxy, tmp_path: Path) -> None:
    code = (
        "import sys; from gpu_npz import BuildConfig, build\n"
        "build(*sys.argv[1:3], BuildConfig(size=16, shard_size=2, workers=0, device='cpu'))"
    )
    hit, reached = puts(rb"\S*/shard-00002.npz"), threading.Event()

    def stall(data: bytes) -> bytes:
        if reached.is_set():
            return b""  # the rest of the file, or of its header, may come in pieces
        if hit(data):
            reached.set()
            return data[:1024]
        return data

    proxy.rule = stall
    environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": proxy.url, "TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen([sys.executable, "-c", code, src, out], env=environment) as process:
        assert reached.wait(60)
        process.kill()
    proxy.rule = lambda data: data
    assert "shard-00002.npz" not in contents(out)
    assert LOCK in contents(out)
    assert len(list((tmp_path / "scratch").iterdir())) >= 1
    assert build(src, out, SETTINGS).complete
    assert verify(out).ok
    assert [path for path in contents(out) if path.startswith((LOCK, ".gpu-npz/beat"))] == []
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def answer(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>as the test says</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_a_store_that_asks_for_patience_gets_it(out: str, proxy: Proxy) -> None:
    storage, turns = ObjectStorage(out), iter(["503 Slow Down", "500 Internal Server Error"])

    def busy(data: bytes) -> bytes:
        turn = next(turns, None) if data.startswith(b"PUT") else None
        return data if turn is None else answer(turn, "SlowDown" if "503" in turn else "InternalError")

    proxy.rule = busy
    storage.write("file", b"content")
    assert next(turns, None) is None
    assert storage.read("file") == b"content"


def test_a_store_that_refuses_is_not_asked_twice_and_the_rights_are_named(src: Path, out: str, proxy: Proxy) -> None:
    asked = []

    def refuse(data: bytes) -> bytes:
        if not data.startswith(b"PUT"):
            return data
        asked.append(data)
        return answer("403 Forbidden", "AccessDenied")

    proxy.rule = refuse
    with pytest.raises(StorageError, match="as the test says; request permission to list the bucket and to get, put"):
        build(src, out, SETTINGS)
    assert len(asked) == 1
    proxy.rule = lambda data: data
    assert contents(out) == {}


def test_a_bucket_that_does_not_exist_is_told(src: Path, out: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/out\S*': The specified bucket does not exist; create"):
        build(src, "s3://no-such-bucket/out", SETTINGS)
    with pytest.raises(StorageError, match="The specified bucket does not exist; check the name of the bucket"):
        Manifest.load("s3://no-such-bucket/out")


def test_missing_credentials_are_told_with_where_to_put_them(
    src: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"Unable to locate credentials; log in .*AWS_ACCESS_KEY_ID"):
        build(src, out, SETTINGS)


def test_a_server_that_is_not_there_is_told(src: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{closed}"})
    with pytest.raises(
        StorageError, match=f"127.0.0.1:{closed}.*; the object store does not respond; check the network"
    ):
        build(src, out, SETTINGS)


def test_a_full_temporary_folder_is_told_by_its_name(storage: ObjectStorage, tmp_path: Path) -> None:
    storage.temporary("shard")
    with pytest.raises(StorageError) as caught, storage.explained("shard"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"is made in '{tmp_path / 'scratch'}/" in str(caught.value)
    assert "No space left on device; free some space there or set TMPDIR" in str(caught.value)


# One build at a time


def foreign(token: str = "4711-abc") -> bytes:
    return json.dumps({"host": "node-17", "process": 4711, "place": "elsewhere", "token": token}).encode()


def test_a_second_build_is_refused_and_told_who_holds_out(src: Path, storage: ObjectStorage) -> None:
    who = f"is in use by process {os.getpid()} on host {socket.gethostname()} .*; wait for it, or stop it"
    with storage.lock():
        assert storage.live_locks() == ["lock"]
        with pytest.raises(LockedError, match=who):
            build(src, storage.root, SETTINGS)
        storage.require_held()
        with storage.lock("lock-part-2-of-8"):
            assert storage.live_locks() == ["lock", "lock-part-2-of-8"]
    assert storage.live_locks() == []
    assert storage.names(".gpu-npz") == []
    with storage.lock():
        pass


def test_a_lock_is_waited_for(storage: ObjectStorage) -> None:
    order = []

    def other() -> None:
        with ObjectStorage(storage.root).lock(wait_s=60):
            order.append("taken")

    with storage.lock():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("released")
    thread.join()
    assert order == ["released", "taken"]


def test_the_lock_of_a_process_of_this_machine_that_died_is_taken_over_at_once(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "STALE_S", 600.0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    holder = {"host": socket.gethostname(), "process": dead.pid, "place": holders.place(), "token": "t"}
    storage.put(LOCK, json.dumps(holder).encode())
    storage.put(".gpu-npz/beat-t", b"3")
    assert storage.live_locks() == []
    with storage.lock():
        assert json.loads(storage.read(LOCK) or b"")["process"] == os.getpid()
    assert storage.names(".gpu-npz") == []


def test_the_lock_of_another_host_is_respected_while_its_heart_beats(storage: ObjectStorage) -> None:
    storage.put(LOCK, foreign())
    over = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            storage.put(".gpu-npz/beat-4711-abc", str(number).encode())
            if over.wait(0.1):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert storage.live_locks() == ["lock"]
        with pytest.raises(LockedError, match="process 4711 on host node-17"), storage.lock():
            pass
        with pytest.raises(LockedError, match="process 4711 on host node-17"), storage.lock(wait_s=2):
            pass
    finally:
        over.set()
        thread.join()
    assert storage.read(LOCK) == foreign()
    with storage.lock():  # and no longer
        pass


@pytest.mark.parametrize("conditional", [True, False], ids=["if-none-match", "ignored"])
def test_of_two_that_wait_for_the_lock_of_a_dead_host_one_has_it(
    out: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    create, one_by_one = ObjectStorage.create, threading.Lock()

    def atomic(storage: ObjectStorage, name: str, content: bytes) -> bool:
        with one_by_one:  # moto looks whether there is an object, then writes it; S3 does both in one step
            return create(storage, name, content)

    monkeypatch.setattr(ObjectStorage, "create", atomic)
    if not conditional:
        proxy.rule = lambda data: re.sub(rb"(?i)if-none-match: \*\r\n", b"", data)
    storage = ObjectStorage(out)
    storage.put(LOCK, foreign())
    ends = race(lambda: ObjectStorage(out).lock())
    assert ends[0] == "won"
    assert f"in use by process {os.getpid()} " in ends[1]
    assert len(ends) == 2
    assert storage.names(".gpu-npz") == []


def test_where_if_none_match_is_ignored_a_lock_is_read_again_before_it_counts(
    out: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ObjectStorage(out).create("file", b"") is ObjectStorage(out).creates_once("file") is True
    proxy.rule = lambda data: re.sub(rb"(?i)if-none-match: \*\r\n", b"", data)
    storage, create = ObjectStorage(out), ObjectStorage.create
    assert storage.creates_once("file") is False

    def overtaken(storage: ObjectStorage, name: str, content: bytes) -> bool:
        created = create(storage, name, content)
        if created and name == LOCK:
            storage.put(LOCK, b"of another that looked at the same moment and wrote later")
        return created

    monkeypatch.setattr(ObjectStorage, "create", overtaken)
    with pytest.raises(LockedError), storage.lock():
        pass


def test_a_claim_whose_maker_died_is_not_respected_for_ever(storage: ObjectStorage) -> None:
    storage.put(LOCK, foreign())
    storage.put(".gpu-npz/claim-4711-abc", b"of a process that died")
    with storage.lock():
        pass
    assert storage.names(".gpu-npz") == []


def test_who_lost_the_lock_publishes_nothing_more(storage: ObjectStorage) -> None:
    storage.write("before", b"")
    temporary = storage.temporary("shard")
    Path(temporary).touch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError))  # also of leaving the lock
        stack.enter_context(storage.lock())
        storage.put(LOCK, foreign())
        for act in (
            storage.require_held,
            lambda: storage.write("after", b""),
            lambda: storage.publish(temporary, "shard"),
            lambda: storage.remove("before"),
        ):
            with pytest.raises(LockedError, match="was taken over by process 4711 on host node-17"):
                act()
    assert storage.names() == [".gpu-npz", "before"]
    assert storage.read(LOCK) == foreign()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": null}', b"\xff\x00"])
def test_a_lock_that_says_nothing_is_respected_and_the_way_out_is_told(storage: ObjectStorage, content: bytes) -> None:
    storage.put(LOCK, content)
    with pytest.raises(LockedError, match=f"if no build is running, delete '{storage.path(LOCK)}'$"), storage.lock():
        pass
    assert storage.read(LOCK) == content


def test_what_is_left_of_locks_is_removed_and_nothing_of_live_ones(storage: ObjectStorage) -> None:
    storage.put(".gpu-npz/beat-gone", b"7")
    storage.put(".gpu-npz/claim-gone", b"7")
    storage.put(".gpu-npz/lock-part-1-of-2", foreign())
    storage.put(".gpu-npz/beat-4711-abc", b"7")
    with storage.lock():
        storage.remove_temporaries(".gpu-npz")
    assert storage.names(".gpu-npz") == ["beat-4711-abc", "lock-part-1-of-2"]


def losing_before(storage: ObjectStorage, call: str, act: Callable[[], None]) -> Callable[..., Any]:
    """A request of the client, before which something happens once."""
    real, turns = getattr(storage._files, call), iter([act])

    def late(*values: Any, **options: Any) -> Any:
        next(turns, lambda: None)()
        return real(*values, **options)

    return late


@pytest.mark.parametrize("there", [None, b"the other's"])
@pytest.mark.parametrize("size", [1000, 12 << 20], ids=["one put", "multipart"])
def test_a_lock_that_is_lost_during_an_upload_publishes_nothing(
    out: str, monkeypatch: pytest.MonkeyPatch, size: int, there: bytes | None
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    storage = ObjectStorage(out)
    temporary = storage.temporary("shard")
    Path(temporary).write_bytes(bytes(size))

    def lose() -> None:
        storage.put(LOCK, foreign())
        if there is not None:
            storage.put("shard", there)

    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError))
        stack.enter_context(storage.lock())
        monkeypatch.setattr(storage._files, "put_file", losing_before(storage, "put_file", lose))
        with pytest.raises(LockedError, match="was taken over by process 4711 on host node-17"):
            storage.publish(temporary, "shard")
    assert storage.read("shard") == there


@pytest.mark.parametrize("there", [b"the other's", b"ours"])
def test_a_lock_that_is_lost_before_a_deletion_deletes_nothing_of_the_other(
    out: str, monkeypatch: pytest.MonkeyPatch, there: bytes
) -> None:
    storage = ObjectStorage(out)

    def lose() -> None:
        storage.put(LOCK, foreign())
        storage.put("file", there)

    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError))
        stack.enter_context(storage.lock())
        storage.write("file", b"ours")
        monkeypatch.setattr(storage._files, "call_s3", losing_before(storage, "call_s3", lose))
        with pytest.raises(LockedError):
            storage.remove("file")
    assert storage.read("file") == there


def test_under_a_lock_objects_are_replaced_and_removed(storage: ObjectStorage) -> None:
    with storage.lock():
        for content in (b"1", b"2"):
            storage.write("file", content)
            assert storage.read("file") == content
        storage.remove("file")
        storage.remove("file")
        assert storage.names() == [".gpu-npz"]


def test_a_put_whose_answer_was_lost_is_known_for_ones_own(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(out)
    real, turns = storage._files.pipe_file, iter([None])

    def cut(*values: Any, **options: Any) -> None:
        real(*values, **options)
        for _ in turns:
            raise TimeoutError("no answer")

    with storage.lock(), monkeypatch.context() as patched:
        patched.setattr(storage._files, "pipe_file", cut)
        deleted: list[str] = []
        patched.setattr(storage._files, "rm_file", deleted.append)
        storage.write("file", b"content")
        assert deleted == []
        assert storage.read("file") == b"content"


def test_a_worker_works_under_the_lock_of_its_parent_and_no_longer(storage: ObjectStorage) -> None:
    assert_a_worker_needs_its_parents_lock(storage)


def uploads(storage: ObjectStorage) -> set[str]:
    found = storage._files.call_s3("list_multipart_uploads", Bucket=storage._key.split("/")[0])
    return {upload["Key"].rpartition("out/")[2] for upload in found.get("Uploads", [])}


def test_multipart_uploads_of_killed_builds_are_ended_and_no_others(out: str) -> None:
    storage = ObjectStorage(out)
    bucket, _, key = storage._key.partition("/")
    names = ("shard-00000.npz", "shard-00001.npz", "index.npz", ".gpu-npz/plan.npz", "video.mp4", "val/shard-00000.npz")
    for name in names:
        storage._files.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{name}")
    with storage.lock("lock-part-1-of-2"):
        storage.remove_leftovers("shard-00000.npz")
        assert uploads(storage) == {*names[1:]}
        with ObjectStorage(out).lock("lock-part-2-of-2"):  # whose uploads they may be
            storage.remove_temporaries("")
            assert uploads(storage) == {*names[1:]}
        for folder in ("", ".gpu-npz"):
            storage.remove_temporaries(folder)
        assert uploads(storage) == {"video.mp4", "val/shard-00000.npz"}
