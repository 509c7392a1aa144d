"""What ``TOPRTrainer`` refuses at its door: wrong types, and settings that would be without effect."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.config import TOPRConfig
from topr_kernels.hf.signature import positions

#: Arguments that nothing here would call or take, and what does their work.
_NOT_TAKEN = {
    "compute_loss_func": (
        "never calls it: the loss is TOPR's; override TOPRTrainer.compute_loss for another, or write a "
        "loop over topr_kernels.linear_log_prob"
    ),
    "compute_metrics": (
        "never calls it: no logits are kept to compute them from; evaluate() reports the metrics of "
        "TOPROutput, and a TrainerCallback's on_evaluate may generate and score"
    ),
    "preprocess_logits_for_metrics": "never calls it: no logits are kept; drop it",
    "tokenizer": "does not take it: pass processing_class=tokenizer",
    "peft_config": (
        "does not take it: pass model=peft.get_peft_model(model, peft_config), which then is what trains"
    ),
    "ref_model": "does not take it: TOPR has no KL penalty and no reference model; drop it",
    "reward_funcs": (
        "does not take it: training is offline; score the completions beforehand and give every record "
        "its reward"
    ),
}


def check_arguments(
    model: Any, args: Any, train_dataset: Any, eval_dataset: Any, more: Mapping[str, Any]
) -> None:
    """Refuses what newcomers give instead of what is meant.

    Args:
        model: as in ``TOPRTrainer``.
        args: as in ``TOPRTrainer``, not None.
        train_dataset: as in ``TOPRTrainer``.
        eval_dataset: as in ``TOPRTrainer``.
        more: further arguments of ``Trainer``.

    Raises:
        TypeError: naming an argument of the wrong type, what it was and what to give.
        ValueError: naming an argument, or a setting, that would be without effect; if weights of the
            model are offloaded.
    """
    for name, why in _NOT_TAKEN.items():
        if more.get(name) is not None:
            raise ValueError(f"{name}: expected None, TOPRTrainer {why}")
    if not isinstance(args, TOPRConfig):
        raise TypeError(
            f"args: got a {type(args).__name__}; expected a TOPRConfig, which takes the same arguments "
            "and those of the loss: TOPRConfig(output_dir=...)"
        )
    _check_model(model, args, more)
    _check_offloaded(model)
    for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        _check_data(name, data)
    _check_lengths(args, train_dataset)


def longest(model: Any, args: TOPRConfig) -> int | None:
    """Most tokens that a record may have: ``max_length``, else the model's positions.

    Raises:
        ValueError: if ``max_length`` is more than the model has positions.
    """
    most = positions(model)
    if args.max_length is not None and most is not None and args.max_length > most:
        raise ValueError(
            f"max_length: got {args.max_length}, but the model has {most} positions; expected at most "
            "those. If it was made for more, say so in its config (max_position_embeddings, or "
            "rope_parameters)"
        )
    return most if args.max_length is None else args.max_length


def _check_model(model: Any, args: TOPRConfig, more: Mapping[str, Any]) -> None:
    if isinstance(model, str):
        raise TypeError(
            f"model: got the str {model!r}; expected a loaded model, as "
            f"AutoModelForCausalLM.from_pretrained({model!r})"
        )
    if model is None and more.get("model_init") is None:
        raise TypeError("model: got None; expected a model, or model_init=, which makes one")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got a {type(model).__name__}; expected a Hugging Face causal language model"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model: got a {type(model).__name__}; expected the model in it (its .module), which "
            "Trainer wraps itself"
        )
    if model is None and args.behavior == "initial":
        raise ValueError(
            "model_init: got one with behavior='initial', but it makes another model when training "
            "begins than log mu would be scored with; pass model=model_init(), or score the records "
            "beforehand and use behavior='recorded'"
        )


def _check_offloaded(model: Any) -> None:
    """Refuses weights that hooks of accelerate fetch as they are needed: gradients would not arrive."""
    if model is None or not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    away = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise ValueError(
            f"model: its {away} is offloaded (cpu_offload, disk_offload or device_map), which serves "
            "inference alone: no gradient would reach it. Load the model whole; where it does not fit "
            "train with FSDP (fsdp_config={'version': 2, 'cpu_offload': True}) or DeepSpeed ZeRO-3, or "
            "adapters on a quantised model. score_behavior(..., fused_head=False) scores with it"
        )


def _check_data(name: str, data: Any) -> None:
    if isinstance(data, (str, PathLike)):
        load = f"datasets.load_dataset({data!r}, split='train')"
        if not isinstance(data, str):
            load = f"datasets.load_dataset('json', data_files={str(data)!r}, split='train')"
        raise TypeError(
            f"{name}: got the {type(data).__name__} {str(data)!r}; expected a loaded data set, as {load}"
        )
    if isinstance(data, Mapping) and name == "train_dataset":
        raise TypeError(
            f"{name}: got a {type(data).__name__} with the keys {sorted(map(str, data))}; expected one "
            "data set: of several splits give one, as in data['train'], of several sets "
            "datasets.concatenate_datasets([...])"
        )
    parts = data if isinstance(data, Mapping) else {"": data}
    for part, records in parts.items():
        if hasattr(records, "__len__") and len(records) == 0:
            of = f"{name}[{part!r}]" if part else name
            raise ValueError(f"{of}: has no records; expected at least one, or None")


def _check_lengths(args: TOPRConfig, train_dataset: Any) -> None:
    """Sampling by length reads a column that only a ``datasets.Dataset`` can have."""
    for name, value in (
        ("train_sampling_strategy", getattr(args, "train_sampling_strategy", None)),
        ("group_by_length", getattr(args, "group_by_length", None)),
    ):
        by_length = value is True or value in ("group_by_length", "batch_rebalance")
        column = args.length_column_name
        if by_length and column not in (getattr(train_dataset, "column_names", None) or ()):
            raise ValueError(
                f"{name}: got {value!r}, but the training set is no datasets.Dataset with a column "
                f"{column!r}, from which Trainer takes the lengths; add it (tokens of a record), or "
                "leave the setting out: packing=True needs no like lengths"
            )


def check_own_collator(collator: Any, args: TOPRConfig) -> None:
    """Refuses what is not a collator, and settings that only the default one implements."""
    if isinstance(collator, type) or not callable(collator):
        got = f"a {type(collator).__name__}"
        got = f"the class {collator.__name__}" if isinstance(collator, type) else got
        raise TypeError(
            f"data_collator: got {got}; expected an object to call with a list of records, as "
            "CompletionCollator(pad_id)"
        )
    if isinstance(collator, CompletionCollator) and collator.temperature != args.temperature:
        if collator.temperature != 1:
            raise ValueError(
                f"temperature: the data_collator has {collator.temperature:g}, the arguments "
                f"{args.temperature:g}; give both the sampler's"
            )
        collator.temperature = args.temperature
    for name in ("share_prefix", "packing", "mask_truncated"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: got True with a data_collator, which decides that itself; set it there, as in "
                f"CompletionCollator(pad_id, {name}=True), or drop data_collator"
            )
