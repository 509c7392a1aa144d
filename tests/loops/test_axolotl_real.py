"""Axolotl itself, on a CPU: a YAML file, its own loading and trainer builder, our plug-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from safetensors.torch import load_file
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("axolotl")
    policy = plain.model()
    policy.save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    data = plain.batch(1, policy)
    with (path / "records.jsonl").open("w") as file:
        for i in range(plain.ROWS):
            asked = data.attention[i, : plain.PROMPT] == 1
            answered = data.attention[i, plain.PROMPT :] == 1
            record = {
                "prompt_token_ids": data.ids[i, : plain.PROMPT][asked].tolist(),
                "completion_token_ids": data.ids[i, plain.PROMPT :][answered].tolist(),
                "completion_mask": data.mask[i][answered].tolist(),
                "behavior_log_prob": data.mu[i][answered].tolist(),
                "reward": data.score[i].item(),
            }
            file.write(json.dumps(record) + "\n")
    return path


def config(folder: Path, out: Path, **changes: Any) -> Any:
    settings = {
        "base_model": str(folder / "model"),
        "plugins": ["topr_kernels.integrations.axolotl.TOPRPlugin"],
        "datasets": [{"path": str(folder / "records.jsonl"), "ds_type": "json"}],
        "topr": {"limits": "topr"},
        "sequence_len": 64,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "adam_epsilon": plain.EPS,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "attn_implementation": "eager",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "val_set_size": 0.0,
        "save_strategy": "no",
        "output_dir": str(out),
        **changes,
    }
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(settings))
    return load_cfg(str(path))


@pytest.mark.parametrize(("micro", "packing"), [(8, False), (2, False), (2, True)])
def test_two_steps_are_those_of_the_plain_loop(
    micro: int, packing: bool, folder: Path, tmp_path: Path
):
    topr = {"limits": "topr", "packing": packing}
    parts = {"micro_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
    do_train(config(folder, tmp_path / "out", topr=topr, **parts), TrainerCliArgs())
    policy = plain.model()
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    data = plain.batch(1, policy)
    step = (data, data.score, (float((data.mask.sum(1) > 0).sum()), True))
    expected = plain.train(policy, [step, step])
    found = load_file(tmp_path / "out" / "model.safetensors")
    moved = plain.distance(found, expected, start)
    print(f"axolotl, micro-batches of {micro}, packing {packing}: {moved:.1e}")
    assert moved < 1e-5


def test_it_evaluates_and_scores_mu(folder: Path, tmp_path: Path):
    lines = (folder / "records.jsonl").read_text().splitlines()
    bare = [{k: v for k, v in json.loads(x).items() if k != "behavior_log_prob"} for x in lines]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in bare))
    data = [{"path": str(path), "ds_type": "json"}]
    changes = {"datasets": data, "test_datasets": [{**data[0], "split": "train"}], "eval_steps": 1}
    cfg = config(folder, tmp_path / "out", topr={"behavior": "initial"}, max_steps=1, **changes)
    do_train(cfg, TrainerCliArgs())
    assert torch.isfinite(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_packing": True}, "sample_packing: got True .*packing: true under topr"),
        ({"val_set_size": 0.5}, "val_set_size: got 0.5 .*test_datasets"),
        ({"rl": "dpo"}, "rl: got .*leave it out"),
        ({"topr": {"lr": 1}}, "topr: got 'lr', which is no setting of the loss"),
        ({"topr": {"max_steps": 1}}, "topr: got 'max_steps'"),
        ({"topr": {"limits": "ppo"}}, "limits: got 'ppo'"),
        ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio: got 16.0, which Axolotl's own trainers"),
        ({"sequence_len": 5}, "expected at most 5 together"),
    ],
)
def test_what_would_be_another_training_is_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        do_train(config(folder, tmp_path / "out", **changes), TrainerCliArgs())
