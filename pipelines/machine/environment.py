"""Detects usable GPUs and libraries, explains how to install missing ones, and chooses the backend of a build."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..config import BuildConfig, gpu_numbers
from ..errors import BackendError, UsageError, install_command

BackendName = Literal["pillow", "dali"]
_OLDEST_CUDA = 12_000  # CUDA 12.0 in the format of cuDriverGetVersion; DALI has no wheels for older drivers
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC
_NVIDIA_VENDOR = "0x10de"


@dataclass(frozen=True)
class Missing:
    """A part of the GPU path that cannot be used.

    Attributes:
        what: the name of the part, such as DALI.
        reason: why it cannot be used.
        remedy: a command or an action that fixes it.
    """

    what: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.remedy}"


def usable_cpus() -> int:
    """Returns the number of cores that this process may use, given its CPU affinity and its cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cgroup_quota())))


@dataclass(frozen=True)
class Machine:
    """The GPUs, libraries and cores of a machine.

    Attributes:
        gpus: the number of GPUs that this process can see, whether or not their driver works.
        cuda: the CUDA version of the driver, in the format of cuDriverGetVersion (12040 is 12.4); None if unknown.
        driver: what is wrong with the driver; None if no problem was found.
        dali: what is wrong with DALI; None if no problem was found.
        cupy: what is wrong with CuPy; None if no problem was found.
        cpus: the number of usable cores, which the workers share.
        capabilities: the compute capability of each GPU, such as (9, 0); empty if the driver does not work.
    """

    gpus: int
    cuda: int | None
    driver: Missing | None
    dali: Missing | None
    cupy: Missing | None
    cpus: int = field(default_factory=usable_cpus)
    capabilities: tuple[tuple[int, int], ...] = ()

    @property
    def missing(self) -> list[Missing]:
        """The parts that prevent the use of a GPU, driver first."""
        return [part for part in (self.driver, self.dali, self.cupy) if part]


@dataclass(frozen=True)
class Choice:
    """The backend and the devices of a build.

    Attributes:
        backend: the decoder.
        gpus: the numbers of the GPUs; empty for the CPU.
        warning: what the user should know about this choice; None if there is nothing to report.
        cpus: the number of usable cores.
        capability: the highest compute capability of these GPUs; None if unknown, or for the CPU.
    """

    backend: BackendName
    gpus: tuple[int, ...] = ()
    warning: str | None = None
    cpus: int = field(default_factory=usable_cpus)
    capability: tuple[int, int] | None = None

    @property
    def gpu(self) -> int | None:
        """The number of the first GPU; None for the CPU."""
        return next(iter(self.gpus), None)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """The kind of device. It is stored with the plan and must be the same on resume."""
        return "cuda" if self.gpus else "cpu"


def inspect(config: BuildConfig | None = None) -> Machine:
    """Inspects this machine.

    It loads the NVIDIA driver if there is one. It loads DALI and CuPy only if a GPU could use them, and DALI also if
    the settings request it for the CPU.

    Args:
        config: `device` names the GPU on which CuPy is tested, which is GPU 0 if it contains no number; with `backend`
            dali, DALI is tested without a GPU, too. The defaults if None.
    """
    config = config or BuildConfig()
    gpus, cuda, driver = _driver()
    capabilities = () if driver or cuda is None else tuple(map(_capability, range(gpus)))
    number = next(iter(gpu_numbers(config.device)), 0)
    gpu = number if config.device != "cpu" and number < gpus and driver is None else None
    dali, cupy = _trouble(_DALI, cuda, gpu), _trouble(_CUPY, cuda, gpu)
    if config.backend == "dali" and gpu is None:  # its CPU operators need no driver
        dali = _trouble(_DALI, None, None, on_cpu=True)
    return Machine(gpus, cuda, driver, dali, cupy, capabilities=capabilities)


def choose(config: BuildConfig, machine: Machine) -> Choice:
    """Chooses the backend and the GPUs for `--device` and `--backend` on `machine`.

    Raises:
        BackendError: a GPU or DALI was requested and cannot be used.
        UsageError: there is no such GPU, or the options contradict each other.
    """
    choice = _choose(config, machine)
    known = [machine.capabilities[gpu] for gpu in choice.gpus if gpu < len(machine.capabilities)]
    return replace(choice, cpus=machine.cpus, capability=max(known, default=None))


def block_while_waiting(gpu: int) -> None:
    """Makes threads sleep while they wait for a GPU. By default, CUDA spins and keeps a core busy.

    It has an effect only if it is called before anything else in this process uses the GPU.
    """
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        cuda.cuInit(0)
        cuda.cuDevicePrimaryCtxSetFlags_v2(gpu, _BLOCKING_SYNC)


