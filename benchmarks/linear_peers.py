"""The providers that the fused-linear benchmarks compare: this package, plain torch, and peers.

A provider is a loss of (case, hidden, weight). Those that give a log-probability per token share one
TOPR stage in plain torch (README, "Equivalent to"); those that give only a mean compute the mean
cross-entropy of the same tokens, which is less work and cannot express TOPR: ``kind`` says so, and
they are checked against that mean. What cannot be imported is a provider with a reason instead of a
loss. Peers run in the dtype of the inputs, with their documented fp32 accumulation where they have it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hidden_states import Hidden, to
from torch import Tensor

from topr_kernels import linear_topr_loss

PACKAGES = ("trl", "liger_kernel", "cut_cross_entropy", "quack_kernels", "transformers", "triton")


class Case:
    """Inputs of one measurement, on their device, with the sequence of each row and its length."""

    def __init__(self, data: Hidden, device: str, dtype: torch.dtype) -> None:
        data = to(data, device)
        self.data = data._replace(hidden=data.hidden.to(dtype), weight=data.weight.to(dtype))
        self.length = self.data.cu_seqlens.diff().long()
        self.of = torch.arange(len(self.length), device=device).repeat_interleave(self.length)
        self.aside: dict[str, float] = {}  # what ours reports besides the loss

    def topr(self, log_pi: Tensor) -> Tensor:
        """The TOPR loss of log pi [N] in plain torch, fp32 or fp64."""
        return topr(log_pi, self.data.behavior_log_prob, self.data.reward, self.of, self.length)


Loss = Callable[[Case, Tensor, Tensor], Tensor]


class Provider(NamedTuple):
    """A loss at each of its settings, or why it is missing; ``kind`` is "topr" or "mean"."""

    settings: dict[str, Loss]
    kind: str = "topr"
    missing: str = ""


def topr(log_pi: Tensor, mu: Tensor, reward: Tensor, of: Tensor, length: Tensor) -> Tensor:
    """README's "Equivalent to" for packed sequences: row t belongs to sequence ``of[t]``."""
    difference = log_pi - mu
    log_ratio = difference.new_zeros(len(length)).index_add(0, of, difference)
    low = torch.where(reward < 0, 0.0, 1.0).log()
    c = torch.minimum(torch.maximum(log_ratio, low), torch.zeros_like(low)).detach()
    return -(reward * c.exp() * (1 + log_ratio - c) / length).mean()


def _plain(
    h: Tensor, w: Tensor, y: Tensor, mu: Tensor, reward: Tensor, of: Tensor, length: Tensor
) -> Tensor:
    log_pi = F.linear(h, w).float().log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    return topr(log_pi, mu, reward, of, length)


def plain(function: Callable[..., Tensor] = _plain) -> Loss:
    """Eager torch: logits in the dtype of the inputs, then fp32; or a compiled form of it."""

    def loss(c: Case, h: Tensor, w: Tensor) -> Tensor:
        d = c.data
        return function(h, w, d.labels, d.behavior_log_prob, d.reward, c.of, c.length)

    return loss


def ours(tolerance: float, **options: Any) -> Loss:
    """This package; notes the measured sparsity and what was left out."""

    def loss(c: Case, h: Tensor, w: Tensor) -> Tensor:
        d = c.data
        out = linear_topr_loss(
            h,
            w,
            d.labels,
            d.behavior_log_prob,
            d.reward,
            cu_seqlens=d.cu_seqlens,
            shift=False,
            grad_tolerance=tolerance,
            **options,
        )
        # Kept as tensors: reading them here would put a device sync into the timing.
        c.aside = {"active_share": out.active_share, "left_out": out.left_out}  # type: ignore[dict-item]
        return out.loss

    return loss


def per_token(log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A peer's log-probability per token (hidden, weight, labels -> [N]) under our TOPR stage."""
    return lambda c, h, w: c.topr(log_prob(h, w, c.data.labels).float())


def torch_linear_cross_entropy() -> dict[str, Provider]:
    """``F.linear_cross_entropy``: the per-token form TOPR needs, and the cheaper mean."""
    if not hasattr(F, "linear_cross_entropy"):
        missing = Provider({}, missing=f"not in torch {torch.__version__}")
        return {"F.linear_cross_entropy": missing}
    from torch.nn import LinearCrossEntropyOptions as Options

    settings = {"default": Options()} | {
        f"{rows} rows a chunk": Options(batch_chunk_size=rows) for rows in (128, 512, 2048)
    }

    def none(options: Any) -> Loss:
        return per_token(
            lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=options)
        )

    def mean(options: Any) -> Loss:
        return lambda c, h, w: F.linear_cross_entropy(h, w, c.data.labels, options=options)

    # Without options it materialises the logits: the reference path.
    settings_none = {"no options": none(None)} | {k: none(o) for k, o in settings.items()}
    settings_mean = {"no options": mean(None)} | {k: mean(o) for k, o in settings.items()}
    return {
        "F.linear_cross_entropy": Provider(settings_none),
        "F.linear_cross_entropy mean": Provider(settings_mean, "mean"),
    }


