"""Which backend a build gets on which machine, that a resumed build never falls back, and how many cores count."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import MakeTree, edit_json, python

from gpu_npz.builder.build import build
from gpu_npz.config import BuildConfig
from gpu_npz.errors import BackendError, MismatchError, UsageError
from gpu_npz.machine import environment
from gpu_npz.machine.environment import Choice, Machine, Missing, available_memory, choose, inspect, usable_cpus

DRIVER = Missing("driver", "libcuda.so.1 was not found", "install the NVIDIA driver")
DALI = Missing("DALI", "not installed", "pip install 'nvidia-dali-cuda130>=2.4,<3'")
CUPY = Missing("CuPy", "not installed", "pip install 'cupy-cuda13x[ctk]>=14'")


def machine(
    gpus: int, *, driver: Missing | None = None, dali: Missing | None = None, cupy: Missing | None = None
) -> Machine:
    return Machine(gpus, 13_000 if gpus and not driver else None, driver, dali, cupy)


GPU_NODE, FOUR_GPUS, LAPTOP = machine(1), machine(4), machine(0, dali=DALI, cupy=CUPY)
HALF_READY = {
    "driver": machine(1, driver=DRIVER),
    "DALI": machine(1, dali=DALI),
    "CuPy": machine(1, cupy=CUPY),
    "all three": machine(1, driver=DRIVER, dali=DALI, cupy=CUPY),
}


# The table of README.md, line by line


@pytest.mark.parametrize(
    ("device", "gpus"), [("auto", [0]), ("0", [0]), ("3", [3]), ("2, 0", [2, 0]), ("all", range(4))]
)
def test_a_usable_gpu_is_taken(device: str, gpus: Sequence[int]) -> None:
    assert choose(BuildConfig(device=device), FOUR_GPUS) == Choice("dali", tuple(gpus))
    assert choose(BuildConfig(device=device, backend="dali", require_gpu=True), FOUR_GPUS).device == "cuda"


@pytest.mark.parametrize("device", ["auto", "0"])
def test_without_a_gpu_a_build_goes_to_the_cpu_with_a_warning(device: str) -> None:
    choice = choose(BuildConfig(device=device), LAPTOP)
    assert (choice.backend, choice.gpu, choice.device) == ("pillow", None, "cpu")
    assert choice.warning
    assert "no GPU found, using the CPU" in choice.warning


@pytest.mark.parametrize("part", HALF_READY)
def test_auto_on_a_gpu_that_lacks_a_part_goes_to_the_cpu_and_says_what_to_install(part: str) -> None:
    choice = choose(BuildConfig(), HALF_READY[part])
    assert (choice.backend, choice.gpu) == ("pillow", None)
    assert choice.warning
    assert "the GPU cannot be used" in choice.warning
    assert all(missing.remedy in choice.warning for missing in HALF_READY[part].missing)


@pytest.mark.parametrize("part", HALF_READY)
@pytest.mark.parametrize("asked", [{"device": "0"}, {"device": "auto", "require_gpu": True}], ids=["0", "require-gpu"])
def test_a_gpu_that_was_asked_for_and_lacks_a_part_is_an_error_that_says_what_to_install(
    part: str, asked: dict[str, Any]
) -> None:
    with pytest.raises(BackendError) as caught:
        choose(BuildConfig(**asked), HALF_READY[part])
    assert caught.value.exit_code == 1
    assert all(missing.remedy in str(caught.value) for missing in HALF_READY[part].missing)


@pytest.mark.parametrize("device", ["auto", "0"])
def test_require_gpu_without_a_gpu_is_an_error(device: str) -> None:
    with pytest.raises(BackendError, match="a GPU is required, and no NVIDIA GPU is visible") as caught:
        choose(BuildConfig(device=device, require_gpu=True), LAPTOP)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("node", "known"), [(GPU_NODE, "one usable GPU, number 0$"), (machine(2), "2 usable GPU.*numbered 0 to 1$")]
)
def test_a_gpu_number_that_the_machine_does_not_have_is_a_usage_error(node: Machine, known: str) -> None:
    for device in ("3", "0,3"):
        with pytest.raises(UsageError, match=f"--device: got {device}.*{known}") as caught:
            choose(BuildConfig(device=device), node)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("node", [GPU_NODE, machine(0), machine(1, driver=DRIVER, cupy=CUPY)])
def test_dali_on_the_cpu_needs_dali_and_nothing_else(node: Machine) -> None:
    pytest.importorskip("nvidia.dali")
    assert choose(BuildConfig(backend="dali", device="cpu"), node) == Choice("dali")


def test_dali_on_the_cpu_that_is_too_old_is_an_error_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    dali = pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(dali, "__version__", "1.99.0")
    config = BuildConfig(backend="dali", device="cpu")
    with pytest.raises(
        BackendError, match=r"--backend dali: DALI: 1\.99\.0 is installed; 2\.4 or newer is needed; pip i"
    ):
        choose(config, inspect(config))
    monkeypatch.setattr(dali, "__version__", "10.0")
    assert choose(config, inspect(config)) == Choice("dali")


@pytest.mark.parametrize("node", [LAPTOP, machine(1, dali=DALI)])
def test_dali_on_the_cpu_without_dali_is_an_error_with_the_install_line(node: Machine) -> None:
    with pytest.raises(BackendError, match="--backend dali: DALI: not installed; pip install"):
        choose(BuildConfig(backend="dali", device="cpu"), node)


@pytest.mark.parametrize("node", [LAPTOP, machine(1, dali=DALI)])
def test_dali_that_would_fall_back_to_the_cpu_still_needs_dali(node: Machine) -> None:
    with pytest.raises(BackendError, match="pip install 'nvidia-dali"):
        choose(BuildConfig(backend="dali"), node)


def test_dali_without_a_gpu_goes_to_dalis_cpu_operators_with_a_warning() -> None:
    pytest.importorskip("nvidia.dali")
    choice = choose(BuildConfig(backend="dali"), machine(0))
    assert (choice.backend, choice.device) == ("dali", "cpu")
    assert choice.warning
    assert "using the CPU with dali" in choice.warning


def test_pillow_on_a_gpu_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--backend pillow cannot use GPU 0") as caught:
        BuildConfig(backend="pillow", device="0")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="contradict"):
        choose(BuildConfig(backend="pillow", require_gpu=True), GPU_NODE)
    with pytest.raises(UsageError, match="contradict"):
        BuildConfig(device="cpu", require_gpu=True)


@pytest.mark.parametrize("node", [LAPTOP, GPU_NODE, HALF_READY["all three"]])
@pytest.mark.parametrize("asked", [{"device": "cpu"}, {"backend": "pillow"}], ids=["cpu", "pillow"])
def test_the_cpu_that_was_asked_for_is_taken_without_a_warning(node: Machine, asked: dict[str, str]) -> None:
    assert choose(BuildConfig(**asked), node) == Choice("pillow")


# What is found here


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_a_machine_whose_gpus_are_hidden_has_none_and_loads_nothing_to_find_out(hidden: str) -> None:
    code = (
        "import sys\nfrom gpu_npz.machine.environment import inspect\nfound = inspect()\n"
        "print(found.gpus, found.driver, [name for name in ('nvidia.dali', 'cupy') if name in sys.modules])"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": hidden}
    result = python("-c", code, env=environ)
    assert result.stdout.split("\n")[0] == "0 None []"


def test_hidden_gpus_send_a_build_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose(BuildConfig(), inspect()).device == "cpu"
    with pytest.raises(BackendError):
        choose(BuildConfig(require_gpu=True), inspect())


def test_a_package_that_is_not_installed_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = inspect().cupy
    assert found is not None
    assert (found.what, found.reason) == ("CuPy", "not installed")
    assert found.remedy == CUPY.remedy


@pytest.mark.gpu
def test_a_gpu_node_is_found_to_be_one() -> None:
    found = inspect()
    assert found.gpus > 0
    assert not found.missing
    assert choose(BuildConfig(require_gpu=True), found) == Choice("dali", (0,))


# Bad surroundings, through the command: a driver, a DALI and a CuPy of our own, which fail as the real ones do

LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>
static int given(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
int cuInit(unsigned flags) { return given("FAKE_INIT", 0); }
int cuDeviceGetAttribute(int *value, int attribute, int gpu) {
  *value = given(attribute == 75 ? "FAKE_MAJOR" : "FAKE_MINOR", attribute == 75 ? 9 : 0);
  return 0;
}
int cuDevicePrimaryCtxSetFlags_v2(int gpu, unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = given("FAKE_CUDA", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = given("FAKE_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA Pretence", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 80ul << 30; return 0; }
int cuDeviceGetPCIBusId(char *bus, int size, int device) { strncpy(bus, "0000:17:00.0", size); return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) {
    *handle = &given;
    return strcmp(bus, "0000:17:00.0") != 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 80ull << 30; memory[1] = 3ull << 29; memory[2] = memory[0] - memory[1];
    return handle != &given;
}
"""
FAKE_DALI = """
import os
exec(os.environ.get("FAKE_DALI", ""))
__cuda_version__ = int(os.environ.get("FAKE_DALI_CUDA", "13492"))
__version__ = os.environ.get("FAKE_DALI_VERSION", "2.4.0")
"""
FAKE_CUPY = """
import contextlib, os, types
import numpy
from numpy import asarray, int32
gpu, version = None, int(os.environ.get("FAKE_CUPY_CUDA", "13020"))
class Array:
    nbytes = 4
    def __init__(self): self.values = numpy.zeros(1, int32)
    def get(self): return self.values
    def __setitem__(self, place, values): exec(os.environ.get("FAKE_CUPY_INDEXING", ""))
def zeros(count, dtype): return Array()
@contextlib.contextmanager
def device(number):
    global gpu
    gpu = number
    yield
def RawKernel(source, name):
    assert f"void {name}(" in source
    def launch(grid, block, args):
        args[0].values[0] = 42
        exec(os.environ.get("FAKE_CUPY", ""), {"gpu": gpu, "result": args[0].values})
    return launch
cuda = types.SimpleNamespace(
    Device=device, alloc_pinned_memory=bytearray, runtime=types.SimpleNamespace(runtimeGetVersion=lambda: version)
)
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def pretence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1, libnvidia-ml.so.1, cupy and nvidia.dali, to be steered by FAKE_* variables."""
    root = tmp_path_factory.mktemp("pretence")
    for name, content in {"cupy": FAKE_CUPY, "nvidia": "", "nvidia/dali": FAKE_DALI}.items():
        (root / name).mkdir()
        (root / name / "__init__.py").write_text(content)
    (root / "cuda.c").write_text(LIBCUDA)
    library = root / "libcuda.so.1"
    subprocess.run([shutil.which("cc") or "cc", "-shared", "-fPIC", "-o", library, root / "cuda.c"], check=True)
    shutil.copy(library, root / "libnvidia-ml.so.1")
    return root


