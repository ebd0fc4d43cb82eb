"""Ways to deliver images to training in shuffled batches: a plain loop, our readers, image files, and other libraries.

All deliver the same images, as stored or normalized to float32; or random crops of them, flipped or not, as torchvision
makes them. Each way has a function that prepares what it reads, and returns its epochs. Its library is imported on its
first use.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..preprocess.normalize import statistics
from ..readers.augment import Augment
from ..readers.dataset import Dataset, open_dataset
from ..readers.order import shuffled

Epochs = Callable[[int], Iterable[Any]]  # the batches of an epoch, by its number: (images, labels)


@dataclass(frozen=True)
class Loading:
    """What is loaded, and how.

    Attributes:
        source: the folder of the image files.
        out: the dataset that was built from them; uint8 (N, C, H, W) with labels, unless only DataLoaders read it.
        place: an existing folder for files of this way.
        batch_size: images per batch.
        workers: threads of `loader` and FFCV, worker processes of the other ways.
        stored: whether to deliver images as stored, rather than normalized float32.
        augment: "rrc-flip" to deliver random crops, rather than whole images.
        size: height and width to which crops are resized, in pixels; None without `augment`.
    """

    source: Path
    out: Path
    place: Path
    batch_size: int
    workers: int
    stored: bool = False
    augment: Augment | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Library:
    """A library that a way needs beside PyTorch.

    Attributes:
        name: its distribution.
        install: the command that installs it.
    """

    name: str
    install: str


@dataclass(frozen=True)
class Way:
    """A way to deliver images.

    Attributes:
        name: what tables call it.
        prepare: prepares what it reads, and returns its epochs.
        library: the library that it needs; None for PyTorch alone.
        augments: the values of `Loading.augment` that it can do.
    """

    name: str
    prepare: Callable[[Loading], Epochs]
    library: Library | None = None
    augments: tuple[Augment | None, ...] = (None,)


def loop(loading: Loading) -> Epochs:
    """One thread copies or normalizes row by row into a buffer that is used for all batches."""
    data = open_dataset(loading.out)
    labels = data.labels
    assert labels is not None
    values = data.preprocess.tables(data[0])
    images = np.empty((loading.batch_size, *data.image_shape), data.dtype if loading.stored else np.float32)

    def batches(epoch: int) -> Iterator[Any]:
        order = shuffled(np.arange(len(data)), 0, epoch)
        for start in range(0, len(order), loading.batch_size):
            rows = order[start : start + loading.batch_size]
            for place, row in enumerate(rows.tolist()):
                if loading.stored:
                    np.copyto(images[place], data[row])
                    continue
                for table, pixels, plane in zip(values, data[row], images[place], strict=True):
                    np.take(table, pixels, out=plane, mode="clip")
            yield images[: len(rows)], labels[rows]

    return batches


def loader(loading: Loading) -> Epochs:
    """Our `loader`."""
    from ..readers import torch as reader

    found = reader.loader(
        loading.out,
        loading.batch_size,
        device="cpu",
        shuffle=True,
        threads=max(1, loading.workers),
        **_of_reader(loading),
    )
    return _numbered(found, found)


def shard_dataset(loading: Loading, *, collated: bool = False) -> Epochs:
    """A DataLoader over our ShardDataset, with our `collate` or torch's."""
    from ..readers import torch as reader

    options = {"collate_fn": reader.collate} if collated else {}
    dataset = reader.ShardDataset(loading.out, **_of_reader(loading))
    return _data_loader(dataset, loading, shuffle=True, **options)


def shard_iterable(loading: Loading, *, whole: bool = False) -> Epochs:
    """A DataLoader over our ShardIterable, which streams single images or whole batches."""
    from ..readers import torch as reader

    given: dict[str, Any] = {}
    if whole:
        given = {"global_batch": loading.batch_size, "lanes": math.gcd(loading.batch_size, 8)}
    stream = reader.ShardIterable(loading.out, shuffle=True, **_of_reader(loading), **given)
    found = _data_loader(stream, loading, **({"batch_size": None} if whole else {}))
    return _numbered(found(0), stream)


def image_files(loading: Loading) -> Epochs:
    """A DataLoader over image files, which are decoded each time."""
    data = open_dataset(loading.out)
    values = data.preprocess if loading.stored else data.preprocess.normalized
    return _data_loader(_Files(loading, data, values), loading, shuffle=True)


def torchvision_files(loading: Loading) -> Epochs:
    """A DataLoader over image files, of which torchvision decodes, crops and flips each one every time."""
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    data = open_dataset(loading.out)
    steps = [default_loader, transforms.RandomResizedCrop(loading.size), transforms.RandomHorizontalFlip()]
    if loading.stored:
        steps += [transforms.PILToTensor()]
    else:
        mean, std = ([float(number) for number in numbers] for numbers in statistics(data.manifest.config) or ())
        steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return _data_loader(_Files(loading, data, transforms.Compose(steps)), loading, shuffle=True)


