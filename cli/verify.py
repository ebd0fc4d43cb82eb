"""`gpu-npz verify`."""

from __future__ import annotations

from typing import Any

import click
from rich.progress import Progress

from gpu_npz.audit.verification import verify
from gpu_npz.cli.console import errors, print_json, printable, show_warnings, size
from gpu_npz.cli.options import OPERATIONAL, config_options, read_config
from gpu_npz.errors import UsageError
from gpu_npz.maintenance import repair


@click.command("verify")
@click.argument("out", metavar="OUT")
@click.option("--repair", "repairing", is_flag=True, help="Build damaged and missing shards anew; verify again.")
@click.option("--source", metavar="SRC", help="For --repair: where the images are now, if they have moved.")
@config_options(*OPERATIONAL)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(out: str, repairing: bool, source: str | None, as_json: bool, **given: Any) -> int:
    """Read the whole dataset in OUT and compare it with its manifest; exit 1 if anything is wrong.

    Checked: every CRC-32; that each shard is there, is this dataset's and is the one that was committed; shapes,
    dtypes, value ranges, labels; and that every planned item is one row or one reject.
    """
    show_warnings()
    config = read_config(None, given)
    if not repairing and (source is not None or any(value is not None for value in given.values())):
        raise UsageError("--source and the settings of a build go with --repair; add it, or leave them out")
    with Progress(console=errors, transient=True, disable=as_json or not errors.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)

        def checked(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        rebuilt = repair(out, config, source=source, checked=checked) if repairing else None
        result = verify(out, progress=checked)
    if as_json:
        print_json({**result.to_json(), **({"repaired_shards": rebuilt.shards} if rebuilt else {})})
    else:
        if rebuilt is not None:
            click.echo(f"{len(rebuilt.shards)} shard(s) built anew")
        for problem in result.problems:
            click.echo(f"{printable(problem.file)}: {printable(problem.what)}")
        verdict = "whole" if result.ok else f"NOT whole, {len(result.problems)} problem(s)"
        click.echo(
            f"{printable(result.path)}: {result.rows} rows in {result.shards} shards, {size(result.bytes)}: {verdict}"
        )
    return 0 if result.ok else 1
