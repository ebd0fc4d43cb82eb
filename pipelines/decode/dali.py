"""Decoding and resizing by DALI, on a GPU or by its CPU operators: whole JPEGs there, all else by Pillow.

DALI answers one damaged image by failing its whole batch. So the graph looks at every item before it decodes: only a
whole 8-bit JPEG within the limits reaches the decoder, and a blank image takes the place of any other, which is then
Pillow's. A batch that fails all the same is decoded again in parts, until an image that DALI cannot decode stands
alone; it too is Pillow's. So an image's pixels do not depend on its neighbours, and every verdict comes from one place.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import dali
from PIL import Image

from ..config import BuildConfig
from ..errors import BackendError, ShardError
from ..geometry import Geometry
from ..plan import Batch
from ..rejects import MAX_ENCODED_BYTES, BadItem, Reject, clean
from ..sources.base import Item, Source, read_item
from ..tuning import Tuning
from .base import Decoded, Stage
from .pillow import PillowDecoder, versions

log = logging.getLogger(__name__)
fn: Any = dali.fn  # untyped all four: DALI's stubs leave out much of what it has
math: Any = dali.math
types: Any = dali.types
pipeline_def: Any = dali.pipeline.pipeline_def

_FILTERS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
_FAILURES = (RuntimeError, MemoryError, UnicodeDecodeError)  # the last: a missing file whose name is not UTF-8
_NO_MEMORY = re.compile("bad_alloc|out.of.memory|MemoryAllocation|allocation failed|can't allocate", re.IGNORECASE)
_BROKEN_GPU = re.compile("CUDA (runtime|driver) API error|cudaError|CUDA_ERROR")
_UNFINISHED = 2  # batches that wait for Pillow while DALI goes on: a few slow files in one of them do no harm


@dataclass
class _Rows:
    """A batch in the making: pixels (N, H, W, C), encoded sizes, and which rows have their pixels."""

    pixels: Any
    source_bytes: NDArray[np.int64]
    done: NDArray[np.bool_]


@dataclass
class _Unfinished:
    """A batch that DALI is done with, and what Pillow makes of the items at the positions `left`."""

    batch: Batch
    rows: _Rows
    left: NDArray[np.int64]
    results: list[Future[tuple[int, NDArray[np.uint8] | Reject]]]
    seconds: float


class DaliDecoder:
    """Decodes whole 8-bit JPEGs by DALI; every other item, and what DALI fails on, by Pillow.

    Args:
        config: the settings of the build.
        geometry: where pixels go.
        source: gives the items. Where each is a local file, DALI reads it.
        tuning: the largest batch that `decode` will meet, threads (for DALI, and as many for Pillow), and so on.
        device: the GPU's number, or None for DALI's CPU operators.
        stream: handle of the CUDA stream on which the pixels will be used; None waits for each batch instead.
    """

    def __init__(
        self,
        config: BuildConfig,
        geometry: Geometry,
        source: Source,
        *,
        tuning: Tuning,
        device: int | None,
        stream: int | None = None,
    ) -> None:
        self._source = source
        self._pillow = PillowDecoder(config, geometry, source)
        self._tuning = tuning
        self._device = device
        self._stream = stream
        self._row_shape = (geometry.height, geometry.width, config.channel_count)
        self._options = {
            "config": config,
            "geometry": geometry,
            "backend": "cpu" if device is None else "mixed",
            "hw_decoder_load": tuning.hw_decoder_load,
            "batch_size": tuning.batch_size,
            "num_threads": tuning.threads,
            "device_id": device,
        }
        self._xp: Any = np if device is None else importlib.import_module("cupy")
        self._on_stream: Any = contextlib.nullcontext()
        if stream is not None:
            self._on_stream = self._xp.cuda.ExternalStream(stream, device)
        elif device is not None:
            self._on_stream = self._xp.cuda.Device(device)
        self._batches: Iterator[Batch] = iter(())
        self._ahead: deque[Batch] = deque()  # given to DALI and not yet taken back, in order
        self._failure: Exception | None = None
        self._main: Any = None
        self._repair: Any = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> DaliDecoder:
        try:
            self._main = _from_source(
                self._next,
                "resize",
                self._source.file_per_item,
                prefetch_queue_depth=self._tuning.prefetch,
                **self._options,
            )
            self._main.build()
        except RuntimeError as exc:
            advice = "see what `gpu-npz doctor` finds"
            if _NO_MEMORY.search(str(exc)):
                advice = "`nvidia-smi` shows which processes hold the GPU's memory; end them, or take another GPU"
            raise BackendError(f"DALI does not start ({_reason(exc)}); {advice}") from exc
        if self._device is not None:
            with self._on_stream:  # CuPy compiles this once, which must not come in the midst of a build
                self._xp.zeros((1, 1), np.uint8)[self._xp.asarray([0])] = self._xp.asarray(np.ones((1, 1), np.uint8))
        self._open.enter_context(self._pillow)
        self._pool = self._open.enter_context(ThreadPoolExecutor(self._tuning.threads, "gpu-npz-pillow"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipeline in filter(None, (self._main, self._repair)):
            pipeline.__del__()  # ends its threads even while the frames of an exception still refer to it
        self._main = self._repair = None
        self._open.close()

    def environment(self) -> dict[str, Any]:
        """What decides the pixels besides the settings: DALI, its codecs, Pillow, and the GPU's model."""
        found = {
            "backend": "dali",
            "device": "cpu" if self._device is None else "cuda",
            "dali": dali.__version__,
            "nvimgcodec": importlib.import_module("nvidia.nvimgcodec").__version__,
            **versions(),
        }
        if self._device is not None:
            found["gpu"] = self._xp.cuda.runtime.getDeviceProperties(self._device)["name"].decode()
        return found

    @property
    def deep(self) -> str | None:
        """See `PillowDecoder`, to which all such images go."""
        return self._pillow.deep

    def decode(self, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """See `Decoder.decode`; what `batches` raises comes after the batches before it."""
        unfinished: deque[_Unfinished] = deque()
        try:
            with contextlib.closing(self._run(batches)) as runs:
                for run in runs:
                    unfinished.append(run)
                    while unfinished and (
                        len(unfinished) > _UNFINISHED or all(result.done() for result in unfinished[0].results)
                    ):
                        yield self._finish(unfinished.popleft())
            while unfinished:
                yield self._finish(unfinished.popleft())
        finally:
            for result in (result for batch in unfinished for result in batch.results):
                result.cancel()
        if self._failure is not None:
            raise self._failure

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """See `Decoder.bare`; waits for each batch."""
        self._batches, self._failure = iter(batches), None
        pipeline = _from_source(
            self._next, last, self._source.file_per_item, prefetch_queue_depth=self._tuning.prefetch, **self._options
        )
        try:
            while True:
                try:
                    pipeline.run()
                except StopIteration:
                    break
                except _FAILURES:
                    log.debug("DALI failed on a batch")
                yield self._ahead.popleft()
        finally:
            pipeline.__del__()
            self._ahead.clear()
        if self._failure is not None:
            raise self._failure

    def _run(self, batches: Iterable[Batch]) -> Generator[_Unfinished, None, None]:
        """What DALI makes of the batches, in order; what it has left begins at Pillow."""
        self._batches, self._failure = iter(batches), None
        self._main.reset()
        try:
            while True:
                start = time.perf_counter()
                try:
                    *outputs, index = self._main.run(self._stream)
                except StopIteration:
                    break
                except _FAILURES as exc:
                    log.info("DALI failed on a batch, which is decoded again in parts: %s", _reason(exc))
                    batch = self._ahead.popleft()
                    with self._on_stream:
                        rows = self._salvage(batch, exc)
                else:
                    batch = self._ahead.popleft()
                    if np.asarray(index.as_tensor()).tolist() != [item.index for item in batch.items]:
                        raise ShardError(f"DALI {dali.__version__} gave a batch out of turn; install DALI 2.4")
                    with self._on_stream:
                        rows = self._rows(outputs)
                left = np.flatnonzero(~rows.done)
                results = [self._pool.submit(self._by_pillow, batch.items[position]) for position in left]
                yield _Unfinished(batch, rows, left, results, time.perf_counter() - start)
        finally:
            self._drain()

    def _next(self) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        """Paths or encoded images of the next batch, and indices; DALI takes no exception but StopIteration."""
        try:
            batch = next(self._batches)
            if not 1 <= len(batch.items) <= self._tuning.batch_size:
                raise ValueError(f"a batch of {len(batch.items)} items; allowed are 1 to {self._tuning.batch_size}")
            if self._source.file_per_item:
                texts = [self._source.local_path(item) for item in batch.items]
            else:  # a byte that is no image, where there is nothing to be had: Pillow's part says why
                texts = [data or b"\0" for data in self._pool.map(self._encoded, batch.items)]
        except StopIteration:
            raise
        except Exception as exc:  # for `decode` to raise; out of here it would come again at every run
            self._failure = exc
            raise StopIteration from exc
        self._ahead.append(batch)
        return [np.frombuffer(text, np.uint8) for text in texts], np.array(
            [item.index for item in batch.items], np.int64
        )

    def _drain(self) -> None:
        """Takes back from DALI what nobody will ask for any more."""
        self._batches = iter(())
        while self._ahead:
            self._ahead.popleft()
            with contextlib.suppress(StopIteration, *_FAILURES):
                self._main.run()

    def _rows(self, outputs: list[Any]) -> _Rows:
        pixels, source_bytes, usable = (output.as_tensor() for output in outputs)
        # The last two come from CPU operators, which have finished when a batch is handed out, whatever the stream
        # (DALI's executor waits for its tasks before it gives outputs; not yet seen on a GPU).
        images = np.asarray(pixels) if self._device is None else self._xp.from_dlpack(pixels)
        return _Rows(images, np.array(source_bytes), np.array(usable))

    def _finish(self, run: _Unfinished) -> Decoded:
        """The batch with Pillow's pixels where DALI has none."""
        start = time.perf_counter()
        rows, rejects, mended, images = run.rows, [], [], []
        for position, future in zip(run.left.tolist(), run.results, strict=True):
            rows.source_bytes[position], result = future.result()
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                mended.append(position)
                images.append(result)
        if mended:
            with self._on_stream:
                rows.pixels[self._xp.asarray(mended)] = self._xp.asarray(np.stack(images))
            rows.done[mended] = True
        seconds = {"read": 0.0, "decode": run.seconds + time.perf_counter() - start}
        return Decoded(run.batch, rows.pixels, np.flatnonzero(rows.done), rows.source_bytes, rejects, seconds)

    def _by_pillow(self, item: Item) -> tuple[int, NDArray[np.uint8] | Reject]:
        """The item's encoded size, 0 if it cannot be read, and its pixels or why it has none."""
        data = b""
        try:
            data = read_item(self._source, item)
            return len(data), self._pillow.decode_image(data, item.path, self._source.frame(item))
        except BadItem as bad:
            return len(data), bad.of(item.path, item.index)

    def _encoded(self, item: Item) -> bytes:
        """The item's bytes, empty if it cannot be read."""
        try:
            return read_item(self._source, item)
        except BadItem:
            return b""

    def _salvage(self, batch: Batch, failure: Exception) -> _Rows:
        """What DALI can decode of a batch that it failed on as a whole."""
        count = len(batch.items)
        rows = _Rows(
            self._xp.empty((count, *self._row_shape), np.uint8), np.zeros(count, np.int64), np.zeros(count, np.bool_)
        )
        data = list(self._pool.map(self._encoded, batch.items))
        positions = [position for position in range(count) if data[position]]
        if _is_no_memory(failure):
            dali.backend.ReleaseUnusedMemory()
            groups = list(_halves(positions))
        else:
            # DALI names one image at most. Whatever Pillow rejects is a good guess at them all, and mostly leaves one
            # run for the others. But what DALI does with an image alone decides, lest its pixels depend on its
            # neighbours.
            results = self._pool.map(self._by_pillow, [batch.items[position] for position in positions])
            suspects = [p for p, (_, result) in zip(positions, results, strict=True) if isinstance(result, Reject)]
            groups = [[position for position in positions if position not in suspects], *([p] for p in suspects)]
        for group in filter(None, groups):
            self._mend(rows, data, group)
        return rows

    def _mend(self, rows: _Rows, data: Sequence[bytes], positions: list[int]) -> None:
        """Decodes these items by DALI, in halves where that fails."""
        self._repair = self._repair or _from_memory(prefetch_queue_depth=1, **self._options)
        try:
            outputs = self._repair.run(self._stream, encoded=[np.frombuffer(data[p], np.uint8) for p in positions])
        except _FAILURES as exc:
            no_memory = _is_no_memory(exc)
            if not no_memory and _BROKEN_GPU.search(str(exc)):
                raise ShardError(
                    f"GPU {self._device} is in an error state ({_reason(exc)}); "
                    "look for Xid errors in dmesg, then run the same command to resume"
                ) from exc
            if no_memory:
                dali.backend.ReleaseUnusedMemory()
            if len(positions) > 1:
                for half in _halves(positions):
                    self._mend(rows, data, half)
            elif no_memory:  # never another decoder for want of memory: its pixels would differ
                raise ShardError(
                    "no memory to decode one image; end what else uses it, or lower --workers or --open-shards, and "
                    "run the command again to resume (with a lower --max-pixels, it starts anew)"
                ) from exc
        else:
            part = self._rows(outputs)
            rows.pixels[self._xp.asarray(positions)] = part.pixels
            rows.source_bytes[positions] = part.source_bytes
            rows.done[positions] = part.done
            if self._device is not None:  # DALI may use the part's buffer again as soon as it is dropped
                self._xp.cuda.get_current_stream().synchronize()


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # see above
def _from_source(
    source: Callable[[], Any],
    last: Stage,
    files: bool,
    config: BuildConfig,
    geometry: Geometry,
    backend: str,
    hw_decoder_load: float | None,
) -> Any:
    """What `source` gives at each call, paths of files or encoded images, up to the stage `last`; and its indices."""
    encoded, index = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 0])
    if files:
        # Not mapped: plain reads are twice as fast, and a file that shrinks meanwhile does no harm.
        encoded = fn.io.file.read(encoded, dont_use_mmap=True)
    outputs: tuple[Any, ...]
    if last == "read":
        outputs = (encoded.shape(),)
    else:
        outputs = _decoded(encoded, last, config, geometry, backend, hw_decoder_load)
    return *outputs, index


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # see above
def _from_memory(config: BuildConfig, geometry: Geometry, backend: str, hw_decoder_load: float | None) -> Any:
    """What is fed as "encoded", decoded."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return _decoded(encoded, "resize", config, geometry, backend, hw_decoder_load)


def _decoded(
    encoded: Any, last: Stage, config: BuildConfig, geometry: Geometry, backend: str, hw_decoder_load: float | None
) -> tuple[Any, Any, Any]:
    """The graph: pixels, encoded sizes, and which items DALI decoded, where the others' pixels are a blank's.

    Up to the stage `decode`, pixels have the size that they are stored in.
    """
    out_height, out_width = geometry.height, geometry.width
    max_pixels = min(config.max_pixels, 2**31 - 1)  # the largest constant that a graph can hold

    source_bytes = encoded.shape()[0]
    usable = (source_bytes >= 4) & (source_bytes <= MAX_ENCODED_BYTES)
    if usable:  # a branch sees only its own items: no byte is asked of an empty file, no size of a text
        usable = (encoded[0] == 0xFF) & (encoded[1] == 0xD8) & (encoded[-2] == 0xFF) & (encoded[-1] == 0xD9)
    if usable:
        shape = fn.peek_image_shape(encoded, adjust_orientation=config.exif_orientation)
    else:
        shape = types.Constant([0, 0, 0], dtype=types.INT64, device="cpu")
    height, width = shape[0], shape[1]
    usable = (height > 0) & (width > 0) & (height * width <= max_pixels)
    size, start = [out_height, out_width], None
    if geometry.mode == "none":
        usable = usable & (height == out_height) & (width == out_width)
    elif geometry.mode != "stretch":
        high, wide, top, left = _place(geometry, math.max(height, 1), math.max(width, 1))
        usable = usable & (high * wide <= max_pixels)
        if usable:
            size = fn.cast(fn.stack(high, wide), dtype=types.FLOAT)
            start = fn.cast(fn.stack(top, left), dtype=types.INT32)
        else:
            size = types.Constant([out_height, out_width], dtype=types.FLOAT, device="cpu")
            start = types.Constant([0, 0], dtype=types.INT32, device="cpu")
    if not usable:
        encoded = types.Constant(_blank(out_height, out_width), device="cpu")

    images = fn.decoders.image(
        encoded,
        device=backend,
        output_type=types.GRAY if config.channels == "gray" else types.RGB,
        adjust_orientation=config.exif_orientation,
        jpeg_fancy_upsampling=True,  # as Pillow does; without it, pixels of 4:2:0 images differ by up to 27 levels
        **({} if hw_decoder_load is None else {"hw_decoder_load": hw_decoder_load}),
    )
    if last == "resize" and geometry.mode != "none":
        images = fn.resize(images, size=size, interp_type=_FILTERS[config.interpolation], subpixel_scale=False)
    if last == "resize" and start is not None:
        images = fn.slice(
            images,
            start=start,
            shape=[out_height, out_width],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=config.pad_value,
        )
    return images, source_bytes, usable


def _place(geometry: Geometry, height: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """`Geometry.place` of center-crop and pad for int64 nodes, without branches; offsets are where to begin to cut."""
    out_height, out_width = geometry.height, geometry.width
    if geometry.mode == "center-crop":
        cover_height, cover_width = geometry.cover
        high = math.max(height * cover_width // width, cover_height)
        wide = math.max(width * cover_height // height, cover_width)
        top, left = (high - out_height) // 2, (wide - out_width) // 2
        top += top & (high - out_height) & 1  # half to even
        left += left & (wide - out_width) & 1
    else:
        high = math.clamp((2 * height * out_width + width) // (2 * width), 1, out_height)
        wide = math.clamp((2 * width * out_height + height) // (2 * height), 1, out_width)
        top, left = -((out_height - high) // 2), -((out_width - wide) // 2)
    return high, wide, top, left


def _halves(positions: Sequence[int]) -> tuple[list[int], list[int]]:
    middle = len(positions) // 2
    return list(positions[:middle]), list(positions[middle:])


def _is_no_memory(failure: Exception) -> bool:
    return isinstance(failure, MemoryError) or _NO_MEMORY.search(str(failure)) is not None


def _reason(failure: BaseException) -> str:
    return clean(str(failure).rpartition("encountered:")[2])  # before it, DALI quotes the graph's source


def _blank(height: int, width: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
