"""`gpu-npz preview`."""

from __future__ import annotations

from typing import Literal

import click

from gpu_npz.cli.console import print_json, printable
from gpu_npz.errors import UsageError


@click.command("preview")
@click.argument("out", metavar="OUT")
@click.option("-o", "target", required=True, metavar="FILE", help="Where to draw: a name that ends with .png or .jpg.")
@click.option("--count", type=int, metavar="N", help="Images; of each class with --by class. [default: 64, 8 a class]")
@click.option(
    "--by", type=click.Choice(["random", "class"]), default="random", show_default=True, help="Which images to draw."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="SEED", help="Another seed, other images.")
@click.option("--rejects", is_flag=True, help="Draw the rejected items instead, as far as they can be decoded.")
@click.option("--source", metavar="SRC", help="For --rejects: where the images are now, if they have moved.")
@click.option("--tile", type=int, default=128, show_default=True, metavar="PIXELS", help="Side of an image drawn.")
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
    """Draw a contact sheet of the dataset in OUT: images as pixels again, with their classes."""
    from gpu_npz.audit.preview import preview  # loads Pillow, which the help of this command does not need

    if rejects and by == "class":
        raise UsageError("--rejects and --by class: rejects are not sorted by class; leave one out")
    sheet = preview(out, target, show="rejects" if rejects else by, count=count, seed=seed, source=source, tile=tile)
    if as_json:
        print_json(sheet.to_json())
        return
    left_out = f"; {sheet.left_out} more {'rejects' if rejects else 'classes'} left out" if sheet.left_out else ""
    what = "rejects" if rejects else "images"
    click.echo(f"{printable(sheet.path)}: {len(sheet.tiles)} {what}, {sheet.width} x {sheet.height} pixels{left_out}")
