"""Checks which parts of this machine gpu-npz can use, and gives the exact command that fixes each of the others."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from ..config import BuildConfig
from ..errors import install_command
from ..machine.environment import Machine, dotted, inspect, usable_cpus

# Optional libraries by name: the module to import, the extra that installs it, and what needs it.
_EXTRAS = {
    "imagecodecs": ("imagecodecs", "bits16", "--bit-depth 16, and TIFF that Pillow does not read"),
    "tifffile": ("tifffile", "bits16", "--bit-depth 16, and TIFF that Pillow does not read"),
    "cykooz-resizer": ("cykooz_resizer", "simd", "--resizer simd"),
    "simplejpeg": ("simplejpeg", "simd", "decoding JPEGs faster with --resizer simd"),
    "pydicom": ("pydicom", "dicom", "DICOM files"),
    "PyArrow": ("pyarrow", "parquet", "Parquet files"),
    "SciPy": ("scipy", "imagenet", "the devkit of ILSVRC2012"),
    "aiohttp": ("aiohttp", "http", "https://"),
    "s3fs": ("s3fs", "s3", "s3://"),
    "gcsfs": ("gcsfs", "gs", "gs://"),
    "Ray": ("ray", "ray", "--engine ray"),
}
_VIDEO_LIBRARY = "libnvcuvid.so.1"
_SIMD_INSTALL = 'CC="cc -mavx2" pip install pillow-simd'


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: the part that was checked.
        ok: whether the part can be used.
        found: a description of what was found, such as a version.
        remedy: a command or an action that makes the part usable or faster; empty if there is none.
    """

    what: str
    ok: bool
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the finding as JSON values."""
        return asdict(self)


def diagnose() -> list[Finding]:
    """Checks the machine, the GPU path and the CPU path without changing anything."""
    machine = inspect(BuildConfig(backend="dali"))  # tests DALI without a GPU, too
    cores = f"{usable_cpus()} usable of {os.cpu_count()}"
    return [
        Finding("gpu-npz", True, f"{version('gpu-npz')} on Python {platform.python_version()}, {platform.system()}"),
        Finding("cores", True, cores),
        *_gpu(machine),
        *_pillow(),
        Finding("NumPy", True, version("numpy")),
        Finding("ISA-L", True, f"isal {version('isal')}"),
        *(_extra(what, *given) for what, given in _EXTRAS.items()),
    ]


def _gpu(machine: Machine) -> list[Finding]:
    found = f"{machine.gpus} visible" + (f", driver for CUDA {dotted(machine.cuda)}" if machine.cuda else "")
    findings = [Finding("GPU", True, found) if machine.gpus else _no_gpu()]
    if not machine.driver:
        findings += [Finding(f"GPU {number}", True, _device(number)) for number in range(machine.gpus)]
    for what, missing in {"driver": machine.driver, "DALI": machine.dali, "CuPy": machine.cupy}.items():
        if missing and not machine.gpus and missing.reason == "not installed":
            findings.append(Finding(missing.what, False, f"{missing.reason}; only needed on a machine with a GPU"))
        elif missing:
            findings.append(Finding(missing.what, False, missing.reason, missing.remedy))
        elif what != "driver":
            findings.append(Finding(what, True, _installed("nvidia-dali" if what == "DALI" else "cupy")))
    if machine.gpus:
        findings += _jpeg_engines()
    return findings


def _jpeg_engines() -> list[Finding]:
    """Returns what prevents the use of the hardware JPEG engines. DALI does not report that it runs without them."""
    # Only containers set this variable. The container toolkit mounts only the driver libraries that it lists.
    capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "all")
    remedy = "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video ..."
    if not {"all", "video"} & set(capabilities.split(",")):
        reason = f"hidden from this container: NVIDIA_DRIVER_CAPABILITIES is {capabilities!r}, without video"
        return [Finding("JPEG engines", False, reason, remedy)]
    try:
        ctypes.CDLL(_VIDEO_LIBRARY)
    except OSError as exc:
        remedy = f"install the NVIDIA driver's video libraries; in a container: {remedy}"
        return [Finding("JPEG engines", False, f"the driver's video library cannot be loaded ({exc})", remedy)]
    return []


def _no_gpu() -> Finding:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return Finding("GPU", False, "none visible: builds run on the CPU")
    found = f"none visible, and CUDA_VISIBLE_DEVICES is {shown!r}: builds run on the CPU"
    return Finding("GPU", False, found, "unset CUDA_VISIBLE_DEVICES")


def _device(number: int) -> str:
    """Returns a GPU's name and memory. It asks the driver and NVML, because neither of them allocates GPU memory."""
    name, bus = ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
    device, size = ctypes.c_int(), ctypes.c_size_t()
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    text = "name and memory unknown"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuDeviceGet(ctypes.byref(device), number) or cuda.cuDeviceGetName(name, len(name), device):
            return text
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        text = f"{name.value.decode()}, {size.value / 2**30:.1f} GiB"
        cuda.cuDeviceGetPCIBusId(bus, len(bus), device)  # CUDA and NVML number GPUs differently
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
        if not failed and not nvml.nvmlDeviceGetMemoryInfo(handle, memory):
            text += f", {memory[1] / 2**30:.1f} GiB free"
    except (OSError, AttributeError):  # NVML is part of the driver, but a container may lack it
        pass
    return text


def _pillow() -> list[Finding]:
    import PIL

    from ..preprocess.pillow import versions
    from ..preprocess.resize import advice, is_simd

    found = versions()
    owners = sorted({owner.lower() for owner in packages_distributions().get("PIL", [])})
    where = Path(PIL.__file__ or "").parent
    name = "Pillow-SIMD" if is_simd() else "Pillow"
    text = f"{name} {found['pillow']} with {found['libjpeg']}, imported from {where}"
    if len(owners) > 1:
        remedy = f"pip uninstall -y {' '.join(owners)} && {_SIMD_INSTALL}"
        return [Finding("PIL", False, f"{text}; {' and '.join(owners)} both claim it", remedy)]
    return [Finding("PIL", True, text, advice(BuildConfig()) or "")]


def _extra(what: str, module: str, extra: str, use: str) -> Finding:
    try:
        found = importlib.import_module(module)
    except ImportError as exc:
        reason = "not installed" if getattr(exc, "name", None) == module else f"cannot be imported ({exc})"
        return Finding(what, False, f"{reason}; optional, for {use}", install_command(extra))
    return Finding(what, True, f"{getattr(found, '__version__', 'installed')}, for {use}")


def _installed(prefix: str) -> str:
    names = sorted({name for names in packages_distributions().values() for name in names if name.startswith(prefix)})
    shown = []
    for name in names:
        try:
            shown.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(shown) or "installed"
