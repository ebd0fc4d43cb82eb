"""Decoding and resizing by DALI, on a GPU or by its CPU operators: plain JPEGs there, all else by Pillow.

DALI decodes many images in one process, and a file that two of its parsers read differently could make it write beyond
a buffer, into another image. So it decides nothing: one pipeline reads files, Python reads each header (`jpeg.py`), and
a second pipeline gets the bytes with the size, the placement and the orientation that go with them. Only plain JPEGs
within the limits reach its decoder; a blank image takes the place of any other, which is then Pillow's.

DALI answers one damaged image by failing its whole batch. Such a batch is decoded again in parts, until an image that
DALI cannot decode stands alone; it too is Pillow's. So an image's pixels do not depend on its neighbours, and every
verdict comes from one place.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import dali, nvimgcodec
from PIL import Image

from ..config import BuildConfig
from ..errors import BackendError, ShardError
from ..machine.tuning import Tuning
from ..sources.access.local import is_plain
from ..sources.base import Batch, Item, Source, read_item
from ..sources.rejects import MAX_ENCODED_BYTES, BadItem, Reject, Stage, clean
from .base import DECODING_REVISION, Decoded
from .fed_pipeline import FedPipeline
from .geometry import Geometry
from .pillow import PillowDecoder, versions
from .routing import Route, route

log = logging.getLogger(__name__)
fn: Any = dali.fn  # untyped all three: DALI's stubs leave out much of what it has
types: Any = dali.types
pipeline_def: Any = dali.pipeline.pipeline_def

_FILTERS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
_INPUTS = {  # type and dimensions; `routing.Route` says what they are
    "encoded": (types.UINT8, 1),
    "shape": (types.INT32, 1),
    "size": (types.FLOAT, 1),
    "start": (types.INT32, 1),
    "transposed": (types.BOOL, 0),
    "flipped": (types.BOOL, 0),
    "flips": (types.INT32, 1),
}
_NO_MEMORY = re.compile("bad_alloc|out.of.memory|MemoryAllocation|allocation failed|can't allocate", re.IGNORECASE)
_BROKEN_GPU = re.compile("CUDA (runtime|driver) API error|cudaError|CUDA_ERROR")
_UNFINISHED = 2  # batches that wait for Pillow while DALI goes on: a few slow files in one of them do no harm


_Encoded = list[NDArray[np.uint8]]


@dataclass
class _Read:
    """A batch whose files have been read: each item's bytes, empty if it cannot be read, and where they go."""

    batch: Batch
    encoded: _Encoded
    route: Route


@dataclass
class _DecodedRows:
    """A batch in the making: pixels (N, H, W, C), encoded sizes, and which rows have their pixels."""

    pixels: Any
    source_bytes: NDArray[np.int64]
    done: NDArray[np.bool_]


@dataclass
class _Unfinished:
    """A batch that DALI is done with, and what Pillow makes of the items at the positions `left`."""

    batch: Batch
    rows: _DecodedRows
    left: NDArray[np.int64]
    results: list[Future[tuple[int, NDArray[np.uint8] | Reject]]]
    seconds: float


