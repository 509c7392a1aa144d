"""``topr demo`` end to end on a tiny model: results, resuming, refusals, exit status."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from tiny import save, tiny_model

from topr_kernels.recipe import Evaluation, Question, Task, read_records, wilson_interval
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.evaluate import Accuracy
from topr_kernels.recipe.scoring import Verdict
from topr_kernels.recipe.trained_on import digest

demo = importlib.import_module("topr_kernels.recipe.demo")
FLAGS = ["--quick", "--held-out", "6", "--questions", "4", "--lr", "1e-3", "--epochs", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(model, out) == 0
    return out


def run(model: Path, out: Path, *flags: str) -> int:
    return main(["demo", "--model", str(model), "--out", str(out), *FLAGS, *flags])


def figures(out: Path) -> dict[str, Any]:
    """The report without what differs between equal runs."""
    report = json.loads((out / "report.json").read_text())
    del report["seconds"], report["cpu_seconds"], report["environment"]
    for entry in [e for history in report["history"].values() for e in history]:
        for name in [n for n in entry if "runtime" in n or "per_second" in n]:
            del entry[name]
    return report


def test_the_demo_runs_end_to_end(whole: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    report = json.loads((whole / "report.json").read_text())
    assert set(report["accuracy"]) == {"base", "TOPR", "SFT"}
    assert report["accuracy"]["TOPR"]["greedy"]["questions"] == 6
    assert report["settings"]["model"] == "tiny" and report["settings"]["lr"] == 1e-3
    assert len(report["history"]["TOPR"]) == len(report["history"]["SFT"]) == 2
    assert set(report["seconds"]) >= {"generate", "score", "train TOPR", "total"}
    assert report["data"]["max_log_ratio_same_packing"] == 0
    assert report["data"]["max_log_ratio_other_packing"] < 1e-4
    assert report["environment"]["versions"]["torch"]
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    for file in whole.glob("*.json"):
        assert str(whole.parent) not in file.read_text()
        assert str(model.parent) not in file.read_text()
    assert len(read_records(whole / "records.parquet")) == 16
    # Checkpoints are gone, the trained model is there and loads.
    assert not list(whole.rglob("checkpoint*"))
    assert (whole / "topr" / "model" / "model.safetensors").exists()
    # It tells its questions, so that topr evaluate does not ask them again.
    known = (whole / "sft" / "model" / "trained_on.txt").read_text().split()
    assert known == sorted({digest(r.prompt) for r in read_records(whole / "records.parquet")})
    # A second start has nothing to do and prints the same table.
    assert run(model, whole) == 0
    printed = capsys.readouterr()
    assert "positives only (SFT)" in printed.out and "sampled" in printed.out
    assert "generate" not in printed.err


@pytest.mark.parametrize("balance", ["subsample", "baseline"])
def test_the_wanted_share_of_positives_is_made(balance: str, model: Path, tmp_path: Path):
    one_digit = Task(
        "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    )
    settings = demo.DemoSettings(
        model=str(model), questions=20, samples=4, held_out=4, epochs=1, balance=balance
    )
    demo.run_demo(settings, tmp_path, task=one_digit)
    data = json.loads((tmp_path / "report.json").read_text())["data"]
    assert data["sampled"] == 80 and 0 < data["sampled_positive_share"] < 0.5
    assert data["effective_positive_share"] == pytest.approx(0.5)
    if balance == "subsample":
        assert data["positive_share"] == 0.5 and data["baseline"] == 0
        assert data["records"] == 2 * round(80 * data["sampled_positive_share"])
    else:
        assert data["records"] == 80 and data["baseline"] < 0


def test_right_answers_alone_take_as_many_steps(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Wrong ones have weight 0 there: they would cost half of the time for nothing."""
    original = demo.train
    given = {}

    def observed(
        model: Any, tokenizer: Any, records: Any, settings: Any, *, label: str, **rest: Any
    ) -> Any:
        given[label] = [r.reward for r in records], settings.batch_size
        return original(model, tokenizer, records, settings, label=label, **rest)

    monkeypatch.setattr(demo, "train", observed)
    one_digit = Task(
        "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    )
    settings = demo.DemoSettings(
        model=str(model), questions=20, samples=4, held_out=4, batch_size=4
    )
    demo.run_demo(settings, tmp_path, task=one_digit)
    everything, size = given["TOPR"]
    assert given["SFT"] == ([r for r in everything if r > 0], 2) and size == 4
    assert len(given["SFT"][0]) * 2 == len(everything)
    history = json.loads((tmp_path / "report.json").read_text())["history"]
    assert len(history["TOPR"]) == len(history["SFT"]) > 1


def test_answers_whose_scorer_failed_are_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    judge = Task.reward
    failing = Task("chain_sum", {"min_terms": 2, "max_terms": 2})

    def fail_once(task: Task, answer: str | None, question: Question) -> float:
        if not said:
            said.append(question)
            raise ValueError("a scorer of its own mind")
        return judge(task, answer, question)

    def verdicts(task: Task, answers: list[Any]) -> list[Verdict]:
        return [Verdict(**judged(task, *answer)) for answer in answers]

    judged = importlib.import_module("topr_kernels.recipe.scoring_server").judge
    for name in ("generate", "evaluate"):
        module = importlib.import_module(f"topr_kernels.recipe.{name}")
        monkeypatch.setattr(module, "verdicts", verdicts)
    monkeypatch.setattr(Task, "reward", fail_once)
    settings = demo.DemoSettings(model=str(model), questions=4, samples=2, held_out=4)
    run = demo._Run(settings, tmp_path, failing)
    for step in (run.evaluate_base, run.sample):
        said: list[Question] = []
        assert step()["scorer_problems"] == {"raised": 1}
    assert capsys.readouterr().out.count("rewarded -1: 1 raised") == 2


def test_the_processor_time_of_finished_steps_is_counted(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "samples.json"
    samples = json.loads(path.read_text())
    path.write_text(json.dumps({**samples, "cpu_seconds": 12345.5}))
    before = time.process_time()
    assert run(model, tmp_path / "run") == 0
    cpu = json.loads((tmp_path / "run" / "report.json").read_text())["cpu_seconds"]
    others = sum(s for name, s in cpu.items() if name not in ("generate", "total"))
    assert cpu["generate"] == 12345.5
    # This process's own, from its start, is in it too.
    assert 12345.5 + others + before <= cpu["total"] + 0.1
    assert f"{cpu['total']:.0f} CPU seconds" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["evaluate", "generate", "score", "train"])
def test_an_interrupted_run_resumes_to_the_same_figures(
    victim: str,
    model: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    original = getattr(demo, victim)
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(victim)
        # For evaluate and train: the second call, after the first one's result was written.
        if victim in ("generate", "score") or len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(demo, victim, interrupted)
    assert run(model, tmp_path) == 130
    assert "same command resumes" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(model, tmp_path) == 0
    assert figures(tmp_path) == figures(whole)
    for name in ("samples.parquet", "records.parquet"):
        assert read_records(tmp_path / name) == read_records(whole / name)


def test_a_resumed_training_deletes_nothing_of_the_users(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_json = demo.write_json

    def interrupted(path: Path, value: Any) -> None:
        if path.name == "history.json":
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(demo, "write_json", interrupted)
    assert run(model, tmp_path) == 130
    monkeypatch.undo()
    mine = ["model/notes.txt", "checkpoints/checkpoint-best/notes.txt", "checkpoint-3/notes.txt"]
    for file in mine:
        (tmp_path / "topr" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "topr" / file).write_text("mine")
    assert run(model, tmp_path) == 0
    assert all((tmp_path / "topr" / file).read_text() == "mine" for file in mine)
    assert figures(tmp_path) == figures(whole)
    # And not half of another model.
    names = {path.name for path in (whole / "topr" / "model").iterdir()}
    assert {p.name for p in (tmp_path / "topr" / "model").iterdir()} == names | {"notes.txt"}


def test_a_killed_run_resumes_to_the_same_records(model: Path, whole: Path, tmp_path: Path):
    """kill -9 at whatever it is doing once the first result is there."""
    command = [sys.executable, "-m", "topr_kernels.recipe.cli", "demo", "--model", str(model)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), *FLAGS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "base" / "evaluation.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "report.json").exists()
    assert run(model, tmp_path) == 0
    assert read_records(tmp_path / "samples.parquet") == read_records(whole / "samples.parquet")
    assert figures(tmp_path)["data"] == figures(whole)["data"]


def test_other_settings_are_refused_and_restart_starts_anew(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine.txt").write_text("keep")
    settings = demo.DemoSettings(model=str(model), seed=1)
    demo._write_or_check_settings(tmp_path, settings)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "evaluation.json").write_text("{}")
    assert run(model, tmp_path) == 2
    message = capsys.readouterr().err
    assert "--seed: 1 there, 0 now" in message and "--restart" in message and "--out" in message
    demo.restart(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_restart_deletes_nothing_in_a_folder_of_another_kind(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious.txt").write_text("keep")
    assert run(model, tmp_path, "--restart") == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert (tmp_path / "base" / "precious.txt").exists()


def test_restart_keeps_the_users_files(whole: Path, model: Path, tmp_path: Path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    mine = ["topr/notes.txt", "topr/model/notes.txt", "generated/mine.parquet", "sub/settings.json"]
    for file in mine:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("mine")
    demo.restart(out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == sorted(
        mine
    )
    assert run(model, out) == 0
    assert all((out / file).read_text() == "mine" for file in mine)


@pytest.mark.parametrize("name", ["samples.parquet", "report.json", "topr/model/config.json"])
def test_a_demo_overwrites_no_file_of_the_users(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert run(model, tmp_path) == 2
    assert f"{tmp_path / name}: exists, but was not made" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_restart_tells_another_tools_settings_from_its_own(tmp_path: Path):
    (tmp_path / "settings.json").write_text('{"seed": 0}')
    with pytest.raises(demo.SettingsError, match="nothing was deleted"):
        demo.restart(tmp_path)
    assert (tmp_path / "settings.json").exists()


def test_infinite_figures_of_a_diverged_run_are_stored_as_null(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("settings.json", "samples.json", "records.json", "records.parquet"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    (tmp_path / "base").mkdir()
    evaluation = (whole / "base" / "evaluation.json").read_bytes()
    (tmp_path / "base" / "evaluation.json").write_bytes(evaluation)
    entry = {"step": 1, "objective": float("-inf"), "weight_negative_mean": 0.5}
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: [entry, {**entry, "step": 2}])
    run(model, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["history"]["TOPR"][0] == {**entry, "objective": None}


def test_impossible_questions_do_not_claim_the_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    out = tmp_path / "out"
    # The demo's own task has ten thousand questions; it takes seconds to see that there are no more.
    few = Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    monkeypatch.setitem(demo.run_demo.__kwdefaults__, "task", few)
    assert main(["demo", "--model", str(model), "--out", str(out), "--questions", "300"]) == 2
    assert "count: chain_sum gave only" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("text", [b'{"records": 1', b"\xff\xfe\xff", b"[]", b"{}"])
def test_a_damaged_result_is_named(
    text: bytes, whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "records.json").write_bytes(text)
    assert run(model, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "records.json: " in message and "delete it and run again" in message
    assert "Traceback" not in message
    (tmp_path / "run" / "records.json").unlink()
    assert run(model, tmp_path / "run") == 0
    assert figures(tmp_path / "run") == figures(whole)


def test_damaged_settings_are_named(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Deleting them alone would let results of other settings pass: another remedy."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "settings.json").write_text('{"seed"')
    assert run(model, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "settings.json: damaged" in message and "another --out" in message
    assert run(model, tmp_path / "run", "--restart") == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("greedy", "sampled", "status"), [(4, 4, 0), (5, 4, 0), (3, 4, 1), (4, 3, 1), (5, 3, 1)]
)
def test_exit_status_says_whether_topr_got_worse(
    greedy: int, sampled: int, status: int, whole: Path, model: Path, tmp_path: Path
):
    def outcome(correct: int) -> Accuracy:
        return Accuracy(correct, 6, *wilson_interval(correct, 6), 0.0, 3.0)

    for name in ("settings.json", "samples.json", "records.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    for name, evaluation in (
        ("base", Evaluation(outcome(4), outcome(4))),
        ("topr", Evaluation(outcome(greedy), outcome(sampled))),
        ("sft", Evaluation(outcome(6), outcome(6))),
    ):
        (tmp_path / name).mkdir()
        raw = json.loads((whole / name / "evaluation.json").read_text())
        raw |= demo.report.accuracy_json(evaluation)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(raw))
        if name != "base":
            history = (whole / name / "history.json").read_bytes()
            (tmp_path / name / "history.json").write_bytes(history)
    assert run(model, tmp_path) == status


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "0"], "questions: got 0"),
        (["--lr", "-1"], "lr: got -1.0"),
        (["--lr", "nan"], "lr: got nan"),
        (["--lr", "inf"], "lr: got inf; expected a finite number above 0"),
        (["--seed", "100000000000000"], "seed: got 100000000000000; expected 0 to 4294967295"),
        (["--positive-share", "1.5"], "positive_share: got 1.5"),
        (["--seed", "-1"], "seed: got -1"),
    ],
)
def test_senseless_settings_are_refused(
    flags: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert run(model, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "--model" in message and "no config.json" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as status:
        main(["demo", "--help"])
    assert status.value.code == 0
    # The width of the terminal breaks lines anywhere.
    text = " ".join(capsys.readouterr().out.split())
    for word in ("dequantised", "resumes", "default: 2e-05", "exit status", "p~", "<= share < 1"):
        assert word in text


def test_flags_have_the_defaults_of_the_settings():
    from topr_kernels.recipe.cli import _arguments

    args = vars(_arguments(["demo"]))
    settings = vars(demo.DemoSettings())
    assert {name: args[name] for name in settings} == settings
