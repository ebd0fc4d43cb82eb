"""Whole batches of a dataset on a device: threads read them ahead into memory that is used again and again."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from ..errors import BackendError, UsageError
from ..machine.environment import usable_cpus
from .augment import Augment, Boxes, Crops, Size, crops_of
from .buffers import Buffers, fresh
from .combine import Openable, opened
from .contract import compare_with_others
from .order import Places, kept_rows, part, require_natural, require_rank, share, shuffled
from .torch_crops import cropped, read
from .views import Rows

_MOST_THREADS = 8
_HELD = 4  # batches beside those read ahead: one being delivered, the caller's, and what it kept for a moment


def loader(
    path: Openable,
    batch_size: int,
    *,
    device: str | torch.device = "cuda",
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    normalize: bool = True,
    dtype: Literal["float32", "float16"] = "float32",
    channels_last: bool | None = None,
    keep_blank: bool = False,
    augment: Augment | None = None,
    size: Size | None = None,
    prefetch: int = 2,
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
) -> Loader:
    """Whole batches of OUT on a device, without a DataLoader or worker processes.

    Threads read batches ahead from the mapped shards into memory that is used again and again: a batch's memory is
    taken for another one only when nobody holds the batch, a view of it or its NumPy array any more. For the CPU, the
    threads also normalize. For a GPU, pixels are copied as stored, through pinned memory, and normalized there, with
    exactly the values of a float32 build. This has not been tried on a GPU yet.

    With `augment="rrc-flip"`, each image is a random part of the stored one, resized, and flipped half of the time, as
    by torchvision's RandomResizedCrop and RandomHorizontalFlip. For a GPU, torch does that there; this has not been run
    on a GPU either.

    Args:
        path: OUT, or a dataset, view or mix.
        batch_size: images per batch.
        device: the device of the tensors.
        shuffle: shuffle all images in each epoch.
        seed: decides the order, and the random parts.
        drop_last: omit the last batch if it is smaller, and the images that some ranks would have more than others.
        rank: defaults to that of torch.distributed if it is initialized, else 0.
        world_size: defaults to that of torch.distributed if it is initialized, else 1.
        normalize: False gives the stored values.
        dtype: of normalized images. If pixels are stored, float16 gives the values of a float16 build.
        channels_last: whether batches are in the `channels_last` memory format; as the dataset stores them by default.
        keep_blank: keep the zero rows of `--on-reject blank`.
        augment: "rrc-flip" for random parts, which depend only on `seed`, the epoch and the row.
        size: height and width of a batch's images, or one number for both; as stored by default. Without `augment`, the
            middle of the stored image is cut out.
        prefetch: how many batches are read ahead.
        threads: how many threads read each batch together; by default one per usable core, at most 8.
        cache, cache_size: as for `gpu_npz.open_dataset`. Whole shards are fetched in the background; with `shuffle`, a
            row whose shard is not there yet is fetched alone.

    Raises:
        UsageError: a value that is not allowed.
        BackendError: PyTorch finds no usable GPU.
        IncompleteError, FormatError, StorageError: as for `gpu_npz.open_dataset`.
    """
    threads = min(usable_cpus(), _MOST_THREADS) if threads is None else threads
    require_natural(batch_size=batch_size, prefetch=prefetch, threads=threads)
    if dtype not in ("float32", "float16") or (dtype == "float16" and not normalize):
        raise UsageError(f"dtype: got {dtype!r}; allowed: float32 or float16, and float32 with normalize=False")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {str(place)!r}: PyTorch finds no usable GPU; give device='cpu'")
    data = opened(path, cache, cache_size)
    compare_with_others(data)
    return Loader(
        data=data,
        rows=kept_rows(data, keep_blank),
        keep_blank=keep_blank,
        batch_size=batch_size,
        device=place,
        seed=seed if shuffle else None,
        drop_last=drop_last,
        ranks=ranks(rank, world_size),
        normalize=normalize,
        dtype=np.dtype(dtype),
        channels_last=channels_last,
        prefetch=prefetch,
        threads=threads,
        crops=crops_of(data, augment, size, seed),
        buffers=Buffers(prefetch + _HELD, _pinned if place.type == "cuda" else fresh),
    )


@dataclass
class Loader:
    """What `loader` returns: each iteration is an epoch of (images, labels), or of images if there are no labels.

    Images are (N, C, H, W), labels int64 (N,), both on the device. `epoch` is the number of the next iteration; it is
    incremented by each iteration and set by `set_epoch`. Every rank takes its part of the epoch's order: each image
    comes once, and ranks differ by at most one image and one batch; with `drop_last`, they do not differ.
    """

    data: Rows
    rows: Places
    keep_blank: bool
    batch_size: int
    device: torch.device
    seed: int | None
    drop_last: bool
    ranks: tuple[int, int]
    normalize: bool
    dtype: np.dtype[Any]
    channels_last: bool | None
    prefetch: int
    threads: int
    crops: Crops | None
    buffers: Buffers
    epoch: int = 0

    def __len__(self) -> int:
        """Batches of this rank per epoch."""
        start, stop = self._run()
        return (stop - start) // self.batch_size if self.drop_last else -(-(stop - start) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Any]:
        start, stop = self._run()
        order = shuffled(kept_rows(self.data, self.keep_blank, epoch), self.seed, epoch)[start:stop]
        self.data.fill(order, wait=self.seed is None)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="gpu-npz-loader")
        ahead: deque[_Batch] = deque()
        copies = _Copies(self.prefetch)
        try:
            for number in range(len(self)):
                copies.forget_finished()
                ahead.append(self._begin(pool, order[number * self.batch_size :][: self.batch_size], epoch))
                if len(ahead) > self.prefetch:
                    yield self._placed(ahead.popleft(), copies)
            while ahead:
                yield self._placed(ahead.popleft(), copies)
        finally:
            pool.shutdown(cancel_futures=True)
            copies.wait()

    def _run(self) -> tuple[int, int]:
        return share(len(self.rows), *self.ranks, self.drop_last)

    @property
    def _on_host(self) -> bool:
        """Whether the threads normalize. Otherwise the device does."""
        return self.normalize and self.device.type == "cpu"

    def _begin(self, pool: ThreadPoolExecutor, rows: Places, epoch: int) -> _Batch:
        """Makes the threads read a batch, each a part of its rows."""
        layout = self.data.layout
        last = layout == "NHWC"
        if self.device.type == "cpu" and self.channels_last is not None:
            last = self.channels_last
        shape: tuple[int, ...] = self.data.image_shape
        if self.crops is not None and self.device.type == "cpu":
            shape = self.crops.shape
        if last != (layout == "NHWC"):
            shape = (*shape[1:], shape[0]) if last else (shape[2], *shape[:2])
        images = self.buffers.take((len(rows), *shape), self.dtype if self._on_host else self.data.dtype)
        images = images.transpose(0, 3, 1, 2) if last else images
        stored = images.transpose(0, 2, 3, 1) if layout == "NHWC" else images
        spans = [slice(*part(len(rows), number, self.threads)) for number in range(self.threads)]
        boxes = None if self.crops is None else self.crops.boxes(rows, epoch)
        parts = [(rows[span], stored[span], None if boxes is None else boxes[span]) for span in spans]
        return _Batch(images, rows, boxes, [pool.submit(self._fill, *each) for each in parts])

    def _fill(self, rows: Places, out: NDArray[Any], boxes: Boxes | None) -> NDArray[Any] | None:
        """Reads rows, and returns the tables with which the device normalizes them, or None."""
        if self.crops is not None and boxes is not None and self.device.type == "cpu":
            read(self.data, rows, boxes, self.crops, out, normalize=self._on_host)
            return None
        self.data.read(rows, out, normalize=self._on_host)
        if self.normalize and not self._on_host and self.data.dtype.kind == "u":
            return self.data.preprocess.tables(out, self.dtype.name)
        return None

    def _placed(self, batch: _Batch, copies: _Copies) -> Any:
        tables = [future.result() for future in batch.futures]
        images = torch.from_numpy(batch.images)
        if self.device.type != "cpu":
            images = copies.to(self.device, images)
            if self.crops is not None and batch.boxes is not None:
                images = cropped(images, batch.boxes, self.crops)
            images = self._finished(images, tables, batch.rows)
        if self.data.labels is None:
            return images
        return images, torch.from_numpy(self.data.labels[batch.rows]).to(self.device)

    def _finished(self, images: torch.Tensor, tables: list[NDArray[Any] | None], rows: Places) -> torch.Tensor:
        """Normalizes stored images on the device."""
        if (first := tables[0]) is not None:
            values = first if first.ndim == 2 else np.concatenate([each for each in tables if each is not None])
            images = look_up(torch.from_numpy(values).to(self.device, non_blocking=True), images)
            if self.data.valid is not None and not (valid := self.data.valid[rows]).all():
                images[torch.from_numpy(~valid).to(self.device)] = 0
        elif self.normalize:
            images = images.to(torch.float16 if self.dtype == np.float16 else torch.float32)
        if self.channels_last is None:
            return images
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


@dataclass
class _Batch:
    """A batch that threads are reading: (N, C, H, W)."""

    images: NDArray[Any]
    rows: Places
    boxes: Boxes | None
    futures: list[Future[NDArray[Any] | None]]


class _Copies:
    """The copies to a GPU that may not have finished, whose host memory must not be used again.

    Args:
        most: how many may be unfinished before the next one waits for the oldest.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._unfinished: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def to(self, device: torch.device, images: torch.Tensor) -> torch.Tensor:
        """Copies images to a device, a GPU asynchronously."""
        copied = images.to(device, non_blocking=device.type == "cuda")
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._unfinished.append((event, images))
        return copied

    def forget_finished(self) -> None:
        """Lets go of the memory of finished copies."""
        while self._unfinished:
            event, _ = self._unfinished[0]
            if len(self._unfinished) > self._most:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return
            self._unfinished.popleft()

    def wait(self) -> None:
        """Waits for all copies."""
        self._most = -1
        self.forget_finished()


def _pinned(size: int) -> NDArray[np.uint8]:
    memory: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def look_up(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Looks up `values[channel, level]`, or `values[image, 0, level]`, for each pixel: (N, C, H, W).

    Args:
        values: (C, levels), or (N, 1, levels) if each image has its own table.
        images: uint8 or uint16 (N, C, H, W), on the same device.
    """
    first = torch.arange(0, values.numel(), values.shape[-1], dtype=torch.int32, device=values.device)
    places = images.to(torch.int32) + first.view(*values.shape[:-1], 1, 1)
    return values.flatten().index_select(0, places.flatten()).view(images.shape)


def ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size as given, or as torch.distributed says. Raises UsageError if only one makes sense."""
    if rank is None and world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    return require_rank(rank, world_size)
