"""Folders of images on an object store: the same items as on a disk, and whose trouble is whose."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, items, labelled, python, read_shards

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import fsspec
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from gpu_npz.builder.planning import check_places
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.selection import listed
from gpu_npz.errors import ShardError, SourceError, UsageError
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, read_item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.folders.remote import RemoteSource
from gpu_npz.sources.rejects import MAX_ENCODED_BYTES, BadItem
from gpu_npz.storage import open_storage

pytestmark = pytest.mark.filterwarnings(r"ignore:datetime\.datetime\.utcnow:DeprecationWarning:(boto|moto)")
_number = itertools.count()
Put = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """Nobody waits, and no credentials but the test's are found, here or in a process that it starts."""
    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "FSSPEC_S3_ENDPOINT_URL": server,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server})


@pytest.fixture(params=["s3", "memory"])
def put(request: pytest.FixtureRequest) -> Put:
    """`put({"a/1.jpg": b"..."})`: the URL of a new folder that has these."""
    return lambda objects: _stored(request.param, objects)


@pytest.fixture
def put_s3() -> Put:
    return lambda objects: _stored("s3", objects)


def _stored(protocol: str, objects: dict[str, bytes]) -> str:
    store = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    bucket = f"{protocol}://images-{next(_number)}"
    store.mkdir(bucket)
    store.pipe({f"{bucket}/some/src/{name}": content for name, content in objects.items()})
    return f"{bucket}/some/src"


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_remote_folder_lists_and_reads_what_a_local_one_does(put: Put, tree: Path) -> None:
    remote, local = open_source(put(tree_of(tree))), FolderSource(tree)
    assert isinstance(remote, RemoteSource)
    assert (remote.kind, remote.class_names, remote.files) == ("folder", local.class_names, ())
    assert labelled(remote) == labelled(local) == labelled(pickle.loads(pickle.dumps(remote)))
    copy = pickle.loads(pickle.dumps(remote))
    for item in items(remote):
        content = (tree / item.path).read_bytes()
        assert read_item(remote, item) == content
        assert read_item(copy, item._replace(place=())) == content  # as after .gpu-npz was lost


def test_names_are_taken_as_from_a_disk(put: Put) -> None:
    names = ["b/2.jpg", "b/deep/1.PNG", "a/z z.jpg", "a/ü+%20&?.jpg", "a/notes.txt", ".hidden/1.jpg", "a/.1.jpg"]
    source = open_source(put(dict.fromkeys(names, b"x")))
    assert source.class_names == ("a", "b")
    assert labelled(source) == [("a/z z.jpg", 0), ("a/ü+%20&?.jpg", 0), ("b/2.jpg", 1), ("b/deep/1.PNG", 1)]
    assert {read_item(source, item) for item in items(source)} == {b"x"}


def test_classes_flat_folders_and_mixtures_follow_the_rules_of_folders(put: Put) -> None:
    url = put({"a/1.jpg": b"x", "c/2.jpg": b"x"})
    assert labelled(open_source(url + "/", classes=["c", "b", "a"])) == [("a/1.jpg", 2), ("c/2.jpg", 0)]
    with pytest.raises(SourceError, match="1 classes that are not in the given list: 'c'"):
        open_source(url, classes=["a"])
    flat = open_source(put({"2.jpg": b"x", "1.jpg": b"x"}))
    assert (flat.class_names, labelled(flat)) == (None, [("1.jpg", None), ("2.jpg", None)])
    with pytest.raises(SourceError, match=r"both images .* and folders of images"):
        open_source(put({"1.jpg": b"x", "a/2.jpg": b"x"}))


def test_what_consoles_leave_and_names_that_no_folder_has_are_no_items(put_s3: Put) -> None:
    source = open_source(put_s3({"": b"", "a/": b"", "a/1.jpg": b"x", "a//2.jpg": b"x", "a/../3.jpg": b"x"}))
    assert (source.class_names, labelled(source)) == (("a",), [("a/1.jpg", 0)])
    assert [name.rpartition("/a/")[2] for name in source.impossible] == ["/", "../"]


