"""``topr generate|score|curate|train|evaluate``: results, resuming, refusals, dry runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import topr_kernels

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from pipeline import contents, run_shown, shown_commands
from safetensors import SafetensorError
from tiny import random_model, save, tiny_model, tiny_tokenizer

from topr_kernels.recipe import read_records, write_records
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.files import checksum
from topr_kernels.recipe.settings import EvaluateSettings, GenerateSettings, IterateSettings
from topr_kernels.recipe.trained_on import digest

commands, sampling = (
    importlib.import_module(f"topr_kernels.recipe.{name}") for name in ("commands", "sampling")
)
TASK = [
    *("--task", "chain_sum", "--questions", "24", "--held-out", "5", "--max-new-tokens", "6"),
    *("--task-config", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
]
#: Each command with all but the model, the records and --out; whether it wants the model.
FLAGS: dict[str, list[str]] = {
    "generate": [*TASK, "--samples", "4", "--sample-batch", "16"],
    "score": ["--batch-size", "2"],
    "curate": ["--positive-share", "0.3", "--no-dedupe"],
    "train": ["--batch-size", "4", "--lr", "1e-3", "--save-steps", "1"],
    "evaluate": [*TASK, "--eval-samples", "4", "--votes", "3", "--sample-batch", "8"],
}
OUT = {
    "generate": "samples.parquet",
    "score": "scored.jsonl",
    "curate": "curated.parquet",
    "train": "trained",
    "evaluate": "evaluation.json",
}
READS = {"score": "samples.parquet", "curate": "scored.jsonl", "train": "curated.parquet"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of unbroken runs of all commands."""
    folder = tmp_path_factory.mktemp("whole")
    for command in FLAGS:
        assert run(command, folder, model) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(whole, tmp_path / "copy"))


def run(command: str, folder: Path, model: Path, *flags: str, out: str = "") -> int:
    argv = [command, *FLAGS[command], "--out", str(folder / (out or OUT[command]))]
    if command == "evaluate":
        model = folder / "trained" if (folder / "trained").exists() else model
    if command != "curate":
        argv += ["--model", str(model)]
    if command in READS:
        argv += ["--records", str(folder / READS[command])]
    return main([*argv, *flags])


def manifest(folder: Path, command: str) -> dict[str, Any]:
    name = OUT[command] + ("" if command == "evaluate" else ".json")
    return dict(json.loads((folder / name).read_text()))


