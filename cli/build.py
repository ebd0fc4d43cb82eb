"""`gpu-npz build`."""

from __future__ import annotations

import os
from typing import Any

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gpu_npz.builder.build import build, build_split
from gpu_npz.builder.planning import Measuring
from gpu_npz.builder.report import BuildReport, Started
from gpu_npz.cli.console import counted, errors, print_json, printable, show_warnings
from gpu_npz.cli.options import ConfigCommand, config_options, read_config
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.layout import REPORT
from gpu_npz.dataset.space import format_bytes
from gpu_npz.errors import RejectLimitError
from gpu_npz.workers import events
from gpu_npz.workers.messages import Message

_SHOWN = 3  # the number of files listed with a message


@click.command("build", cls=ConfigCommand)
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@config_options(*BuildConfig.model_fields)
@click.option("--preset", metavar="NAME|FILE.json", help="Take a published model's preprocessing; options given win.")
@click.option("--config", "config_file", metavar="FILE.toml", help="Take settings from a file; options given win.")
@click.option("--dry-run", is_flag=True, help="Build nothing: show what `gpu-npz plan` shows.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.pass_context
def command(
    context: click.Context,
    /,
    src: str,
    out: str,
    preset: str | None,
    config_file: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Build NPZ shards in OUT from the images in SRC.

    SRC is a folder of class folders, or a folder of images. The same command again goes on with a build that was
    stopped, and says so if there is nothing left to do.
    """
    if dry_run:
        from gpu_npz.cli import plan

        context.invoke(plan.command, src=src, out=out, preset=preset, config_file=config_file, as_json=as_json, **given)
        return
    show_warnings()
    config = read_config(config_file, given, preset)
    with Bar(hidden=quiet or as_json) as bar:
        try:
            if config.several:
                reports = build_split(src, out, config, progress=lambda side, event: bar(event))
            else:
                reports = {"": build(src, out, config, progress=bar)}
        except RejectLimitError as exc:
            if as_json:
                ended = exc.report.to_json()
                print_json({os.path.basename(exc.report.out): ended} if config.several else ended)
            raise
    if as_json:
        found = {side: report.to_json() for side, report in reports.items()}
        print_json(found if config.several else found[""])
    elif not quiet:
        click.echo("\n".join(map(summary, reports.values())))


def summary(report: BuildReport) -> str:
    """Summarizes a build for humans, in several lines."""
    columns = report.label_columns
    labels = f"labels {', '.join(columns[:5])}{', ...' * (len(columns) > 5)}" if columns else "no labels"
    labels = f" ({printable(labels)})" if report.classes is None else f" of {counted(report.classes, 'class')}"
    shards = f"{counted(report.shards, 'shard')}, {format_bytes(report.dataset_bytes)}"
    lines = [
        f"{printable(report.out)}: {counted(report.rows, 'image')}{labels} in {shards}",
        f"  rejects     {_rejects(report)}",
    ]
    if report.missing_shards:
        left = f"{report.missing_shards} of {report.shards} shards are left for others; the last part finishes"
        lines.append(f"  part        {report.part} is built; {left}")
    if not report.built_shards:
        return "\n".join([*lines, f"  {'complete; ' if report.complete else ''}nothing was left to build"])
    tuning, place = report.tuning, "GPU" if report.device == "cuda" else "CPU"
    workers = counted(tuning.workers, "worker") if tuning.workers else "no worker but itself"
    gpu_memory = f", {format_bytes(report.gpu_memory_bytes)} on its GPU" if report.gpu_memory_bytes else ""
    around = f"(start-up {report.startup_seconds:.1f} s, teardown {report.teardown_seconds:.1f} s)"
    rate = f"{report.images_per_second:.0f} images/s {around}"
    lines += [
        f"  built       {report.built_items} items in {report.seconds:.1f} s: {rate}",
        f"  with        {report.backend} on the {place}, {workers}, batches of {tuning.batch_size}",
        f"  memory      {format_bytes(report.worker_memory_bytes)} in a worker{gpu_memory}",
    ]
    if report.decoded_by.get("dali"):
        lines.append(f"  decoders    {_decoders(report)}")
    if report.bottleneck:
        lines.append(f"  bottleneck  {report.bottleneck}")
    lines += [f"  message     {_message(message)}" for message in report.messages]
    return "\n".join([*lines, *(f"  hint        {hint}" for hint in report.hints)])


def _message(message: Message) -> str:
    """Formats a decoder's message, the number of times it was logged, and some of the files it is about."""
    files = [*map(printable, message.files[:_SHOWN])]
    if len(message.files) > _SHOWN:
        files.append(f"{len(message.files) - _SHOWN} more in {REPORT}")
    if not message.all_files:
        files.append("maybe others")
    return f"{message.count} x {message.text!r}: {', '.join(files)}"


def _decoders(report: BuildReport) -> str:
    """Formats the number of images that each decoder decoded, and the results of the spot checks."""
    decoders = f"DALI {report.decoded_by['dali']} images, Pillow {report.decoded_by.get('pillow', 0)}"
    if not report.spot_checks:
        return decoders
    return f"{decoders}; {report.spot_checks} of DALI's compared with Pillow's, {report.spot_check_differences} differ"


def _rejects(report: BuildReport) -> str:
    if not report.rejects:
        return "none"
    codes = ", ".join(f"{count} {code}" for code, count in report.rejects_by_code.items())
    return f"{report.rejects} ({codes}); rejects.jsonl names them"


class Bar:
    """A progress bar on stderr that shows a build's events. Calling it with an event updates it."""

    def __init__(self, *, hidden: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[rates]}"),
            TimeRemainingColumn(),
            console=errors,
            disable=hidden or not errors.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("building", total=None, rates="", visible=False)
        self._start = self._rejects = self._bytes = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Started | Measuring | events.Event) -> None:
        task = self._progress.tasks[0]
        if isinstance(event, Measuring):
            self._progress.update(
                self._task, description="measuring", total=event.items, completed=event.items_done, visible=True
            )
        elif isinstance(event, Started):
            self._progress.reset(
                self._task, description="building", total=event.items, completed=event.items_done, visible=True
            )
            self._start, self._rejects, self._bytes = event.items_done, 0, 0
        elif isinstance(event, events.Progress):
            self._rejects += event.rejects
            self._bytes += event.source_bytes
            elapsed = max(task.elapsed or 0.0, 1e-3)
            done = task.completed + event.items - self._start
            rates = (
                f"{done / elapsed:.0f} images/s  {format_bytes(self._bytes / elapsed)}/s read  {self._rejects} rejects"
            )
            self._progress.update(self._task, advance=event.items, rates=rates)
