"""TOPR in the loops of verl and prime-rl: their calling convention, their arithmetic, our gradient.

Neither framework is installed here. The stand-ins below follow, without their code,
- verl-project/verl, verl/trainer/ppo/core_algos.py: agg_loss, register_policy_loss, and
  verl/workers/utils/losses.py: ppo_loss, which calls a policy loss by keyword, fills
  ``config.global_batch_info`` and changes the loss in place; ranks are averaged by FSDP;
- PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py: compute_loss, one call per sequence,
  their sum divided by rl_scale, the sum of the rl weights over the scored tokens of the step.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import IS, SFT, TIS, TOPR, Limits, topr_loss_from_log_prob
from topr_kernels.integrations import prime_rl, verl
from topr_kernels.integrations.tokens import one_per_sequence

RATIOS = ["sequence", "geometric", "token"]
MODES = {"seq-mean-token-mean": "sequence_mean", "token-mean": "token_mean", "token-sum": "sum"}


@dataclass
class Batch:
    """[B, T]: mu, pi (differentiable), advantages, mask; [B]: reward."""

    mu: Tensor
    pi: Tensor
    advantages: Tensor
    mask: Tensor
    reward: Tensor

    def rows(self, index: slice) -> dict[str, Tensor]:
        """A micro-batch under verl's names."""
        return {
            "old_log_prob": self.mu[index],
            "log_prob": self.pi[index],
            "advantages": self.advantages[index],
            "response_mask": self.mask[index],
        }


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Eight sequences, one of them empty, one with a hole; drift on both sides of the limits."""
    torch.manual_seed(1)
    lengths = torch.tensor([7, 3, 5, 0, 1, 6, 4, 7])
    mask = torch.arange(7) < lengths[:, None]
    mask[5, 2] = False
    mu = torch.where(mask, -torch.rand(8, 7, dtype=dtype) * 2, torch.nan)
    pi = torch.where(mask, mu - 0.1 + 0.3 * torch.randn(8, 7, dtype=dtype), torch.nan)
    reward = torch.tensor([0.7, -1.2, -0.4, 1.0, 0.5, -2.0, 0.0, -0.3], dtype=dtype)
    # Trainers multiply by the mask; whatever lies under it must not matter.
    advantages = torch.where(mask, reward[:, None], torch.nan)
    return Batch(mu, pi.requires_grad_(), advantages, mask, reward)


def whole(data: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the batch in one call of ours."""
    out = topr_loss_from_log_prob(data.pi, data.mask, data.mu, data.reward, **options)
    (gradient,) = torch.autograd.grad(out.loss, data.pi)
    assert out.loss != 0 and gradient.abs().max() > 1e-3
    return out.loss.detach(), gradient


def surrogate(data: Batch, ratio: str, limits: Limits) -> Tensor:
    """[B, T], the per-token loss a framework would write: -sg(weight) * advantage * log pi."""
    d = torch.where(data.mask, data.pi.detach() - data.mu, 0.0)
    if ratio == "token":
        x = d.exp()
    else:
        length = data.mask.sum(1, keepdim=True).clamp(min=1)
        total = d.sum(1, keepdim=True)
        x = (total / length if ratio == "geometric" else total).exp()
    low = torch.where(data.reward < 0, limits.neg_min, limits.pos_min)[:, None]
    high = torch.where(data.reward < 0, limits.neg_max, limits.pos_max)[:, None]
    weight = x.clamp(low, high)
    return torch.where(data.mask, -weight * data.reward[:, None] * data.pi, 0.0)


# verl -------------------------------------------------------------------------------------------


def verl_aggregate(loss: Tensor, mask: Tensor, mode: str, info: dict[str, Any]) -> Tensor:
    """What verl's agg_loss makes of a matrix of per-token losses."""
    loss, ranks = torch.where(mask, loss, 0.0), info["dp_size"]
    if mode == "token-mean":
        return loss.sum() * ranks / info["batch_num_tokens"]
    if mode == "token-sum":
        return loss.sum() * ranks
    means = loss.sum(1) / mask.sum(1).clamp(min=1)
    return means.sum() * ranks / info["global_batch_size"]


