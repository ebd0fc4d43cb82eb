"""Presets: the preprocessing that published models expect, as settings of a build.

Sources of the numbers:

- torchvision 0.29, the `transforms` of each weights entry in `torchvision.models`
- Keras, `keras.applications.imagenet_utils.preprocess_input`, modes tf, caffe and torch
- timm, `timm.data.transforms_factory.transforms_imagenet_eval`: the shorter side becomes floor(size / crop_pct)
- Hugging Face transformers, the `image_processing_*.py` of each model
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError

_IMAGENET = {"normalize": "imagenet"}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN = (123.68, 116.779, 103.939)  # R,G,B, in levels

# torchvision's weights, by the size to which the shorter side is resized, the size of the crop, and the filter.
_TORCHVISION = {
    (256, 224, "bilinear"): """
        alexnet-v1 densenet121-v1 densenet161-v1 densenet169-v1 densenet201-v1 googlenet-v1 mnasnet0_5-v1 mnasnet1_0-v1
        mobilenet_v2-v1 mobilenet_v3_large-v1 mobilenet_v3_small-v1 regnet_x_16gf-v1 regnet_x_1_6gf-v1 regnet_x_32gf-v1
        regnet_x_3_2gf-v1 regnet_x_400mf-v1 regnet_x_800mf-v1 regnet_x_8gf-v1 regnet_y_16gf-v1 regnet_y_1_6gf-v1
        regnet_y_32gf-v1 regnet_y_3_2gf-v1 regnet_y_400mf-v1 regnet_y_800mf-v1 regnet_y_8gf-v1 resnet101-v1 resnet152-v1
        resnet18-v1 resnet34-v1 resnet50-v1 resnext101_32x8d-v1 resnext50_32x4d-v1 shufflenet_v2_x0_5-v1
        shufflenet_v2_x1_0-v1 squeezenet1_0-v1 squeezenet1_1-v1 vgg11-v1 vgg11_bn-v1 vgg13-v1 vgg13_bn-v1 vgg16-v1
        vgg16_bn-v1 vgg19-v1 vgg19_bn-v1 vit_b_16-v1 vit_b_32-v1 vit_l_32-v1 wide_resnet101_2-v1 wide_resnet50_2-v1
    """,
    (232, 224, "bilinear"): """
        convnext_base-v1 convnext_large-v1 mnasnet0_75-v1 mnasnet1_3-v1 mobilenet_v2-v2 mobilenet_v3_large-v2
        regnet_x_16gf-v2 regnet_x_1_6gf-v2 regnet_x_32gf-v2 regnet_x_3_2gf-v2 regnet_x_400mf-v2 regnet_x_800mf-v2
        regnet_x_8gf-v2 regnet_y_16gf-v2 regnet_y_1_6gf-v2 regnet_y_32gf-v2 regnet_y_3_2gf-v2 regnet_y_400mf-v2
        regnet_y_800mf-v2 regnet_y_8gf-v2 resnet101-v2 resnet152-v2 resnet50-v2 resnext101_32x8d-v2 resnext101_64x4d-v1
        resnext50_32x4d-v2 shufflenet_v2_x1_5-v1 shufflenet_v2_x2_0-v1 wide_resnet101_2-v2 wide_resnet50_2-v2
    """,
    (230, 224, "bilinear"): "convnext_small-v1",
    (236, 224, "bilinear"): "convnext_tiny-v1",
    (242, 224, "bilinear"): "vit_l_16-v1",
    (255, 240, "bilinear"): "efficientnet_b1-v2",
    (342, 299, "bilinear"): "inception_v3-v1",
    (384, 384, "bilinear"): "efficientnet_v2_s-v1",
    (480, 480, "bilinear"): "efficientnet_v2_m-v1",
    (224, 224, "bicubic"): """
        maxvit_t-v1 regnet_y_128gf-swag-linear-v1 regnet_y_16gf-swag-linear-v1 regnet_y_32gf-swag-linear-v1
        vit_b_16-swag-linear-v1 vit_h_14-swag-linear-v1 vit_l_16-swag-linear-v1
    """,
    (232, 224, "bicubic"): "swin_t-v1",
    (238, 224, "bicubic"): "swin_b-v1",
    (246, 224, "bicubic"): "swin_s-v1",
    (256, 224, "bicubic"): "efficientnet_b0-v1",
    (256, 240, "bicubic"): "efficientnet_b1-v1",
    (260, 256, "bicubic"): "swin_v2_s-v1 swin_v2_t-v1",
    (272, 256, "bicubic"): "swin_v2_b-v1",
    (288, 288, "bicubic"): "efficientnet_b2-v1",
    (320, 300, "bicubic"): "efficientnet_b3-v1",
    (384, 380, "bicubic"): "efficientnet_b4-v1",
    (384, 384, "bicubic"): """
        regnet_y_128gf-swag-e2e-v1 regnet_y_16gf-swag-e2e-v1 regnet_y_32gf-swag-e2e-v1 vit_b_16-swag-e2e-v1
    """,
    (456, 456, "bicubic"): "efficientnet_b5-v1",
    (512, 512, "bicubic"): "vit_l_16-swag-e2e-v1",
    (518, 518, "bicubic"): "vit_h_14-swag-e2e-v1",
    (528, 528, "bicubic"): "efficientnet_b6-v1",
    (600, 600, "bicubic"): "efficientnet_b7-v1",
}


def _crop(resized: int, crop: int, interpolation: str) -> dict[str, Any]:
    """The settings that resize the shorter side to `resized` pixels and then crop the middle of `crop` x `crop`."""
    return {
        "size": (crop, crop),
        "resize_mode": "center-crop",
        "crop_pct": crop / resized,
        "interpolation": interpolation,
    }


_NAMED: dict[str, dict[str, Any]] = {
    "imagenet-eval": {**_crop(256, 224, "bilinear"), **_IMAGENET},
    "keras-tf": {"normalize": "signed", "layout": "NHWC"},
    "keras-caffe": {
        "channels": "bgr",
        "normalize": "mean-std",
        "mean": tuple(level / 255 for level in _CAFFE_MEAN),
        "std": (1 / 255,) * 3,
        "layout": "NHWC",
    },
    "keras-torch": {**_IMAGENET, "layout": "NHWC"},
    **{
        f"torchvision:{name}": {**_crop(*numbers), **_IMAGENET}
        for numbers, names in _TORCHVISION.items()
        for name in names.split()
    },
    "torchvision:efficientnet_v2_l-v1": {
        **_crop(480, 480, "bicubic"),
        "normalize": "mean-std",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    },
}
NAMES = tuple(sorted(_NAMED))


def settings_of_preset(preset: str) -> dict[str, Any]:
    """The settings that a preset stands for: keyword arguments of `BuildConfig`.

    Args:
        preset: one of NAMES; or a timm `config.json`, or a Hugging Face `preprocessor_config.json`.

    Raises:
        UsageError: there is no such preset or file, or the file asks for something that no setting expresses.
    """
    if preset in _NAMED:
        return dict(_NAMED[preset])
    path = Path(preset).expanduser()
    if not path.is_file():
        raise UsageError(f"preset: got {preset!r}; {_suggestion(preset)}")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"preset: {preset!r} is no JSON file ({exc})") from exc
    if not isinstance(content, dict):
        raise UsageError(f"preset: {preset!r} has a JSON {type(content).__name__}, not an object")
    model = content.get("pretrained_cfg", content)
    read = _timm if isinstance(model, dict) and "input_size" in model else _hugging_face
    return read(_Keys(preset, model if read is _timm else content))


def _suggestion(preset: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(preset, NAMES, 3, 0.6)
    allowed = (
        "allowed are imagenet-eval, keras-tf, keras-caffe, keras-torch, torchvision:MODEL-WEIGHTS such as "
        "torchvision:resnet50-v2, or the JSON file of a timm or Hugging Face model"
    )
    return f"{allowed}. Did you mean {' or '.join(close)}?" if close else allowed


class _Keys:
    """The keys of a model's configuration file. Each is taken once; those left over must be known to be harmless."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self._path = path
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any, fits: Callable[[Any], bool]) -> Any:
        """The value of a key, or the default. Raises UsageError if the value does not fit."""
        value = self._left.pop(name, default)
        if not fits(value):
            raise self.refusal(f"{name} = {value!r}")
        return value

    def end(self, harmless: str) -> None:
        """Raises UsageError if a key is left that may change pixels."""
        if other := sorted({*self._left} - {*harmless.split()}):
            raise self.refusal(", ".join(f"{name} = {self._left[name]!r}" for name in other))

    def refusal(self, what: str) -> UsageError:
        return UsageError(
            f"preset: {self._path!r} has {what}, which no setting expresses; give the settings that you need as options"
        )


