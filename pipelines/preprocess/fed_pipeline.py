"""DALI pipelines that are fed from Python: batches in, what becomes of each out, in order, whatever fails between."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np

from ..errors import ShardError

FAILURES = (RuntimeError, MemoryError, UnicodeDecodeError)  # the last: a missing file whose name is not UTF-8

_OUT_OF_TURN = "DALI gave a batch out of turn; install DALI 2.4"

T = TypeVar("T")
Entry = TypeVar("Entry")


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
        self, feed: Iterable[tuple[T, list[Any]]], stream: Any = None
    ) -> Generator[tuple[T, list[Any] | Exception], None, None]:
        """For each batch of the feed, what came with its inputs, and its outputs or why DALI failed on it.

        DALI works ahead. What the feed raises comes after the batches before it.

        Args:
            feed: batches, each with what comes with it and its inputs.
            stream: the CUDA stream (CuPy's, say) on which the outputs will be used; None waits for each batch instead.
        """
        self._feed, self._failure = iter(feed), None
        self._pipeline.reset()
        try:
            while True:
                try:
                    *outputs, numbers = self._pipeline.run(stream)
                except StopIteration:
                    if self._ahead:
                        raise ShardError(_OUT_OF_TURN) from None
                    break
                except FAILURES as exc:
                    yield self._ahead.popleft()[0], exc
                else:
                    companion, inputs = self._ahead.popleft()
                    if np.asarray(numbers.as_tensor())[0] != inputs[-1][0]:
                        raise ShardError(_OUT_OF_TURN)
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


def run_in_turn(
    pipelines: Sequence[FedPipeline[T]], feed: Iterable[tuple[T, list[Any]]], stream: Any = None
) -> Generator[tuple[T, list[Any] | Exception], None, None]:
    """As `FedPipeline.run`, by pipelines that take turns: while one finishes a batch, the others work on theirs."""
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(contextlib.closing(pipeline.run(hand, stream)))
            for pipeline, hand in zip(pipelines, _dealt(feed, len(pipelines)), strict=True)
        ]
        for run in itertools.cycle(runs):
            try:
                result = next(run)
            except StopIteration:  # where this pipeline has no next batch, the feed has none
                return
            yield result


def _dealt(feed: Iterable[Entry], count: int) -> list[Iterator[Entry]]:
    """The entries of `feed` in turn, as `count` iterators; what `feed` raises takes the place of its next entry."""
    entries = iter(feed)
    hands = [deque[tuple[Entry, None] | tuple[None, Exception]]() for _ in range(count)]
    turns = itertools.cycle(hands)

    def dealt(hand: deque[tuple[Entry, None] | tuple[None, Exception]]) -> Iterator[Entry]:
        while True:
            while not hand:
                taker = next(turns)
                try:
                    taker.append((next(entries), None))
                except Exception as exc:  # StopIteration, too: every hand gets one
                    taker.append((None, exc))
            entry, failure = hand.popleft()
            if isinstance(failure, StopIteration):
                return
            if failure is not None:
                raise failure
            yield cast(Entry, entry)

    return [dealt(hand) for hand in hands]
