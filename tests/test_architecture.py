"""The package as a whole: which module may import which, one home for each library, the public names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpu_npz
from gpu_npz.config import load_toml

ROOT = Path(__file__).parents[1]
MAX_LINES = 60  # of a function, its docstring aside

# Each room: the rooms that it may import; then its modules, one floor per string, from the ground up. A module imports
# those of its own room only from lower floors. The name of a room, or of a folder in it, means its `__init__.py`.
ROOMS = {
    "errors": ("", ["errors"]),
    "config": ("errors", ["config"]),
    "presets": ("errors", ["presets"]),
    "storage": (
        "errors",
        [
            "names retries scratch",
            "clients holders",
            "base heartbeats",
            "file_lock object_lock",
            "local objects",
            "storage",
        ],
    ),
    "machine": ("errors config", ["machine", "environment", "tuning"]),
    "npz": ("errors storage", ["npz", "format arrays", "writer reader load"]),
    "sources": (
        "errors config storage npz",
        [
            "rejects access access.read_ahead archives arrays arrays.netpbm folders tables",
            "dicom_frames arrays.scaling",
            "base",
            "labels access.local access.stores arrays.pickles",
            "access.files tables.columns tables.paths",
            "archives.base tables.arrow arrays.cifar",
            "archives.tar archives.zip tables.parquet tables.rows",
            "archives.imagenet archives.webdataset arrays.npy tables.sidecar tables.table",
            "arrays.choice arrays.inflation folders.folder detect",
            "arrays.labelling arrays.rows folders.remote",
            "arrays.numpy_source",
            "arrays.per_file",
            "sources",
        ],
    ),
    "preprocess": (
        "errors config machine sources",
        [
            "preprocess exif fed_pipeline samples geometry normalize resize",
            "jpeg normalize_cuda dali_pipelines",
            "base dicom png routing tiff turbo",
            "pillow_files",
            "pillow",
            "pillow_16bit dali_reader",
            "dali",
            "decoders spot_check",
        ],
    ),
    "dataset": (
        "errors config storage machine npz sources preprocess",
        [
            "dataset layout identity records plan",
            "job image_size space selection",
            "commits",
            "manifest",
            "built",
            "originals",
        ],
    ),
    "workers": (
        "errors config storage machine npz sources preprocess dataset",
        [
            "workers messages shard_queue",
            "events subprocesses",
            "sink",
            "worker counting",
            "message_files",
            "local",
            "ray",
        ],
    ),
    "readers": (
        "errors config storage machine npz sources preprocess dataset",
        [
            "readers inference buffers cache",
            "remote views",
            "dataset contract order",
            "combine augment",
            "torch_crops",
            "torch_loader torch_workers keras tensorflow dali",
            "torch",
        ],
    ),
    "audit": (
        "errors config storage machine npz sources preprocess dataset readers workers.counting",
        ["audit doctor verify parity", "compare stats preview"],
    ),
    "export": (
        "errors storage machine npz sources preprocess dataset readers",
        ["export png names place rows", "arrays encoder", "folder webdataset", "run"],
    ),
    "builder": (
        "errors config storage machine sources preprocess dataset workers audit",
        [
            "builder pace schedulers headers watch",
            "parts",
            "planning",
            "inspection report",
            "short_run",
            "estimate run",
            "build maintenance",
        ],
    ),
    "bench": (
        "errors config storage machine npz sources preprocess dataset workers readers audit builder",
        [
            "bench peers pictures rates formats loaders",
            "setup",
            "loading storage cores sources sweep worker",
            "plots pipeline writers",
        ],
    ),
}


def sources(*folders: str) -> dict[Path, ast.Module]:
    """Every module in the folders, parsed, by its path from the root."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT): ast.parse(path.read_bytes()) for path in paths}


def imported(path: Path, module: ast.AST) -> Iterator[str]:
    """The full names of what a module imports, wherever in it; relative ones under the package's name."""
    package = ["gpu_npz", *path.parent.parts[path.parts[0] == "pipelines" :]]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def test_no_file_imports_the_folders_by_their_own_names() -> None:
    for path, module in sources("pipelines", "cli", "tests").items():
        tops = {name.split(".")[0] for name in imported(path, module)}
        assert not tops & {"pipelines", "cli", "tests"}, path


