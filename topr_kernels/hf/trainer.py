"""TOPR in ``transformers.Trainer``: settings, exact normalisation, and metrics."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from topr_kernels import PRESETS, Limits, TOPROutput, kernels
from topr_kernels.choices import BEHAVIORS, MEAN_REDUCTIONS, RATIOS
from topr_kernels.hf.behavior import score_behavior
from topr_kernels.hf.causal_lm import causal_lm_topr_loss
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.data import prepare_records
from topr_kernels.hf.heads import base_model, head_shape
from topr_kernels.hf.initial import score_initial
from topr_kernels.hf.loading import check_loader, check_loading, without_repeats
from topr_kernels.hf.packing import check_packing, is_packed
from topr_kernels.layout import IGNORE_INDEX, scored_labels
from topr_kernels.output import DEAD_WEIGHT
from topr_kernels.validation import (
    check_choice,
    check_number,
    check_tolerance,
    check_transforms,
    check_workspace,
)

if TYPE_CHECKING:
    _LimitsOption = Any
else:
    # HfArgumentParser converts the text of --limits to this: the name of a preset.
    _LimitsOption = str

_SWITCHES = ("entropy", "fused_head", "share_prefix", "packing", "mask_truncated")
#: Arguments of ``Trainer`` that nothing here would call, and what does their work.
_NEVER_CALLED = {
    "compute_loss_func": (
        "the loss is TOPR's; override TOPRTrainer.compute_loss for another, or write a loop over "
        "topr_kernels.linear_log_prob"
    ),
    "compute_metrics": (
        "no logits are kept to compute them from; evaluate() reports the metrics of TOPROutput, and a "
        "TrainerCallback's on_evaluate may generate and score"
    ),
    "preprocess_logits_for_metrics": "no logits are kept; drop it",
}


@dataclass
class TOPRConfig(TrainingArguments):
    """Settings of ``TOPRTrainer``: those of ``TrainingArguments`` and the loss's.

    Args:
        limits: name of a preset ("topr", "tis", "is", "reinforce", "sft") or a ``Limits``.
        ratio: "sequence" (the paper's), "geometric" or "token".
        baseline: subtracted from every reward before the sign is taken; see
            ``baseline_for_positive_share``.
        reduction: "sequence_mean" (the paper's: 1/B of 1/|y|) or "token_mean".
        temperature: divides the logits, as in sampling.
        entropy: also log the mean entropy of the policy; costs a little.
        impl: implementation of the loss, as in ``topr_loss`` and ``linear_topr_loss``.
        fused_head: compute the loss from the hidden states and the head (``linear_topr_loss``), so that
            logits are never made. False makes the logits of the completions: for heads that are
            quantised, sharded over processes or have LoRA on them.
        workspace_bytes: budget for a tile of logits of the fused head, as in ``linear_topr_loss``.
        grad_tolerance: of the fused head, as in ``linear_topr_loss``; None is exact for a trained head.
        share_prefix: run the tokens that all prompts of a batch begin with once per batch. Saves
            most of the time with few-shot prompts; needs plain full attention.
        packing: lay the sequences of a batch out in one row without padding (FlashAttention's varlen
            convention; the same results with sdpa and eager). The first batch checks that the model
            keeps them apart.
        mask_truncated: do not count completions that were cut off.
        behavior: "recorded" takes ``behavior_log_prob`` of the records; "initial" scores it with the
            model as it is when the trainer is made, for data sampled from that very model at
            ``temperature``, under the autocast of training: ratios start at exactly 1. FSDP and
            DeepSpeed round in places of their own in half precision, and ratios start at 1 up to that.
            Each process must hold the whole model then (no ZeRO-3 while it is loaded, no
            ``cpu_ram_efficient_loading``). A resumed run must be given the same initial model.
        beta: refused unless 0, as is entropy_coef: neither a KL penalty nor an entropy bonus is a part
            of TOPR, whose taper is what keeps it stable.

    ``HfArgumentParser`` reads all of them from a command line; there, ``limits`` is a preset's name.

    Raises:
        TypeError: if ``baseline``, ``temperature`` or ``grad_tolerance`` is not a number,
            ``workspace_bytes`` not an int, or a switch not a bool.
        ValueError: on an unknown preset, ratio, reduction or implementation, a temperature that is not
            above 0, a baseline that is not finite, a ``grad_tolerance`` outside [0, 1), a KL penalty or
            entropy bonus, ``remove_unused_columns=True``, ``label_smoothing_factor``, context or
            sequence parallelism, or settings that do not go together.
    """

    limits: _LimitsOption = field(
        default="topr", metadata={"help": f"Preset of the clip limits: {', '.join(PRESETS)}."}
    )
    ratio: str = field(default="sequence", metadata={"help": "sequence, geometric or token."})
    baseline: float = field(default=0.0, metadata={"help": "Subtracted from every reward."})
    reduction: str = field(
        default="sequence_mean", metadata={"help": "sequence_mean or token_mean."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits."})
    entropy: bool = field(default=False, metadata={"help": "Log the policy's entropy."})
    impl: str = field(default="auto", metadata={"help": "Implementation of the loss."})
    fused_head: bool = field(
        default=True, metadata={"help": "Compute the loss from hidden states, without logits."}
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Budget for a tile of logits of the fused head."}
    )
    grad_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Relative norm of the gradient the fused head may leave out; 0 is exact."
        },
    )
    share_prefix: bool = field(
        default=False, metadata={"help": "Run the prompts' common prefix once per batch."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Lay sequences out in one row, without padding."}
    )
    mask_truncated: bool = field(
        default=False, metadata={"help": "Do not train on completions that were cut off."}
    )
    behavior: str = field(
        default="recorded",
        metadata={
            "help": "Where log mu comes from: recorded, or initial (the model as it starts)."
        },
    )
    beta: float = field(default=0.0, metadata={"help": "Must stay 0: TOPR has no KL penalty."})
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Must stay 0: TOPR has no entropy bonus."}
    )
    # The Trainer would drop reward and behavior_log_prob: no model's forward takes them.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the loss needs the extra columns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.limits, str) and self.limits in PRESETS:
            self.limits = PRESETS[self.limits]
        elif isinstance(self.limits, Mapping):
            self.limits = Limits(**self.limits)
        if not isinstance(self.limits, Limits):
            raise ValueError(
                f"limits: got {self.limits!r}; expected a Limits or one of {sorted(PRESETS)}"
            )
        check_choice("ratio", self.ratio, RATIOS)
        check_number("baseline", self.baseline)
        check_transforms(self.temperature, None)
        if self.reduction not in MEAN_REDUCTIONS:
            raise ValueError(
                f"reduction: got {self.reduction!r}; expected one of {MEAN_REDUCTIONS}"
            )
        check_choice("behavior", self.behavior, BEHAVIORS)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("beta", "entropy_coef"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; TOPR has no KL penalty and no entropy bonus, "
                    "its taper is what keeps it stable. For a loss with one write a loop over "
                    "topr_kernels.linear_log_prob, which is differentiable per token"
                )
        if self.packing and self.share_prefix:
            raise ValueError("packing: got True with share_prefix=True; expected one of them")
        check_tolerance(self.grad_tolerance, torch.float32, False, 0.0)
        self._check_fused_head()
        self._check_inherited()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: got True, which would drop reward and behavior_log_prob "
                "from the data set; leave it False"
            )

    def _check_fused_head(self) -> None:
        for name in ("workspace_bytes", "grad_tolerance"):
            if not self.fused_head and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with fused_head=False, which has no use for it; "
                    "drop one of them"
                )
        path = kernels.LINEAR if self.fused_head else kernels.LOGITS
        check_choice("impl", self.impl, ("auto", *path))
        # The least that any head needs; TOPRTrainer knows the vocabulary.
        check_workspace(self.workspace_bytes, torch.empty(0), 1)

    def _check_inherited(self) -> None:
        """Refuses settings of ``TrainingArguments`` that would be without effect, or wrong."""
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {self.label_smoothing_factor}; TOPR scores the tokens "
                "that were sampled and no others, leave it 0"
            )
        parallel = self.parallelism_config
        if parallel is not None and (parallel.cp_size > 1 or parallel.sp_size > 1):
            raise ValueError(
                f"parallelism_config: got cp_size={parallel.cp_size} and sp_size={parallel.sp_size}, "
                "with which transformers cuts the labels along the sequence, but not "
                "behavior_log_prob; expected 1 for both. For sequences spread over processes write a "
                "loop over topr_kernels.linear_topr_loss(sequence_group=...)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON-friendly values; the limits as a mapping of their four numbers."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        settings["limits"] = dataclasses.asdict(self.limits)
        return settings


class TOPRTrainer(Trainer):
    """``transformers.Trainer`` with the TOPR loss, for any Hugging Face causal language model.

    Takes the arguments of ``Trainer``. The data set holds prompt, completion and reward as text,
    messages or token ids, see ``prepare_records``; the default collator needs ``processing_class`` (the
    tokenizer). Gradients do not depend on how a batch is split: the loss is normalised by the
    non-empty sequences (or tokens) of the whole accumulated batch over all processes.

    ``log`` carries the metrics of ``TOPROutput.metrics()``, averaged over the micro-batches since
    the last log where they are defined (keys that end in ``_min`` or ``_max``: the extreme).
    ``evaluate`` reports the loss and the same metrics. With several processes both the loss's
    normaliser and the metrics are of all of them.

    Disable dropout (``attention_dropout=0.0`` and the like in the model's configuration); the first
    batch warns of it. Training runs the model in train mode, so with dropout > 0 pi is noisy while mu
    was scored in eval mode: the ratios are not 1 where the policies are equal, and their clipping acts
    on noise.

    The loss is computed inside the wrapped model's forward, see ``causal_lm_topr_loss``: adapters on
    the head, routers' balancing losses, DistributedDataParallel, FSDP2 and ZeRO-3 are served as they
    are for logits.

    A collator of one's own gets the records as they are and must give ``input_ids``, ``labels``,
    ``behavior_log_prob`` and ``reward``, and ``attention_mask`` or ``position_ids``; further entries go
    to the model's forward, see ``completion_logits``.

    With ``fused_head`` the first batch also compares the model's own logits of a few rows with those of
    its head, since a model may do to them what is not known here (see ``find_head``).

    Streams with several processes need ``accelerator_config={"dispatch_batches": False}``, so that every
    process loads batches of its own. ``evaluate`` counts every record of a data set once, however many
    processes share it.

    Raises:
        ValueError: if neither ``data_collator`` nor a tokenizer with a pad or EOS token is given; if a
            record is not sound (see ``prepare_records``) or lacks ``behavior_log_prob``; if batches of
            the default collator would be joined and cut up between processes; on ``compute_loss_func``,
            ``compute_metrics`` or ``preprocess_logits_for_metrics``, which nothing would call; with
            ``behavior="initial"``, as ``score_initial``; with ``fused_head``, if the model's head cannot
            be fused (see ``find_head``) or ``workspace_bytes`` is too small for it.

    Warns:
        UserWarning: once, if between two logs more than half of the negatives had a weight of nothing,
            or their effective sample size was below a tenth of their number: time for new samples.
        UserWarning: once per training set, if no reward is below the baseline although the limits
            give negatives a weight: TOPR is then positives only. Not for records without a
            ``reward``, which a collator of one's own computes.
        UserWarning: once, at the first batch, if the model drops out in training.
        UserWarning: if several processes evaluate a stream, or ``behavior="initial"`` must score on the
            CPU although training does not run there.
    """

    # The loss is normalised over the whole accumulated batch: the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    args: TOPRConfig

    def __init__(
        self,
        model: nn.Module,
        args: TOPRConfig,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, remedy in _NEVER_CALLED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None, TOPRTrainer never calls it: {remedy}")
        if data_collator is None:
            eos = _eos_token_id(model, processing_class)
            data_collator = CompletionCollator(
                _pad_token_id(processing_class),
                args.share_prefix,
                args.packing,
                args.mask_truncated,
                eos,
            )
            train_dataset, eval_dataset = (
                _each(data, lambda part: prepare_records(part, processing_class, eos_token_id=eos))
                for data in (train_dataset, eval_dataset)
            )
        else:
            _check_own_collator(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # transformers < 5.19 has no loss_is_scaled_for_ga and looks at this flag instead.
        self.model_accepts_loss_kwargs = True
        self._head_checked = self._packing_checked = self._dropout_checked = False
        self._eval_loader: Any = None
        check_loading(args, data_collator, self.train_dataset, self.eval_dataset)
        if args.fused_head and args.n_gpu > 1:
            raise ValueError(
                f"fused_head: one process drives {args.n_gpu} GPUs by nn.DataParallel, whose replicas "
                "cannot share a head; launch one process per GPU (torchrun, accelerate launch), or use "
                "fused_head=False"
            )
        if args.fused_head:
            vocab, _ = head_shape(self.model)
            check_workspace(args.workspace_bytes, torch.empty(0, device=args.device), vocab)
        self._train_metrics = MetricMean()
        self._eval_metrics = MetricMean()
        self._watch = NegativeWatch()
        if isinstance(data_collator, CompletionCollator):
            self.train_dataset, self.eval_dataset = (
                _each(data, functools.partial(self._with_behavior, data_collator))
                for data in (self.train_dataset, self.eval_dataset)
            )
        if train_dataset is not None and hasattr(train_dataset, "__len__"):
            warn_if_never_negative(_rewards(train_dataset), args.baseline, args.limits)

    def _with_behavior(self, collator: CompletionCollator, dataset: Any) -> Any:
        """The data set with ``behavior_log_prob``: its own, or that of the initial model."""
        if not hasattr(dataset, "__len__"):
            if self.args.behavior == "initial":
                raise ValueError(
                    f"behavior: got 'initial' with a {type(dataset).__name__} that has no length; "
                    "expected one that can be scored before training; use behavior='recorded'"
                )
            return dataset
        recorded = self.args.behavior == "recorded"
        # Reading a data set on disk takes time; the collator looks at every record of it later.
        looked_at = 1 if recorded and not isinstance(dataset, list) else len(dataset)
        records = [dataset[i] for i in range(min(looked_at, len(dataset)))]
        known = [record.get("behavior_log_prob") is not None for record in records]
        if recorded:
            if not all(known):
                raise ValueError(
                    f"record {known.index(False)} has no behavior_log_prob: TOPR weighs by pi/mu. "
                    "Record the sampler's log-probabilities, score them with causal_lm_log_prob, or, "
                    "for data sampled from this very model, set behavior='initial'"
                )
            return dataset
        if any(known):
            raise ValueError(
                f"behavior: got 'initial', but record {known.index(True)} has a behavior_log_prob, "
                "which would be ignored; drop the column, or use behavior='recorded'"
            )
        processes, rank = self.args.world_size, self.args.process_index
        model = cast(nn.Module, self.model)

        def score(share: Sequence[Mapping[str, Any]]) -> list[list[float]]:
            # The Trainer's forward passes will run under it, and the ratio of equal policies is 1 only
            # if both were rounded alike.
            with self.accelerator.autocast():
                return score_behavior(
                    model,
                    share,
                    collator,
                    batch_size=self.args.per_device_train_batch_size,
                    temperature=self.args.temperature,
                    fused_head=self.args.fused_head,
                    workspace_bytes=self.args.workspace_bytes,
                    impl=self.args.impl,
                    progress=rank == 0 and not self.args.disable_tqdm,
                )

        rows = score_initial(
            model, records, score, device=self.args.device, processes=processes, rank=rank
        )
        if hasattr(dataset, "add_column"):
            if "behavior_log_prob" in dataset.column_names:
                dataset = dataset.remove_columns("behavior_log_prob")
            return dataset.add_column("behavior_log_prob", rows)
        return [{**r, "behavior_log_prob": row} for r, row in zip(records, rows, strict=True)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch, normalised by the items of the whole accumulated batch."""
        if model.training and not self._dropout_checked:
            warn_of_dropout(self.accelerator.unwrap_model(model))
            self._dropout_checked = True
        output = self._topr(model, inputs, num_items_in_batch)
        metrics = self._train_metrics if model.training else self._eval_metrics
        counted = (output.length > 0).sum()
        metrics.add(output.metrics(), counted)
        if model.training:
            self._watch.add(output)
        else:
            # Trainer's own mean weighs batches by their first dimension, 1 where they are packed.
            units = counted if self.args.reduction == "sequence_mean" else output.length.sum()
            metrics.add({"loss": output.loss}, units)
        # Data-parallel wrappers average gradients over processes; our normaliser is global already.
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = output.loss * processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _topr(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> TOPROutput:
        fused: dict[str, Any] = {}
        if self.args.fused_head:
            fused = {
                "grad_tolerance": self.args.grad_tolerance,
                "workspace_bytes": self.args.workspace_bytes,
            }
        unwrapped = self.accelerator.unwrap_model(model)
        if is_packed(inputs) and not self._packing_checked:
            check_packing(model, inputs, signature_of=unwrapped)
            self._packing_checked = True
        output = causal_lm_topr_loss(
            model,
            inputs,
            unwrapped=unwrapped,
            limits=self.args.limits,
            ratio=self.args.ratio,
            baseline=self.args.baseline,
            reduction=self.args.reduction,
            normalizer=items,
            temperature=self.args.temperature,
            entropy=self.args.entropy,
            fused_head=self.args.fused_head,
            impl=self.args.impl,
            check=not self._head_checked,
            **fused,
        )
        self._head_checked = True
        return output

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | None:
        """Non-empty sequences (or scored tokens) of an accumulated batch, over all processes.

        Trainer counts tokens here; the paper's loss is a mean over sequences.
        """
        if not batch_samples:
            return None
        counts = [_count(batch, self.args.reduction) for batch in batch_samples]
        items = torch.stack(counts).sum().to(device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        # A batch without anything to learn from has loss 0, not 0 / 0.
        return items.clamp(min=1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of one evaluation batch; logits are not kept."""
        inputs = without_repeats(self._prepare_inputs(inputs), self._eval_loader)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s evaluation, with the loss's metrics added to its figures."""
        check_loader(dataloader, self.data_collator, self.args.world_size)
        self._eval_metrics, self._eval_loader = MetricMean(), dataloader
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._eval_loader = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self._eval_metrics.result(self._gather)
        metrics = {f"{prefix}_{k}": v for k, v in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log to a training log."""
        if "loss" in logs:
            logs = {**logs, **self._train_metrics.result(self._gather)}
            self._train_metrics = MetricMean()
            self._watch.warn(self._gather)
        super().log(logs, start_time)

    def _gather(self, x: Tensor) -> Tensor:
        return self.accelerator.gather(x) if self.args.world_size > 1 else x


class NegativeWatch:
    """Warns, once each, when the negatives stopped teaching: time for a new iteration."""

    #: Share of negatives whose weight is nothing, and effective share of their number, to warn at.
    MOST_DEAD, LEAST_EFFECTIVE = 0.5, 0.1

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._sums: Tensor | None = None

    def add(self, output: TOPROutput) -> None:
        """Adds the sequences of a micro-batch; nothing is copied to the host."""
        negative = (output.length > 0) & (output.reward < 0)
        w = torch.where(negative, output.weight, 0.0).double()
        dead = negative & (output.weight < DEAD_WEIGHT)
        sums = torch.stack([negative.sum(), dead.sum(), w.sum(), w.square().sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def warn(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Looks at what was added since the last call, over all processes, and begins anew."""
        if self._sums is None:
            return
        count, dead, total, squares = gather(self._sums[None]).sum(0).tolist()
        self._sums = None
        if not count:
            return
        if dead / count > self.MOST_DEAD:
            self._once(
                "dead", f"{dead / count:.0%} of the negatives have a weight below {DEAD_WEIGHT:g}"
            )
        elif squares and total * total / squares < self.LEAST_EFFECTIVE * count:
            effective = total * total / squares
            self._once(
                "few",
                f"{count:.0f} negatives count for only {effective:.1f} (effective sample size)",
            )

    def _once(self, kind: str, what: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"{what}: the policy has left them behind. It is time for a new iteration: sample new "
                "completions from the current policy, score them, and train on those.",
                UserWarning,
                stacklevel=2,
            )


class MetricMean:
    """Means of device scalars over batches, each weighted by its size; NaN means "undefined here".

    Keys that end in ``_min`` or ``_max`` keep the extreme instead. Nothing is copied to the host
    before ``result``.
    """

    def __init__(self) -> None:
        self._total: dict[str, Tensor] = {}
        self._weight: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], size: int | Tensor) -> None:
        """Adds one batch's metrics (scalars of any dtype) with ``size``, a number, as their weight."""
        for name, value in metrics.items():
            x = value.detach().double()
            undefined = x.isnan()
            if name.endswith(("_min", "_max")):
                known = self._total.get(name, x)
                extreme = torch.fmin if name.endswith("_min") else torch.fmax
                self._total[name] = extreme(known, x)
                continue
            zero = torch.zeros_like(x)
            weight = torch.where(undefined, zero, zero + size)
            # Select, don't multiply: 0 * NaN is NaN.
            total = torch.where(undefined, zero, x * size)
            self._total[name] = self._total.get(name, zero) + total
            self._weight[name] = self._weight.get(name, zero) + weight

    def result(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means so far; metrics that were never defined are left out.

        Args:
            gather: from [1, K] of each of P processes to [P, K], for the means over all of them. Every
                process must call it, with the same metrics.
        """
        if not self._total:
            return {}
        names = sorted(self._total)
        totals = torch.stack([self._total[name] for name in names])[None]
        ones = torch.ones_like(totals[0, 0])
        weights = torch.stack([self._weight.get(name, ones) for name in names])[None]
        if gather is not None:
            totals, weights = gather(totals), gather(weights)
        means = {}
        for i, name in enumerate(names):
            if name.endswith(("_min", "_max")):
                extreme = torch.fmin if name.endswith("_min") else torch.fmax
                means[name] = float(functools.reduce(extreme, totals[:, i]))
            elif weight := float(weights[:, i].sum()):
                means[name] = float(totals[:, i].sum()) / weight
        return {name: value for name, value in means.items() if not math.isnan(value)}


def _count(batch: Mapping[str, Any], reduction: str) -> Tensor:
    """Non-empty sequences or scored tokens of a padded or packed batch, 0-dim."""
    offsets = batch.get("cu_seq_lens_q")
    scored = scored_labels(batch["labels"], offsets, shift=True).ne(IGNORE_INDEX)
    if reduction == "token_mean":
        return scored.sum()
    if offsets is None:
        return scored.any(dim=1).sum()
    before = nn.functional.pad(scored.view(-1).cumsum(0), (1, 0))[offsets.long()]
    return before.diff().gt(0).sum()


def warn_if_never_negative(rewards: Iterable[float], baseline: float, limits: Limits) -> bool:
    """Warns if no reward lies below the baseline although negatives would have a weight.

    TOPR then only ever imitates: with 0/1 rewards and no baseline it is positives only.

    Returns:
        Whether it warned; never where there are no rewards.
    """
    if limits.neg_max == 0:
        return False
    known = False
    for reward in rewards:
        if float(reward) - baseline < 0:
            return False
        known = True
    if not known:
        return False
    warnings.warn(
        f"No reward of this data set is below the baseline of {baseline:g}: TOPR degenerates to "
        "training on positives only. Use signed rewards (for instance +1 and -1), or a baseline "
        "between the lowest and the highest reward; limits='sft' if positives only is the intent.",
        UserWarning,
        stacklevel=3,
    )
    return True


def _rewards(dataset: Any) -> Iterator[float]:
    for record in itertools.islice(dataset, len(dataset)):
        # A collator of one's own may compute the rewards: one record without tells.
        if not isinstance(record, Mapping) or record.get("reward") is None:
            return
        yield record["reward"]


def _each(data: Any, change: Callable[[Any], Any]) -> Any:
    """Applies a change to a data set, or to each of a mapping of them; None stays None."""
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: change(part) for name, part in data.items()}
    return change(data)


def _check_own_collator(args: TOPRConfig) -> None:
    """Refuses settings that only the default collator carries out."""
    for name in ("share_prefix", "packing", "mask_truncated"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: got True with a data_collator, which decides that itself; set it there, as in "
                f"CompletionCollator(pad_id, {name}=True), or drop data_collator"
            )


def warn_of_dropout(model: nn.Module) -> bool:
    """Warns if a module of a model drops out in the mode it is in, naming it and the remedy.

    Returns:
        Whether it warned.
    """
    rates = dict(_dropout_rates(model))
    if not rates:
        return False
    name, rate = next(iter(rates.items()))
    config = base_model(model).config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields = [
        f"{field}=0.0" for field, x in vars(config).items() if "drop" in field and _is_rate(x)
    ]
    # What no field of the config sets, an adapter brought.
    remedy = f"with {', '.join(fields)} in its config" if fields else "without it"
    more = f" and {len(rates) - 1} more" if len(rates) > 1 else ""
    warnings.warn(
        f"{name} of the model is {rate:g}{more}: it drops out in training, but mu was scored without, "
        "so pi/mu is noise where the policies are equal, and its clipping acts on that. Load the "
        f"model {remedy} (of LoRA: LoraConfig(lora_dropout=0.0))",
        UserWarning,
        stacklevel=2,
    )
    return True


def _dropout_rates(model: nn.Module) -> Iterator[tuple[str, float]]:
    for path, module in model.named_modules():
        if not module.training:
            continue
        if "Dropout" in type(module).__name__ and _is_rate(getattr(module, "p", None)):
            yield path, module.p
        # Attention passes its rate on to a function.
        for name, x in vars(module).items():
            if "drop" in name and _is_rate(x):
                yield f"{path}.{name}", x


def _is_rate(x: Any) -> bool:
    return isinstance(x, float) and x > 0


def _eos_token_id(model: Any, processing_class: Any) -> Any:
    """Id or ids that end a completion: what generation stops at, else the tokenizer's."""
    generation = getattr(base_model(model), "generation_config", None)
    stops = getattr(generation, "eos_token_id", None)
    return getattr(processing_class, "eos_token_id", None) if stops is None else stops


def _pad_token_id(processing_class: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(processing_class, name, None)
        if token is not None:
            return int(token)
    raise ValueError(
        "processing_class: expected a tokenizer with a pad or EOS token to pad batches with, got "
        f"{type(processing_class).__name__}; pass it, or data_collator=CompletionCollator(pad_id)"
    )
