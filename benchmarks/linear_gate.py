"""The training gate of the active-vocabulary backward: does tau change what a trained head learns?

    python benchmarks/linear_gate.py --out FOLDER [--seeds 0 1 2] [--steps 300] [--log2-tau -10 -14]
    python benchmarks/linear_gate.py --out FOLDER --quick --seeds 0 --steps 2    # does it run?

For each seed the model (SmolLM2-135M-Instruct: its head is tied) is trained, head included, by AdamW
from the same start on the same batches in exact mode and with each tau; answers to two-term sums and
differences, scored and balanced as in ``topr demo``. Compared at the end: accuracy on held-out
questions, and over the last third of the steps objective, weight of the negatives and entropy; the
drift of the head's rows, apart for rows that were active in some step of the tau run and rows that
never were. Seed noise is the spread of the exact runs; the gate asks whether tau stays inside it.

Every finished run is a file in FOLDER and is not run again; gate.json has the figures of all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from topr_kernels import TOPR, kernels, linear_topr_loss
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.forward import completion_hidden
from topr_kernels.hf.heads import find_head
from topr_kernels.linear.operators import linear_kernels
from topr_kernels.linear.tile import RowStats
from topr_kernels.ops import linear as ops
from topr_kernels.ops.options import Transforms
from topr_kernels.recipe.curate import subsample_negatives
from topr_kernels.recipe.evaluate import evaluate
from topr_kernels.recipe.generate import generate
from topr_kernels.recipe.manifests import write_or_check_settings
from topr_kernels.recipe.models import LoadedModel, load_model
from topr_kernels.recipe.options import SettingsError, model_key
from topr_kernels.recipe.record_checks import training_fields
from topr_kernels.recipe.records import Record, read_records, write_records
from topr_kernels.recipe.score import score, workspace_bytes
from topr_kernels.recipe.tasks import ARITHMETIC, Question, held_out_split

BATCH = 8
LEARNING_RATE = 1e-5
SCORED_TOGETHER = 32
RECORDING = "gate"


class Setting(NamedTuple):
    """What all runs of a folder share."""

    #: As in ``load_model``.
    model: str
    steps: int
    #: Questions to train on, and held out.
    questions: int
    held_out: int

    def split(self) -> tuple[list[Question], list[Question]]:
        """-> (questions to train on, held-out questions)."""
        return held_out_split(ARITHMETIC, self.questions, self.held_out, 0)


def prepare(out: Path, setting: Setting) -> list[Record]:
    """Samples and scores the training records once, for all runs."""
    path = out / "records.parquet"
    if not path.exists():
        loaded = load_model(setting.model)
        records = generate(
            loaded.model,
            loaded.tokenizer,
            ARITHMETIC,
            setting.split()[0],
            model_name=loaded.name,
            samples=8,
            max_new_tokens=16,
            batch_size=128,
            seed=0,
        )
        records = subsample_negatives(records, 0.5, seed=0)
        pad = loaded.tokenizer.pad_token_id
        records = score(loaded.model, records, pad_token_id=pad, batch_size=SCORED_TOGETHER)
        write_records(path, records)
    return read_records(path)


def record_columns(weight: Tensor) -> Tensor:
    """Registers ``RECORDING``: what "auto" is for this head, and a note of the columns it is asked for.

    Returns:
        [V] bool on the device of ``weight`` [V, D]: whether some backward has multiplied this row.
    """
    ever = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    name = kernels.resolve("auto", weight, kernels.LINEAR)
    tile = kernels.linear_tile(name)

    def gradient(*args: Any) -> Tensor:
        ever[:] = True
        return tile.gradient(*args)

    def gather(
        z: Tensor,
        label: Tensor,
        stats: RowStats,
        transforms: Transforms,
        columns: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ever[columns] = True
        return tile.gather(z, label, stats, transforms, columns, dtype)

    ops.register(RECORDING, linear_kernels(tile._replace(gradient=gradient, gather=gather)))
    kernels.LINEAR[RECORDING] = kernels.LINEAR[name]
    return ever


def train(records: list[Record], seed: int, tau: float, setting: Setting) -> dict[str, Any]:
    """One run; -> its figures, and the head's drift per row under "drift" and "active"."""
    loaded = load_model(setting.model)
    log, drift, ever = trained(loaded, records, seed, tau, setting.steps)
    result = evaluate(
        loaded.model,
        loaded.tokenizer,
        ARITHMETIC,
        setting.split()[1],
        max_new_tokens=16,
        batch_size=100,
        seed=seed,
        label=f"seed {seed}",
    )
    last = log[-max(1, setting.steps // 3) :]
    return {
        "seed": seed,
        "tau": tau,
        "steps": setting.steps,
        "greedy": result.greedy.accuracy,
        "sampled": result.sampled.accuracy,
        **{k: mean([entry[k] for entry in last]) for k in last[0]},
        "drift": drift.cpu(),
        "active": ever.cpu(),
    }


def trained(
    loaded: LoadedModel, records: list[Record], seed: int, tau: float, steps: int
) -> tuple[list[dict[str, float]], Tensor, Tensor]:
    """Trains the model; -> (figures of every step, [V] drift of the head's rows, [V] ever active)."""
    model = loaded.model
    model.train()
    head = find_head(model)
    before = head.weight.detach().clone()
    rows = training_fields(records, TOPR, 0.0)
    collate = CompletionCollator(loaded.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    ever = record_columns(head.weight)
    size = min(BATCH, len(rows))
    order: list[int] = []
    log: list[dict[str, float]] = []
    for _ in tqdm(range(steps), desc=f"seed {seed}, tau {tau:g}", unit="step"):
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator).tolist()
        batch = collate([rows[order.pop()] for _ in range(size)])
        keep = batch["logits_to_keep"]
        out = linear_topr_loss(
            completion_hidden(model, batch),
            head.weight,
            batch["labels"][:, -keep:],
            batch["behavior_log_prob"][:, -keep:],
            batch["reward"],
            **head.options,
            entropy=True,
            grad_tolerance=tau,
            workspace_bytes=workspace_bytes(model),
            impl=RECORDING,
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures = {k: float(v) for k, v in out.metrics().items()}
        log.append(
            {
                **{k: figures[k] for k in ("objective", "entropy", "weight_negative_mean")},
                "active_share": float(out.active_share),
                "left_out": float(out.left_out),
            }
        )
    drift = (head.weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    return log, drift, ever


def mean(values: list[float]) -> float:
    """Mean of what is defined."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else math.nan


def run(out: Path, setting: Setting, seeds: list[int], taus: list[float]) -> list[dict[str, Any]]:
    """All runs that are not yet there; tau before exact, which needs to know the active rows."""
    records = prepare(out, setting)
    found = []
    for seed in seeds:
        masks: dict[float, Tensor] = {}
        for tau in [*taus, 0.0]:
            path = out / f"seed{seed}_tau{tau:g}.pt"
            if not path.exists():
                result = train(records, seed, tau, setting)
                torch.save(result, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
            result = torch.load(path)
            if tau:
                masks[tau] = result["active"]
            drift = result.pop("drift")
            result.pop("active")
            for t, mask in masks.items():
                if tau in (0.0, t):
                    result[f"drift_active_{t:g}"] = float(drift[mask].mean())
                    result[f"drift_never_{t:g}"] = float(drift[~mask].mean())
                    result[f"never_active_share_{t:g}"] = float((~mask).float().mean())
            found.append(result)
            (out / "gate.json").write_text(json.dumps(found, indent=1))
    return found


def report(found: list[dict[str, Any]]) -> None:
    """Prints mean and standard deviation over the seeds, per tau."""
    names = [k for k in found[0] if k not in ("seed", "tau", "steps")]
    names += [k for f in found for k in f if k not in (*names, "seed", "tau", "steps")]
    taus = sorted({f["tau"] for f in found})
    print(f"{'':24s}" + "".join(f"{'exact' if not t else f'tau {t:.2g}':>22s}" for t in taus))
    for name in dict.fromkeys(names):
        cells = []
        for tau in taus:
            values = [f[name] for f in found if f["tau"] == tau and name in f]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{mean(values):12.4g} ± {spread:.2g}" if values else "")
        print(f"{name:24s}" + "".join(f"{cell:>22s}" for cell in cells))


def main(arguments: list[str] | None = None) -> None:
    """Runs and prints the gate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log2-tau", type=int, nargs="+", default=[-10])
    parser.add_argument("--model", default="smollm2", help="smollm2, a local folder, or a hub id")
    parser.add_argument(
        "--quick", action="store_true", help="few questions: the figures mean nothing"
    )
    args = parser.parse_args(arguments)
    setting = Setting(args.model, args.steps, *((8, 4) if args.quick else (128, 200)))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        shared = setting._replace(model=model_key(setting.model))._asdict()
        write_or_check_settings(args.out / "settings.json", shared, args.out)
    except SettingsError as error:
        raise SystemExit(str(error)) from error
    report(run(args.out, setting, args.seeds, [2.0**t for t in args.log2_tau]))


if __name__ == "__main__":
    main()
