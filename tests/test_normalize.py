"""Every stored value is the exact rational, rounded once; on the CPU and on the GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gpu_npz.config import BuildConfig
from gpu_npz.errors import UsageError
from gpu_npz.preprocess import normalize, normalize_cuda
from gpu_npz.preprocess.normalize import (
    NumpyNormalizer,
    Quotient,
    Sums,
    apply_table,
    image_table,
    levels,
    row_shape,
    table,
    tables,
    value_range,
)
from gpu_npz.preprocess.normalize_cuda import CudaNormalizer

# Of each floating type: bits of a significand, exponent of the smallest number above zero (IEEE 754-2019, table 3.5).
PRECISION = {"float16": (11, -24), "float32": (24, -149)}
IMAGENET = ((Fraction("0.485"), Fraction("0.456"), Fraction("0.406")), (Fraction("0.229"), Fraction("0.224"),
            Fraction("0.225")))  # fmt: skip
# The settings of each normalization, with mean and std in the order R, G, B.
NORMALIZATIONS: dict[str, tuple[dict[str, Any], tuple[tuple[Fraction, ...], tuple[Fraction, ...]]]] = {
    "imagenet": ({"normalize": "imagenet"}, IMAGENET),
    "unit": ({"normalize": "unit"}, ((Fraction(0),) * 3, (Fraction(1),) * 3)),
    "signed": ({"normalize": "signed"}, ((Fraction(1, 2),) * 3, (Fraction(1, 2),) * 3)),
    "none": ({"normalize": "none"}, ((Fraction(0),) * 3, (Fraction(1, 255),) * 3)),
    "mean-std": (
        {"mean": (0.1, 1e-5, 0.7), "std": (0.3, 7.0, 0.01)},
        ((Fraction("0.1"), Fraction("0.00001"), Fraction("0.7")), (Fraction("0.3"), Fraction(7), Fraction("0.01"))),
    ),
    # Values among float16's subnormals, where a step is 2^-24.
    "tiny": ({"mean": (0, 0, 0), "std": (1e6, 3e6, 7e5)}, ((Fraction(0),) * 3, (10**6, 3 * 10**6, 7 * 10**5))),
}
# Those without mean and std, with the exact value of a level.
OTHERS: dict[str, tuple[dict[str, Any], Callable[[int], Fraction]]] = {
    "log": ({"normalize": "log"}, lambda level: logarithm(1 + level) / logarithm(256)),
    "window": ({"window": (20.5, 130)}, lambda level: cut((level - Fraction("20.5")) / (130 - Fraction("20.5")))),
    "wide": ({"normalize": "window", "window": "-10,300.25"}, lambda level: (level + 10) / (10 + Fraction("300.25"))),
    "narrow": ({"window": (99, 99.5)}, lambda level: Fraction(level > 99)),
}
PER_IMAGE = ("standardize", "minmax", "maxabs", "l2")
LAYOUTS, CHANNELS, DTYPES = ("NCHW", "NHWC"), ("rgb", "bgr", "gray"), ("float32", "float16", "uint8")


@functools.cache
def logarithm(number: int) -> Fraction:
    """ln by its series 2 (z + z^3/3 + z^5/5 + ...), z = (m - 1) / (m + 1), of m in 1 to 2, plus n ln 2: 60 digits."""
    halvings = max(0, number.bit_length() - 1)
    return series(Fraction(number, 2**halvings)) + halvings * series(Fraction(2))


def series(number: Fraction) -> Fraction:
    z, digits = (number - 1) / (number + 1), 10**60
    whole = sum(Fraction(int(z ** (2 * n + 1) * digits), digits * (2 * n + 1)) for n in range(64))
    return 2 * whole


def cut(value: Fraction) -> Fraction:
    return min(max(value, Fraction(0)), Fraction(1))


def rounded(value: Fraction, dtype: str) -> float:
    """`value` in the nearest number of a floating type, half to even, by integers alone."""
    if dtype == "uint8" or not value:
        return float(value)
    bits, smallest = PRECISION[dtype]
    exponent = max(value.numerator.bit_length() - value.denominator.bit_length() - bits, smallest)
    if abs(value) >= Fraction(2) ** (exponent + bits):
        exponent += 1
    step = Fraction(2) ** exponent
    return float(round(value / step) * step)


def config_of(name: str, channels: str = "rgb", **settings: Any) -> BuildConfig:
    given = dict(NORMALIZATIONS[name][0])
    if channels == "gray":
        given = {key: value[:1] if isinstance(value, tuple) else value for key, value in given.items()}
    return BuildConfig(**given, channels=channels, **settings)


def expected_rows(name: str, channels: str, dtype: str) -> list[list[float]]:
    means, stds = NORMALIZATIONS[name][1]
    if dtype == "uint8":
        return [[float(level) for level in range(256)]] * (1 if channels == "gray" else 3)
    rows = [
        [rounded((Fraction(level, 255) - mean) / std, dtype) for level in range(256)]
        for mean, std in zip(means, stds, strict=True)
    ]
    return {"rgb": rows, "bgr": rows[::-1], "gray": rows[:1]}[channels]


def possible(name: str, channels: str) -> bool:
    return not (name == "imagenet" and channels == "gray")  # refused by the settings


def pixels_with_every_level(channels: str, images: int = 3) -> np.ndarray:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, 16, 24, 1 if channels == "gray" else 3), np.uint8)
    pixels[0, :16, :16] = random.permutation(256).reshape(16, 16, 1)
    return pixels


def every(pixels: np.ndarray) -> np.ndarray:
    return np.arange(len(pixels))


def looked_up(values: np.ndarray, pixels: np.ndarray, channels: str, layout: str) -> np.ndarray:
    """What the normalizers must give, spelled out: one value at a time."""
    stored = pixels[..., ::-1] if channels == "bgr" else pixels
    planes = [values[channel][stored[..., channel]] for channel in range(stored.shape[3])]
    return np.stack(planes, axis=1 if layout == "NCHW" else 3)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_value_is_the_exact_rational_rounded_once(name: str, dtype: str, channels: str) -> None:
    if not possible(name, channels):
        return
    values = table(config_of(name, channels, dtype=dtype))
    assert values.dtype == dtype
    assert values.tolist() == expected_rows(name, channels, dtype)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
def test_every_value_of_a_kind_without_mean_and_std_is_rounded_once_too(name: str, dtype: str, channels: str) -> None:
    settings, exact = OTHERS[name]
    config = BuildConfig(**settings, channels=channels, dtype=dtype)
    row = [float(level) if dtype == "uint8" else rounded(exact(level), dtype) for level in range(256)]
    assert table(config).dtype == dtype
    assert table(config).tolist() == [row] * config.channel_count
    stored = BuildConfig(**settings, channels=channels, dtype="uint8")
    np.testing.assert_array_equal(table(stored, "float32"), table(config, "float32"), strict=True)


def by_definition(kind: str, image: np.ndarray) -> np.ndarray:
    """A per-image kind in float64, as its library defines it, of the levels of one image."""
    x = image.astype(np.float64)
    if kind == "standardize":  # TensorFlow 2, tf.image.per_image_standardization: of a float image
        return (x - x.mean()) / max(x.std(), 1 / np.sqrt(x.size))
    if kind == "minmax":  # scikit-learn 1, preprocessing.minmax_scale; a range of 0 counts as 1
        return (x - x.min()) / ((x.max() - x.min()) or 1)
    if kind == "maxabs":  # scikit-learn 1, preprocessing.maxabs_scale
        return x / (np.abs(x).max() or 1)
    return x / (np.linalg.norm(x.ravel()) or 1)  # scikit-learn 1, preprocessing.normalize with norm="l2"


def images_of_every_kind(channels: str) -> np.ndarray:
    """All levels, dark noise, little contrast, black, one level, one bright value, one a level up: (7, 16, 24, C)."""
    pixels = pixels_with_every_level(channels, images=7)
    pixels[1] //= 2
    pixels[2] = 40 + pixels[2] // 100
    pixels[3], pixels[4], pixels[5] = 0, 77, 0
    pixels[5, 3, 4, 0] = 200
    pixels[6] = 77
    pixels[6, 3, 4, 0] = 78  # its deviation is less than 1 / sqrt(n)
    return pixels


DEEP: dict[str, tuple[dict[str, Any], Callable[[int], Fraction]]] = {
    "imagenet": ({}, lambda level: (Fraction(level, 65535) - Fraction("0.485")) / Fraction("0.229")),
    "signed": ({"normalize": "signed"}, lambda level: Fraction(2 * level, 65535) - 1),
    "none": ({"normalize": "none"}, Fraction),
    "log": ({"normalize": "log"}, lambda level: logarithm(1 + level) / logarithm(65536)),
    "window": ({"window": "1000,40000"}, lambda level: cut(Fraction(level - 1000, 39000))),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
@pytest.mark.parametrize("name", DEEP)
def test_in_16_bits_there_is_an_entry_for_each_of_65536_levels(name: str, dtype: str) -> None:
    settings, exact = DEEP[name]
    config = BuildConfig(**settings, bit_depth=16, dtype=dtype, clip=True)
    values = table(config)
    assert (values.shape, values.dtype) == ((3, 65536), dtype)
    chosen = np.unique(np.r_[0, 1, 65535, np.random.default_rng(0).integers(0, 65536, 100 if name == "log" else 2000)])
    most = Fraction(65504 if dtype == "float16" else 10**6)
    for level in chosen.tolist():
        assert values[0, level] == (level if dtype == "uint16" else rounded(min(exact(level), most), dtype)), level
    if dtype == "float16" and name == "none":
        with pytest.raises(UsageError, match="float16 cannot hold 65535, the value of level 65535"):
            table(BuildConfig(**settings, bit_depth=16, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", ["unit", "log", "window", "none", *PER_IMAGE])
def test_pixels_of_16_bits_are_looked_up_stored_and_given_back(kind: Any, channels: Any, layout: Any) -> None:
    window = {"window": (0, 65535)} if kind == "window" else {}
    config = BuildConfig(normalize=kind, channels=channels, layout=layout, bit_depth=16, **window)
    deep = BuildConfig(**{**config.model_dump(), "dtype": "uint16"})
    pixels = np.random.default_rng(0).integers(0, 65536, (3, 16, 24, config.channel_count), np.uint16)
    rows = {}
    for each in (config, deep):
        rows[each.dtype] = NumpyNormalizer(each).allocate((3, *row_shape(each, 16, 24)))
        NumpyNormalizer(each).apply(pixels, every(pixels), rows[each.dtype])
    np.testing.assert_array_equal(
        apply_table(tables(deep, rows["uint16"]), rows["uint16"], layout), rows["float32"], strict=True
    )
    if kind in PER_IMAGE:
        expected = np.stack([by_definition(kind, image) for image in rows["uint16"]])
        np.testing.assert_allclose(rows["float32"], expected, rtol=2**-24, atol=2**-25)
    else:
        values = table(config)
        assert values is not None
        np.testing.assert_array_equal(levels(values, rows["float32"], layout), rows["uint16"], strict=True)
    with pytest.raises(ValueError, match="need uint16"):
        NumpyNormalizer(config).apply(pixels.astype(np.uint8), every(pixels), rows["float32"])
    with pytest.raises(ValueError, match="need uint16"):
        apply_table(tables(deep, rows["uint16"]), rows["uint16"].astype(np.uint8), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PER_IMAGE)
def test_an_image_is_normalized_by_its_own_statistics(kind: Any, dtype: Any, channels: Any, layout: Any) -> None:
    config = BuildConfig(normalize=kind, dtype=dtype, channels=channels, layout=layout)
    pixels, kept = images_of_every_kind(channels), np.array([5, 4, 3, 2, 0, 6])
    normalizer = NumpyNormalizer(config)
    rows = normalizer.allocate((len(kept), *row_shape(config, 16, 24)))
    normalizer.apply(pixels, kept, rows)()
    stored = pixels[kept][..., ::-1] if channels == "bgr" else pixels[kept]
    planes = stored.transpose(0, 3, 1, 2) if layout == "NCHW" else stored
    expected = np.stack([by_definition(kind, image) for image in planes])
    assert rows.dtype == dtype
    if dtype == "uint8":
        np.testing.assert_array_equal(rows, planes)
        rows = apply_table(tables(config, rows), rows, layout)
        direct = BuildConfig(normalize=kind, channels=channels, layout=layout)
        floats = NumpyNormalizer(direct).allocate(rows.shape)
        NumpyNormalizer(direct).apply(pixels, kept, floats)()
        np.testing.assert_array_equal(rows, floats, strict=True)
        np.testing.assert_array_equal(apply_table(tables(config, planes[1]), planes[1], layout), floats[1], strict=True)
    # Half a unit in the last place of the stored type; float64's own errors are far below.
    np.testing.assert_allclose(rows, expected, rtol=2**-11 if dtype == "float16" else 2**-24, atol=2**-25)
    assert not expected[1].any() or kind not in ("standardize", "minmax")
    assert not rows[2].any()


def test_sums_are_exact_where_floats_are_not() -> None:
    image = np.full((3000, 3000, 3), 255, np.uint8)
    image[0, 0, 0] = 254
    assert Sums.of(image) == Sums(image.size, 255 * image.size - 1, 255**2 * image.size - 509, 254, 255)


def test_values_lie_within_their_range_and_reach_it() -> None:
    pixels = images_of_every_kind("rgb")
    for kind in PER_IMAGE:
        config = BuildConfig(normalize=kind)
        rows = NumpyNormalizer(config).allocate((7, 3, 16, 24))
        NumpyNormalizer(config).apply(pixels, every(pixels), rows)
        low, high = value_range(config, rows[0].size)
        assert (low <= rows.min(axis=(0, 2, 3))).all()
        assert (rows.max(axis=(0, 2, 3)) <= high).all()
        assert rows.max() > 0.97 * high.max()
    alone = np.zeros((1, 224, 224, 3), np.uint8)
    alone[0, 100, 100, 1] = 255
    for dtype in ("float16", "float32"):
        config = BuildConfig(normalize="standardize", dtype=dtype)
        rows = NumpyNormalizer(config).allocate((1, 3, 224, 224))
        NumpyNormalizer(config).apply(alone, every(alone), rows)
        _, high = value_range(config, rows.size)
        assert np.sqrt(rows.size) * 0.999 < rows.max() <= high[0] < np.sqrt(rows.size) * 1.002
    low, high = value_range(BuildConfig(channels="bgr"), 9)
    np.testing.assert_array_equal((low, high), table(BuildConfig(channels="bgr"))[:, [0, -1]].T)


def test_where_float64_leaves_the_rounding_open_the_exact_value_decides() -> None:
    # 1 + 2^-11 + 2^-64 is above the middle of two numbers of float16, and the middle in float64.
    for exact, expected in (
        (Fraction(1) + Fraction(2) ** -11 + Fraction(2) ** -64, 1 + 2**-10),
        (Fraction(1) + Fraction(2) ** -11 - Fraction(2) ** -64, 1),
        (Fraction(1) + Fraction(2) ** -11, 1),
    ):
        found = normalize._rounded(np.array([float(exact)]), lambda level, exact=exact: exact, np.dtype("float16"))
        assert found.tolist() == [expected]


def test_a_value_in_the_middle_goes_to_the_even_neighbour_and_decimals_are_taken_as_written() -> None:
    # float16 has steps of 2 here. In binary, 20.53 / 0.01 is a little more than 2053, and would go to 2054.
    halves = table(BuildConfig(mean=(2049, 2051, 20.53), std=(1, 1, 0.01), dtype="float16"))
    assert halves[:, 0].tolist() == [-2048, -2052, -2052]
    singles = table(BuildConfig(mean=(2**24 + 1, 2**24 + 3, 0), std=(1, 1, 1)))
    assert singles[:2, 0].tolist() == [-(2**24), -(2**24 + 4)]


def test_a_reader_gets_the_float_table_of_a_dataset_that_stores_pixels() -> None:
    for channels in ("rgb", "bgr"):
        stored, direct = config_of("imagenet", channels, dtype="uint8"), config_of("imagenet", channels)
        np.testing.assert_array_equal(table(stored, "float32"), table(direct), strict=True)


def test_float16_that_cannot_hold_a_value_is_refused_with_advice() -> None:
    config = BuildConfig(mean=(0, 0, 0), std=(1, 1, 1e-6), dtype="float16")
    message = r"float16 cannot hold 1e\+06, the value of level 255 in channel 2, but -65504 to 65504; .*or --clip"
    with pytest.raises(UsageError, match=message):
        table(config)


@pytest.mark.parametrize("channels", CHANNELS)
def test_with_clip_such_values_are_the_largest_that_float16_holds_and_float32_keeps_them(channels: str) -> None:
    given = {"mean": (0.5,), "std": (5e-6,)} if channels == "gray" else {"mean": (0, 0.5, 0), "std": (1, 5e-6, 1)}
    config = BuildConfig(**given, channels=channels, dtype="float16", clip=True)
    values = table(config)
    exact = np.array([(Fraction(level, 255) - Fraction(1, 2)) / Fraction("0.000005") for level in range(256)], float)
    row = values[0 if channels == "gray" else 1]
    np.testing.assert_array_equal(row, exact.clip(-65504, 65504).astype(np.float16))
    assert (row == 65504).sum() == (row == -65504).sum() == 45
    assert table(config, "float32").max() == 1e5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_hold_the_tables_values_in_the_layout_and_order_asked_for(dtype: str, channels: str, layout: str) -> None:
    config = config_of("mean-std", channels, dtype=dtype, layout=layout)
    pixels = pixels_with_every_level(channels)
    normalizer = NumpyNormalizer(config)
    out = normalizer.allocate((len(pixels), *row_shape(config, 16, 24)))
    normalizer.apply(pixels, every(pixels), out)()
    np.testing.assert_array_equal(out, looked_up(table(config), pixels, channels, layout), strict=True)


def test_pixels_may_be_a_view_and_rows_a_part_of_a_larger_buffer() -> None:
    config = config_of("imagenet", "bgr", layout="NHWC")
    pixels = pixels_with_every_level("rgb", images=6)[::2, ::-1]
    normalizer = NumpyNormalizer(config)
    buffer = normalizer.allocate((8, *row_shape(config, 16, 24)))
    buffer[...] = -99
    normalizer.apply(pixels, every(pixels), buffer[2:5])()
    np.testing.assert_array_equal(buffer[2:5], looked_up(table(config), pixels, "bgr", "NHWC"))
    assert (buffer[:2] == -99).all()
    assert (buffer[5:] == -99).all()


def test_only_the_images_that_are_kept_become_rows() -> None:
    for dtype in DTYPES:
        config = config_of("imagenet", dtype=dtype)
        pixels, kept = pixels_with_every_level("rgb", images=6), np.array([1, 2, 5])
        normalizer = NumpyNormalizer(config)
        rows = normalizer.allocate((3, *row_shape(config, 16, 24)))
        normalizer.apply(pixels, kept, rows)()
        np.testing.assert_array_equal(rows, looked_up(table(config), pixels[kept], "rgb", "NCHW"))


def test_a_batch_without_images_writes_nothing() -> None:
    normalizer = NumpyNormalizer(config_of("imagenet"))
    buffer = normalizer.allocate((2, 3, 16, 24))
    buffer[...] = -99
    normalizer.apply(np.empty((2, 16, 24, 3), np.uint8), np.arange(0), buffer[1:1])()
    assert (buffer == -99).all()


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_pixels_and_the_table_give_what_a_float_build_would_have_stored(
    layout: str, channels: str, dtype: str
) -> None:
    pixels = pixels_with_every_level(channels)
    rows = {}
    for kind in ("uint8", dtype):
        config = config_of("imagenet", channels, dtype=kind, layout=layout)
        normalizer = NumpyNormalizer(config)
        rows[kind] = normalizer.allocate((len(pixels), *row_shape(config, 16, 24)))
        normalizer.apply(pixels, every(pixels), rows[kind])()
    values = table(config_of("imagenet", channels, dtype="uint8"), dtype)
    np.testing.assert_array_equal(apply_table(values, rows["uint8"], layout), rows[dtype], strict=True)
    np.testing.assert_array_equal(apply_table(values, rows["uint8"][1], layout), rows[dtype][1], strict=True)


STATISTICS: list[dict[str, Any]] = [
    {"normalize": "imagenet"},
    {"normalize": "unit"},
    {"normalize": "signed"},
    {"normalize": "imagenet", "bit_depth": 16},
    {"normalize": "mean-std", "mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)},
    {"normalize": "mean-std", "mean": (0.5, 0.25, -1.5), "std": (3.0, 0.001, 1e-4)},
]


@pytest.mark.parametrize("place", ["contiguous", "other layout", "every second"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", STATISTICS, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("shape", [(16, 24), (1, 1), (97, 131)])
def test_arithmetic_gives_the_values_of_the_table(
    settings: dict[str, Any], layout: Any, place: str, shape: tuple[int, int]
) -> None:
    config = BuildConfig(**settings, layout=layout)
    quotient, values = Quotient.of(config), table(config)
    assert quotient is not None
    stored = (5, *row_shape(config, *shape))
    pixels = np.random.default_rng(0).integers(0, config.max_level + 1, stored, config.pixel_dtype)
    expected = apply_table(values, pixels, layout)
    out = np.full(pixels.shape, -99, np.float32)
    if place == "other layout":
        axis, other = (1, 3) if layout == "NCHW" else (3, 1)
        out = np.moveaxis(np.moveaxis(out, axis, other).copy(), other, axis)
    elif place == "every second":
        out = np.full((*pixels.shape, 2), -99, np.float32)[..., 0]
    assert apply_table(values, pixels, layout, out, quotient) is out
    np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32), strict=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": "mean-std", "mean": (0.4914009,) * 3, "std": (0.2470323,) * 3},
        {"normalize": "mean-std", "mean": (0.5, 0.5, 0.4914009), "std": (0.5,) * 3},
        {"normalize": "mean-std", "mean": (0.4914,) * 3, "std": (0.2473,) * 3, "bit_depth": 16},
        {"normalize": "mean-std", "mean": (0.1234567,) * 3, "std": (1e-3,) * 3},
        {"normalize": "log"},
        {"normalize": "standardize"},
    ],
    ids=str,
)
def test_there_is_no_arithmetic_where_it_would_round_more_than_once(settings: dict[str, Any]) -> None:
    assert Quotient.of(BuildConfig(**settings)) is None


def test_the_shape_of_a_row_follows_layout_and_channels() -> None:
    assert row_shape(BuildConfig(), 10, 20) == (3, 10, 20)
    assert row_shape(BuildConfig(layout="NHWC"), 10, 20) == (10, 20, 3)
    assert row_shape(config_of("unit", "gray"), 10, 20) == (1, 10, 20)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 16, 24, 1), np.uint8),
        np.zeros((2, 16, 24, 4), np.uint8),
        np.zeros((2, 3, 16, 24), np.uint8),
        np.zeros((16, 24, 3), np.uint8),
        np.zeros((2, 16, 24, 3), np.uint16),
        np.zeros((2, 16, 24, 3), np.int8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_pixels_that_are_not_uint8_nhwc_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels: got .*; need uint8 \(N, H, W, 3\)"):
        NumpyNormalizer(config_of("imagenet")).apply(pixels, np.arange(2), np.empty((2, 3, 16, 24), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_for_another_number_or_size_of_images_are_refused(layout: str, dtype: str) -> None:
    config = config_of("imagenet", dtype=dtype, layout=layout)
    normalizer = NumpyNormalizer(config)
    for shape in ((3, *row_shape(config, 16, 24)), (1, *row_shape(config, 16, 24)), (2, *row_shape(config, 16, 23))):
        with pytest.raises(ValueError, match="out: got"):
            normalizer.apply(np.zeros((2, 16, 24, 3), np.uint8), np.arange(2), np.empty(shape, dtype))


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        ("float32", np.empty((2, 4, 16, 24), np.float32)),  # the fourth channel would stay as it was
        ("float32", np.empty((2, 3, 16, 24), np.float16)),
        ("uint8", np.empty((2, 3, 16, 24), np.float32)),
    ],
    ids=["channels", "float16", "uint8"],
)
def test_rows_of_another_dtype_or_number_of_channels_are_refused(dtype: str, out: np.ndarray) -> None:
    normalizer = NumpyNormalizer(config_of("imagenet", dtype=dtype))
    with pytest.raises(ValueError, match="out: got"):
        normalizer.apply(np.zeros((2, 16, 24, 3), np.uint8), np.arange(2), out)


@pytest.mark.parametrize(
    "stored",
    [
        np.zeros((2, 4, 16, 24), np.uint8),  # the fourth channel would be uninitialized memory
        np.zeros((2, 1, 16, 24), np.uint8),
        np.full((2, 3, 16, 24), -1, np.int8),  # would count from the table's end
        np.zeros((2, 3, 16, 24), np.uint16),
    ],
    ids=lambda stored: f"{stored.dtype}{stored.shape}",
)
def test_a_table_is_applied_only_to_pixels_that_it_was_made_for(stored: np.ndarray) -> None:
    with pytest.raises(ValueError, match="stored: got"):
        apply_table(table(config_of("imagenet")), stored, "NCHW")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PER_IMAGE)
def test_the_gpu_gives_an_image_its_own_table_as_the_cpu_does(
    kind: Any, dtype: Any, channels: Any, layout: Any
) -> None:
    import cupy

    config = BuildConfig(normalize=kind, dtype=dtype, channels=channels, layout=layout)
    pixels, kept = images_of_every_kind(channels), np.array([5, 4, 3, 2, 0, 6])
    normalizer = CudaNormalizer(config, 0)
    expected, rows = (each.allocate((6, *row_shape(config, 16, 24))) for each in (NumpyNormalizer(config), normalizer))
    NumpyNormalizer(config).apply(pixels, kept, expected)()
    on_gpu = cupy.asarray(pixels)
    cupy.cuda.get_current_stream().synchronize()
    normalizer.apply(on_gpu, kept, rows)()
    np.testing.assert_array_equal(rows, expected, strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_gives_the_cpus_rows_to_the_last_bit(dtype: str, channels: str, layout: str) -> None:
    import cupy

    pixels = pixels_with_every_level(channels)
    for name in NORMALIZATIONS:
        if not possible(name, channels):
            continue
        config = config_of(name, channels, dtype=dtype, layout=layout)
        shape = (len(pixels), *row_shape(config, 16, 24))
        expected = NumpyNormalizer(config).allocate(shape)
        NumpyNormalizer(config).apply(pixels, every(pixels), expected)()
        normalizer = CudaNormalizer(config, 0)
        on_gpu = cupy.asarray(pixels)
        cupy.cuda.get_current_stream().synchronize()
        rows = normalizer.allocate(shape)
        wait = normalizer.apply(on_gpu, every(pixels), rows)
        del on_gpu  # what is enqueued must keep its input alive
        wait()
        bits = f"u{rows.dtype.itemsize}"
        np.testing.assert_array_equal(rows.view(bits), expected.view(bits), err_msg=name, strict=True)


@pytest.mark.gpu
def test_the_gpu_writes_the_rows_that_are_kept_to_the_front_of_a_buffer_and_nowhere_else() -> None:
    import cupy

    config = config_of("imagenet")
    normalizer = CudaNormalizer(config, 0)
    pixels = pixels_with_every_level("rgb", images=6)
    buffer = normalizer.allocate((6, *row_shape(config, 16, 24)))
    for kept in ([0, 2, 5], [], [4]):
        buffer[...] = -99
        on_gpu = cupy.asarray(pixels)
        cupy.cuda.get_current_stream().synchronize()
        normalizer.apply(on_gpu, np.array(kept, np.int64), buffer[: len(kept)])()
        np.testing.assert_array_equal(buffer[: len(kept)], looked_up(table(config), pixels[kept], "rgb", "NCHW"))
        assert (buffer[len(kept) :] == -99).all()


@pytest.mark.gpu
def test_buffers_in_flight_do_not_disturb_each_other() -> None:
    import cupy

    config = config_of("imagenet", layout="NHWC")
    normalizer = CudaNormalizer(config, 0)
    batches = [np.random.default_rng(seed).integers(0, 256, (64, 96, 96, 3), np.uint8) for seed in range(8)]
    buffers = [normalizer.allocate((64, 96, 96, 3)) for _ in batches]
    on_gpu = [cupy.asarray(pixels) for pixels in batches]
    cupy.cuda.get_current_stream().synchronize()
    for _ in range(3):
        waits = [normalizer.apply(*given) for given in zip(on_gpu, map(every, batches), buffers, strict=True)]
        for wait, pixels, rows in zip(waits, batches, buffers, strict=True):
            wait()
            np.testing.assert_array_equal(rows, looked_up(table(config), pixels, "rgb", "NHWC"))
            rows[...] = -99


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`compiled("float16")`: the GPU's kernel for values of this dtype, compiled for the CPU, once for each size.

    It does what a GPU's threads do, one after the other: no GPU is needed to see a wrong index.
    """

    @functools.cache
    def compiled(bits: str) -> Any:
        kernel = normalize_cuda._KERNEL.replace('extern "C" __global__', "").replace("VALUE", bits)
        grid = "static struct { int x, y; } blockIdx, threadIdx, blockDim;\n"
        launch = """
        void launch(int blocks, int images, int threads, void *pixels, void *kept, void *table, void *out, int plane,
                    int channels, int planar, int swap, int image_step, int channel_step) {
          for (blockDim.x = threads, blockIdx.y = 0; blockIdx.y < images; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
              for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
                normalize(pixels, kept, table, out, plane, channels, planar, swap, image_step, channel_step);
        }"""
        folder = tmp_path_factory.mktemp("kernel")
        (folder / "kernel.c").write_text(grid + kernel + launch)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "kernel.so", folder / "kernel.c"], check=True)
        return ctypes.CDLL(str(folder / "kernel.so")).launch

    return lambda dtype: compiled(normalize_cuda._BITS[np.dtype(dtype).itemsize])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mean-std", "standardize"])
