"""Records with images: from messages to the loss, by families of models, with their own processors."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image
from vision import FAMILIES, SHOWN, model, picture, processor

from topr_kernels.hf import (
    CompletionCollator,
    TOPRConfig,
    TOPRTrainer,
    causal_lm_topr_loss,
    forward,
    prepare_records,
    score_behavior,
)
from topr_kernels.hf.fields import TOKENS
from topr_kernels.hf.images import has_images, opened
from topr_kernels.hf.padding import PaddingCheck
from topr_kernels.hf.sharing import warn_unshared

Row = dict[str, Any]
IMAGE = {"type": "image"}
#: As its chat template writes it, and the pictures of each record in order.
TEXTS = ["u:%how many?;a:12<eos>", "u:a%b%;a:345<eos>", "u:no picture;a:7<eos>"]
PICTURES = [[picture(16, 16)], [picture(32, 16, 1), picture(16, 32, 2)], []]


def said(text: str) -> Row:
    return {"type": "text", "text": text}


def records(**changes: Any) -> list[Row]:
    """One picture, two of other sizes, and none."""
    asked = [[IMAGE, said("how many?")], [said("a"), IMAGE, said("b"), IMAGE], "no picture"]
    answers = ["12", "345", "7"]
    return [
        {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": answer}],
            "reward": reward,
            **({"images": images} if images else {}),
            **changes,
        }
        for content, answer, reward, images in zip(
            asked, answers, [1.0, -1.0, -0.5], PICTURES, strict=True
        )
    ]


def collator(family: str, **options: Any) -> CompletionCollator:
    return CompletionCollator(0, processor=processor(family), **options)


def own_log_probs(family: str, trained: Any) -> list[torch.Tensor]:
    """Of each completion, by the processor's and the model's own calls on the whole text alone."""
    found = []
    for text, images in zip(TEXTS, PICTURES, strict=True):
        given = processor(family)(
            text=[text.replace("%", SHOWN[family])],
            images=[images] if images else None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        if "mm_token_type_ids" not in processor(family).model_input_names and family != "gemma3":
            # The tokenizer's own.
            given.pop("token_type_ids", None)
        answer = len(text.rpartition("a:")[2].replace("<eos>", "$"))
        logits = trained(**given).logits[0, -answer - 1 : -1]
        ids = given["input_ids"][0, -answer:]
        found.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str):
    """Two pictures of unlike size, one, and none, in one batch, padded; one record alone, without."""
    trained = model(family)
    with torch.no_grad():
        expected = own_log_probs(family, trained)
    ready = prepare_records(records(), processor(family))
    for size in (3, 1):
        mu = score_behavior(trained, ready, collator(family), batch_size=size, progress=False)
        for found, own in zip(mu, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), own, rtol=1e-5, atol=1e-5)
    # Off-policy: negatives have weights below 1.
    scored = [
        {**record, "behavior_log_prob": [x + 0.1 * i for x in values]}
        for i, (record, values) in enumerate(zip(ready, mu, strict=True))
    ]
    batch = collator(family)(scored)
    out = causal_lm_topr_loss(trained, batch, grad_tolerance=0.0)
    out.loss.backward()
    gradients = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    assert any("vision" in n or "visual" in n for n in gradients)
    trained.zero_grad()
    loss = 0
    for record, log_prob in zip(scored, own_log_probs(family, trained), strict=True):
        ratio = (log_prob.sum() - torch.tensor(record["behavior_log_prob"]).sum()).detach().exp()
        weight = 1.0 if record["reward"] > 0 else float(ratio.clamp(0, 1))
        loss = loss - weight * record["reward"] * log_prob.mean() / 3
    loss.backward()
    for name, p in trained.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        if name in gradients or own.any():
            torch.testing.assert_close(
                gradients[name], own, rtol=1e-3, atol=1e-5 * (1 + float(own.abs().max()))
            )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_batch_of_text_alone_is_the_one_without_a_processor(family: str):
    trained, tokens = model(family), processor(family).tokenizer
    ready = prepare_records(records()[2:], processor(family))
    assert ready == prepare_records(
        records()[2:],
        tokens,
        chat_template_kwargs={"chat_template": processor(family).chat_template},
    )
    scored = [{**ready[0], "behavior_log_prob": [-1.0, -2.0]}] * 2
    batch, plain = collator(family)(scored), CompletionCollator(0)(scored)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(torch.as_tensor(batch[n]), torch.as_tensor(x)) for n, x in plain.items())
    trained.train()
    assert causal_lm_topr_loss(trained, batch).loss.isfinite()


def trainer_of(family: str, trained: Any, folder: Any, data: Any, **options: Any) -> TOPRTrainer:
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "behavior": "initial",
        "save_strategy": "no",
        **options,
    }
    return TOPRTrainer(
        model=trained,
        args=TOPRConfig(**args),
        train_dataset=data,
        processing_class=processor(family),
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava_next", "idefics3"])
def test_ratios_are_exactly_one_before_the_first_update(family: str, tmp_path: Any):
    trained = model(family)
    seen = []

    class Sees(TOPRTrainer):
        def _topr(self, *args: Any) -> Any:
            out = super()._topr(*args)
            seen.append(out.weight.tolist())
            return out

    ready = trainer_of(family, trained, tmp_path, records(), max_steps=2)
    ready.__class__ = Sees
    before = {n: p.clone() for n, p in trained.named_parameters()}
    ready.train()
    assert seen[0] == [1.0, 1.0, 1.0] and seen[1] != seen[0]
    moved = [n for n, p in trained.named_parameters() if not torch.equal(p, before[n])]
    assert any("vision" in n or "visual" in n for n in moved)
    assert any("q_proj" in n for n in moved)


# --- what images may be ----------------------------------------------------------------------------


def encoded(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_images_may_be_given_in_many_ways(tmp_path: Any):
    """A list of what stands for the same picture; all give the same tokens and the same tensors."""
    image = PICTURES[1][0]
    file, data = tmp_path / "a.png", base64.b64encode(encoded(image)).decode()
    file.write_bytes(encoded(image))
    url = f"data:image/png;base64,{data}"
    forms = [image, str(file), file, encoded(image), url, {"bytes": encoded(image), "path": None}]
    parts = [
        *({"type": "image", "image": form} for form in forms[:5]),
        {"type": "image", "path": str(file)},
        {"type": "image", "url": url},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        # As Arrow fills fields up.
        {"type": "image", "image": image, "text": None},
    ]

    def record(part: Row, **changes: Any) -> Row:
        asked = [{"role": "user", "content": [part, said("?")]}]
        answer = [{"role": "assistant", "content": [said("1")]}]
        return {"prompt": asked, "completion": answer, "reward": 1.0, **changes}

    text = "u:<|vision_start|><|image_pad|><|vision_end|>?;a:"
    rows = [
        *(record(IMAGE, images=[form]) for form in forms),
        *map(record, parts),
        {"prompt": text, "completion": "1", "reward": 1.0, "images": [image]},
    ]
    ready = prepare_records(rows, processor("qwen2_vl"))
    assert len({str([x[n] for n in TOKENS]) for x in ready}) == 1
    assert ready[0]["images"] == [image], "kept as they were given"
    batches = [collator("qwen2_vl")([{**x, "behavior_log_prob": [-1.0, -1.0]}]) for x in ready]
    assert all(torch.equal(b["pixel_values"], batches[0]["pixel_values"]) for b in batches)
    # Not the picture in other colours or upside down.
    plain = processor("qwen2_vl").image_processor([image], return_tensors="pt")
    assert torch.equal(batches[0]["pixel_values"], plain["pixel_values"])


def test_images_are_upright_and_in_colour(tmp_path: Any):
    """As the file says; with transparency, palettes and greys as RGB."""
    image, turned = picture(32, 16), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # Seen rotated by 90 degrees.
    image.save(turned, exif=exif)
    found = opened(turned, 0, "record 0")
    assert found.size == (16, 32) and found.tobytes() == image.rotate(-90, expand=True).tobytes()
    for mode in ("RGBA", "P", "L"):
        assert opened(image.convert(mode), 0, "record 0").mode == "RGB"


def test_collators_are_sent_to_other_processes():
    ready = prepare_records(records()[:1], processor("llava"))
    scored = [{**ready[0], "behavior_log_prob": [-1.0] * 3}]
    here = collator("llava")
    there = pickle.loads(pickle.dumps(here))
    assert torch.equal(there(scored)["pixel_values"], here(scored)["pixel_values"])


DROPS_IMAGES = (
    "{% for m in messages %}{{ m.content if m.content is string else m.content[1].text }}"
    "{% endfor %}"
)
REFUSED = [
    ({"images": ["none.png"]}, r"number 0: cannot be read \(FileNotFoundError.*none.png.*download"),
    ({"images": ["https://x.y/z.png"]}, r"number 0: cannot be read .*download what is elsewhere"),
    ({"images": [b"no image"]}, r"number 0: cannot be read \(UnidentifiedImageError"),
    ({"images": ["data:image/png,zzz"]}, r"cannot be read .*expected base64"),
    ({"images": "a.png"}, r"got a str; expected a list of images"),
    ({"images": PICTURES[0] + [3]}, r"number 1: got a int; expected a path"),
    ({"images": PICTURES[1]}, r"holds 2 images for 1 image parts"),
    ({"images": []}, r"holds 0 images for 1 image parts.*write a part"),
    ({"image": PICTURES[0]}, r"field 'image': expected images in a list under the name 'images'"),
    ({"videos": ["a.mp4"]}, r"field 'videos': expected none, video and sound are not given"),
    ({"pixel_values": [1.0]}, r"'pixel_values': expected none.*tensors of images are made of"),
    (
        {"prompt": "<|image_pad|><|image_pad|>", "completion": "1"},
        r"holds 1 .*<\|image_pad\|>.* 2 ",
    ),
    ({"prompt": "what?", "completion": "1"}, r"holds 1 .*<\|image_pad\|>.* 0 times"),
    (
        {"prompt": [{"role": "user", "content": [IMAGE, said("<|image_pad|>")]}]},
        r"holds 1 images, but the text of the messages has '<\|image_pad\|>'.* 2 times",
    ),
    (
        {"chat_template_kwargs": {"chat_template": DROPS_IMAGES}},
        r"makes runs of \[4\] image tokens of them, but the token ids have \[\].*must write each",
    ),
    (
        {"prompt": [{"role": "user", "content": [IMAGE, {"type": "video", "video": "x"}]}]},
        r"content of type 'video'; .*video, sound and files are not given",
    ),
    (
        {"completion": [{"role": "assistant", "content": [IMAGE]}]},
        r"got a message of the assistant with an image",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": 3}]}], "images": []},
        r"field 'prompt': got an image part with a int; expected a path",
    ),
    ({"images": [picture(8, 4000)]}, r"Qwen2VLProcessor failed on images of 8 x 4000 pixels"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_images_that_cannot_be_given_to_the_model_are_refused(changes: Row, message: str):
    rows = [records()[2], {**records()[0], **changes}]
    with pytest.raises((TypeError, ValueError), match=f"(?s)record 1.*{message}"):
        prepare_records(rows, processor("qwen2_vl"))


def test_images_without_a_processor_are_refused(tmp_path: Any):
    ready = prepare_records(records(), processor("llava"))
    remedy = r"'images': .*with the model's processor in the place of its tokenizer"
    with pytest.raises(ValueError, match=f"record 0, field {remedy}"):
        prepare_records(ready, processor("llava").tokenizer)
    with pytest.raises(ValueError, match=r"with content of type 'image'.*processor"):
        prepare_records(records(), processor("llava").tokenizer)
    with pytest.raises(ValueError, match=f"record 0 of the batch, field {remedy}"):
        CompletionCollator(0)([{**ready[0], "behavior_log_prob": [-1.0] * 3}])
    with pytest.raises(ValueError, match=f"record 0 of the data, field {remedy}"):
        score_behavior(model("llava"), ready, CompletionCollator(0), batch_size=2, progress=False)


def test_other_images_than_the_tokens_were_made_with_are_refused():
    ready = prepare_records(records(), processor("qwen2_vl"))
    make = collator("qwen2_vl")
    a, b = ready[1]["images"]
    for images, message in (
        ([b, a, a], r"makes runs of \[8, 8, 8\]"),
        ([a], r"makes runs of \[8\] image tokens of them, but the token ids have \[8, 8\]"),
        ([a, picture(16, 16)], r"makes runs of \[8, 4\]"),
    ):
        rows = [{**ready[0], "behavior_log_prob": [-1.0] * 3}]
        rows += [{**ready[1], "images": images, "behavior_log_prob": [-1.0] * 4}]
        with pytest.raises(ValueError, match=f"record 1 of the batch, field 'images': .*{message}"):
            make(rows)
    without = {n: x for n, x in ready[1].items() if n != "images"}
    for row in (without, {**without, "images": []}):
        with pytest.raises(ValueError, match="record 0 of the batch: has 16 image tokens, but no"):
            make([{**row, "behavior_log_prob": [-1.0] * 4}])
        with pytest.raises(ValueError, match="record 0: has 16 image tokens, but no images"):
            prepare_records([row], processor("qwen2_vl"))
    written = {**ready[1], "behavior_log_prob": [-1.0] * 4}
    written |= {"prompt_token_ids": ready[1]["prompt_token_ids"][:4]}
    written |= {"completion_token_ids": ready[1]["prompt_token_ids"][4:8]}
    with pytest.raises(
        ValueError, match=r"has the image token 6 at position 0 \(4 of the sequence\)"
    ):
        make([written])


def test_records_with_images_are_not_cut():
    longer = records()[2]
    longer["prompt"] = [{"role": "user", "content": "x" * 40}]
    options = {"max_length": 20, "truncate": "prompt_left"}
    (cut,) = prepare_records([longer], processor("qwen2_vl"), **options)
    assert len(cut["prompt_token_ids"]) == 18
    with pytest.raises(ValueError, match=r"record 0, field 'images': .* 20 tokens .*is not cut"):
        prepare_records(records(), processor("qwen2_vl"), **options)


def test_a_template_that_reads_parts_alone_loses_no_text():
    """As those of SmolVLM and Idefics, which write nothing for a content that is a text."""
    parts = processor("idefics3").chat_template.replace(
        "{% if m.content is string %}{{ m.content }}{% else %}", "{% if true %}"
    )
    ready = prepare_records(
        records(), processor("idefics3"), chat_template_kwargs={"chat_template": parts}
    )
    assert ready == prepare_records(records(), processor("idefics3"))


def test_turns_of_others_may_hold_images():
    """A tool answers with a picture: its tokens are context, and the model sees it."""
    whole = [
        {"role": "assistant", "content": "look"},
        {"role": "tool", "content": [IMAGE, said("!")]},
        {"role": "assistant", "content": "2"},
    ]
    row = {"prompt": records()[0]["prompt"], "completion": whole, "reward": -1.0}
    row["images"] = [PICTURES[0][0], PICTURES[1][0]]
    (ready,) = prepare_records([row], processor("qwen2_vl"))
    text = processor("qwen2_vl").tokenizer.decode(ready["completion_token_ids"])
    assert text.replace(" ", "").startswith("look<eos>;t:<|vision_start|><|image_pad|>")
    mask = ready["completion_mask"]
    assert sum(mask) == len("look$") + len("2$") and mask[:5] == [1] * 5 and mask[-2:] == [1, 1]
    trained, make = model("qwen2_vl"), collator("qwen2_vl")
    with pytest.raises(ValueError, match="images after the last message of the assistant"):
        prepare_records([{**row, "completion": whole[:2]}], processor("qwen2_vl"))
    (mu,) = score_behavior(trained, [ready], make, batch_size=1, progress=False)
    other = {**ready, "images": [PICTURES[0][0], picture(32, 16, 9)]}
    (blind,) = score_behavior(trained, [other], make, batch_size=1, progress=False)
    assert mu[:5] == pytest.approx(blind[:5], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(mu[-2:], blind[-2:], strict=True)) > 1e-2


# --- data sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [True, False])
def test_data_sets_keep_files_and_not_pixels(decoded: bool, tmp_path: Any):
    datasets = pytest.importorskip("datasets")
    paths = []
    for k, image in enumerate([*PICTURES[0], *PICTURES[1]]):
        paths.append(str(tmp_path / f"{k}.png"))
        image.save(paths[-1])
    rows = records()
    for row, images in zip(rows, [paths[:1], paths[1:], []], strict=True):
        # Arrow's columns hold one kind: a message is its parts.
        row["images"] = images
        content = row["prompt"][0]["content"]
        row["prompt"][0]["content"] = [said(content)] if isinstance(content, str) else content
    expected = prepare_records(rows, processor("gemma3"))
    data = datasets.Dataset.from_list(rows)
    if decoded:
        data = data.cast_column("images", datasets.List(datasets.Image()))
    ready = prepare_records(data, processor("gemma3"))
    again = prepare_records(ready, processor("gemma3"))
    for found in (ready, again):
        for i, record in enumerate(expected):
            assert all(found[i][name] == record[name] for name in TOKENS)
            assert all(isinstance(x, dict if decoded else str) for x in found[i]["images"])
    trained = trainer_of("gemma3", model("gemma3"), tmp_path, data, max_steps=1)
    trained.train()
    assert trained.state.log_history[0]["log_ratio_negative_max"] == 0.0
    held = {"type": "image", "image": paths[0]}
    rows[0]["prompt"][0]["content"] = [held, said("?")]
    with pytest.raises(ValueError, match=r"record 0, field 'prompt': .*holds its image itself"):
        prepare_records(datasets.Dataset.from_list(rows), processor("gemma3"))


# --- sharing, packing, padding ---------------------------------------------------------------------


def test_prompts_with_images_are_not_shared(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    rows = records()[1:2] * 4
    trained = model("llava")
    with pytest.raises(ValueError, match="share_prefix=True, but records hold images"):
        trainer_of("llava", trained, tmp_path, rows, share_prefix=True)
    warn_unshared.cache_clear()
    ready = trainer_of("llava", trained, tmp_path, rows, max_steps=1)
    ready.train()
    assert "runs its prompt anew, since records hold images" in caplog.text
    assert "tokens_saved" not in ready.state.log_history[0]
    scored = [
        {**x, "behavior_log_prob": [-1.0] * 4} for x in prepare_records(rows, processor("llava"))
    ]
    assert "tree_ends" not in collator("llava", share_prefix=True)(scored)
    # Text alone is shared, as in any other model.
    text = prepare_records(records()[2:] * 4, processor("llava"))
    scored = [{**x, "behavior_log_prob": [-1.0] * 2} for x in text]
    assert "tree_ends" in collator("llava", share_prefix=True)(scored)


def test_what_would_hang_or_cut_images_up_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    ready = trainer_of("llava", model("llava"), tmp_path, records())
    assert [bool(x.get("images")) for x in ready.train_dataset] == [True, True, False]
    monkeypatch.setattr(TOPRConfig, "world_size", 2)
    ready.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="some records have images and some none, but a sharded"):
        ready._fit_images(ready.train_dataset, None)
    with pytest.raises(ValueError, match="eval_dataset: some records have images and some none"):
        ready._fit_images(ready.train_dataset[:2], {"held out": ready.train_dataset})
    ready._fit_images(ready.train_dataset[:2], None)
    monkeypatch.setattr(TOPRConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process drives 2 GPUs"):
        ready._fit_images(ready.train_dataset[:2], None)


def test_a_column_without_an_image_changes_nothing():
    datasets = pytest.importorskip("datasets")
    rows = [{"images": x} for x in (None, [], None)]
    data = datasets.Dataset.from_list(rows)
    assert not has_images(rows) and not has_images(data)
    assert has_images([*rows, {"images": ["a.png"]}])


def test_packing_is_refused_beside_images():
    ready = prepare_records(records(), processor("llava"))
    scored = [{**x, "behavior_log_prob": [-1.0] * len(x[TOKENS[1]])} for x in ready]
    with pytest.raises(ValueError, match="packing: got True with a batch that has images"):
        collator("llava", packing=True)(scored)
    assert collator("llava", packing=True)(scored[2:])["cu_seq_lens_q"].tolist() == [0, 17]


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava"])
def test_padding_behind_the_tokens_moves_their_kinds_too(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """As for a model with states: what has columns moves, pictures stay with their tokens."""
    trained, asked = model(family), []
    ready = prepare_records(records(), processor(family))
    options = {"batch_size": 3, "progress": False}
    mu = score_behavior(trained, ready, collator(family), **options)

    def behind(*args: Any, **_: Any) -> PaddingCheck:
        asked.append(args[1])
        return PaddingCheck(1.0, 0.0, 1e-4, "a state")

    monkeypatch.setattr(forward, "check_padding_once", behind)
    for found, own in zip(
        score_behavior(trained, ready, collator(family), **options), mu, strict=True
    ):
        assert found == pytest.approx(own, abs=1e-5)
    assert asked, "images do not spare a model the check"


# --- adapters and frozen towers --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_adapters_and_frozen_towers_get_the_gradients_that_were_asked_for(
    family: str, tmp_path: Any
):
    peft = pytest.importorskip("peft")
    base = model(family)
    language = r".*(language_model|text_model)\.layers.*\.(q_proj|v_proj|down_proj)"
    config = peft.LoraConfig(r=2, target_modules=language, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    before = {n: p.clone() for n, p in adapted.named_parameters()}
    ready = trainer_of(
        family, adapted, tmp_path, records(), max_steps=1, gradient_checkpointing=True
    )
    ready.train()
    assert ready.state.log_history[0]["log_ratio_negative_max"] == 0.0
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n} and len(moved) == 12
    assert not any("vision" in n or "visual" in n for n in moved)

    frozen = model(family)
    tower = frozen.model.visual if family.startswith("qwen2") else frozen.model.vision_model
    tower.requires_grad_(False)
    before = {n: p.clone() for n, p in frozen.named_parameters()}
    trainer_of(family, frozen, tmp_path, records(), max_steps=1).train()
    still = {n for n, p in frozen.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n, p in frozen.named_parameters() if not p.requires_grad}
