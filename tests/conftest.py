"""What all tests share: the kinds of images, trees and datasets of them, and what to do where there is no GPU."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import BAD, DAMAGED, GOOD, MakeDataset, MakeTree, build_cpu, file_bytes


@functools.cache
def _why_no_gpu() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns where it finds no CUDA
            import cupy
    except ImportError as exc:
        return f"CuPy cannot be imported: {exc}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as exc:  # CUDARuntimeError, or whatever the loader of a missing library raises
        return f"CUDA has no usable GPU: {exc}"
    return None if count > 0 else "CUDA counts no GPU"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or (reason := _why_no_gpu()) is None:
        return
    if os.environ.get("GPU_NPZ_REQUIRE_GPU") == "1":
        pytest.fail(f"GPU_NPZ_REQUIRE_GPU=1 promised a GPU, but {reason}", pytrace=False)
    pytest.skip(f"NOT TESTED, no GPU: {reason} (with GPU_NPZ_REQUIRE_GPU=1 this fails)")


# The files that take longest. They come first: a process that begins one last keeps the others waiting.
LONGEST = ("test_published.py", "test_workers_ray.py", "test_docker.py", "test_npz.py", "test_workers_local.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files that have most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk() -> Iterator[None]:
    """Turns `os.fsync` into a check of its descriptor, except in processes that a test starts.

    It takes milliseconds, thousands of times, and changes nothing that a running machine could read.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (os.fstat(descriptor), None)[1])
        yield


@pytest.fixture(autouse=True)
def own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes the library's logger over; the next test gets it back."""
    logger = logging.getLogger("gpu_npz")
    monkeypatch.setattr(logger, "handlers", logger.handlers)
    monkeypatch.setattr(logger, "propagate", logger.propagate)


@pytest.fixture(scope="session")
def good_kinds() -> tuple[str, ...]:
    """The kinds that must be decoded, the damaged ones that nobody can tell among them."""
    return (*GOOD, *DAMAGED)


@pytest.fixture(scope="session")
def bad_kinds() -> dict[str, tuple[str, str]]:
    """The kinds that must become rejects, each with its stage and its code."""
    return {kind: (stage, code) for kind, (stage, code, _) in BAD.items()}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of all good kinds in three classes, one of them in two folders. Read only: all tests share it."""
    root = tmp_path_factory.mktemp("tree")
    folders = ("apples", "berries", "berries/red", "cherries")
    random = np.random.default_rng(0)
    for number in range(40):
        folder = root / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        kind = tuple(GOOD)[number % len(GOOD)] if number % 2 else "jpeg"
        height, width = (int(side) for side in random.integers(60, 121, 2))
        (folder / f"{number:03d}-{kind}.jpg").write_bytes(file_bytes(kind, seed=number, size=(height, width)))
    return root


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """`make_tree({"cats/a.jpg": "jpeg", "cats/b.jpg": "half", "dogs/c.jpg": b"..."})`: the root of such a tree.

    A file is given by its kind (see `file_bytes`) or by its content; a path that ends with a slash makes a folder.
    """

    def make(files: Mapping[str, str | bytes]) -> Path:
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        for seed, (path, content) in enumerate(files.items()):
            target = root / path
            if path.endswith("/"):
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file_bytes(content, seed=seed) if isinstance(content, str) else content)
        return root

    return make


@pytest.fixture(scope="session")
def make_dataset(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """`make_dataset(src, dtype="uint8", ...)`: a new folder with a dataset of `src`, or of `tree`, 7 rows a shard."""

    def make(src: Path = tree, **settings: Any) -> Path:
        settings = {"shard_size": 7, "size": "12x16", "max_rejects": "100%", **settings}
        return build_cpu(src, tmp_path_factory.mktemp("dataset") / "out", **settings)

    return make


@pytest.fixture(scope="session")
def many_shards(make_dataset: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 rows of 8 x 8 pixels, uint8, in as many shards; the label of each row is its number modulo 10."""
    folder = tmp_path_factory.mktemp("many")
    for label in range(10):
        (folder / str(label)).mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number % 10}/{number:04d}.png", compress_level=1)
    return make_dataset(folder, shard_size=1, size=8, dtype="uint8")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