class DaliDecoder:
    """Decodes plain JPEGs by DALI; every other item, and what DALI fails on, by Pillow.

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
        self._config = config
        self._geometry = geometry
        self._source = source
        self._pillow = PillowDecoder(config, geometry, source)
        self._tuning = tuning
        self._device = device
        self._stream = stream
        self._row_shape = (geometry.height, geometry.width, config.channel_count)
        self._backend = "cpu" if device is None else "mixed"
        self._names = _input_names("resize", geometry, self._backend)
        self._blank = _blank(geometry.height, geometry.width)
        self._xp: Any = np if device is None else importlib.import_module("cupy")
        self._on_stream: Any = contextlib.nullcontext()
        if stream is not None:
            self._on_stream = self._xp.cuda.ExternalStream(stream, device)
        elif device is not None:
            self._on_stream = self._xp.cuda.Device(device)
        self._main: FedPipeline[_Read] | None = None
        self._repair: FedPipeline[None] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> DaliDecoder:
        try:
            if self._source.file_per_item:
                self._reader: FedPipeline[tuple[Batch, list[bool]]] = self._opened(_files, None, self._tuning.prefetch)
            self._main = self._decoding(self._names, self._tuning.prefetch)
            self._try_blank()
        except (RuntimeError, OSError) as exc:
            self._open.close()
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
        self._main = self._repair = None
        self._open.close()

    def _try_blank(self) -> None:
        """Decodes a blank image: without its plug-ins, nvImageCodec starts and then fails on every image."""
        assert self._main is not None
        blank = _Read(Batch(0, [], True), [self._blank], route([self._blank.data], self._config, self._geometry))
        ((_, outputs),) = self._main.run([(blank, self._inputs(blank, self._names))], self._stream)
        if isinstance(outputs, Exception):
            raise BackendError(
                f"DALI decodes no JPEG here ({_reason(outputs)}); nvImageCodec needs its plug-ins, by links in the "
                f"temporary folder {tempfile.gettempdir()!r}, whose name must have no colon. If TMPDIR and "
                "NVIMGCODEC_EXTENSIONS_PATH are in order, reinstall nvidia-nvimgcodec"
            ) from outputs

    def _decoding(self, names: Sequence[str], prefetch: int) -> FedPipeline[Any]:
        """A pipeline that decodes, as far as its inputs say."""
        with _without_opencv():
            return self._opened(
                _decoded,
                self._device,
                prefetch,
                names=names,
                config=self._config,
                geometry=self._geometry,
                backend=self._backend,
                hw_decoder_load=self._tuning.hw_decoder_load,
            )

    def _opened(self, graph: Any, device: int | None, prefetch: int, **options: Any) -> FedPipeline[Any]:
        pipeline: FedPipeline[Any] = FedPipeline(
            graph,
            batch_size=self._tuning.batch_size,
            num_threads=self._tuning.threads,
            device_id=device,
            prefetch_queue_depth=prefetch,
            **options,
        )
        self._open.callback(pipeline.close)
        return pipeline

    def provenance(self) -> dict[str, Any]:
        """What decides the pixels besides the settings: DALI, its codecs, Pillow, and the GPU's model."""
        found = {
            "backend": "dali",
            "device": "cpu" if self._device is None else "cuda",
            "decoding_revision": DECODING_REVISION,
            "dali": dali.__version__,
            "nvimgcodec": nvimgcodec.__version__,
            **versions(),
        }
        if self._device is not None:
            found["gpu"] = self._xp.cuda.runtime.getDeviceProperties(self._device)["name"].decode()
        return found

    @property
    def sixteen_bit(self) -> str | None:
        """See `PillowDecoder`, to which all such images go."""
        return self._pillow.sixteen_bit

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

    def bare(self, batches: Iterable[Batch], last: Stage) -> Iterator[Batch]:
        """See `Decoder.bare`; waits for each batch."""
        reads = self._read(batches)
        if last == "read":
            yield from (read.batch for read in reads)
            return
        names = _input_names(last, self._geometry, self._backend)
        pipeline = self._decoding(names, self._tuning.prefetch)
        try:
            for read, outputs in pipeline.run((read, self._inputs(read, names)) for read in reads):
                if isinstance(outputs, Exception):
                    log.debug("DALI failed on a batch")
                yield read.batch
        finally:
            pipeline.close()

    def _run(self, batches: Iterable[Batch]) -> Generator[_Unfinished, None, None]:
        """What DALI makes of the batches, in order; what it has left begins at Pillow."""
        assert self._main is not None
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            reads = stack.enter_context(contextlib.closing(self._read(batches)))
            feed = ((read, self._inputs(read, self._names)) for read in reads)
            for read, outputs in stack.enter_context(contextlib.closing(self._main.run(feed, self._stream))):
                with self._on_stream:
                    if isinstance(outputs, Exception):
                        log.info("DALI failed on a batch, which is decoded again in parts: %s", _reason(outputs))
                        rows = self._salvage(read, outputs)
                    else:
                        rows = _DecodedRows(self._pixels(outputs), _sizes(read.encoded), read.route.usable.copy())
                left = np.flatnonzero(~rows.done)
                results = [self._pool.submit(self._by_pillow, read, position) for position in left.tolist()]
                yield _Unfinished(read.batch, rows, left, results, time.perf_counter() - start)
                start = time.perf_counter()

    def _read(self, batches: Iterable[Batch]) -> Generator[_Read, None, None]:
        """The batches with their items' bytes, and what the headers say."""
        read = self._read_by_dali if self._source.file_per_item else self._read_by_source
        with contextlib.closing(read(batches)) as reads:
            for batch, encoded in reads:
                yield _Read(batch, encoded, route([data.data for data in encoded], self._config, self._geometry))

    def _read_by_source(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, _Encoded], None, None]:
        for batch in batches:
            yield batch, list(self._pool.map(self._encoded, self._checked(batch).items))

    def _read_by_dali(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, _Encoded], None, None]:
        """Reads files in DALI's threads; what is none by its looks, and a batch in which one cannot be read, by Python.

        DALI would wait for a named pipe, and would fill memory from /proc/kcore.
        """
        with contextlib.closing(self._reader.run(map(self._named, batches))) as runs:
            for (batch, plain), outputs in runs:
                if isinstance(outputs, Exception):
                    yield batch, list(self._pool.map(self._encoded, batch.items))
                else:
                    read = zip(batch.items, plain, outputs[0], strict=True)
                    yield batch, [np.asarray(data) if fits else self._encoded(item) for item, fits, data in read]

    def _named(self, batch: Batch) -> tuple[tuple[Batch, list[bool]], list[Any]]:
        """A batch, which of its items are plain files, and the paths that DALI reads: of another item an empty file."""
        paths = [self._source.local_path(item) for item in self._checked(batch).items]
        plain = [is_plain(path) for path in paths]
        return (batch, plain), [
            [_array(path if fits else b"/dev/null") for path, fits in zip(paths, plain, strict=True)]
        ]

    def _checked(self, batch: Batch) -> Batch:
        if not 1 <= len(batch.items) <= self._tuning.batch_size:
            raise ValueError(f"a batch of {len(batch.items)} items; allowed are 1 to {self._tuning.batch_size}")
        return batch

    def _inputs(self, read: _Read, names: Sequence[str], positions: Sequence[int] | None = None) -> list[Any]:
        """What DALI is given of a batch, or of the items at some positions; a blank for what is not DALI's."""
        route, encoded = read.route, read.encoded
        chosen = list(range(len(encoded)) if positions is None else positions)
        turns = route.turns[chosen]
        found = {
            "encoded": [encoded[position] if route.usable[position] else self._blank for position in chosen],
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
        return np.asarray(pixels) if self._device is None else self._xp.from_dlpack(pixels)

    def _finish(self, run: _Unfinished) -> Decoded:
        """The batch with Pillow's pixels where DALI has none."""
        start = time.perf_counter()
        rows, rejects, decoded, images = run.rows, [], [], []
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
        return Decoded(run.batch, rows.pixels, np.flatnonzero(rows.done), rows.source_bytes, rejects, seconds)

    def _by_pillow(self, read: _Read, position: int) -> tuple[int, NDArray[np.uint8] | Reject]:
        """An item's encoded size, 0 if it cannot be read, and its pixels or why it has none."""
        item, encoded, data = read.batch.items[position], read.encoded[position], b""
        frame = self._source.frame(item)
        try:
            # Reading again says why it failed, or what is too large; and the source keeps a file of several frames.
            again = frame is not None or not 0 < len(encoded) <= MAX_ENCODED_BYTES
            data = read_item(self._source, item) if again else encoded.tobytes()
            return len(data), self._pillow.decode_image(data, item.path, frame)
        except BadItem as bad:
            return len(data), bad.of(item.path, item.index)

    def _encoded(self, item: Item) -> NDArray[np.uint8]:
        """The item's bytes, empty if it cannot be read."""
        try:
            return _array(read_item(self._source, item))
        except BadItem:
            return _array(b"")

    def _salvage(self, read: _Read, failure: Exception) -> _DecodedRows:
        """What DALI can decode of a batch that it failed on as a whole."""
        count = len(read.encoded)
        pixels = self._xp.empty((count, *self._row_shape), np.uint8)
        rows = _DecodedRows(pixels, _sizes(read.encoded), np.zeros(count, np.bool_))
        positions = np.flatnonzero(read.route.usable).tolist()
        if _is_no_memory(failure):
            dali.backend.ReleaseUnusedMemory()
            groups = list(_halves(positions))
        else:
            # DALI names one image at most. Whatever Pillow rejects is a good guess at them all, and mostly leaves one
            # run for the others. But what DALI does with an image alone decides, or its pixels would depend on its
            # neighbours.
            results = self._pool.map(self._by_pillow, itertools.repeat(read), positions)
            suspects = [p for p, (_, result) in zip(positions, results, strict=True) if isinstance(result, Reject)]
            groups = [[position for position in positions if position not in suspects], *([p] for p in suspects)]
        for group in filter(None, groups):
            self._decode_again(rows, read, group)
        return rows

    def _decode_again(self, rows: _DecodedRows, read: _Read, positions: list[int]) -> None:
        """Decodes these items by DALI, in halves where that fails."""
        self._repair = self._repair or self._decoding(self._names, 1)
        feed = [(None, self._inputs(read, self._names, positions))]
        ((_, outputs),) = self._repair.run(feed, self._stream)
        if not isinstance(outputs, Exception):
            rows.pixels[self._xp.asarray(positions)] = self._pixels(outputs)
            rows.done[positions] = True
            if self._device is not None:  # DALI may use the part's buffer again as soon as it is dropped
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
        elif no_memory:  # never another decoder for want of memory: its pixels would differ
            raise ShardError(
                "no memory to decode one image; end what else uses it, or lower --workers or --open-shards, and "
                "run the command again to resume (with a lower --max-pixels, it starts anew)"
            ) from outputs


@pipeline_def  # type: ignore[untyped-decorator]  # see above
def _files(source: Callable[[], list[Any]]) -> Any:
    """The bytes of the files whose paths `source` gives."""
    paths, number = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 0])
    # Not mapped: plain reads are twice as fast, and a file that shrinks meanwhile does no harm.
    return fn.io.file.read(paths, dont_use_mmap=True), number


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # see above
def _decoded(
    source: Callable[[], list[Any]],
    names: Sequence[str],
    config: BuildConfig,
    geometry: Geometry,
    backend: str,
    hw_decoder_load: float | None,
) -> Any:
    """Encoded images to pixels, as far as there are inputs for it, whose `names` are those of `_INPUTS`."""
    *inputs, number = fn.external_source(
        source,
        num_outputs=len(names) + 1,
        no_copy=backend == "cpu",  # a GPU may still be reading when the batch is handed out; not yet measured
        dtype=[*(_INPUTS[name][0] for name in names), types.INT64],
        ndim=[*(_INPUTS[name][1] for name in names), 0],
    )
    given = dict(zip(names, inputs))  # noqa: B905  # DALI's translation of this function has a zip without `strict`
    options: dict[str, Any] = {
        "device": backend,
        "output_type": types.GRAY if config.channels == "gray" else types.RGB,
        "adjust_orientation": False,  # by a parser that may take another EXIF segment than ours
        "jpeg_fancy_upsampling": True,  # as Pillow does; without it, pixels of 4:2:0 images differ by up to 27 levels
    }
    if hw_decoder_load is not None:
        options["hw_decoder_load"] = hw_decoder_load
    if "shape" in given:
        images = fn.decoders.image_slice(given["encoded"], start=[0, 0], shape=given["shape"], axes=[0, 1], **options)
    else:
        images = fn.decoders.image(given["encoded"], **options)
    if "size" in given:
        images = fn.resize(images, size=given["size"], interp_type=_FILTERS[config.interpolation], subpixel_scale=False)
    if "flips" in given:
        transposed, flipped, flips = (given[name] for name in ("transposed", "flipped", "flips"))
        if transposed:
            images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
        if flipped:
            images = fn.flip(images, horizontal=flips[0], vertical=flips[1])
    if "start" in given:
        images = fn.slice(
            images,
            start=given["start"],
            shape=[geometry.height, geometry.width],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=config.pad_value,
        )
    return images, number