def global_info(data: Batch, ranks: int, sequences: int) -> dict[str, Any]:
    return {
        "dp_size": ranks,
        "batch_num_tokens": int(data.mask.sum()),
        "global_batch_size": sequences,
        "loss_scale_factor": None,
    }


def verl_step(
    data: Batch, ranks: int, micro_batches: int, loss_fn: Callable[..., Any], **call: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient after verl's step: a sum over micro-batches, a mean over ranks."""
    rows = len(data.reward) // (ranks * micro_batches)
    total, gradient = torch.zeros(()).double(), torch.zeros_like(data.pi)
    for part in range(ranks * micro_batches):
        micro = data.rows(slice(part * rows, (part + 1) * rows))
        loss, metrics = loss_fn(**micro, rollout_is_weights=None, **call)
        assert all(isinstance(m, float) and math.isfinite(m) for m in metrics.values())
        gradient += torch.autograd.grad(loss, data.pi)[0] / ranks
        total += loss.detach() / ranks
    return total, gradient


@pytest.mark.parametrize("split", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 8)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_verl_any_split_of_the_batch_takes_one_step(ratio: str, mode: str, split: tuple[int, int]):
    data = batch()
    # verl's count of sequences is the mini-batch size: the empty ones are in it.
    sequences = len(data.reward)
    config = SimpleNamespace(global_batch_info=global_info(data, split[0], sequences))
    loss_fn = functools.partial(verl.topr_policy_loss, ratio=ratio)
    loss, gradient = verl_step(data, *split, loss_fn, loss_agg_mode=mode, config=config)
    normalizer = sequences if mode == "seq-mean-token-mean" else None
    expected = whole(data, ratio=ratio, reduction=MODES[mode], normalizer=normalizer)
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("limits", [TOPR, TIS, Limits(0.5, 2, 0.1, 1.5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_verl_gradient_is_that_of_its_own_aggregation(ratio: str, mode: str, limits: Limits):
    data = batch()
    info = global_info(data, 2, 8)
    loss, _ = verl.topr_policy_loss(
        **data.rows(slice(None)),
        loss_agg_mode=mode,
        config=SimpleNamespace(global_batch_info=info),
        limits=limits,
        ratio=ratio,
    )
    (found,) = torch.autograd.grad(loss, data.pi)
    theirs = verl_aggregate(surrogate(data, ratio, limits), data.mask, mode, info)
    (expected,) = torch.autograd.grad(theirs, data.pi)
    expected = torch.where(data.mask, expected, 0.0)
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("config", [None, SimpleNamespace(global_batch_info={}), SimpleNamespace()])
@pytest.mark.parametrize("mode", MODES)
def test_verl_without_global_counts_means_are_local(mode: str, config: Any):
    """As agg_loss does: the non-empty sequences, or the tokens, of this call."""
    data = batch()
    loss, _ = verl.topr_policy_loss(**data.rows(slice(None)), loss_agg_mode=mode, config=config)
    (gradient,) = torch.autograd.grad(loss, data.pi)
    torch.testing.assert_close((loss.detach(), gradient), whole(data, reduction=MODES[mode]))


def test_verl_adds_its_own_terms_in_place():
    """ppo_loss of verl does ``policy_loss -= ...`` on what it gets."""
    data = batch(torch.float32)
    _, expected = whole(data)
    loss, _ = verl.topr_policy_loss(**data.rows(slice(None)))
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss -= 0.5 * torch.where(data.mask, data.pi, 0.0).sum()
    loss.backward()
    torch.testing.assert_close(data.pi.grad, expected - 0.5 * data.mask)


def test_verl_metrics_say_what_they_say():
    data = batch()
    _, metrics = verl.topr_policy_loss(**data.rows(slice(None)))
    out = topr_loss_from_log_prob(data.pi, data.mask, data.mu, data.reward)
    negative = (data.reward < 0).nonzero().flatten()
    assert len(negative) == 4 and 0 < out.weight[negative].mean() < 1
    kl = (data.mu - data.pi.detach())[data.mask].mean()
    assert metrics["actor/ppo_kl"] == pytest.approx(float(kl))
    assert metrics["actor/topr_objective"] == pytest.approx(-float(out.loss.detach()))
    assert metrics["actor/topr_negative_share"] == pytest.approx(4 / 7)
    expected = float(out.weight[negative].sum()) / 7
    assert metrics["actor/topr_negative_weight"] == pytest.approx(expected)
    assert metrics["actor/topr_dead_share"] == 0


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 4)], ids=["positive", "empty"])
def test_verl_metrics_keep_their_keys_where_data_lacks(rows: slice):
    """verl takes means over micro-batches and ranks: no key may come and go, none may be NaN."""
    data = batch()
    loss, metrics = verl.topr_policy_loss(**data.rows(rows))
    assert metrics.keys() == verl.topr_policy_loss(**data.rows(slice(None)))[1].keys()
    assert all(map(math.isfinite, metrics.values())) and loss.isfinite()
    loss.backward()
    assert data.pi.grad.isfinite().all()


def test_verl_dead_negatives_are_counted():
    data = batch()
    pi = data.pi.detach() - torch.where(data.reward < 0, 20.0, 0.0)[:, None]
    _, metrics = verl.topr_policy_loss(data.mu, pi, data.advantages, data.mask)
    assert metrics["actor/topr_dead_share"] == pytest.approx(4 / 7)
    assert metrics["actor/topr_negative_weight"] < 1e-6


def test_verl_rewards_that_are_not_finite_raise():
    data = batch()
    micro = data.rows(slice(None))
    micro["advantages"] = torch.where(data.reward[:, None] == -2, torch.nan, data.advantages)
    with pytest.raises(ValueError, match=r"reward: expected finite.*sequence 5"):
        verl.topr_policy_loss(**micro)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_agg_mode": "seq-mean-token-sum"}, "loss_agg_mode.*seq-mean-token-mean"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode.*seq-mean-token-mean"),
        ({"rollout_is_weights": torch.ones(8, 7)}, "rollout_is_weights.*rollout_is=null"),
        ({"advantages": torch.arange(56.0).view(8, 7)}, "advantages.*sequence 0.*not GAE"),
        ({"advantages": torch.ones(8)}, r"advantages: expected shape \(8, 7\)"),
        (
            {"config": SimpleNamespace(global_batch_info={"dp_size": 2, "batch_num_tokens": 9})},
            "'global_batch_size' is missing with dp_size = 2",
        ),
    ],
)
def test_verl_what_has_no_meaning_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        verl.topr_policy_loss(**{**batch().rows(slice(None)), **changes})


