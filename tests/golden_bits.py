"""Hashes of what the package computes, to show that a change of its structure changed no bit.

``python tests/golden_bits.py --write FILE`` before the change, ``--check FILE`` after it: losses,
log-probs and gradients of the configurations below (paths, implementations, options, process
groups), and the files of a small ``topr iterate``. It uses public names alone. Hashes hold for one
machine and one set of libraries, so they are not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch import Tensor

from topr_kernels import (
    IS,
    TIS,
    Limits,
    linear_log_prob,
    linear_topr_loss,
    log_prob,
    topr_loss,
    topr_loss_from_log_prob,
)
from topr_kernels.testing import make_batch, make_linear_batch, pack

LENGTHS = [(3, 5), (2, 9), (4, 0), (1, 1), (3, 7)]
LIMITS = Limits(0.5, 2.0, 0.3, 1.5)
TRANSFORMS = {"softcap": 5.0, "temperature": 0.7, "entropy": True}
LOSS: dict[str, dict[str, Any]] = {
    "default": {},
    "token": {"limits": TIS, "ratio": "token", "reduction": "token_mean"},
    "geometric": {"limits": IS, "ratio": "geometric", "baseline": 0.2},
    "transforms": {"limits": LIMITS, **TRANSFORMS},
    "packed": {"limits": LIMITS, "reduction": "sum", "packed": True},
    "normalizer": {"normalizer": 9.0, "summed": True},
}
LOGITS = {**LOSS, "inplace": {"inplace": True}, "bf16": {"dtype": torch.bfloat16}}
LINEAR = {
    **LOSS,
    "tolerance": {"grad_tolerance": 2.0**-4, "bias": True},
    "frozen": {"frozen": True, "logit_scale": 0.5},
    "tiles": {"limits": LIMITS, "workspace_bytes": 16 * 97 * 4, "bias": True},
    "bf16": {"dtype": torch.bfloat16},
}
IMPLS = ("torch", "native", "triton")


def digest(*tensors: Tensor | None) -> str:
    """Hash of the bits of tensors."""
    total = hashlib.sha256()
    for x in tensors:
        if x is not None:
            total.update(str((x.dtype, tuple(x.shape))).encode())
            total.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:20]


def results(out: Any, *leaves: Tensor | None) -> str:
    """Hash of every field of a result and of every gradient."""
    first = out[0]
    first.backward(torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).view(first.shape))
    # The weights of sequences are an input.
    return digest(*out[:11], *(None if x is None else x.grad for x in leaves))


def logits_case(impl: str, function: str, options: dict[str, Any]) -> str:
    """One configuration of ``topr_loss`` or ``log_prob``."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    b = make_batch(LENGTHS, 97, dtype=dtype, padding=2)
    x, labels, mu, offsets = b.logits, b.labels, b.behavior_log_prob, None
    if options.pop("packed", False):
        x, labels, mu, _, offsets = pack(b, LENGTHS)
    if options.pop("summed", False):
        mu = mu.double().sum(1)
    leaf = x.detach().requires_grad_()
    if function == "log_prob":
        options = {k: v for k, v in options.items() if k in TRANSFORMS}
        return results(log_prob(leaf, labels, cu_seqlens=offsets, impl=impl, **options), leaf)
    own = leaf.clone() if options.get("inplace") else leaf
    out = topr_loss(own, labels, mu, b.reward, cu_seqlens=offsets, impl=impl, **options)
    return results(out, leaf)


def linear_case(impl: str, function: str, options: dict[str, Any]) -> str:
    """One configuration of ``linear_topr_loss`` or ``linear_log_prob``."""
    options = dict(options)
    dtype, frozen = options.pop("dtype", torch.float32), options.pop("frozen", False)
    b = make_linear_batch(LENGTHS, 97, 24, dtype=dtype, padding=2)
    x, labels, mu, offsets = b.hidden, b.labels, b.behavior_log_prob, None
    if options.pop("packed", False):
        sizes = [p + c for p, c in LENGTHS]
        x, labels, mu = (
            torch.cat([y[i, :n] for i, n in enumerate(sizes)]) for y in (x, labels, mu)
        )
        offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    if options.pop("summed", False):
        mu = mu.double().sum(1)
    hidden = x.detach().requires_grad_()
    weight = b.weight.detach().requires_grad_(not frozen)
    bias = torch.linspace(-1, 1, 97).to(dtype).requires_grad_() if options.pop("bias", 0) else None
    options |= {"bias": bias, "cu_seqlens": offsets, "impl": impl}
    if function == "linear_log_prob":
        known = (*TRANSFORMS, "bias", "cu_seqlens", "impl", "logit_scale", "workspace_bytes")
        options = {k: v for k, v in options.items() if k in known}
        return results(linear_log_prob(hidden, weight, labels, **options), hidden, weight, bias)
    out = linear_topr_loss(hidden, weight, labels, mu, b.reward, **options)
    return results(out, hidden, weight, bias)