def test_the_gpus_kernel_compiled_for_the_cpu_gives_the_cpus_rows(
    kind: str, dtype: str, channels: str, layout: str, compiled: Callable[[str], Any]
) -> None:
    settings = config_of("mean-std", channels) if kind == "mean-std" else BuildConfig(normalize=kind, channels=channels)
    config = settings.model_copy(update={"dtype": dtype, "layout": layout})
    pixels, kept, values = pixels_with_every_level(channels), np.array([2, 0], np.int32), table(config)
    expected, steps = np.empty((2, *row_shape(config, 16, 24)), dtype), (0, 256)
    NumpyNormalizer(config).apply(pixels, kept.astype(np.int64), expected)
    if values is None:
        values, steps = np.stack([image_table(config, Sums.of(pixels[place])) for place in kept]), (256, 0)
    out = np.full((3, *row_shape(config, 16, 24)), 99, dtype)
    arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, kept, values, out)]
    compiled(dtype)(2, len(kept), 256, *arrays, 16 * 24, pixels.shape[3], layout == "NCHW", channels == "bgr", *steps)
    np.testing.assert_array_equal(out[:2], expected, strict=True)
    assert (out[2] == 99).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mean-std", "unit", "signed", "none", "log", "window"])
def test_stored_values_give_their_levels_back(layout: Any, channels: str, dtype: str, kind: str) -> None:
    given: dict[str, Any] = {}
    if kind == "mean-std":
        given = {"mean": (0.9, 0.1, 0.4), "std": (0.01, 3.0, 0.25)}
        given = {name: values[: 1 if channels == "gray" else 3] for name, values in given.items()}
    if kind == "window":
        given = {"window": (-5, 255)}
    config = BuildConfig(layout=layout, channels=channels, dtype=dtype, normalize=kind, **given)
    values = table(config)
    count = len(values)
    pixels = np.stack([np.roll(np.arange(256, dtype=np.uint8), 7 * channel) for channel in range(count)])
    images = pixels.reshape(1, count, 16, 16)
    if layout == "NHWC":
        images = np.moveaxis(images, 1, 3)
    stored = images if dtype == "uint8" else apply_table(values, images, layout)
    np.testing.assert_array_equal(levels(values, stored, layout), images)


def test_values_between_levels_and_beyond_them_become_the_nearest_level() -> None:
    values = table(BuildConfig(channels="gray", normalize="unit"))
    stored = np.array([-5, 0.4 / 255, 0.6 / 255, 254.6 / 255, 9, np.nan, np.inf, -np.inf], np.float32).reshape(1, 2, 4)
    assert levels(values, stored, "NCHW").ravel().tolist() == [0, 0, 1, 255, 255, 0, 255, 0]
