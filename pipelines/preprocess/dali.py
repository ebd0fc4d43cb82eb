"""Decodes and resizes plain JPEGs with DALI, on a GPU or with its CPU operators, and all other images with Pillow.

DALI decodes many images in one process. If two of its parsers read a file differently, it could write beyond a buffer
into another image. So DALI decides nothing: one pipeline reads files, Python parses each header (`jpeg.py`), and a
second pipeline gets the bytes together with their size, placement and orientation. Only plain JPEGs within the limits
reach DALI's decoder. Every other image is replaced by a blank one in DALI's batch and decoded by Pillow.

If one image is damaged, DALI fails on its whole batch. Such a batch is decoded again in parts, until each image that
DALI cannot decode is alone; Pillow then decodes it. So an image's pixels do not depend on its neighbours, and all
rejects come from Pillow.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import dali, nvimgcodec
from PIL import Image

from ..config import BuildConfig
from ..errors import BackendError, ShardError
from ..machine.tuning import Tuning
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import MAX_ENCODED_BYTES, BadItem, Reject, Stage, clean
from .base import DECODING_REVISION, DecodedBatch, on_host
from .dali_pipelines import decode_images, input_names, without_opencv
from .dali_reader import DaliReader, EncodedBatch
from .fed_pipeline import FedPipeline, run_in_turn
from .geometry import Geometry
from .pillow import PillowDecoder

log = logging.getLogger(__name__)
_NO_MEMORY = re.compile("bad_alloc|out.of.memory|MemoryAllocation|allocation failed|can't allocate", re.IGNORECASE)
_BROKEN_GPU = re.compile("CUDA (runtime|driver) API error|cudaError|CUDA_ERROR")
_PENDING = 2  # batches that may wait for Pillow while DALI continues, so that a few slow files do not stop it

_ONE_IMAGE_MEMORY = (
    "no memory to decode one image; end what else uses it, or lower --workers or --open-shards, and run the command "
    "again to resume (with a lower --max-pixels, it starts over)"
)


@dataclass
class _Rows:
    """A batch that is being decoded.

    Attributes:
        pixels: uint8 (N, H, W, C), of NumPy or CuPy.
        source_bytes: encoded size of each item, int64 (N,).
        done: which rows have their pixels, bool (N,).
    """

    pixels: Any
    source_bytes: NDArray[np.int64]
    done: NDArray[np.bool_]


@dataclass
class _PendingBatch:
    """A batch that DALI has finished, and Pillow's results for the items at the positions `left`."""

    read: EncodedBatch
    rows: _Rows
    left: NDArray[np.int64]
    results: list[Future[tuple[int, NDArray[np.uint8] | Reject]]]
    seconds: float


