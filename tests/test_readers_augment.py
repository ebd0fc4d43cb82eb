"""Random parts of images: distributed as torchvision's, the same for any workers, with the pixels that Pillow makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import MakeDataset, file_bytes, read_shards, readme_example

import gpu_npz
from gpu_npz.errors import UsageError
from gpu_npz.readers.augment import Crops, crops_of, uniform

torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")

from torch.utils.data import DataLoader  # noqa: E402  # after the skip

from gpu_npz.readers.torch import ShardDataset, ShardIterable, collate, loader  # noqa: E402
from gpu_npz.readers.torch_crops import cropped, read  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # workers are forked here on purpose
    "ignore:'set_vital' is deprecated:UserWarning",  # torchdata 0.11 calls it
    "ignore:This DataLoader will create:UserWarning",  # more workers than cores
)
Pixels = NDArray[np.uint8]
RRC: dict[str, Any] = {"augment": "rrc-flip", "size": (20, 24)}


@pytest.fixture(scope="module", params=["NCHW", "NHWC", "gray", "deflated"])
def data(request: pytest.FixtureRequest, make_dataset: MakeDataset) -> gpu_npz.Dataset:
    """40 rows of 30 x 40 pixels in 6 shards. Read only."""
    settings: dict[str, Any] = {
        "gray": {"channels": "gray", "normalize": "unit"},
        "deflated": {"compress": "deflate"},
    }.get(request.param, {"layout": request.param})
    return gpu_npz.open_dataset(make_dataset(dtype="uint8", size="30x40", **settings))


@pytest.fixture(scope="module")
def out(make_dataset: MakeDataset) -> Path:
    """40 rows of 30 x 40 pixels in 6 shards, NCHW. Read only."""
    return make_dataset(dtype="uint8", size="30x40")


@pytest.fixture(scope="module")
def blank(make_dataset: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 rows, of which the last is blank. Read only."""
    root = tmp_path_factory.mktemp("blank")
    for number in range(6):
        (root / f"{number}.jpg").write_bytes(file_bytes("text" if number == 5 else "jpeg", seed=number))
    return make_dataset(root, dtype="uint8", size="30x40", on_reject="blank")


def crops_for(stored: tuple[int, int], seed: int = 0) -> Crops:
    return Crops(stored, (20, 24), (3, 20, 24), "rrc-flip", seed)