def test_the_commands_run_one_after_the_other(whole: Path, model: Path):
    samples = read_records(whole / "samples.parquet")
    assert len(samples) == 96 and [r.group for r in samples] == [i // 4 for i in range(96)]
    assert {r.reward for r in samples} == {1.0, -1.0}
    assert all(r.valid is not None and r.sampling.weights for r in samples)
    assert manifest(whole, "generate")["figures"]["records"] == 96
    scored = read_records(whole / "scored.jsonl")
    assert [r.completion for r in scored] == [r.completion for r in samples]
    assert all(r.behavior_log_prob and r.behavior_source == "score" for r in scored)
    curated = read_records(whole / "curated.parquet")
    share = sum(r.reward > 0 for r in curated) / len(curated)
    assert share == pytest.approx(0.3, abs=0.04) and len(curated) < 96
    training = manifest(whole, "train")["figures"]
    assert training["steps"] == len(training["history"]) == -(-len(curated) // 4)
    # The batches that were scored are not those of the training, so only nearly 0.
    assert abs(training["history"][0]["log_ratio_negative_min"]) < 1e-4
    figures = manifest(whole, "evaluate")["figures"]
    assert (figures["questions"], figures["samples"], figures["votes"]) == (5, 4, 3)
    assert len(read_records(whole / "evaluation.parquet")) == 20
    # Nothing but results is left, and no path of this machine in them.
    assert not list(whole.glob(".*")) and not list(whole.rglob("checkpoint*"))
    for path in whole.glob("*.json"):
        assert str(whole.parent) not in path.read_text()
        assert str(model.parent) not in path.read_text()


def test_a_finished_command_does_nothing(copy: Path, model: Path, capsys: Any):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    for command in FLAGS:
        assert run(command, copy, model) == 0
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == before
    assert "sample/s" not in capsys.readouterr().err


@pytest.mark.parametrize("command", list(FLAGS))
def test_a_dry_run_tells_and_writes_nothing(
    command: str, copy: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    before = contents(copy)
    told = {
        "generate": "96 samples (24 questions x 4) in 6 batches",
        "score": "96 records",
        "curate": "baseline for the training",
        "train": "updates",
        "evaluate": "20 samples (5 questions x 4) in 3 batches",
    }
    out = f"new-{OUT[command]}"
    assert run(command, copy, model, "--dry-run", out=out) == 0
    text = capsys.readouterr().out
    assert "starts anew" in text and told[command] in text and f"writes: {copy / out}" in text
    assert run(command, copy, model, "--dry-run") == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    assert contents(copy) == before


def test_what_a_dry_run_tells_is_what_is_done(
    whole: Path, model: Path, tmp_path: Path, capsys: Any
):
    for command, figure in (("train", "steps"), ("score", "records")):
        shutil.copy(whole / READS[command], tmp_path)
        assert run(command, tmp_path, model, "--dry-run") == 0
        said = capsys.readouterr().out
        assert f"{manifest(whole, command)['figures'][figure]} " in said


@pytest.mark.parametrize(
    ("command", "module", "function", "calls"),
    [
        ("generate", "generate", "complete", 3),
        ("score", "score", "_token_log_probs", 40),
        ("train", "train", "_drop_damaged", 1),
        ("evaluate", "generate", "complete", 2),
    ],
)
def test_an_interrupted_command_continues(
    *,
    command: str,
    module: str,
    function: str,
    calls: int,
    whole: Path,
    copy: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    forget(copy, command)
    owner = importlib.import_module(f"topr_kernels.recipe.{module}")
    original, count = getattr(owner, function), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, interrupted)
    assert run(command, copy, model) == 130
    monkeypatch.undo()
    # Nothing that looks like a result, and parts of what was done.
    assert not (copy / OUT[command]).exists()
    assert list(copy.glob(".*.partial/settings.json"))
    assert run(command, copy, model, "--dry-run") == 0
    assert "continues the run that was interrupted" in capsys.readouterr().out
    again: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        again.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, counted)
    assert run(command, copy, model) == 0
    assert contents(copy) == contents(whole)
    # What was done is not done again: 6, 48 and 3 calls in all.
    if command != "train":
        done = {"generate": 2, "score": 32, "evaluate": 1}[command]
        total = {"generate": 6, "score": 48, "evaluate": 3}[command]
        assert len(again) == total - done


def forget(folder: Path, command: str) -> None:
    """Deletes a command's results."""
    for path in folder.glob(f"{Path(OUT[command]).stem}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("generate", ["--samples", "2"], "--samples: 4 there, 2 now"),
        ("score", ["--batch-size", "8"], "--batch-size: 2 there, 8 now"),
        ("curate", ["--method", "anna-karenina"], "--method: 'uniform' there, 'anna-karenina' now"),
        ("train", ["--baseline", "0.5"], "--baseline: 0.0 there, 0.5 now"),
        ("evaluate", ["--votes", "2"], "--votes: 3 there, 2 now"),
    ],
)
def test_other_settings_are_refused(
    command: str, flags: list[str], message: str, copy: Path, model: Path, capsys: Any
):
    before = contents(copy)
    for dry in ([], ["--dry-run"]):
        assert run(command, copy, model, *flags, *dry) == 2
        error = capsys.readouterr().err
        assert message in error and "choose another --out" in error and "Traceback" not in error
    assert contents(copy) == before


def test_other_settings_of_an_unfinished_run_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    # When all batches are there, and before the records are.
    monkeypatch.setattr(commands, "write_records", interrupted)
    assert run("generate", tmp_path, model) == 130
    monkeypatch.undo()
    assert run("generate", tmp_path, model, "--seed", "5") == 2
    assert "--seed: 0 there, 5 now" in capsys.readouterr().err
    (tmp_path / ".samples.parquet.json.partial" / "settings.json").write_text('{"step')
    assert run("generate", tmp_path, model) == 2
    assert "settings.json: damaged" in capsys.readouterr().err


def test_another_input_is_refused(copy: Path, model: Path, capsys: Any):
    """The same settings, but the records or the model under the same name have changed."""
    records = copy / "samples.parquet"
    for path in (records, copy / "samples.parquet.json"):
        path.unlink()
    assert run("generate", copy, model, "--seed", "9") == 0
    assert run("score", copy, model) == 2
    old = manifest(copy, "score")["inputs"]["records"]["sha256"][:12]
    new = checksum(records)[:12]
    changed = f"--records: 'samples.parquet' has changed since: sha256 {old}... there, {new}... now"
    error = capsys.readouterr().err
    assert changed in error and "--model" not in error
    forget(copy, "score")
    assert run("score", copy, model) == 0
    other = chatty(model, copy / "other" / "tiny", ASK)
    assert run("score", copy, other) == 2
    error = capsys.readouterr().err
    assert "--model: 'tiny' has changed since: sha256 " in error and "--records" not in error
    (copy / "moved.parquet").write_bytes(records.read_bytes())
    assert run("score", copy, model, "--records", str(copy / "moved.parquet")) == 2
    error = capsys.readouterr().err
    assert "--records: 'samples.parquet' there, 'moved.parquet' now" in error


def test_a_file_of_somebody_else_is_not_overwritten(model: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "samples.parquet").write_text("precious")
    assert run("generate", tmp_path, model) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "samples.parquet").read_text() == "precious"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
@pytest.mark.parametrize("command", ["score", "curate"])
def test_damaged_results_are_named_by_who_made_and_who_reads_them(
    command: str, damage: str, copy: Path, model: Path, capsys: Any
):
    path = copy / OUT[command]
    reader = {"score": "curate", "curate": "train"}[command]
    forget(copy, reader)
    if damage == "missing":
        path.unlink()
    elif damage == "cut" and path.suffix == ".jsonl":
        # At the end of a line: every line that is left is whole.
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    for who in (command, reader):
        assert run(who, copy, model) == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error and "delete" in error and "Traceback" not in error


def test_a_damaged_part_is_named(
    copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    forget(copy, "generate")
    monkeypatch.setattr(
        commands, "write_records", lambda *args: (_ for _ in ()).throw(OSError("full"))
    )
    assert run("generate", copy, model) == 2
    assert "full" in capsys.readouterr().err
    monkeypatch.undo()
    parts = copy / ".samples.parquet.json.partial" / "parts"
    part = parts / "batch-00002.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    assert run("generate", copy, model) == 2
    assert "batch-00002.parquet: not a Parquet file" in capsys.readouterr().err
    # A whole part in the place of another would repeat its records and lose others.
    shutil.copy(parts / "batch-00001.parquet", part)
    assert run("generate", copy, model) == 2
    assert "batch-00002.parquet: holds other questions" in capsys.readouterr().err
    part.unlink()
    assert run("generate", copy, model) == 0


def test_an_unfinished_input_is_named(copy: Path, model: Path, capsys: Any):
    forget(copy, "score")
    (copy / ".scored.jsonl.json.partial").mkdir()
    assert run("curate", copy, model, out="again.parquet") == 2
    assert "scored.jsonl: unfinished; run the command that makes it" in capsys.readouterr().err


def test_mu_is_the_policy_that_sampled(copy: Path, tmp_path: Path, capsys: Any):
    other = tmp_path / "other"
    save(random_model(1), other)
    assert run("score", copy, other, out="again.parquet") == 2
    error = capsys.readouterr().err
    assert "samples.parquet, record 0, field 'sampling.weights'" in error
    assert "give the model that did" in error


def test_ids_of_another_tokenizer_are_not_scored(copy: Path, tmp_path: Path, capsys: Any):
    other, tokenizer = tmp_path / "other", tiny_tokenizer()
    tiny_model().save_pretrained(other)
    tokenizer.save_pretrained(other)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert run("score", copy, other, out="again.parquet") == 2
    assert "record 0, field 'sampling.tokenizer'" in capsys.readouterr().err


def test_training_takes_the_baseline_that_curate_chose(copy: Path, model: Path, capsys: Any):
    for command in ("curate", "train"):
        forget(copy, command)
    assert run("curate", copy, model, "--balance", "baseline") == 0
    baseline = manifest(copy, "curate")["figures"]["baseline"]
    assert -1 < baseline < 1 and baseline != 0
    assert run("train", copy, model) == 0
    assert manifest(copy, "train")["settings"]["baseline"] == baseline
    # As in the loss: +1 - baseline for the right ones.
    assert run("train", copy, model, "--baseline", "0", out="plain") == 0
    histories = [
        json.loads((copy / f"{name}.json").read_text())["figures"]["history"]
        for name in ("trained", "plain")
    ]
    assert histories[0][0]["loss"] != histories[1][0]["loss"]


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path, model: Path, capsys: Any):
    (tmp_path / "scored.jsonl").write_text("")
    assert run("curate", tmp_path, model) == 2
    assert "scored.jsonl: holds no records" in capsys.readouterr().err
    assert run("score", tmp_path, model) == 2
    assert "samples.parquet: no such file" in capsys.readouterr().err


