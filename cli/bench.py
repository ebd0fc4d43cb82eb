"""`gpu-npz bench`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

# Memory that the kernel turns into huge pages and back makes float32 rates swing; NumPy reads this when it is imported.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")


@click.group("bench")
def command() -> None:
    """Measure on this machine. Compare the ratios of one run, not the figures of two."""


@command.command("pipeline")
@click.argument("src", metavar="[SRC]", required=False)
@click.option(
    "--images", default=3000, show_default=True, type=click.IntRange(1), metavar="N", help="Images a build has."
)
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Rounds; the ways take turns in each.",
)
@click.option("--folder", metavar="DIR", help="Where to write; the system's temporary folder unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurement as JSON on stdout.")
def pipeline(src: str | None, images: int, rounds: int, folder: str | None, as_json: bool) -> None:
    """Measure whole builds on one core beside a bare loop of the same steps, and the shard writer beside NumPy's.

    SRC is a folder as for build; pictures are made up if there is none.
    """
    from gpu_npz.bench.pipeline import measure
    from gpu_npz.cli.console import errors, print_json
    from gpu_npz.demo import make_images

    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors.status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(make_images(Path(place) / "pictures").folder)
        result = measure(src, images=images, rounds=rounds, folder=folder, say=status.update)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(", ".join(f"{name} {value}" for name, value in result.machine.items()))
    click.echo(f"{'':16} {'images/s':>10} {'lowest':>10} {'highest':>10}   ratio")
    for row in result.rows:
        low, high = min(row.rates), max(row.rates)
        ratio = f"{result.ratio(row):.2f} of {row.baseline}"
        click.echo(f"{row.name:16} {row.median:10.0f} {low:10.0f} {high:10.0f}   {ratio}")