class DaliDecoder:
    """Decodes plain JPEGs with DALI; all other images, and those on which DALI fails, with Pillow.

    Args:
        config: the settings of the build.
        geometry: the resize mode and the output size.
        source: reads the items. If each item is a local file, DALI reads it.
        tuning: the batch size, the number of threads (for DALI, and as many for Pillow), and so on.
        device: the device number of the GPU; None for DALI's CPU operators.
        stream: CuPy's stream on which the pixels will be used; None waits for each batch.

    Raises:
        BackendError: on entering, if DALI does not start or decodes no JPEG.
    """

    def __init__(
        self,
        config: BuildConfig,
        geometry: Geometry,
        source: Source,
        *,
        tuning: Tuning,
        device: int | None,
        stream: Any = None,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._source = source
        self._pillow = PillowDecoder(config, geometry, source)
        self._tuning = tuning
        self._device = device
        self._stream = stream
        self._row_shape = (geometry.height, geometry.width, config.channel_count)
        self._backend = "cpu" if device is None else "mixed"
        self._names = input_names("resize", geometry, self._backend)
        self._blank = _blank(geometry.height, geometry.width)
        self._xp: Any = np if device is None else importlib.import_module("cupy")
        self._on_stream: Any = contextlib.nullcontext()
        if stream is not None:
            self._on_stream = stream
        elif device is not None:
            self._on_stream = self.device_context()
        self._reader = DaliReader(config, geometry, source, tuning)
        self._main: list[FedPipeline[EncodedBatch]] = []
        self._repair: FedPipeline[None] | None = None
        self._single: FedPipeline[None] | None = None
        self._single_lock = threading.Lock()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> DaliDecoder:
        try:
            self._open.enter_context(self._reader)
            self._main = self._decoding(self._names)
            self._try_blank()
        except (RuntimeError, OSError) as exc:
            self._open.close()
            advice = "see what `gpu-npz doctor` finds"
            if _NO_MEMORY.search(str(exc)):
                advice = "`nvidia-smi` shows which processes hold the GPU's memory; end them, or choose another GPU"
            raise BackendError(f"DALI does not start ({_reason(exc)}); {advice}") from exc
        if self._device is not None:
            with self._on_stream:  # CuPy compiles this once; better now than in the middle of a build
                self._xp.zeros((1, 1), np.uint8)[self._xp.asarray([0])] = self._xp.asarray(np.ones((1, 1), np.uint8))
        self._open.enter_context(self._pillow)
        self._pool = self._open.enter_context(ThreadPoolExecutor(self._tuning.threads, "gpu-npz-pillow"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._main, self._repair, self._single = [], None, None
        self._open.close()

    def _try_blank(self) -> None:
        """Decodes blank images, since nvImageCodec without plug-ins starts but then fails on every image.

        On a GPU it decodes a whole batch: the first batch in a decoder's life fixes the share of the hardware engines.
        """
        count = 1 if self._device is None else self._tuning.batch_size
        encoded = [self._blank] * count
        blanks = self._reader.routed(Batch(0, [], True), encoded)
        feed = [(blanks, self._inputs(blanks, self._names))] * len(self._main)
        results = [outputs for _, outputs in run_in_turn(self._main, feed, self._stream)]
        failure = next((outputs for outputs in results if isinstance(outputs, Exception)), None)
        if failure is not None:
            raise BackendError(
                f"DALI cannot decode JPEGs here ({_reason(failure)}); nvImageCodec needs its plug-ins, by links in the "
                f"temporary folder {tempfile.gettempdir()!r}, whose name must have no colon. If TMPDIR and "
                "NVIMGCODEC_EXTENSIONS_PATH are in order, reinstall nvidia-nvimgcodec"
            ) from failure

    def _decoding(self, names: Sequence[str], *, repairing: bool = False) -> list[FedPipeline[Any]]:
        """The pipelines that decode, with the steps that their inputs allow; for repairs, one without prefetching."""
        count, prefetch = (1, 1) if repairing else (self._tuning.pipelines, self._tuning.prefetch)
        pipelines: list[FedPipeline[Any]] = []
        with without_opencv():
            for _ in range(count):
                pipeline: FedPipeline[Any] = FedPipeline(
                    decode_images,
                    batch_size=self._tuning.batch_size,
                    num_threads=self._tuning.decoding_threads,
                    device_id=self._device,
                    prefetch_queue_depth=prefetch,
                    names=names,
                    config=self._config,
                    geometry=self._geometry,
                    backend=self._backend,
                    hw_decoder_load=self._tuning.hw_decoder_load,
                )
                self._open.callback(pipeline.close)
                pipelines.append(pipeline)
        return pipelines

    def provenance(self) -> dict[str, Any]:
        """See `Decoder.provenance`: the versions of DALI, its codecs and Pillow, and the GPU model."""
        found = {
            "backend": "dali",
            "device": "cpu" if self._device is None else "cuda",
            "decoding_revision": DECODING_REVISION,
            "dali": dali.__version__,
            "nvimgcodec": nvimgcodec.__version__,
            **self._pillow.libraries,
        }
        if self._device is not None:
            found["gpu"] = self._xp.cuda.runtime.getDeviceProperties(self._device)["name"].decode()
        return found

    @property
    def name(self) -> str:
        """The decoder's libraries and its device, for messages."""
        place = "the CPU" if self._device is None else f"GPU {self._device}"
        return f"DALI {dali.__version__} with nvImageCodec {nvimgcodec.__version__} on {place}"

    @property
    def hw_decoder_load(self) -> float | None:
        """The share of the images that DALI gives to a GPU's hardware engines; None if DALI chooses it."""
        return self._tuning.hw_decoder_load

    @property
    def sixteen_bit(self) -> str | None:
        """See `PillowDecoder.sixteen_bit`; Pillow decodes all images with 16 bits per channel."""
        return self._pillow.sixteen_bit

    def decode(self, batches: Iterable[Batch]) -> Iterator[DecodedBatch]:
        """See `Decoder.decode`. An exception of `batches` is raised after all batches before it are returned."""
        unfinished: deque[_PendingBatch] = deque()
        try:
            with contextlib.closing(self._run(batches)) as runs:
                for run in runs:
                    unfinished.append(run)
                    while unfinished and (
                        len(unfinished) > _PENDING or all(result.done() for result in unfinished[0].results)
                    ):
                        yield self._finish(unfinished.popleft())
            while unfinished:
                yield self._finish(unfinished.popleft())
        finally:
            for result in (result for batch in unfinished for result in batch.results):
                result.cancel()

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """See `Decoder.bare`; waits for each batch."""
        reads = self._reader.read(batches)
        if last == "read":
            yield from (read.batch for read in reads)
            return
        names = input_names(last, self._geometry, self._backend)
        with contextlib.ExitStack() as stack:
            pipelines = self._decoding(names)
            for pipeline in pipelines:
                stack.callback(pipeline.close)
            for read, outputs in run_in_turn(pipelines, ((read, self._inputs(read, names)) for read in reads)):
                if isinstance(outputs, Exception):
                    log.debug("DALI failed on a batch")
                yield read.batch

    def _run(self, batches: Iterable[Batch]) -> Generator[_PendingBatch, None, None]:
        """The batches that DALI has finished, in order; Pillow starts on the items that DALI left."""
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            reads = stack.enter_context(contextlib.closing(self._reader.read(batches)))
            feed = ((read, self._inputs(read, self._names)) for read in reads)
            for read, outputs in stack.enter_context(contextlib.closing(run_in_turn(self._main, feed, self._stream))):
                with self._on_stream:
                    if isinstance(outputs, Exception):
                        log.info("DALI failed on a batch, which is decoded again in parts: %s", _reason(outputs))
                        rows = self._salvage(read, outputs)
                    else:
                        rows = _Rows(self._pixels(outputs), _sizes(read.encoded), read.route.usable.copy())
                left = np.flatnonzero(~rows.done)
                results = [self._pool.submit(self._by_pillow, read, position) for position in left.tolist()]
                yield _PendingBatch(read, rows, left, results, time.perf_counter() - start)
                start = time.perf_counter()

    def device_context(self) -> Any:
        """Makes the decoder's GPU the current one of this thread."""
        return contextlib.nullcontext() if self._device is None else self._xp.cuda.Device(self._device)

    def _inputs(self, read: EncodedBatch, names: Sequence[str], positions: Sequence[int] | None = None) -> list[Any]:
        """The pipeline's inputs for a batch, or for the items at `positions`; a blank for items that Pillow decodes."""
        route = read.route
        chosen = list(range(len(read.encoded)) if positions is None else positions)
        turns = route.turns[chosen]
        found = {
            "encoded": read.inputs
            if positions is None and route.usable.all()
            else [read.inputs[position] if route.usable[position] else self._blank for position in chosen],
            "shape": route.shapes[chosen],
            "size": route.sizes[chosen],
            "start": route.starts[chosen],
            "transposed": turns[:, 0].astype(np.bool_),
            "flipped": turns[:, 1:].any(axis=1),
            "flips": turns[:, 1:].copy(),
        }
        return [found[name] for name in names]

    def _pixels(self, outputs: list[Any]) -> Any:
        pixels = outputs[0].as_tensor()
        return self._xp.asarray(pixels)  # holds the tensor; with DLPack, DALI would free it in a thread that waits

    def _finish(self, run: _PendingBatch) -> DecodedBatch:
        """The batch with Pillow's pixels in the rows that DALI left."""
        start = time.perf_counter()
        rows, rejects, decoded, images = run.rows, [], [], []
        by_dali = np.flatnonzero(rows.done)
        for position, future in zip(run.left.tolist(), run.results, strict=True):
            rows.source_bytes[position], result = future.result()
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                decoded.append(position)
                images.append(result)
        if decoded:
            with self._on_stream:
                rows.pixels[self._xp.asarray(decoded)] = self._xp.asarray(np.stack(images))
            rows.done[decoded] = True
        seconds = {"read": 0.0, "decode": run.seconds + time.perf_counter() - start}
        return DecodedBatch(
            run.read.batch,
            rows.pixels,
            np.flatnonzero(rows.done),
            rows.source_bytes,
            rejects,
            seconds,
            by_dali,
            () if self._device is None else run.read.encoded,
        )

    def decode_with_pillow(self, encoded: NDArray[np.uint8], item: Item) -> NDArray[np.uint8]:
        """An image as Pillow decodes it, (H, W, C); for any thread. Raises BadItem if Pillow rejects it."""
        return self._pillow.decode_image(encoded.tobytes(), item.path, None)

    def decode_alone(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """An image as DALI decodes it in a batch of its own, (H, W, C); None if DALI fails on it; for any thread."""
        with self._single_lock, self.device_context():
            self._single = self._single or self._decoding(self._names, repairing=True)[0]
            read = self._reader.routed(Batch(0, [], True), [encoded])
            ((_, outputs),) = self._single.run([(None, self._inputs(read, self._names))])
            if isinstance(outputs, Exception):
                if _is_no_memory(outputs):
                    raise ShardError(_ONE_IMAGE_MEMORY) from outputs
                return None
            image: NDArray[np.uint8] = on_host(self._pixels(outputs))[0]
            return image

    def _by_pillow(self, read: EncodedBatch, position: int) -> tuple[int, NDArray[np.uint8] | Reject]:
        """An item's encoded size, 0 if it cannot be read, and its pixels or the reject."""
        item, encoded, data = read.batch.items[position], read.encoded[position], b""
        frame = self._source.frame(item)
        try:
            # Reading again gives the reason of a failure, or the size of a file that is too large. For a file of
            # several frames, the source keeps it in memory.
            again = frame is not None or not 0 < len(encoded) <= MAX_ENCODED_BYTES
            data = read_item(self._source, item) if again else encoded.tobytes()
            return len(data), self._pillow.decode_image(data, item.path, frame)
        except BadItem as bad:
            return len(data), bad.of(item.path, item.index)

    def _salvage(self, read: EncodedBatch, failure: Exception) -> _Rows:
        """The rows that DALI can decode of a batch on which it failed as a whole."""
        count = len(read.encoded)
        pixels = self._xp.empty((count, *self._row_shape), np.uint8)
        rows = _Rows(pixels, _sizes(read.encoded), np.zeros(count, np.bool_))
        positions = np.flatnonzero(read.route.usable).tolist()
        if _is_no_memory(failure):
            dali.backend.ReleaseUnusedMemory()
            groups = list(_halves(positions))
        else:
            # DALI names at most one damaged image. The images that Pillow rejects are a good guess at all of them, so
            # one more run usually decodes all others. Still, each suspect goes through DALI alone: only that decides,
            # or its pixels would depend on its neighbours.
            results = self._pool.map(self._by_pillow, itertools.repeat(read), positions)
            suspects = [p for p, (_, result) in zip(positions, results, strict=True) if isinstance(result, Reject)]
            groups = [[position for position in positions if position not in suspects], *([p] for p in suspects)]
        for group in filter(None, groups):
            self._decode_again(rows, read, group)
        return rows

    def _decode_again(self, rows: _Rows, read: EncodedBatch, positions: list[int]) -> None:
        """Decodes these items with DALI; on failure, each half on its own.

        Raises:
            ShardError: there is too little memory for a single image, or the GPU is in an error state.
        """
        self._repair = self._repair or self._decoding(self._names, repairing=True)[0]
        feed = [(None, self._inputs(read, self._names, positions))]
        ((_, outputs),) = self._repair.run(feed, self._stream)
        if not isinstance(outputs, Exception):
            rows.pixels[self._xp.asarray(positions)] = self._pixels(outputs)
            rows.done[positions] = True
            if self._device is not None:  # DALI may reuse the output buffer as soon as it is released
                self._xp.cuda.get_current_stream().synchronize()
            return
        no_memory = _is_no_memory(outputs)
        if not no_memory and _BROKEN_GPU.search(str(outputs)):
            raise ShardError(
                f"GPU {self._device} is in an error state ({_reason(outputs)}); "
                "look for Xid errors in dmesg, then run the same command to resume"
            ) from outputs
        if no_memory:
            dali.backend.ReleaseUnusedMemory()
        if len(positions) > 1:
            for half in _halves(positions):
                self._decode_again(rows, read, half)
        elif no_memory:  # never fall back to Pillow for lack of memory: its pixels would differ
            raise ShardError(_ONE_IMAGE_MEMORY) from outputs


def _sizes(encoded: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    return np.array([len(data) for data in encoded], np.int64)


def _halves(positions: Sequence[int]) -> tuple[list[int], list[int]]:
    middle = len(positions) // 2
    return list(positions[:middle]), list(positions[middle:])


def _is_no_memory(failure: Exception) -> bool:
    return isinstance(failure, MemoryError) or _NO_MEMORY.search(str(failure)) is not None


def _reason(failure: BaseException) -> str:
    return clean(str(failure).rpartition("encountered:")[2])  # before that, DALI quotes the pipeline's source code


def _blank(height: int, width: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