def torchvision_s(height: int, width: int, count: int) -> NDArray[np.float64]:
    """Top, left, height and width of parts by the algorithm of torchvision's RandomResizedCrop, one by one."""
    random = np.random.default_rng(7)
    found = []
    for _ in range(count):
        for _ in range(10):
            area = height * width * random.uniform(0.08, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                found.append((random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w))
                break
        else:
            w, h = width, height
            if width / height < 3 / 4:
                h = round(w / (3 / 4))
            elif width / height > 4 / 3:
                w = round(h * (4 / 3))
            found.append(((height - h) // 2, (width - w) // 2, h, w))
    return np.array(found, float)


# The distribution


@pytest.mark.parametrize("stored", [(256, 256), (256, 340), (60, 200), (500, 90)])
def test_parts_are_distributed_as_torchvision_s(stored: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="NOT TESTED: SciPy is not installed")
    count, (height, width) = 20_000, stored
    ours = crops_for(stored).boxes(np.arange(count), 0).astype(float)
    theirs = torchvision_s(height, width, count)
    assert set(ours[:, 4]) == {0, 1}
    assert abs(ours[:, 4].mean() - 0.5) < 4 * 0.5 / math.sqrt(count)

    def quantities(boxes: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        top, left, h, w = boxes[:, :4].T
        return {
            "scale": h * w / (height * width),
            "ratio": w / h,
            "height": h,
            "width": w,
            "top": top,
            "left": left,
            "bottom": top + h,
            "right": left + w,
            "placed": np.where(h < height, top / np.maximum(height - h, 1), 0.5),
            "area and place": h * w + 1000 * left,
        }

    expected = quantities(theirs)
    for name, values in quantities(ours).items():
        assert stats.ks_2samp(values, expected[name]).pvalue > 0.001, name
    assert (ours[:, :4] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_a_small_part_has_any_area_and_ratio_alike() -> None:
    stats = pytest.importorskip("scipy.stats", reason="NOT TESTED: SciPy is not installed")
    boxes = crops_for((4000, 4000)).boxes(np.arange(20_000), 3).astype(float)
    scale = boxes[:, 2] * boxes[:, 3] / 4000**2
    small = scale < 0.7  # they lie in the image with any ratio
    assert stats.kstest(scale[small], stats.uniform(0.08, 0.62).cdf).pvalue > 0.001
    logs = np.log(boxes[small, 3] / boxes[small, 2])
    assert stats.kstest(logs, stats.uniform(math.log(3 / 4), 2 * math.log(4 / 3)).cdf).pvalue > 0.001
    for side, start in ((2, 0), (3, 1)):
        place = boxes[small, start] / (4000 - boxes[small, side])
        assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > 0.001


def test_where_no_part_fits_the_largest_in_the_middle_is_taken() -> None:
    for stored, box in (((10, 1000), [0, 493, 10, 13]), ((1000, 10), [493, 0, 13, 10])):
        boxes = crops_for(stored).boxes(np.arange(100), 0)
        assert (boxes[:, :4] == box).all(axis=1).sum() > 90


def test_random_numbers_are_uniform_and_independent() -> None:
    stats = pytest.importorskip("scipy.stats", reason="NOT TESTED: SciPy is not installed")
    rows = np.arange(5000)
    tables = np.stack([uniform(seed, epoch, rows, 23) for seed in (0, 1, -1) for epoch in (0, 1, 2)])
    assert ((tables >= 0) & (tables < 1)).all()
    assert stats.kstest(tables.ravel(), stats.uniform(0, 1).cdf).pvalue > 0.001
    assert len(np.unique(tables)) == tables.size
    flat = tables.transpose(0, 2, 1).reshape(-1, len(rows))  # by seed, epoch and draw
    correlations = np.abs(np.corrcoef(flat) - np.eye(len(flat)))
    assert correlations.max() < 5.5 / math.sqrt(len(rows))
    assert abs(np.corrcoef(tables[0, :-1, 0], tables[0, 1:, 0])[0, 1]) < 4 / math.sqrt(len(rows))
    picked = rows[[4000, 3, 77]]
    np.testing.assert_array_equal(uniform(1, 2, picked, 23), uniform(1, 2, rows, 23)[picked])
    np.testing.assert_array_equal(uniform(1, np.int64(2), picked, 5), uniform(1, 2, picked, 23)[:, :5])  # type: ignore[arg-type]


# Pixels


def planes(data: gpu_npz.Dataset, image: NDArray[Any]) -> NDArray[Any]:
    return image if data.layout == "NCHW" else image.transpose(2, 0, 1)


def by_pillow(image: Pixels, box: Iterable[int], size: tuple[int, int]) -> Pixels:
    """A part of an image (C, H, W), resized by Pillow, and flipped."""
    top, left, height, width, flipped = box
    resized = [
        np.asarray(Image.fromarray(plane[top : top + height, left : left + width]).resize(size[::-1], Image.BILINEAR))
        for plane in image
    ]
    return np.stack(resized)[:, :, :: -1 if flipped else 1]


@pytest.mark.parametrize("size", [(20, 24), (7, 5), (64, 50), (30, 40)])
def test_pixels_are_pillow_s_give_or_take_a_level_on_the_cpu_and_on_a_device(
    data: gpu_npz.Dataset, size: tuple[int, int]
) -> None:
    rows = np.random.default_rng(0).integers(0, 40, 70)
    crops = crops_of(data, "rrc-flip", size, 5)
    assert crops is not None
    boxes = crops.boxes(rows, 2)
    boxes[0], boxes[1] = (3, 5, *np.minimum(size, (27, 35)), 0), (0, 0, 30, 40, 1)  # nothing to resize; and all
    expected = np.stack(
        [by_pillow(planes(data, data[int(row)]), box, size) for row, box in zip(rows, boxes, strict=True)]
    )
    found = np.empty((len(rows), *crops.shape), np.uint8)
    read(data, rows, boxes, crops, found)
    ours = np.stack([planes(data, image) for image in found]).astype(int)
    assert np.abs(ours - expected).max() <= 1
    assert (ours != expected).mean() < 0.15  # torch's weights have 16 bits or fewer, Pillow's have 22
    stored = torch.from_numpy(data[rows])
    stored = stored if data.layout == "NCHW" else stored.movedim(-1, 1)
    device = cropped(stored, boxes, crops)
    assert (device.dtype, device.stride()) == (torch.uint8, torch.empty_like(device).stride())
    assert device.is_contiguous(memory_format=torch.contiguous_format if data.layout == "NCHW" else torch.channels_last)
    off = np.abs(device.numpy().astype(int) - expected)
    assert off.max() <= 2  # both passes may round differently
    assert (off > 1).mean() < 0.001
    assert (off > 0).mean() < 0.15


def test_pixels_are_those_of_torch_s_crop_and_resize(out: Path) -> None:
    data = gpu_npz.open_dataset(out)
    images, _ = next(iter(loader(out, 40, device="cpu", seed=3, normalize=False, **RRC)))
    crops = crops_of(data, "rrc-flip", (20, 24), 3)
    assert crops is not None
    for row, (top, left, height, width, flipped) in enumerate(crops.boxes(np.arange(40), 0).tolist()):
        part = torch.from_numpy(data[row].copy())[None, :, top : top + height, left : left + width]
        part = torch.nn.functional.interpolate(part, (20, 24), mode="bilinear", antialias=True)[0]
        assert torch.equal(images[row], part.flip(-1) if flipped else part)


def test_normalized_parts_are_those_pixels_normalized(data: gpu_npz.Dataset) -> None:
    for dtype in ("float32", "float16"):
        pixels, _ = next(iter(loader(data, 40, device="cpu", normalize=False, **RRC)))
        values, _ = next(iter(loader(data, 40, device="cpu", dtype=dtype, **RRC)))
        assert pixels.dtype == torch.uint8
        assert values.dtype == getattr(torch, dtype)
        stored = pixels.numpy() if data.layout == "NCHW" else pixels.numpy().transpose(0, 2, 3, 1)
        expected = data.preprocess.tables(stored, dtype)[np.arange(pixels.shape[1])[:, None, None], pixels.numpy()]
        np.testing.assert_array_equal(values.numpy(), expected)
    if data.layout == "NHWC":
        assert values.is_contiguous(memory_format=torch.channels_last)
    images, _ = next(iter(loader(data, 40, device="cpu", channels_last=data.layout == "NCHW", **RRC)))
    np.testing.assert_array_equal(images.numpy(), next(iter(loader(data, 40, device="cpu", **RRC)))[0].numpy())


def test_parts_keep_the_statistics_of_their_whole_image(make_dataset: MakeDataset) -> None:
    data = gpu_npz.open_dataset(make_dataset(dtype="uint8", size="30x40", normalize="standardize"))
    images, _ = next(iter(loader(data, 40, device="cpu", size=16)))
    np.testing.assert_array_equal(images.numpy(), data.normalized(slice(None))[:, :, 7:23, 12:28])


def test_without_augment_the_middle_is_cut_out(data: gpu_npz.Dataset) -> None:
    pixels = np.stack([planes(data, image) for image in data.normalized(slice(None))])
    for size, expected in ((16, pixels[:, :, 7:23, 12:28]), ((30, 21), pixels[:, :, :, 9:30]), ((30, 40), pixels)):
        for batches in (
            loader(data, 40, device="cpu", size=size),
            DataLoader(ShardDataset(data, size=size), 40),
            DataLoader(ShardIterable(data, size=size), 40),
        ):
            images, labels = next(iter(batches))
            np.testing.assert_array_equal(images.numpy(), expected)
            assert labels.tolist() == data.labels.tolist()  # type: ignore[union-attr]


def test_blank_rows_stay_zero(blank: Path) -> None:
    assert read_shards(blank, "valid").tolist() == [True] * 5 + [False]
    for batches in (
        loader(blank, 6, device="cpu", keep_blank=True, **RRC),
        DataLoader(ShardDataset(blank, keep_blank=True, **RRC), 6),
    ):
        images = next(iter(batches))
        assert [bool(image.any()) for image in images] == [True] * 5 + [False]


# The same for everybody


def images_of(batches: Iterable[Any]) -> list[bytes]:
    """All images of an epoch, as bytes."""
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def test_every_reader_with_any_threads_workers_and_ranks_takes_the_same_part_of_a_row(out: Path) -> None:
    dataset = ShardDataset(out, seed=4, **RRC)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        expected = images_of(DataLoader(dataset, 7))
        assert [dataset[row][0].numpy().tobytes() for row in range(40)] == expected
        labels = read_shards(out, "labels").tolist()
        assert [int(label) for _, label in dataset] == labels  # type: ignore[attr-defined]
        for workers in (1, 3):
            batches = DataLoader(dataset, 6, num_workers=workers, collate_fn=collate)
            assert images_of(batches) == expected
            assert [label for _, some in batches for label in some.tolist()] == labels
        for threads in (1, 3):
            batches = loader(out, 9, device="cpu", seed=4, threads=threads, **RRC)
            batches.set_epoch(epoch)
            assert images_of(batches) == expected
        for options in ({}, {"global_batch": 8}, {"shuffle": True}, {"shuffle": True, "global_batch": 8}):
            for world_size, workers in ((1, 0), (1, 2), (3, 1)):
                found = []
                for rank in range(world_size):
                    stream = ShardIterable(out, seed=4, rank=rank, world_size=world_size, **RRC, **options)
                    stream.set_epoch(epoch)
                    batch_size = None if "global_batch" in options else 5
                    found += images_of(DataLoader(stream, batch_size, num_workers=workers))
                assert sorted(found) == sorted(expected)


def test_parts_differ_by_seed_epoch_and_row_and_are_flipped_or_not(out: Path) -> None:
    whole = gpu_npz.open_dataset(out).subset([0] * 40)  # the same image in each row
    found = set()
    for seed in (0, 1):
        batches = loader(whole, 40, device="cpu", seed=seed, **RRC)
        for epoch in range(3):
            images = images_of(batches)
            batches.set_epoch(epoch)
            assert images_of(batches) == images
            found |= set(images)
    assert len(found) > 230  # some parts are equal by chance: there are few in small images


def test_the_parts_after_a_resume_are_those_of_a_run_without(out: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="NOT TESTED: torchdata is not installed")

    def make() -> Any:
        stream = ShardIterable(out, shuffle=True, seed=5, buffer=11, rank=0, world_size=1, **RRC)
        return stateful.StatefulDataLoader(stream, 3, num_workers=2)

    batches = make()
    batches.dataset.set_epoch(2)
    whole = images_of(batches)
    begun = iter(batches)
    head = images_of(next(begun) for _ in range(5))
    resumed = make()
    resumed.load_state_dict(batches.state_dict())
    assert head + images_of(resumed) == whole

    def steps(world_size: int, workers: int, state: dict[str, Any] | None = None) -> list[bytes]:
        parts = []
        for rank in range(world_size):
            stream = ShardIterable(
                out, shuffle=True, global_batch=8, buffer=11, rank=rank, world_size=world_size, **RRC
            )
            stream.set_epoch(1)
            if state is not None:
                stream.load_state_dict(state)
            parts.append(list(DataLoader(stream, None, num_workers=workers)))
        return [image for step in zip(*parts, strict=True) for image in images_of(step)]

    stream = ShardIterable(out, shuffle=True, global_batch=8, buffer=11, rank=0, world_size=1, **RRC)
    stream.set_epoch(1)
    assert steps(1, 2, stream.state_dict(2)) == steps(2, 0, stream.state_dict(2)) == steps(1, 0)[16:]


def test_until_the_epoch_is_set_parts_differ_each_time_by_torch_s_seed(out: Path) -> None:
    dataset = ShardDataset(out, **RRC)

    def epochs(workers: int) -> list[list[bytes]]:
        torch.manual_seed(3)
        batches = DataLoader(dataset, 8, num_workers=workers, persistent_workers=workers == 1)
        return [images_of(batches) for _ in range(2)]

    for workers in (0, 1, 2):
        first, second = epochs(workers)
        assert len(set(first) & set(second)) < 4  # equal by chance
        assert epochs(workers) == [first, second]
    dataset.set_epoch(0)
    first, second = epochs(1)
    assert first == second


def test_views_and_mixes_are_augmented_too(out: Path) -> None:
    data = gpu_npz.open_dataset(out)
    both = gpu_npz.concat([data, data])
    expected = images_of(DataLoader(loader_dataset(both), 16))
    assert len(set(expected)) > 76
    mixed = gpu_npz.mix({data: 1, data.where(label="berries"): 1})
    batches = loader(mixed, 8, device="cpu", **RRC)
    stream = ShardIterable(mixed, shuffle=True, rank=0, world_size=1, **RRC)
    for epoch in range(2):
        stream.set_epoch(epoch)
        assert sorted(images_of(batches)) == sorted(images_of(DataLoader(stream, 8)))


def loader_dataset(data: gpu_npz.View) -> ShardDataset:
    dataset = ShardDataset(data, **RRC)
    dataset.set_epoch(0)
    return dataset


def test_a_transform_gets_the_part(out: Path) -> None:
    dataset = ShardDataset(out, lambda image: image.shape, lambda label: -label, **RRC)
    assert dataset[3] == ((3, 20, 24), -read_shards(out, "labels")[3])


def test_the_readme_s_example_runs(out: Path, make_dataset: MakeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    code = readme_example(
        'train = loader("/data/train-256", 256, device="cuda", shuffle=True, augment="rrc-flip", size=224)'
    )
    other = make_dataset(dtype="uint8", size="256", limit=3)
    names: dict[str, Any] = {}
    for path, to in (("/data/train-256", out), ("/data/valid-256", other), ("cuda", "cpu")):
        code = code.replace(path, str(to))
    exec(code, names)
    assert capsys.readouterr().out == "torch.Size([40, 3, 224, 224]) torch.float32\n"
    assert next(iter(names["valid"]))[0].shape == (3, 3, 224, 224)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [None, False, True])
def test_a_gpu_gives_the_parts_that_the_cpu_gives(data: gpu_npz.Dataset, channels_last: bool | None) -> None:
    options = {"seed": 2, "channels_last": channels_last, "normalize": False, **RRC}
    for (images, labels), (expected, wanted) in zip(
        loader(data, 16, **options), loader(data, 16, device="cpu", **options), strict=True
    ):
        assert images.device.type == labels.device.type == "cuda"
        assert (images.cpu().int() - expected.int()).abs().max() <= 2
        assert torch.equal(labels.cpu(), wanted)


# What is refused


READERS: list[Callable[..., object]] = [
    ShardDataset,
    ShardIterable,
    lambda path, **options: loader(path, 4, device="cpu", **options),
]


@pytest.mark.parametrize("reader", READERS, ids=["dataset", "stream", "loader"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "randaugment"}, "augment: got 'randaugment'; allowed: 'rrc-flip' or None"),
        ({"augment": True}, "augment: got True"),
        ({"augment": "rrc-flip", "size": 0}, r"size: got 0; allowed: a number of pixels above 0, or \(height, width\)"),
        ({"size": -3}, "size: got -3"),
        ({"size": True}, "size: got True"),
        ({"size": 2.5}, "size: got 2.5"),
        ({"size": (3,)}, r"size: got \(3,\)"),
        ({"size": (3, 4, 5)}, r"size: got \(3, 4, 5\)"),
        ({"size": "224"}, "size: got '224'"),
        ({"size": 31}, "size: got 31, more than the stored 30 x 40, .*; give at most this size, or augment='rrc-flip'"),
        ({"size": (30, 41)}, r"size: got \(30, 41\), more than"),
    ],
)
def test_what_cannot_be_cropped_is_refused(
    out: Path, reader: Callable[..., object], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        reader(out, **options)


@pytest.mark.parametrize("reader", READERS, ids=["dataset", "stream", "loader"])
def test_datasets_without_pixels_are_refused(reader: Callable[..., object], make_dataset: MakeDataset) -> None:
    path = make_dataset(limit=3)
    for options in (RRC, {"size": 3}):
        with pytest.raises(UsageError, match=f"'{path}' stores float32; build it with --dtype uint8"):
            reader(path, **options)
