"""What benches share: rates, rounds that take turns, the machine's name, and a folder of as many files as wanted."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..dataset.plan import Plan, collect
from ..machine.environment import usable_cpus
from ..sources.folders.folder import FolderSource

Tick = Callable[[int], None]
Way = Callable[[Tick], None]  # does some work, and says after each step how many images it took


@dataclass(frozen=True)
class Row:
    """One measured way: images a second in each round, and how long it took to begin in the median.

    `baselines` names the rows that it is compared with.
    """

    name: str
    baselines: tuple[str, ...]
    rates: tuple[float, ...]
    start_s: float

    @property
    def median(self) -> float:
        """Median of the rates."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measurement:
    """A whole run: its rows, what they were measured with, and the machine."""

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def share(self, row: Row, baseline: str) -> float:
        """The median over rounds of a row's rate to its baseline's in the same round."""
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
                "shares": {baseline: self.share(row, baseline) for baseline in row.baselines},
            }
            for row in self.rows
        ]
        return {"rows": rows, "settings": self.settings, "machine": self.machine}


def rate(way: Way) -> tuple[float, float]:
    """Images a second, and the seconds until the first of them are done; these do not count for the rate.

    So a decoder's start, which is the same for a thousand images and for a million, does not blur what is measured. A
    way of one step only is measured as a whole.
    """
    begin, first, images, started = time.perf_counter(), 0, 0, 0.0

    def tick(count: int) -> None:
        nonlocal first, images, started
        if not started:
            started, first = time.perf_counter(), count
        else:
            images += count

    way(tick)
    end = time.perf_counter()
    if not images:
        return first / (end - begin), 0.0
    return images / (end - started), started - begin


def in_turns(
    ways: Mapping[str, tuple[tuple[str, ...], Way]], rounds: int, say: Callable[[str], None]
) -> tuple[Row, ...]:
    """Measures ways, given by name with their baselines, in rounds in which they take turns; a first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    starts: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (_, way) in ways.items():
            say(f"round {number} of {rounds}: {name}")
            found, start = rate(way)
            if number:
                rates[name].append(found)
                starts[name].append(start)
    return tuple(
        Row(name, baselines, tuple(rates[name]), statistics.median(starts[name]))
        for name, (baselines, _) in ways.items()
    )


def linked(src: str | os.PathLike[str], place: Path, images: int) -> Path:
    """A tree of `images` links to the files of `src`."""
    collection = FolderSource(src)
    plan = Plan(collect(collection.groups()), 1)
    items = plan.items(0, plan.item_count)
    for number in range(images):
        item = items[number % len(items)]
        folder = place / f"class-{number * 100 // images:03}"
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink(os.fsdecode(collection.local_path(item)), folder / f"{number:08}{Path(item.path).suffix}")
    return place


@contextlib.contextmanager
def folder_of(path: Path) -> Iterator[Path]:
    """A new empty folder, deleted in the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def machine(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The processor, how much of it may be used, versions, and what a decoder says of itself."""
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
