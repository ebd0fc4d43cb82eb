"""Measures every form that SRC can have, with the same files: listing, reading without decoding, and building.

All rows are measured in one run with interleaved rounds, from the page cache. Reading and building use one core.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import BuildConfig
from ..errors import UsageError
from ..machine.environment import choose, inspect
from ..sources import open_source
from .rates import Measurement, Tick, Way, in_turns, linked, machine, on_one_core
from .setup import Setup

IMAGES = 1_000
ROUNDS = 5
_LISTED = 100_000  # the least number of items over which the rate of a listing is measured
_FOLDER = "folder"
_PARQUET_ROWS = 256  # of a row group
_SAMPLES_A_TAR = 500


def measure(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    images: int = IMAGES,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures folder, tar, zip, WebDataset, CSV table and, where pyarrow is installed, Parquet.

    Args:
        src: a folder as for `build`; its files are linked until there are enough.
        config: the settings of the builds.
        images: how many images.
        rounds: how often everything is measured; the ways take turns within a round.
        folder: where to write one copy of the images per form; the system's temporary folder if None.
        say: called with the name of what is measured next.

    Raises:
        UsageError: `resize_mode` is `none`.
        BackendError, SourceError: as `build`.
    """
    config = config or BuildConfig()
    if config.size is None:
        raise UsageError("--resize-mode none: choose another mode, or a --size")
    choice = choose(config, inspect(config))
    common = {"device": "cpu" if choice.gpu is None else str(choice.gpu), "backend": choice.backend}
    settings = BuildConfig(**{**config.model_dump(), **common, "workers": 0, "max_rejects": "100%"})
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        place = Path(name)
        tree = linked(src, place / "src", images)
        ways: dict[str, tuple[tuple[str, ...], Way]] = {}
        built: dict[str, tuple[tuple[str, ...], Way]] = {}
        for form, make in _FORMS.items():
            say(f"storing {form}")
            location = make(tree, place)
            if location is None:
                continue
            setup = Setup.of(settings, choice, open_source(location, settings), place)
            others = [() if form == _FOLDER else (f"{what} {_FOLDER}",) for what in ("list", "read", "build")]
            ways[f"list {form}"] = (others[0], _listing(location, settings))
            ways[f"read {form}"] = (others[1], on_one_core(_reading(setup)))
            built[f"build {form}"] = (others[2], on_one_core(setup.built))
        rows = in_turns({**dict(sorted(ways.items())), **built}, rounds, say)
        provenance = setup.decoder().provenance()
    return Measurement(rows, {"images": images, "dtype": settings.dtype, "size": settings.size}, machine(provenance))


def _listing(location: str, config: BuildConfig) -> Way:
    """Opens and lists the source again and again, until enough items have been listed."""

    def way(tick: Tick) -> None:
        done = 0
        while done < _LISTED:
            count = sum(len(group.names) for group in open_source(location, config).groups())
            done += count
            tick(count)

    return way


def _reading(setup: Setup) -> Way:
    """Reads all items in the order of the plan, without decoding them."""

    def way(tick: Tick) -> None:
        setup.bare(tick, "read")

    return way


def _members(tree: Path) -> Iterator[tuple[str, bytes]]:
    """The name and the content of each file, class by class."""
    for path in sorted(tree.glob("*/*")):
        yield path.relative_to(tree).as_posix(), path.read_bytes()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _as_tar(tree: Path, place: Path) -> str:
    with tarfile.open(place / "images.tar", "w") as archive:
        for name, content in _members(tree):
            _add(archive, name, content)
    return os.fspath(place / "images.tar")


def _as_zip(tree: Path, place: Path) -> str:
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for name, content in _members(tree):
            archive.writestr(name, content)
    return os.fspath(place / "images.zip")


def _as_webdataset(tree: Path, place: Path) -> str:
    (place / "samples").mkdir()
    members = list(_members(tree))
    for start in range(0, len(members), _SAMPLES_A_TAR):
        with tarfile.open(place / "samples" / f"{start // _SAMPLES_A_TAR:06}.tar", "w") as archive:
            for number, (name, content) in enumerate(members[start : start + _SAMPLES_A_TAR], start):
                _add(archive, f"{number:09}{Path(name).suffix.lower()}", content)
                _add(archive, f"{number:09}.cls", name.partition("/")[0].rpartition("-")[2].encode())
    return os.fspath(place / "samples" / "*.tar")


def _as_table(tree: Path, place: Path) -> str:
    path = place / "images.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label"))
        rows.writerows((f"{tree.name}/{name}", name.partition("/")[0]) for name, _ in _members(tree))
    return os.fspath(path)


def _as_parquet(tree: Path, place: Path) -> str | None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    rows = [
        {"image": {"bytes": content, "path": name}, "label": name.partition("/")[0]} for name, content in _members(tree)
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), place / "images.parquet", row_group_size=_PARQUET_ROWS, compression="none"
    )
    return os.fspath(place / "images.parquet")


_FORMS: dict[str, Callable[[Path, Path], str | None]] = {
    _FOLDER: lambda tree, place: os.fspath(tree),
    "tar": _as_tar,
    "zip": _as_zip,
    "webdataset": _as_webdataset,
    "table": _as_table,
    "parquet": _as_parquet,
}
