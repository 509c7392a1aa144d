"""TOPR in Axolotl: a plugin, with which a YAML file trains offline records.

    plugins:
      - topr_kernels.integrations.axolotl.TOPRPlugin
    datasets:
      - path: records.jsonl     # prompt, completion, reward, log mu: see prepare_records
    test_datasets:
      - path: held_out.jsonl
    topr:
      limits: topr              # and any other setting of the loss in TOPRConfig
      behavior: recorded

Model, adapters, quantisation, optimizer, schedule, saving and distribution are Axolotl's. It reads the
files; the records go to ``TOPRTrainer`` as they are. Its collator takes the place of Axolotl's: prompts
are shared, and sequences packed, as ``topr`` says.

- **mu** is ``behavior_log_prob`` of the records, or scored at first (``behavior: initial``).
- **The reward** is ``reward`` of the records, signed.
- **sequence_len** is the most tokens of a record: longer ones are refused, or cut by ``truncate``.
- **Refused**: ``rl``, ``reward_model``, ``process_reward_model`` and ``trainer_cls`` (another trainer),
  ``val_set_size`` (samples of one prompt would lie on both sides), ``sample_packing`` (``packing`` of
  ``topr`` does it), other losses, what only Axolotl's trainers do (``batch_flattening``, learning rates
  by layer, ...), and settings of ``topr`` that are not the loss's.

Follows axolotl 0.21: cli/train.py: do_train, and core/builders/causal.py: HFCausalTrainerBuilder.build.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.training_args_base import AxolotlTrainingMixins
from axolotl.integrations.base import BasePlugin
from axolotl.utils.data.shared import load_dataset_with_config, merge_datasets
from pydantic import BaseModel

from topr_kernels.hf.config import TOPRConfig
from topr_kernels.hf.trainer import TOPRTrainer

_REMEDIES = {
    **dict.fromkeys(("rl", "reward_model", "process_reward_model", "trainer_cls"), "leave it out"),
    "val_set_size": "give test_datasets, so that no prompt has samples on both sides",
    "sample_packing": "set packing: true under topr, which packs where that is exact",
    "eval_sample_packing": "set packing: true under topr, which packs where that is exact",
}
#: Arguments of Axolotl's trainers that change no update here, whatever they are.
_HARMLESS = {
    *("chat_template", "dataset_num_proc", "include_tkps", "max_seq_length", "model_type"),
    *("multipack_real_batches", "sample_packing_drop_attention_mask", "eval_sample_packing"),
    *("dion_rank_fraction", "dion_rank_multiple_of"),
}
#: What Axolotl gives its own trainers beside the arguments of Trainer.
_PUT_ASIDE = ("eval_data_collator", "bench_data_collator", "dataset_tags")
_TRAINER = next(c for c in TOPRConfig.__mro__ if c.__name__ == "TrainingArguments")
_INHERITED = {f.name for f in dataclasses.fields(_TRAINER) if f.init}
_LOSS = {f.name for f in dataclasses.fields(TOPRConfig)} - _INHERITED


class TOPRArgs(BaseModel):
    """What the plugin adds to the YAML file: the settings of the loss in ``TOPRConfig``."""

    topr: dict[str, Any] = {}


class TOPRPlugin(BasePlugin):  # type: ignore[misc]
    """Loads the records of a YAML file and trains on them with ``TOPRTrainer``."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the model of ``topr``."""
        return f"{__name__}.TOPRArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        """The records of ``datasets`` and ``test_datasets``, as they are.

        Args:
            cfg: of the YAML file, validated by Axolotl.
            preprocess: nothing is kept of it, for there is nothing to tokenise beforehand.

        Raises:
            ValueError: if a setting would make the training another one; names it and the remedy.
        """
        _check(cfg)
        train, test = (
            merge_datasets([load_dataset_with_config(d, False) for d in given], cfg)
            if given
            else None
            for given in (cfg.datasets, cfg.test_datasets)
        )
        return TrainDatasetMeta(train_dataset=train, eval_dataset=test)

    def get_trainer_cls(self, cfg: Any) -> type[TOPRTrainer]:
        """The trainer with the settings of a YAML file."""
        _check(cfg)
        settings = {"max_length": cfg.sequence_len, **dict(cfg.topr or {})}
        return type("AxolotlTOPRTrainer", (AxolotlTOPRTrainer,), {"settings": settings})


class AxolotlTOPRTrainer(TOPRTrainer):
    """``TOPRTrainer`` as Axolotl makes it: from its arguments, and the settings of ``topr``.

    Raises:
        ValueError: if an argument is set that only Axolotl's own trainers have.
    """

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *, args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        for field in dataclasses.fields(AxolotlTrainingMixins):
            value, unset = getattr(args, field.name), (field.default, None, False)
            if field.name not in _HARMLESS | _INHERITED and value not in unset:
                raise ValueError(
                    f"{field.name}: got {value!r}, which Axolotl's own trainers do and TOPRTrainer does "
                    "not; leave it out"
                )
        given = {name: getattr(args, name) for name in _INHERITED}
        kwargs = {name: x for name, x in kwargs.items() if name not in _PUT_ASIDE}
        super().__init__(args=TOPRConfig(**{**given, **self.settings}), **kwargs)

    @staticmethod
    def requires_all_columns(cfg: Any) -> bool:
        """Axolotl asks: no model's forward takes rewards and log mu, but they must be kept."""
        return True


def _check(cfg: Any) -> None:
    for name, remedy in _REMEDIES.items():
        if cfg.get(name):
            raise ValueError(f"{name}: got {cfg[name]!r} with TOPRPlugin; {remedy}")
    unknown = sorted(set(cfg.topr or ()) - _LOSS)
    if unknown:
        raise ValueError(
            f"topr: got {unknown[0]!r}, which is no setting of the loss; expected {sorted(_LOSS)}. What "
            "Trainer and Axolotl do is said outside of it"
        )
