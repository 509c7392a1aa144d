"""benchmarks/learning/world: its sums, its losses, its runner, the rule and the committed page."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a folder of the repository, not of the package

from benchmarks.learning import page as large  # noqa: E402
from benchmarks.learning.verdicts import interval  # noqa: E402
from benchmarks.learning.world import __main__ as world  # noqa: E402
from benchmarks.learning.world import claims, page, pilot, run, store, sums, verifier  # noqa: E402
from benchmarks.learning.world.cells import GRIDS, MOST_SEEDS, SEEDS, Cell, cells_of  # noqa: E402
from benchmarks.learning.world.model import COURSES, new_model, sample, score, sequences  # noqa: E402


def text(ids: torch.Tensor) -> str:
    return "".join(sums.ALPHABET[i] for i in ids.tolist())


def test_sums_are_worked_and_judged_by_their_result():
    # 312 + 132 and 133 + 321 in base four.
    questions = torch.tensor([[[2, 2], [1, 3], [3, 1]], [[3, 1], [3, 2], [1, 3]]])
    assert text(sums.prompts(questions)[0]) == "a22b13c31="
    honest, habit = (torch.full((2,), x) for x in (False, True))
    assert text(sums.solutions(questions, honest)[0]) == "a22010b13111c31111\n"
    assert text(sums.solutions(questions, habit)[0]) == "a22010b13010c31010\n"
    assert sums.truth(questions).tolist() == [[0, 1, 1, 1], [0, 2, 1, 1]]
    said, readable = sums.results(sums.solutions(questions, honest), 3)
    assert readable.all() and said.equal(sums.truth(questions))
    for place, token in ((18, 0), (6, sums.LETTER), (5, sums.BASE)):
        broken = sums.solutions(questions, honest)
        broken[0, place] = token
        assert sums.results(broken, 3)[1].tolist() == [False, True]


def test_a_longer_answer_works_the_sum_again():
    questions = torch.tensor([[[2, 2], [1, 3], [3, 1]]])
    once, twice = (sums.solutions(questions, torch.tensor([False]), n) for n in (1, 2))
    assert text(twice[0]) == "a22010b13111c31111d22010e13111f31111\n"
    assert Cell("", passes=2).tokens == twice.shape[1] and Cell("").tokens == once.shape[1]
    # The last pass counts; letters stand in their place in each.
    twice[0, 10] = 2
    said, readable = sums.results(twice, 3)
    assert readable.all() and said.equal(sums.truth(questions))
    for place in (29, 6):
        broken = twice.clone()
        broken[0, place] = 3
        said, readable = sums.results(broken, 3)
        assert readable.item() == (place == 29) and said.equal(sums.truth(questions)) == (
            place != 29
        )


@pytest.mark.parametrize("columns", [3, 10])
def test_forgetting_is_wrong_on_every_question(columns: int):
    questions = sums.draw(200, columns, torch.Generator().manual_seed(0))
    forgotten = sums.solutions(questions, torch.ones(200, dtype=torch.bool))
    by_habit = sums.results(forgotten, columns)[0]
    assert not (by_habit == sums.truth(questions)).all(1).any()
    numbers = (questions * 4 ** torch.arange(columns)[:, None].double()).sum((1, 2))
    digits = sums.truth(questions) * 4 ** torch.arange(columns + 1).double()
    assert digits.sum(1).equal(numbers)


def test_samples_end_and_are_scored_as_the_model_has_them():
    model = new_model(0).eval()
    questions = sums.draw(12, 2, torch.Generator().manual_seed(1))
    asked = sums.prompts(questions)
    answers = sample(model, asked, 13, torch.Generator().manual_seed(2), batch=5)
    answers[0, 4:] = sums.END
    ids, labels = sequences(asked, answers)
    assert labels[0].tolist() == [-100] * 7 + answers[0, :5].tolist() + [-100] * 8
    log_prob = score(model, asked, answers, batch=5)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    chosen = wanted.gather(2, ids[:, 1:, None])[..., 0]
    scored = labels[:, 1:] != -100
    torch.testing.assert_close(log_prob[:, 1:][scored], chosen[scored], rtol=1e-4, atol=1e-5)
    # Sampled greedily, every token is the likeliest.
    best = sample(model, asked, 13, torch.Generator(), greedy=True)
    ids, labels = sequences(asked, best)
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits.argmax(2)[:, :-1]
    assert likeliest[labels[:, 1:] != -100].equal(labels[labels != -100])


def test_the_prefix_ratio_has_its_gradient():
    log_prob = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ratio = torch.tensor([[-0.5, 0.2, 0.7], [1.0, -1.5, 9.0]])
    for sign in (-1.0, 1.0):
        log_prob.grad = None
        loss, weight = run.prefix_loss(log_prob, ratio, mask, torch.tensor([sign, sign]))
        loss.backward()
        w = (
            torch.tensor([[-0.5, -0.3, 0.0], [0.0, -0.5, 0.0]]).exp()
            if sign < 0
            else torch.ones(2, 3)
        )
        length = torch.tensor([[3.0], [2.0]])
        torch.testing.assert_close(log_prob.grad, -sign * w * mask / length / 2)
        torch.testing.assert_close(weight, (w * mask).sum(1) / length[:, 0])


CASES = [("topr", "sequence"), ("topr", "segment"), ("ppo", "sequence"), ("prefix", "sequence")]


@pytest.mark.parametrize(("method", "ratio"), CASES)
def test_losses_are_equal_before_the_first_update(method: str, ratio: str):
    """All ratios are 1, so every method's gradient is naive REINFORCE's."""
    model = new_model(0)
    data = run.draw(model, Cell("", columns=2, questions=3, samples=2), 0)
    data = data._replace(reward=torch.tensor([1.0, -1, 1, -1, -1, 1]))
    ids, labels = sequences(data.prompts, data.answers)
    gradients = []
    for cell in (Cell(method, ratio=ratio), Cell("reinforce")):
        model.zero_grad()
        run.objective(cell, model(input_ids=ids).logits, labels, data, 0.3)[0].backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_segment_is_a_column_of_the_answer():
    columns = run.columns_of(torch.zeros(2, 20), torch.zeros(2, 13))
    assert columns.tolist() == [[0] * 7 + [0] * 6 + [1] * 7] * 2


def test_a_run_resumes_and_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run, "CACHE", tmp_path)
    out = tmp_path / "out.json"
    assert world.main(["--quick", "--out", str(out)]) == 0
    (name,) = first = store.read(out)
    assert name in capsys.readouterr().out
    world.main(["--quick", "--out", str(out)])
    assert not capsys.readouterr().out, "it ran again"
    store.add(tmp_path / "other.json", name, run.run(world.QUICK, world.QUICK.rate))
    again = store.read(tmp_path / "other.json")
    assert {**again[name], "seconds": 0} == {**first[name], "seconds": 0}


def test_long_answers_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "CACHE", tmp_path)
    cell = Cell("topr", columns=2, passes=9, questions=2, samples=2, epochs=2, batch=4)
    for table, value in ((run.HELD_OUT, 2), (run.BASES, 1), (COURSES, [(1, 1, 2), (9, 1, 2)])):
        monkeypatch.setitem(table, cell.tokens, value)
    assert list(run.run(cell, 1e-4)["looks"]) == ["2"]


def test_rounds_sample_anew_and_curation_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "KEPT", 6)
    cell = Cell("topr", columns=2, rounds=2, questions=4, samples=4, epochs=1, batch=4)
    found = run.run(dataclasses.replace(cell, curation="uniform"), 1e-3)
    assert list(found["looks"]) == ["1", "2"] and len(found["positive"]) == 2
    data, other = (run.draw(run.base_model(2, 1, 50, "habit", 0), cell, turn) for turn in (0, 1))
    assert not data.prompts.equal(other.prompts)
    reward = torch.tensor([-1.0, 1, 1, -1] * 2 + [-1] * 8)
    data = data._replace(reward=reward)
    kept = run.chosen(dataclasses.replace(cell, curation="karenina"), data, 0)
    assert len(kept.reward) == 6 and kept.reward.sum() == 2 - 4
    assert kept.prompts[kept.reward > 0].equal(data.prompts[[1, 5]])
    assert len(run.chosen(dataclasses.replace(cell, curation="uniform"), data, 0).reward) == 6
    half = run.chosen(dataclasses.replace(cell, curation="half"), data, 0)
    assert sorted(half.reward.tolist()) == [-1.0] * 4 + [1.0] * 4


def test_votes_count_the_commonest_result(monkeypatch: pytest.MonkeyPatch):
    honest, habit = torch.tensor([False]), torch.tensor([True])

    def answers(_: Any, asked: torch.Tensor, tokens: int, __: torch.Generator) -> torch.Tensor:
        questions = asked[:, :-1].unflatten(1, (3, 3))[:, :, 1:]
        # Two of three right for the first question, one of three for the second.
        forgets = (habit, honest, honest, habit, habit, honest)
        rows = [sums.solutions(q[None], f) for q, f in zip(questions, forgets, strict=True)]
        return torch.cat(rows)

    monkeypatch.setattr(run, "sample", answers)
    found = run.vote(new_model(0), Cell("topr", votes=3), questions=2)
    assert found == {"single": 50.0, "majority": 50.0}
    monkeypatch.setattr(run, "sample", lambda *a: answers(*a)[[1, 1, 0, 4, 5, 5]])
    assert run.vote(new_model(0), Cell("topr", votes=3), questions=2)["majority"] == 100.0
    results = {"topr epochs=1 votes=8 seed=4": {"votes": {"single": 80.0, "majority": 83.0}}}
    claim = next(c for c in claims.CLAIMS if "majority of 8" in c.text)
    assert claims.differences(results, claim) == {4: 3.0}


def test_a_verifier_is_judged_by_the_truth_of_its_words():
    said = torch.tensor([[verifier.RIGHT, sums.END]] * 2 + [[verifier.WRONG, sums.END]] * 2
                        + [[sums.END, sums.END], [verifier.RIGHT, 0]])  # fmt: skip
    right = torch.tensor([True, False, True, False, False, True])
    true, readable = verifier.judge(said, right)
    assert true.tolist() == [True, False, False, True, False, False]
    assert readable.tolist() == [True] * 4 + [False] * 2
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(4000) % 2 == 0
    assert verifier.judge(verifier.judgements(right, False, generator), right)[0].all()
    true, readable = verifier.judge(verifier.judgements(right, True, generator), right)
    assert readable.float().mean().item() == pytest.approx(1 - verifier.SILENT, abs=0.03)
    assert true[readable].float().mean().item() == pytest.approx(verifier.TRUE, abs=0.03)


def test_a_verifier_trains_and_weighs_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "CACHE", tmp_path)
    cell = Cell(
        "topr", columns=2, questions=4, samples=4, epochs=1, batch=8, verifier=True, votes=3
    )
    found = run.run(cell, 1e-4)
    assert set(found["votes"]) == {"single", "majority", "untrained", "trained"}
    data = run.draw(run.base_verifier(2, 0), cell, 0)
    assert data.prompts.shape == (16, 7 + 13) and data.answers.shape == (16, verifier.TOKENS)

    # One answer of three is right; only the judge who knows it gives it weight.
    rows = [sums.solutions(torch.tensor([[[3, 1], [1, 1]]]), torch.tensor([f]))
            for f in (True, False, True)]  # fmt: skip
    question = torch.tensor([[[3, 1], [1, 1]]])
    monkeypatch.setattr(run.sums, "draw", lambda count, *_: question.expand(count, -1, -1))
    monkeypatch.setattr(run, "sample", lambda _, asked, *__: torch.cat(rows * (len(asked) // 3)))
    knowing = run.base_verifier(2, 1)

    def ask(model: Any, prompts: torch.Tensor, answers: torch.Tensor, _: Any) -> Any:
        right = (
            torch.arange(len(answers)) % 3 == 1
            if model is knowing
            else torch.arange(len(answers)) % 3 == 0
        )
        return verifier.judgements(right, False, torch.Generator()), None

    monkeypatch.setattr(run.verifier, "ask", ask)
    found = run.vote(knowing, cell, questions=2)
    assert (found["majority"], found["untrained"], found["trained"]) == (0.0, 0.0, 100.0)
    claim = next(c for c in claims.CLAIMS if c.text.endswith("beat plain ones"))
    results = {"topr votes=8 verifier=True seed=4": {"votes": found}}
    assert claims.differences(results, claim) == {4: 100.0}


def test_rates_are_the_pilots_better_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[Cell] = []

    def fake(cell: Cell, rate: float) -> dict[str, Any]:
        ran.append(cell)
        right = {3e-5: 99.0, 1e-4: 50.0, 3e-4: 60.0, 1e-3: 99.0}[rate] + (cell.method == "tis") * (
            rate == 1e-4
        ) * 20
        return {"looks": {"1": {"right": 99.0}, "4": {"right": right}}}

    monkeypatch.setattr(pilot, "run", fake)
    path = tmp_path / "pilot.json"
    assert pilot.rate(Cell("topr", seed=3, share=0.1), path) == 3e-4
    assert {c.seed for c in ran} == set(pilot.SEEDS) and {c.share for c in ran} == {0.0}
    count = len(ran)
    assert pilot.rate(Cell("reinforce", batch=128, like="topr"), path) == pytest.approx(6e-4)
    assert len(ran) == count
    assert pilot.rate(Cell("tis"), path) == 1e-4
    # Answers of 199 tokens take the rates of 55; outer rates are tried and choose nothing.
    assert pilot.rate(Cell("topr", passes=11), path) == 3e-4
    assert ran[-1].passes == 3
    del ran[:]
    pilot.complete(Cell("tis"), pilot.WIDER, path)
    assert [c.rate for c in ran] == [3e-5, 3e-5, 1e-3, 1e-3]
    assert pilot.rate(Cell("tis"), path) == 1e-4


def test_pilots_seeds_are_in_no_comparison():
    assert not set(pilot.SEEDS) & set(range(MOST_SEEDS))
    assert SEEDS <= MOST_SEEDS


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 3.0, "reproduced"),
        (-3.0, -1.0, "not reproduced"),
        (-1.0, 3.0, "too small to tell"),
        (-1.9, 1.9, claims.NO_DIFFERENCE),
        (0.5, 1.9, claims.NO_DIFFERENCE),
        (-2.1, 1.9, "too small to tell"),
    ],
)
def test_the_rule(low: float, high: float, expected: str):
    mean, half = (low + high) / 2, (high - low) / 2
    # Of ten values m - d and m + d in turn the half-width is 2.262 d / 3.
    spread = half * 3 / 2.262
    values = [mean + spread * (-1) ** i for i in range(10)]
    assert claims.verdict(values) == expected
    assert claims.verdict(values[:9]) == "not run"


def test_differences_pair_seeds():
    def figures(base: float, *looks: float) -> dict[str, Any]:
        return {
            "base": {"right": base},
            "looks": {str(i): {"right": x} for i, x in enumerate(looks)},
        }

    results = {
        "topr seed=0": figures(40, 99, 90), "topr seed=1": figures(50, 99, 91),
        "sft seed=1": figures(50, 99, 94), "sft seed=2": figures(50, 99, 10),
    }  # fmt: skip
    found = {c.text: claims.differences(results, c) for c in claims.CLAIMS}
    assert found["TOPR beats positives only"] == {1: -3}
    assert found["TOPR learns off-policy"] == {0: 50, 1: 41}
    assert found["naive REINFORCE collapses below the base"] == {}


def test_every_claim_is_planned_and_every_cell_named_once():
    planned = {cell for cells in GRIDS.values() for cell in cells}
    for claim in claims.CLAIMS:
        assert planned.issuperset(claims.cells_of_claim(claim)), claim.text
    names = {cell.name for cell in planned}
    assert len(names) == len(planned)
    assert {c.seed for c in cells_of("methods", range(1, 6, 2))} == {1, 3, 5}
    # The claims of the large page are here, in its words.
    assert {claim.text for claim in large.CLAIMS} <= {claim.text for claim in claims.CLAIMS}


def test_the_page_is_of_the_committed_figures():
    """`python -m benchmarks.learning.world --report` writes it."""
    results, tried = store.read(world.RESULTS), store.read(world.PILOT)
    shown = (world.FOLDER / "README.md").read_text(encoding="utf-8")
    assert large.fill(shown, page.blocks(results, tried)) == shown
    path = world.FOLDER / "map.png"
    if path.exists():
        with Image.open(path) as image:
            assert image.text["Description"] == large.fingerprint(results, page.draw)
    assert path.exists() == ("(map.png)" in shown)
    planned = {c.name for cells in GRIDS.values() for c in cells}
    assert {re.sub(r"seed=\d+$", "seed=0", name) for name in results} <= planned


#: In the order of the README: what stands before a figure, its claim, and the sign it is told with.
QUOTED = [
    ("behind positives only by", "TOPR beats positives only where 10 % are right", -1),
    ("a tenth right, by", "TOPR beats positives only", -1),
    ("has half, by", "TOPR beats positives only where 80 % are right", -1),
    (
        "half are right gains",
        "half of the records right, as the recipe makes it, beats all where 10 % are right",
        1,
    ),
    (
        "keeping all, and comes to within",
        "half of the records right, as the recipe makes it: TOPR beats positives only",
        -1,
    ),
    (
        "p̃ = 80 % comes to within",
        "TOPR at p̃ = 80 % beats positives only where 10 % are right (added later)",
        -1,
    ),
    ("is behind 50 % by", "TOPR: p̃ = 10 % beats 50 %", -1),
    ("Naive REINFORCE falls", "naive REINFORCE collapses below the base", 1),
    ("beats each token's by", "the ratio of the sequence beats that of each token", 1),
    ("at 19 tokens, by", "55 tokens: the sequence's ratio beats each token's", 1),
    ("at 55, by", "199 tokens: the sequence's ratio beats each token's", 1),
    ("the geometric mean by", "the ratio of the sequence beats the geometric mean", 1),
    ("and ends behind TOPR by", "TOPR beats naive REINFORCE at 3e-5", 1),
    ("leads each token's by", "19 tokens: the sequence's ratio beats each token's at 3e-05", 1),
    ("at 19 tokens, by", "55 tokens: the sequence's ratio beats each token's at 3e-05", 1),
    ("at 55 and by", "199 tokens: the sequence's ratio beats each token's at 2e-05", 1),
    ("at 19, by", "55 tokens: the sequence's ratio beats the geometric mean", 1),
    ("at 55, by", "199 tokens: the sequence's ratio beats the geometric mean", 1),
]


def test_the_docs_quote_the_small_world():
    def under_the_heading(page: str) -> str:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\u2212", "-")
        section = text.partition("## When do negatives help?\n")[2].partition("\n## ")[0]
        # Behind the picture stands what others found.
        return " ".join(section.partition("\n![")[0].split())

    part = under_the_heading("docs/method.md")
    rounded = {"80"}
    results = store.read(world.RESULTS)
    by_text = {claim.text: claim for claim in claims.CLAIMS}
    for phrase, name, sign in QUOTED:
        values = [sign * v for v in claims.differences(results, by_text[name]).values()]
        found = interval(values)
        shown = f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"
        rounded |= {f"{found.mean:.1f}", f"{found.mean:.0f}"}
        told = f"{found.mean:.1f} points ({found.low:.1f} to {found.high:.1f})"
        assert re.search(rf"{re.escape(phrase)} ({re.escape(shown)}|{re.escape(told)})", part), (
            shown
        )
        # Whoever reads "behind" is told so by the interval, or that it is level.
        assert found.low > 0 or "within" in phrase
    assert len(re.findall(r"\d to \d", part)) == len(QUOTED)
    # README rounds the same figures.
    assert set(re.findall(r"\b\d+\.\d|\b\d\d\b", under_the_heading("README.md"))) <= rounded
    # "In any epoch, batch size, ...": nowhere does the map have TOPR ahead.
    for _, changes in page._PLACES:
        for right in page.RIGHT:
            for epoch in page._EPOCHS:
                values = page._help(results, changes, right, epoch)
                assert len(values) < claims.LEAST_SEEDS or interval(values).low <= 0


def test_a_page_of_other_figures(tmp_path: Path):
    """Every table and the picture, from made-up figures."""

    def made(right: float, weight: float | None) -> dict[str, Any]:
        looks = {e: {"right": right, "unreadable": 1.0, "weight": weight} for e in ("1", "2", "4")}
        return {"base": {"right": 40.0, "unreadable": 0.0}, "looks": looks, "seconds": 36.0}

    results = {
        dataclasses.replace(Cell(m, right=right), seed=seed).name: made(
            90 + seed + 2 * (m == "sft"), w
        )
        for m, w in (("topr", 0.5), ("sft", None))
        for right in (10, 50)
        for seed in range(10)
    }
    readme = tmp_path / "README.md"
    readme.write_text((world.FOLDER / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    page.write(results, {}, readme)
    text = readme.read_text(encoding="utf-8")
    assert "TOPR beats positives only | -2.0 [-2.0, -2.0] | 10 | **not reproduced**" in text
    assert (
        "| 19 tokens, 32 x 16 samples, batch 32 | 4 | -2.0 [-2.0, -2.0] | -2.0 [-2.0, -2.0] | - |"
        in text
    )
    assert (
        "| TOPR | 10 | 40.0 ± 0.0 | 1: 94.5 ± 2.2; 2: 94.5 ± 2.2; 4: 94.5 ± 2.2 | 1.0 % | 0.5 → 0.5 |"
        in text
    )
    assert "40 cells, " in text and "0.40 hours" in text
    assert (tmp_path / "map.png").exists()
