"""Measures the rate of a process from its first to its last step, and its start-up and teardown separately."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """The measured rate.

    Attributes:
        images_per_second: the rate from the first to the last step. If there was only one step, the rate includes
            start-up and teardown.
        startup_seconds: the time until the first step was done; 0 if there was only one.
        teardown_seconds: the time after the last step was done; 0 if there was only one.
    """

    images_per_second: float
    startup_seconds: float
    teardown_seconds: float


class Stopwatch:
    """Measures a `Pace`.

    The rate does not include the images of the first step, because the time that they took is part of the start-up.

    Args:
        begin: the value of `time.perf_counter()` when the start-up began; the current one if None.
    """

    def __init__(self, begin: float | None = None) -> None:
        self._begin = time.perf_counter() if begin is None else begin
        self._first: float | None = None
        self._last = self._begin
        self._first_images = self._images = 0

    def tick(self, images: int, when: float | None = None) -> None:
        """Records that a step is done.

        Args:
            images: how many images the step processed; 0 if it wrote images that were counted before.
            when: the value of `time.perf_counter()` when it was done; the current one if None.
        """
        self._last = time.perf_counter() if when is None else when
        if self._first is None:
            self._first, self._first_images = self._last, images
        else:
            self._images += images

    def stop(self) -> Pace:
        """Ends the teardown and returns the pace of all steps."""
        end = time.perf_counter()
        if self._first is None or self._images <= 0:
            return Pace((self._first_images + self._images) / (end - self._begin), 0.0, 0.0)
        return Pace(self._images / (self._last - self._first), self._first - self._begin, end - self._last)
