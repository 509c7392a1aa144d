"""The operators of the fused-linear path over the tile kernels of an implementation."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from topr_kernels.layout import to_rows
from topr_kernels.linear.gradient import GradedRows, Gradient
from topr_kernels.linear.head import HeadProducts
from topr_kernels.linear.plan import ScoredRows, Tile, plan_tiles, scored_rows
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.linear.workspace import Workspace
from topr_kernels.ops import linear as ops
from topr_kernels.ops.options import HeadWeights, Objective, Tokens, Transforms, Units, Wanted
from topr_kernels.sequence import (
    SequenceStage,
    effective_reward,
    loss_denominator,
    sequence_stage,
    signed_weight,
)


def linear_kernels(tile: TileKernels) -> ops.Kernels:
    """The operators over some tile kernels."""
    return ops.Kernels(
        partial(_log_prob_fwd, tile), partial(_log_prob_bwd, tile), partial(_topr_fwd, tile)
    )


class _TokenResults:
    """Label-aligned results, [O, T], 0 where nothing is scored."""

    def __init__(self, labels: Tensor, dtype: torch.dtype) -> None:
        self.log_prob = labels.new_zeros(labels.shape, dtype=dtype)
        self.lse, self.entropy = torch.zeros_like(self.log_prob), torch.zeros_like(self.log_prob)

    def put(self, position: Tensor, stats: RowStats) -> None:
        self.log_prob.view(-1)[position] = stats.log_prob
        self.lse.view(-1)[position] = stats.lse
        self.entropy.view(-1)[position] = stats.entropy

    def finished_entropy(self, wanted: bool) -> Tensor:
        return self.entropy if wanted else torch.full_like(self.entropy, torch.nan)


def _log_prob_fwd(
    kernels: TileKernels,
    hidden: Tensor,
    weights: HeadWeights,
    tokens: Tokens,
    transforms: Transforms,
    entropy: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows, _ = scored_rows(tokens)
        head = HeadProducts(weights)
        space = Workspace(kernels, head, hidden, transforms, len(rows.row), workspace_bytes)
        out = _TokenResults(tokens.labels, head.arithmetic)
        for start in range(0, len(rows.row), space.capacity):
            part = slice(start, start + space.capacity)
            *_, stats = space.forward(rows.row[part], rows.label[part], entropy, False)
            out.put(rows.position[part], stats)
        return out.log_prob, out.lse, out.finished_entropy(entropy)


def _log_prob_bwd(
    kernels: TileKernels,
    hidden: Tensor,
    weights: HeadWeights,
    tokens: Tokens,
    d_log_prob: Tensor,
    transforms: Transforms,
    workspace_bytes: int,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows, _ = scored_rows(tokens)
        head = HeadProducts(weights)
        c = d_log_prob.reshape(-1)[rows.position].to(head.arithmetic)
        gradient = Gradient(kernels, head, hidden, transforms, wanted, scaled=True)
        # Rows without an upstream gradient are not multiplied again.
        live = (c != 0).nonzero().squeeze(-1)
        space = Workspace(kernels, head, hidden, transforms, len(live), workspace_bytes)
        for index in torch.split(live, space.capacity) if len(live) else ():
            row, label = rows.row[index], rows.label[index]
            h, z, stats = space.forward(row, label, False, True)
            gradient.add(GradedRows(z, label, stats, row, h, c[index]))
        gradient.finish()
        like = weights.weight if weights.bias is None else weights.bias
        return (
            gradient.d_hidden.view(hidden.shape if wanted.hidden else 0),
            gradient.d_weight.to(weights.weight.dtype),
            gradient.d_bias.to(like.dtype),
        )


def _topr_fwd(
    kernels: TileKernels,
    hidden: Tensor,
    weights: HeadWeights,
    tokens: Tokens,
    objective: Objective,
    transforms: Transforms,
    entropy: bool,
    workspace_bytes: int,
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        # Per sequence, or per unit where units have the ratios; tiles are planned by these.
        rows, (lengths, branches) = scored_rows(tokens, _branches(objective), units=objective.units)
        if objective.units is not None and kernels.sum_pieces is None:
            # Units are padded with empty ones.
            while lengths and not lengths[-1]:
                lengths.pop()
        if kernels.sum_pieces is not None:
            # Of the whole sequences; ``lengths`` are those of the pieces here.
            counts = torch.cat([rows.length, (~rows.sound).to(torch.int64)[None]])
            counts = kernels.sum_pieces(counts)
            rows = rows._replace(length=counts[:-1], sound=counts[-1] == 0)
        head = HeadProducts(weights)
        work = _Work(
            rows,
            objective,
            Workspace(kernels, head, hidden, transforms, len(rows.row), workspace_bytes),
            Gradient(kernels, head, hidden, transforms, wanted, scaled=False),
            _TokenResults(tokens.labels, head.arithmetic),
            entropy,
        )
        branches = branches[: len(lengths)]
        graded = [wanted.anything() and branch != 0 for branch in branches]
        whole = [not _known_in_advance(objective, branch) for branch in branches]
        unneeded = work.score_first(lengths, graded, whole)
        order, tiles = plan_tiles(lengths, graded, whole, work.space.capacity, unneeded)
        order = order.to(hidden.device)
        for tile in tiles:
            work.run_tile(order[tile.start : tile.start + tile.size], tile)
        return work.results(hidden, tokens.shift, wanted)


def _branches(objective: Objective) -> Tensor:
    """[B]: 0 without a gradient, -1 on the negative branch, 1 on the positive one (NaN too)."""
    reward = effective_reward(objective)
    amount = reward
    if objective.sequence_weight is not None:
        amount = signed_weight(objective, torch.float64)
    return torch.where(amount == 0, 0, torch.where(reward < 0, -1, 1))


def _known_in_advance(objective: Objective, branch: int) -> bool:
    """Whether a row's coefficient does not depend on its sequence's log-ratio."""
    if objective.taper is not None:
        return objective.ratio == "token"
    low, high = objective.log_limits[2:] if branch < 0 else objective.log_limits[:2]
    return objective.ratio == "token" or low == high


class _Work:
    """One call of ``linear_topr_fwd``: forward passes, coefficients of rows, gradients."""

    def __init__(
        self,
        rows: ScoredRows,
        objective: Objective,
        space: Workspace,
        gradient: Gradient,
        out: _TokenResults,
        entropy: bool,
    ) -> None:
        self.rows, self.objective, self.space = rows, objective, space
        self.gradient, self.out, self.entropy = gradient, out, entropy
        self.sum_pieces = space.kernels.sum_pieces
        self.denominator = loss_denominator(rows.length, rows.sound, objective)
        #: Coefficients of the rows that were scored first, and which rows they are.
        self.early_c = torch.zeros_like(rows.label, dtype=out.log_prob.dtype)
        self.is_early = torch.zeros_like(rows.label, dtype=torch.bool)

    def forward(self, index: Tensor, gradient: bool) -> tuple[Tensor, Tensor, RowStats]:
        """The forward of some rows, at most a tile of them."""
        rows = self.rows
        h, z, stats = self.space.forward(rows.row[index], rows.label[index], self.entropy, gradient)
        self.out.put(rows.position[index], stats)
        return h, z, stats

    def score(self, index: Tensor) -> None:
        """The forward of any number of rows, for their log-probs alone."""
        for part in torch.split(index, self.space.capacity) if len(index) else ():
            self.forward(part, False)

    def score_first(self, lengths: list[int], graded: list[bool], whole: list[bool]) -> set[int]:
        """Scores the sequences that must be whole before their weight is known and fit no tile.

        Args:
            lengths: rows per sequence.
            graded: whether a sequence takes part in the backward.
            whole: whether it must lie in one tile; False afterwards where it was scored here.

        Returns:
            Sequences of weight 0, which need no tile any more.
        """
        first = [0, *itertools.accumulate(lengths)]
        device = self.rows.row.device
        waiting = [s for s in range(len(lengths)) if graded[s] and whole[s]]
        if self.sum_pieces is not None:
            # In pieces: no tile holds a whole sequence. All processes of the group come here together.
            if waiting:
                parts = [torch.arange(first[s], first[s] + lengths[s]) for s in waiting]
                index = torch.cat(parts).to(device)
                self.score(index)
                stage = self.stage()
                d_log_prob = stage.d_log_prob.view(-1)[self.rows.position[index]]
                self._keep_early(index, d_log_prob / stage.denominator)
                whole[:] = [False] * len(whole)
            return set()
        weightless = set()
        for s in waiting:
            if lengths[s] > self.space.capacity:
                index = torch.arange(first[s], first[s] + lengths[s], device=device)
                self.score(index)
                c = self.coefficients(index, [(s, lengths[s])])
                self._keep_early(index, c)
                whole[s] = False
                if not bool((c != 0).any()):
                    weightless.add(s)
        return weightless

    def _keep_early(self, index: Tensor, c: Tensor) -> None:
        self.early_c[index], self.is_early[index] = c, True

    def coefficients(self, index: Tensor, parts: list[tuple[int, int]]) -> Tensor:
        """Gradient of the loss by the log-probs of some rows, which are known by now; [n].

        Args:
            index: [n] which rows.
            parts: as those of ``Tile``; a sequence whose weight depends on its ratio is whole.
        """
        rows, mu, device = self.rows, self.objective.behavior_log_prob, index.device
        sequence = torch.tensor([s for s, _ in parts]).to(device)
        offsets = torch.tensor([0, *(n for _, n in parts)]).cumsum(0).to(device)
        units = self.objective.units
        if units is not None:
            sequence = units.owner[sequence]
            units = Units(offsets, torch.arange(len(parts), device=device))
        position = rows.position[index]
        log_prob = self.out.log_prob.view(-1)[position].unsqueeze(0)
        mu = mu.reshape(-1)[position].unsqueeze(0) if mu.dim() == 2 else mu[sequence]
        stage = sequence_stage(
            log_prob,
            torch.ones_like(log_prob, dtype=torch.bool),
            offsets,
            rows.sound,
            self.objective.of_sequences(sequence, mu, units),
            length=rows.length[sequence],
        )
        return stage.d_log_prob[0] / self.denominator.to(log_prob.dtype)

    def stage(self) -> SequenceStage:
        """The sequence stage of the whole batch."""
        rows = self.rows
        token = self.out.log_prob, rows.scored, rows.offsets, rows.sound
        return sequence_stage(*token, self.objective, rows.length, self.sum_pieces)

    def run_tile(self, index: Tensor, tile: Tile) -> None:
        """Forward and backward of one tile, whose rows ``index`` lists."""
        h, z, stats = self.forward(index, tile.graded_size > 0)
        if not tile.graded_size:
            return
        index = index[: tile.graded_size]
        c = self.coefficients(index, tile.parts)
        c = torch.where(self.is_early[index], self.early_c[index], c)
        live = (c != 0).nonzero().squeeze(-1)
        if not len(live):
            return
        live = _compact_(z, live) if len(live) < tile.graded_size else live
        kept = RowStats(*(x[live] for x in stats))
        row, label = self.rows.row[index][live], self.rows.label[index][live]
        self.gradient.add(GradedRows(z[: len(live)], label, kept, row, h[live], c[live]))

    def results(self, hidden: Tensor, shift: bool, wanted: Wanted) -> tuple[Tensor, ...]:
        """What the operator returns."""
        gradient, out = self.gradient, self.out
        gradient.finish()
        stage = self.stage()
        coefficient = to_rows(stage.d_log_prob, shift, 0.0) / stage.denominator
        coefficient = coefficient * gradient.row_scale.view(coefficient.shape)
        # Sequences of reward 0 leave the backward, so a NaN in one would be in no row of d_weight.
        sound = torch.where(self.rows.sound & ~stage.d_log_prob.isnan().any(), 1.0, torch.nan)
        return (
            stage.loss,
            sound.to(stage.loss.dtype),
            out.log_prob,
            out.lse,
            out.finished_entropy(self.entropy),
            *stage[2:8],
            *(x.to(stage.loss.dtype) for x in gradient.report()),
            coefficient,
            gradient.d_hidden.view(hidden.shape if wanted.hidden else 0),
            gradient.d_weight,
            gradient.d_bias,
        )


def _compact_(z: Tensor, live: Tensor) -> Tensor:
    """Moves the live rows of a tile to its front; -> [L] which row is where now.

    Args:
        z: [n, V].
        live: [L] int64, increasing.
    """
    where = torch.arange(len(live), device=z.device)
    vacant = torch.ones_like(where, dtype=torch.bool)
    vacant[live[live < len(live)]] = False
    target, source = where[vacant], live[live >= len(live)]
    # A few rows at a time: the copy must not need another tile.
    for t, s in zip(torch.split(target, 8), torch.split(source, 8), strict=True):
        z[t] = z[s]
    return where.index_copy(0, target, source)
