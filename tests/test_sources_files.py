"""Files that hold many items: how they are found; a read gives the bytes asked for or an error, on the web, too."""

from __future__ import annotations

import errno
import gc
import gzip
import http.server
import multiprocessing
import os
import pickle
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, read_shards, reject_lines

from gpu_npz.config import BuildConfig
from gpu_npz.errors import ShardError, SourceError
from gpu_npz.sources import open_source
from gpu_npz.sources.access import files as files_module
from gpu_npz.sources.access.files import Files
from gpu_npz.sources.base import Group, Item, Source, read_item
from gpu_npz.sources.rejects import BadItem

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 3000, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that hold their own names."""
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "c.txt", "[x]{1,2}*.tar", "sub/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


# What is found


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{10..08}.tar", ["a-10.tar", "a-09.tar", "a-08.tar"]),
        ("{b,a-09}.tar", ["b.tar", "a-09.tar"]),
        ("{sub/d,b}.tar", ["sub/d.tar", "b.tar"]),
        ("a-*.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-[01]?.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{c,a-0*}.t*", ["c.txt", "a-08.tar", "a-09.tar"]),
        ("[x]{1,2}*.tar", ["[x]{1,2}*.tar"]),
        ("b.tar", ["b.tar"]),
    ],
)
def test_patterns_find_files_in_their_order(folder: Path, pattern: str, names: list[str]) -> None:
    files = Files(str(folder / pattern))
    assert files.names == names
    assert files.stamps == tuple((name, len(name)) for name in names)
    assert [files.read(number, 0, 100).decode() for number in range(len(files))] == names


def test_ranges_are_padded_as_bash_pads_them() -> None:
    assert list(files_module._expanded("{000..099}")) == [f"{number:03}" for number in range(100)]
    assert list(files_module._expanded("{8..11}")) == ["8", "9", "10", "11"]
    assert list(files_module._expanded("{a,b}{1..2}")) == ["a1", "a2", "b1", "b2"]
    assert list(files_module._expanded("{1..2}{a,b}")) == ["1a", "1b", "2a", "2b"]
    assert list(files_module._expanded("{a}{}")) == ["{a}{}"]
    with pytest.raises(SourceError, match="expands to more than 1000000 files"):
        files_module._expanded("{0..9999999999}")
    for pattern in (f"{{0..{'9' * 5000}}}", f"{{{'0' * 4000}..1}}", "{1..1}" * 2000, "{a,b}" * 2000):
        with pytest.raises(SourceError, match=r"its \{\.\.\.\} are too many, or have numbers of more than 18 digits"):
            files_module._expanded(pattern)


def test_a_folder_is_taken_by_the_names_inside(folder: Path) -> None:
    assert Files(str(folder), "*.tar").names == ["[x]{1,2}*.tar", "a-08.tar", "a-09.tar", "a-10.tar", "b.tar"]
    assert Files(f"file://{folder}/sub", "*.tar").names == ["d.tar"]


@pytest.mark.parametrize("pattern", ["none.tar", "none-*.tar", "a-{07..08}.tar", "c.txt/x", ""])
def test_what_is_not_there_is_an_error_that_names_it(folder: Path, pattern: str) -> None:
    with pytest.raises(SourceError, match="give a file, a pattern in quotes, or a URL"):
        Files(str(folder / pattern), "*.none")


# What is read


def test_a_read_gives_the_part_asked_for_and_never_more_than_was_found(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    files = Files(str(tmp_path / "f"))
    for copy in (files, pickle.loads(pickle.dumps(files))):
        assert copy.read(0, 10, 20) == CONTENT[10:30]
        assert copy.read(0, 2990, 100) == CONTENT[2990:]
        assert copy.read(0, 3000, 1) == copy.read(0, 9999, 1) == copy.read(0, 5, 0) == b""
    for number, start in ((1, 0), (-1, 0), (0, -1)):
        with pytest.raises(OSError, match="no byte") as caught:
            files.read(number, start, 1)
        assert caught.value.errno == errno.EINVAL
    with open(tmp_path / "f", "ab") as file:
        file.write(b"more")
    assert files.read(0, 2990, 100) == CONTENT[2990:]
    os.truncate(tmp_path / "f", 100)
    with pytest.raises(OSError, match="90 of 200 bytes came") as caught:
        files.read(0, 10, 200)
    assert caught.value.errno == errno.EIO


def test_more_files_than_stay_open_are_read_by_many_threads(tmp_path: Path) -> None:
    count = 5 * files_module._OPEN_FILES
    for number in range(count):
        (tmp_path / f"{number:03}").write_bytes(b"%03d" % number * 100)
    files = Files(str(tmp_path))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, count, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(partial(files.read, start=3, size=3), order)
        assert list(read) == [b"%03d" % number for number in order]
    assert len(os.listdir("/proc/self/fd")) <= before + files_module._OPEN_FILES
    del files, read
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def in_a_fork(action: Callable[[], bytes]) -> bytes:
    """What an action gives in a forked child."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    child = context.Process(target=lambda: its.send_bytes(action()))
    child.start()
    its.close()
    try:
        assert ours.poll(30), "the child waits for ever"
        return ours.recv_bytes()
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_reads_though_a_thread_was_reading(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    files = Files(str(tmp_path / "f"))
    assert files.read(0, 0, 1) == CONTENT[:1]
    with files._lock:
        assert in_a_fork(lambda: files.read(0, 10, 20)) == CONTENT[10:30]
    assert files.read(0, 10, 20) == CONTENT[10:30]


def test_a_file_is_opened_to_read_and_to_seek(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    files = Files(str(tmp_path / "f"))
    with files.opened(0) as file:
        assert (file.read(7), file.seek(-5, os.SEEK_END), file.read()) == (CONTENT[:7], 2995, CONTENT[-5:])
    files.check()
    os.remove(tmp_path / "f")
    with pytest.raises(SourceError, match="is missing; restore it"):
        Files.check(pickle.loads(pickle.dumps(files)))


# The web

Behaviour = Callable[["Handler", bytes], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, each in the way that the first part of its path says."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        _, behaviour, name = self.path.split("/", 2)
        content = self.server.files.get(name)
        if content is None:
            self.answer(404)
        else:
            BEHAVIOURS[self.server.now.get(behaviour, behaviour)](self, content)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def asked_part(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{size - 1}"))
        assert match
        return int(match[1]), min(int(match[2]) + 1, size)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """`now` lets one behaviour become another while the test runs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"f": CONTENT}
        self.asked: Counter[str] = Counter()
        self.now: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up in the middle of a body are part of these tests."""


def plain(handler: Handler, content: bytes, **headers: str) -> None:
    if "Range" not in handler.headers:
        return handler.answer(200, content, **headers)
    start, stop = handler.asked_part(len(content))
    if start >= len(content):
        return handler.answer(416, Content_Range=f"bytes */{len(content)}")
    given = {"Content_Range": f"bytes {start}-{stop - 1}/{len(content)}", **headers}
    return handler.answer(206, content[start:stop], **given)


def twice_500(handler: Handler, content: bytes) -> None:
    request = f"{handler.path} {handler.headers.get('Range')}"
    handler.server.asked[request] += 1
    if handler.server.asked[request] % 3:
        handler.answer(500, b"an error page")
    else:
        plain(handler, content)


def cut(handler: Handler, content: bytes) -> None:
    start, stop = handler.asked_part(len(content))
    partial = {"Content_Range": f"bytes {start}-{stop - 1}/{len(content)}"} if "Range" in handler.headers else {}
    handler.close_connection = True
    half = content[start : start + (stop - start) // 2]
    handler.answer(206 if partial else 200, half, Content_Length=str(stop - start), **partial)


def shorter(handler: Handler, content: bytes) -> None:
    """As `cut`, but with a Content-Length that hides it."""
    start, stop = handler.asked_part(len(content))
    body = content[start : start + (stop - start + 1) // 2]
    handler.answer(206, body, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")


def without_length(handler: Handler, content: bytes) -> None:
    handler.close_connection = True
    plain(handler, content, Content_Length="", Connection="close")


def without_range_and_length(handler: Handler, content: bytes) -> None:
    handler.close_connection = True
    handler.answer(200, content, Content_Length="", Connection="close")


def lying(handler: Handler, content: bytes) -> None:
    """Another part than the one asked for."""
    start, stop = handler.asked_part(len(content))
    moved = f"bytes {start + 1}-{stop}/{len(content)}"
    handler.answer(206, content[start + 1 : stop + 1], Content_Range=moved)


def too_much(handler: Handler, content: bytes) -> None:
    start, stop = handler.asked_part(len(content))
    handler.answer(206, content, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")


def to(location: str) -> Behaviour:
    return lambda handler, _: handler.answer(302, Location=location)


BEHAVIOURS: dict[str, Behaviour] = {
    "plain": plain,
    "refused": lambda handler, _: handler.answer(414),
    "too-many-requests": lambda handler, _: handler.answer(429),
    "compressed": lambda handler, _: handler.answer(200, gzip.compress(bytes(1 << 20)), Content_Encoding="gzip"),
    "to-elsewhere": to("http://localhost:9/x.png"),
    "to-parent": lambda handler, _: handler.answer(302, Location="%2e%2e/%2e%2e/plain/secret.png"),
    "forbidden": lambda handler, _: handler.answer(403),
    "gone": lambda handler, _: handler.answer(404),
    "broken": lambda handler, _: handler.answer(500),
    "twice-500": twice_500,
    "cut": cut,
    "shorter": shorter,
    "moved": lambda handler, _: handler.answer(301, Location=handler.path.replace("/moved/", "/plain/")),
    "to-file": to("file:///etc/passwd"),
    "to-itself": lambda handler, _: handler.answer(302, Location=handler.path),
    "no-range": lambda handler, content: handler.answer(200, content),
    "no-range-no-length": without_range_and_length,
    "lying": lying,
    "no-content-range": lambda handler, content: handler.answer(206, content[:1]),
    "too-much": too_much,
    "no-length": without_length,
    "longer": lambda handler, content: plain(handler, content + b"x"),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("gpu_npz.sources.base.RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    with Server() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


class Parts(Source):
    """Parts of one file; place: first byte, size."""

    kind = "parts"

    def __init__(self, files: Files) -> None:
        self.files_read, self.location = files, files.location

    def groups(self) -> Iterator[Group]:
        yield from ()

    def read(self, item: Item) -> bytes:
        return self.files_read.read(0, *item.place)

    def check(self) -> None:
        self.files_read.check()


PART = Item(0, "part", None, (1000, 500))


@pytest.mark.parametrize("behaviour", ["plain", "moved", "no-length", "no-range", "twice-500"])
def test_a_file_on_the_web_is_read_by_parts(server: Server, behaviour: str) -> None:
    files = Files(f"{server.url}/{behaviour}/f")
    assert files.stamps == (("f", 3000),)
    assert files.reads_at_once > 1
    for copy in (files, pickle.loads(pickle.dumps(files))):
        assert read_item(Parts(copy), PART) == CONTENT[1000:1500]
        assert read_item(Parts(copy), PART._replace(place=(2900, 500))) == CONTENT[2900:]
        assert copy.read(0, 3000, 10) == b""
    with files.opened(0) as file:
        assert (file.read(7), file.seek(-5, os.SEEK_END), file.read()) == (CONTENT[:7], 2995, CONTENT[-5:])


@pytest.mark.parametrize(
    ("behaviour", "number", "outcome"),
    [
        ("forbidden", errno.EACCES, SourceError),
        ("gone", errno.ENOENT, SourceError),
        ("broken", errno.EIO, ShardError),
        ("cut", errno.EIO, ShardError),
        ("shorter", errno.EIO, ShardError),
        ("to-file", errno.EINVAL, SourceError),
        ("to-itself", errno.EINVAL, SourceError),
        ("refused", errno.EINVAL, SourceError),
        ("too-many-requests", errno.EIO, ShardError),
        ("compressed", errno.EINVAL, SourceError),
        ("no-range-no-length", errno.ENOTSUP, ShardError),
        ("lying", errno.EIO, ShardError),
        ("no-content-range", errno.EIO, ShardError),
        ("too-much", errno.EIO, ShardError),
        ("longer", errno.EIO, ShardError),
    ],
)
def test_a_wrong_answer_is_an_error_and_never_bytes(
    server: Server, behaviour: str, number: int, outcome: type[Exception]
) -> None:
    server.now["some"] = "plain"
    files = Files(f"{server.url}/some/f")
    server.now["some"] = behaviour
    with pytest.raises(OSError, match=r"^\[Errno") as caught:
        files.read(0, *PART.place)
    assert caught.value.errno == number
    with pytest.raises(outcome):
        read_item(Parts(files), PART)
    server.now["some"] = "plain"
    assert read_item(Parts(files), PART) == CONTENT[1000:1500]


@pytest.mark.parametrize(
    ("behaviour", "what"),
    [
        ("forbidden", "no permission"),
        ("gone", "not there"),
        ("broken", "HTTP status 500"),
        ("to-file", "NonHttpUrlRedirect"),
        ("no-range-no-length", "does not give parts of a file .*download it first"),
        ("lying", "HTTP status 206"),
        ("no-content-range", "HTTP status 206"),
    ],
)
def test_a_file_that_cannot_be_read_by_parts_is_refused_at_once(server: Server, behaviour: str, what: str) -> None:
    with pytest.raises(SourceError, match=what):
        Files(f"{server.url}/{behaviour}/f")


def test_a_large_file_of_a_server_without_ranges_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_npz.sources.access.stores.BLOCK_BYTES", 2999)
    with pytest.raises(SourceError, match="no Range"):
        Files(f"{server.url}/no-range/f")


def test_patterns_and_queries_of_urls_name_files(server: Server) -> None:
    server.files = {f"p-{number}.tar": b"%d" % number for number in range(8, 12)} | {"f?key=1": CONTENT, "empty": b""}
    files = Files(f"{server.url}/plain/p-{{8..11}}.tar")
    assert files.stamps == (("p-8.tar", 1), ("p-9.tar", 1), ("p-10.tar", 2), ("p-11.tar", 2))
    assert files.read(3, 0, 9) == b"11"
    assert Files(f"{server.url}/plain/f?key=1").stamps == (("f", 3000),)
    assert Files(f"{server.url}/plain/empty").read(0, 0, 9) == b""
    with pytest.raises(SourceError, match=r"p-12\.tar"):
        Files(f"{server.url}/plain/p-{{11..12}}.tar")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_asks_the_web_by_itself(server: Server) -> None:
    files = Files(f"{server.url}/plain/f")
    assert in_a_fork(lambda: files.read(0, 10, 20)) == files.read(0, 10, 20) == CONTENT[10:30]


# Builds


@pytest.fixture
def images(tree: Path, server: Server) -> dict[str, bytes]:
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    server.files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in paths}
    return server.files


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_of_a_web_server_that_stumbles_builds_what_can_be_had(
    server: Server, images: dict[str, bytes], workers: int, tree: Path, tmp_path: Path, make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ways = ("plain", "twice-500", "forbidden", "moved", "no-length", "gone", "no-range")
    names = list(images)[:35]
    rows = [f"{ways[number % len(ways)]}/{name}" for number, name in enumerate(names)]
    (tmp_path / "web.csv").write_text("\n".join(["path", *rows]))
    good = [number for number in range(len(rows)) if ways[number % len(ways)] not in ("forbidden", "gone")]
    (tmp_path / "local.csv").write_text("\n".join(["path", *(names[number] for number in good)]))
    ours = make_dataset(tmp_path / "web.csv", root=f"{server.url}/", workers=workers)
    plain = make_dataset(tmp_path / "local.csv", root=str(tree))
    assert read_shards(ours, "paths").tolist() == [rows[number] for number in good]
    np.testing.assert_array_equal(read_shards(ours), read_shards(plain))
    rejects = reject_lines(ours)
    codes = {"forbidden": "unreadable", "gone": "missing"}
    assert {reject["path"]: reject["code"] for reject in rejects} == {
        row: codes[row.partition("/")[0]] for number, row in enumerate(rows) if number not in good
    }


def test_what_a_server_answers_for_one_image_alone_is_a_reject(
    server: Server, images: dict[str, bytes], tmp_path: Path, make_dataset: MakeDataset
) -> None:
    name = next(iter(images))
    ways = {
        "refused": "HTTP status 414",
        "compressed": "the server compresses it (gzip), against the request",
        "to-file": "it leads out of SRC, to file://",
        "to-elsewhere": "it leads out of SRC, to http://localhost",
        "to-itself": "more than 10 redirects",
    }
    (tmp_path / "web.csv").write_text("\n".join(["path", *(f"{way}/{name}" for way in ("plain", *ways))]))
    made = make_dataset(tmp_path / "web.csv", root=server.url, max_rejects="100%")
    rejects = reject_lines(made)
    assert {reject["path"].partition("/")[0]: reject["detail"] for reject in rejects} == ways
    assert {reject["code"] for reject in rejects} == {"unreadable"}
    (tmp_path / "deeper.csv").write_text(f"path\n{name}\n")
    source = open_source(tmp_path / "deeper.csv", BuildConfig(root=f"{server.url}/to-parent"))
    with pytest.raises(BadItem, match="it leads out of SRC, to http"):
        read_item(source, Item(0, name, None))


@pytest.mark.parametrize("cell", ["%2e%2e/secret.png", "..%2fsecret.png", "a/%2E./%2e%2e/secret.png"])
def test_percent_encoded_dots_do_not_lead_out_of_a_web_folder(server: Server, tmp_path: Path, cell: str) -> None:
    (tmp_path / "web.csv").write_text(f"path\n{cell}\n")
    with pytest.raises(SourceError, match=r"row 1 has the path .* which leads out of .*; write it relative to that"):
        open_source(tmp_path / "web.csv", BuildConfig(root=f"{server.url}/plain"))
    (tmp_path / cell).parent.mkdir(parents=True, exist_ok=True)  # on a disk it is a name as any other
    (tmp_path / cell).touch()
    assert open_source(tmp_path / "web.csv").class_names is None


@pytest.mark.parametrize("way", ["cut", "broken", "too-many-requests"])
def test_images_that_may_come_another_time_stop_the_build(
    server: Server, images: dict[str, bytes], way: str, tmp_path: Path, make_dataset: MakeDataset
) -> None:
    name = next(iter(images))
    (tmp_path / "web.csv").write_text(f"path\n{way}/{name}\n")
    with pytest.raises(ShardError, match=f"reading '{way}/{name}' failed 4 times: .*run the same command to resume"):
        make_dataset(tmp_path / "web.csv", root=f"{server.url}/")
    source = open_source(tmp_path / "web.csv", BuildConfig(root=f"{server.url}/"))
    with pytest.raises(OSError, match=r"^\[Errno") as caught:
        source.read(Item(0, f"{way}/{name}", None))
    assert caught.value.errno == errno.EIO
    with pytest.raises(BadItem, match="not there"):
        read_item(source, Item(0, f"gone/{name}", None))


@pytest.mark.parametrize(("way", "workers"), [("plain", 0), ("plain", 2), ("twice-500", 0), ("moved", 0)])
def test_a_tar_on_the_web_builds_what_the_local_one_builds(
    server: Server, tree: Path, way: str, workers: int, tmp_path: Path, make_dataset: MakeDataset
) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tree, ".")
    server.files["images.tar"] = (tmp_path / "images.tar").read_bytes()
    ours = make_dataset(f"{server.url}/{way}/images.tar", workers=workers)
    plain = make_dataset(tmp_path / "images.tar")
    for name in ("images", "labels", "paths", "source_bytes"):
        np.testing.assert_array_equal(read_shards(ours, name), read_shards(plain, name))
