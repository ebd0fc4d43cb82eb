"""Preprocess gives of a file, at inference, the row that the build stored of it, bit for bit on the CPU path."""

from __future__ import annotations

import io
import json
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import cpu_config, file_bytes, python

import gpu_npz
from gpu_npz import Preprocess
from gpu_npz.config import BuildConfig
from gpu_npz.errors import FormatError, ImageError, UsageError

SETTINGS: list[dict[str, Any]] = [
    {},
    {"dtype": "uint8"},
    {"dtype": "float16", "layout": "NHWC", "channels": "bgr", "interpolation": "bicubic"},
    {"channels": "gray", "mean": "0.5", "std": "0.25", "resize_mode": "pad", "pad_value": 7},
    {"resize_mode": "center-crop", "size": "20x24", "exif_orientation": False, "normalize": "signed"},
    {"dtype": "uint8", "normalize": "log", "channels": "bgr"},
    {"window": "20,200", "channels": "gray"},
    {"dtype": "uint8", "normalize": "standardize", "channels": "gray", "layout": "NHWC"},
    {"dtype": "float16", "normalize": "l2", "channels": "bgr"},
    {"dtype": "uint8", "normalize": "none", "interpolation": "nearest", "background": "9,8,7"},
]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many kinds: JPEGs that are decoded at half their size, turned ones, gray, alpha, 16 bit."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)

    def picture(height: int, width: int, channels: int = 3) -> Image.Image:
        levels = random.integers(0, 256, (height // 4, width // 4, channels), np.uint8).repeat(4, 0).repeat(4, 1)
        return Image.fromarray(levels[..., 0] if channels == 1 else levels)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(120, 88).save(root / f"turned-{orientation}.jpg", exif=exif)
    picture(64, 48, 1).save(root / "gray.jpg")
    picture(64, 48).convert("CMYK").save(root / "cmyk.jpg")
    picture(16, 20, 4).save(root / "alpha.png")
    picture(40, 20).quantize(9).save(root / "palette.gif")
    Image.fromarray(random.integers(0, 65_536, (24, 30), np.uint16)).save(root / "deep.png")
    return root


def build(src: Path, out: Path, **values: Any) -> gpu_npz.Dataset:
    report = gpu_npz.build(src, out, cpu_config(**values))
    assert report.rejects == 0
    return gpu_npz.open_dataset(out)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_path_bytes_and_an_open_image_give_the_stored_row(
    src: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    dataset = build(src, tmp_path / "out", **settings)
    preprocess = Preprocess.from_dataset(tmp_path / "out")
    assert len(dataset) == 13
    for row, name in enumerate(dataset.paths):
        path = src / name
        with Image.open(path) as picture:
            for image in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), picture):
                found = preprocess(image)
                assert (found.shape, found.dtype) == (dataset.image_shape, dataset.dtype)
                assert found.tobytes() == dataset[row].tobytes(), (name, type(image))
        normalized = preprocess.normalized(path)
        assert normalized.dtype == np.float32
        np.testing.assert_array_equal(normalized, dataset.normalized(row))


def test_pixels_give_what_a_lossless_file_of_them_gives(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = [random.integers(0, 256, (40, 30, *more), np.uint8) for more in ((), (3,), (4,))]
    arrays.append(random.integers(0, 65_536, (40, 30), np.uint16))
    (tmp_path / "src").mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"src/{number}.png")
    dataset = build(tmp_path / "src", tmp_path / "out")
    preprocess = Preprocess.from_dataset(tmp_path / "out")
    for row, array in enumerate(arrays):
        np.testing.assert_array_equal(preprocess(array), dataset[row])
        np.testing.assert_array_equal(preprocess(Image.fromarray(array)), dataset[row])
    np.testing.assert_array_equal(preprocess(arrays[0][..., None]), dataset[0])
    np.testing.assert_array_equal(preprocess(arrays[1][::-1][::-1]), dataset[1])


def test_the_callers_image_stays_as_it_is(src: Path) -> None:
    with Image.open(src / "turned-6.jpg") as picture:
        preprocess = Preprocess(BuildConfig(size=16), (16, 16))
        before = preprocess(picture)
        assert picture.size == (88, 120)
        picture.load()
        assert picture.size == (88, 120)
        loaded = preprocess(picture)  # decoded whole by somebody else: near, but not the same
    assert np.abs(loaded - before).mean() < 0.2


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(UsageError, match=r"got .* \(4.*allowed: uint8 \(H, W\)"):
        Preprocess(BuildConfig(size=16), (16, 16))(array)


def test_what_is_no_image_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="got an object of type list; allowed: a path"):
        Preprocess(BuildConfig(size=16), (16, 16))([[1, 2], [3, 4]])  # type: ignore[arg-type]  # that is the test


def test_an_open_image_is_refused_where_a_build_would_reject_its_file(tmp_path: Path) -> None:
    preprocess, path = Preprocess(BuildConfig(size=16), (16, 16)), tmp_path / "image.tif"
    Image.fromarray(np.arange(1200, dtype=np.int32).reshape(40, 30)).save(path)  # 16 bits of 32 are in use
    with Image.open(path) as picture:
        for image in (path, picture):
            with pytest.raises(ImageError, match="a TIFF of int32 samples"):
                preprocess(image)
        picture.load()
        with pytest.raises(ImageError, match="samples of 32 bits"):
            preprocess(picture)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_image_whose_file_was_closed_is_an_error(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (20, 20)).save(path := tmp_path / f"image{suffix}")
    with path.open("rb") as file:
        picture = Image.open(file)
    with pytest.raises(ImageError, match="closed file"):
        Preprocess(BuildConfig(size=16), (16, 16))(picture)


