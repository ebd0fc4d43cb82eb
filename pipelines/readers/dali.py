"""Gives a finished dataset to pipelines of NVIDIA DALI, which has no reader of NPZ files, to augment it there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ..errors import UsageError
from .buffers import Buffers
from .combine import Openable, opened
from .contract import compare_with_others
from .order import Places, kept_rows, require_natural, require_rank, share, shuffled
from .views import Rows

_HELD = 2  # batches: one that is filled, and one that a worker process of DALI still copies


def source(
    path: Openable,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    keep_blank: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
) -> Source:
    """The batches of OUT for a DALI pipeline, which takes them by `nvidia.dali.fn.external_source`.

        batches = source("/data/train-npz", 256, shuffle=True)

        @pipeline_def(batch_size=256, num_threads=4, device_id=0)
        def training():
            images, labels = fn.external_source(batches, **batches.options)
            ...

    DALI gets the stored values, uint8 pixels for `--dtype uint8`, with their layout: "HWC" for `--layout NHWC`, else
    "CHW". Geometric and colour operators of DALI, such as `fn.rotate` and `fn.color_twist`, need "HWC", which
    `fn.transpose(images, perm=[1, 2, 0])` makes of "CHW". `fn.crop_mirror_normalize` normalizes pixels by mean and
    std of `batches.data.manifest.normalization`, multiplied by 255, or by 65535 for uint16. It cannot do the kinds of
    normalization without mean and std; for these, build with `--dtype float32`, which stores normalized values. None
    of this has been tried on a GPU yet.

    At the end of an epoch, the pipeline's `run` raises StopIteration; after its `reset` comes the next epoch, in an
    order of its own. DALI's iterators call `reset` themselves with `auto_reset=True`. In each epoch, each image comes
    once to one of the ranks, which differ by at most one image.

    DALI reads in the thread that calls `run`, and copies each batch. With `parallel=True` in `external_source`, it
    reads in processes, as many as `py_num_workers` of the pipeline says.

    Args:
        path: OUT, or a dataset, view or mix.
        batch_size: images per batch, at most the batch size of the pipeline; the last batch of an epoch may be smaller.
        shuffle: shuffle all images in each epoch.
        seed: decides the order.
        rank: which part of each epoch to read, from 0 up to `world_size` - 1.
        world_size: how many pipelines share an epoch.
        drop_last: omit the last batch if it is smaller, and the images that some ranks would have more than others.
        keep_blank: keep the zero rows of `--on-reject blank`.
        cache, cache_size: as for `gpu_npz.open_dataset`. Batches fetch whole shards in the background.

    Raises:
        UsageError: a value that is not allowed.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    require_natural(batch_size=batch_size)
    require_rank(rank, world_size)
    data = opened(path, cache, cache_size)
    compare_with_others(data)
    rows = kept_rows(data, keep_blank)
    return Source(data, rows, keep_blank, batch_size, seed if shuffle else None, rank, world_size, drop_last)


@dataclass(eq=False)
class Source:
    """What `source` returns: DALI calls it for each batch. It can be pickled, for DALI's worker processes.

    Attributes:
        data: the dataset as arrays, with `manifest`, `class_names` and so on.
        rows: the row of each image of epoch 0 in `data`, int64 (N,), before they are shuffled and shared.
    """

    data: Rows
    rows: Places
    keep_blank: bool
    batch_size: int
    seed: int | None
    rank: int
    world_size: int
    drop_last: bool
    _epoch: tuple[int, Places] | None = field(default=None, init=False, repr=False)  # the latest, and this rank's rows
    _buffers: Buffers = field(default_factory=lambda: Buffers(_HELD), init=False, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """What `external_source` has to know: the number of outputs, their layouts, and that epochs are counted."""
        outputs = 1 if self.data.labels is None else 2
        layout = self.data.layout.removeprefix("N")
        return {"num_outputs": outputs, "layout": [layout], "batch_info": True}

    def __len__(self) -> int:
        """Batches of this rank per epoch."""
        start, stop = self._share()
        return (stop - start) // self.batch_size if self.drop_last else -(-(stop - start) // self.batch_size)

    def __call__(self, batch: Any) -> tuple[NDArray[Any], ...]:
        """One batch: images as stored, (n, H, W, C) or (n, C, H, W), and labels (n,) or (n, K) if there are any.

        Args:
            batch: a `nvidia.dali.types.BatchInfo`: the number of the batch in its epoch, and the number of the epoch.

        Raises:
            StopIteration: the epoch has no such batch.
            UsageError: the number of the epoch is missing.
            FormatError: a shard is missing or damaged.
        """
        if isinstance(batch, int):
            raise UsageError(
                f"batch: got {batch}; allowed: a BatchInfo; call fn.external_source(batches, **batches.options)"
            )
        if batch.iteration >= len(self):
            raise StopIteration
        rows = self._order(batch.epoch_idx)[batch.iteration * self.batch_size :][: self.batch_size]
        images = self._buffers.take((len(rows), *self.data.image_shape), self.data.dtype)
        self.data.fill(wait=self.seed is None)
        self.data.read(rows, images)
        return (images,) if self.data.labels is None else (images, self.data.labels[rows])

    def _share(self) -> tuple[int, int]:
        return share(len(self.rows), self.rank, self.world_size, self.drop_last)

    def _order(self, epoch: int) -> Places:
        """The rows of this rank in an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            rows = kept_rows(self.data, self.keep_blank, epoch)
            self._epoch = epoch, shuffled(rows, self.seed, epoch)[slice(*self._share())]
        return self._epoch[1]