@pytest.fixture
def run_with(pretence: Path) -> Run:
    """`run_with({"FAKE_CUDA": "12040"}, "doctor")`: the command on a machine with one GPU, unless told otherwise."""
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}

    def run(fakes: dict[str, str], *args: str | Path) -> subprocess.CompletedProcess[str]:
        environ = {**kept, "LD_LIBRARY_PATH": str(pretence), "PYTHONPATH": str(pretence), "COLUMNS": "1000", **fakes}
        return python("-m", "gpu_npz", *args, status=None, env=environ)

    return run


pretending = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler for a driver of our own"
)
OLD_DRIVER = {"FAKE_CUDA": "12040"}
FOR_12 = {"FAKE_DALI_CUDA": "12986", "FAKE_CUPY_CUDA": "12090"}
NO_NVRTC = "raise RuntimeError('Failure finding \"libnvrtc.so.13 or libnvrtc.so.12\": No such file')"
TAKEN = "raise MemoryError('Out of memory allocating 512 bytes (allocated so far: 0 bytes).')"
BAD = {
    "DALI too new for the driver": (
        {**OLD_DRIVER, "FAKE_CUPY_CUDA": "12090"},
        "  DALI: made for CUDA 13, and the driver is made for CUDA 12.4; pip uninstall -y nvidia-dali-cuda130 && "
        "pip install 'nvidia-dali-cuda120>=2.4,<3', or install a newer NVIDIA driver\n",
    ),
    "CuPy too new for the driver": (
        {**OLD_DRIVER, "FAKE_DALI_CUDA": "12986"},
        "  CuPy: made for CUDA 13, and the driver is made for CUDA 12.4; pip uninstall -y cupy-cuda13x "
        "nvidia-cuda-nvrtc && pip install 'cupy-cuda12x[ctk]>=14', or install a newer NVIDIA driver\n",
    ),
    "a driver too old for anything": (
        {"FAKE_CUDA": "11040"},
        "  driver: it is made for CUDA 11.4; 12.0 or newer is needed; install a newer NVIDIA driver (525 or later)\n",
    ),
    "CuPy without NVRTC": (
        {"FAKE_CUPY": NO_NVRTC},
        '  CuPy: installed without NVRTC, its compiler (Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such '
        "file); pip install 'cupy-cuda13x[ctk]>=14'\n",
    ),
    "CuPy without CUDA's headers": (
        {"FAKE_CUPY_INDEXING": "raise RuntimeError('cannot open source file cuda_fp16.h')"},
        "  CuPy: installed, but not usable (cannot open source file cuda_fp16.h); "
        "pip install 'cupy-cuda13x[ctk]>=14'\n",
    ),
    "CuPy for CUDA 12 without NVRTC on a newer driver": (
        {"FAKE_CUPY": NO_NVRTC, **FOR_12},
        "; pip install 'cupy-cuda12x[ctk]>=14'\n",
    ),
    "no DALI": (
        {"FAKE_DALI": "raise ModuleNotFoundError('nvidia.dali')"},
        "  DALI: not installed; pip install 'nvidia-dali-cuda130>=2.4,<3'\n",
    ),
    "no CuPy": (
        {"FAKE_CUPY": "raise ModuleNotFoundError('cupy')", **OLD_DRIVER, **FOR_12},
        "  CuPy: not installed; pip install 'cupy-cuda12x[ctk]>=14'\n",
    ),
    "DALI that is too old": (
        {"FAKE_DALI_VERSION": "1.51.2"},
        "  DALI: 1.51.2 is installed; 2.4 or newer is needed; pip install 'nvidia-dali-cuda130>=2.4,<3'\n",
    ),
    "DALI for CUDA 12 that is too old, on a newer driver": (
        {"FAKE_DALI_VERSION": "2.3.0.dev20260101", "FAKE_DALI_CUDA": "12986"},
        "  DALI: 2.3.0.dev20260101 is installed; 2.4 or newer is needed; pip install 'nvidia-dali-cuda120>=2.4,<3'\n",
    ),
    "DALI that cannot be loaded": (
        {"FAKE_DALI": "raise OSError('libnvjpeg.so.13: cannot\\nopen')"},
        "  DALI: installed, but not usable (libnvjpeg.so.13: cannot open); pip install 'nvidia-dali-cuda130>=2.4,<3'\n",
    ),
    "a kernel that does nothing": (
        {"FAKE_CUPY": "result[:] = 0"},
        "  CuPy: installed, but not usable (a kernel ran and left no result); pip install 'cupy-cuda13x[ctk]>=14'\n",
    ),
    "memory taken": (
        {"FAKE_CUPY": TAKEN},
        "  GPU 0: its memory is taken (Out of memory allocating 512 bytes (allocated so far: 0 bytes).); `nvidia-smi` "
        "shows which process holds it; end that process, or choose another GPU with --device\n",
    ),
    "memory taken, as CUDA says it": (
        {"FAKE_CUPY": "raise RuntimeError('cudaErrorMemoryAllocation: out of memory')"},
        "  GPU 0: its memory is taken (cudaErrorMemoryAllocation: out of memory); `nvidia-smi` shows",
    ),
}


