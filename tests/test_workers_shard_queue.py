"""The queue of shards that both engines use: order, losses, isolation mode and hopeless shards."""

from __future__ import annotations

from gpu_npz.workers.shard_queue import ShardQueue


def test_shards_are_taken_in_order_until_none_is_left() -> None:
    queue = ShardQueue([4, 2, 7], max_losses=3)
    assert len(queue) == queue.left(isolated=False) == 3
    assert [queue.take(isolated=False) for _ in range(4)] == [4, 2, 7, None]
    assert len(queue) == 0


def test_isolated_workers_get_no_shard_that_was_never_lost() -> None:
    queue = ShardQueue([1], max_losses=3)
    assert queue.take(isolated=True) is None
    assert (queue.left(isolated=True), queue.left(isolated=False)) == (0, 1)


def test_a_lost_shard_is_the_next_and_after_its_second_loss_only_for_isolated_workers() -> None:
    queue = ShardQueue([1, 2], max_losses=5)
    assert queue.take(isolated=False) == 1
    queue.put_back(1)
    assert queue.take(isolated=False) == 1
    queue.put_back(1)
    assert (queue.left(isolated=True), queue.left(isolated=False), len(queue)) == (1, 1, 2)
    assert queue.take(isolated=False) == 2
    assert queue.take(isolated=True) == 1


def test_a_shard_put_back_for_the_sake_of_an_item_stays_doubtful_and_is_never_hopeless() -> None:
    queue = ShardQueue([1], max_losses=3)
    for _ in range(2):
        queue.take(isolated=False)
        queue.put_back(1)
    for _ in range(10):
        assert queue.take(isolated=True) == 1
        queue.put_back(1, lost=False)
    assert not queue.is_hopeless(1)
    queue.put_back(1)
    assert queue.is_hopeless(1)


def test_losses_are_counted_for_each_shard() -> None:
    queue = ShardQueue([1, 2], max_losses=1)
    shard = queue.take(isolated=False)
    assert shard == 1
    queue.put_back(1)
    assert queue.is_hopeless(1)
    assert not queue.is_hopeless(2)
