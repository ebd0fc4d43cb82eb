"""The Pillow decoder: every kind of input, the resize modes as Pillow itself does them, and what becomes a reject."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from conftest import Encode, FileBytes, MakeTree, Pixels
from gpu_npz.config import BuildConfig
from gpu_npz.decode.base import Decoded
from gpu_npz.decode.pillow import PillowDecoder, first_size, is_simd
from gpu_npz.demo import paint
from gpu_npz.errors import ShardError
from gpu_npz.geometry import Geometry
from gpu_npz.plan import Batch, Item
from gpu_npz.rejects import BadItem, clean
from gpu_npz.sources.folder import FolderSource
from numpy.typing import NDArray
from PIL import EpsImagePlugin, ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin
