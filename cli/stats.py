"""`gpu-npz stats`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from gpu_npz.cli.console import class_sizes, errors, print_lines, printable, show_warnings
from gpu_npz.cli.datasets import datasets_in, print_sides
from gpu_npz.cli.options import CONFIG_FILE, ConfigCommand, config_options
from gpu_npz.config import BuildConfig, load_toml
from gpu_npz.dataset.layout import JOB, MANIFEST, sides_of_split
from gpu_npz.errors import StorageError, UsageError
from gpu_npz.storage import open_storage

if TYPE_CHECKING:
    from gpu_npz.audit.stats import Statistics

_USED = (
    "device", "backend", "resizer", "require_gpu", "reproducible", "size", "resize_mode", "crop_pct", "pad_value",
    "interpolation", "reduced_decoding", "exif_orientation", "background", "dicom_window", "max_pixels", "channels",
    "bit_depth", "shuffle", "limit", "source", "root", "follow_links", "labels", "image_column", "per_class", "split",
    "split_by", "split_seed", "classes_from", "batch_size", "workers", "threads", "prefetch", "hw_decoder_load",
)  # fmt: skip
_NORMALIZING = ("normalize", "mean", "std", "window")
_COLUMNS = 32  # the width of a drawn histogram, in characters
_BLOCKS = " ▁▂▃▄▅▆▇█"


@click.command("stats", cls=ConfigCommand)
@click.argument("src", metavar="SRC|OUT")
@config_options(*_USED)
@CONFIG_FILE
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(src: str, config_file: str | None, as_json: bool, **given: Any) -> None:
    """Compute the mean, std, histograms and class counts of the images in SRC, or of a dataset.

    Images are decoded as a build decodes them. The statistics are exact, because they are computed from the counts of
    all levels. The last line has the options that normalize a build by them. With --split, they are those of the side
    train, unless you name another side, as in val=0.2/val.
    """
    from gpu_npz.audit.stats import of_dataset, of_source  # loads Pillow, which this command's help does not need

    show_warnings()
    values = {name: value for name, value in given.items() if value is not None}
    is_dataset = _is_dataset(src)
    if is_dataset and (values or config_file):
        raise UsageError(f"{src!r} is a dataset, whose images are as they are; leave the settings out")
    if config_file:
        values = {**load_toml(config_file), **values}
    # Normalization does not affect the statistics, and imagenet is not allowed with gray.
    values = {name: value for name, value in values.items() if name not in _NORMALIZING}
    values["normalize"] = "none"
    with Progress(console=errors(), transient=True, disable=as_json or not errors().is_terminal) as progress:
        task = progress.add_task("counting", total=None)

        def counted(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if is_dataset:
            found = {side: of_dataset(path, progress=counted) for side, path in datasets_in(src).items()}
        else:
            found = {"": of_source(src, BuildConfig(**values), progress=counted)}
    if as_json:
        print_sides({side: each.to_json() for side, each in found.items()})
    else:
        print_lines(line for each in found.values() for line in _lines(each))


def _is_dataset(src: str) -> bool:
    with contextlib.suppress(StorageError):  # if SRC cannot be opened, reading it as a source reports why
        storage = open_storage(src)
        return any(storage.size(name) is not None for name in (MANIFEST, JOB)) or bool(sides_of_split(storage))
    return False


def _lines(found: Statistics) -> list[str]:
    codes = ", ".join(f"{count} {code}" for code, count in found.rejects_by_code.items())
    side = "" if found.side is None else f" of {found.side} alone, as --split takes them"
    lines = [
        f"{printable(found.path)}: {found.images} images{side}{f'; rejects: {codes}' if codes else ''}",
        f"  {'channel':8} {'mean':>8} {'std':>8} {'min':>4} {'max':>4}  levels 0 to {len(found.histograms[0]) - 1}",
    ]
    rows = zip(found.channels, found.mean, found.std, found.min, found.max, found.histograms, strict=True)
    lines += [
        f"  {name:8} {mean:8.6f} {std:8.6f} {low:4} {high:4}  {_drawn(counts)}"
        for name, mean, std, low, high, counts in rows
    ]
    if found.class_counts:
        lines.append(f"  classes  {len(found.class_counts)}, {class_sizes(found.class_counts)}")
    if 0 in (stds := [round(std, 6) for std in found.std]):
        return [*lines, "  a channel has one level alone: there is no --std for it"]
    means = [round(mean, 6) for mean in found.mean]
    return [*lines, f"--mean {','.join(map(str, means))} --std {','.join(map(str, stds))}"]


def _drawn(counts: tuple[int, ...]) -> str:
    step = len(counts) // _COLUMNS
    columns = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    # Round up, so that a blank means that the count is zero.
    return "|" + "".join(_BLOCKS[-(-column * (len(_BLOCKS) - 1) // max(columns))] for column in columns) + "|"
