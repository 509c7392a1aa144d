"""The small world's verifier: a decoder that reads a question and a solution and writes a judgement.

A judgement is ``y`` or ``n`` and the end. The base verifier has learned to check, and then to judge
carelessly: often it writes nothing, and what it writes is often wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.learning.world import sums
from benchmarks.learning.world.model import new_model, sample, sequences

RIGHT, WRONG = (sums.ALPHABET.index(letter) for letter in "yn")
#: Tokens of a judgement.
TOKENS = 2
#: Of the judgements that the base learned from last: share without a verdict, and of the others the
#: share that is true.
SILENT, TRUE = 0.3, 0.6
#: Pretraining: steps with true judgements, steps with careless ones, solutions a step.
COURSE = {13: (2, 2, 8), 19: (300, 60, 32)}


def judge(judgements: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Whether judgements [B, 2] are true of solutions ``right`` [B], and can be read: two [B] bool."""
    readable = ((judgements[:, 0] == RIGHT) | (judgements[:, 0] == WRONG)) & (
        judgements[:, 1] == sums.END
    )
    return readable & ((judgements[:, 0] == RIGHT) == right), readable


def ask(
    model: LlamaForCausalLM, prompts: Tensor, solutions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Judgements [B, 2] of solutions [B, T], and what the model read [B, P + T]."""
    read = torch.cat([prompts, solutions], 1)
    return sample(model, read, TOKENS, generator), read


def pretrain(columns: int, seed: int) -> LlamaForCausalLM:
    """A base verifier, trained from scratch on worked sums and judgements of them."""
    generator = torch.Generator().manual_seed(700_000 + seed)
    model = new_model(700_000 + seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    true, careless, batch = COURSE[sums.STEP * columns + 1]
    for step in range(1, true + careless + 1):
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / (true + careless)))
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, step / 30) * decay
        questions = sums.draw(batch, columns, generator)
        forgets = torch.rand(batch, generator=generator) < 0.5
        prompts, solutions = sums.prompts(questions), sums.solutions(questions, forgets)
        said = judgements(~forgets, step > true, generator)
        ids, labels = sequences(torch.cat([prompts, solutions], 1), said)
        # To work sums is to know what to check.
        labels[:, prompts.shape[1] : prompts.shape[1] + solutions.shape[1]] = solutions
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def judgements(right: Tensor, careless: bool, generator: torch.Generator) -> Tensor:
    """Judgements [B, 2] of solutions that are ``right`` [B] bool."""
    draws = torch.rand(2, len(right), generator=generator)
    true = draws[0] < (TRUE if careless else 1.0)
    said = torch.where(true == right, RIGHT, WRONG)
    if careless:
        said = torch.where(draws[1] < SILENT, sums.END, said)
    return torch.stack([said, torch.full_like(said, sums.END)], 1)
