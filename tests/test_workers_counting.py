"""`--normalize dataset`: mean and std of the source's own pixels, measured once, before the first shard."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeTree, cpu_config, encode

import gpu_npz
from gpu_npz import Measuring, Preprocess
from gpu_npz.audit.stats import of_source
from gpu_npz.builder.build import build
from gpu_npz.builder.estimate import estimate
from gpu_npz.cli.main import run
from gpu_npz.errors import MismatchError, SourceError, UsageError

FILES = {"a/0.jpg": "jpeg", "a/1.jpg": "half", "a/2.jpg": "cmyk", "b/3.png": "alpha", "b/4.jpg": "jpeg"}


settings = functools.partial(cpu_config, shard_size=2, normalize="dataset")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_values_have_mean_zero_and_deviation_one(make_tree: MakeTree, tmp_path: Path, dtype: str, workers: int) -> None:
    src = make_tree(FILES)
    seen: list[Any] = []
    build(src, tmp_path / "out", settings(dtype=dtype, workers=workers), progress=seen.append)
    assert Measuring(5, 5) in seen
    found = of_source(src, settings())
    data = gpu_npz.open_dataset(tmp_path / "out")
    assert data.manifest.normalization
    assert (data.manifest.normalization.mean, data.manifest.normalization.std) == (found.mean, found.std)
    values = data.normalized(slice(None)).astype(np.float64)
    np.testing.assert_allclose(values.mean(axis=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(axis=(0, 2, 3)), 1, atol=1e-6)
    assert gpu_npz.verify(tmp_path / "out").ok
    preprocess = Preprocess.from_dataset(tmp_path / "out")
    np.testing.assert_array_equal(preprocess(src / "a/0.jpg"), data[0])


def test_it_is_measured_once_and_resumed_with_the_same_command(make_tree: MakeTree, tmp_path: Path) -> None:
    src, out = make_tree(FILES), tmp_path / "out"
    build(src, out, settings(part="1/2"))
    seen: list[Any] = []
    (src / "a/2.jpg").unlink()  # what is left would give other statistics
    assert build(src, out, settings(), progress=seen.append).complete
    assert not [event for event in seen if isinstance(event, Measuring)]
    with pytest.raises(MismatchError, match="normalize: existing dataset, requested imagenet"):
        build(src, out, settings(normalize="imagenet"))
    with pytest.raises(UsageError, match="measures both --mean and --std"):
        settings(mean=(0.5, 0.5, 0.5))


def test_what_cannot_be_normalized_is_told(make_tree: MakeTree, tmp_path: Path) -> None:
    black = make_tree({"a/1.png": encode(np.zeros((20, 20, 3), np.uint8), "PNG")})
    with pytest.raises(UsageError, match=r"has only one level .*choose another --normalize"):
        build(black, tmp_path / "black", settings())
    (black / "a/1.png").write_text("no image")
    with pytest.raises(SourceError, match="no image can be decoded, so --normalize dataset"):
        build(black, tmp_path / "none", settings())


def test_the_command_line_knows_it(make_tree: MakeTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make_tree(FILES)
    options = ["--normalize", "dataset", "--size", "16", "--device", "cpu", "--workers", "1"]
    assert run(["build", str(src), str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    found = estimate(src, settings(), seconds=0)
    assert any("nearly twice as long" in warning for warning in found.warnings)
    assert run(["bench", "pipeline", str(src), "--images", "2", "--rounds", "1", *options[:-2]]) == 2
    assert "give --mean and --std here" in capsys.readouterr().err
