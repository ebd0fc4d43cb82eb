"""Memory that batches use again: values stay, whatever of a batch somebody keeps, and memory does not grow."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, read_shards

from gpu_npz.errors import UsageError
from gpu_npz.readers.buffers import Buffers

torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")

from gpu_npz.readers.torch import loader  # noqa: E402  # after the skip

UINT8 = np.dtype(np.uint8)


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, as uint8 NCHW. Read only."""
    return make_dataset(dtype="uint8")


# Buffers


def test_a_buffer_is_used_again_only_when_no_view_of_it_is_left() -> None:
    buffers = Buffers(4)
    first = buffers.take((2, 3), np.dtype(np.float32))
    place = first.ctypes.data
    views: list[Any] = [first[:1].T, memoryview(first), torch.from_numpy(first)[1], torch.from_numpy(first).numpy()[0]]
    del first
    while views:
        assert buffers.take((6,), np.dtype(np.float32)).ctypes.data != place
        views.pop(0)
    assert place in [array.ctypes.data for array in [buffers.take((6,), np.dtype(np.float32)) for _ in range(4)]]


def test_buffers_that_are_kept_do_not_grow_in_number() -> None:
    buffers = Buffers(3)
    held = [buffers.take((10,), UINT8) for _ in range(20)]
    assert len({array.ctypes.data for array in held}) == 20
    assert len(buffers._buffers) == 3
    held.clear()
    assert len({buffers.take((10,), UINT8).ctypes.data for _ in range(50)}) <= 3


def test_a_buffer_that_is_too_small_is_replaced() -> None:
    buffers = Buffers(2)
    for size in (5, 7, 3, 0, 100):
        assert buffers.take((size,), UINT8).shape == (size,)
    assert [len(buffer) for buffer in buffers._buffers] == [100]


def test_pickled_buffers_are_empty() -> None:
    buffers = Buffers(2)
    buffers.take((5,), UINT8)
    assert len(pickle.loads(pickle.dumps(buffers))._buffers) == 0


def test_threads_never_get_the_same_buffer() -> None:
    buffers, faults = Buffers(6), []

    def work(number: int) -> None:
        mine = random.Random(number)
        held: list[tuple[Any, int]] = []
        for step in range(3000):
            array = buffers.take((64,), np.dtype(np.int64))
            array[:] = number * 10_000 + step
            held.append((array, number * 10_000 + step))
            if len(held) > mine.randrange(3):
                faults.extend(value for kept, value in held if (kept != value).any())
                held.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


# The loader

HOLDS: dict[str, Callable[[Any], Any]] = {
    "batch": lambda images: images,
    "slice": lambda images: images[2:4],
    "image": lambda images: images[1],
    "array": lambda images: images.numpy(),
    "array of a slice": lambda images: images[1:].numpy()[..., ::2],
    "flipped array": lambda images: np.flip(images.numpy(), -1)[:2],
    "transposed": lambda images: images.permute(0, 2, 3, 1),
    "detached": lambda images: images.detach().view(-1),
    "parameter": lambda images: torch.nn.Parameter(images, requires_grad=False),
    "buffer": lambda images: memoryview(images.numpy()),
    "dlpack": lambda images: torch.from_dlpack(images),
    "saved for backward": lambda images: (torch.ones(1, requires_grad=True) * images).grad_fn,
}


def content(held: Any) -> bytes:
    if hasattr(held, "_saved_other"):
        held = held._saved_other
    return bytes(held) if isinstance(held, memoryview) else np.ascontiguousarray(np.asarray(held)).tobytes()


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_of_a_batch_changes_while_it_is_held(pixels: Path, hold: str, normalize: bool) -> None:
    batches, held = loader(pixels, 4, device="cpu", shuffle=True, normalize=normalize, threads=3), []
    chosen = random.Random(hold)
    for _ in range(4):
        for images, _ in batches:
            if chosen.random() < 0.6:
                part = HOLDS[hold](images)
                held.append((part, content(part)))
            if held and chosen.random() < 0.2:
                held.pop(chosen.randrange(len(held)))
    assert len(held) > 2
    assert all(content(part) == before for part, before in held)


def test_memory_is_used_again_over_epochs(pixels: Path) -> None:
    batches = loader(pixels, 4, device="cpu", shuffle=True)
    places = [{images.data_ptr() for images, _ in batches} for _ in range(6)]
    assert len(set.union(*places)) <= batches.prefetch + 3
    begun = [iter(batches) for _ in range(3)]  # several at the same time share the memory, not the batches
    for three in zip(*begun, strict=True):
        assert len({images.data_ptr() for images, _ in three}) == 3


def test_two_iterations_at_once_give_what_one_gives(pixels: Path) -> None:
    batches = loader(pixels, 4, device="cpu")
    whole = [images.clone() for images, _ in batches]
    for (one, _), (other, _), expected in zip(batches, batches, whole, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("stored", ["uint8", "float32"])
def test_the_memory_format_is_the_wanted_one(make_dataset: MakeDataset, stored: str, layout: str) -> None:
    path = make_dataset(dtype=stored, layout=layout)
    for normalize in (True, False):
        plain = [images for images, _ in loader(path, 9, device="cpu", normalize=normalize)]
        for channels_last in (True, False):
            batches = loader(path, 9, device="cpu", normalize=normalize, channels_last=channels_last)
            wanted = torch.channels_last if channels_last else torch.contiguous_format
            for (images, _), expected in zip(batches, plain, strict=True):
                assert images.is_contiguous(memory_format=wanted)
                assert torch.equal(images, expected)


@pytest.mark.parametrize("kind", ["imagenet", "minmax"])
def test_float16_has_the_values_of_a_float16_build(make_dataset: MakeDataset, kind: str) -> None:
    built = read_shards(make_dataset(dtype="float16", normalize=kind))
    for layout in ("NCHW", "NHWC"):
        path = make_dataset(dtype="uint8", normalize=kind, layout=layout)
        found = np.concatenate([images.numpy() for images, _ in loader(path, 7, device="cpu", dtype="float16")])
        np.testing.assert_array_equal(found, built, strict=True)


@pytest.mark.parametrize("threads", [1, 2, 5, 50])
def test_the_number_of_threads_changes_nothing(pixels: Path, threads: int) -> None:
    expected = [images.clone() for images, _ in loader(pixels, 7, device="cpu", shuffle=True, threads=1)]
    for (images, _), other in zip(
        loader(pixels, 7, device="cpu", shuffle=True, threads=threads), expected, strict=True
    ):
        assert torch.equal(images, other)


def test_types_that_make_no_sense_are_refused(pixels: Path) -> None:
    for options in ({"dtype": "float64"}, {"dtype": "float16", "normalize": False}):
        with pytest.raises(UsageError, match=f"dtype: got '{options['dtype']}'; allowed: float32 or float16"):
            loader(pixels, 4, device="cpu", **options)
    with pytest.raises(UsageError, match="threads: got 0"):
        loader(pixels, 4, device="cpu", threads=0)


def test_a_loader_can_be_pickled(pixels: Path) -> None:
    batches = loader(pixels, 7, device="cpu", shuffle=True)
    copy = pickle.loads(pickle.dumps(batches))
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(batches, copy, strict=True))
