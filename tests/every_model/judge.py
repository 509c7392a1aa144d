"""Runs one model on every path and compares loss and gradients with those of its own logits.

The truth is one forward pass for each record alone, without padding and without anything of ours: the
model's own logits, and the paper's formula in fp64 over them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import topr_kernels
from every_model.further import Further
from every_model.tiny_configs import FIRST_TOKEN, VOCAB
from topr_kernels import Limits, reference
from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss

SAME, REFUSED, WRONG, ERROR = "same", "refused", "wrong", "error"
#: PEFT cannot adapt all of its linear layers.
PEFT = "peft refuses"
#: Weights of both signs vary with the ratio.
LIMITS = Limits(0.5, 2.0, 0.5, 2.0)
#: Error of the loss, and of a gradient relative to its norm or a share of the largest one.
LOSS_ALLOWED, GRADIENT_ALLOWED, SHARE = 1e-4, 2e-3, 1e-3
#: Prompt and completion lengths; the first two are as long as each other, the last two begin alike.
SHAPES = [(6, 6), (3, 9), (4, 3), (4, 5)]
PATHS = ("fused", "logits", "padded", "packed", "shared", "lora")
OURS = Path(topr_kernels.__file__).parent

Record = dict[str, Any]


#: Of most models.
NOTHING = Further()


class Unfit(Exception):
    """A model does not run plain rows of tokens, whoever asks."""


class Truth(NamedTuple):
    """Loss and gradients of records alone."""

    loss: float
    gradients: dict[str, Tensor]


def make_records(begin: Sequence[int] = (), seed: int = 0) -> list[Record]:
    """Records whose log mu is not known yet, and whose prompts begin with given ids."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for i, (p, c) in enumerate(SHAPES):
        tokens = torch.randint(FIRST_TOKEN, VOCAB, (p + c,), generator=generator).tolist()
        prompt = records[2]["prompt_token_ids"] if i == 3 else [*begin, *tokens[:p]]
        records.append(
            {
                "prompt_token_ids": prompt,
                "completion_token_ids": tokens[p:],
                "reward": (1.0, -1.0, -0.5, 1.0)[i],
            }
        )
    return records


def alone(model: nn.Module, record: Record, further: Further = NOTHING) -> Truth:
    """Loss and gradients of a record; gives it log mu near log pi if it has none.

    Raises:
        Unfit: if the model cannot run it, or returns something else than a row of logits for each token.
    """
    prompt, completion = record["prompt_token_ids"], record["completion_token_ids"]
    ids = torch.tensor([prompt + completion])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    model.zero_grad()
    try:
        logits = model(input_ids=ids, use_cache=False, **further(ids, labels)).logits
    except Exception as error:
        raise Unfit(f"{type(error).__name__}: {error}"[:300]) from error
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise Unfit(f"logits of shape {tuple(logits.shape)} for {ids.shape[1]} tokens")
    if not logits.requires_grad:
        raise Unfit("logits without gradient")
    log_prob = reference.token_log_probs(
        logits[0, len(prompt) - 1 : -1].double(), ids[0, len(prompt) :]
    )
    record.setdefault("behavior_log_prob", (log_prob.detach() + 0.05).clamp(max=0.0).tolist())
    behavior = torch.zeros(ids.shape, dtype=torch.float64)
    behavior[0, len(prompt) :] = torch.tensor(record["behavior_log_prob"], dtype=torch.float32)
    reward = torch.tensor([record["reward"]], dtype=torch.float64)
    loss = reference.topr_loss(logits.double(), labels, behavior, reward, limits=LIMITS).loss
    loss.backward()
    return Truth(float(loss.detach()), _gradients(model))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mean(truths: Sequence[Truth]) -> Truth:
    """Of a batch of these records."""
    names = {name for truth in truths for name in truth.gradients}
    n = len(truths)
    return Truth(
        sum(truth.loss for truth in truths) / n,
        {name: sum(t.gradients[name] for t in truths if name in t.gradients) / n for name in names},
    )