def test_verl_counts_that_are_no_mapping_are_refused():
    """verl's own losses unpack them with ``**``: a TypeError there, too."""
    config = SimpleNamespace(global_batch_info=None)
    with pytest.raises(TypeError, match=r"config\.global_batch_info: expected a mapping.*NoneType"):
        verl.topr_policy_loss(**batch().rows(slice(None)), config=config)


def test_verl_half_precision_is_refused():
    micro = batch().rows(slice(None))
    micro["log_prob"] = micro["log_prob"].bfloat16()
    with pytest.raises(TypeError, match=r"log_prob: expected float32.*fsdp_config.mixed_precision"):
        verl.topr_policy_loss(**micro)


@pytest.mark.parametrize("mode", MODES)
def test_verl_a_batch_without_a_scored_token_has_loss_and_gradient_0(mode: str):
    """Under token-mean its count is 0, which once killed the worker."""
    data = batch()
    micro = {**data.rows(slice(None)), "response_mask": torch.zeros_like(data.mask)}
    info = {"dp_size": 2, "batch_num_tokens": torch.tensor(0), "global_batch_size": 8}
    loss, metrics = verl.topr_policy_loss(
        **micro, loss_agg_mode=mode, config=SimpleNamespace(global_batch_info=info)
    )
    (gradient,) = torch.autograd.grad(loss, data.pi)
    assert loss == 0 and (gradient == 0).all()
    assert all(map(math.isfinite, metrics.values()))


def verl_config(rejection: str | None) -> SimpleNamespace:
    correction = SimpleNamespace(rollout_rs=rejection)
    policy = SimpleNamespace(rollout_correction=correction)
    return SimpleNamespace(global_batch_info={}, policy_loss=policy)


