"""Compares a sample of the images that DALI decodes on a GPU with Pillow's, to detect a decoder that is faulty there.

A GPU decodes images in batches, and a fault in a driver or in a hardware decoder may give one image the pixels of
another, or part of them, without any error: https://github.com/pytorch/vision/issues/9606 is an example. A file may
also look different to two decoders for a reason of its own. The difference between the two is whether the image comes
out the same if it is decoded alone.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from ..sources.rejects import BadItem
from .base import DecodedBatch, on_host

if TYPE_CHECKING:
    from .dali import DaliDecoder

# Mean difference of two images, in levels. DALI's and Pillow's images of intact files differ by less than 1 under all
# filters but nearest; two unrelated photos differ by 50 and more.
LIMIT = 8.0
_FIRST = 16  # images of each worker that are compared at once
_EVERY = 1000  # and one in so many after that


class SpotCheck:
    """Chooses and compares a sample of a worker's images.

    Args:
        decoder: the decoder, which also decodes images alone and with Pillow.
    """

    def __init__(self, decoder: DaliDecoder) -> None:
        self._decoder = decoder
        self._random = random.Random(0)
        self._seen = self._chosen = 0

    def choose(self, decoded: DecodedBatch) -> list[int]:
        """The positions in a batch of the images to compare: 16 of the first images, then one in 1,000."""
        candidates = decoded.by_dali.tolist()
        self._seen += len(candidates)
        count = min(len(candidates), _FIRST + self._seen // _EVERY - self._chosen)
        self._chosen += count
        return self._random.sample(candidates, count)

    def differences(self, decoded: DecodedBatch, positions: list[int]) -> int:
        """How many of these images differ from Pillow's, both in their batch and alone; for any thread.

        Args:
            decoded: a batch whose pixels are ready.
            positions: what `choose` gave for it.

        Raises:
            ShardError: an image has other pixels in its batch than alone.
        """
        return sum(self._differs(decoded, position) for position in positions)

    def _differs(self, decoded: DecodedBatch, position: int) -> bool:
        item, encoded = decoded.batch.items[position], decoded.encoded[position]
        with self._decoder.device_context():
            pixels = on_host(decoded.pixels[position])
        try:
            expected = self._decoder.decode_with_pillow(encoded, item)
        except BadItem:
            expected = None  # Pillow rejects what DALI decoded: only the image alone can tell
        if expected is not None and mean_difference(pixels, expected) <= LIMIT:
            return False
        alone = self._decoder.decode_alone(encoded)
        off = LIMIT + 1 if alone is None else mean_difference(pixels, alone)
        if alone is None or off > LIMIT or (expected is not None and mean_difference(alone, expected) <= LIMIT):
            raise ShardError(self._fault(item.path, alone, off))
        return True

    def _fault(self, path: str, alone: Any, off: float) -> str:
        load = self._decoder.hw_decoder_load
        how = (
            "could not be decoded alone" if alone is None else f"differs by {off:.0f} levels from itself decoded alone"
        )
        option = "--hw-decoder-load unset" if load is None else f"--hw-decoder-load {load}"
        if load == 0:
            remedy = "update DALI and the NVIDIA driver to resume, or build on the CPU: --device cpu --overwrite"
        else:
            remedy = "run the same command with --hw-decoder-load 0 to resume"
        return (
            f"{path!r} {how}, so {self._decoder.name} is faulty here (with {option}); {remedy}. "
            "`gpu-npz verify OUT --deep 10000` compares the rows that were built before with their files"
        )


def mean_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean absolute difference of two images of the same shape, in levels."""
    return float(np.abs(one.astype(np.int16) - other).mean())
