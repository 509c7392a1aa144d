"""Images in the recipe: from a file of questions to a trained model, by commands and in Python."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("PIL")

from test_recipe_curate import record
from tiny import random_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    LlamaConfig,
)
from vision import model, picture, processor

from topr_kernels.hf import CompletionCollator, completion_logits
from topr_kernels.hf.images import ImageInputs
from topr_kernels.recipe import (
    Record,
    RecordError,
    TrainSettings,
    load_model,
    read_records,
    score,
    train,
    write_records,
)
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.files import read_json
from topr_kernels.recipe.generate import complete, prompt_token_ids, read_prompts, stop_token_ids
from topr_kernels.recipe.models import _auto_class
from topr_kernels.recipe.score import max_log_ratio

SIZES = [(16, 16), (32, 16), (16, 32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of images with its processor, and a file of questions about pictures."""
    where = tmp_path_factory.mktemp("images")
    model("gemma3").save_pretrained(where / "tiny")
    processor("gemma3").save_pretrained(where / "tiny")
    lines = []
    for k in range(6):
        name = f"{k}.png"
        picture(*SIZES[k % 3], seed=k).save(where / name)
        # One text, six questions.
        lines.append(json.dumps({"question": "how many?", "answer": str(k), "images": [name]}))
    lines.append(json.dumps({"question": "and none?", "answer": "0"}))
    (where / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return where


def run(*argv: Any) -> int:
    return main([str(x) for x in argv])


def test_from_questions_about_pictures_to_a_trained_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.chdir(folder.parent)
    here = Path(folder.name)
    asked = ["--task", f"gsm8k:{here}/questions.jsonl", "--held-out", 2, "--max-new-tokens", 4]
    asked += ["--model", here / "tiny"]
    sampling = ["--chat", "--questions", 5, "--samples", 2, "--sample-batch", 4]
    samples, scored, out = (tmp_path / x for x in ("samples.parquet", "scored.jsonl", "trained"))
    assert run("generate", *asked, "--questions", 5, "--out", samples) == 2
    assert "--chat: the model's chat template says" in capsys.readouterr().err
    assert run("generate", *asked, *sampling, "--out", samples) == 0
    records = read_records(samples)
    shown = {tuple(r.images or ()) for r in records}
    assert all(x[0].startswith(f"{here}/") for x in shown if x) and len(shown) == 5
    assert run("score", "--model", here / "tiny", "--records", samples, "--out", scored) == 0
    assert [r.images for r in read_records(scored)] == [r.images for r in records]
    training = ["--batch-size", 10, "--lr", "1e-2", "--model", here / "tiny"]
    assert run("train", *training, "--records", scored, "--baseline", "-1.5", "--out", out) == 0
    (entry,) = read_json(tmp_path / "trained.json")["figures"]["history"]
    assert entry["log_ratio_positive_max"] == pytest.approx(0, abs=1e-5)
    trained, before = load_model(str(out)), load_model(str(folder / "tiny"))
    assert trained.processor is not None
    moved = {n for n, p in trained.model.named_parameters()
             if not torch.equal(p, before.model.get_parameter(n))}  # fmt: skip
    assert any("vision" in n for n in moved) and any("language" in n for n in moved)
    # The same text about another picture is another question: nothing of the held-out ones was seen.
    assert run("evaluate", *asked[:-1], out, "--chat", "--out", tmp_path / "e.json") == 0
    assert all(
        r.images or r.prompt.startswith("and none") for r in read_records(tmp_path / "e.parquet")
    )


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava_next"])
def test_a_batch_with_pictures_is_sampled_as_each_question_alone(family: str, folder: Path):
    """And each token is the likeliest by the very log-probs that are scored."""
    policy, reads = model(family), processor(family)
    images = [[str(folder / "0.png")], [str(folder / "1.png"), str(folder / "2.png")], []]
    prompts = ["how many?", "more?", "none?"]
    stops = stop_token_ids(reads.tokenizer, one_line=False)
    options: dict[str, Any] = {"max_new_tokens": 5, "seed": 0, "stop_ids": stops, "chat": True}
    together = complete(policy, reads, prompts, images=images, temperature=0.0, **options)
    for prompt, shown, found in zip(prompts, images, together, strict=True):
        given = {"images": [shown], "temperature": 0.0, **options}
        assert complete(policy, reads, [prompt], **given) == [found]
        row = {"prompt_token_ids": found.prompt_token_ids, "completion_token_ids": found.token_ids}
        row |= {"images": shown, "behavior_log_prob": [-1.0] * len(found.token_ids), "reward": 1.0}
        batch = CompletionCollator(0, processor=reads)([row])
        logits = completion_logits(policy, batch)[0, :-1]
        assert logits.argmax(-1).tolist()[-len(found.token_ids) :] == found.token_ids
    with pytest.raises(ValueError, match=r"question 'how many\?': has 1 images; expected .*--chat"):
        prompt_token_ids(reads, "how many?", images=images[0])
    with pytest.raises(ValueError, match="expected the model's processor"):
        prompt_token_ids(reads.tokenizer, "how many?", chat=True, images=images[0])


def test_equal_prompts_with_equal_images_are_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    policy, reads, made = model("gemma3"), processor("gemma3"), []
    expansions = ImageInputs.expansions

    def counted(self: ImageInputs, images: Any, where: str) -> list[str]:
        made.append(self)
        return expansions(self, images, where)

    monkeypatch.setattr(ImageInputs, "expansions", counted)
    images = [[str(folder / "0.png")]] * 3 + [[str(folder / "1.png")]]
    read = read_prompts(policy, reads, ["how many?"] * 4, chat=True, images=images)
    assert len(read.token_ids) == 4 and len(made) == 2
    assert made[0] is made[1], "so that it asks the processor once for its tokens"


def records_of(folder: Path) -> list[Record]:
    """One with a picture in a path, one with two in a URL and a path, and one of text."""
    reads, found = processor("gemma3"), []
    data = base64.b64encode((folder / "1.png").read_bytes()).decode()
    files = [
        [str(folder / "0.png")],
        [f"data:image/png;base64,{data}", str(folder / "2.png")],
        None,
    ]
    for k, images in enumerate(files):
        ids = prompt_token_ids(reads, "how many?", chat=True, images=images or ())
        found.append(record(group=k, reward=1.0 - k, tokens=3, prompt_token_ids=ids,
                            completion_token_ids=[30 + k, 31, 0], images=images,
                            behavior_log_prob=None))  # fmt: skip
    return found


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_records_with_images_survive_a_round_trip(folder: Path, tmp_path: Path, suffix: str):
    path, rows = tmp_path / f"records.{suffix}", records_of(folder)
    write_records(path, rows)
    assert read_records(path) == rows
    write_records(path, rows[2:])
    assert b"images" not in path.read_bytes()


def test_records_with_images_are_scored_and_trained_on_in_python(folder: Path, tmp_path: Path):
    policy, reads, rows = model("gemma3"), processor("gemma3"), records_of(folder)
    options: dict[str, Any] = {"pad_token_id": 0, "batch_size": 3, "processor": reads}
    scored = score(policy, rows, progress=False, **options)
    assert max_log_ratio(policy, scored, **options) == 0
    blind = [dataclasses.replace(scored[0], images=[str(folder / "3.png")]), *scored[1:]]
    assert max_log_ratio(policy, blind, **options) > 1e-2
    (log,) = train(policy, reads, scored, TrainSettings(batch_size=3), checkpoints=tmp_path)
    assert log["log_ratio_positive_max"] == log["log_ratio_negative_max"] == 0


def test_images_that_cannot_be_shown_are_refused_by_record(folder: Path, tmp_path: Path):
    policy, reads, rows = model("gemma3"), processor("gemma3"), records_of(folder)
    lost = [rows[2], dataclasses.replace(rows[0], images=["lost.png"])]
    for given, message in (
        ({"processor": reads}, "record 1, field 'images', number 0: cannot be read .*lost.png"),
        ({}, "record 1, field 'images': has 1, but the model has no processor"),
    ):
        with pytest.raises(RecordError, match=message):
            score(policy, lost, pad_token_id=0, batch_size=2, progress=False, **given)
    with pytest.raises(RecordError, match="record 0, field 'images': has 1, but the model has no"):
        train(random_model(), tiny_tokenizer(), rows[:1], TrainSettings(), checkpoints=tmp_path)
    for changes, message in (
        ({"images": "a.png"}, "'images': expected a list of paths"),
        ({"images": [3]}, r"'images\[0\]': expected a text"),
        ({"image": "a.png"}, "'image': unknown; rename it 'images'"),
    ):
        with pytest.raises(RecordError, match=message):
            Record.from_dict({**rows[2].to_dict(), **changes}, "it")


def test_questions_with_images_are_refused_where_no_model_sees_them(
    folder: Path, tmp_path: Path, capsys: Any
):
    text = tmp_path / "text"
    random_model().save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    asked = ["--task", f"gsm8k:{folder}/questions.jsonl", "--questions", 4, "--held-out", 2]
    asked += ["--max-new-tokens", 2, "--out", tmp_path / "x.parquet"]
    assert run("generate", *asked, "--model", text) == 2
    assert "has no processor for the images of the questions" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"question": "?", "answer": "1", "image": "a.png"}\n')
    asked[1] = f"gsm8k:{tmp_path}/q.jsonl"
    assert run("generate", *asked, "--model", text) == 2
    assert "q.jsonl, line 1, field 'image': expected 'images', a list" in capsys.readouterr().err
    rows = records_of(folder)[:1]
    write_records(tmp_path / "r.parquet", rows)
    flags = ["--records", tmp_path / "r.parquet", "--out", tmp_path / "v.parquet"]
    assert run("verify", "--model", folder / "tiny", *flags) == 2
    assert "which a verifier is not shown" in capsys.readouterr().err


def test_a_model_of_images_whose_text_has_a_class_of_its_own_is_loaded_as_that():
    assert _auto_class(Llama4Config()) is AutoModelForCausalLM
    assert _auto_class(Gemma3Config()) is AutoModelForImageTextToText
    assert _auto_class(LlamaConfig()) is AutoModelForCausalLM
