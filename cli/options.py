"""Options from the settings: every field of BuildConfig is an option of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from gpu_npz.config import BuildConfig, load_toml, settings_of

# What may differ from the build when rejects are tried again or shards built anew.
_NOT = {"classes_from", "part", "overwrite", "source", "root", "follow_links"}
OPERATIONAL = [name for name in (*settings_of("environment"), *settings_of("operational")) if name not in _NOT]

F = TypeVar("F", bound=Callable[..., Any])


def config_options(*names: str) -> Callable[[F], F]:
    """Adds an option for each of these settings. What is not given arrives as None; BuildConfig alone checks values."""

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
    """What stands for a setting's value in the help: its choices, or a word."""
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


def read_config(config_file: str | None, given: dict[str, Any]) -> BuildConfig:
    """The settings from a TOML file and the command line, which wins."""
    values = load_toml(config_file) if config_file else {}
    return BuildConfig(**{**values, **{name: value for name, value in given.items() if value is not None}})
