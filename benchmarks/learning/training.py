"""Trains on one data set for several epochs and looks at the model after each; resumes by epochs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from benchmarks.learning.ppo import PPOTrainer
from topr_kernels.hf import TOPRConfig, TOPRTrainer
from topr_kernels.recipe import Record
from topr_kernels.recipe.record_checks import training_fields
from topr_kernels.recipe.score import workspace_bytes


def train_epochs(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    limits: str,
    ratio: str,
    baseline: float,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    checkpoints: Path,
    after_epoch: Callable[[int], None],
) -> list[dict[str, float]]:
    """Trains the model in place with the settings of ``topr train``, looking at it after each epoch.

    The recipe's ``train`` runs all its epochs at once, and training epoch by epoch with it would start
    AdamW's moments anew each time; otherwise this is the same.

    Args:
        model: at the weights that sampled the records.
        tokenizer: its tokenizer.
        records: scored records.
        limits: preset, or "ppo".
        ratio: level of the ratio.
        baseline: subtracted from every reward.
        epochs: passes over the records.
        lr: learning rate of AdamW.
        batch_size: sequences per update.
        seed: of the order of the records.
        checkpoints: folder; training continues from the last whole one there.
        after_epoch: called with the number of the epoch, from 1, when it is over.

    Returns:
        The log: one mapping of metrics per update.
    """
    _drop_damaged(checkpoints)
    kind = PPOTrainer if limits == "ppo" else TOPRTrainer
    args = TOPRConfig(
        output_dir=str(checkpoints),
        limits="is" if limits == "ppo" else limits,
        ratio=ratio,
        baseline=baseline,
        share_prefix=False,
        workspace_bytes=workspace_bytes(model),
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        seed=seed,
        logging_steps=1,
        # A diverged run must say so in its log, not repeat the last finite figure.
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
    )
    trainer = kind(
        model=model,
        args=args,
        train_dataset=training_fields(records, args.limits, baseline),
        processing_class=tokenizer,
        callbacks=[_AfterEpoch(after_epoch, epochs)],
    )
    trainer.remove_callback(PrinterCallback)
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _AfterEpoch(TrainerCallback):
    def __init__(self, look: Callable[[int], None], epochs: int) -> None:
        self.look = look
        self.epochs = epochs

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = math.ceil(state.epoch - 1e-6)
        self.look(epoch)
        # Nothing continues from the last epoch, and a checkpoint is three times the model.
        if epoch >= self.epochs:
            control.should_save = False


def _drop_damaged(folder: Path) -> None:
    """Deletes checkpoints that a kill left half-written: the Trainer writes its state last."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
