"""What all benchmarks share: rates, rounds in which they take turns, the machine, and a folder of linked files."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..builder.pace import Pace, Stopwatch
from ..dataset.plan import Plan, collect
from ..machine.environment import usable_cpus
from ..sources.folders.folder import FolderSource

Way = Callable[["Tick"], None]  # does some work, and calls its argument after each step with the number of images


class Tick(Protocol):
    """See `Stopwatch.tick`."""

    def __call__(self, images: int, when: float | None = None, /) -> None: ...


@dataclass(frozen=True)
class Row:
    """One measured way.

    Attributes:
        name: what was measured.
        baselines: the names of the rows that it is compared with.
        rates: images per second from the first to the last step, one for each round.
        start_s: median of the seconds until the first step was done.
        end_s: median of the seconds after the last step.
    """

    name: str
    baselines: tuple[str, ...]
    rates: tuple[float, ...]
    start_s: float
    end_s: float = 0.0

    @property
    def median(self) -> float:
        """Median of the rates."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measurement:
    """A whole run.

    Attributes:
        rows: what was measured.
        settings: the settings that were used.
        machine: what it was measured on.
        left_out: what was not measured because packages are missing, and what to install.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def share(self, row: Row, baseline: str) -> float:
        """A row's rate divided by its baseline's in the same round, median of all rounds."""
        other = next(other for other in self.rows if other.name == baseline)
        return statistics.median(a / b for a, b in zip(row.rates, other.rates, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        rows = [
            {
                "name": row.name,
                "median": row.median,
                "rates": row.rates,
                "start_s": row.start_s,
                "end_s": row.end_s,
                "shares": {baseline: self.share(row, baseline) for baseline in row.baselines},
            }
            for row in self.rows
        ]
        return {"rows": rows, "settings": self.settings, "machine": self.machine, "left_out": self.left_out}


def rate(way: Way) -> Pace:
    """Measures one run.

    A decoder's start-up takes the same time for a thousand images as for a million, so it does not count for the rate.
    """
    watch = Stopwatch()
    way(watch.tick)
    return watch.stop()


def in_turns(
    ways: Mapping[str, tuple[tuple[str, ...], Way]], rounds: int, say: Callable[[str], None]
) -> tuple[Row, ...]:
    """Measures ways, given with their baselines by name, in rounds in which they take turns. A first round warms up."""
    paces: dict[str, list[Pace]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (_, way) in ways.items():
            say(f"round {number} of {rounds}: {name}")
            pace = rate(way)
            if number:
                paces[name].append(pace)
    return tuple(
        Row(
            name,
            baselines,
            tuple(pace.images_per_second for pace in paces[name]),
            statistics.median(pace.startup_seconds for pace in paces[name]),
            statistics.median(pace.teardown_seconds for pace in paces[name]),
        )
        for name, (baselines, _) in ways.items()
    )


def linked(src: str | os.PathLike[str], place: Path, images: int) -> Path:
    """A tree of `images` hard links to the files of `src`, or to copies where the filesystem has no such links."""
    collection = FolderSource(src)
    plan = Plan(collect(collection.groups()), 1)
    items = plan.items(0, min(images, plan.item_count))
    originals = [os.path.realpath(os.fsdecode(collection.local_path(item))) for item in items]
    for number in range(images):
        position = number % len(items)
        folder = place / f"class-{number * 100 // images:03}"
        folder.mkdir(parents=True, exist_ok=True)
        path = os.fspath(folder / f"{number:08}{Path(items[position].path).suffix}")
        try:
            os.link(originals[position], path)
        except OSError:  # another filesystem, too many links, or another user's file
            shutil.copyfile(originals[position], path)
            originals[position] = path
    return place


@contextlib.contextmanager
def folder_of(path: Path) -> Iterator[Path]:
    """A new empty folder, which is deleted at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def machine(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The processor, the number of usable cores, versions, and a decoder's provenance."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    versions = {name: version(name) for name in ("gpu-npz", "numpy", "isal")}
    return {"processor": model, "cores": usable_cpus(), **versions, **provenance}


def on_one_core(way: Way) -> Way:
    """The same, on one core."""

    def restricted(tick: Tick) -> None:
        with _one_core():
            way(tick)

    return restricted


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
