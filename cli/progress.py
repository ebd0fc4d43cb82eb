"""The progress of builds: a bar on a terminal's stderr, or JSON lines on stdout."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from gpu_npz.builder.planning import Measuring
from gpu_npz.builder.report import Started
from gpu_npz.cli.console import counted, errors
from gpu_npz.dataset.space import format_bytes
from gpu_npz.workers import events

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_S = 1.0  # between two JSON lines about progress


class Bar:
    """A progress bar on stderr that shows a build's events. Calling it with an event updates it."""

    def __init__(self, *, hidden: bool) -> None:
        self._hidden = hidden
        self._progress = None if hidden or not errors().is_terminal else _rich_bar()
        self._start = self._rejects = self._bytes = 0

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, event: Started | Measuring | events.Event) -> None:
        if isinstance(event, Started) and 0 < event.items_done < event.items and not self._hidden:
            errors().print(f"resuming: {event.items_done} of {counted(event.items, 'item')} are built already")
        if self._progress:
            self._show(event, self._progress)

    def _show(self, event: Started | Measuring | events.Event, progress: Progress) -> None:
        (task,) = progress.tasks
        if isinstance(event, Measuring):
            progress.update(
                task.id, description="measuring", total=event.items, completed=event.items_done, visible=True
            )
        elif isinstance(event, Started):
            progress.reset(task.id, description="building", total=event.items, completed=event.items_done, visible=True)
            self._start, self._rejects, self._bytes = event.items_done, 0, 0
        elif isinstance(event, events.Progress):
            self._rejects += event.rejects
            self._bytes += event.source_bytes
            elapsed = max(task.elapsed or 0.0, 1e-3)
            done = task.completed + event.items - self._start
            rates = (
                f"{done / elapsed:.0f} images/s  {format_bytes(self._bytes / elapsed)}/s read  {self._rejects} rejects"
            )
            progress.update(task.id, advance=event.items, rates=rates)


def _rich_bar() -> Progress:
    """A progress bar with one invisible task."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[rates]}"),
        TimeRemainingColumn(),
        console=errors(),
        transient=True,
    )
    bar.add_task("building", total=None, rates="", visible=False)
    return bar


class JsonLines:
    """Prints a build's events on stdout, for programs: one JSON object per line, flushed at once.

    Each line has the key `event`. `started` has the numbers of items in total and built before; `progress`, at most one
    per second, how many items are done, how many of this run's were rejected, and its seconds and images per second;
    `measuring` and `shard` are described in `cli/README.md`. Lines of a split have the key `side`.
    """

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._items = self._start = self._done = self._rejects = 0

    def __call__(self, event: Started | Measuring | events.Event, side: str = "") -> None:
        now = time.monotonic()
        if isinstance(event, Started):
            self._begin = self._last = now
            self._items, self._start, self._done, self._rejects = event.items, event.items_done, event.items_done, 0
            self.print(
                "started", side, items=event.items, items_done=event.items_done, backend=event.backend,
                device=event.device, workers=event.workers,
            )  # fmt: skip
        elif isinstance(event, Measuring):
            if now - self._last >= _LINE_S:
                self._last = now
                self.print("measuring", side, items=event.items, items_done=event.items_done)
        elif isinstance(event, events.Progress):
            self._done += event.items
            self._rejects += event.rejects
            if now - self._last >= _LINE_S or self._done == self._items:
                self._last = now
                seconds = max(now - self._begin, 1e-3)
                self.print(
                    "progress", side, items=self._items, items_done=self._done, rejects=self._rejects,
                    seconds=round(seconds, 1), images_per_second=round((self._done - self._start) / seconds, 1),
                )  # fmt: skip
        elif isinstance(event, events.Committed):
            self.print("shard", side, shard=event.record.shard, rows=event.record.rows, bytes=event.record.bytes)

    @staticmethod
    def print(event: str, side: str = "", **values: Any) -> None:
        """Prints one line."""
        click.echo(json.dumps({"event": event, **({"side": side} if side else {}), **values}))
