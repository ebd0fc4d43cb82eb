"""Where OUT is: whole files or none, errors with advice, and one build at a time."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MakeTree, assert_a_worker_needs_its_parents_lock, python, race

from gpu_npz.audit.verify import verify
from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
from gpu_npz.errors import LockedError, StorageError
from gpu_npz.storage import file_lock, heartbeats
from gpu_npz.storage.local import LocalStorage

LOCK = ".gpu-npz/lock"
SETTINGS = BuildConfig(size=16, shard_size=2, workers=0, device="cpu")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


def files(storage: LocalStorage) -> set[str]:
    return {os.fspath(path.relative_to(storage.root)) for path in Path(storage.root).rglob("*") if path.is_file()}


def failing(number: int, *, after: int = 0) -> Callable[..., Any]:
    """A system call that fails with `number`, once it has done nothing `after` times."""
    calls = iter(range(10**6))

    def call(*_: Any, **__: Any) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))

    return call


# Writing


def test_what_was_written_is_read_back_and_its_folders_are_made(storage: LocalStorage) -> None:
    storage.write("a/b/file.json", b"content")
    assert storage.read("a/b/file.json") == b"content"
    assert storage.size("a/b/file.json") == 7
    assert (storage.names(), storage.names("a/b")) == (["a"], ["file.json"])


def test_what_is_not_there_is_none_and_no_error(storage: LocalStorage) -> None:
    storage.write("file", b"")
    for name in ("gone", "gone/below", "file/below"):
        assert storage.read(name) is None
        assert storage.size(name) is None
        storage.remove(name)
    assert storage.names("gone") == []
    assert (storage.read("file"), storage.size("file")) == (b"", 0)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    storage.write("file.json", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"file\.json': No space left on device; free some space"):
            storage.write("file.json", b"new")
        with pytest.raises(StorageError):
            storage.write("never.json", b"new")
    assert storage.read("file.json") == b"old"
    assert files(storage) == {"file.json"}


def test_a_write_that_is_interrupted_leaves_the_old_content_and_nothing_else(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    storage.write("file.json", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            storage.write("file.json", b"new")
    assert storage.read("file.json") == b"old"
    assert files(storage) == {"file.json"}


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_write_ends(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("file.json", b"old")
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "fsync file")
        fsync(descriptor)

    def watched_rename(old: str, new: str) -> None:
        assert Path(old).read_bytes() == b"new"
        assert os.path.dirname(old) == os.path.dirname(new)
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    storage.write("file.json", b"new")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_file_whose_folder_cannot_be_flushed_is_whole_and_the_error_is_told(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("file.json", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.EIO, after=1))
        with pytest.raises(StorageError, match="Input/output error"):
            storage.write("file.json", b"new")
    assert storage.read("file.json") == b"new"
    assert files(storage) == {"file.json"}


def test_a_build_names_only_what_is_on_the_disk_and_each_proof_after_what_it_proves(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = make_tree({f"a/{number}.jpg": "jpeg" for number in range(4)})
    calls: list[tuple[int, str]] = []  # with the thread: each shard has one, and they do not wait for each other
    flushed: set[tuple[int, int]] = set()
    fsync, link = os.fsync, os.link

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        flushed.add((status.st_ino, status.st_size))
        if stat.S_ISDIR(status.st_mode):
            calls.append((threading.get_ident(), "folder"))

    def watched_link(old: str, new: str) -> None:
        status = os.stat(old)
        if os.path.basename(new) != "lock":
            assert (status.st_ino, status.st_size) in flushed, new
            calls.append((threading.get_ident(), os.path.basename(new)))
        link(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "link", watched_link)
    build(src, tmp_path / "out", SETTINGS)

    def flushed_each(*names: str) -> list[str]:
        return [call for name in names for call in (name, "folder")]

    own = threading.get_ident()
    before, after = (
        flushed_each("plan.npz", "job.json"),
        flushed_each("rejects.jsonl", "index.npz", "dataset.json", "report.json"),
    )
    assert calls[: len(before)] == [(own, call) for call in before]
    assert calls[-len(after) :] == [(own, call) for call in after]
    shards = calls[len(before) : -len(after)]
    assert len(shards) == 8
    for name in ("shard-00000", "shard-00001"):
        thread, start = next((thread, place) for place, (thread, call) in enumerate(shards) if call == f"{name}.npz")
        assert [call for one, call in shards[start:] if one == thread][:4] == flushed_each(
            f"{name}.npz", f"{name}.json"
        )


def test_temporaries_of_killed_builds_are_removed_and_nothing_that_only_looks_like_one(storage: LocalStorage) -> None:
    storage.write("file.json", b"")
    ours = [storage.temporary("shard-00000.npz"), storage.temporary("shard-00000.npz")]
    assert ours[0] != ours[1]
    foreign = [".hidden.tmp", "notes.1-2.tmp", ".a.1-2.tmp.txt", ".a.b-c.tmp"]
    for path in (*ours, *(storage.path(name) for name in foreign)):
        Path(path).write_bytes(b"x")
    storage.remove_temporaries("")
    storage.remove_temporaries("no such folder")
    assert files(storage) == {"file.json", *foreign}


def test_removing_takes_files_links_and_empty_folders_but_no_full_folder(storage: LocalStorage) -> None:
    storage.write("full/file", b"")
    root = Path(storage.root)
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "full")
    storage.remove("empty")
    storage.remove("link")
    assert files(storage) == {"full/file"}
    with pytest.raises(StorageError, match="not empty"):
        storage.remove("full")


# Trouble, explained


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space, then run the same command to resume"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EFBIG, "choose a smaller --shard-size"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "choose another OUT"),
        (errno.EIO, "check the disk, then run the same command to resume"),
    ],
)
def test_trouble_with_the_disk_names_the_file_the_reason_and_what_to_do(
    storage: LocalStorage, number: int, advice: str
) -> None:
    with pytest.raises(StorageError) as caught, storage.explained("shard-00001.npz"):
        raise OSError(number, os.strerror(number))
    path = storage.path("shard-00001.npz")
    assert str(caught.value).startswith(f"{path!r}: {os.strerror(number)}; ")
    assert advice in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_an_out_that_is_a_file_is_refused_with_advice(make_tree: MakeTree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(StorageError, match="OUT must be a folder"):
        build(make_tree({"a/1.jpg": "jpeg"}), out, SETTINGS)
    with pytest.raises(StorageError, match="OUT must be a folder"):
        build(make_tree({"a/1.jpg": "jpeg"}), out / "below", SETTINGS)
    assert out.read_text() == "precious"


def test_an_out_that_may_not_be_written_is_refused_with_advice(make_tree: MakeTree, public_folder: Path) -> None:
    src, out = make_tree({"a/1.jpg": "jpeg"}), public_folder / "out"
    (public_folder / "closed").mkdir(mode=0o700)
    out.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:
        Path(src).rename(public_folder / "images")
        src = public_folder / "images"
        os.seteuid(65_534)  # without root's right to write everywhere
    try:
        with pytest.raises(StorageError, match="Permission denied; make it writable or choose another OUT"):
            build(src, out, SETTINGS)
        if root:
            with pytest.raises(StorageError, match="Permission denied; make it writable or choose another OUT"):
                build(src, public_folder / "closed/out", SETTINGS)
    finally:
        if root:
            os.seteuid(0)
    assert list(out.iterdir()) == []


FULL_DISK = """
import resource, sys
from gpu_npz.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # Python ignores SIGXFSZ: writing fails with EFBIG
sys.exit(run(["build", *sys.argv[2:]]))
"""


def test_a_disk_that_takes_no_more_stops_the_build_and_leaves_nothing_half(make_tree: MakeTree, tmp_path: Path) -> None:
    src, out = make_tree({f"a/{number}.jpg": "jpeg" for number in range(10)}), tmp_path / "out"
    options = ["--size", "64", "--shard-size", "4", "--workers", "0", "--device", "cpu", "--quiet"]
    # Ten rows of 48 KiB: two shards of four, one of two, which alone fits.
    result = python("-c", FULL_DISK, "150000", src, out, *options, status=1)
    assert "shard-00000.npz': File too large; choose a smaller --shard-size or raise the file size" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"job.json", "plan.npz"}
    report = build(src, out, BuildConfig(size=64, shard_size=4, workers=0, device="cpu"))
    assert (report.complete, report.rows) == (True, 10)


@pytest.mark.parametrize(("call", "step"), [("pwrite", 9), ("pwritev", 5), ("fsync", 3), ("link", 1)])
def test_a_full_disk_at_any_moment_is_a_storage_error_and_the_next_run_finishes(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    src, real = make_tree({f"a/{number}.jpg": "jpeg" for number in range(4)}), getattr(os, call)
    config = SETTINGS.model_copy(update={"page_cache": "drop" if call == "pwritev" else "keep"})

    def disk(moment: int) -> Callable[..., Any]:
        calls = itertools.count()

        def scarce(*values: Any) -> Any:
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*values)

        return scarce

    for moment in itertools.count(0, step):
        out = tmp_path / f"out-{moment}"
        with monkeypatch.context() as patched:
            patched.setattr(os, call, disk(moment))
            try:
                build(src, out, config)
                break  # it ended before that moment
            except StorageError as exc:
                message = str(exc)
        assert "No space left on device; free some space, then run the same command" in message
        assert not [path for path in out.rglob("*") if path.name == "lock" or path.suffix == ".tmp"]
        assert build(src, out, SETTINGS).rows == 4
        assert verify(out).ok
    assert moment >= 5 * step


# One build at a time

HOLDER = """
import sys, time
from gpu_npz.storage.local import LocalStorage
with LocalStorage(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(storage: LocalStorage) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds OUT."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, storage.root], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_build_is_refused_and_told_which_process_holds_out(
    storage: LocalStorage, holder: subprocess.Popen[str], make_tree: MakeTree
) -> None:
    who = re.escape(f"is in use by process {holder.pid} on host {socket.gethostname()}; wait for it, or stop it")
    with pytest.raises(LockedError, match=who) as caught:
        build(make_tree({"a/1.jpg": "jpeg"}), storage.root, SETTINGS)
    assert caught.value.exit_code == 1
    assert "delete" not in str(caught.value)  # on this host nothing ever needs deleting
    assert files(storage) == {LOCK}


