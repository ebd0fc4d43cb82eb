"""What tests share: settings, builds, contents of a dataset, processes, stores, images, decoders, sources, tars."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import select
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import contents as contents  # it lives there because the fault scripts run without pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

import gpu_npz
from gpu_npz.bench.pictures import paint
from gpu_npz.config import BuildConfig
from gpu_npz.errors import LockedError, SourceError, UsageError
from gpu_npz.preprocess.decoders import pillow_decoder
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.pillow import PillowDecoder
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, Source, read_item
from gpu_npz.sources.rejects import BadItem
from gpu_npz.workers.worker import Progress

Pixels = NDArray[np.uint8]
# The fixtures in conftest.py that are functions
MakeTree = Callable[[Mapping[str, "str | bytes"]], Path]
MakeDataset = Callable[..., Path]


# Builds


def cpu_config(**settings: Any) -> BuildConfig:
    """Settings of a small build in this process."""
    return BuildConfig(**{"device": "cpu", "size": 16, "workers": 0, **settings})


def build_cpu(src: Path, out: Path, **settings: Any) -> Path:
    """`out`, built from `src` with `cpu_config(**settings)`."""
    gpu_npz.build(src, out, cpu_config(**settings))
    return out


def progressed(events: Iterable[object]) -> tuple[int, int, int]:
    """Items, rejects and source bytes, summed over all progress events."""
    steps = [event for event in events if isinstance(event, Progress)]
    return sum(s.items for s in steps), sum(s.rejects for s in steps), sum(s.source_bytes for s in steps)


# What OUT contains


def arrays_of(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an NPZ file, as plain NumPy reads them."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_shards(out: Path | str, name: str = "images") -> NDArray[Any]:
    """One array of all shards, as plain NumPy reads it."""
    arrays = []
    for path in sorted(Path(out).glob("shard-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays.append(file[name])
    return np.concatenate(arrays)


def reject_lines(out: Path) -> list[dict[str, Any]]:
    """The records in rejects.jsonl."""
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text("ascii").splitlines()]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the object in a JSON file in place."""
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def flip_bit(path: Path, position: int) -> None:
    """Flips one bit of the byte at `position`, which counts from the end if it is negative."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


# Other processes, and the README's examples


def python(*arguments: Any, status: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs this Python with `arguments`; its exit status must be `status`, or may be any with None."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)
    assert status in (None, result.returncode), f"exit status {result.returncode}\n{result.stdout}{result.stderr}"
    return result


def growth_of(program: str, *arguments: Any) -> tuple[int, str]:
    """How many bytes a Python process's peak memory grows by after the line `# from here`, and what it prints.

    By VmHWM of proc(5): on Linux, getrusage starts a child at the peak of its parent, which hides any growth.
    """
    peak = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    before, after = program.split("# from here\n")
    first, *printed, last = python("-c", before + peak + after + peak, *arguments).stdout.splitlines()
    return 1024 * (int(last) - int(first)), "\n".join(printed)


def readme_example(line: str) -> str:
    """The Python block of the pages that contains this line."""
    pages = (Path(__file__).parents[1] / name for name in ("README.md", "pipelines/README.md"))
    blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(page.read_text() for page in pages), re.M | re.S)
    (block,) = (block for block in blocks if line in block.splitlines())
    return block


# Locks


def race(lock: Callable[[], AbstractContextManager[Any]]) -> list[str]:
    """The outcomes of two threads that take a lock at the same time: "won", and the error of the other."""
    ends: list[str] = []
    ended, both = threading.Event(), threading.Barrier(2)

    def wait() -> None:
        held = lock()
        both.wait()
        try:
            with held:
                ends.append("won")
                assert ended.wait(60)
        except LockedError as exc:
            ends.append(str(exc))
            ended.set()

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def assert_a_worker_needs_its_parents_lock(storage: Any) -> None:
    """A worker's storage writes while its parent holds the lock, and no longer."""
    with storage.lock():
        worker = type(storage)(storage.root, storage.fence)
        worker.write("file", b"1")
    with pytest.raises(LockedError, match="taken over by another build"):
        worker.write("file", b"2")
    with storage.lock(), pytest.raises(LockedError, match=f"taken over by process {os.getpid()} "):
        worker.remove("file")
    assert storage.read("file") == b"1"


# Object stores


Rule = Callable[[bytes], "bytes | None"]


class Proxy:
    """Passes bytes on to a server. A rule is given what a client sends and says what of it to pass on.

    None: the connection is cut after the first kilobyte. Bytes that begin with HTTP/ go back as the answer.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.rule: Rule = lambda data: data
        self._server = server
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns
            self._threads[0].join()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._ends.append(client)
                self._threads.append(threading.Thread(target=self._pass, args=(client,)))
                self._threads[-1].start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for end in ready:
                    data = end.recv(1 << 16)
                    passed = self.rule(data) if end is client else data
                    if passed is None:
                        server.sendall(data[:1024])
                    if not data or passed is None:
                        return
                    back = end is server or passed.startswith(b"HTTP/")
                    (client if back else server).sendall(passed)


# Generated images


def encode(pixels: Pixels | Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    """Encodes an array, (H, W) or (H, W, C), or a Pillow image as a file; JPEG unless `file_format` says otherwise."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _claiming(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG whose frame header says another size than that of the data behind it."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[frame + 9 :]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _alpha(pixels: Pixels) -> Pixels:
    ramp = np.linspace(0, 255, pixels.shape[1], dtype=np.uint8)
    return np.dstack([pixels, np.broadcast_to(ramp, pixels.shape[:2])])


