"""`gpu-npz info`."""

from __future__ import annotations

from typing import Any

import click

from gpu_npz.cli.console import print_json, printable
from gpu_npz.config import as_option
from gpu_npz.dataset.manifest import Manifest, so_far
from gpu_npz.errors import IncompleteError
from gpu_npz.storage import open_storage

_LAST = {"shard_table_digest", "rejects_digest"}  # of what the end of a build writes


@click.command("info")
@click.argument("out", metavar="OUT")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the manifest as JSON on stdout; of an unfinished build, what it is so far.",
)
def command(out: str, as_json: bool) -> None:
    """Say what the dataset in OUT is: its images, classes, counts and settings.

    Of a build that has not ended, what it is so far, and exit 1.
    """
    try:
        _show(Manifest.load(out), None, as_json)
    except IncompleteError:
        manifest, _, built = so_far(open_storage(out))
        _show(manifest, len(built), as_json)
        raise


def _show(manifest: Manifest, built: int | None, as_json: bool) -> None:
    """Prints what a dataset is; one of which so many shards are built, what these are."""
    if as_json:
        unfinished = {**manifest.model_dump(exclude=_LAST), "built_shards": built}
        print_json(manifest.model_dump() if built is None else unfinished)
        return
    images, counts = manifest.images, manifest.counts
    codes = ", ".join(f"{count} {code}" for code, count in counts.rejects_by_code.items())
    progress = "" if built is None else f", {built} are built"
    made_with = (", ".join(f"{k} {v}" for k, v in made.items()) for made in manifest.environments)
    settings = ((name, value) for name, value in manifest.settings.items() if value is not None)
    rows: dict[str, Any] = {
        "id": manifest.id,
        "images": f"{counts.rows} of shape {images.shape}, {images.dtype}, {images.layout}, {images.channels}",
        "shards": f"{counts.shards} of {manifest.shard_items} items{progress}",
        "rejects": f"{counts.rejects} of {counts.items} items" + (f" ({codes})" if codes else ""),
        "label columns" if manifest.columns else "classes": _labels(manifest),
        "made with": "; ".join(made_with) or "nothing yet",
        **{name.replace("_", "-"): as_option(name, value) for name, value in settings},
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