def test_unscored_records_do_not_train(
    copy: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    # Before the model is loaded.
    monkeypatch.setattr("topr_kernels.recipe.commands.Models", None)
    argv = ["train", "--model", str(model), "--records", str(copy / "samples.parquet")]
    assert main([*argv, "--out", str(copy / "never")]) == 2
    said = capsys.readouterr().err
    assert "samples.parquet, record 0, field 'behavior_log_prob': missing (a reward of -1" in said
    assert "; run score first" in said
    assert not (copy / "never").exists()


def test_two_processes_do_not_work_on_one_result(model: Path, tmp_path: Path, capsys: Any):
    steps = importlib.import_module("topr_kernels.recipe.steps")
    with steps.locked(tmp_path / ".samples.parquet.json.partial"):
        assert run("generate", tmp_path, model) == 2
    assert "another process is working there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "0"], "questions: got 0; expected at least 1"),
        (["--questions", "500"], "count: chain_sum gave only"),
        (
            ["--task", "aritmetic"],
            "--task aritmetic: no task has this name; the nearest are arithmetic,",
        ),
        (["--task", "q q"], "has this name; expected arithmetic, gsm8k:FILE, math:FILE, or a data"),
        (["--task", "no/q.jsonl"], "say gsm8k:no/q.jsonl or math:no/q.jsonl"),
        (["--task", __file__], f"say gsm8k:{__file__} or math:{__file__}"),
        (["--task-config", "[1]"], "task_config: got [1]"),
        (["--task-config", "{min"], "task_config: got '{min'; not JSON"),
        (["--task", "arithmetic"], "'arithmetic', which has no settings; leave it out"),
        (["--task", "gsm8k:none.jsonl"], "'gsm8k:none.jsonl', which has no settings"),
        (["--temperature", "nan"], "temperature: got nan; expected a finite number"),
        (["--seed", "100000000000000"], "seed: got 100000000000000; expected at most 4294967295"),
        (["--chat"], "'tiny' has no chat template; leave it out"),
        (["--model", "./none"], "--model ./none: model: no folder './none', and a hub id is"),
        (["--model", "runs/a/model"], "model: no folder 'runs/a/model'"),
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--model", "."], "--model .: model: folder"),
        (
            ["--out", "samples.csv"],
            "out: got 'samples.csv'; expected a name that ends in .parquet or",
        ),
    ],
)
def test_senseless_settings_are_refused(
    flags: list[str], message: str, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    assert run("generate", tmp_path, model, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.glob("samples*"))
    # Nothing was done under them, so they bind nobody.
    assert run("generate", tmp_path, model) == 0


def test_votes_are_at_most_the_samples(model: Path, tmp_path: Path, capsys: Any):
    assert run("evaluate", tmp_path, model, "--votes", "9") == 2
    assert "votes: got 9; expected at most eval_samples, 4" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]):
    for command in FLAGS:
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "example: topr" in text and "continues a run" in text and "None" not in text
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in FLAGS)


def error_of(capsys: Any, *argv: Any) -> str:
    """What a command that is refused says, the dry run of it as well."""
    said = []
    capsys.readouterr()
    for dry in (["--dry-run"], []):
        assert main([*map(str, argv), *dry]) == 2
        said.append(str(capsys.readouterr().err))
    assert said[0] == said[1] and "Traceback" not in said[0]
    return said[0]


# --- training questions are not held out -----------------------------------------------------


def test_a_model_is_not_measured_on_what_it_was_trained_on(
    copy: Path, model: Path, tmp_path: Path, capsys: Any
):
    trained = copy / "trained"
    known = {digest(r.prompt) for r in read_records(copy / "curated.parquet")}
    assert (trained / "trained_on.txt").read_text() == "".join(f"{d}\n" for d in sorted(known))
    other = ["evaluate", *FLAGS["evaluate"], "--out", copy / "other.json"]
    for flags in (["--question-seed", 1, "--held-out", 40], ["--held-out", 40]):
        error = error_of(capsys, *other, *flags, "--model", trained)
        assert "of the 40 held-out questions are among those that the model 'trained'" in error
        assert "--question-seed, --held-out" in error and not (copy / "other.json").exists()
        # The model that it was trained from may be asked anything.
        assert main([*map(str, [*other, *flags, "--model", model]), "--dry-run"]) == 0
    assert main([*map(str, [*other, "--model", trained]), "--dry-run"]) == 0
    # What the start was trained on stays known.
    few = [r for r in read_records(copy / "curated.parquet") if r.group < 4]
    added = dataclasses.replace(few[0], prompt="asked nowhere else")
    write_records(copy / "few.jsonl", [*few, added])
    argv = ["train", "--model", trained, "--records", copy / "few.jsonl", "--out", copy / "next"]
    assert main([*map(str, argv)]) == 0
    both = (copy / "next" / "trained_on.txt").read_text().split()
    assert set(both) == known | {digest("asked nowhere else")}


