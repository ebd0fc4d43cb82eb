"""Gives a finished dataset to PyTorch: image by image, as a stream of shards, or as whole batches on a device.

Images are tensors (C, H, W), whatever the layout of the shards: NHWC is permuted without a copy, so its batches are
`channels_last`. They are float32 and normalized, even if uint8 pixels or float16 are stored; `normalize=False` gives
the stored values. Datasets with labels give (image, label) pairs, datasets without labels only images. The zero rows of
`--on-reject blank` are omitted unless `keep_blank`.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import BackendError, UsageError
from .buffers import Buffers
from .contract import compare_with_others
from .dataset import Dataset
from .order import Places, kept_rows, part, require_natural, windows

try:
    import torch
    import torch.distributed
    import torch.utils.data
except ImportError as exc:
    raise BackendError(f"gpu_npz.readers.torch needs PyTorch ({exc}); run: pip install 'gpu-npz[torch]'") from exc

from .torch_loader import Loader, loader, look_up, ranks
from .torch_workers import KEPT, Batch, collate, shared_buffers, tensor

__all__ = ["Loader", "ShardDataset", "ShardIterable", "collate", "loader", "look_up"]

Transform = Callable[[Any], Any]
_CHUNK = 16  # rows that a stream reads at a time


class ShardDataset(torch.utils.data.Dataset[Any]):
    """The images of OUT by index, in the form of torchvision's ImageFolder: (image, label), where the label is an int.

    If nothing has to be computed, an image is a view of the mapped shard, which is read on access. Changes to a view
    stay in this process, but are visible in later views of the image. A transform gets its own copy, so it may work in
    place. A DataLoader reads each batch at once (`__getitems__`), which keeps no shard open; with `collate_fn=collate`,
    it also passes it on as a whole.

    It may be used by threads, after a fork, and by DataLoader workers with any start method: fork, spawn or forkserver.

    Attributes:
        data: the dataset as arrays, with `paths`, `manifest` and so on.
        rows: the row of each image in `data`, int64 (N,).
        classes: the class names by label; None without classes.
        class_to_idx: the labels by class name; None without classes.
        targets: the label of each image, from index.npz, so that no shard is opened; None without labels.

    Args:
        path: OUT.
        transform: applied to the image, a tensor (C, H, W).
        target_transform: applied to the label.
        normalize: False gives the stored values.
        keep_blank: keep the zero rows of `--on-reject blank`.

    Raises:
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`; on access, FormatError names the
            shard.
        IndexError: on access, an index is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        *,
        normalize: bool = True,
        keep_blank: bool = False,
    ) -> None:
        self.data = Dataset(path)
        compare_with_others(self.data)
        self.rows: Places = kept_rows(self.data, keep_blank)
        self.transform = transform
        self.target_transform = target_transform
        self.normalize = normalize
        self._buffers, self._shared = Buffers(KEPT), shared_buffers()
        names = self.data.class_names
        self.classes = None if names is None else list(names)
        self.class_to_idx = None if names is None else {name: label for label, name in enumerate(names)}

    @functools.cached_property
    def targets(self) -> list[Any] | None:
        """The label of each image; with several label columns, a list per image."""
        return None if self.data.labels is None else self.data.labels[self.rows].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = int(self.rows[operator.index(index)])
        image = self.data.normalized(row) if self.normalize else self.data[row]
        if self.transform is not None and not image.flags.owndata:
            image = image.copy()
        return self._sample(tensor(image, self.data.manifest.images.layout), row)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The images of a batch, which are read at once, into memory that is used again when all of them are gone."""
        rows = self.rows[[operator.index(index) for index in indices]]
        buffers = self._buffers if torch.utils.data.get_worker_info() is None else self._shared
        dtype = np.dtype(np.float32) if self.normalize else self.data.dtype
        images = buffers.take((len(rows), *self.data.image_shape), dtype)
        self.data.read(rows, images, normalize=self.normalize)
        layout = self.data.manifest.images.layout
        if self.transform is None and self.target_transform is None:
            return Batch(images, None if self.data.labels is None else self.data.labels[rows], layout)
        return [self._sample(image, row) for image, row in zip(tensor(images, layout), rows.tolist(), strict=True)]

    def _sample(self, image: torch.Tensor, row: int) -> Any:
        value = image if self.transform is None else self.transform(image)
        if self.data.labels is None:
            return value
        label = self.data.labels[row]
        label = torch.from_numpy(label) if label.ndim else label.item()
        return value, label if self.target_transform is None else self.target_transform(label)


class ShardIterable(torch.utils.data.IterableDataset[Any]):
    """The images of OUT as a stream, shard by shard, for disks with slow random access.

    With `shuffle`, each epoch has its own order of shards, and within every `buffer` consecutive images the order is
    random. The buffer holds row numbers, not images, so it needs hardly any memory. Class folders that were built
    without `--shuffle` have shards of a single class; they need a buffer of many shards.

    The sequence of an epoch is divided among the ranks, and each rank's part among its DataLoader workers. So every
    image comes exactly once, and the parts differ by at most one image: the last batch of a worker may be smaller, and
    one rank may have one batch more than another. If all ranks must take the same number of steps, as with
    DistributedDataParallel, `drop_last` omits the surplus images, which are fewer than the ranks; with `shuffle`, other
    images are omitted in each epoch.

    The order is that of epoch 0 until `set_epoch` is called, which also reaches persistent workers. `state_dict` and
    `load_state_dict` let torchdata's StatefulDataLoader resume in the middle of an epoch.

    Attributes:
        dataset: the same images by index.
        rank: the rank of this process.
        world_size: how many processes share an epoch.

    Args:
        path: OUT.
        transform: as for ShardDataset; a transform may work in place.
        target_transform: as for ShardDataset.
        shuffle: whether to shuffle.
        seed: decides the order.
        buffer: how many consecutive images are shuffled together.
        rank: defaults to that of torch.distributed if it is initialized, else 0.
        world_size: defaults to that of torch.distributed if it is initialized, else 1.
        drop_last: give all ranks the same number of images.
        normalize: as for ShardDataset.
        keep_blank: as for ShardDataset.

    Raises:
        UsageError: a value that is not allowed; when an iteration begins, a state of another stream.
        IncompleteError, FormatError, StorageError: as for ShardDataset.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 16_384,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        normalize: bool = True,
        keep_blank: bool = False,
    ) -> None:
        require_natural(buffer=buffer)
        self.dataset = ShardDataset(path, transform, target_transform, normalize=normalize, keep_blank=keep_blank)
        self.rank, self.world_size = ranks(rank, world_size)
        self._seed = seed if shuffle else None
        self._buffer = buffer
        self._drop_last = drop_last
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # untyped in torch; workers see what set_epoch writes
        self._begun = 0, 0  # of the latest iteration: its epoch, and how many images it has given
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Images of this rank per epoch, over all workers. Each worker makes its own last batch."""
        start, stop = self._run()
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, which starts at its beginning unless a state of it was loaded."""
        self._epoch.fill_(epoch)
        if self._resumed is not None and self._resumed["epoch"] != epoch:
            self._resumed = None

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            epoch, done = int(self._epoch), 0
        else:
            _require_same(resumed, self._identity())
            epoch, done = resumed["epoch"], resumed["done"]
        self._begun = epoch, done
        return self._samples(epoch, done)

    def state_dict(self) -> dict[str, Any]:
        """The position of the latest iteration in this process, for `load_state_dict`; it can be stored as JSON."""
        if self._resumed is not None:
            return self._resumed
        epoch, done = self._begun
        return {**self._identity(), "epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration resume at a state of the same rank and worker, with as many ranks and workers."""
        self._resumed = dict(state)

    def _samples(self, epoch: int, done: int) -> Iterator[Any]:
        start, stop = self._run()
        worker, workers = _worker()
        first, last = part(stop - start, worker, workers)
        ends = np.cumsum(self.dataset.data.shard_rows)
        bounds = np.searchsorted(self.dataset.rows, np.concatenate([[0], ends]))
        skipped = done % self._buffer
        begin = start + first + done - skipped
        for places in windows(bounds, begin, start + last, self._buffer, self._seed, epoch):
            for at in range(skipped, len(places), _CHUNK):
                for sample in self.dataset.__getitems__(places[at : at + _CHUNK].tolist()):
                    done += 1
                    self._begun = epoch, done
                    yield sample
            skipped = 0

    def _run(self) -> tuple[int, int]:
        count = len(self.dataset)
        if self._drop_last:
            count -= count % self.world_size
        return part(count, self.rank, self.world_size)

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the images of this process's stream and their order."""
        worker, workers = _worker()
        return {
            "dataset": self.dataset.data.manifest.id,
            "images": len(self.dataset),
            "seed": self._seed,
            "buffer": self._buffer,
            "drop_last": self._drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker,
            "workers": workers,
        }


def _worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _require_same(state: dict[str, Any], own: dict[str, Any]) -> None:
    others = [f"{name} {state.get(name)!r}, not {value!r}" for name, value in own.items() if state.get(name) != value]
    if others or not {"epoch", "done"} <= state.keys():
        raise UsageError(
            f"a state of another stream cannot be resumed: {'; '.join(others) or 'no epoch'}; make the dataset and its "
            "loader as they were, or begin the epoch anew"
        )
