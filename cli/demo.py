"""`gpu-npz demo`."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import click

from gpu_npz.cli.build import summary
from gpu_npz.cli.console import counted, show_warnings
from gpu_npz.errors import UsageError

_SETTINGS = {"dtype": "uint8", "shard_size": "128", "shuffle": 0, "max_rejects": "10%"}


@click.command("demo")
@click.argument("folder", metavar="[DIR]", default="gpu-npz-demo")
@click.option(
    "--images", default=300, show_default=True, type=click.IntRange(1), metavar="N", help="How many pictures to make."
)
def command(folder: str, images: int) -> int:
    """Make pictures (some of them broken), build a dataset from them, verify it, and show how to read it.

    Everything is written to DIR (default: gpu-npz-demo) and stays there for you to look at.
    """
    # Imported here so that this command's help does not load NumPy and Pillow.
    from gpu_npz import BuildConfig, build, open_dataset, verify
    from gpu_npz.bench.pictures import make_images
    from gpu_npz.dataset.layout import REJECTS

    show_warnings()
    place = Path(folder)
    pictures, out = place / "images", place / "dataset"
    if place.exists() and not out.exists() and any(place.iterdir()):
        raise UsageError(f"{folder!r} is not empty and holds no earlier demo; choose a new folder: gpu-npz demo DIR")
    click.echo(f"1. Making {images} pictures and a few broken files in {pictures} ...")
    start = time.perf_counter()
    made = make_images(pictures, count=images)
    click.echo(f"   {made.images} pictures in {len(made.class_names)} classes, {time.perf_counter() - start:.1f} s")
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in _SETTINGS.items())
    click.echo(f"2. gpu-npz build {shlex.quote(str(pictures))} {shlex.quote(str(out))} {options}")
    report = build(pictures, out, BuildConfig(**_SETTINGS))
    click.echo(_indented(summary(report)))
    click.echo(f"   The broken files became lines of {out / REJECTS}, not errors:")
    for line in (out / REJECTS).read_text().splitlines():
        reject = json.loads(line)
        click.echo(f"     {reject['path']}: {reject['code']} ({reject['detail']})")
    click.echo(f"3. gpu-npz verify {shlex.quote(str(out))}")
    result = verify(out)
    click.echo(
        f"   {counted(result.rows, 'row')} in {counted(result.shards, 'shard')}: {'OK' if result.ok else 'DAMAGED'}"
    )
    data = open_dataset(out)
    assert data.labels is not None
    assert data.class_names is not None
    image, name = data.normalized(0), data.class_names[data.labels[0]]
    click.echo("4. Reading it:")
    click.echo(f"     data = gpu_npz.open_dataset({str(out)!r})")
    click.echo(f"     data[0]             {data[0].dtype} {data[0].shape}: {data.paths[0]}, class {name!r}")
    click.echo(f"     data.normalized(0)  {image.dtype}, values {image.min():.2f} to {image.max():.2f}")
    click.echo(f"     numpy.load({str(out / 'shard-00000.npz')!r})['images']")
    click.echo(f"Everything is in {place.resolve()}")
    return 0 if result.ok else 1


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
