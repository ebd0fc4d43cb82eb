"""`gpu-npz verify`."""

from __future__ import annotations

import click
from rich.progress import Progress

from gpu_npz.audit.verification import verify
from gpu_npz.cli.console import errors, print_json, printable, size


@click.command("verify")
@click.argument("out", metavar="OUT")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(out: str, as_json: bool) -> int:
    """Read the whole dataset in OUT and compare it with its manifest; exit 1 if anything is wrong.

    Checked: every CRC-32; that each shard is there, is this dataset's and is the one that was committed; shapes,
    dtypes, value ranges, labels; and that every planned item is one row or one reject.
    """
    with Progress(console=errors, transient=True, disable=as_json or not errors.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        result = verify(out, progress=lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        print_json(result.to_json())
    else:
        for problem in result.problems:
            click.echo(f"{printable(problem.file)}: {printable(problem.what)}")
        verdict = "whole" if result.ok else f"NOT whole, {len(result.problems)} problem(s)"
        click.echo(
            f"{printable(result.path)}: {result.rows} rows in {result.shards} shards, {size(result.bytes)}: {verdict}"
        )
    return 0 if result.ok else 1
