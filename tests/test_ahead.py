"""Reads that run ahead of the decoder: what they hold together is bounded, and every item still comes, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gpu_npz.preprocess import base as decode
from gpu_npz.sources.access.read_ahead import Room, reserve
from gpu_npz.sources.base import Batch, Group, Item, Source
from gpu_npz.sources.rejects import BadItem

SIZE = 100


class Store(Source):
    """Items of 100 bytes; the one called `bad` ends in the midst of its bytes. Knows how many were held at most."""

    kind = location = "store"
    reads_at_once = 4

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.lock = threading.Lock()

    def groups(self) -> Iterator[Group]:
        yield from ()

    def read(self, item: Item) -> bytes:
        reserve(SIZE)
        with self.lock:
            self.reads.append(item.path)
        if item.path == "bad":
            raise BadItem("read", "unreadable", "half")
        return item.path.encode().ljust(SIZE)


def batches(names: list[str]) -> list[Batch]:
    items = [Item(number, name, None) for number, name in enumerate(names)]
    return [Batch(0, items[start : start + 10], last=start + 10 >= len(items)) for start in range(0, len(items), 10)]


@pytest.mark.parametrize("room_bytes", [0, SIZE, 3 * SIZE, 1 << 30])
def test_all_items_come_in_order_however_little_room_there_is(room_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(room_bytes)
    monkeypatch.setattr(decode, "Room", lambda: room)
    source, names = Store(), [f"{number:02}" for number in range(40)]
    found = [read().strip().decode() for _, reads in decode.with_reads(source, batches(names)) for read in reads]
    assert found == names
    assert sorted(source.reads) == names  # each once: who finds no room ends before its bytes come
    assert room.take(room_bytes)  # all was given back
    assert not room.take(1)


def test_reads_ahead_never_hold_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(3 * SIZE)
    monkeypatch.setattr(decode, "Room", lambda: room)
    source = Store()
    coming = decode.with_reads(source, batches([f"{number:02}" for number in range(40)]))
    next(coming)
    coming.close()  # waits for what has begun
    assert len(source.reads) <= 3


def test_a_read_that_fails_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(SIZE)
    monkeypatch.setattr(decode, "Room", lambda: room)
    for _, reads in decode.with_reads(Store(), batches(["bad"])):
        with pytest.raises(BadItem):
            reads[0]()
    assert room.take(SIZE)
