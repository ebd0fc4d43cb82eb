"""Measures how fast images are delivered to training: by our readers, from image files, and by other libraries.

All ways read the same images from the page cache. Each runs in a process of its own, which stays between the rounds in
which the ways take turns. A rate is that of a whole epoch.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..builder.build import build
from ..config import BuildConfig
from ..errors import BackendError, FormatError, SourceError, UsageError
from ..preprocess.pillow import versions
from ..readers.dataset import open_dataset
from ..workers.subprocesses import end_with_parent, running
from .loaders import LOADER, LOOP, WAYS, Library, Loading
from .rates import Measurement, Tick, in_turns, linked, machine

IMAGES = 1_536
ROUNDS = 5
BATCH_SIZE = 256
WORKERS = 2
_MEMORY_S = 0.1  # between two looks at the memory
_END_S = 10.0  # for an orderly end, before the process is killed
_NEAR = 1e-3  # difference of means: FFCV rounds values in another way


@dataclass(frozen=True)
class Epoch:
    """What a process says about an epoch.

    Attributes:
        images: how many were delivered.
        kind: dtype and shape of an image.
        mean: of all values; 0 except in the first epoch.
        memory_bytes: the most main memory that the process and its workers held; None if the system does not say.
    """

    images: int
    kind: tuple[str, tuple[int, ...]]
    mean: float
    memory_bytes: int | None


@dataclass(frozen=True)
class LoadingMeasurement(Measurement):
    """A whole run.

    Attributes:
        memory_bytes: of each row by name: the most main memory that its processes held in each round; None if the
            system does not say. Memory that processes share counts in each of them; mapped files do not count.
    """

    memory_bytes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        found = super().to_json()
        rows = [{**row, "memory_bytes": self.memory_bytes[row["name"]]} for row in found["rows"]]
        return {**found, "rows": rows}


def measure(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    images: int = IMAGES,
    rounds: int = ROUNDS,
    batch_size: int = BATCH_SIZE,
    workers: int = WORKERS,
    stored: bool = False,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> LoadingMeasurement:
    """Builds a uint8 dataset of some images and measures epochs of every way to load them.

    Args:
        src: a folder as for `build`; its files are linked until there are enough. They are decoded by Pillow.
        config: the settings of the build; it stores uint8 and NCHW whatever they say.
        images: how many images an epoch has.
        rounds: how many epochs of each way are measured; the ways take turns in each round.
        batch_size: images per batch.
        workers: threads of `loader` and FFCV, worker processes of the other ways; not of the loop.
        stored: deliver uint8 as stored, rather than normalized float32.
        folder: where to write; the system's temporary folder if None.
        say: called with the name of what is measured next.

    Raises:
        UsageError: a value that is not allowed.
        BackendError: PyTorch is not installed, or one of our ways failed.
        SourceError: as `build`.
        FormatError: a way delivered other images than the loop.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: batches need images of one size; choose another mode")
    from ..readers import torch as _torch  # noqa: F401  # fails now if it cannot be imported

    fixed = {"device": "cpu", "backend": "pillow", "max_rejects": "100%", "dtype": "uint8", "layout": "NCHW"}
    config = BuildConfig(**{**config.model_dump(), **fixed})
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name, contextlib.ExitStack() as stack:
        place = Path(name)
        say("building a dataset")
        source = linked(src, place / "src", images)
        build(source, place / "dataset", config)
        count = len(open_dataset(place / "dataset"))
        if not count:
            raise SourceError(
                f"{os.fspath(src)!r}: no image of it can be decoded; gpu-npz build says why, file by file"
            )
        libraries = {"torch": version("torch")}
        processes: dict[str, _Process] = {}
        for number, (way, (_, library)) in enumerate(WAYS.items()):
            say(f"preparing {way}")
            own = place / str(number)
            own.mkdir()
            loading = Loading(source, place / "dataset", own, batch_size, workers, stored)
            try:
                process = stack.enter_context(_process(way, loading, library))
            except _LeftOut as exc:
                left_out.append(str(exc))
                continue
            processes[way] = process
            _require_same(way, process.first, processes[LOOP].first, count)
            if library:
                libraries[library.name] = version(library.name)
        rows = in_turns({way: (_baselines(way), process.epoch) for way, process in processes.items()}, rounds, say)
    memory = {way: tuple(process.memory_bytes[-rounds:]) for way, process in processes.items()}
    settings = {
        "images": count,
        "shape": processes[LOOP].first.kind[1],
        "dtype": processes[LOOP].first.kind[0],
        "batch_size": batch_size,
        "workers": workers,
        "compress": config.compress,
    }
    return LoadingMeasurement(rows, settings, machine({**versions(), **libraries}), tuple(left_out), memory)


