"""Runs a cell: its base model, its samples, its training with the package's loss, its figures."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.learning.ppo import ppo_objective
from benchmarks.learning.world import sums, verifier
from benchmarks.learning.world.cells import BASES, HABITS, HELD_OUT, KEPT, WARM_UP, Cell
from benchmarks.learning.world.model import (
    IGNORE,
    accuracy,
    judge,
    pretrain,
    sample,
    score,
    sequences,
    shares,
)
from topr_kernels import baseline_for_positive_share, log_prob, topr_loss
from topr_kernels.limits import PRESETS
from topr_kernels.recipe.curate import anna_karenina, to_positive_share
from topr_kernels.recipe.records import Record
from topr_kernels.recipe.voting import weighted_majority

CACHE = Path(__file__).parents[3] / "runs" / "learning" / "world"
#: Of a verifier on every answer that votes.
JUDGEMENTS = 4
#: Epochs after which the model is looked at.
LOOKS = (1, 2, 4, 16)


class Batch(NamedTuple):
    """Samples: prompts [B, P], answers [B, T], log mu [B, P + T], rewards [B] of +-1, groups [B]."""

    prompts: Tensor
    answers: Tensor
    behavior: Tensor
    reward: Tensor
    group: Tensor

    def rows(self, index: Tensor) -> Batch:
        """Some of them."""
        return Batch(*(x[index] for x in self))


@functools.lru_cache(maxsize=2)
def base_model(columns: int, passes: int, right: int, errors: str, seed: int) -> LlamaForCausalLM:
    """The base model, from the cache if it is there."""
    habit = HABITS[right] if errors == "habit" else 0.0
    stop_at = 100.0 if errors == "habit" else float(right)
    name = f"{errors}-{columns}x{passes}-{right}-{seed}"
    return _cached(name, lambda: pretrain(columns, passes, habit, seed, stop_at))


@functools.lru_cache(maxsize=2)
def base_verifier(columns: int, seed: int) -> LlamaForCausalLM:
    """The base verifier, from the cache if it is there."""
    return _cached(f"verifier-{columns}-{seed}", lambda: verifier.pretrain(columns, seed))


def _cached(name: str, make: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    path = CACHE / f"{name}.pt"
    if path.exists():
        return cast(LlamaForCausalLM, torch.load(path, weights_only=False))
    model = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may make it at once.
    partial = path.with_suffix(f".{time.time_ns()}")
    torch.save(model, partial)
    partial.rename(path)
    return model


def draw(model: LlamaForCausalLM, cell: Cell, turn: int) -> Batch:
    """A round's samples of the model, with their log mu; a verifier's are judgements of solutions."""
    generator = torch.Generator().manual_seed(1000 * cell.seed + turn)
    questions = sums.draw(cell.questions, cell.columns, generator).repeat_interleave(
        cell.samples, 0
    )
    prompts = sums.prompts(questions)
    if cell.verifier:
        solutions = sample(_solver_of(cell), prompts, cell.tokens, generator)
        answers, prompts = verifier.ask(model, prompts, solutions, generator)
        right, _ = verifier.judge(answers, judge(questions, solutions)[0])
    else:
        answers = sample(model, prompts, cell.tokens, generator)
        right, _ = judge(questions, answers)
    group = torch.arange(cell.questions).repeat_interleave(cell.samples)
    reward = torch.where(right, 1.0, -1.0)
    return Batch(prompts, answers, score(model, prompts, answers), reward, group)


@functools.lru_cache(maxsize=2)
def first_round(cell: Cell) -> Batch:
    """The base model's samples, drawn once for all methods of a seed."""
    return draw(_base_of(cell), cell, 0)


def look(model: LlamaForCausalLM, cell: Cell) -> dict[str, float]:
    """Accuracy on held-out questions; questions and noise are those of every look of a seed."""
    generator = torch.Generator().manual_seed(500_000 + cell.seed)
    questions = sums.draw(HELD_OUT[cell.tokens], cell.columns, generator)
    if cell.verifier:
        prompts = sums.prompts(questions)
        solutions = sample(_solver_of(cell), prompts, cell.tokens, generator)
        said, _ = verifier.ask(model, prompts, solutions, generator)
        return shares(*verifier.judge(said, judge(questions, solutions)[0]))
    return accuracy(model, questions, cell.tokens, generator)