def _input_names(last: Stage, geometry: Geometry, backend: str) -> list[str]:
    """The inputs that a pipeline needs to go up to the stage `last`; DALI warns of any that it does not use."""
    names = ["encoded"]
    if backend == "cpu":
        # The decoder compares a region with what it finds in the data; without one it trusts its parser. On a GPU, a
        # region may change the engine that decodes: not yet measured.
        names.append("shape")
    if last == "resize":
        names += ["transposed", "flipped", "flips"]
        names += [] if geometry.mode == "none" else ["size"]
        names += ["start"] if geometry.mode in ("center-crop", "pad") else []
    return names


_environment = threading.Lock()  # which _without_opencv changes for a moment


@contextlib.contextmanager
def _without_opencv() -> Iterator[None]:
    """Decoders that are made meanwhile have all plug-ins of nvImageCodec but OpenCV's.

    OpenCV decodes damaged JPEGs without an error, with gray where the data ends, and writes as many pixels as it finds
    rather than as many as there is room for.
    """
    name = "NVIMGCODEC_EXTENSIONS_PATH"
    with _environment, tempfile.TemporaryDirectory(prefix="gpu-npz-") as links:
        before = os.environ.get(name)
        folders = (before or os.path.join(os.path.dirname(nvimgcodec.__file__), "extensions")).split(os.pathsep)
        for plugin in (plugin for folder in folders for plugin in Path(folder).glob("*.so*")):
            if "opencv" not in plugin.name:
                Path(links, plugin.name).symlink_to(plugin.resolve())
        os.environ[name] = links
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _sizes(encoded: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    return np.array([len(data) for data in encoded], np.int64)


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
