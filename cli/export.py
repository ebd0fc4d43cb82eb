"""`gpu-npz export`."""

from __future__ import annotations

import os
from typing import Any

import click
from rich.progress import Progress

from gpu_npz.cli.console import counted, errors, printable, show_warnings
from gpu_npz.cli.datasets import datasets_in, print_sides
from gpu_npz.errors import UsageError

_FILES = ("npz", "npy")
_IMAGES = ("folder", "webdataset")
_REQUIRED_KIND = {"keys": ("npz",), "image_format": _IMAGES, "quality": _IMAGES, "samples": ("webdataset",)}


@click.command("export")
@click.argument("out", metavar="OUT")
@click.argument("dest", metavar="DEST")
@click.option(
    "--as",
    "kind",
    type=click.Choice([*_FILES, *_IMAGES]),
    required=True,
    help="The format: one .npz; one .npy, with NAME-labels.npy beside it; class folders of images; WebDataset tars.",
)
@click.option("--keys", metavar="IMAGES,LABELS", help="For npz: the names of the two arrays. [default: images,labels]")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["png", "jpeg"]),
    help="For folder and webdataset: the image format. png keeps every pixel; jpeg does not. [default: png]",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), metavar="N", help="For --format jpeg: the quality. [default: 95]"
)
@click.option(
    "--shard-size",
    "samples",
    type=click.IntRange(1),
    metavar="N",
    help="For webdataset: samples per tar. [default: 1000]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(out: str, dest: str, kind: Any, keys: str | None, as_json: bool, **given: Any) -> None:
    """Copy the dataset in OUT into the format of other tools: an .npz, an .npy, folders of images, or WebDataset.

    An .npz or .npy has the values as stored; images have the pixels that they were made from. Rows that --on-reject
    blank left empty are omitted. Nothing is overwritten; if an export to a folder is interrupted, the same command
    completes it. For a split, each side is exported: to DEST/train and so on, or to NAME-train.npz.
    """
    from gpu_npz.export.run import export_dataset  # loads Pillow, which this command's help does not need

    show_warnings()
    options = {name: value for name, value in {"keys": keys, **given}.items() if value is not None}
    for name in options:
        if kind not in _REQUIRED_KIND[name]:
            option = {"image_format": "format", "samples": "shard-size"}.get(name, name)
            raise UsageError(f"--{option} requires --as {' or '.join(_REQUIRED_KIND[name])}; omit it")
    if "quality" in options and options.get("image_format") != "jpeg":
        raise UsageError("--quality requires --format jpeg; add it, or omit --quality")
    if keys is not None:
        options["keys"] = _two(keys)
    found = {}
    with Progress(console=errors(), transient=True, disable=as_json or not errors().is_terminal) as progress:
        for side, path in datasets_in(out).items():
            task = progress.add_task(f"exporting {side}".strip(), total=None)

            def exported(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            found[side] = export_dataset(path, _dest(dest, side, kind), kind, progress=exported, **options)
    if as_json:
        print_sides({side: each.to_json() for side, each in found.items()})
        return
    for each in found.values():
        existing = f", of which {each.existing} existed already" if each.existing else ""
        blank = f"; {counted(each.blank, 'blank row')} omitted" if each.blank else ""
        click.echo(f"{printable(each.path)}: exported {counted(each.images, 'image')} ({kind}){existing}{blank}")


def _two(keys: str) -> tuple[str, str]:
    names = tuple(name.strip() for name in keys.split(","))
    if len(names) != 2:
        raise UsageError(f"--keys: got {keys!r}; give the names of the images and the labels, such as x_train,y_train")
    return names[0], names[1]


def _dest(dest: str, side: str, kind: str) -> str:
    """Where a side of a split is exported to; DEST itself unless OUT is a split."""
    if not side:
        return dest
    root, extension = os.path.splitext(dest)
    return f"{root}-{side}{extension}" if kind in _FILES else os.path.join(dest, side)
