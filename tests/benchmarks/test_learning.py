"""benchmarks/learning: every grid end to end, kills, the page, and the rule of the verdicts."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from PIL import Image
from processes import call
from tiny import save, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a folder of the repository, not of the package

from benchmarks.learning import page, verdicts  # noqa: E402
from benchmarks.learning import run as learning_run  # noqa: E402
from benchmarks.learning.__main__ import FOLDER, main  # noqa: E402
from benchmarks.learning.cells import (  # noqa: E402
    GRIDS,
    QUICK,
    SMALL,
    Cell,
    cell_settings,
    cells_of,
)
from benchmarks.learning.ppo import PPOTrainer, ppo_objective  # noqa: E402
from benchmarks.learning.run import Runner  # noqa: E402
from topr_kernels.hf import TOPRConfig  # noqa: E402
from topr_kernels.recipe import files, read_records, verifier  # noqa: E402

KILLED = ["moves-1", "time-1"]


def unsynced(argv: list[str]) -> int:
    """``main`` in a process that may be killed: it needs no disk to hold what it wrote."""
    files._sync = lambda path: None
    return main(argv)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", lambda path: None)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")


def quick(model: Path, out: Path, *more: str) -> int:
    return main(["--quick", "--model", str(model), "--seeds", "0", "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an unbroken run of every grid."""
    out = tmp_path_factory.mktemp("learning") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        # After every cell, which takes less time than its pictures; smaller runs below draw them then.
        patch.setattr(page, "draw_plot", lambda *_: False)
        assert quick(model, out) == 0
    assert quick(model, out, "--report") == 0
    assert {path.name for path in out.glob("*.png")} == set(page.PLOTS)
    return out


def figures(path: Path) -> dict[str, Any]:
    """A result without what differs between equal runs."""
    value = json.loads(path.read_text())
    return {n: v for n, v in value.items() if n not in ("seconds", "environment")}


def test_every_grid_leaves_the_figures_that_were_asked_for(whole: Path, model: Path):
    names = {cell.name for _, cell in cells_of(list(GRIDS), [0])}
    assert {p.stem for p in whole.glob("*.json")} == names | {"base-seed0"}
    base = json.loads((whole / "base-seed0.json").read_text())
    assert base["sampled"]["records"] == QUICK.questions * QUICK.samples
    assert base["trained_on"]["positive_share"] == 0.5
    for name in names:
        text = (whole / f"{name}.json").read_text()
        result = json.loads(text)
        # No path of this machine, and the commit and versions that ran.
        assert str(model.parent) not in text and str(ROOT) not in text
        assert result["cell"] == name and result["settings"]["model"] == "tiny"
        assert {"commit", "versions", "threads"} <= set(result["environment"])
        assert result["seconds"] > 0
        if "iterate" in name:
            assert [e["iteration"] for e in result["iterations"]] == [0, 1, 2]
            continue
        if "verifier" in name:
            asked = result["settings"]["verifier"]
            trained = result["trained_on"]
            assert trained["judgements"] == asked["samples"] * trained["solutions"] > 0
            before, after = result["before"], result["after"]
            for look in (before, after):
                judged = look["verifier"]
                assert judged["judgements"] == asked["judgements"] * judged["solutions"]
                assert look["vote"]["samples"] == look["vote"]["votes"] == asked["answers"]
                assert look["vote"]["questions"] == QUICK.held_out
            assert before["verifier"]["solutions"] == after["verifier"]["solutions"]
            continue
        assert [e["epoch"] for e in result["epochs"]] == [1, 2]
        assert sum(e["updates"] for e in result["epochs"]) == len(result["updates"])
        for epoch in result["epochs"]:
            for decoding in ("greedy", "sampled"):
                found = epoch["evaluation"][decoding]
                assert found["questions"] == QUICK.held_out
                assert {"accuracy", "invalid_share", "mean_length"} <= set(found)
    # Nothing of half a gigabyte stays behind.
    assert not list(whole.rglob("model.safetensors")) and not list(whole.rglob("checkpoint-*"))