def vote(model: LlamaForCausalLM, cell: Cell, questions: int = 128) -> dict[str, float]:
    """Of held-out questions: per cent right of single answers and of the majority of ``votes``.

    A verifier weighs answers of the base model by how many of ``JUDGEMENTS`` say that they are right:
    those of the base verifier for ``untrained``, of ``model`` for ``trained``.
    """
    generator = torch.Generator().manual_seed(600_000 + cell.seed)
    asked = sums.draw(questions, cell.columns, generator).repeat_interleave(cell.votes, 0)
    prompts = sums.prompts(asked)
    solver = _solver_of(cell) if cell.verifier else model
    answers = sample(solver, prompts, cell.tokens, generator)
    right, readable = judge(asked, answers)
    said = sums.results(answers, cell.columns)[0].tolist()
    forms = [str(form) if known else None for form, known in zip(said, readable, strict=True)]
    weights = {"majority": torch.ones(len(forms))}
    if cell.verifier:
        for name, judging in (("untrained", _base_of(cell)), ("trained", model)):
            weights[name] = torch.zeros(len(forms))
            for _ in range(JUDGEMENTS):
                words, _ = verifier.ask(judging, prompts, answers, generator)
                weights[name] += verifier.judge(words, torch.ones_like(right))[0]
    found = {"single": 100 * right.float().mean().item()}
    for name, of in weights.items():
        votes = list(zip(forms, right.tolist(), of.tolist(), strict=True))
        rows = [votes[i : i + cell.votes] for i in range(0, len(votes), cell.votes)]
        found[name] = 100 * weighted_majority(rows, votes=cell.votes, draws=1, seed=0)[0]
    return {name: round(value, 3) for name, value in found.items()}


@functools.lru_cache(maxsize=2)
def first_look(cell: Cell) -> dict[str, float]:
    """The base model's, once for all methods of a seed."""
    return look(_base_of(cell), cell)


def _base_of(cell: Cell) -> LlamaForCausalLM:
    if cell.verifier:
        return base_verifier(cell.columns, cell.seed % BASES[cell.tokens])
    return _solver_of(cell)


def _solver_of(cell: Cell) -> LlamaForCausalLM:
    number = cell.seed % BASES[cell.tokens]
    return base_model(cell.columns, cell.passes, cell.right, cell.errors, number)


def _data_key(cell: Cell) -> Cell:
    names = ("seed", "columns", "passes", "right", "errors", "questions", "samples", "verifier")
    return Cell("", **{n: getattr(cell, n) for n in names})


def chosen(cell: Cell, data: Batch, seed: int) -> Batch:
    """What of a round's samples is trained on."""
    if not cell.curation:
        return data
    order = torch.randperm(len(data.reward), generator=torch.Generator().manual_seed(seed))
    if cell.curation == "uniform":
        return data.rows(order[:KEPT])
    pairs = zip(data.group.tolist(), data.reward.tolist(), strict=True)
    numbered = [_Numbered(group, reward, i) for i, (group, reward) in enumerate(pairs)]
    records = cast(Sequence[Record], numbered)
    if cell.curation == "half":
        kept = to_positive_share(records, 0.5, seed)
    else:
        kept = anna_karenina(records, KEPT, seed)
    return data.rows(torch.tensor([cast(Any, record).number for record in kept]))


class _Numbered(NamedTuple):
    """What curation reads of a record, and its place."""

    group: int
    reward: float
    number: int


def objective(
    cell: Cell, logits: Tensor, labels: Tensor, data: Batch, baseline: float
) -> tuple[Tensor, Tensor]:
    """A batch's loss and the detached weight of each sequence (mean over its tokens) [B]."""
    reward = data.reward - baseline
    if cell.method not in ("ppo", "prefix"):
        out = topr_loss(
            logits,
            labels,
            data.behavior,
            data.reward,
            limits=PRESETS[cell.method],
            ratio=cell.ratio,
            baseline=baseline,
            segments=columns_of(labels, data.answers) if cell.ratio == "segment" else None,
        )
        return out.loss, out.weight
    mask = labels != IGNORE
    found = log_prob(logits, labels).log_prob
    ratio = torch.where(mask, found - data.behavior, 0.0)
    length = mask.sum(1)
    if cell.method == "ppo":
        total = ratio.sum(1)
        weight = total.detach().exp()
        inside = torch.where(reward < 0, weight > 0.8, weight < 1.2)
        return -(ppo_objective(total, reward) / length).mean(), torch.where(inside, weight, 0.0)
    return prefix_loss(found, ratio, mask, reward)


