"""The examples that train on a file of records, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny import random_model, save
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> tuple[list[Any], Any]:
    """What an example returns, and the model that it saved."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rewards = [1.0, -1.0] * 3
    lines = [
        json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 2 - (r > 0)}", "reward": r})
        for i, r in enumerate(rewards)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, out = save(random_model(), folder / "tiny"), folder / "out"
    flags = ["--batch-size", "3", "--learning-rate", "1e-2"]
    logs = module.main([str(model), str(folder / "records.jsonl"), str(out), *flags])
    return logs, AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("name", ["trainer", "loop"])
def test_it_scores_trains_and_saves(name: str, tmp_path: Path):
    logs, trained = run(name, tmp_path)
    steps = [x for x in logs if "kl_k1" in x]
    assert len(steps) == 2
    assert sum(x["positive_share"] for x in steps) == pytest.approx(1)
    # mu is the model that starts, and the first update moves the policy.
    assert steps[0]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[1]["kl_k1"]) > 1e-2
    before = dict(random_model().named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in trained.named_parameters())


def test_a_tiny_model_learns_to_count_in_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From guesses and their rewards alone, on pictures that it has not seen."""
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("images", EXAMPLES / "images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.main(pictures=320, epochs=5)
    assert before < 0.5 and after > 0.7
