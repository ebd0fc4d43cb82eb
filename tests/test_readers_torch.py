"""A dataset for PyTorch: whatever the reader, worker and rank, it hands out the rows that numpy.load finds, once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, MakeTree, file_bytes, python, read_shards, readme_example

import gpu_npz
from gpu_npz.errors import BackendError, FormatError, UsageError

torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")

from torch.utils.data import DataLoader, DistributedSampler, Subset, random_split  # noqa: E402  # after the skip

from gpu_npz.readers.torch import ShardDataset, ShardIterable, loader, look_up  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # workers are forked here on purpose
    "ignore:'set_vital' is deprecated:UserWarning",  # torchdata 0.11 calls it
    "ignore:This DataLoader will create:UserWarning",  # more workers than cores
)


@pytest.fixture(scope="module")
def out(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, float32 NCHW. Read only."""
    return make_dataset()


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """The same images as uint8 NHWC. Read only."""
    return make_dataset(dtype="uint8", layout="NHWC")


@pytest.fixture(scope="module")
def blank(make_tree_once: Path, make_dataset: MakeDataset) -> Path:
    """20 rows, each third of them blank, as uint8. Read only."""
    return make_dataset(make_tree_once, dtype="uint8", on_reject="blank")


@pytest.fixture(scope="module")
def make_tree_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("some-bad")
    for number in range(20):
        folder = root / "abcd"[number // 5]
        folder.mkdir(exist_ok=True)
        content = file_bytes("half" if number % 3 == 1 else "jpeg", seed=number)
        (folder / f"{number:02d}.jpg").write_bytes(content)
    return root


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """The dataset in a folder that may be damaged."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pairs(out: Path) -> Counter[tuple[bytes, int]]:
    """Every row of the shards: the float32 image in C, H, W order, and its label."""
    counted = Counter(zip(map(bytes, read_shards(out)), read_shards(out, "labels").tolist(), strict=True))
    assert set(counted.values()) == {1}
    return counted


def seen(batches: Iterable[Any]) -> Counter[tuple[bytes, int]]:
    """What batches of (images, labels) hold, as `pairs`."""
    found: Counter[tuple[bytes, int]] = Counter()
    for images, labels in batches:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        found.update(zip((image.numpy().tobytes() for image in images), labels.tolist(), strict=True))
    return found


def order(batches: Iterable[Any]) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


# By number


def test_images_and_labels_are_those_of_the_shards(out: Path) -> None:
    dataset = ShardDataset(out)
    assert len(dataset) == 40
    for index in (0, 6, 7, 39, -1, np.int64(3), torch.tensor(8)):
        image, label = dataset[index]
        assert type(label) is int
        assert (image.dtype, image.shape) == (torch.float32, (3, 12, 16))
        np.testing.assert_array_equal(image.numpy(), read_shards(out)[int(index)])
        assert label == read_shards(out, "labels")[int(index)]


def test_a_batch_is_what_its_images_are_one_by_one(out: Path, pixels: Path) -> None:
    for path in (out, pixels):
        dataset = ShardDataset(path, torch.neg, str)
        indices = [39, 0, 7, 7, -1]
        for (image, label), index in zip(dataset.__getitems__(indices), indices, strict=True):
            assert torch.equal(image, dataset[index][0])
            assert label == dataset[index][1] == str(ShardDataset(path)[index][1])
        assert dataset.__getitems__([]) == []


def test_uint8_and_nhwc_give_the_bits_of_a_float32_nchw_build(
    out: Path, pixels: Path, make_dataset: MakeDataset
) -> None:
    assert order([next(iter(DataLoader(ShardDataset(pixels), 40)))]) == list(map(bytes, read_shards(out)))
    halves = make_dataset(dtype="float16")
    np.testing.assert_array_equal(ShardDataset(halves)[9][0].numpy(), read_shards(halves)[9].astype(np.float32))


def test_without_normalization_the_stored_values_come(pixels: Path) -> None:
    image, _ = ShardDataset(pixels, normalize=False)[11]
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.numpy(), read_shards(pixels)[11].transpose(2, 0, 1))


def test_an_image_is_a_view_of_the_map_and_a_transform_may_work_in_place(out: Path, pixels: Path) -> None:
    for path, options in ((out, {}), (pixels, {"normalize": False})):
        plain, in_place = (ShardDataset(path, transform, **options) for transform in (None, lambda x: x.fill_(1)))
        shard = plain.data.shard(1)["images"]
        assert np.shares_memory(plain[8][0].numpy(), shard)
        before = shard.copy()
        assert (in_place[8][0] == 1).all()
        assert all((image == 1).all() for image, _ in in_place.__getitems__([7, 8, 9]))
        np.testing.assert_array_equal(in_place.data.shard(1)["images"], before)


def test_classes_and_targets_are_as_image_folder_has_them_and_open_no_shard(copy: Path) -> None:
    labels = read_shards(copy, "labels").tolist()
    for shard in copy.glob("shard-*.npz"):
        shard.unlink()
    dataset = ShardDataset(copy)
    assert dataset.classes == ["apples", "berries", "cherries"]
    assert dataset.class_to_idx == {"apples": 0, "berries": 1, "cherries": 2}
    assert dataset.targets == labels
    assert len(dataset) == 40


def test_without_labels_images_come_alone(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    path = make_dataset(make_tree({"b.jpg": "jpeg", "a.jpg": "jpeg", "c.jpg": "jpeg"}), shard_size=2)
    dataset = ShardDataset(path, target_transform=str)
    assert dataset.classes is dataset.class_to_idx is dataset.targets is None
    assert dataset[2].shape == (3, 12, 16)
    for batches in (DataLoader(dataset, 2), DataLoader(ShardIterable(path), 2), loader(path, 2, device="cpu")):
        assert [images.shape for images in batches] == [(2, 3, 12, 16), (1, 3, 12, 16)]


def test_blank_rows_are_left_out_unless_wanted(blank: Path) -> None:
    valid = read_shards(blank, "valid")
    labels = read_shards(blank, "labels")
    assert valid.sum() == 13
    for keep, rows in ((False, np.flatnonzero(valid)), (True, np.arange(20))):
        dataset = ShardDataset(blank, keep_blank=keep)
        np.testing.assert_array_equal(dataset.rows, rows)
        assert dataset.targets == labels[rows].tolist() == [label for _, label in dataset]
        expected = order(DataLoader(dataset, 6))
        assert [any(image) for image in expected] == valid[rows].tolist()
        assert order(DataLoader(ShardIterable(blank, keep_blank=keep), 6)) == expected
        assert order(loader(blank, 6, device="cpu", keep_blank=keep)) == expected


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(pixels: Path, pairs: Counter[tuple[bytes, int]], method: str) -> None:
    dataset = ShardDataset(pixels)
    _ = dataset[3], dataset.targets  # what is open already must not disturb
    workers = 2 if method == "fork" else 1
    batches = DataLoader(dataset, 7, shuffle=True, num_workers=workers, multiprocessing_context=method)
    assert seen(batches) == pairs


def test_a_fork_while_a_thread_reads_does_not_hang(pixels: Path, pairs: Counter[tuple[bytes, int]]) -> None:
    dataset = ShardDataset(pixels)
    with dataset.data._lock:  # as a thread that reads holds it; the child has no such thread
        batches = iter(DataLoader(dataset, 40, num_workers=1, multiprocessing_context="fork", timeout=20))
        assert seen(batches) == pairs


def test_it_pickles_with_its_transforms(out: Path) -> None:
    dataset = pickle.loads(pickle.dumps(ShardDataset(out, torch.neg, str)))
    image, label = dataset[5]
    assert torch.equal(image, -ShardDataset(out)[5][0])
    assert label == str(ShardDataset(out)[5][1])


def test_samplers_splits_and_subsets_take_it(out: Path, pairs: Counter[tuple[bytes, int]]) -> None:
    dataset = ShardDataset(out)
    halves = random_split(dataset, [0.5, 0.5], torch.Generator().manual_seed(0))
    assert sum((seen(DataLoader(half, 6)) for half in halves), Counter()) == pairs
    samplers = [DistributedSampler(dataset, 4, rank) for rank in range(4)]
    assert sum((seen(DataLoader(dataset, 6, sampler=sampler)) for sampler in samplers), Counter()) == pairs
    assert order(DataLoader(Subset(dataset, [9, 30]), 2)) == [dataset[row][0].numpy().tobytes() for row in (9, 30)]


# Streams


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 3, 4, 41])
def test_every_image_comes_once_whatever_the_ranks_and_workers(
    pixels: Path, pairs: Counter[tuple[bytes, int]], world_size: int, shuffle: bool
) -> None:
    for workers in (0, 1, 3)[: 3 if world_size <= 4 else 1]:
        found: Counter[tuple[bytes, int]] = Counter()
        for rank in range(world_size):
            stream = ShardIterable(pixels, shuffle=shuffle, buffer=9, rank=rank, world_size=world_size)
            images = seen(DataLoader(stream, 5, num_workers=workers))
            assert images.total() == len(stream) in (40 // world_size, 40 // world_size + 1)
            found += images
        assert found == pairs


def test_ranks_have_equally_many_images_if_the_last_are_dropped(pixels: Path) -> None:
    for world_size in (1, 3, 7):
        streams = [
            ShardIterable(pixels, shuffle=True, drop_last=True, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        found = [seen(DataLoader(stream, 5)) for stream in streams]
        assert {each.total() for each in found} == {len(stream) for stream in streams} == {40 // world_size}
        assert len(sum(found, Counter())) == 40 // world_size * world_size


def test_a_stream_is_in_order_unless_shuffled_and_shuffled_by_seed_and_epoch(out: Path) -> None:
    def take(seed: int, epoch: int) -> list[bytes]:
        stream = ShardIterable(out, shuffle=True, seed=seed, buffer=14)
        stream.set_epoch(epoch)
        return order(DataLoader(stream, 8))

    plain = order(DataLoader(ShardDataset(out), 8))
    assert order(DataLoader(ShardIterable(out, buffer=3), 8)) == plain
    orders = [take(0, 0), take(0, 1), take(1, 0), plain]
    assert len({tuple(each) for each in orders}) == 4
    assert len({frozenset(each) for each in orders}) == 1
    assert take(0, 1) == orders[1]
    places = [plain.index(image) for image in orders[0]]
    shards = {place // 7 for place in places[:14]}  # the first buffer holds two or, with the short last, three shards
    assert len(shards) in (2, 3)
    assert places[:14] != sorted(places[:14])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_set_epoch_reaches_workers_that_stay(out: Path, method: str) -> None:
    stream = ShardIterable(out, shuffle=True)
    batches = DataLoader(stream, 8, num_workers=1, persistent_workers=True, multiprocessing_context=method)
    found = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        found.append(order(batches))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_resumes_in_the_middle_of_an_epoch(pixels: Path, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="NOT TESTED: torchdata is not installed")

    def make() -> Any:
        return stateful.StatefulDataLoader(
            ShardIterable(pixels, shuffle=True, seed=5, buffer=11, rank=0, world_size=1), 3, num_workers=workers
        )

    batches = make()
    batches.dataset.set_epoch(2)
    whole = order(batches)
    begun = iter(batches)
    head = order(next(begun) for _ in range(5))
    state = pickle.loads(pickle.dumps(batches.state_dict()))
    assert head + order(begun) == whole
    end = batches.state_dict()

    resumed = make()
    resumed.load_state_dict(state)
    assert head + order(resumed) == whole
    resumed.dataset.set_epoch(3)
    third = order(resumed)
    assert sorted(third) == sorted(whole)
    assert third != whole

    ended = make()
    ended.load_state_dict(end)
    ended.dataset.set_epoch(3)
    assert order(ended) == third


def test_a_stream_goes_on_from_its_state_at_every_image(out: Path) -> None:
    def make() -> ShardIterable:
        return ShardIterable(out, shuffle=True, seed=1, buffer=9, rank=1, world_size=3)

    stream = make()
    stream.set_epoch(4)
    whole = [image.numpy().tobytes() for image, _ in stream]
    for done in range(len(stream) + 1):
        iteration = iter(stream)
        for _ in range(done):
            next(iteration)
        resumed = make()
        resumed.load_state_dict(stream.state_dict())
        assert resumed.state_dict() == stream.state_dict()
        assert [image.numpy().tobytes() for image, _ in resumed] == whole[done:]
        resumed.load_state_dict(stream.state_dict())
        resumed.set_epoch(4)
        assert [image.numpy().tobytes() for image, _ in resumed] == whole[done:]
        resumed.set_epoch(4)
        assert [image.numpy().tobytes() for image, _ in resumed] == whole


def test_a_state_of_another_stream_is_refused(out: Path, pixels: Path) -> None:
    state = ShardIterable(out, shuffle=True).state_dict()
    for stream, difference in [
        (ShardIterable(pixels, shuffle=True), "dataset '"),
        (ShardIterable(out, shuffle=True, seed=1), "seed 0, not 1"),
        (ShardIterable(out, shuffle=True, rank=1, world_size=2), "rank 0, not 1; world_size 1, not 2"),
    ]:
        stream.load_state_dict(state)
        with pytest.raises(UsageError, match=f"a state of another stream cannot be resumed: {difference}"):
            iter(stream)
    stream = ShardIterable(out, shuffle=True)
    stream.load_state_dict(state)
    with pytest.raises(UsageError, match="worker"):
        list(DataLoader(stream, num_workers=2))


def test_ranks_are_those_of_torch_distributed_where_it_is_initialized(out: Path, tmp_path: Path) -> None:
    assert (ShardIterable(out).rank, ShardIterable(out).world_size) == (0, 1)
    processes = [
        multiprocessing.get_context("fork").Process(target=_take_rank, args=(out, tmp_path / "store", rank))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def _take_rank(out: Path, store: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    stream = ShardIterable(out)
    assert (stream.rank, stream.world_size) == loader(out, 4, device="cpu").ranks == (rank, 2)
    torch.distributed.barrier()


# Whole batches


@pytest.mark.parametrize("world_size", [1, 3, 41])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_gives_every_image_once_whatever_the_ranks(
    out: Path, pixels: Path, pairs: Counter[tuple[bytes, int]], world_size: int, shuffle: bool
) -> None:
    for path in (out, pixels):
        loaders = [
            loader(path, 6, device="cpu", shuffle=shuffle, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sum((seen(batches) for batches in loaders), Counter()) == pairs
        for batches in loaders:
            assert len(list(batches)) == len(batches)


def test_a_loader_shuffles_anew_in_each_epoch_by_seed(out: Path) -> None:
    batches = loader(out, 8, device="cpu", shuffle=True, seed=3)
    epochs = [order(batches) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    batches.set_epoch(1)
    assert order(batches) == epochs[1]
    assert order(loader(out, 5, device="cpu", shuffle=True, seed=3)) == epochs[0]
    assert order(loader(out, 5, device="cpu", shuffle=True, seed=4)) != epochs[0]
    plain = loader(out, 8, device="cpu")
    assert order(plain) == order(plain) == order(DataLoader(ShardDataset(out), 40))


def test_a_loader_drops_short_batches_and_uneven_images_alike_on_all_ranks(out: Path) -> None:
    for world_size in (1, 3):
        for rank in range(world_size):
            batches = loader(out, 6, device="cpu", drop_last=True, rank=rank, world_size=world_size)
            assert [len(images) for images, _ in batches] == [6] * (40 // world_size // 6)
            assert len(batches) == 40 // world_size // 6


def test_what_is_written_to_a_batch_is_not_seen_in_the_next_epoch(out: Path, pairs: Counter[tuple[bytes, int]]) -> None:
    batches = loader(out, 7, device="cpu")
    for images, _ in batches:
        images.zero_()
    assert seen(batches) == pairs


def test_a_loader_without_normalization_gives_what_is_stored(pixels: Path) -> None:
    images, _ = next(iter(loader(pixels, 40, device="cpu", normalize=False)))
    np.testing.assert_array_equal(images.numpy(), read_shards(pixels).transpose(0, 3, 1, 2))


def test_a_loader_s_threads_end_with_its_iteration(out: Path) -> None:
    for images, _ in loader(out, 2, device="cpu"):
        assert len(images) == 2
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-npz-loader")]


def test_values_looked_up_by_torch_are_those_of_numpy(pixels: Path) -> None:
    data = gpu_npz.open_dataset(pixels)
    images = torch.from_numpy(data[:].transpose(0, 3, 1, 2))
    found = look_up(torch.from_numpy(data.preprocess.tables(data[:])), images)
    np.testing.assert_array_equal(found.numpy(), data.normalized(slice(None)).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["standardize", "minmax", "maxabs", "l2"])
def test_images_with_tables_of_their_own_are_looked_up_as_numpy_does(
    kind: str, layout: str, make_dataset: MakeDataset
) -> None:
    settings = {"normalize": kind, "layout": layout, "channels": "bgr"}
    data = gpu_npz.open_dataset(make_dataset(dtype="uint8", **settings))
    images = torch.from_numpy(data[:] if layout == "NCHW" else data[:].transpose(0, 3, 1, 2))
    found = look_up(torch.from_numpy(data.preprocess.tables(data[:])), images).numpy()
    built = gpu_npz.open_dataset(make_dataset(**settings))[:]
    np.testing.assert_array_equal(found, built if layout == "NCHW" else built.transpose(0, 3, 1, 2), strict=True)
    batches = [batch.numpy() for batch, _ in loader(data.path, 5, device="cpu")]
    np.testing.assert_array_equal(np.concatenate(batches), found)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["pixels", "blank", "out"])
def test_what_a_device_computes_is_what_the_cpu_does(path: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(path)
    for (images, labels), (expected, wanted) in zip(
        loader(dataset, 6, keep_blank=True), loader(dataset, 6, device="cpu", keep_blank=True), strict=True
    ):
        assert images.device.type == labels.device.type == "cuda"
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), wanted)


def test_a_device_that_is_not_there_is_named(out: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"device 'cuda': PyTorch finds no usable GPU; give device='cpu'"):
        loader(out, 4)


# Training


def test_a_model_trains_on_what_the_shards_hold(out: Path, pixels: Path, pairs: Counter[tuple[bytes, int]]) -> None:
    for batches in (
        DataLoader(ShardDataset(pixels), 8, shuffle=True),
        DataLoader(ShardIterable(out, shuffle=True), 8),
        loader(pixels, 8, device="cpu", shuffle=True),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3)
        )
        losses, used = [], []
        for _ in range(5):
            for images, labels in batches:
                used.append((images.clone(), labels.clone()))
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                model.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for weights in model.parameters():
                        weights -= 0.05 * weights.grad
                losses.append(loss.item())
        assert seen(used) == Counter(dict.fromkeys(pairs, 5))
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_readme_s_example_runs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = readme_example("from gpu_npz.readers.torch import ShardDataset, ShardIterable, collate, loader")
    names: dict[str, Any] = {}
    exec(code.replace("/data/train-npz", str(out)).replace('"cuda"', '"cpu"'), names)
    assert capsys.readouterr().out == "torch.Size([40, 3, 12, 16]) torch.float32 cpu torch.Size([40])\n"
    assert len(names["data"]) == len(names["stream"]) == 40


# What is not sound


def readers(path: Path) -> list[Iterable[Any]]:
    return [
        DataLoader(ShardDataset(path), 4),
        DataLoader(ShardIterable(path), 4),
        loader(path, 4, device="cpu"),
    ]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "no end record"),
        (lambda path: shutil.copy(path.parent / "shard-00001.npz", path), "belongs here"),
        (
            lambda path: np.savez(path, images=np.zeros((7, 3, 12, 16), np.float32)),
            "build or copy it again|damaged|belongs",
        ),
    ],
    ids=["missing", "cut", "another", "not ours"],
)
def test_a_damaged_shard_is_named_by_every_reader(copy: Path, damage: Callable[[Path], object], fault: str) -> None:
    damage(copy / "shard-00002.npz")
    for reader in readers(copy):
        with pytest.raises(FormatError, match=rf"(?s)copy/shard-00002\.npz: .*({fault})"):
            list(reader)


def test_a_damaged_shard_is_named_when_a_worker_reads_it(copy: Path) -> None:
    (copy / "shard-00002.npz").unlink()
    with pytest.raises(FormatError, match=r"copy/shard-00002\.npz: No such file"):
        list(DataLoader(ShardDataset(copy), 20, num_workers=1))


def test_what_a_later_version_made_is_refused(copy: Path) -> None:
    manifest = copy / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2', 1))
    for reader in (ShardDataset, ShardIterable, lambda path: loader(path, 4, device="cpu")):
        with pytest.raises(FormatError, match="install a newer gpu-npz"):
            reader(copy)


def test_numbers_out_of_range_and_no_numbers_are_refused(out: Path) -> None:
    dataset = ShardDataset(out)
    for index in (40, -41):
        with pytest.raises(IndexError, match="40"):
            dataset[index]
        with pytest.raises(IndexError, match="40"):
            dataset.__getitems__([0, index])
    for index in (1.0, slice(3), None, "3"):
        with pytest.raises(TypeError, match="integer"):
            dataset[index]


def test_settings_that_make_no_sense_are_refused(out: Path) -> None:
    for size in (0, -1, 2.5, True):
        with pytest.raises(UsageError, match=rf"batch_size: got {size}; allowed: an integer of 1 or more"):
            loader(out, size, device="cpu")
        with pytest.raises(UsageError, match=rf"buffer: got {size}"):
            ShardIterable(out, buffer=size)
    for rank, world_size in ((1, None), (None, 2), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match=rf"rank {rank}, world_size {world_size}: give both"):
            ShardIterable(out, rank=rank, world_size=world_size)


def test_a_dataset_without_a_row_is_empty(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    path = make_dataset(make_tree({"a/1.jpg": "half", "b/2.jpg": "empty"}))
    assert ShardDataset(path).targets == []
    assert [list(reader) for reader in readers(path)] == [[]] * 3
    with pytest.raises(IndexError):
        ShardDataset(path)[0]


FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from torch.utils.data import DataLoader
from gpu_npz.readers.torch import ShardDataset, ShardIterable, loader

path = sys.argv[1]
for batches in (
    DataLoader(ShardDataset(path), 500, shuffle=True),
    DataLoader(ShardIterable(path, shuffle=True), 500, num_workers=1),
    loader(path, 500, device="cpu", shuffle=True),
):
    found = [label for images, labels in batches for label in labels.tolist()]
    assert [found.count(label) for label in range(10)] == [200] * 10
if sys.platform == "linux":
    with open("/proc/self/maps") as maps:
        assert sum("shard-" in line for line in maps) < 300
"""


def test_all_images_of_2000_shards_are_read_with_300_file_descriptors(many_shards: Path) -> None:
    python("-c", FEW_DESCRIPTORS, many_shards)


def test_without_torch_the_error_says_what_to_install() -> None:
    result = python("-c", "import sys\nsys.modules['torch'] = None\nimport gpu_npz.readers.torch", status=1)
    assert "BackendError: gpu_npz.readers.torch needs PyTorch" in result.stderr
    assert "run: pip install 'torch>=2.2'" in result.stderr


def test_two_datasets_that_are_not_preprocessed_alike_are_told_once(
    out: Path, make_dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_dataset(size=24, normalize="unit")
    for path in (out, other, other, out):
        ShardDataset(path)
        loader(path, 4, device="cpu")
    said = [record.getMessage() for record in caplog.records if str(other) in record.getMessage()]
    assert len([text for text in said if str(out) in text]) == 1
    assert "are preprocessed differently" in said[0]
    assert "mean: (0.0, 0.0, 0.0) and (0.485, 0.456, 0.406)" in said[0]
