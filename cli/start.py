"""The first of the command line that runs: it takes signals before it loads anything that takes its time.

Until a command begins, and after it has ended, there is nothing to tidy up: a signal ends the process at once. While a
command runs, a signal is an exception, so that locks and temporary files are let go of in order.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # built in; `signal` makes enumerations of it, which takes its time
import atexit
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes its time, too
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

_SIGNALS = (_signal.SIGINT, _signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


def main() -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 usage, 3 too many rejects, 130 and 143 interrupted."""
    for number in _SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:  # as `nohup` and a shell's `&` leave it
            _signal.signal(number, _leave)
    atexit.register(_ignore)  # the first to be registered is the last to run
    from gpu_npz.cli.main import run

    code = run(sys.argv[1:])
    leave_at_once()
    sys.exit(code)


def stop_in_order() -> None:
    """A signal raises KeyboardInterrupt or Terminated from now on."""
    _replace(_leave, _raise)


def leave_at_once() -> None:
    """A signal ends the process from now on."""
    _replace(_raise, _leave)


def _replace(old: object, new: Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in _SIGNALS:
        if _signal.getsignal(number) is old:  # where `main` has not run, signals are the host's
            _signal.signal(number, new)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    try:  # noqa: SIM105  # contextlib takes its time
        os.write(2, b"gpu-npz: stopped\n")
    except OSError:
        pass
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == _signal.SIGINT else Terminated


def _ignore() -> None:
    """While the interpreter takes itself apart, a signal has its default action, which would hide the exit code."""
    for number in _SIGNALS:
        _signal.signal(number, _signal.SIG_IGN)
