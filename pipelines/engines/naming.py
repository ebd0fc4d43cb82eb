"""Which files decoders have written messages about, which name none: batches that may be it are decoded again, alone.

A decoder works on several batches at once, and a message can be about any of them. It writes the same again when it
decodes them one after the other, and those that it does write about, image by image.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection

from .. import processes
from ..decode import make_decoder
from ..errors import GpuNpzError
from ..geometry import Geometry
from ..job import Job
from ..messages import Heard
from ..plan import Batch
from ..storage import open_storage
from ..worker import Task

AHEAD = 4  # batches that a worker is at most ahead of the one that it says is done, besides what DALI prefetches
_SHARE = 20  # one of so many items of a build is decoded again at most, but up to _FEW in any case
_FEW = 5000

Suspect = tuple[int, int, int]  # shard, first item in it, items


def named(task: Task, suspects: Sequence[Suspect], shards: int, timeout_s: float) -> Heard:
    """The paths of the items that make a decoder write known messages.

    Args:
        task: that of the workers.
        suspects: where they may be.
        shards: how many were built, which decides how much time this may take.
        timeout_s: for one batch.
    """
    paths: defaultdict[str, list[str]] = defaultdict(list)
    with contextlib.suppress(EOFError, OSError), processes.running(__name__) as (connection, output):
        connection.send(task)

        def decoded(suspect: Suspect) -> tuple[list[str], Counter[str]]:
            connection.send(suspect)
            if not connection.poll(timeout_s):
                raise EOFError
            return connection.recv(), output.known()

        left = max(_FEW, shards * Job.open(open_storage(task.out)).plan.shard_rows // _SHARE)
        for shard, first, count in sorted(set(suspects)):
            left -= count
            if left < 0:
                return Heard(paths=paths)
            if decoded((shard, first, count))[1]:
                left -= count
                for position in range(first, first + count):
                    found, messages = decoded((shard, position, 1))
                    for text in messages:
                        paths[text] += found
        return Heard(paths=paths, all_paths=True)
    return Heard(paths=paths)  # the process died, or hangs


def serve(descriptor: int) -> None:
    """What the process runs: it takes a Task, then suspects, decodes them and gives their paths."""
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
                items = list(job.plan.items(start, start + count))
                for _ in decoder.decode([Batch(shard, items, last=True)]):
                    pass
                connection.send([item.path for item in items])