def columns_of(labels: Tensor, answers: Tensor) -> Tensor:
    """The column of every token, shaped as ``labels`` [B, P + T]; the end belongs to the last one."""
    length = answers.shape[1]
    column = torch.arange(length).div(sums.STEP, rounding_mode="floor")
    column = column.clamp(max=(length - 1) // sums.STEP - 1)
    return torch.nn.functional.pad(column, (labels.shape[1] - length, 0)).expand_as(labels)


def prefix_loss(
    found: Tensor, ratio: Tensor, mask: Tensor, reward: Tensor
) -> tuple[Tensor, Tensor]:
    """The experiment w_t = clip(prod_{s <= t} r_s) with TOPR's limits; all [B, T], reward [B].

    It is a gradient without an objective: the loss is -(1/B) sum_s R_s / |y_s| sum_t sg(w_t) log pi_t.
    """
    length = mask.sum(1)
    tapered = ratio.detach().cumsum(1).clamp(max=0.0).exp()
    weight = torch.where((reward >= 0)[:, None], torch.ones_like(tapered), tapered)
    terms = torch.where(mask, weight * found, 0.0).sum(1) / length
    return -(reward * terms).mean(), torch.where(mask, weight, 0.0).sum(1) / length


def run(cell: Cell, rate: float) -> dict[str, Any]:
    """Trains a cell with AdamW at a learning rate; its figures.

    Returns:
        ``base`` and ``looks``: by epoch, or by round where there are several, the per cent of sampled
        answers (of a verifier, judgements) that are right and that cannot be read, and the mean weight
        of negatives in the last epoch or round; ``positive``: right answers in per cent of each round's
        samples; ``trained``: of the records trained on; ``votes``: of ``vote``, where the cell has them;
        ``seconds`` of processor time.
    """
    start = time.process_time()
    model = copy.deepcopy(_base_of(cell))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(cell.seed)
    looks: dict[str, Any] = {}
    positive, trained, updates = [], [], 0

    base = first_look(_data_key(cell))
    # To sample long answers takes longer than to train on them.
    looked = LOOKS if cell.tokens < 100 else (cell.epochs,)
    for turn in range(cell.rounds):
        data = draw(model, cell, turn) if turn else first_round(_data_key(cell))
        positive.append(_share(data))
        data = chosen(cell, data, 1000 * cell.seed + turn)
        trained.append(_share(data))
        baseline = 0.0
        if cell.share and 0 < trained[-1] < 100:
            baseline = baseline_for_positive_share(trained[-1] / 100, cell.share)
        for epoch in range(1, cell.epochs + 1):
            weights = []
            for index in torch.randperm(len(data.reward), generator=order).split(cell.batch):
                updates += 1
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, updates / WARM_UP)
                part = data.rows(index)
                ids, labels = sequences(part.prompts, part.answers)
                loss, weight = objective(cell, model(input_ids=ids).logits, labels, part, baseline)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                weights.append(weight[part.reward < 0])
            if cell.rounds == 1 and epoch in looked:
                looks[str(epoch)] = {**look(model, cell), "weight": _mean(torch.cat(weights))}
        if cell.rounds > 1:
            last = turn + 1 == cell.rounds
            if last or cell.rounds <= 3:
                looks[str(turn + 1)] = {**look(model, cell), "weight": _mean(torch.cat(weights))}
    return {
        "rate": rate,
        "base": base,
        "looks": looks,
        "positive": positive,
        "trained": trained,
        **({"votes": vote(model, cell)} if cell.votes else {}),
        "seconds": round(time.process_time() - start, 2),
    }


def _share(data: Batch) -> float:
    return round(100 * (data.reward > 0).float().mean().item(), 3)


def _mean(values: Tensor) -> float | None:
    if not len(values) or not values.isfinite().all():
        return None
    return float(f"{values.mean().item():.4g}")
