"""What is compared: every cell with its settings, fixed before the first one ran, in their order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: Added to a cell's seed for its questions, so that they are none of those the recipe was tried on.
QUESTION_SEED = 1000
#: Trained with their own loss; the others are presets of ``topr_kernels.limits``.
PPO = "ppo"
#: Ways of choosing samples are compared by the share of right answers that they themselves give.
_NATURAL: dict[str, Any] = {"positive_share": 0.0, "epochs": 1, "eval_samples": 4}
#: The default template asks for a judgement step by step, which a model of this size does not write.
_SHOTS = """12 + 34 = 46
Verdict: right
65 - 41 = 34
Verdict: wrong
38 + 27 = 65
Verdict: right
91 + 16 = 117
Verdict: wrong
{prompt}{completion}
Verdict:"""


@dataclass(frozen=True)
class Size:
    """How large the comparisons are; the same for every method.

    Args:
        model: as in ``load_model``.
        task: as in ``topr generate``.
        task_config: settings of the data set.
        questions: training questions of a seed.
        samples: answers sampled per training question.
        held_out: held-out questions, answered greedily and by sampling after every epoch.
        max_new_tokens: longest answer.
        sample_batch: answers sampled together.
        epochs: passes over the one data set of a seed.
        lr: of AdamW, constant.
        batch_size: sequences per update.
        iterate: settings of the grids that resample, by curation.
        verifier: settings of the grid of the generative verifier: ``samples`` judgements of each of its
            training solutions, ``judgements`` of each held-out one, ``answers`` of the base model to a
            held-out question, of which all vote.
    """

    model: str = "smollm2"
    task: str = "arithmetic"
    task_config: str = "{}"
    questions: int = 128
    samples: int = 8
    held_out: int = 200
    max_new_tokens: int = 6
    sample_batch: int = 128
    epochs: int = 4
    lr: float = 2e-5
    batch_size: int = 32
    iterate: str = json.dumps(
        {
            # The recipe's defaults, written out so that later changes of them change nothing here.
            "default": {"questions": 192, "samples": 8, "eval_samples": 8},
            # The same candidates and the same number of records for both ways of choosing them.
            "uniform": {"questions": 96, "samples": 16, "size": 384, **_NATURAL},
            "anna-karenina": {"questions": 96, "samples": 16, "size": 384, **_NATURAL},
        }
    )
    verifier: str = json.dumps(
        {
            "template": _SHOTS,
            "max_new_tokens": 8,
            "samples": 4,
            "epochs": 1,
            "answers": 4,
            "judgements": 4,
            "vote_judgements": 1,
        }
    )


#: SmolLM2-135M on two-digit sums: a cell of 4 epochs takes some five minutes on one core.
SMALL = Size()
#: For a GPU; nothing of it has a committed figure unless the page shows one.
LARGE = dataclasses.replace(
    SMALL,
    questions=1024,
    samples=16,
    held_out=1000,
    sample_batch=1024,
    batch_size=64,
    iterate=json.dumps(
        {
            "default": {"questions": 1024, "samples": 16, "eval_samples": 16},
            "uniform": {"questions": 512, "samples": 64, "size": 4096, **_NATURAL},
            "anna-karenina": {"questions": 512, "samples": 64, "size": 4096, **_NATURAL},
        }
    ),
)
#: To see that everything runs; with a tiny model, seconds.
QUICK = dataclasses.replace(
    SMALL,
    task="chain_sum",
    task_config='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
    questions=32,
    samples=6,
    held_out=6,
    sample_batch=96,
    epochs=2,
    lr=1e-4,
    batch_size=4,
    iterate=json.dumps(
        {
            "default": {"questions": 16, "samples": 4, "eval_samples": 4, "iterations": 2},
            "uniform": {"questions": 16, "size": 16, "iterations": 2, **_NATURAL},
            "anna-karenina": {"questions": 16, "size": 16, "iterations": 2, **_NATURAL},
        }
    ),
)
SIZES = {"small": SMALL, "large": LARGE, "quick": QUICK}

#: What the grids that resample have in common: the defaults of ``topr iterate``.
ITERATE: dict[str, Any] = {
    "iterations": 3,
    "method": "uniform",
    "size": 0,
    "positive_share": 0.5,
    "balance": "subsample",
    "dedupe": False,
    "limits": "topr",
    "ratio": "sequence",
    "epochs": 2,
    "votes": 4,
    "draws": 100,
}


@dataclass(frozen=True, order=True)
class Cell:
    """One training to measure.

    Args:
        method: a preset of ``topr_kernels.limits``, or "ppo".
        seed: of the questions, the samples and the order of training.
        ratio: level of the ratio.
        share: p~ of Eq. 7. The data hold equally many right and wrong answers, so 0.5 needs no
            baseline; any other share is made by one.
        curation: "" for epochs on one data set; else a key of ``Size.iterate``: sample, choose and
            train, again and again.
        verifier: whether judgements of solutions are trained on, in place of solutions.
    """

    method: str
    seed: int
    ratio: str = "sequence"
    share: float = 0.5
    curation: str = ""
    verifier: bool = False

    @property
    def name(self) -> str:
        """Name of its file."""
        if self.verifier:
            return f"{self.method}-verifier-seed{self.seed}"
        middle = f"iterate-{self.curation}" if self.curation else f"{self.ratio}-p{self.percent}"
        return f"{self.method}-{middle}-seed{self.seed}"

    @property
    def percent(self) -> str:
        """p~ in per cent."""
        return f"{100 * self.share:g}"


def cell_settings(cell: Cell, size: Size) -> dict[str, Any]:
    """All that a cell's figures depend on, as plain values."""
    common = {
        "method": cell.method,
        "seed": cell.seed,
        "question_seed": QUESTION_SEED + cell.seed,
        **{n: getattr(size, n) for n in ("task", "task_config", "held_out", "max_new_tokens")},
        **{n: getattr(size, n) for n in ("sample_batch", "lr", "batch_size")},
    }
    if cell.curation:
        changes = json.loads(size.iterate)[cell.curation]
        method = "anna-karenina" if cell.curation == "anna-karenina" else "uniform"
        iterate = {**ITERATE, "method": method, "limits": cell.method, **changes}
        return {**common, "curation": cell.curation, "iterate": iterate}
    if cell.verifier:
        solutions = {n: getattr(size, n) for n in ("questions", "samples")}
        return {**common, "solutions": solutions, "verifier": json.loads(size.verifier)}
    return {
        **common,
        "ratio": cell.ratio,
        "positive_share": cell.share,
        **{n: getattr(size, n) for n in ("questions", "samples", "epochs")},
    }


