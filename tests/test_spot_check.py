"""The check of a GPU's pixels by a sample: what it takes, what it counts, and what it stops.

There is no GPU in most places, so faults are injected into a decoder that runs on DALI's CPU operators.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import arrays_of, cpu_config

from gpu_npz import build
from gpu_npz.bench.pictures import paint
from gpu_npz.config import BuildConfig
from gpu_npz.dataset.layout import REPORT
from gpu_npz.errors import ShardError
from gpu_npz.machine.environment import Choice
from gpu_npz.machine.tuning import Tuning
from gpu_npz.preprocess.base import DecodedBatch
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.spot_check import LIMIT, SpotCheck, mean_difference
from gpu_npz.sources.base import Batch, Item
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.sources.rejects import BadItem

dali = pytest.importorskip("gpu_npz.preprocess.dali", reason="DALI is not installed", exc_type=ImportError)

ITEMS = [Item(number, f"{number:02d}.jpg", None) for number in range(8)]


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[Any]:
    for item in ITEMS:
        Image.fromarray(paint(60 + item.index, 111 - item.index, item.index)).save(tmp_path / item.path)
    config = BuildConfig(size=64, batch_size=8)
    tuning = Tuning.of(config, Choice("dali"), row_bytes=1, shard_rows=8, shards=1)
    geometry = Geometry.of(config, (64, 64))
    with dali.DaliDecoder(config, geometry, FolderSource(tmp_path), tuning=tuning, device=None) as decoder:
        yield decoder


def decoded_by(decoder: Any) -> DecodedBatch:
    (decoded,) = decoder.decode([Batch(0, ITEMS, True)])
    encoded = [np.frombuffer(decoder._source.read(item), np.uint8) for item in ITEMS]
    found: DecodedBatch = dataclasses.replace(decoded, encoded=encoded)
    return found


def unequal(*_: Any) -> Any:
    """An image that has nothing in common with any other."""
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def test_images_as_pillow_decodes_them_are_no_difference(decoder: Any) -> None:
    assert SpotCheck(decoder).differences(decoded_by(decoder), list(range(8))) == 0


def test_a_file_that_pillow_decodes_differently_is_counted(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = decoded_by(decoder)
    monkeypatch.setattr(decoder, "decode_with_pillow", unequal)
    assert SpotCheck(decoder).differences(decoded, [1, 4, 6]) == 3


def test_a_file_that_pillow_alone_rejects_is_counted(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rejected(*_: Any) -> Any:
        raise BadItem("decode", "truncated", "a reason")

    decoded = decoded_by(decoder)
    monkeypatch.setattr(decoder, "decode_with_pillow", rejected)
    assert SpotCheck(decoder).differences(decoded, [0]) == 1


@pytest.mark.parametrize("pillow_agrees", [True, False])
def test_an_image_that_differs_only_in_its_batch_is_an_error(
    pillow_agrees: bool, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = decoded_by(decoder)
    decoded.pixels[2] = 255 - decoded.pixels[2]
    check = SpotCheck(decoder)
    assert check.differences(decoded, [0, 1, 3]) == 0
    if not pillow_agrees:
        monkeypatch.setattr(decoder, "decode_with_pillow", unequal)
    with pytest.raises(ShardError, match=r"'02\.jpg' differs by \d+ levels from itself decoded alone") as caught:
        check.differences(decoded, [2])
    assert "DALI 2." in str(caught.value)
    assert "--hw-decoder-load unset" in str(caught.value)
    assert "run the same command with --hw-decoder-load 0" in str(caught.value)


def test_an_image_that_only_a_batch_decodes_is_an_error(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = decoded_by(decoder)
    monkeypatch.setattr(decoder, "decode_with_pillow", unequal)
    monkeypatch.setattr(decoder, "decode_alone", lambda _: None)
    with pytest.raises(ShardError, match="could not be decoded alone"):
        SpotCheck(decoder).differences(decoded, [5])


def test_without_hardware_engines_the_advice_is_another_one(decoder: Any) -> None:
    decoder._tuning = dataclasses.replace(decoder._tuning, hw_decoder_load=0.0)
    decoded = decoded_by(decoder)
    decoded.pixels[0] = 255 - decoded.pixels[0]
    with pytest.raises(ShardError, match=r"with --hw-decoder-load 0\.0\); update DALI .* --device cpu --overwrite"):
        SpotCheck(decoder).differences(decoded, [0])


@pytest.mark.parametrize("size", [1, 5, 256])
def test_the_sample_is_16_images_and_one_in_a_thousand(size: int) -> None:
    check, chosen, seen = SpotCheck(None), 0, 0  # type: ignore[arg-type]
    for number in range(20_000 // size):
        batch = Batch(0, [Item(number * size + place, "x.jpg", None) for place in range(size)], False)
        by_dali = np.arange(0, size, 2)  # Pillow decoded the others
        decoded = DecodedBatch(batch, None, np.arange(size), np.ones(size, np.int64), [], {}, by_dali)
        positions = check.choose(decoded)
        assert {*positions} <= {*by_dali.tolist()}
        chosen, seen = chosen + len(positions), seen + len(by_dali)
        assert chosen == min(seen, 16 + seen // 1000)


def test_the_limit_lies_between_two_decoders_and_two_images(decoder: Any) -> None:
    pixels = decoded_by(decoder).pixels
    assert mean_difference(pixels[0], pixels[0] ^ 1) == 1.0
    assert mean_difference(pixels[0], decoder.decode_with_pillow(decoded_by(decoder).encoded[0], ITEMS[0])) < LIMIT / 4
    assert mean_difference(pixels[0], unequal()) > 4 * LIMIT


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in this process on DALI's CPU operators check a sample, as those on a GPU do."""
    finish: Callable[..., DecodedBatch] = dali.DaliDecoder._finish

    def with_encoded(decoder: Any, run: Any) -> DecodedBatch:
        return dataclasses.replace(finish(decoder, run), encoded=run.read.encoded)

    monkeypatch.setattr(dali.DaliDecoder, "_finish", with_encoded)
    monkeypatch.setattr(
        "gpu_npz.workers.worker._spot_check",
        lambda task, decoder: SpotCheck(decoder) if task.tuning.spot_check else None,
    )


