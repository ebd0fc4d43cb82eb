"""`gpu-npz info`."""

from __future__ import annotations

from typing import Any

import click

from gpu_npz.cli.console import print_json, printable
from gpu_npz.manifest import Manifest


@click.command("info")
@click.argument("out", metavar="OUT")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
def command(out: str, as_json: bool) -> None:
    """Say what the dataset in OUT is: its images, classes, counts and settings."""
    manifest = Manifest.load(out)
    if as_json:
        print_json(manifest.model_dump())
        return
    images, counts = manifest.images, manifest.counts
    codes = ", ".join(f"{count} {code}" for code, count in counts.rejects_by_code.items())
    rows: dict[str, Any] = {
        "id": manifest.id,
        "images": f"{counts.rows} of shape {images.shape}, {images.dtype}, {images.layout}, {images.channels}",
        "shards": f"{counts.shards} of {manifest.shard_items} items",
        "rejects": f"{counts.rejects} of {counts.items} items" + (f" ({codes})" if codes else ""),
        "label columns" if manifest.columns else "classes": _labels(manifest),
        "made with": "; ".join(", ".join(f"{k} {v}" for k, v in made.items()) for made in manifest.environments),
        **{name.replace("_", "-"): value for name, value in manifest.settings.items() if value is not None},
    }
    width = max(map(len, rows))
    click.echo("\n".join(f"{name:{width}}  {printable(str(value))}" for name, value in rows.items()))


def _labels(manifest: Manifest) -> str:
    if manifest.columns:
        return ", ".join(map(str, manifest.columns))
    names = manifest.classes
    if names is None:
        return "no labels"
    return f"{len(names)}: " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