def token_case(options: dict[str, Any]) -> str:
    """One configuration of ``topr_loss_from_log_prob``."""
    b = make_batch(LENGTHS, 97, dtype=torch.float32, padding=2)
    leaf = log_prob(b.logits, b.labels, impl="torch").log_prob.detach().requires_grad_()
    mu = b.behavior_log_prob.sum(1) if options.get("summed") else b.behavior_log_prob
    kept = {k: v for k, v in options.items() if k not in ("summed", "packed", *TRANSFORMS)}
    return results(topr_loss_from_log_prob(leaf, b.labels != -100, mu, b.reward, **kept), leaf)


def group_cases(rank: int) -> dict[str, str]:
    """The configurations over two processes, on one of them."""
    b = make_linear_batch(LENGTHS, 97, 24, dtype=torch.float32, padding=2)
    found = {}
    part = slice(0, 41) if rank == 0 else slice(41, 97)
    columns = slice(0, 6) if rank == 0 else slice(6, None)
    for name, options in LOSS.items():
        if "packed" in options:
            continue
        options = {k: v for k, v in options.items() if k != "summed"}
        for over in ("process_group", "sequence_group"):
            x, weight, y, mu = b.hidden, b.weight, b.labels, b.behavior_log_prob
            if over == "process_group":
                weight = weight[part]
            else:
                x, y, mu = x[:, columns], y[:, columns], mu[:, columns]
            group: dict[str, Any] = {over: dist.group.WORLD}
            hidden, head = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_topr_loss(hidden, head, y, mu, b.reward, **group, **options)
            found[f"groups linear {over} {name}"] = results(out, hidden, head)
            logits = (x @ weight.T).requires_grad_()
            out = topr_loss(logits, y, mu, b.reward, **group, **options)
            found[f"groups logits {over} {name}"] = results(out, logits)
            kept = {k: v for k, v in options.items() if k in TRANSFORMS}
            hidden, head = x.clone().requires_grad_(), weight.clone().requires_grad_()
            scored = linear_log_prob(hidden, head, y, **group, **kept)
            found[f"groups linear_log_prob {over} {name}"] = results(scored, hidden, head)
    return found


def rank_of_group(folder: str) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(group_cases(rank)))
    dist.destroy_process_group()


def pipeline_files(folder: Path) -> dict[str, str]:
    """Hashes of the Parquet and model files that a small ``topr iterate`` leaves."""
    from tiny import save, tiny_model

    from topr_kernels.recipe.cli import main

    config = importlib.import_module("recipe.test_recipe_iterate").CONFIG
    model = save(tiny_model(), folder / "model")
    (folder / "config.yaml").write_text(config + f"model: {model}\n")
    status = main(
        ["iterate", "--config", str(folder / "config.yaml"), "--out", str(folder / "out")]
    )
    assert status == 0, status
    paths = sorted(p for s in ("*.parquet", "*.safetensors") for p in (folder / "out").rglob(s))
    return {
        f"iterate {p.relative_to(folder)}": hashlib.sha256(p.read_bytes()).hexdigest()[:20]
        for p in paths
    }


def paths() -> dict[str, str]:
    """Every configuration in one process."""
    found = {}
    for impl in IMPLS:
        for name, options in LOGITS.items():
            found[f"logits {impl} {name}"] = logits_case(impl, "topr_loss", options)
        for name, options in LINEAR.items():
            if impl == "triton" and "dtype" in options:
                continue  # tl.dot of the interpreter is wrong in bf16
            found[f"linear {impl} {name}"] = linear_case(impl, "linear_topr_loss", options)
        for name in ("default", "transforms", "packed"):
            found[f"log_prob {impl} {name}"] = logits_case(impl, "log_prob", LOSS[name])
            found[f"linear_log_prob {impl} {name}"] = linear_case(
                impl, "linear_log_prob", LOSS[name]
            )
    return found


def tokens() -> dict[str, str]:
    """``topr_loss_from_log_prob``."""
    return {f"from_log_prob {name}": token_case(options) for name, options in LOSS.items()}


def groups() -> dict[str, str]:
    """Two processes."""
    from processes import launch

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        launch(2, "golden_bits.rank_of_group", folder)
        for path in sorted(Path(folder).glob("*.json")):
            parts = json.loads(path.read_text())
            found |= {f"{name} rank {path.stem}": bits for name, bits in parts.items()}
    return found


def pipeline() -> dict[str, str]:
    """A small ``topr iterate``."""
    with tempfile.TemporaryDirectory() as folder:
        return pipeline_files(Path(folder))


PARTS = {"paths": paths, "tokens": tokens, "groups": groups, "pipeline": pipeline}


def main() -> int:
    """Writes the hashes, or compares them; the number of configurations that differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="JSON file for the hashes")
    parser.add_argument("--check", type=Path, help="JSON file of hashes to compare with")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for part in asked.only:
        found |= PARTS[part]()
    if asked.write:
        asked.write.write_text(json.dumps(found, indent=1))
    expected = json.loads(asked.check.read_text()) if asked.check else found
    compared = expected | found if set(asked.only) == set(PARTS) else found
    wrong = sorted(n for n in compared if expected.get(n) != found.get(n))
    print(*(f"differs: {name}" for name in wrong), sep="\n")
    print(f"{len(found)} configurations, {len(wrong)} differ")
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
