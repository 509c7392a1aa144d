"""The Trainer where a wrapper shards the parameters: FSDP2 and ZeRO-3 against one process."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from processes import launch
from test_trainer import config, rows, two_process_model
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, PrinterCallback

from topr_kernels.hf import TOPRTrainer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

#: All eight records in every step, so that their order does not matter.
STEPS = {"max_steps": 5, "baseline": -0.4, "seed": 3}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
DATA = rows(8, lengths=[3, 1, 4, 0, 2, 4, 1, 2])


def train(folder: Path, tied: bool, before: Any = None, **settings: Any) -> TOPRTrainer:
    args = config(folder, **STEPS, **settings)
    if before is not None:
        before()
    run = TOPRTrainer(
        two_process_model(tied),
        args,
        train_dataset=DATA,
        eval_dataset=DATA,
        processing_class=tiny_tokenizer(),
    )
    run.remove_callback(PrinterCallback)
    run.train()
    return run


def save(run: TOPRTrainer, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Rank 0 writes what came of it; evaluation has run sharded on every rank."""
    evaluated = run.evaluate()["eval_objective"]
    if run.args.process_index == 0:
        figures = {
            "processes": run.accelerator.num_processes,
            "kind": str(run.accelerator.distributed_type),
            "grad_norms": [e["grad_norm"] for e in run.state.log_history if "grad_norm" in e],
            "evaluated": evaluated,
        }
        (folder / "figures.json").write_text(json.dumps(figures))
        torch.save(weights, folder / "weights.pt")


def fsdp_worker(folder: str, tied: bool, offload: bool) -> None:
    import torch.distributed.fsdp as fsdp
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    # Memory is pinned for an accelerator only.
    policy: Any = fsdp.CPUOffloadPolicy
    fsdp.CPUOffloadPolicy = functools.partial(policy, pin_memory=False)  # type: ignore[misc]

    def pretend() -> None:
        # Accelerate turns FSDP on for accelerators only; torch's FSDP2 runs on a CPU as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    wrap = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_offload": offload,
    }
    run = train(Path(folder), tied, pretend, fsdp=True, fsdp_config=wrap, **TWO)
    assert isinstance(run.model.lm_head.weight, DTensor)
    assert isinstance(run.accelerator.state.fsdp_plugin.cpu_offload, policy) == offload
    weights = {n: p.detach().full_tensor() for n, p in run.model.named_parameters()}
    save(run, Path(folder), weights)


def without_shared_memory() -> None:
    """DeepSpeed would compile its own collectives for a CPU, most of a minute, instead of gloo."""
    torch.set_num_threads(1)
    # As an attribute of its package that name is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    assert callable(backend.build_shm_op)
    backend.build_shm_op = lambda: None


def zero_worker(folder: str, tied: bool) -> None:
    import deepspeed

    without_shared_memory()
    zero = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    run = train(Path(folder), tied, deepspeed=zero, **TWO)
    assert run.model.lm_head.weight.shape == (0,)
    weights = {}
    for name, p in run.model.named_parameters():
        with deepspeed.zero.GatheredParameters(p):
            weights[name] = p.detach().clone()
    save(run, Path(folder), weights)


def partitioned_worker(folder: str) -> None:
    without_shared_memory()
    zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    # From here on transformers partitions what it loads.
    args = config(Path(folder), behavior="initial", deepspeed=zero, ddp_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.shape == (0,)
    records = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in DATA]
    with pytest.raises(ValueError, match=r"ZeRO-3 partitioned .*as it was loaded.*'recorded'"):
        TOPRTrainer(model, args, train_dataset=records, processing_class=tiny_tokenizer())
    print("refused")


def check(folder: Path, tied: bool, kind: str) -> None:
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["processes"] == 2 and kind in figures["kind"]
    one = train(folder, tied, per_device_train_batch_size=8)
    norms = [e["grad_norm"] for e in one.state.log_history if "grad_norm" in e]
    assert len(norms) == 5 and min(norms) > 0.1
    assert figures["grad_norms"] == pytest.approx(norms, rel=1e-4)
    assert figures["evaluated"] == pytest.approx(one.evaluate()["eval_objective"], rel=1e-4)
    weights = torch.load(folder / "weights.pt")
    start = dict(two_process_model(tied).named_parameters())
    for name, p in one.model.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, start[name])


@pytest.mark.parametrize(("tied", "offload"), [(False, False), (True, False), (False, True)])
def test_fsdp2_ends_where_one_process_ends(tmp_path: Path, tied: bool, offload: bool):
    launch(
        2,
        "test_sharded_training.fsdp_worker",
        str(tmp_path),
        tied,
        offload,
        env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    )
    check(tmp_path, tied, "FSDP")


@pytest.mark.parametrize("tied", [False, True])
def test_zero_3_ends_where_one_process_ends(tmp_path: Path, tied: bool):
    pytest.importorskip("deepspeed")
    launch(
        2,
        "test_sharded_training.zero_worker",
        str(tmp_path),
        tied,
        imports=("deepspeed",),
    )
    check(tmp_path, tied, "DEEPSPEED")


def test_a_model_that_zero_3_partitioned_cannot_be_scored(tmp_path: Path):
    pytest.importorskip("deepspeed")
    two_process_model(True).save_pretrained(tmp_path)
    for output in launch(
        2,
        "test_sharded_training.partitioned_worker",
        str(tmp_path),
        imports=("deepspeed",),
    ):
        assert output.rstrip().endswith("refused")
