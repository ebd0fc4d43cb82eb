"""The pipeline definitions that DALI runs: one reads files, the other decodes, resizes and turns images."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nvidia import dali, nvimgcodec

from ..config import BuildConfig
from ..sources.rejects import Stage
from .geometry import Geometry

fn: Any = dali.fn  # these three are untyped, since DALI's stubs are incomplete
types: Any = dali.types
pipeline_def: Any = dali.pipeline.pipeline_def

_FILTERS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
_INPUTS = {  # type and number of dimensions; see `routing.Route` for the meaning
    "encoded": (types.UINT8, 1),
    "shape": (types.INT32, 1),
    "size": (types.FLOAT, 1),
    "start": (types.INT32, 1),
    "transposed": (types.BOOL, 0),
    "flipped": (types.BOOL, 0),
    "flips": (types.INT32, 1),
}


@pipeline_def  # type: ignore[untyped-decorator]  # as fn
def read_files(source: Callable[[], list[Any]]) -> Any:
    """Reads the files whose paths `source` gives."""
    paths, number = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 0])
    # Without mmap: plain reads are twice as fast, and it does no harm if a file shrinks meanwhile.
    return fn.io.file.read(paths, dont_use_mmap=True), number


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # as fn
def decode_images(
    source: Callable[[], list[Any]],
    names: Sequence[str],
    config: BuildConfig,
    geometry: Geometry,
    backend: str,
    hw_decoder_load: float | None,
) -> Any:
    """Decodes images, and resizes, turns and crops or pads them if the inputs for these steps are given.

    Args:
        source: gives the inputs of one batch per call.
        names: the names of the inputs, from `input_names`.
        config: the settings of the build.
        geometry: the resize mode and the output size.
        backend: "cpu" or "mixed", the device of DALI's decoder.
        hw_decoder_load: the share of images for the hardware JPEG decoder, 0 to 1; None leaves it to DALI.
    """
    *inputs, number = fn.external_source(
        source,
        num_outputs=len(names) + 1,
        no_copy=True,  # a GPU may still be reading when the batch is returned: see `DecodedBatch.encoded`
        dtype=[*(_INPUTS[name][0] for name in names), types.INT64],
        ndim=[*(_INPUTS[name][1] for name in names), 0],
    )
    given = dict(zip(names, inputs))  # noqa: B905  # DALI's translation of this function has a zip without `strict`
    options: dict[str, Any] = {
        "device": backend,
        "output_type": types.GRAY if config.channels == "gray" else types.RGB,
        "adjust_orientation": False,  # DALI's parser may read another EXIF segment than ours
        "jpeg_fancy_upsampling": True,  # as Pillow does; without it, pixels of 4:2:0 images differ by up to 27 levels
    }
    if hw_decoder_load is not None:
        options["hw_decoder_load"] = hw_decoder_load
    if "shape" in given:
        images = fn.decoders.image_slice(given["encoded"], start=[0, 0], shape=given["shape"], axes=[0, 1], **options)
    else:
        images = fn.decoders.image(given["encoded"], **options)
    if "size" in given:
        images = fn.resize(images, size=given["size"], interp_type=_FILTERS[config.interpolation], subpixel_scale=False)
    if "flips" in given:
        transposed, flipped, flips = (given[name] for name in ("transposed", "flipped", "flips"))
        if transposed:
            images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
        if flipped:
            images = fn.flip(images, horizontal=flips[0], vertical=flips[1])
    if "start" in given:
        images = fn.slice(
            images,
            start=given["start"],
            shape=[geometry.height, geometry.width],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=config.pad_value,
        )
    return images, number


def input_names(last: Stage, geometry: Geometry, backend: str) -> list[str]:
    """The inputs that a pipeline needs for the stages up to `last`; DALI warns about unused inputs."""
    names = ["encoded"]
    if backend == "cpu":
        # With a region of interest, the decoder checks it against the data; without one it trusts its parser. On a
        # GPU, a region may make DALI choose another decoder: not yet measured.
        names.append("shape")
    if last == "resize":
        names += ["transposed", "flipped", "flips"]
        names += [] if geometry.mode == "none" else ["size"]
        names += ["start"] if geometry.mode in ("center-crop", "pad") else []
    return names


_environment_lock = threading.Lock()


@contextlib.contextmanager
def without_opencv() -> Iterator[None]:
    """Decoders that are created in the body use all plug-ins of nvImageCodec except OpenCV's.

    OpenCV decodes damaged JPEGs without an error, with gray after the end of the data, and writes as many pixels as the
    data has, which may overflow the buffer. The body sees a changed environment variable.
    """
    name = "NVIMGCODEC_EXTENSIONS_PATH"
    with _environment_lock, tempfile.TemporaryDirectory(prefix="gpu-npz-") as links:
        before = os.environ.get(name)
        folders = (before or os.path.join(os.path.dirname(nvimgcodec.__file__), "extensions")).split(os.pathsep)
        for plugin in (plugin for folder in folders for plugin in Path(folder).glob("*.so*")):
            if "opencv" not in plugin.name:
                Path(links, plugin.name).symlink_to(plugin.resolve())
        os.environ[name] = links
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
