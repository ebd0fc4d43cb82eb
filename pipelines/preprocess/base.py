"""What a decoder and a normalizer take and give."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..sources.access.read_ahead import SHARE, NoRoomError, Room, Share
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import Reject, Stage


@dataclass
class DecodedBatch:
    """A batch after decoding and resizing.

    Attributes:
        batch: the batch that was decoded.
        pixels: (N, H, W, C) in R,G,B (C=3) or gray (C=1), uint8 or, in 16 bits, uint16: one image for each of the
            batch's N items; undefined for rejects. A NumPy array with any strides, or a CuPy array on the decoder's GPU
            that is ready in the order of the decoder's stream. On a GPU, keep a reference until that stream no longer
            reads it.
        kept: positions in `batch.items` that have pixels, ascending, int64 (rows,).
        source_bytes: encoded size of each item, int64 (N,); 0 if it could not be read.
        rejects: the items without pixels, in order.
        seconds: time spent in each stage, by the stage's name.
        by_dali: positions whose pixels DALI decoded, ascending, int64; the others of `kept` are Pillow's.
        encoded: on a GPU, the N items' bytes, each uint8 (bytes,): the decoder may read them until the pixels are ready
            in the order of its stream, so keep the batch until then. Empty on a CPU.
    """

    batch: Batch
    pixels: Any
    kept: NDArray[np.int64]
    source_bytes: NDArray[np.int64]
    rejects: list[Reject]
    seconds: dict[str, float]
    by_dali: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    encoded: Sequence[NDArray[np.uint8]] = ()


def on_host(pixels: Any) -> NDArray[Any]:
    """A batch's pixels as a NumPy array; a CuPy array is copied."""
    host: NDArray[Any] = pixels if isinstance(pixels, np.ndarray) else pixels.get()
    return host


# Increase by one whenever this code may give other pixels or rejects for the same file with the same libraries. It is
# part of `Decoder.provenance`, so a build never continues with another revision.
DECODING_REVISION = 4

Reads = list[Callable[[], bytes]]


def with_reads(source: Source, batches: Iterable[Batch]) -> Generator[tuple[Batch, Reads], None, None]:
    """Each batch with a function per item that returns the item's bytes and raises as `read_item` does.

    For slow sources, the items of this batch and of the next one are read ahead in threads, as far as `Room` allows.
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
    """An item's bytes and their share of the room; None if the room is too small for them."""
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
    """Batches to pixels. Use as a context manager. A decoder may read ahead, but keeps the order of the batches."""

    @property
    def sixteen_bit(self) -> str | None:
        """The path of an image that was reduced from 16 to 8 bits per channel; None if there was none."""
        ...

    def decode(self, batches: Iterable[Batch]) -> Iterator[DecodedBatch]:
        """Decodes the batches. Raises ShardError for a failure that no image caused, such as a lack of memory."""
        ...

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """For benchmarks: runs only the stages up to `last`, in the same way as `decode`.

        The pixels are discarded; each batch is returned when it is done.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What decides the pixels besides the settings: this code's revision, library versions, the GPU model."""
        ...

    def __enter__(self) -> Decoder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Normalizer(Protocol):
    """Decoded pixels to stored rows."""

    @property
    def stream(self) -> Any:
        """CuPy's Stream on which `apply` reads the pixels; None on the CPU."""
        ...

    def allocate(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """A buffer in host memory for stored rows, of the stored dtype."""
        ...

    def apply(self, pixels: Any, kept: NDArray[np.int64], out: NDArray[Any]) -> Callable[[], None]:
        """Writes the rows of some images to `out`.

        Args:
            pixels: (N, H, W, C) in R,G,B or gray, uint8 or, in 16 bits, uint16, as a decoder gives them.
            kept: which of the N images, int64 (rows,).
            out: (rows, *row shape) in the stored dtype: the front of a buffer that `allocate` made.

        Returns:
            A function that waits until `out` is complete; call it before reading `out`.

        Raises:
            ValueError: the shape or dtype of `pixels` or `out` is wrong.
        """
        ...

    def device_bytes(self) -> int:
        """GPU memory in use, that of other processes included; 0 on the CPU."""
        ...
