"""Retries of calls that fail for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

Answer = TypeVar("Answer")


def with_retries(
    action: Callable[[], Answer], delays_s: Iterable[float], may_pass: Callable[[Exception], bool]
) -> Answer:
    """Calls `action`, and calls it again after each delay while it fails with an error that may pass.

    Args:
        action: the call.
        delays_s: seconds to sleep before each further attempt; their number is the number of retries.
        may_pass: whether a retry may help after this error. Not called after the last attempt.

    Raises:
        Exception: the first error that cannot pass, or the error of the last attempt.
    """
    for delay_s in delays_s:
        try:
            return action()
        except Exception as exc:
            if not may_pass(exc):
                raise
        time.sleep(delay_s)
    return action()
