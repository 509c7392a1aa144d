"""Packing: sequences one after another in one row, without padding; and the check that they stay apart.

A packed batch follows FlashAttention's convention for sequences of various lengths, under the names
that transformers knows (``transformers.modeling_flash_attention_utils``)::

    input_ids       [1, N]    | sequence 0 | sequence 1 | ...
    position_ids    [1, N]      0 1 2 3 4    0 1 2 ...
    cu_seq_lens_q   [B + 1]     0            5            ...  N

Attention that computes all pairs of a row (``sdpa``, ``eager``) gets rows of bounded length, which never
cost more than a padded batch; the hidden states are put back into one (``in_rows``).

transformers keeps the sequences apart in one of two ways. Flash attention gets the offsets; ``sdpa``,
``eager`` and ``flex_attention`` get a mask that transformers makes where the position ids restart, but
only without ``attention_mask`` and without cache. Some models never ask for that mask (in transformers
5.24 GPT-OSS and OPT, among others), and nothing warns of it: hence ``check_packing``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, cycle, islice, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import masking_utils

from topr_kernels.hf.heads import base_model, output_embeddings
from topr_kernels.hf.signature import POSITIONS, VARLEN, accepts, takes
from topr_kernels.hf.tree import ROW_TOKENS, fill

#: Layers in which a token sees only its own sequence, given offsets or a mask.
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: Implementations that compute all pairs of a row, under any mask.
DENSE = frozenset({"eager", "sdpa"})
#: Implementations for which transformers makes a mask from the position ids.
_MASKED = DENSE | {"flex_attention"}
_REMEDY = "use packing=False"
#: Entries of a packed batch that ``in_rows`` adds.
CELLS = "row_cells"
ROWS = (CELLS, "row_shape")

#: Tokens of a sequence that ``check_packing`` runs: a leak shows most in the first ones.
_CHECK_TOKENS = 64
#: Limit in eps of the dtype. Over 66 families of models rounding was 5 in the median; leaks are >= 0.24.
_EPS_ALLOWED = 12
#: The least limit, for fp32: kernels that sum in another order differ by more than 12 eps.
_LEAST_ALLOWED = 1e-4


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is packed: it then has ``cu_seq_lens_q``."""
    return batch.get("cu_seq_lens_q") is not None


