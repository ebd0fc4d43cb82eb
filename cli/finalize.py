"""`gpu-npz finalize`."""

from __future__ import annotations

from typing import Any

import click

from gpu_npz.builder.maintenance import finalize
from gpu_npz.cli.console import counted, printable, show_warnings
from gpu_npz.cli.options import config_options, read_config


@click.command("finalize")
@click.argument("out", metavar="OUT")
@config_options("max_rejects", "accept_environment")
def command(out: str, **given: Any) -> None:
    """Complete the dataset in OUT when all of its shards are built. The last part of a build does this by itself."""
    show_warnings()
    manifest = finalize(out, read_config(None, given))
    counts = manifest.counts
    click.echo(f"{printable(out)}: {counted(counts.rows, 'image')} in {counted(counts.shards, 'shard')}; complete")
