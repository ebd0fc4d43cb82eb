"""Whole batches from DataLoader workers, in shared memory that is used again: values stay, memory does not grow."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, MakeTree

torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")

from torch.utils.data import DataLoader, Subset  # noqa: E402  # after the skip

from gpu_npz.readers import torch_workers  # noqa: E402
from gpu_npz.readers.torch import ShardDataset, collate  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # workers are forked here on purpose
    "ignore:This DataLoader will create:UserWarning",  # more workers than cores
)


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, as uint8 NHWC. Read only."""
    return make_dataset(dtype="uint8", layout="NHWC")


def batches_of(dataset: Any, **options: Any) -> Any:
    return DataLoader(dataset, **{"batch_size": 7, "collate_fn": collate, **options})


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            assert torch.equal(tensor, wanted)
            assert tensor.dtype == wanted.dtype


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (3, "fork"), (2, "spawn"), (1, "forkserver")])
def test_batches_are_those_of_torchs_own_function(pixels: Path, workers: int, method: str | None) -> None:
    for normalize in (True, False):
        dataset = ShardDataset(pixels, normalize=normalize)
        expected = list(DataLoader(dataset, 7))
        found = batches_of(dataset, num_workers=workers, multiprocessing_context=method)
        assert_same(found, expected)


def test_images_alone_and_datasets_with_transforms_are_collated(
    make_tree: MakeTree, make_dataset: MakeDataset, pixels: Path
) -> None:
    plain = ShardDataset(make_dataset(make_tree({"a.jpg": "jpeg", "b.jpg": "jpeg", "c.jpg": "jpeg"})))
    for workers in (0, 1):
        assert [images.shape for images in batches_of(plain, batch_size=2, num_workers=workers)] == [
            (2, 3, 12, 16),
            (1, 3, 12, 16),
        ]
        for dataset in (ShardDataset(pixels, torch.neg), ShardDataset(pixels, target_transform=float)):
            assert_same(batches_of(dataset, num_workers=workers), DataLoader(dataset, 7))
        subset = Subset(ShardDataset(pixels), [3, 9, 2, 30])
        assert_same(batches_of(subset, batch_size=3, num_workers=workers), DataLoader(subset, 3))


class Changing(torch.utils.data.Dataset[Any]):
    """A dataset that wraps another one, and changes the list of a batch's samples."""

    def __init__(self, dataset: ShardDataset, change: Callable[[Any], object]) -> None:
        self.dataset, self.change = dataset, change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        samples = self.dataset.__getitems__(indices)
        self.change(samples)
        return samples


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda samples: samples.reverse(),
        lambda samples: samples.pop(),
        lambda samples: samples.append(samples[0]),
        lambda samples: samples.__setitem__(0, (-samples[0][0], 7)),
    ],
    ids=["reversed", "shorter", "longer", "replaced"],
)
def test_a_dataset_that_wraps_another_may_change_the_samples_of_a_batch(
    pixels: Path, workers: int, change: Callable[[Any], object]
) -> None:
    dataset = Changing(ShardDataset(pixels), change)
    assert_same(batches_of(dataset, num_workers=workers), DataLoader(dataset, 7))