def test_a_second_build_in_the_same_process_is_refused_too(storage: LocalStorage) -> None:
    with storage.lock(), pytest.raises(LockedError, match=f"process {os.getpid()} "), storage.lock():
        pass
    with storage.lock():
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_process_that_died_is_taken_over(
    storage: LocalStorage, holder: subprocess.Popen[str], make_tree: MakeTree, number: int
) -> None:
    holder.send_signal(number)
    holder.wait()
    assert LOCK in files(storage)
    assert build(make_tree({"a/1.jpg": "jpeg"}), storage.root, SETTINGS).complete
    assert LOCK not in files(storage)


def test_the_lock_that_a_dying_build_has_still_lent_to_a_child_is_waited_for(storage: LocalStorage) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (Path(storage.root) / ".gpu-npz").mkdir(parents=True)
    path = Path(storage.root) / LOCK
    path.write_text(json.dumps({"host": socket.gethostname(), "process": dead.pid}))
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(0.3)"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        before = len(os.listdir("/proc/self/fd"))
        with storage.lock():
            assert len(os.listdir("/proc/self/fd")) <= before + 1
            assert json.loads(path.read_bytes())["process"] == os.getpid()


def test_the_lock_of_another_host_whose_heart_stands_still_is_taken_over(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeats, "STALE_S", 0.3)
    monkeypatch.setattr(file_lock, "_LOOK_S", 0.02)
    storage.write(LOCK, json.dumps({"host": "node-17", "process": 4711, "beat": 3}).encode())
    with storage.lock():
        assert json.loads(storage.read(LOCK) or b"")["process"] == os.getpid()
    assert (
        "is held by process 4711 on host node-17; checking for up to 0.3 s whether it is still running" in caplog.text
    )
    assert files(storage) == set()