def test_a_build_says_which_keys_no_folder_could_have(put_s3: Put, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(put_s3({"a/1.jpg": b"x", "b//2.jpg": b"x", "c/./3.jpg": b"x"}))
    assert labelled(source) == [("a/1.jpg", 0)]
    listed(source, BuildConfig())
    said = [record.getMessage() for record in caplog.records]
    assert sum("2 names that no folder could have are left out" in each and "/b//'" in each for each in said) == 1
    assert any("2 class folders have no images" in each for each in said)


def test_a_listing_of_many_pages_is_whole(put_s3: Put) -> None:
    names = [f"a/{number:04d}.jpg" for number in range(1_100)]  # S3 lists a thousand at a time
    url = put_s3({names[0]: b"x"})
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    held = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for name in names[1:]:
        held.put_object(bucket, f"{folder}/{name}", b"x")
    assert [path for path, _ in labelled(open_source(url))] == names


def test_objects_that_are_gone_empty_or_too_large_are_rejects(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put({"a/1.jpg": b"x", "a/2.jpg": b"", "a/3.jpg": b"x" * 100})
    source = open_source(url)
    gone, empty, large = items(source)
    fsspec.filesystem(url.partition(":")[0]).rm(f"{url}/a/1.jpg")
    monkeypatch.setattr("gpu_npz.sources.access.stores.MAX_ENCODED_BYTES", 99)
    for item, code in ((gone, "missing"), (empty, "empty"), (large, "too-large")):
        with pytest.raises(BadItem) as caught:
            read_item(source, item)
        assert caught.value.code == code
    assert MAX_ENCODED_BYTES > 99


def test_an_object_that_was_replaced_since_is_read_as_it_is(put: Put) -> None:
    url = put({"a/1.jpg": b"x" * 10, "a/2.jpg": b"x" * 10, "a/3.jpg": b""})
    source = open_source(url)
    contents = [b"y" * 1_000, b"y", b"y"]
    for item, content in zip(items(source), contents, strict=True):
        fsspec.filesystem(url.partition(":")[0]).pipe_file(f"{url}/{item.path}", content)
    assert [read_item(source, item) for item in items(source)] == contents
    stale = [Item(0, "a/1.jpg", None, (10,)), Item(1, "a/2.jpg", None, (10,))]
    assert [read_item(source, item) for item in stale] == contents[:2]


class Answers:
    """A client of a store that gives wrong answers first."""

    def __init__(self, store: Any, *wrong: Any) -> None:
        self._store, self.wrong = store, list(wrong)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def cat_file(self, *arguments: Any, **named: Any) -> Any:
        if not self.wrong:
            return self._store.cat_file(*arguments, **named)
        if isinstance(answer := self.wrong.pop(0), Exception):
            raise answer
        return answer


def test_trouble_of_the_store_is_tried_again_and_is_no_reject(put: Put) -> None:
    source: Any = open_source(put({"a/1.jpg": b"content"}))
    (item,) = items(source)
    whole = source._store
    for trouble in (OSError(16, "SlowDown"), TimeoutError(), ConnectionResetError(), RuntimeError("a client's own")):
        source._fs = Answers(whole, trouble, trouble, trouble)
        assert read_item(source, item) == b"content"
        source._fs = Answers(whole, *[trouble] * 9)
        with pytest.raises(ShardError, match=r"reading 'a/1\.jpg' failed 4 times: .*run the same command to resume"):
            read_item(source, item)


def test_a_body_that_was_cut_off_never_becomes_an_image(put: Put) -> None:
    source: Any = open_source(put({"a/1.jpg": b"content"}))
    (item,) = items(source)
    whole = source._store
    source._fs = Answers(whole, b"con", b"cont", b"con")
    assert read_item(source, item) == b"content"
    source._fs = Answers(whole, *[b"con"] * 20)
    with pytest.raises(ShardError, match="3 of 7 bytes came"):
        read_item(source, item)


def test_without_permission_an_object_is_a_reject_and_a_bucket_is_an_error(put: Put) -> None:
    source: Any = open_source(put({"a/1.jpg": b"content"}))
    (item,) = items(source)
    source._fs = store = Answers(source._store, PermissionError("AccessDenied"))
    with pytest.raises(BadItem) as caught:
        read_item(source, item)
    assert caught.value.code == "unreadable"

    def expired(*_: object) -> None:
        raise PermissionError("ExpiredToken")

    store.wrong, store.info = [PermissionError("ExpiredToken")], expired  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match="no permission; request permission to list"):
        read_item(source, item)


def test_a_bucket_that_vanished_is_an_error_and_its_objects_are_no_rejects(put_s3: Put) -> None:
    url = put_s3({"a/1.jpg": b"content"})
    source = open_source(url)
    source.check()
    (item,) = items(source)
    fsspec.filesystem("s3").rm(url.partition("/some")[0], recursive=True)
    with pytest.raises(SourceError, match="not there; check the names of bucket and folder"):
        read_item(source, item)


def test_what_cannot_be_listed_is_refused_with_advice(
    put_s3: Put, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    url = put_s3({"a/1.jpg": b"x", "b.jpg": b"x"})
    for wrong in ("s3://no-such-bucket", "s3://no-such-bucket/a", f"{url}/none", "memory://none/at/all"):
        with pytest.raises(SourceError, match="not there; check the names of bucket and folder in SRC"):
            open_source(wrong)
    with pytest.raises(SourceError, match="is a file; give SRC as a folder"):
        open_source(f"{url}/b.jpg")
    with pytest.raises(SourceError, match=r"cannot list a folder; give a table .* --root .*\.tar or \.zip"):
        open_source("https://host/images")
    with pytest.raises(SourceError, match="give a path, s3://"):
        open_source("nonsense://host/images")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "s3fs", None)
        with pytest.raises(SourceError, match=r"run: pip install 's3fs>=2024\.12'"):
            open_source("s3a://bucket/images")
    with monkeypatch.context() as patched:
        patched.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
        with pytest.raises(SourceError, match="check the network and the endpoint"):
            open_source(url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server, "token": None})
    with pytest.raises(SourceError, match=r"log in \(for S3: `aws configure`"):
        open_source(url)


