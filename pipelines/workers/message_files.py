"""Finds the files that a decoder's messages are about, since the messages contain no file names.

A decoder works on several batches at once, so a message may be about an image in any of them. These batches are decoded
again one after the other. If a message appears again, the images of that batch are decoded one by one.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection

from ..dataset.job import Job
from ..errors import GpuNpzError
from ..preprocess.decoders import make_decoder
from ..preprocess.geometry import Geometry
from ..sources.base import Batch
from ..storage import open_storage
from . import subprocesses
from .events import Task
from .messages import DecoderMessages

AHEAD = 4  # batches that a worker may be ahead of the one that it reports, besides those that DALI prefetches
_SHARE = 20  # one of this many items may be decoded again, but at least _FEW items
_FEW = 5000

Suspect = tuple[int, int, int]  # shard, first item in it, items


def find_message_files(task: Task, suspects: Sequence[Suspect], built_items: int, timeout_s: float) -> DecoderMessages:
    """The paths of the items about which a decoder writes known messages.

    Args:
        task: the task of the workers; its skipped items are not decoded.
        suspects: the batches that may contain these items.
        built_items: how many items were decoded in the build, which limits how many are decoded again.
        timeout_s: the longest time for one batch.
    """
    paths: defaultdict[str, list[str]] = defaultdict(list)
    with contextlib.suppress(EOFError, OSError), subprocesses.running(__name__) as (connection, output):
        connection.send(task)

        def decoded(suspect: Suspect) -> tuple[list[str], Counter[str]]:
            connection.send(suspect)
            if not connection.poll(timeout_s):
                raise EOFError
            return connection.recv(), output.known()

        left = max(_FEW, built_items // _SHARE)
        for shard, first, count in sorted(set(suspects)):
            left -= count
            if left < 0:
                return DecoderMessages(paths=paths)
            if decoded((shard, first, count))[1]:
                left -= count
                for position in range(first, first + count):
                    found, messages = decoded((shard, position, 1))
                    for text in messages:
                        paths[text] += found
        return DecoderMessages(paths=paths, all_paths=True)
    return DecoderMessages(paths=paths)  # the process died or hangs


def serve(descriptor: int) -> None:
    """What the process runs: receives a Task, then suspects; decodes each and sends the paths of its items."""
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError, GpuNpzError):
        task: Task = connection.recv()
        job = Job.open(open_storage(task.out))
        geometry = Geometry.of(job.settings, job.record.image_size)
        with make_decoder(
            job.record.backend, job.settings, geometry, task.source, tuning=task.tuning, gpu=task.gpu
        ) as decoder:
            while True:
                shard, first, count = connection.recv()
                start = job.plan.shard_range(shard).start + first
                items = [item for item in job.plan.items(start, start + count) if item.index not in task.skipped]
                for _ in decoder.decode([Batch(shard, items, last=True)] if items else []):
                    pass
                connection.send([item.path for item in items])
