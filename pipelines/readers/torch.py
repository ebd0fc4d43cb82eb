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

from ..errors import BackendError, UsageError, install_command
from ..machine.environment import usable_cpus
from .buffers import Buffers
from .contract import compare_with_others
from .dataset import Dataset
from .order import ElasticOrder, Places, kept_rows, part, require_natural, windows

try:
    import torch
    import torch.distributed
    import torch.utils.data
except ImportError as exc:
    raise BackendError(f"gpu_npz.readers.torch needs PyTorch ({exc}); run: {install_command('torch')}") from exc

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
        alone = torch.utils.data.get_worker_info() is None
        buffers = self._buffers if alone else self._shared
        dtype = np.dtype(np.float32) if self.normalize else self.data.dtype
        images = buffers.take((len(rows), *self.data.image_shape), dtype)
        # Inflating takes long enough to be worth threads; workers are processes, which share the cores already.
        threads = usable_cpus() if alone and self.data.manifest.deflated else 1
        self.data.read(rows, images, normalize=self.normalize, threads=threads)
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

    With `global_batch`, the stream gives whole batches, (images, labels) or images, for a DataLoader with
    `batch_size=None`. The images of each step are the same with any number of ranks, which share them, and of workers,
    which take turns. So an epoch can be resumed with other numbers of both: `state_dict(step)` in the main process is
    the state after so many steps of the epoch, and after `load_state_dict` there, that epoch begins at this step, until
    `set_epoch` sets another epoch. The images that do not fill a step form a smaller last one, in which a rank may have
    no batch; `drop_last`, recommended with DistributedDataParallel, omits it. A rank reads from few shards at a time
    where the number of ranks divides `lanes`.

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
        drop_last: give all ranks the same number of images; with `global_batch`, omit the smaller last step.
        normalize: as for ShardDataset.
        keep_blank: as for ShardDataset.
        global_batch: images per step of all ranks together; the stream gives single images unless set.
        lanes: with `global_batch`, which it divides: the parts of the order from which each step takes equally many.

    Raises:
        UsageError: a value that is not allowed; when an iteration begins, or, with `global_batch`, when a state is
            loaded, a state of another stream.
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
        global_batch: int | None = None,
        lanes: int = 8,
    ) -> None:
        require_natural(buffer=buffer, lanes=lanes)
        self.dataset = ShardDataset(path, transform, target_transform, normalize=normalize, keep_blank=keep_blank)
        self.rank, self.world_size = ranks(rank, world_size)
        self._seed = seed if shuffle else None
        self._buffer = buffer
        self._drop_last = drop_last
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # untyped in torch; workers see what set_epoch writes
        self._keep_blank = keep_blank
        self._global_batch, self._lanes = global_batch, lanes
        if global_batch is not None:
            require_natural(global_batch=global_batch)
            if global_batch % lanes or global_batch < self.world_size:
                raise UsageError(
                    f"global_batch: got {global_batch}; needs a multiple of lanes ({lanes}), at least one image a rank"
                )
        self._loaded = torch.full((2,), -1)  # with global_batch: the epoch and the step of the state that was loaded
        self._loaded.share_memory_()  # type: ignore[no-untyped-call]
        self._begun = 0, 0  # of the latest iteration: its epoch, and how many images it has given
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Images of this rank per epoch, over all workers. Each worker makes its own last batch.

        With `global_batch`, the batches of this rank per epoch, also of one that is resumed.
        """
        if self._global_batch is not None:
            return self._steps(self._elastic(int(self._epoch)))
        start, stop = self._run()
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, which starts at its beginning unless a state of it was loaded."""
        self._epoch.fill_(epoch)
        if int(self._loaded[0]) != epoch:
            self._loaded.fill_(-1)
        if self._resumed is not None and self._resumed["epoch"] != epoch:
            self._resumed = None

    def __iter__(self) -> Iterator[Any]:
        if self._global_batch is not None:
            return self._batches(*self._resumed_at())
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            epoch, done = int(self._epoch), 0
        else:
            _require_same(resumed, self._identity(), {"epoch", "done"})
            epoch, done = resumed["epoch"], resumed["done"]
        self._begun = epoch, done
        return self._samples(epoch, done)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The position of the latest iteration in this process, for `load_state_dict`; it can be stored as JSON.

        Args:
            step: with `global_batch`, how many steps of the epoch are done, counted by the caller; by default those of
                the latest iteration in this process, which a DataLoader with workers does not have.

        Raises:
            UsageError: with `global_batch`, if a worker is asked.
        """
        if self._global_batch is not None:
            if torch.utils.data.get_worker_info() is not None:
                raise UsageError(
                    "a stream with global_batch has one state, in the main process; use torch's DataLoader"
                )
            epoch, done = self._begun if step is None else (self._resumed_at()[0], step)
            return {**self._elastic_identity(), "epoch": epoch, "step": done}
        if self._resumed is not None:
            return self._resumed
        epoch, done = self._begun
        return {**self._identity(), "epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration resume at a state of the same rank and worker, with as many ranks and workers.

        With `global_batch`, ranks and workers do not matter.
        """
        if self._global_batch is not None:
            _require_same(state, self._elastic_identity(), {"epoch", "step"})
            self._epoch.fill_(state["epoch"])
            self._loaded.copy_(torch.tensor([state["epoch"], state["step"]]))
            self._begun = state["epoch"], state["step"]
            return
        self._resumed = dict(state)

    def _samples(self, epoch: int, done: int) -> Iterator[Any]:
        start, stop = self._run()
        worker, workers = _worker()
        first, last = part(stop - start, worker, workers)
        bounds = self._bounds()
        skipped = done % self._buffer
        begin = start + first + done - skipped
        for places in windows(bounds, begin, start + last, self._buffer, self._seed, epoch):
            for at in range(skipped, len(places), _CHUNK):
                for sample in self.dataset.__getitems__(places[at : at + _CHUNK].tolist()):
                    done += 1
                    self._begun = epoch, done
                    yield sample
            skipped = 0

    def _bounds(self) -> Places:
        """Shard k has the images from bounds[k] up to bounds[k + 1]."""
        ends = np.cumsum(self.dataset.data.shard_rows)
        bounds: Places = np.searchsorted(self.dataset.rows, np.concatenate([[0], ends]))
        return bounds

    def _resumed_at(self) -> tuple[int, int]:
        """The epoch and the step at which the next iteration begins."""
        epoch, loaded = int(self._epoch), self._loaded.tolist()
        return epoch, loaded[1] if loaded[0] == epoch else 0

    def _elastic(self, epoch: int) -> ElasticOrder:
        assert self._global_batch is not None
        return ElasticOrder(
            self._bounds(), self._global_batch, self._lanes, self._buffer, self._seed, epoch, self._drop_last
        )

    def _steps(self, order: ElasticOrder) -> int:
        """The steps in which this rank has a batch."""
        assert self._global_batch is not None
        left = len(self.dataset) % self._global_batch
        start, stop = part(left, self.rank, self.world_size)
        return order.steps - (not self._drop_last and left > 0 and start == stop)

    def _batches(self, epoch: int, first: int) -> Iterator[Any]:
        """This worker's share of the rank's batches from step `first` on."""
        order = self._elastic(epoch)
        worker, workers = _worker()
        self._begun = epoch, first
        for step in range(first + worker, self._steps(order), workers):
            places = order.step(step)
            start, stop = part(len(places), self.rank, self.world_size)
            samples = self.dataset.__getitems__(places[start:stop].tolist())
            self._begun = epoch, step + 1
            yield collate(samples)

    def _elastic_identity(self) -> dict[str, Any]:
        """Everything that decides the images of each step."""
        return {
            "dataset": self.dataset.data.manifest.id,
            "rows": len(self.dataset),
            "seed": self._seed or 0,
            "shuffle": self._seed is not None,
            "global_batch": self._global_batch,
            "lanes": self._lanes,
            "buffer": self._buffer,
            "keep_blank": self._keep_blank,
        }

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


def _require_same(state: dict[str, Any], own: dict[str, Any], position: set[str]) -> None:
    others = [f"{name} {state.get(name)!r}, not {value!r}" for name, value in own.items() if state.get(name) != value]
    if others or not position <= state.keys():
        raise UsageError(
            f"a state of another stream cannot be resumed: {'; '.join(others) or 'no epoch'}; make the dataset and its "
            "loader as they were, or restart the epoch"
        )
