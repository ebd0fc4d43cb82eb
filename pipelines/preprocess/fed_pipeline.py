"""DALI pipelines that are fed from Python and give one result per batch, in order, even if some batches fail."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np

from ..errors import ShardError

FAILURES = (RuntimeError, MemoryError, UnicodeDecodeError)  # the last for a missing file whose name is not UTF-8

_OUT_OF_TURN = "DALI gave a batch out of turn; install DALI 2.4"

T = TypeVar("T")
Entry = TypeVar("Entry")


class FedPipeline(Generic[T]):
    """A DALI pipeline that takes batches from an iterable and gives one result for each, in the same order.

    Args:
        graph: a pipeline definition whose first argument is the source of its inputs. Its last input and its last
            output are the batch's number, which detects a batch that comes out of order.
        options: passed to the pipeline.
    """

    def __init__(self, graph: Callable[..., Any], **options: Any) -> None:
        self._feed: Iterator[tuple[T, list[Any]]] = iter(())
        # The batches that DALI is working on, in order, with their inputs, which DALI may still be reading.
        self._ahead: deque[tuple[T, list[Any]]] = deque()
        self._number = 0
        self._failure: Exception | None = None
        self._pipeline = graph(self._next, **options)
        self._pipeline.build()

    def run(
        self, feed: Iterable[tuple[T, list[Any]]], stream: Any = None
    ) -> Generator[tuple[T, list[Any] | Exception], None, None]:
        """For each batch of the feed: its companion, and its outputs or the exception with which DALI failed on it.

        DALI works ahead. An exception of the feed is raised after the results of all batches before it.

        Args:
            feed: pairs of a companion, which is returned with the result, and the inputs of the pipeline.
            stream: the CUDA stream on which the outputs will be used, CuPy's for example; None waits for each batch.
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
            while self._ahead:  # discard the results that nobody will ask for
                with contextlib.suppress(StopIteration, *FAILURES):
                    self._pipeline.run()
                self._ahead.popleft()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Ends DALI's threads, even while the traceback of an exception still refers to the pipeline."""
        self._pipeline.__del__()

    def _next(self) -> list[Any]:
        """The inputs of the next batch. DALI handles no exception but StopIteration."""
        try:
            companion, inputs = next(self._feed)
        except StopIteration:
            raise
        except Exception as exc:  # `run` raises it; raised here, it would come again at every run
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
