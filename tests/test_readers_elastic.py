"""Steps of an epoch that are the same for any number of ranks and workers: counted, with a resume at every step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, read_shards

from gpu_npz.errors import UsageError
from gpu_npz.readers.order import ElasticOrder, part, shards_in

torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")

from torch.utils.data import DataLoader  # noqa: E402  # after the skip

import gpu_npz.readers.torch as reader  # noqa: E402
from gpu_npz.readers.torch import ShardIterable  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # workers are forked here on purpose
    "ignore:'set_vital' is deprecated:UserWarning",  # torchdata 0.11 calls it
    "ignore:This DataLoader will create:UserWarning",  # more workers than cores
)
RANKS = (1, 2, 3, 4, 6, 8)
WORKERS = range(5)
GLOBAL_BATCH, LANES = 12, 4


@pytest.fixture(scope="module")
def out(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, float32 NCHW. Read only."""
    return make_dataset()


@pytest.fixture(scope="module")
def row_of(out: Path) -> dict[bytes, int]:
    return {image.tobytes(): row for row, image in enumerate(read_shards(out))}


def stream_of(out: Path, **options: Any) -> ShardIterable:
    options = {"shuffle": True, "seed": 3, "buffer": 4, "rank": 0, "world_size": 1, **options}
    return ShardIterable(out, **{"global_batch": GLOBAL_BATCH, "lanes": LANES, **options})


# The order


