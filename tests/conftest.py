"""What all tests share: pictures of every kind, trees of them, and what to do where there is no GPU."""

from __future__ import annotations

import functools
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from support import Encode, FileBytes, MakeDataset, MakeTree, build_cpu

from gpu_npz.bench.pictures import paint

Pixels = NDArray[np.uint8]


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


def _encode(pixels: Pixels | Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _claiming(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG whose frame header says another size than that of the data behind it."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[frame + 9 :]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _alpha(pixels: Pixels) -> Pixels:
    ramp = np.linspace(0, 255, pixels.shape[1], dtype=np.uint8)
    return np.dstack([pixels, np.broadcast_to(ramp, pixels.shape[:2])])


# What a collection has; every decoder path of ours must take these.
_GOOD: dict[str, Callable[[Pixels], bytes]] = {
    "jpeg": lambda pixels: _encode(pixels, quality=90),
    "jpeg-444": lambda pixels: _encode(pixels, quality=95, subsampling="4:4:4"),
    "jpeg-422": lambda pixels: _encode(pixels, quality=80, subsampling="4:2:2"),
    "progressive": lambda pixels: _encode(pixels, quality=85, progressive=True),
    "gray": lambda pixels: _encode(pixels[..., 1].copy(), quality=90),
    "exif-6": lambda pixels: _encode(pixels, quality=90, exif=_oriented(6)),
    "cmyk": lambda pixels: _encode(Image.fromarray(pixels).convert("CMYK"), quality=90),
    "png-named-jpg": lambda pixels: _encode(pixels, "PNG"),
    "palette": lambda pixels: _encode(Image.fromarray(pixels).quantize(32), "PNG"),
    "alpha": lambda pixels: _encode(_alpha(pixels), "PNG"),
    "gray16": lambda pixels: _encode(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
    "bilevel": lambda pixels: _encode(Image.fromarray(pixels).convert("1"), "PNG"),
    "1x1": lambda pixels: _encode(pixels[:1, :1], quality=90),
}
# What decodes although something is wrong with it: nobody can tell.
_DAMAGED: dict[str, Callable[[Pixels], bytes]] = {
    "half-with-eoi": lambda pixels: _half(_encode(pixels)) + b"\xff\xd9",
    "broken-exif": lambda pixels: _encode(pixels, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"),
    "zeros-behind": lambda pixels: _encode(pixels) + bytes(1000),
}
# What no decoder takes, with the stage and the code of the reject that it becomes.
_BAD: dict[str, tuple[str, str, Callable[[Pixels], bytes]]] = {
    "half": ("decode", "truncated", lambda pixels: _half(_encode(pixels))),
    "half-progressive": ("decode", "truncated", lambda pixels: _half(_encode(pixels, progressive=True))),
    "half-png": ("decode", "truncated", lambda pixels: _half(_encode(pixels, "PNG"))),
    "no-eoi": ("decode", "truncated", lambda pixels: _encode(pixels)[:-2]),
    "headers-only": ("decode", "truncated", lambda pixels: _encode(pixels)[:100]),
    "empty": ("read", "empty", lambda _: b""),
    "text": ("decode", "not-an-image", lambda _: b"This is no image, whatever its name says.\n"),
    "two-bytes": ("decode", "not-an-image", lambda _: b"\xff\xd8"),
    "zeros": ("decode", "not-an-image", lambda _: bytes(5000)),
    "postscript": ("decode", "not-an-image", lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "claims-65500": ("decode", "too-large", lambda pixels: _claiming(_encode(pixels), 65_500, 65_500)),
    "broken-png": (
        "decode", "undecodable", lambda pixels: _encode(pixels, "PNG").replace(b"IDAT", b"IDAT\xff\xff\xff", 1)
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes the library's logger over; the next test gets it back."""
    logger = logging.getLogger("gpu_npz")
    monkeypatch.setattr(logger, "handlers", logger.handlers)
    monkeypatch.setattr(logger, "propagate", logger.propagate)


@pytest.fixture(scope="session")
def encode() -> Encode:
    """`encode(pixels, "PNG", **options)`: an array or a Pillow image as the bytes of a file, JPEG by default."""
    return _encode


@pytest.fixture(scope="session")
def file_bytes() -> FileBytes:
    """`file_bytes("cmyk", seed=0, size=(90, 120))`: a file of that kind, good, damaged or bad."""
    kinds = {**_GOOD, **_DAMAGED, **{kind: make for kind, (_, _, make) in _BAD.items()}}

    @functools.cache
    def make(kind: str, *, seed: int = 0, size: tuple[int, int] = (90, 120)) -> bytes:
        return kinds[kind](paint(*size, seed))

    return make


@pytest.fixture(scope="session")
def good_kinds() -> tuple[str, ...]:
    """The kinds that must be decoded, the damaged ones that nobody can tell among them."""
    return (*_GOOD, *_DAMAGED)


@pytest.fixture(scope="session")
def bad_kinds() -> dict[str, tuple[str, str]]:
    """The kinds that must become rejects, each with its stage and its code."""
    return {kind: (stage, code) for kind, (stage, code, _) in _BAD.items()}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory, file_bytes: FileBytes) -> Path:
    """40 pictures of all good kinds in three classes, one of them in two folders. Read only: all tests share it."""
    root = tmp_path_factory.mktemp("tree")
    folders = ("apples", "berries", "berries/red", "cherries")
    random = np.random.default_rng(0)
    for number in range(40):
        folder = root / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        kind = tuple(_GOOD)[number % len(_GOOD)] if number % 2 else "jpeg"
        height, width = (int(side) for side in random.integers(60, 121, 2))
        (folder / f"{number:03d}-{kind}.jpg").write_bytes(file_bytes(kind, seed=number, size=(height, width)))
    return root


@pytest.fixture
def make_tree(tmp_path: Path, file_bytes: FileBytes) -> MakeTree:
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)  # 8,000 of them take their time and matter to no reader
        return make_dataset(folder, shard_size=1, size=8, dtype="uint8")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
