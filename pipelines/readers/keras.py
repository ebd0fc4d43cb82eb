"""Gives a finished dataset to Keras 3, with any backend, as batches for `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import BackendError, install_command
from .combine import Openable, opened
from .contract import compare_with_others
from .order import Places, kept_rows, require_natural, shuffled

try:
    import keras
except ImportError as exc:
    raise BackendError(
        f"gpu_npz.readers.keras needs Keras 3 and a backend of it ({exc}); run: {install_command('keras')}, and "
        "torch, tensorflow or jax"
    ) from exc
if not hasattr(keras.utils, "PyDataset"):
    raise BackendError(
        f"gpu_npz.readers.keras needs Keras 3, and this is {keras.__version__}; run: {install_command('keras')}"
    )


class ShardDataset(keras.utils.PyDataset):  # type: ignore[misc]  # mypy does not follow keras, so the base is Any
    """The batches of OUT as NumPy arrays: (images, labels), or only images if there are no labels.

    Images are float32 and normalized, even if uint8 pixels or float16 are stored. Their layout is the one for which
    Keras is configured (`keras.config.image_data_format()`), whatever the layout of the shards: (N, H, W, C) for
    "channels_last", the default, else (N, C, H, W). Labels are int64 (N,). The zero rows of `--on-reject blank` are
    omitted unless `keep_blank`.

    Attributes:
        data: the dataset as arrays, with `class_names`, `labels`, `paths` and so on.

    Args:
        path: OUT, or a dataset, view or mix.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        shuffle: shuffle all images in each epoch. `fit` also shuffles the batches unless it is called with
            `shuffle=False`.
        seed: decides the order.
        normalize: False gives the stored values.
        keep_blank: keep the zero rows of `--on-reject blank`.
        workers: threads (or processes) of Keras that prepare batches ahead. With 1, Keras makes batches as they are
            needed, and each epoch of `fit` has every image once. With more, Keras (3.15) keeps batches that were ready
            when it read the first one to build the model, so its epochs are shifted by a few batches.
        use_multiprocessing: whether the workers are processes.
        max_queue_size: how many batches are prepared ahead.
        cache, cache_size: as for `gpu_npz.open_dataset`. Batches fetch whole shards in the background.

    Raises:
        UsageError: a value that is not allowed.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """

    def __init__(
        self,
        path: Openable,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        normalize: bool = True,
        keep_blank: bool = False,
        workers: int = 1,
        use_multiprocessing: bool = False,
        max_queue_size: int = 10,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
    ) -> None:
        super().__init__(workers=workers, use_multiprocessing=use_multiprocessing, max_queue_size=max_queue_size)
        require_natural(batch_size=batch_size)
        self.data = opened(path, cache, cache_size)
        compare_with_others(self.data)
        self._batch_size = batch_size
        self._normalize = normalize
        self._seed = seed if shuffle else None
        self._epoch = 0
        self._keep_blank = keep_blank
        self._order = self._epoch_order()
        stored, wanted = self.data.layout, keras.config.image_data_format()
        self._axes = {
            ("NCHW", "channels_last"): (0, 2, 3, 1),
            ("NHWC", "channels_first"): (0, 3, 1, 2),
        }.get((stored, wanted), (0, 1, 2, 3))

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, number: int) -> Any:
        """One batch of the current epoch.

        Raises:
            IndexError: there is no such batch.
            FormatError: a shard is missing or damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of a dataset with {len(self)} batches")
        self.data.fill(wait=self._seed is None)
        rows = self._order[number * self._batch_size :][: self._batch_size]
        images = self.data.normalized(rows) if self._normalize else self.data[rows]
        images = np.transpose(images, self._axes)
        return images if self.data.labels is None else (images, self.data.labels[rows])

    def on_epoch_end(self) -> None:
        """Shuffles for the next epoch; Keras calls it."""
        self._epoch += 1
        self._order = self._epoch_order()

    def _epoch_order(self) -> Places:
        return shuffled(kept_rows(self.data, self._keep_blank, self._epoch), self._seed, self._epoch)