def _timm(keys: _Keys) -> dict[str, Any]:
    channels, height, width = map(int, keys.take("input_size", None, _are_numbers(3)))
    if channels not in (1, 3):
        raise keys.refusal(f"input_size = {[channels, height, width]}")
    interpolation = keys.take("interpolation", "bicubic", lambda name: name in ("bilinear", "bicubic", "lanczos"))
    crop_pct = keys.take("crop_pct", 0.875, _is_number)
    mode = keys.take("crop_mode", "center", lambda name: name in ("center", "squash"))
    covers = [math.floor(side / crop_pct) for side in (height, width)]
    found: dict[str, Any] = {"size": (height, width), "interpolation": interpolation}
    if covers == [height, width] and mode == "squash":
        found["resize_mode"] = "stretch"
    elif mode == "center" and height == width:
        found |= {"resize_mode": "center-crop", "crop_pct": height / covers[0]}
    else:
        raise keys.refusal(f"crop_mode = {mode!r} with crop_pct = {crop_pct} and input_size = {[height, width]}")
    if channels == 1:
        found["channels"] = "gray"
    found |= _normalization(keys, "mean", "std", channels)
    keys.end(
        "architecture classifier custom_load file first_conv fixed_input_size global_pool hf_hub_filename hf_hub_id "
        "label_descriptions label_names license min_input_size model_args num_classes num_features origin_url "
        "paper_ids paper_name pool_size pretrained_cfg source tag test_crop_pct test_input_size url notes"
    )
    return found


