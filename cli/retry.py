"""`gpu-npz retry`."""

from __future__ import annotations

from typing import Any

import click

from gpu_npz.builder.maintenance import retry
from gpu_npz.cli.build import summary
from gpu_npz.cli.console import counted, print_json, print_lines, printable, show_warnings
from gpu_npz.cli.options import OPERATIONAL, ConfigCommand, config_options, read_config
from gpu_npz.cli.progress import Bar


@click.command("retry", cls=ConfigCommand)
@click.argument("out", metavar="OUT")
@click.option("--source", metavar="SRC", help="Where the images are now, if they have moved.")
@config_options(*OPERATIONAL)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(out: str, source: str | None, as_json: bool, **given: Any) -> None:
    """Try the rejects of OUT again after you have fixed their files. Only shards that change are rebuilt."""
    show_warnings()
    with Bar(hidden=as_json) as bar:
        result = retry(out, read_config(None, given), source=source, progress=bar)
    if as_json:
        print_json(result.to_json())
    elif result.report is None:
        click.echo(f"{printable(out)}: no reject can be decoded now; nothing was changed")
    else:
        print_lines([f"{counted(len(result.shards), 'shard')} rebuilt", *summary(result.report).split("\n")])
