"""Decoding and resizing by DALI, on a GPU or by its CPU operators: whole JPEGs there, all else by Pillow."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import dali, nvimgcodec
from nvidia.dali import fn, math, types
from PIL import Image

from ..config import BuildConfig
from ..geometry import Geometry
from ..plan import Batch
from ..rejects import MAX_ENCODED_BYTES
from ..sources.base import Source
from .base import Decoded
from .pillow import PillowDecoder, versions

log = logging.getLogger(__name__)

_FILTERS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
_FAILURES = (RuntimeError, MemoryError, UnicodeDecodeError)  # the last: a missing file whose name is not UTF-8
_NO_MEMORY = re.compile("bad_alloc|out.of.memory|MemoryAllocation|allocation failed|can't allocate", re.IGNORECASE)
_BROKEN = re.compile("CUDA (runtime|driver) API error|cudaError|CUDA_ERROR")


def _place(geometry: Geometry, height: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """The formulas of `geometry.py` on int64 graph nodes, without branches; the offsets say where to start to cut."""
    out_height, out_width = geometry.height, geometry.width
    if geometry.mode == "center-crop":
        cover_height, cover_width = geometry.cover
        high = math.max(height * cover_width // width, cover_height)
        wide = math.max(width * cover_height // height, cover_width)
        top, left = (high - out_height) // 2, (wide - out_width) // 2
        top += top & (high - out_height) & 1  # an odd difference is halved to the even side
        left += left & (wide - out_width) & 1
        return high, wide, top, left
    high = math.clamp((2 * height * out_width + width) // (2 * width), 1, out_height)
    wide = math.clamp((2 * width * out_height + height) // (2 * height), 1, out_width)
    return high, wide, -((out_height - high) // 2), -((out_width - wide) // 2)


@dali.pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI has no types
def _graph(config: BuildConfig, geometry: Geometry, mixed: bool, paths: Callable[[], list[Any]] | None) -> Any:
    """Encoded images, from the files that `paths` names or fed as "encoded", to pixels, encoded sizes, and verdicts.

    A true verdict: the pixels are the item's. A false one: the item is not for DALI, and a blank image stands for it.
    """
    if paths is not None:
        # No memory map: a file that shrinks would kill the process, and plain reads are twice as fast.
        encoded = fn.io.file.read(fn.external_source(source=paths, dtype=types.UINT8, ndim=1), dont_use_mmap=True)
    else:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    out_height, out_width = geometry.height, geometry.width
    max_pixels = min(config.max_pixels, 2**31 - 1)  # the largest constant of a graph; beyond it, Pillow decides

    source_bytes = encoded.shape()[0]
    whole = (source_bytes >= 4) & (source_bytes <= MAX_ENCODED_BYTES)
    if whole:  # operators in a branch see only its items
        whole = (encoded[0] == 0xFF) & (encoded[1] == 0xD8) & (encoded[-2] == 0xFF) & (encoded[-1] == 0xD9)
    if whole:
        shape = fn.peek_image_shape(encoded, adjust_orientation=config.exif_orientation, dtype=types.INT32)
    else:
        shape = types.Constant([0, 0, 0], dtype=types.INT32, device="cpu")
    shape = fn.cast(shape, dtype=types.INT64)
    height, width = shape[0], shape[1]
    usable = (height > 0) & (width > 0) & (height * width <= max_pixels)
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
    if usable:
        chosen = encoded
    else:
        chosen = types.Constant(_blank(out_height, out_width), device="cpu")

    images = fn.decoders.image(
        chosen,
        device="mixed" if mixed else "cpu",
        output_type=types.GRAY if config.channels == "gray" else types.RGB,
        adjust_orientation=config.exif_orientation,
        jpeg_fancy_upsampling=True,  # as Pillow and the CPU operators upsample
        **({"hw_decoder_load": 0.0} if config.reproducible else {}),
    )
    if geometry.mode == "none":
        return images, source_bytes, usable
    filters = {"interp_type": _FILTERS[config.interpolation], "subpixel_scale": False}
    if geometry.mode == "stretch":
        return fn.resize(images, size=[out_height, out_width], **filters), source_bytes, usable
    images = fn.resize(images, size=size, **filters)
    images = fn.slice(
        images,
        start=start,
        shape=[out_height, out_width],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=config.pad_value,
    )
    return images, source_bytes, usable


def _blank(height: int, width: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


class DaliDecoder:
    """Decodes whole 8-bit JPEGs by DALI, and hands every other item, and what DALI fails on, to Pillow.

    Args:
        config: the settings of the build.
        geometry: where pixels go.
        source: gives the items; they must lie on a local filesystem.
        batch_size: the largest batch that `decode` will meet.
        device: the GPU's number, or None for DALI's CPU operators.
        stream: handle of the CUDA stream on which the pixels are to be used; None waits for each batch.
        threads: of DALI and of Pillow; as many as usable cores unless given.
    """

    def __init__(
        self,
        config: BuildConfig,
        geometry: Geometry,
        source: Source,
        *,
        batch_size: int,
        device: int | None,
        stream: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._source = source
        self._batch_size = batch_size
        self._device = device
        self._stream = stream
        self._threads = threads or max(1, len(os.sched_getaffinity(0)))
        self._pillow = PillowDecoder(config, geometry, source)
        self._batches: Iterator[Batch] = iter(())
        self._failure: Exception | None = None
        self._ahead: collections.deque[Batch] = collections.deque()  # given to DALI, not yet taken from it
        self._open = contextlib.ExitStack()
        self._pipeline: Any = None
        self._repair: Any = None

    def __enter__(self) -> DaliDecoder:
        self._open.enter_context(self._pillow)
        self._pool = self._open.enter_context(ThreadPoolExecutor(self._threads, "gpu-npz-pillow"))
        self._pipeline = self._build(self._paths, prefetch_queue_depth=2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipeline = self._repair = None
        self._open.close()

    def _build(self, paths: Callable[[], list[Any]] | None, prefetch_queue_depth: int) -> Any:
        return _graph(
            self._config,
            self._geometry,
            self._device is not None,
            paths,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device,
            prefetch_queue_depth=prefetch_queue_depth,
        )

    def environment(self) -> dict[str, Any]:
        """What decides the pixels besides the settings: DALI, its codecs, Pillow, and the GPU's model."""
        found = {
            "backend": "dali",
            "device": "cpu" if self._device is None else "cuda",
            "dali": dali.__version__,
            "nvimgcodec": nvimgcodec.__version__,
            **versions(),
        }
        if self._device is not None:
            found["gpu"] = self._arrays.cuda.runtime.getDeviceProperties(self._device)["name"].decode()
        return found

    def decode(self, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """See `Decoder.decode`; at most two batches are read ahead."""
        self._batches, self._failure = iter(batches), None
        self._pipeline.reset()
        try:
            while True:
                start = time.perf_counter()
                try:
                    outputs = self._pipeline.run(self._stream)
                except StopIteration:
                    break
                except _FAILURES as exc:
                    rows = self._salvage(self._ahead.popleft(), exc)
                else:
                    rows = self._take(self._ahead.popleft(), outputs)
                yield self._decoded(rows, start)
        finally:
            self._drain()
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        """Takes from DALI what nobody will ask for any more."""
        self._batches = iter(())
        while self._ahead:
            with contextlib.suppress(*_FAILURES):
                self._pipeline.run()
            self._ahead.popleft()

    def _paths(self) -> list[NDArray[np.uint8]]:
        """The next batch's paths, for DALI, where any exception but StopIteration would come again at every run."""
        try:
            batch = next(self._batches)
            paths = [np.frombuffer(self._source.local_path(item.path), np.uint8) for item in batch.items]
        except StopIteration:
            raise
        except Exception as exc:  # raised by `decode` once the batches before it are delivered
            self._failure = exc
            raise StopIteration from exc
        self._ahead.append(batch)
        return paths
