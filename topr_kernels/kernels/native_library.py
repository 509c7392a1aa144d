"""The compiled CPU library: finds it, loads it with ctypes, calls its functions with a params struct.

Loaded when an implementation asks for it, after torch: then the dynamic linker gives both the same
OpenMP runtime, one pool of threads instead of two that spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

#: Where setup.py puts the library.
PATH = Path(__file__).parent.parent / f"_native.{'dll' if sys.platform == 'win32' else 'so'}"

#: What setup.py leaves in its place where it tried and could not: the reason.
REASON = PATH.with_name("_native_missing.txt")

_INT32, _INT64, _DOUBLE, _POINTER = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_double,
    ctypes.c_void_p,
)


class Params(ctypes.Structure):
    """``topr_params`` of csrc/topr_kernels.h, which says what the fields mean."""

    _fields_ = [
        ("size", _INT64),
        *((name, _INT32) for name in ("threads", "isa", "dtype", "shift", "entropy", "grad")),
        *((n, _INT32) for n in ("ratio", "reduction", "behavior_dtype", "behavior_per_sequence")),
        *((name, _DOUBLE) for name in ("logit_scale", "softcap", "temperature")),
        *((name, _INT64) for name in ("outer", "time", "vocab")),
        *((name, _INT64) for name in ("stride_outer", "stride_time", "stride_vocab")),
        ("logits", _POINTER),
        ("gradient_stride_outer", _INT64),
        ("gradient_stride_time", _INT64),
        ("gradient_stride_vocab", _INT64),
        ("gradient", _POINTER),
        ("labels", _POINTER),
        ("offsets", _POINTER),
        ("sequences", _INT64),
        *((name, _POINTER) for name in ("log_prob", "lse", "lse_low", "row_entropy")),
        *((name, _POINTER) for name in ("d_log_prob", "d_loss", "loss_denominator")),
        *((name, _POINTER) for name in ("behavior_log_prob", "reward", "normalizer")),
        *((n, _DOUBLE) for n in ("log_pos_min", "log_pos_max", "log_neg_min", "log_neg_max")),
        *((name, _POINTER) for name in ("loss", "denominator", "token_log_ratio")),
        *((name, _POINTER) for name in ("log_ratio", "weight", "objective", "length")),
        *((name, _POINTER) for name in ("factor", "total", "coefficient", "groups")),
        ("group_count", _INT64),
        *((name, _POINTER) for name in ("energy", "sums", "columns")),
        ("column_count", _INT64),
        *((name, _POINTER) for name in ("gathered", "gathered_sums")),
    ]


#: How to get the library where it is missing.
REMEDY = (
    "; for the native kernels install a C++17 compiler, then TOPR_BUILD=cpu pip install "
    "--force-reinstall --no-deps --no-cache-dir --no-binary topr_kernels topr_kernels; "
    "impl='torch' does without"
)

#: enum topr_dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def load(path: Path) -> ctypes.CDLL:
    """Loads the library and checks that it is of this version of the package.

    Raises:
        ImportError: if it is not there, does not load or is another version's; names the remedy.
    """
    if not path.exists():
        reason = f": {REASON.read_text(encoding='utf-8').strip()}" if REASON.exists() else ""
        raise ImportError(f"the native library was not built ({path} is missing{reason})" + REMEDY)
    try:
        library = ctypes.CDLL(str(path))
        library.topr_params_size.restype = ctypes.c_int64
        library.topr_error_message.restype = ctypes.c_char_p
        size = library.topr_params_size()
    except (OSError, AttributeError) as error:
        raise ImportError(f"cannot load the native library {path}: {error}" + REMEDY) from error
    if size != ctypes.sizeof(Params):
        raise ImportError(
            f"the native library {path} was built from other sources than this package (its params have "
            f"{size} bytes, expected {ctypes.sizeof(Params)})" + REMEDY
        )
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once per process."""
    return load(PATH)


#: Values of ATEN_CPU_CAPABILITY that hold torch back -> ``topr_isa``.
HELD_BACK = {"default": 1, "avx2": 2}


@functools.cache
def instruction_set() -> int:
    """``topr_isa`` of a call: the best there is, or less where ATEN_CPU_CAPABILITY holds torch back."""
    wanted = HELD_BACK.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), 0)
    return min(wanted, int(library().topr_isa_available()))


def call(function: str, **fields: Tensor | float | None) -> None:
    """Calls a function of the library with torch's threads and instructions; tensors go as pointers.

    Raises:
        AttributeError: for a field that ``Params`` does not have.
        RuntimeError: if the library refuses its params, with its reason, or a tensor that has no strides
            among the fields is not contiguous.
    """
    p = Params(size=ctypes.sizeof(Params), threads=torch.get_num_threads(), isa=instruction_set())
    for name, value in fields.items():
        getattr(Params, name)  # ctypes would make a new attribute of a misspelled one
        if isinstance(value, Tensor):
            if name not in ("logits", "gradient") and not value.is_contiguous():
                raise RuntimeError(f"{function}: {name} must be contiguous")
            value = value.data_ptr()
        setattr(p, name, value)
    code = getattr(library(), function)(ctypes.byref(p))
    if code:
        raise RuntimeError(f"{function}: {library().topr_error_message(code).decode()}")
