"""The public functions over process groups: agree, run the operators, align results with the labels."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels import kernels, validation
from topr_kernels.distributed import agreement, pieces, shards
from topr_kernels.distributed.agreement import PER_SEQUENCE, PER_TOKEN, Agreement, Groups
from topr_kernels.distributed.collectives import over, sum_
from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_offsets
from topr_kernels.linear.operators import linear_kernels
from topr_kernels.linear.tile import Shard
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens
from topr_kernels.output import LogProbOutput, TOPROutput, sequence_weight_or_ones
from topr_kernels.segments import scored_tokens, with_units
from topr_kernels.sequence import topr_from_log_prob, without_unknown
from topr_kernels.validation import LinearArguments, LogitsArguments, SequenceArguments


def topr_loss(
    groups: Groups, given: LogitsArguments, sequences: SequenceArguments, inplace: bool
) -> TOPROutput:
    """:func:`topr_kernels.topr_loss` in its two stages, each over its process group."""
    if inplace:
        raise ValueError(
            "inplace: got True with a process group, where it is not served; pass inplace=False"
        )
    call = _LogitsCall(groups, given, sequences)
    checked, agreed = agreement.agree(groups, _device(given.logits), call)
    inputs, objective = checked.inputs, checked.agreed_objective(agreed)
    tokens, objective = _at_rows(inputs.tokens, objective, groups)
    objective = _with_units(objective, tokens, groups.sequence_group)
    scores = _log_probs(inputs._replace(tokens=tokens), checked.impl, agreed, groups)
    out = topr_from_log_prob(
        scores.log_prob,
        scored_labels(*tokens) != IGNORE_INDEX,
        tokens.cu_seqlens,
        objective,
        None if groups.sequence_group is None else over(sum_, groups.sequence_group),
    )
    out = out._replace(entropy=scores.entropy)
    if tokens.shift != given.tokens.shift:
        summed = objective.behavior_log_prob.dim() == 1
        out = pieces.loss_at_labels(out, given.entropy, summed, groups.sequence_group)
    return out.shaped(given.tokens.labels.shape)


def log_prob(groups: Groups, given: LogitsArguments) -> LogProbOutput:
    """:func:`topr_kernels.log_prob` of logits whose columns or tokens are spread."""
    checked, agreed = agreement.agree(
        groups, _device(given.logits), _LogitsCall(groups, given, None)
    )
    tokens, _ = _at_rows(checked.inputs.tokens, None, groups)
    out = _log_probs(checked.inputs._replace(tokens=tokens), checked.impl, agreed, groups)
    return _scores(out, given.tokens, tokens, given.entropy, groups)


def linear_topr_loss(
    groups: Groups, given: LinearArguments, sequences: SequenceArguments, frozen_tolerance: float
) -> TOPROutput:
    """:func:`topr_kernels.linear_topr_loss` of a head or of tokens that are spread."""
    call = _LinearCall(groups, given, sequences, frozen_tolerance)
    checked, agreed = agreement.agree(groups, _device(given.hidden), call)
    inputs, objective = checked.inputs, checked.agreed_objective(agreed)
    tokens, objective = _at_rows(inputs.tokens, objective, groups)
    objective = _with_units(objective, tokens, groups.sequence_group)
    workspace_bytes = _workspace_bytes(given, inputs, agreed.shard)
    impl = _registered(checked.impl, agreed.shard, groups)
    x, weights, _, transforms, wanted = inputs
    lent = linear_ops.lend(objective.taper)
    out = linear_ops.linear_topr_fwd(
        *(x, *weights[:2], *tokens[:2], *objective.operands, lent and lent.number),
        *(weights.compute_dtype, *transforms, given.entropy, tokens.shift),
        *(wanted.grad_tolerance, workspace_bytes, *wanted[1:], impl),
    )
    loss, _, token, _, row_entropy, token_log_ratio, *rest = out[:13]
    rest.append(sequence_weight_or_ones(objective.sequence_weight, rest[3]))
    result = TOPROutput(loss, token, row_entropy, token_log_ratio, *rest)
    result = without_unknown(result, objective, *tokens[:2])
    if tokens.shift != given.tokens.shift:
        summed = objective.behavior_log_prob.dim() == 1
        result = pieces.loss_at_labels(result, given.entropy, summed, groups.sequence_group)
    return result.shaped(given.tokens.labels.shape)


def linear_log_prob(groups: Groups, given: LinearArguments) -> LogProbOutput:
    """:func:`topr_kernels.linear_log_prob` of a head or of tokens that are spread."""
    call = _LinearCall(groups, given, None, 0.0)
    checked, agreed = agreement.agree(groups, _device(given.hidden), call)
    inputs = checked.inputs
    tokens, _ = _at_rows(inputs.tokens, None, groups)
    workspace_bytes = _workspace_bytes(given, inputs, agreed.shard)
    impl = _registered(checked.impl, agreed.shard, groups._replace(sequence_group=None))
    x, weights, _, transforms, wanted = inputs
    out = linear_ops.linear_log_prob_fwd(
        *(x, *weights[:2], *tokens[:2], weights.compute_dtype, *transforms),
        *(given.entropy, tokens.shift, wanted.grad_tolerance, workspace_bytes, impl),
    )
    return _scores(LogProbOutput(*out), given.tokens, tokens, given.entropy, groups)


def topr_loss_from_log_prob(
    sequence_group: Any, given: validation.TokenArguments, sequences: SequenceArguments
) -> TOPROutput:
    """:func:`topr_kernels.topr_loss_from_log_prob` of sequences in pieces."""
    groups = Groups(None, sequence_group)
    checked, agreed = agreement.agree(
        groups, _device(given.log_prob), _TokenCall(groups, given, sequences)
    )
    inputs, objective = checked.inputs, checked.agreed_objective(agreed)
    objective = _with_units(objective, inputs.tokens, sequence_group)
    out = topr_from_log_prob(
        inputs.log_prob, inputs.mask, inputs.cu_seqlens, objective, over(sum_, sequence_group)
    )
    return out.shaped(given.log_prob.shape)


# ---- what is checked and agreed on -----------------------------------------------------------------


class _Checked(NamedTuple):
    """Arguments that passed their checks; ``forms`` is PER_SEQUENCE, PER_TOKEN or both."""

    inputs: Any
    objective: Objective | None
    forms: int
    impl: str

    def agreed_objective(self, agreed: Agreement) -> Objective:
        """The objective, log mu taken as the processes have agreed to take it."""
        assert self.objective is not None
        return self.objective if agreed.per_token else self.summed()

    def summed(self) -> Objective:
        """The objective, with log mu read as [B] if its shape allows that."""
        assert self.objective is not None
        if self.forms != PER_SEQUENCE | PER_TOKEN:
            return self.objective
        mu = self.objective.behavior_log_prob.reshape(-1)
        return self.objective._replace(behavior_log_prob=mu)


def _checked(
    inputs: Any, tokens: Tokens, sequences: SequenceArguments | None, impl: str
) -> _Checked:
    if sequences is None:
        return _Checked(inputs, None, PER_TOKEN, impl)
    objective = validation.check_objective(tokens, sequences)
    forms = PER_TOKEN if objective.behavior_log_prob.dim() == 2 else PER_SEQUENCE
    as_sums = sequences.behavior_log_prob.shape == objective.reward.shape
    if as_sums and objective.ratio != "token":
        forms |= PER_SEQUENCE
    return _Checked(inputs, objective, forms, impl)


def _announcement(
    checked: _Checked,
    x: Tensor,
    tokens: Tokens,
    columns: int,
    shape: torch.Size,
    options: tuple[object, ...],
) -> agreement.Announcement:
    """What the processes must agree on.

    Args:
        checked: the arguments.
        x: logits, hidden states or log-probs.
        tokens: labels (or the mask), offsets and shift.
        columns: of the vocabulary that are here.
        shape: what ``x`` has in common with that of other shards.
        options: what else both groups must agree on.
    """
    labels, cu_seqlens, shift = tokens
    shared: dict[str, object] = {
        "options": (*options, checked.impl, shift),
        "dtype": x.dtype,
        "requires_grad": x.requires_grad and torch.is_grad_enabled(),
        "number of sequences": len(labels) if cu_seqlens is None else len(cu_seqlens) - 1,
    }
    tensors: dict[str, Tensor | None] = {}
    behavior = summed = None
    objective = checked.objective
    if objective is not None:
        behavior, taper = objective.behavior_log_prob, objective.taper
        summed = checked.summed().behavior_log_prob if checked.forms & PER_SEQUENCE else None
        shared |= {
            "limits": objective.log_limits
            if taper is None
            else getattr(taper, "__qualname__", type(taper)),
            "ratio": objective.ratio,
            "ratio per segment": objective.segments is not None,
            "baseline": objective.baseline,
            "reduction": objective.reduction,
            "dtype of behavior_log_prob": behavior.dtype,
        }
        names = ("reward", "normalizer", "sequence_weight", "behavior_known")
        tensors = {name: getattr(objective, name) for name in names}
    segments = None if objective is None else objective.segments
    whole = {"labels": labels, "cu_seqlens": cu_seqlens, "segments": segments, **tensors}
    vocabulary = agreement.Facts({**shared, "shape": tuple(shape)}, whole, behavior)
    return agreement.Announcement(
        columns, vocabulary, agreement.Facts(shared, tensors, summed), checked.forms
    )


class _LogitsCall(NamedTuple):
    """``topr_loss`` and ``log_prob``."""

    groups: Groups
    given: LogitsArguments
    sequences: SequenceArguments | None

    def check(self) -> _Checked:
        given = self.given
        pieces.check_shift(given.tokens, self.groups.sequence_group)
        here = shards.local_columns(self.groups.process_group, given.logits)
        inputs = validation.check_logits(given._replace(logits=here))
        impl = shards.check_impl(
            given.impl, inputs.logits, self.groups.process_group, kernels.LOGITS
        )
        return _checked(inputs, inputs.tokens, self.sequences, impl)

    def announcement(self, checked: _Checked) -> agreement.Announcement:
        inputs: LogitsArguments = checked.inputs
        x, options = inputs.logits, (inputs.transforms, inputs.entropy)
        return _announcement(checked, x, inputs.tokens, x.shape[-1], x.shape[:-1], options)

    def check_values(self, checked: _Checked, vocab: int | None) -> None:
        x = checked.inputs.logits
        _check_values(checked, x, vocab or x.shape[-1], self.sequences, self.given.debug)


class _LinearCall(NamedTuple):
    """``linear_topr_loss`` and ``linear_log_prob``."""

    groups: Groups
    given: LinearArguments
    sequences: SequenceArguments | None
    frozen_tolerance: float

    def check(self) -> _Checked:
        given, group = self.given, self.groups.process_group
        pieces.check_shift(given.tokens, self.groups.sequence_group)
        weight, bias = shards.local_head(group, given.weight, given.bias)
        given = given._replace(weight=weight, bias=bias)
        inputs = validation.check_linear(given, self.frozen_tolerance)
        impl = shards.check_impl(given.impl, inputs.hidden, group, kernels.LINEAR)
        return _checked(inputs, inputs.tokens, self.sequences, impl)

    def announcement(self, checked: _Checked) -> agreement.Announcement:
        inputs: validation.LinearInputs = checked.inputs
        options = (
            *inputs[3:],
            inputs.weights.compute_dtype,
            self.given.workspace_bytes,
            self.given.entropy,
        )
        x, columns = inputs.hidden, len(inputs.weights.weight)
        return _announcement(checked, x, inputs.tokens, columns, x.shape, options)

    def check_values(self, checked: _Checked, vocab: int | None) -> None:
        inputs: validation.LinearInputs = checked.inputs
        vocab = vocab or len(inputs.weights.weight)
        _check_values(checked, inputs.hidden, vocab, self.sequences, self.given.debug)


class _TokenCall(NamedTuple):
    """``topr_loss_from_log_prob``."""

    groups: Groups
    given: validation.TokenArguments
    sequences: SequenceArguments

    def check(self) -> _Checked:
        inputs = validation.check_token_log_prob(self.given)
        return _checked(inputs, inputs.tokens, self.sequences, "")

    def announcement(self, checked: _Checked) -> agreement.Announcement:
        inputs: validation.TokenArguments = checked.inputs
        return _announcement(checked, inputs.log_prob, inputs.tokens, 0, inputs.log_prob.shape, ())

    def check_values(self, checked: _Checked, vocab: int | None) -> None:
        inputs: validation.TokenArguments = checked.inputs
        if validation.values_readable(inputs.log_prob, self.given.debug):
            rest = checked.objective, self.sequences.normalizer
            validation.check_sequence_values(inputs.tokens, *rest)


def _check_values(
    checked: _Checked, x: Tensor, vocab: int, sequences: SequenceArguments | None, debug: bool
) -> None:
    if not validation.values_readable(x, debug):
        return
    objective, tokens = checked.objective, checked.inputs.tokens
    if objective is None or sequences is None:
        validation.check_values(tokens, vocab)
    else:
        validation.check_values(tokens, vocab, objective, sequences.normalizer)


# ---- what runs -------------------------------------------------------------------------------------


def _device(x: object) -> torch.device:
    """Device of a tensor that is not checked yet."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _at_rows(tokens: Tokens, objective: Any, groups: Groups) -> tuple[Tokens, Any]:
    """Labels and log mu aligned with the rows that are here, where the sequences are in pieces."""
    group = groups.sequence_group
    if group is None or not tokens.shift:
        return tokens, objective
    moved = pieces.shifted(tokens, group)
    if objective is not None and objective.behavior_log_prob.dim() == 2:
        mu = pieces.next_tokens(objective.behavior_log_prob, 0.0, group)
        objective = objective._replace(behavior_log_prob=mu)
    if objective is not None and objective.segments is not None:
        objective = objective._replace(segments=pieces.next_tokens(objective.segments, 0, group))
    return moved, objective


