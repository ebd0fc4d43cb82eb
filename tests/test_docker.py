"""The container files, as far as they can be tried without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpu_npz.audit import doctor
from gpu_npz.machine.environment import Machine

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"


def run_lines(path: Path) -> list[str]:
    """What each RUN of a Dockerfile runs, on one line each."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return re.findall(r"^RUN (.*)$", re.sub(r"\\\n\s*", "", text), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cc") is None or not Path("/usr/include/jpeglib.h").exists(),
    reason="needs a C compiler and the headers of libjpeg",
)
def test_the_cpu_image_installs_gpu_npz_with_pillow_simd(tmp_path: Path) -> None:
    (install,) = [line for line in run_lines(DOCKER / "Dockerfile.cpu") if "venv" in line]
    source = tmp_path / "src"
    for name in ("pyproject.toml", "README.md", "LICENSE", "pipelines", "cli"):  # what the file copies
        assert f" {name} " in (DOCKER / "Dockerfile.cpu").read_text()
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    command = install.replace("/opt/venv", str(tmp_path / "venv")).replace("/src[simd]", f"{source}[simd]")
    subprocess.run(["bash", "-euc", command], check=True, cwd=tmp_path)
    program = "from gpu_npz.preprocess.resize import is_simd; assert is_simd()"
    subprocess.run([tmp_path / "venv/bin/python", "-c", program], check=True, cwd=tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        [DOCKER / "start-cpu", "--version"], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("gpu-npz ")


def test_the_cpu_image_says_so_where_the_processor_has_no_avx2(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu sse sse2 avx avx512f\n")
    environment = {**os.environ, "CPUINFO": str(tmp_path / "cpuinfo")}
    done = subprocess.run([DOCKER / "start-cpu"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs a processor with AVX2" in done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_runs_gpu_npz_as_a_user_without_rights(name: str) -> None:
    lines = (DOCKER / name).read_text().splitlines()
    assert lines.index("USER 10001") > max(number for number, line in enumerate(lines) if line.startswith("RUN"))
    assert ("ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in lines) == (name == "Dockerfile")


@pytest.mark.parametrize(
    ("capabilities", "hidden"), [(None, False), ("all", False), ("compute,video", False), ("compute,utility", True)]
)
def test_doctor_notices_that_a_container_hides_the_hardware_jpeg_engines(
    capabilities: str | None, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "inspect", lambda *_: Machine(1, 13_000, None, None, None))
    monkeypatch.setattr(doctor, "_VIDEO_LIBRARY", "libc.so.6")  # any that can be loaded
    if capabilities is None:
        monkeypatch.delenv("NVIDIA_DRIVER_CAPABILITIES", raising=False)
    else:
        monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", capabilities)
    found = {finding.what: finding for finding in doctor.diagnose()}
    assert ("JPEG engines" in found) == hidden
    assert not hidden or "video" in found["JPEG engines"].remedy


def test_doctor_notices_that_the_drivers_video_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "inspect", lambda *_: Machine(1, 13_000, None, None, None))
    monkeypatch.setattr(doctor, "_VIDEO_LIBRARY", "libnvcuvid-is-not-here.so.1")
    (found,) = [finding for finding in doctor.diagnose() if finding.what == "JPEG engines"]
    assert "libnvcuvid-is-not-here.so.1" in found.found
    assert found.remedy.endswith("docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video ...")
