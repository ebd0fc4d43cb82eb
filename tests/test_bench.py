"""The benches run, tiny, so that they cannot rot. What they measure is asserted nowhere."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_npz import build, open_dataset
from gpu_npz.bench import loading, peers, pipeline, storage, sweep
from gpu_npz.bench.formats import Images, Npy
from gpu_npz.bench.pictures import make_images
from gpu_npz.bench.rates import Row, Tick, in_turns, linked, rate
from gpu_npz.builder import pace
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.errors import FormatError, UsageError
from gpu_npz.sources.arrays.cifar import Cifar

BACKENDS = [
    ["--backend", "pillow", "--device", "cpu"],
    ["--backend", "dali", "--device", "cpu"],
    pytest.param(["--device", "0", "--require-gpu"], marks=pytest.mark.gpu),
]
STAGES = ["read", "decode", "resize", "normalize", "write"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that must end well and gives what it prints, as JSON where it is that."""

    def call(*arguments: str) -> Any:
        assert run(list(arguments)) == 0
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return call


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns its first result again, whatever its arguments."""
    results: list[Any] = []

    def call(*arguments: Any, **options: Any) -> Any:
        if not results:
            results.append(function(*arguments, **options))
        return results[0]

    return call


@pytest.mark.parametrize("backend", BACKENDS, ids=" ".join)
def test_bench_pipeline_measures_each_stage_and_whole_builds(
    backend: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    if "dali" in backend:
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(pipeline, "_WRITER_BATCH_ROWS", 2)
    monkeypatch.setattr(pipeline, "measure", once(pipeline.measure))
    options = ["--images", "20", "--rounds", "2", "--folder", str(tmp_path), "--size", "32", "--batch-size", "8"]
    result = printed("bench", "pipeline", str(tree), *backend, *options, "--json")
    rows = {row["name"]: row for row in result["rows"]}
    on_gpu, by_pillow = "--require-gpu" in backend, "pillow" in backend
    expected = STAGES[:-1] + ["transfer"] * on_gpu + STAGES[-1:]
    assert list(rows)[: len(expected)] == expected
    assert {"build float32", "build float16", "build uint8", "savez", "bare write", "shard writer"} <= rows.keys()
    assert ("loop uint8" in rows) == by_pillow
    assert "usual script" in rows["all cores float32"]["shares"] if by_pillow else "usual script" not in rows
    for before, name in itertools.pairwise(expected):
        assert before in rows[name]["shares"]
    assert "resize" in rows["build uint8"]["shares"]
    assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in rows.values())
    assert rows["build uint8"]["start_s"] > 0 < rows["build uint8"]["end_s"]
    assert (result["settings"]["images"], result["settings"]["batch_size"]) == (20, 8)
    assert {"processor", "cores", "numpy", "pillow", "libjpeg", "device"} <= result["machine"].keys()
    assert not list(tmp_path.iterdir())
    text = printed("bench", "pipeline", str(tree), *backend, *options)  # the same measurement, in words
    assert "of savez" in text
    assert "of resize" in text


@pytest.mark.parametrize("backend", BACKENDS, ids=" ".join)
def test_a_sweep_tries_options_of_the_backend_but_those_that_are_given(
    backend: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    if "dali" in backend:
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(sweep, "_FIRST_IMAGES", 16)
    monkeypatch.setattr(sweep, "_IMAGES", {"cuda": 64, "cpu": 64})
    monkeypatch.setattr(sweep.sweep, "__kwdefaults__", {**sweep.sweep.__kwdefaults__, "cell_s": 0.05})
    options = ["--sweep", "--size", "32", "--open-shards", "1", "--folder", str(tmp_path)]
    result = printed("bench", "pipeline", str(tree), *backend, *options, "--json")
    tried = {name for trial in result["trials"] for name in trial["options"]}
    assert "batch_size" in tried
    assert "open_shards" not in tried
    assert ("workers" in tried) == ("pillow" in backend)
    assert ("prefetch" in tried) == ("pipelines" in tried) == ("pillow" not in backend)
    assert ("hw_decoder_load" in tried) == ("--require-gpu" in backend)
    assert result["default"]["open_shards"] == 1
    assert [trial["images_per_second"] > 0 for trial in result["trials"]] == [True] * len(result["trials"])
    assert result["builds"][0]["options"] == {}
    assert result["share"] > 0
    assert not list(tmp_path.iterdir())


def test_a_sweep_prints_the_options_that_were_plainly_faster(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    cells = [100.0, 150.0, 120.0, 90.0]
    rates = iter([100.0] * 2 + cells + [100.0, 150.0])
    monkeypatch.setattr(sweep, "_IMAGES", {"cuda": 64, "cpu": 64})
    monkeypatch.setattr(sweep, "rate", lambda way: pace.Pace(next(rates), 0.0, 0.0))
    options = ["--sweep", "--device", "cpu", "--folder", str(tmp_path), "--open-shards", "1"]
    text = printed("bench", "pipeline", str(tree), *options)
    assert "reaches 1.00 of" in text
    assert text.endswith("1.50 times as fast as a build's own choice:\n    --batch-size 16\n")
    rates = iter([100.0] * 2 + cells + [100.0, 101.0])  # it was chance
    assert "nothing was plainly faster" in printed("bench", "pipeline", str(tree), *options)


def test_a_sweep_that_has_no_time_left_tries_nothing_more(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_IMAGES", {"cuda": 64, "cpu": 64})
    found = sweep.sweep(tree, seconds=0, cell_s=0.1, folder=str(tmp_path))
    assert [trial.options for trial in (*found.trials, *found.builds)] == [{}, {}, {}]


def test_bench_worker_measures_every_stage_and_leaves_headers_out(tmp_path: Path, printed: Callable[..., Any]) -> None:
    pytest.importorskip("nvidia.dali")
    options = ["--device", "cpu", "--images", "64", "--rounds", "2", "--batch-size", "16", "--folder", str(tmp_path)]
    result = printed("bench", "worker", *options, "--json")
    assert list(result["stages"]) == ["plan", "read", "decode", "worker"]
    assert result["total"] == pytest.approx(sum(result["stages"].values()))
    assert min(result["total"], result["headers"]) > 0
    assert (result["settings"]["images"], result["settings"]["batch_size"]) == (64, 16)
    assert not list(tmp_path.iterdir())
    assert "us per image to parse headers" in printed("bench", "worker", *options)


def test_the_first_round_and_the_first_batch_of_each_way_do_not_count() -> None:
    rounds = []

    def way(tick: Tick) -> None:
        rounds.append(len(rounds))
        for _ in range(3):
            tick(10)

    (row,) = in_turns({"way": ((), way)}, 2, lambda text: None)
    assert (len(rounds), len(row.rates)) == (3, 2)


def test_a_rate_counts_from_the_first_step_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 11.0, 12.0, 17.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(times))

    def way(tick: Tick) -> None:
        for images in (100, 40, 0):
            tick(images)

    assert rate(way) == pace.Pace(20.0, 10.0, 5.0)


def test_a_rate_of_a_single_step_includes_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(times))
    assert rate(lambda tick: tick(100)) == pace.Pace(5.0, 0.0, 0.0)


def test_benches_link_files_and_copy_them_where_a_link_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = {path.stat().st_ino for path in tree.rglob("*") if path.is_file()}
    place = linked(tree, tmp_path / "links", len(originals) + 3)
    assert {path.stat().st_ino for path in place.glob("*/*")} == originals
    real, refused = os.link, []

    def link(source: str, path: str) -> None:
        if not Path(source).is_relative_to(tmp_path / "copies"):
            refused.append(source)
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, path)

    monkeypatch.setattr(os, "link", link)
    copies = [path.stat() for path in linked(tree, tmp_path / "copies", len(originals) + 3).glob("*/*")]
    assert len(copies) == len(originals) + 3
    assert len({copy.st_ino for copy in copies}) == len(refused) == len(originals)
    assert originals.isdisjoint(copy.st_ino for copy in copies)


def test_resize_mode_none_is_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "pipeline", str(tree), "--resize-mode", "none"]) == 2
    assert "choose another mode" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return str(make_images(tmp_path / "pictures", count=8, broken=False).folder)


def test_bench_writers_compares_builds_with_the_writers_that_are_there(
    pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    packages = {"litdata": ("no-such-litdata",), "mds": ("no-such-mds", "numpy"), "savez": ("numpy", "pillow")}
    monkeypatch.setattr(peers, "NEEDED", packages)
    place = tmp_path / "place"
    place.mkdir()
    options = ["--images", "20", "--rounds", "2", "--size", "16", "--batch-size", "2", "--folder", str(place)]
    result = printed("bench", "writers", pictures, *options, "--json")
    shares = {row["name"]: list(row["shares"]) for row in result["rows"]}
    assert shares == {
        "decode+resize": [],
        "savez uint8": [],
        "build uint8": ["savez uint8", "decode+resize"],
        "savez float32": [],
        "build float32": ["savez float32", "decode+resize"],
    }
    assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 < row["start_s"] for row in result["rows"])
    assert [line.split(";")[0] for line in result["left_out"]] == [
        "litdata is left out, because no-such-litdata cannot be found",
        "mds is left out, because no-such-mds cannot be found",
    ]
    assert f"{sys.executable} -m pip install no-such-mds" in result["left_out"][1]
    assert {"peers' python", "peers' numpy", "peers' pillow", "load before"} <= result["machine"].keys()
    assert not list(place.iterdir())


_LITDATA = """
import numpy

