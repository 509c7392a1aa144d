"""Records with images: from messages to the loss, by families of models, with their own processors."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from tiny import tiny_tokenizer
from vision import FAMILIES, SHOWN, model, picture, processor

from topr_kernels.hf import (
    CompletionCollator,
    TOPRConfig,
    TOPRTrainer,
    causal_lm_log_prob,
    causal_lm_topr_loss,
    prepare_records,
    score_behavior,
)

Row = dict[str, Any]
IMAGE = {"type": "image"}
#: As its chat template writes it, and the pictures of each record in order.
TEXTS = ["u:%how many?;a:12<eos>", "u:a%b%;a:345<eos>", "u:no picture;a:7<eos>"]
PICTURES = [[picture(16, 16)], [picture(32, 16, 1), picture(16, 32, 2)], []]


def said(text: str) -> Row:
    return {"type": "text", "text": text}


def records(**changes: Any) -> list[Row]:
    """One picture, two of other sizes, and none."""
    asked = [[IMAGE, said("how many?")], [said("a"), IMAGE, said("b"), IMAGE], "no picture"]
    answers = ["12", "345", "7"]
    return [
        {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": answer}],
            "reward": reward,
            **({"images": images} if images else {}),
            **changes,
        }
        for content, answer, reward, images in zip(
            asked, answers, [1.0, -1.0, -0.5], PICTURES, strict=True
        )
    ]


def collator(family: str, **options: Any) -> CompletionCollator:
    return CompletionCollator(0, processor=processor(family), **options)


def own_log_probs(family: str, trained: Any) -> list[torch.Tensor]:
    """Of each completion, by the processor's and the model's own calls on the whole text alone."""
    found = []
    for text, images in zip(TEXTS, PICTURES, strict=True):
        given = processor(family)(
            text=[text.replace("%", SHOWN[family])],
            images=[images] if images else None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        if "mm_token_type_ids" not in processor(family).model_input_names and family != "gemma3":
            # The tokenizer's own.
            given.pop("token_type_ids", None)
        answer = len(text.rpartition("a:")[2].replace("<eos>", "$"))
        logits = trained(**given).logits[0, -answer - 1 : -1]
        ids = given["input_ids"][0, -answer:]
        found.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str):
    """Two pictures of unlike size, one, and none, in one batch, padded; one record alone, without."""
    trained = model(family)
    with torch.no_grad():
        expected = own_log_probs(family, trained)
    ready = prepare_records(records(), processor(family))
    for size in (3, 1):
        mu = score_behavior(trained, ready, collator(family), batch_size=size, progress=False)
        for found, own in zip(mu, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), own, rtol=1e-5, atol=1e-5)
    # Off-policy: negatives have weights below 1.
    scored = [
        {**record, "behavior_log_prob": [x + 0.1 * i for x in values]}
        for i, (record, values) in enumerate(zip(ready, mu, strict=True))
    ]
    batch = collator(family)(scored)
    out = causal_lm_topr_loss(trained, batch, grad_tolerance=0.0)
    out.loss.backward()
    gradients = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    assert any("vision" in n or "visual" in n for n in gradients)
    trained.zero_grad()
    loss = 0
    for record, log_prob in zip(scored, own_log_probs(family, trained), strict=True):
        ratio = (log_prob.sum() - torch.tensor(record["behavior_log_prob"]).sum()).detach().exp()
        weight = 1.0 if record["reward"] > 0 else float(ratio.clamp(0, 1))
        loss = loss - weight * record["reward"] * log_prob.mean() / 3
    loss.backward()
    for name, p in trained.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        if name in gradients or own.any():
            torch.testing.assert_close(
                gradients[name], own, rtol=1e-3, atol=1e-5 * (1 + float(own.abs().max()))
            )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_batch_of_text_alone_is_the_one_without_a_processor(family: str):
    trained, tokens = model(family), processor(family).tokenizer
    ready = prepare_records(records()[2:], processor(family))
    assert ready == prepare_records(
        records()[2:],
        tokens,
        chat_template_kwargs={"chat_template": processor(family).chat_template},
    )
    scored = [{**ready[0], "behavior_log_prob": [-1.0, -2.0]}] * 2
    batch, plain = collator(family)(scored), CompletionCollator(0)(scored)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(torch.as_tensor(batch[n]), torch.as_tensor(x)) for n, x in plain.items())
    trained.train()
    assert causal_lm_topr_loss(trained, batch).loss.isfinite()


def trainer_of(family: str, trained: Any, folder: Any, data: Any, **options: Any) -> TOPRTrainer:
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "behavior": "initial",
        "save_strategy": "no",
        **options,
    }
    return TOPRTrainer(
        model=trained,
        args=TOPRConfig(**args),
        train_dataset=data,
        processing_class=processor(family),
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava_next", "idefics3"])
def test_ratios_are_exactly_one_before_the_first_update(family: str, tmp_path: Any):
    trained = model(family)
    seen = []

    class Sees(TOPRTrainer):
        def _topr(self, *args: Any) -> Any:
            out = super()._topr(*args)
            seen.append(out.weight.tolist())
            return out

    ready = trainer_of(family, trained, tmp_path, records(), max_steps=2)
    ready.__class__ = Sees
    before = {n: p.clone() for n, p in trained.named_parameters()}
    ready.train()
    assert seen[0] == [1.0, 1.0, 1.0] and seen[1] != seen[0]
    moved = [n for n, p in trained.named_parameters() if not torch.equal(p, before[n])]
    assert any("vision" in n or "visual" in n for n in moved)
    assert any("q_proj" in n for n in moved)
