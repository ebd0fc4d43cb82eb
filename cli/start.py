"""The entry point of the command line. It installs signal handlers before it imports any slow module.

Before a command starts and after it has finished, there is nothing to clean up, so a signal ends the process at once.
While a command runs, a signal raises an exception, so that locks are released and temporary files are deleted.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # built in; `signal` is slow to import, because it creates enums
import atexit
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` is slow to import, too
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

_SIGNALS = (_signal.SIGINT, _signal.SIGTERM)


class Terminated(BaseException):
    """Raised on SIGTERM, just as KeyboardInterrupt is raised on SIGINT."""


def main() -> NoReturn:
    """Runs the command line and exits.

    The exit status is 0 for success, 1 for failure, 2 for wrong usage, 3 for too many rejects, and 130 or 143 after
    SIGINT or SIGTERM.
    """
    for number in _SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:  # `nohup` and a shell's `&` leave a signal ignored
            _signal.signal(number, _leave)
    code = 1  # after an unexpected exception, whose traceback the interpreter prints
    atexit.register(lambda: _end(code))  # registered first, so it runs last
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look for them in every installed package
    from gpu_npz.cli.main import run

    code = run(sys.argv[1:])
    leave_at_once()
    sys.exit(code)


def stop_in_order() -> None:
    """Makes signals raise KeyboardInterrupt or Terminated from now on."""
    _replace(_leave, _raise)


def leave_at_once() -> None:
    """Makes signals end the process at once from now on."""
    _replace(_raise, _leave)


def _replace(old: object, new: Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in _SIGNALS:
        if _signal.getsignal(number) is old:  # if `main` has not run, the host program handles signals
            _signal.signal(number, new)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    try:  # noqa: SIM105  # contextlib is slow to import
        os.write(2, b"gpu-npz: stopped\n")
    except OSError:
        pass
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == _signal.SIGINT else Terminated


def _end(code: int) -> None:
    """Ends the process without the interpreter's teardown, which takes a quarter of the time of a short command.

    It is the last exit handler, so the other ones have run and the threads that are not daemons have ended. Signals are
    ignored, since their default action would replace the exit status.
    """
    for number in _SIGNALS:
        _signal.signal(number, _signal.SIG_IGN)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # there is no such stream, or its reader is gone
        return  # the interpreter decides what that means
    os._exit(code)
