"""`gpu-npz bench`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_npz.cli.options import config_options, read_config
from gpu_npz.errors import UsageError

if TYPE_CHECKING:
    from gpu_npz.bench.loading import LoadingMeasurement
    from gpu_npz.bench.rates import Measurement
    from gpu_npz.bench.storage import StorageMeasurement
    from gpu_npz.bench.sweep import Sweep
    from gpu_npz.bench.worker import WorkerCost
    from gpu_npz.readers.augment import Augment

# Float32 rates vary while the kernel merges pages into huge pages and splits them. NumPy reads this variable on import.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")

_USED = ("device", "backend", "resizer", "require_gpu", "reproducible", "size", "resize_mode", "interpolation",
         "channels", "normalize", "dtype", "layout", "shard_size", "batch_size", "threads", "prefetch", "pipelines",
         "open_shards", "hw_decoder_load")  # fmt: skip
_STORED = ("size", "resize_mode", "dtype", "layout", "shard_size")


Command = Callable[..., None]


def _rounds(default: int) -> Callable[[Command], Command]:
    text = "How many rounds. All candidates run in each round."
    return click.option("--rounds", default=default, show_default=True, type=click.IntRange(1), metavar="N", help=text)


_FOLDER = click.option("--folder", metavar="DIR", help="Where to write. The default is the system's temporary folder.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the measurement as JSON on stdout.")


@click.group("bench")
def command() -> None:
    """Measure speed on this machine. Compare figures within one run only, as ratios."""


@command.command("pipeline")
@click.argument("src", metavar="[SRC]", required=False)
@click.option(
    "--sweep", "sweeping", is_flag=True, help="Instead, search for the options that make builds fastest here."
)
@click.option(
    "--images",
    type=click.IntRange(1),
    metavar="N",
    help="How many images each line uses. The default is 100,000 on a GPU and 2,000 on a CPU.",
)
@_rounds(5)
@click.option("--seconds", default=120.0, show_default=True, type=float, help="Roughly how long a sweep takes.")
@_FOLDER
@config_options(*_USED)
@_JSON
def pipeline(
    src: str | None,
    sweeping: bool,
    images: int | None,
    rounds: int,
    seconds: float,
    folder: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure each stage of a build, and whole builds.

    The last lines compare the shard writer with NumPy's. Every line includes the stages of the lines above it, so the
    first line that is much slower shows the bottleneck. Rates count from the first batch to the last. SRC is a folder,
    as for build; without it, pictures are generated.
    """
    from gpu_npz.bench.pictures import make_images
    from gpu_npz.bench.pipeline import measure
    from gpu_npz.bench.sweep import sweep
    from gpu_npz.cli.console import errors, print_json

    config = read_config(None, given)
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors().status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(make_images(Path(place) / "pictures").folder)
        result: Measurement | Sweep
        if sweeping:
            result = sweep(src, config, seconds=seconds, folder=folder, say=status.update)
            lines = _sweep_lines(result)
        else:
            result = measure(src, config, images=images, rounds=rounds, folder=folder, say=status.update)
            lines = _lines(result)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(lines))


@command.command("worker")
@click.option(
    "--images", default=20_480, show_default=True, type=click.IntRange(1), metavar="N", help="How many images."
)
@_rounds(5)
@click.option("--folder", metavar="DIR", help="Where to write. The default is in memory (/dev/shm), where that exists.")
@config_options("device", "batch_size", "threads", "prefetch", "pipelines", "open_shards", "hw_decoder_load")
@_JSON
def worker(images: int, rounds: int, folder: str | None, as_json: bool, **given: Any) -> None:
    """Measure the time per image in a worker's main thread, by stage.

    DALI's decoding is not included. The images are tiny and in memory. The time limits how many images a worker can
    process, however fast its decoder is: 10 us per image are 100,000 images/s.
    """
    from gpu_npz.bench.worker import measure
    from gpu_npz.cli.console import errors, print_json

    config = read_config(None, given)
    with errors().status("") as status:
        result = measure(config, images=images, rounds=rounds, folder=folder, say=status.update)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_worker_lines(result)))


@command.command("sources")
@click.argument("src", metavar="[SRC]", required=False)
@click.option("--images", default=1000, show_default=True, type=click.IntRange(1), metavar="N", help="How many images.")
@_rounds(5)
@_FOLDER
@config_options("device", "backend", "size", "dtype")
@_JSON
def sources(src: str | None, images: int, rounds: int, folder: str | None, as_json: bool, **given: Any) -> None:
    """Compare folders, archives, tables and Parquet as SRC.

    The archives are tar, zip and WebDataset, and the table is a CSV file. The figures are items per second: listed,
    read with a decoder that does nothing, and built on one core. SRC is a folder, as for build; without it, pictures
    are generated.
    """
    from gpu_npz.bench.pictures import make_images
    from gpu_npz.bench.sources import measure
    from gpu_npz.cli.console import errors, print_json

    config = read_config(None, given)
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors().status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(make_images(Path(place) / "pictures").folder)
        result = measure(src, config, images=images, rounds=rounds, folder=folder, say=status.update)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_lines(result)))


