"""What tests share: settings, whole builds, contents of a dataset, other processes, decoders, sources and tars."""

from __future__ import annotations

import io
import json
import os
import re
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

import gpu_npz
from gpu_npz.config import BuildConfig
from gpu_npz.errors import LockedError, SourceError, UsageError
from gpu_npz.preprocess.decoders import pillow_decoder
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.pillow import PillowDecoder
from gpu_npz.sources import open_source
from gpu_npz.sources.base import Item, Source, read_item
from gpu_npz.sources.rejects import BadItem
from gpu_npz.workers.worker import Progress

# The fixtures in conftest.py that are functions
Encode = Callable[..., bytes]
FileBytes = Callable[..., bytes]
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
