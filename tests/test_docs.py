"""The README says what the program does: every command, every option, every exit code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click

from gpu_npz.cli.main import COMMANDS
from gpu_npz.config import BuildConfig

README = Path(__file__).parent.parent / "README.md"


def commands() -> dict[str, click.Command]:
    found = {}
    for name in COMMANDS:
        command = importlib.import_module(f"gpu_npz.cli.{name}").command
        if isinstance(command, click.Group):
            found |= {f"{name} {below}": command.commands[below] for below in command.commands}
        else:
            found[name] = command
    return found


def table() -> list[str]:
    """The rows of the README's table of commands and options."""
    rows = []
    for name, command in commands().items():
        context = click.Context(command)
        arguments = " ".join(
            param.make_metavar(context) for param in command.params if isinstance(param, click.Argument)
        )
        text = command.get_short_help_str(200)
        rows.append(row(f"**`{name} {arguments}`**".replace(" `", "`"), text))
        shared = []
        for param in command.params:
            if isinstance(param, click.Option):
                syntax, description = param.get_help_record(context) or ("", "")
                if name != "build" and param.name in BuildConfig.model_fields:
                    shared.append(f"`{syntax.split(' ')[0]}`")
                else:
                    rows.append(row(f"`{syntax.replace(' / ', '`, `')}`", " ".join(description.split())))
        if shared:
            rows.append(row(", ".join(shared), "As for `build`."))
    return rows


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_the_table_in_the_readme_lists_every_command_and_option_as_the_program_has_them() -> None:
    lines = README.read_text().splitlines()
    start = lines.index("| command or option | what it does |") + 2
    stop = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    assert lines[start:stop] == table(), "replace the table's rows by:\n" + "\n".join(table())


def test_every_command_that_the_readme_shows_exists() -> None:
    shown = set(re.findall(r"(?:^ *|`|bin/|&& )gpu-npz ((?:bench )?[a-z]+)\b", README.read_text(), re.MULTILINE))
    assert shown
    assert shown <= set(commands())


def test_the_readme_has_the_two_commands_on_one_line_each() -> None:
    text = README.read_text()
    for ending in (r"gpu-npz demo", r"pytest"):
        assert re.search(rf"^python3 -m venv \.venv && \.venv/bin/pip install .*{ending}$", text, re.MULTILINE)