def test_of_two_that_wait_for_the_lock_of_a_dead_host_one_has_it(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "STALE_S", 0.5)
    monkeypatch.setattr(file_lock, "_LOOK_S", 0.02)
    storage.write(LOCK, json.dumps({"host": "node-17", "process": 4711, "beat": 3}).encode())
    ends = race(lambda: LocalStorage(storage.root).lock(wait_s=2))
    assert ends[0] == "won"
    assert f"in use by process {os.getpid()} " in ends[1]
    assert files(storage) == set()


@pytest.mark.parametrize("wait_s", [0.0, 0.7])
def test_the_lock_of_another_host_is_respected_while_its_heart_beats(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> None:
    monkeypatch.setattr(heartbeats, "STALE_S", 5.0)
    monkeypatch.setattr(file_lock, "_LOOK_S", 0.02)
    over = threading.Event()

    def write(beat: int) -> None:
        storage.write(LOCK, json.dumps({"host": "node-17", "process": 4711, "beat": beat}).encode())

    def beat() -> None:
        for number in itertools.count(1):
            if over.wait(0.05):
                return
            write(number)

    write(0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError, match="process 4711 on host node-17"), storage.lock(wait_s=wait_s):
            pass
        assert storage.live_locks() == ["lock"]
    finally:
        over.set()
        thread.join()


def test_who_was_taken_for_dead_is_told_and_leaves_the_lock_of_the_other(storage: LocalStorage) -> None:
    other = json.dumps({"host": "node-17", "process": 4711, "beat": 3}).encode()
    foreign = LocalStorage(storage.root)
    with pytest.raises(LockedError, match="was taken over by process 4711 on host node-17"), storage.lock():
        foreign.write(LOCK, other)  # another file in its place
    assert storage.read(LOCK) == other


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": null}', b"\xff\x00"])
def test_a_lock_file_that_says_nothing_and_that_nobody_holds_is_taken_over(
    storage: LocalStorage, content: bytes
) -> None:
    storage.write(LOCK, content)
    with storage.lock():
        holder = json.loads(storage.read(LOCK) or b"")
        assert (holder["host"], holder["process"], holder["beat"]) == (socket.gethostname(), os.getpid(), 0)
    assert files(storage) == set()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt], ids=str)
