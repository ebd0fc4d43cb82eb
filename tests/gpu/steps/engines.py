"""Whether the hardware JPEG engines write their output before earlier work on the same memory is done.

A fault of this kind is known on Hopper GPUs: https://github.com/pytorch/vision/issues/9606. Here a decoder's output is
compared bit for bit with its own output while the GPU does nothing else.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from runner import Context

from steps.decoding import difference, jpegs

_ROUNDS = 100
_DECODED_TOGETHER = 64
_IMAGES = 20_000
_BATCH_SIZE = 256
_SIDE = 64
_BUSY_CYCLES = 40_000_000  # some 20 ms
_SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


def early_writes(context: Context, backend: str) -> dict[str, Any]:
    """Decodes with nvImageCodec into buffers that earlier work on the same stream still overwrites."""
    import cupy
    from nvidia import nvimgcodec as codec

    kinds = {"engines": codec.BackendKind.HW_GPU_ONLY, "cuda": codec.BackendKind.HYBRID_CPU_GPU}
    decoder = codec.Decoder(device_id=0, backends=[codec.Backend(kinds[backend])], options=":fancy_upsampling=1")
    streams = [codec.CodeStream(data) for data in jpegs(context, _DECODED_TOGETHER)]
    spin, stream = cupy.RawKernel(_SPIN, "spin"), cupy.cuda.Stream(non_blocking=True)
    images = decoder.decode(streams, cuda_stream=stream.ptr)
    stream.synchronize()
    left_out = sum(image is None for image in images)
    streams = [each for each, image in zip(streams, images, strict=True) if image is not None]
    images = [image for image in images if image is not None]
    assert images, f"the {backend} decode none of {left_out} images"
    # Made once: making such an array waits for the stream of its image.
    rows = [cupy.asarray(image) for image in images]
    right = [row.copy() for row in rows]
    wrong, moved = [], 0
    for _ in range(_ROUNDS):
        with stream:
            spin((1,), (1,), (np.int64(_BUSY_CYCLES),))
            for row in rows:
                row[...] = 170
        images = decoder.decode(streams, images=images, cuda_stream=stream.ptr)
        cupy.cuda.Device().synchronize()
        pairs = [(cupy.asarray(image), row) for image, row in zip(images, rows, strict=True)]
        moved += sum(image.data.ptr != row.data.ptr for image, row in pairs)
        same = (cupy.array_equal(image, row) for (image, _), row in zip(pairs, right, strict=True))
        wrong.append(sum(not bool(each) for each in same))
    assert not any(wrong), f"{sum(map(bool, wrong))} of {_ROUNDS} rounds had wrong images, {sum(wrong)} in all: {wrong}"
    assert not moved, f"{moved} images were decoded into other buffers, so nothing is proved"
    return {"summary": [f"{_ROUNDS} rounds of {len(images)} images, all right; {left_out} not decoded"]}


def busy_pipeline(context: Context, load: float) -> dict[str, Any]:
    """Decodes 20,000 images with DALI, in pipelines that have much more to do on the GPU and in idle ones."""
    data = jpegs(context, 1000 if context.on_gpu else 20)
    count = _IMAGES if context.on_gpu else 40
    quiet = _decoded(context, data, count, load, busy=False)
    wrong = []
    for _ in range(2):
        rows = _decoded(context, data, count, load, busy=True)
        wrong.append(np.flatnonzero((rows != quiet).any(axis=(1, 2, 3))).tolist())
    by_cuda = _decoded(context, data, len(data), 0.0, busy=False)
    other = np.array([difference(one, two) for one, two in zip(quiet, by_cuda, strict=False)])
    summary = (
        f"{[len(each) for each in wrong]} of {count} images changed in a busy pipeline; "
        f"mean {other.mean():.3f} from load 0, {int((other > 8).sum())} of {len(other)} by over 8 levels"
    )
    assert not any(wrong), f"{[each[:100] for each in wrong]}\n{summary}"
    assert not (other > 8).any(), f"{np.flatnonzero(other > 8)[:100].tolist()}\n{summary}"
    return {"from_load_0": other.tolist(), "summary": [summary]}


def _decoded(context: Context, data: list[bytes], count: int, load: float, *, busy: bool) -> NDArray[np.uint8]:
    """`count` small images, (N, H, W, 3). A busy pipeline resizes each to a large image and back first."""
    from nvidia.dali import fn, pipeline_def, types

    batch_size = min(_BATCH_SIZE, count)
    encoded = [np.frombuffer(each, np.uint8) for each in data]
    endless = itertools.cycle(encoded)

    def source() -> list[NDArray[np.uint8]]:
        return list(itertools.islice(endless, batch_size))

    @pipeline_def(
        batch_size=batch_size,
        num_threads=14 if context.on_gpu else 2,
        device_id=0 if context.on_gpu else None,
        prefetch_queue_depth=3 if busy else 1,
    )
    def graph() -> Any:
        files = fn.external_source(source, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files,
            device="mixed" if context.on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=load,
        )
        small = fn.resize(images, size=[_SIDE, _SIDE])
        if not busy:
            return small
        large = fn.resize(images, size=[1024, 1024], interp_type=types.INTERP_LANCZOS3)
        return small, fn.resize(large, size=[_SIDE, _SIDE])

    pipeline = graph()
    pipeline.build()
    parts = []
    for _ in range(-(-count // batch_size)):
        small = pipeline.run()[0]
        parts.append(np.asarray((small.as_cpu() if context.on_gpu else small).as_array()))
    return np.concatenate(parts)[:count]
