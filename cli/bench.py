"""`gpu-npz bench`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_npz.cli.options import config_options, read_config

if TYPE_CHECKING:
    from gpu_npz.bench.rates import Measurement
    from gpu_npz.bench.sweep import Sweep

# Memory that the kernel turns into huge pages and back makes float32 rates swing; NumPy reads this when it is imported.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")

_USED = ("device", "backend", "require_gpu", "reproducible", "size", "resize_mode", "interpolation", "channels",
         "normalize", "dtype", "layout", "shard_size", "batch_size", "threads", "prefetch", "open_shards",
         "hw_decoder_load")  # fmt: skip


@click.group("bench")
def command() -> None:
    """Measure on this machine. Compare the ratios of one run, not the figures of two."""


@command.command("pipeline")
@click.argument("src", metavar="[SRC]", required=False)
@click.option("--sweep", "sweeping", is_flag=True, help="Look for the options that make builds fastest here instead.")
@click.option(
    "--images",
    type=click.IntRange(1),
    metavar="N",
    help="Images that each line takes; 20,000 on a GPU, 2,000 on a CPU unless given.",
)
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Rounds; the ways take turns in each.",
)
@click.option("--seconds", default=60.0, show_default=True, type=float, help="How long a sweep may take, about.")
@click.option("--folder", metavar="DIR", help="Where to write; the system's temporary folder unless given.")
@config_options(*_USED)
@click.option("--json", "as_json", is_flag=True, help="Print the measurement as JSON on stdout.")
def pipeline(
    src: str | None,
    sweeping: bool,
    images: int | None,
    rounds: int,
    seconds: float,
    folder: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure each stage of a build, whole builds, and the shard writer beside NumPy's.

    Every line goes through the stages of the lines above it, too, so the first that falls behind is the bottleneck. The
    time until the first batch is not counted. SRC is a folder as for build; pictures are made up if there is none.
    """
    from gpu_npz.bench.pipeline import measure
    from gpu_npz.bench.sweep import sweep
    from gpu_npz.cli.console import errors, print_json
    from gpu_npz.demo import make_images

    config = read_config(None, given)
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors.status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(make_images(Path(place) / "pictures").folder)
        result: Measurement | Sweep
        if sweeping:
            result = sweep(src, config, seconds=seconds, folder=folder, say=status.update)
            lines = _sweep_lines(result)
        else:
            result = measure(src, config, images=images, rounds=rounds, folder=folder, say=status.update)
            lines = _lines(result)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(lines))


def _lines(result: Measurement) -> list[str]:
    lines = [_named(result.machine), _named(result.settings), ""]
    lines.append(f"{'':16} {'images/s':>10} {'lowest':>10} {'highest':>10} {'begins in':>10}   share of another's rate")
    for row in result.rows:
        shares = ", ".join(f"{result.share(row, name):.2f} of {name}" for name in row.baselines)
        low, high = min(row.rates), max(row.rates)
        lines.append(f"{row.name:16} {row.median:10.0f} {low:10.0f} {high:10.0f} {row.start_s:8.2f} s   {shares}")
    return lines


def _sweep_lines(result: Sweep) -> list[str]:
    lines = [_named(result.machine), f"by itself, a build takes: {_named(result.default)}", ""]
    lines.append(f"{'images/s':>10}   of {result.images} images a build, with")
    lines += [
        f"{tried.images_per_second:10.0f}   {_flags(tried.options) or '(its own choice)'}" for tried in result.trials
    ]
    if not result.options:
        return [*lines, "", "nothing was plainly faster than a build's own choice: leave the options out"]
    return [*lines, "", f"{result.gain:.2f} times as fast as a build's own choice:", f"    {_flags(result.options)}"]


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _flags(options: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
