"""Per-token log-probabilities of the labels, differentiable: the scorer of log pi and log mu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from topr_kernels import kernels, validation
from topr_kernels.distributed import calls
from topr_kernels.distributed.agreement import Groups
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Tokens, Transforms
from topr_kernels.output import LogProbOutput


def log_prob(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    shift: bool = True,
    process_group: Any = None,
    sequence_group: Any = None,
    impl: str = "auto",
    debug: bool = False,
) -> LogProbOutput:
    """Computes log softmax(logits)[label] per token without an fp32 copy of the logits.

    Equivalent to ``logits.float().log_softmax(-1)`` gathered at the labels. The result has the layout
    :func:`topr_loss` expects of ``behavior_log_prob``, so under ``no_grad`` this scores log mu.

    Args:
        logits: [B, T, V], or packed [N, V] / [1, N, V] with ``cu_seqlens``; any strides; fp32, bf16,
            fp16 or fp64. Never copied; sums and exponentials run in fp32 (fp64 for fp64).
        labels: [B, T] / [N] int64, unshifted as in Hugging Face; -100 = not scored.
        cu_seqlens: [B + 1] int32 offsets of packed sequences (FlashAttention's convention).
        temperature: logits are divided by it, after ``softcap``.
        softcap: s of ``s * tanh(logits / s)``, 1e-5 to 1e5, for raw logits only: ``model(...).logits``
            has it.
        entropy: also compute the entropy of every scored row.
        shift: row t predicts the label at t + 1; False when rows and labels are already aligned.
        process_group: of ``torch.distributed``, over whose processes the vocabulary is spread: the
            logits here are this process's columns, in the order of the ranks and not necessarily of one
            number, or a DTensor of placement Shard(-1) over that group. Labels and options must be the
            same on each; so are the results. Reads 40 bytes of each on the host.
        sequence_group: over whose processes the tokens of each sequence are spread, in the order of the
            ranks; needed where labels are shifted, across its borders. The backward is collective then.
            Packed input: shift the labels before they are cut, and pass ``shift=False``.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or options that disagree; on eager CPU (or with ``debug``) also
            labels outside the vocabulary and unsound ``cu_seqlens``. Elsewhere those give NaN.
    """
    tokens, transforms = Tokens(labels, cu_seqlens, shift), Transforms(1.0, softcap, temperature)
    given = validation.LogitsArguments(logits, tokens, transforms, entropy, impl, debug)
    if process_group is not None or sequence_group is not None:
        return calls.log_prob(Groups(process_group, sequence_group), given)
    x, tokens, transforms, *_ = validation.check_logits(given)
    impl = kernels.resolve(impl, x)
    readable = validation.values_readable(x, debug)
    if readable:
        validation.check_values(tokens, x.shape[-1])
    options = transforms.temperature, transforms.softcap, entropy, shift, impl
    token, lse, _, row_entropy = ops.log_prob_fwd(x, *tokens[:2], *options)
    out = LogProbOutput(*(y.view(labels.shape) for y in (token, lse, row_entropy)))
    return out if readable else out.poisoned(tokens)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    shift: bool = True,
    grad_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    sequence_group: Any = None,
    impl: str = "auto",
    debug: bool = False,
) -> LogProbOutput:
    """Computes :func:`log_prob` of a language model's head without ever making its logits.

    Differentiable with any upstream gradient per token, at the cost of one more matmul in the backward;
    under ``no_grad`` one matmul over the scored rows in all. With equal ``workspace_bytes`` it gives
    bitwise the log-probs of :func:`topr_kernels.linear_topr_loss`: score log mu with it. It copies to
    the host as that does.

    Args:
        hidden: [B, T, D], or packed [N, D] / [1, N, D] with ``cu_seqlens``: the input of the head.
        weight: [V, D], ``lm_head.weight``.
        labels: [B, T] / [N] int64, unshifted as in Hugging Face; -100 = not scored.
        bias: [V] or None.
        logit_scale: multiplies the logits, before ``softcap``.
        cu_seqlens: [B + 1] int32 offsets of packed sequences (FlashAttention's convention).
        temperature: logits are divided by it, after ``softcap``.
        softcap: s of ``s * tanh(logits / s)``, 1e-5 to 1e5 times ``logit_scale``.
        entropy: also compute the entropy of every scored row.
        shift: row t predicts the label at t + 1; False when rows and labels are already aligned.
        grad_tolerance: as in :func:`topr_kernels.linear_topr_loss`; None is 0.
        workspace_bytes: as in :func:`topr_kernels.linear_topr_loss`.
        process_group: as in :func:`topr_kernels.linear_topr_loss`.
        sequence_group: as in :func:`log_prob`.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument, or a head sharded over processes.
        ValueError: as :func:`log_prob`.
    """
    tokens = Tokens(labels, cu_seqlens, shift)
    transforms = Transforms(logit_scale, softcap, temperature)
    given = validation.LinearArguments(
        *(hidden, weight, bias, tokens, transforms),
        *(entropy, grad_tolerance, workspace_bytes, impl, debug),
    )
    if process_group is not None or sequence_group is not None:
        return calls.linear_log_prob(Groups(process_group, sequence_group), given)
    x, weights, tokens, transforms, wanted = validation.check_linear(given, 0.0)
    vocab = weights.weight.shape[0]
    workspace_bytes = validation.check_workspace(workspace_bytes, x, vocab)
    impl = kernels.resolve(impl, x, kernels.LINEAR)
    readable = validation.values_readable(x, debug)
    if readable:
        validation.check_values(tokens, vocab)
    result = linear_ops.linear_log_prob_fwd(
        *(x, *weights[:2], *tokens[:2], weights.compute_dtype, *transforms),
        *(entropy, shift, wanted.grad_tolerance, workspace_bytes, impl),
    )
    out = LogProbOutput(*(y.view(labels.shape) for y in result))
    return out if readable else out.poisoned(tokens)