def _with_units(objective: Objective, tokens: Tokens, sequence_group: Any) -> Objective:
    """The objective with the units of its segments, if it has any; across the pieces of sequences."""
    if objective.segments is None or sequence_group is None:
        return with_units(objective, tokens)
    offsets, _ = sequence_offsets(tokens.labels, tokens.cu_seqlens)
    here = objective.segments, scored_tokens(tokens), offsets
    return objective._replace(units=pieces.find_units(*here, sequence_group))


def _log_probs(
    inputs: LogitsArguments, impl: str, agreed: Agreement, groups: Groups
) -> LogProbOutput:
    """Results per token [O, T], aligned with the labels of ``inputs``."""
    x, tokens, transforms, entropy = inputs[:4]
    if agreed.shard is not None:
        return shards.log_probs(x, tokens, transforms, entropy, agreed.shard, groups.process_group)
    options = transforms.temperature, transforms.softcap, entropy, tokens.shift, impl
    log_prob, lse, _, row_entropy = ops.log_prob_fwd(x, *tokens[:2], *options)
    return LogProbOutput(log_prob, lse, row_entropy)


def _scores(
    out: LogProbOutput, given: Tokens, tokens: Tokens, entropy: bool, groups: Groups
) -> LogProbOutput:
    """Results of a scorer at their labels, in the shape of the labels given."""
    if tokens.shift != given.shift:
        out = pieces.scores_at_labels(out, entropy, groups.sequence_group)
    return LogProbOutput(*(x.view(given.labels.shape) for x in out.poisoned(tokens)))