def dotted(cuda: int) -> str:
    """Formats a CUDA version in the usual notation: 12040 becomes 12.4."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _choose(config: BuildConfig, machine: Machine) -> Choice:
    if config.bit_depth == 16:
        return _choose_16bit(config)
    if config.backend == "pillow" and config.require_gpu:
        raise UsageError("--require-gpu and --backend pillow contradict each other; omit one of them")
    on_cpu: BackendName = "dali" if config.backend == "dali" else "pillow"
    if config.device == "cpu" or config.backend == "pillow":
        return _choose_cpu(on_cpu, machine)
    if machine.gpus == 0:
        if config.require_gpu:
            raise BackendError("a GPU is required, and no NVIDIA GPU is visible; run `gpu-npz doctor` for the reason")
        return _choose_cpu(
            on_cpu, machine, f"no GPU found, using the CPU with {on_cpu} (run `gpu-npz doctor` for the reason)"
        )
    if any(number >= machine.gpus for number in gpu_numbers(config.device)):
        known = "one usable GPU, number 0"
        if machine.gpus > 1:
            known = f"{machine.gpus} usable GPUs, numbered 0 to {machine.gpus - 1}"
        raise UsageError(f"--device: got {config.device}; this machine has {known}")
    if machine.missing:
        reasons = "\n".join(f"  {part}" for part in machine.missing)
        if config.device != "auto" or config.require_gpu:
            raise BackendError(f"the GPU cannot be used:\n{reasons}")
        return _choose_cpu(on_cpu, machine, f"the GPU cannot be used, using the CPU with {on_cpu}:\n{reasons}")
    every = tuple(range(machine.gpus))
    return Choice("dali", every if config.device == "all" else gpu_numbers(config.device) or every[:1])


def _choose_16bit(config: BuildConfig) -> Choice:
    require_bits16("--bit-depth 16")
    warning = "decoding on the CPU with pillow, because DALI decodes only 8 bits per channel"
    return Choice("pillow", (), warning if config.device == "auto" else None)


def _choose_cpu(backend: BackendName, machine: Machine, warning: str | None = None) -> Choice:
    if backend == "dali" and machine.dali:
        raise BackendError(f"--backend dali: {machine.dali}")
    return Choice(backend, (), warning)


class Bits16(NamedTuple):
    """The libraries for images that Pillow truncates to 8 bits, decodes incorrectly, or cannot read."""

    tifffile: Any
    imagecodecs: Any


def require_bits16(what: str) -> Bits16:
    """Imports the libraries of the extra `bits16`.

    Args:
        what: what needs them, for the error message.

    Raises:
        BackendError: they cannot be imported.
    """
    try:
        return Bits16(*map(importlib.import_module, Bits16._fields))
    except ImportError as exc:
        raise BackendError(f"{what} needs tifffile and imagecodecs ({exc}); run: {install_command('bits16')}") from exc


def _driver() -> tuple[int, int | None, Missing | None]:
    """Returns the number of visible GPUs, the CUDA version of the driver, and what is wrong with the driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0, None, None
    hardware = _pci_gpus()
    remedy = "install the NVIDIA driver, or start the container with --gpus all"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return hardware, None, Missing("driver", "libcuda.so.1 was not found", remedy) if hardware else None
    code = int(cuda.cuInit(0))
    if code == _NO_DEVICE:
        return 0, None, None
    if code:
        problem = Missing("driver", f"CUDA error {code} at start", "reboot or reinstall the NVIDIA driver")
        return hardware, None, problem if hardware else None
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if version.value < _OLDEST_CUDA:
        reason = f"it is made for CUDA {dotted(version.value)}; 12.0 or newer is needed"
        return count.value, version.value, Missing("driver", reason, "install a newer NVIDIA driver (525 or later)")
    return count.value, version.value, None


def _capability(gpu: int) -> tuple[int, int]:
    """Returns a GPU's compute capability, such as (9, 0)."""
    cuda, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    found = []
    for attribute in _CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, gpu)
        found.append(value.value)
    return found[0], found[1]


def _pci_gpus() -> int:
    """Counts the NVIDIA display and 3D controllers on the PCI bus, which are visible even without a driver."""
    found = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == _NVIDIA_VENDOR and kind.startswith("0x03")
    return found


@dataclass(frozen=True)
class _Package:
    """A library that has a separate wheel for each major version of CUDA.

    Attributes:
        what: the library's name.
        module: the module to import.
        wheel: the requirement to install; `{}` stands for the major version of CUDA.
        replaced: the packages to uninstall first; `{}` stands for the major version of CUDA.
        made_for: returns the major version of CUDA that the imported module was built for.
        oldest: the oldest supported version, (major, minor); None if any version will do.
        trial: tests the library on a GPU and raises an exception if it does not work; None if there is no test.
    """

    what: str
    module: str
    wheel: str
    replaced: str
    made_for: Callable[[Any], int]
    oldest: tuple[int, int] | None = None
    trial: Callable[[int], None] | None = None


