"""A CUDA device that is not there, for every python that gpu_suite.sh starts: a rehearsal of it.

Python imports a module of this name by itself, so the folder on PYTHONPATH is all that is needed.
Tensors "on cuda" lie on the CPU, Triton kernels run as compiled for sm_90 on the executor, time is that
of the CPU, and the benchmarks' cases are tiny whatever their names say.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from ptx import launch
from torch.overrides import TorchFunctionMode

from benchmarks import data
from benchmarks.suites import accuracy, end_to_end
from topr_kernels import kernels


class Event:
    """``torch.cuda.Event`` by the CPU's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e3 * (other.at - self.at), 1e-3)


class OnTheHost(TorchFunctionMode):
    """Takes "cuda" for "cpu" wherever torch is given a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        args = tuple(on_the_host(a) for a in args)
        return function(*args, **{k: on_the_host(v) for k, v in (kw or {}).items()})


def on_the_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def pretend() -> None:
    """Puts the device and the tiny cases in place, for the life of this process."""
    waits = mock.Mock(return_value=None)
    cuda = {
        **{"is_available": lambda: True, "get_device_name": lambda *_: "no device", "Event": Event},
        **dict.fromkeys(("synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats"), waits),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0),
        "current_device": lambda: 0,
        "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=4),
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    half = (torch.float32, torch.bfloat16, torch.float16)
    automatic = kernels._automatic
    kernels._automatic = lambda x: "triton" if x.dtype in half else automatic(x)
    logits, linear, step, long = (
        *(data.logits_case, data.linear_case),
        *(end_to_end.Step, accuracy.long_case),
    )
    data.logits_case = lambda device, dtype, *_: logits("cpu", dtype, 16, 97)  # type: ignore[assignment]
    data.linear_case = lambda device, dtype, *_, **__: linear("cpu", dtype, True, **data.TINY)  # type: ignore[assignment]
    end_to_end.Step = lambda name, *rest: step("tiny", *rest)  # type: ignore[assignment,misc]
    accuracy.LENGTHS["cuda"] = (4, 8)
    accuracy.long_case = lambda t, tokens, *_: long(t, tokens, "cpu", True)
    for context in (launch.device(), OnTheHost()):
        context.__enter__()
        # What ends with its last reference would end here.
        KEPT.append(context)


KEPT: list[Any] = []
pretend()