# --- mu --------------------------------------------------------------------------------------


def test_the_baseline_of_curate_survives_a_later_score(copy: Path, model: Path, capsys: Any):
    forget(copy, "curate")
    assert run("curate", copy, model, "--balance", "baseline") == 0
    baseline = manifest(copy, "curate")["figures"]["baseline"]
    again = copy / "again.parquet"
    argv = ["score", "--model", model, "--records", copy / "curated.parquet", "--out", again]
    assert main([*map(str, argv)]) == 0
    assert "baseline" not in manifest(copy, "score")["figures"]
    capsys.readouterr()
    argv = ["train", *FLAGS["train"], "--model", model, "--records", again, "--out", copy / "new"]
    assert main([*map(str, argv)]) == 0
    assert f"baseline {baseline:+.3f}" in capsys.readouterr().out
    assert json.loads((copy / "new.json").read_text())["settings"]["baseline"] == baseline != 0


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("top_p", 0.5), ("temperature", 0.0)])
def test_mu_of_a_cut_softmax_does_not_train(
    name: str, value: float, whole: Path, model: Path, tmp_path: Path, capsys: Any
):
    records = [
        dataclasses.replace(
            r,
            sampling=dataclasses.replace(r.sampling, **{name: value}),  # type: ignore[arg-type]
            behavior_source="sampler",
        )
        for r in read_records(whole / "curated.parquet")
    ]
    write_records(tmp_path / "cut.jsonl", records)
    argv = ["train", "--model", model, "--records", tmp_path / "cut.jsonl"]
    error = error_of(capsys, *argv, "--out", tmp_path / "never")
    assert f"record 0, field 'sampling.{name}': got {value}" in error


# --- flags -----------------------------------------------------------------------------------


def test_flags_are_not_abbreviated(model: Path, tmp_path: Path, capsys: Any):
    """An abbreviated --config would not be read, and its settings ignored."""
    for flags in (["generate", "--conf", "x.yaml"], ["demo", "--quest", "8"]):
        with pytest.raises(SystemExit) as status:
            main([*flags, "--out", str(tmp_path / "s.parquet")])
        assert status.value.code == 2
        assert f"no flag {flags[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags", "meant"),
    [
        (
            "generate",
            ["--max-new-token", "8"],
            "no flag --max-new-token; did you mean --max-new-tokens?",
        ),
        ("generate", ["--held-uot=8"], "no flag --held-uot; did you mean --held-out?"),
        (
            "train",
            ["--records", "r", "--learning-rate", "1"],
            "did you mean --lr?",
        ),
        ("generate", ["--heldout", "8"], "no flag --heldout; did you mean --held-out?"),
        ("generate", ["--chat", "true"], "unexpected argument 'true' after --chat"),
        # The text of --out once more.
        ("generate", ["--chat", "x.parquet"], "'x.parquet' after --out or --chat"),
        ("generate", ["--samples", "many"], "--samples: got 'many'; expected a whole number"),
        ("generate", ["--chat=yes"], "got 'yes'; expected no value, or true or false in a file"),
        ("demo", ["--xyzzy"], "no flag --xyzzy (see topr demo --help)"),
        ("reward", ["--reward", "m:f", "--try", "f", "--tyr"], "did you mean --try?"),
    ],
)
def test_a_flag_that_is_not_there_is_told_with_the_one_that_was_meant(
    command: str, flags: list[str], meant: str, capsys: Any
):
    out = [] if command == "reward" else ["--out", "x.parquet"]
    with pytest.raises(SystemExit) as status:
        main([command, *out, *flags])
    said = capsys.readouterr().err
    assert status.value.code == 2 and meant in said and said.count("\n") == 1


def test_a_name_in_a_config_that_is_no_flag_is_told(model: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "c.yaml").write_text("no_debug: true\nheld-out: 3\nmax_new_token: 8\n")
    argv = ["generate", "--config", tmp_path / "c.yaml", "--out", tmp_path / "s.parquet"]
    error = error_of(capsys, *argv)
    assert (
        "c.yaml, max_new_token: topr generate has no such flag; did you mean max_new_tokens?"
        in error
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("samples: many", "samples: got 'many'; expected a whole number"),
        ("temperature: 20%", "temperature: got '20%'; expected a number"),
        ("chat: maybe", "chat: got 'maybe'; expected no value, or true or false in a file"),
        ("temperature: false", "temperature: unrecognized arguments: --no-temperature"),
        ("no_chat: false", "no_chat: got false; write chat: true"),
        ("backend: mine", "backend: invalid choice: 'mine' (choose from "),
    ],
)
def test_a_wrong_value_in_a_config_is_told_with_its_file(
    line: str, told: str, model: Path, tmp_path: Path, capsys: Any
):
    (tmp_path / "c.yaml").write_text(line)
    argv = ["generate", "--config", tmp_path / "c.yaml", "--out", tmp_path / "s.parquet"]
    assert f"c.yaml, {told}" in error_of(capsys, *argv)


