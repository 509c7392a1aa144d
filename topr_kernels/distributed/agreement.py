"""What the processes of a call must agree on, compared before any work."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from topr_kernels.distributed.collectives import gathered, over, rank_in, sum_
from topr_kernels.linear.tile import Shard

T = TypeVar("T")
#: What ``torch.distributed.new_group`` returns on processes that are not members.
NON_MEMBER = -100
#: Forms that log mu may have by its shape; packed, with as many tokens as sequences, it may be either.
PER_SEQUENCE, PER_TOKEN = 1, 2


class Groups(NamedTuple):
    """The process groups of a call."""

    process_group: Any  # over which the vocabulary is spread, or None
    sequence_group: Any  # over which the sequences are spread, or None


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


class Announcement(NamedTuple):
    """What a process tells the others of its groups before any work.

    Attributes:
        columns: of the vocabulary that are here.
        vocabulary: what the processes that share a vocabulary must agree on.
        pieces: what the processes that share the sequences must agree on.
        behavior: PER_SEQUENCE, PER_TOKEN or both.
    """

    columns: int
    vocabulary: Facts
    pieces: Facts
    behavior: int = PER_TOKEN


class Agreement(NamedTuple):
    """What the processes of a call have agreed on."""

    shard: Shard | None  # the part of the vocabulary that is here; None for the whole
    per_token: bool  # whether a log mu that could be either is per token


class Call(Protocol[T]):
    """The arguments of a call, to be checked."""

    def check(self) -> T:
        """Checks all but values, and returns the arguments; raises TypeError or ValueError."""

    def announcement(self, checked: T) -> Announcement:
        """What the other processes are told of them."""

    def check_values(self, checked: T, vocab: int | None) -> None:
        """Checks values against the size of the whole vocabulary, None for that which is here."""


def agree(groups: Groups, device: torch.device, call: Call[T]) -> tuple[T, Agreement]:
    """Checks the arguments of a call, and raises on all of its processes if one of them must.

    One all-gather of 40 bytes per group, read on the host. A refusal is sent to every group of the call
    before it is raised, so that no process hangs in the next collective.

    Args:
        groups: of the call; one at least.
        device: of the tensors.
        call: the arguments.

    Returns:
        The checked arguments, and what the processes agreed on.

    Raises:
        TypeError: from ``call.check``.
        ValueError: from ``call.check`` and ``call.check_values``; if another process refused its
            arguments, or they differ in what they must share.
    """
    for name, group in groups._asdict().items():
        check_group(name, group)
    problem: Exception | None = None
    checked: T | None = None
    announcement: Announcement | None = None
    try:
        checked = call.check()
        announcement = call.announcement(checked)
    except (TypeError, ValueError) as error:
        problem = error
    shard = None
    if groups.process_group is not None:
        problem, shard = _vocabulary(groups.process_group, device, problem, announcement)
    if problem is None and checked is not None:
        try:
            call.check_values(checked, None if shard is None else shard.vocab)
        except ValueError as error:
            problem = error
    forms = PER_SEQUENCE | PER_TOKEN
    if groups.sequence_group is not None:
        problem, forms = _pieces(groups.sequence_group, device, problem, announcement)
    if problem is not None:
        raise problem
    assert checked is not None
    # Log mu that may be either on every process is taken per token.
    return checked, Agreement(shard, bool(forms & PER_TOKEN))


def _vocabulary(
    group: Any, device: torch.device, problem: Exception | None, announcement: Announcement | None
) -> tuple[Exception | None, Shard]:
    """What is wrong between the processes that share a vocabulary, and the shard that is here."""
    columns, facts = (0, None) if announcement is None else announcement[:2]
    problem, sizes, near = _compare("process_group", group, device, problem, facts, columns)
    if problem is None and not near:
        problem = _difference("process_group", ["behavior_log_prob"], {})
    start = sum(sizes[: rank_in(group)])
    return problem, Shard(start, max(sizes), sum(sizes), over(sum_, group))


def _pieces(
    group: Any, device: torch.device, problem: Exception | None, announcement: Announcement | None
) -> tuple[Exception | None, int]:
    """What is wrong between the processes that share sequences, and the forms log mu has on all."""
    facts, form = (None, 0) if announcement is None else announcement[2:]
    problem, each, near = _compare("sequence_group", group, device, problem, facts, form)
    forms = functools.reduce(operator.and_, each)
    if problem is None and forms == 0:
        problem = ValueError(
            "sequence_group: behavior_log_prob is per token on some of its processes and summed per "
            "sequence on others; pass one form on all (packed per token: [1, N])"
        )
    if problem is None and not near and forms == PER_SEQUENCE:
        problem = _difference("sequence_group", ["behavior_log_prob"], {})
    return problem, forms


def _compare(
    name: str,
    group: Any,
    device: torch.device,
    problem: Exception | None,
    facts: Facts | None,
    local: int,
) -> tuple[Exception | None, list[int], bool]:
    """-> (what to raise, every process's ``local``, whether log mu is the same but for rounding)."""
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
    # The one synchronisation: what follows is computed on the host.
    all_processes = gathered(own, group).cpu()
    told = all_processes.tolist()
    locals_ = [x[0] for x in told]
    refused = [rank for rank, x in enumerate(told) if x[1]]
    if problem is None and refused:
        problem = ValueError(
            f"{name}: process {refused[0]} of it refused its own arguments; see the error there"
        )
    if refused:
        return problem, locals_, True
    assert facts is not None
    names = [*facts.options, *facts.tensors]
    differ: list[str] = []
    if len({x[2] for x in told}) > 1:
        # All processes see this, and come here.
        each = gathered(digests, group).t().tolist()
        differ = [n for n, values in zip(names, each, strict=True) if len(set(values)) > 1]
    signed, size = all_processes[:, 3:].contiguous().view(torch.float64).unbind(1)
    near = bool((signed - signed[0]).abs().max() <= 1e-4 * size.max())
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
    """[number of facts] int64: equal for equal facts; others collide with negligible probability."""
    host = [_hash(repr(value)) for value in facts.options.values()]
    sums = []
    for x in facts.tensors.values():
        described = "" if x is None else f"{tuple(x.shape)} {x.dtype}"
        digest = torch.full((), _hash(described), device=device)
        if x is not None and x.numel():
            bits = x.detach().double().view(torch.int64) if x.is_floating_point() else x.long()
            odd = 2 * torch.arange(x.numel(), device=device) + 1
            digest = digest + (bits.flatten() * odd).sum()
        sums.append(digest)
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
