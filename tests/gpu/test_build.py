"""Whole builds on a GPU. Where there is none, these are skipped, or fail if GPU_NPZ_REQUIRE_GPU=1 promised one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import gpu_npz
from gpu_npz import BuildConfig

pytestmark = pytest.mark.gpu

# Decoders on the GPU and on the CPU share no code for the inverse DCT and the upsampling of chroma: a level or two at
# most pixels, more at hard edges. Where the mean is larger, something else differs (a wrong filter, an offset).
MEAN_LEVELS = 1.0


def build(src: Path, out: Path, **settings: object) -> gpu_npz.Dataset:
    gpu_npz.build(src, out, BuildConfig(**{"size": 64, "shard_size": "16", "max_rejects": "100%", **settings}))
    assert gpu_npz.verify(out).ok
    return gpu_npz.open_dataset(out)


def test_a_gpu_build_has_the_cpu_operators_rows_within_the_tolerance(tree: Path, tmp_path: Path) -> None:
    gpu = build(tree, tmp_path / "gpu", device="0", require_gpu=True, dtype="uint8")
    cpu = build(tree, tmp_path / "cpu", device="cpu", backend="dali", dtype="uint8")
    assert gpu.manifest.environments[0]["device"] == "cuda"
    assert list(gpu.paths) == list(cpu.paths)
    difference = np.abs(gpu[:].astype(np.int16) - cpu[:])
    print(f"GPU against CPU operators: mean {difference.mean():.3f}, max {difference.max()} levels")
    assert difference.mean() <= MEAN_LEVELS


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_gpu_build_normalizes_its_own_pixels_exactly(dtype: str, layout: str, tree: Path, tmp_path: Path) -> None:
    common = {"device": "0", "reproducible": True, "layout": layout}
    pixels = build(tree, tmp_path / "uint8", dtype="uint8", **common)
    values = build(tree, tmp_path / "values", dtype=dtype, **common)
    assert np.array_equal(pixels.normalized(slice(None)).astype(dtype), values[:])


def test_a_reproducible_gpu_build_has_the_same_bytes_twice_and_in_other_batches(tree: Path, tmp_path: Path) -> None:
    for name, batch_size in (("one", 16), ("two", 16), ("three", 5)):
        build(tree, tmp_path / name, device="0", reproducible=True, batch_size=batch_size)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("shard-*.npz")}
    assert shards
    for name in ("two", "three"):
        assert shards == {path.name: path.read_bytes() for path in (tmp_path / name).glob("shard-*.npz")}


def test_bad_files_become_the_same_rejects_on_a_gpu_as_on_the_cpu(
    make_tree: Callable[[Mapping[str, str]], Path],
    bad_kinds: dict[str, tuple[str, str]],
    good_kinds: tuple[str, ...],
    tmp_path: Path,
) -> None:
    src = make_tree({f"all/{number:02}-{kind}.jpg": kind for number, kind in enumerate((*bad_kinds, *good_kinds))})
    build(src, tmp_path / "gpu", device="0")
    build(src, tmp_path / "cpu", device="cpu", backend="pillow")
    assert (tmp_path / "gpu/rejects.jsonl").read_bytes() == (tmp_path / "cpu/rejects.jsonl").read_bytes()


def test_a_gpu_build_that_lost_shards_goes_on_on_the_gpu_and_never_on_the_cpu(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(tree, out, device="0", reproducible=True)
    before = {path.name: path.read_bytes() for path in out.glob("*") if path.is_file()}
    (out / "shard-00001.npz").unlink()
    with pytest.raises(gpu_npz.GpuNpzError, match="started with backend dali on cuda"):
        build(tree, out, device="cpu", reproducible=True)
    build(tree, out, reproducible=True)
    assert before == {path.name: path.read_bytes() for path in out.glob("*") if path.is_file()}
