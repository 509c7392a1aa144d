"""TOPRGRPOTrainer over several turns: TRL runs a tool between them, and its tokens are not scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from test_trl import config, parameters
from test_turns import HERMES, tokenizer
from tiny import tiny_config
from transformers import LlamaForCausalLM, PrinterCallback

from topr_kernels.hf.trl import TOPRGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*environment_factory.*experimental")
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|eot|>'
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|eot\|>\s*", "content": "text"},
    },
}


class Calculator:
    """An environment of TRL: its methods are the tools."""

    calls = 0

    def reset(self, **_: Any) -> None:
        """Nothing to forget."""

    def multiply(self, a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: the first number.
            b: the second number.

        Returns:
            Their product.
        """
        Calculator.calls += 1
        return a * b


class Scripted(TOPRGRPOTrainer):
    """Says what a policy that uses the tool would; all else is TRL's and ours."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        said = []
        for i, ids in enumerate(prompt_ids):
            called = "tool_response" in self._tokenizer.decode(ids)
            said.append(f"It is {'12' if i % 3 else '7'}.<|eot|>" if called or i % 4 == 3 else CALL)
        return [self._tokenizer(text)["input_ids"] for text in said], None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.seen.append(inputs)
        return super()._compute_loss(model, inputs)


def right(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    return [1.0 if "12" in str(turns[-1].get("content")) else -1.0 for turns in completions]


@pytest.mark.parametrize("ratio", ["sequence", "segment"])
def test_a_step_over_several_turns_scores_what_the_policy_wrote(tmp_path: Path, ratio: str):
    tokens = tokenizer(HERMES)
    tokens.response_template = RESPONSES
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokens), eos_token_id=tokens.eos_token_id))
    prompts = [[{"role": "user", "content": f"3*4? ({i})"}] for i in range(2)]
    run = Scripted(
        model,
        right,
        config(tmp_path, max_completion_length=256),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokens,
        environment_factory=Calculator,
        ratio=ratio,
    )
    run.remove_callback(PrinterCallback)
    run.seen, before, Calculator.calls = [], parameters(run), 0
    run.train()
    assert Calculator.calls == 6
    (inputs,) = run.seen
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    tool = inputs["completion_mask"] * (1 - inputs["tool_mask"])
    for ids, own, others in zip(inputs["completion_ids"], mask, tool, strict=True):
        text = tokens.decode(ids[others.bool()])
        if others.any():
            assert "<tool_response>\n12\n</tool_response>" in text and "It is" not in text
        assert "tool_response" not in tokens.decode(ids[own.bool()])
    assert tool.any(1).sum() == 6
    (log,) = (e for e in run.state.log_history if "loss" in e)
    assert log["topr/length_mean"] == pytest.approx(mask.sum().item() / 8)
    assert log["grad_norm"] > 1e-3
    assert any(not torch.equal(p, before[n]) for n, p in parameters(run).items())
