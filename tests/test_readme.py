"""The code that README shows runs, and does what README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from topr_kernels import topr_loss
from topr_kernels.testing import make_batch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The first Python block under a heading."""
    return README.split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]


def test_equivalent_to() -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 2)], 17, dtype=torch.float32)
    for reward, baseline in (([1.0, -1.0, 0.5], 0.0), ([1.0, 0.0, 1.0], 0.5)):
        logits = batch.logits.clone().requires_grad_()
        names: dict[str, Any] = {
            "torch": torch,
            "logits": logits,
            "labels": batch.labels,
            "mu": batch.behavior_log_prob,
            "reward": torch.tensor(reward),
            "baseline": baseline,
        }
        exec(block("Equivalent to"), names)
        names["loss"].backward()
        ours = batch.logits.clone().requires_grad_()
        loss = topr_loss(ours, *batch[1:3], torch.tensor(reward), baseline=baseline).loss
        loss.backward()
        torch.testing.assert_close(loss, names["loss"])
        torch.testing.assert_close(ours.grad, logits.grad, rtol=1e-4, atol=1e-7)


def test_twelve_lines() -> None:
    batch = make_batch([(2, 4), (1, 6)], 17, dtype=torch.float32)

    def model(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=logits * 1)

    logits = batch.logits.clone().requires_grad_()
    names: dict[str, Any] = {
        "model": model,
        "frozen": model,
        "batch": {"input_ids": batch.labels},
        "labels": batch.labels,
        "reward": torch.tensor([1.0, -1.0]),
    }
    exec(block("Twelve lines"), names)
    assert logits.grad is not None and logits.grad.any()
    assert names["out"].weight.tolist() == [1.0, 1.0]  # nothing has been trained yet


def test_the_table_of_seeds_is_the_one_that_was_measured() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "demo_seeds.py"
    command = [sys.executable, str(script), "--table-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in README


def test_the_tables_are_those_that_were_measured() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "report.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 5
    for table in tables:
        assert table in README
