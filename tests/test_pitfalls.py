"""One named test per pitfall that can bite the logits path in plain torch; the rest is accounted for.

Numbers are those of the list of pitfalls seen in published fused losses. A number is either a test
here (``test_pitfall_NN_...``), a key of ``ELSEWHERE`` (held by another test file) or a key of
``DEFERRED`` (belongs to a part that does not exist yet).
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topr_kernels import (
    IS,
    REINFORCE,
    SFT,
    TIS,
    TOPR,
    Limits,
    TOPROutput,
    kernels,
    log_prob,
    reference,
    topr_loss,
)
from topr_kernels.linear.head import HeadProducts
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops.options import HeadWeights
from topr_kernels.testing import Batch, assert_within_budget, make_batch

#: Number -> the part of the project that will hold it.
DEFERRED: dict[int, str] = {}

#: Number -> the test or check elsewhere that holds it, as file::name.
ELSEWHERE = {
    1: "tests/core/test_triton.py::test_offsets_pass_two_to_the_thirty_first",
    2: "tests/core/test_triton.py::test_grids_have_one_dimension",
    3: "tests/core/test_triton_aot.py::test_no_length_or_batch_size_needs_another_compilation",
    4: "tests/core/test_triton_aot.py::test_sm_90",  # no fp64 instruction
    5: "tests/core/test_triton.py::test_launches_run_on_the_device_of_their_tensors",
    8: "tests/core/test_triton.py::test_tuning_is_opt_in_and_keeps_results",
    9: "tests/core/test_triton_aot.py::test_sm_90",  # no spill
    15: "tests/core/test_linear.py::test_half_precision_is_better_than_half_precision_logits",
    17: "tests/core/test_linear.py::test_small_coefficients_do_not_underflow",
    21: "tests/core/test_linear.py::test_log_prob_is_differentiable_with_any_upstream_gradient",
    25: "tests/core/test_linear.py::test_frozen_parts_cost_nothing",
    26: "tests/hf/test_heads.py::test_a_sharded_head_is_refused",
    28: "tests/hf/test_trainer.py::test_gradients_do_not_depend_on_accumulation",
    30: "tests/hf/test_packing.py::test_an_attention_mask_lets_samples_leak_and_is_refused",
    31: "tests/hf/test_trainer.py::test_config_refuses",
    32: "tests/hf/test_trainer.py::test_labels_cover_the_completion_only_even_where_pad_is_eos",
    36: "tests/core/test_gpu.py::test_equals_plain_torch",
    37: "tests/benchmarks/test_benchmarks.py::test_settings_are_compared_warm",
}

IGNORE = -100


def run(batch: Batch, **options: Any) -> tuple[TOPROutput, Tensor]:
    """Loss and gradient of the logits of a batch."""
    z = batch.logits.detach().clone().requires_grad_()
    out = topr_loss(z, *batch[1:], **options)
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad


def truth(batch: Batch, **options: Any) -> tuple[reference.ReferenceOutput, Tensor]:
    """The same in fp64 through the reference."""
    z = batch.logits.detach().double().requires_grad_()
    out = reference.topr_loss(
        z, batch.labels, batch.behavior_log_prob.double(), batch.reward.double(), **options
    )
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad


def one_row(
    row: Tensor, label: int, reward: float, mu: float | None = None, **options: Any
) -> tuple[TOPROutput, Tensor]:
    """One sequence of one scored token, aligned; mu = None samples it from the policy itself."""
    z = row.detach().clone().view(1, 1, -1).requires_grad_()
    y = torch.tensor([[label]])
    wide = accumulate_dtype(row.dtype)
    behavior = log_prob(z.detach(), y, shift=False).log_prob if mu is None else None
    if behavior is None:
        behavior = torch.full((1, 1), mu, dtype=wide)
    out = topr_loss(z, y, behavior, torch.tensor([reward]), shift=False, **options)
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad.view(-1)


def test_every_pitfall_is_accounted_for() -> None:
    named = [re.match(r"test_pitfall_(\d+)_", name) for name in globals()]
    covered = {int(m.group(1)) for m in named if m}
    assert covered | set(DEFERRED) | set(ELSEWHERE) == set(range(1, 39))
    assert len(covered) + len(DEFERRED) + len(ELSEWHERE) == 38, "a number is listed twice"


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_what_holds_the_other_pitfalls_exists(place: str) -> None:
    path, name = place.split("::")
    assert f"def {name}(" in (Path(__file__).parents[1] / path).read_text()


@pytest.mark.parametrize("vocab", [5, 50257 // 64, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfall_06_unaligned_rows(vocab: int, dtype: torch.dtype) -> None:
    """Slices and odd vocabularies are not 16-byte aligned; the result must not care."""
    batch = make_batch([(2, 5), (1, 3)], vocab, dtype=dtype)
    out, grad = run(batch)
    room = torch.full((2, 8, vocab + 3), math.nan, dtype=dtype)
    room[:, 1:, 1:-2] = batch.logits
    labels = torch.full((2, 8), 7)
    labels[:, 1:] = batch.labels
    z = room[:, 1:, 1:-2].requires_grad_()
    assert z.data_ptr() % 16 != 0 and not z.is_contiguous()
    moved = topr_loss(z, labels[:, 1:], *batch[2:])
    moved.loss.backward()
    assert torch.equal(moved.loss, out.loss) and torch.equal(moved.log_prob, out.log_prob)
    assert z.grad is not None and torch.equal(z.grad, grad) and grad.any()


@pytest.mark.parametrize("vocab", [1, 2, 7, 127, 129, 1000, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pitfall_07_vocabulary_not_a_multiple_of_the_block(vocab: int, dtype: torch.dtype) -> None:
    """Unmasked columns give log_prob > 0 and a reward collapse: log_prob <= 0, p sums to 1."""
    z = 4 * torch.randn(1, 9, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    labels = z.argmax(-1)  # the largest log-probs there are
    out = log_prob(z, labels, shift=False)
    assert (out.log_prob <= 0).all()
    total = (z.float() - out.lse.unsqueeze(-1)).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_10_half_precision_logits_and_temperature(dtype: torch.dtype) -> None:
    """bf16 in the ratio; temperature applied in bf16, or its 1/T missing in the gradient."""
    half = make_batch([(1, 30), (2, 20), (1, 25)], 301, dtype=dtype, drift=0.05)
    single = half._replace(logits=half.logits.float())
    options: dict[str, Any] = {"temperature": 0.7, "limits": TIS, "ratio": "geometric"}
    out, grad = run(half, **options)
    wide, wide_grad = run(single, **options)
    # Nothing between the stored logits and the loss is rounded to half precision.
    assert torch.equal(out.log_prob, wide.log_prob) and torch.equal(out.loss, wide.loss)
    assert torch.equal(grad, wide_grad.to(dtype)) and grad.any()
    ref, ref_grad = truth(single, **options)
    torch.testing.assert_close(wide.loss.double(), ref.loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(wide_grad.double(), ref_grad, rtol=1e-4, atol=1e-7)
    ratio = ref_grad.norm() / truth(single, **{**options, "temperature": 1.4})[1].norm()
    assert abs(ratio - 1) > 0.2, "the temperature must matter for this test to mean anything"


@pytest.mark.parametrize("limits", [TOPR, TIS, REINFORCE, SFT], ids=str)
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
def test_pitfall_11_clip_before_exp(limits: Any, ratio: str) -> None:
    """exp before min or mask gives inf * 0 = NaN: clip in log space."""
    batch = make_batch([(1, 3)] * 4, 7, dtype=torch.float32)
    drift = torch.tensor([2e4, -2e4, 2e4, -2e4]).unsqueeze(-1)
    batch = batch._replace(
        behavior_log_prob=batch.behavior_log_prob - drift,
        reward=torch.tensor([1.0, 1.0, -1.0, -1.0]),
    )
    out, grad = run(batch, limits=limits, ratio=ratio)
    assert out.log_ratio.abs().min() > 5e4
    assert out.loss.isfinite() and out.weight.isfinite().all() and grad.isfinite().all()
    expected = [limits.pos_max, limits.pos_min, limits.neg_max, limits.neg_min]
    assert out.weight.tolist() == expected
    assert grad.any(dim=-1).any(dim=-1).tolist() == [w > 0 for w in expected]


def test_pitfall_11_unbounded_limit_at_ratio_zero() -> None:
    """exp before min or mask: with b = inf the lower end must still be a plain 0."""
    out, grad = one_row(torch.tensor([0.0, 1.0, 2.0]), 1, 1.0, mu=1e4, limits=IS)
    assert out.loss.item() == 0 and not grad.any()


def test_pitfall_12_large_common_offset() -> None:
    """z_y - lse with a large common offset loses digits, in the loss and in its gradient."""
    g = torch.Generator().manual_seed(0)
    # Multiples of 1/64 below 8 keep every bit at an offset of 2^16: only cancellation can differ.
    z = torch.randint(-512, 512, (2, 6, 50), generator=g) / 64
    labels = torch.randint(0, 50, (2, 6), generator=g)
    mu, reward = torch.zeros(2, 6), torch.tensor([1.0, -1.0])
    batch = Batch(z, labels, mu, reward)
    plain, grad = run(batch)
    moved, moved_grad = run(batch._replace(logits=z + 65536))
    assert plain.log_prob.any() and torch.equal(plain.log_prob, moved.log_prob)
    assert torch.equal(plain.loss, moved.loss)
    assert grad.any()
    torch.testing.assert_close(moved_grad, grad, rtol=1e-5, atol=1e-8)


def test_pitfall_13_minus_inf_logits_are_legal() -> None:
    """Minus inf less minus inf, and 0 * (-inf) in the entropy."""
    batch = make_batch([(1, 4), (2, 3)], 9, dtype=torch.float32)
    padded = torch.cat([batch.logits, torch.full((2, 5, 3), -torch.inf)], -1)
    out, grad = run(batch, entropy=True)
    banned, banned_grad = run(batch._replace(logits=padded), entropy=True)
    assert out.entropy.sum() > 0 and grad.any()
    torch.testing.assert_close(banned.entropy, out.entropy)
    torch.testing.assert_close(banned.loss, out.loss)
    torch.testing.assert_close(banned_grad[..., :9], grad)
    assert not banned_grad[..., 9:].any()


def test_pitfall_13_running_maximum_far_below_zero() -> None:
    """A running max initialised to 0 underflows every exponential."""
    row = torch.tensor([-1e4, -1e4 + 1, -1e4 + 2])
    out, grad = one_row(row, 0, 1.0)
    expected = (row.double() + 1e4).log_softmax(-1)
    torch.testing.assert_close(out.log_prob.item(), expected[0].item())
    assert grad[0] < 0 < grad[1] < grad[2]


def test_pitfall_13_label_at_minus_inf() -> None:
    """A label at -inf: log_prob -inf; a negative gets weight 0 and zero gradient, a positive +inf."""
    row = torch.tensor([-torch.inf, 1.0, 2.0])
    out, grad = one_row(row, 0, -1.0, mu=-1.0)
    assert out.log_prob.item() == -math.inf and out.weight.item() == 0
    assert out.loss.item() == 0 and not grad.any()
    assert one_row(row, 0, 1.0, mu=-1.0)[0].loss.item() == math.inf


@pytest.mark.parametrize("reward", [0.0, -1.0, 1.0])
def test_pitfall_13_row_of_minus_inf(reward: float) -> None:
    """A row of -inf alone: log_prob -inf, NaN gradient unless its coefficient is 0."""
    out, grad = one_row(torch.full((4,), -torch.inf), 2, reward, mu=-1.0)
    assert out.log_prob.item() == -math.inf
    if reward > 0:
        assert out.loss.item() == math.inf and grad.isnan().any()
    else:
        assert out.loss.item() == 0 and not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_14_true_class_gradient_keeps_its_digits(dtype: torch.dtype) -> None:
    """The true-class entry by read-modify-write in bf16 loses 1 - p when p is near 1."""
    row = torch.tensor([9.0, 0.0, -0.5, 0.25], dtype=dtype)
    _, grad = one_row(row, 0, 1.0)
    p = row.double().softmax(-1)
    assert 1 - p[0] < torch.finfo(torch.bfloat16).eps, "p must round to 1 in bf16"
    error = (grad[0].double() / (p[0] - 1) - 1).abs()
    assert error <= torch.finfo(dtype).eps
    # The row of a softmax gradient sums to 0, up to one rounding an entry.
    assert grad.double().sum().abs() <= torch.finfo(dtype).eps * grad.double().abs().sum()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
@pytest.mark.parametrize("inplace", [False, True])
def test_pitfall_18_nan_under_the_mask(poison: float, ratio: str, inplace: bool) -> None:
    """Masked-out padding that holds NaN or inf poisons gradients through 0 * NaN: select."""
    batch = make_batch([(3, 4), (2, 6), (1, 2)], 13, dtype=torch.float32, padding=2)
    labels = batch.labels.clone()
    labels[1, 4] = IGNORE  # a hole inside a completion as well
    clean = batch._replace(labels=labels)
    scored_row = torch.zeros_like(labels, dtype=torch.bool)
    scored_row[:, :-1] = labels[:, 1:] != IGNORE
    logits = batch.logits.masked_fill(~scored_row.unsqueeze(-1), poison)
    mu = batch.behavior_log_prob.masked_fill(labels == IGNORE, poison)
    out, grad = run(clean, ratio=ratio, entropy=True)
    z = logits.clone().requires_grad_()
    poisoned = topr_loss(
        z * 1, labels, mu, batch.reward, ratio=ratio, entropy=True, inplace=inplace
    )
    poisoned.loss.backward()
    assert grad[scored_row].any() and not grad[~scored_row].any()
    assert z.grad is not None and torch.equal(z.grad, grad)
    for name, a, b in zip(out._fields, poisoned, out, strict=True):
        assert name in ("active_share", "left_out") or torch.equal(a, b), name
    assert all(v.isfinite() or torch.isnan(out.metrics()[k]) for k, v in poisoned.metrics().items())


def test_pitfall_18_masked_sequence_with_bad_values() -> None:
    """The same for a whole sequence without a scored token, whatever its summed mu."""
    batch = make_batch([(1, 4), (5, 0)], 7, dtype=torch.float32)
    mu = torch.tensor([-5.0, math.nan])
    out, grad = run(batch._replace(behavior_log_prob=mu))
    assert out.loss.isfinite() and grad[0].any() and not grad[1].any()
    assert out.log_ratio[1] == 0 and out.weight[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_19_loss_is_fp32(dtype: torch.dtype) -> None:
    """The loss is never returned in bf16, autocast or not."""
    batch = make_batch([(1, 3)], 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = topr_loss(*batch)
    out, grad = run(batch)
    assert grad.dtype == dtype
    for x in (inside, out):
        floating = [t for t in x if t.is_floating_point()]
        assert {t.dtype for t in floating} == {torch.float32}


@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
@pytest.mark.parametrize("reward", [-1.0, 1.0])
def test_pitfall_20_no_gradient_through_the_weight(ratio: str, reward: float) -> None:
    """A leak through the weight turns w into w (1 + log pi): wrong sign where log pi < -1."""
    row = torch.tensor([-4.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    p = row.softmax(-1)
    assert p[0].log() < -1
    mu = p[0].log().item() + 0.5  # ratio exp(-0.5), inside the limits of TIS
    out, grad = one_row(row, 0, reward, mu=mu, limits=TIS, ratio=ratio)
    onehot = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(grad, -reward * math.exp(-0.5) * (onehot - p))
    assert not out.weight.requires_grad and not out.log_prob.requires_grad


def test_pitfall_22_upstream_gradient_is_honoured_without_a_sync() -> None:
    """Loss scaling and accumulation multiply the gradient; no host test of grad_output."""
    batch = make_batch([(1, 4), (2, 2)], 11, dtype=torch.float32)
    z = batch.logits.requires_grad_()
    grads = [
        torch.autograd.grad(scale * topr_loss(*batch).loss, z)[0] for scale in (1.0, 4.0, -0.5)
    ]
    assert grads[0].any()
    assert torch.equal(grads[1], 4 * grads[0]) and torch.equal(grads[2], -0.5 * grads[0])


def test_pitfall_22_no_value_is_read_on_the_host() -> None:
    """A tensor without values cannot be tested: the whole step must run on the meta device."""
    meta = [x.to("meta") for x in make_batch([(1, 4), (2, 2)], 11, dtype=torch.float32)]
    z = meta[0].requires_grad_()
    out = topr_loss(*meta, normalizer=torch.ones((), device="meta"), entropy=True)
    out.metrics()
    (3 * out.loss).backward()
    assert z.grad is not None and z.grad.shape == z.shape


def test_pitfall_23_inplace_with_retain_graph_raises() -> None:
    """In-place gradients with a second backward: raise or be right."""
    z, *rest = make_batch([(1, 4), (2, 2)], 11, dtype=torch.float32)
    z.requires_grad_()
    loss = topr_loss(z * 1, *rest, inplace=True).loss
    loss.backward(retain_graph=True)
    assert z.grad is not None and z.grad.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pitfall_23_inplace_with_create_graph_raises() -> None:
    """In-place gradients under create_graph: raise, and leave the logits alone."""
    z, *rest = make_batch([(1, 4), (2, 2)], 11, dtype=torch.float32)
    logits = z.requires_grad_() * 1
    before = logits.detach().clone()
    loss = topr_loss(logits, *rest, inplace=True).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_pitfall_23_checkpointing_runs_forward_twice(inplace: bool) -> None:
    """In-place gradients inside a checkpointed region are right."""
    z, *rest = make_batch([(1, 4), (2, 2)], 11, dtype=torch.float32)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(topr_loss(2 * z, *rest).loss, z)

    def step(z: Tensor) -> Tensor:
        return topr_loss(2 * z, *rest, inplace=inplace).loss

    checkpoint(step, z, use_reentrant=False).backward()
    assert expected.any() and z.grad is not None and torch.equal(z.grad, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_pitfall_24_no_gradient_work_without_a_backward(requires_grad: bool, cpu_impl: str) -> None:
    """Gradient work done under no_grad or in evaluation: the logits are only read."""
    batch = make_batch([(1, 4), (2, 2)], 64, dtype=torch.float32)
    batch.logits.requires_grad_(requires_grad)
    module = importlib.import_module(f"topr_kernels.kernels.{kernels.LOGITS[cpu_impl]}")
    with (
        torch.no_grad() if requires_grad else torch.enable_grad(),
        mock.patch.object(module, "_write_gradient", side_effect=AssertionError("gradient work")),
        LargestAllocation(batch.logits) as largest,
    ):
        out = topr_loss(*batch, inplace=True)
        scores = log_prob(batch.logits, batch.labels)
    assert out.loss.grad_fn is None and scores.log_prob.grad_fn is None
    # Scored rows alone are copied, one block at a time: 6 of 10 rows here.
    assert 0 < largest.elements < batch.logits.numel()


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of the largest tensor made that is not a view of ``known``."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.elements = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_pitfall_16_products_of_a_gpu_keep_half_precision_operands(compute: torch.dtype) -> None:
    """fp32 sums come from the matmul's accumulator there, not from operands cast up."""

    class OnGpu:
        """What the head of a GPU looks like to the code that chooses dtypes."""

        is_cuda, shape = True, (7, 3)

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def detach(self) -> OnGpu:
            return self

        def to(self, dtype: torch.dtype) -> OnGpu:
            return OnGpu(dtype)

    for stored in (compute, torch.float32):  # the second under autocast
        head = HeadProducts(HeadWeights(OnGpu(stored), None, compute))  # type: ignore[arg-type]
        assert head.operand == compute
        assert head.weight.dtype == compute
        assert head.arithmetic == torch.float32
        assert len(head.blocks) == 1, "nothing is cast block by block"
    wide = HeadProducts(HeadWeights(torch.zeros(7, 3, dtype=compute), None, compute))
    assert wide.operand == torch.float32, "a CPU has no fast half-precision product"