@pytest.mark.parametrize("count", [0, 1, 11, 12, 40, 97])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("buffer", [1, 4, 1000])
@pytest.mark.parametrize("lanes", [1, 3, 12])
def test_every_place_comes_once_and_each_step_stands_alone(
    count: int, seed: int | None, buffer: int, lanes: int
) -> None:
    bounds = np.unique([0, count // 3, count // 2, count])
    bounds = np.array([0, 0]) if count == 0 else bounds
    order = ElasticOrder(bounds, 12, lanes, buffer, seed, 2)
    steps = [order.step(number) for number in range(order.steps)]
    assert [len(step) for step in steps] == [12] * (count // 12) + [count % 12] * (count % 12 > 0)
    assert sorted(place for step in steps for place in step) == list(range(count))
    assert ElasticOrder(bounds, 12, lanes, buffer, seed, 2, drop_last=True).steps == count // 12
    for number in reversed(range(order.steps)):
        np.testing.assert_array_equal(
            ElasticOrder(bounds, 12, lanes, buffer, seed, 2).step(number), steps[number], strict=True
        )


def test_a_rank_reads_few_shards_where_the_ranks_divide_the_lanes() -> None:
    bounds = np.arange(0, 64_001, 1000)
    order = ElasticOrder(bounds, 256, 8, 2000, 0, 0)
    for ranks in (1, 2, 4, 8):
        for number in (0, 3, 100, 249):
            parts = np.split(order.step(number), ranks)
            assert all(len(np.unique(part // 1000)) <= 4 * 8 // ranks for part in parts)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_rank_that_begins_at_any_step_knows_every_shard_that_it_will_read(seed: int | None, world_size: int) -> None:
    bounds = np.cumsum([0, 3, 0, 8, 1, 13, 5, 2, 21, 4])
    order = ElasticOrder(bounds, 8, 4, 7, seed, 1)
    for first in range(order.steps):
        for rank in range(world_size):
            known = shards_in(bounds, order.spans(first, rank, world_size), seed, 1)
            for step in map(order.step, range(first, order.steps)):
                mine = step[slice(*part(len(step), rank, world_size))]
                assert set(np.searchsorted(bounds[1:], mine, side="right")) <= set(known)


# The stream


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_ranks_and_workers_resume_at_every_step_and_give_every_row_once(
    out: Path, row_of: dict[bytes, int], world_size: int, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stream_of(out, drop_last=drop_last)
    plain.set_epoch(1)
    expected = [[row_of[image.numpy().tobytes()] for image in images] for images, _ in plain]
    assert [len(step) for step in expected] == [12, 12, 12] + [4] * (not drop_last)
    assert len({row for step in expected for row in step}) == (36 if drop_last else 40)
    for first in range(len(expected) + 1):
        state = json.loads(json.dumps(plain.state_dict(first)))
        for workers in WORKERS:
            steps: list[list[int]] = [[] for _ in expected]
            for rank in range(world_size):
                stream = stream_of(out, drop_last=drop_last, rank=rank, world_size=world_size)
                stream.load_state_dict(state)
                sharers = max(1, workers)
                for worker in range(sharers):
                    monkeypatch.setattr(reader, "_worker", lambda mine=(worker, sharers): mine)
                    for number, (images, _) in enumerate(stream):
                        step = first + worker + number * sharers
                        assert step < len(stream)
                        steps[step] += [row_of[image.numpy().tobytes()] for image in images]
            assert steps == [*([[]] * first), *expected[first:]]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataloader_s_workers_give_the_steps_in_order(out: Path, workers: int, method: str) -> None:
    if method == "spawn" and workers not in (1, 3):
        pytest.skip("slow, and the numbers of workers are tested with fork")
    expected = list(stream_of(out))
    for first in (0, 1, 3):
        stream = stream_of(out)
        stream.load_state_dict(stream.state_dict(first))
        options = {"multiprocessing_context": method} if workers else {}
        assert_same(DataLoader(stream, batch_size=None, num_workers=workers, **options), expected[first:])


def test_a_state_that_is_loaded_reaches_workers_that_stay_and_ends_with_its_epoch(out: Path) -> None:
    stream = stream_of(out)
    batches = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    whole = {}
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        whole[epoch] = list(batches)
    stream.load_state_dict(stream_of(out).state_dict(2))
    for _ in range(2):
        stream.set_epoch(0)
        assert_same(batches, whole[0][2:])
    stream.set_epoch(1)
    assert_same(batches, whole[1])
    stream.set_epoch(0)
    assert_same(batches, whole[0])


def test_the_state_of_an_iteration_in_this_process_counts_by_itself(out: Path) -> None:
    stream = stream_of(out)
    for number, _ in enumerate(stream):
        assert stream.state_dict() == stream.state_dict(number + 1)


def test_the_state_names_neither_ranks_nor_workers(out: Path) -> None:
    state = stream_of(out, rank=1, world_size=3).state_dict(2)
    assert list(state) == [
        "dataset", "rows", "seed", "shuffle", "global_batch", "lanes", "buffer", "keep_blank", "epoch", "step"
    ]  # fmt: skip


def test_states_of_other_streams_are_refused_at_once(out: Path) -> None:
    state = stream_of(out).state_dict(1)
    for options, difference in [
        ({"seed": 4}, "seed 3, not 4"),
        ({"buffer": 5}, "buffer 4, not 5"),
        ({"lanes": 2}, "lanes 4, not 2"),
        ({"global_batch": 24}, "global_batch 12, not 24"),
        ({"shuffle": False}, "shuffle True, not False"),
        ({"keep_blank": True}, "keep_blank False, not True"),
    ]:
        with pytest.raises(UsageError, match=difference):
            stream_of(out, **options).load_state_dict(state)
    with pytest.raises(UsageError, match="another stream"):
        stream_of(out).load_state_dict(ShardIterable(out, shuffle=True, seed=3).state_dict())


def test_a_worker_has_no_state(out: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="NOT TESTED: torchdata is not installed")
    with pytest.raises(UsageError, match="one state, in the main process"):
        list(stateful.StatefulDataLoader(stream_of(out), batch_size=None, num_workers=1))


def test_global_batches_that_make_no_sense_are_refused(out: Path) -> None:
    for options in ({"global_batch": 10}, {"world_size": 16, "rank": 0}, {"global_batch": 0}, {"lanes": 0}):
        with pytest.raises(UsageError, match=r"(global_batch|lanes): got"):
            stream_of(out, **options)


@pytest.mark.parametrize("transform", [None, torch.neg])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"collate_fn": reader.collate}], ids=["torch's collate", "ours"])
def test_a_dataloader_that_would_put_steps_into_batches_is_told_how_to_be_created(
    out: Path, transform: Any, workers: int, options: dict[str, Any]
) -> None:
    batches = DataLoader(stream_of(out, transform=transform), batch_size=2, num_workers=workers, **options)
    with pytest.raises(UsageError, match=r"create the DataLoader with batch_size=None"):
        next(iter(batches))


def test_transforms_are_applied(out: Path) -> None:
    expected = [(-images, labels) for images, labels in stream_of(out)]
    for workers in (0, 2):
        stream = stream_of(out, transform=torch.neg)
        assert_same(DataLoader(stream, batch_size=None, num_workers=workers), expected)


def assert_same(found: Iterable[Any], expected: Iterable[Any]) -> None:
    for (images, labels), (others, wanted) in zip(found, expected, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, wanted)
