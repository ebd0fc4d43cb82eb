"""Statistics of SRC and of OUT: exact counts, the same by every way to them."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from support import MakeTree, cpu_config, encode

import gpu_npz
from gpu_npz.audit.stats import Statistics, of_dataset, of_source
from gpu_npz.cli.main import run
from gpu_npz.errors import FormatError, IncompleteError, ShardError, SourceError
from gpu_npz.workers import counting
from gpu_npz.workers.counting import count_levels

FILES = {
    "a/0.jpg": "jpeg",
    "a/1.jpg": "half",
    "a/2.jpg": "cmyk",
    "b/3.png": "alpha",
    "b/4.jpg": "empty",
    "c/5.jpg": "text",
}


settings = functools.partial(cpu_config, size="12x16", shard_size=2)


def counted(images: np.ndarray) -> list[list[int]]:
    """The levels of uint8 (N, H, W, C), counted by NumPy."""
    return [np.bincount(images[..., channel].ravel(), minlength=256).tolist() for channel in range(images.shape[3])]


def test_a_collection_is_counted_as_a_build_decodes_it(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree(FILES)
    gpu_npz.build(src, tmp_path / "out", settings(dtype="uint8", layout="NHWC"))
    images = gpu_npz.open_dataset(tmp_path / "out")[:]
    found = of_source(src, settings())
    assert [list(counts) for counts in found.histograms] == counted(images)
    assert found.channels == ("red", "green", "blue")
    assert (found.images, found.rejects_by_code) == (3, {"empty": 1, "not-an-image": 1, "truncated": 1})
    assert found.class_counts == {"a": 2, "b": 1, "c": 0}
    scaled = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, scaled.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, scaled.std(axis=0), rtol=1e-12)
    assert found.min == tuple(images.reshape(-1, 3).min(axis=0))
    assert found.max == tuple(images.reshape(-1, 3).max(axis=0))


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_a_dataset_has_the_statistics_of_its_source_in_the_order_red_green_blue(
    tree: Path, tmp_path: Path, channels: str, layout: str, dtype: str
) -> None:
    config = settings(channels=channels, layout=layout, dtype=dtype, normalize="signed", shard_size=15)
    gpu_npz.build(tree, tmp_path / "out", config)
    found, source = of_dataset(tmp_path / "out"), of_source(tree, config)
    assert found.histograms == source.histograms
    assert found.class_counts == source.class_counts
    assert (found.images, found.channels, found.mean) == (40, source.channels, source.mean)


def test_blank_rows_are_no_images(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree(FILES)
    gpu_npz.build(src, tmp_path / "out", settings(on_reject="blank"))
    found, source = of_dataset(tmp_path / "out"), of_source(src, settings())
    assert (found.images, found.histograms, found.class_counts) == (3, source.histograms, source.class_counts)
    assert found.rejects_by_code == source.rejects_by_code


@pytest.mark.parametrize(
    ("labels", "counts"), [("number", {"-3": 1, "41": 2}), ("weight", None), ("number,weight", None)]
)
def test_whole_numbers_are_counted_as_classes_are(
    make_tree: MakeTree, tmp_path: Path, labels: str, counts: dict[str, int] | None
) -> None:
    make_tree({f"{number}.jpg": "half" if number == 3 else "jpeg" for number in range(4)})
    rows = [f"images/{number}.jpg,{label},0.5" for number, label in enumerate((41, -3, 41, 7))]
    (tmp_path / "table.csv").write_text("\n".join(["path,number,weight", *rows]))
    config = settings(labels=labels, on_reject="blank")
    gpu_npz.build(tmp_path / "table.csv", tmp_path / "out", config)
    assert of_source(tmp_path / "table.csv", config).class_counts == counts
    assert of_dataset(tmp_path / "out").class_counts == counts


def test_processes_count_the_same(tree: Path) -> None:
    assert of_source(tree, settings(workers=2)) == of_source(tree, settings())


def test_dali_is_counted_too(tree: Path) -> None:
    pytest.importorskip("nvidia.dali")
    assert of_source(tree, settings(backend="dali", workers=1)).mean == pytest.approx(
        of_source(tree, settings()).mean, abs=1 / 255
    )


def test_a_process_that_dies_is_an_error_that_says_what_to_do(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = (signal.raise_signal, (signal.SIGKILL,))
    monkeypatch.setattr(counting._Work, "__reduce__", lambda work: killed)  # what the process does with its work
    with pytest.raises(ShardError, match=r"a process that decodes images died.*fewer --workers"):
        of_source(make_tree({"a/0.jpg": "jpeg"}), settings(workers=1))
    last_words = (os.system, ("echo free: invalid pointer >&2; kill -9 $PPID",))
    monkeypatch.setattr(counting._Work, "__reduce__", lambda work: last_words)
    with pytest.raises(ShardError, match=r"\nIt wrote last:\n  free: invalid pointer$"):
        of_source(make_tree({"a/0.jpg": "jpeg"}), settings(workers=1))


def test_mean_and_deviation_lose_nothing_at_a_size_where_floats_would() -> None:
    counts = [0] * 256
    counts[127], counts[128] = 10**18, 10**18 + 2
    found = Statistics("x", 1, {}, ("gray",), (tuple(counts),), None)
    assert found.mean == (127.5 / 255,)
    assert found.std == (0.5 / 255,)


def test_numbers_of_levels_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    for shape in ((3, 5, 7, 3), (3, 5, 7, 1), (1, 1, 1, 3), (0, 5, 7, 3)):
        pixels = random.integers(0, 256, shape, np.uint8)
        assert count_levels(pixels).tolist() == counted(pixels)
    assert count_levels(np.moveaxis(pixels, 1, 2)).tolist() == counted(pixels)


def test_what_cannot_be_counted_says_why(make_tree: MakeTree, tmp_path: Path) -> None:
    src, out = make_tree({"a/0.jpg": "half", "a/1.jpg": "text"}), tmp_path / "out"
    with pytest.raises(SourceError, match=r"none of 2 items can be decoded \(1 not-an-image, 1 truncated\)"):
        of_source(src, settings())
    gpu_npz.build(src, out, settings(max_rejects="100%"))
    with pytest.raises(FormatError, match="holds no images: all 2 items were rejected"):
        of_dataset(out)
    (out / "dataset.json").unlink()
    with pytest.raises(IncompleteError, match="is not complete"):
        of_dataset(out)
    with pytest.raises(SourceError, match="holds no images"):
        of_source(make_tree({"empty/": ""}) / "empty", settings())


def test_values_that_do_not_tell_levels_apart_and_cut_shards_are_refused(tree: Path, tmp_path: Path) -> None:
    flat, cut = tmp_path / "flat", tmp_path / "cut"
    gpu_npz.build(tree, flat, settings(mean=(-1e8,) * 3, std=(1,) * 3, limit=2))
    gpu_npz.build(tree, tmp_path / "own", settings(normalize="minmax", limit=2))
    with pytest.raises(FormatError, match=r"by its own statistics \(minmax\), .*; give SRC instead"):
        of_dataset(tmp_path / "own")
    with pytest.raises(FormatError, match="do not tell the 256 levels apart; give SRC"):
        of_dataset(flat)
    gpu_npz.build(tree, cut, settings(limit=6))
    os.truncate(cut / "shard-00001.npz", 5000)
    with pytest.raises(FormatError, match=r"shard-00001\.npz"):
        of_dataset(cut)


def test_the_last_line_normalizes_a_build(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stats", str(tree), "--size", "16", "--device", "cpu", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tree}: 40 images"
    assert [line.split()[0] for line in lines[2:6]] == ["red", "green", "blue", "classes"]
    options = lines[-1].split()
    assert options[::2] == ["--mean", "--std"]
    out = str(tmp_path / "out")
    assert run(["build", str(tree), out, "--size", "16", "--device", "cpu", "--workers", "0", "--quiet", *options]) == 0
    values = np.stack(list(gpu_npz.open_dataset(out)))
    np.testing.assert_allclose(values.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(axis=(0, 2, 3)), 1, atol=1e-4)
    assert run(["stats", out, "--json"]) == 0
    red = json.loads(capsys.readouterr().out)["channels"][0]
    assert f"{red['mean']:.6g}" == f"{float(options[1].split(',')[0]):.6g}"
    assert len(red["histogram"]) == 256


def test_a_collection_of_one_level_has_no_line_for_a_build(
    make_tree: MakeTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_tree({"0.png": encode(np.full((4, 4), 9, np.uint8), "PNG")})
    config = tmp_path / "settings.toml"
    config.write_text('channels = "gray"\nmean = [0.5]\nstd = [0.5]\n')
    assert run(["stats", str(src), "--config", str(config), "--device", "cpu", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "there is no --std for it" in out
    assert "classes" not in out


def test_of_a_split_the_statistics_are_those_of_train(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(split="val=0.3", normalize="dataset")
    gpu_npz.build_split(tree, tmp_path / "out", config)
    train = of_source(tree, config)
    assert train == of_source(tree, settings(split="val=0.3/train"))
    assert (train.side, train.images, train.histograms) == ("train", 28, of_dataset(tmp_path / "out/train").histograms)
    assert gpu_npz.open_dataset(tmp_path / "out/val").manifest.settings["mean"] == list(train.mean)
    val = of_source(tree, settings(split="val=0.3/val"))
    assert (val.side, val.images, val.histograms) == ("val", 12, of_dataset(tmp_path / "out/val").histograms)
    options = ["--size", "16", "--device", "cpu", "--workers", "0"]
    assert run(["stats", str(tree), "--split", "val=0.3", *options]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tree}: 28 images of train alone, as --split takes them"
    assert run(["stats", str(tree), "--split", "val=0.3", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["side"] == "train"
    assert of_source(tree, settings()).side is None


@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize("bits", ["8", "16"])
def test_options_that_statistics_and_info_print_are_taken_by_a_build(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: str, bits: str
) -> None:
    options = ["--size", "16", "--device", "cpu", "--workers", "0", "--channels", channels, "--bit-depth", bits]
    if bits == "16":
        pytest.importorskip("imagecodecs")
    assert run(["stats", str(tree), *options]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert run(["build", str(tree), str(tmp_path / "a"), *options, *printed]) == 0
    measured = ["--normalize", "dataset", "--background", "1,2,3"]
    assert run(["build", str(tree), str(tmp_path / "b"), *options, *measured]) == 0
    capsys.readouterr()
    assert run(["info", str(tmp_path / "b")]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    given = [*rows["normalized"].split(), *re.findall(r"--(?:size|background) \S+", rows["settings"])]
    given = [word for option in given for word in option.split()]
    assert "--background" in given
    assert run(["build", str(tree), str(tmp_path / "c"), *options, *given]) == 0
    there, here = (gpu_npz.open_dataset(tmp_path / name) for name in "bc")
    np.testing.assert_array_equal(there[:], here[:])


def test_settings_are_refused_for_a_dataset(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_npz.build(tree, tmp_path / "out", settings(limit=2))
    assert run(["stats", str(tmp_path / "out"), "--size", "32"]) == 2
    assert "leave the settings out" in capsys.readouterr().err
    assert run(["stats", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