def test_pitfall_27_softcap_then_temperature() -> None:
    """Order of the transforms: softcap, then temperature; both in the gradient."""
    row = torch.tensor([-3.0, 0.5, 2.0, 6.0], dtype=torch.float64)
    cap, heat = 2.5, 0.8
    z = row.clone().requires_grad_()
    right = (cap * torch.tanh(z / cap) / heat).log_softmax(-1)[2]
    wrong = (cap * torch.tanh(row / heat / cap)).log_softmax(-1)[2]
    (d,) = torch.autograd.grad(right, z)
    assert abs(right.item() - wrong.item()) > 0.1
    out, grad = one_row(row, 2, 1.0, temperature=heat, softcap=cap, mu=-1.0)
    torch.testing.assert_close(out.log_prob.view(()), right.detach())
    torch.testing.assert_close(grad, -d)


@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
def test_pitfall_29_all_masked_batch(ratio: str, reduction: str) -> None:
    """An all-masked batch: loss 0, finite, connected to the graph, zero gradients."""
    batch = make_batch([(5, 0), (3, 0)], 7, dtype=torch.float32)
    batch = batch._replace(logits=torch.full_like(batch.logits, math.nan))
    out, grad = run(batch, ratio=ratio, reduction=reduction)
    assert out.loss.item() == 0 and out.loss.requires_grad
    assert not grad.any() and out.length.tolist() == [0, 0]


