"""Detections by the name of an argument: each goes off where upstream renames it, and that shows."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_trainer import random_model, rows
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.forward import completion_logits
from topr_kernels.hf.packing import packing_problem
from topr_kernels.hf.signature import (
    CACHE,
    KEEP,
    POSITIONS,
    VARLEN,
    cache_argument,
    cache_of,
    takes,
)
from topr_kernels.recipe import prompt_cache
from topr_kernels.recipe.prompt_cache import cache_problem, caches_prefix, prefix_cache


def renamed(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The forward pass of a version of transformers that calls an argument otherwise."""
    signature = inspect.signature(forward)
    others = [
        p.replace(name=f"{name}_") if p.name == name else p for p in signature.parameters.values()
    ]

    @functools.wraps(forward)
    def forward_(*args: Any, **kwargs: Any) -> Any:
        if f"{name}_" in kwargs:
            kwargs[name] = kwargs.pop(f"{name}_")
        return forward(*args, **kwargs)

    forward_.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return forward_


def cache_is_found(model: Any) -> bool:
    return cache_argument(model) is not None


#: What is detected by name: the argument -> whether it is found.
DETECTIONS: dict[str, Callable[[Any], bool]] = {
    KEEP: lambda model: takes(model, KEEP),
    POSITIONS: lambda model: takes(model, POSITIONS),
    "cache": cache_is_found,
}


def found(model: Any) -> dict[str, bool]:
    return {name: detect(model) for name, detect in DETECTIONS.items()}


def cache_name() -> str:
    return str(cache_argument(random_model()))


@pytest.mark.parametrize("name", DETECTIONS)
def test_every_argument_that_is_asked_for_by_name_is_there(name: str):
    """Red with a transformers that renames an argument, as the second half shows."""
    model = random_model()
    assert found(model) == dict.fromkeys(DETECTIONS, True)
    theirs = cache_name() if name == "cache" else name
    model.forward = renamed(model.forward, theirs)
    assert found(model) == {**dict.fromkeys(DETECTIONS, True), name: False}


@pytest.mark.parametrize("name", DETECTIONS)
def test_a_lost_argument_is_named_where_it_switches_something_off(name: str):
    model = random_model()
    theirs = cache_name() if name == "cache" else name
    model.forward = renamed(model.forward, theirs)
    problem = cache_problem(model)
    assert problem is not None
    assert theirs in problem
    if name == POSITIONS:
        assert POSITIONS in str(packing_problem(model))


def lost(function: Callable[..., Any], wanted: Iterable[str]) -> set[str]:
    return set(wanted) - set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", [*VARLEN, POSITIONS])
def test_the_names_of_packed_offsets_and_of_the_mask_are_transformers_own(name: str):
    """Red with a transformers that renames one, as the second half shows."""
    assert set(VARLEN) <= set(modeling_flash_attention_utils.FlashAttentionKwargs.__annotations__)
    readers = {
        modeling_flash_attention_utils._flash_attention_forward: (*VARLEN, POSITIONS),
        masking_utils.create_causal_mask: (POSITIONS,),
    }
    for function, wanted in readers.items():
        assert lost(function, wanted) == set()
        assert lost(renamed(function, name), wanted) == {name} & set(wanted)


@pytest.mark.parametrize("name", CACHE)
def test_both_names_of_the_cache_serve(name: str):
    """As the argument: the installed name, and one that a model of another version has."""
    model, ids = random_model(), torch.tensor([[5, 6, 7, 8], [5, 6, 9, 4]])
    rest = {POSITIONS: torch.tensor([[2, 3]]), "attention_mask": torch.ones_like(ids)}

    def behind_prefix() -> torch.Tensor:
        with torch.no_grad():
            cache = prefix_cache(model, ids, 2)
            return model(input_ids=ids[:, 2:], use_cache=True, **rest, **cache).logits

    expected = behind_prefix()
    with torch.no_grad():
        torch.testing.assert_close(expected, model(ids).logits[:, 2:], rtol=0, atol=1e-6)
    theirs, plain = cache_name(), model.forward
    if name != theirs:

        def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if name in kwargs:
                kwargs[theirs] = kwargs.pop(name)
            return plain(input_ids, attention_mask, position_ids, **kwargs)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            *(
                inspect.Parameter(n, keyword, default=None)
                for n in ("input_ids", "attention_mask", POSITIONS, name, "use_cache", KEEP)
            ),
        ]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        model.forward = forward
    assert cache_argument(model) == name
    assert torch.equal(behind_prefix(), expected)


def test_outputs_are_read_by_either_name():
    class Old:
        past_key_values = "old"

    class Both(Old):
        cache = "new"

    assert (cache_of(Old()), cache_of(Both())) == ("old", "new")


def test_no_deprecated_name_of_transformers_is_used(caplog: pytest.LogCaptureFixture):
    """warning_once speaks once per process, so its memory is emptied first."""
    from transformers.utils import logging as theirs

    theirs.warning_once.cache_clear()
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger="transformers")
    try:
        model = random_model().eval()
        batch = CompletionCollator(0, share_prefix=True)(rows(4))
        with torch.no_grad():
            completion_logits(model, batch)
            prefix_cache(model, batch["unshared"]["input_ids"], 1)
        said = [r.getMessage() for r in caplog.records if "deprecat" in r.getMessage()]
        assert said == []
        # The test can fail: the old name does warn where the new one exists.
        if "cache" in CausalLMOutputWithPast.__dataclass_fields__:
            assert CausalLMOutputWithPast(cache=None).past_key_values is None
            assert any("deprecat" in r.getMessage() for r in caplog.records)
    finally:
        root.removeHandler(caplog.handler)


def test_a_model_that_carries_a_state_keeps_no_prefix():
    model = random_model()
    type(model)._is_stateful, before = True, type(model)._is_stateful
    try:
        assert "state" in str(cache_problem(model))
    finally:
        type(model)._is_stateful = before


def test_a_cache_that_is_off_says_so_once(caplog: pytest.LogCaptureFixture):
    # What other tests of this process heard is not said again.
    prompt_cache._log_once.cache_clear()
    model = random_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not caches_prefix(model)
    assert not caches_prefix(model)
    assert [r.getMessage() for r in caplog.records if "once per prompt" in r.getMessage()] == [
        "Sampling runs the common prefix of a batch's prompts once per prompt: the model has layers of "
        "type sliding_attention"
    ]
