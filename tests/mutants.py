"""Breaks the code on purpose, one fault at a time, and tells which tests notice.

Each fault of ``MUTANTS`` is put into a copy of the tracked files (and of the native library, as it was
built), where the tests named beside it run until the first that fails. The tests that failed must pass
in the copy as it was, else they say nothing. Usage: python tests/mutants.py [--only NAME ...] [--list]

Faults of ``csrc`` would each need a build: ``make sanitize`` holds those kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
#: Ignored by git, but a part of what is tested.
BUILT = ("topr_kernels/_native.so", "topr_kernels/_native_missing.txt")
#: Imported once, before the copies of this process that run the tests. None of them starts threads.
SLOW_IMPORTS = ("torch", "triton", "hypothesis", "transformers", "accelerate")
LIMIT = 300


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: what ``--only`` takes.
        file: where it is.
        old: text that occurs once in the file.
        new: what takes its place.
        tests: files, or tests, of which one must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LOSS = [
    Mutant(
        "taper-without-excess",
        "topr_kernels/taper.py",
        "torch.where(weight == 0, 0.0, weight * (1 + excess))",
        "torch.where(weight == 0, 0.0, weight)",
        ("tests/core/test_taper.py",),
    ),
    Mutant(
        "limits-of-the-other-sign",
        "topr_kernels/sequence.py",
        "pos_min, pos_max, neg_min, neg_max = objective.log_limits",
        "neg_min, neg_max, pos_min, pos_max = objective.log_limits",
        ("tests/core/test_loss.py",),
    ),
    Mutant(
        "zero-reward-loses-nan",
        "topr_kernels/sequence.py",
        "silent = ~counted | ((amount == 0) & ~tapered.isnan())",
        "silent = ~counted | (amount == 0)",
        (
            "tests/core/test_linear.py::test_a_nan_of_a_sequence_with_reward_0_reaches_every_gradient",
        ),
    ),
    Mutant(
        "empty-sequences-counted",
        "topr_kernels/sequence.py",
        "units = length > 0 if",
        "units = torch.ones_like(length) if",
        ("tests/core/test_loss.py",),
    ),
    Mutant(
        "ratio-in-fp32",
        "topr_kernels/sequence.py",
        "difference = log_prob.double() - behavior_log_prob.double()",
        "difference = (log_prob - behavior_log_prob.to(log_prob.dtype)).double()",
        ("tests/core/test_from_log_prob.py::test_the_ratio_keeps_the_digits_of_mu",),
    ),
    Mutant(
        "baseline-in-fp32",
        "topr_kernels/sequence.py",
        "return reward - baseline  #",
        "return reward.double() - baseline  #",
        ("tests/core/test_loss.py::test_a_reward_equal_to_the_baseline_is_zero",),
    ),
    Mutant(
        "weight-of-a-sequence-not-in-the-gradient",
        "topr_kernels/sequence.py",
        "share = -amount / tokens if",
        "share = -reward / tokens if",
        ("tests/core/test_sequence_weight.py",),
    ),
    Mutant(
        "negative-weight-of-a-sequence",
        "topr_kernels/sequence.py",
        "sound = (weight >= 0) & (weight < torch.inf)",
        "sound = ~weight.isnan()",
        ("tests/core/test_sequence_weight.py::test_poisons_where_values_cannot_be_read",),
    ),
    Mutant(
        "missing-mu-read",
        "topr_kernels/validation.py",
        "behavior = torch.where(kept, behavior, fill.to(behavior.dtype))",
        "behavior = torch.where(kept, behavior, behavior + 0 * fill.to(behavior.dtype))",
        ("tests/core/test_behavior_known.py",),
    ),
    Mutant(
        "segments-not-told-apart",
        "topr_kernels/segments.py",
        "same = (value[1:] == value[:-1]) & (sequence",
        "same = (sequence",
        ("tests/core/test_segments.py::test_equals_the_reference",),
    ),
    Mutant(
        "segments-across-sequences",
        "topr_kernels/segments.py",
        "& (sequence[1:] == sequence[:-1])",
        "",
        ("tests/core/test_segments.py::test_a_segment_ends_with_its_sequence",),
    ),
    Mutant(
        "segments-end-at-a-border",
        "topr_kernels/distributed/pieces.py",
        "joined.append(present * first_scored * open_ * (first == value))",
        "joined.append(torch.zeros_like(present))",
        ("tests/core/test_parallel_levels.py::test_sequences_in_pieces",),
    ),
    Mutant(
        "a-segment-in-two-tiles",
        "topr_kernels/linear/plan.py",
        "counts = [of_unit, *(x[units.owner] for x in counts[1:])]",
        "counts = [length, *counts[1:]]",
        ("tests/core/test_segments.py::test_a_weight_of_the_sequence_and_tiles_smaller_than_it",),
    ),
    Mutant(
        "taper-of-its-own-loses-nan",
        "topr_kernels/taper.py",
        "torch.where(unknown, log_ratio, x.to(log_ratio.dtype))",
        "x.to(log_ratio.dtype)",
        ("tests/core/test_own_taper.py::test_a_nan_ratio_is_no_finite_weight",),
    ),
    Mutant(
        "taper-of-the-other-sign",
        "topr_kernels/sequence.py",
        "taper_by(objective.taper, log_ratio, ~negative)",
        "taper_by(objective.taper, log_ratio, negative)",
        ("tests/core/test_own_taper.py::test_equals_the_method_in_plain_torch",),
    ),
    Mutant(
        "taper-forgotten-before-its-graph",
        "topr_kernels/ops/linear.py",
        "ctx.lent = None if inputs[14] is None else _LENT[inputs[14]]",
        "pass",
        ("tests/core/test_own_taper.py::test_it_lives_as_long_as_the_graph",),
    ),
    Mutant(
        "first-label-of-a-pack-scored",
        "topr_kernels/layout.py",
        "cu_seqlens.to(position.dtype)[:-1])",
        "cu_seqlens.to(position.dtype)[1:-1])",
        ("tests/core/test_loss.py::test_the_first_label_of_every_sequence_has_no_row",),
    ),
    Mutant(
        "border-token-to-the-sequence-before",
        "topr_kernels/layout.py",
        "position, right=True)",
        "position, right=False)",
        ("tests/core/test_loss.py::test_aligned_rows_of_a_pack_belong_to_their_own_sequence",),
    ),
    Mutant(
        "equation-7-with-the-other-sign",
        "topr_kernels/baseline.py",
        "mass = 1 + (1 - 2 * p) * c",
        "mass = 1 - (1 - 2 * p) * c",
        ("tests/core/test_metrics.py",),
    ),
    Mutant(
        "label-of-the-vocabularys-size",
        "topr_kernels/validation.py",
        "if low < 0 or high >= vocab:",
        "if low < 0 or high > vocab:",
        ("tests/core/test_validation.py",),
    ),
    Mutant(
        "kl-of-the-other-direction",
        "topr_kernels/output.py",
        "(torch.expm1(d) - d).sum()",
        "(torch.expm1(-d) + d).sum()",
        ("tests/core/test_metrics.py",),
    ),
]

OPS = [
    Mutant(
        "results-that-claim-a-gradient",
        "topr_kernels/ops/logits.py",
        "ctx.mark_non_differentiable(*output[1:])",
        "ctx.mark_non_differentiable(*output[3:])",
        ("tests/core/test_autograd.py::test_only_loss_and_log_prob_are_differentiable",),
    ),
    Mutant(
        "fake-gradient-of-another-dtype",
        "topr_kernels/ops/logits.py",
        "return logits.new_empty(logits.shape)",
        "return logits.new_empty(logits.shape, dtype=accumulate_dtype(logits.dtype))",
        ("tests/core/test_autograd.py::test_opcheck_backward",),
    ),
    Mutant(
        "constants-not-copied",
        "topr_kernels/ops/linear.py",
        "tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs[3:])",
        "tuple(inputs[3:])",
        ("tests/core/test_linear.py::test_buffers_of_inference_mode_and_refilled_ones",),
    ),
    Mutant(
        "gradient-handed-over-twice",
        "topr_kernels/ops/linear.py",
        "    elif not compiling:\n        ctx.gradients = None\n",
        "",
        ("tests/core/test_linear.py::test_a_retained_graph_gives_the_same_gradient_again",),
    ),
    Mutant(
        "labels-of-inference-mode-saved",
        "topr_kernels/ops/__init__.py",
        "return x.clone() if x is not None and x.is_inference() else x",
        "return x",
        ("tests/core/test_loss.py::test_constants_may_come_from_inference_mode",),
    ),
]

KERNELS = [
    Mutant(
        "zero-times-infinite-scale",
        "topr_kernels/kernels/portable.py",
        "torch.where((d_log_prob == 0) & ~scale.isnan(), 0.0, d_log_prob * scale)",
        "d_log_prob * scale",
        (
            "tests/core/test_autograd.py::test_a_reward_of_0_has_no_gradient_under_an_infinite_scale",
        ),
    ),
    Mutant(
        "slope-without-temperature",
        "topr_kernels/rows.py",
        "return 1 - (z * (transforms.temperature / transforms.softcap)).square_()",
        "return 1 - (z / transforms.softcap).square_()",
        ("tests/core/test_autograd.py::test_gradcheck",),
    ),
    Mutant(
        "tile-without-temperature",
        "topr_kernels/kernels/portable_linear.py",
        "factor * (transforms.logit_scale / transforms.temperature)",
        "factor * transforms.logit_scale",
        ("tests/core/test_linear.py::test_fp64_equals_the_reference",),
    ),
    Mutant(
        "padding-in-the-softmax",
        "topr_kernels/kernels/triton_rows.py",
        "        u = tl.where(m_v, u, -INFINITY)\n",
        "",
        ("tests/core/test_triton_linear.py::test_every_vocabulary_within_the_budget",),
    ),
    Mutant(
        "slopes-not-rescaled",
        "topr_kernels/kernels/triton_rows.py",
        "g = tl.fma(g, rescale, _sum(p * slope))",
        "g = g + _sum(p * slope)",
        ("tests/core/test_triton_linear.py::test_every_vocabulary_within_the_budget",),
    ),
    Mutant(
        "offset-takes-the-digits",
        "topr_kernels/kernels/triton_rows.py",
        "log_prob = tl.fma(u - m, hi, tl.fma(u - m, lo, -log_s))",
        "log_prob = u * hi - (m * hi + log_s)",
        ("tests/core/test_triton_linear.py::test_a_large_common_offset_costs_nothing",),
    ),
    Mutant(
        "prompt-in-the-length",
        "topr_kernels/kernels/triton_sequences.py",
        "share = share / tokens",
        "share = share / tl.maximum(end - start, 1).to(tl.float32)",
        ("tests/core/test_triton.py",),
    ),
    Mutant(
        "mean-over-tokens-not-divided",
        "topr_kernels/kernels/triton_sequences.py",
        "weight = tl.sum(weights, axis=0) / tokens",
        "weight = tl.sum(weights, axis=0)",
        ("tests/core/test_triton.py",),
    ),
    Mutant(
        "triton-taper-without-excess",
        "topr_kernels/kernels/triton_taper.py",
        "weight * (1.0 + excess)",
        "weight * (1.0 - excess)",
        ("tests/core/test_triton.py::test_golden_table",),
    ),
    Mutant(
        "sums-of-columns-that-are-not-there",
        "topr_kernels/kernels/triton_linear.py",
        "b_sum += tl.where(m_a[None, :], j, 0.0)",
        "b_sum += j",
        ("tests/core/test_triton_linear.py::test_parts_of_the_columns_with_and_without_labels",),
    ),
    Mutant(
        "gradient-without-temperature",
        "topr_kernels/kernels/triton_linear.py",
        "slope_factor = logit_scale / temperature",
        "slope_factor = logit_scale",
        ("tests/core/test_triton_linear.py::test_every_vocabulary_within_the_budget",),
    ),
    Mutant(
        "no-fence",
        "topr_kernels/kernels/triton_logits.py",
        'sem="acq_rel"',
        'sem="relaxed"',
        ("tests/core/test_triton_aot.py::test_sm_90",),
    ),
    Mutant(
        "no-wide-loads",
        "topr_kernels/kernels/triton_linear.py",
        "        p_z = tl.multiple_of(p_z, 16)\n",
        "        p_z = p_z + 0\n",
        ("tests/core/test_triton_aot.py::test_sm_90",),
    ),
    Mutant(
        "the-row-after-the-last",
        "topr_kernels/kernels/triton_gradient.py",
        "            position = row + 1\n            c = tl.load(p_d_log_prob + position)\n",
        "            c = tl.load(p_d_log_prob + row + 1)\n        position = row + 1\n",
        ("tests/core/test_triton_bounds.py::test_backward",),
    ),
    Mutant(
        "fused-with-the-maximum",
        "topr_kernels/kernels/triton_rows.py",
        'NO_FUSION = {"enable_fp_fusion": False}',
        'NO_FUSION = {"enable_fp_fusion": True}',
        ("tests/core/test_triton_aot.py::test_sm_90",),
    ),
    Mutant(
        "a-compilation-per-batch-size",
        "topr_kernels/kernels/triton_rows.py",
        "(do_not_specialize=names, do_not_specialize_on_alignment=names)",
        "(do_not_specialize_on_alignment=names)",
        ("tests/core/test_triton_aot.py::test_no_length_or_batch_size_needs_another_compilation",),
    ),
    Mutant(
        "strided-saved-tensors",
        "topr_kernels/kernels/native.py",
        "x.to(dtype).contiguous() for k, x in dense.items()",
        "x.to(dtype) for k, x in dense.items()",
        ("tests/core/test_native.py::test_saved_tensors_may_come_back_in_another_layout",),
    ),
    Mutant(
        "library-of-longer-params",
        "topr_kernels/kernels/native_library.py",
        "if size != ctypes.sizeof(Params):",
        "if size < ctypes.sizeof(Params):",
        ("tests/core/test_native.py::test_library_of_another_version_is_refused",),
    ),
    Mutant(
        "a-failed-build-is-no-news",
        "topr_kernels/kernels/__init__.py",
        "if not native.PATH.exists() and not native.REASON.exists():",
        "if not native.PATH.exists():",
        ("tests/core/test_native.py::test_missing_library",),
    ),
]

LINEAR = [
    Mutant(
        "positives-known-in-advance",
        "topr_kernels/linear/operators.py",
        'return objective.ratio == "token" or low == high',
        'return objective.ratio == "token" or low == high or branch > 0',
        ("tests/core/test_linear.py",),
    ),
    Mutant(
        "length-of-the-rows-in-the-tile",
        "topr_kernels/linear/operators.py",
        "            length=rows.length[sequence],\n",
        "",
        ("tests/core/test_linear.py",),
    ),
    Mutant(
        "a-bin-too-many-left-out",
        "topr_kernels/linear/active.py",
        "kept |= bins >= fits.sum()",
        "kept |= bins > fits.sum()",
        ("tests/core/test_linear_tolerance.py",),
    ),
    Mutant(
        "left-out-in-another-unit",
        "topr_kernels/linear/gradient.py",
        "self.left += left * top.double().square()",
        "self.left += left * top.double()",
        ("tests/core/test_linear_tolerance.py",),
    ),
    Mutant(
        "product-not-added",
        "topr_kernels/linear/matmul.py",
        "target.add_(product)",
        "target.copy_(product)",
        ("tests/core/test_matmul.py",),
    ),
    Mutant(
        "tolerance-of-the-shard-alone",
        "topr_kernels/linear/active.py",
        "    if shard is not None:\n        shard.sum_(histogram)\n",
        "",
        (
            "tests/core/test_parallel.py::test_a_tolerance_holds_for_the_whole_vocabulary",
            "tests/core/test_parallel.py::test_what_is_sent_is_what_the_docs_say",
        ),
    ),
    Mutant(
        "length-of-the-piece",
        "topr_kernels/linear/operators.py",
        "rows = rows._replace(length=counts[:-1], sound=counts[-1] == 0)",
        "rows = rows._replace(sound=counts[-1] == 0)",
        ("tests/core/test_parallel.py::test_sequences_in_pieces_give_what_whole_ones_give",),
    ),
    Mutant(
        "weights-of-the-piece",
        "topr_kernels/sequence.py",
        "            sum_pieces(sums)\n",
        "            pass\n",
        ("tests/core/test_parallel.py::test_sequences_in_pieces_give_what_whole_ones_give",),
    ),
    Mutant(
        "gradient-moves-the-wrong-way",
        "topr_kernels/distributed/pieces.py",
        "return next_tokens(d.contiguous(), 0.0, ctx.group), None, None",
        "return previous_tokens(d.contiguous(), 0.0, ctx.group), None, None",
        ("tests/core/test_parallel.py::test_log_probs_of_sequences_in_pieces",),
    ),
    Mutant(
        "sharded-gradient-without-temperature",
        "topr_kernels/distributed/shards.py",
        "j * (c / transforms.temperature)",
        "j * c",
        ("tests/core/test_parallel.py::test_logits_in_shards_and_pieces",),
    ),
    Mutant(
        "rows-of-a-shard-sum-to-zero",
        "topr_kernels/distributed/shards.py",
        "        j_sum = z.sum(-1)\n",
        "",
        ("tests/core/test_parallel.py::test_a_tolerance_holds_for_the_whole_vocabulary",),
    ),
]

HF = [
    Mutant(
        "a-column-too-few",
        "topr_kernels/hf/collator.py",
        "max(kept, default=0) + 1",
        "max(kept, default=1)",
        ("tests/hf/test_trainer.py::test_kept_logits_equal_those_of_each_sequence_alone",),
    ),
    Mutant(
        "one-eos-of-several",
        "topr_kernels/hf/collator.py",
        "ends = set(ids) if isinstance(ids, Sequence) else {ids}",
        "ends = {ids[0]} if isinstance(ids, Sequence) else {ids}",
        ("tests/hf/test_packing.py::test_truncated_completions_are_not_counted",),
    ),
    Mutant(
        "all-modules-trained-again",
        "topr_kernels/hf/packing.py",
        "            module.training = training\n",
        "            module.training = modes[0][1]\n",
        (
            "tests/hf/test_packing.py::test_the_check_leaves_no_trace",
            "tests/hf/test_trainer_data.py::test_scoring_runs_in_eval_mode_and_leaves_the_mode_as_it_was",
        ),
    ),
    Mutant(
        "nan-is-agreement",
        "topr_kernels/hf/packing.py",
        "if not difference <= allowed:",
        "if difference > allowed:",
        ("tests/hf/test_packing.py::test_a_model_of_nan_is_no_agreement",),
    ),
    Mutant(
        "windows-of-columns-in-trees",
        "topr_kernels/hf/sharing.py",
        "depths[b, q] - depths[b, k] < config.sliding_window",
        "q - k < config.sliding_window",
        (
            "tests/hf/test_sharing.py::test_a_tree_gives_the_loss_and_every_gradient_of_separate_sequences",
        ),
    ),
    Mutant(
        "a-median-over-the-whole-sequence",
        "topr_kernels/hf/sharing.py",
        "_PROOF_PARTS = 4",
        "_PROOF_PARTS = 1",
        ("tests/hf/test_sharing.py::test_the_proof_sees_windows_that_only_the_last_tokens_reach",),
    ),
    Mutant(
        "trees-that-failed-the-proof",
        "topr_kernels/hf/trainer.py",
        "return inputs if self._shares else unshared(inputs)",
        "return inputs",
        (
            "tests/hf/test_sharing.py::test_a_model_that_fails_the_proof_is_trained_unshared_and_named_once",
        ),
    ),
    Mutant(
        "every-epoch-in-one-order",
        "topr_kernels/hf/tree_sampler.py",
        "{self.seed} {self.epoch()}",
        "{self.seed}",
        (
            "tests/hf/test_sharing.py::test_every_epoch_sees_every_record_once_also_when_it_is_resumed",
        ),
    ),
    Mutant(
        "repeats-of-a-resumed-epoch-scored",
        "topr_kernels/hf/loading.py",
        "        sampler = sampler.batch_sampler\n",
        "",
        ("tests/hf/test_trainer_processes.py::test_training_counts_every_record_once_an_epoch",),
    ),
    Mutant(
        "mu-of-temperature-1",
        "topr_kernels/hf/behavior.py",
        "        temperature=temperature,\n",
        "",
        ("tests/recipe/test_recipe.py::test_scores_are_taken_at_the_sampling_temperature",),
    ),
    Mutant(
        "cut-text-ends-with-eos",
        "topr_kernels/hf/tokenise.py",
        "        if cut or (after and after[-1] in self.eos):\n            return start, after\n",
        "        if after and after[-1] in self.eos:\n            return start, after\n",
        ("tests/hf/test_data.py",),
    ),
    Mutant(
        "bos-twice",
        "topr_kernels/hf/tokenise.py",
        "return bare if added > 0 and bare[:added] == ids[:added] else ids",
        "return ids",
        ("tests/hf/test_tokenise.py::test_a_rendered_prompt_has_its_bos_once",),
    ),
    Mutant(
        "the-first-stop-token",
        "topr_kernels/hf/tokenise.py",
        "next((x for x in (turn, own) if x in self.eos), self.eos[0])",
        "self.eos[0]",
        ("tests/hf/test_tokenise.py::test_of_several_stops_the_one_that_ends_a_turn_ends_a_text",),
    ),
    Mutant(
        "prompt-and-completion-apart",
        "topr_kernels/hf/tokenise.py",
        "start, whole = self._with_special(prompt), self._with_special(prompt + completion)",
        "start = self._with_special(prompt); whole = start + self._bare(completion)",
        ("tests/hf/test_tokenise.py::test_prompt_and_completion_are_tokenised_as_one_text",),
    ),
    Mutant(
        "thoughts-that-nobody-had",
        "topr_kernels/hf/tokenise.py",
        "if between and (not between.strip() or start == self._render(prompt, extra, where)):",
        "if between:",
        ("tests/hf/test_tokenise.py::test_an_answer_is_what_the_policy_wrote",),
    ),
    Mutant(
        "a-begun-answer-is-a-turn",
        "topr_kernels/hf/tokenise.py",
        'if prompt[-1]["role"] == "assistant":',
        "if False:",
        ("tests/hf/test_tokenise.py::test_a_begun_answer_is_continued",),
    ),
    Mutant(
        "nulls-of-arrow-reach-the-template",
        "topr_kernels/hf/data.py",
        "    without = _without_nulls(record, features)\n",
        "    without = dict(record)\n",
        ("tests/hf/test_data.py::test_fields_that_arrow_filled_in_are_not_seen_by_the_template",),
    ),
    Mutant(
        "masks-are-ignored",
        "topr_kernels/hf/fields.py",
        "if _MASK.search(name):",
        "if False:",
        ("tests/hf/test_fields.py::test_a_field_that_would_be_ignored_is_refused",),
    ),
    Mutant(
        "tools-are-scored",
        "topr_kernels/hf/collator.py",
        "[0] * len(r.mask) if cut else r.mask",
        "[0] * len(r.mask) if cut else [1] * len(r.mask)",
        (
            "tests/hf/test_masks.py::test_the_loss_and_its_gradient_are_those_of_labels_of_minus_100",
        ),
    ),
    Mutant(
        "rewritten-turns-pass",
        "topr_kernels/hf/turns.py",
        'all messages before it", at)',
        'all messages before it", at) if False else None',
        (
            "tests/hf/test_turns.py::test_thoughts_that_a_template_drops_are_refused_or_served_from_token_ids",
        ),
    ),
    Mutant(
        "marks-are-ignored",
        "topr_kernels/hf/turns.py",
        "if marked is not None:",
        "if False:",
        ("tests/hf/test_turns.py::test_marks_say_what_of_a_turn_the_policy_wrote",),
    ),
    Mutant(
        "every-weight-is-one",
        "topr_kernels/hf/fields.py",
        "    return float(weight)",
        "    return 1.0",
        ("tests/hf/test_fields.py::test_weights_of_records_reach_the_batch",),
    ),
    Mutant(
        "positives-never-read-mu",
        "topr_kernels/hf/fields.py",
        "return limits.pos_min != limits.pos_max",
        "return False",
        ("tests/hf/test_trainer_data.py::test_recorded_log_probs_are_never_replaced_nor_missed",),
    ),
    Mutant(
        "lengths-count-tools",
        "topr_kernels/recipe/records.py",
        "if mask is None else sum(mask)",
        "if mask is None else len(mask)",
        ("tests/recipe/test_recipe_masks.py::test_lengths_count_what_the_policy_wrote",),
    ),
    Mutant(
        "nan-is-a-log-probability",
        "topr_kernels/hf/fields.py",
        "if not (math.isfinite(x) and x <= 0):",
        "if x > 0:",
        (
            "tests/hf/test_fields.py::test_what_is_no_number_of_its_kind_is_refused_at_every_entrance",
        ),
    ),
    Mutant(
        "token-data-sets-pass-unchecked",
        "topr_kernels/hf/data.py",
        "if tokens and all(prepare.keeps(record, i) for i, record in enumerate(dataset)):",
        "if tokens:",
        (
            "tests/hf/test_fields.py::test_what_is_no_number_of_its_kind_is_refused_at_every_entrance",
        ),
    ),
    Mutant(
        "late-data-sets-unprepared",
        "topr_kernels/hf/trainer.py",
        "return self._scored(self._prepared(dataset))",
        "return dataset",
        ("tests/hf/test_trainer_door.py::test_a_data_set_may_come_late",),
    ),
    Mutant(
        "past-the-last-position",
        "topr_kernels/hf/trainer.py",
        "max_length=longest(self.model, args)",
        "max_length=args.max_length",
        ("tests/hf/test_trainer_door.py::test_records_longer_than_the_models_positions",),
    ),
    Mutant(
        "rewards-of-the-default-dtype",
        "topr_kernels/hf/collator.py",
        "torch.tensor([r.reward for r in read], dtype=torch.float32)",
        "torch.tensor([r.reward for r in read])",
        ("tests/hf/test_fields.py::test_a_default_dtype_changes_no_batch",),
    ),
    Mutant(
        "any-arguments-will-do",
        "topr_kernels/hf/arguments.py",
        "if not isinstance(args, TOPRConfig):",
        "if False:",
        ("tests/hf/test_trainer_door.py::test_the_wrong_thing_at_the_door_is_named",),
    ),
    Mutant(
        "granite-multiplies",
        "topr_kernels/hf/heads.py",
        "scale /= scaling",
        "scale *= scaling",
        ("tests/hf/test_heads.py::test_the_head_makes_the_models_own_logits",),
    ),
    Mutant(
        "lora-bias-unscaled",
        "topr_kernels/hf/heads.py",
        "up = adapter.scaling * adapter.up.bias",
        "up = adapter.up.bias",
        (
            "tests/hf/test_causal_lm.py::test_lora_on_the_head_merged_stacked_biased_and_half_precision",
        ),
    ),
    Mutant(
        "router-loss-of-every-micro-batch",
        "topr_kernels/hf/causal_lm.py",
        "share = units.sum().to(out.loss.dtype) / normalizer",
        "share = units.sum().to(out.loss.dtype) / units.sum()",
        ("tests/hf/test_causal_lm.py::test_router_losses_are_kept_and_split_by_share",),
    ),
    Mutant(
        "a-label-cut-off-in-silence",
        "topr_kernels/hf/causal_lm.py",
        "labels[:, 1 : max(labels.shape[1] - keep, 0) + 1]",
        "labels[:, 1 : max(labels.shape[1] - keep, 0)]",
        (
            "tests/hf/test_causal_lm.py::test_labels_before_what_is_kept_are_not_left_out_in_silence",
        ),
    ),
    Mutant(
        "normaliser-of-the-first-step",
        "topr_kernels/hf/trl.py",
        "first = self._step % len(batches) // steps * steps",
        "first = 0",
        (
            "tests/hf/test_trl.py::test_gradients_do_not_depend_on_accumulation",
            "tests/hf/test_trl.py::test_an_accumulated_batch_over_several_generations",
        ),
    ),
    Mutant(
        "unknown-mu-is-certain",
        "topr_kernels/hf/trl.py",
        "return torch.where(sampled.isnan(), current, sampled.float())",
        "return sampled.float().nan_to_num()",
        ("tests/hf/test_trl.py::test_a_log_prob_that_the_sampler_could_not_give_moves_nothing",),
    ),
    Mutant(
        "gradient-of-one-process",
        "topr_kernels/hf/trainer.py",
        "scale = self.accelerator.num_processes",
        "scale = 1",
        (
            "tests/hf/test_trainer.py::test_two_processes_take_the_step_of_one",
            "tests/hf/test_sharded_training.py::test_fsdp2_ends_where_one_process_ends",
        ),
    ),
    Mutant(
        "own-items-times-the-processes",
        "topr_kernels/hf/trainer.py",
        "items = self.accelerator.gather(items).sum()",
        "items = items * self.args.world_size",
        (
            "tests/hf/test_trainer.py::test_two_processes_take_the_step_of_one",
            "tests/hf/test_sharded_training.py::test_fsdp2_ends_where_one_process_ends",
        ),
    ),
    Mutant(
        "weights-of-one-process",
        "topr_kernels/hf/watch.py",
        "            sums = gather(sums[None]).sum(0)\n",
        "",
        ("tests/hf/test_trainer_processes.py::test_evaluation_counts_every_record_once",),
    ),
    Mutant(
        "repeats-counted",
        "topr_kernels/hf/loading.py",
        "return min(max(left, 0), sequences)",
        "return sequences",
        ("tests/hf/test_trainer_processes.py::test_evaluation_counts_every_record_once",),
    ),
    Mutant(
        "repeats-of-a-pack-counted-from-its-last",
        "topr_kernels/hf/loading.py",
        "labels.view(-1)[int(offsets[first]) :]",
        "labels.view(-1)[int(offsets[first + 1]) :]",
        ("tests/hf/test_trainer_processes.py::test_evaluation_counts_every_record_once",),
    ),
    Mutant(
        "shares-one-after-the-other",
        "topr_kernels/hf/initial.py",
        "[shares[i % processes][0][i // processes] for i in range(len(records))]",
        "[row for share in shares for row in share[0]]",
        ("tests/hf/test_trainer_data.py::test_processes_share_the_scoring",),
    ),
    Mutant(
        "other-weights-on-each-process",
        "topr_kernels/hf/initial.py",
        "_ALLOWED = 0.1",
        "_ALLOWED = float('inf')",
        ("tests/hf/test_trainer_processes.py::test_all_processes_refuse_what_one_cannot_score",),
    ),
    Mutant(
        "fsdp-hides-the-head",
        "topr_kernels/hf/heads.py",
        "return cls.__bases__[-1] if fsdp is not None and issubclass(cls, fsdp) else cls",
        "return cls",
        ("tests/hf/test_sharded_training.py::test_fsdp2_ends_where_one_process_ends",),
    ),
    Mutant(
        "placeholders-are-scored",
        "topr_kernels/hf/initial.py",
        'if hasattr(p, "ds_id") and p.numel() == 0:',
        'if hasattr(p, "ds_id") and p.numel() < 0:',
        (
            "tests/hf/test_sharded_training.py::test_a_model_that_zero_3_partitioned_cannot_be_scored",
        ),
    ),
    Mutant(
        "a-term-of-a-subclass-per-micro-batch",
        "topr_kernels/hf/trainer.py",
        "loss_is_scaled_for_ga = False",
        "loss_is_scaled_for_ga = True",
        ("tests/hf/test_trainer.py::test_a_term_of_a_subclass_is_averaged_over_the_micro_batches",),
    ),
    Mutant(
        "evaluation-drops-the-last",
        "topr_kernels/hf/trainer.py",
        "drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False",
        "drop_last = self.args.dataloader_drop_last",
        ("tests/hf/test_trainer.py::test_evaluation_does_not_depend_on_the_size_of_its_batches",),
    ),
    Mutant(
        "noise-of-training-unseen",
        "topr_kernels/hf/watch.py",
        "if difference <= MOST_NOISE:",
        "if difference >= 0:",
        ("tests/hf/test_trainer.py::test_noise_that_only_training_has_is_warned_of",),
    ),
    Mutant(
        "the-look-for-noise-draws-numbers",
        "topr_kernels/hf/watch.py",
        "with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):",
        "with torch.no_grad():",
        ("tests/hf/test_trainer.py::test_looking_for_noise_draws_no_random_number",),
    ),
    Mutant(
        "a-plain-collator-scores",
        "topr_kernels/hf/behavior.py",
        "collate = copy.copy(collator)",
        'collate = CompletionCollator(getattr(collator, "pad_token_id", 0))',
        ("tests/hf/test_trainer_data.py::test_the_collator_of_training_scores",),
    ),
    Mutant(
        "log-mu-in-the-batches-order",
        "topr_kernels/hf/behavior.py",
        "values[index.long()] = log_prob[kept].float().cpu()",
        "values[: len(index)] = log_prob[kept].float().cpu()",
        ("tests/hf/test_trainer_data.py::test_the_collator_of_training_scores",),
    ),
    Mutant(
        "log-mu-of-the-checkpoints-model",
        "topr_kernels/hf/initial.py",
        "if not worst <= _ALLOWED:",
        "if worst < 0:",
        (
            "tests/hf/test_trainer_data.py::test_a_resumed_run_does_not_score_the_model_of_its_checkpoint",
        ),
    ),
    Mutant(
        "a-mean-of-standard-deviations",
        "topr_kernels/hf/watch.py",
        "self._sequences.append(torch.stack([x.double() for x in results[:6]]))",
        "self._sequences = [torch.stack([x.double() for x in results[:6]])]",
        ("tests/hf/test_trainer.py::test_metrics_of_batches_are_those_of_all_their_sequences",),
    ),
    Mutant(
        "text-positions-beside-an-image",
        "topr_kernels/hf/forward.py",
        "if batch.get(POSITIONS) is None and (further or counts_positions(base)):",
        "if False:",
        ("tests/hf/test_causal_lm.py::test_a_model_with_positions_of_its_own_counts_them",),
    ),
    Mutant(
        "positions-counted-beside-images",
        "topr_kernels/hf/collator.py",
        "                del batch[POSITIONS]\n",
        "",
        ("tests/hf/test_images.py::test_loss_and_gradients_are_those_of_the_models_own_logits",),
    ),
    Mutant(
        "kinds-of-image-tokens-left-out",
        "topr_kernels/hf/images.py",
        "return {name: [kinds.get(x, 0) for x in ids] for",
        "return {name: [0 for x in ids] for",
        ("tests/hf/test_images.py::test_loss_and_gradients_are_those_of_the_models_own_logits",),
    ),
    Mutant(
        "images-of-other-tokens",
        "topr_kernels/hf/images.py",
        "if sum(runs) == sum(expected) and set(ends) <= set(accumulate(expected)):",
        "if True:",
        ("tests/hf/test_images.py::test_other_images_than_the_tokens_were_made_with_are_refused",),
    ),
    Mutant(
        "kinds-left-behind-as-padding-moves",
        "topr_kernels/hf/padding.py",
        '    "mm_token_type_ids",\n',
        "",
        ("tests/hf/test_images.py::test_padding_behind_the_tokens_moves_their_kinds_too",),
    ),
    Mutant(
        "padding-left-in-front",
        "topr_kernels/hf/forward.py",
        "    if padding.exact_as_it_is:\n",
        "    if True:\n",
        ("tests/hf/test_padding.py::test_every_token_has_the_log_prob_it_has_alone",),
    ),
    Mutant(
        "positions-counted-for-a-model-that-counts",
        "topr_kernels/hf/padding.py",
        "return self.column is None",
        "return True",
        ("tests/hf/test_padding.py::test_every_token_has_the_log_prob_it_has_alone",),
    ),
    Mutant(
        "results-left-in-the-moved-columns",
        "topr_kernels/hf/padding.py",
        'return Moved(moved | {"logits_to_keep": width - first}, column - first)',
        'return Moved(moved | {"logits_to_keep": keep}, column - (width - keep))',
        ("tests/hf/test_padding.py::test_padding_anywhere_is_moved_behind_and_back",),
    ),
    Mutant(
        "padding-that-is-seen-on-both-sides",
        "topr_kernels/hf/forward.py",
        "    if not padding.exact_behind:\n",
        "    if False:\n",
        (
            "tests/hf/test_padding.py::test_a_model_that_sees_padding_on_both_sides_is_refused_by_name",
        ),
    ),
    Mutant(
        "trl-metrics-of-the-last-micro-batch",
        "topr_kernels/hf/trl.py",
        "self._topr_sequences[mode].add(out)",
        "self._topr_sequences[mode] = SequenceMetrics(); self._topr_sequences[mode].add(out)",
        ("tests/hf/test_trl.py::test_metrics_do_not_depend_on_the_micro_batches",),
    ),
    Mutant(
        "advantages-dropped",
        "topr_kernels/hf/fields.py",
        "or foreign_problem(",
        "or None and foreign_problem(",
        ("tests/hf/test_fields.py::test_a_field_that_would_be_ignored_is_refused",),
    ),
    Mutant(
        "packed-batches-checked-at-every-call",
        "topr_kernels/hf/packing.py",
        "    if attention not in passed:\n",
        "    if attention is not passed:\n",
        ("tests/hf/test_packing.py::test_ones_own_loop_checks_a_packed_model_once",),
    ),
    Mutant(
        "sampling-unread",
        "topr_kernels/hf/sampled.py",
        "if value is not None and not math.isclose(value, temperature, rel_tol=1e-6):",
        "if False:",
        ("tests/hf/test_fields.py::test_log_mu_of_another_distribution_is_refused",),
    ),
    Mutant(
        "log-of-one-process-gathers",
        "topr_kernels/hf/trl.py",
        "if not any(x ==",
        "if not any(True or x ==",
        ("tests/hf/test_trl.py::test_a_log_of_one_process_gathers_nothing",),
    ),
    Mutant(
        "compiled-model-twice",
        "topr_kernels/hf/capture.py",
        'self._model = getattr(model, "_orig_mod", model)',
        "self._model = model",
        ("tests/hf/test_trainer_data.py::test_a_compiled_model_scores_as_the_model_in_it",),
    ),
]

RECIPE = [
    Mutant(
        "zero-rewards-lost-by-anna-karenina",
        "topr_kernels/recipe/curate.py",
        "if record.reward <= 0]\n    if 0 < size < len(first):",
        "if record.reward < 0]\n    if 0 < size < len(first):",
        ("tests/recipe/test_recipe_curate.py",),
    ),
    Mutant(
        "zero-rewards-lost-by-the-share",
        "topr_kernels/recipe/curate.py",
        "if record.reward <= 0]\n    if not positive or not negative:",
        "if record.reward < 0]\n    if not positive or not negative:",
        ("tests/recipe/test_recipe_curate.py",),
    ),
    Mutant(
        "last-right-answer",
        "topr_kernels/recipe/curate.py",
        "first.setdefault(record.group, i)",
        "first[record.group] = i",
        ("tests/recipe/test_recipe_curate.py",),
    ),
    Mutant(
        "log-probs-stored-in-half",
        "topr_kernels/recipe/records.py",
        '("behavior_log_prob", pa.list_(pa.float32()))',
        '("behavior_log_prob", pa.list_(pa.float16()))',
        ("tests/recipe/test_recipe.py",),
    ),
    Mutant(
        "certain-tokens-refused",
        "topr_kernels/recipe/records.py",
        'if _number(x, where, f"{name}[{i}]") > 0:',
        'if _number(x, where, f"{name}[{i}]") >= 0:',
        ("tests/recipe/test_recipe.py::test_scored_log_probs_are_stored_exactly",),
    ),
    Mutant(
        "stop-token-dropped",
        "topr_kernels/recipe/generate.py",
        "ids = row if end is None else row[: end + 1]",
        "ids = row if end is None else row[:end]",
        ("tests/recipe/test_recipe.py",),
    ),
    Mutant(
        "min-p-of-the-model",
        "topr_kernels/recipe/generate.py",
        "    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]\n",
        "",
        ("tests/recipe/test_recipe.py",),
    ),
    Mutant(
        "wilson-without-a-square",
        "topr_kernels/recipe/evaluate.py",
        "z * z / (4 * count * count)",
        "z * z / (4 * count)",
        ("tests/recipe/test_recipe.py::test_wilson_interval",),
    ),
    Mutant(
        "unparsable-answers-vote",
        "topr_kernels/recipe/voting.py",
        "                if form is not None:\n",
        "                if True:\n",
        ("tests/recipe/test_recipe_curate.py",),
    ),
    Mutant(
        "error-of-all-answers",
        "topr_kernels/recipe/voting.py",
        "/ (samples - votes))",
        "/ samples)",
        ("tests/recipe/test_recipe_curate.py",),
    ),
    Mutant(
        "parts-gone-before-the-manifest",
        "topr_kernels/recipe/steps.py",
        "        _put_in_place(step, result)\n        shutil.rmtree(partial)\n",
        "        shutil.rmtree(partial)\n        _put_in_place(step, result)\n",
        ("tests/recipe/test_recipe_iterate.py::test_kills_change_nothing",),
    ),
    Mutant(
        "folder-of-a-lost-first-process",
        "topr_kernels/recipe/steps.py",
        "        with _held(settings_file):\n            pass\n",
        "        pass\n",
        (
            "tests/recipe/test_recipe_processes.py"
            "::test_a_process_that_outlives_its_first_one_keeps_the_folder",
        ),
    ),
    Mutant(
        "all-batches-after-a-failure",
        "topr_kernels/recipe/processes.py",
        "            if known := self._failure():\n                raise ProcessError(known)\n",
        "",
        ("tests/recipe/test_recipe_processes.py::test_the_others_stop_at_their_next_batch",),
    ),
    Mutant(
        "a-batch-for-each-process",
        "topr_kernels/recipe/train.py",
        "per_device_train_batch_size=settings.batch_size // crew.count",
        "per_device_train_batch_size=settings.batch_size",
        (
            "tests/recipe/test_recipe_processes.py"
            "::test_training_in_several_processes_takes_the_updates_of_one",
        ),
    ),
    Mutant(
        "one-result-of-two-runs",
        "topr_kernels/recipe/steps.py",
        "fcntl.LOCK_SH if shared else fcntl.LOCK_EX",
        "fcntl.LOCK_SH",
        ("tests/recipe/test_recipe_processes.py::test_one_run_holds_one_result",),
    ),
    Mutant(
        "the-model-before-is-measured",
        "topr_kernels/recipe/iterate.py",
        "pick(EvaluateSettings, settings, model=str(model)),",
        "pick(EvaluateSettings, settings, model=source),",
        (
            "tests/recipe/test_recipe_iterate.py::test_an_iteration_learns_from_the_samples_of_the_last_model",
        ),
    ),
    Mutant(
        "the-same-samples-again",
        "topr_kernels/recipe/iterate.py",
        "seed = settings.seed * 1009 + i",
        "seed = settings.seed * 1009 + 1",
        (
            "tests/recipe/test_recipe_iterate.py::test_an_iteration_learns_from_the_samples_of_the_last_model",
        ),
    ),
    Mutant(
        "a-failed-start-binds",
        "topr_kernels/recipe/iterate.py",
        '        and not (path.name == "settings.json" and path.parent.name.endswith(".partial"))\n',
        "",
        ("tests/recipe/test_recipe_iterate.py::test_a_start_that_failed_binds_nobody",),
    ),
    Mutant(
        "mu-of-the-server",
        "topr_kernels/recipe/server.py",
        "x.token_ids, stops)",
        "x.token_ids, stops, x.log_probs)",
        ("tests/recipe/test_recipe_server.py::test_a_server_samples_and_mu_is_scored_here",),
    ),
    Mutant(
        "defaults-of-the-server",
        "topr_kernels/recipe/server.py",
        '    "min_p": 0.0,\n',
        "",
        ("tests/recipe/test_recipe_server.py::test_a_server_samples_and_mu_is_scored_here",),
    ),
    Mutant(
        "another-policy-unsaid",
        "topr_kernels/recipe/server.py",
        "elif difference > _ROUNDING",
        "elif difference > 100",
        ("tests/recipe/test_recipe_server.py::test_a_server_of_another_policy_is_warned_of",),
    ),
    Mutant(
        "a-redirect-is-followed",
        "topr_kernels/recipe/server.py",
        "def redirect_request(",
        "def redirect_nothing(",
        ("tests/recipe/test_recipe_server.py::test_a_server_that_refuses_is_told_in_a_line",),
    ),
    Mutant(
        "ppo-takes-the-larger",
        "benchmarks/learning/ppo.py",
        "torch.minimum(x * reward,",
        "torch.maximum(x * reward,",
        ("tests/benchmarks/test_learning.py::test_ppo_weighs_by_the_ratio_inside_of_its_clip",),
    ),
    Mutant(
        "baseline-of-the-inverse-share",
        "benchmarks/learning/run.py",
        "baseline_for_positive_share(share, cell.share)",
        "baseline_for_positive_share(cell.share, share)",
        ("tests/benchmarks/test_learning.py::test_the_methods_differ_where_they_should",),
    ),
    Mutant(
        "units-of-any-kind",
        "topr_kernels/recipe/quantities.py",
        'unit="/".join(names))',
        'unit="")',
        ("tests/recipe/test_recipe_answers.py::test_verdicts_are_those_of_a_reader",),
    ),
    Mutant(
        "chain-of-either-sign",
        "topr_kernels/recipe/equality.py",
        'if not set(chain[1::2]) <= {">", r"\\ge"}:',
        "if len(chain) < 2:",
        ("tests/recipe/test_recipe_answers.py::test_verdicts_are_those_of_a_reader",),
    ),
    Mutant(
        "key-twice",
        "topr_kernels/recipe/files.py",
        "if name in mapping:",
        "if False:",
        ("tests/recipe/test_recipe_tasks.py::test_bad_lines_are_named",),
    ),
    Mutant(
        "segments-not-trained-on",
        "topr_kernels/recipe/record_checks.py",
        '"sample_weight", "segments", "images")',
        '"sample_weight", "images")',
        ("tests/recipe/test_recipe_masks.py",),
    ),
]

INTEGRATIONS = [
    Mutant(
        "masked-advantages-read",
        "topr_kernels/integrations/tokens.py",
        'low = _extreme(torch.where(scored, values, torch.inf), cu_seqlens, "amin")',
        'low = _extreme(values, cu_seqlens, "amin")',
        ("tests/hf/test_integrations.py::test_what_lies_under_the_mask_is_never_read",),
    ),
    Mutant(
        "count-of-all-ranks",
        "topr_kernels/integrations/verl.py",
        "max(float(count), 1.0) / ranks",
        "max(float(count), 1.0)",
        ("tests/hf/test_integrations.py",),
    ),
    Mutant(
        "half-precision-taken",
        "topr_kernels/integrations/tokens.py",
        "if log_prob.dtype in (torch.float16, torch.bfloat16):",
        "if log_prob.dtype in ():",
        ("tests/hf/test_integrations.py::test_verl_half_precision_is_refused",),
    ),
    Mutant(
        "registers-over-another-loss",
        "topr_kernels/integrations/tokens.py",
        'if taken is not None and getattr(taken, "func", None) is not ours:',
        "if False:",
        (
            "tests/hf/test_integrations.py::test_verl_its_own_losses_are_not_replaced",
            "tests/hf/test_other_integrations.py::test_skyrl_registering_twice_does_no_harm",
        ),
    ),
    Mutant(
        "tinker-mu-for-advantages",
        "topr_kernels/integrations/tinker.py",
        "mu, advantages, mask = (",
        "advantages, mu, mask = (",
        (
            "tests/hf/test_other_integrations.py::test_tinker_is_the_mean_over_the_answers_of_a_call",
        ),
    ),
    Mutant(
        "tinker-traced-sign",
        "topr_kernels/integrations/tinker.py",
        "low = torch.where(reward < 0, neg_min, pos_min)",
        "low = torch.where(reward > 0, neg_min, pos_min)",
        ("tests/hf/test_other_integrations.py::test_tinker_the_traced_form_is_the_same",),
    ),
    Mutant(
        "axolotl-settings-without-effect",
        "topr_kernels/integrations/axolotl.py",
        "if field.name not in _HARMLESS | _INHERITED and value not in unset:",
        "if False:",
        ("tests/hf/test_other_integrations.py::test_axolotl_trains_on_the_records_of_its_files",),
    ),
]

MUTANTS = [*LOSS, *OPS, *KERNELS, *LINEAR, *HF, *RECIPE, *INTEGRATIONS]


class Failures:
    """A pytest plugin that writes down which tests failed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.note(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.note(f"{report.nodeid} (collection)")

    def note(self, name: str) -> None:
        with self.file.open("a") as f:
            f.write(f"{name}\n")


def copy_tree(folder: Path) -> None:
    """Copies the tracked files as they are now, and what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in [*filter(None, listed.stdout.split("\0")), *BUILT]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def broken(folder: Path, mutant: Mutant) -> Iterator[None]:
    """Puts the fault into a copy while the block runs."""
    path = folder / mutant.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: its text occurs {sound.count(mutant.old)} times in {mutant.file}; "
            "expected once"
        )
    try:
        write(path, sound.replace(mutant.old, mutant.new))
        yield
    finally:
        write(path, sound)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Python tells an old one by seconds and size, which may be those of the fault before.
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def run(
    folder: Path, tests: Sequence[str], limit: float, *more: str
) -> tuple[int | None, list[str]]:
    """Runs pytest in a fork of this process; -> (its status, None at the limit; what failed)."""
    with tempfile.TemporaryDirectory() as notes:
        log, output = Path(notes, "failed"), Path(notes, "output")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            run_pytest(folder, tests, more, log, output)
        status = waited(child, limit)
        failed = log.read_text().splitlines() if log.exists() else []
        if status not in (0, 1, None):
            print(output.read_text()[-3000:])
        return status, failed


def run_pytest(
    folder: Path, tests: Sequence[str], more: Sequence[str], log: Path, output: Path
) -> None:
    """In the child: never returns."""
    status = 70
    try:
        # A group of its own: a test may leave processes behind when it is killed.
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        # The limit is this program's: a test that runs out of its own time would look like a kill.
        flags = ["-q", "-p", "no:cacheprovider", "--timeout=0", *more]
        status = pytest.main([*flags, *tests], plugins=[Failures(log)])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def waited(child: int, limit: float) -> int | None:
    """Status of a child; None if it had to be killed at the limit."""
    deadline = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)


def prepare() -> None:
    """Pays for the imports once. The package under test is none of them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # As in conftest.py; a GPU must not be looked for before a fork.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults and no others")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each fault")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    args = parser.parse_args()
    named = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in args.only or () if name not in named]
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}; --list tells the names")
    chosen = [named[name] for name in args.only or named]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:42}{mutant.file}")
        return 0
    prepare()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        return judge(folder, chosen, args.limit)


