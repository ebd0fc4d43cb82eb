"""The resize modes' integer formulas, against torchvision's published rules and against what they promise."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from gpu_npz.config import BuildConfig
from gpu_npz.preprocess.geometry import Geometry, Placement

OUTPUTS = [(224, 224), (96, 160), (1, 1), (7, 300), (299, 299), (5, 4)]


def image_sizes() -> Iterator[tuple[int, int]]:
    """Sizes around the outputs' own, ordinary ones, and extreme ones."""
    near = (1, 2, 3, 4, 5, 6, 7, 95, 96, 97, 159, 160, 223, 224, 225, 255, 256, 257)
    yield from ((height, width) for height in near for width in near)
    yield from ((height, width) for height in range(300, 520, 11) for width in range(300, 520, 7))
    yield from [(1, 65_500), (65_500, 1), (65_535, 65_535), (3, 40_000), (427, 640), (375, 500), (500, 333)]
    yield from np.random.default_rng(0).integers(1, 5000, (1000, 2)).tolist()


def torchvision_resize(height: int, width: int, size: int) -> tuple[int, int]:
    """`_compute_resized_output_size` of torchvision.transforms.functional: the longer side is truncated."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    return new_height, new_width


def torchvision_crop(resized: int, size: int) -> int:
    """The offset in `center_crop`: Python rounds half to even."""
    return round((resized - size) / 2.0)


@pytest.mark.parametrize("size", [224, 192, 299, 32, 1, 7])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
def test_center_crop_is_torchvisions_resize_and_center_crop(size: int, crop_pct: float) -> None:
    geometry = Geometry("center-crop", size, size, crop_pct)
    cover = geometry.cover[0]
    for height, width in image_sizes():
        new_height, new_width = torchvision_resize(height, width, cover)
        expected = Placement(
            new_height, new_width, -torchvision_crop(new_height, size), -torchvision_crop(new_width, size)
        )
        assert geometry.place(height, width) == expected, (height, width)


def test_the_documented_example_is_truncated_and_not_rounded() -> None:
    assert Geometry("center-crop", 224, 224, 0.875).place(640, 427) == Placement(383, 256, -80, -16)


@pytest.mark.parametrize(
    ("side", "crop_pct", "cover"),
    [(224, 0.875, 256), (224, 1.0, 224), (299, 0.875, 342), (1, 0.4, 3), (224, 0.7, 320), (7, 0.1, 70), (9, 0.4, 23)],
)
def test_the_covered_size_is_the_exact_quotient_rounded_half_up(side: int, crop_pct: float, cover: int) -> None:
    assert Geometry("center-crop", side, side, crop_pct).cover == (cover, cover)


@pytest.mark.parametrize(("height", "width"), OUTPUTS)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.33])
def test_center_crop_covers_the_output_and_cuts_its_middle(height: int, width: int, crop_pct: float) -> None:
    geometry = Geometry("center-crop", height, width, crop_pct)
    cover = geometry.cover
    for size in image_sizes():
        place = geometry.place(*size)
        for resized, output, covered, offset in zip(
            (place.height, place.width), (height, width), cover, (place.top, place.left), strict=True
        ):
            assert resized >= covered >= output, size
            assert abs(2 * -offset - (resized - output)) <= 1, size  # the middle, to half a pixel
            assert 0 <= -offset <= resized - output, size
        assert place.height == cover[0] or place.width == cover[1], size
        # The side that overhangs keeps the aspect, less than one pixel short of it.
        exact = Fraction(max(Fraction(cover[0], size[0]), Fraction(cover[1], size[1])))
        assert 0 <= size[0] * exact - place.height < 1, size
        assert 0 <= size[1] * exact - place.width < 1, size


@pytest.mark.parametrize(("height", "width"), OUTPUTS)
def test_pad_fits_the_output_and_stands_in_its_middle(height: int, width: int) -> None:
    geometry = Geometry("pad", height, width)
    for size in image_sizes():
        place = geometry.place(*size)
        for resized, output, offset in zip(
            (place.height, place.width), (height, width), (place.top, place.left), strict=True
        ):
            assert 1 <= resized <= output, size
            assert offset == (output - resized) // 2, size
        assert place.height == height or place.width == width, size
        exact = min(Fraction(height, size[0]), Fraction(width, size[1]))
        for resized, side in zip((place.height, place.width), size, strict=True):
            assert resized == max(1, int(side * exact + Fraction(1, 2))), size


@pytest.mark.parametrize(("height", "width"), OUTPUTS)
def test_stretch_takes_the_output_size_whatever_the_image(height: int, width: int) -> None:
    geometry = Geometry("stretch", height, width)
    assert {geometry.place(*size) for size in image_sizes()} == {Placement(height, width)}


def test_none_leaves_the_image_as_it_is() -> None:
    geometry = Geometry("none", 10, 20)
    assert all(geometry.place(*size) == Placement(*size) for size in image_sizes())


def test_an_image_of_the_output_size_is_neither_cut_nor_padded() -> None:
    for height, width in OUTPUTS:
        for mode in ("stretch", "center-crop", "pad", "none"):
            assert Geometry(mode, height, width, 1.0).place(height, width) == Placement(height, width)


def test_the_geometry_of_a_build_has_the_plans_size_and_the_settings_mode() -> None:
    config = BuildConfig(resize_mode="center-crop", crop_pct=0.9, size=64)
    assert Geometry.of(config, (64, 64)) == Geometry("center-crop", 64, 64, 0.9)
    assert Geometry.of(BuildConfig(resize_mode="none"), (12, 34)) == Geometry("none", 12, 34, 0.875)
