"""The small world's decoder: its making, its samples and their log mu."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.learning.world import sums
from topr_kernels import log_prob

IGNORE = -100
#: Pretraining by the tokens of an answer: (passes, steps, sums a step).
COURSES = {
    # To see that it runs; it learns nothing.
    13: [(1, 4, 8)],
    19: [(1, 240, 32)],
    55: [(1, 240, 32), (3, 250, 24)],
    199: [(1, 240, 32), (3, 150, 16), (11, 400, 12)],
}


def new_model(seed: int) -> LlamaForCausalLM:
    """Two layers of random weights, 88,000 parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(sums.ALPHABET),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            # With transformers' 0.02 a net as narrow as this needs twice the steps to begin to copy.
            initializer_range=0.08,
            rope_theta=1000.0,
            bos_token_id=None,
            eos_token_id=sums.END,
            pad_token_id=sums.PAD,
        )
    )


def sequences(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, T]; after an answer's end nothing is scored."""
    ended = (answers == sums.END).cumsum(1) - (answers == sums.END).long() > 0
    labels = torch.where(ended, IGNORE, answers)
    return torch.cat([prompts, answers], 1), torch.cat(
        [torch.full_like(prompts, IGNORE), labels], 1
    )


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    prompts: Tensor,
    tokens: int,
    generator: torch.Generator,
    *,
    greedy: bool = False,
    batch: int = 256,
) -> Tensor:
    """Answers [B, tokens] to prompts [B, P] at T = 1; the end and what follows it is the end."""
    out = []
    for part in prompts.split(batch):
        cache, ids, made = DynamicCache(), part, []
        done = torch.zeros(len(part), dtype=torch.bool)
        for _ in range(tokens):
            logits = model(input_ids=ids, cache=cache, logits_to_keep=1).logits[:, -1]
            if greedy:
                chosen = logits.argmax(1)
            else:
                noise = torch.empty_like(logits).exponential_(generator=generator)
                chosen = (logits.softmax(1) / noise).argmax(1)
            chosen = torch.where(done, sums.END, chosen)
            made.append(chosen)
            done |= chosen == sums.END
            if done.all():
                break
            ids = chosen[:, None]
        rows = torch.stack(made, 1)
        out.append(torch.nn.functional.pad(rows, (0, tokens - rows.shape[1]), value=sums.END))
    return torch.cat(out)


@torch.no_grad()
def score(model: LlamaForCausalLM, prompts: Tensor, answers: Tensor, batch: int = 64) -> Tensor:
    """Log mu per token [B, T], aligned with the labels of ``sequences``."""
    ids, labels = sequences(prompts, answers)
    parts = zip(ids.split(batch), labels.split(batch), strict=True)
    return torch.cat([log_prob(model(input_ids=i).logits, y).log_prob for i, y in parts])


def accuracy(
    model: LlamaForCausalLM,
    questions: Tensor,
    tokens: int,
    generator: torch.Generator,
    *,
    greedy: bool = False,
) -> dict[str, float]:
    """Shares, in per cent, of right answers and of those that cannot be read; one answer each."""
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return {"right": 0.0, "unreadable": 100.0}
    answers = sample(model, sums.prompts(questions), tokens, generator, greedy=greedy)
    return shares(*judge(questions, answers))


def shares(right: Tensor, readable: Tensor) -> dict[str, float]:
    """In per cent, of answers that are right and that cannot be read."""
    return {
        "right": round(100 * right.float().mean().item(), 3),
        "unreadable": round(100 - 100 * readable.float().mean().item(), 3),
    }


def judge(questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each answer is right and whether it can be read: two [B] bool."""
    said, readable = sums.results(answers, questions.shape[1])
    return readable & (said == sums.truth(questions)).all(1), readable


def pretrain(
    columns: int, passes: int, forget: float, seed: int, stop_at: float = 100.0
) -> LlamaForCausalLM:
    """A base model, trained from scratch on worked sums.

    Args:
        columns: digits of a number.
        passes: of an answer.
        forget: share of the solutions to learn from that never carry: the model's habit.
        seed: of weights and sums.
        stop_at: training ends when this many per cent of sampled answers are right. With
            ``forget`` = 0 what is wrong then is the noise of sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    model = new_model(seed)
    tokens = sums.STEP * columns * passes + 1
    held_out = sums.draw(512, columns, torch.Generator().manual_seed(10**6 + seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    course = [(n, batch) for n, steps, batch in COURSES[tokens] for _ in range(steps)]
    for step, (worked, batch) in enumerate(course, 1):
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / len(course)))
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, step / 30) * decay
        questions = sums.draw(batch, columns, generator)
        forgets = torch.rand(batch, generator=generator) < forget
        # Not used: the base models of the figures drew it.
        torch.randint(1, (), generator=generator)
        ids, labels = sequences(sums.prompts(questions), sums.solutions(questions, forgets, worked))
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        look = stop_at < 100 and step > len(course) // 4 and step % 5 == 0
        if look and accuracy(model, held_out, tokens, generator)["right"] >= stop_at:
            break
    return model
