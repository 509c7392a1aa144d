"""Several processes against one: segments that cross a border, weights, missing log mu."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from levels import PATHS, VOCAB, a_trajectory, some_segments
from processes import case, launch
from test_own_taper import band
from test_parallel import BOTH, close, start
from torch import Tensor
from torch.nn.functional import pad

from topr_kernels import TOPROutput, linear_topr_loss, topr_loss
from topr_kernels.testing import LinearBatch

#: First columns of the pieces; one process may have none.
PIECES = {2: [0, 6, 13], 4: [0, 4, 4, 7, 13]}
PER_SEQUENCE = ("log_ratio", "weight", "objective", "reward", "length", "sequence_weight", "loss")


def level_options() -> list[dict[str, Any]]:
    """Options of the loss, of which entries per token are cut with the sequences."""
    segments = some_segments(a_trajectory())
    segments[1] = 0
    weight = torch.tensor([2.0, 0.5, 7.0, 0.0, 1.5], dtype=torch.float64)
    known = torch.tensor([False, True, True, True, True])
    return [
        {"ratio": "segment", "limits": BOTH, "segments": segments},
        {"ratio": "segment_geometric", "limits": BOTH, "reduction": "token_mean"},
        {"ratio": "segment", "limits": BOTH, "sequence_weight": weight},
        {"ratio": "sequence", "limits": band},
        {"ratio": "segment_geometric", "limits": band},
        {"ratio": "geometric", "sequence_weight": weight, "behavior_known": known},
        {"ratio": "segment_geometric", "segments": segments, "behavior_known": known},
    ]


def compare(found: tuple[TOPROutput, Tensor], expected: tuple[TOPROutput, Tensor]) -> None:
    for name in PER_SEQUENCE:
        close(getattr(found[0], name).detach(), getattr(expected[0], name).detach(), name)
    close(found[1], expected[1], "gradient")


def cut(batch: LinearBatch, options: dict[str, Any], columns: slice) -> Any:
    """A piece of a padded batch, and of the options."""
    x, weight, labels, mu, reward = batch
    here = LinearBatch(x[:, columns], weight, labels[:, columns], mu[:, columns], reward)
    if "segments" in options:
        options = {**options, "segments": options["segments"][:, columns]}
    return here, options


def cut_packed(batch: LinearBatch, options: dict[str, Any], rank: int, world: int) -> Any:
    """A piece of the packed batch, of which every sequence is cut elsewhere; and the parts."""
    x, weight, labels, mu, reward = batch
    labels, mu = pad(labels[:, 1:], (0, 1), value=-100), pad(mu[:, 1:], (0, 1))
    b, t = labels.shape
    edges = [[0, *sorted((3 * s + 5 * i) % t for i in range(1, world)), t] for s in range(b)]
    parts = [slice(e[rank], e[rank + 1]) for e in edges]
    options = {**options, "shift": False}
    if "segments" in options:
        segments = pad(options["segments"][:, 1:], (0, 1))
        options["segments"] = torch.cat([segments[s, p] for s, p in enumerate(parts)])
    lengths = [p.stop - p.start for p in parts]
    options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x, labels, mu = (torch.cat([y[s, p] for s, p in enumerate(parts)]) for y in (x, labels, mu))
    return LinearBatch(x, weight, labels, mu, reward), options, parts


def pieces_worker() -> None:
    rank, world = start()
    edges = PIECES[world]
    columns = slice(edges[rank], edges[rank + 1])
    whole = a_trajectory()
    for (number, options), (path, call) in itertools.product(
        enumerate(level_options()), PATHS.items()
    ):
        out, d = call(whole, **options)
        assert d.abs().max() > 1e-3
        group = {"sequence_group": dist.group.WORLD}
        if path != "log_prob":  # whose labels are not shifted
            here, kept = cut(whole, options, columns)
            found = call(here, **kept, **group)
            with case(f"{path} {number} in pieces"):
                compare(found, (out, d[:, columns]))
        if path == "head":
            here, kept, parts = cut_packed(whole, options, rank, world)
            found = call(here, **kept, **group)
            small = call(here, **kept, **group, workspace_bytes=16 * VOCAB * 8)
            expected = torch.cat([d[s, p] for s, p in enumerate(parts)])
            with case(f"{path} {number} in packed pieces"):
                compare(found, (out, expected))
                compare(small, (out, expected))


def shards_worker() -> None:
    rank, _ = start()
    batch, group = a_trajectory(), {"process_group": dist.group.WORLD}
    rows = slice(0, 5) if rank == 0 else slice(5, VOCAB)
    for number, options in enumerate(level_options()):
        expected = PATHS["head"](batch, **options)
        found = PATHS["head"](batch._replace(weight=batch.weight[rows]), **options, **group)
        logits = (batch.hidden @ batch.weight.T)[..., rows].requires_grad_()
        out = topr_loss(logits, *batch[2:], **options, **group)
        (d_logits,) = torch.autograd.grad(out.loss, logits)
        d_hidden = d_logits @ batch.weight[rows]
        dist.all_reduce(d_hidden)
        with case(f"shards {number}"):
            compare(found, expected)
            compare((out, d_hidden), expected)
    for wrong, what in (
        ({"ratio": ("segment", "sequence")[rank]}, "ratio per segment"),
        ({"limits": (band, BOTH)[rank]}, "limits"),
        ({"sequence_weight": torch.full((5,), 1.0 + rank)}, "sequence_weight"),
        ({"ratio": "segment", "segments": some_segments(batch, rank)}, "segments"),
    ):
        with case(what), pytest.raises(ValueError, match=f"differ in {what}"):
            head = batch._replace(weight=batch.weight[rows])
            linear_topr_loss(*head, **wrong, **group)


@pytest.mark.parametrize("world", [2, 4])
def test_sequences_in_pieces(world: int) -> None:
    launch(world, "test_parallel_levels.pieces_worker")


def test_a_vocabulary_in_shards() -> None:
    launch(2, "test_parallel_levels.shards_worker")