def test_the_lock_is_let_go_of_at_the_end_also_after_an_error(
    storage: LocalStorage, error: type[BaseException] | None
) -> None:
    gc.collect()  # or files that earlier tests left open would be closed meanwhile
    descriptors = len(os.listdir("/dev/fd"))
    try:
        with storage.lock():
            assert LOCK in files(storage)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert files(storage) == set()
    assert len(os.listdir("/dev/fd")) == descriptors
    with storage.lock():
        pass


def test_a_build_that_fails_lets_go_of_out(make_tree: MakeTree, storage: LocalStorage) -> None:
    src = make_tree({"a/1.jpg": "jpeg"})

    def broken(_: object) -> None:
        raise RuntimeError("the caller's own fault")

    with pytest.raises(RuntimeError):
        build(src, storage.root, SETTINGS, progress=broken)
    assert LOCK not in files(storage)
    assert build(src, storage.root, SETTINGS).complete


# Whoever has lost the lock changes nothing

OTHER = {"host": "node-17", "process": 4711, "beat": 3}


def taken_over(storage: LocalStorage) -> None:
    """Another host has taken the lock for stale."""
    LocalStorage(storage.root).write(LOCK, json.dumps(OTHER).encode())


def acting_before(call: str, act: Callable[[], None]) -> Callable[..., Any]:
    """The system call, before which something happens once."""
    real, turns = getattr(os, call), iter([act])

    def late(*values: Any) -> Any:
        next(turns, lambda: None)()
        return real(*values)

    return late


