"""Chooses workers, threads, batch size and so on, as far as the settings leave them open."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BATCH_SIZE, BuildConfig
from .environment import Choice

_BATCH_BYTES = 1 << 28  # a batch of huge images is smaller, unless asked for
# Batches inside each of DALI's pipelines. On a GPU, one more keeps two in flight while Python works; on CPU operators 3
# was no faster.
_PREFETCH = {"cuda": 3, "cpu": 2}
# A pipeline runs one operator of a kind at a time; with two, one does its work on the host while the other waits.
_PIPELINES = {"cuda": 2, "cpu": 1}
_OTHER_CORES = 2  # of a GPU's: for Python, and for the threads that write
_READING = 8  # one in so many of a GPU's threads reads files: 25 us an image, beside some 700 us to decode its share
# Hardware JPEG engines of Hopper and later GPUs are off until they have been seen to decode correctly: a known fault
# there gives wrong pixels without an error (https://github.com/pytorch/vision/issues/9606).
_UNPROVEN_ENGINES = (9, 0)
# One thread writes a shard, and on one file two of them gain nothing. A GPU gives more than one thread can write.
_OPEN_SHARDS = {"cuda": 4, "cpu": 1}


@dataclass(frozen=True)
class Tuning:
    """What decides how fast a build runs. Nothing here changes the rows of a shard or their order.

    Attributes:
        workers: processes; none where everything is done in the process that builds.
        batch_size: images that are decoded together, at most.
        threads: threads of a worker's DALI, shared by its pipelines on a GPU; pillow has none.
        pipelines: of DALI, that decode in turn.
        prefetch: batches inside each of them at the same time.
        open_shards: shards that a worker writes at the same time.
        hw_decoder_load: the share of a batch's JPEGs for a GPU's hardware engines, 0 to 1; None leaves it to DALI.
        spot_check: whether a sample of the images that a GPU decodes is compared with Pillow's.
    """

    workers: int
    batch_size: int
    threads: int
    pipelines: int
    prefetch: int
    open_shards: int
    hw_decoder_load: float | None
    spot_check: bool = True

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
        if device == "cuda":
            cores -= _OTHER_CORES
        threads = max(1, cores // max(1, workers))
        return cls(
            workers=workers,
            batch_size=min(batch_size, shard_rows),
            threads=config.threads or threads,
            pipelines=config.pipelines or _PIPELINES[device],
            prefetch=config.prefetch or _PREFETCH[device],
            open_shards=min(config.open_shards or _OPEN_SHARDS[device], max(1, shards // max(1, workers))),
            hw_decoder_load=_hw_decoder_load(config, choice),
            spot_check=config.spot_check,
        )

    @property
    def batches_ahead(self) -> int:
        """Batches that a worker's decoding pipelines hold at the same time."""
        return self.pipelines * self.prefetch

    @property
    def reading_threads(self) -> int:
        """Threads of the pipeline that reads files."""
        return self.threads if self.pipelines == 1 else max(1, self.threads // _READING)

    @property
    def decoding_threads(self) -> int:
        """Threads of each pipeline that decodes."""
        return self.threads if self.pipelines == 1 else max(1, (self.threads - self.reading_threads) // self.pipelines)


def _hw_decoder_load(config: BuildConfig, choice: Choice) -> float | None:
    if config.reproducible:
        return 0.0
    if config.hw_decoder_load is None and (choice.capability or (0, 0)) >= _UNPROVEN_ENGINES:
        return 0.0
    return config.hw_decoder_load
