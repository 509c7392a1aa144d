"""The example of an agent, with a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from tiny import random_model, save, tiny_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.py"


def agent() -> Any:
    spec = importlib.util.spec_from_file_location("agent", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_agent_trains_on_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    example, tokenizer = agent(), tiny_tokenizer()
    flags = ["--episodes", "4", "--steps", "1"]
    records, (log, *_) = example.main(
        ["--model", str(save(random_model(), tmp_path / "tiny")), *flags]
    )
    for r in records:
        pairs = list(zip(r["completion_token_ids"], r["completion_mask"], strict=True))
        assert tokenizer.decode([x for x, own in pairs if not own]) == "Result: error\nAnswer:"
        assert [x < 0 for x in r["behavior_log_prob"]] == [bool(own) for _, own in pairs]
    written = sum(sum(r["completion_mask"]) for r in records)
    assert log["length_mean"] == pytest.approx(written / 4) and log["grad_norm"] > 0
    # Nothing but rounding moved the policy before the first step.
    assert log["log_ratio_negative_min"] == pytest.approx(0, abs=1e-4)
    assert torch.tensor([r["reward"] for r in records]).eq(-1).all()


def test_its_tool_reckons():
    calculate = agent().calculate
    found = [calculate(x) for x in (" 12 * 7\n", "3-5", "12 + x", "2 ** 99")]
    assert found == ["84", "-2", "error", "error"]
