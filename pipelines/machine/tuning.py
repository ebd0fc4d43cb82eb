"""Chooses the number of workers and threads, the batch size and so on, unless the settings specify them."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BATCH_SIZE, BuildConfig
from .environment import Choice

# The most bytes of rows in a batch, unless the settings specify its size. Pillow's batches stay in the cache of the CPU
# until they are written; with 8 rows of float32 instead of 32, builds were 7% faster.
_BATCH_BYTES = {"dali": 1 << 28, "pillow": 5 << 20}
# Batches in flight in each DALI pipeline. On a GPU, the third keeps two in flight while Python is busy. With the CPU
# operators, three were no faster than two.
_PREFETCH = {"cuda": 3, "cpu": 2}
# A pipeline runs one operator of each kind at a time. With two pipelines, one works on the host while the other waits.
_PIPELINES = {"cuda": 2, "cpu": 1}
_OTHER_CORES = 2  # cores reserved in a GPU build for Python and the writing threads
_READING = 8  # 1 in 8 threads of a GPU worker reads files: 25 us an image; the host's share of decoding takes 700 us
# The hardware JPEG engines of Hopper and later GPUs are off until they are known to decode correctly. A known bug
# produces wrong pixels there without an error (https://github.com/pytorch/vision/issues/9606).
_UNPROVEN_ENGINES = (9, 0)
# One thread writes each shard; two threads on the same file are no faster. A GPU produces more than one thread can
# write.
_OPEN_SHARDS = {"cuda": 4, "cpu": 1}


@dataclass(frozen=True)
class Tuning:
    """The parameters that determine the speed of a build. None of them changes the rows of a shard or their order.

    Attributes:
        workers: the number of worker processes; 0 to do all work in the process that builds.
        batch_size: the maximum number of images decoded together.
        threads: the number of DALI threads in a worker, shared by its pipelines on a GPU; unused by Pillow.
        pipelines: the number of DALI pipelines, which decode in turn.
        prefetch: the number of batches in flight in each pipeline.
        open_shards: the number of shards that a worker writes at the same time.
        hw_decoder_load: the share of a batch's JPEGs that the GPU's hardware engines decode, 0 to 1; None for DALI's
            default.
        spot_check: whether to compare a sample of the images decoded by a GPU with Pillow's results.
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
        """Chooses the tuning of a build.

        Args:
            config: the settings; values that they specify take precedence.
            choice: the decoder, the GPUs and the cores.
            row_bytes: the size of a stored image, in bytes.
            shard_rows: the maximum number of items in a shard.
            shards: the number of shards to build.
        """
        cores = choice.cpus
        device, workers = choice.device, config.workers
        if workers is None:
            workers = cores if choice.backend == "pillow" else max(1, len(choice.gpus))  # DALI has its own threads
        workers = min(workers, max(1, shards))
        batch_size = config.batch_size or max(1, min(BATCH_SIZE[device], _BATCH_BYTES[choice.backend] // row_bytes))
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
        """The number of batches in flight in all decoding pipelines of a worker."""
        return self.pipelines * self.prefetch

    @property
    def reading_threads(self) -> int:
        """The number of threads of the pipeline that reads files."""
        return self.threads if self.pipelines == 1 else max(1, self.threads // _READING)

    @property
    def decoding_threads(self) -> int:
        """The number of threads of each decoding pipeline."""
        return self.threads if self.pipelines == 1 else max(1, (self.threads - self.reading_threads) // self.pipelines)


def _hw_decoder_load(config: BuildConfig, choice: Choice) -> float | None:
    if config.reproducible:
        return 0.0
    if config.hw_decoder_load is None and (choice.capability or (0, 0)) >= _UNPROVEN_ENGINES:
        return 0.0
    return config.hw_decoder_load
