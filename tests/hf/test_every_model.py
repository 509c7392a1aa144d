"""A sample of every model, judged on every path; and that the table and its page say what was found.

``python -m every_model`` judges them all: ``make every-model``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from every_model import __main__ as command
from every_model import judge as judging
from every_model import sweep as sweeping
from every_model import table
from every_model.building import build, entries
from every_model.judge import ERROR, PATHS, REFUSED, SAME, WRONG, judge
from every_model.sweep import judged, sweep

ENTRIES = {entry.model: entry for entry in entries()}
VERSION = transformers.__version__
#: By size of use, of different kinds.
SAMPLE = [
    "Cohere2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
]
#: What refusals of the fused head, or of a whole class, say.
REFUSALS = {
    # It writes to its logits in place, where the head left something else.
    "ChameleonForConditionalGeneration": r"logits differ by inf.*fused_head=False",
    "CpmAntForCausalLM": "lets tokens see later ones",
    "DiffusionGemmaForBlockDiffusion": r"gave logits of shape \(1, \d+, 96\)",
    "Florence2ForConditionalGeneration": "an encoder and a decoder",
    "ProphetNetForCausalLM": r"head's input has shape.*one row for each token; .*fused_head=False",
    "MusicgenForCausalLM": "cannot run a row of tokens alone: RuntimeError",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_is_the_same_or_refused(name: str):
    """Loss and gradients of its own logits on every path, as the table of its version says."""
    found = judged(ENTRIES[name])
    assert found["fused"] == found["logits"] == found["padded"] == {"verdict": SAME}
    for path in ("packed", "shared"):
        assert found[path]["verdict"] == SAME or found[path]["remedy"] == SAME, found[path]
    known = table.read()["versions"].get(VERSION)
    if known is not None:
        assert table.shortened(found) == known[name]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused_by_name(name: str):
    found = judged(ENTRIES[name], ["fused"])["fused"]
    assert found["verdict"] == REFUSED
    assert re.search(REFUSALS[name], found["message"]), found["message"]


@pytest.mark.parametrize(
    "name",
    [
        "AyaVisionForConditionalGeneration",
        "BlipForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "NemotronH_Omni_Reasoning_V3",
    ],
)
def test_the_head_of_a_language_model_inside_another_is_fused(name: str):
    """Its own forward may leave out the text model's scale, or not pass on where its head is."""
    if name not in ENTRIES:
        pytest.skip(f"transformers {VERSION} has no {name}")
    assert judged(ENTRIES[name], ["fused"])["fused"] == {"verdict": SAME}


def test_the_judge_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    """A loss, a gradient or an error of ours that is off."""
    run = judging.causal_lm_topr_loss

    def verdict(change: Any) -> dict[str, Any]:
        monkeypatch.setattr(judging, "causal_lm_topr_loss", change)
        return judge(build(ENTRIES["LlamaForCausalLM"]), paths=["fused"])["fused"]

    def shifted(*args: Any, **options: Any) -> Any:
        out = run(*args, **options)
        return out._replace(loss=out.loss + 0.01)

    def detached(model: Any, batch: Any, **options: Any) -> Any:
        model.model.layers[0].requires_grad_(False)
        out = run(model, batch, **options)
        return out

    def broken(*args: Any, **options: Any) -> Any:
        raise KeyError("broken")

    assert verdict(shifted)["verdict"] == WRONG
    assert verdict(detached)["verdict"] == WRONG
    assert verdict(broken)["verdict"] == ERROR
    assert verdict(run)["verdict"] == SAME


def test_a_crash_or_a_hang_ends_no_sweep(monkeypatch: pytest.MonkeyPatch):
    def act(entry: Any) -> dict[str, Any]:
        if entry.model == "GPT2LMHeadModel":
            os._exit(3)
        if entry.model == "LlamaForCausalLM":
            time.sleep(60)
        return {"fused": {"verdict": SAME}}

    monkeypatch.setattr(sweeping, "judged", act)
    chosen = [ENTRIES[n] for n in ("GPT2LMHeadModel", "LlamaForCausalLM", "PhiForCausalLM")]
    found = {entry.model: verdicts for entry, verdicts in sweep(chosen, jobs=2, seconds=1.5)}
    assert found == {
        "GPT2LMHeadModel": {"crashed": "its process ended with 3"},
        "LlamaForCausalLM": {"crashed": "no verdict in 1.5 s"},
        "PhiForCausalLM": {"fused": {"verdict": SAME}},
    }


def test_the_command_prints_the_verdicts_on_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["every_model", "GPT2LMHeadModel", "--jobs", "1"])
    # It would silence the logs of the tests that follow.
    monkeypatch.setattr(command, "quiet", lambda: None)
    assert command.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert {printed["GPT2LMHeadModel"][path]["verdict"] for path in PATHS} == {SAME}


def test_the_table_has_every_class_and_no_fault():
    versions = table.read()["versions"]
    if VERSION in versions:
        assert list(versions[VERSION]) == list(ENTRIES)
    for models in versions.values():
        built = {name: found for name, found in models.items() if set(found) == set(PATHS)}
        assert len(models) - len(built) <= 5
        for name, found in built.items():
            assert not {WRONG, ERROR} & {table.verdict(found[path]) for path in PATHS}, name


def test_the_page_and_the_readme_say_what_the_table_says():
    made = table.read()
    assert table.PAGE.read_text() == table.page(made)
    newest = table.counts(next(iter(made["versions"].values())))
    readme = Path(table.ROOT, "README.md").read_text()
    for words in (
        f"Of {newest['all']} classes",
        f"{newest['same']} train with the loss and the gradients of their own logits",
        f"{newest['refused']} are refused",
    ):
        assert words in readme