def test_the_methods_differ_where_they_should(whole: Path):
    def of(name: str) -> Any:
        return json.loads((whole / f"{name}-seed0.json").read_text())

    def training(name: str, figure: str) -> list[float]:
        return [update[figure] for update in of(name)["updates"]]

    assert set(training("reinforce-sequence-p50", "weight_negative_mean")) == {1.0}
    assert set(training("sft-sequence-p50", "weight_negative_mean")) == {0.0}
    topr = training("topr-sequence-p50", "weight_negative_mean")
    assert topr[0] == pytest.approx(1, abs=1e-4) and 0 < topr[-1] < 0.999
    # The first batch is the same for all, and before the first update so are pi and mu.
    for other in ("reinforce", "tis", "is", "ppo"):
        first = of(f"{other}-sequence-p50")["updates"][0]
        assert first["grad_norm"] == pytest.approx(
            of("topr-sequence-p50")["updates"][0]["grad_norm"], rel=1e-3
        )
    assert of("sft-sequence-p50")["updates"][0]["grad_norm"] != pytest.approx(
        of("topr-sequence-p50")["updates"][0]["grad_norm"], rel=1e-3
    )
    for name, baseline in (("p1", 0.98), ("p10", 0.8), ("p20", 0.6), ("p50", 0.0)):
        assert of(f"topr-sequence-{name}")["data"]["baseline"] == pytest.approx(baseline)
    assert of("tis-sequence-p100")["data"]["baseline"] == -1
    levels = [training(f"topr-{r}-p50", "log_ratio_negative_mean")[-1] for r in
              ("sequence", "geometric", "token")]  # fmt: skip
    assert len(set(levels)) == 3
    chosen = {c: of(f"topr-iterate-{c}")["settings"]["iterate"]["method"] for c in
              ("default", "uniform", "anna-karenina")}  # fmt: skip
    assert chosen == {
        "default": "uniform", "uniform": "uniform", "anna-karenina": "anna-karenina"
    }  # fmt: skip


