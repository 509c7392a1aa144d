"""The generative verifier: its data, its verdicts, weighted self-consistency, ``topr verify|vote``."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from pipeline import contents
from test_recipe import record
from tiny import save, tiny_model, tiny_tokenizer
from torch.nn import functional

from topr_kernels.recipe import (
    Judged,
    Question,
    Record,
    RecordError,
    SettingsError,
    Task,
    VerifySettings,
    VoteSettings,
    held_out_split,
    read_records,
    sampled_accuracy,
    verifier_figures,
    voting,
    weighted_accuracy,
    write_records,
)
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.scoring import Verdict
from topr_kernels.recipe.trained_on import write_trained_on
from topr_kernels.recipe.verifier import (
    Verification,
    answers_to_judge,
    choose_solutions,
    verifier_scores,
)
from topr_kernels.recipe.voting import judged_answers, weighted_majority

VERIFICATION = Verification(VerifySettings().template)


# --- questions and verdicts ------------------------------------------------------------------


def test_a_question_shows_the_solution_and_knows_whether_it_is_right():
    right = record(prompt="1 + 1 =", completion=" 2\n")
    question = VERIFICATION.question(right, 7)
    assert question.group == 7 and question.entry == {"right": True}
    assert question.prompt.startswith("1 + 1 = 2\n\nIs the solution above right?")
    assert '"Verdict: right" or "Verdict: wrong"' in question.prompt
    # What the solution says is not taken for the template's own words.
    odd = record(prompt="{completion} =", completion="{prompt}", reward=-1.0)
    question = Verification("{prompt}|{completion}|{prompt}").question(odd, 0)
    assert question.prompt == "{completion} =|{prompt}|{completion} ="
    assert question.entry == {"right": False}


@pytest.mark.parametrize(
    ("completion", "reason", "verdict"),
    [
        ("1 + 1 is 2.\nVerdict: right\n", "stop", "right"),
        ("Verdict: wrong", "stop", "wrong"),
        ("**Verdict:** Correct.", "stop", "right"),
        ("verdict: INCORRECT", "stop", "wrong"),
        # The last one counts.
        ("Verdict: right\nNo, I misread.\nVerdict: wrong\n", "stop", "wrong"),
        (" yes\n", "stop", "right"),
        ("No.", "stop", "wrong"),
        # Unparsable.
        ("", "stop", None),
        ("It looks right to me.", "stop", None),
        ('"Verdict: right" or "Verdict: wrong"? Verdict: right or wrong', "stop", None),
        ("Verdict: not right", "stop", None),
        ("Verdict: rightly so", "stop", None),
        ("Verdict: maybe", "stop", None),
        ("The verdict is unclear. right", "stop", None),
        # Cut: what followed is not known.
        ("Verdict: right", "length", None),
    ],
)
def test_verdicts(completion: str, reason: str, verdict: str | None):
    question = VERIFICATION.question(record(), 0)
    assert VERIFICATION.parse(completion, reason, question) == verdict


@pytest.mark.parametrize(
    ("verdict", "right", "reward"),
    [
        ("right", True, 1.0),
        ("wrong", False, 1.0),
        ("right", False, -1.0),
        ("wrong", True, -1.0),
        (None, True, -1.0),
        (None, False, -1.0),
    ],
)
def test_a_right_verdict_is_rewarded_and_an_unparsable_one_is_wrong(
    verdict: str | None, right: bool, reward: float
):
    question = VERIFICATION.question(record(reward=1.0 if right else -1.0), 0)
    assert VERIFICATION.reward(verdict, question) == reward


# --- which solutions -------------------------------------------------------------------------


def solutions(rights: list[int], per_group: int = 4) -> list[Record]:
    return [
        record(group=i // per_group, reward=1.0 if right else -1.0)
        for i, right in enumerate(rights)
    ]


def test_all_solutions_are_judged_by_default_and_keep_their_numbers():
    given = solutions([1, 0, 0, 0, 0, 1])
    chosen = choose_solutions(given, VerifySettings())
    assert [r.judged for r in chosen] == [
        Judged(i, i // 4, right) for i, right in enumerate([True, False, False, False, False, True])
    ]
    assert [dataclasses.replace(r, judged=None) for r in chosen] == given


def test_solutions_are_drawn_per_question_and_to_a_share_of_right_ones():
    given = solutions([1, 0, 0, 0] * 50)
    settings = VerifySettings(solutions=3)
    chosen = choose_solutions(given, settings)
    assert len(chosen) == 150
    numbers = [r.judged.record for r in chosen if r.judged]
    assert numbers == sorted(set(numbers))
    assert all(sum(n // 4 == group for n in numbers) == 3 for group in range(50))
    assert chosen == choose_solutions(given, settings)
    assert chosen != choose_solutions(given, dataclasses.replace(settings, seed=1))
    even = choose_solutions(given, VerifySettings(right_share=0.5))
    assert len(even) == 100 and sum(r.reward > 0 for r in even) == 50
    for r in even:
        assert r.judged and r == dataclasses.replace(given[r.judged.record], judged=r.judged)


def test_judgements_are_not_judged():
    with pytest.raises(RecordError, match="record 1, field 'judged': got a judgement"):
        choose_solutions([record(), record(judged=Judged(0, 0, True))], VerifySettings())


# --- records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_records_tell_what_they_judge(tmp_path: Path, suffix: str):
    path = tmp_path / f"records.{suffix}"
    records = [record(judged=Judged(5, 2, False)), record(), record(judged=Judged(0, 0, True))]
    write_records(path, records)
    assert read_records(path) == records


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_answers_to_questions_are_stored_as_before_there_were_judgements(
    tmp_path: Path, suffix: str
):
    path = tmp_path / f"records.{suffix}"
    write_records(path, [record()])
    assert b"judged" not in path.read_bytes()
    assert read_records(path) == [record()]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "field 'judged': expected a mapping"),
        ({"record": 1, "group": 0}, "field 'judged', field 'right': missing"),
        ({"record": -1, "group": 0, "right": True}, r"field 'judged\.record': expected a whole"),
        ({"record": 1, "group": 0, "right": 1}, r"field 'judged\.right': expected true or false"),
        ({"record": 1, "group": 0, "right": True, "x": 1}, "field 'judged', field 'x': unknown"),
    ],
)
def test_bad_judged_fields_are_refused(tmp_path: Path, value: Any, message: str):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**record().to_dict(), "judged": value}) + "\n")
    with pytest.raises(RecordError, match=rf"data\.jsonl, record 0, {message}"):
        read_records(path)


# --- scores and figures ----------------------------------------------------------------------


def judgement(number: int, right: bool, verdict: str | None) -> Record:
    good = verdict is not None and (verdict == "right") == right
    return record(
        group=number,
        reward=1.0 if good else -1.0,
        valid=verdict is not None,
        judged=Judged(number, number // 2, right),
    )


JUDGEMENTS = [
    judgement(0, True, "right"),
    judgement(0, True, "wrong"),
    judgement(1, False, "right"),
    judgement(1, False, "right"),
    judgement(3, False, "wrong"),
    judgement(3, False, None),
    judgement(4, True, None),
    judgement(4, True, "right"),
]


def test_a_score_counts_who_says_right():
    """By the verdict, not by whether it is right; nothing said is not "right"."""
    assert verifier_scores(JUDGEMENTS, 6) == [1, 2, 0, 0, 1, 0]
    with pytest.raises(RecordError, match=r"record 6, field 'judged': got .* expected one of 4"):
        verifier_scores(JUDGEMENTS, 4)
    with pytest.raises(RecordError, match="record 0, field 'judged': got None"):
        verifier_scores([record()], 4)


def test_figures_of_the_verifier():
    found = verifier_figures(JUDGEMENTS)
    assert (found.solutions, found.judgements) == (4, 8)
    assert found.accuracy == 3 / 8
    assert (found.accuracy_on_right, found.accuracy_on_wrong) == (2 / 4, 1 / 4)
    assert found.unparsable_share == 2 / 8
    only = verifier_figures(JUDGEMENTS[:2])
    assert only.accuracy_on_wrong is None and "of wrong" not in str(only)
    with pytest.raises(RecordError, match="record 0, field 'judged': missing"):
        verifier_figures([record()])
    with pytest.raises(ValueError, match="judgements: got none"):
        verifier_figures([])


# --- weighted voting -------------------------------------------------------------------------


class Numbers:
    """Answers are whole numbers; "?" is none."""

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        return None if completion == "?" else completion

    def canonical(self, answer: str) -> str:
        return str(int(answer))

    def reward(self, answer: str | None, question: Question) -> float:
        return 1.0 if answer is not None and int(answer) == question.entry["answer"] else -1.0


def questions(count: int, answer: int = 5) -> list[Question]:
    return [Question(i, f"q{i}", f"q{i}", {"answer": answer}) for i in range(count)]


def vote(answers: list[list[str]], scores: list[list[float]], **options: Any) -> Any:
    records = [
        record(group=i, prompt=f"q{i}", completion=text)
        for i, row in enumerate(answers)
        for text in row
    ]
    flat = [score for row in scores for score in row]
    settings = {"votes": len(answers[0]), "draws": 1, "seed": 0, **options}
    return weighted_accuracy(records, flat, Numbers(), questions(len(answers)), **settings)


@pytest.mark.parametrize(
    ("answers", "scores", "plain", "weighted"),
    [
        # One that the verifier believes in outweighs two that it does not: 4 > 0 + 1.
        (["3", "3", "5"], [0, 1, 4], 0, 1),
        # And the other way round.
        (["5", "5", "3"], [1, 0, 2], 1, 0),
        # Scores of equal answers add up: 2 + 2 > 3; "05" is "5".
        (["3", "5", "05"], [3, 2, 2], 1, 1),
        # Equal sums: the answer with more votes, 1 + 1 = 2.
        (["3", "5", "5"], [2, 1, 1], 1, 1),
        (["5", "3", "3"], [2, 1, 1], 0, 0),
        # Equal sums and votes: the one drawn first.
        (["3", "5"], [1, 1], 0, 0),
        (["5", "3"], [1, 1], 1, 1),
        # A verifier that believes nothing leaves the plain majority, not the first answer.
        (["3", "5", "5"], [0, 0, 0], 1, 1),
        # No parsable answer: no vote, whatever its score.
        (["?", "?", "5"], [9, 9, 0], 1, 1),
        (["?", "?", "3"], [9, 9, 0], 0, 0),
        (["?", "?"], [4, 4], 0, 0),
        # All wrong.
        (["3", "4", "3"], [1, 4, 1], 0, 0),
        # One right answer in a sum of scores that is not the largest.
        (["5", "4", "4"], [3, 2, 2], 0, 0),
    ],
)
def test_votes_by_hand(answers: list[str], scores: list[float], plain: int, weighted: int):
    found = vote([answers], [scores])
    assert (found.maj_at_k, found.weighted_at_k) == (plain, weighted)
    assert found.maj_at_k_error is None and found.weighted_at_k_error is None
    assert found.pass_at_1 == sum(a in ("5", "05") for a in answers) / len(answers)


def test_what_does_not_vote_does_not_win():
    rows = [[(None, True, 5.0)], [("5", True, 0.0)]]
    assert weighted_majority(rows, votes=1, draws=1, seed=0) == (0.5, None)


def test_questions_count_alike():
    found = vote(
        [["3", "3", "5"], ["3", "?", "?"], ["5", "5", "5"]], [[0, 0, 1], [4, 0, 0], [0, 0, 0]]
    )
    assert found.maj_at_k == 1 / 3 and found.weighted_at_k == 2 / 3
    assert found.pass_at_1 == 4 / 9


def test_draws_and_the_papers_standard_error():
    """K of N drawn, by hand; the error is sqrt(K V / (N - K)) of each way of voting."""
    draw = random.Random(3)
    texts = [[draw.choice(["3", "4", "5", "?"]) for _ in range(6)] for _ in range(10)]
    scores = [[draw.randrange(3) for _ in range(6)] for _ in range(10)]
    found = vote(texts, scores, votes=4, draws=30, seed=11)
    for name, weigh in (("maj", False), ("weighted", True)):
        draw, accuracies = random.Random(11), []
        for _ in range(30):
            right = 0
            for row, weights in zip(texts, scores, strict=True):
                drawn = draw.sample(list(zip(row, weights, strict=True)), 4)
                named = [text for text, _ in drawn if text != "?"]
                sums = {
                    text: (sum(w for t, w in drawn if t == text) if weigh else 0, named.count(text))
                    for text in named
                }
                best = [text for text in named if sums[text] == max(sums.values())]
                right += bool(best) and best[0] == "5"
            accuracies.append(right / 10)
        assert getattr(found, f"{name}_at_k") == pytest.approx(statistics.fmean(accuracies))
        error = math.sqrt(4 * statistics.variance(accuracies) / (6 - 4))
        assert error > 0 and getattr(found, f"{name}_at_k_error") == pytest.approx(error)


def test_plain_votes_are_those_of_evaluate():
    draw = random.Random(0)
    texts = [[draw.choice(["3", "5", "05", "?"]) for _ in range(5)] for _ in range(8)]
    found = vote(texts, [[draw.random() for _ in range(5)] for _ in range(8)], votes=3, draws=20)
    records = [record(group=i, completion=t) for i, row in enumerate(texts) for t in row]
    plain = sampled_accuracy(records, Numbers(), questions(8), votes=3, draws=20, seed=0)
    assert (found.maj_at_k, found.maj_at_k_error) == (plain.maj_at_k, plain.maj_at_k_error)
    assert found.pass_at_1 == pytest.approx(plain.pass_at_1)
    # Weights that are all alike change nothing.
    alike = vote(texts, [[2.0] * 5] * 8, votes=3, draws=20)
    assert alike.weighted_at_k == plain.maj_at_k
    assert alike.weighted_at_k_error == plain.maj_at_k_error


def test_senseless_votes_are_refused():
    with pytest.raises(ValueError, match="scores: got 1; expected one per answer, 2"):
        vote([["3", "5"]], [[1]])
    with pytest.raises(ValueError, match="votes: got 3; expected 1 to 2"):
        vote([["3", "5"]], [[1, 1]], votes=3)


def test_only_answers_to_these_questions_that_can_be_parsed_are_judged():
    asked = questions(2)
    records = [
        record(group=i, prompt=f"q{i}", completion=text)
        for i, row in enumerate((["5", "?"], ["?", "3"]))
        for text in row
    ]
    judged, found = answers_to_judge(records, Numbers(), asked, "x.parquet")
    assert [r.judged.record for r in judged if r.judged] == [0, 3]
    assert [verdict.answer for verdict in found] == ["5", None, None, "3"]
    with pytest.raises(RecordError, match=r"x\.parquet: holds 3 answers to 2 questions"):
        answers_to_judge(records[:3], Numbers(), asked, "x.parquet")
    records[2] = dataclasses.replace(records[2], prompt="another")
    with pytest.raises(RecordError, match=r"x\.parquet, record 2, field 'prompt'.*question 1"):
        answers_to_judge(records, Numbers(), asked, "x.parquet")


# --- the commands ----------------------------------------------------------------------------

TASK = [
    *("--task", "chain_sum", "--questions", "24", "--held-out", "40", "--max-new-tokens", "6"),
    *("--task-config", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
]
JUDGE = [
    *("--template", "{prompt}{completion}\n?", "--one-line", "--max-new-tokens", "6"),
    *("--sample-batch", "16"),
]
FLAGS = {
    "generate": [*TASK, "--samples", "4"],
    "evaluate": [*TASK, "--eval-samples", "4", "--votes", "3", "--draws", "20"],
    "verify": [*JUDGE, "--samples", "3", "--right-share", "0.4"],
    "score": ["--batch-size", "4"],
    "curate": ["--positive-share", "0.5"],
    "train": ["--batch-size", "4", "--lr", "1e-4"],
    "vote": [*JUDGE, *TASK, "--judgements", "2", "--votes", "3", "--draws", "20"],
}
OUT = {
    "generate": "samples.parquet",
    "evaluate": "evaluation.json",
    "verify": "judgements.parquet",
    "score": "scored.parquet",
    "curate": "curated.parquet",
    "train": "verifier",
    "vote": "vote.json",
}
READS = {
    "verify": "samples.parquet",
    "score": "judgements.parquet",
    "curate": "scored.parquet",
    "train": "curated.parquet",
    "vote": "evaluation.parquet",
}


def judge_model() -> Any:
    """The tiny model, taught that "yes" or "no" follows sums and a question mark."""
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        sums = [[draw.randrange(10) for _ in range(12)] for _ in range(16)]
        text = "{} + {} = {}\n" * 4 + "? "
        # Of equal length, so that there is nothing to pad.
        lines = [text.format(*row) + draw.choice(["yes\n", "no\n\n"]) for row in sums]
        ids = torch.tensor(tokenizer(lines)["input_ids"])
        logits = model(ids).logits[:, :-1]
        # Of the verdict alone.
        loss = functional.cross_entropy(logits[:, -5:].flatten(0, 1), ids[:, -5:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("solver", tiny_model()), ("judge", judge_model())):
        save(model, folder / name)
    return {name: folder / name for name in ("solver", "judge")}


def run(command: str, folder: Path, models: dict[str, Path], *flags: str, out: str = "") -> int:
    argv = [command, *FLAGS[command], "--out", str(folder / (out or OUT[command]))]
    if command == "vote":
        argv += ["--model", str(folder / "verifier")]
    elif command != "curate":
        argv += [
            "--model",
            str(models["solver" if command in ("generate", "evaluate") else "judge"]),
        ]
    if command in READS:
        argv += ["--records", str(folder / READS[command])]
    return main([*argv, *flags])


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of unbroken runs: a verifier trained on judgements, and a vote that it weighs."""
    folder = tmp_path_factory.mktemp("whole")
    for command in FLAGS:
        assert run(command, folder, models) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(whole, tmp_path / "copy"))