#: Cells by the comparison they are for, without their seed, in the order in which they run.
GRIDS: dict[str, tuple[Cell, ...]] = {
    "core": (Cell("topr", 0), Cell("sft", 0), Cell("reinforce", 0)),
    "shares": (Cell("topr", 0, share=0.1), Cell("tis", 0, share=0.1), Cell("tis", 0)),
    "ratios": (Cell("topr", 0, "geometric"), Cell("topr", 0, "token")),
    # Not planned: added when the first seed's naive REINFORCE at 50 % had not collapsed, before any of
    # these ran. A tenth is the share of right answers that the base model has by itself.
    "naive-share": (Cell("reinforce", 0, share=0.1),),
    "methods": (Cell("ppo", 0), Cell("is", 0)),
    "iterations": (Cell("topr", 0, curation="default"),),
    "verifier": (Cell("topr", 0, verifier=True),),
    "low-shares": (Cell("topr", 0, share=0.01), Cell("tis", 0, share=0.01)),
    "curation": (Cell("topr", 0, curation="anna-karenina"), Cell("topr", 0, curation="uniform")),
    "other-shares": (
        Cell("topr", 0, share=0.2),
        Cell("tis", 0, share=0.2),
        Cell("tis", 0, share=1),
    ),
}


def cells_of(grids: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, Cell]]:
    """(grid, cell) in the order to run: grid by grid, and in each seed by seed."""
    for grid in grids:
        for seed in seeds:
            for cell in GRIDS[grid]:
                yield grid, dataclasses.replace(cell, seed=seed)
