"""Settings of ``TOPRTrainer``: those of ``TrainingArguments`` and those of the loss, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from topr_kernels import PRESETS, Limits, kernels
from topr_kernels.choices import BEHAVIORS, MEAN_REDUCTIONS, RATIOS, TRUNCATIONS
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


_SWITCHES = ("entropy", "fused_head", "packing", "mask_truncated")


@dataclass
class TOPRConfig(TrainingArguments):
    """Settings of ``TOPRTrainer``: those of ``TrainingArguments`` and the loss's.

    Args:
        limits: name of a preset ("topr", "tis", "is", "reinforce", "sft") or a ``Limits``.
        ratio: "sequence" (the paper's), "geometric" or "token"; of trajectories also "segment" or
            "segment_geometric": per turn of the policy, or per run of equal ``segments`` of the records.
        baseline: subtracted from every reward before the sign is taken; see
            ``baseline_for_positive_share``.
        reduction: "sequence_mean" (the paper's: 1/B of 1/|y|) or "token_mean".
        temperature: divides the logits, as in sampling.
        entropy: also log the mean entropy of the policy; costs a little.
        impl: implementation of the loss, as in ``topr_loss`` and ``linear_topr_loss``.
        fused_head: compute the loss from the hidden states and the head (``linear_topr_loss``), without
            logits. False computes the logits of the completions: for heads that ``find_head`` refuses,
            as quantised ones.
        workspace_bytes: budget for a tile of logits of the fused head, as in ``linear_topr_loss``.
        grad_tolerance: of the fused head, as in ``linear_topr_loss``; None is exact for a trained head.
        share_prefix: run a prompt once for all its samples of a batch, and what prompts begin with in
            common once for all of them; samples of a prompt are then kept together as the records are
            shuffled, so an update sees fewer prompts: 16 samples each fill a batch of 16 with one. None
            does so where a batch has something to share and the first one proves the model exact, which
            needs sdpa, eager or flex_attention; True raises where it is not; False shuffles freely.
        packing: put the sequences of a batch into one row without padding (FlashAttention's varlen
            convention; with sdpa and eager into rows of bounded length, with the same results). On the
            first batch it is checked that the model keeps them apart.
        mask_truncated: do not count completions that were cut off.
        max_length: most tokens of prompt and completion together; None: the model's positions.
        truncate: what happens to longer records: None refuses them, "prompt_left" cuts the prompt's
            first tokens off. Recorded log mu is then that of another prompt.
        behavior: "recorded" takes ``behavior_log_prob`` from the records. "initial" scores it with the
            model as the trainer gets it, for data sampled from that model at ``temperature``, under
            the autocast of training. Ratios start at exactly 1 in a batch of the records that were
            scored together, in the order of the data set; in others, as shuffling makes them, at 1 but
            for the rounding of another shape. FSDP and DeepSpeed in half precision round in other
            places, too. Each process must hold the whole model then (no ZeRO-3 while it is loaded, no
            ``cpu_ram_efficient_loading``). A resumed run must get the same initial model.
        beta: must be 0, like entropy_coef: TOPR has neither a KL penalty nor an entropy bonus; its taper
            keeps it stable.

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
    ratio: str = field(
        default="sequence", metadata={"help": f"{', '.join(RATIOS[:-1])} or {RATIOS[-1]}."}
    )
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
    share_prefix: bool | None = field(
        default=None,
        metadata={"help": "Run a prompt once for all its samples; where exact, if left out."},
    )
    packing: bool = field(
        default=False, metadata={"help": "Lay sequences out in one row, without padding."}
    )
    mask_truncated: bool = field(
        default=False, metadata={"help": "Do not train on completions that were cut off."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a record; the model's positions if left out."},
    )
    truncate: str | None = field(
        default=None,
        metadata={"help": "prompt_left cuts longer records, which are refused otherwise."},
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
                f"limits: got {self.limits!r}; expected a Limits or one of {sorted(PRESETS)} (not a "
                "callable, which checkpoints cannot keep: pass one to causal_lm_topr_loss)"
            )
        check_choice("ratio", self.ratio, RATIOS)
        check_number("baseline", self.baseline)
        check_transforms(self.temperature, None)
        if self.reduction not in MEAN_REDUCTIONS:
            raise ValueError(
                f"reduction: got {self.reduction!r}; expected one of {MEAN_REDUCTIONS}"
            )
        check_choice("behavior", self.behavior, BEHAVIORS)
        if self.truncate is not None:
            check_choice("truncate", self.truncate, TRUNCATIONS)
        if self.max_length is not None:
            _check_length(self.max_length)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not isinstance(self.share_prefix, bool | None):
            raise TypeError(
                f"share_prefix: expected True, False or None, got {self.share_prefix!r}"
            )
        for name in ("beta", "entropy_coef"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; TOPR has no KL penalty and no entropy bonus, "
                    "its taper is what keeps it stable. For a loss with one write a loop over "
                    "topr_kernels.linear_log_prob, which is differentiable per token"
                )
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
                    f"{name}: got {getattr(self, name)} with fused_head=False, which does not use it; "
                    "drop one of them"
                )
        path = kernels.LINEAR if self.fused_head else kernels.LOGITS
        check_choice("impl", self.impl, ("auto", *path))
        # For a vocabulary of 1, the least that any head needs; TOPRTrainer checks with the real one.
        check_workspace(self.workspace_bytes, torch.empty(0), 1)

    def _check_inherited(self) -> None:
        """Refuses settings of ``TrainingArguments`` that would have no effect, or a wrong one."""
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {self.label_smoothing_factor}; TOPR scores the tokens "
                "that were sampled and no others, leave it 0"
            )
        for name, wanted, why in (
            ("include_for_metrics", [], "no metrics are computed from what it would keep"),
            ("batch_eval_metrics", False, "no metrics are computed from logits"),
            ("label_names", None, "the loss takes labels, behavior_log_prob and reward of a batch"),
        ):
            value = getattr(self, name, wanted)
            if value != wanted:
                raise ValueError(
                    f"{name}: got {value!r}, which would be without effect: {why}; leave it {wanted!r}"
                )
        parallel = self.parallelism_config
        if parallel is not None and (parallel.cp_size > 1 or parallel.sp_size > 1):
            raise ValueError(
                f"parallelism_config: got cp_size={parallel.cp_size} and sp_size={parallel.sp_size}, "
                "with which transformers cuts the labels along the sequence, but not "
                "behavior_log_prob; expected 1 for both. For sequences spread over processes write a "
                "loop over topr_kernels.linear_topr_loss(sequence_group=...)"
            )

    @property
    def device(self) -> torch.device:
        """The device of this process, a CPU without a number.

        With several processes accelerate calls it ``cpu:0``, to which ``torch.load`` refuses to load an
        optimiser's state (transformers 5.17).
        """
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON-friendly values; the limits as a mapping of their four numbers."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        settings["limits"] = dataclasses.asdict(self.limits)
        return settings


def _check_length(length: Any) -> None:
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"max_length: expected an int, got {type(length).__name__}")
    if length < 2:
        raise ValueError(
            f"max_length: got {length}; expected at least 2, a token of prompt and one of completion"
        )
