"""The settings of a build. Each has one name, one description, one check and one kind, and round-trips through JSON.

An `identity` setting affects pixels, labels or their order, so a build cannot be resumed with a different value. An
`environment` setting selects what the build runs on; it is decided once and stored with the plan. An `operational`
setting may change from one run to the next.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import UsageError

Kind = Literal["identity", "environment", "operational"]
Group = Literal["input", "pixels", "output", "speed", "run"]  # the section of the help that lists a setting
ResizeMode = Literal["stretch", "center-crop", "pad", "none"]
Resizer = Literal["auto", "pillow", "simd"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Normalization = Literal[
    "imagenet", "unit", "signed", "none", "mean-std", "dataset", "log", "window",
    "standardize", "minmax", "maxabs", "l2",
]  # fmt: skip
DType = Literal["float32", "float16", "uint8", "uint16"]
Layout = Literal["NCHW", "NHWC"]
Channels = Literal["rgb", "bgr", "gray"]
SourceKind = Literal[
    "auto", "folder", "tar", "zip", "webdataset", "imagenet", "table", "parquet", "cifar", "numpy", "dataset"
]  # fmt: skip

MAX_SIDE = 16_384
BATCH_SIZE = {"cuda": 256, "cpu": 32}  # a CPU batch should be close to the cache size, a GPU batch fill the decoders
SHARD_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AUTO_SHARD_ROWS = (1024, 512, 256, 128, 64)  # use the first that results in at least _AUTO_SHARDS shards
_AUTO_SHARDS = 16
DEFLATE_LEVEL = 1
MIN_STD = 1e-9
_MAX_TOML_BYTES = 1 << 20
TRAIN = "train"  # the side of a split that gets all remaining items
_LATER = ("scale",)  # identity settings that datasets of earlier versions do not name
MIN_REJECT_LIMIT = 10  # so that a percentage of a small plan still allows a few bad files

_RANGES = {
    "crop_pct": (1e-3, 1), "pad_value": (0, 255), "background": (0, 255), "max_pixels": (1, 2**40), "limit": (1, 2**40),
    "shuffle": (0, 2**63), "batch_size": (1, 4096), "workers": (0, 1024), "threads": (1, 1024), "prefetch": (1, 64),
    "pipelines": (1, 8), "open_shards": (1, 64), "hw_decoder_load": (0, 1), "worker_timeout": (1, 86_400),
    "per_class": (1, 2**40), "split_seed": (0, 2**63),
}  # fmt: skip


def _setting(
    kind: Kind,
    group: Group,
    default: Any,
    description: str,
    allowed: str = "",
    metavar: str = "",
    *,
    advanced: bool = False,
) -> Any:
    extra: dict[str, Any] = {
        "kind": kind, "group": group, "advanced": advanced, "allowed": allowed, "metavar": metavar,
    }  # fmt: skip
    return Field(default, description=description, json_schema_extra=extra)


_advanced = functools.partial(_setting, advanced=True)


class BuildConfig(BaseModel):
    """The settings of `gpu-npz build`. They are immutable and hashable, and `model_dump_json` is lossless.

    Raises:
        UsageError: a value or a combination of values is not allowed. The message lists every problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = _setting(
        "environment",
        "speed",
        "auto",
        "Where to decode. auto uses a GPU if one is usable, otherwise the CPU; all uses all GPUs; 0 or 0,1,2 selects "
        "GPUs.",
        "auto, cpu, all, or numbers of GPUs: 0 or 0,1,2",
        "auto|cpu|all|N,...",
    )
    backend: Literal["auto", "pillow", "dali"] = _advanced(
        "environment", "speed", "auto", "The decoder: auto is dali on a GPU and pillow on a CPU."
    )
    resizer: Resizer = _advanced(
        "environment",
        "speed",
        "auto",
        "The library that resizes on the CPU. simd is faster; with bilinear, its pixels differ from those of pillow "
        "by at most 2 levels of 255 (by more with bicubic and lanczos). auto uses simd for bilinear if it is "
        "installed and Pillow-SIMD is not.",
    )
    require_gpu: bool = _advanced(
        "environment", "speed", False, "Fail if there is no usable GPU, instead of using the CPU."
    )
    reproducible: bool = _advanced(
        "identity",
        "speed",
        False,
        "On a GPU, decode every JPEG with the CUDA decoder, so that the same input always gives the same bytes.",
    )

    size: tuple[int, int] | None = _setting(
        "identity",
        "pixels",
        None,
        "Height and width of the stored images. The default is 224; with --resize-mode none, it is the size of the "
        "first readable image.",
        f"N or HxW, each side 1 to {MAX_SIDE}",
        "N|HxW",
    )
    resize_mode: ResizeMode = _setting(
        "identity",
        "pixels",
        "stretch",
        "How images are resized to --size. stretch changes the aspect ratio; center-crop resizes the image to cover "
        "the size and crops the center; pad resizes it to fit inside and fills the border; none accepts only images "
        "that already have the size.",
    )
    crop_pct: float = _setting(
        "identity",
        "pixels",
        0.875,
        "For center-crop: --size as a fraction of the size before the crop (0.875: 224 of 256).",
        "0.001 to 1",
        "FRACTION",
    )
    pad_value: int = _advanced("identity", "pixels", 0, "For pad: the gray level of the border.", "0 to 255", "LEVEL")
    interpolation: Interpolation = _advanced(
        "identity", "pixels", "bilinear", "The resampling filter. All filters except nearest antialias."
    )
    reduced_decoding: bool = _advanced(
        "identity",
        "pixels",
        True,
        "Let Pillow decode JPEGs at half their size or less if they are at least four times as large as the resized "
        "image. This is faster, but may change pixels slightly. If off, Preprocess gives the same row for a file and "
        "for its decoded pixels.",
    )
    exif_orientation: bool = _advanced(
        "identity", "pixels", True, "Rotate images by their EXIF orientation, and TIFFs by their Orientation tag."
    )
    background: tuple[int, int, int] = _advanced(
        "identity", "pixels", (0, 0, 0), "The color behind transparent pixels.", "R,G,B, each 0 to 255", "R,G,B"
    )
    dicom_window: tuple[float, float] | None = _advanced(
        "identity", "pixels", None,
        "For DICOM: the values (after rescaling, such as HU) that become black and white in every file. By default, "
        "each file's own window is used.",
        "LO,HI with LO < HI", "LO,HI",
    )  # fmt: skip
    max_pixels: int = _advanced(
        "identity", "pixels", 89_478_485, "Reject images with more pixels than this.", "a positive number", "PIXELS"
    )
    channels: Channels = _setting("identity", "pixels", "rgb", "The channels of the stored images, in this order.")
    bit_depth: int = _advanced(
        "identity",
        "pixels",
        8,
        "Bits per channel while images are decoded and resized. Images of 16 bits are decoded on the CPU.",
        "8, 16",
        "8|16",
    )
    normalize: Normalization = _setting(
        "identity",
        "pixels",
        "imagenet",
        "How pixels are normalized. imagenet, mean-std: (pixel / 255 - mean) / std; dataset: the same, with the mean "
        "and std of SRC, which takes an additional pass over it; unit: 0 to 1; signed: -1 to 1; log: log(1 + level), "
        "scaled to 0 to 1; window: see --window. standardize (mean 0, standard deviation 1), minmax (0 to 1), maxabs "
        "and l2 use the statistics of each image over all of its channels.",
    )
    mean: tuple[float, ...] | None = _setting(
        "identity",
        "pixels",
        None,
        "For mean-std: the mean of R,G,B (or gray), of pixels scaled to 0 to 1.",
        "as many numbers as channels, in the order R,G,B",
        "R,G,B",
    )
    std: tuple[float, ...] | None = _setting(
        "identity",
        "pixels",
        None,
        "For mean-std: the standard deviation of R,G,B (or gray), of pixels scaled to 0 to 1.",
        "as many positive numbers as channels, in the order R,G,B",
        "R,G,B",
    )
    window: tuple[float, float] | None = _advanced(
        "identity", "pixels", None,
        "For --normalize window: the levels (0 to 255, or to 65535 with 16 bits) that become 0 and 1. Values outside "
        "are clipped.",
        "LO,HI with LO < HI, and levels between them", "LO,HI",
    )  # fmt: skip
    dtype: DType = _setting(
        "identity",
        "pixels",
        "float32",
        "The type of the stored values. uint8 (or uint16, with --bit-depth 16) stores pixels, in a quarter (or half) "
        "of the space of float32, and the readers normalize them.",
    )
    clip: bool = _advanced(
        "identity",
        "pixels",
        False,
        "Clip values that are too large for float16, instead of refusing them.",
    )
    layout: Layout = _setting(
        "identity", "pixels", "NCHW", "The order of the axes: batch (N), channels (C), height (H) and width (W)."
    )

    labels: str | None = _setting(
        "identity",
        "input",
        None,
        "Where the labels are. For a folder or an archive: class-dir (the default: the top-level folder is the "
        "class), a table FILE, or csv:NAME (a table of this name in every folder). For a table or Parquet: columns "
        "A,B, each with an optional kind (A:class, A:integer, A:float); also after a table (FILE:A,B). For a "
        "WebDataset: cls (the default), txt or json:FIELD. For CIFAR-100: coarse. For arrays: the name of an array, "
        "or an .npy FILE. none: no labels.",
        "class-dir, none, a table's path, csv:NAME, columns, cls, txt, json:FIELD, coarse, an array or FILE.npy",
        "WHERE",
    )
    image_column: str | None = _advanced(
        "identity",
        "input",
        None,
        "The column with the paths (of a table) or the images (of a Parquet file). By default, it is found by its "
        "name.",
        "the name of a column",
        "COLUMN",
    )
    scale: Literal["none", "255", "signed"] = _setting(
        "identity",
        "input",
        "none",
        "For arrays of floats: 255 if the values are 0 to 1, signed if they are -1 to 1; they are rounded to levels of "
        "0 to 255.",
    )
    per_class: int | None = _setting(
        "identity",
        "input",
        None,
        "Use only the first N items of each class, after --shuffle.",
        "a positive number",
        "N",
    )
    split: str | None = _setting(
        "identity",
        "input",
        None,
        "Split the items: val=0.1 puts 10% of them into OUT/val and the others into OUT/train; val=0.1,test=0.1 makes "
        "train, val and test; val=0.1/val builds only val, directly in OUT.",
        "NAME=SHARE[,NAME=SHARE...], shares such as 0.1 that sum up to less than 1, /NAME behind it for one side alone",
        "NAME=SHARE",
    )
    split_by: str | None = _advanced(
        "identity",
        "input",
        None,
        "How --split chooses items: label (the default) gives each side the same share of each class, random ignores "
        "the classes; folder, or the name of a table's column, keeps items with the same value on one side.",
        "label, random, folder, or the name of a table's column",
        "HOW",
    )
    split_seed: int = _advanced("identity", "input", 0, "The seed of --split.", "0 or a positive number", "SEED")

    shard_size: str = _setting(
        "identity",
        "output",
        "auto",
        "Rows per shard, or bytes per shard with a unit. auto is 1024 rows; for fewer than 16,384 items it is 512, "
        "256, 128 or 64, so that there are at least 16 shards to keep all cores busy.",
        "auto, rows (1024) or bytes with a unit (512MB; B, kB, MB, GB, KiB, MiB, GiB)",
        "auto|ROWS|BYTES",
    )
    compress: str = _setting(
        "identity",
        "output",
        "none",
        "Compress the stored images with deflate, by ISA-L at a level of 0 to 3 (default 1). A single row can still "
        "be read alone.",
        "none, deflate, or deflate:LEVEL with a level of 0 to 3",
        "none|deflate[:LEVEL]",
    )
    shuffle: int | None = _setting(
        "identity",
        "input",
        None,
        "Shuffle the items with this seed. By default, they keep the order of SRC.",
        "0 or a positive number",
        "SEED",
    )
    limit: int | None = _setting(
        "identity", "input", None, "Use only the first N items, after --shuffle.", "a positive number", "N"
    )
    on_reject: Literal["skip", "blank", "fail"] = _setting(
        "identity",
        "output",
        "skip",
        "What to do with an image that cannot be decoded: skip it, store a blank row of zeros, or stop the build.",
    )

    classes_from: str | None = _advanced(
        "operational", "input", None,
        "Number the classes as in a finished dataset, or as in a text file with one class name per line.",
        "a finished dataset, or a text file",
        "OUT|FILE",
    )  # fmt: skip
    source: SourceKind = _setting(
        "operational", "input", "auto", "The kind of SRC. auto detects it by name and content."
    )
    splits: Literal["none", "all"] = _setting(
        "operational", "input", "none",
        "With all, the build writes OUT/train, OUT/val and OUT/test from the arrays of an .npz whose names contain "
        "these words, as in those of Keras and MedMNIST.",
    )  # fmt: skip
    root: str | None = _advanced(
        "operational", "input", None,
        "The folder to which the paths in a table are relative (default: the folder of the table). For a folder, tar "
        "or zip: use only the images under this folder of it.",
        "a folder",
        "DIR",
    )  # fmt: skip
    follow_links: bool | None = _advanced(
        "operational", "input", None,
        "Follow symbolic links that lead out of SRC. By default, links in a folder are followed, and links that a "
        "table names are refused.",
    )  # fmt: skip
    max_rejects: str = _setting(
        "operational",
        "output",
        "1%",
        f"Exit with code 3 if more items are rejected. A percentage always allows up to {MIN_REJECT_LIMIT} rejects, "
        "but never all items unless it is 100%.",
        "a number of items (50) or a percentage of the plan (0.5%)",
        "N|P%",
    )
    batch_size: int | None = _setting(
        "operational",
        "speed",
        None,
        f"How many images are decoded together. The default is {BATCH_SIZE['cuda']} on a GPU and {BATCH_SIZE['cpu']} "
        "on a CPU; fewer if the rows are large (8 of 3 x 224 x 224 in float32 on a CPU).",
        "1 to 4096",
        "N",
    )
    workers: int | None = _setting(
        "operational",
        "speed",
        None,
        "How many worker processes run. The default is one per GPU, or one per usable core on a CPU. 0 builds in the "
        "main process.",
        "0 to 1024",
        "N",
    )
    threads: int | None = _advanced(
        "operational",
        "speed",
        None,
        "How many threads DALI uses in each worker. The default is the number of usable cores, minus two on a GPU.",
        "1 to 1024",
        "N",
    )
    prefetch: int | None = _advanced(
        "operational",
        "speed",
        None,
        "How many batches are in each DALI pipeline at the same time. The default is 3 on a GPU and 2 on a CPU.",
        "1 to 64",
        "N",
    )
    pipelines: int | None = _advanced(
        "operational",
        "speed",
        None,
        "How many DALI pipelines decode in turn in each worker. The default is 2 on a GPU and 1 on a CPU.",
        "1 to 8",
        "N",
    )
    open_shards: int | None = _advanced(
        "operational",
        "speed",
        None,
        "How many shards each worker writes at the same time. The default is 4 on a GPU and 1 on a CPU.",
        "1 to 64",
        "N",
    )
    hw_decoder_load: float | None = _advanced(
        "operational",
        "speed",
        None,
        "The share of JPEGs that a GPU's hardware JPEG engines decode. The default is DALI's own, but 0 on Hopper and "
        "newer GPUs, where these engines have a known bug that may give wrong pixels.",
        "0 to 1",
        "SHARE",
    )
    spot_check: bool = _advanced(
        "operational",
        "speed",
        True,
        "Decode a sample of the images that a GPU decodes (the first 16 of each worker, then 1 in 1,000) with Pillow "
        "too, and stop the build if the GPU decodes an image differently in a batch and alone.",
    )
    worker_timeout: int = _advanced(
        "operational",
        "run",
        300,
        "Stop and replace a worker that does not respond for this many seconds. Its shards are built again.",
        "1 to 86400",
        "SECONDS",
    )
    engine: Literal["local", "ray"] = _setting(
        "operational", "run", "local", "Where the workers run: on this machine, or on a Ray cluster."
    )
    ray_address: str | None = _advanced(
        "operational", "run", None,
        "For --engine ray: the address of the cluster. By default, a cluster that runs on this machine is used, or a "
        "new one is started.",
        "an address that ray.init takes",
        "ADDRESS",
    )  # fmt: skip
    part: str | None = _setting(
        "operational",
        "run",
        None,
        "Build part I of N (I from 1 to N), as one of N jobs. auto takes both numbers from the "
        "cluster's scheduler; auto/N is for schedulers that do not give the number of jobs (Kubernetes, PBS).",
        "i/n with i from 1 to n, auto or auto/n",
        "I/N|auto[/N]",
    )
    page_cache: Literal["auto", "keep", "drop"] = _advanced(
        "operational",
        "output",
        "auto",
        "Whether written shards stay in the page cache or are dropped from it once they are on the disk (needs Linux "
        "6.14). auto drops them if the dataset is larger than half of the available memory.",
    )
    preflight: bool = _advanced(
        "operational",
        "output",
        True,
        "Refuse to start a build whose output does not fit on the disk of OUT, or "
        "whose arrays in an .npz do not match their CRC-32.",
    )
    overwrite: bool = _setting("operational", "output", False, "Delete the dataset in OUT and build it again.")
    accept_environment: bool = _advanced(
        "operational", "run", False, "Resume although the decoder, its version or the GPU model is different now."
    )

    def __init__(self, /, **values: Any) -> None:
        values = _filled(values)
        faults: dict[str, str] = {}
        try:
            super().__init__(**values)
        except ValidationError as exc:
            faults = _field_faults(exc)
            valid = {name: value for name, value in values.items() if name not in faults}
            super().__init__(**valid)  # so that the rules can be checked for the other settings
        broken = [rule for rule in _RULES if faults.keys().isdisjoint(rule.settings.split()) and rule.is_broken(self)]
        if faults or broken:
            raise UsageError("\n".join([*faults.values(), *(rule.message(self) for rule in broken)]))

    @field_validator("size", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        return _require(sides := parse_size(value), sides)

    @field_validator("*", mode="before")
    @classmethod
    def _parse_choice(cls, value: Any, info: Any) -> Any:
        """Accepts a choice in any case and with `_` for `-`, as other tools spell it: nhwc, center_crop."""
        choices = get_args(cls.model_fields[info.field_name].annotation)
        value = str(value) if type(value) is int and str(value) in choices else value
        if not isinstance(value, str) or not all(isinstance(choice, str) for choice in choices):
            return value
        spelled = value.strip().lower().replace("_", "-")
        return next((choice for choice in choices if choice.lower() == spelled), value)

    @field_validator("device", mode="before")
    @classmethod
    def _parse_device(cls, value: Any) -> str:
        text = re.sub(r"(cuda|gpu):(?=\d)", "", str(value).strip().lower())
        if text in ("auto", "cpu", "all"):
            return text
        if text in ("cuda", "gpu"):
            return "0"
        numbers = re.findall(r"\d{1,4}", text) if re.fullmatch(r"\d{1,4}(\s*,\s*\d{1,4})*", text, re.ASCII) else []
        _require(numbers and len({*map(int, numbers)}) == len(numbers), text)
        return ",".join(str(int(number)) for number in numbers)

    @field_validator("background", "mean", "std", "window", "dicom_window", mode="before")
    @classmethod
    def _split_numbers(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        inner = re.fullmatch(r"\s*[\[(](.*)[\])]\s*", value)  # the notation of Python and JSON
        return [part.strip() for part in (inner[1] if inner else value).split(",")]

    @field_validator("shard_size", mode="before")
    @classmethod
    def _parse_shard_size(cls, value: Any) -> str:
        if str(value).strip().lower() == "auto":
            return "auto"
        rows = re.fullmatch(r"\d{1,15}", str(value).strip(), re.ASCII)
        size = int(rows[0]) if rows else parse_bytes(str(value))
        _require(size, value)
        return str(size) if rows else f"{size}B"

    @field_validator("compress", mode="before")
    @classmethod
    def _parse_compress(cls, value: Any) -> str:
        match = re.fullmatch(r"none|deflate(?::([0-3]))?", str(value).strip().lower())
        _require(match, value)
        assert match
        return "none" if match[0] == "none" else f"deflate:{match[1] or DEFLATE_LEVEL}"

    @field_validator("split", mode="before")
    @classmethod
    def _parse_split(cls, value: Any) -> str:
        shares, _, side = str(value).strip().partition("/")
        found: dict[str, Decimal] = {}
        for each in shares.split(","):
            match = re.fullmatch(r"\s*([A-Za-z0-9][\w-]{0,63})\s*=\s*(0?\.\d{1,9})\s*", each, re.ASCII)
            _require(match and match[1] not in found and match[1] != TRAIN, value)
            assert match
            found[match[1]] = Decimal(match[2])
        _require(all(found.values()) and sum(found.values()) < 1 and side in ("", TRAIN, *found), value)
        text = ",".join(f"{name}={share.normalize():f}" for name, share in found.items())
        return f"{text}/{side}" if side else text

    @field_validator("part", mode="before")
    @classmethod
    def _parse_part(cls, value: Any) -> str | None:
        text = str(value).strip().lower()
        match = re.fullmatch(r"(auto|\d{1,6})/(\d{1,6})", text, re.ASCII)
        if text == "auto" or match is None:
            return str(_require(text == "auto", value) and text)
        number, count = match[1], int(match[2])
        _require(count > 0 if number == "auto" else 1 <= int(number) <= count, value)
        return f"{number if number == 'auto' else int(number)}/{count}"

    @field_validator("max_rejects", mode="before")
    @classmethod
    def _parse_max_rejects(cls, value: Any) -> str:
        match = re.fullmatch(r"(\d{1,15})|(\d{1,3}(?:\.\d{1,6})?)\s*%", str(value).strip())
        _require(match and (match[1] or float(match[2]) <= 100), value)
        assert match
        return str(int(match[1])) if match[1] else f"{Decimal(match[2]).normalize():f}%"

    @field_validator("bit_depth")
    @classmethod
    def _check_bit_depth(cls, value: int) -> Any:
        return _require(value in (8, 16), value)

    @field_validator(*_RANGES)
    @classmethod
    def _check_range(cls, value: Any, info: Any) -> Any:
        low, high = _RANGES[info.field_name]
        numbers = value if isinstance(value, tuple) else (value,)
        return _require(all(number is None or low <= number <= high for number in numbers), value)

    @property
    def channel_count(self) -> int:
        """The number of channels of a stored image, 1 or 3."""
        return 1 if self.channels == "gray" else 3

    @property
    def reduces_jpegs(self) -> bool:
        """Whether Pillow decodes JPEGs that are much larger than `size` at half the scale or less.

        This is possible only with resampling filters that would average those pixels anyway.
        """
        return self.reduced_decoding and self.interpolation != "nearest" and self.resize_mode != "none"

    @property
    def shares(self) -> dict[str, Fraction]:
        """The share of each side of a split except train, by the side's name; empty without a split."""
        parts = (self.split or "").partition("/")[0].split(",")
        return {name: Fraction(share) for name, _, share in (part.partition("=") for part in parts) if name}

    @property
    def side(self) -> str | None:
        """The side of a split, if only one is to be built; None for all sides, or without a split."""
        return (self.split or "").partition("/")[2] or None

    @property
    def sides(self) -> dict[str, BuildConfig]:
        """The settings of each dataset of a split, by side; empty if the build makes a single dataset."""
        if self.split is None or self.side is not None:
            return {}
        return {side: self.model_copy(update={"split": f"{self.split}/{side}"}) for side in (TRAIN, *self.shares)}

    @property
    def several(self) -> bool:
        """Whether the build makes a dataset for each side of a split, its own or one that SRC has."""
        return bool(self.sides) or self.splits != "none"

    @property
    def max_level(self) -> int:
        """The highest level of a pixel, which means white: 255 or 65535."""
        return 255 if self.bit_depth == 8 else 65_535

    @property
    def pixel_dtype(self) -> Literal["uint8", "uint16"]:
        """The dtype of pixels before normalization, and of stored images if the reader normalizes them."""
        return "uint8" if self.bit_depth == 8 else "uint16"

    @property
    def deflate_level(self) -> int | None:
        """ISA-L's compression level for stored images; None if they are not compressed."""
        return None if self.compress == "none" else int(self.compress.partition(":")[2])

    def identity(self) -> dict[str, Any]:
        """Returns the settings that determine the output's bytes, as JSON values by name."""
        return self.model_dump(mode="json", include=set(settings_of("identity")))

    def stored_identity(self) -> dict[str, Any]:
        """Returns `identity` as datasets store it: without later settings that have their default.

        So a build has the id, and thus the bytes, that it had before there were such settings.
        """
        defaults = {name: BuildConfig.model_fields[name].default for name in _LATER}
        return {name: value for name, value in self.identity().items() if (name, value) not in defaults.items()}

    def for_items(self, items: int) -> BuildConfig:
        """Returns the settings for a plan of `items` items, with a `shard_size` of auto replaced by a number of rows.

        The number depends only on `items`, so that every machine builds the same shards.
        """
        if self.shard_size != "auto":
            return self
        enough = (rows for rows in _AUTO_SHARD_ROWS if items > rows * (_AUTO_SHARDS - 1))
        return self.model_copy(update={"shard_size": str(next(enough, _AUTO_SHARD_ROWS[-1]))})

    def shard_rows(self, row_bytes: int) -> int:
        """Returns the number of rows in a shard. A `shard_size` of auto must be replaced first, with `for_items`.

        Args:
            row_bytes: the size of a stored image, in bytes.

        Raises:
            UsageError: a shard is too small for a single row.
        """
        if not self.shard_size.endswith("B"):
            return int(self.shard_size)
        rows = int(self.shard_size[:-1]) // row_bytes
        if rows < 1:
            raise UsageError(
                f"shard-size: got {self.shard_size}, but one image takes {row_bytes} bytes; give at least that much"
            )
        return rows

    def reject_limit(self, items: int) -> int:
        """Returns the maximum number of rejects allowed in a plan of `items` items."""
        if not self.max_rejects.endswith("%"):
            return int(self.max_rejects)
        share = Fraction(self.max_rejects[:-1]) / 100
        # A percentage below 100% never allows all items to be rejected, even if there are only a few.
        return max(min(MIN_REJECT_LIMIT, items - 1), int(items * share))


def gpu_numbers(device: str) -> tuple[int, ...]:
    """Returns the GPU numbers in a `device` setting; empty for `auto`, `cpu` and `all`."""
    return () if device in ("auto", "cpu", "all") else tuple(map(int, device.split(",")))


def settings_of(kind: Kind) -> list[str]:
    """Returns the names of the settings of one kind, in declaration order."""
    return [name for name in BuildConfig.model_fields if _extra(name)["kind"] == kind]


def group_of(name: str) -> tuple[Group, bool]:
    """Returns the group in which the help lists a setting, and whether the setting is advanced."""
    return _extra(name)["group"], _extra(name)["advanced"]


def as_option(name: str, value: Any) -> str:
    """Formats a setting's value, which must not be None, for its option: `0.485,0.456,0.406`, `224x224`, `true`."""
    if isinstance(value, (tuple, list)):
        return ("x" if name == "size" else ",").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def option_of(name: str, value: Any) -> str:
    """A setting, other than None, as an option of the command line: `--size 224x224`, `--clip`, `--no-preflight`."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {as_option(name, value)}"


def parse_bytes(text: str) -> int:
    """The bytes in a size such as 512MB, 500M, 2GiB or 4096; units are those of SHARD_UNITS, in either case.

    Raises:
        ValueError: the text is not a size.
    """
    match = re.fullmatch(r"(\d{1,15})\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    units = {unit.lower(): size for unit, size in SHARD_UNITS.items()}
    units |= {unit.removesuffix("b"): size for unit, size in units.items()}  # 500M means 500MB
    _require(match and match[2].lower() in units, text)
    assert match
    return int(match[1]) * units[match[2].lower()]


def load_toml(path: str | Path) -> dict[str, Any]:
    """Reads settings from a TOML file. The keys are the names of the options (`resize-mode = "pad"`).

    Raises:
        UsageError: the file cannot be read or is not TOML.
    """
    import tomllib  # few builds need it, and otherwise every worker would import it

    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TOML_BYTES + 1)
        if len(content) > _MAX_TOML_BYTES:
            raise ValueError(f"more than {_MAX_TOML_BYTES} bytes")
        values = tomllib.loads(content.decode("utf-8"))
    except OSError as exc:
        raise UsageError(f"--config {path}: {exc.strerror or exc}; give a readable TOML file") from exc
    except (ValueError, RecursionError) as exc:  # includes TOMLDecodeError and UnicodeDecodeError
        raise UsageError(f"--config {path}: not TOML ({exc}); write lines such as: size = 224") from exc
    return {name.replace("-", "_"): value for name, value in values.items()}


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the settings that follow from the given ones, and drops those that are None, except mean and std."""
    filled = dict(values)
    if filled.get("size") is None and filled.get("resize_mode", "stretch") != "none":
        filled["size"] = 224
    if filled.get("normalize") is None and (filled.get("mean") is not None or filled.get("std") is not None):
        filled["normalize"] = "mean-std"
    if filled.get("normalize") is None and filled.get("window") is not None:
        filled["normalize"] = "window"
    return {name: value for name, value in filled.items() if value is not None or name in ("mean", "std")}


def _extra(name: str) -> dict[str, Any]:
    extra: Any = BuildConfig.model_fields[name].json_schema_extra
    return dict(extra)


def _allowed(name: str) -> str:
    choices = get_args(BuildConfig.model_fields[name].annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(choices)
    return str(_extra(name)["allowed"]) or "true, false"


def parse_size(value: Any) -> tuple[int, int] | None:
    """Height and width of N, (H, W), "N" or "HxW"; None if that is not allowed."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    elif isinstance(value, str):
        match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", value.strip())
        value = match and (int(match[1]), int(match[2] or match[1]))
    sides_fit = isinstance(value, (tuple, list)) and len(value) == 2
    return tuple(value) if sides_fit and all(type(side) is int and 1 <= side <= MAX_SIDE for side in value) else None


def _require(condition: Any, value: Any) -> Any:
    if not condition:
        raise ValueError("not allowed")
    return value


def _field_faults(error: ValidationError) -> dict[str, str]:
    """Returns a message for each setting whose value is not allowed by itself, by the setting's name."""
    faults: dict[str, str] = {}
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if name in faults:  # one message is enough, even if every element of a list is wrong
            continue
        if name in BuildConfig.model_fields:
            faults[name] = f"{name.replace('_', '-')}: got {fault['input']!r}; allowed: {_allowed(name)}"
        elif fault["type"] == "extra_forbidden":
            import difflib

            near = difflib.get_close_matches(name, BuildConfig.model_fields, n=1)
            hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else "`gpu-npz build --help` lists them"
            faults[name] = f"unknown setting {name!r}; {hint}"
        else:
            faults[name] = fault["msg"].removeprefix("Value error, ")
    return faults


class _Rule(NamedTuple):
    """A rule that forbids a combination of settings.

    Attributes:
        settings: the names of the settings that the rule depends on, separated by spaces.
        is_broken: whether a configuration breaks the rule.
        message: returns the error message for a configuration.
    """

    settings: str
    is_broken: Callable[[BuildConfig], bool]
    message: Callable[[BuildConfig], str]


def _statistics_rules(name: Literal["mean", "std"]) -> tuple[_Rule, _Rule]:
    def numbers(config: BuildConfig) -> tuple[float, ...]:
        return (config.mean if name == "mean" else config.std) or ()

    return (
        _Rule(
            f"{name} channels",
            lambda config: getattr(config, name) is not None and len(numbers(config)) != config.channel_count,
            lambda config: (
                f"--{name} has {len(numbers(config))} numbers; "
                f"--channels {config.channels} needs {config.channel_count}"
            ),
        ),
        _Rule(
            name,
            lambda config: not all(abs(each) < 1e9 and (name == "mean" or each > MIN_STD) for each in numbers(config)),
            lambda config: f"--{name}: got {numbers(config)}; allowed: {_allowed(name)}",
        ),
    )


def _is_window(low: float, high: float) -> bool:
    return -1e9 < low < high < 1e9


def _shown(window: tuple[float, float] | None) -> str:
    return ",".join(f"{bound:g}" for bound in window or ())


_RULES = (
    _Rule(
        "size max_pixels",
        lambda config: config.size is not None and math.prod(config.size) > config.max_pixels,
        lambda config: f"size {as_option('size', config.size)} has more pixels than --max-pixels {config.max_pixels}",
    ),
    _Rule(
        "normalize mean std",
        lambda config: config.normalize == "mean-std" and None in (config.mean, config.std),
        lambda _: "normalize mean-std needs both --mean and --std",
    ),
    _Rule(
        "normalize mean std",
        lambda config: config.normalize == "dataset" and (config.mean is None) != (config.std is None),
        lambda _: "normalize dataset measures both --mean and --std; omit them",
    ),
    _Rule(
        "normalize mean std",
        lambda config: (
            config.normalize not in ("mean-std", "dataset") and (config.mean is not None or config.std is not None)
        ),
        lambda config: f"--mean and --std require --normalize mean-std; got {config.normalize}",
    ),
    *_statistics_rules("mean"),
    *_statistics_rules("std"),
    _Rule(
        "normalize window",
        lambda config: (config.normalize == "window") != (config.window is not None),
        lambda _: "--normalize window and --window LO,HI require each other; give both, or neither",
    ),
    _Rule(
        "window bit_depth",
        lambda config: (
            config.window is not None
            and not (_is_window(*config.window) and config.window[0] < config.max_level and config.window[1] > 0)
        ),
        lambda config: f"--window: got {_shown(config.window)}; allowed: {_allowed('window')}",
    ),
    _Rule(
        "dicom_window",
        lambda config: config.dicom_window is not None and not _is_window(*config.dicom_window),
        lambda config: f"--dicom-window: got {_shown(config.dicom_window)}; allowed: {_allowed('dicom_window')}",
    ),
    _Rule(
        "normalize channels",
        lambda config: config.normalize == "imagenet" and config.channel_count != 3,
        lambda _: (
            "normalize imagenet has statistics for three channels; with --channels gray choose another "
            "one, such as unit, or give --mean and --std with one number each"
        ),
    ),
    _Rule(
        "dtype bit_depth",
        lambda config: config.dtype.startswith("u") and config.dtype != config.pixel_dtype,
        lambda config: (
            f"--dtype {config.dtype} is not for pixels of --bit-depth {config.bit_depth}; choose {config.pixel_dtype} "
            "or a float type, or the other --bit-depth"
        ),
    ),
    _Rule(
        "bit_depth backend require_gpu device",
        lambda config: (
            config.bit_depth == 16
            and (config.backend == "dali" or config.require_gpu or config.device not in ("auto", "cpu"))
        ),
        lambda config: (
            f"--bit-depth 16 decodes with Pillow on the CPU; got --backend {config.backend}, --device {config.device}"
            f"{', --require-gpu' if config.require_gpu else ''}; omit them, or choose --bit-depth 8"
        ),
    ),
    _Rule(
        "resizer interpolation bit_depth",
        lambda config: config.resizer == "simd" and (config.interpolation == "nearest" or config.bit_depth == 16),
        lambda config: (
            f"--resizer simd does not resize by {config.interpolation} with --bit-depth {config.bit_depth}; choose "
            "--resizer pillow"
        ),
    ),
    _Rule(
        "device backend",
        lambda config: config.device not in ("auto", "cpu") and config.backend == "pillow",
        lambda config: f"--backend pillow cannot use GPU {config.device}; choose --backend dali or --device cpu",
    ),
    _Rule(
        "reproducible hw_decoder_load",
        lambda config: config.reproducible and bool(config.hw_decoder_load),
        lambda config: (
            f"--reproducible leaves nothing to the hardware JPEG engines; --hw-decoder-load {config.hw_decoder_load} "
            "contradicts it; omit one of them"
        ),
    ),
    _Rule(
        "split split_by split_seed",
        lambda config: config.split is None and (config.split_by is not None or config.split_seed != 0),
        lambda _: "--split-by and --split-seed require --split; add it, or omit them",
    ),
    _Rule(
        "split splits",
        lambda config: config.split is not None and config.splits != "none",
        lambda config: (
            f"--split {config.split} divides SRC, and --splits {config.splits} takes the sides that it has; omit "
            "one of them"
        ),
    ),
    _Rule(
        "ray_address engine",
        lambda config: config.ray_address is not None and config.engine != "ray",
        lambda _: "--ray-address requires --engine ray; add it, or omit the address",
    ),
    _Rule(
        "engine workers",
        lambda config: config.engine == "ray" and config.workers == 0,
        lambda _: "--workers 0 builds in this process; with --engine ray give 1 or more, or omit it",
    ),
    _Rule(
        "engine device",
        lambda config: config.engine == "ray" and gpu_numbers(config.device) not in ((), (0,)),
        lambda config: (
            f"--engine ray gives each worker a GPU of its own; --device {config.device} does not fit it: give all"
        ),
    ),
    _Rule(
        "device require_gpu",
        lambda config: config.device == "cpu" and config.require_gpu,
        lambda _: "--require-gpu and --device cpu contradict each other; omit one of them",
    ),
)
