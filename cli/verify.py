"""`gpu-npz verify`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import click
from rich.progress import Progress

from gpu_npz.audit.compare import MEAN_LEVELS, Comparison, compare
from gpu_npz.audit.verify import Problem, Verification, verify
from gpu_npz.builder.maintenance import repair
from gpu_npz.cli.console import counted, errors, printable, show_warnings
from gpu_npz.cli.datasets import datasets_in, print_sides
from gpu_npz.cli.options import OPERATIONAL, config_options, read_config
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.layout import INDEX
from gpu_npz.dataset.space import format_bytes
from gpu_npz.errors import FormatError, UsageError


@click.command("verify")
@click.argument("out", metavar="OUT")
@click.option("--repair", "repairing", is_flag=True, help="Rebuild damaged and missing shards, then verify again.")
@click.option(
    "--deep", type=click.IntRange(1), metavar="N", help="Decode the files of N random rows again and compare."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="SEED", help="For --deep: the seed that selects the rows."
)
@click.option("--source", metavar="SRC", help="For --repair and --deep: where the images are now, if they have moved.")
@config_options(*OPERATIONAL)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    out: str, repairing: bool, deep: int | None, seed: int, source: str | None, as_json: bool, **given: Any
) -> int:
    """Check every byte of the dataset in OUT. The exit code is 1 if anything is wrong.

    The command checks every CRC-32, shape, dtype, value range and label, that each shard is the one that the build
    committed, and that every item of the plan is one row or one reject. With --deep, it also decodes source files again
    and compares them with their rows, bit for bit if the decoder's version is still the same.
    """
    show_warnings()
    config = read_config(None, given)
    if not repairing and any(value is not None for value in given.values()):
        raise UsageError("the settings of a build go with --repair; add it, or omit them")
    if source is not None and not repairing and deep is None:
        raise UsageError("--source goes with --repair and --deep; add one of them, or omit it")
    found = {}
    for side, path in datasets_in(out).items():
        if side and not as_json:
            click.echo(f"{side}:")
        found[side] = _verify(path, config, repairing=repairing, deep=deep, seed=seed, source=source, quiet=as_json)
    if as_json:
        print_sides(found)
    return 0 if all(each["ok"] for each in found.values()) else 1


def _verify(
    out: str, config: BuildConfig, *, repairing: bool, deep: int | None, seed: int, source: str | None, quiet: bool
) -> dict[str, Any]:
    """Verifies a dataset, prints the result unless `quiet`, and returns it as JSON values."""
    with Progress(console=errors(), transient=True, disable=quiet or not errors().is_terminal) as progress:
        task = progress.add_task("verifying", total=None)

        def checked(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        rebuilt = repair(out, config, source=source, checked=checked) if repairing else None
        again: Comparison | None = None
        faults: list[Problem] = []
        if deep is not None:
            try:
                again = compare(out, deep, seed=seed, source=source, progress=checked)
                faults += again.problems
            except FormatError as exc:  # verify the rest anyway
                faults.append(Problem(INDEX, f"--deep cannot read it: {exc}"))
        result = verify(out, progress=checked)
    result = dataclasses.replace(result, problems=tuple(dict.fromkeys([*result.problems, *faults])))
    if not quiet:
        _show(result, again, None if rebuilt is None else len(rebuilt.shards))
    more: dict[str, Any] = {"repaired_shards": rebuilt.shards} if rebuilt else {}
    more |= {"deep": again.to_json()} if again else {}
    return {**result.to_json(), **more}


def _show(result: Verification, again: Comparison | None, rebuilt: int | None) -> None:
    if rebuilt is not None:
        click.echo(f"{counted(rebuilt, 'shard')} rebuilt")
    for problem in result.problems:
        click.echo(f"{printable(problem.file)}: {printable(problem.what)}")
    if rebuilt is None and any(problem.file.rpartition("/")[2].startswith("shard-") for problem in result.problems):
        command = f"gpu-npz verify {shlex.quote(printable(result.path))} --repair"
        click.echo(f"this rebuilds damaged and missing shards, if the images are still there: {command}")
    if again is not None:
        click.echo(_compared(again))
    verdict = "OK" if result.ok else f"DAMAGED, {counted(len(result.problems), 'problem')}"
    content = f"{counted(result.rows, 'row')} in {counted(result.shards, 'shard')}, {format_bytes(result.bytes)}"
    click.echo(f"{printable(result.path)}: {content}: {verdict}")


def _compared(found: Comparison) -> str:
    sides = (found.environment, *found.environments)
    here, *made = (", ".join(f"{name} {value}" for name, value in side.items()) for side in sides)
    how = "bit for bit" if found.exact else f"within a mean of {MEAN_LEVELS:g} levels, since {'; '.join(made)} built it"
    differences = f"mean difference {found.mean:.3f} levels, max {found.max}"
    return f"{found.rows} rows decoded again by {here}, to be equal {how}: {differences}"