@pytest.mark.parametrize("rejection", ["token_k1", "seq_max_k3,token_k2"])
def test_verl_rejection_of_single_tokens_is_refused(rejection: str):
    """A token out of the mask is out of the ratio: the weight of its sequence is another."""
    with pytest.raises(ValueError, match=r"rollout_rs: .*token_k.*set rollout_rs=null"):
        verl.topr_policy_loss(**batch().rows(slice(None)), config=verl_config(rejection))
    for allowed in (None, "seq_max_k3"):
        verl.topr_policy_loss(**batch().rows(slice(None)), config=verl_config(allowed))


def test_verl_a_rejected_token_changes_the_weight():
    """Why: two tokens of a wrong answer, the one that had left it rejected."""
    mu, pi = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -4.0]])
    weights = []
    for mask in ([[1, 1]], [[1, 0]]):
        _, metrics = verl.topr_policy_loss(mu, pi, -torch.ones(1, 2), torch.tensor(mask))
        weights.append(metrics["actor/topr_negative_weight"])
    assert weights == pytest.approx([math.exp(-3), 1.0])


def test_verl_the_score_itself_as_advantage():
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    found, returns = verl.topr_advantage(rewards, mask, config=None, index=None)
    assert found.tolist() == [[1, 1, 0], [-1, -1, -1], [0, 0, 0]]
    assert returns.tolist() == found.tolist()
    with pytest.raises(ValueError, match="use_kl_in_reward: expected false"):
        verl.topr_advantage(rewards, mask, config=SimpleNamespace(use_kl_in_reward=True))


def test_verl_signs_are_shown():
    """A right answer that an estimator made negative is missing in the share of positives."""
    data = batch()
    _, metrics = verl.topr_policy_loss(**data.rows(slice(None)))
    assert metrics["actor/topr_positive_share"] == pytest.approx(2 / 7)


def fake_verl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """A verl.trainer.ppo.core_algos with a registry alone."""
    registry: dict[str, Callable[..., Any]] = {}

    def register_policy_loss(name: str) -> Callable[..., Any]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            registry[name] = function
            return function

        return decorator

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    core = sys.modules["verl.trainer.ppo.core_algos"]
    registry |= {"vanilla": print, "bypass_mode": print}
    core.POLICY_LOSS_REGISTRY = registry
    core.register_policy_loss = register_policy_loss
    core.register_adv_est = lambda name: lambda function: estimators.update({name: function})
    core.ESTIMATORS = estimators = {}
    return registry


def test_verl_register(monkeypatch: pytest.MonkeyPatch):
    registry = fake_verl(monkeypatch)
    assert verl.register() is registry["topr"]
    verl.register("geometric", ratio="geometric", limits=TIS)
    assert registry.keys() == {"topr", "geometric", "vanilla", "bypass_mode"}
    core = sys.modules["verl.trainer.ppo.core_algos"]
    assert {"topr": verl.topr_advantage} == core.ESTIMATORS
    assert verl.register() is registry["topr"]  # again: no harm
    data = batch()
    loss, _ = registry["geometric"](**data.rows(slice(None)), config=None, rollout_is_weights=None)
    torch.testing.assert_close(loss.detach(), whole(data, ratio="geometric", limits=TIS)[0])
    with pytest.raises(ValueError, match="ratio"):
        verl.register(ratio="gspo")
    with pytest.raises(TypeError, match="limits"):
        verl.register(limits="topr")


@pytest.mark.parametrize("name", ["bypass_mode", "vanilla"])
def test_verl_its_own_losses_are_not_replaced(monkeypatch: pytest.MonkeyPatch, name: str):
    """No worker is told of "bypass_mode": a loss of that name never runs, and PPO does."""
    registry = fake_verl(monkeypatch)
    with pytest.raises(ValueError, match=f"{name}.*loss_mode=topr.*bypass_mode=true"):
        verl.register(name)
    assert registry[name] is print