def _baselines(way: str) -> tuple[str, ...]:
    return {LOOP: (), LOADER: (LOOP,)}.get(way, (LOOP, LOADER))


class _LeftOut(Exception):
    """Why a way of another library is not measured."""


class _Process:
    """A process that loads epochs in one way.

    Attributes:
        first: the first epoch, which is not measured.
        memory_bytes: of all other epochs.
    """

    def __init__(self, connection: Connection, way: str, loading: Loading) -> None:
        self._connection, self._way, self._output = connection, way, _output(loading)
        self._send((way, loading))
        self.first: Epoch = self._next()
        self.memory_bytes: list[int | None] = []

    def epoch(self, tick: Tick) -> None:
        """Loads an epoch."""
        tick(0)
        self._send(True)
        found = self._next()
        tick(found.images)
        self.memory_bytes.append(found.memory_bytes)

    def end(self) -> None:
        """Lets the process end its workers and remove what a library has in shared memory."""
        with contextlib.suppress(OSError, EOFError):
            self._connection.send(False)
            if self._connection.poll(_END_S):
                self._connection.recv()

    def _send(self, what: Any) -> None:
        with contextlib.suppress(OSError):  # if it has ended, `_next` says so
            self._connection.send(what)

    def _next(self) -> Epoch:
        try:
            found: Epoch | ImportError = self._connection.recv()
        except (OSError, EOFError) as exc:
            lines = self._output.read_text(errors="replace").split("\n") if self._output.exists() else []
            why = next((line.strip() for line in reversed(lines) if line.strip()), "its process was killed")
            raise BackendError(f"{self._way}: {why}") from exc
        if isinstance(found, ImportError):
            raise found
        return found


@contextlib.contextmanager
def _process(way: str, loading: Loading, library: Library | None) -> Iterator[_Process]:
    """Starts a process, which loads a first epoch.

    Raises:
        _LeftOut: the library is missing, or fails.
        BackendError: a way without another library fails.
    """
    with running(__name__) as (connection, _):
        try:
            process = _Process(connection, way, loading)
        except ImportError as exc:
            raise _LeftOut(f"{way} is left out ({exc}); run: {library.install if library else ''}") from exc
        except BackendError as exc:
            if library is None:
                raise
            raise _LeftOut(f"{exc}; it is left out, since {library.name} fails here") from exc
        try:
            yield process
        finally:
            process.end()


def _output(loading: Loading) -> Path:
    return loading.place / "output.txt"


def _require_same(way: str, found: Epoch, expected: Epoch, count: int) -> None:
    """Raises FormatError if a way did not deliver each image once."""
    near = math.isclose(found.mean, expected.mean, rel_tol=_NEAR, abs_tol=_NEAR)
    if found.images != count or found.kind != expected.kind or not near:
        raise FormatError(
            f"{way}: an epoch had {found.images} images of {found.kind}, mean {found.mean:.6g}; expected {count} of "
            f"{expected.kind}, mean {expected.mean:.6g}"
        )


def serve(descriptor: int) -> None:
    """The process: receives a way and what to load, sends a first epoch, and another one for each True, until False."""
    connection = Connection(descriptor)
    way, loading = connection.recv()
    end_with_parent(descriptor)
    # Some libraries print.
    output = os.open(_output(loading), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        epochs = WAYS[way][0](loading)
    except ImportError as exc:
        connection.send(ImportError(str(exc)))
        return
    number, more = 0, True
    while more:
        connection.send(_loaded(epochs(number), with_mean=not number))
        number, more = number + 1, connection.recv()
    del epochs  # ends the workers
    gc.collect()
    connection.send(None)


def _loaded(batches: Iterable[Any], with_mean: bool) -> Epoch:
    images, total, memory, next_look = 0, 0.0, 0, 0.0
    kind: tuple[str, tuple[int, ...]] = "nothing", ()
    for batch, _ in batches:
        images += len(batch)
        kind = str(batch.dtype).removeprefix("torch."), tuple(batch.shape[1:])
        if with_mean:
            total += float(np.mean(np.asarray(batch), dtype=np.float64)) * len(batch)
        if (now := time.perf_counter()) >= next_look:
            memory, next_look = max(memory, _memory_bytes(os.getpid())), now + _MEMORY_S
    return Epoch(images, kind, total / max(images, 1), memory or None)


def _memory_bytes(process: int) -> int:
    """The main memory that a process and its descendants hold, without mapped files; 0 if the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        tasks = [Path(f"/proc/{process}/task/{task}/children") for task in os.listdir(f"/proc/{process}/task")]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:  # it has ended, or there is no /proc
        return 0
    own = sum(int(size) for size in re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", status, re.MULTILINE))
    return own * 1024 + sum(map(_memory_bytes, children))
