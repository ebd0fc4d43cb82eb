"""Whole batches from DataLoader workers to their parent, through shared memory that is used again and again.

Torch moves each batch of a worker to new shared memory, whose pages are zeroed, filled, and mapped by the parent, which
costs more than reading the batch. Here a worker reads into a few shared buffers. The first batch in a buffer takes its
file descriptor to the parent, which keeps the buffer mapped; later ones only name it. The last bytes of a buffer say
whether the parent still uses the batch.
"""

from __future__ import annotations

import itertools
import operator
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch.utils.data._utils.collate import default_collate_fn_map  # to be extended, says default_collate

from ..config import Layout
from ..errors import UsageError
from .buffers import Buffers, Bytes

KEPT = 16  # buffers of a worker: more than the batches that a DataLoader prefetches from it
_CONTROL = 16  # bytes at the end of a buffer: the serial number (8), is it with the parent (1), was it ever (1)
_LENT, _KNOWN = -8, -7
_Key = tuple[int, int]  # a worker's process and the serial number of its buffer

# In a worker
_serials = itertools.count()
_made: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()

# In the parent
_mapped: dict[_Key, Bytes] = {}
_leases: weakref.WeakSet[_Lease] = weakref.WeakSet()


class Batch(list[Any]):
    """The samples of a batch, as a DataLoader passes them on, and the arrays that hold them all.

    Attributes:
        images: (N, C, H, W) or (N, H, W, C), at the beginning of a buffer.
        labels: (N,) or (N, K); None without labels.
        layout: of the images.
    """

    def __init__(self, images: NDArray[Any], labels: NDArray[Any] | None, layout: Layout) -> None:
        self.images, self.labels, self.layout = images, labels, layout
        samples: Sequence[Any] = tensor(images, layout).unbind() if len(images) else ()
        if labels is not None:
            each = torch.from_numpy(labels).unbind() if labels.ndim > 1 and len(labels) else labels.tolist()
            samples = list(zip(samples, each, strict=True))
        super().__init__(samples)
        self._read = tuple(samples)

    @property
    def is_as_read(self) -> bool:
        """Whether the list still has exactly the samples that were read, which a wrapping dataset may change."""
        return len(self) == len(self._read) and all(map(operator.is_, self, self._read))


def collate(samples: Sequence[Any]) -> Any:
    """The `collate_fn` for a DataLoader over the datasets of `gpu_npz.readers.torch`: (images, labels), or images.

    Batches are those of torch's own function. Without transforms, they are passed on as a whole: a worker process reads
    them into shared memory that is used again when the batch, its views and its NumPy arrays are gone. With transforms,
    this is torch's own function. In a worker, what it returns becomes tensors when the parent process receives it.
    """
    if not isinstance(samples, Batch) or not samples or not samples.is_as_read:
        return torch.utils.data.default_collate(samples)  # type: ignore[arg-type]
    if torch.utils.data.get_worker_info() is None:
        return _whole(samples.images, samples.labels, samples.layout)
    return _Message(samples)


class Step(tuple[torch.Tensor, torch.Tensor]):
    """Images and labels of a step, which a DataLoader must not put into batches once more."""

    __slots__ = ()


def _refuse(steps: Any, *, collate_fn_map: Any = None) -> Any:
    raise UsageError("a stream with global_batch gives whole batches; create the DataLoader with batch_size=None")


def shared_buffers() -> Buffers:
    """Buffers for a worker, which its parent process can map."""
    return Buffers(KEPT, _make, _is_back)


def tensor(images: NDArray[Any], layout: Layout) -> torch.Tensor:
    """Images as a tensor (..., C, H, W) that shares their memory."""
    found = torch.from_numpy(images)
    return found.movedim(-1, -3) if layout == "NHWC" else found


def _make(size: int) -> Bytes:
    rounded = -(-size // _CONTROL) * _CONTROL
    memory: Bytes = _shared(rounded + _CONTROL).numpy()
    memory[-_CONTROL:] = 0
    serial = next(_serials)
    memory[-_CONTROL:_LENT].view(np.int64)[0] = serial
    _made[serial] = memory
    return memory


def _shared(size: int) -> torch.Tensor:
    memory: torch.Tensor = torch.empty(size, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    return memory


def _is_back(memory: Bytes) -> bool:
    return not memory[_LENT]


class _Message:
    """A batch on its way from a worker. Unpickled, it is what `collate` returns in one process."""

    def __init__(self, batch: Batch) -> None:
        memory = batch.images.base
        assert memory is not None
        self._batch, self._memory = batch, memory
        self._kept = list(_made)  # now, since another thread pickles this, while this thread may make a buffer
        memory[_LENT] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        batch, memory = self._batch, self._memory
        serial = int(memory[-_CONTROL:_LENT].view(np.int64)[0])
        storage = None if memory[_KNOWN] else memory.base
        memory[_KNOWN] = 1
        images = batch.images.shape, batch.images.dtype.str
        return _received, ((os.getpid(), serial), self._kept, storage, images, batch.labels, batch.layout)


def _received(
    key: _Key,
    kept: list[int],
    storage: torch.Tensor | None,
    images: tuple[tuple[int, ...], str],
    labels: NDArray[Any] | None,
    layout: Layout,
) -> Any:
    """In the parent: the tensors of a batch, of which only the buffer's name came, or also the buffer.

    Args:
        key: the buffer.
        kept: the serial numbers of all buffers that the worker still uses.
        storage: the buffer, if this is its first batch.
        images: their shape and dtype.
        labels: as of `Batch`.
        layout: of the images.
    """
    if storage is not None:
        _mapped[key] = storage.numpy()
        _unmap(lambda worker, serial: worker == key[0] and serial not in kept)
    memory = _mapped[key]
    shape, dtype = images
    # Not a view in NumPy's sense, whose own views would hold the buffer but not this array.
    lent = np.frombuffer(memory.data, dtype, int(np.prod(shape, dtype=np.int64)))
    weakref.finalize(lent, _Lease(memory).end).atexit = False
    return _whole(lent.reshape(shape), labels, layout)


class _Lease:
    """A worker's buffer while this process uses it."""

    def __init__(self, memory: Bytes) -> None:
        self._memory: Bytes | None = memory
        self._process = os.getpid()
        _leases.add(self)

    def keep(self) -> None:
        """Never gives the buffer back."""
        self._memory = None

    def end(self) -> None:
        """Gives the buffer back to the worker."""
        if self._memory is not None and self._process == os.getpid():
            self._memory[_LENT] = 0


def _unmap(is_dropped: Callable[[int, int], bool] = lambda worker, serial: False) -> None:
    """Lets go of the buffers of workers that have ended, and of those that their workers dropped."""
    for key in list(_mapped):
        if is_dropped(*key) or not _lives(key[0]):
            _mapped.pop(key, None)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # a process of another user has the number now
        return False
    return True


def _before_fork() -> None:
    """A forked process shares what is lent just now, and nobody knows how long it uses it."""
    for lease in list(_leases):
        lease.keep()
    _unmap()


os.register_at_fork(before=_before_fork, after_in_child=_mapped.clear)
default_collate_fn_map.update({Step: _refuse, _Message: _refuse})


def _whole(images: NDArray[Any], labels: NDArray[Any] | None, layout: Layout) -> Any:
    found = tensor(images, layout)
    return found if labels is None else (found, torch.from_numpy(labels))
