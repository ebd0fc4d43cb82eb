"""What a build chooses where the settings leave it open."""

from __future__ import annotations

import pytest

from gpu_npz.config import BuildConfig
from gpu_npz.machine.environment import Choice, Machine, choose
from gpu_npz.machine.tuning import Tuning


def tuning_of(choice: Choice, *, shards: int = 100, row_bytes: int = 150_528, **settings: object) -> Tuning:
    return Tuning.of(BuildConfig(**settings), choice, row_bytes=row_bytes, shard_rows=1024, shards=shards)


def test_a_gpu_gets_two_pipelines_that_share_all_cores_but_two() -> None:
    tuning = tuning_of(Choice("dali", (0,), cpus=16))
    assert (tuning.workers, tuning.threads, tuning.pipelines, tuning.prefetch) == (1, 14, 2, 3)
    assert (tuning.reading_threads, tuning.decoding_threads, tuning.batches_ahead) == (1, 6, 6)


@pytest.mark.parametrize(("gpus", "cores"), [(1, 1), (1, 2), (8, 8), (8, 16)])
def test_each_pipeline_has_a_thread_however_few_cores_there_are(gpus: int, cores: int) -> None:
    tuning = tuning_of(Choice("dali", tuple(range(gpus)), cpus=cores))
    assert tuning.workers == gpus
    assert min(tuning.threads, tuning.reading_threads, tuning.decoding_threads) == 1


def test_cpu_operators_have_one_pipeline_with_all_threads_of_a_worker() -> None:
    tuning = tuning_of(Choice("dali", cpus=8))
    assert (tuning.workers, tuning.threads, tuning.pipelines, tuning.prefetch) == (1, 8, 1, 2)
    assert (tuning.reading_threads, tuning.decoding_threads, tuning.batches_ahead) == (8, 8, 2)


def test_pillow_has_a_worker_per_core_and_never_more_than_shards() -> None:
    assert tuning_of(Choice("pillow", cpus=8)).workers == 8
    assert tuning_of(Choice("pillow", cpus=8), shards=3).workers == 3


@pytest.mark.parametrize(("row_bytes", "pillow", "dali"), [(150_528, 32, 32), (602_112, 8, 32), (1 << 27, 1, 2)])
def test_large_rows_make_small_batches(row_bytes: int, pillow: int, dali: int) -> None:
    assert tuning_of(Choice("pillow", cpus=2), row_bytes=row_bytes).batch_size == pillow
    assert tuning_of(Choice("dali", cpus=2), row_bytes=row_bytes).batch_size == dali
    assert tuning_of(Choice("pillow", cpus=2), row_bytes=row_bytes, batch_size=40).batch_size == 40


def test_what_the_settings_say_is_taken() -> None:
    given = {
        "workers": 2, "threads": 5, "prefetch": 7, "pipelines": 4, "open_shards": 3, "batch_size": 9,
        "hw_decoder_load": 0.25,
    }  # fmt: skip
    tuning = tuning_of(Choice("dali", (0, 1), cpus=16), **given)
    assert {name: getattr(tuning, name) for name in given} == given
    assert tuning_of(Choice("dali", (0,), cpus=16), reproducible=True).hw_decoder_load == 0.0


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, None), ((8, 9), None), ((9, 0), 0.0), ((10, 0), 0.0), ((12, 1), 0.0)]
)
def test_hardware_engines_are_off_where_they_have_not_been_seen_to_be_correct(
    capability: tuple[int, int] | None, expected: float | None
) -> None:
    choice = Choice("dali", (0,), cpus=16, capability=capability)
    assert tuning_of(choice).hw_decoder_load == expected
    assert tuning_of(choice, hw_decoder_load=0.5).hw_decoder_load == 0.5


def test_the_highest_capability_of_the_chosen_gpus_decides() -> None:
    machine = Machine(3, 13_000, None, None, None, capabilities=((8, 0), (9, 0), (8, 6)))
    assert choose(BuildConfig(), machine).capability == (8, 0)
    assert choose(BuildConfig(device="all"), machine).capability == (9, 0)
    assert choose(BuildConfig(device="0,2"), machine).capability == (8, 6)
    assert choose(BuildConfig(device="cpu"), machine).capability is None
