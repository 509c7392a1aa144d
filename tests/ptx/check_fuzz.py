"""Batches, layouts, strides, dtypes and options at random through the whole path, against fp64.

PTX_CASES says how many (`make test-ptx`: 500, and a quarter more of the fused-linear kernels). A case
is its number: options that make another binary come from the number modulo VARIANTS, so that compiling
does not take all the time, everything else from the number.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_triton_linear as linear
import torch
from torch import Tensor

from ptx import launch
from ptx.execute import Options
from topr_kernels import IS, PRESETS, Limits, reference, topr_loss
from topr_kernels.kernels import triton_linear, triton_logits
from topr_kernels.testing import assert_within_budget, make_batch, pack

CASES = int(os.environ.get("PTX_CASES", "24"))
VARIANTS = 48 if CASES > 100 else 12
SPLIT = triton_logits.Settings(BV=128, U=2, tiles_per_program=3, split=8, num_warps=4)


class Variant(NamedTuple):
    """What a binary depends on."""

    dtype: torch.dtype
    impl: str
    packed: bool
    shift: bool
    ratio: str
    reduction: str
    temperature: float
    softcap: float | None
    entropy: bool
    strides: str
    summed: bool
    split: bool
    wide: bool

    @classmethod
    def draw(cls, number: int) -> Variant:
        rng = np.random.default_rng([1, number])

        def one(*choices: Any) -> Any:
            return choices[rng.integers(len(choices))]

        ratio = one("sequence", "geometric", "token")
        return cls(
            dtype=one(torch.float32, torch.bfloat16, torch.float16),
            impl=one("triton", "triton", "triton_staged"),
            packed=one(False, True),
            shift=one(True, True, False),
            ratio=ratio,
            reduction=one("sequence_mean", "token_mean", "sum"),
            temperature=one(1.0, 0.7),
            softcap=one(None, 6.0),
            entropy=one(False, True),
            strides=one("aligned", "contiguous", "room", "every second", "transposed"),
            summed=ratio != "token" and one(False, False, True),
            split=one(False, False, False, True),
            wide=one(False, False, False, True),
        )


def strided(x: Tensor, kind: str) -> Tensor:
    """The same logits [B, T, V] in memory of another layout, NaN between them."""
    b, t, v = x.shape
    if kind == "contiguous":
        return x.clone()
    if kind == "transposed":
        room = torch.full((t, b, v), torch.nan, dtype=x.dtype).transpose(0, 1)
    elif kind == "every second":
        room = torch.full((b, t, 2 * v + 1), torch.nan, dtype=x.dtype)[..., : 2 * v : 2]
    elif kind == "room":
        room = torch.full((b, t + 2, v + 5), torch.nan, dtype=x.dtype)[:, 1 : t + 1, 3 : v + 3]
    else:  # rows that start at multiples of 16 elements
        step = -(-v // 16) * 16 + 16
        room = torch.full((b, t, step), torch.nan, dtype=x.dtype)[..., :v]
    room.copy_(x)
    return room


@pytest.mark.parametrize("case", range(CASES))
def test_the_loss_and_its_gradient(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v = Variant.draw(case % VARIANTS)
    rng = np.random.default_rng([2, case])
    if v.split:
        monkeypatch.setattr(triton_logits, "settings", lambda *_: SPLIT)
    lengths = [
        (int(rng.integers(0, 4)), int(rng.integers(0, 9))) for _ in range(rng.integers(1, 5))
    ]
    if rng.random() < 0.1:
        lengths[0] = (3, 280)  # more than a step of the sequence stage
    if not sum(map(sum, lengths)):
        lengths[0] = (1, 1)
    vocab = int(rng.integers(1025, 1500) if v.wide else rng.integers(2, 400))
    if v.strides == "aligned":
        vocab = -(-vocab // 16) * 16
    batch = make_batch(
        lengths,
        vocab,
        dtype=v.dtype,
        padding=int(rng.integers(0, 3)),
        seed=case,
        sharpness=float(rng.choice([1.0, 3.0, 8.0])),
    )
    limits = [*PRESETS.values(), IS, Limits(0.2, 1.7, 0.05, 0.9)][rng.integers(len(PRESETS) + 2)]
    kw: dict[str, Any] = {
        "ratio": v.ratio,
        "reduction": v.reduction,
        "temperature": v.temperature,
        "softcap": v.softcap,
        "shift": v.shift,
        "limits": limits,
        "baseline": float(rng.choice([0.0, 0.1])),
    }
    if rng.random() < 0.2 and v.reduction != "sum":
        kw["normalizer"] = 7.0
    data: Any = pack(batch, lengths) if v.packed else batch
    if v.packed:
        kw["cu_seqlens"] = data.cu_seqlens
    logits, labels, mu, reward = data[:4]
    if v.summed:
        mu = torch.stack([x.double().sum() for x in batch.behavior_log_prob])
    args = (labels, mu, reward)
    view = strided(logits if logits.dim() == 3 else logits[None], v.strides)
    view = view if logits.dim() == 3 else view[0]
    ulps = int(rng.choice([0, 2]))
    options = Options(seed=case, ulps=ulps, late=bool(rng.random() < 0.3))
    results = {}
    for name, source in (("exact", logits.double()), ("plain", logits.float()), ("got", view)):
        leaf = source.detach().requires_grad_()
        wide = [x.double() if name == "exact" and x.is_floating_point() else x for x in args]
        if name == "got":
            with launch.device(options):
                out = topr_loss(leaf, *args, impl=v.impl, entropy=v.entropy, **kw)
                out.loss.backward()
        else:
            out = reference.topr_loss(leaf, *wide, **kw)
            leaf.grad = torch.zeros_like(leaf)
            if out.loss.requires_grad:  # else nothing is scored
                out.loss.backward()
        results[name] = (out, leaf.grad)
    (ref, ref_grad), (plain, plain_grad), (out, grad) = results.values()
    tokens = [topr_loss(z, *args, impl="torch", entropy=True, **kw) for z in (logits.float(),)]
    exact_args = [x.double() if x.is_floating_point() else x for x in args]
    exact = topr_loss(logits.double(), *exact_args, impl="torch", entropy=True, **kw)
    assert grad is not None and ref_grad is not None and plain_grad is not None
    # Two ulp of every exponential are two ulp of their sum, and of what comes of it.
    slack = 1 + ulps
    nats = slack * max(out.log_prob.abs().max().item(), 1.0)
    pairs = [
        ("log_prob", out.log_prob, tokens[0].log_prob, exact.log_prob, nats),
        ("log_ratio", out.log_ratio, plain.log_ratio, ref.log_ratio, nats * max(map(sum, lengths))),
        ("weight", out.weight, plain.weight, ref.weight, 0.0),
    ]
    if v.entropy:
        pairs.append(("entropy", out.entropy, tokens[0].entropy, exact.entropy, 5 * nats))
    size = ref.weight.abs().max().item()
    for name, got, torch_got, want, operand in pairs:
        operand = nats * max(map(sum, lengths)) * size if name == "weight" else operand
        assert_within_budget(name, got, torch_got, want, operand=operand)
    eps = slack * nats * ref_grad.abs().max().item()
    assert_within_budget("gradient", grad, plain_grad.to(v.dtype), ref_grad, operand=eps)
    torch.testing.assert_close(
        out.loss.double(), ref.loss.double(), rtol=slack * 2e-5, atol=slack * 1e-6
    )


LINEAR = (linear.PLAIN, linear.SCALED, linear.CAPPED, linear.Transforms(1.0, 30.0, 1.0))


def check_tile(z: Tensor, label: Tensor, transforms: Any, columns: Tensor) -> None:
    """Every entry of J and what is summed of it, by the condition of each.

    An exponential is as wrong as its argument is rounded; at the label that is absolute, 1 - p, and so
    is the slope of a softcap.
    """
    exact = linear.reference(z, label, transforms, columns)
    factor = transforms.logit_scale / transforms.temperature
    operand = max(1.0, z.abs().max().item() * factor, exact.stats.lse.abs().max().item())
    rounding = 16 * torch.finfo(torch.float32).eps * operand
    x = z.double() * transforms.logit_scale
    if transforms.softcap is not None:
        x = transforms.softcap * (x / transforms.softcap).tanh()
    p = (x / transforms.temperature).softmax(-1)
    budget = rounding * factor * p.scatter(1, label.unsqueeze(1), 1.0)
    got = linear.run(triton_linear, z, label, transforms, columns)
    c, groups = (a.double().abs() for a in linear.make_coefficients(len(z)))
    energy = 2 * c.square() @ (exact.gradient.abs() * budget + budget.square())
    for name, a, b, most in (
        ("log_prob", got.stats.log_prob, exact.stats.log_prob, rounding),
        ("entropy", got.stats.entropy, exact.stats.entropy, rounding),
        ("gradient", got.gradient, exact.gradient, budget),
        ("gathered", got.gathered, exact.gathered, budget[:, columns]),
        ("kept", got.kept, exact.kept, budget[:, columns].sum(1)),
        ("sums", got.sums, exact.sums, groups @ budget),
        ("energy", got.energy, exact.energy, energy),
    ):
        error = (a.double() - b).abs()
        assert (error <= most + 1e-30).all(), f"{name}: {(error / most).max()} of the budget"


@pytest.mark.parametrize("case", range(CASES // 4))
def test_the_kernels_of_the_fused_linear_path(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng([3, case])
    if rng.random() < 0.3:
        monkeypatch.setattr(triton_linear, "COLUMN_ROWS", 8)
    vocab = int(rng.choice([rng.integers(2, 400), rng.integers(1025, 2500)], p=[0.8, 0.2]))
    padding = int(rng.choice([5, 32]))
    vocab = -(-vocab // 16) * 16 if padding == 32 else vocab
    z, label = linear.make_tile(int(rng.integers(1, 14)), vocab, seed=case, padding=padding)
    columns = torch.from_numpy(np.nonzero(rng.random(vocab) < rng.choice([0.1, 0.5]))[0])
    if not len(columns):
        columns = label[:1].clone()
    transforms = LINEAR[case % len(LINEAR)]
    with launch.device(Options(seed=case)):
        check_tile(z, label, transforms, columns)
        half = (torch.bfloat16, torch.float16)[case % 2]
        stats = triton_linear.rows(z, label, transforms, False, True)
        gathered, _ = triton_linear.gather(z, label, stats, transforms, columns, half)
        gradient = triton_linear.gradient(z, label, stats, transforms, half)
        whole = triton_linear.gradient(z, label, stats, transforms, torch.float32)
    for got, want in ((gathered, whole[:, columns]), (gradient, whole)):
        # One rounding; the compiler may contract either form of the kernel to other fused operations.
        torch.testing.assert_close(got.float(), want, rtol=torch.finfo(half).eps, atol=1e-7)
