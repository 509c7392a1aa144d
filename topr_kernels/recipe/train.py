"""Trains on scored records with ``TOPRTrainer``; resumes where a killed run stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from topr_kernels.choices import SEGMENT_RATIOS
from topr_kernels.hf import TOPRConfig, TOPRTrainer
from topr_kernels.hf.heads import head_shape
from topr_kernels.hf.images import is_processor, tokenizer_of
from topr_kernels.limits import PRESETS, Limits
from topr_kernels.recipe.models import tokenizer_fingerprint
from topr_kernels.recipe.processes import current
from topr_kernels.recipe.record_checks import (
    check_images,
    check_scored_softmax,
    check_sources,
    check_tokens,
    training_fields,
)
from topr_kernels.recipe.records import Record, RecordError
from topr_kernels.recipe.score import workspace_bytes


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        limits: preset name or ``Limits``.
        ratio: "sequence", "geometric" or "token"; of trajectories also "segment" or "segment_geometric".
        baseline: subtracted from every reward.
        learning_rate: of AdamW; constant, without weight decay, gradient norm clipped at 1.
        batch_size: sequences per optimizer step.
        epochs: passes over the records.
        seed: of the order of the records.
        save_steps: optimizer steps between checkpoints; a kill loses at most that many.
    """

    limits: str | Limits = "topr"
    ratio: str = "sequence"
    baseline: float = 0.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int = 1
    seed: int = 0
    save_steps: int = 12


def train(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    settings: TrainSettings,
    *,
    checkpoints: Path,
    label: str = "",
) -> list[dict[str, float]]:
    """Trains the model in place, as a policy at temperature 1.

    Several processes (``processes.joined``) share every update. If ``batch_size`` does not divide the
    number of records, the last update of an epoch then repeats some of them.

    Args:
        model: a causal language model, at the weights that sampled the records.
        tokenizer: its tokenizer, or for records with images its processor.
        records: scored records; see ``trainable_fields``.
        settings: see ``TrainSettings``.
        checkpoints: folder for checkpoints (three times the model's size: weights and AdamW's two
            moments). Training continues from the last whole one found there. The caller deletes it
            once the trained model is saved.
        label: named on the progress bar.

    Returns:
        The log: one mapping of metrics per optimizer step.

    Raises:
        RecordError: as ``trainable_fields``, or if the ids come from another tokenizer, or images cannot
            be read.
        ValueError: if the model's head cannot be fused, see ``topr_kernels.hf.find_head``.
    """
    fields = trainable_fields(records, settings.limits, settings.baseline, settings.ratio)
    check_images(records, tokenizer if is_processor(tokenizer) else None)
    check_tokens(records, head_shape(model)[0], tokenizer_fingerprint(tokenizer_of(tokenizer)))
    crew = current()
    crew.first(lambda: _drop_damaged(checkpoints))
    args = TOPRConfig(
        output_dir=str(checkpoints),
        limits=settings.limits,
        ratio=settings.ratio,
        baseline=settings.baseline,
        workspace_bytes=workspace_bytes(model),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=settings.batch_size // crew.count,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        ddp_backend="gloo" if crew.count > 1 and model.device.type == "cpu" else None,
        dataloader_pin_memory=False,
    )
    trainer = TOPRTrainer(
        model=model,
        args=args,
        train_dataset=fields,
        processing_class=tokenizer,
        callbacks=[_ProgressBar(f"train {label}".strip())],
    )
    # It would print every log; the bar shows the figures that matter and the history keeps all.
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trainable_fields(
    records: Sequence[Record], limits: str | Limits, baseline: float, ratio: str
) -> list[dict[str, Any]]:
    """The fields of records that the Trainer takes.

    Args:
        records: N records. Those whose weight does not depend on mu (positives in TOPR) need none.
        limits: of the training.
        baseline: of the training.
        ratio: of the training.

    Raises:
        RecordError: if a record has no log mu that the limits read, or segments that the ratio does not
            read; if mu comes from several sources, or is not that of the policy that sampled.
    """
    cut = next((i for i, record in enumerate(records) if record.segments is not None), None)
    if cut is not None and ratio not in SEGMENT_RATIOS:
        raise RecordError(
            f"record {cut}, field 'segments': ratio={ratio!r} does not read it; use --ratio "
            f"{' or '.join(SEGMENT_RATIOS)}, or remove the field"
        )
    if isinstance(limits, str):
        limits = PRESETS[limits]
    fields = training_fields(records, limits, baseline)
    check_sources(records)
    check_scored_softmax(records)
    return fields


class _ProgressBar(TrainerCallback):
    """A progress bar over the optimizer steps with the figures to watch; no checkpoint at the end."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        shown = {"objective": "objective", "w_neg": "weight_negative_mean"}
        self.bar.set_postfix(
            {name: f"{entry[key]:.3f}" for name, key in shown.items() if key in entry},
            refresh=False,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        # The Trainer ends with a checkpoint; the caller is about to save the model itself.
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def checkpoints_in(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, first to last; other files are ignored."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*")]
    return [path for _, path in sorted((int(m[1]), p) for m, p in named if m and p.is_dir())]


def _last_checkpoint(folder: Path) -> str | None:
    checkpoints = checkpoints_in(folder)
    return str(checkpoints[-1]) if checkpoints else None


def _drop_damaged(folder: Path) -> None:
    """Deletes checkpoints that a kill left half-written: the Trainer writes its state last."""
    for checkpoint in checkpoints_in(folder):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
