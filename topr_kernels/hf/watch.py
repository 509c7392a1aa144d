"""What is watched while a model trains: means of metrics, and signs of a run that goes wrong."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels import Limits, TOPROutput
from topr_kernels.hf.heads import base_model
from topr_kernels.output import DEAD_WEIGHT


class NegativeWatch:
    """Warns, once per kind, when the negatives no longer teach: time for a new iteration."""

    #: Limits: the share of negatives without weight, and their effective sample size by their number.
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
        """Warns if the sequences since the last call, of all processes, pass a limit; then resets."""
        if self._sums is None:
            return
        count, dead, weight_sum, square_sum = gather(self._sums[None]).sum(0).tolist()
        self._sums = None
        if not count:
            return
        if dead / count > self.MOST_DEAD:
            self._once(
                "dead", f"{dead / count:.0%} of the negatives have a weight below {DEAD_WEIGHT:g}"
            )
        elif square_sum and weight_sum * weight_sum / square_sum < self.LEAST_EFFECTIVE * count:
            effective = weight_sum * weight_sum / square_sum
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
            weighted = torch.where(undefined, zero, x * size)
            self._total[name] = self._total.get(name, zero) + weighted
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


def warn_if_never_negative(rewards: Iterable[float], baseline: float, limits: Limits) -> bool:
    """Warns if no reward lies below the baseline although the limits give negatives a weight.

    TOPR then trains on positives only, as with 0/1 rewards and no baseline.

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


def warn_of_dropout(model: nn.Module) -> bool:
    """Warns if dropout is active in a module of the model, naming the module and the remedy.

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
    # Dropout that no field of the config sets comes from an adapter.
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
        # Attention layers hold their rate as a number and pass it to a function.
        for name, x in vars(module).items():
            if "drop" in name and _is_rate(x):
                yield f"{path}.{name}", x


def _is_rate(x: Any) -> bool:
    return isinstance(x, float) and x > 0