def _workspace_bytes(
    given: LinearArguments, inputs: validation.LinearInputs, shard: Shard | None
) -> int:
    """Bytes of the workspace; tiles have as many rows on every shard."""
    largest = len(inputs.weights.weight) if shard is None else shard.largest
    return validation.check_workspace(given.workspace_bytes, inputs.hidden, largest)


_NUMBERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_COUNT = itertools.count()


def _registered(impl: str, shard: Shard | None, groups: Groups) -> str:
    """Registers the fused-linear operators over process groups; returns their name.

    They are forgotten with their groups: nothing that is registered keeps a group alive.
    """
    process_group, sequence_group = groups
    if shard is None and sequence_group is None:
        return impl
    alive = [group for group in groups if group is not None]
    # A group's name can be used again, its number here is not.
    numbers = [_NUMBERS.setdefault(group, next(_COUNT)) for group in alive]
    name = f"{impl} groups {numbers} shard {shard and shard[:3]}"
    if linear_ops.is_registered(name):
        return name
    tile = kernels.linear_tile(impl) if shard is None else shards.shard_tile(shard, process_group)
    if sequence_group is not None:
        tile = tile._replace(sum_pieces=over(sum_, sequence_group))
    linear_ops.register(name, linear_kernels(tile))
    for group in alive:
        weakref.finalize(group, linear_ops.unregister, name).atexit = False
    return name