def place_of(module: str) -> tuple[str, int]:
    """The room of a module, by its name below the package, and its floor there."""
    room, _, inside = module.partition(".")
    floors = ROOMS[room][1] if room in ROOMS else []
    for number, floor in enumerate(floors):
        if (inside or room) in floor.split():
            return room, number
    raise AssertionError(f"{module}: give it a floor in ROOMS, and its room a line in the map of pipelines/README.md")


def test_imports_point_down_only_between_rooms_and_inside_a_room() -> None:
    modules = {}
    for path, module in sources("pipelines").items():
        name = ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            modules[name] = (path, module)
    for name, (path, module) in modules.items():
        room, floor = place_of(name)
        for full in imported(path, module):
            if not full.startswith("gpu_npz.") or full == "gpu_npz.__version__":
                continue
            target = full.removeprefix("gpu_npz.")
            while target and target not in modules:
                target = target.rpartition(".")[0]
            assert target, f"{path} imports {full}: name the module"
            if target == name:
                continue
            other, below = place_of(target)
            if other == room:
                assert below < floor, f"{path} imports {target}, which is not on a lower floor of {room}"
            else:
                allowed = ROOMS[room][0].split()
                assert other in allowed or target in allowed, f"{path} imports {target}: {room} may not"


def test_rooms_import_only_rooms_before_them() -> None:
    names = list(ROOMS)
    for name, (allowed, _) in ROOMS.items():
        for other in allowed.split():
            assert names.index(other.partition(".")[0]) < names.index(name), f"{name} may not import {other}"


def test_each_module_has_one_place_and_each_place_a_module() -> None:
    for room, (_, floors) in ROOMS.items():
        listed = [name for floor in floors for name in floor.split()]
        assert len(listed) == len(set(listed)), room
        for name in listed:
            path = ROOT / "pipelines" / ("" if name == room else room) / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), path


def test_the_ground_floor_holds_nothing_but_the_rooms() -> None:
    files = {path.name for path in (ROOT / "pipelines").iterdir() if path.is_file()}
    assert files == {
        "__init__.py",
        "__main__.py",
        "README.md",
        "config.py",
        "errors.py",
        "presets.py",
        "py.typed",
    }


def test_every_folder_with_modules_is_installed() -> None:
    packages = load_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pipelines").rglob("*.py")}
    names = {".".join(["gpu_npz", *folder.parts[1:]]) for folder in folders}
    assert sorted(packages) == sorted({*names, "gpu_npz.cli"})
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_readers_and_audit_never_import_what_writes() -> None:
    writing = ("npz.writer", "workers.sink", "workers.worker", "builder")
    for path, module in sources("pipelines/readers", "pipelines/audit").items():
        for name in imported(path, module):
            assert not name.startswith(tuple(f"gpu_npz.{each}" for each in writing)), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("torch", "readers/torch*.py"),
        ("keras", "readers/keras.py"),
        ("tensorflow", "readers/tensorflow.py"),
        ("nvidia", "preprocess/dali*.py"),
        ("ray", "workers/ray.py"),
    ],
)
def test_each_heavy_library_is_imported_in_one_place(library: str, home: str) -> None:
    for path, module in sources("pipelines", "cli").items():
        if not path.match(f"pipelines/{home}"):
            assert library not in {name.split(".")[0] for name in imported(path, module)}, path


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without those of its docstring."""
    assert function.end_lineno is not None
    first, lines = function.body[0], function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None or first.end_lineno is None:
        return lines
    return lines - (first.end_lineno - first.lineno + 1)


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path}: {node.name} has {lines} lines"
        for path, module in sources("pipelines", "cli").items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := lines_of_code(node)) > MAX_LINES
    ]
    assert not long


def test_the_public_names_are_the_ones_that_the_package_says() -> None:
    module = ast.parse((ROOT / "pipelines/__init__.py").read_bytes())
    typed = {
        alias.name
        for block in module.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(gpu_npz.__all__) == {*typed, "__version__"}
    assert gpu_npz.__all__ == sorted(gpu_npz.__all__)
    assert dir(gpu_npz) == gpu_npz.__all__
    for name in typed:
        assert getattr(gpu_npz, name).__module__ == f"gpu_npz.{gpu_npz._HOMES[name]}"
    assert gpu_npz._HOMES.keys() == typed
    with pytest.raises(AttributeError, match="has no attribute 'bild'"):
        gpu_npz.bild  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert gpu_npz.__version__ == load_toml(ROOT / "pyproject.toml")["project"]["version"]