def test_pitfall_29_batch_without_sequences() -> None:
    """The same for a batch of no sequence at all, padded and packed."""
    for shape, offsets in (((0, 4, 7), None), ((2, 0, 7), None), ((0, 7), [0]), ((0, 7), [0, 0])):
        z = torch.zeros(shape, requires_grad=True)
        cu_seqlens = None if offsets is None else torch.tensor(offsets)
        count = shape[0] if offsets is None else len(offsets) - 1
        labels, reward = torch.zeros(shape[:-1], dtype=torch.int64), torch.ones(count)
        out = topr_loss(z, labels, torch.zeros(shape[:-1]), reward, cu_seqlens=cu_seqlens)
        out.loss.backward()
        assert out.loss.item() == 0 and z.grad is not None and z.grad.shape == z.shape


def test_pitfall_33_a_sequence_is_judged_by_its_own_reward() -> None:
    """Whitening moves signs: here a right answer among better ones stays positive."""
    batch = make_batch([(2, 6), (1, 5), (2, 7)], 97, drift=0.5)
    found = []
    for others in (3.0, -2.0):
        reward = torch.tensor([1.0, others, others])
        out, _ = run(batch._replace(reward=reward), limits=Limits(1.0, 1.0, 0.0, 0.5))
        assert out.reward.tolist() == reward.tolist()
        whitened = (reward - reward.mean()) / reward.std()
        found.append((out.weight[0].item(), out.objective[0].item(), bool(whitened[0] < 0)))
    assert found[0][:2] == found[1][:2] and found[0][0] == 1
    # The advantages of a framework would have judged it by its neighbours.
    assert [negative for *_, negative in found] == [True, False]


