"""What a worker's main thread costs per image beside decoding: CPU time, by stage.

Everything that Python does for an image happens in that thread, so this cost limits how many images one worker can
process, however fast its decoder is. DALI decodes in threads of its own, which are not measured; the images are tiny
and lie in memory, so that these threads have next to nothing to do. Parsing headers is measured separately.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import BuildConfig
from ..dataset.job import Job
from ..errors import BackendError
from ..machine.environment import choose, inspect
from ..preprocess.geometry import Geometry
from ..preprocess.routing import route
from ..sources.folders.folder import FolderSource
from ..storage.local import LocalStorage
from ..workers.events import Progress, Task
from ..workers.worker import work
from .rates import folder_of, linked, machine
from .setup import Setup

IMAGES = 20_480
ROUNDS = 5
BATCH_SIZE = 256
_SIDE = 16  # pixels
_SHARD_ROWS = "4096"
_IN_MEMORY = "/dev/shm"  # noqa: S108  # a folder of our own is made in it


@dataclass(frozen=True)
class WorkerCost:
    """What was measured.

    Attributes:
        stages: microseconds of CPU time per image, by stage: the plan's batches, reading, decoding, and the rest.
        headers: microseconds of parsing headers per image, which no stage includes.
        settings: what was used.
        machine: what it was measured on.
    """

    stages: dict[str, float]
    headers: float
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def total(self) -> float:
        """All stages together."""
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {**asdict(self), "total": self.total}


def measure(
    config: BuildConfig | None = None,
    *,
    images: int = IMAGES,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> WorkerCost:
    """Measures a worker that decodes with DALI, on a GPU or on DALI's CPU operators.

    Args:
        config: device, batch size and so on; batches of 256 unless given.
        images: how many images each round processes.
        rounds: how often everything is measured. The least value counts, since other processes only add to it.
        folder: where to write; in memory if None and the system has such a folder.
        say: called with the name of what is measured next.

    Raises:
        BackendError: DALI cannot be used.
    """
    given = (config or BuildConfig()).model_dump()
    own = {"backend": "dali", "size": _SIDE, "shard_size": _SHARD_ROWS, "batch_size": given["batch_size"] or BATCH_SIZE}
    # As little work as possible for a CPU's normalizer, since a GPU normalizes without this thread.
    own |= {"dtype": "uint8", "normalize": "none", "layout": "NHWC"}
    settings = BuildConfig(**{**given, **own})
    choice = choose(settings, inspect(settings))
    if choice.backend != "dali":
        raise BackendError("bench worker measures DALI; see what `gpu-npz doctor` finds")
    in_memory = _IN_MEMORY if os.path.isdir(_IN_MEMORY) else None
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder or in_memory) as name:
        place = Path(name)
        (place / "tiny").mkdir()
        data = _tiny()
        (place / "tiny" / "image.jpg").write_bytes(data)
        setup = Setup.of(settings, choice, FolderSource(linked(place / "tiny", place / "src", images)), place)
        ways = {"plan": _planned, "read": _read, "decode": _decoded, "worker": _worked}
        headers, wholes = math.inf, dict.fromkeys(ways, math.inf)  # a stage's whole includes the stages before it
        for number in range(rounds):
            headers = min(headers, _headers(setup, data))
            for stage, way in ways.items():
                say(f"round {number + 1} of {rounds}: {stage}")
                wholes[stage] = min(wholes[stage], way(setup) * 1e6 / images)
        provenance = setup.decoder().provenance()
    costs = {
        stage: after - before for stage, (before, after) in zip(ways, pairwise([0.0, *wholes.values()]), strict=True)
    }
    costs["read"] -= headers
    return WorkerCost(costs, headers, {"images": images, **asdict(setup.tuning)}, machine(provenance))


def _tiny() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _headers(setup: Setup, data: bytes) -> float:
    """Microseconds per image of parsing headers."""
    assert setup.config.size is not None
    geometry = Geometry.of(setup.config, setup.config.size)
    count = setup.tuning.batch_size
    encoded = [memoryview(bytearray(data)) for _ in range(count)]
    repeats = max(1, setup.plan.item_count // count)
    begin = time.thread_time()
    for _ in range(repeats):
        route(encoded, setup.config, geometry)
    return (time.thread_time() - begin) / (repeats * count) * 1e6


def _spent(steps: Iterable[Any], begin: float) -> float:
    """The CPU time of this thread from `begin` to the last of the steps, in seconds."""
    end = begin
    for _ in steps:
        end = time.thread_time()
    return end - begin


def _planned(setup: Setup) -> float:
    return _spent(setup.batches(), time.thread_time())


def _read(setup: Setup) -> float:
    with setup.decoder() as decoder:
        return _spent(decoder.bare(setup.batches(), "read"), time.thread_time())


def _decoded(setup: Setup) -> float:
    with setup.decoder() as decoder:
        return _spent(decoder.decode(setup.batches()), time.thread_time())


def _worked(setup: Setup) -> float:
    """As the others; the start-up of the worker is over when it asks for its first shard."""
    begin = 0.0

    def shards() -> Iterator[int]:
        nonlocal begin
        begin = time.thread_time()
        yield from range(setup.plan.shard_count)

    assert setup.config.size is not None
    with folder_of(setup.place / "out") as out:
        Job.create(
            LocalStorage(out), setup.plan, setup.config, setup.choice, source=setup.source, image_size=setup.config.size
        )
        task = Task(os.fspath(out), setup.source, setup.choice.gpu, setup.tuning, None)
        end = 0.0
        for event in work(task, shards()):
            if isinstance(event, Progress):
                end = time.thread_time()
    return end - begin