def pack(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lays token sequences out one after another.

    Args:
        sequences: B sequences of token ids, each at least one.

    Returns:
        ``input_ids`` and ``position_ids`` [1, N] int64, positions restarting at 0; ``cu_seq_lens_q``
        and ``cu_seq_lens_k`` [B + 1] int32; ``max_length_q`` and ``max_length_k`` int.
    """
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tokens = [token for sequence in sequences for token in sequence]
    return {
        "input_ids": torch.tensor(tokens, dtype=torch.int64)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the forward pass that keep the sequences of a packed batch apart.

    Args:
        model: the unwrapped model, as ``signature_of`` in ``completion_logits``.
        batch: packed, in rows or not.

    Returns:
        ``input_ids``, ``position_ids``, ``use_cache=False`` and, if the forward takes them and the
        batch is in one row, the offsets and longest lengths.

    Raises:
        ValueError: if the batch has an ``attention_mask`` or lacks a field; if the model cannot keep the
            sequences apart (see ``packing_problem``).
    """
    if batch.get("attention_mask") is not None:
        raise ValueError(
            "the batch is packed (it has cu_seq_lens_q) and has an attention_mask, with which "
            "transformers ignores the packing without a word: sequences would see each other; drop "
            f"attention_mask in the data collator, or {_REMEDY}"
        )
    missing = [name for name in (POSITIONS, *VARLEN) if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"the batch is packed (it has cu_seq_lens_q) but has no {', '.join(missing)}; give all of "
            f"position_ids, {', '.join(VARLEN)}, as CompletionCollator(packing=True) does"
        )
    problem = packing_problem(model)
    if problem:
        raise ValueError(f"packing=True, but {problem}; {_REMEDY}")
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if CELLS in batch:
        for name, x in inputs.items():
            inputs[name] = x.new_zeros(batch["row_shape"])
            inputs[name].view(-1)[batch[CELLS]] = x[0]
    else:
        inputs |= {name: batch[name] for name in VARLEN if accepts(model, name)}
    # With a cache, transformers does not look for packed sequences.
    return inputs | {"use_cache": False}


def in_rows(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A packed batch with the places of its tokens in rows of bounded length, if its model needs them.

    Copies the offsets to the host.

    Args:
        model: the unwrapped model, as ``signature_of`` in ``completion_logits``.
        batch: packed or not; one that is not is returned as it is.

    Returns:
        The batch, for attention that computes all pairs of a row with ``row_cells`` [N], the place of
        each token in the flattened rows, and ``row_shape``.
    """
    offsets = batch.get("cu_seq_lens_q")
    if offsets is None or attention_of(model) not in DENSE:
        return batch
    begins = offsets.tolist()
    lengths = [j - i for i, j in pairwise(begins)]
    if not lengths or min(lengths) < 0:
        return batch
    rows = fill(lengths, ROW_TOKENS)
    if len(rows) == 1:
        return batch
    width = max(sum(lengths[i] for i in row) for row in rows)
    starts = [0] * len(lengths)
    for r, row in enumerate(rows):
        before = accumulate((lengths[i] for i in row), initial=r * width)
        for i, start in zip(row, before, strict=False):
            starts[i] = start
    device = batch["input_ids"].device
    repeats = torch.tensor(lengths, device=device)
    moved = torch.tensor(starts, device=device) - offsets[:-1]
    cells = torch.arange(begins[-1], device=device) + moved.repeat_interleave(repeats)
    return {**batch, CELLS: cells, "row_shape": (len(rows), width)}


def packing_problem(model: nn.Module) -> str | None:
    """Says why this model cannot run packed sequences, or None if nothing is known against it.

    What it says follows from the config and the signature of the forward pass; only ``check_packing``
    measures.
    """
    model_name = type(base_model(model)).__name__
    # By name: Bloom's **kwargs take position_ids and ignore them.
    if not takes(model, POSITIONS):
        return (
            f"{model_name}.forward names no position_ids, by which packed sequences are told apart"
        )
    if problem := state_problem(model):
        return problem
    attention = attention_of(model)
    if attention.startswith("paged"):
        return f"attn_implementation={attention!r} is for generation"
    if "chunked_attention" in (getattr(text_config(model), "layer_types", None) or ()):
        # Chunks must be counted from the start of each sequence.
        exact = hasattr(masking_utils, "remap_positions_for_packed_sequence")
        if not exact or attention not in _MASKED:
            return (
                f"with attn_implementation={attention!r} the chunks of {model_name}'s chunked attention "
                "would be counted from the start of the batch in this version of transformers"
            )
    return None


@torch.no_grad()
def check_packing(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> float:
    """Runs a sequence behind another one and alone, and compares its hidden states.

    The first pass packs two sequences of the batch: the second one, its tokens reversed so that samples
    of one prompt differ, and behind it the first one. The other pass runs the first one alone, without
    the arguments of packing. At most 64 tokens of each are run. If there is only one sequence it is
    used twice, so that all processes of a sharded model do the same.

    Compared is each token's input to the head: the norm of the difference relative to the norm, as a
    median over the tokens, because rounding makes routers choose another expert for a few of them. The
    limit is 12 eps of the dtype the model computes in (0.09 in bf16, 0.01 in fp16), and 1e-4 in fp32.
    Rounding causes up to 5 eps. A leak, or positions that count all columns, causes 0.8 in SmolLM2-135M
    and 0.24 to 1.4 in random models whose attention has an effect. In a model that was just initialised
    attention has next to none, and a leak may be below the resolution of bf16.

    The model runs in eval mode and without gradients; its modules get their modes back, and no random
    number is drawn. Call it on all processes or on none.

    Args:
        model: as in ``completion_logits``.
        batch: packed, as ``CompletionCollator(packing=True)`` returns it, on the model's device.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.

    Returns:
        The median relative difference.

    Raises:
        ValueError: as ``completion_logits``; if the position ids do not match the offsets; if the
            difference is above the limit.
    """
    unwrapped = model if signature_of is None else signature_of
    packed_inputs(unwrapped, batch)
    sequences = _sequences(batch)
    b, other = sequences[0][:_CHECK_TOKENS], sequences[min(1, len(sequences) - 1)]
    # As long as any sequence of the batch: few tokens in front would leak little.
    length = min(_CHECK_TOKENS, int(batch["max_length_q"]))
    a = list(islice(cycle(other[:length][::-1]), length))
    together = packed_inputs(unwrapped, pack([a, b]))
    single = {"input_ids": torch.tensor([b]), "use_cache": False}
    device = batch["input_ids"].device
    with eval_mode(unwrapped):
        (behind, _), (alone, eps) = (
            head_input(
                model,
                unwrapped,
                {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()},
            )
            for inputs in (together, single)
        )
    difference, allowed = median_difference(behind[len(a) :], alone), allowed_difference(eps)
    # Written so that NaN fails.
    if not difference <= allowed:
        base = base_model(unwrapped)
        attention = getattr(base.config, "_attn_implementation", None)
        raise ValueError(
            f"packing=True, but {type(base).__name__} with attn_implementation={attention!r} does not "
            "keep packed sequences apart: behind another sequence the hidden states of a token differ "
            f"by {difference:.1e} of their norm (median) from those of the sequence alone; expected at "
            f"most {allowed:.1e}, from rounding; {_REMEDY}, or an attn_implementation that takes "
            "cu_seq_lens_q (flash_attention_2)"
        )
    return difference


#: Base model -> the attention implementations with which it has passed ``check_packing``.
_passed: WeakKeyDictionary[nn.Module, set[str | None]] = WeakKeyDictionary()


def check_packing_once(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> None:
    """``check_packing``, unless the model has passed it with its attention implementation."""
    base = base_model(model if signature_of is None else signature_of)
    attention = getattr(base.config, "_attn_implementation", None)
    passed = _passed.setdefault(base, set())
    if attention not in passed:
        check_packing(model, batch, signature_of=signature_of)
        passed.add(attention)


def _sequences(batch: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of each sequence of a packed batch; raises if its fields disagree."""
    ids, offsets = batch["input_ids"][0].tolist(), batch["cu_seq_lens_q"].tolist()
    sequences = [ids[i:j] for i, j in pairwise(offsets)]
    expected = pack(sequences)
    for name in (POSITIONS, *VARLEN):
        if not torch.equal(torch.as_tensor(batch[name]).cpu(), torch.as_tensor(expected[name])):
            raise ValueError(
                f"{name} of the packed batch does not match the sequences that cu_seq_lens_q delimits: "
                f"got {batch[name]}, expected {expected[name]}; build the batch with "
                "CompletionCollator(packing=True)"
            )
    return sequences


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part; None of a module that has none."""
    config: Any = getattr(base_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_of(model: nn.Module) -> str:
    """The attention implementation of a model's text part."""
    return getattr(text_config(model), "_attn_implementation", None) or "eager"


def other_layers(model: nn.Module) -> list[str]:
    """Kinds of a model's layers, as its config names them, that are not attention."""
    return sorted(set(getattr(text_config(model), "layer_types", None) or ()) - ATTENTION)


def state_problem(model: nn.Module) -> str | None:
    """Says what of a model carries one sequence of a row into the next, or None if nothing is known."""
    base = base_model(model)
    model_name, others = type(base).__name__, other_layers(model)
    if others:
        return (
            f"{model_name} has layers of type {', '.join(others)}, which carry one sequence into the "
            "next"
        )
    # A config that lists its layers has named those with a state.
    if not getattr(text_config(model), "layer_types", None) and getattr(
        base, "_is_stateful", False
    ):
        return f"{model_name} carries a state from one sequence into the next"
    return None


def median_difference(hidden: Tensor, alone: Tensor) -> float:
    """Median over the tokens of ``token_differences``."""
    return float(token_differences(hidden, alone).median())


def token_differences(hidden: Tensor, alone: Tensor) -> Tensor:
    """[T] norm of each token's difference relative to the norm; both [T, D] fp32."""
    # The embedding of a padding id may be 0, and then all that comes of it.
    norms = alone.norm(dim=-1).clamp(min=torch.finfo(alone.dtype).tiny)
    differences: Tensor = (hidden - alone).norm(dim=-1) / norms
    return differences


def allowed_difference(eps: float) -> float:
    """What rounding may explain of a ``median_difference``."""
    return max(_LEAST_ALLOWED, _EPS_ALLOWED * eps)


def head_input(model: Any, unwrapped: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """Input of the head, [T, D] fp32, or logits if there is no head; and the eps of the computation."""
    head = output_embeddings(unwrapped)
    seen: list[tuple[Tensor, float]] = []

    def see(hidden: Tensor) -> None:
        seen.append((hidden.flatten(0, -2).float(), computing_eps(hidden)))

    if head is None:
        see(model(**inputs).logits)
        return seen[-1]
    hook = head.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[-1]


def computing_eps(hidden: Tensor) -> float:
    """Eps of the dtype that a matmul computes in, which autocast and TF32 change from the operands'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    if hidden.dtype == torch.float32 and device == "cuda":
        # TF32 has the digits of fp16; "medium" may use bf16.
        rounded = {"high": torch.float16, "medium": torch.bfloat16}
        dtype = rounded.get(torch.get_float32_matmul_precision(), torch.float32)
        return torch.finfo(dtype).eps
    return torch.finfo(hidden.dtype).eps


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating weight of a model."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and every module back into the mode it was in."""
    # One by one: some modules may be in eval mode on purpose.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