def _trouble(package: _Package, driver: int | None, gpu: int | None, *, on_cpu: bool = False) -> Missing | None:
    """Returns what prevents the use of a package; None if it can be used.

    Args:
        package: the package to check.
        driver: the CUDA version of the driver, in the format of cuDriverGetVersion; None if unknown.
        gpu: the number of the GPU to test the package on. If None, the package only needs to be installed.
        on_cpu: whether to import the package and check its version even without a GPU.
    """
    suits = 13 if driver is None or driver >= 13_000 else 12
    install = f"pip install '{package.wheel.format(suits)}'"
    try:
        if importlib.util.find_spec(package.module) is None:
            return Missing(package.what, "not installed", install)
        if not on_cpu and (driver is None or gpu is None):
            return None
        module = importlib.import_module(package.module)
        made_for = package.made_for(module)
        # A newer minor version works, thanks to NVIDIA's minor-version compatibility.
        if driver is not None and made_for > driver // 1000:
            reason = f"made for CUDA {made_for}, and the driver is made for CUDA {dotted(driver)}"
            uninstall = f"pip uninstall -y {package.replaced.format(made_for)}"
            return Missing(package.what, reason, f"{uninstall} && {install}, or install a newer NVIDIA driver")
        if made_for == 12:  # it works with every driver, and wheels for two CUDA versions conflict
            install = f"pip install '{package.wheel.format(12)}'"
        if package.oldest and tuple(map(int, re.findall(r"\d+", module.__version__)[:2])) < package.oldest:
            needed = ".".join(map(str, package.oldest))
            return Missing(package.what, f"{module.__version__} is installed; {needed} or newer is needed", install)
        if package.trial and gpu is not None:
            package.trial(gpu)
    except ModuleNotFoundError:
        return Missing(package.what, "not installed", install)
    except Exception as exc:  # native libraries fail to load in many ways; all are handled alike
        text = " ".join(str(exc).split())[:200]
        if re.search("out of memory|busy or unavailable", text, re.IGNORECASE):
            remedy = "`nvidia-smi` shows which process holds it; end that process, or choose another GPU with --device"
            return Missing(f"GPU {gpu}", f"its memory is taken ({text})", remedy)
        state = "installed without NVRTC, its compiler" if "libnvrtc" in text else "installed, but not usable"
        return Missing(package.what, f"{state} ({text})", install)
    return None


def _try_cupy(gpu: int) -> None:
    """Tests everything that normalization needs on the GPU: compiling and running a kernel, and pinned memory."""
    block_while_waiting(gpu)
    import cupy

    with cupy.cuda.Device(gpu):
        number = cupy.zeros(1, cupy.int32)
        kernel = cupy.RawKernel('extern "C" __global__ void trial(int* number) { *number = 42; }', "trial")
        kernel((1,), (1,), (number,))
        number[cupy.asarray([0])] = cupy.asarray([42])  # runs one of CuPy's own kernels, which need the CUDA headers
        cupy.cuda.alloc_pinned_memory(number.nbytes)
        if int(number.get()[0]) != 42:
            raise RuntimeError("a kernel ran and left no result")


# DALI reports its CUDA version without dots: 13.4.92 is 13492, 12.9.86 is 12986.
_DALI = _Package(
    "DALI",
    "nvidia.dali",
    "nvidia-dali-cuda{}0>=2.4,<3",
    replaced="nvidia-dali-cuda{}0",
    made_for=lambda dali: int(str(dali.__cuda_version__)[:2]),
    oldest=(2, 4),
)
# CuPy needs NVRTC, which the extra [ctk] installs since CuPy 14. The remedy also uninstalls NVRTC for CUDA 13, because
# CuPy for CUDA 12 would prefer it to its own, and the code that it generates needs a newer driver.
_CUPY = _Package(
    "CuPy",
    "cupy",
    "cupy-cuda{}x[ctk]>=14",
    replaced="cupy-cuda{}x nvidia-cuda-nvrtc",
    made_for=lambda cupy: int(cupy.cuda.runtime.runtimeGetVersion()) // 1000,
    trial=_try_cupy,
)


def _cgroups() -> list[Path]:
    """Returns the folders of this process's control group and of those that contain it (kernel docs: cgroup-v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    names = [name for name in own.split("/") if name not in ("", "..")]  # ".." leads out of a container
    return [Path("/sys/fs/cgroup").joinpath(*names[:count]) for count in range(len(names), -1, -1)]


def _cgroup_quota() -> float:
    """Returns the lowest CPU quota of these groups in cores; infinity if there is none (cgroup-v2, sched-bwc)."""
    quotas = []
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(math.inf if quota == "max" else int(quota) / int(period))
    if quotas:
        return min(quotas)
    try:
        quota_us, period_us = (
            int(Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return math.inf
    return quota_us / period_us if quota_us > 0 else math.inf


def available_memory() -> int | None:
    """Returns the main memory that is free or reclaimable, within the groups' limits, in bytes; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, limit - used + int(cached[1] if cached else 0))
    return free
