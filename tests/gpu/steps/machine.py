"""The machine, the files to measure with, and what nvImageCodec logs in a build."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner import Context

from gpu_npz.audit.doctor import diagnose
from gpu_npz.bench.rates import folder_of, linked
from gpu_npz.config import BuildConfig
from gpu_npz.machine.environment import inspect, usable_cpus

_LOGGED_IMAGES = 4096
_TELLING = re.compile("hw|hardware|engine|prealloc|batch-single|error|warn", re.IGNORECASE)
_NOT_TELLING = re.compile(r"\x1b\[[0-9;]*m|0x[0-9a-f]+")  # colours and addresses
_LINES = 40


def machine(context: Context) -> dict[str, Any]:
    """Driver, engines and cores. Fails if a GPU was asked for and cannot be used."""
    findings = {finding.what: f"{'' if finding.ok else 'NOT OK: '}{finding.found}" for finding in diagnose()}
    query = "name,driver_version,memory.total,memory.used,clocks.max.sm,temperature.gpu,pcie.link.gen.current"
    processor = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    found = {
        "findings": findings,
        "nvidia-smi": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "lscpu": processor,
        "kernel": platform.release(),
        "memory": Path("/proc/meminfo").read_text().splitlines()[:3],
        "limits": {name: _read(f"/sys/fs/cgroup/{name}") for name in ("cpu.max", "memory.max")},
    }
    known = inspect(BuildConfig(device=context.device))
    if context.on_gpu and (known.missing or not known.gpus):
        raise RuntimeError("; ".join(map(str, known.missing)) or "no GPU is visible")
    threads = re.search(r"Thread\(s\) per core:\s*(\d+)", processor)
    return {
        **found,
        "summary": [
            f"{findings.get('GPU 0', findings['GPU'])}, {usable_cpus()} cores, {threads[1] if threads else '?'} a core",
            ", ".join(f"{name} {findings[name]}" for name in ("DALI", "CuPy", "JPEG engines") if name in findings),
        ],
    }


def files(context: Context) -> dict[str, Any]:
    """Hard links to copies of the files of SRC, as many as the context says."""
    linked(context.src, context.many, context.images)
    return {"summary": [f"{context.images} files in {context.many}"]}


def logged_build(context: Context, load: float | None) -> dict[str, Any]:
    """A build in a process that logs what nvImageCodec does, and how busy the JPEG engines are."""
    with folder_of(Path(context.place, "out")) as out, engine_use() as percents:
        options = ["--device", context.device, "--workers", "0", "--dtype", "uint8", "--max-rejects", "100%"]
        options += ["--require-gpu"] if context.on_gpu else []
        options += ["--backend", "dali", "--limit", str(min(_LOGGED_IMAGES, context.images)), "--quiet"]
        options += [] if load is None else ["--hw-decoder-load", str(load)]
        program = [sys.executable, "-m", "gpu_npz", "build", str(context.many), str(out), *options]
        environment = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "3"}
        start = time.monotonic()
        done = subprocess.run(program, env=environment, capture_output=True, text=True, errors="replace", check=False)
        seconds = time.monotonic() - start
    log = (done.stdout + done.stderr).splitlines()
    if done.returncode:
        raise RuntimeError("\n".join([*log, f"exit status {done.returncode}"][-_LINES:]))
    lines = Counter(_NOT_TELLING.sub("", line) for line in log if _TELLING.search(line))
    engines = re.findall(r"num_hw_engines=(\d+)", "\n".join(log))
    return {
        "log": [f"{count} x {line}" for line, count in lines.most_common(_LINES)],
        "last lines": log[-_LINES // 2 :],
        "engine_percents": percents,
        "summary": [
            f"{seconds:.1f} s, {len(log)} lines, num_hw_engines {sorted(set(engines))}, "
            f"engines at most {max(percents, default='?')}% busy"
        ],
    }


@contextlib.contextmanager
def engine_use() -> Iterator[list[int]]:
    """How busy the first GPU's JPEG engines are while the body runs, in percent, by NVML; empty if it is not known."""
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        device, percent, period = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return
        while not over.wait(0.1):
            if not nvml.nvmlDeviceGetJpgUtilization(device, ctypes.byref(percent), ctypes.byref(period)):
                seen.append(percent.value)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(1)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None
