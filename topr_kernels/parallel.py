"""The loss over several processes: a vocabulary in shards, sequences in pieces.

Everything here runs on ``torch.distributed`` process groups and is collective: every process of a group
must make the same calls in the same order. What the processes of a group must agree on is compared
before any work, so that a mistake raises on all of them and nobody waits for ever.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from topr_kernels import kernels
from topr_kernels.fused_linear import Shard, linear_kernels
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops import linear as linear_ops
from topr_kernels.rows import transform_

# torch.distributed is imported where it is used: some builds of torch come without it.


T = TypeVar("T")
#: What ``torch.distributed.new_group`` gives to a process outside of the group.
NON_MEMBER = -100
#: Elements of a block of logits that is transformed at a time.
BLOCK = 1 << 22


class Facts(NamedTuple):
    """What the processes of a group must agree on.

    Attributes:
        options: compared by their ``repr``.
        tensors: compared by shape, dtype and every bit; None where an argument is absent.
        behavior: log mu, where it must be the same but for rounding; compared by sums.
    """

    options: Mapping[str, object]
    tensors: Mapping[str, Tensor | None]
    behavior: Tensor | None = None


class Settled(NamedTuple):
    """What the processes of a call have agreed on.

    Attributes:
        shard: the part of the vocabulary that is here; None for the whole.
        per_token: whether a log mu that could be either is per token.
    """

    shard: Shard | None
    per_token: bool


#: What a log mu can be by its shape: for packed input with as many tokens as sequences it can be both.
PER_SEQUENCE, PER_TOKEN = 1, 2


class Claims(NamedTuple):
    """What a process tells the others of its groups before any work.

    Attributes:
        size: columns of the vocabulary that are here.
        whole: what the processes that share a vocabulary must agree on.
        pieces: what the processes that share the sequences must agree on.
        behavior: PER_SEQUENCE, PER_TOKEN or both.
    """

    size: int
    whole: Facts
    pieces: Facts
    behavior: int = PER_TOKEN


def settle(
    process_group: Any,
    sequence_group: Any,
    x: object,
    check: Callable[[], T],
    claims: Callable[[T], Claims],
    check_values: Callable[[T, int | None], None],
) -> tuple[T, Settled]:
    """Checks the arguments of a call, and raises on all of its processes if one of them must.

    One all-gather of 40 bytes per group, read on the host. Nobody raises before every group of the
    call has heard of it: else its other processes would wait for the next collective. With neither
    group the checks alone.

    Args:
        process_group: over which the vocabulary is spread, or None.
        sequence_group: over which the sequences are spread, or None.
        x: a tensor of the call; not checked yet.
        check: checks all but values, and returns the arguments.
        claims: what the other processes are to be told of them.
        check_values: checks values; given the size of the whole vocabulary, None for that which is here.

    Returns:
        What ``check`` returned, and what the processes agreed on.

    Raises:
        TypeError: from ``check``.
        ValueError: from ``check`` and ``check_values``; if another process refused its arguments, or
            they differ in what they must share.
    """
    if process_group is None and sequence_group is None:
        found = check()
        check_values(found, None)
        return found, Settled(None, True)
    for name, group in (("process_group", process_group), ("sequence_group", sequence_group)):
        check_group(name, group)
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    problem: Exception | None = None
    result: tuple[T, Claims] | None = None
    try:
        arguments = check()
        result = arguments, claims(arguments)
    except (TypeError, ValueError) as error:
        problem = error
    here = None if result is None else result[1]
    shard = None
    if process_group is not None:
        size, whole = (0, None) if here is None else (here.size, here.whole)
        problem, sizes, near = _agree("process_group", process_group, device, problem, whole, size)
        if problem is None and not near:
            problem = _difference("process_group", ["behavior_log_prob"], {})
        start = sum(sizes[: _rank(process_group)])
        shard = Shard(start, max(sizes), sum(sizes), partial(_sum, process_group))
    if problem is None and result is not None:
        try:
            check_values(result[0], None if shard is None else shard.vocab)
        except ValueError as error:
            problem = error
    common = PER_SEQUENCE | PER_TOKEN
    if sequence_group is not None:
        kind, pieces = (0, None) if here is None else (here.behavior, here.pieces)
        problem, kinds, near = _agree(
            "sequence_group", sequence_group, device, problem, pieces, kind
        )
        common = functools.reduce(operator.and_, kinds, common)
        if problem is None and common == 0:
            problem = ValueError(
                "sequence_group: behavior_log_prob is per token on some of its processes and summed per "
                "sequence on others; pass one form on all (packed per token: [1, N])"
            )
        if problem is None and not near and common == PER_SEQUENCE:
            problem = _difference("sequence_group", ["behavior_log_prob"], {})
    if problem is not None:
        raise problem
    assert result is not None
    # With as many packed tokens as sequences it is taken per token, if that is so on all processes.
    return result[0], Settled(shard, bool(common & PER_TOKEN))


def _agree(
    name: str,
    group: Any,
    device: torch.device,
    problem: Exception | None,
    facts: Facts | None,
    local: int,
) -> tuple[Exception | None, list[int], bool]:
    """-> (what to raise, ``local`` of each process, whether log mu is the same but for rounding)."""
    digests = torch.zeros(0, dtype=torch.int64, device=device)
    if facts is not None:
        digests = _digests(facts, device)
    odd = 2 * torch.arange(len(digests), device=device) + 1
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if facts is not None and facts.behavior is not None:
        places = torch.arange(facts.behavior.numel(), device=device) % 1024 + 1
        x = facts.behavior.double().flatten().nan_to_num(0.0, 0.0, 0.0) * places
        sums = torch.stack([x.sum(), x.abs().sum()])
    host = torch.tensor([local, int(problem is not None)], device=device)
    own = torch.cat([host, (digests * odd).sum()[None], sums.view(torch.int64)])
    # The one synchronisation: what follows is reckoned on the host.
    found = _gathered(own, group).cpu()
    rows = found.tolist()
    locals_ = [row[0] for row in rows]
    refused = [rank for rank, row in enumerate(rows) if row[1]]
    if problem is None and refused:
        problem = ValueError(
            f"{name}: process {refused[0]} of it refused its own arguments; see the error there"
        )
    if refused:
        return problem, locals_, True
    assert facts is not None
    names = [*facts.options, *facts.tensors]
    differ: list[str] = []
    if len({row[2] for row in rows}) > 1:
        # All processes see this, and come here.
        each = _gathered(digests, group).t().tolist()
        differ = [n for n, values in zip(names, each, strict=True) if len(set(values)) > 1]
    total, size = found[:, 3:].contiguous().view(torch.float64).unbind(1)
    near = bool((total - total[0]).abs().max() <= 1e-4 * size.max())
    if differ:
        problem = _difference(name, differ, facts.options)
    return problem, locals_, near


def _difference(name: str, differ: Sequence[str], options: Mapping[str, object]) -> ValueError:
    here = [f"{n}={options[n]!r}" for n in differ if n in options]
    shown = f" (here {', '.join(here)})" if here else ""
    same = {
        "process_group": "the vocabulary is spread over them: pass the same hidden states, labels, "
        "sequences and options on each",
        "sequence_group": "pass the same sequences, rewards and options on each, and of the tokens its "
        "own piece (none, for a sequence that ends earlier)",
    }
    return ValueError(f"{name}: its processes differ in {', '.join(differ)}{shown}; {same[name]}")


def _digests(facts: Facts, device: torch.device) -> Tensor:
    """[number of facts] int64, equal where the facts are, and hardly elsewhere."""
    host = [_hash(repr(value)) for value in facts.options.values()]
    sums = []
    for x in facts.tensors.values():
        described = "" if x is None else f"{tuple(x.shape)} {x.dtype}"
        total = torch.full((), _hash(described), device=device)
        if x is not None and x.numel():
            bits = x.detach().double().view(torch.int64) if x.is_floating_point() else x.long()
            odd = 2 * torch.arange(x.numel(), device=device) + 1
            total = total + (bits.flatten() * odd).sum()
        sums.append(total)
    return torch.stack([*torch.tensor(host, dtype=torch.int64, device=device), *sums])


def _hash(text: str) -> int:
    # Python's own differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def check_group(name: str, group: object) -> None:
    """Checks that a group is one of ``torch.distributed`` that this process is in, or None."""
    import torch.distributed as dist

    if group is None or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0):
        return
    remedy = "; pass mesh.get_group()" if hasattr(group, "get_group") else ""
    what = "a group that this process is not in" if group == NON_MEMBER else repr(group)
    raise TypeError(
        f"{name}: got {what}; expected a torch.distributed.ProcessGroup of this process, or None{remedy}"
    )


def serve(shard: Shard | None, process_group: Any, sequence_group: Any, name: str) -> str:
    """Registers the fused-linear operators over process groups; returns their name.

    Args:
        shard: the part of the vocabulary that is here.
        process_group: over which the vocabulary is spread, or None.
        sequence_group: over which the sequences are spread, or None.
        name: of the implementation that serves one process.
    """
    if shard is None and sequence_group is None:
        return name
    if shard is None:
        tile = kernels.linear_tile(name)
    else:
        kernels.load(kernels.LINEAR["torch"])
        tile = kernels.shard_tile(shard, partial(_max, process_group))
        name = f"vocabulary:{process_group.group_name}:{shard.start}:{shard.largest}:{shard.vocab}"
    if sequence_group is not None:
        name = f"{name}/sequences:{sequence_group.group_name}"
        tile = tile._replace(total=partial(_sum, sequence_group))
    linear_ops.register(name, linear_kernels(tile))
    return name


def check_shift(shift: bool, sequence_group: Any, cu_seqlens: object) -> None:
    """Refuses a shift across the pieces of packed sequences."""
    if shift and sequence_group is not None and cu_seqlens is not None:
        raise ValueError(
            "shift: got True with cu_seqlens and sequence_group; where the pieces of packed sequences "
            "meet is not known here: shift the labels before they are cut, and pass shift=False"
        )


def check_impl(impl: str, x: Tensor, process_group: Any, path: dict[str, str]) -> str:
    """Name of the implementation of a call, on ``path``.

    Raises:
        ValueError: as :func:`topr_kernels.kernels.resolve`; if ``impl`` does not serve the group.
    """
    if process_group is None:
        return kernels.resolve(impl, x, path)
    if impl not in ("auto", "torch"):
        raise ValueError(
            f"impl: got {impl!r} with process_group, which 'torch' alone serves; use 'auto'"
        )
    return "torch"


class ShardedLogProb(torch.autograd.Function):
    """log softmax at the labels over logits whose columns are spread; (log_prob, lse, entropy).

    Two all-reduces in the forward, of [N] and [3, N]; none in the backward. Blocks of rows bound the
    temporaries; the gradient has the dtype of the logits. Rows of label IGNORE_INDEX have no gradient,
    whatever comes from above, and nothing in them is read for another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        shard: Shard,
        group: Any,
        softcap: float | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> each [N]; logits [O, T, V of the shard], label [N], IGNORE_INDEX in rows of no meaning."""
        wide = accumulate_dtype(logits.dtype)
        n, vocab = label.numel(), logits.shape[-1]
        index, here = shard.local(label, vocab)

        def block(part: slice) -> Tensor:
            return transform_(_rows(logits, part, wide), 1.0, softcap, temperature)

        parts = _blocks(n, vocab)
        top = logits.new_full((n,), -torch.inf, dtype=wide)
        for part in parts:
            top[part] = block(part).amax(-1)
        top = _max(group, top)
        # A row of -inf alone must not become -inf - (-inf).
        top = torch.where(top == -torch.inf, 0.0, top)
        sums = top.new_zeros((3, n))
        for part in parts:
            z = block(part).sub_(top[part].unsqueeze(-1))
            at_label = z.gather(-1, index[part].unsqueeze(-1)).squeeze(-1)
            sums[1, part] = torch.where(here[part], at_label, 0.0)
            p = z.exp()
            sums[0, part] = p.sum(-1)
            if entropy:
                sums[2, part] = torch.where(p == 0, 0.0, p * z).sum(-1)
        total, difference, surprise = shard.sum_(sums).unbind()
        log_total = total.log()
        lse = top + log_total
        log_prob = difference - log_total
        log_prob = torch.where((difference == -torch.inf) & ~lse.isnan(), -torch.inf, log_prob)
        ignored = label == IGNORE_INDEX
        outside = ~ignored & ((label < 0) | (label >= shard.vocab))
        log_prob = log_prob.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0)
        row_entropy = (log_total - surprise / total) if entropy else torch.full_like(lse, torch.nan)
        lse, row_entropy = lse.masked_fill(ignored, 0.0), row_entropy.masked_fill(ignored, 0.0)
        row_entropy = row_entropy if entropy else torch.full_like(lse, torch.nan)
        ctx.save_for_backward(logits, index, here, log_prob, top, log_total, ignored)
        ctx.transforms = softcap, temperature
        ctx.mark_non_differentiable(lse, row_entropy)
        ctx.set_materialize_grads(False)
        return log_prob, lse, row_entropy

    @staticmethod
    def backward(ctx: Any, d: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """-> d (onehot - softmax), by selection 0 in rows of coefficient 0."""
        if d is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of log_prob over a process_group is not differentiable a second time "
                "(create_graph=True); for second derivatives use topr_kernels.reference"
            )
        logits, index, here, log_prob, top, log_total, ignored = ctx.saved_tensors
        softcap, temperature = ctx.transforms
        d = d.masked_fill(ignored, 0.0)
        gradient = logits.new_empty(logits.shape)
        flat = gradient.view(-1, logits.shape[-1])
        for part in _blocks(*flat.shape):
            z = transform_(_rows(logits, part, top.dtype), 1.0, softcap, temperature)
            slope = None if softcap is None else 1 - (z * (temperature / softcap)).square()
            j = z.sub_(top[part].unsqueeze(-1)).sub_(log_total[part].unsqueeze(-1)).exp_().neg_()
            # The true class in the arithmetic dtype: 1 - p_y = -expm1(log p_y) keeps every digit.
            row = here[part].nonzero().squeeze(-1)
            j[row, index[part][row]] = -torch.expm1(log_prob[part][row])
            if slope is not None:
                j.mul_(slope)
            c = d[part].unsqueeze(-1)
            flat[part] = torch.where(c == 0, 0.0, j * (c / temperature)).to(flat.dtype)
        return (gradient, *(None,) * 6)


def _rows(x: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """A copy of some of the rows of [O, T, V], whatever its strides."""
    t = x.shape[1]
    row = torch.arange(part.start, part.stop, device=x.device)
    # By two indices: flattening a slice of the logits would copy all of them.
    return x[row // t, row % t].to(dtype)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, BLOCK // max(columns, 1))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


def local_rows(group: Any, *tensors: Any) -> tuple[Any, ...]:
    """The rows of head and bias that this process holds, of DTensors in shards of the vocabulary.

    Args:
        group: over which the head is spread, or None.
        *tensors: plain tensors and None are returned as they are; a DTensor as its local rows, whose
            gradient goes back to the DTensor in the same placement.

    Raises:
        ValueError: if a DTensor is not spread by Shard(0) over that group.
    """
    import torch.distributed as dist

    if group is None:
        return tensors
    for x in tensors:
        if not hasattr(x, "device_mesh"):
            continue
        mesh, ranks = x.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
        if len(x.placements) != 1 or not x.placements[0].is_shard(0) or mesh != ranks:
            raise ValueError(
                f"weight or bias: a DTensor of placements {x.placements} over ranks {mesh}; expected "
                f"(Shard(dim=0),) over the ranks {ranks} of process_group; pass the group of its mesh "
                "(weight.device_mesh.get_group()), or redistribute it"
            )
    return tuple(x.to_local() if hasattr(x, "device_mesh") else x for x in tensors)


def local_columns(group: Any, logits: Any) -> Any:
    """The columns of the logits that this process holds, of a DTensor as loss parallelism has them.

    Raises:
        ValueError: if a DTensor is not spread over its last dimension and that group.
    """
    import torch.distributed as dist

    if group is None or not hasattr(logits, "device_mesh"):
        return logits
    mesh, ranks = logits.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
    last = logits.dim() - 1
    if len(logits.placements) != 1 or not logits.placements[0].is_shard(last) or mesh != ranks:
        raise ValueError(
            f"logits: a DTensor of placements {logits.placements} over ranks {mesh}; expected "
            f"(Shard(dim={last}),) over the ranks {ranks} of process_group"
        )
    return logits.to_local()


class _Moved(torch.autograd.Function):
    """``previous_tokens`` of something differentiable; its backward is a collective too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: float, group: Any) -> Tensor:
        ctx.group = group
        return previous_tokens(x, fill, group)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return next_tokens(d.contiguous(), 0.0, ctx.group), None, None


