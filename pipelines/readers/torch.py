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
from .augment import Augment, Size, crops_of
from .buffers import Buffers
from .combine import Openable, opened
from .contract import compare_with_others
from .order import ElasticOrder, Places, kept_rows, part, require_natural, shards_in, share, windows

try:
    import torch
    import torch.distributed
    import torch.utils.data
except ImportError as exc:
    raise BackendError(f"gpu_npz.readers.torch needs PyTorch ({exc}); run: {install_command('torch')}") from exc

from .torch_crops import read
from .torch_loader import Loader, loader, look_up, ranks
from .torch_workers import KEPT, Batch, Step, collate, shared_buffers, tensor

__all__ = ["Loader", "ShardDataset", "ShardIterable", "collate", "loader", "look_up"]

Transform = Callable[[Any], Any]
_CHUNK = 16  # rows that a stream reads at a time


class ShardDataset(torch.utils.data.Dataset[Any]):
    """The images of OUT by index, in the form of torchvision's ImageFolder: (image, label), where the label is an int.

    With a mix, `set_epoch` decides which of its rows these are; they are those of epoch 0 until it is called.

    With `augment="rrc-flip"`, each image is a random part of the stored one, resized, and flipped half of the time, as
    by torchvision's RandomResizedCrop and RandomHorizontalFlip. After `set_epoch`, the parts depend only on `seed`, the
    epoch and the row. Until then, they depend on torch's random numbers, as a transform would, and differ each time.

    If nothing has to be computed, an image is a view of the mapped shard, which is read on access. Changes to a view
    stay in this process, but are visible in later views of the image. A transform gets its own copy, so it may work in
    place. A DataLoader reads each batch at once (`__getitems__`), which keeps no shard open; with `collate_fn=collate`,
    it also passes it on as a whole.

    It may be used by threads, after a fork, and by DataLoader workers with any start method: fork, spawn or forkserver.

    Attributes:
        data: the dataset as arrays, with `paths`, `manifest` and so on.
        classes: the class names by label; None without classes.
        class_to_idx: the labels by class name; None without classes.
        targets: the label of each image, from index.npz, so that no shard is opened; None without labels.

    Args:
        path: OUT, or a dataset, view or mix.
        transform: applied to the image, a tensor (C, H, W).
        target_transform: applied to the label.
        normalize: False gives the stored values.
        keep_blank: keep the zero rows of `--on-reject blank`.
        augment: "rrc-flip" for random parts.
        size: height and width of images, or one number for both; as stored by default. Without `augment`, the middle of
            the stored image is cut out.
        seed: decides the random parts.
        cache, cache_size: as for `gpu_npz.open_dataset`. Batches of a DataLoader fetch whole shards in the background.

    Raises:
        UsageError: a value that is not allowed.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`; on access, FormatError names the
            shard.
        IndexError: on access, an index is out of range.
    """

    def __init__(
        self,
        path: Openable,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        *,
        normalize: bool = True,
        keep_blank: bool = False,
        augment: Augment | None = None,
        size: Size | None = None,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
    ) -> None:
        self.data = opened(path, cache, cache_size)
        compare_with_others(self.data)
        self._keep_blank = keep_blank
        self._crops = crops_of(self.data, augment, size, seed)
        self._epoch = _shared_number(-1)  # until it is set
        self._drawn = 0, kept_rows(self.data, keep_blank)
        self.transform = transform
        self.target_transform = target_transform
        self.normalize = normalize
        self._buffers, self._shared = Buffers(KEPT), shared_buffers()
        names = self.data.class_names
        self.classes = None if names is None else list(names)
        self.class_to_idx = None if names is None else {name: label for label, name in enumerate(names)}

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the rows of a mix depend; workers that exist already follow."""
        self._epoch.fill_(epoch)
        self.__dict__.pop("targets", None)

    @property
    def rows(self) -> Places:
        """The row of each image in `data`, int64 (N,)."""
        return self.rows_of(max(0, int(self._epoch)))

    def rows_of(self, epoch: int) -> Places:
        """The row of each image of an epoch, int64 (N,)."""
        drawn = self._drawn
        if drawn[0] != epoch:
            self._drawn = drawn = epoch, kept_rows(self.data, self._keep_blank, epoch)
        return drawn[1]  # another thread may have drawn another epoch

    @functools.cached_property
    def targets(self) -> list[Any] | None:
        """The label of each image; with several label columns, a list per image."""
        return None if self.data.labels is None else self.data.labels[self.rows].tolist()

    def __len__(self) -> int:
        return len(self._drawn[1])

    def __getitem__(self, index: int) -> Any:
        if self._crops is not None:
            return self.__getitems__([index])[0]
        row = int(self.rows[operator.index(index)])
        image = self.data.normalized(row) if self.normalize else self.data[row]
        if self.transform is not None and not image.flags.owndata:
            image = image.copy()
        return self._sample(tensor(image, self.data.layout), row)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The images of a batch, which are read at once, into memory that is used again when all of them are gone."""
        self.data.fill()
        epoch = int(self._epoch)
        if epoch < 0 and self._crops is not None:
            epoch = int(torch.empty((), dtype=torch.int64).random_())
        return self.samples(self.rows[[operator.index(index) for index in indices]], epoch)

    def samples(self, rows: Places, epoch: int) -> list[Any]:
        """The images of some rows of `data` in an epoch, as `__getitems__`."""
        alone = torch.utils.data.get_worker_info() is None
        buffers = self._buffers if alone else self._shared
        dtype = np.dtype(np.float32) if self.normalize else self.data.dtype
        shape = self.data.image_shape if self._crops is None else self._crops.shape
        images = buffers.take((len(rows), *shape), dtype)
        if self._crops is None:
            # Inflating takes long enough to be worth threads; workers are processes, which share the cores already.
            threads = usable_cpus() if alone and self.data.deflated else 1
            self.data.read(rows, images, normalize=self.normalize, threads=threads)
        else:
            read(self.data, rows, self._crops.boxes(rows, epoch), self._crops, images, normalize=self.normalize)
        layout = self.data.layout
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
        path: OUT, or a dataset, view or mix.
        transform: as for ShardDataset; a transform may work in place.
        target_transform: as for ShardDataset.
        shuffle: whether to shuffle.
        seed: decides the order, and the random parts.
        buffer: how many consecutive images are shuffled together.
        rank: defaults to that of torch.distributed if it is initialized, else 0.
        world_size: defaults to that of torch.distributed if it is initialized, else 1.
        drop_last: give all ranks the same number of images; with `global_batch`, omit the smaller last step.
        normalize: as for ShardDataset.
        keep_blank: as for ShardDataset.
        global_batch: images per step of all ranks together; the stream gives single images unless set.
        lanes: with `global_batch`, which it divides: the parts of the order from which each step takes equally many.
        augment: "rrc-flip" for random parts of images, as for ShardDataset. They depend only on `seed`, the epoch and
            the row, so call `set_epoch`.
        size: as for ShardDataset.
        cache, cache_size: as for `gpu_npz.open_dataset`. A stream fetches its shards in its order, and waits for them.

    Raises:
        UsageError: a value that is not allowed; when an iteration begins, or, with `global_batch`, when a state is
            loaded, a state of another stream.
        IncompleteError, FormatError, StorageError: as for ShardDataset.
    """

    def __init__(
        self,
        path: Openable,
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
        augment: Augment | None = None,
        size: Size | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
    ) -> None:
        require_natural(buffer=buffer, lanes=lanes)
        data = opened(path, cache, cache_size)
        self.dataset = ShardDataset(
            data.by_shard() if shuffle else data,
            transform,
            target_transform,
            normalize=normalize,
            keep_blank=keep_blank,
            augment=augment,
            size=size,
            seed=seed,
        )
        self.rank, self.world_size = ranks(rank, world_size)
        self._seed = seed if shuffle else None
        self._buffer = buffer
        self._drop_last = drop_last
        self._epoch = _shared_number(0)
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
        rows = self.dataset.rows_of(epoch)
        bounds = self.dataset.data.bounds(rows)
        skipped = done % self._buffer
        begin = start + first + done - skipped
        self._fill(bounds, [(begin, start + last)], rows, epoch)
        for places in windows(bounds, begin, start + last, self._buffer, self._seed, epoch):
            for at in range(skipped, len(places), _CHUNK):
                for sample in self.dataset.samples(rows[places[at : at + _CHUNK]], epoch):
                    done += 1
                    self._begun = epoch, done
                    yield sample
            skipped = 0

    def _fill(self, bounds: Places, spans: list[tuple[int, int]], rows: Places, epoch: int) -> None:
        """Fetches shards ahead, as `Dataset.fill`, in the order in which spans of the sequence of shards need them."""
        if shards := shards_in(bounds, spans, self._seed, epoch):
            wanted = [rows[bounds[shard] : bounds[shard + 1]] for shard in shards]
            self.dataset.data.fill(np.concatenate(wanted), wait=True)

    def _resumed_at(self) -> tuple[int, int]:
        """The epoch and the step at which the next iteration begins."""
        epoch, loaded = int(self._epoch), self._loaded.tolist()
        return epoch, loaded[1] if loaded[0] == epoch else 0

    def _elastic(self, epoch: int) -> ElasticOrder:
        assert self._global_batch is not None
        bounds = self.dataset.data.bounds(self.dataset.rows_of(epoch))
        return ElasticOrder(bounds, self._global_batch, self._lanes, self._buffer, self._seed, epoch, self._drop_last)

    def _steps(self, order: ElasticOrder) -> int:
        """The steps in which this rank has a batch."""
        assert self._global_batch is not None
        left = len(self.dataset) % self._global_batch
        start, stop = part(left, self.rank, self.world_size)
        return order.steps - (not self._drop_last and left > 0 and start == stop)

    def _batches(self, epoch: int, first: int) -> Iterator[Any]:
        """This worker's share of the rank's batches from step `first` on."""
        order, rows = self._elastic(epoch), self.dataset.rows_of(epoch)
        worker, workers = _worker()
        self._begun = epoch, first
        spans = order.spans(first, self.rank, self.world_size)
        self._fill(self.dataset.data.bounds(rows), spans, rows, epoch)
        for step in range(first + worker, self._steps(order), workers):
            places = order.step(step)
            start, stop = part(len(places), self.rank, self.world_size)
            samples = self.dataset.samples(rows[places[start:stop]], epoch)
            self._begun = epoch, step + 1
            found = collate(samples)
            yield Step(found) if isinstance(found, (tuple, list)) else found

    def _elastic_identity(self) -> dict[str, Any]:
        """Everything that decides the images of each step."""
        return {
            "dataset": self.dataset.data.id,
            "rows": len(self.dataset),
            "seed": self._seed or 0,
            "shuffle": self._seed is not None,
            "global_batch": self._global_batch,
            "lanes": self._lanes,
            "buffer": self._buffer,
            "keep_blank": self._keep_blank,
        }

    def _run(self) -> tuple[int, int]:
        return share(len(self.dataset), self.rank, self.world_size, self._drop_last)

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the images of this process's stream and their order."""
        worker, workers = _worker()
        return {
            "dataset": self.dataset.data.id,
            "images": len(self.dataset),
            "seed": self._seed,
            "buffer": self._buffer,
            "drop_last": self._drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker,
            "workers": workers,
        }


def _shared_number(value: int) -> torch.Tensor:
    """A number in shared memory: worker processes see what `fill_` writes."""
    number = torch.tensor(value)
    number.share_memory_()  # type: ignore[no-untyped-call]  # untyped in torch
    return number


def _worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _require_same(state: dict[str, Any], own: dict[str, Any], position: set[str]) -> None:
    others = [f"{name} {state.get(name)!r}, not {value!r}" for name, value in own.items() if state.get(name) != value]
    if others or not position <= state.keys():
        raise UsageError(
            f"a state of another stream cannot be resumed: {'; '.join(others) or 'no epoch'}; create the dataset and "
            "its loader with the same arguments, or restart the epoch"
        )