# What a collection has; every decoder path of ours must take these.
GOOD: dict[str, Callable[[Pixels], bytes]] = {
    "jpeg": lambda pixels: encode(pixels, quality=90),
    "jpeg-444": lambda pixels: encode(pixels, quality=95, subsampling="4:4:4"),
    "jpeg-422": lambda pixels: encode(pixels, quality=80, subsampling="4:2:2"),
    "progressive": lambda pixels: encode(pixels, quality=85, progressive=True),
    "gray": lambda pixels: encode(pixels[..., 1].copy(), quality=90),
    "exif-6": lambda pixels: encode(pixels, quality=90, exif=_oriented(6)),
    "cmyk": lambda pixels: encode(Image.fromarray(pixels).convert("CMYK"), quality=90),
    "png-named-jpg": lambda pixels: encode(pixels, "PNG"),
    "palette": lambda pixels: encode(Image.fromarray(pixels).quantize(32), "PNG"),
    "alpha": lambda pixels: encode(_alpha(pixels), "PNG"),
    "gray16": lambda pixels: encode(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
    "bilevel": lambda pixels: encode(Image.fromarray(pixels).convert("1"), "PNG"),
    "1x1": lambda pixels: encode(pixels[:1, :1], quality=90),
}
# What decodes although something is wrong with it: nobody can tell.
DAMAGED: dict[str, Callable[[Pixels], bytes]] = {
    "half-with-eoi": lambda pixels: _half(encode(pixels)) + b"\xff\xd9",
    "broken-exif": lambda pixels: encode(pixels, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"),
    "zeros-behind": lambda pixels: encode(pixels) + bytes(1000),
}
# What no decoder takes, with the stage and the code of the reject that it becomes.
BAD: dict[str, tuple[str, str, Callable[[Pixels], bytes]]] = {
    "half": ("decode", "truncated", lambda pixels: _half(encode(pixels))),
    "half-progressive": ("decode", "truncated", lambda pixels: _half(encode(pixels, progressive=True))),
    "half-png": ("decode", "truncated", lambda pixels: _half(encode(pixels, "PNG"))),
    "no-eoi": ("decode", "truncated", lambda pixels: encode(pixels)[:-2]),
    "headers-only": ("decode", "truncated", lambda pixels: encode(pixels)[:100]),
    "empty": ("read", "empty", lambda _: b""),
    "text": ("decode", "not-an-image", lambda _: b"This is no image, whatever its name says.\n"),
    "two-bytes": ("decode", "not-an-image", lambda _: b"\xff\xd8"),
    "zeros": ("decode", "not-an-image", lambda _: bytes(5000)),
    "postscript": ("decode", "not-an-image", lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "claims-65500": ("decode", "too-large", lambda pixels: _claiming(encode(pixels), 65_500, 65_500)),
    "broken-png": (
        "decode", "undecodable", lambda pixels: encode(pixels, "PNG").replace(b"IDAT", b"IDAT\xff\xff\xff", 1)
    ),
}  # fmt: skip


@functools.cache
def file_bytes(kind: str, *, seed: int = 0, size: tuple[int, int] = (90, 120)) -> bytes:
    """The content of a generated file. `kind` is a key of GOOD, DAMAGED or BAD; `size` is (height, width) in pixels."""
    make = BAD[kind][2] if kind in BAD else {**GOOD, **DAMAGED}[kind]
    return make(paint(*size, seed))


# Decoding single images


def pillow_of(**settings: Any) -> PillowDecoder:
    """Pillow's decoder without a source. With `channels="gray"`, `normalize` is "unit" by default."""
    if settings.get("channels") == "gray":
        settings.setdefault("normalize", "unit")
    config = BuildConfig(**{"resizer": "pillow", **settings})
    assert config.size is not None
    return pillow_decoder(config, Geometry.of(config, config.size), None)


def decode(data: bytes, frame: int | None = None, *, name: str = "image", **settings: Any) -> NDArray[Any]:
    """The pixels of one encoded image, (H, W, C), uint8 or uint16, in an array of their own."""
    with pillow_of(**settings) as decoder:
        return np.array(decoder.decode_image(data, name, frame))


def rejection(data: bytes, **settings: Any) -> tuple[str, str, str]:
    """Stage, code and detail with which one encoded image is rejected."""
    with pytest.raises(BadItem) as caught:
        decode(data, **settings)
    return caught.value.stage, caught.value.code, caught.value.detail


# Sources


def opened(location: Path | str, classes: list[str] | None = None, **settings: Any) -> Source:
    return open_source(location, BuildConfig(**settings), classes)


def items(source: Source) -> list[Item]:
    """All items; those without a label have None."""
    found: list[Item] = []
    for group in source.groups():
        for row, name in enumerate(group.names):
            label = group.label if group.labels is None else group.labels[row].tolist()
            place = () if group.places is None else tuple(group.places[row].tolist())
            found.append(Item(len(found), os.fsdecode(group.folder + name), None if label == -1 else label, place))
    return found


def labelled(source: Source) -> list[tuple[str, Any]]:
    """Path and label of all items."""
    return [(item.path, item.label) for item in items(source)]


def refusal(location: Path | str, classes: list[str] | None = None, **settings: Any) -> str:
    """The error of a source that cannot be opened or listed."""
    with pytest.raises((SourceError, UsageError)) as caught:
        items(opened(location, classes, **settings))
    return str(caught.value)


def reject(source: Source, item: Item) -> tuple[str, str]:
    """Code and detail with which an item is rejected when it is read."""
    with pytest.raises(BadItem) as caught:
        read_item(source, item)
    return caught.value.code, caught.value.detail


def pack(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """Writes a tar with these files, in this order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def only_test_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets S3 clients find the credentials of a test, and nobody's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
