"""The named choices of options, each list once; the presets of the limits are in ``limits.PRESETS``."""

from __future__ import annotations

#: Levels of the ratio in the kernels. The index is the number there, enum topr_ratio of csrc.
KERNEL_RATIOS = ("sequence", "geometric", "token")

#: Levels per segment -> the level that each segment has in the place of its sequence.
SEGMENT_RATIOS = {"segment": "sequence", "segment_geometric": "geometric"}

#: Levels of the ratio.
RATIOS = (*KERNEL_RATIOS, *SEGMENT_RATIOS)

#: Those that the log mu of whole sequences suffices for; the others need it per token.
SUMMED_RATIOS = RATIOS[:2]

#: Reductions that divide by a count. Trainers offer these: they normalise over the accumulated batch.
MEAN_REDUCTIONS = ("sequence_mean", "token_mean")

#: Reductions of the loss. The index is the number in the kernels, enum topr_reduction of csrc.
REDUCTIONS = (*MEAN_REDUCTIONS, "sum")

#: Where the Trainer takes log mu from: the records, or the model as it is before training.
BEHAVIORS = ("recorded", "initial")

#: How records are cut that are longer than the model's positions.
TRUNCATIONS = ("prompt_left",)

#: How a share of positives is made: leave samples out, or subtract a baseline from the rewards.
BALANCES = ("subsample", "baseline")
