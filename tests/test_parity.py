"""Two decoders beside each other: real DALI on its CPU operators, and Pillow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from gpu_npz import BuildConfig
from gpu_npz.audit import parity as module
from gpu_npz.audit.parity import Parity, parity
from gpu_npz.cli.main import run
from gpu_npz.errors import SourceError, UsageError

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
    from gpu_npz.decode.pillow import PillowDecoder

    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "gray", "a/3.jpg": "jpeg"})
    real = PillowDecoder.decode_image

    def brighter(self: PillowDecoder, data: bytes, path: str) -> np.ndarray:
        pixels = real(self, data, path)
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
    from gpu_npz.decode.pillow import PillowDecoder
    from gpu_npz.rejects import BadItem

    src = make_tree({"a/1.jpg": "jpeg", "a/2.jpg": "jpeg", "a/3.jpg": "half"})
    real = PillowDecoder.decode_image

    def strict(self: PillowDecoder, data: bytes, path: str) -> np.ndarray:
        if path == "a/2.jpg":
            raise BadItem("decode", "undecodable", "not this one")
        return real(self, data, path)

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


def test_what_cannot_be_compared_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose two different"):
        parity(tree, CONFIG, ("pillow", "pillow"), images=1)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no images"):
        compare(tmp_path / "empty")


@pytest.mark.gpu
def test_the_gpu_differs_from_the_cpu_operators_by_a_level_at_most_on_average(tree: Path) -> None:
    found = parity(tree, CONFIG, ("dali-cpu", "dali-gpu"), images=1000)
    for difference in found.kinds:
        print(difference)
    assert found.mean <= 1.0
    assert found.verdicts == ()
