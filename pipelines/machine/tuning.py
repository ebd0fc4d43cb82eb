"""Chooses workers, threads, batch size and so on, as far as the settings leave them open."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BATCH_SIZE, BuildConfig
from .environment import Choice

_BATCH_BYTES = 1 << 28  # limits the default batch size of huge images
# One batch is decoded while another one is used. With CPU operators, 3 was no faster.
_PREFETCH = 2
# Each open shard has one writer thread; a second one on the same file gains nothing. A GPU needs more than one thread.
_OPEN_SHARDS = {"cuda": 4, "cpu": 1}


@dataclass(frozen=True)
class Tuning:
    """What decides how fast a build runs. Nothing here changes the rows of a shard or their order.

    Attributes:
        workers: number of worker processes; 0 if the calling process does all the work.
        batch_size: the most images that are decoded together.
        threads: threads of each worker's DALI; unused by pillow.
        prefetch: batches that DALI works on at the same time.
        open_shards: shards that a worker writes at the same time.
        hw_decoder_load: the share of a batch's JPEGs for a GPU's hardware engines, 0 to 1; None leaves it to DALI.
    """

    workers: int
    batch_size: int
    threads: int
    prefetch: int
    open_shards: int
    hw_decoder_load: float | None

    @classmethod
    def of(cls, config: BuildConfig, choice: Choice, *, row_bytes: int, shard_rows: int, shards: int) -> Tuning:
        """The tuning of a build.

        Args:
            config: values that are set here are used.
            choice: the decoder, the GPUs and the cores.
            row_bytes: size of a stored image in bytes.
            shard_rows: the most items in a shard.
            shards: how many shards are to be built.
        """
        cores = choice.cpus
        device, workers = choice.device, config.workers
        if workers is None:
            workers = cores if choice.backend == "pillow" else max(1, len(choice.gpus))  # DALI decodes in threads
        workers = min(workers, max(1, shards))
        batch_size = config.batch_size or max(1, min(BATCH_SIZE[device], _BATCH_BYTES // row_bytes))
        threads = max(1, cores // max(1, workers))
        if device == "cuda":
            threads = max(1, threads // 2)  # the GPU's decoder starts as many again for its work on the host
        return cls(
            workers=workers,
            batch_size=min(batch_size, shard_rows),
            threads=config.threads or threads,
            prefetch=config.prefetch or _PREFETCH,
            open_shards=min(config.open_shards or _OPEN_SHARDS[device], max(1, shards // max(1, workers))),
            hw_decoder_load=0.0 if config.reproducible else config.hw_decoder_load,
        )
