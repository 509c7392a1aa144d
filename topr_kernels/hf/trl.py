"""TOPR in TRL's ``GRPOTrainer``: generation, rewards and groups are TRL's, the loss is ours.

Needs a version of trl whose internals are known here: importing this module with another one raises
ImportError.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels import TOPR, Limits, TOPROutput, topr_loss_from_log_prob
from topr_kernels.choices import MEAN_REDUCTIONS, RATIOS
from topr_kernels.hf.watch import SequenceMetrics
from topr_kernels.validation import check_choice, check_limits, check_number

# The internals that this module uses were read in every version of this range: `_compute_loss(model,
# inputs)`, the keys of `inputs`, what `_get_per_token_logps_and_entropies` returns, `_step`,
# `_buffered_inputs`, `_metrics` and how `log` takes the mean of each of these.
_OLDEST, _TOO_NEW = (1, 15), (1, 17)


def _check_trl() -> None:
    try:
        installed = metadata.version("trl")
    except metadata.PackageNotFoundError:
        installed = "none"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and _OLDEST <= (int(numbers[1]), int(numbers[2])) < _TOO_NEW:
        return
    oldest, too_new = (".".join(map(str, version)) for version in (_OLDEST, _TOO_NEW))
    raise ImportError(
        f"topr_kernels.hf.trl: found trl {installed}, expected trl >= {oldest}, < {too_new}, whose "
        f'internals it knows; pip install "trl>={oldest},<{too_new}"'
    )


_check_trl()

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

#: Entries of a batch that only the model's forward reads.
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

_OWN_TERM = (
    "add a term of your own in a training loop, to linear_topr_loss and from the differentiable "
    "log-probs of topr_kernels.linear_log_prob"
)
_OTHER_LOSS = "it is an option of a loss that TOPR replaces; leave it out"
_LIMITS = "TOPR bounds ratios by limits=topr_kernels.Limits(...) of this trainer; leave it out"
#: Options of GRPOConfig that must keep their default, and what to do instead.
_REFUSED = {
    "beta": f"TOPR has no KL term; {_OWN_TERM}",
    "entropy_coef": f"TOPR has no entropy bonus; {_OWN_TERM}",
    "use_adaptive_entropy": f"TOPR has no entropy bonus; {_OWN_TERM}",
    "top_entropy_quantile": "the ratio of a completion needs all of its tokens; leave it out",
    "off_policy_mask_threshold": f"the taper fades negatives already; {_LIMITS}",
    "delta": _LIMITS,
    "epsilon": _LIMITS,
    "epsilon_high": _LIMITS,
    "importance_sampling_level": 'pass ratio="geometric" to this trainer for GSPO\'s ratio, and '
    "leave it out",
    "loss_type": "the loss is TOPR; leave it out",
    "use_bias_correction_kl": f"TOPR has no KL term; {_OWN_TERM}",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _OTHER_LOSS),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _OTHER_LOSS
    ),
}
#: Options of sampling that truncate or reweigh the distribution -> their values that leave it as it is.
_TRUNCATING: dict[str, tuple[object, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
}


class TOPRGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` with the TOPR loss; ``_compute_loss`` is replaced, ``log`` extended.

    Equivalent, per optimizer step, to ``topr_loss_from_log_prob(log_prob, mask, mu, advantages)`` over
    all completions of its accumulated batch. TRL generates, scores, forms groups and computes the
    log-probs (with its own fused head, at ``args.temperature``).

    **mu**, per token, is the first of these that TRL gives: ``sampling_per_token_logps``, the log-probs
    of the sampler itself (vLLM or a ``rollout_func``); ``old_per_token_logps``, the policy's at the time
    of generation; and, where every completion is used before the policy changes, the current ones,
    detached: the ratio is then 1. If a sampler's log-prob is NaN (vLLM has none for that token), the
    policy's current one takes its place, so that the token does not change the ratio;
    ``topr/unknown_mu_share`` is the share of such tokens. Tokens of tools and of truncated completions
    (``mask_truncated_completions``) are not scored.

    **TRL's advantage takes the place of the reward**: its sign chooses the limits. The group's mean is
    subtracted, so a completion is positive if it is better than its group: a wrong answer is positive
    in a group of worse ones, and the share of positives by weight is a half. ``scale_rewards`` changes
    the size of an advantage, never its sign. In a group of equal rewards all advantages are 0 but for
    rounding: its completions teach nothing, but count in the denominator. ``baseline`` is subtracted
    from the advantage, in its units; unless it is 0, such completions train as well.

    **Normalisation.** The denominator is the number of non-empty completions ("sequence_mean") or scored
    tokens ("token_mean") of the whole accumulated batch over all processes, so gradients do not depend
    on how it is split. It is exact if ``gradient_accumulation_steps`` divides ``steps_per_generation``
    (they are equal by default), or if the accumulated batch is a number of whole passes through one
    generation batch. Otherwise it contains generations that do not exist yet when its first gradients
    are computed, and the count of the current one is scaled to its size. That is exact for
    "sequence_mean" without empty completions, which come only from ``mask_truncated_completions`` and
    masks of tools, and approximate for "token_mean". Evaluation normalises each batch by itself.

    **Numerical noise** of the tokens adds up in the sequence ratio. Under mixed precision or with a
    half-precision model TRL rounds the logits; ``cast_lm_head_to_fp32=True`` prevents that, and without
    it this trainer warns. Dropout (``lora_dropout`` included) makes pi differ from mu; set it to 0, or
    ``disable_dropout=True``. vLLM's log-probs differ a little from the model's. A vLLM server must run
    with ``--logprobs-mode processed_logprobs``, as ``trl vllm-serve`` does; TRL checks that only
    together with ``vllm_importance_sampling_correction``, which is refused here.

    **Refused options** of ``GRPOConfig`` are those that would have no effect or another than they say:
    options of other losses, the KL and entropy terms, ``vllm_importance_sampling_correction`` (pi/mu
    with the sampler's mu is that correction), and, with vLLM, sampling that truncates or reweighs the
    distribution: its log-probs are renormalised, so every ratio would be off by the probability that
    was kept. Without vLLM such sampling is allowed, because mu is scored with the full softmax.
    ``use_liger_kernel`` is allowed: it replaces layers, not the loss.

    ``log`` gets the entropy as in TRL, and under ``topr/`` the metrics of ``TOPROutput.metrics()``, of
    all completions since the last log, over all processes, as if they were one batch; those that are
    undefined there are left out.

    Args:
        model: as in ``GRPOTrainer``.
        reward_funcs: as in ``GRPOTrainer``.
        args: ``GRPOConfig``, without the refused options.
        *more: further arguments of ``GRPOTrainer``.
        limits: clip limits per sign of the advantage; presets TOPR, TIS, IS, REINFORCE, SFT.
        ratio: "sequence" (the paper's), "geometric" or "token"; "segment" or "segment_geometric" are per
            turn of the policy.
        baseline: subtracted from every advantage before the sign is taken.
        reduction: "sequence_mean" (the paper's) or "token_mean".
        **kwargs: further arguments of ``GRPOTrainer``.

    Raises:
        ImportError: on import of the module, if trl is missing or of a version that is not known here.
        TypeError: if ``limits`` is neither ``Limits`` nor a callable taper, or ``baseline`` no number.
        ValueError: on an unknown ratio or reduction, a baseline that is not finite, or a refused option;
            in training, if a subclass gives advantages per token.

    Warns:
        UserWarning: if the logits are rounded to half precision.
    """

    # TRL and transformers declare wider types than these have in a training step.
    model: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *more: Any,
        limits: Limits = TOPR,
        ratio: str = "sequence",
        baseline: float = 0.0,
        reduction: str = "sequence_mean",
        **kwargs: Any,
    ) -> None:
        check_choice("ratio", ratio, RATIOS)
        check_choice("reduction", reduction, MEAN_REDUCTIONS)
        self.topr_options: dict[str, Any] = {
            "limits": check_limits(limits),
            "ratio": ratio,
            "baseline": check_number("baseline", baseline),
            "reduction": reduction,
        }
        if args is not None:
            _check_config(args)
        self._topr_sequences = {mode: SequenceMetrics() for mode in ("train", "eval")}
        #: Tokens without a log-prob of their sampler, and scored ones; of each micro-batch.
        self._topr_unknown: dict[str, list[Tensor]] = {"train": [], "eval": []}
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        _warn_of_rounded_logits(self.args, self.model)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Loss of one micro-batch, normalised by the items of the whole accumulated batch."""
        reward = inputs["advantages"]
        if reward.dim() != 1:
            raise ValueError(
                f"advantages: expected one per completion, [B], got shape {tuple(reward.shape)}; TOPR "
                "weighs whole completions, so sum or average them per completion first"
            )
        mode = "train" if self.model.training else "eval"
        scored = _scored(inputs)
        log_prob, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            # TRL's head computes the entropy in any case.
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _MULTIMODAL},
        )
        out = topr_loss_from_log_prob(
            log_prob.float(),
            scored,
            _behavior_log_prob(inputs, log_prob),
            reward,
            normalizer=self._topr_normalizer() if mode == "train" else None,
            **self.topr_options,
        )
        self._topr_log(mode, inputs, scored, out, entropy)
        if not self.aux_loss_enabled:
            return out.loss
        aux_losses = self.accelerator.gather(aux_loss.detach())
        self._metrics[mode]["aux_loss"].append(aux_losses.mean().item())
        # A mean of each micro-batch, unlike the loss, so it is averaged over them, as in TRL.
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return out.loss + aux_loss * (self.router_aux_loss_coef / steps)

    def _topr_normalizer(self) -> Any:
        """Items of the accumulated batch over all processes, divided by their number; 0-dim float64.

        Divided, because data-parallel wrappers average the gradients over processes.
        """
        batches = self._buffered_inputs
        steps = self.current_gradient_accumulation_steps
        if len(batches) % steps == 0:
            first = self._step % len(batches) // steps * steps
            accumulated = batches[first : first + steps]
        else:
            # The accumulated batch is several passes through these, or more than was generated yet.
            accumulated = batches
        masks = [_scored(batch) for batch in accumulated]
        if self.topr_options["reduction"] == "sequence_mean":
            masks = [mask.any(dim=1) for mask in masks]
        items = torch.stack([mask.sum() for mask in masks]).sum()
        items = self.accelerator.reduce(items, reduction="sum").double()
        return items * (steps / len(accumulated) / self.accelerator.num_processes)

    def _topr_log(
        self,
        mode: str,
        inputs: dict[str, Any],
        scored: Tensor,
        out: TOPROutput,
        entropy: Tensor,
    ) -> None:
        """Keeps what ``log`` needs of a micro-batch, and appends its entropy as TRL does."""
        self._topr_sequences[mode].add(out)
        if (sampled := inputs.get("sampling_per_token_logps")) is not None:
            unknown = (sampled.isnan() & scored).sum()
            self._topr_unknown[mode].append(torch.stack([unknown, scored.sum()]).double())
        local = torch.stack([torch.where(scored, entropy.detach(), 0.0).sum(), scored.sum()])
        sums, tokens = self.accelerator.gather(local.double()).view(-1, 2).sum(0).tolist()
        self._metrics[mode]["entropy"].append(sums / max(tokens, 1.0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """``GRPOTrainer.log``; a log of training or evaluation gets the metrics since the last one."""
        mode = "train" if self.model.training else "eval"
        # All processes write those two; another log may be one process's own, and gathering would hang.
        if not any(x == "loss" or (mode == "eval" and x.endswith("_loss")) for x in logs):
            super().log(logs, start_time)
            return
        figures = self._topr_sequences[mode].result(self._topr_gather)
        self._topr_sequences[mode] = SequenceMetrics()
        nothing = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        counts = torch.stack([nothing, *self._topr_unknown[mode]]).sum(0, keepdim=True)
        unknown, scored = self._topr_gather(counts).sum(0).tolist()
        self._topr_unknown[mode].clear()
        if scored:
            figures["unknown_mu_share"] = unknown / scored
        for name, value in figures.items():
            self._metrics[mode][f"topr/{name}"] = [value]
        super().log(logs, start_time)

    def _topr_gather(self, x: Tensor) -> Tensor:
        # A process that saw no batch has nothing on the device.
        gathered: Tensor = self.accelerator.gather(x.to(self.accelerator.device))
        return gathered


def _scored(inputs: dict[str, Any]) -> Tensor:
    """Which tokens of the completions the policy wrote and trains on; bool [B, T]."""
    scored: Tensor = inputs["completion_mask"] != 0
    return scored & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else scored


def _behavior_log_prob(inputs: dict[str, Any], log_prob: Tensor) -> Tensor:
    """Log mu per token, [B, T] fp32; the docstring of the class says which one."""
    current = log_prob.detach().float()
    sampled: Tensor | None = inputs.get("sampling_per_token_logps")
    if sampled is not None:
        return torch.where(sampled.isnan(), current, sampled.float())
    old: Tensor | None = inputs.get("old_per_token_logps")
    return current if old is None else old.float()


def _check_config(args: GRPOConfig) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for name, remedy in _REFUSED.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}: expected its default {defaults[name]!r}, got {value!r}: {remedy}"
            )
    if not args.use_vllm:
        return
    if args.vllm_importance_sampling_correction:
        raise ValueError(
            "vllm_importance_sampling_correction: got True, but TOPR's own ratio corrects for the "
            "sampler, whose log-probs are its mu; pass vllm_importance_sampling_correction=False"
        )
    overrides: Any = args.generation_kwargs or {}
    sampling = {**{name: getattr(args, name) for name in _TRUNCATING}, **overrides}
    for name, harmless in _TRUNCATING.items():
        if sampling[name] not in harmless:
            raise ValueError(
                f"{name}: got {sampling[name]} with use_vllm, whose log-probs are then not those of the "
                f"policy's full softmax and no mu for TOPR; pass {name}={harmless[0]}, or generate "
                "without vLLM"
            )
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError(
            "vllm_structured_outputs_regex: got one, but the log-probs of constrained sampling are not "
            "those of the policy's full softmax and no mu for TOPR; leave it out, or generate without "
            "vLLM"
        )


def _warn_of_rounded_logits(args: Any, model: Any) -> None:
    half = args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)
    if half and not args.cast_lm_head_to_fp32:
        warnings.warn(
            "cast_lm_head_to_fp32: got False, so TRL rounds the logits to half precision and the ratio "
            "of a completion carries that noise of all its tokens (nats, on long ones); pass "
            "cast_lm_head_to_fp32=True",
            UserWarning,
            stacklevel=3,
        )
