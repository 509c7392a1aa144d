"""Says what is installed and what will compute, for bug reports: ``python -m topr_kernels``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from topr_kernels import __version__, kernels
from topr_kernels.kernels import native_library

#: What the package runs beside; the first four it needs for one thing or another.
PACKAGES = ("triton", "transformers", "accelerate", "flash-attn", "trl", "peft", "verl", "vllm")
INSTRUCTION_SETS = {1: "baseline", 2: "AVX2", 3: "AVX-512"}


def report() -> Iterator[str]:
    """Lines of "what: value"."""
    yield f"topr_kernels: {__version__} in {Path(__file__).parent}"
    yield f"python: {platform.python_version()} on {platform.platform()}"
    yield f"torch: {torch.__version__}"
    yield "beside it: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    name = cpu_name() or platform.processor() or "unknown"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield f"processor: {name} ({platform.machine()}), {threads}"
    yield f"native library: {native()}"
    yield f"devices: {devices()}"
    yield f'impl="auto" on a CPU: {"native" if kernels.native_serves() else "torch"}'
    triton = "triton" if find_spec("triton") else "torch, as triton is not installed"
    yield f'impl="auto" on CUDA: {triton}'


def version(package: str) -> str:
    """Version of an installed package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def cpu_name() -> str:
    """Name of the CPU as Linux has it, "" elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def native() -> str:
    """Whether the compiled library loads, and what it was built for; or why not."""
    try:
        library = native_library.library()
    except ImportError as error:
        return f"not used: {error}"
    used = native_library.instruction_set() or library.topr_isa_available()
    threads = "with threads" if library.topr_parallel() else "serial"
    return f"{native_library.PATH}, {INSTRUCTION_SETS[used]}, {threads}"


def devices() -> str:
    """The CUDA devices that torch sees, with their architecture."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(names)


if __name__ == "__main__":
    sys.stdout.write("\n".join(report()) + "\n")
