"""verl's own actor worker on a CPU, from verl's own configuration files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Read when verl is imported, which registers the CPU as a platform, and when it builds an engine.
os.environ.update(
    VERL_PLATFORM="cpu",
    VERL_USE_EXTERNAL_MODULES="verl_cpu",
    VERL_ENGINE_DEVICE="cuda",
    VERL_ENGINE_VENDOR="nvidia",
)

import plain
import torch
import verl
from hydra import compose, initialize_config_dir
from verl import DataProto
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import left_right_2_no_padding

CONFIGS = str(Path(verl.__file__).parent / "trainer" / "config")


def actor_config(model: str, micro: int, *changes: str) -> Any:
    """verl's configuration files, with a tiny model on a CPU."""
    prefix = "actor_rollout_ref."
    settings = [
        f"{prefix}model.path={model}",
        f"{prefix}model.use_remove_padding=false",
        f"{prefix}model.enable_gradient_checkpointing=false",
        f"+{prefix}model.override_config.attn_implementation=eager",
        f"{prefix}actor.strategy=fsdp2",
        f"{prefix}actor.use_torch_compile=false",
        f"{prefix}actor.fsdp_config.use_torch_compile=false",
        f"{prefix}actor.optim.lr=0.01",
        f"{prefix}actor.optim.weight_decay=0",
        f"+{prefix}actor.optim.override_optimizer_config.eps={plain.EPS}",
        f"{prefix}actor.ppo_micro_batch_size_per_gpu={micro}",
        f"{prefix}rollout.log_prob_micro_batch_size_per_gpu=4",
        f"{prefix}rollout.name=vllm",
        *changes,
    ]
    with initialize_config_dir(config_dir=CONFIGS, version_base=None):
        return compose("ppo_trainer", overrides=settings)


def worker(config: Any) -> Any:
    """The actor, built: a rank of a group of its own."""
    # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses.
    torch.distributed.init_process_group("gloo")
    actor = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    actor.init_model()
    return actor


def update(actor: Any, config: Any, data: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What RayPPOTrainer._update_actor sends to the workers, and what they return."""
    batch = left_right_2_no_padding(DataProto.from_single_dict(data).to_tensordict())
    rows = len(data["responses"]) * torch.distributed.get_world_size()
    tu.assign_non_tensor(
        batch,
        calculate_entropy=False,
        global_batch_size=rows,
        mini_batch_size=rows,
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
        temperature=1.0,
    )
    return tu.get(actor.update_actor(batch), "metrics")


def weights(actor: Any) -> dict[str, torch.Tensor]:
    state = actor.actor.engine.module.state_dict()
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in state.items()}
