"""`gpu-npz build`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from gpu_npz.builder.build import build, build_split
from gpu_npz.builder.report import BuildReport
from gpu_npz.cli.console import counted, print_json, print_lines, printable, show_warnings
from gpu_npz.cli.options import CONFIG_FILE, PRESET, ConfigCommand, config_options, read_config
from gpu_npz.cli.progress import Bar, JsonLines
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.layout import REPORT
from gpu_npz.dataset.space import format_bytes
from gpu_npz.errors import RejectLimitError, UsageError
from gpu_npz.workers.messages import Message
from gpu_npz.workers.subprocesses import WORKER, discard

_SHOWN = 3  # the number of files listed with a message


@click.command("build", cls=ConfigCommand)
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@config_options(*BuildConfig.model_fields)
@PRESET
@CONFIG_FILE
@click.option("--dry-run", is_flag=True, help="Build nothing; show what `gpu-npz plan` shows.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option(
    "--progress",
    "progress_form",
    type=click.Choice(["bar", "json"]),
    default="bar",
    help="Show a progress bar on a terminal, or print progress and report as JSON lines on stdout.  [default: bar]",
)
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
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
    progress_form: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Build NPZ shards in OUT from the images in SRC.

    SRC is a folder of class folders or of images, an archive, a table, a Parquet file, an array, or an object store.
    If a build was interrupted, run the same command again to resume it.
    """
    if dry_run:
        from gpu_npz.cli import plan

        discard(WORKER)
        context.invoke(plan.command, src=src, out=out, preset=preset, config_file=config_file, as_json=as_json, **given)
        return
    if progress_form == "json" and as_json:
        raise UsageError("--json and --progress json contradict each other; omit --json: the last line has the report")
    show_warnings()
    config = read_config(config_file, given, preset)
    if config.workers == 0 or config.engine == "ray":
        discard(WORKER)
    lines = JsonLines() if progress_form == "json" else None
    with Bar(hidden=quiet or as_json or lines is not None) as bar:
        on_event: Any = lines or bar
        try:
            if config.several:
                by_side = (lambda side, event: lines(event, side)) if lines else (lambda side, event: bar(event))
                reports = build_split(src, out, config, progress=by_side)
            else:
                reports = {"": build(src, out, config, progress=on_event)}
        except RejectLimitError as exc:
            if as_json or lines:
                _print_reports({os.path.basename(exc.report.out) if config.several else "": exc.report}, lines)
            raise
    if as_json or lines:
        _print_reports(reports, lines)
    elif not quiet:
        print_lines(line for report in reports.values() for line in summary(report).split("\n"))


def _print_reports(reports: Mapping[str, BuildReport], lines: JsonLines | None) -> None:
    """Prints reports as JSON: an object of all sides of a split, or one report; or a line for each."""
    found = {side: report.to_json() for side, report in reports.items()}
    if lines is None:
        print_json(found.get("", found))
        return
    for side, report in found.items():
        lines.print("finished", side, report=report)


def summary(report: BuildReport) -> str:
    """Summarizes a build for humans, in several lines."""
    columns = report.label_columns
    labels = f"labels: {', '.join(columns[:5])}{', ...' * (len(columns) > 5)}" if columns else "no labels"
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
    workers = counted(tuning.workers, "worker") if tuning.workers else "no worker processes"
    gpu_memory = f", {format_bytes(report.gpu_memory_bytes)} per GPU" if report.gpu_memory_bytes else ""
    around = f"(start-up {report.startup_seconds:.1f} s, teardown {report.teardown_seconds:.1f} s)"
    if not report.startup_seconds and not report.teardown_seconds:
        around = "including the start-up"  # there was only one batch
    rate = f"{report.images_per_second:.0f} images/s {around}"
    lines += [
        f"  built       {report.built_items} items in {report.seconds:.1f} s: {rate}",
        f"  with        {report.backend} on the {place}, {workers}, batches of {tuning.batch_size}",
        f"  memory      {format_bytes(report.worker_memory_bytes)} per worker{gpu_memory}",
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