_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


def _hugging_face(keys: _Keys) -> dict[str, Any]:
    keys.take("do_resize", False, lambda value: value is True)
    resample = keys.take("resample", None, lambda value: type(value) is int and value in _RESAMPLE)
    found: dict[str, Any] = {"interpolation": _RESAMPLE[resample]}
    found |= _hugging_face_size(keys)
    keys.take("do_pad", False, lambda value: value is False)
    rescale = keys.take("do_rescale", True, _is_bool)
    keys.take("rescale_factor", 1 / 255, lambda value: _is_number(value) and math.isclose(value, 1 / 255, rel_tol=1e-3))
    if keys.take("do_normalize", True, _is_bool):
        if not rescale:
            raise keys.refusal("do_normalize = True with do_rescale = False")
        found |= _normalization(keys, "image_mean", "image_std", 3)
    else:
        found["normalize"] = "unit" if rescale else "none"
    if keys.take("do_flip_channel_order", False, _is_bool):
        found["channels"] = "bgr"
    keys.end(
        "_processor_class crop_size data_format do_convert_rgb feature_extractor_type image_mean image_processor_type "
        "image_std processor_class return_tensors"
    )
    return found


def _hugging_face_size(keys: _Keys) -> dict[str, Any]:
    """The settings for `size`, `crop_size` and `crop_pct`."""
    size = keys.take("size", None, lambda value: isinstance(value, (int, dict)))
    crops = keys.take("do_center_crop", False, _is_bool)
    crop = _sides(keys.take("crop_size", None, lambda value: not crops or _sides(value) is not None)) if crops else None
    crop_pct = keys.take("crop_pct", None, lambda value: value is None or _is_number(value))
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    whole = _sides(size)
    if isinstance(edge, int) and crop_pct is not None and not crops:  # ConvNeXT's
        if edge >= 384:  # where it resizes without a crop
            return {"size": (edge, edge), "resize_mode": "stretch"}
        return {"size": (edge, edge), "resize_mode": "center-crop", "crop_pct": edge / int(edge / crop_pct)}
    if isinstance(edge, int) and crop and crop[0] == crop[1] <= edge and crop_pct is None:
        return {"size": crop, "resize_mode": "center-crop", "crop_pct": crop[0] / edge}
    if whole and crop in (None, whole) and crop_pct is None:
        return {"size": whole, "resize_mode": "stretch"}
    raise keys.refusal(f"size = {size!r} with do_center_crop = {crops}, crop_size = {crop}, crop_pct = {crop_pct}")


def _sides(value: Any) -> tuple[int, int] | None:
    """(height, width) of a size that is a number or has `height` and `width`; None for others."""
    if isinstance(value, dict):
        sides = value.get("height"), value.get("width")
        return (int(sides[0]), int(sides[1])) if all(type(side) is int for side in sides) else None  # type: ignore[arg-type]
    return (value, value) if type(value) is int else None


def _normalization(keys: _Keys, mean: str, std: str, channels: int) -> dict[str, Any]:
    """The settings for a mean and a standard deviation of pixels scaled to 0..1."""
    means = tuple(keys.take(mean, None, _are_numbers(channels, or_zero=True)))
    stds = tuple(keys.take(std, None, _are_numbers(channels)))
    if (means, stds) == (_IMAGENET_MEAN, _IMAGENET_STD):
        return dict(_IMAGENET)
    return {"normalize": "mean-std", "mean": means, "std": stds}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _are_numbers(count: int, *, or_zero: bool = False) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        numbers = value if isinstance(value, list) else []
        return len(numbers) == count and all(_is_number(number) or (or_zero and number == 0) for number in numbers)

    return fits