@pytest.fixture
def digits_are_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model writes digits: even ones shall say "right", odd ones "wrong", and 7 nothing."""
    words = {str(d): ("right", "wrong")[d % 2] for d in range(10) if d != 7}
    monkeypatch.setattr(verifier, "_WORDS", words)
    monkeypatch.setattr(verifier, "_BARE", re.compile(r"\W*([0-689])\W*"))


def test_a_verifier_is_trained_and_judged_before_and_after(
    model: Path, tmp_path: Path, digits_are_verdicts: None, monkeypatch: pytest.MonkeyPatch
):
    chosen = {**json.loads(QUICK.verifier), "template": "{prompt}{completion}\n1 + 1 ="}
    size = dataclasses.replace(
        QUICK, model=str(model), questions=48, held_out=24, lr=3e-3, verifier=json.dumps(chosen)
    )
    cell = Cell("topr", 0, verifier=True)
    runner = Runner(size, tmp_path / "results", tmp_path / "work")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    # In the middle of it, again and again: what was done stays.
    for step in ("run_verify", "run_score", "run_train", "run_vote"):
        with monkeypatch.context() as patch:
            patch.setattr(learning_run, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner.run(cell)
    result = json.loads(runner.run(cell).read_text())
    folder = tmp_path / "work" / cell.name
    answers = read_records(folder / "answers.parquet")
    assert len(answers) == 24 * chosen["answers"]
    for name, judge in (("before", "tiny"), ("after", "model")):
        judgements, votes = (
            read_records(folder / f"{name}{part}.parquet") for part in ("", "-votes")
        )
        right = [j.judged.right for j in judgements]
        assert 0 < sum(right) == len(right) / 2
        assert {j.sampling.model for j in judgements + votes} == {judge}
        told = result[name]["verifier"]
        assert told["accuracy"] == pytest.approx(fmean(j.reward > 0 for j in judgements))
        assert told["unparsable_share"] == pytest.approx(fmean(not j.valid for j in judgements))
        assert 0 < told["accuracy"] < 1 and told["unparsable_share"] < 1
        # As even digits are, right verdicts of right solutions, and of wrong ones as odd ones are.
        assert told["accuracy_on_right"] == pytest.approx(
            fmean(
                j.completion.strip() in ("0", "2", "4", "6", "8")
                for j in judgements
                if j.judged.right
            )
        )
        assert len(votes) == sum(bool(a.valid) for a in answers)
    assert result["before"]["verifier"] != result["after"]["verifier"]
    trained = read_records(folder / "scored.parquet")
    assert len(trained) == chosen["samples"] * result["trained_on"]["solutions"]
    assert {t.reward for t in trained} == {1.0, -1.0}
    # No judged solution is one of those that were trained on, and no half gigabyte stays.
    assert not {t.prompt for t in trained} & {j.prompt for j in judgements}
    assert not list(tmp_path.rglob("model.safetensors"))
    (folder / "model").mkdir()
    runner.run(cell)
    assert not (folder / "model").exists()
    whole = Runner(size, tmp_path / "other" / "results", tmp_path / "other" / "work").run(cell)
    assert figures(whole) == figures(tmp_path / "results" / whole.name)


def test_all_cells_of_a_seed_share_its_samples(whole: Path):
    manifests = [json.loads(p.read_text()) for p in (whole / "work" / "cells").glob("*.json")]
    assert len(manifests) == sum(
        not (c.curation or c.verifier) for cells in GRIDS.values() for c in cells
    )
    assert len({json.dumps(m["inputs"]) for m in manifests}) == 1
    assert len(list((whole / "work").glob("data-seed*"))) == 1


def test_a_finished_cell_is_left_alone_and_other_settings_are_refused(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("*.json")}
    assert quick(model, whole, "--grid", "core", "iterations") == 0
    assert {p: p.stat().st_mtime_ns for p in whole.glob("*.json")} == before
    other = json.loads((whole / "topr-sequence-p50-seed0.json").read_text())
    other["settings"]["lr"] = 1.0
    (tmp_path / "topr-sequence-p50-seed0.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert quick(model, tmp_path, "--grid", "core") == 2
    error = capsys.readouterr().err
    assert "1.0 there, 0.0001 now" in error and "topr-sequence-p50-seed0.json" in error


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Folder with one run per case, and how often each was killed."""
    folder, kills = tmp_path_factory.mktemp("killed"), {}
    for case in KILLED:
        argv = ["--quick", "--model", str(model), "--seeds", "0", "--out", str(folder / case)]
        argv += ["--grid", "naive-share"]
        job = {"function": "test_learning.unsynced", "argv": argv, "moves": 5, "seconds": 1.0}
        kills[case] = call("pipeline.kill_until_done", case=case, **job)
    return folder, kills


@pytest.mark.parametrize("case", KILLED)
def test_kills_change_nothing(case: str, killed: tuple[Path, dict[str, int]], whole: Path):
    folder, kills = killed
    # How many fit into a run that is killed by the clock depends on the machine.
    assert kills[case] >= (2 if case.startswith("time") else 5)
    for cell in ("base-seed0", "reinforce-sequence-p10-seed0"):
        assert figures(folder / case / f"{cell}.json") == figures(whole / f"{cell}.json")


