"""Settings: checked once, frozen, and whole again after JSON or TOML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from gpu_npz.config import MIN_REJECT_LIMIT, BuildConfig, Kind, as_option, load_toml, settings_of
from gpu_npz.errors import UsageError

VARIED: list[dict[str, Any]] = [
    {},
    {"device": 3, "backend": "dali", "reproducible": True, "require_gpu": True},
    {"size": "128x256", "resize_mode": "center-crop", "crop_pct": 0.9, "interpolation": "bicubic"},
    {"resize_mode": "pad", "pad_value": 255, "background": "1,2,3", "exif_orientation": False},
    {"resize_mode": "none"},
    {"channels": "gray", "normalize": "unit", "dtype": "float16", "layout": "NHWC"},
    {"channels": "gray", "mean": "0.5", "std": "0.25"},
    {"mean": (0.1, 0.2, 0.3), "std": (1, 2e-5, 1 / 3)},
    {"window": "-3,77.5", "clip": True},
    {"dicom_window": "-160,240"},
    {"normalize": "log", "channels": "gray"},
    {"normalize": "standardize"},
    {"bit_depth": "16", "dtype": "uint16", "window": "9,40000"},
    {"shard_size": "2GB", "shuffle": 0, "limit": 7, "max_rejects": "0.5%"},
    {"shard_size": 10, "max_rejects": 5, "batch_size": 64, "workers": 2, "on_reject": "blank"},
    {"classes_from": "names.txt", "overwrite": True, "accept_environment": True, "max_pixels": 10**6},
]


@pytest.mark.parametrize("settings", VARIED, ids=lambda settings: ",".join(settings) or "defaults")
def test_settings_survive_json_in_both_ways(settings: dict[str, Any]) -> None:
    config = BuildConfig(**settings)
    text = config.model_dump_json()
    assert BuildConfig.model_validate_json(text) == config
    assert BuildConfig(**json.loads(text)) == config
    assert hash(BuildConfig(**json.loads(text))) == hash(config)


@pytest.mark.parametrize("settings", VARIED, ids=lambda settings: ",".join(settings) or "defaults")
def test_settings_are_taken_as_they_are_shown(settings: dict[str, Any]) -> None:
    identity = BuildConfig(**settings).identity()
    shown = {name: as_option(name, value) for name, value in identity.items() if value is not None}
    assert all(isinstance(value, str) for value in shown.values())
    assert BuildConfig(**shown).identity() == identity


@pytest.mark.parametrize("text", ["0.5,0.25,1e-3", "[0.5, 0.25, 0.001]", " (0.5,0.25, .001) "])
def test_numbers_are_taken_as_options_json_and_python_have_them(text: str) -> None:
    assert BuildConfig(mean=text, std="1,1,1").mean == (0.5, 0.25, 0.001)
    with pytest.raises(UsageError, match=r"mean: got"):
        BuildConfig(mean=text.strip(" [(") + "]", std="1,1,1")


@pytest.mark.parametrize("percentage", ["0.00001%", "33.333333%"])
def test_any_percentage_of_rejects_survives_json(percentage: str) -> None:
    config = BuildConfig(max_rejects=percentage)
    assert BuildConfig.model_validate_json(config.model_dump_json()) == config
    assert float(config.max_rejects[:-1]) == float(percentage[:-1])


@pytest.mark.parametrize(
    ("name", "spelled", "meant"),
    [
        ("device", "cuda", "0"), ("device", "GPU", "0"), ("device", "cuda:1", "1"), ("device", "cuda:0,cuda:2", "0,2"),
        ("resize_mode", "center_crop", "center-crop"), ("resize_mode", "Center-Crop", "center-crop"),
        ("layout", "nhwc", "NHWC"), ("normalize", "mean_std", "mean-std"), ("dtype", "UINT8", "uint8"),
        ("interpolation", " BILINEAR ", "bilinear"), ("on_reject", "Blank", "blank"),
        ("shard_size", "500M", "500000000B"), ("shard_size", "2g", "2000000000B"), ("shard_size", "64k", "64000B"),
        ("shard_size", "1 Gi", "1073741824B"),
    ],
)  # fmt: skip
def test_familiar_spellings_mean_the_same(name: str, spelled: str, meant: str) -> None:
    extra = {"mean": (0, 0, 0), "std": (1, 1, 1)} if name == "normalize" else {}
    assert getattr(BuildConfig(**{name: spelled}, **extra), name) == meant


def test_toml_gives_settings_under_the_names_of_the_options(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.write_text('size = "64x96"\nresize-mode = "pad"\npad_value = 9\nmean = [0.1, 0.2, 0.3]\nstd = [1, 1, 1]\n')
    config = BuildConfig(**load_toml(path))
    assert config == BuildConfig(size=(64, 96), resize_mode="pad", pad_value=9, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))


def test_a_toml_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.toml: No such file.*give a readable TOML file"):
        load_toml(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_bytes(b"size = \n")
    with pytest.raises(UsageError, match=r"bad\.toml: not TOML"):
        load_toml(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.toml: not TOML"):
        load_toml(tmp_path / "binary.toml")


def test_every_setting_is_of_one_kind() -> None:
    names = [name for kind in get_args(Kind) for name in settings_of(kind)]
    assert sorted(names) == sorted(BuildConfig.model_fields)


@pytest.mark.parametrize("name", BuildConfig.model_fields)
def test_every_setting_is_described(name: str) -> None:
    description = BuildConfig.model_fields[name].description or ""
    assert len(description) > 15
    assert description.endswith(".")


@pytest.mark.parametrize("name", BuildConfig.model_fields)
def test_a_value_of_a_wrong_type_is_answered_with_what_is_allowed(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildConfig(**{name: {"a": "table"}})
    option, _, allowed = str(caught.value).splitlines()[0].partition(": got {'a': 'table'}; allowed: ")
    assert option == name.replace("_", "-")
    is_switch = BuildConfig.model_fields[name].annotation in (bool, bool | None)
    assert (allowed == "true, false") if is_switch else (allowed not in ("", "true, false"))


@pytest.mark.parametrize(
    ("name", "value", "got", "allowed"),
    [
        ("device", "cuda:", "'cuda:'", "auto, cpu, all, or numbers of GPUs"),
        ("device", "tpu", "'tpu'", "auto, cpu, all, or numbers of GPUs"),
        ("device", -1, "-1", "auto, cpu, all, or numbers of GPUs"),
        ("device", "0,0", "'0,0'", "auto, cpu, all, or numbers of GPUs"),
        ("device", "0,all", "'0,all'", "auto, cpu, all, or numbers of GPUs"),
        ("part", "5/4", "'5/4'", "i/n with i from 1 to n, auto or auto/n"),
        ("part", "0/4", "'0/4'", "i/n with i from 1 to n, auto or auto/n"),
        ("part", "2", "'2'", "i/n with i from 1 to n, auto or auto/n"),
        ("device", "²", "'²'", "auto, cpu, all, or numbers of GPUs"),
        ("backend", "opencv", "'opencv'", "auto, pillow, dali"),
        ("size", 0, "0", "N or HxW, each side 1 to 16384"),
        ("size", "224x", "'224x'", "N or HxW"),
        ("size", "20000", "'20000'", "N or HxW"),
        ("size", (1, 2, 3), "(1, 2, 3)", "N or HxW"),
        ("size", True, "True", "N or HxW"),
        ("resize_mode", "crop", "'crop'", "stretch, center-crop, pad, none"),
        ("crop_pct", 0, "0", "0.001 to 1"),
        ("crop_pct", 1.01, "1.01", "0.001 to 1"),
        ("crop_pct", float("nan"), "nan", "0.001 to 1"),
        ("pad_value", 256, "256", "0 to 255"),
        ("interpolation", "cubic", "'cubic'", "bilinear, bicubic, lanczos, nearest"),
        ("background", "0,0,256", "'0,0,256'", "R,G,B, each 0 to 255"),
        ("background", "0,0", "['0', '0']", "R,G,B, each 0 to 255"),
        ("max_pixels", 0, "0", "a positive number"),
        ("bit_depth", 12, "12", "8, 16"),
        ("channels", "rgba", "'rgba'", "rgb, bgr, gray"),
        ("normalize", "zscore", "'zscore'", "imagenet, unit, signed, none, mean-std"),
        ("mean", "a,0,0", "'a'", "as many numbers as channels"),
        ("dtype", "float64", "'float64'", "float32, float16, uint8, uint16"),
        ("layout", "CHW", "'CHW'", "NCHW, NHWC"),
        ("shard_size", "0", "'0'", "auto, rows (1024) or bytes with a unit"),
        ("shard_size", "1TB", "'1TB'", "auto, rows (1024) or bytes with a unit"),
        ("shuffle", -1, "-1", "0 or a positive number"),
        ("limit", 0, "0", "a positive number"),
        ("on_reject", "ignore", "'ignore'", "skip, blank, fail"),
        ("max_rejects", "101%", "'101%'", "a number of items (50) or a percentage"),
        ("max_rejects", "many", "'many'", "a number of items (50) or a percentage"),
        ("batch_size", 4097, "4097", "1 to 4096"),
        ("workers", -1, "-1", "0 to 1024"),
        ("overwrite", "perhaps", "'perhaps'", "true, false"),
    ],
)
def test_a_bad_value_is_answered_with_what_was_got_and_what_is_allowed(
    name: str, value: Any, got: str, allowed: str
) -> None:
    with pytest.raises(UsageError) as caught:
        BuildConfig(**{name: value})
    assert f"{name.replace('_', '-')}: got {got}; allowed: {allowed}" in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        BuildConfig(size=0, dtype="int8", workers=-2)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["size", "dtype", "workers"]


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        (
            {"mean": (0, 0), "std": (1, 0, 1), "dicom_window": (9, 9), "device": "cpu", "require_gpu": True},
            ["--mean has 2", "--std: got", "--dicom-window: got", "--require-gpu and --device cpu"],
        ),
        (
            {"workers": -2, "engine": "ray", "device": "0,1", "sise": 3, "window": (9, 9), "max_pixels": 5},
            ["workers: got", "unknown setting 'sise'", "size 224x224 has", "--window: got", "--engine ray gives"],
        ),
        ({"size": 0, "max_pixels": 5, "ray_address": "auto"}, ["size: got 0", "--ray-address requires"]),
        ({"mean": "a,0,0", "channels": "gray", "split_seed": 1}, ["mean: got 'a'", "--split-by and"]),
        ({"normalize": "zscore", "mean": (0, 0)}, ["normalize: got", "--mean has 2"]),
        ({"channels": "gray", "dtype": "uint16"}, ["normalize imagenet has", "--dtype uint16 is not"]),
    ],
)
def test_faults_of_settings_alone_and_together_are_named_at_once(settings: dict[str, Any], starts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        BuildConfig(**settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts), lines
    assert all(map(str.startswith, lines, starts)), lines


def test_faults_in_json_are_usage_errors_too() -> None:
    with pytest.raises(UsageError, match="size: got 0"):
        BuildConfig.model_validate_json('{"size": 0}')
    with pytest.raises(UsageError, match="size: got 0"):
        BuildConfig.model_validate({"size": 0})


def test_an_unknown_setting_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'resize_mod'; did you mean 'resize-mode'\?"):
        BuildConfig(resize_mod="pad")
    with pytest.raises(UsageError, match=r"unknown setting 'qqq'; `gpu-npz build --help` lists them"):
        BuildConfig(qqq=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0, 0, 0)}, "needs both --mean and --std"),
        ({"std": (1, 1, 1)}, "needs both --mean and --std"),
        ({"normalize": "mean-std"}, "needs both --mean and --std"),
        ({"normalize": "unit", "mean": (0, 0, 0), "std": (1, 1, 1)}, "got unit"),
        ({"mean": (0, 0), "std": (1, 1, 1)}, "--mean has 2 numbers; --channels rgb needs 3"),
        ({"channels": "gray", "mean": (0,), "std": (1, 1, 1)}, "--std has 3 numbers; --channels gray needs 1"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "as many positive numbers"),
        ({"mean": (0, 0, 0), "std": (1, -1, 1)}, "as many positive numbers"),
        ({"mean": (0, float("inf"), 0), "std": (1, 1, 1)}, "as many numbers as channels"),
        ({"mean": (0, float("nan"), 0), "std": (1, 1, 1)}, "as many numbers as channels"),
        ({"channels": "gray"}, "with --channels gray choose another one, such as unit, or give"),
        ({"dtype": "uint16"}, "--dtype uint16 is not for pixels of --bit-depth 8; choose uint8 or a float type"),
        ({"bit_depth": 16, "dtype": "uint8"}, "--dtype uint8 is not for pixels of --bit-depth 16; choose uint16"),
        ({"bit_depth": 16, "backend": "dali"}, "on the CPU; got --backend dali, --device auto; omit"),
        ({"bit_depth": 16, "device": "0"}, "on the CPU; got --backend auto, --device 0; omit"),
        ({"bit_depth": 16, "require_gpu": True}, "--device auto, --require-gpu; omit them, or choose"),
        ({"dicom_window": (9, 9)}, "--dicom-window: got 9,9; allowed: LO,HI with LO < HI"),
        ({"normalize": "window"}, "--normalize window and --window LO,HI require each other"),
        ({"normalize": "unit", "window": (0, 9)}, "require each other; give both, or neither"),
        ({"window": (9, 9)}, "--window: got 9,9; allowed: LO,HI with LO < HI, and levels between them"),
        ({"window": (255, 300)}, "--window: got 255,300"),
        ({"window": (-9, 0)}, "--window: got -9,0"),
        ({"window": (0, float("nan"))}, "--window: got 0,nan"),
        ({"device": 0, "backend": "pillow"}, "choose --backend dali or --device cpu"),
        ({"device": "all", "backend": "pillow"}, "choose --backend dali or --device cpu"),
        ({"ray_address": "auto"}, "requires --engine ray"),
        ({"engine": "ray", "workers": 0}, "with --engine ray give 1 or more"),
        ({"engine": "ray", "device": "0,1"}, "gives each worker a GPU of its own"),
        ({"reproducible": True, "hw_decoder_load": 0.5}, "omit one of them"),
        ({"device": "cpu", "require_gpu": True}, "contradict each other"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildConfig(**settings)


def test_the_many_ways_to_say_one_thing_are_one_setting() -> None:
    assert BuildConfig(size=224) == BuildConfig(size="224") == BuildConfig(size="224X224") == BuildConfig()
    assert BuildConfig(device=0) == BuildConfig(device="0") == BuildConfig(device=" 00 ")
    assert BuildConfig(device="CPU") == BuildConfig(device="cpu")
    assert BuildConfig(shard_size="1MB") == BuildConfig(shard_size="1000 kb") == BuildConfig(shard_size="1000000B")
    assert BuildConfig(shard_size="1KiB") == BuildConfig(shard_size="1024B") != BuildConfig(shard_size=1024)
    assert BuildConfig(max_rejects="1 %") == BuildConfig(max_rejects="1.0%") == BuildConfig(max_rejects=None)


def test_mean_and_std_alone_mean_mean_std() -> None:
    assert BuildConfig(mean="0,0,0", std="1,1,1").normalize == "mean-std"


def test_a_window_alone_means_window() -> None:
    assert BuildConfig(window="10,20") == BuildConfig(normalize="window", window=[10, 20])


def test_only_resize_mode_none_leaves_the_size_open() -> None:
    assert BuildConfig().size == (224, 224)
    assert BuildConfig(resize_mode="pad", size=None).size == (224, 224)
    assert BuildConfig(resize_mode="none").size is None
    assert BuildConfig(resize_mode="none", size=32).size == (32, 32)


def test_identity_leaves_out_what_may_change_between_runs() -> None:
    config = BuildConfig(workers=4, batch_size=8, max_rejects="3%", overwrite=True, device="cpu", backend="pillow")
    assert config.identity() == BuildConfig().identity()
    assert set(config.identity()) == set(settings_of("identity"))
    assert not {"workers", "batch_size", "max_rejects", "overwrite", "device", "backend"} & set(config.identity())


@pytest.mark.parametrize(
    "changed",
    [{"size": 225}, {"crop_pct": 0.9}, {"dtype": "uint8"}, {"shuffle": 0}, {"shard_size": 1000}, {"limit": 1}],
)
def test_identity_tells_apart_what_changes_the_bytes(changed: dict[str, Any]) -> None:
    before, after = BuildConfig().identity(), BuildConfig(**changed).identity()
    assert [name for name in before if before[name] != after[name]] == list(changed)
    assert json.loads(json.dumps(after)) == after


def test_shard_rows_are_given_or_what_fits_into_the_bytes() -> None:
    assert BuildConfig(shard_size=7).for_items(1).shard_rows(10**9) == 7
    assert BuildConfig(shard_size="1MB").shard_rows(1000) == 1000
    assert BuildConfig(shard_size="1MB").shard_rows(1001) == 999
    assert BuildConfig(shard_size="1MB").shard_rows(10**6) == 1
    with pytest.raises(UsageError, match=r"shard-size: got 1000000B, but one image takes 1000001 bytes"):
        BuildConfig(shard_size="1MB").shard_rows(10**6 + 1)


@pytest.mark.parametrize(
    ("items", "rows"),
    [
        (1, 64),
        (1920, 64),
        (1921, 128),
        (3840, 128),
        (3841, 256),
        (7681, 512),
        (15_360, 512),
        (15_361, 1024),
        (10**9, 1024),
    ],
)
def test_auto_shards_are_the_largest_of_which_there_are_sixteen(items: int, rows: int) -> None:
    assert BuildConfig(shard_size=" AUTO ") == BuildConfig()
    config = BuildConfig().for_items(items)
    assert config.shard_size == str(rows)
    assert config.shard_rows(10**9) == rows
    assert rows == 64 or -(-items // rows) >= 16
    assert rows == 1024 or -(-items // (2 * rows)) < 16


def test_the_reject_limit_is_a_number_or_a_share_of_the_plan() -> None:
    assert BuildConfig(max_rejects=0).reject_limit(10**6) == 0
    assert BuildConfig(max_rejects=3).reject_limit(10**6) == 3
    assert BuildConfig(max_rejects="0.5%").reject_limit(10**6) == 5000
    assert BuildConfig(max_rejects="100%").reject_limit(12_345) == 12_345
    assert BuildConfig().reject_limit(50) == MIN_REJECT_LIMIT
    assert BuildConfig(max_rejects="0%").reject_limit(10**6) == MIN_REJECT_LIMIT


def test_the_reject_limit_of_a_percentage_is_exact() -> None:
    assert BuildConfig(max_rejects="0.57%").reject_limit(10_000) == 57


def test_settings_cannot_be_changed() -> None:
    config = BuildConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.dtype = "uint8"  # type: ignore[misc]
    assert config.dtype == "float32"
