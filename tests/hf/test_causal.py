"""Models that see what they are to predict, or that are no language models of their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from test_heads import SIZE
from test_trainer import rows
from tiny import random_model, tiny_config

from topr_kernels.hf import (
    CompletionCollator,
    causal_lm_log_prob,
    causal_lm_topr_loss,
    completion_logits,
)
from topr_kernels.hf.causal import causal_problem, check_causal_once


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZE, "num_hidden_layers": 1, **changes})
    return transformers.BertLMHeadModel(config)


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"share_prefix": True}])
def test_a_model_that_sees_later_tokens_is_refused_on_every_path(layout: dict[str, bool]):
    batch = CompletionCollator(0, **layout)(rows(4))
    for call in (causal_lm_log_prob, causal_lm_topr_loss, completion_logits):
        with pytest.raises(ValueError, match=r"BertLMHeadModel lets tokens see.*is_decoder=True"):
            call(bert(), batch)


def test_the_remedies_serve():
    batch = CompletionCollator(0)(rows(4))
    assert causal_lm_log_prob(bert(is_decoder=True), batch).log_prob.isfinite().all()
    # Who asks for no checks gets none.
    assert causal_lm_log_prob(bert(), batch, check_padded=False).log_prob.isfinite().all()


def paligemma() -> Any:
    torch.manual_seed(0)
    text = {"model_type": "gemma", **SIZE, "num_hidden_layers": 1, "num_key_value_heads": 1}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=99, projection_dim=16
    )
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def test_kinds_of_tokens_are_given_to_the_rows_that_are_run():
    batch = CompletionCollator(0)(rows(4))
    batch = {n: x for n, x in batch.items() if n != "position_ids"}
    zeros = torch.zeros_like(batch["input_ids"])
    ends = (batch["labels"] != -100).long()
    for typed in (zeros, ends):
        with pytest.raises(ValueError, match="BertLMHeadModel lets tokens see"):
            causal_lm_log_prob(bert(), batch | {"token_type_ids": typed})
    with pytest.raises(ValueError, match=r"PaliGemma.* lets tokens see"):
        causal_lm_log_prob(paligemma(), batch | {"token_type_ids": zeros})
    check_causal_once(paligemma(), batch | {"token_type_ids": ends}, further={"token_type_ids"})
    # Images do not hide it; an entry that is not known may say what is seen.
    model, pixels = bert(), {"token_type_ids": zeros, "pixel_values": zeros}
    with pytest.raises(ValueError, match="BertLMHeadModel lets tokens see"):
        check_causal_once(model, batch | pixels, further=set(pixels))
    check_causal_once(model, batch | pixels, further={*pixels, "seen"})


def test_one_token_that_sees_later_ones_is_enough():
    """A median would not tell: of Reformer's tokens few see what is in their chunk."""

    class Peeks(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            embedded = self.model.embed_tokens(input_ids).clone()
            embedded[:, 15] += embedded[:, -1]
            return super().forward(inputs_embeds=embedded, **kwargs)

    batch = CompletionCollator(0)(rows(4))
    assert "Peeks lets tokens see later ones" in str(causal_problem(Peeks(tiny_config()), batch))


def test_what_has_no_row_of_logits_for_each_token_is_refused():
    batch = CompletionCollator(0)(rows(4))
    model = random_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is an encoder and a decoder"):
        causal_lm_log_prob(model, batch)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is an encoder and a decoder"):
        check_causal_once(model, batch, further={"another"})

    class Short(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[:, 1:]
            return out

    with pytest.raises(ValueError, match=r"Short gave logits of shape \(1, 31, 102\)"):
        causal_lm_log_prob(Short(tiny_config()), batch)

    class Asks(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
            if pixel_values is None:
                raise TypeError("where is the image")
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match=r"Asks cannot run a row.*TypeError: where is the image"):
        causal_lm_log_prob(Asks(tiny_config()), batch)


def test_a_packed_batch_with_an_image_is_refused():
    class Sees(transformers.LlamaForCausalLM):
        def forward(
            self, *args: Any, position_ids: Any = None, pixel_values: Any = None, **kwargs: Any
        ) -> Any:
            return super().forward(*args, position_ids=position_ids, **kwargs)

    batch = CompletionCollator(0, packing=True)(rows(4)) | {"pixel_values": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match=r"packing=True, but .*pixel_values.*packing=False"):
        causal_lm_log_prob(Sees(tiny_config()), batch)


def test_the_check_runs_once_and_leaves_no_trace():
    model, batch = random_model().train(), CompletionCollator(0)(rows(4))
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, widths = torch.get_rng_state(), []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for _ in range(2):
        causal_lm_log_prob(model, batch)
    hook.remove()
    assert widths.count((1, 32)) == 2
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks and not model.lm_head._forward_pre_hooks