def trl() -> dict[str, Provider]:
    """TRL's fused head, at the vocabulary chunk its trainers use and at the best of a few."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as default
    except ImportError as error:
        return {"TRL fused head": Provider({}, missing=str(error))}

    def at(chunk: int) -> Loss:
        def log_prob(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, ())[0]

        return per_token(log_prob)

    tuned = {f"chunk {chunk}": at(chunk) for chunk in (1024, 2048, 4096, 8192, 16384)}
    return {
        "TRL fused head": Provider({f"chunk {default}": at(default)}),
        "TRL fused head tuned": Provider(tuned),
    }


def liger(device: str) -> dict[str, Provider]:
    """Liger's chunked selective log-prob (its GRPO); on CUDA also scaled CE and mean CE."""
    found = {}
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

        def at(chunk: int) -> Loss:
            return per_token(
                lambda h, w, y: _ChunkedSelectiveLogProbFunction.apply(h, w, y, None, 1.0, chunk)
            )

        chunks = (4096, 8192, 16384)
        found["Liger selective log-prob"] = Provider({f"chunk {k}": at(k) for k in chunks})
    except ImportError as error:
        found["Liger selective log-prob"] = Provider({}, missing=str(error))
    if device != "cuda":
        return found
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Scaled,
        )

        scaled = per_token(lambda h, w, y: -Scaled.apply(h, w, y))
        found["Liger scaled cross-entropy"] = Provider({"default": scaled})
    except ImportError as error:
        found["Liger scaled cross-entropy"] = Provider({}, missing=str(error))
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Mean,
        )

        def mean(c: Case, h: Tensor, w: Tensor) -> Tensor:
            out = Mean.apply(
                h, w, c.data.labels, None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32
            )
            return out[0] if isinstance(out, tuple) else out

        found["Liger cross-entropy mean"] = Provider({"fp32 accumulation": mean}, "mean")
    except ImportError as error:
        found["Liger cross-entropy mean"] = Provider({}, missing=str(error))
    return found


def apple(device: str) -> dict[str, Provider]:
    """Cut cross-entropy: on CUDA with and without gradient filtering, elsewhere its torch twin."""
    try:
        from cut_cross_entropy import linear_cross_entropy as cce
    except ImportError as error:
        return {"cut cross-entropy": Provider({}, missing=str(error))}

    def at(impl: str, eps: Any) -> Loss:
        return per_token(lambda h, w, y: -cce(h, w, y, reduction="none", filter_eps=eps, impl=impl))

    if device != "cuda":
        return {"cut cross-entropy (torch)": Provider({"torch_compile": at("torch_compile", None)})}
    return {
        "cut cross-entropy": Provider({"exact": at("cce", None)}),
        "cut cross-entropy filtered": Provider({'filter_eps="auto"': at("cce", "auto")}),
    }


def quack(device: str) -> dict[str, Provider]:
    """QuACK's chunked mean; CUDA only."""
    if device != "cuda":
        return {"QuACK mean": Provider({}, missing="runs on CUDA only")}
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked
    except ImportError as error:
        return {"QuACK mean": Provider({}, missing=str(error))}

    def at(chunk: int) -> Loss:
        return lambda c, h, w: chunked(h, w, c.data.labels, chunk_size=chunk)

    return {"QuACK mean": Provider({f"chunk {k}": at(k) for k in (2048, 4096, 8192)}, "mean")}


def providers(device: str, log2_tolerances: list[int]) -> dict[str, Provider]:
    """Every provider by name."""
    found = {"topr exact": Provider({"": ours(0.0)})}
    for k in log2_tolerances:
        found[f"topr tau 2^{k}"] = Provider({"": ours(2.0**k)})
    found["torch eager"] = Provider({"": plain()})
    found["torch.compile"] = Provider({"": plain(torch.compile(_plain, dynamic=False))})
    found |= torch_linear_cross_entropy() | trl() | apple(device) | liger(device) | quack(device)
    return found


def versions() -> str:
    """Versions of the peers that are installed, for the CSV."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)
