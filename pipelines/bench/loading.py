"""Epochs of PyTorch's DataLoader over image files, which are decoded each time, and over shards of the same images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BackendError
from ..readers.inference import Preprocess
from .rates import Tick, Way

BATCH_SIZE = 64


def missing() -> str | None:
    """What to install if PyTorch cannot be imported; None if it can."""
    try:
        from ..readers import torch  # noqa: F401  # only whether it can be imported
    except BackendError as exc:
        return f"DataLoader is left out ({exc})"
    return None


def ways(source: Path, out: Path, ours: str) -> dict[str, tuple[tuple[str, ...], Way]]:
    """Both ways by name; each runs in this process and loads shuffled batches of float32 images.

    Args:
        source: the folder of the image files.
        out: the dataset that was built from them.
        ours: the name of the way that reads the dataset.
    """
    from ..readers import torch as reader

    loader = reader.torch.utils.data.DataLoader  # type: ignore[attr-defined]  # torch is imported only in that module
    shards = reader.ShardDataset(out)

    def epoch(dataset: Any) -> Way:
        def way(tick: Tick) -> None:
            for images, _ in loader(dataset, BATCH_SIZE, shuffle=True):
                tick(len(images))

        return way

    return {"image files": ((ours,), epoch(_Files(source, shards))), ours: ((), epoch(shards))}


class _Files:
    """The images of a dataset, decoded from their files when they are requested, like an ImageFolder."""

    def __init__(self, source: Path, shards: Any) -> None:
        self._paths = [os.path.join(source, path) for path in shards.data.paths]
        self._shards = shards
        self._preprocess: Preprocess = shards.data.preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        image = self._preprocess.normalized(self._paths[number])
        if self._preprocess.config.layout == "NHWC":
            image = image.transpose(2, 0, 1)
        return image, self._shards.targets[number]