HOLDS: dict[str, Callable[[Any], Any]] = {
    "batch": lambda images: images,
    "slice": lambda images: images[:3],
    "image": lambda images: images[0],
    "array": lambda images: images.numpy(),
    "array of a slice": lambda images: images[:1].numpy()[..., ::2],
    "flipped array": lambda images: np.flip(images.numpy(), -1)[:2],
    "channels last": lambda images: images.permute(0, 2, 3, 1).numpy().reshape(-1),
    "detached": lambda images: images.detach()[:, 0],
    "dlpack": lambda images: torch.from_dlpack(images),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_nothing_of_a_batch_changes_while_it_is_held(pixels: Path, hold: str) -> None:
    batches = batches_of(ShardDataset(pixels), batch_size=3, shuffle=True, num_workers=2, persistent_workers=True)
    held, chosen = [], random.Random(hold)
    for _ in range(4):
        for images, _ in batches:
            if chosen.random() < 0.5:
                part = HOLDS[hold](images)
                held.append((part, np.asarray(part).copy()))
            if held and chosen.random() < 0.3:
                held.pop(chosen.randrange(len(held)))
    assert len(held) > 4
    for part, before in held:
        np.testing.assert_array_equal(np.asarray(part), before)


def test_memory_is_used_again_over_epochs_and_given_back(pixels: Path) -> None:
    batches = batches_of(ShardDataset(pixels), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    places: set[int] = set()
    for _ in range(6):
        places |= {images.data_ptr() for images, _ in batches}
    assert len(places) <= 2 * 6
    ours = {key for key in torch_workers._mapped if torch_workers._lives(key[0])}
    assert len(ours) <= 2 * 6
    del batches
    gc.collect()
    torch_workers._unmap()
    assert not {key for key in torch_workers._mapped if key in ours}


def test_workers_of_each_epoch_leave_no_memory_mapped(pixels: Path) -> None:
    batches = batches_of(ShardDataset(pixels), batch_size=4, num_workers=2)
    for _ in range(5):
        for _ in batches:
            pass
        assert len(torch_workers._mapped) <= 2 * 6


def test_a_user_who_keeps_every_batch_gets_new_memory(pixels: Path) -> None:
    dataset = ShardDataset(pixels)
    kept: list[Any] = []
    batches = batches_of(dataset, batch_size=1, num_workers=1, persistent_workers=True)
    for _ in range(2):
        kept.extend(batches)
        assert len(torch_workers._mapped) <= torch_workers.KEPT + 4
    assert_same(kept, [*DataLoader(dataset, 1), *DataLoader(dataset, 1)])


def test_a_forked_process_keeps_what_it_shares(pixels: Path) -> None:
    batches = batches_of(ShardDataset(pixels), batch_size=2, num_workers=1, persistent_workers=True)
    begun = iter(batches)
    images, _ = next(begun)
    before = images.clone()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.read(reading, 1)  # until the parent has let go of the batch, and the worker has read others
        os._exit(0 if torch.equal(images, before) else 1)
    del images
    for _ in begun:
        pass
    for _ in batches:
        pass
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reading)
    os.close(writing)


def test_a_child_gives_nothing_back_that_its_parent_uses(pixels: Path) -> None:
    begun = iter(batches_of(ShardDataset(pixels), batch_size=2, num_workers=1))
    images, _ = next(begun)
    before = images.clone()
    child = os.fork()
    if not child:
        del images
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in begun:
        pass
    assert torch.equal(images, before)


def test_pinned_batches_are_copies_and_free_the_memory(pixels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())  # as pinning does
    dataset = ShardDataset(pixels)
    batches = batches_of(dataset, batch_size=2, num_workers=1, pin_memory=True, persistent_workers=True)
    expected = list(DataLoader(dataset, 2))
    for _ in range(3):
        assert_same(list(batches), expected)
    assert len(torch_workers._mapped) <= torch_workers.KEPT


def test_iterations_that_stop_early_and_begin_anew(pixels: Path) -> None:
    dataset = ShardDataset(pixels)
    batches = batches_of(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    for stop in (1, 3, 0, 5, 2):
        for number, _ in enumerate(batches):
            if number == stop:
                break
    assert_same(batches, DataLoader(dataset, 2))


def test_a_message_names_the_buffers_of_the_time_at_which_it_was_made() -> None:
    # It is pickled by another thread, while the worker's own thread may make a buffer.
    buffers = torch_workers.shared_buffers()
    images = buffers.take((2, 3, 4, 5), np.dtype(np.uint8))
    message = torch_workers._Message(torch_workers.Batch(images, None, "NCHW"))
    later = torch_workers._make(100)
    _, ((_, serial), kept, *_) = message.__reduce__()
    assert serial in kept
    assert int(later[-16:-8].view(np.int64)[0]) not in kept


def test_a_worker_whose_number_a_process_of_another_user_has_taken_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setitem(torch_workers._mapped, (4_000_000, 0), np.zeros(32, np.uint8))
    torch_workers._unmap()
    assert (4_000_000, 0) not in torch_workers._mapped


def test_torchs_other_way_to_share_memory_works(pixels: Path) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        dataset = ShardDataset(pixels)
        assert_same(batches_of(dataset, num_workers=2), DataLoader(dataset, 7))
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
