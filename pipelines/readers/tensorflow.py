"""Gives a finished dataset as a tf.data.Dataset of batches."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, install_command
from .combine import Openable, opened
from .contract import compare_with_others
from .order import Places, kept_rows, require_natural, shuffled

try:
    import tensorflow as tf
except ImportError as exc:
    raise BackendError(
        f"gpu_npz.readers.tensorflow needs TensorFlow ({exc}); run: {install_command('tensorflow')}"
    ) from exc


def as_tf_dataset(
    path: Openable,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    normalize: bool = True,
    keep_blank: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
) -> Any:
    """The batches of OUT as a tf.data.Dataset of (images, labels), or of images if there are no labels.

    Images are float32 (N, H, W, C) and normalized, even if uint8 pixels or float16 are stored, whatever the layout of
    the shards. Labels are int64 (N,). Batches are prefetched in parallel, which does not change their order. The zero
    rows of `--on-reject blank` are omitted unless `keep_blank`.

    The dataset only works in this process, since Python reads the shards: it can neither be saved as a graph nor be
    sent to another machine. A damaged shard raises an error of TensorFlow, whose message contains the FormatError.

    Args:
        path: OUT, or a dataset, view or mix; a mix has the rows of its epoch 0 unless `shuffle`.
        batch_size: images per batch.
        shuffle: shuffle all images each time that the dataset is iterated.
        seed: decides the order.
        drop_last: omit the last batch if it is smaller; the batch size is then part of the `element_spec`.
        normalize: False gives the stored values.
        keep_blank: keep the zero rows of `--on-reject blank`.
        cache, cache_size: as for `gpu_npz.open_dataset`. Batches fetch whole shards in the background.

    Raises:
        UsageError: a value that is not allowed.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    require_natural(batch_size=batch_size)
    data = opened(path, cache, cache_size)
    compare_with_others(data)
    rows = kept_rows(data, keep_blank)
    axes = (0, 1, 2, 3) if data.layout == "NHWC" else (0, 2, 3, 1)
    shape = [data.image_shape[axis - 1] for axis in axes[1:]]
    dtype = tf.as_dtype(np.float32 if normalize else data.dtype)

    def order(number: np.int64) -> Places:
        return shuffled(kept_rows(data, keep_blank, int(number)), seed, int(number))

    def read(wanted: Places) -> NDArray[Any]:
        data.fill(wait=not shuffle)
        images = data.normalized(wanted) if normalize else data[wanted]
        return np.ascontiguousarray(images.transpose(axes))

    def epoch(number: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(tf.numpy_function(order, [number], tf.int64), [None]))

    def batch(wanted: Any) -> Any:
        images = tf.numpy_function(read, [wanted], dtype)
        images = tf.ensure_shape(images, [wanted.shape[0], *shape])
        return images if data.labels is None else (images, tf.gather(data.labels, wanted))

    if shuffle:
        numbers = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
        places = numbers.flat_map(epoch).apply(tf.data.experimental.assert_cardinality(len(rows)))
    else:
        places = tf.data.Dataset.from_tensor_slices(rows)
    batches = places.batch(batch_size, drop_remainder=drop_last)
    return batches.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
