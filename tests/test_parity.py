"""Two decoders beside each other: real DALI on its CPU operators, and Pillow."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import file_bytes

from gpu_npz import BuildConfig
from gpu_npz.audit import parity as module
from gpu_npz.audit.parity import Parity, parity
from gpu_npz.cli.main import run
from gpu_npz.errors import BackendError, SourceError, UsageError

pytest.importorskip("nvidia.dali")
CONFIG = BuildConfig(size=48)
# The resize rounds differently at a tenth of the pixels, by one level, and weighs the border otherwise.
MEAN_LEVELS = 0.5


def compare(src: Path, images: int = 1000) -> Parity:
    return parity(src, CONFIG, ("pillow", "dali-cpu"), images=images)


def test_the_difference_of_every_kind_is_within_the_tolerance_and_missing_kinds_are_named(tree: Path) -> None:
    found = compare(tree)
    for difference in found.kinds:
        print(difference)
        assert difference.mean <= MEAN_LEVELS
    kinds = {difference.kind for difference in found.kinds}
    assert {"all", "4:4:4", "4:2:0", "gray", "CMYK", "progressive", "EXIF turned", "not JPEG"} <= kinds
    assert set(found.missing_kinds) == set(module.KINDS) - kinds
    assert found.images == 40
    assert found.verdicts == ()
    assert found.sides["dali-cpu"]["backend"] == "dali"
    assert compare(tree, images=3).images == 3


def test_a_decoder_that_gives_other_pixels_is_noticed_with_its_kind_and_worst_file(
    make_tree: Callable[[Mapping[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_npz.preprocess.pillow import PillowDecoder

    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "gray", "a/3.jpg": "jpeg"})
    real = PillowDecoder.decode_image

    def brighter(self: PillowDecoder, data: bytes, path: str, frame: int | None) -> np.ndarray:
        pixels = real(self, data, path, frame)
        return np.clip(pixels.astype(np.int16) + 40 * (path == "a/2.jpg"), 0, 255).astype(np.uint8)

    monkeypatch.setattr(PillowDecoder, "decode_image", brighter)
    found = compare(src)
    by_kind = {difference.kind: difference for difference in found.kinds}
    assert by_kind["gray"].mean > 20
    assert by_kind["4:2:0"].mean <= MEAN_LEVELS
    assert found.worst[0][0] == "a/2.jpg"
    assert found.mean > MEAN_LEVELS


def test_verdicts_that_differ_are_counted_and_named(
    make_tree: Callable[[Mapping[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_npz.preprocess.pillow import PillowDecoder
    from gpu_npz.sources.rejects import BadItem

    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "jpeg", "a/3.jpg": "half"})
    real = PillowDecoder.decode_image

    def strict(self: PillowDecoder, data: bytes, path: str, frame: int | None) -> np.ndarray:
        if path == "a/2.jpg":
            raise BadItem("decode", "undecodable", "not this one")
        return real(self, data, path, frame)

    monkeypatch.setattr(PillowDecoder, "decode_image", strict)
    found = compare(src)
    assert found.verdicts == (("a/2.jpg", "undecodable", "decoded"),)
    assert found.images == 1


def test_the_command_fails_if_the_mean_is_larger_than_allowed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["parity", str(tree), "--size", "48", "--images", "12"]
    assert run([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert run([*options, "--max-mean", "0"]) == 1
    captured = capsys.readouterr()
    assert "verdicts that differ: 0" in captured.out
    assert "--max-mean allows 0.0" in captured.err
    assert run([*options, "--channels", "gray"]) == 0


def test_what_cannot_be_compared_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose two different"):
        parity(tree, CONFIG, ("pillow", "pillow"), images=1)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no images"):
        compare(tmp_path / "empty")


def test_sides_need_no_size_where_the_images_have_one(make_tree: Callable[[Mapping[str, str]], Path]) -> None:
    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "gray"})
    found = parity(src, BuildConfig(resize_mode="none"), ("pillow", "dali-cpu"), images=2)
    assert (found.images, found.verdicts) == (2, ())


def test_a_missing_torchvision_is_named_with_what_to_install(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(BackendError, match=r"torchvision cannot be imported .*; pip install torchvision, in"):
        parity(tree, CONFIG, ("pillow", "torchvision"), images=1)
    assert run(["parity", str(tree), "--one", "torchvision", "--other", "pillow"]) == 1
    assert "pip install torchvision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"resize_mode": "pad"}, "choose stretch, center-crop or none"),
        ({"resize_mode": "center-crop", "size": (32, 48)}, "32x48: .* give a square --size, or choose stretch"),
    ],
)
def test_what_torchvision_has_not_is_refused(tree: Path, settings: dict[str, Any], allowed: str) -> None:
    with pytest.raises(UsageError, match=allowed):
        parity(tree, BuildConfig(**settings), ("pillow", "torchvision"), images=1)


@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("mode", ["stretch", "center-crop", "none"])
def test_torchvision_gives_the_pixels_of_pillow(
    make_tree: Callable[[Mapping[str, str]], Path], mode: Any, interpolation: Any, channels: Any
) -> None:
    pytest.importorskip("torchvision")
    kinds = ["jpeg", "jpeg-444", "jpeg-422", "progressive", "gray", "cmyk", "png-named-jpg", "palette", "bilevel"]
    src = make_tree({f"a/{kind}.jpg": kind for kind in [*kinds, "half"]})
    config = BuildConfig(
        size=None if mode == "none" else 48,
        resize_mode=mode, interpolation=interpolation, channels=channels, normalize="unit",
    )  # fmt: skip
    found = parity(src, config, ("torchvision", "pillow"), images=1000)
    assert (found.images, found.verdicts) == (len(kinds), ())
    assert found.kinds[0].max == 0  # Pillow's resize to the same sizes; 120 pixels to 48 are too few for `draft`
    assert found.sides["torchvision"]["backend"] == "torchvision"


def test_torchvision_differs_where_it_does_not_turn_and_does_not_see_alpha(
    make_tree: Callable[[Mapping[str, str]], Path],
) -> None:
    pytest.importorskip("torchvision")
    src = make_tree({"a/1.jpg": "exif-6", "a/2.jpg": "alpha", "a/3.jpg": "gray16", "a/4.jpg": "jpeg-444"})
    sides = ("pillow", "torchvision")
    by_kind = {found.kind: found.mean for found in parity(src, CONFIG, sides, images=4).kinds}
    assert by_kind["EXIF turned"] > 10
    assert by_kind["not JPEG"] > 10
    assert by_kind["4:4:4"] == 0
    unturned = parity(src, BuildConfig(size=48, exif_orientation=False), sides, images=4)
    assert {found.kind: found.max for found in unturned.kinds}["EXIF turned"] == 0


def test_torchvision_decodes_large_jpegs_whole_and_pillow_does_not(
    make_tree: Callable[[Mapping[str, bytes]], Path],
) -> None:
    pytest.importorskip("torchvision")
    src = make_tree({"a/1.jpg": file_bytes("jpeg", size=(400, 500))})
    found = parity(src, CONFIG, ("pillow", "torchvision"), images=1)
    print(found.kinds[0])
    assert 0 < found.mean <= 2  # Pillow's side takes a quarter from the DCT, and filters only the rest


@pytest.mark.gpu
def test_the_gpu_differs_from_the_cpu_operators_by_a_level_at_most_on_average(tree: Path) -> None:
    found = parity(tree, CONFIG, ("dali-cpu", "dali-gpu"), images=1000)
    for difference in found.kinds:
        print(difference)
    assert found.mean <= 1.0
    assert found.verdicts == ()
