"""What a decoder takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..sources.access.read_ahead import SHARE, NoRoomError, Room, Share
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import Reject, Stage


@dataclass
class Decoded:
    """A batch after decoding and resizing.

    Attributes:
        batch: what was asked for.
        pixels: (N, H, W, C) in R,G,B (C=3) or gray (C=1), uint8 or, in 16 bits, uint16: an image for each of the
            batch's N items, of which a reject's is undefined. A NumPy array, or one of CuPy on the decoder's GPU,
            ordered on the stream that the decoder was given. On a GPU, hold it until that stream has done with it.
        kept: positions in `batch.items` that have pixels, ascending, int64 (rows,).
        source_bytes: encoded size of every item of the batch, int64; 0 where nothing could be read.
        rejects: the items without pixels, in order.
        seconds: time spent in each stage, by its name.
    """

    batch: Batch
    pixels: Any
    kept: NDArray[np.int64]
    source_bytes: NDArray[np.int64]
    rejects: list[Reject]
    seconds: dict[str, float]


def on_host(pixels: Any) -> NDArray[Any]:
    """A batch's pixels as a NumPy array; CuPy's are copied."""
    host: NDArray[Any] = pixels if isinstance(pixels, np.ndarray) else pixels.get()
    return host


# Raised by one whenever the same libraries may give other pixels or verdicts for the same file. It is part of what
# `Decoder.provenance` gives, so a build never continues with another revision.
DECODING_REVISION = 3

Reads = list[Callable[[], bytes]]


def with_reads(source: Source, batches: Iterable[Batch]) -> Generator[tuple[Batch, Reads], None, None]:
    """Each batch with what gives its items' bytes, as `read_item` does.

    Where reads take long, those of this batch and of the next are under way, as far as there is `Room`.
    """
    if source.reads_at_once == 1:
        for batch in batches:
            yield batch, [partial(read_item, source, item) for item in batch.items]
        return
    pool, room = ThreadPoolExecutor(source.reads_at_once, "gpu-npz-read"), Room()
    try:
        before: tuple[Batch, Reads] | None = None
        for batch in batches:
            futures = [pool.submit(_ahead, source, item, room) for item in batch.items]
            reads: Reads = [partial(_taken, *each, source) for each in zip(futures, batch.items, strict=True)]
            if before is not None:
                yield before
            before = batch, reads
        if before is not None:
            yield before
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(source: Source, item: Item, room: Room) -> tuple[bytes, Share] | None:
    """An item's bytes, and what they take of the room; None if there is none for them."""
    share = Share(room)
    SHARE.set(share)
    try:
        return read_item(source, item), share
    except NoRoomError:
        share.give_back()
        return None
    except BaseException:
        share.give_back()
        raise


def _taken(read: Future[tuple[bytes, Share] | None], item: Item, source: Source) -> bytes:
    found = read.result()
    if found is None:
        return read_item(source, item)
    data, share = found
    share.give_back()
    return data


class Decoder(Protocol):
    """Batches to pixels. Use as a context manager; it may read ahead, and keeps the order."""

    @property
    def sixteen_bit(self) -> str | None:
        """The path of an image of which it kept 8 of 16 bits a channel."""
        ...

    def decode(self, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """The batches, decoded. Raises ShardError for trouble that is not an image's."""
        ...

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """For measuring: the stages up to `last`, as `decode` goes through them, and nothing around them.

        What comes of them is lost; gives each batch when it is done.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What decides the pixels besides the settings: this code, libraries with versions, and the GPU's model."""
        ...

    def __enter__(self) -> Decoder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