def judge(folder: Path, chosen: Sequence[Mutant], limit: float) -> int:
    """Runs the faults; 0 if each is noticed by a test that passes without it."""
    alive, killers = [], dict[str, str]()
    for mutant in chosen:
        start = time.monotonic()
        with broken(folder, mutant):
            status, failed = run(folder, mutant.tests, limit, "-x")
        by = failed[0] if failed else ""
        if status is None:
            told = f"killed at the limit of {limit:.0f} s"
        elif status == 1 and by:
            told = f"killed by {by}"
            killers[by] = mutant.name
        else:
            told = "SURVIVED" if status == 0 else f"NOT JUDGED: pytest ended with {status}"
            alive.append(mutant.name)
        print(f"{mutant.name:42}{told}  ({time.monotonic() - start:.0f} s)", flush=True)
    tests = [by for by in killers if "(collection)" not in by]
    if tests:
        status, failed = run(folder, tests, limit * 10)
        for by in failed:
            print(f"{killers.get(by, by):42}NOT JUDGED: {by} fails without the fault as well")
        alive += [killers.get(by, by) for by in failed]
        if status != 0 and not failed:
            alive.append(f"the sound code: pytest ended with {status}")
    print(
        f"{len(chosen)} faults"
        + (f"; not noticed: {', '.join(alive)}" if alive else ", all noticed")
    )
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
