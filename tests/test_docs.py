"""The pages say what the program does: every command and every option; and the README stays short."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import click

from gpu_npz.cli.main import COMMANDS
from gpu_npz.config import BuildConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OPTIONS = ROOT / "cli" / "README.md"
PAGES = [README, OPTIONS, ROOT / "pipelines" / "README.md", ROOT / "docker" / "README.md"]


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
    """The rows of the table of commands and options."""
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


def test_the_table_lists_every_command_and_option_as_the_program_has_them() -> None:
    lines = OPTIONS.read_text().splitlines()
    start = lines.index("| command or option | what it does |") + 2
    rows = [line for line in lines[start:] if line.startswith("|")]
    assert rows == table(), "replace the table's rows by:\n" + "\n".join(table())


def test_every_command_that_a_page_shows_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"(?:^ *|`|bin/|&& )gpu-npz ((?:bench )?[a-z]+)\b", text, re.MULTILINE))
    assert shown
    assert shown <= set(commands())


def test_the_readme_has_the_two_commands_on_one_line_each() -> None:
    text = README.read_text()
    for ending in (r"gpu-npz demo", r"pytest"):
        assert re.search(rf"^python3 -m venv \.venv && \.venv/bin/pip install .*{ending}$", text, re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    path = ROOT / ".github" / "figures" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    figures = json.loads(measure.FIGURES.read_text())
    assert measure.table(figures) in README.read_text(), "run .github/figures/measure.py"


def test_pictures_are_small() -> None:
    pictures = [path for path in (ROOT / ".github" / "assets").iterdir() if path.is_file()]
    assert pictures
    assert all(path.stat().st_size < 300_000 for path in pictures)


def test_every_link_from_one_page_to_another_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_every_option_that_a_page_shows_exists() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", "\n".join(table())))
    ours = re.compile(r"^(?:    |\$ )?(?:\S*bin/)?gpu-npz .*$", re.MULTILINE)
    others = {"--image-size", "--img-size", "--jobs", "--num-workers"}
    for page in PAGES:
        for line in ours.findall(page.read_text()):
            assert set(re.findall(r"(?<= )--[a-z][a-z-]+", line.partition("#")[0])) <= known | others, line