def test_the_command_builds_checks_and_mends_a_dataset_of_a_bucket(
    put_s3: Put, tree: Path, tmp_path: Path, make_dataset: MakeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"apples/zzz.jpg": b"no image"}
    url = put_s3({**tree_of(tree), **broken})
    out = str(tmp_path / "out")
    settings = ("--size", "12x16", "--shard-size", "7", "--device", "cpu")
    python("-m", "gpu_npz", "build", url, out, *settings, "--workers", "2")
    same = make_dataset(tree)
    for name in ("images", "labels", "paths"):
        assert np.array_equal(read_shards(tmp_path / "out", name), read_shards(same, name))
    for command in (["stats", url, "--device", "cpu", "--size", "12x16"], ["verify", out, "--deep", "41"]):
        assert run(command) == 0
    capsys.readouterr()
    assert run(["plan", url, *settings]) == 0
    assert "41" in capsys.readouterr().out
    fsspec.filesystem("s3").pipe_file(f"{url}/apples/zzz.jpg", next(tree.rglob("*.jpg")).read_bytes())
    python("-m", "gpu_npz", "retry", out, "--device", "cpu")
    assert "apples/zzz.jpg" in read_shards(tmp_path / "out", "paths")
    assert len(read_shards(tmp_path / "out", "paths")) == 41
    assert run(["verify", out, "--deep", "41"]) == 0
    assert run(["build", url, out, *settings]) == 0  # finished: the same command says so


def test_a_build_with_workers_inside_reads_ahead_and_gives_the_same(
    put: Put, tree: Path, make_dataset: MakeDataset
) -> None:
    out = make_dataset(put(tree_of(tree)))
    assert np.array_equal(read_shards(out), read_shards(make_dataset(tree)))


def test_a_source_is_opened_again_by_its_own_settings(put: Put) -> None:
    source = open_source(put({"a/1.jpg": b"x"}))
    again = open_source(source.location, BuildConfig(source="folder"), source.class_names)
    assert labelled(again) == labelled(source)


def test_out_inside_of_a_remote_src_is_refused() -> None:
    with pytest.raises(UsageError, match="lies inside SRC"):
        check_places("memory://images", open_storage("memory://images/out"))
    check_places("memory://images", open_storage("memory://images-out"))
    check_places("memory://images", open_storage("/tmp/out"))
