"""gpu_npz: collections of images to NPZ shards, and back to arrays.

    report = gpu_npz.build("/data/train", "/data/out", gpu_npz.BuildConfig(dtype="uint8"))
    data = gpu_npz.open_dataset("/data/out")
    image, label = data[0], data.labels[0]

Importing this package loads next to nothing; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # `typing` takes a while to load, and the command line takes no signals before this has run
if TYPE_CHECKING:
    __version__: str
    from .audit.verify import Problem, Verification, verify
    from .builder.build import build, build_split
    from .builder.planning import Measuring
    from .builder.report import BuildReport, Started
    from .config import BuildConfig
    from .dataset.manifest import Manifest
    from .errors import GpuNpzError
    from .export.run import export_dataset
    from .npz.load import load
    from .readers.combine import Mix, concat, mix
    from .readers.dataset import Dataset, open_dataset
    from .readers.inference import Preprocess
    from .readers.views import View
    from .workers.events import Committed, Progress, WorkerEnded

_HOMES = {
    "BuildConfig": "config",
    "BuildReport": "builder.report",
    "Committed": "workers.events",
    "Dataset": "readers.dataset",
    "GpuNpzError": "errors",
    "Manifest": "dataset.manifest",
    "Measuring": "builder.planning",
    "Mix": "readers.combine",
    "Preprocess": "readers.inference",
    "Problem": "audit.verify",
    "Progress": "workers.events",
    "Started": "builder.report",
    "Verification": "audit.verify",
    "View": "readers.views",
    "WorkerEnded": "workers.events",
    "build": "builder.build",
    "build_split": "builder.build",
    "concat": "readers.combine",
    "export_dataset": "export.run",
    "load": "npz.load",
    "mix": "readers.combine",
    "open_dataset": "readers.dataset",
    "verify": "audit.verify",
}
__all__ = [
    "BuildConfig",
    "BuildReport",
    "Committed",
    "Dataset",
    "GpuNpzError",
    "Manifest",
    "Measuring",
    "Mix",
    "Preprocess",
    "Problem",
    "Progress",
    "Started",
    "Verification",
    "View",
    "WorkerEnded",
    "__version__",
    "build",
    "build_split",
    "concat",
    "export_dataset",
    "load",
    "mix",
    "open_dataset",
    "verify",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("gpu-npz")
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
