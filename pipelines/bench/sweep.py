"""Which options make builds fastest on this machine: whole builds, one option varied after the other.

The start is what a build takes by itself. An option keeps another value only if that is plainly faster, and in the end
the best combination and the start take turns again: two runs of the same thing differ, too.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..builder.build import build
from ..config import BuildConfig
from ..machine.environment import choose, inspect, usable_cpus
from ..sources.folders.folder import FolderSource
from ..workers.events import Progress
from .rates import Tick, folder_of, linked, machine, rate
from .setup import Setup

SECONDS = 60.0
_PLAINLY = 1.03
_CONFIRMING_ROUNDS = 3
_MAX_IMAGES = 50_000
_TRIAL_S = 2.0  # an own start-up not counted
_FIRST_IMAGES = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class Trial:
    """One measured combination of options, by their settings' names; what is not named is a build's own choice."""

    options: dict[str, Any]
    images_per_second: float


@dataclass(frozen=True)
class Sweep:
    """What was found.

    Attributes:
        options: the fastest combination; empty if nothing is plainly faster than a build's own choice.
        gain: its rate to that of a build's own choice, in the median of rounds that took turns.
        default: a build's own choice, by the names of `Tuning`.
        trials: everything that was measured on the way, in order.
        images: how many images a trial took.
        machine: what it was measured on.
    """

    options: dict[str, Any]
    gain: float
    default: dict[str, Any]
    trials: tuple[Trial, ...]
    images: int
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def sweep(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    seconds: float = SECONDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Looks for the fastest options; what `config` gives stays as it is.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        config: the settings of the builds.
        seconds: no further option is tried after that time; what was begun is finished.
        folder: where to write; the system's temporary folder if None.
        say: told what is being measured.

    Raises:
        UsageError, BackendError, SourceError: as `build`.
    """
    config = config or BuildConfig()
    choice = choose(config, inspect(config.device))
    trials: list[Trial] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        place = Path(name)
        source = FolderSource(linked(src, place / "src", _MAX_IMAGES))
        device = "cpu" if choice.gpu is None else str(choice.gpu)
        common = {"device": device, "backend": choice.backend, "max_rejects": "100%"}
        first = _FIRST_IMAGES[choice.device]

        def tried(options: dict[str, Any], images: int) -> float:
            values = {**config.model_dump(), **common, "limit": images, **options}
            say(", ".join(f"{name} {value}" for name, value in options.items()) or "a build's own choice")

            def way(tick: Tick) -> None:
                with folder_of(place / "out") as out:
                    build(
                        source.location,
                        out,
                        BuildConfig(**values),
                        progress=lambda event: tick(event.items) if isinstance(event, Progress) else None,
                    )

            trials.append(Trial(options, rate(way).images_per_second))
            return trials[-1].images_per_second

        tried({}, first)  # warms up
        images = min(_MAX_IMAGES, max(first, int(tried({}, first) * _TRIAL_S)))
        setup = Setup.of(BuildConfig(**{**config.model_dump(), **common, "limit": images}), choice, source, place)
        default = asdict(setup.tuning)
        best: dict[str, Any] = {}
        fastest = tried({}, images)
        for option, candidates in _candidates(choice.backend, choice.device, config).items():
            for value in candidates:
                if value == default[option] or time.monotonic() - begin > seconds:
                    continue
                found = tried({**best, option: value}, images)
                if found > fastest * _PLAINLY:
                    best, fastest = {**best, option: value}, found
        pairs = [(tried({}, images), tried(best, images)) for _ in range(_CONFIRMING_ROUNDS if best else 0)]
        gain = statistics.median(ours / own for own, ours in pairs) if pairs else 1.0
        provenance = setup.decoder().provenance()
    plain = gain > _PLAINLY
    return Sweep(best if plain else {}, gain if plain else 1.0, default, tuple(trials), images, machine(provenance))


def _candidates(backend: str, device: str, config: BuildConfig) -> dict[str, list[Any]]:
    """Values worth a try by the option's name, the most telling option first; options that are given are left out."""
    cores = usable_cpus()
    several = sorted({max(1, cores * quarters // 4) for quarters in (1, 2, 3, 4)})
    if device == "cuda":
        found: dict[str, list[Any]] = {
            "hw_decoder_load": [] if config.reproducible else [0.0, 0.5, 0.8, 1.0],
            "threads": several,
            "batch_size": [128, 512],
            "open_shards": [2, 8],
            "prefetch": [2, 4],
        }
    elif backend == "dali":
        found = {"threads": several, "batch_size": [64, 128], "prefetch": [3], "open_shards": [2]}
    else:
        found = {"batch_size": [16, 64], "workers": [cores + 1], "open_shards": [2]}
    return {name: values for name, values in found.items() if getattr(config, name) is None}