def test_under_a_lock_files_are_replaced_and_removed(storage: LocalStorage) -> None:
    with storage.lock():
        for content in (b"1", b"2"):
            storage.write("file", content)
            assert storage.read("file") == content
        assert files(storage) == {"file", LOCK}
        storage.remove("file")
        storage.remove("file")
    assert files(storage) == set()


@pytest.mark.parametrize("there", [None, b"the other's"])
def test_a_lock_that_is_lost_between_the_look_and_the_link_publishes_nothing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, there: bytes | None
) -> None:
    def lose() -> None:
        taken_over(storage)
        if there is not None:
            LocalStorage(storage.root).write("file", there)

    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError, match="process 4711 on host node-17"))
        stack.enter_context(storage.lock())
        with monkeypatch.context() as patched:
            patched.setattr(os, "link", acting_before("link", lose))
            with pytest.raises(LockedError):
                storage.write("file", b"ours")
    assert storage.read("file") == there
    assert files(storage) == {LOCK} | ({"file"} if there else set())


def test_a_lock_that_is_lost_between_the_look_and_the_removal_removes_nothing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError))
        stack.enter_context(storage.lock())
        storage.write("file", b"content")
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", acting_before("rename", lambda: taken_over(storage)))
            with pytest.raises(LockedError):
                storage.remove("file")
    assert files(storage) == {"file", LOCK}


def test_a_worker_works_under_the_lock_of_its_parent_and_no_longer(storage: LocalStorage) -> None:
    assert_a_worker_needs_its_parents_lock(storage)


def test_what_fails_because_another_build_took_over_says_so(storage: LocalStorage) -> None:
    def fail() -> None:
        with storage.lock():
            taken_over(storage)
            raise StorageError("its file is gone")

    with pytest.raises(LockedError, match="was taken over by process 4711") as caught:
        fail()
    assert str(caught.value.__cause__) == "its file is gone"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_everything_works_by_rename(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    with storage.lock():
        for content in (b"1", b"2"):
            storage.write("file", content)
            assert storage.read("file") == content
        with pytest.raises(LockedError), LocalStorage(storage.root).lock():
            pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(LockedError))
        stack.enter_context(storage.lock())
        monkeypatch.setattr(os, "rename", acting_before("rename", lambda: taken_over(storage)))
        with pytest.raises(LockedError):
            storage.remove("file")
    assert storage.read("file") == b"2"


@pytest.mark.parametrize("call", ["link", "rename"])
def test_a_publish_under_a_lock_that_fails_leaves_the_old_content(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with storage.lock():
        storage.write("file", b"old")
        with monkeypatch.context() as patched:
            real, calls = getattr(os, call), itertools.count()

            def scarce(*values: Any) -> Any:
                if next(calls) == (1 if call == "link" else 0):  # the first says that the name is taken
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*values)

            patched.setattr(os, call, scarce)
            with pytest.raises(StorageError, match="No space left"):
                storage.write("file", b"new")
        assert storage.read("file") == b"old"
        assert files(storage) == {"file", LOCK}


def test_what_a_killed_process_had_moved_aside_is_put_back_unless_a_newer_file_is_there(storage: LocalStorage) -> None:
    storage.write("new", b"new")
    for name in (".new.0123456789abcdef-00000000.old", ".gone.0123456789abcdef-00000000.old"):
        Path(storage.path(name)).write_bytes(b"old")
    with storage.lock():
        storage.remove_temporaries("")
    assert (storage.read("new"), storage.read("gone")) == (b"new", b"old")
    assert files(storage) == {"new", "gone"}


