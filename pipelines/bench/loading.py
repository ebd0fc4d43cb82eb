"""Measures how fast images are delivered to training: by our readers, from image files, and by other libraries.

All ways read the same images from the page cache. Each runs in a process of its own, which stays between the rounds in
which the ways take turns. A rate is that of a whole epoch.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..builder.build import build
from ..config import MAX_SIDE, BuildConfig, parse_size
from ..errors import BackendError, FormatError, SourceError, UsageError
from ..preprocess.pillow import versions
from ..readers.augment import Augment, Size
from ..readers.dataset import open_dataset
from ..workers.subprocesses import end_with_parent, running
from .loaders import LOADER, LOOP, WAYS, Loading, Way
from .rates import Measurement, Tick, in_turns, linked, machine

IMAGES = 1_536
ROUNDS = 5
BATCH_SIZE = 256
WORKERS = 2
_MEMORY_S = 0.1  # between two looks at the memory
_END_S = 10.0  # for an orderly end, before the process is killed
_NEAR = 1e-3  # difference of means and deviations: FFCV rounds values in another way
# Of random crops, as a share of the deviation of all values. The mean of a crop varies by less than the values do, so
# that of n crops by less than 1 / sqrt(n), and a difference by sqrt(2 / n), of which this allows three.
_CROPS_NEAR = 3 * math.sqrt(2)
_OTHER_PARTS = 0.05  # the same, whatever n: crops of image files also have what the resize mode cuts off

Kind = tuple[str, tuple[int, ...]]  # dtype and shape of an image


@dataclass(frozen=True)
class Epoch:
    """What a process says about an epoch.

    Attributes:
        images: how many were delivered.
        kind: dtype and shape of an image.
        mean: of all values; 0 except in the first epoch.
        deviation: the standard deviation of all values; 0 except in the first epoch.
        memory_bytes: the most main memory that the process and its workers held; None if the system does not say.
    """

    images: int
    kind: Kind
    mean: float
    deviation: float
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
    augment: Augment | None = None,
    crop_size: Size | str | None = None,
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
        augment: "rrc-flip" to deliver random crops, flipped or not, by the ways that can do it.
        crop_size: the size to which crops are resized, as `BuildConfig.size`; the stored size if None.
        folder: where to write; the system's temporary folder if None.
        say: called with the name of what is measured next.

    Raises:
        UsageError: a value that is not allowed.
        BackendError: PyTorch is not installed, or one of our ways failed.
        SourceError: as `build`.
        FormatError: a way delivered other images than the first one.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: batches need images of one size; choose another mode")
    size = _crop_size(augment, crop_size, config)
    from ..readers import torch as _torch  # noqa: F401  # fails now if it cannot be imported

    fixed = {"device": "cpu", "backend": "pillow", "max_rejects": "100%", "dtype": "uint8", "layout": "NCHW"}
    config = BuildConfig(**{**config.model_dump(), **fixed})
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name, contextlib.ExitStack() as stack:
        place = Path(name)
        say("building a dataset")
        source = linked(src, place / "src", images)
        build(source, place / "dataset", config)
        data = open_dataset(place / "dataset")
        if not len(data):
            raise SourceError(
                f"{os.fspath(src)!r}: no image of it can be decoded; gpu-npz build says why, file by file"
            )
        loading = Loading(source, place / "dataset", place, batch_size, workers, stored, augment, size)
        shape = (data.image_shape[0], *(size or data.image_shape[1:]))
        kind = "uint8" if stored else "float32", shape
        processes, left_out = _started(loading, len(data), kind, stack, say)
        turns = {way.name: (_baselines(way, processes), process.epoch) for way, process in processes.items()}
        rows = in_turns(turns, rounds, say)
    memory = {way.name: tuple(process.memory_bytes[-rounds:]) for way, process in processes.items()}
    settings = {
        "images": len(data),
        "shape": shape,
        "dtype": kind[0],
        "batch_size": batch_size,
        "workers": workers,
        "compress": config.compress,
        **({"augment": augment, "stored_shape": data.image_shape} if augment else {}),
    }
    libraries = {name: version(name) for name in ("torch", *(way.library.name for way in processes if way.library))}
    return LoadingMeasurement(rows, settings, machine({**versions(), **libraries}), tuple(left_out), memory)


def _crop_size(augment: Augment | None, given: Any, config: BuildConfig) -> tuple[int, int] | None:
    """The size of crops, None without `augment`."""
    if given is not None and augment is None:
        raise UsageError(f"crop-size: got {given!r}, but whole images are delivered; give --augment rrc-flip, too")
    size = config.size if given is None else parse_size(given)
    if size is None:
        raise UsageError(f"crop-size: got {given!r}; allowed: N or HxW, each side 1 to {MAX_SIDE}")
    return size if augment else None


def _started(
    loading: Loading, count: int, kind: Kind, stack: contextlib.ExitStack, say: Callable[[str], None]
) -> tuple[dict[Way, _Process], list[str]]:
    """A process for each way, which ends with `stack`; and which ways are left out, and why.

    Args:
        loading: what is loaded; each way gets a folder of its own in its `place`.
        count: how many images an epoch must have.
        kind: dtype and shape that an image must have.
        stack: ends the processes.
        say: called with the name of what is prepared next.

    Raises:
        BackendError: a way without another library fails.
        FormatError: a way delivers other images than the first one.
    """
    ways = [way for way in WAYS if loading.augment in way.augments]
    names = [way.name for way in ways]
    others = [way.name for way in WAYS if way.name not in names]
    left_out = [f"not measured with --augment {loading.augment}: {', '.join(others)}"] if others else []
    processes: dict[Way, _Process] = {}
    for number, way in enumerate(ways):
        say(f"preparing {way.name}")
        own = loading.place / str(number)
        own.mkdir()
        try:
            process = stack.enter_context(_process(way, replace(loading, place=own)))
        except _LeftOut as exc:
            left_out.append(str(exc))
            continue
        processes[way] = process
        first = next(iter(processes.values())).first
        tolerance = first.deviation * (_CROPS_NEAR / math.sqrt(count) + _OTHER_PARTS) if loading.augment else 0.0
        _require_same(way.name, process.first, replace(first, images=count, kind=kind), tolerance)
    return processes, left_out


def _baselines(way: Way, ways: Iterable[Way]) -> tuple[str, ...]:
    """The names of the ways with which this one is compared: of the loop and `loader`, those before it."""
    before = itertools.takewhile(lambda each: each != way, ways)
    return tuple(each.name for each in before if each.name in (LOOP, LOADER))


class _LeftOut(Exception):
    """Why a way of another library is not measured."""


class _Process:
    """A process that loads epochs in one way.

    Attributes:
        first: the first epoch, which is not measured.
        memory_bytes: of all other epochs.
    """

    def __init__(self, connection: Connection, way: Way, loading: Loading) -> None:
        self._connection, self._way, self._output = connection, way.name, _output(loading)
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
def _process(way: Way, loading: Loading) -> Iterator[_Process]:
    """Starts a process, which loads a first epoch.

    Raises:
        _LeftOut: the library is missing, or fails.
        BackendError: a way without another library fails.
    """
    with running(__name__) as (connection, _):
        try:
            process = _Process(connection, way, loading)
        except ImportError as exc:
            install = way.library.install if way.library else ""
            raise _LeftOut(f"{way.name} is left out ({exc}); run: {install}") from exc
        except BackendError as exc:
            if way.library is None:
                raise
            raise _LeftOut(f"{exc}; it is left out, since {way.library.name} fails here") from exc
        try:
            yield process
        finally:
            process.end()


def _output(loading: Loading) -> Path:
    return loading.place / "output.txt"


def _require_same(way: str, found: Epoch, expected: Epoch, tolerance: float) -> None:
    """Raises FormatError if a way did not deliver each image once, or a crop of each.

    Args:
        way: its name.
        found: what it delivered.
        expected: what it should deliver.
        tolerance: the allowed difference of mean and deviation, beside that of rounding.
    """
    near = all(
        math.isclose(one, other, rel_tol=_NEAR, abs_tol=max(_NEAR, tolerance))
        for one, other in ((found.mean, expected.mean), (found.deviation, expected.deviation))
    )
    if (found.images, found.kind) != (expected.images, expected.kind) or not near:
        raise FormatError(f"{way}: an epoch had {_described(found)}; expected {_described(expected)}")


def _described(epoch: Epoch) -> str:
    return f"{epoch.images} images of {epoch.kind}, mean {epoch.mean:.6g}, deviation {epoch.deviation:.6g}"


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
        epochs = way.prepare(loading)
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
    images, memory, next_look = 0, 0, 0.0
    sums = np.zeros(2)  # of the images' means, and of the means of their squares
    kind: Kind = "nothing", ()
    for batch, _ in batches:
        images += len(batch)
        kind = str(batch.dtype).removeprefix("torch."), tuple(batch.shape[1:])
        for image in np.asarray(batch) if with_mean else ():
            values = image.astype(np.float64)
            sums += values.mean(), np.square(values).mean()
        if (now := time.perf_counter()) >= next_look:
            memory, next_look = max(memory, _memory_bytes(os.getpid())), now + _MEMORY_S
    mean, square = (sums / max(images, 1)).tolist()
    return Epoch(images, kind, mean, math.sqrt(max(0.0, square - mean**2)), memory or None)


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
