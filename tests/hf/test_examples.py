"""The examples but the agent's and the images', with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch

pytest.importorskip("transformers")

from tiny import random_model, save, tiny_model
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
#: As `accelerate launch --cpu` has it.
CPU = {"ACCELERATE_USE_CPU": "true"}


def example(name: str) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(folder: Path) -> list[str]:
    """A tiny model, six records of its own, and where the trained one goes."""
    rewards = [1.0, -1.0] * 3
    lines = [
        json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 2 - (r > 0)}", "reward": r})
        for i, r in enumerate(rewards)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = save(random_model(), folder / "tiny")
    return [str(model), str(folder / "records.jsonl"), str(folder / "out")]


def moved(folder: Path) -> dict[str, torch.Tensor]:
    """How far each weight of the saved model lies from where it began."""
    trained = AutoModelForCausalLM.from_pretrained(folder / "out")
    before = dict(random_model().named_parameters())
    return {name: (p - before[name]).detach() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("name", ["trainer", "loop"])
def test_it_scores_trains_and_saves(name: str, tmp_path: Path):
    flags = ["--batch-size", "3", "--learning-rate", "1e-2"]
    logs = example(name).main([*arguments(tmp_path), *flags])
    steps = [x for x in logs if "kl_k1" in x]
    assert len(steps) == 2
    assert sum(x["positive_share"] for x in steps) == pytest.approx(1)
    # mu is the model that starts, and the first update moves the policy.
    assert steps[0]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[1]["kl_k1"]) > 1e-2
    assert all(p.any() for p in moved(tmp_path).values())


def worker(name: str, folder: str, batch_size: str) -> None:
    """An example as one process; plain gradient descent, so that weights tell of gradients."""
    module = example(name)
    module.AdamW = torch.optim.SGD
    names = [str(Path(folder, x)) for x in ("tiny", "records.jsonl", "out")]
    module.main([*names, "--batch-size", batch_size, "--learning-rate", "1"])


@pytest.mark.parametrize("name, size", [("accelerate_loop", "3"), ("ddp", "4")])
def test_two_processes_take_the_steps_of_one(name: str, size: str, tmp_path: Path):
    """Accelerate: two batches of 3, or one on each process. DDP: four sequences, then two."""
    weights, steps = [], []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        arguments(folder)
        printed = launch(world, "test_examples.worker", name, str(folder), size, env=CPU)[0]
        steps.append(re.findall(r"loss (\S+), (\d+) sequences", printed))
        weights.append(moved(folder))
    assert [int(n) for _, n in steps[0]] == ([6] if name == "accelerate_loop" else [4, 2])
    assert steps[0] == steps[1]
    for parameter, change in weights[0].items():
        assert change.any()
        bound = 1e-4 * change.abs().max().item()
        torch.testing.assert_close(change, weights[1][parameter], rtol=0, atol=bound)


def test_the_last_step_with_accelerate_counts_what_is_left(tmp_path: Path):
    arguments(tmp_path)
    (printed,) = launch(1, "test_examples.worker", "accelerate_loop", str(tmp_path), "2", env=CPU)
    assert [int(n) for n in re.findall(r"(\d+) sequences", printed)] == [4, 2]


def test_grpo(tmp_path: Path):
    pytest.importorskip("trl")
    model = save(tiny_model(), tmp_path / "tiny")
    flags = ["--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    logs = example("grpo").main([*flags, "--learning-rate", "1e-2"])
    steps = [x for x in logs if "topr/objective" in x]
    assert len(steps) == 2 and all(math.isfinite(x["loss"]) for x in steps)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_tiny_model_learns_to_count_in_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From guesses and their rewards alone, on pictures that it has not seen."""
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    before, after = example("images").main(pictures=320, epochs=5)
    assert before < 0.5 and after > 0.7