def test_a_run_goes_on_from_its_last_epoch(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not from the start: the epochs before are not looked at again."""
    looks: list[str] = []
    evaluate = Runner._evaluate

    def interrupted(self: Runner, *args: Any) -> dict[str, Any]:
        looks.append("look")
        if len(looks) == 3:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    monkeypatch.setattr(Runner, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(model, tmp_path, "--grid", "core")
    assert len(looks) == 3  # the base, epoch 1, and within epoch 2
    looks[:] = ["look"] * 3
    assert quick(model, tmp_path, "--grid", "core") == 0
    assert len(looks) - 3 == 1 + 2 * 2
    cell = "topr-sequence-p50-seed0"
    assert figures(tmp_path / f"{cell}.json") == figures(whole / f"{cell}.json")


def test_list_runs_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--quick", "--list", "--out", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "none").exists()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["core", "topr-sequence-p50-seed0"],
        ["core", "sft-sequence-p50-seed0"],
        ["core", "reinforce-sequence-p50-seed0"],
        ["core", "topr-sequence-p50-seed1"],
    ]
    assert all(line.endswith("to run") for line in lines)
    assert main(["--quick", "--list", "--seeds", "0", "--out", str(whole)]) == 0
    assert all(line.endswith("done") for line in capsys.readouterr().out.splitlines())


def test_settings_are_equal_over_methods_and_seeds():
    """All that may differ between cells on one data set is what is compared."""
    compared = {"method", "ratio", "positive_share", "seed", "question_seed"}
    common = {
        json.dumps({n: v for n, v in cell_settings(c, SMALL).items() if n not in compared})
        for _, c in cells_of(list(GRIDS), [0, 1, 2])
        if not (c.curation or c.verifier)
    }
    assert len(common) == 1
    iterate = [cell_settings(c, SMALL)["iterate"] for c in GRIDS["curation"]]
    assert [{**i, "method": ""} for i in iterate[1:]] == [{**iterate[0], "method": ""}]
    names = [c.name for cells in GRIDS.values() for c in cells]
    assert len(names) == len(set(names))


# PPO


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.2, -1.8])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_ppo_weighs_by_the_ratio_inside_of_its_clip(ratio: float, reward: float):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    ppo_objective(log_ratio, torch.tensor([reward], dtype=torch.float64)).backward()
    inside = ratio < 1.2 if reward >= 0 else ratio > 0.8
    assert log_ratio.grad.item() == pytest.approx(reward * ratio * inside)


def test_the_trainers_ppo_is_the_formula_on_full_logits(tmp_path: Path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = [
        {"prompt_token_ids": tokenizer(p)["input_ids"], "reward": r, "behavior_log_prob": b,
         "completion_token_ids": tokenizer(c)["input_ids"]}
        for p, c, r, b in (
            ("1 + 2 = ", "3\n", 1.0, [-1.5, -0.1]),
            ("14 + 2 = ", "77\n", -1.0, [-3.0, -2.0, -0.2]),
            ("1 + 2 = ", "45\n", -1.0, [-9.0, -5.0, -1.0]),
            ("3 + 2 = ", "5\n", 1.0, [-0.05, -0.01]),
        )
    ]  # fmt: skip
    args = TOPRConfig(
        output_dir=str(tmp_path), limits="is", baseline=0.25, report_to="none", use_cpu=True
    )
    trainer = PPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator(rows)
    output = trainer._topr(model, batch, torch.tensor(8))
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}

    again = tiny_model()
    total, weights = torch.zeros(()), []
    for row in rows:
        prompt, answer = row["prompt_token_ids"], row["completion_token_ids"]
        logits = again(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        x = (chosen - torch.tensor(row["behavior_log_prob"])).sum().exp()
        w = x.item()
        r = row["reward"] - 0.25
        total = total - torch.minimum(x * r, x.clamp(0.8, 1.2) * r) / len(answer) / 8
        weights.append(w if (w < 1.2 if r >= 0 else w > 0.8) else 0.0)
    total.backward()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert output.weight.tolist() == pytest.approx(weights, rel=1e-4)
    # Both kinds are there: clipped ones and others.
    assert 0 < sum(w == 0 for w in weights) < 4
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


# The page


def test_the_page_is_of_the_committed_figures():
    """`python -m benchmarks.learning --report` writes it."""
    results = page.load(FOLDER / "results")
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert page.fill(text, page.blocks(results)) == text
    for name, draw in page.PLOTS.items():
        path = FOLDER / name
        if draw(results) is None:
            assert not path.exists(), f"{path}: there are no figures for it"
            continue
        with Image.open(path) as image:
            assert image.text["Description"] == page.fingerprint(results, draw), path
            assert image.width <= 1200
    for path in FOLDER.rglob("*.json"):
        assert "/root" not in path.read_text() and "/home" not in path.read_text()


def test_committed_figures_are_of_the_settings_that_are_stated():
    results = page.load(FOLDER / "results")
    for _, cell in cells_of(list(GRIDS), range(30)):
        if cell.name in results:
            settings = results[cell.name]["settings"]
            assert settings == {"model": "smollm2", **cell_settings(cell, SMALL)}
    known = {cell.name for _, cell in cells_of(list(GRIDS), range(30))}
    assert {n for n in results if not n.startswith("base-seed")} <= known


def test_a_run_writes_its_page(whole: Path):
    text = (whole / "README.md").read_text(encoding="utf-8")
    made = page.blocks(page.load(whole))
    assert page.fill(text, made) == text
    assert all((whole / name).exists() for name in page.PLOTS)
    # One seed is no verdict.
    assert text.count("**not run**") == len(verdicts.CLAIMS)


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected <!-- begin data --> and <!-- end data --> once"):
        page.fill("no marks", {"data": "x"})


def test_without_figures_everything_is_not_run():
    made = page.blocks({})
    assert set(made.values()) - {made["verdicts"]} == {verdicts.NOT_RUN}
    for text in ("reproduced", "too small"):
        assert text not in made["verdicts"]
    assert all(draw({}) is None for draw in page.PLOTS.values())


# Verdicts, on made-up figures


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], "not run"),
        ([9.0], "not run"),
        ([9.0, 9.0], "not run"),
        ([9.0, 9.5, 8.5], "reproduced"),
        ([-9.0, -9.5, -8.5], "not reproduced"),
        ([9.0, 1.0, 2.0], "too small to tell"),
        ([0.0, 0.0, 0.0], "too small to tell"),
        ([3.0, 3.0, 3.0], "reproduced"),
        # The half-width is 4.303 / sqrt(3) standard deviations: 2.484 here.
        ([1.49, 2.49, 3.49], "reproduced"),
        ([1.48, 2.48, 3.48], "too small to tell"),
        ([-3.49, -2.49, -1.49], "not reproduced"),
        ([-3.48, -2.48, -1.48], "too small to tell"),
    ],
)
def test_the_rule(differences: list[float], expected: str):
    assert verdicts.verdict(differences) == expected


def test_intervals_are_students():
    found = verdicts.interval([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    assert found.half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2)
    for values in ([], [1.0], [0.0] * 62):
        with pytest.raises(ValueError, match="expected 2 to 61"):
            verdicts.interval(values)


def made_up(accuracies: dict[str, float]) -> dict[str, Any]:
    """Results whose last figure is given, and whose others would be wrong."""
    results: dict[str, Any] = {}
    for name, value in accuracies.items():
        evaluation = {
            "diverged": False,
            "greedy": {"accuracy": value / 100, "invalid_share": 0.0, "mean_length": 3.0},
            "sampled": {"accuracy": 0.99, "invalid_share": 0.0, "mean_length": 3.0},
        }
        wrong = copy.deepcopy(evaluation)
        wrong["greedy"]["accuracy"] = 0.77
        training = {"weight_negative_mean": 0.5}
        results[name] = (
            {"evaluation": evaluation}
            if name.startswith("base")
            else {
                "epochs": [
                    {"evaluation": wrong, "training": training},
                    {"evaluation": evaluation, "training": training},
                ]
            }
        )
    return results


def test_differences_pair_the_seeds_that_both_have():
    results = made_up(
        {
            "base-seed0": 10, "base-seed1": 20, "base-seed2": 30,
            "topr-sequence-p50-seed0": 50, "topr-sequence-p50-seed1": 61,
            "topr-sequence-p50-seed10": 72, "sft-sequence-p50-seed1": 60,
            "sft-sequence-p50-seed10": 75, "topr-sequence-p5-seed0": 0,
        }
    )  # fmt: skip
    topr, sft = Cell("topr", 0), Cell("sft", 0)
    claim = verdicts.Claim("", "", topr, sft)
    assert verdicts.differences(results, claim) == pytest.approx({1: 1, 10: -3})
    above = verdicts.Claim("", "", topr, None)
    assert verdicts.differences(results, above) == pytest.approx({0: 40, 1: 41})
    below = verdicts.Claim("", "", None, topr)
    assert verdicts.differences(results, below) == pytest.approx({0: -40, 1: -41})


def test_a_model_of_nan_answers_nothing_right():
    results = made_up({"base-seed0": 10, "reinforce-sequence-p50-seed0": 50})
    results["reinforce-sequence-p50-seed0"]["epochs"][-1]["evaluation"] = {"diverged": True}
    claim = verdicts.Claim("", "", None, Cell("reinforce", 0))
    assert verdicts.differences(results, claim) == pytest.approx({0: 10})
    assert "naive REINFORCE" in page.blocks({**results, **_base()})["methods"]


def _base() -> dict[str, Any]:
    evaluation = made_up({"base-seed0": 10})["base-seed0"]["evaluation"]
    data = {"records": 9, "positive_share": 0.5, "invalid_share": 0.1}
    return {
        "base-seed0": {
            "evaluation": evaluation, "sampled": data, "trained_on": data,
            "weights": {"name": "made up", "remark": ""}, "seconds": {"all": 1.0},
            "environment": {"commit": None, "versions": {}, "threads": 1},
        }
    } | {
        "reinforce-sequence-p50-seed0": {
            "epochs": [{"evaluation": {"diverged": True}, "training": {"weight_negative_mean": None}}],
            "seconds": 1.0, "environment": {"commit": None, "versions": {}, "threads": 1},
        }
    }  # fmt: skip


def test_iterations_are_compared_with_the_model_they_start_from():
    def run(*passes: float) -> dict[str, Any]:
        return {"iterations": [{"evaluation": {"pass_at_1": p / 100}} for p in passes]}

    karenina, uniform = (Cell("topr", 0, curation=c) for c in ("anna-karenina", "uniform"))
    results = {
        f"{cell.name.removesuffix('0')}{seed}": run(10 + seed, 90, last)
        for cell, lasts in ((karenina, (40, 42, 45)), (uniform, (30, 31, 36)))
        for seed, last in enumerate(lasts)
    }
    gain = verdicts.Claim("", "", karenina, None)
    assert verdicts.differences(results, gain) == pytest.approx({0: 30, 1: 31, 2: 33})
    claim = verdicts.Claim("", "", karenina, uniform)
    found = verdicts.differences(results, claim)
    assert found == pytest.approx({0: 10, 1: 11, 2: 9})
    assert verdicts.verdict(list(found.values())) == "reproduced"


def test_a_verifier_is_compared_with_itself_before_training():
    def look(accuracy: float, unparsable: float, weighted: float) -> dict[str, Any]:
        judged = {"accuracy": accuracy, "unparsable_share": unparsable, "solutions": 100}
        judged |= {"accuracy_on_right": accuracy + 0.01, "accuracy_on_wrong": accuracy - 0.01}
        vote = {"pass_at_1": 0.2, "maj_at_k": 0.25, "weighted_at_k": weighted, "votes": 4}
        return {"verifier": judged, "vote": vote}

    results = {
        f"topr-verifier-seed{seed}": {
            "trained_on": {"judgements": 400, "solutions": 100},
            "before": look(0.30 + seed / 100, 0.34, 0.27),
            "after": look(0.70, 0.01, 0.31),
            "seconds": 60.0,
            "environment": {"commit": None, "versions": {}, "threads": 1},
        }
        for seed in range(3)
    }
    claims = {c.figure: c for c in verdicts.CLAIMS if c.figure}
    assert set(claims) == set(verdicts.VERIFIER)
    found = {name: verdicts.differences(results, claim) for name, claim in claims.items()}
    assert found["accuracy"] == pytest.approx({0: 40, 1: 39, 2: 38})
    assert found["parsable"] == pytest.approx(dict.fromkeys(range(3), 33))
    assert found["vote"] == pytest.approx(dict.fromkeys(range(3), 6))
    assert found["untrained vote"] == pytest.approx(dict.fromkeys(range(3), 4))
    lines = page.blocks({**results, **_base()})["verifier"].splitlines()
    assert lines[0].endswith("400 of 100, 400 of 100, 400 of 100.")
    assert (
        "| untrained | 1 | 100 | 31.0 % | 47.0 % | 32.0 % | 30.0 % | 34.0 % | 20.0 % | 25.0 % | 27.0 % |"
        in lines
    )
    assert any(line.startswith("| trained | mean |  | 70.0 ± 0.0 |") for line in lines)


#: In the order of the README, what it calls each comparison, and the claim.
QUOTED = [
    ("TOPR learns off policy", "TOPR learns off-policy"),
    (
        "of `topr iterate` with its defaults",
        "three iterations of the default recipe beat the base",
    ),
    ("more right verdicts", "training raises the verifier's accuracy"),
    ("fewer unparsable ones", "training lowers the verifier's unparsable share"),
    ("collapses at p\u0303 = 10 %", "naive REINFORCE collapses below the base at p\u0303 = 10 %"),
    ("against naive REINFORCE", "TOPR beats naive REINFORCE"),
    ("against positives only", "TOPR beats positives only"),
    ("PPO", "TOPR beats PPO"),
    ("IS", "TOPR beats plain importance sampling"),
    ("TIS", "at p\u0303 = 50 % TOPR beats TIS"),
    ("naive REINFORCE below the base", "naive REINFORCE collapses below the base"),
    ("against uniform sampling", "Anna Karenina sampling beats uniform sampling"),
    ("against plain ones", "votes weighted by the trained verifier beat plain ones"),
    ("beats that of each token", "the ratio of the sequence beats that of each token"),
    ("over the geometric mean", "the ratio of the sequence beats the geometric mean"),
]


def test_the_readme_quotes_the_page():
    """Each difference is that of its claim, and stands under the word of its verdict."""
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8").replace("\u2212", "-")
    part = text.partition("### Do the paper's claims hold?")[2].partition("\n## ")[0]
    results = page.load(FOLDER / "results")
    claims = {claim.text: claim for claim in verdicts.CLAIMS}
    places = []
    for phrase, name in QUOTED:
        values = list(verdicts.differences(results, claims[name]).values())
        found = verdicts.interval(values)
        shown = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
        place = re.search(rf"\b{re.escape(phrase)}[^\[;]*?{re.escape(shown)}", part, re.DOTALL)
        assert place, f"{phrase}: expected {shown}"
        places.append(place.end())
        item = part[: place.end()].rpartition("\n- **")[2]
        word = item.partition("**")[0].split(",")[0].removesuffix(":").lower()
        if not word.startswith("ours"):
            assert word == verdicts.verdict(values), phrase
    assert places == sorted(places)
    shares = page.blocks(results)["shares"]
    assert re.search(r"\| naive REINFORCE \| - \| 0\.0 ", shares)
    assert "TOPR has " + re.search(r"\| TOPR \| [^|]+ \| ([\d.]+) ", shares)[1] + " %" in part
    # No figure beside those.
    assert len(re.findall(r"\d \[", part)) == len(QUOTED)
    table = page.blocks(results)["iterations"]
    first, last = re.search(
        r"\| mean \| ([\d.]+) .* \| ([\d.]+) \S+ [\d.]+ \|  \|  \|", table
    ).groups()
    assert f"take pass@1 from {first} to {last} %" in part