@command.command("writers")
@click.argument("src", metavar="[SRC]", required=False)
@click.option(
    "--peers",
    metavar="PYTHON",
    help="The Python of the environment in which the others are installed. The default is this one.",
)
@click.option("--images", default=2000, show_default=True, type=click.IntRange(1), metavar="N", help="How many images.")
@_rounds(5)
@_FOLDER
@config_options("resizer", "size", "shard_size", "batch_size")
@_JSON
def writers(
    src: str | None,
    peers: str | None,
    images: int,
    rounds: int,
    folder: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare builds with LitData, MosaicML and a numpy.savez script.

    All use all cores. The figures are images per second, from the first row to the last one on the disk. `begins in` is
    the time from the start of a process to its first row. The others resize with Pillow. SRC is a folder of images that
    can all be decoded; without it, pictures are generated.
    """
    from gpu_npz.bench.pictures import make_images
    from gpu_npz.bench.writers import measure
    from gpu_npz.cli.console import errors, print_json

    config = read_config(None, given)
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors().status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(make_images(Path(place) / "pictures", count=min(images, 300), broken=False).folder)
        python = {} if peers is None else {"python": peers}
        result = measure(src, config, images=images, rounds=rounds, folder=folder, say=status.update, **python)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_lines(result)))


@command.command("storage")
@click.argument("src", metavar="[SRC]", required=False)
@click.option("--cifar", metavar="DIR", help="Use CIFAR-10 or CIFAR-100, unpacked from its Python archive, at 32 x 32.")
@click.option(
    "--images",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="How many images. Files are used several times if there are fewer.",
)
@_rounds(3)
@_FOLDER
@click.option("--plot", metavar="FILE.png", help="Draw the rates on linear and logarithmic axes.")
@config_options(*_STORED)
@_JSON
def storage(
    src: str | None,
    cifar: str | None,
    images: int,
    rounds: int,
    folder: str | None,
    plot: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare shards with PNG, LMDB, HDF5, .npy and NumPy's NPZ files.

    The figures are for writing, for reading one image or all images, and for the size. All formats store the same
    images, bit for bit. Writes include the flush to the disk; reads come from the page cache. SRC is a folder, as for
    build; without it, pictures are generated.
    """
    from gpu_npz.bench.plots import draw, require_matplotlib
    from gpu_npz.bench.storage import cifar_files, measure
    from gpu_npz.cli.console import errors, print_json, show_warnings
    from gpu_npz.sources.arrays.cifar import read_cifar

    show_warnings()
    if src is not None and cifar is not None:
        raise UsageError(f"got SRC {src!r} and --cifar {cifar!r}; give one of them")
    if plot is not None:
        require_matplotlib()  # fail now rather than after minutes of measuring
    config = read_config(None, {**given, "size": given["size"] or (cifar and "32")})
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors().status("") as status:
        pictures = Path(place) / "pictures"
        if cifar is not None:
            status.update("reading CIFAR")
            src = str(cifar_files(read_cifar(cifar), pictures, images))
        elif src is None:
            status.update("making pictures")
            src = str(_good_pictures(pictures, images))
        result = measure(src, config, images=images, rounds=rounds, folder=folder, say=status.update)
    if plot is not None:
        draw(result, plot)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_storage_lines(result)))