@pretending
@pytest.mark.parametrize("bad", BAD)
def test_a_gpu_in_bad_surroundings_that_was_asked_for_is_an_error_with_the_remedy(
    bad: str, run_with: Run, make_tree: MakeTree, tmp_path: Path
) -> None:
    fakes, message = BAD[bad]
    result = run_with(fakes, "build", make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out", "--device", "0")
    assert result.returncode == 1, result.stderr
    assert "the GPU cannot be used:\n" in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out/.gpu-npz/job.json").exists()


@pretending
@pytest.mark.parametrize("bad", ["DALI too new for the driver", "CuPy without NVRTC", "memory taken"])
def test_a_gpu_in_bad_surroundings_sends_auto_to_the_cpu_with_a_warning_and_the_remedy(
    bad: str, run_with: Run, make_tree: MakeTree, tmp_path: Path
) -> None:
    (fakes, message), out = BAD[bad], tmp_path / "out"
    result = run_with(fakes, "build", make_tree({"a/1.jpg": "jpeg"}), out, "--size", "16")
    assert result.returncode == 0, result.stderr
    assert "the GPU cannot be used, using the CPU with pillow" in result.stderr
    assert message.rstrip() in result.stderr
    assert (out / "dataset.json").exists()


@pretending
@pytest.mark.parametrize(
    "bad", [OLD_DRIVER, {"FAKE_CUPY": TAKEN}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": ""}], ids=str
)
def test_require_gpu_where_none_can_be_used_is_an_error(
    bad: dict[str, str], run_with: Run, make_tree: MakeTree, tmp_path: Path
) -> None:
    result = run_with(bad, "build", make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out", "--require-gpu")
    assert result.returncode == 1
    assert "GPU" in result.stderr
    assert not (tmp_path / "out/.gpu-npz/job.json").exists()


@pretending
@pytest.mark.parametrize("bad", [{}, OLD_DRIVER], ids=str)
def test_a_gpu_number_beyond_the_last_is_a_usage_error_whatever_else_is_wrong(
    bad: dict[str, str], run_with: Run, make_tree: MakeTree, tmp_path: Path
) -> None:
    result = run_with(bad, "build", make_tree({"a/1.jpg": "jpeg"}), tmp_path / "out", "--device", "3")
    assert result.returncode == 2
    assert "got 3; this machine has one usable GPU, number 0" in result.stderr


@pretending
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_send_a_build_to_the_cpu_and_doctor_says_what_hides_them(
    hidden: str, run_with: Run, make_tree: MakeTree, tmp_path: Path
) -> None:
    fakes, out = {"CUDA_VISIBLE_DEVICES": hidden}, tmp_path / "out"
    result = run_with(fakes, "build", make_tree({"a/1.jpg": "jpeg"}), out, "--size", "16", "--device", "0")
    assert result.returncode == 0, result.stderr
    assert "no GPU found, using the CPU with pillow" in result.stderr
    assert (out / "dataset.json").exists()
    shown = run_with(fakes, "doctor").stdout
    assert f"none visible, and CUDA_VISIBLE_DEVICES is {hidden!r}" in shown
    assert "-> unset CUDA_VISIBLE_DEVICES" in shown


@pretending
def test_doctor_tells_the_gpus_with_their_memory_and_what_is_wrong(run_with: Run) -> None:
    result = run_with({"FAKE_GPUS": "2", "FAKE_CUPY": NO_NVRTC}, "doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert found["GPU"]["found"] == "2 visible, driver for CUDA 13.0"
    assert found["GPU 0"]["found"] == found["GPU 1"]["found"] == "NVIDIA Pretence, 80.0 GiB, 1.5 GiB free"
    assert found["DALI"]["ok"]
    assert (found["CuPy"]["ok"], found["CuPy"]["remedy"]) == (False, CUPY.remedy)


@pretending
@pytest.mark.parametrize(("device", "taken"), [("auto", True), ("0", True), ("1", False), ("2", False)])
def test_the_gpu_that_is_asked_for_is_the_one_that_is_tried(device: str, taken: bool, pretence: Path) -> None:
    program = (
        "from gpu_npz.machine.environment import BuildConfig, inspect\n"
        f"print(*inspect(BuildConfig(device={device!r})).missing)"
    )
    fakes = {"FAKE_GPUS": "2", "FAKE_CUPY": f"if gpu != 1: {TAKEN}"}
    environ = {**os.environ, "LD_LIBRARY_PATH": str(pretence), "PYTHONPATH": str(pretence), **fakes}
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    result = python("-c", program, env=environ)
    assert ("GPU 0: its memory is taken" in result.stdout) == taken
    assert taken or result.stdout == "\n"


@pretending
@pytest.mark.parametrize("fits", [FOR_12, {**FOR_12, **OLD_DRIVER}, {"FAKE_DALI_CUDA": "124127"}], ids=str)
def test_within_a_major_version_of_cuda_and_below_it_every_driver_will_do(fits: dict[str, str], run_with: Run) -> None:
    found = json.loads(run_with(fits, "doctor", "--json").stdout)
    assert {finding["what"]: finding["ok"] for finding in found if finding["what"] in ("GPU", "DALI", "CuPy")} == {
        "GPU": True, "DALI": True, "CuPy": True,
    }  # fmt: skip


# Once planned, never another


@pytest.fixture
def begun(make_tree: MakeTree, tmp_path: Path) -> tuple[Path, Path]:
    """SRC, and an OUT with one of two shards, begun on the CPU with Pillow."""
    src, out = make_tree({"a/1.jpg": "jpeg", "b/2.jpg": "jpeg"}), tmp_path / "out"
    build(src, out, SMALL)
    (out / ".gpu-npz/commits/shard-00001.json").unlink()
    return src, out


SMALL = BuildConfig(size=16, shard_size=1, workers=0, device="cpu")


def begin_with(out: Path, backend: str, device: str) -> None:
    """Makes OUT one that was begun with another backend."""
    edit_json(out / ".gpu-npz/job.json", lambda job: job.update(backend=backend, device=device))


def asking(**values: Any) -> BuildConfig:
    return SMALL.model_copy(update={"device": "auto", **values})


@pytest.mark.parametrize("asked", [{}, {"backend": "dali"}, {"device": "0"}, {"require_gpu": True}], ids=str)
def test_what_was_begun_on_a_gpu_does_not_go_on_without_one(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    src, out = begun
    begin_with(out, "dali", "cuda")
    monkeypatch.setattr(environment, "inspect", lambda *_: LAPTOP)
    with pytest.raises(BackendError, match=r"started with backend dali on cuda.*no NVIDIA GPU is visible") as caught:
        build(src, out, asking(**asked))
    assert caught.value.exit_code == 1
    monkeypatch.setattr(environment, "inspect", lambda *_: HALF_READY["DALI"])
    with pytest.raises(BackendError, match="pip install 'nvidia-dali"):
        build(src, out, asking(**asked))
    assert not (out / ".gpu-npz/commits/shard-00001.json").exists()


def test_what_was_begun_with_dali_on_the_cpu_does_not_go_on_without_dali(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = begun
    begin_with(out, "dali", "cpu")
    monkeypatch.setattr(environment, "inspect", lambda *_: LAPTOP)
    with pytest.raises(BackendError, match="pip install 'nvidia-dali"):
        build(src, out, asking())


@pytest.mark.parametrize(
    ("backend", "device", "asked"),
    [
        ("dali", "cuda", {"device": "cpu"}),
        ("dali", "cuda", {"backend": "pillow"}),
        ("dali", "cpu", {"backend": "pillow"}),
        ("pillow", "cpu", {"backend": "dali"}),
        ("pillow", "cpu", {"require_gpu": True}),
        ("dali", "cpu", {"require_gpu": True}),
    ],
)
def test_another_backend_than_the_one_begun_with_is_refused(
    begun: tuple[Path, Path], backend: str, device: str, asked: dict[str, Any]
) -> None:
    src, out = begun
    begin_with(out, backend, device)
    with pytest.raises(MismatchError, match=f"started with backend {backend} on {device}") as caught:
        build(src, out, asking(**asked))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("device", ["auto", "cpu", "0"])
def test_what_was_begun_on_the_cpu_goes_on_there_on_a_gpu_node_too(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    src, out = begun
    monkeypatch.setattr(environment, "inspect", lambda *_: FOUR_GPUS)
    report = build(src, out, asking(device=device))
    assert (report.complete, report.backend, report.device) == (True, "pillow", "cpu")
    assert ("continues there, not on GPU 0" in caplog.text) == (device == "0")


# Cores


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder for the control group's files, empty."""
    monkeypatch.setattr(environment, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    return tmp_path / "sys/fs/cgroup"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_only_cores_of_the_processor_affinity_count() -> None:
    code = (
        "import os\nfrom gpu_npz.machine.environment import usable_cpus\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(usable_cpus())"
    )
    result = python("-c", code)
    assert result.stdout == "1\n"
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9900000 100000\n", 8),
        ("", 8),
        ("nonsense\n", 8),
    ],
)
def test_the_quota_of_the_control_group_limits_the_cores(system: Path, content: str, cores: int) -> None:
    (system / "cpu.max").write_text(content)
    assert usable_cpus() == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (300_000, 3), (1000, 1)])
def test_the_quota_of_an_older_control_group_limits_the_cores(system: Path, quota: int, cores: int) -> None:
    (system / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (system / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus() == cores


def test_without_a_control_group_all_cores_of_the_affinity_count(system: Path) -> None:
    assert usable_cpus() == 8


@pytest.mark.parametrize("own", ["/", "/job", "/../job/step"])
def test_the_lowest_limit_of_a_control_group_and_those_around_it_counts(system: Path, own: str) -> None:
    root = system.parents[2]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/other\n0::{own}\n")
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory() == 8000 * 1024
    (system / "job/step").mkdir(parents=True)
    for group, cores, limit in (("", 5, "max"), ("job", 3, "5000000"), ("job/step", 4, "6000000")):
        (system / group / "cpu.max").write_text(f"{cores}00000 100000\n")
        (system / group / "memory.max").write_text(f"{limit}\n")
        (system / group / "memory.current").write_text("2000000\n")
        (system / group / "memory.stat").write_text("anon 5\ninactive_file 500000\nactive_file 7\n")
    assert usable_cpus() == (5 if own == "/" else 3)
    assert available_memory() == (8000 * 1024 if own == "/" else 3_500_000)