def test_temporaries_of_other_locks_that_are_held_stay(storage: LocalStorage) -> None:
    other = LocalStorage(storage.root)
    with other.lock("lock-part-2-of-2"), storage.lock("lock-part-1-of-2"):
        for each in (other, storage):
            Path(each.temporary("shard-00000.npz")).write_bytes(b"")
        storage.remove_leftovers("shard-00001.npz")
        assert len(storage.names()) == 3
        storage.remove_temporaries("")
        assert len(storage.names()) == 2
        storage.remove_leftovers("shard-00000.npz")
        assert len(storage.names()) == 2
        other.remove_leftovers("shard-00000.npz")
        assert storage.names() == [".gpu-npz"]


# Hosts and filesystems


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_flock_fails_heartbeats_decide_with_one_warning(
    storage: LocalStorage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make_tree: MakeTree,
    number: int,
) -> None:
    monkeypatch.setattr(file_lock.FileLock, "_told", False)
    monkeypatch.setattr(heartbeats, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(file_lock.fcntl, "flock", failing(number))
    src = make_tree({"a/1.jpg": "jpeg"})
    with storage.lock(), pytest.raises(LockedError, match=f"process {os.getpid()} "):
        build(src, storage.root, SETTINGS)
    assert files(storage) == set()
    for _ in range(2):
        assert build(src, storage.root, SETTINGS).complete
    assert LOCK not in files(storage)
    assert caplog.text.count("has no flock") == 1


def test_where_flock_fails_the_lock_of_a_process_that_died_is_taken_over_at_once(
    storage: LocalStorage, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lock.fcntl, "flock", failing(errno.ENOSYS))
    holder.kill()  # and nobody has waited for it yet
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with storage.lock():
        assert json.loads(storage.read(LOCK) or b"")["process"] == os.getpid()


@pytest.mark.parametrize("place", ["another boot/1", "this boot/another container"])
def test_another_host_of_the_same_name_is_respected_where_flock_does_not_reach(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(heartbeats, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(file_lock.fcntl, "flock", lambda *_: None)
    with storage.lock():
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("gpu_npz.storage.holders.place", lambda: place)
            with pytest.raises(LockedError, match=f"process {os.getpid()} on host"), storage.lock():
                pass
        storage.write("file", b"")


def test_a_process_that_has_the_number_of_one_that_died_is_not_taken_for_it(storage: LocalStorage) -> None:
    with storage.lock():
        holder = {**json.loads(storage.read(LOCK) or b""), "token": "0" * 16, "started": 1}
    storage.write(LOCK, json.dumps(holder).encode())
    with storage.lock():
        assert json.loads(storage.read(LOCK) or b"")["token"] != "0" * 16


def test_the_lock_of_an_earlier_version_is_understood(storage: LocalStorage) -> None:
    old = {"host": socket.gethostname(), "process": os.getpid(), "beat": 3}
    storage.write(LOCK, json.dumps(old).encode())
    with open(storage.path(LOCK)) as file:
        file_lock.fcntl.flock(file, file_lock.fcntl.LOCK_EX)
        with pytest.raises(LockedError, match=f"process {os.getpid()} "), storage.lock():
            pass
    with storage.lock():
        pass


def test_a_report_that_cannot_be_written_is_a_warning(
    storage: LocalStorage, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = LocalStorage.write

    def full(self: LocalStorage, name: str, content: bytes) -> None:
        with self.explained(name):
            if name.endswith("report.json"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, name, content)

    monkeypatch.setattr(LocalStorage, "write", full)
    assert build(make_tree({"a/1.jpg": "jpeg"}), storage.root, SETTINGS).complete
    assert "report.json': No space left on device" in caplog.text
