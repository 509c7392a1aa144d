"""AReaL itself: its FSDP actor, its advantages, its micro-batches, on a CPU over gloo."""

from __future__ import annotations

import functools
import os

# Compiling AReaL's log-probs would take longer than all else.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from areal.api.cli_args import MicroBatchSpec, NormConfig, OptimizerConfig, PPOActorConfig
from areal.api.io_struct import FinetuneSpec
from processes import case, launch
from test_verl_real import folder

from topr_kernels.integrations import areal

__all__ = ["folder"]  # a fixture


def config(path: str, micro: int, **changes: Any) -> PPOActorConfig:
    settings = {
        "experiment_name": "e",
        "trial_name": "t",
        "path": path,
        "dtype": "float32",
        "attn_impl": "sdpa",
        "backend": "fsdp:d1",
        "mb_spec": MicroBatchSpec(n_mbs=micro),
        "ppo_n_minibatches": 1,
        "kl_ctl": 0.0,
        "recompute_logprob": False,
        "use_decoupled_loss": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "optimizer": OptimizerConfig(
            lr=0.01,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            eps=plain.EPS,
            lr_scheduler_type="constant",
            warmup_steps_proportion=0.0,
            gradient_clipping=1.0,
        ),
    }
    return PPOActorConfig(**{**settings, **changes})


def flat(data: plain.Batch) -> list[dict[str, torch.Tensor]]:
    """AReaL's trajectories: no padding on the left, log mu and mask at the tokens themselves."""
    items = []
    for i in range(plain.ROWS):
        kept = data.attention[i] == 1
        prompt = torch.zeros(plain.PROMPT)
        items.append(
            {
                "input_ids": data.ids[i][kept][None],
                "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.bool),
                "loss_mask": torch.cat([prompt, data.mask[i].float()])[kept][None].int(),
                "logprobs": torch.cat([prompt, data.mu[i]])[kept][None],
                "rewards": data.score[i][None],
            }
        )
    return items


def without_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """AReaL gives FlashAttention a dict; sdpa of this transformers reads packing off the positions."""
    return args, {**kwargs, "attention_mask": None}


def two_steps(folder: str, parts: int, reduction: str) -> None:
    """A rank: two updates of AReaL's actor against the plain loop."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    actor = areal.TOPRActor(config(folder, parts, backend=f"fsdp:d{ranks}"))
    actor.reduction = reduction
    actor.create_process_group()
    actor.initialize(None, FinetuneSpec(total_train_epochs=1, dataset_size=64, train_batch_size=8))
    actor.model.register_forward_pre_hook(without_mask, with_kwargs=True)
    policy = plain.model()
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    each = plain.ROWS // ranks
    steps = []
    for data in [plain.batch(seed, policy) for seed in (1, 2)]:
        mine = flat(data)[rank * each : (rank + 1) * each]
        actor.ppo_update(actor.compute_advantages(mine))
        count = float((data.mask.sum(1) > 0).sum())  # AReaL has no count of empty answers
        unit = (count, True) if reduction == "sequence_mean" else (float(data.mask.sum()), False)
        steps.append((data, data.score, unit))
    expected = plain.train(policy, steps)
    state = actor.model.state_dict()
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in state.items()}
    print("distance", plain.distance(found, expected, start))
    with case(reduction):
        assert plain.distance(found, expected, start) < 1e-5


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_two_steps_are_those_of_the_plain_loop(
    folder: Path, ranks: int, parts: int, reduction: str
):
    print(*launch(ranks, "test_areal_real.two_steps", str(folder), parts, reduction), sep="\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_ctl": 0.1},
        {"recompute_logprob": True},
        {"adv_norm": NormConfig()},
        {"reward_norm": NormConfig()},
        {"m2_threshold": 0.1},
        {"enable_tree_training": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_its_settings_are_refused_by_name(folder: Path, changes: dict[str, Any]):
    with pytest.raises(ValueError, match=f"actor.{next(iter(changes))}"):
        areal.TOPRActor(config(str(folder), 1, **changes))


def test_its_default_penalty_is_refused():
    default = PPOActorConfig(experiment_name="e", trial_name="t", path="p")
    names = [name for name, wrong, _ in areal.refusals(default) if wrong]
    assert "kl_ctl" in names


def test_its_count_of_tokens_would_be_another_loss():
    """Why the two functions belong together."""
    data = {
        "loss_mask": torch.tensor([1, 1, 1, 1, 0, 1]),
        "cu_seqlens": torch.tensor([0, 4, 5, 6], dtype=torch.int32),
    }
    assert int(areal.loss_weight(data)) == 2
    assert int(functools.partial(areal.loss_weight, reduction="token_mean")(data)) == 5
