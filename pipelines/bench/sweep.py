"""Finds the options that make builds fastest on this machine.

With DALI, each cell of the sweep decodes and resizes for some seconds in this process, without storing anything. With
Pillow, a cell is a whole build, since Pillow decodes in the workers. The sweep starts from what a build chooses by
itself and changes one option after another, keeping a value only if it is plainly faster. At the end, two whole builds,
without and with the options that were found, decide whether to recommend them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..builder.pace import Stopwatch
from ..config import BuildConfig
from ..machine.environment import Choice, choose, inspect, usable_cpus
from ..sources.base import Source
from ..sources.folders.folder import FolderSource
from .rates import linked, machine, rate
from .setup import Setup

log = logging.getLogger(__name__)
SECONDS = 120.0
CELL_S = 3.0
_PLAINLY = 1.03
_IMAGES = {"cuda": 100_000, "cpu": 50_000}  # files that a cell or a build may use
_FIRST_IMAGES = 256  # of a build with Pillow that warms up


@dataclass(frozen=True)
class Trial:
    """One measured combination of options, by their settings' names; a build chooses all others by itself."""

    options: dict[str, Any]
    images_per_second: float


@dataclass(frozen=True)
class Sweep:
    """The result.

    Attributes:
        options: the fastest combination; empty if nothing is plainly faster than a build's own choice.
        gain: the rate of a build with it, divided by that of a build's own choice; 1 if there are no options.
        default: a build's own choice, by the names of `Tuning`.
        trials: all cells, in order; with DALI, the rates of decoding and resizing alone.
        builds: a whole build's own choice, and a whole build with the fastest options of the trials.
        images: how many images each of these builds processed.
        machine: what it was measured on.
    """

    options: dict[str, Any]
    gain: float
    default: dict[str, Any]
    trials: tuple[Trial, ...]
    builds: tuple[Trial, Trial]
    images: int
    machine: dict[str, Any]

    @property
    def share(self) -> float:
        """The rate of the second build, divided by that of the cell with the same options."""
        last = self.builds[1]
        cells = [trial.images_per_second for trial in self.trials if trial.options == last.options]
        return last.images_per_second / max(cells)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class _Bench:
    """Measures combinations of options.

    Attributes:
        config: the settings that are given.
        choice: what builds run on.
        source: the linked files.
        place: a folder for builds.
        cell_s: how long a cell takes, start-up not included.
    """

    config: BuildConfig
    choice: Choice
    source: Source
    place: Path
    cell_s: float

    def setup(self, options: dict[str, Any], limit: int | None = None) -> Setup:
        """The parts of a build with these options."""
        device = "cpu" if self.choice.gpu is None else str(self.choice.gpu)
        common = {"device": device, "backend": self.choice.backend, "max_rejects": "100%", "limit": limit}
        config = BuildConfig(**{**self.config.model_dump(), **common, **options})
        return Setup.of(config, self.choice, self.source, self.place)

    def built(self, options: dict[str, Any], images: int) -> float:
        """Images per second of a whole build."""
        return rate(self.setup(options, images).built).images_per_second

    def bare(self, options: dict[str, Any]) -> float:
        """Images per second of decoding and resizing alone, once all batches that DALI prefetches have started."""
        setup = self.setup(options)
        endless = itertools.chain.from_iterable(setup.batches() for _ in itertools.count())
        watch, end = Stopwatch(), 0.0
        with contextlib.ExitStack() as stack:
            decoder: Any = stack.enter_context(setup.decoder())
            batches = stack.enter_context(contextlib.closing(decoder.bare(endless, "resize")))
            for number, batch in enumerate(batches):
                if number < setup.tuning.batches_ahead:
                    continue
                watch.tick(len(batch.items))
                end = end or time.monotonic() + self.cell_s
                if time.monotonic() >= end and number > setup.tuning.batches_ahead:
                    break
        return watch.stop().images_per_second


def sweep(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    seconds: float = SECONDS,
    cell_s: float = CELL_S,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Looks for the fastest options; those that `config` gives stay as they are.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        config: the settings of the builds.
        seconds: after that time, no further option is tried; the two builds follow.
        cell_s: how long each cell measures.
        folder: where to write; the system's temporary folder if None.
        say: called with what is measured next.

    Raises:
        UsageError, BackendError, SourceError: as `build`.
    """
    config = config or BuildConfig()
    choice = choose(config, inspect(config))
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        source = FolderSource(linked(src, Path(name) / "src", _IMAGES[choice.device]))
        bench = _Bench(config, choice, source, Path(name), cell_s)
        enough = _IMAGES[choice.device]
        if choice.backend == "pillow":
            bench.built({}, _FIRST_IMAGES)  # warms up
            enough = int(bench.built({}, _FIRST_IMAGES) * cell_s)
        images = min(_IMAGES[choice.device], max(_FIRST_IMAGES, enough))

        def tried(options: dict[str, Any]) -> float:
            say(_named(options))
            found = bench.built(options, images) if choice.backend == "pillow" else bench.bare(options)
            log.info("%.0f images/s with %s", found, _named(options))
            trials.append(Trial(options, found))
            return found

        default = asdict(bench.setup({}, images).tuning)
        best: dict[str, Any] = {}
        begin, fastest = time.monotonic(), tried({})
        for option, candidates in _candidates(choice, config).items():
            for value in candidates:
                if value == default[option] or time.monotonic() - begin > seconds:
                    continue
                found = tried({**best, option: value})
                if found > fastest * _PLAINLY:
                    best, fastest = {**best, option: value}, found
        images = min(images, max(_FIRST_IMAGES, int(fastest * cell_s)))
        builds = []
        for options in ({}, best):
            say(f"a whole build with {_named(options)}")
            builds.append(Trial(options, bench.built(options, images)))
        provenance = bench.setup({}).decoder().provenance()
    own, ours = builds
    gain = ours.images_per_second / own.images_per_second
    plain = bool(best) and gain > _PLAINLY
    result = (best, gain) if plain else ({}, 1.0)
    return Sweep(*result, default, tuple(trials), (own, ours), images, machine(provenance))


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "a build's own choice"


def _candidates(choice: Choice, config: BuildConfig) -> dict[str, list[Any]]:
    """The values to try by option, the most important option first; without options that are given."""
    cores = usable_cpus()
    if choice.device == "cuda":
        found: dict[str, list[Any]] = {
            "hw_decoder_load": [] if config.reproducible else [0.0, 0.3, 0.5, 0.65, 0.8, 1.0],
            "threads": sorted({max(1, cores // 2), max(1, cores - 2), cores, 2 * cores, 4 * cores}),
            "pipelines": [1, 2, 3],
            "prefetch": [2, 3, 4],
            "batch_size": [128, 256, 512],
        }
    elif choice.backend == "dali":
        several = sorted({max(1, cores * quarters // 4) for quarters in (1, 2, 3, 4)})
        found = {"threads": several, "pipelines": [2], "prefetch": [3], "batch_size": [64, 128]}
    else:
        found = {"batch_size": [16, 64], "workers": [cores + 1], "open_shards": [2]}
    return {name: values for name, values in found.items() if getattr(config, name) is None}
