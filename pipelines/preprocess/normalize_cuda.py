"""Normalizes pixels on a GPU with CuPy: the tables of `normalize.py`, with bit-identical values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import BuildConfig
from .normalize import Sums, image_table, table

if TYPE_CHECKING:
    Array = NDArray[Any]

# One thread per pixel. Values are copied as bits, so one kernel serves every dtype and needs no header. `image_step`
# and `channel_step` are the distances in `table` between images and between channels; 0 if they share entries.
_KERNEL = r"""
extern "C" __global__ void normalize(const unsigned char* pixels, const int* kept, const VALUE* table, VALUE* out,
                                     int plane, int channels, int planar, int swap, int image_step, int channel_step) {
  const int position = blockIdx.x * blockDim.x + threadIdx.x;
  if (position >= plane) return;
  const unsigned char* pixel = pixels + ((long long)kept[blockIdx.y] * plane + position) * channels;
  VALUE* row = out + (long long)blockIdx.y * plane * channels;
  for (int channel = 0; channel < channels; channel++) {
    const unsigned char level = pixel[swap ? channels - 1 - channel : channel];
    row[planar ? (long long)channel * plane + position : (long long)position * channels + channel] =
        table[(long long)blockIdx.y * image_step + channel * channel_step + level];
  }
}
"""
_BITS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int"}
_THREADS = 256


class CudaNormalizer:
    """Turns decoded pixels into stored rows on a GPU and copies them to pinned host memory; see `base.Normalizer`.

    The kernel and the copy run on separate streams, so that the next kernel need not wait for the copy. Each host
    buffer has a twin on the device that is allocated with it: a buffer that is free is free on both sides. For the
    per-image kinds, sums over each image are copied to the host, which makes the tables. This waits until the batch is
    decoded, so while it is normalized, nothing new is enqueued. The per-image kinds have not been tried on a GPU yet.
    """

    def __init__(self, config: BuildConfig, device: int) -> None:
        import cupy

        self._cupy = cupy
        cupy.cuda.Device(device).use()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._copy_stream = cupy.cuda.Stream(non_blocking=True)
        self._config = config
        self._dtype = np.dtype(config.dtype)
        self._host_table = table(config)
        self._planar = config.layout == "NCHW"
        self._swap = config.channels == "bgr"
        source = _KERNEL.replace("VALUE", _BITS[self._dtype.itemsize])
        self._kernel = cupy.RawKernel(source, "normalize")
        self._squares = cupy.ReductionKernel("T x", "int64 y", "(long long)x * x", "a + b", "y = a", "0", "squares")
        self._twins: dict[int, Any] = {}
        with self._stream:
            self._table = None if self._host_table is None else cupy.asarray(self._host_table)

    @property
    def stream(self) -> Any:
        """The kernel's CUDA stream. The decoder gets it too, so that neither waits for the other."""
        return self._stream

    def allocate(self, shape: tuple[int, ...]) -> Array:
        """A pinned host buffer of exactly the needed size; also allocates its twin on the device."""
        dtype = self._dtype
        count = int(np.prod(shape))
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(max(1, count * dtype.itemsize)), 0)
        host = np.frombuffer(memory, dtype, count).reshape(shape)
        self._twins[host.ctypes.data] = self._cupy.empty(count, dtype)
        return host

    def launch(self, pixels: Any, kept: NDArray[np.int64], out: Array) -> Callable[[], None]:
        """Enqueues only the kernel, which writes from `pixels` to the twin of `out`; see `apply`."""
        cupy = self._cupy
        with self._stream:
            source = cupy.asarray(pixels)
            fit = source.dtype == np.uint8 and source.ndim == 4 and source.shape[3] == self._config.channel_count
            if not fit or not source.flags.c_contiguous:
                raise ValueError(f"pixels: got {source.dtype} {source.shape}; need dense uint8 (N, H, W, C)")
            _, height, width, channels = source.shape
            if out.size != len(kept) * height * width * channels or out.dtype != self._dtype:
                raise ValueError(f"out: got {out.dtype} {out.shape} for {len(kept)} of {source.shape}")
            positions = cupy.asarray(kept.astype(np.int32))
            plane = height * width
            table, steps = self._table, (0, self._config.max_level + 1)
            if table is None:
                table, steps = self._tables_of(source, kept), steps[::-1]
            if len(kept):
                self._kernel(
                    (-(-plane // _THREADS), len(kept)),
                    (_THREADS,),
                    (
                        source, positions, table, self._twins[out.ctypes.data],
                        *map(np.int32, (plane, channels, self._planar, self._swap, *steps)),
                    ),
                )  # fmt: skip
            event = self._recorded(self._stream)

        def wait() -> None:
            nonlocal pixels, source, positions, table
            event.synchronize()
            pixels = source = positions = table = None  # the kernel no longer reads them

        return wait

    def apply(self, pixels: Any, kept: NDArray[np.int64], out: Array) -> Callable[[], None]:
        """Enqueues the kernel and the copy; see `Normalizer.apply`.

        `pixels` is any uint8 array on this GPU that has CUDA's array interface.
        """
        launched = self.launch(pixels, kept, out)
        self._copy_stream.wait_event(self._recorded(self._stream))
        self._twins[out.ctypes.data][: out.size].get(stream=self._copy_stream, out=out.reshape(-1), blocking=False)
        event = self._recorded(self._copy_stream)

        def wait() -> None:
            event.synchronize()
            launched()

        return wait

    def device_bytes(self) -> int:
        """See `Normalizer.device_bytes`."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(total - free)

    def _tables_of(self, source: Any, kept: NDArray[np.int64]) -> Any:
        """The tables of the kept images under a per-image kind, on the device."""
        flat = source.reshape(len(source), -1)
        columns = flat.sum(axis=1, dtype=np.int64), self._squares(flat, axis=1), flat.min(axis=1), flat.max(axis=1)
        sums = self._cupy.stack([column.astype(np.int64) for column in columns], axis=1).get()[kept]
        own = [image_table(self._config, Sums(flat.shape[1], *row)) for row in sums.tolist()]
        return self._cupy.asarray(np.array(own, self._dtype))

    def _recorded(self, stream: Any) -> Any:
        event = self._cupy.cuda.Event(block=True, disable_timing=True)  # a thread that waits for it sleeps
        event.record(stream)
        return event