SETTINGS = cpu_config(backend="dali", workers=0, size=64, batch_size=8, shard_size="4", max_rejects="100%")


def same(one: Path, other: Path) -> bool:
    shards = sorted(one.glob("*.npz"))
    return len(shards) > 2 and all(
        np.array_equal(value, arrays_of(other / shard.name)[name])
        for shard in shards
        for name, value in arrays_of(shard).items()
    )


def test_a_build_reports_its_checks_and_their_differences(
    checked: None, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build(tree, tmp_path / "good", SETTINGS)
    assert (report.spot_checks, report.spot_check_differences) == (min(16, report.decoded_by["dali"]), 0)
    assert sum(report.decoded_by.values()) == report.rows
    monkeypatch.setattr(dali.DaliDecoder, "decode_with_pillow", unequal)
    report = build(tree, tmp_path / "other", SETTINGS)
    assert report.spot_check_differences == report.spot_checks > 0
    stored = json.loads((tmp_path / "other" / REPORT).read_text())
    assert stored["spot_check_differences"] == report.spot_checks
    off = build(tree, tmp_path / "off", SETTINGS.model_copy(update={"spot_check": False}))
    assert (off.spot_checks, off.spot_check_differences) == (0, 0)
    assert same(tmp_path / "off", tmp_path / "good")


def test_a_faulty_batch_stops_the_build_which_resumes(
    checked: None, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = dali.DaliDecoder._pixels

    def shifted(decoder: Any, outputs: Any) -> Any:
        found = pixels(decoder, outputs)
        return np.roll(found, 1, axis=0) if len(found) > 1 else found  # each image has the pixels of its neighbour

    with monkeypatch.context() as patch:
        patch.setattr(dali.DaliDecoder, "_pixels", shifted)
        with pytest.raises(ShardError, match="from itself decoded alone"):
            build(tree, tmp_path / "out", SETTINGS)
    assert build(tree, tmp_path / "out", SETTINGS).complete
    build(tree, tmp_path / "whole", SETTINGS)
    assert same(tmp_path / "out", tmp_path / "whole")
