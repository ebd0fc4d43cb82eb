"""A DALI pipeline that is fed from Python: batches in, what becomes of each out, in order, whatever fails between."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from ..errors import ShardError

FAILURES = (RuntimeError, MemoryError, UnicodeDecodeError)  # the last: a missing file whose name is not UTF-8

T = TypeVar("T")


class FedPipeline(Generic[T]):
    """A DALI pipeline that takes batches from an iterable and gives what becomes of each, in their order.

    Args:
        graph: a pipeline definition whose first argument is the source of its inputs. The last input and the last
            output are the batch's number, by which a batch that is out of turn is noticed.
        options: of the pipeline.
    """

    def __init__(self, graph: Callable[..., Any], **options: Any) -> None:
        self._feed: Iterator[tuple[T, list[Any]]] = iter(())
        # Given to DALI and not yet taken back, in order, with the inputs that it may still be reading.
        self._ahead: deque[tuple[T, list[Any]]] = deque()
        self._number = 0
        self._failure: Exception | None = None
        self._pipeline = graph(self._next, **options)
        self._pipeline.build()

    def run(
        self, feed: Iterable[tuple[T, list[Any]]], stream: int | None = None
    ) -> Generator[tuple[T, list[Any] | Exception], None, None]:
        """For each batch of the feed, what came with its inputs, and its outputs or why DALI failed on it.

        DALI works ahead. What the feed raises comes after the batches before it.
        """
        self._feed, self._failure = iter(feed), None
        self._pipeline.reset()
        try:
            while True:
                try:
                    *outputs, numbers = self._pipeline.run(stream)
                except StopIteration:
                    break
                except FAILURES as exc:
                    yield self._ahead.popleft()[0], exc
                else:
                    companion, inputs = self._ahead.popleft()
                    if np.asarray(numbers.as_tensor())[0] != inputs[-1][0]:
                        raise ShardError("DALI gave a batch out of turn; install DALI 2.4")
                    yield companion, outputs
        finally:
            self._feed = iter(())
            while self._ahead:  # what nobody will ask for any more
                with contextlib.suppress(StopIteration, *FAILURES):
                    self._pipeline.run()
                self._ahead.popleft()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Ends its threads, even while the frames of an exception still refer to it."""
        self._pipeline.__del__()

    def _next(self) -> list[Any]:
        """The inputs of the next batch; DALI takes no exception but StopIteration."""
        try:
            companion, inputs = next(self._feed)
        except StopIteration:
            raise
        except Exception as exc:  # for `run` to raise; out of here it would come again at every run
            self._failure = exc
            raise StopIteration from exc
        self._number += 1
        inputs = [*inputs, np.full(len(inputs[0]), self._number)]
        self._ahead.append((companion, inputs))
        return inputs
