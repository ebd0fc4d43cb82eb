"""Counts what every process of a build does to the files below FAULTS_UNDER, and lets one of these calls go wrong.

Python imports this by itself where its folder is on PYTHONPATH. All processes of a build append a line a call to the
same log, so that calls have numbers. With FAULTS_AT=N, call N is where it happens, with FAULTS_AT="CALL NAME" the first
of this kind about a path with NAME in it: FAULTS_KIND is `kill` (SIGKILL to
every process that has come this far; of a write, half is written), `stop` (SIGSTOP to all of them), or the name of an
errno, with `FROM:` in front if all calls from there on shall fail. What a rename or an unlink destroys is kept in the
folder FAULTS_KEEP, so that `harness.power_loss` can bring it back.

FAULTS_CALLS says which calls count, if not all. With FAULTS_HOST, the build runs as if on a host of that name: flock in
OUT does not reach others, and hearts beat fast. Where FAULTS_UNDER is on S3, requests that change something count.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import itertools
import json
import os
import signal
import socket

UNDER = os.environ.get("FAULTS_UNDER", "")
LOG = os.environ.get("FAULTS_LOG", "")
KEEP = os.environ.get("FAULTS_KEEP", "")
AT, _, ABOUT = os.environ.get("FAULTS_AT", "-1").partition(" ")
KIND = os.environ.get("FAULTS_KIND", "kill")
HOST = os.environ.get("FAULTS_HOST", "")
NAMES = ("open", "write", "pwrite", "pwritev", "fsync", "rename", "link", "unlink", "rmdir", "mkdir", "ftruncate")
CALLS = os.environ.get("FAULTS_CALLS", "").split() or NAMES
REQUESTS = ("put_object", "delete_object", "create_multipart_upload", "complete_multipart_upload")
real_flock = fcntl.flock
real = {name: getattr(os, name) for name in NAMES}
real_open = builtins.open
kept, met = itertools.count(), itertools.count()


def path_of(target: object) -> str:
    if isinstance(target, int):
        try:
            return os.readlink(f"/proc/self/fd/{target}").removesuffix(" (deleted)")
        except OSError:
            return ""
    return os.path.abspath(os.fsdecode(target))  # type: ignore[arg-type]


def ours(path: str) -> bool:
    return path == UNDER or path.startswith(UNDER + "/")


def noted(call: str, path: str, **more: object) -> int:
    """Appends a line to the log; its number."""
    descriptor = real["open"](LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        real_flock(descriptor, fcntl.LOCK_EX)
        number = os.pread(descriptor, 1 << 24, 0).count(b"\n")
        real["write"](descriptor, json.dumps({"call": call, "path": path, "pid": os.getpid(), **more}).encode() + b"\n")
        return number
    finally:
        os.close(descriptor)


def is_now(number: int, call: str, paths: str) -> bool:
    """Whether this is the call at which it happens."""
    if not ABOUT:
        return number == int(AT)
    return call == AT and ABOUT in paths and next(met) == 0


def signal_all(number: signal.Signals) -> None:
    with real_open(LOG) as log:
        pids = {json.loads(line)["pid"] for line in log} - {os.getpid()}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    os.kill(os.getpid(), number)


def keep(path: str) -> str | None:
    """A second name, outside, for a file that is about to lose this one."""
    if not KEEP or not os.path.isfile(path):
        return None
    name = f"{KEEP}/{os.getpid()}-{next(kept)}"
    real["link"](path, name)
    return name


def faulty(call: str):  # type: ignore[no-untyped-def]
    def shim(*args, **kwargs):  # type: ignore[no-untyped-def]
        path = path_of(args[0])
        changes = call != "open" or bool(args[1] & os.O_CREAT and not os.path.exists(path))
        if not changes or not ours(path):
            return real[call](*args, **kwargs)
        more: dict[str, object] = {}
        if call in ("rename", "link"):
            more = {"to": path_of(args[1]), "kept": keep(path_of(args[1])) if call == "rename" else None}
        elif call == "unlink":
            more = {"kept": keep(path)}
        number = noted(call, path, **more)
        now = is_now(number, call, f"{path} {more.get('to', '')}")
        if now and KIND == "kill":
            if call in ("write", "pwrite", "pwritev"):
                data = memoryview(args[1][0] if call == "pwritev" else args[1]).cast("B")
                half = data[: len(data) // 2]
                real[call](args[0], [half] if call == "pwritev" else half, *args[2:])
            signal_all(signal.SIGKILL)
        if now and KIND == "stop":
            signal_all(signal.SIGSTOP)
            return real[call](*args, **kwargs)
        once, code = (False, KIND.removeprefix("FROM:")) if KIND.startswith("FROM:") else (True, KIND)
        if KIND not in ("kill", "stop") and (now if once else 0 <= int(AT) <= number):
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number), path)
        return real[call](*args, **kwargs)

    return shim


def opened(file, mode="r", *args, **kwargs):  # type: ignore[no-untyped-def]
    """Files that are opened to be written: by calls that are counted."""
    if mode != "wb" or not ours(path_of(file)):
        return real_open(file, mode, *args, **kwargs)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    return Written(descriptor)


class Written:
    """What storage.write does with a file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.descriptor, data) :]

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self.descriptor

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)


def watch_requests() -> None:
    import s3fs
    from fsspec.asyn import sync_wrapper

    real_call = s3fs.S3FileSystem._call_s3

    async def call(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        place = f"s3://{kwargs.get('Bucket')}/{kwargs.get('Key')}"
        counts = method in REQUESTS and ours(place) and "/beat-" not in place
        if counts and is_now(noted(method, place), method, place):
            signal_all(signal.SIGSTOP)
        return await real_call(self, method, *args, **kwargs)

    s3fs.S3FileSystem._call_s3 = call
    s3fs.S3FileSystem.call_s3 = sync_wrapper(call)


if HOST:
    from gpu_npz.storage import file_lock, heartbeats, object_lock

    socket.gethostname = lambda: HOST
    fcntl.flock = lambda descriptor, how: None if ours(path_of(descriptor)) else real_flock(descriptor, how)
    heartbeats.HEARTBEAT_S, heartbeats.STALE_S, object_lock.SETTLE_S = 0.1, 0.6, 0.2
    file_lock._LOOK_S = object_lock._LOOK_S = 0.05
if UNDER.startswith("s3://"):
    watch_requests()
elif UNDER:
    for each in CALLS:
        setattr(os, each, faulty(each))
    builtins.open = opened  # type: ignore[assignment]