def manifest(folder: Path, command: str) -> dict[str, Any]:
    name = OUT[command] + ("" if OUT[command].endswith(".json") else ".json")
    return dict(json.loads((folder / name).read_text()))


def test_judgements_tell_which_solution_they_are_of(whole: Path):
    solved = read_records(whole / "samples.parquet")
    judgements = read_records(whole / "judgements.parquet")
    groups = [r.group for r in judgements]
    assert groups == [n for n in sorted(set(groups)) for _ in range(3)]
    for r in judgements:
        assert r.judged is not None and r.judged.record == r.group
        solution = solved[r.group]
        assert (r.judged.group, r.judged.right) == (solution.group, solution.reward > 0)
        assert r.prompt == f"{solution.prompt}{solution.completion.rstrip()}\n?"
        verdict = {"yes": True, "no": False}.get(r.completion.strip())
        assert r.valid == (verdict is not None)
        assert (r.reward > 0) == (verdict == r.judged.right)
    assert {r.reward for r in judgements} == {1.0, -1.0}
    assert {r.completion.strip() for r in judgements} >= {"yes", "no"}
    found = manifest(whole, "verify")["figures"]
    assert found["accuracy"] == found["positive_share"]
    assert found["unparsable_share"] == found["invalid_share"]
    rights = [r.judged.right for r in judgements if r.judged]
    assert sum(rights) / len(rights) == pytest.approx(0.4, abs=0.07)
    # They went through score, curate and train as any records do.
    curated = read_records(whole / "curated.parquet")
    assert all(r.behavior_log_prob and r in read_records(whole / "scored.parquet") for r in curated)
    assert {r.judged for r in curated} <= {r.judged for r in judgements}
    assert manifest(whole, "train")["figures"]["steps"] == -(-len(curated) // 4)


def test_a_vote_reports_both_ways_and_the_verifier(whole: Path, models: dict[str, Path]):
    found = manifest(whole, "vote")["figures"]
    plain = manifest(whole, "evaluate")["figures"]
    for name in ("questions", "samples", "votes", "maj_at_k", "maj_at_k_error"):
        assert found[name] == plain[name], name
    assert found["pass_at_1"] == pytest.approx(plain["pass_at_1"])
    answers = read_records(whole / "evaluation.parquet")
    judgements = read_records(whole / "vote.parquet")
    parsed = [i for i, r in enumerate(answers) if r.valid]
    assert [r.group for r in judgements] == [i for i in parsed for _ in range(2)]
    assert found["verifier"]["solutions"] == len(parsed)
    assert found["verifier"]["accuracy"] == statistics.fmean(r.reward > 0 for r in judgements)
    says = [0] * len(answers)
    for r in judgements:
        says[r.group] += r.completion.strip() == "yes"
    asked = held_out_split(Task("chain_sum", json.loads(TASK[-1])), 0, 40, 0)[1]
    expected = weighted_accuracy(answers, says, Task(), asked, votes=3, draws=20, seed=0)
    for name in ("maj_at_k", "weighted_at_k", "weighted_at_k_error"):
        assert found[name] == getattr(expected, name) > 0, name
    assert found["weighted_at_k"] != found["maj_at_k"]
    # By the trained verifier, not by the one it was trained from.
    assert manifest(whole, "vote")["inputs"]["model"]["file"] == "verifier"
    assert {r.sampling.model for r in judgements} == {"verifier"}
    for path in whole.glob("*.json"):
        assert str(whole.parent) not in path.read_text()
    assert not list(whole.glob(".*"))


@pytest.mark.parametrize("command", ["verify", "vote"])
def test_an_interrupted_command_continues(
    command: str, whole: Path, copy: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    for path in copy.glob(f"{Path(OUT[command]).stem}*"):
        path.unlink()
    generate = importlib.import_module("topr_kernels.recipe.generate")
    original, calls = generate.complete, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(generate, "complete", interrupted)
    assert run(command, copy, models) == 130
    assert not (copy / OUT[command]).exists()
    assert len(list(copy.glob(".*.partial/parts/*.parquet"))) == 1
    assert run(command, copy, models) == 0
    assert contents(copy) == contents(whole)
    batches = len(calls) - 1
    assert run(command, copy, models) == 0
    assert len(calls) - 1 == batches


@pytest.mark.parametrize(
    ("command", "told"),
    [("verify", "solutions: "), ("vote", "answers: 160 to 40 questions, ")],
)
def test_a_dry_run_tells_and_writes_nothing(
    command: str, told: str, copy: Path, models: dict[str, Path], capsys: Any
):
    before = contents(copy)
    assert run(command, copy, models, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "finished: nothing to do" in text and told in text
    count = len(read_records((copy / OUT[command]).with_suffix(".parquet")))
    assert f"{count} samples" in text
    new = "new.json" if command == "vote" else "new.parquet"
    assert run(command, copy, models, "--dry-run", out=new) == 0
    assert "starts anew" in capsys.readouterr().out
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("verify", ["--samples", "2"], "--samples: 3 there, 2 now"),
        ("verify", ["--template", "{prompt}{completion}!"], "--template: "),
        ("vote", ["--judgements", "1"], "--judgements: 2 there, 1 now"),
        ("vote", ["--votes", "2"], "--votes: 3 there, 2 now"),
    ],
)
def test_other_settings_are_refused(
    command: str, flags: list[str], message: str, copy: Path, models: dict[str, Path], capsys: Any
):
    before = contents(copy)
    for dry in ([], ["--dry-run"]):
        assert run(command, copy, models, *flags, *dry) == 2
        assert message in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("verify", ["--template", "{completion}"], "expected {prompt} in it"),
        ("verify", ["--right-share", "2"], "right_share: got 2.0; expected at most 1"),
        ("vote", ["--votes", "5"], "votes: got 5; expected at most 4, the answers to a question"),
        ("vote", ["--question-seed", "3"], "field 'prompt': is not that of held-out question"),
        ("vote", ["--held-out", "7"], "holds 160 answers to 7 questions"),
    ],
)
def test_senseless_settings_are_refused(
    command: str, flags: list[str], message: str, copy: Path, models: dict[str, Path], capsys: Any
):
    new = "new.json" if command == "vote" else "new.parquet"
    for dry in ([], ["--dry-run"]):
        assert run(command, copy, models, *flags, *dry, out=new) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (copy / new).exists()
    # They bind nobody.
    assert run(command, copy, models, out=new) == 0