def test_pitfall_34_absolute_anchor() -> None:
    """Parity can pass on 0 == 0: values by hand, and inputs whose gradients are not zero."""
    # Uniform over 4 tokens, 2 scored; mu = 1/8 each, so the product ratio is 4.
    z = torch.zeros(1, 3, 4, requires_grad=True)
    labels, mu = torch.tensor([[0, 1, 2]]), torch.full((1, 3), -math.log(8))
    out = topr_loss(z, labels, mu, torch.tensor([1.0]))
    out.loss.backward()
    assert out.length.item() == 2 and out.weight.item() == 1
    assert out.log_ratio.item() == pytest.approx(2 * math.log(2))
    assert out.objective.item() == pytest.approx(1 + 2 * math.log(2))  # b (1 + log(x / b)) at b = 1
    assert out.loss.item() == pytest.approx(-(1 + 2 * math.log(2)) / 2)
    expected = [[0.125, -0.375, 0.125, 0.125], [0.125, 0.125, -0.375, 0.125], [0.0] * 4]
    assert z.grad is not None and z.grad.view(3, 4).tolist() == expected


def test_pitfall_34_the_error_budget_can_fail() -> None:
    """bf16 with rtol 0.5 proves nothing: the budget refuses twice the error of plain torch."""
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, 2.0 + 1e-6])
    assert_within_budget("x", torch.tensor([1.0, 2.0 + 1e-6]), plain, exact)
    with pytest.raises(AssertionError, match="x: max error"):
        assert_within_budget("x", torch.tensor([1.0, 2.0 + 5e-6]), plain, exact)
    with pytest.raises(AssertionError, match="nan"):
        assert_within_budget("x", torch.tensor([1.0, math.nan]), plain, exact)


