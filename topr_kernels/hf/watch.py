"""What is watched while a model trains: means of metrics, and signs of a run that goes wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels import Limits, TOPROutput
from topr_kernels.hf.heads import base_model
from topr_kernels.hf.packing import eval_mode
from topr_kernels.output import DEAD_WEIGHT, SequenceResults

#: Nats by which a token's log-prob may differ between train and eval mode.
MOST_NOISE = 0.01


class NegativeWatch:
    """Warns, once per kind, when the negatives no longer teach: time for a new iteration."""

    #: Limits: the share of negatives without weight, and their effective sample size by their number.
    MOST_DEAD, LEAST_EFFECTIVE = 0.5, 0.1

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warn(self, figures: Mapping[str, float]) -> None:
        """Warns if the metrics since the last log, of all processes, pass a limit."""
        dead, share = figures.get("dead_share", 0.0), figures.get("ess_negative_share", 1.0)
        if dead > self.MOST_DEAD:
            self._once("dead", f"{dead:.0%} of the negatives have a weight below {DEAD_WEIGHT:g}")
        elif share < self.LEAST_EFFECTIVE:
            effective = figures["ess_negative"]
            self._once(
                "few",
                f"{effective / share:.0f} negatives count for only {effective:.1f} (effective sample "
                "size)",
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


class SequenceMetrics:
    """Metrics of the sequences of several batches, as if they had been one batch.

    The sequences' results are kept, six numbers each, since a standard deviation or an effective
    sample size is not the mean of those of the batches. Nothing is copied to the host before ``result``.
    """

    #: Tensors that are kept before they are joined.
    MOST_PARTS = 256

    def __init__(self) -> None:
        self._sequences: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, output: TOPROutput, items: Tensor | None = None) -> None:
        """Adds a batch; with ``items``, what its loss was divided by, for the mean loss."""
        if len(self._sums) >= self.MOST_PARTS:
            self._sequences, self._sums = [self._joined()], [torch.stack(self._sums).sum(0)]
        results = output.sequences()
        self._sequences.append(torch.stack([x.double() for x in results[:6]]))
        if items is None:
            items = torch.zeros_like(results.entropy)
        loss = torch.where(items == 0, 0.0, output.loss.detach() * items)
        sums = (results.entropy, results.kl_k3, loss, items)
        self._sums.append(torch.stack([x.double() for x in sums]))

    def result(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The metrics, and ``loss`` if its items were given; what is undefined is left out.

        Args:
            gather: from [1, K] of each of P processes to [P, K], for the metrics over all of them.
                Every process must call it.
        """
        sequences, sums = torch.zeros(6, 0), torch.zeros(4, dtype=torch.float64)
        if self._sums:
            sequences, sums = self._joined(), torch.stack(self._sums).sum(0)
        if gather is not None:
            sums = gather(sums[None]).sum(0)
            longest = int(gather(sums.new_tensor([[sequences.shape[1]]])).max())
            if not longest:
                return {}
            # Sequences of length 0 are not counted.
            padded = nn.functional.pad(sequences.double(), (0, longest - sequences.shape[1]))
            sequences = gather(padded.reshape(1, -1)).view(-1, *padded.shape)
            sequences = sequences.transpose(0, 1).flatten(1)
        if not sequences.shape[1]:
            return {}
        entropy, kl_k3, loss, items = sums
        metrics = SequenceResults._make([*sequences, entropy, kl_k3]).metrics()
        figures = {name: float(value) for name, value in metrics.items()}
        if items:
            figures["loss"] = float(loss / items)
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def _joined(self) -> Tensor:
        return torch.cat(self._sequences, dim=1)


def warn_if_never_negative(rewards: Iterable[float], baseline: float, limits: Limits) -> bool:
    """Warns if no reward lies below the baseline although the limits give negatives a weight.

    TOPR then trains on positives only, as with 0/1 rewards and no baseline.

    Returns:
        Whether it warned; never where there are no rewards.
    """
    if limits.neg_max == 0:
        return False
    empty = True
    for reward in rewards:
        if float(reward) - baseline < 0:
            return False
        empty = False
    if empty:
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


def warn_of_noise(
    model: nn.Module, score: Callable[[], Tensor], neftune: float | None = None
) -> bool:
    """Warns if a model in train mode gives other log-probs than in eval mode: pi is then noisy.

    Args:
        model: in train mode; it is run twice.
        score: runs the model on a batch; its log-probs.
        neftune: ``neftune_noise_alpha`` of the Trainer, to name it.

    Returns:
        Whether it warned.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # The random numbers of training stay what they would be.
    with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
        in_training = score()
        with eval_mode(model):
            quiet = score()
    # NaN in one mode alone is a difference; -inf in both is not.
    one_sided = bool((in_training.isnan() != quiet.isnan()).any())
    differences = (in_training - quiet).nan_to_num(0.0).abs()
    difference = math.inf if one_sided else float(differences.max())
    if difference <= MOST_NOISE:
        return False
    cause = (
        f"neftune_noise_alpha={neftune:g} adds noise to the embeddings"
        if neftune
        else "find what acts in train mode alone: a hook, LayerDrop, noise in a router"
    )
    warnings.warn(
        f"The log-probs of the first batch differ by up to {difference:.2g} nats between train mode and "
        f"eval mode, in which mu was scored: {cause}. So pi/mu is noise where the policies are equal, "
        "and its clipping acts on that. Train without it",
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