@pytest.mark.parametrize("known", ["questions", "judgements"])
def test_a_verifier_is_not_measured_on_what_it_was_trained_on(
    known: str, whole: Path, copy: Path, tmp_path: Path, capsys: Any
):
    verifier = Path(shutil.copytree(whole / "verifier", tmp_path / "judge"))
    source = {"questions": "evaluation.parquet", "judgements": "vote.parquet"}[known]
    write_trained_on(verifier, read_records(whole / source), "")
    argv = ["vote", *FLAGS["vote"], "--model", str(verifier), "--out", str(copy / "again.json")]
    for dry in ([], ["--dry-run"]):
        assert main([*argv, "--records", str(copy / "evaluation.parquet"), *dry]) == 2
        error = capsys.readouterr().err
        assert {"questions": "40 of the 40 held-out", "judgements": "trained to judge"}[
            known
        ] in error


def test_judgements_are_not_taken_for_solutions(copy: Path, models: dict[str, Path], capsys: Any):
    argv = ["verify", *JUDGE, "--model", str(models["judge"]), "--out", str(copy / "new.parquet")]
    assert main([*argv, "--records", str(copy / "judgements.parquet")]) == 2
    assert "field 'judged': got a judgement; expected solutions" in capsys.readouterr().err


def test_a_vote_without_a_parsable_answer(copy: Path, models: dict[str, Path], capsys: Any):
    path = copy / "evaluation.parquet"
    (copy / "evaluation.json").unlink()
    write_records(
        path, [dataclasses.replace(r, completion="?", valid=False) for r in read_records(path)]
    )
    assert run("vote", copy, models, out="none.json") == 0
    found = json.loads((copy / "none.json").read_text())["figures"]
    assert found["verifier"] is None and found["weighted_at_k"] == found["maj_at_k"] == 0
    assert read_records(copy / "none.parquet") == []


