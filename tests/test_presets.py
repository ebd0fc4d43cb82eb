"""Presets: settings that give a published model what it expects, and refusals of what no setting expresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpu_npz.bench.pictures import paint
from gpu_npz.cli.main import run
from gpu_npz.config import BuildConfig
from gpu_npz.errors import UsageError
from gpu_npz.preprocess.geometry import Geometry
from gpu_npz.preprocess.normalize import NumpyNormalizer
from gpu_npz.presets import NAMES, settings_of_preset

TIMM = {
    "architecture": "vit_base_patch16_224",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "augreg", "custom_load": False, "input_size": [3, 224, 224], "fixed_input_size": True,
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5], "num_classes": 1000, "pool_size": None, "first_conv": "patch_embed.proj",
    },
}  # fmt: skip
VIT = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "ViTImageProcessor", "image_std": [0.229, 0.224, 0.225], "resample": 2,
    "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
}  # fmt: skip
CLIP = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 256},
}  # fmt: skip
CONVNEXT = {
    "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
}  # fmt: skip


def of_file(path: Path, content: Any) -> dict[str, Any]:
    path.write_text(json.dumps(content))
    return settings_of_preset(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_settings_of_a_build(name: str) -> None:
    settings = settings_of_preset(name)
    config = BuildConfig(**settings)
    assert {key: getattr(config, key) for key in settings} == settings


def test_weights_of_torchvision_are_resized_and_cropped_as_they_say() -> None:
    assert len(NAMES) > 100
    for name, cover, size, interpolation in (
        ("torchvision:resnet50-v1", 256, 224, "bilinear"),
        ("torchvision:resnet50-v2", 232, 224, "bilinear"),
        ("torchvision:inception_v3-v1", 342, 299, "bilinear"),
        ("torchvision:swin_v2_b-v1", 272, 256, "bicubic"),
        ("torchvision:vit_h_14-swag-e2e-v1", 518, 518, "bicubic"),
        ("imagenet-eval", 256, 224, "bilinear"),
    ):
        config = BuildConfig(**settings_of_preset(name))
        assert config.size == (size, size)
        assert Geometry.of(config, config.size).cover == (cover, cover)
        assert config.interpolation == interpolation


@pytest.mark.parametrize("mode", ["tf", "caffe", "torch"])
def test_keras_presets_give_what_keras_computes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    utils = pytest.importorskip("keras.applications.imagenet_utils")
    pixels = paint(20, 30, 7)[None]
    config = BuildConfig(**settings_of_preset(f"keras-{mode}"), size=(20, 30))
    rows = np.empty((1, 20, 30, 3), np.float32)
    NumpyNormalizer(config).apply(pixels, np.zeros(1, np.int64), rows)()
    expected = utils.preprocess_input(pixels.astype(np.float32), "channels_last", mode)
    np.testing.assert_allclose(rows, expected, atol=1e-4 if mode == "caffe" else 1e-6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            TIMM,
            {"size": (224, 224), "resize_mode": "center-crop", "crop_pct": 224 / 248, "interpolation": "bicubic"}
            | {"normalize": "mean-std", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        ),
        (
            {**TIMM["pretrained_cfg"], "input_size": [1, 32, 64], "crop_pct": 1.0, "crop_mode": "squash"}  # type: ignore[dict-item]
            | {"mean": [0.0], "std": [1.0]},
            {"size": (32, 64), "resize_mode": "stretch", "interpolation": "bicubic", "channels": "gray"}
            | {"normalize": "mean-std", "mean": (0.0,), "std": (1.0,)},
        ),
        (VIT, {"size": (224, 224), "resize_mode": "stretch", "interpolation": "bilinear", "normalize": "imagenet"}),
        (
            CLIP,
            {"size": (224, 224), "resize_mode": "center-crop", "crop_pct": 224 / 256, "interpolation": "bicubic"}
            | {"normalize": "mean-std", "mean": tuple(CLIP["image_mean"]), "std": tuple(CLIP["image_std"])},  # type: ignore[arg-type]
        ),
        (
            CONVNEXT,
            {"size": (224, 224), "resize_mode": "center-crop", "crop_pct": 0.875, "interpolation": "bicubic"}
            | {"normalize": "imagenet"},
        ),
        (
            {**CONVNEXT, "size": {"shortest_edge": 384}},
            {"size": (384, 384), "resize_mode": "stretch", "interpolation": "bicubic", "normalize": "imagenet"},
        ),
        (
            {"do_resize": True, "size": 96, "resample": 0, "do_normalize": False, "do_flip_channel_order": True},
            {"size": (96, 96), "resize_mode": "stretch", "interpolation": "nearest", "normalize": "unit"}
            | {"channels": "bgr"},
        ),
    ],
)
def test_a_models_file_becomes_settings(content: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    settings = of_file(tmp_path / "config.json", content)
    assert settings == expected
    BuildConfig(**settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**VIT, "do_pad": True}, "do_pad = True"),
        ({**VIT, "resample": 4}, "resample = 4"),
        ({**VIT, "do_resize": False}, "do_resize = False"),
        ({**VIT, "rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        ({**VIT, "do_rescale": False}, "do_normalize = True with do_rescale = False"),
        ({**VIT, "do_reduce_labels": True, "patch_size": 14}, "do_reduce_labels = True, patch_size = 14"),
        ({**VIT, "size": {"shortest_edge": 224}}, "size = {'shortest_edge': 224} with do_center_crop = False"),
        ({**VIT, "size": {"longest_edge": 224}}, "longest_edge"),
        ({**CLIP, "crop_size": {"height": 300, "width": 300}}, r"crop_size = \(300, 300\)"),
        ({**CLIP, "image_std": [0.0, 0.2, 0.2]}, "image_std"),
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "crop_mode": "border"}}, "crop_mode = 'border'"),  # type: ignore[dict-item]
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "interpolation": "random"}}, "interpolation = 'random'"),  # type: ignore[dict-item]
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "input_size": [4, 9, 9]}}, "input_size"),  # type: ignore[dict-item]
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "black_magic": 1}}, "black_magic = 1"),  # type: ignore[dict-item]
        ({}, "do_resize = False"),
        ([], "a JSON list, not an object"),
    ],
)
def test_what_no_setting_expresses_is_refused_by_name(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        of_file(tmp_path / "config.json", content)


def test_an_unknown_preset_is_answered_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean torchvision:resnet50-v2"):
        settings_of_preset("torchvision:resnet-50-v2")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="no JSON file"):
        settings_of_preset(str(tmp_path / "broken.json"))


def test_options_win_over_the_environment_over_the_file_over_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    Image.fromarray(paint(40, 50, 1)).save(tmp_path / "src" / "a" / "1.jpg")
    (tmp_path / "file.toml").write_text('interpolation = "nearest"\nworkers = 3\nbatch-size = 7\nlayout = "NHWC"\n')
    monkeypatch.setenv("GPU_NPZ_WORKERS", "2")
    monkeypatch.setenv("GPU_NPZ_BATCH_SIZE", "5")
    monkeypatch.setenv("GPU_NPZ_LAYOUT", "NCHW")  # no operational setting
    monkeypatch.setenv("GPU_NPZ_PREFLIGHT", "false")
    options = ["--preset", "torchvision:efficientnet_v2_l-v1", "--config", str(tmp_path / "file.toml")]
    options += ["--batch-size", "4", "--size", "16", "--normalize", "unit", "--device", "cpu", "--json"]
    assert run(["build", str(tmp_path / "src"), str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr()
    assert "preset torchvision:efficientnet_v2_l-v1: --size 480x480 --resize-mode center-crop" in shown.err
    tuning = json.loads(shown.out)["tuning"]
    assert (tuning["workers"], tuning["batch_size"]) == (1, 1)  # one image
    settings = json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"]
    assert (settings["size"], settings["resize_mode"], settings["crop_pct"]) == ([16, 16], "center-crop", 1.0)
    assert (settings["interpolation"], settings["layout"]) == ("nearest", "NHWC")
    assert (settings["normalize"], settings["mean"]) == ("unit", None)


def test_a_bad_variable_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_NPZ_WORKERS", "many")
    assert run(["build", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "workers: got 'many'" in capsys.readouterr().err