def test_a_config_may_say_that_it_is_no_dry_run(model: Path, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("dry_run: false\n")
    assert run("generate", tmp_path, model, "--config", str(tmp_path / "c.yaml"), "--dry-run") == 0
    assert not (tmp_path / "samples.parquet").exists()


def test_answers_are_as_long_as_their_task_wants():
    assert GenerateSettings().max_new_tokens == IterateSettings().max_new_tokens == 6
    assert GenerateSettings(task="gsm8k:x.jsonl").max_new_tokens == 512
    assert EvaluateSettings(task="chain_sum").max_new_tokens == 512
    assert EvaluateSettings(test_task="math:x.jsonl").max_new_tokens == 512
    assert GenerateSettings(task="chain_sum", max_new_tokens=3).max_new_tokens == 3


def test_generate_prints_its_figures(model: Path, tmp_path: Path, capsys: Any):
    assert run("generate", tmp_path, model) == 0
    printed = capsys.readouterr().out
    share = 100 * manifest(tmp_path, "generate")["figures"]["positive_share"]
    assert f"96 samples of 24 questions: {share:.1f} % right, " in printed
    assert "% invalid" in printed and "% cut off" in printed


# --- files of somebody else, and damaged ones ------------------------------------------------


def test_a_dry_run_refuses_what_the_command_refuses(copy: Path, model: Path, capsys: Any):
    forget(copy, "generate")
    assert run("generate", copy, model, "--seed", "9") == 0
    (copy / "precious.parquet").write_text("precious")
    base = ["--model", model, "--records", copy / "samples.parquet"]
    error = error_of(capsys, "score", *base, *FLAGS["score"], "--out", copy / "scored.jsonl")
    assert "--records: 'samples.parquet' has changed since" in error
    error = error_of(capsys, "score", *base, "--out", copy / "precious.parquet")
    assert "was not made by this command" in error
    error = error_of(capsys, "evaluate", "--model", model, "--out", copy / "figures")
    assert "out: got 'figures'; expected a name that ends in .json" in error
    error = error_of(capsys, "score", *base[:2], "--records", "x.csv", "--out", copy / "s.jsonl")
    assert "records: got 'x.csv'" in error
    error = error_of(capsys, "iterate", "--temperature", "0", "--out", copy / "iterated")
    assert "temperature: got 0; expected a number above 0" in error


def test_another_json_beside_a_model_is_not_its_manifest(model: Path, tmp_path: Path, capsys: Any):
    mine = Path(shutil.copytree(model, tmp_path / "llama"))
    for text in (
        '{"n_ctx": 4096}',
        "[1]",
        '{"step": "evaluate", "outputs": {"llama.parquet": ""}}',
    ):
        (tmp_path / "llama.json").write_text(text)
        assert run("generate", tmp_path, mine, "--dry-run") == 0
    argv = ["train", "--model", mine, "--records", tmp_path / "r.jsonl", "--out", tmp_path / "x"]
    (tmp_path / "r.jsonl").write_text("")
    (tmp_path / "x.json").write_text("{}")
    assert "x.json: exists, but was not made by this command" in error_of(capsys, *argv)


def test_a_rotten_file_is_named(whole: Path, model: Path, tmp_path: Path, capsys: Any):
    data = bytearray((whole / "samples.parquet").read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (tmp_path / "rotten.parquet").write_bytes(data)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("rotten.parquet", "rotten.parquet: not a Parquet file"),
        ("binary.jsonl", "binary.jsonl: not UTF-8 text"),
    ):
        argv = ["curate", "--records", tmp_path / name, "--out", tmp_path / "c.jsonl"]
        assert message in error_of(capsys, *argv)
    task = ["generate", "--model", model, "--task", f"gsm8k:{tmp_path / 'binary.jsonl'}"]
    error = error_of(capsys, *task, "--out", tmp_path / "s.jsonl")
    assert "binary.jsonl: not UTF-8 text" in error
    half = Path(shutil.copytree(model, tmp_path / "half"))
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("generate", tmp_path, half) == 2
    assert f"--model {half}: model: damaged weights" in capsys.readouterr().err


def test_a_step_that_another_process_finishes_meanwhile_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = importlib.import_module("topr_kernels.recipe.steps")
    out, locked, calls = tmp_path / "out.txt", steps.locked, []
    made = steps.Step("step", tmp_path / "out.txt.json", {}, {}, [out])

    def compute(partial: Path) -> dict[str, Any]:
        calls.append(partial)
        made.draft(out).parent.mkdir()
        made.draft(out).write_text("done")
        return {}

    def step() -> Any:
        return steps.run_step(made, compute)

    def late(folder: Path) -> Any:
        # The other one runs from start to end between the first look and the lock.
        monkeypatch.setattr(steps, "locked", locked)
        step()
        return locked(folder)

    monkeypatch.setattr(steps, "locked", late)
    assert step()["outputs"].keys() == {"out.txt"} and len(calls) == 1
    assert not list(tmp_path.glob(".*"))


def interrupt(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """Has the next call of a function, or a method, of the recipe interrupted."""

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    owner: Any = importlib.import_module(f"topr_kernels.recipe.{module}")
    *classes, method = name.split(".")
    for kind in classes:
        owner = getattr(owner, kind)
    monkeypatch.setattr(owner, method, interrupted)


@pytest.mark.parametrize(
    ("module", "name"), [("train", "_ProgressBar.on_step_end"), ("steps", "move")]
)
def test_an_interrupted_training_deletes_nothing_of_the_users(
    module: str, name: str, whole: Path, copy: Path, model: Path, monkeypatch: Any, capsys: Any
):
    forget(copy, "train")
    interrupt(monkeypatch, module, name)
    assert run("train", copy, model) == 130
    monkeypatch.undo()
    mine = [
        "notes.txt",
        "sub/deep.txt",
        "checkpoint-1/weights",
        "checkpoint-best/x",
        "model.safetensors",
    ]
    for folder in (copy / "trained", copy):
        for file in mine:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(f"mine {file}")
    error = error_of(capsys, *training(copy, model))
    assert f"{copy / 'trained'}: exists, but was not made by this command; move it" in error
    assert all((copy / "trained" / file).read_text() == f"mine {file}" for file in mine)
    (copy / "trained").rename(copy / "moved")
    assert run("train", copy, model) == 0
    for folder in (copy / "moved", copy):
        assert all((folder / file).read_text() == f"mine {file}" for file in mine)
    found = contents(copy)
    assert {name: found[name] for name in contents(whole)} == contents(whole)


def training(folder: Path, model: Path) -> list[Any]:
    argv = ["train", *FLAGS["train"], "--model", model, "--records", folder / READS["train"]]
    return [*argv, "--out", folder / OUT["train"]]


def test_a_file_that_the_user_puts_there_meanwhile_is_kept(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    """While the command runs, and after it was interrupted; a link to nothing as well."""
    samples, original = tmp_path / "samples.parquet", commands.write_records

    def write_both(path: Path, records: Any) -> None:
        original(path, records)
        samples.write_text("mine")

    monkeypatch.setattr(commands, "write_records", write_both)
    assert run("generate", tmp_path, model) == 2
    assert "samples.parquet: exists, but was not made" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("generate", tmp_path, model) == 2
    assert samples.read_text() == "mine"
    samples.unlink()
    samples.symlink_to(tmp_path / "elsewhere")
    assert run("generate", tmp_path, model) == 2
    assert samples.is_symlink()
    samples.unlink()
    # What was sampled is moved, not sampled again.
    interrupt(monkeypatch, "generate", "complete")
    assert run("generate", tmp_path, model) == 0


@pytest.mark.parametrize("flags", [["--model", "./none"], ["--chat"]])
@pytest.mark.parametrize("command", ["generate", "evaluate", "iterate"])
def test_a_refused_run_leaves_nothing_behind(
    command: str, flags: list[str], model: Path, tmp_path: Path, capsys: Any
):
    out = tmp_path / "new" / "deeper" / OUT.get(command, "run")
    argv = [command, *TASK, "--model", str(model), "--out", str(out), *flags]
    assert main(argv) == 2
    assert not list(tmp_path.iterdir())


def test_a_run_in_the_users_folder_leaves_what_is_theirs(model: Path, tmp_path: Path, capsys: Any):
    argv = ["iterate", *TASK, "--model", model, "--out", tmp_path]
    for name in ("settings.json", "report.json"):
        (tmp_path / name).write_text('{"mine": 1}')
        assert f"{name}: exists, but was not made by this command" in error_of(capsys, *argv)
        assert (tmp_path / name).read_text() == '{"mine": 1}'
        (tmp_path / name).unlink()


# --- what would otherwise pass in silence ----------------------------------------------------


def test_answers_that_are_all_wrong_are_warned_of_once(whole: Path, tmp_path: Path, capsys: Any):
    silly = save(random_model(), tmp_path / "silly")
    with pytest.warns(
        UserWarning, match=r"none of the 96 answers in samples\.parquet is right"
    ) as w:
        assert run("generate", tmp_path, silly) == 0
    said = [str(x.message) for x in w if "is right" in str(x.message)]
    assert len(said) == 1 and "% unreadable, " in said[0] and "--max-new-tokens" in said[0]
    with pytest.warns(UserWarning, match=r"none of the 20 answers in evaluation\.parquet is right"):
        assert run("evaluate", tmp_path, silly) == 0
    argv = ["curate", "--records", str(tmp_path / "samples.parquet")]
    with pytest.warns(UserWarning, match=r"none of the 96 answers in samples\.parquet is right"):
        assert main([*argv, "--out", str(tmp_path / "curated.parquet")]) == 0


def test_training_on_wrong_answers_alone_is_warned_of(whole: Path, tmp_path: Path, model: Path):
    wrong = [r for r in read_records(whole / "scored.jsonl") if r.reward < 0]
    write_records(tmp_path / "wrong.jsonl", wrong[:4])
    argv = ["train", "--model", str(model), "--records", str(tmp_path / "wrong.jsonl")]
    with pytest.warns(UserWarning, match=r"none of the 4 answers in wrong\.jsonl is right"):
        assert main([*argv, "--out", str(tmp_path / "trained")]) == 0


def test_a_warning_is_a_line_like_an_error(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    wrong = [r for r in read_records(whole / "scored.jsonl") if r.reward < 0]
    write_records(tmp_path / "wrong.jsonl", wrong[:4])
    argv = [
        "curate",
        "--records",
        str(tmp_path / "wrong.jsonl"),
        "--out",
        str(tmp_path / "c.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", ["topr", *argv])
    # What the program sets for itself is taken back, and what is another's is shown as it was.
    with pytest.warns(UserWarning) as shown:
        assert main() == 0
        warnings.warn("of another", UserWarning, stacklevel=1)
    assert [str(w.message) for w in shown] == ["of another"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("topr: warning: none of the 4 answers in wrong.jsonl is right")


def test_right_answers_are_not_warned_of(whole: Path, tmp_path: Path, model: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("generate", tmp_path, model) == 0


def chatty(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model whose tokenizer has a chat template."""
    copied = Path(shutil.copytree(model, folder))
    (copied / "chat_template.jinja").write_text(template)
    return copied


ASK = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ strftime_now('%d %b %Y') }} " + ASK, True),
        ("{{ strftime_now('%d %b %Y').split()[1] }} " + ASK, True),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%Y') | int + 1 }}{% endif %}" + ASK,
            True,
        ),
        ("{% set date = 'x' if strftime_now is defined else 'y' %}" + ASK, False),
        ("{% if messages | length > 9 %}{{ strftime_now('%Y') }}{% endif %}" + ASK, False),
        (ASK, False),
    ],
)
def test_a_chat_template_that_tells_the_date_is_warned_of(
    template: str, told: bool, model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    folder = chatty(model, tmp_path / "chatty", template)
    for flags in (["--dry-run"], []):
        recwarn.clear()
        assert run("generate", tmp_path, folder, "--chat", *flags) == 0
        said = [str(w.message) for w in recwarn if "writes the date" in str(w.message)]
        assert len(said) == told and all(
            "put a date in the place of strftime_now" in x for x in said
        )
    recwarn.clear()
    assert run("generate", tmp_path, folder, "--dry-run", out="plain.parquet") == 0
    assert not any("writes the date" in str(w.message) for w in recwarn)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no user here') }}", "{% if", "{{ a.b.c }}"]
)
def test_a_chat_template_that_fails_is_named(
    template: str, model: Path, tmp_path: Path, capsys: Any
):
    folder = chatty(model, tmp_path / "chatty", template)
    argv = ["generate", *TASK, "--model", folder, "--chat", "--out", tmp_path / "s.jsonl"]
    error = error_of(capsys, *argv)
    assert "chat: the chat template of the model 'chatty' fails: " in error
    assert error.count("\n") == 1 and "leave --chat out" in error


def test_a_chat_template_without_the_question_is_named(model: Path, tmp_path: Path, capsys: Any):
    folder = chatty(model, tmp_path / "chatty", "{{ messages[0].contents }}")
    argv = ["generate", *TASK, "--model", folder, "--chat", "--out", tmp_path / "s.jsonl"]
    assert "model 'chatty' leaves the question '1 + 1 =' out, and gives ''" in error_of(
        capsys, *argv
    )


# --- paths and inputs ------------------------------------------------------------------------


def test_the_home_folder_is_meant_by_every_path(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    """Also after an equals sign and in a file of settings, where no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "models" / "tiny")
    (tmp_path / "c.yaml").write_text("model: ~/models/tiny\n")
    argv = ["generate", *FLAGS["generate"], "--config=~/c.yaml", "--out=~/s.parquet"]
    assert main(argv) == 0
    assert len(read_records(tmp_path / "s.parquet")) == 96
    argv = ["score", "--model=~/models/tiny", "--records=~/s.parquet", "--out", "~/scored.jsonl"]
    assert main(argv) == 0 and (tmp_path / "scored.jsonl").exists()
    lines = [{"question": f"What is {i}?", "answer": str(i)} for i in range(9)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    task = ["--task=gsm8k:~/q.jsonl", "--questions", "4", "--held-out", "2", "--dry-run"]
    assert main(["generate", "--config=~/c.yaml", *task, "--out=~/g.jsonl"]) == 0
    task[0] = "--test-task=gsm8k:~/q.jsonl"
    assert main(["generate", "--config=~/c.yaml", *task, "--out=~/g.jsonl"]) == 0
    assert main(["demo", "--model=~/none", "--out=~/demo"]) == 2
    assert f"no folder '{tmp_path / 'none'}'" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("what", ["records", "weights", "model", "task", "config"])
def test_a_link_to_nothing_is_named(
    what: str, whole: Path, model: Path, tmp_path: Path, capsys: Any
):
    link = tmp_path / {"records": "x.parquet", "task": "x.jsonl"}.get(what, "x")
    if what == "weights":
        link = Path(shutil.copytree(model, tmp_path / "linked")) / "model.safetensors"
        link.unlink()
    link.symlink_to(tmp_path / "gone")
    out = tmp_path / "new" / "out.parquet"
    argv = {
        "records": ["curate", "--records", link],
        "weights": ["generate", *TASK, "--model", link.parent],
        "model": ["generate", *TASK, "--model", link],
        "task": ["generate", "--model", model, "--task", f"gsm8k:{link}"],
        "config": ["generate", "--config", link],
    }[what]
    error = error_of(capsys, *argv, "--out", out)
    assert f"{link}: a link to {tmp_path / 'gone'}, which is not there" in error
    assert error.count("\n") == 1 and not out.parent.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlr: 2\nseed: 3", "c.yaml, line 3: seed is there twice; keep one"),
        ("task_config: {a: 1, a: 2}", "c.yaml, line 1: a is there twice"),
        ("max-length: 1\nmax_length: 2", "c.yaml, max_length: there twice"),
        ("config: other.yaml", "c.yaml, config: a file names no other"),
        ("a: &a [*a]", "c.yaml, line 1: an alias stands for a list or a mapping"),
        ("a: &a {x: 1}\nb: [*a]", "c.yaml, line 1: an alias stands for"),
        ("? [a, b]\n: 1", "c.yaml, line 1: expected a name before the colon"),
        ("a: " + "[" * 2000, "c.yaml: not YAML (RecursionError"),
        *(
            (f"size: 1\nseed: {value}", f"c.yaml, line 2: got {value}; expected a decimal number")
            for value in ("010", "09", "-007", "0x10", "0b1", "1_000", "1:30", "00.5")
        ),
    ],
)
def test_settings_that_say_something_else_than_they_look_like_are_refused(
    text: str, message: str, whole: Path, tmp_path: Path, capsys: Any
):
    (tmp_path / "c.yaml").write_text(text + "\n")
    argv = ["curate", "--config", tmp_path / "c.yaml", "--records", whole / "samples.parquet"]
    assert message in error_of(capsys, *argv, "--out", tmp_path / "out.parquet")


def test_numbers_and_texts_of_a_file_of_settings(whole: Path, tmp_path: Path):
    text = "seed: 10\nsize: 20\npositive-share: 0.5\nmethod: 'uniform'\nmax_length: '0'\n"
    (tmp_path / "c.yaml").write_text(text)
    argv = ["curate", "--config", tmp_path / "c.yaml", "--records", whole / "samples.parquet"]
    assert main([*map(str, argv), "--out", str(tmp_path / "out.parquet")]) == 0
    found = json.loads((tmp_path / "out.parquet.json").read_text())["settings"]
    assert (found["seed"], found["size"], found["positive_share"]) == (10, 20, 0.5)


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", "._config.json", "__MACOSX/x", "desktop.ini"]
)
def test_what_a_file_manager_leaves_in_a_folder_changes_nothing(
    name: str, copy: Path, model: Path, capsys: Any
):
    mine = Path(shutil.copytree(model, copy / "mine" / "tiny"))
    for folder in (mine, copy / "trained"):
        before = checksum(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
        assert checksum(folder) == before
        (folder / "other").write_text("x")
        assert checksum(folder) != before
        (folder / "other").unlink()
    for command in ("generate", "train", "evaluate"):
        assert run(command, copy, mine) == 0


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "target", "error", "said"),
    [
        (
            *("generate", "sampling.generate", RuntimeError("CUDA error:\n  misaligned")),
            "--model {model}, --backend hf: sampling failed: RuntimeError: CUDA error: misaligned",
        ),
        (
            *("evaluate", "sampling.generate", torch.OutOfMemoryError("CUDA out of memory.\nTry")),
            "out of memory. Try; a smaller --sample-batch takes less memory",
        ),
        (
            *("score", "commands.score", MemoryError()),
            "--model {model}: scoring failed: MemoryError; a smaller --batch-size takes less memory",
        ),
        (
            *("train", "commands.train", ValueError("model: head of a kind\nunheard of")),
            "--model {model}: training failed: model: head of a kind unheard of",
        ),
        (
            *("train", "commands.write_trained_on", SafetensorError("No space left")),
            "{out}: saving failed: SafetensorError: No space left",
        ),
        (
            *("curate", "records.pq.write_table", OSError(28, "No space left on device")),
            "outputs/curated.parquet: cannot be written ([Errno 28] No space left on device)",
        ),
        (
            *("generate", "files._sync", OSError(28, "No space left on device")),
            "settings.json: cannot be written ([Errno 28] No space left on device)",
        ),
        (
            *("score", "records.pq.ParquetFile", PermissionError(13, "Permission denied", "x.pq")),
            "topr: x.pq: Permission denied",
        ),
    ],
)
def test_a_failure_is_one_line_that_names_what_failed(
    command: str, target: str, error: Exception, said: str, copy: Path, model: Path, capsys: Any
):
    forget(copy, command)
    module, _, name = target.partition(".")
    owner: Any = importlib.import_module(f"topr_kernels.recipe.{module}")
    *inner, name = name.split(".")
    for part in inner:
        owner = getattr(owner, part)
    before = contents(copy)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    wanted = said.format(
        model=copy / "trained" if command == "evaluate" else model, out=copy / OUT[command]
    )
    for flags in ([], ["--debug"]):
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert run(command, copy, model, *flags) == 2
        told = capsys.readouterr().err
        # But for the bars of progress.
        lines = [line for line in told.splitlines() if "%|" not in line and line.strip()]
        assert wanted in lines[-1] and lines[-1].startswith("topr: ")
        assert (len(lines) == 1) != bool(flags) and ("Traceback" in told) == bool(flags)
        # A model that was trained and could not be saved need not be trained again.
        kept = {path.name for path in copy.glob(".*")}
        assert (contents(copy) == before and not kept) or "saving" in said
    assert run(command, copy, model) == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "unheard-of"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{}"),
        ("generation_config.json", '{"eos_token_id": "abc"}'),
        ("model.safetensors", "not weights"),
        ("model.safetensors", None),
        ("model.gguf", "GGUF"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line(
    file: str, text: str | None, model: Path, tmp_path: Path, capsys: Any
):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    if file.endswith("gguf"):
        (broken / "config.json").unlink()
    if text is None:
        (broken / file).unlink()
    else:
        (broken / file).write_text(text)
    assert run("generate", tmp_path, broken) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"topr: --model {broken}: ") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/none", "no folder 'runs/none', though there is a folder 'runs'"),
        ("runs/a/none", "no folder 'runs/a/none', and a hub id is"),
        ("./none", "no folder './none', and a hub id is"),
        ("../none", "no folder '../none', and a hub id is"),
        ("none/", "no folder 'none/', and a hub id is"),
        ("/none/none", "no folder '/none/none', and a hub id is"),
        ("~/none", "/none', and a hub id is"),
        ("runs/begun", "no folder 'runs/begun': its training is unfinished"),
        ("runs/x.gguf", "'runs/x.gguf' is a file; give the folder"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_model_that_is_no_folder_is_not_asked_of_the_hub(
    name: str, message: str, dry: bool, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / ".begun.json.partial").mkdir(parents=True)
    (tmp_path / "runs" / "x.gguf").touch()
    argv = ["generate", *TASK, "--model", name, "--out", "s.jsonl", *["--dry-run"][: int(dry)]]
    with pytest.MonkeyPatch.context() as patch:
        models = importlib.import_module("topr_kernels.recipe.models")
        for kind in (models.AutoTokenizer, models.AutoConfig, models.AutoModelForCausalLM):
            patch.setattr(kind, "from_pretrained", None)
        assert main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_model_of_the_hub_is_said_to_be_one(tmp_path: Path, monkeypatch: Any, capsys: Any):
    models = importlib.import_module("topr_kernels.recipe.models")

    def offline(**options: Any) -> Any:
        assert "Owner/unheard-of: no such folder; asking the hub" in capsys.readouterr().err
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", offline)
    argv = ["generate", *TASK, "--model", "Owner/unheard-of", "--out", "s.jsonl"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said == "topr: --model Owner/unheard-of: We couldn't connect to the hub\n"


def test_the_version_is_told(capsys: Any):
    with pytest.raises(SystemExit) as status:
        main(["--version"])
    assert status.value.code == 0
    assert capsys.readouterr().out == f"topr_kernels {topr_kernels.__version__}\n"


def test_the_examples_of_the_help_run_one_after_the_other(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    commands = []
    order = ["generate", "score", "curate", "train", "evaluate", "iterate", "verify", "vote"]
    for command in order:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        commands += shown_commands(capsys.readouterr().out)
    assert [c[0] for c in commands] == [*order[:-1], "score", "train", "vote"]
    run_shown(commands, model, tmp_path, monkeypatch)
    assert (tmp_path / "run" / "vote.json").exists()


def test_a_bug_shows_its_traceback(model: Path, tmp_path: Path, monkeypatch: Any):
    def mistaken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sampling, "generate", mistaken)
    with pytest.raises(ZeroDivisionError):
        run("generate", tmp_path, model)
    assert not list(tmp_path.iterdir())
