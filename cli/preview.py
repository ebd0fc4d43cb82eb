"""`gpu-npz preview`."""

from __future__ import annotations

import os
from typing import Literal

import click

from gpu_npz.cli.console import counted, printable
from gpu_npz.cli.datasets import datasets_in, print_sides
from gpu_npz.errors import UsageError


@click.command("preview")
@click.argument("out", metavar="OUT")
@click.option(
    "-o", "target", required=True, metavar="FILE", help="The picture to write; its name ends with .png or .jpg."
)
@click.option(
    "--count",
    type=int,
    metavar="N",
    help="How many images; with --by class, of each class.  [default: 64, or 8 per class]",
)
@click.option(
    "--by",
    type=click.Choice(["random", "class"]),
    default="random",
    show_default=True,
    help="Draw random images, or one line of images for each class.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="SEED", help="The seed that selects the images."
)
@click.option("--rejects", is_flag=True, help="Draw the rejected images that can be decoded.")
@click.option("--source", metavar="SRC", help="For --rejects: where the images are now, if they have moved.")
@click.option(
    "--tile", type=int, default=128, show_default=True, metavar="PIXELS", help="The side of each image in the picture."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was drawn as JSON on stdout.")
def command(
    out: str,
    target: str,
    count: int | None,
    by: Literal["random", "class"],
    seed: int,
    rejects: bool,
    source: str | None,
    tile: int,
    as_json: bool,
) -> None:
    """Draw a contact sheet of the dataset in OUT: its images, de-normalized, with their classes.

    For a split, there is a sheet for each side: -o sheet.png makes sheet-train.png and sheet-val.png.
    """
    from gpu_npz.audit.preview import preview  # loads Pillow, which this command's help does not need

    if rejects and by == "class":
        raise UsageError("--rejects and --by class: rejects are not sorted by class; omit one of them")
    sheets = {}
    for side, path in datasets_in(out).items():
        root, extension = os.path.splitext(target)
        place = f"{root}-{side}{extension}" if side else target
        show = "rejects" if rejects else by
        sheets[side] = preview(path, place, show=show, count=count, seed=seed, source=source, tile=tile)
    if as_json:
        print_sides({side: sheet.to_json() for side, sheet in sheets.items()})
        return
    for sheet in sheets.values():
        left_out = f"; {sheet.left_out} more {'rejects' if rejects else 'classes'} left out" if sheet.left_out else ""
        size = f"{sheet.width} x {sheet.height} pixels"
        click.echo(
            f"{printable(sheet.path)}: {counted(len(sheet.tiles), 'reject' if rejects else 'image')}, {size}{left_out}"
        )