def test_verl_a_module_registers_on_import(monkeypatch: pytest.MonkeyPatch):
    registry = fake_verl(monkeypatch)
    monkeypatch.delitem(sys.modules, "topr_kernels.integrations.verl_plugin", raising=False)
    importlib.import_module("topr_kernels.integrations.verl_plugin")
    assert registry["topr"].func is verl.topr_policy_loss
    points = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert (
        '[project.entry-points."verl.plugins"]\ntopr = "topr_kernels.integrations.verl_plugin"'
        in points
    )


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_verl_register_without_verl():
    with pytest.raises(ImportError, match="install verl in the environment of the workers"):
        verl.register()


# prime-rl ---------------------------------------------------------------------------------------


@dataclass
class PrimeInputs:
    """The fields of prime-rl's LossInputs."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def prime_step(data: Batch, weights: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient as prime-rl's compute_loss builds them: sequence by sequence, one scale."""
    total = torch.zeros((), dtype=data.pi.dtype)
    scale = data.mask.sum().double()
    if weights is not None:
        scale = torch.where(data.mask, weights, 0.0).sum()
    for i in range(len(data.reward)):
        mask, w = data.mask[i], None
        if weights is not None:
            w = weights[i]
            mask = mask & (w != 0)
            if not mask.any():
                continue
        inputs = PrimeInputs(data.pi[i], data.mu[i], None, data.advantages[i], mask, w)
        result = prime_rl.topr_loss(inputs, **kwargs)
        assert all(m.shape == () and m.isfinite() for m in result.metrics.values())
        total = total + result.loss
    (gradient,) = torch.autograd.grad(total / scale, data.pi)
    return (total / scale).detach(), gradient