def optimize(fn, inputs, output_dir, chunk_bytes, num_workers):
    samples = [fn(entry) for entry in inputs]
    assert num_workers and {sample["label"] for sample in samples} == set(range(20))
    numpy.save(f"{output_dir}/chunk.npy", [sample["image"] for sample in samples])
"""
_STREAMING = """
import os

class MDSWriter:
    def __init__(self, out, columns):
        os.mkdir(out)
        self.dtype = columns["image"].split(":")[1]
        assert columns == {"image": f"ndarray:{self.dtype}:3,16,16", "label": "int"}
        self.file = open(f"{out}/shard.mds", "wb")
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, sample):
        assert (sample["image"].shape, sample["image"].dtype) == ((3, 16, 16), self.dtype)
        self.file.write(sample["image"])
"""
_UTIL = """
import os

def merge_index(out, keep_local):
    sizes = [os.path.getsize(f"{out}/{group}/shard.mds") for group in os.listdir(out)]
    assert len(sizes) > 1 and sum(sizes) in (20 * 768, 20 * 3072)
"""


def test_bench_writers_runs_other_libraries_in_an_environment_of_theirs(
    pictures: str, tmp_path: Path, printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    files = {
        "litdata.py": _LITDATA,
        "streaming/__init__.py": _STREAMING,
        "streaming/base/util.py": _UTIL,
        "litdata-1.2.dist-info/METADATA": "Name: litdata\nVersion: 1.2\n",
        "mosaicml_streaming-3.4.dist-info/METADATA": "Name: mosaicml-streaming\nVersion: 3.4\n",
    }
    for name, text in files.items():
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={theirs} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--images", "20", "--rounds", "1", "--size", "16", "--batch-size", "1", "--peers", str(python)]
    text = printed("bench", "writers", pictures, *options)
    assert "litdata 1.2, mosaicml-streaming 3.4, " in text
    assert all(f"{name} {dtype}" in text for name in ("litdata", "mds", "savez") for dtype in ("uint8", "float32"))
    assert "left out" not in text
    (theirs / "litdata.py").write_text("raise OSError('its library does not load')\n")
    assert run(["bench", "writers", pictures, *options]) == 1
    message = capsys.readouterr().err
    assert "litdata failed in" in message
    assert message.endswith("OSError: its library does not load\n")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_other_writers_store_the_rows_of_a_build(dtype: str, pictures: str, tmp_path: Path) -> None:
    config = BuildConfig(size="24x16", dtype=dtype, resizer="pillow", workers=0, device="cpu", exif_orientation=False)
    build(pictures, tmp_path / "built", config)
    ours = open_dataset(tmp_path / "built")
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    folders = {"src": pictures, "out": str(tmp_path / "out"), "scratch": str(tmp_path / "scratch")}
    job = peers.Job(**folders, workers=2, dtype=dtype, size=(24, 16), config={})
    peers.main(["savez", json.dumps(job)])
    with np.load(tmp_path / "out" / "00000000.npz") as theirs:
        np.testing.assert_allclose(theirs["images"], ours[:], atol=1e-6 * (dtype == "float32"))  # roundings in float32
        assert theirs["images"].dtype == dtype
        np.testing.assert_array_equal(theirs["labels"], ours.labels)
    span = json.loads((tmp_path / "scratch" / peers.SPAN).read_bytes())
    assert (span["images"], span["first"] < span["last"]) == (7, True)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--peers", "no-such-python"], 2, "use one such as"),
        (["--peers", "/bin/true"], 2, "cannot be run as a Python interpreter"),
        (["--images", "2"], 2, "use more --images or a smaller --batch-size"),
    ],
)
def test_bench_writers_refuses_what_it_cannot_measure(
    options: list[str], code: int, message: str, pictures: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "writers", pictures, *options]) == code
    assert message in capsys.readouterr().err


STORES = ["png files", "lmdb", "hdf5", "hdf5 gzip", "npy", "npz", "npz compressed", "gpu-npz", "gpu-npz deflate"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_READS", 4)
    monkeypatch.setattr(storage, "_WRITES", 1)


@pytest.mark.usefixtures("quick")
def test_bench_storage_writes_and_reads_the_same_rows_in_every_format(
    tree: Path, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    plot, place = tmp_path / "plot.png", tmp_path / "place"
    place.mkdir()
    options = ["--images", "20", "--rounds", "2", "--folder", str(place), "--size", "16", "--shard-size", "8"]
    result = printed("bench", "storage", str(tree), *options, "--plot", str(plot), "--json")
    operations = {operation["name"]: operation["rows"] for operation in result["operations"]}
    assert list(operations) == [
        "write 1 image", "write 10 images", "write 20 images", "read one at random", "read all in order",
        "DataLoader, 64 a batch",
    ]  # fmt: skip
    assert [row["name"] for row in operations.pop("DataLoader, 64 a batch")] == ["image files", "gpu-npz"]
    for rows in operations.values():
        assert [row["name"] for row in rows] == list(result["stored_bytes"]) == STORES
        assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in rows)
        assert all(len(row["shares"]) == (not row["name"].startswith("gpu-npz")) for row in rows)
    assert (
        min(result["stored_bytes"][name] for name in ("lmdb", "hdf5", "npy", "npz", "gpu-npz")) > 20 * 3 * 16 * 16 * 4
    )
    assert (result["settings"]["images"], result["settings"]["dtype"]) == (20, "float32")
    assert {"lmdb", "h5py", "numpy", "pillow"} <= result["machine"].keys()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not list(place.iterdir())


@pytest.mark.usefixtures("quick")
def test_bench_storage_leaves_a_format_out_whose_library_is_missing_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    text = printed("bench", "storage", "--images", "3", "--rounds", "1", "--size", "16", "--folder", str(tmp_path))
    assert text.rstrip().splitlines()[-1].startswith("lmdb is left out (")
    assert text.rstrip().endswith("; run: pip install lmdb")
    assert sum(line.startswith("  hdf5 gzip ") for line in text.splitlines()) == 5  # four operations and the size
    assert " of gpu-npz deflate" in text


def test_bench_storage_says_in_words_where_another_format_is_better() -> None:
    rows = (Row("lmdb", ("gpu-npz",), (30.0, 33.0), 0.0), Row("gpu-npz", (), (20.0, 22.0), 0.0))
    operation = storage.Operation("read one at random", 5, rows)
    sizes = {"lmdb": 500, "npz compressed": 300, "gpu-npz": 499, "gpu-npz deflate": 400}
    measured = storage.StorageMeasurement((operation,), sizes, (), {}, {})
    assert measured.beaten() == (
        "read one at random: lmdb is 1.50 times as fast as gpu-npz",
        "size: npz compressed takes 0.75 of what gpu-npz deflate takes",
    )


@pytest.mark.usefixtures("quick")
def test_bench_storage_takes_as_many_images_as_fit_and_cifar_at_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    cifar = Cifar(pixels, np.arange(6) % 2, ("a", "b"))
    place = storage.cifar_files(cifar, tmp_path / "cifar", 5)
    monkeypatch.setattr(storage, "available_memory", lambda: 4 * storage._COPIES * 3072 * 5 // 4)
    config = BuildConfig(size=32, dtype="uint8", layout="NHWC")
    measured = storage.measure(place, config, images=100, rounds=1, folder=str(tmp_path))
    assert "100 images in all formats take 3.4 MB, and memory has" in caplog.text
    assert (measured.settings["images"], measured.settings["shape"]) == (4, [32, 32, 3])
    monkeypatch.setattr(storage, "available_memory", lambda: 100)
    with pytest.raises(UsageError, match="not one fits"):
        storage.measure(place, config, folder=str(tmp_path))


def test_a_format_that_gives_other_rows_back_is_no_match(tmp_path: Path) -> None:
    rows = np.zeros((3, 3, 4, 4), np.float32)
    images = Images(rows, np.zeros((3, 4, 4, 3), np.uint8), BuildConfig(size=4), 2)
    Npy().write(images, tmp_path)
    storage._require_equal(Npy(), images, tmp_path)
    rows[1, 0, 0, 0] = -0.0
    with pytest.raises(FormatError, match="npy: 1 of 3 rows came back changed"):
        storage._require_equal(Npy(), images, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["SRC", "--cifar", "DIR"], "give one of them"), (["SRC", "--resize-mode", "none"], "choose another mode")],
)
def test_bench_storage_refuses_what_makes_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "storage", *arguments]) == 2
    assert message in capsys.readouterr().err


LOADING = ["loop", "loader", "DataLoader, collate", "DataLoader", "ShardIterable", "ShardIterable, global_batch"]


@pytest.mark.parametrize("stored", [False, True], ids=["float32", "uint8"])
def test_bench_loading_measures_every_way_and_says_which_others_are_missing_or_fail(
    stored: bool, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    pytest.importorskip("torch")
    libraries, place = tmp_path / "libraries", tmp_path / "place"
    libraries.mkdir()
    place.mkdir()
    (libraries / "ffcv.py").write_text("raise ImportError('no turbojpeg')")
    (libraries / "litdata.py").write_text("raise ImportError('not here')")
    (libraries / "streaming.py").write_text("raise ValueError('of another time')")
    monkeypatch.syspath_prepend(str(libraries))
    monkeypatch.setattr(loading, "measure", once(loading.measure))
    options = ["--images", "20", "--rounds", "2", "--batch-size", "6", "--size", "16", "--folder", str(place)]
    options += ["--stored"] * stored
    result = printed("bench", "loading", str(tree), *options, "--json")
    assert [row["name"] for row in result["rows"]] == [*LOADING, "image files"]
    assert [set(row["shares"]) for row in result["rows"]] == [set(), {"loop"}, *[{"loop", "loader"}] * 5]
    assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in result["rows"])
    assert all(len(row["memory_bytes"]) == 2 for row in result["rows"])
    if sys.platform == "linux":
        memory = {row["name"]: min(row["memory_bytes"]) for row in result["rows"]}
        assert memory["DataLoader"] > memory["loop"] > 1 << 20  # that of three processes, and of one
    expected = {"images": 20, "shape": [3, 16, 16], "dtype": "uint8" if stored else "float32", "batch_size": 6}
    assert expected.items() <= result["settings"].items()
    assert {"torch", "pillow", "numpy", "processor"} <= result["machine"].keys()
    ffcv, litdata, mosaicml = result["left_out"]
    assert ffcv.startswith("FFCV is left out (no turbojpeg); run: apt-get install ")
    assert litdata == "LitData is left out (not here); run: pip install litdata"
    assert mosaicml.startswith("MosaicML Streaming: ValueError: of another time; it is left out")
    assert not list(place.iterdir())
    lines = printed("bench", "loading", str(tree), *options).splitlines()  # the same measurement, in words
    assert lines[-3:] == result["left_out"]
    assert any(line.startswith("image files") and line.endswith(" of loader") for line in lines)


def test_bench_loading_refuses_a_way_that_delivers_other_images(tree: Path) -> None:
    first = loading.Epoch(20, ("float32", (3, 16, 16)), 0.5, 1.0, None)
    for change, message in (
        ({"images": 19}, "again: an epoch had 19 images"),
        ({"kind": ("float32", (3, 16, 17))}, r"\(3, 16, 17\)"),
        ({"mean": 0.51}, r"mean 0.51, deviation 1; expected"),
        ({"deviation": 0.0}, r"deviation 0; expected"),
    ):
        with pytest.raises(FormatError, match=message):
            loading._require_same("again", dataclasses.replace(first, **change), first, 0.0)
    loading._require_same("again", dataclasses.replace(first, mean=0.5001), first, 0.0)
    loading._require_same("again", dataclasses.replace(first, mean=0.6), first, 0.2)
    with pytest.raises(UsageError, match="choose another mode"):
        loading.measure(tree, BuildConfig(resize_mode="none"))


def test_bench_loading_compares_random_crops(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Callable[..., Any]
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "ffcv.py").write_text("raise ImportError('no turbojpeg')")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--images", "20", "--rounds", "1", "--batch-size", "6", "--size", "16"]
    result = printed("bench", "loading", str(tree), *options, "--augment", "rrc-flip", "--crop-size", "12x10", "--json")
    ours, files = LOADING[1:], ["image files"] if importlib.util.find_spec("torchvision") else []
    assert [row["name"] for row in result["rows"]] == [*ours, *files]
    assert [set(row["shares"]) for row in result["rows"]] == [set(), *[{"loader"}] * (len([*ours, *files]) - 1)]
    expected = {"shape": [3, 12, 10], "dtype": "float32", "augment": "rrc-flip", "stored_shape": [3, 16, 16]}
    assert expected.items() <= result["settings"].items()
    others, *missing = result["left_out"]
    assert others == "not measured with --augment rrc-flip: loop, LitData, MosaicML Streaming"
    assert [text.split(" is left out")[0] for text in missing] == ["image files"] * (not files) + ["FFCV"]
    assert files or missing[0].endswith("run: pip install torchvision")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-size", "8"], "crop-size: got '8', but whole images are delivered; give --augment rrc-flip, too"),
        (["--crop-size", "0", "--augment", "rrc-flip"], "crop-size: got '0'; allowed: N or HxW, each side 1 to 16384"),
    ],
)
def test_bench_loading_refuses_sizes_of_crops_that_make_no_sense(
    arguments: list[str], message: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "loading", str(tree), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
