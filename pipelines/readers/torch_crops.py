"""Parts of images, resized by torch with an antialiased bilinear filter, as torchvision does: on the CPU and a device.

Values are those of Pillow's bilinear filter for the same part, or differ from them by one level of 255, on a device
rarely by two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import Boxes, Crops
from .views import Numbers, Rows

_AT_ONCE = 64  # images on a device at a time, which bounds the memory for their float32 values


def read(data: Rows, rows: Numbers, boxes: Boxes, crops: Crops, out: NDArray[Any], *, normalize: bool = False) -> None:
    """Reads parts of images into memory that exists already, as pixels or normalized. Threads may do so at once.

    Args:
        data: images that are stored as uint8.
        rows: row numbers from 0 up to N - 1, int64 (n,).
        boxes: the part of each image, int64 (n, 5).
        crops: the size of the result.
        out: (n, C, h, w) or (n, h, w, C) as stored, with any strides: uint8; float32 or float16 with `normalize`.
        normalize: whether to normalize pixels, as the dataset does with whole images; blank rows stay zero.
    """
    last = data.layout == "NHWC"
    for place in np.argsort(rows, kind="stable").tolist():  # shard by shard
        row = int(rows[place])
        top, left, height, width, flipped = boxes[place].tolist()
        image = data[row]
        part = (
            image[top : top + height, left : left + width]
            if last
            else image[:, top : top + height, left : left + width]
        )
        if (height, width) != crops.size:
            part = _resized(part, crops.size, last)
        if flipped:
            part = part[:, ::-1] if last else part[..., ::-1]
        if not normalize:
            np.copyto(out[place], part)
        elif data.valid is None or data.valid[row]:
            data.preprocess.write(part, out[place], whole=image)
        else:
            out[place] = 0


def _resized(part: NDArray[np.uint8], size: tuple[int, int], last: bool) -> NDArray[np.uint8]:
    # NumPy makes the part contiguous: torch would start its own threads, which wait for each other in busy loops.
    pixels = torch.from_numpy(np.ascontiguousarray(part))
    pixels = (pixels.movedim(-1, 0) if last else pixels)[None]
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    found: NDArray[np.uint8] = (resized.movedim(0, -1) if last else resized).numpy()
    return found


def cropped(images: torch.Tensor, boxes: Boxes, crops: Crops) -> torch.Tensor:
    """Parts of images on a device, uint8 (N, C, h, w), in the memory format of `images`.

    All images are resized at once, by products with matrices of the filter's weights.

    Args:
        images: uint8 (N, C, H, W).
        boxes: the part of each image, int64 (N, 5).
        crops: the size of the result.
    """
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    places = torch.from_numpy(boxes).to(images.device, non_blocking=True)
    parts = []
    for some, at in zip(torch.split(images, _AT_ONCE), torch.split(places, _AT_ONCE), strict=True):
        rows = _weights(at[:, 0], at[:, 2], images.shape[2], crops.size[0])
        columns = _weights(at[:, 1], at[:, 3], images.shape[3], crops.size[1])
        columns = torch.where(at[:, 4].bool()[:, None, None], columns.flip(1), columns)
        # Widths first, and rounded in between, as Pillow and torch do on the CPU.
        narrow = (some.float() @ columns.transpose(1, 2)[:, None] + 0.5).floor()
        parts.append((rows[:, None] @ narrow + 0.5).to(torch.uint8))
    return torch.cat(parts).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _weights(start: torch.Tensor, length: torch.Tensor, stored: int, size: int) -> torch.Tensor:
    """The weight of each stored pixel for each resized one, along one axis: float32 (N, size, stored).

    Args:
        start: the first pixel of each part, int64 (N,).
        length: how many pixels each part has, int64 (N,).
        stored: how many pixels an image has.
        size: how many pixels a part is resized to.
    """
    scale = (length / size)[:, None, None]
    pixels = torch.arange(stored, device=start.device) + 0.5 - start[:, None, None]
    centers = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
    weights = (1 - (pixels - centers).abs() / scale.clamp(min=1)).clamp(min=0)
    weights *= (pixels > 0) & (pixels < length[:, None, None])
    found: torch.Tensor = weights / weights.sum(-1, keepdim=True)
    return found