def compare(loss: float, gradients: dict[str, Tensor], truth: Truth) -> dict[str, Any]:
    """The verdict, and the largest errors."""
    largest = max(g.norm().item() for g in truth.gradients.values())
    assert largest > 0 and truth.loss != 0, "nothing to compare"
    worst, where = 0.0, ""
    for name in truth.gradients.keys() | gradients.keys():
        found, expected = gradients.get(name), truth.gradients.get(name)
        zero = torch.zeros(())
        found, expected = zero if found is None else found, zero if expected is None else expected
        error = (found - expected).norm().item() / max(expected.norm().item(), SHARE * largest)
        # Written so that NaN counts.
        if not error <= worst:
            worst, where = error, name
    off = abs(loss - truth.loss) / max(1.0, abs(truth.loss))
    same = off <= LOSS_ALLOWED and worst <= GRADIENT_ALLOWED
    result: dict[str, Any] = {"verdict": SAME if same else WRONG}
    if not same:
        result |= {"loss": f"{off:.1e}", "gradient": f"{worst:.1e} ({where})"}
    return result


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The verdict of an action, which may refuse or break."""
    try:
        return action()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(OURS)
        if ours and isinstance(error, ValueError):
            return {"verdict": REFUSED, "message": str(error)}
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"verdict": ERROR, "message": f"{type(error).__name__}: {error} ({where})"[:300]}


def run(
    model: nn.Module, batches: Sequence[dict[str, Any]], truth: Truth, **options: Any
) -> dict[str, Any]:
    """The verdict on batches whose losses add up."""
    model.zero_grad()
    count = sum(len(batch["reward"]) for batch in batches)
    loss = 0.0
    for batch in batches:
        out = causal_lm_topr_loss(
            model, batch, limits=LIMITS, normalizer=count, check=True, **options
        )
        out.loss.backward()
        loss += float(out.loss.detach())
    return compare(loss, _gradients(model), truth)


def judge(model: Any, further: Further = NOTHING, paths: Sequence[str] = PATHS) -> dict[str, Any]:
    """Verdict by path.

    Args:
        model: of ``build``.
        further: what it asks for beside tokens.
        paths: those to judge.
    """
    records = make_records(further.begin)

    def batch(chosen: list[Record], **layout: bool) -> dict[str, Any]:
        return _with(further, CompletionCollator(0, **layout)(chosen))

    try:
        truths = [alone(model, record, further) for record in records]
    except Unfit as unfit:
        for record in records:
            record["behavior_log_prob"] = [-1.0] * len(record["completion_token_ids"])
        verdict = attempt(lambda: run(model, [batch(records[:2])], Truth(0.0, {})))
        return dict.fromkeys(paths, verdict | {"alone": str(unfit)})
    even, whole = mean(truths[:2]), mean(truths)
    equal, single = [batch(records[:2])], [batch([record]) for record in records]
    found: dict[str, Any] = {}

    def one(path: str, made: Callable[[], Any], truth: Truth, remedy: Any, **options: Any) -> None:
        if path not in paths:
            return
        found[path] = attempt(lambda: run(model, made(), truth, **options))
        if found[path]["verdict"] == REFUSED:
            found[path]["remedy"] = attempt(remedy)["verdict"]

    logits = {"fused_head": False}
    one("fused", lambda: equal, even, lambda: run(model, equal, even, **logits))
    one("logits", lambda: equal, even, lambda: run(model, single[:2], even, **logits), **logits)
    head = logits if found.get("fused", {}).get("verdict") == REFUSED else {}
    layouts = {"padded": {}, "packed": {"packing": True}, "shared": {"share_prefix": True}}
    for path, layout in layouts.items():
        one(
            path,
            lambda layout=layout: [batch(records, **layout)],
            whole,
            lambda: run(model, single, whole, **head),
            **head,
        )
    if "lora" in paths:
        found["lora"] = _lora(model, records[:2], further, head)
    return found


def _with(further: Further, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with what the model asks for, as the collator makes it of images."""
    if not further.names:
        return batch
    batch |= further(batch["input_ids"], batch["labels"])
    # Beside images models count positions of their own.
    return {n: x for n, x in batch.items() if n != "position_ids" or "cu_seq_lens_q" in batch}


def _lora(
    model: Any, records: list[Record], further: Further, head: dict[str, bool]
) -> dict[str, Any]:
    """The verdict with LoRA on all linear layers but the head, or on those that PEFT can adapt."""
    # PEFT may fail with half of its adapters in place. A state that is kept forbids the copy.
    try:
        own = deepcopy(model)
    except RuntimeError:
        own = model
    try:
        return _adapted(own, "all-linear", records, further, head)
    except Exception as error:
        refused = {"verdict": PEFT, "message": f"{type(error).__name__}: {error}"[:300]}
    # Not: modules that are more than a product, and the layers of Mamba that PEFT leaves alone.
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not model.get_output_embeddings()
        and not name.endswith("out_proj")
    ]
    try:
        return refused | {"remedy": _adapted(model, plain, records, further, head)["verdict"]}
    except Exception:
        return refused


def _adapted(
    model: Any,
    targets: str | list[str],
    records: list[Record],
    further: Further,
    head: dict[str, bool],
) -> dict[str, Any]:
    """The verdict with LoRA on some layers; raises what PEFT or the adapted model raises."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    records = [{n: x for n, x in r.items() if n != "behavior_log_prob"} for r in records]
    truth = mean([alone(adapted, record, further) for record in records])
    batch = _with(further, CompletionCollator(0)(records))
    return attempt(lambda: run(adapted, [batch], truth, **head))