def ffcv(loading: Loading) -> Epochs:
    """FFCV's Loader over raw pixels."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    data = open_dataset(loading.out)
    path = os.fspath(loading.place / "images.beton")
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(_Pixels(data))
    images = [SimpleRGBImageDecoder()]
    if loading.augment:
        images = [RandomResizedCropRGBImageDecoder(loading.size), RandomHorizontalFlip()]
    if not loading.stored:
        mean, std = (np.array(numbers, np.float64) * 255 for numbers in statistics(data.manifest.config) or ())
        images += [NormalizeImage(mean, std, np.float32)]
    found = Loader(
        path,
        batch_size=loading.batch_size,
        num_workers=max(1, loading.workers),
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines={
            "image": [*images, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze([1])],
        },
    )
    return lambda epoch: found


def litdata(loading: Loading) -> Epochs:
    """LitData's StreamingDataLoader over chunks on the disk."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[name] = os.fspath(loading.place / name)  # it would empty /tmp/chunks and /tmp/data
    data = open_dataset(loading.out)
    optimize(
        fn=functools.partial(_sample, data),
        inputs=list(range(len(data))),
        output_dir=os.fspath(loading.place / "chunks"),
        num_workers=1,
        chunk_bytes="64MB",
    )
    dataset = StreamingDataset(os.fspath(loading.place / "chunks"), shuffle=True)
    found = StreamingDataLoader(dataset, collate_fn=_Collate(data, loading.stored), **_of_data_loader(loading))
    return lambda epoch: found


def mosaicml(loading: Loading) -> Epochs:
    """MosaicML's StreamingDataset over MDS shards on the disk."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    data = open_dataset(loading.out)
    path = os.fspath(loading.place / "mds")
    columns = {"image": f"ndarray:{data.dtype}:{','.join(map(str, data.image_shape))}", "label": "int"}
    with MDSWriter(out=path, columns=columns) as writer:
        for row in range(len(data)):
            writer.write(_sample(data, row))
    dataset = StreamingDataset(local=path, shuffle=True, batch_size=loading.batch_size)
    found = StreamingDataLoader(dataset, collate_fn=_Collate(data, loading.stored), **_of_data_loader(loading))
    return lambda epoch: found


LOOP, LOADER = "loop", "loader"
_EITHER: tuple[Augment | None, ...] = (None, "rrc-flip")
WAYS = (
    Way(LOOP, loop),
    Way(LOADER, loader, augments=_EITHER),
    Way("DataLoader, collate", functools.partial(shard_dataset, collated=True), augments=_EITHER),
    Way("DataLoader", shard_dataset, augments=_EITHER),
    Way("ShardIterable", shard_iterable, augments=_EITHER),
    Way("ShardIterable, global_batch", functools.partial(shard_iterable, whole=True), augments=_EITHER),
    Way("image files", image_files),
    Way("image files", torchvision_files, Library("torchvision", "pip install torchvision"), ("rrc-flip",)),
    Way(
        "FFCV",
        ffcv,
        Library(
            "ffcv",
            "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install 'setuptools<81' numba "
            "opencv-python-headless && pip install --no-build-isolation ffcv",
        ),
        _EITHER,
    ),
    Way("LitData", litdata, Library("litdata", "pip install litdata")),
    Way("MosaicML Streaming", mosaicml, Library("mosaicml-streaming", "pip install mosaicml-streaming")),
)


def _numbered(batches: Iterable[Any], of_epochs: Any) -> Epochs:
    """Epochs of batches whose order `of_epochs` decides."""

    def epoch(number: int) -> Iterable[Any]:
        of_epochs.set_epoch(number)
        return batches

    return epoch


def _of_reader(loading: Loading) -> dict[str, Any]:
    return {"normalize": not loading.stored, "augment": loading.augment, "size": loading.size}


def _of_data_loader(loading: Loading) -> dict[str, Any]:
    workers = loading.workers
    return {"batch_size": loading.batch_size, "num_workers": workers, "persistent_workers": workers > 0}


def _data_loader(dataset: Any, loading: Loading, **options: Any) -> Epochs:
    from ..readers import torch as reader

    found = reader.torch.utils.data.DataLoader(  # type: ignore[attr-defined]  # torch is imported only in that module
        dataset, **{**_of_data_loader(loading), **options}
    )
    return lambda epoch: found


def _sample(data: Dataset, row: int) -> dict[str, Any]:
    assert data.labels is not None
    return {"image": np.array(data[row]), "label": int(data.labels[row])}


class _Collate:
    """What a DataLoader makes of samples with stored images, as `_sample` returns them."""

    def __init__(self, data: Dataset, stored: bool) -> None:
        self._values: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray if stored else data.preprocess.values

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        from ..readers.torch import collate

        return collate([(self._values(sample["image"]), sample["label"]) for sample in samples])


class _Pixels:
    """The images and labels of a dataset, uint8 (H, W, C)."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> tuple[NDArray[Any], int]:
        sample = _sample(self._data, row)
        return np.ascontiguousarray(sample["image"].transpose(1, 2, 0)), sample["label"]


class _Files:
    """The images of a dataset, which `values` makes of their files when they are requested, like an ImageFolder."""

    def __init__(self, loading: Loading, data: Dataset, values: Callable[[str], Any]) -> None:
        self._paths = [os.path.join(loading.source, path) for path in data.paths]
        self._labels = None if data.labels is None else data.labels.tolist()
        self._last = data.layout == "NHWC"
        self._values = values

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        image = self._values(self._paths[number])
        if self._last:
            image = image.transpose(2, 0, 1)
        return image, 0 if self._labels is None else self._labels[number]
