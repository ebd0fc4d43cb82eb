"""The command `gpu-npz`: loads the subcommand and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from gpu_npz.cli.start import Terminated, leave_at_once, stop_in_order
from gpu_npz.errors import GpuNpzError

# The short help is here so that `--help` does not import the commands.
COMMANDS = {
    "build": "Build NPZ shards from images, or resume a build that was interrupted.",
    "plan": "Estimate the size, memory and time of a build before you start it.",
    "info": "Show what is in a dataset, or how far its build has got.",
    "verify": "Check every byte of a dataset; rebuild what is damaged.",
    "stats": "Compute the mean, std, histograms and class counts of images or of a dataset.",
    "preview": "Draw a contact sheet of a dataset, or of its rejects.",
    "export": "Copy a dataset to another format: .npz, .npy, image folders, WebDataset.",
    "retry": "Try the rejects of a dataset again after you have fixed their files.",
    "finalize": "Complete a dataset that was built in parts.",
    "parity": "Measure how much two decoders differ on the same images.",
    "doctor": "Show what this machine can use, and how to install the rest.",
    "demo": "Make some images, build a dataset from them and verify it.",
    "bench": "Measure speed on this machine.",
}

_AFTER_A_STOP = {
    "build": "; what is committed stays, the same command resumes",
    "export": "; finished files stay, the same command makes the others",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"gpu_npz.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        if args[:1] == ["build"] and not {"-h", "--help"}.intersection(args):
            from gpu_npz.workers.subprocesses import WORKER, prepared

            ctx.with_resource(prepared(WORKER))  # it imports its modules while this process does the same
        found = super().resolve_command(ctx, args)  # imports the command
        stop_in_order()
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gpu-npz", message="gpu-npz %(version)s")
def cli() -> None:
    """Turn a collection of images into NPZ shards that a model can train on."""


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        result: Any = cli.main(arguments, prog_name="gpu-npz", standalone_mode=False)
    except click.exceptions.Abort:
        return _stopped(130, arguments)
    except KeyboardInterrupt:
        return _stopped(130, arguments)
    except Terminated:
        return _stopped(143, arguments)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except GpuNpzError as exc:
        click.echo(_message(exc), err=True)
        return exc.exit_code
    except BrokenPipeError:  # the reader of stdout has exited, as `head` does
        sys.stderr.close()
        return 1
    except OSError as exc:
        click.echo(_message(exc), err=True)
        return 1
    return int(result or 0)


def _message(error: Exception) -> str:
    from gpu_npz.cli.console import printable, wrapped  # not needed by most commands, which succeed

    return wrapped("gpu-npz: " + printable(str(error), keep="\n"), sys.stderr)


def _stopped(code: int, arguments: list[str]) -> int:
    leave_at_once()
    click.echo(f"gpu-npz: stopped{_AFTER_A_STOP.get(arguments[0] if arguments else '', '')}", err=True)
    return code
