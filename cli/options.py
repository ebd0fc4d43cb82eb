"""Derives options from the settings: each field of BuildConfig becomes an option of the same name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from gpu_npz.cli.console import errors
from gpu_npz.config import BuildConfig, Group, group_of, load_toml, option_of, settings_of
from gpu_npz.presets import settings_of_preset

# OPERATIONAL: the settings that may differ from those of the build when rejects are retried or shards are rebuilt.
_NOT = {"classes_from", "part", "overwrite", "source", "splits", "root", "follow_links"}
OPERATIONAL = [name for name in (*settings_of("environment"), *settings_of("operational")) if name not in _NOT]

# The names of options in other tools. They are accepted, but the help does not list them.
_OTHER_NAMES = {
    "--image-size": "--size",
    "--img-size": "--size",
    "--jobs": "--workers",
    "--num-workers": "--workers",
    "-j": "--workers",
}

PRESET = click.option(
    "--preset",
    metavar="NAME|FILE.json",
    help="Use a published model's preprocessing. Options on the command line take precedence.",
)
CONFIG_FILE = click.option(
    "--config",
    "config_file",
    metavar="FILE.toml",
    help="Read settings from a file. Options on the command line take precedence.",
)

F = TypeVar("F", bound=Callable[..., Any])


class ConfigCommand(click.Command):
    """A command whose options are settings. It also accepts the option names of other tools."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in parameter.opts}
        for position, argument in enumerate(args):
            if argument == "--":
                break
            name, equals, value = argument.partition("=")
            if _OTHER_NAMES.get(name) in known:
                args[position] = _OTHER_NAMES[name] + equals + value
            elif argument[:2] == "-j" and argument[2:].isdigit() and "--workers" in known:
                args[position] = f"--workers={argument[2:]}"
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options in groups, common options before advanced ones."""
        groups: dict[tuple[str, bool], list[tuple[str, str]]] = {(name, False): [] for name in get_args(Group)}
        groups |= {(name, True): [] for name in get_args(Group)}
        own: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                known = parameter.name in BuildConfig.model_fields
                (groups[group_of(str(parameter.name))] if known else own).append(record)
        sections = [
            (f"{'Advanced ' * advanced}{name.removesuffix('s')} options".capitalize(), found)
            for (name, advanced), found in groups.items()
        ]
        for title, records in [*sections, ("Other options", own)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def config_options(*names: str) -> Callable[[F], F]:
    """Adds an option for each of these settings.

    An option that is not given has the value None. Values are not checked here; BuildConfig checks them.
    """

    def add(command: F) -> F:
        for name in reversed(names):
            command = _option(name)(command)
        return command

    return add


def _option(name: str) -> Callable[[F], F]:
    field = BuildConfig.model_fields[name]
    flag = "--" + name.replace("_", "-")
    help_text = field.description or ""
    if field.annotation in (bool, bool | None):
        both = flag if field.default is False else f"{flag}/--no-{flag[2:]}"
        return click.option(both, name, is_flag=True, default=None, help=help_text)
    return click.option(flag, name, default=None, metavar=metavar(name), help=help_text + _default(name))


def metavar(name: str) -> str:
    """Returns the placeholder for a setting's value in the help: its choices, or a word such as VALUE."""
    field = BuildConfig.model_fields[name]
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    extra: Any = field.json_schema_extra
    return str(extra["metavar"]) or "VALUE"


def _default(name: str) -> str:
    default = BuildConfig.model_fields[name].default
    if default is None:
        return ""
    return f"  [default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]"


def read_config(config_file: str | None, given: dict[str, Any], preset: str | None = None) -> BuildConfig:
    """Merges the settings of a preset, a TOML file, the environment and the command line; later ones take precedence.

    Only operational settings are read from the environment, for example GPU_NPZ_WORKERS.

    Args:
        config_file: the path of the TOML file; None if there is none.
        given: the command line's settings by name; None for an option that was not given.
        preset: the name or file of the preset; None if there is none.

    Raises:
        UsageError: a setting is not allowed, or the file or the preset cannot be read.
    """
    over = load_toml(config_file) if config_file else {}
    over |= {
        name: os.environ[variable]
        for name in settings_of("operational")
        if (variable := f"GPU_NPZ_{name.upper()}") in os.environ
    }
    over |= {name: value for name, value in given.items() if value is not None}
    values = settings_of_preset(preset) if preset else {}
    if preset:
        errors().print(
            f"preset {preset}: {' '.join(option_of(*each) for each in values.items())}", markup=False, soft_wrap=True
        )
    if "normalize" in over:
        values = {name: value for name, value in values.items() if name not in ("mean", "std")}
    return BuildConfig(**{**values, **over})