@pytest.mark.parametrize("limits", ["topr", "tis", Limits(0.5, 2, 0.1, 1.5)], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_prime_rl_sums_up_to_token_mean(ratio: str, limits: Any):
    data = batch()
    found = prime_step(data, None, ratio=ratio, limits=limits)
    preset = {"topr": TOPR, "tis": TIS}.get(limits, limits) if isinstance(limits, str) else limits
    expected = whole(data, ratio=ratio, limits=preset, reduction="token_mean")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ratio", RATIOS)
def test_prime_rl_with_weights_of_one_over_length_sums_up_to_sequence_mean(ratio: str):
    data = batch()
    weights = (1 / data.mask.sum(1).clamp(min=1).double())[:, None].expand(8, 7)
    found = prime_step(data, weights, ratio=ratio)
    expected = whole(data, ratio=ratio, reduction="sequence_mean")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_prime_rl_prompt_mean():
    """loss_aggregation = "prompt": weights of 1 / (tokens of the group), scale = number of groups."""
    data = batch()
    groups = [slice(0, 4), slice(4, 8)]
    weights = torch.zeros(8, 7, dtype=torch.float64)
    expected, gradient = torch.zeros(()).double(), torch.zeros_like(data.pi)
    for group in groups:
        weights[group] = 1 / data.mask[group].sum().double()
        out = topr_loss_from_log_prob(
            data.pi[group],
            data.mask[group],
            data.mu[group],
            data.reward[group],
            reduction="token_mean",
        )
        expected += out.loss.detach() / 2
        gradient += torch.autograd.grad(out.loss / 2, data.pi)[0]
    torch.testing.assert_close(prime_step(data, weights), (expected, gradient), rtol=1e-12, atol=0)


def inputs(i: int, **changes: Any) -> PrimeInputs:
    data = batch()
    given = {
        "trainer_logprobs": data.pi[i],
        "inference_logprobs": data.mu[i],
        "ref_logprobs": None,
        "advantages": data.advantages[i],
        "loss_mask": data.mask[i],
    }
    return PrimeInputs(**{**given, **changes})


def test_prime_rl_metrics_and_shapes():
    data = batch()
    out = topr_loss_from_log_prob(data.pi, data.mask, data.mu, data.reward)
    for i in (0, 5, 6):
        result = prime_rl.topr_loss(inputs(i))
        assert result.loss.shape == ()
        negative = float(data.reward[i] < 0)
        assert result.metrics["topr/log_ratio"] == pytest.approx(float(out.log_ratio[i]))
        assert result.metrics["topr/negative"] == negative
        weight = float(out.weight[i])
        assert result.metrics["topr/negative_weight"] == pytest.approx(negative * weight)
        objective = float(data.reward[i] * out.objective[i])
        assert result.metrics["topr/objective"] == pytest.approx(objective)


def test_prime_rl_an_empty_sequence_stays_in_the_graph():
    empty = inputs(3)
    result = prime_rl.topr_loss(empty)
    (gradient,) = torch.autograd.grad(result.loss, empty.trainer_logprobs)
    assert result.loss == 0 and (gradient == 0).all()


def test_prime_rl_inputs_of_an_older_version():
    """LossInputs once had teacher_logprobs and no loss_weights."""
    old = SimpleNamespace(**{k: v for k, v in vars(inputs(1)).items() if k != "loss_weights"})
    assert prime_rl.topr_loss(old).loss == prime_rl.topr_loss(inputs(1)).loss != 0


def test_prime_rl_limits_of_a_configuration_file():
    table = {"pos_min": 1.0, "pos_max": 1.0, "neg_min": 0.0, "neg_max": 0.0}
    assert prime_rl.topr_loss(inputs(1), limits=table).loss == 0
    assert prime_rl.topr_loss(inputs(1), limits="sft").loss == 0
    loss = prime_rl.topr_loss(inputs(1), limits="is").loss
    assert loss == prime_rl.topr_loss(inputs(1), limits=IS).loss != 0
    assert prime_rl.topr_loss(inputs(0), limits=SFT).loss != 0


@pytest.mark.parametrize(
    ("changes", "kwargs", "error", "message"),
    [
        ({"advantages": torch.arange(7.0)}, {}, ValueError, "advantages: expected one value"),
        ({"loss_weights": torch.arange(7.0)}, {}, ValueError, "loss_weights.*whole sequences"),
        ({}, {"limits": "ppo"}, ValueError, "limits: expected one of 'topr'"),
        ({}, {"limits": 1}, TypeError, "limits"),
        ({}, {"ratio": "gspo"}, ValueError, "ratio"),
        ({"trainer_logprobs": torch.zeros(7).bfloat16()}, {}, TypeError, "half precision"),
    ],
)
def test_prime_rl_what_has_no_meaning_is_refused(
    changes: dict[str, Any], kwargs: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        prime_rl.topr_loss(inputs(0, **changes), **kwargs)


# Both -------------------------------------------------------------------------------------------


def test_a_long_negative_answer_at_the_three_ratios():
    """README: 500 tokens, each 0.9 times as likely as under mu. What pushes, and by how much."""
    mu = torch.full((1, 500), -1.0, dtype=torch.float64)
    pi = (mu + math.log(0.9)).requires_grad_()
    mask, reward = torch.ones(1, 500), torch.tensor([-1.0])
    weights = {}
    for ratio in RATIOS:
        out = topr_loss_from_log_prob(pi, mask, mu, reward, ratio=ratio, reduction="sum")
        (gradient,) = torch.autograd.grad(out.loss, pi)
        # The push on every token: descent on the loss lowers log pi by this much times the rate.
        torch.testing.assert_close(gradient, out.weight.double().expand(1, 500))
        weights[ratio] = float(out.weight)
    assert weights["geometric"] == pytest.approx(0.9)
    assert weights["token"] == pytest.approx(0.9)
    assert weights["sequence"] == pytest.approx(0.9**500) == pytest.approx(1.3e-23, rel=0.02)


def test_what_lies_under_the_mask_is_never_read():
    values = torch.tensor([[9.0, 2.0, 2.0, -7.0], [torch.nan, -1.0, torch.inf, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    assert one_per_sequence("advantages", values, mask, "").tolist() == [2.0, -1.0]


def test_integrations_import_no_framework():
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'verl', 'prime_rl', 'skyrl', 'tinker', 'transformers', 'triton'}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import topr_kernels
assert not any('integrations' in m for m in sys.modules), 'part of the package proper'
import topr_kernels.integrations.prime_rl, topr_kernels.integrations.verl
import topr_kernels.integrations.skyrl, topr_kernels.integrations.tinker
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
