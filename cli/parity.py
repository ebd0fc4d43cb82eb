"""`gpu-npz parity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from gpu_npz.cli.console import errors, print_json, printable, show_warnings
from gpu_npz.cli.options import ConfigCommand, config_options, read_config

if TYPE_CHECKING:
    from gpu_npz.audit.parity import Parity

_SIDES = click.Choice(["pillow", "simd", "dali-cpu", "dali-gpu", "torchvision"])
_TORCHVISION = "torchvision (where installed) is its pipeline on PIL images, which knows no EXIF orientation."
_USED = (
    "device", "size", "resize_mode", "crop_pct", "pad_value", "interpolation", "reduced_decoding", "exif_orientation",
    "channels", "source", "root", "follow_links", "image_column", "hw_decoder_load",
)  # fmt: skip


@click.command("parity", cls=ConfigCommand)
@click.argument("src", metavar="SRC")
@click.option("--one", type=_SIDES, default="pillow", show_default=True, help=f"One decoder; {_TORCHVISION}")
@click.option("--other", type=_SIDES, default="dali-cpu", show_default=True, help="The decoder to compare it with.")
@click.option("--images", type=click.IntRange(1), default=1000, show_default=True, metavar="N", help="How many images.")
@click.option("--max-mean", type=float, metavar="LEVELS", help="Exit with code 1 if the mean difference is larger.")
@config_options(*_USED, "shuffle")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(src: str, one: Any, other: Any, images: int, max_mean: float | None, as_json: bool, **given: Any) -> int:
    """Decode the same images with two decoders and show how much they differ, in levels of 255, by kind of image."""
    from gpu_npz.audit.parity import parity  # loads Pillow, which this command's help does not need

    show_warnings()
    config = read_config(None, given | {"normalize": "none"})  # the default, imagenet, is not allowed with gray
    with Progress(console=errors(), transient=True, disable=as_json or not errors().is_terminal) as progress:
        task = progress.add_task("comparing", total=None)
        result = parity(
            src,
            config,
            (one, other),
            images=images,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_lines(result)))
    if max_mean is not None and result.mean > max_mean:
        click.echo(f"gpu-npz: the mean difference is {result.mean:.3f} levels; --max-mean allows {max_mean}", err=True)
        return 1
    return 0


def _lines(result: Parity) -> list[str]:
    lines = [f"{side}: " + ", ".join(f"{k} {v}" for k, v in made.items()) for side, made in result.sides.items()]
    lines += ["", f"{'kind':18} {'images':>7} {'mean':>7} {'p99':>5} {'max':>5}"]
    lines += [f"{d.kind:18} {d.images:7} {d.mean:7.3f} {d.p99:5} {d.max:5}" for d in result.kinds]
    if result.missing_kinds:
        lines += ["", f"not in SRC, so not compared: {', '.join(result.missing_kinds)}"]
    if result.worst:
        lines += ["", "largest mean differences:"]
        lines += [f"  {mean:7.3f}  {printable(path)}" for path, mean in result.worst]
    lines += ["", f"verdicts that differ: {len(result.verdicts)}"]
    sides = list(result.sides)
    return lines + [f"  {printable(path)}: {sides[0]} {a}, {sides[1]} {b}" for path, a, b in result.verdicts[:20]]