@pytest.mark.parametrize(("kind", "code"), [("half", "truncated"), ("text", "not-an-image"), ("empty", "not-an-image")])
def test_what_a_build_would_reject_is_an_error(tmp_path: Path, kind: str, code: str) -> None:
    content = {"half": lambda: file_bytes("half"), "text": lambda: b"hello", "empty": lambda: b""}[kind]()
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    preprocess = Preprocess(BuildConfig(size=16), (16, 16))
    with pytest.raises(ImageError, match=rf"image\.jpg': {code} at decode .*the build would reject it"):
        preprocess(path)
    with pytest.raises(ImageError, match=code):
        preprocess(content)
    if kind == "half":
        with Image.open(io.BytesIO(content)) as picture, pytest.raises(ImageError, match=code):
            preprocess(picture)
    with pytest.raises(FileNotFoundError):
        preprocess(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="too-large"):
        Preprocess(BuildConfig(size=16, max_pixels=300), (16, 16))(np.zeros((40, 40), np.uint8))


def test_threads_share_one_and_pillows_own_settings_come_back(src: Path) -> None:
    preprocess = Preprocess(BuildConfig(size=16), (16, 16))
    expected = preprocess(src / "turned-3.jpg")
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    same: list[bool] = []

    def use() -> None:
        same.extend(np.array_equal(preprocess(src / "turned-3.jpg"), expected) for _ in range(20))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(preprocess))(src / "turned-3.jpg"), expected)


def test_its_description_says_each_step() -> None:
    config = BuildConfig(size="20x24", resize_mode="center-crop", channels="bgr", dtype="uint8", layout="NHWC")
    text = Preprocess(config, (20, 24)).describe()
    assert text.splitlines() == [
        "rotated by EXIF orientation: yes",
        "8 bits per channel, blue, green, red; transparent pixels on color (0, 0, 0)",
        "resized to cover 23 x 27, then cropped to the 20 x 24 in the middle, by bilinear interpolation, antialiased; "
        "large JPEGs are decoded at a half or less first",
        "values: levels of 0 to 255 are stored; read as (level / 255 - mean) / std, with mean 0.406, 0.456, 0.485 and "
        "std 0.225, 0.224, 0.229 for b, g, r",
        "stored as uint8 of shape (20, 24, 3)",
    ]
    plain = Preprocess(BuildConfig(resize_mode="pad", pad_value=9, normalize="none", interpolation="nearest"), (8, 8))
    assert (
        "resized to fit into 8 x 8, in the middle of a canvas of level 9, by nearest interpolation\n"
        in plain.describe()
    )
    assert "values: levels of 0 to 255, as they are" in plain.describe()
    logarithm = Preprocess(BuildConfig(normalize="log", dtype="uint8"), (8, 8))
    assert "values: levels of 0 to 255 are stored; read as log(1 + level) / log(1 + 255)\n" in logarithm.describe()
    own = Preprocess(BuildConfig(normalize="minmax"), (8, 8))
    assert "values: (level - min) / (max - min) of all values of the image\n" in own.describe()
    assert own.differences(logarithm) == ["normalize: minmax and log"]
    window = Preprocess(BuildConfig(window="20,200.5"), (8, 8))
    assert "(level - LO) / (HI - LO), clipped to 0 to 1, with LO 20 and HI 200.5\n" in window.describe()
    assert window.differences(logarithm) == ["normalize: window and log", "window: (20.0, 200.5) and None"]


def test_two_contracts_differ_in_what_a_model_would_see() -> None:
    one = Preprocess(BuildConfig(size=16), (16, 16))
    assert one.differences(Preprocess(BuildConfig(size=16, dtype="uint8", layout="NHWC", shuffle=3), (16, 16))) == []
    assert one.differences(Preprocess(BuildConfig(size=16, crop_pct=0.5, pad_value=3), (16, 16))) == []
    other = Preprocess(BuildConfig(size=24, resize_mode="center-crop", normalize="unit"), (24, 24))
    assert one.differences(other) == [
        "size: 16x16 and 24x24",
        "resize-mode: stretch and center-crop",
        "mean: (0.485, 0.456, 0.406) and (0.0, 0.0, 0.0)",
        "std: (0.229, 0.224, 0.225) and (1.0, 1.0, 1.0)",
        "crop-pct: None and 0.875",
    ]


def test_a_damaged_manifest_is_an_error(src: Path, tmp_path: Path) -> None:
    build(src, out := tmp_path / "out")
    manifest = json.loads((out / "dataset.json").read_text())
    manifest["settings"]["interpolation"] = "magic"
    (out / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="settings"):
        Preprocess.from_dataset(out)


def test_no_image_library_is_loaded_before_an_image_comes() -> None:
    python("-c", "from gpu_npz import Preprocess; import sys; sys.exit('PIL' in sys.modules)")