def moved_to_labels(x: Tensor, fill: float, group: Any) -> Tensor:
    """A tensor per row moved to the labels, across the pieces of the sequences; differentiable."""
    moved: Tensor = _Moved.apply(x, fill, group)  # type: ignore[no-untyped-call]
    return moved


def next_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the left, across the pieces of the sequences.

    Args:
        x: [B, T], the columns of this process; T may differ between processes, and be 0.
        fill: for the last position of all.
        group: whose ranks hold the columns in their order.

    Returns:
        [B, T]: for each position what ``x`` has at the next one.
    """
    import torch.distributed as dist

    end = x[:, :1] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _all_gather(end, bool(x.shape[1]), group)
    later = (border for border in borders[dist.get_rank(group) + 1 :] if border is not None)
    following = next(later, torch.full_like(end, fill))
    return torch.cat([x, following], dim=1)[:, 1:]


def previous_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the right; as :func:`next_tokens`."""
    import torch.distributed as dist

    end = x[:, -1:] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _all_gather(end, bool(x.shape[1]), group)
    earlier = [border for border in borders[: dist.get_rank(group)] if border is not None]
    before = earlier[-1] if earlier else torch.full_like(end, fill)
    return torch.cat([before, x], dim=1)[:, :-1]


def aligned(labels: Tensor, behavior: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Labels and log mu per token (or per sequence) of the rows here, shifted across the pieces."""
    labels = next_tokens(labels, IGNORE_INDEX, group)
    return labels, next_tokens(behavior, 0.0, group) if behavior.dim() == 2 else behavior


def total_of(group: Any) -> partial[Tensor] | None:
    """Sum over a group, in place; None for None."""
    return None if group is None else partial(_sum, group)


def _all_gather(x: Tensor, present: bool, group: Any) -> list[Tensor | None]:
    """[B, 1] of every process, None of one that has no column."""
    # One more row says whether the rest means anything; a row of x may be NaN.
    found = _gathered(torch.cat([x, x.new_full((1, 1), present)]), group)
    flags = found[:, -1, 0].tolist()
    return [f[:-1] if flag else None for f, flag in zip(found, flags, strict=True)]


def _gathered(x: Tensor, group: Any) -> Tensor:
    """[n, ...]: a tensor of every process."""
    import torch.distributed as dist

    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return torch.stack(found)


def _rank(group: Any) -> int:
    import torch.distributed as dist

    return int(dist.get_rank(group))


def _sum(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, group=group)
    return x


def _max(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
