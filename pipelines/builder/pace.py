"""How fast something runs, from its first to its last step; its start-up and teardown are measured separately."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """The measured rate.

    Attributes:
        images_per_second: from the first to the last step. If there was only one step, start-up and teardown count too.
        startup_seconds: until the first step was done; 0 if there was only one.
        teardown_seconds: since the last step was done; 0 if there was only one.
    """

    images_per_second: float
    startup_seconds: float
    teardown_seconds: float


class Stopwatch:
    """Measures a pace.

    The images of the first step do not count, because the time that they took is part of the start-up.

    Args:
        begin: `time.perf_counter()` when the start-up began; now if None.
    """

    def __init__(self, begin: float | None = None) -> None:
        self._begin = time.perf_counter() if begin is None else begin
        self._first: float | None = None
        self._last = self._begin
        self._first_images = self._images = 0

    def tick(self, images: int) -> None:
        """A step is done, which took so many images; 0 if images that were counted before are now written."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first, self._first_images = self._last, images
        else:
            self._images += images

    def stop(self) -> Pace:
        """The pace of all steps; the teardown ends now."""
        end = time.perf_counter()
        if self._first is None or self._images <= 0:
            return Pace((self._first_images + self._images) / (end - self._begin), 0.0, 0.0)
        return Pace(self._images / (self._last - self._first), self._first - self._begin, end - self._last)