def test_pitfall_35_realistic_entropy() -> None:
    """A near-uniform softmax flatters sparsity and hides cancellation: the inputs are peaked."""
    lengths = [(3, 40), (5, 30), (2, 50), (1, 20)]
    batch = make_batch(lengths, 1000, dtype=torch.float32, sharpness=4.0, seed=1)
    out, _ = run(batch, entropy=True)
    m = out.metrics()
    assert 0.3 < m["entropy"] < 2.6 < math.log(1000)
    assert 0 < m["positive_share"] < 1
    assert 0 < (batch.labels == IGNORE).float().mean() < 1
    token, _ = run(batch, ratio="token")
    tapered = token.weight[token.reward < 0]
    assert ((tapered > 0) & (tapered < 1)).all()


def test_pitfall_38_tests_that_wait_for_a_gpu_are_counted() -> None:
    """A skipped GPU test must not look like a pass: "ran N, needs a GPU: M"."""
    spec = importlib.util.spec_from_file_location(
        "shared_settings", Path(__file__).with_name("conftest.py")
    )
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    lines: list[str] = []
    stats = {
        "passed": [SimpleNamespace()] * 3,
        "failed": [SimpleNamespace()],
        "skipped": [
            SimpleNamespace(longrepr=("f.py", 1, f"Skipped: {conftest.NEEDS_GPU}")),
            SimpleNamespace(longrepr=("f.py", 1, "Skipped: other reason")),
        ],
    }
    conftest.pytest_terminal_summary(SimpleNamespace(stats=stats, write_line=lines.append))
    assert lines == [
        "tests run: 4; not run because they need a GPU: 1; SKIPPED FOR ANOTHER REASON: 1"
    ]

    marks: list[Any] = []
    item = SimpleNamespace(get_closest_marker=lambda name: name == "gpu", add_marker=marks.append)
    with mock.patch("torch.cuda.is_available", return_value=False):
        conftest.pytest_collection_modifyitems([item])
    assert [m.kwargs["reason"] for m in marks] == [conftest.NEEDS_GPU]
