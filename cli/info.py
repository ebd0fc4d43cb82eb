"""`gpu-npz info`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import click
import numpy as np

from gpu_npz.cli.console import class_sizes, print_json, print_lines, printable
from gpu_npz.cli.datasets import datasets_in, print_sides
from gpu_npz.config import BuildConfig, as_option, option_of
from gpu_npz.dataset.manifest import Manifest, so_far
from gpu_npz.dataset.space import format_bytes
from gpu_npz.errors import FormatError, IncompleteError, SourceError, UsageError
from gpu_npz.npz.load import UNNAMED, load
from gpu_npz.readers.dataset import open_index
from gpu_npz.sources.arrays.numpy_source import NumpySource
from gpu_npz.storage import open_storage
from gpu_npz.storage.base import is_remote

_ALWAYS = {"size", "resize_mode", "normalize", "dtype", "layout"}
_SHOWN_CLASSES = 8
_LAST = {"shard_table_digest", "rejects_digest"}  # manifest fields that are unknown until a build ends


@click.command("info")
@click.argument("out", metavar="OUT|FILE")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the manifest as JSON on stdout; for an unfinished build, what is known so far; for a file, its arrays.",
)
def command(out: str, as_json: bool) -> None:
    """Show the images, classes, counts and settings of the dataset in OUT, or the arrays of an .npz or .npy FILE.

    For an unfinished build, it shows what is there so far, and the exit code is 1. For a split, it shows all sides. For
    a file, it shows what a build would use as images and labels.
    """
    if out.lower().endswith((".npz", ".npy")) and not (is_remote(out) or os.path.isdir(out)):
        _show_file(out, as_json)
        return
    found: dict[str, Any] = {}
    unfinished = None
    for side, path in datasets_in(out).items():
        storage = open_storage(path)
        index: Any = None
        built = None
        try:
            manifest = Manifest.load(path)
            with contextlib.suppress(FormatError):  # `gpu-npz verify` reports a damaged index
                index = open_index(storage, manifest)
            found[side] = manifest.model_dump()
        except IncompleteError as exc:
            manifest, index, shards = so_far(storage)
            built = len(shards)
            found[side] = {**manifest.model_dump(exclude=_LAST), "built_shards": built}
            unfinished = unfinished or exc
        if not as_json:
            print_lines([f"{side}:"] * bool(side) + _lines(manifest, index, built))
    if as_json:
        print_sides(found)
    if unfinished is not None:
        raise unfinished


def _show_file(path: str, as_json: bool) -> None:
    """Prints the arrays of a file, and what a build would make of them."""
    try:
        infos = load(path).infos
    except OSError as exc:
        raise SourceError(f"{path!r}: {exc.strerror or exc}; give the OUT of a build, or an .npz or .npy") from exc
    arrays = {
        name: {
            "shape": info.shape,
            "dtype": str(info.dtype),
            "bytes": info.data_bytes,
            "stored": not info.deflated,
            "mappable": info.unmappable is None,
            "unmappable": info.unmappable,
        }
        for name, info in infos.items()
    }
    build = _build_of(path)
    if as_json:
        print_json({"file": path, "arrays": arrays, "build": build})
        return
    rows = {}
    for name, info in infos.items():
        place = "deflated" if info.deflated else "stored"
        mapped = "mappable" if info.unmappable is None else f"not mappable ({info.unmappable})"
        rows[name] = f"{info.dtype} {info.shape}, {format_bytes(info.data_bytes)}, {place}, {mapped}"
    if build["problem"] is None:
        rows["a build"] = f"{build['items']} images of {build['images']!r}, {build['label_kind']}"
        rows["a build"] += f" from {build['labels']!r}" if build["labels"] else ""
    else:
        rows["a build"] = f"would fail: {build['problem']}"
    length = max(map(len, map(printable, rows)))
    click.echo("\n".join(f"{printable(name):{length}}  {printable(text)}" for name, text in rows.items()))


def _build_of(path: str) -> dict[str, Any]:
    """What a build with default settings would take from a file: names of arrays, number of items, kind of labels."""
    try:
        source = NumpySource(path, BuildConfig(), None)
        items = sum(len(group.names) for group in source.groups())
    except (SourceError, UsageError) as exc:
        return {"images": None, "labels": None, "items": 0, "label_kind": None, "problem": str(exc)}
    names = source.class_names
    kind = f"{len(names)} classes" if names is not None else ", ".join(map(str, source.columns)) or "no labels"
    images, labels = source.array_names
    return {
        "images": images or UNNAMED, "labels": labels or None, "items": items, "label_kind": kind, "problem": None,
    }  # fmt: skip


def _lines(manifest: Manifest, index: Any, built: int | None) -> list[str]:
    """Describes a dataset for humans.

    Args:
        manifest: the dataset's manifest.
        index: the dataset's index; None if it cannot be read.
        built: the number of shards built so far; None if the build has finished.
    """
    images, counts = manifest.images, manifest.counts
    codes = ", ".join(f"{count} {code}" for code, count in counts.rejects_by_code.items())
    progress = "" if built is None else f"; {built} are built"
    size = "" if index is None else f", {format_bytes(int(index['shard_bytes'].sum()))}"
    height, width = images.shape[-2:] if images.layout == "NCHW" else images.shape[:2]
    rows = {
        "id": manifest.id,
        "images": f"{counts.rows} of {height} x {width} pixels, {images.channels}, {images.dtype}, {images.layout}",
        "shards": f"{counts.shards} of up to {manifest.shard_items} items{size}{progress}",
        "rejects": f"{counts.rejects} of {counts.items} items" + (f" ({codes})" if codes else ""),
        "label columns" if manifest.columns else "classes": _labels(manifest, index),
        "made with": "; ".join(", ".join(f"{k} {v}" for k, v in made.items()) for made in manifest.environments)
        or "nothing yet",
        "settings": _settings(manifest.settings),
    }
    if manifest.normalization is not None:
        numbers = manifest.normalization
        backwards = slice(None, None, -1 if images.channels == "bgr" else 1)  # the options are in R,G,B order
        mean, std = (as_option("mean", each[backwards]) for each in (numbers.mean, numbers.std))
        rows["normalized"] = f"--mean {mean} --std {std}"
    length = max(map(len, rows))
    return [f"{name:{length}}  {printable(value)}" for name, value in rows.items()]


def _settings(settings: Mapping[str, Any]) -> str:
    """Formats the settings that differ from their defaults, and the most important others, as options."""
    defaults = {name: field.default for name, field in BuildConfig.model_fields.items()}
    return " ".join(
        option_of(name, value)
        for name, value in settings.items()
        if value is not None
        and (name in _ALWAYS or option_of(name, value) != option_of(name, defaults.get(name)))
        and name not in ("mean", "std")
    )


def _labels(manifest: Manifest, index: Any) -> str:
    if manifest.columns:
        return ", ".join(map(str, manifest.columns))
    names = manifest.classes
    if names is None:
        return "no labels"
    shown = ", ".join(names[:_SHOWN_CLASSES]) + (", ..." if len(names) > _SHOWN_CLASSES else "")
    if index is None:
        return f"{len(names)}: {shown}"
    labels = index["labels"] if index.get("valid") is None else index["labels"][index["valid"]]
    counts = np.bincount(labels, minlength=len(names))
    return f"{len(names)}: {shown}; {class_sizes(dict(zip(names, counts.tolist(), strict=True)))}"