def test_a_vote_judges_each_answer_once_and_counts_what_failed(
    copy: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    given: list[int] = []

    def fail(task: Any, answers: list[Any]) -> list[Verdict]:
        given.append(len(answers))
        return [Verdict(None, None, -1.0, "died" if i else "") for i in range(len(answers))]

    monkeypatch.setattr(voting, "verdicts", fail)
    assert run("vote", copy, models, out="none.json") == 0
    found = json.loads((copy / "none.json").read_text())["figures"]
    assert given == [160] and found["scorer_problems"] == {"died": 159}
    with pytest.raises(ValueError, match="judged: got 1; expected one per record, 2"):
        judged_answers([record(group=0)] * 2, Numbers(), questions(1), 1, [Verdict("1", "1", 1.0)])


def test_settings_of_a_verifier_are_checked():
    for kind in (VerifySettings, VoteSettings):
        assert kind().max_new_tokens == 256 and "{completion}" in kind().template
        with pytest.raises(SettingsError, match=r"template: got 'x'; expected \{prompt\} in it"):
            kind(template="x")


@pytest.mark.parametrize("command", ["verify", "vote"])
def test_help_names_every_flag_with_its_default(command: str, capsys: Any):
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: topr {command} --model" in text and "continues a run" in text
    assert "--template" in text and "(default: 256)" in text and "None" not in text