@command.command("loading")
@click.argument("src", metavar="[SRC]", required=False)
@click.option("--stored", is_flag=True, help="Deliver uint8 as stored rather than normalized float32.")
@click.option(
    "--augment",
    type=click.Choice(["rrc-flip"]),
    help="Deliver random resized crops, flipped half of the time, by the ways that make them: our readers, FFCV, and "
    "torchvision from image files.",
)
@click.option(
    "--crop-size", metavar="N|HxW", help="With --augment: the size of resized crops. The default is the stored size."
)
@click.option(
    "--images",
    default=1536,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="How many images. Files are used several times if there are fewer.",
)
@_rounds(5)
@click.option(
    "--batch-size",
    "batch",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Images per batch.",
)
@click.option(
    "--workers",
    "readers",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="The number of threads of loader and FFCV, and of worker processes of the others.",
)
@_FOLDER
@config_options("size", "resize_mode", "compress")
@_JSON
def loading(
    src: str | None,
    stored: bool,
    augment: Augment | None,
    crop_size: str | None,
    images: int,
    rounds: int,
    batch: int,
    readers: int,
    folder: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare ways to load batches for training.

    These are a plain loop, gpu-npz's readers, image files, FFCV, LitData and MosaicML Streaming. All read the same
    images from the page cache, in shuffled batches. Rates are of whole epochs. SRC is a folder, as for build; without
    it, pictures are generated.
    """
    from gpu_npz.bench.loading import measure
    from gpu_npz.cli.console import errors, print_json

    config = read_config(None, given)
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as place, errors().status("") as status:
        if src is None:
            status.update("making pictures")
            src = str(_good_pictures(Path(place) / "pictures", images))
        result = measure(
            src,
            config,
            images=images,
            rounds=rounds,
            batch_size=batch,
            workers=readers,
            stored=stored,
            augment=augment,
            crop_size=crop_size,
            folder=folder,
            say=status.update,
        )
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join(_loading_lines(result)))


def _loading_lines(result: LoadingMeasurement) -> list[str]:
    lines = [_named(result.machine), _named(result.settings), ""]
    heads = "".join(f" {head:>10}" for head in ("images/s", "lowest", "highest"))
    lines.append(f"{'':27}{heads}   {'memory, first and last epoch':30} share of another's rate")
    for row in result.rows:
        shares = ", ".join(f"{result.share(row, name):.2f} of {name}" for name in row.baselines)
        rates = f"{row.median:10.0f} {min(row.rates):10.0f} {max(row.rates):10.0f}"
        first, *_, last = (f"{each / 1e6:.0f} MB" if each else "-" for each in result.memory_bytes[row.name] * 2)
        lines.append(f"{row.name:27} {rates}   {f'{first}, {last}':30} {shares}".rstrip())
    return [*lines, *([""] if result.left_out else []), *result.left_out]


def _good_pictures(place: Path, count: int) -> Path:
    """Makes at most 300 pictures, all of which can be decoded; returns their folder."""
    from gpu_npz.bench.pictures import make_images

    made = make_images(place, count=min(count, 300))
    for path in made.bad.values():
        (made.folder / path).unlink()
    return made.folder


def _storage_lines(result: StorageMeasurement) -> list[str]:
    lines = [_named(result.machine), _named(result.settings)]
    image_bytes = result.settings["image_bytes"]
    for operation in result.operations:
        lines += ["", f"{operation.name:24} {'images/s':>10} {'lowest':>10} {'highest':>10} {'MB/s':>10}   share of"]
        for row in operation.rows:
            share = "".join(f"{operation.share(row):.2f} of {name}" for name in row.baselines)
            rates = f"{row.median:10.1f} {min(row.rates):10.1f} {max(row.rates):10.1f}"
            lines.append(f"  {row.name:22} {rates} {row.median * image_bytes / 1e6:10.1f}   {share}")
    lines += ["", f"{'size':24} {'bytes':>16} {'an image':>10}"]
    count = result.settings["images"]
    lines += [f"  {name:22} {taken:16} {taken / count:10.0f}" for name, taken in result.stored_bytes.items()]
    return [*lines, "", *(result.beaten() or ("no format is plainly better than ours of its kind",)), *result.left_out]


def _lines(result: Measurement) -> list[str]:
    lines = [_named(result.machine), _named(result.settings), ""]
    heads = "".join(f" {head:>10}" for head in ("images/s", "lowest", "highest", "begins in", "ends in"))
    lines.append(f"{'':16}{heads}   share of another's rate")
    for row in result.rows:
        shares = ", ".join(f"{result.share(row, name):.2f} of {name}" for name in row.baselines)
        low, high = min(row.rates), max(row.rates)
        rates = f"{row.median:10.0f} {low:10.0f} {high:10.0f}"
        lines.append(f"{row.name:16} {rates} {row.start_s:8.2f} s {row.end_s:8.2f} s   {shares}")
    return [*lines, *([""] if result.left_out else []), *result.left_out]


def _worker_lines(result: WorkerCost) -> list[str]:
    lines = [_named(result.machine), _named(result.settings), "", f"{'':10} {'us per image':>12}"]
    lines += [f"{stage:10} {cost:12.2f}" for stage, cost in result.stages.items()]
    lines.append(f"{'total':10} {result.total:12.2f}")
    return [*lines, "", f"not included: {result.headers:.2f} us per image to parse headers"]


def _sweep_lines(result: Sweep) -> list[str]:
    lines = [_named(result.machine), f"by itself, a build takes: {_named(result.default)}", ""]
    for title, trials in (("tried", result.trials), (f"whole builds of {result.images} images", result.builds)):
        lines.append(f"{'images/s':>10}   {title}, with")
        lines += [f"{each.images_per_second:10.0f}   {_flags(each.options) or '(its own choice)'}" for each in trials]
    lines.append(f"the second build reaches {result.share:.2f} of what was tried with the same options")
    if not result.options:
        return [*lines, "", "nothing was plainly faster than a build's own choice: leave the options out"]
    return [*lines, "", f"{result.gain:.2f} times as fast as a build's own choice:", f"    {_flags(result.options)}"]


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _flags(options: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
