"""`gpu-npz doctor`."""

from __future__ import annotations

import click

from gpu_npz.audit.doctor import diagnose
from gpu_npz.cli.console import print_json


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def command(as_json: bool) -> None:
    """Show which parts of this machine gpu-npz can use, and the command that installs each part that is missing."""
    findings = diagnose()
    if as_json:
        print_json([finding.to_json() for finding in findings])
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        click.echo(f"{'ok' if finding.ok else 'no':3} {finding.what:{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"{'':3} {'':{width}}  -> {finding.remedy}")
