"""`gpu-npz plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from gpu_npz.cli.console import counted, errors, print_json, print_lines, printable, show_warnings
from gpu_npz.cli.options import CONFIG_FILE, PRESET, ConfigCommand, config_options, read_config
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.space import format_bytes

if TYPE_CHECKING:
    from gpu_npz.builder.estimate import Estimate
    from gpu_npz.builder.headers import Sample


@click.command("plan", cls=ConfigCommand)
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="[OUT]", required=False)
@click.option(
    "--seconds", type=click.FloatRange(0, 600), default=3.0, show_default=True, metavar="S", help="How long to measure."
)
@click.option(
    "--no-measure", is_flag=True, help="Do not measure, and do not estimate the duration. The same as --seconds 0."
)
@click.option("--folder", metavar="DIR", help="Where to measure. The default is the system's temporary folder.")
@config_options(*BuildConfig.model_fields)
@PRESET
@CONFIG_FILE
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    src: str,
    out: str | None,
    seconds: float,
    no_measure: bool,
    folder: str | None,
    preset: str | None,
    config_file: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Estimate the size, memory and time of a build with these arguments.

    The command lists SRC, reads about 1,000 image headers, and builds shards of some items for a few seconds in a
    temporary folder. It writes nothing to OUT, and only checks the free space there (or in the current folder).
    """
    from gpu_npz.builder.estimate import estimate

    show_warnings()
    config = read_config(config_file, given, preset)
    with Progress(console=errors(), transient=True, disable=as_json or not errors().is_terminal) as progress:
        task = progress.add_task("", total=None)
        found = estimate(
            src,
            config,
            out,
            seconds=0.0 if no_measure else seconds,
            folder=folder,
            progress=lambda stage, done, total: progress.update(task, description=stage, completed=done, total=total),
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_lines(_lines(found))


def _lines(found: Estimate) -> list[str]:
    tuning = found.tuning
    free = "" if found.free_bytes is None else f", {format_bytes(found.free_bytes)} free"
    workers = counted(tuning.workers, "worker") if tuning.workers else "no worker processes"
    shape = f"{found.image_size[0]} x {found.image_size[1]}"
    shards = (
        f"{counted(found.shards, 'shard')} of up to {found.shard_rows} rows, {format_bytes(found.output_bytes)}{free}"
    )
    lines = [
        f"{printable(found.source)}: {counted(found.items, 'item')}{_classes(found)}",
        *_labels(found),
        *_sides(found),
        *_sampled(found.sample, found.items),
        f"  output      images of {shape}, {format_bytes(found.row_bytes)} each; {shards}",
        f"  with        {found.backend} on the {'GPU' if found.device == 'cuda' else 'CPU'}, {workers}, "
        f"batches of {tuning.batch_size}, {counted(tuning.open_shards, 'open shard')} per worker",
        f"  memory      about {format_bytes(found.worker_memory_bytes)} per worker, "
        f"{format_bytes(found.memory_bytes)} in all",
    ]
    if found.measured and found.measured.gpu_memory_bytes:
        lines[-1] += f"; {format_bytes(found.measured.gpu_memory_bytes)} of the GPU"
    if found.measured and found.duration_s is not None:
        rate = f"{found.measured.images_per_second:.0f} images/s by one worker"
        lines.append(f"  duration    about {_time(found.duration_s)}: {rate}, {found.measured.items} items measured")
    if found.shards_left is not None:
        left = f"{found.shards_left} of {found.shards} shards are left to build"
        lines.append(f"  resumes     {left}, and the settings are those of OUT")
    return lines + [f"  warning     {printable(warning, keep=chr(10))}" for warning in found.warnings]


def _classes(found: Estimate) -> str:
    if found.classes is None or found.smallest_class is None or found.largest_class is None:
        return "" if found.columns else ", no labels"
    (small, least), (large, most) = found.smallest_class, found.largest_class
    if least == most:
        return f" in {counted(found.classes, 'class')}, {least} in each"
    return f" in {counted(found.classes, 'class')}, {least} ({printable(small)}) to {most} ({printable(large)}) in one"


def _labels(found: Estimate) -> list[str]:
    return [f"  labels      {printable(', '.join(map(str, found.columns)))}"] if found.columns else []


def _sides(found: Estimate) -> list[str]:
    counts = ", ".join(f"{items} {side}" for side, items in found.sides.items())
    return [f"  split       {counts}"] if counts else []


def _sampled(sample: Sample, items: int) -> list[str]:
    codes = ", ".join(f"{count} {code}" for code, count in sample.unreadable.items())
    lines = [f"  sample      {sample.items} headers, {codes or 'all'} {'cannot' if codes else 'can'} be read"]
    if not sample.sizes:
        return lines
    smallest, median, largest = (f"{height} x {width}" for height, width in sample.sizes)
    encoded = f"{format_bytes(sample.encoded_bytes)} encoded, about {format_bytes(sample.encoded_bytes * items)} in all"
    readable = sum(sample.formats.values())
    kinds = {
        "progressive": sample.progressive,
        "rotated by EXIF": sample.turned,
        "CMYK": sample.cmyk,
        "gray": sample.gray,
    }
    shares = [f"{count / readable:.1%} {kind}" for kind, count in kinds.items() if count]
    lines += [
        f"  sizes       {smallest} to {largest}, median {median}; {encoded}",
        f"  kinds       {'; '.join([_counts(sample.formats), _counts(sample.modes), *shares])}",
    ]
    if (heaviest := sample.heaviest) is not None:
        sides = f"{heaviest.height} x {heaviest.width} {heaviest.mode} {heaviest.format}"
        lines.append(
            f"  heaviest    {sides}, {format_bytes(heaviest.decode_bytes)} to decode: {printable(heaviest.path)}"
        )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
