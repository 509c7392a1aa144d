"""The runner, its protocol, its CSV, the report and the comparison with a revision."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a folder of the repository, not of the package

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import data, hidden_states, measure, providers, report  # noqa: E402
from benchmarks.case import Case, LinearCase, LogitsCase, Provider, per_token  # noqa: E402
from benchmarks.compare import judge  # noqa: E402
from benchmarks.engine import COLUMNS, QUICK, Bench, Results, errors, measure_case  # noqa: E402
from benchmarks.measure import deciles, environment, interleave, median_interval  # noqa: E402
from benchmarks.providers import eager, ours, trl, verl  # noqa: E402
from benchmarks.suites import accuracy, end_to_end, memory, scaling  # noqa: E402

Rows = list[dict[str, str]]


@pytest.fixture(autouse=True)
def few_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, eager and two peers that are missing; the others take seconds to import."""
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    monkeypatch.setattr(providers, "MODULES", (ours, eager, trl, verl))


def run(out: Path, *arguments: str) -> tuple[int, Rows]:
    """Exit status and rows of the runner."""
    status = runner.main(["--quick", "--out", str(out), *arguments])
    (path,) = (out / QUICK).glob("*.csv")
    return status, report.read(path)


def values(rows: Rows, provider: str, metric: str) -> list[float]:
    return [float(r["median"]) for r in rows if (r["provider"], r["metric"]) == (provider, metric)]


def extra(monkeypatch: pytest.MonkeyPatch, **added: Provider) -> None:
    """Puts providers into the linear path."""
    module = SimpleNamespace(LINK="", linear=lambda device: added)
    monkeypatch.setattr(providers, "MODULES", (*providers.MODULES, module))


# Statistics


def test_deciles_stay_within_what_was_seen() -> None:
    assert deciles([3.0]) == (3.0, 3.0, 3.0)
    assert deciles([float(i) for i in range(11)]) == (1.0, 5.0, 9.0)


def test_median_interval() -> None:
    xs = [float(i) for i in range(1, 16)]
    # P(fewer than 4 of 15 below the median) = 0.0176, of 5 0.0592: ranks 4 and 12.
    assert median_interval(xs[::-1]) == (4.0, 12.0)
    assert median_interval(xs[:6]) == (1.0, 6.0)  # 2 / 2^6 = 3.1 %
    assert median_interval(xs[:5]) == (-math.inf, math.inf)


def test_median_interval_covers_the_median() -> None:
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 20, generator=g).exp().tolist()
    held = sum(low <= 1 <= high for low, high in map(median_interval, draws)) / 2000
    assert 0.95 <= held < 0.98  # 95.9 % by the binomial distribution


def test_interleave_takes_turns_in_an_order_that_rotates() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples, interrupted = interleave(calls, 3)
    assert "".join(order) == "abcbcacab"
    assert {len(xs) for xs in samples.values()} == {3} and not interrupted


def test_interleave_stops_after_the_deadline_with_enough_to_judge() -> None:
    assert len(interleave({"a": lambda: 1}, 9, deadline=5, now=lambda: 6)[0]["a"]) == 3
    ticks = iter(range(100))
    assert len(interleave({"a": lambda: 1}, 9, deadline=2.5, now=lambda: next(ticks))[0]["a"]) == 6
    assert len(interleave({"a": lambda: 1}, 2, deadline=5, now=lambda: 6)[0]["a"]) == 2


def raising_at(n: int) -> Callable[[], int]:
    calls = iter(range(1, 1000))

    def call() -> int:
        if (i := next(calls)) == n:
            raise KeyboardInterrupt
        return i

    return call


def test_interleave_keeps_whole_rounds_after_ctrl_c() -> None:
    samples, interrupted = interleave({"a": lambda: 1, "b": raising_at(3)}, 9)
    assert samples == {"a": [1, 1], "b": [1, 2]} and interrupted
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": raising_at(1)}, 9)


# The fp64 truth


@pytest.mark.parametrize("kind", ["topr", "mean", "grpo"])
@pytest.mark.parametrize("path", ["linear", "logits"])
def test_the_truth_is_that_of_autograd(path: str, kind: str) -> None:
    case: Case
    if path == "linear":
        made = data.tiny(300, 8, 31)  # more than a tile
        # A policy that has moved, so that ratios are clipped and tapered.
        made = made._replace(hidden=made.hidden * 1.3)
        case = LinearCase("", made, "cpu", torch.float32)
        leaves = [x.double().requires_grad_() for x in (case.data.hidden, case.data.weight)]
        z = (leaves[0] @ leaves[1].T).log_softmax(-1)
    else:
        case = LogitsCase(1024, 31, "cpu", torch.float32)
        case.mu = case.mu - 0.3 * torch.rand(len(case.mu))
        leaves = [case.logits.double().requires_grad_()]
        z = leaves[0][:, :-1].log_softmax(-1).flatten(0, 1)
    loss = case.stage(kind, z.gather(1, case.row_labels()[:, None])[:, 0])
    found = case.reference(kind)
    torch.testing.assert_close(found.loss, loss.detach())
    gradients = torch.autograd.grad(loss, leaves)
    assert tuple(found.gradients) == case.leaf_names
    for name, want in zip(case.leaf_names, gradients, strict=True):
        torch.testing.assert_close(found.gradients[name], want, rtol=1e-10, atol=1e-14)


def test_errors_are_measured() -> None:
    case = data.linear_case("cpu", "float32", True, 40)

    def off(c: Case, h: Tensor, w: Tensor) -> Tensor:
        # The value is right, the gradient of the hidden states is 1 % too large.
        inner = eager.linear("cpu")["torch eager"].settings[""](c, h, w)
        extra = 0.01 * inner
        return inner + extra - extra.detach()

    found = errors(case, Provider({"": off}), off, True)
    assert found["d_hidden_error"][0] == pytest.approx(0.01, rel=1e-3)
    assert found["d_weight_row_error"][1] == pytest.approx(0.01, rel=1e-3)
    assert found["d_hidden_sign_agreement"][0] > 0.999
    assert found["loss_error"][0] < 1e-6


# The runner


def test_the_runner_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names = ("throughput", "accuracy", "end_to_end", "scaling")
    for suite in names:
        status, rows = run(tmp_path, "--filter", suite)
        assert status == 0
    with next((tmp_path / QUICK).glob("*.csv")).open(encoding="utf-8") as f:
        assert next(csv.reader(f)) == list(COLUMNS)
    assert {r["suite"] for r in rows} == set(names)
    finished = [r["job"] for r in rows if r["metric"] == "finished"]
    assert len(finished) == len(set(finished)) == 11
    shared, padded = (values(rows, f"topr {n}", "tokens") for n in ("shared prompts", "padded"))
    assert 0 < 2 * shared[0] < padded[0]
    for r in rows:
        assert r["commit"] and r["dirty"] in ("True", "False") and r["machine"].startswith("cpu")
        if r["metric"] == "total_ms" and r["suite"] == "throughput":
            assert 0 < float(r["q10"]) <= float(r["median"]) <= float(r["q90"])
            assert r["repetitions"] == "2" and float(r["entropy"]) > 0
            shares = ("masked_share", "positive_share", "tapered_share")
            assert all(0 <= float(r[name]) <= 1 for name in shares)
    for name in ("topr exact", "topr tau 2^-10", "topr native", "torch eager", "matmul", "copy"):
        assert values(rows, name, "total_ms"), name
    assert max(values(rows, "topr exact", "d_weight_error")) < 5e-3
    assert len(values(rows, "topr in Hugging Face", "total_ms")) == 1
    assert len(values(rows, "torch eager", "log_ratio_error_mean")) == 2  # lengths
    assert len(values(rows, "topr exact", "weight_error_max")) == 2
    # A peer that is not there is a row that says so, in every table it belongs to.
    missing = [r for r in rows if r["provider"] == "TRL fused head" and r["metric"] == "missing"]
    assert {r["suite"] for r in missing} == {"throughput", "accuracy"}
    tuned = [r for r in rows if r["provider"] == "TRL fused head tuned" and r["note"]]
    assert {r["suite"] for r in tuned} == set(names) - {"scaling"}  # which has no peers on a CPU
    assert "trl.kernels" in missing[0]["note"]
    assert "verl fused kernel: missing: runs on CUDA only" in capsys.readouterr().out


def test_memory_in_a_process_of_its_own(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--filter", "memory", "logits", "--providers", "torch eager")
    assert status == 0
    (logits,) = set(values(rows, "torch eager", "logits_bytes"))
    assert logits == 16 * 97 * 4
    # An fp32 log-softmax and its gradient: at least one copy of the scored rows, less than four.
    (counted,) = values(rows, "torch eager", "counted_bytes")
    assert 14 / 16 * logits < counted < 4 * logits
    assert len(values(rows, "torch eager", "resident_bytes")) == 1


def test_memory_counts_what_an_operator_makes() -> None:
    shape = (40, 97, "float32")
    first = ("linear", "cpu", True)
    ours, about = memory.in_child("counted", "topr exact", *first, True, *shape)
    assert about["rows"] == 40
    assert ours > 0  # without entering the mode inside the operator nothing of it is seen
    plain, about = memory.in_child("counted", "torch eager", *first, False, *shape)
    assert plain > 40 * 97 * 4 and about == {}


def wrong(c: Case, h: Tensor, w: Tensor) -> Tensor:
    return eager.log_prob(h, w, c.row_labels()) * 1.02


def test_a_wrong_one_of_ours_gets_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra(monkeypatch, bad=per_token({"": wrong})._replace(ours=True), peer=per_token({"": wrong}))
    arguments = ("--filter", "throughput", "linear", "--providers", "bad", "peer", "eager")
    status, rows = run(tmp_path, *arguments)
    assert status == 1
    assert not values(rows, "bad", "total_ms") and not values(rows, "bad", "d_hidden_error")
    red = [r["note"] for r in rows if r["provider"] == "bad" and r["metric"] == "red"]
    assert "d_hidden_error 1.7e-01, at most" in red[0] and len(red) == 2  # trained and frozen
    assert "RED, without a number: bad" in capsys.readouterr().out
    # The same mistake of a peer is measured and shown.
    assert len(values(rows, "peer", "total_ms")) == 2
    assert min(values(rows, "peer", "d_hidden_error")) > 0.01
    text = "\n".join(report.tables(tmp_path / QUICK))
    assert "Without a number: bad (red:" in text and "| peer |" in text


def test_a_wrong_loss_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(c: Case, h: Tensor, w: Tensor) -> Tensor:
        return c.stage("topr", eager.log_prob(h, w, c.row_labels())) + 0.1

    extra(monkeypatch, bad=Provider({"": loss}, ours=True))
    status, rows = run(tmp_path, "--filter", "throughput", "linear", "--providers", "bad")
    assert status == 1 and not values(rows, "bad", "total_ms")


def test_what_fails_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(c: Case, h: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("no such shape")

    extra(monkeypatch, broken=per_token({"a": fail}))
    status, rows = run(tmp_path, "--filter", "linear", "trained", "--providers", "broken", "eager")
    assert status == 0
    notes = [r["note"] for r in rows if (r["provider"], r["metric"]) == ("broken", "failed")]
    assert notes == ["RuntimeError: no such shape"]
    assert values(rows, "torch eager", "total_ms")


def test_the_fastest_setting_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"fast": 0, "slow": 0}

    def at(name: str, seconds: float) -> Callable[..., Tensor]:
        def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
            calls[name] += 1
            time.sleep(seconds)
            return eager.log_prob(h, w, c.row_labels())

        return log_prob

    extra(monkeypatch, tuned=per_token({"slow": at("slow", 0.1), "fast": at("fast", 0.0)}))
    _, rows = run(tmp_path, "--filter", "linear", "trained", "--providers", "tuned")
    assert {r["setting"] for r in rows if r["provider"] == "tuned"} == {"fast"}
    assert calls["slow"] == 2 and calls["fast"] == 3 + 1 + 2  # search, errors, two rounds


def test_settings_are_compared_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = set()

    def at(name: str, first: float, seconds: float) -> Callable[..., Tensor]:
        def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
            time.sleep(seconds if name in compiled else first)
            compiled.add(name)
            return eager.log_prob(h, w, c.row_labels())

        return log_prob

    settings = {"slow": at("slow", 0.2, 0.1), "fast": at("fast", 1.0, 0.0)}
    extra(monkeypatch, tuned=per_token(settings))
    _, rows = run(tmp_path, "--filter", "linear", "trained", "--providers", "tuned")
    assert {r["setting"] for r in rows if r["provider"] == "tuned"} == {"fast"}


def failing_from(n: int) -> Callable[..., Tensor]:
    calls = iter(range(1, 1000))

    def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
        if next(calls) >= n:
            raise RuntimeError("illegal memory access")
        return eager.log_prob(h, w, c.row_labels())

    return log_prob


def test_what_fails_in_a_round_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, status in (("peer", 0), ("mine", 1)):
        # The check, a round, and the second fails.
        broken = per_token({"": failing_from(3)})._replace(ours=name == "mine")
        extra(monkeypatch, **{name: broken})
        words = ("--filter", "linear", "trained", "--providers", name, "eager")
        got, rows = run(tmp_path, *words)
        assert got == status
        notes = [r["note"] for r in rows if (r["provider"], r["metric"]) == (name, "failed")]
        assert notes == ["in a round: RuntimeError: illegal memory access"]
        assert not values(rows, name, "total_ms")
        measured = [r for r in rows if (r["provider"], r["metric"]) == ("torch eager", "total_ms")]
        assert measured[-1]["repetitions"] == "2"
        text = "\n".join(report.tables(tmp_path / QUICK))
        assert f"{name} (failed: in a round" in text and f"| {name} |" not in text


def test_ratios_to_eager_are_of_one_run(tmp_path: Path) -> None:
    words = ("--filter", "linear", "trained", "--providers")
    _, rows = run(tmp_path, *words, "topr exact", "eager", "--repetitions", "1")
    ms = {r["provider"]: float(r["median"]) for r in rows if r["metric"] == "total_ms"}
    made = {r["provider"]: float(r["median"]) for r in rows if r["metric"] == "eager_per_total"}
    for name, value in made.items():
        assert value == pytest.approx(ms["torch eager"] / ms[name])
    assert set(made) == {"topr exact", "topr exact, torch", "torch eager"}


def test_a_peer_for_which_there_is_no_time_is_listed(tmp_path: Path) -> None:
    case = data.linear_case("cpu", "float32", True, 40)
    found = providers.linear("cpu")
    peer = found["torch eager"]._replace(settings={"": lambda c, h, w: h.sum()})
    found = {"topr exact": found["topr exact"], "torch eager": found["torch eager"], "peer": peer}
    results = Results(tmp_path, "cpu")
    bench = Bench("cpu", results, repetitions=5)
    ticks = iter(range(10**6))
    bench.now, bench.deadline = lambda: float(next(ticks)), -1.0
    measure_case(bench, case, found, case.facts())
    assert bench.hurried
    rows = report.read(results.path)
    assert [r["note"] for r in rows if r["provider"] == "peer"] == ["out of time"]
    for name in ("topr exact", "torch eager"):  # and the fewest rounds of what was begun
        (row,) = [r for r in rows if (r["provider"], r["metric"]) == (name, "total_ms")]
        assert row["repetitions"] == "3"


def test_a_job_without_time_for_all_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra(monkeypatch, peer=per_token({"": wrong}))
    results = Results(tmp_path, "cpu")
    jobs = [j for j in runner.all_jobs("cpu", True) if j[1].name.endswith("tiny trained float32")]
    # A clock that goes on by a minute at a call: over before the first provider.
    ticks = iter(range(0, 10**7, 60))
    bench = Bench("cpu", results, quick=True, repetitions=2)
    assert runner.run(bench, jobs, minutes=5, now=lambda: float(next(ticks))) == 0
    (row,) = [r for r in report.read(results.path) if not r["provider"]]
    assert (row["metric"], row["note"]) == ("partly measured", "out of time")
    text = "\n".join(report.tables(tmp_path))
    assert f"did not run to their end: {row['job']} (partly measured: out of time)" in text
    assert "peer (not measured: out of time)" in text


def test_an_implementation_is_named(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "--filter", "linear", "trained", "--providers", "topr exact")
    auto = ours.serving("auto", "cpu")
    assert auto in ("native", "torch")
    assert {r["setting"] for r in rows if r["provider"] == "topr exact"} == {auto}
    assert {r["setting"] for r in rows if r["provider"] == "topr exact, torch"} == {"torch"}


def test_what_was_not_compared_with_fp64_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "CHECKED", {"cpu": 16 * 16 * 97})
    _, rows = run(tmp_path, "--filter", "scaling", "--providers", "topr exact")
    timed = [r for r in rows if (r["provider"], r["metric"]) == ("topr exact", "total_ms")]
    said = [(r["rows"], r["vocab"]) for r in timed if r["note"]]
    assert said == [("32", "97"), ("16", "131")] and len(timed) == 3
    assert timed[1]["note"] == "not compared with fp64 at this size"
    text = report.tables(tmp_path / QUICK)
    assert "Not compared with fp64 at 32 x 97, 16 x 131." in text


@pytest.mark.parametrize("job", ["log-ratio", "gradients"])
@pytest.mark.parametrize("name", ["bad", "broken"])
def test_a_wrong_one_of_ours_is_red_in_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, name: str
) -> None:
    def fail(c: Case, h: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("no such shape")

    bad = per_token({"": wrong})
    mine = {"bad": bad, "broken": per_token({"": fail})}[name]._replace(ours=True)
    extra(monkeypatch, **{name: mine}, peer=bad)
    status, rows = run(tmp_path, "--filter", "accuracy", job, "--providers", name, "peer", "topr")
    assert status == 1
    metric = {"bad": "red", "broken": "failed"}[name]
    assert [r["metric"] for r in rows if r["provider"] == name] == [metric]
    # Neither a peer with the same mistake nor what is right is red.
    measured = {r["provider"] for r in rows if r["metric"] not in report.NO_NUMBER}
    assert {"peer", "topr exact", "topr exact, torch"} <= measured
    text = "\n".join(report.tables(tmp_path / QUICK))
    assert {"bad": "bad (red:", "broken": "broken (failed: RuntimeError: no such"}[name] in text


def test_what_is_allowed_lies_between_rounding_and_mistakes() -> None:
    # benchmarks/results: largest errors of a log-prob with fp32 logits, of ours and with bf16 logits.
    assert 4.9e-5 < accuracy.allowed(1, 2.4e-5) < 0.01 * 0.2
    assert accuracy.allowed(512, 4.3e-4) < 0.05 * 2.1


def test_a_process_that_is_killed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ended with signal SIGKILL; out of memory"):
        memory.alone(signal.raise_signal, signal.SIGKILL)
    answers: list[Any] = []
    memory._answer(SimpleNamespace(send=answers.append), divmod, 1, 0)
    memory._answer(SimpleNamespace(send=answers.append), divmod, 7, 3)
    assert answers[0][1].startswith("ZeroDivisionError: ") and answers[1] == (True, (2, 1))

    def alone(*_: Any) -> Any:
        raise RuntimeError("its process ended with signal SIGKILL")

    monkeypatch.setattr(memory, "alone", alone)
    words = ("--filter", "memory", "linear", "--providers")
    for name, status in (("torch eager", 0), ("topr exact", 1)):  # one of ours is red
        got, rows = run(tmp_path, *words, name)
        assert got == status
        notes = [r["note"] for r in rows if (r["provider"], r["metric"]) == (name, "failed")]
        assert notes == ["its process ended with signal SIGKILL"]


def test_a_peer_that_cannot_be_imported_costs_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("built for another torch")

    monkeypatch.setitem(sys.modules, "trl.kernels", Broken("trl.kernels"))

    def fail(device: str) -> dict[str, Provider]:
        raise OSError("no such library")

    peer = SimpleNamespace(LINK="", linear=fail, __name__="benchmarks.providers.peer")
    monkeypatch.setattr(providers, "MODULES", (*providers.MODULES, peer))
    status, rows = run(tmp_path, "--filter", "linear", "trained")
    assert status == 0 and values(rows, "torch eager", "total_ms")
    missing = {r["provider"]: r["note"] for r in rows if r["metric"] == "missing"}
    assert missing["TRL fused head"] == "RuntimeError: built for another torch"
    assert missing["peer"] == "OSError: no such library"
    monkeypatch.setattr(ours, "linear", fail)  # ours is no such peer
    with pytest.raises(OSError, match="no such library"):
        providers.linear("cpu")


def test_a_step_keeps_no_cache_and_searches_on_the_head_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case = end_to_end.Step("tiny", "cpu", torch.float32)
    calls: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(kwargs.get("use_cache"))

    case.model.model.register_forward_pre_hook(hook, with_kwargs=True)

    def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
        return eager.log_prob(h, w, c.row_labels())

    found = {
        "torch eager": per_token({"a": log_prob, "b": log_prob}),
        end_to_end.WHOLE: end_to_end.whole_step("cpu"),
    }
    bench = Bench("cpu", Results(tmp_path, "cpu"), repetitions=2)
    measure_case(bench, case, found, case.facts())
    # Each a warm-up and two rounds, and the check of the whole step its own loss: no search in it. Once
    # three small ones show whether the model sees padding, and two whether tokens see later ones.
    assert calls == [False] * (7 + 3 + 2)
    assert end_to_end.label("Llama-3-8B-shaped") == "Llama-3-8B-shaped, 8 of 32 layers"
    assert end_to_end.label("Qwen2.5-1.5B-shaped") == "Qwen2.5-1.5B-shaped"
    assert not any("compile" in name for name in (*end_to_end.HEADS, *end_to_end.PEERS["cuda"]))


def test_a_tree_with_sources_that_git_does_not_know_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        name = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "base")
    monkeypatch.setattr("benchmarks.measure.ROOT", tmp_path)
    for file in ("benchmarks/results/x.csv", "notes.py", "topr_kernels/notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        assert environment("cpu")["dirty"] == "False", file
    for file in ("topr_kernels/recipe/new.py", "csrc/new.h", "csrc/new.cpp", "benchmarks/new.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        assert environment("cpu")["dirty"] == "True", file
        (tmp_path / file).unlink()


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Trained: the check, two rounds. Frozen: the check, a round, stop.
    stop = raising_at(3 + 1 + 2)

    def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
        stop()
        return eager.log_prob(h, w, c.row_labels())

    extra(monkeypatch, peer=per_token({"": log_prob}))
    status, rows = run(tmp_path, "--filter", "throughput", "linear", "--providers", "peer")
    assert status == 130
    kept = [r for r in rows if (r["provider"], r["metric"]) == ("peer", "total_ms")]
    assert [(r["mode"], r["repetitions"]) for r in kept] == [("trained", "2"), ("frozen", "1")]
    assert [r["job"] for r in rows if r["metric"] == "finished"] == [kept[0]["job"]]
    stopped = [(r["job"], r["metric"]) for r in rows if r["note"] == "interrupted"]
    assert stopped == [(kept[1]["job"], "partly measured")]
    assert "interrupted: what was measured is in" in capsys.readouterr().out


def test_resume_leaves_out_what_this_commit_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--filter", "linear", "trained", "--providers", "eager", "--resume")
    made = Results(tmp_path, "cpu").where
    for dirty, times in (("True", 2), ("False", 1)):
        where = made | {"dirty": dirty, "commit": f"c{dirty}"}
        monkeypatch.setattr("benchmarks.engine.environment", lambda device, where=where: where)
        for _ in range(2):
            assert runner.main(["--quick", "--out", str(tmp_path), *arguments]) == 0
        (path,) = (tmp_path / QUICK).glob("*.csv")
        done = [r for r in report.read(path) if r["metric"] == "finished"]
        assert sum(r["commit"] == f"c{dirty}" for r in done) == times
    assert "--resume: 1 jobs are finished, 0 to do" in capsys.readouterr().out
    # Those providers are finished, and of a run of all of them any.
    results = Results(tmp_path, "cpu", quick=True)
    assert results.finished(["eager"]) and not results.finished(["topr"])
    assert not results.finished()
    results.append([{"job": "all", "metric": "finished"}])
    assert results.finished() == results.finished(["topr"]) == {"all"}


def test_quick_and_real_figures_never_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, rows = run(tmp_path, "--filter", "accuracy", "log-ratio", "--providers", "eager")
    (job,) = {r["job"] for r in rows}
    assert job in [j.name for _, j in runner.all_jobs("cpu", False)]  # the same name in both
    real = Results(tmp_path, "cpu")
    real.where["dirty"] = "False"
    assert job not in real.finished(["eager"])
    assert report.tables(tmp_path) == [] and report.tables(tmp_path / QUICK)
    report.main([str(tmp_path)])
    assert f"no results in {tmp_path}; those of --quick are in" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    arguments = ("--filter", "throughput", "linear", "--providers", "eager", "--minutes", "0")
    status, rows = run(tmp_path, *arguments)
    assert status == 0
    assert [r["metric"] for r in rows] == ["not measured"] * 2
    assert "out of time" in rows[0]["note"]
    (line,) = report.tables(tmp_path / QUICK)
    assert line.count("(not measured: out of time after 0 minutes)") == 2


def test_other_columns_are_not_mixed_in(tmp_path: Path) -> None:
    results = Results(tmp_path, "cpu")
    results.path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        results.append([{"suite": "x"}])


def test_filter_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--filter: no job has all of"):
        runner.main(["--quick", "--out", str(tmp_path), "--filter", "nonsense"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            runner.main(["--suite", "gpu", "--out", str(tmp_path)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says against arguments."""
    with pytest.raises(SystemExit) as error:
        runner.main(list(arguments))
    code = error.value.code
    return code if isinstance(code, str) else capsys.readouterr().err


def test_arguments_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--quick", "--out", str(tmp_path))
    text = refused(capsys, *out, "--providers", "eager", "toprr")
    assert "got 'toprr'" in text and "topr exact" in text and end_to_end.WHOLE in text
    for n in ("0", "-1"):
        text = refused(capsys, *out, "--repetitions", n)
        assert f"--repetitions: expected at least 1, got {n}" in text
    assert "--minutes: expected at least 0, got -1.0" in refused(capsys, "--minutes", "-1")
    for given in (["--providers", "a"], ["--minutes", "1"], ["--out", "x"], ["--resume"]):
        assert f"expected no {given[0]}," in refused(capsys, "--compare", "HEAD", *given)
    assert not list(tmp_path.glob("**/*.csv"))

    def stop(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.compare.compare", stop)
    assert runner.main(["--compare", "HEAD"]) == 130
    assert "interrupted" in capsys.readouterr().out


def test_a_case_without_any_of_the_providers_is_not_measured(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--filter", "throughput", "logits", "--providers", "TRL")
    assert status == 0 and {r["metric"] for r in rows} == {"finished"}


def test_every_job_of_the_gpu_suite_has_its_own_name() -> None:
    for device in ("cpu", "cuda"):
        names = [job.name for _, job in runner.all_jobs(device, False)]
        assert len(names) == len(set(names))


SCRIPT = (ROOT / "benchmarks" / "gpu_suite.sh").read_text(encoding="utf-8")


def test_the_gpu_suite_takes_less_than_nine_minutes() -> None:
    parts = [int(n) for n in re.findall(r"^ *(?:tests|bench) (\d+) ", SCRIPT, re.MULTILINE)]
    check = int(re.findall(r"^timeout --kill-after=5 (\d+) ", SCRIPT, re.MULTILINE)[0])
    assert len(parts) == 8
    total = sum(parts) + check + 5 * (len(parts) + 2)
    assert total < 540 and f"# {total} in all." in SCRIPT


#: Stands for python: says what it was called with, and ends as the file of its kind says.
STUB = """#!/bin/sh
[ "$1" = - ] && exit 0
[ "$1" = -c ] && exit {xdist}
case "$2 $*" in "pytest "*) kind=tests ;; *"--repetitions 1"*) kind=warm ;; *) kind=bench ;; esac
log="{log}.$kind.calls"
[ $kind = warm ] && log="$log.$$"
for word in "$@"; do printf '%s\\t' "$word"; done >> "$log"
echo >> "$log"
[ -f "{log}.$kind" ] && . "{log}.$kind"
exit 0
"""


class SuiteRun(NamedTuple):
    """Exit status of gpu_suite.sh, and its calls of python by kind."""

    status: int
    tests: list[str]
    bench: list[str]
    warm: list[str]


def gpu_suite(folder: Path, xdist: bool = True, **kinds: str) -> SuiteRun:
    """Runs gpu_suite.sh with a python that ends each kind of call by a line of shell."""
    (folder / "benchmarks" / ".cache").mkdir(parents=True)
    (folder / "benchmarks" / ".cache" / "hidden_states.pt").touch()
    shutil.copy(ROOT / "benchmarks" / "gpu_suite.sh", folder / "benchmarks")
    log, stub = folder / "log", folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(log=log, xdist=int(not xdist)))
    stub.chmod(0o755)
    for kind, line in kinds.items():
        (folder / f"log.{kind}").write_text(line)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    command = ["bash", str(folder / "benchmarks" / "gpu_suite.sh"), str(folder / "out")]
    done = subprocess.run(command, env=environment, check=False, capture_output=True)

    def calls(kind: str) -> list[str]:
        files = sorted(folder.glob(f"log.{kind}.calls*"))
        text = "".join(f.read_text() for f in files).replace(str(folder), "")
        return text.splitlines()

    return SuiteRun(done.returncode, calls("tests"), calls("bench"), calls("warm"))


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")
def test_the_gpu_suite(tmp_path: Path) -> None:
    # The first call waits until those that compile for the benchmarks have begun.
    right = gpu_suite(tmp_path / "right", tests="sleep 0.5")
    assert right.status == 0
    (tests,) = right.tests
    for part in ("gpu", "gpu_linear", "triton", "triton_linear"):
        assert f"tests/core/test_{part}.py" in tests
    assert "--numprocesses\t" in tests
    assert len(right.bench) == 7
    names = [f"{suite} {job.name}" for suite, job in runner.all_jobs("cuda", False)]
    for call in right.bench + right.warm:
        # Every part has a limit that its jobs share, less than that of the process, and has jobs.
        words = call.split("\t")
        assert 10 / 60 <= float(words[words.index("--minutes") + 1]) <= 100 / 60
        wanted = call.split("--filter\t")[1].split("\t--providers")[0].strip("\t").split("\t")
        assert any(all(word in name for word in wanted) for name in names), call
    assert len(right.warm) == 3 and all("--providers\ttopr\t" in call for call in right.warm)
    assert "--numprocesses" not in "".join(gpu_suite(tmp_path / "one", xdist=False).tests)
    # Out of time is not red; a failure before it is, and so is any other status. The benchmarks come
    # whatever happened, and are told.
    assert gpu_suite(tmp_path / "slow", tests="exit 124")[::2] == (124, right.bench)
    early = "echo 'tests/core/test_gpu.py::test_a[1] FAILED [ 5%]'; exit 124"
    several = "echo '[gw0] [ 5%] FAILED tests/core/test_gpu.py::test_b '; exit 1"
    for name, line, red in (
        ("early", early, "test_gpu.py::test_a[1]"),
        ("several", several, "test_gpu.py::test_b"),
        ("crashed", "kill -SEGV $$", "pytest itself (status 139)"),
    ):
        status, _, bench, _ = gpu_suite(tmp_path / name, tests=line)
        told = [call.replace(f"--red-tests\t{red}\t", "") for call in bench]
        assert status == 1 and told == right.bench, name
        assert all(f"--red-tests\t{red}" in call for call in bench), name
    # A part that crashes keeps the rest.
    assert gpu_suite(tmp_path / "part", bench="exit 139")[::2] == (1, right.bench)
    assert gpu_suite(tmp_path / "late", bench="exit 124")[::2] == (0, right.bench)


def test_rows_after_a_red_test_name_it(tmp_path: Path) -> None:
    argv = ("--filter", "throughput", "logits", "--providers", "torch eager")
    status, rows = run(tmp_path, *argv, "--red-tests", "test_gpu.py::test_a")
    assert status == 0 and rows
    assert all(r["note"].endswith("measured after red tests: test_gpu.py::test_a") for r in rows)
    text = "\n".join(report.tables(tmp_path / "quick"))
    assert text.count("test_gpu.py::test_a") == 1
    assert "after red tests (throughput): test_gpu.py::test_a." in text


def test_the_device_sleeps_while_python_queues_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(f"sleep {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1, dtype=torch.int8))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    clock = measure.Clock("cuda")
    # Ten million cycles took 2 ms, so 25 million take 5.
    happened.clear()

    def call(ms: float) -> None:
        happened.append("call")
        now[0] += ms / 1e3

    assert clock(lambda: call(1.25)) == 2.0 and clock.host_ms == pytest.approx(1.25)
    assert happened == ["wait", "sleep 25000000", "event", "call", "event", "wait"]
    # A call that returns later than the device wakes has waited for it.
    clock(lambda: call(7.0))
    assert math.isnan(clock.host_ms)


def test_the_vocabulary_is_cut_to_its_likely_columns() -> None:
    whole = data.tiny(60, 16, 97)
    cut = data.cut_vocabulary(whole, 80)
    assert cut.weight.shape == (80, 16)
    assert torch.equal(cut.weight[cut.labels], whole.weight[whole.labels])
    more = hidden_states.repeated(whole, 95)
    assert len(more.labels) == 95 and more.cu_seqlens[-1] == 95
    assert torch.equal(more.hidden[60:], whole.hidden[:35])


# The report


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Results of ours and eager, quick."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "MODULES", (ours, eager, verl))
        for suite in ("throughput", "accuracy", "scaling"):
            assert run(out, "--filter", suite)[0] == 0
    yield out / QUICK


def test_the_report_makes_tables_and_figures(measured: Path) -> None:
    from matplotlib import image

    tables = report.tables(measured)
    heads = [t.split("|")[1].strip() for t in tables if t.startswith("|")]
    assert heads[0] == "trained head, ms (x eager)"
    assert len(heads) == len(set(heads)) == 6
    assert any(t.startswith("Without a number: verl") for t in tables)
    report.main([str(measured), "--figures"])
    figures = sorted(path.name.split("-")[0] for path in measured.glob("*.png"))
    assert figures == ["accuracy", "roofline", "roofline", "scaling", "scaling"]
    for path in measured.glob("*.png"):
        assert image.imread(path).shape[1] == 1660


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    found = Results(tmp_path, "cpu")
    same = {"suite": "throughput", "path": "linear", "mode": "trained", "entropy": "1.5"}
    same |= {"rows": 4, "dim": 2, "vocab": 8, "dtype": "float32"}

    def row(provider: str, metric: str, value: float) -> dict[str, Any]:
        return same | {"provider": provider, "metric": metric, "median": value}

    found.append([row("a", "total_ms", 90.0), row("torch eager", "total_ms", 50.0)])
    # The last counts.
    found.append([row("a", "total_ms", 25.0), row("a", "eager_per_total", 2.0)])
    found.append([row("a", "d_hidden_error", 3e-5)])
    (table,) = report.tables(tmp_path)
    assert "| a | 25 (2.00) | 3.0e-05 |  |" in table
    readme = tmp_path / "README.md"
    stale = table.replace("25 (2.00)", "24 (2.08)")
    readme.write_text(f"text\n\n{stale}\n\n| other |\n| --- |\n", encoding="utf-8")
    assert report.write(readme, [table, "| unknown |\n| --- |"]) == ["unknown"]
    assert readme.read_text(encoding="utf-8") == f"text\n\n{table}\n\n| other |\n| --- |\n"


CASE = {"suite": "throughput", "job": "j", "path": "linear", "mode": "trained", "rows": 4}
CASE |= {"dim": 2, "vocab": 8, "dtype": "float32"}


class Written:
    """Rows of made-up runs."""

    def __init__(self, folder: Path) -> None:
        self.results = Results(folder, "cpu")
        self.folder = folder

    def run(self, minute: int, *rows: dict[str, Any], **facts: Any) -> None:
        self.results.where["time"] = f"2026-01-01T00:{minute:02}:00Z"
        self.results.append([CASE | facts | row for row in rows])

    def text(self) -> str:
        return "\n".join(report.tables(self.folder))


def number(provider: str, value: float, metric: str = "total_ms", **facts: Any) -> dict[str, Any]:
    return {"entropy": "1.5", "provider": provider, "metric": metric, "median": value, **facts}


def none(provider: str, why: str = "red", note: str = "wrong", **facts: Any) -> dict[str, Any]:
    return {"entropy": "1.5", "provider": provider, "metric": why, "note": note, **facts}


def test_a_number_does_not_outlive_a_red_result(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.run(2, none("a"))
    written.run(1, number("a", 25.0), number("b", 30.0))  # earlier, whatever the order of the file
    text = written.text()
    assert "| a |" not in text and "| b | 30 |" in text and "a (red: wrong)" in text
    written.run(3, number("a", 26.0))
    text = written.text()
    assert "| a | 26 |" in text and "red" not in text
    written.run(4, none("a", "not measured", "out of time"))  # says nothing against the number
    assert "| a | 26 |" in written.text()
    written.run(5, none("", "failed", "no data", entropy=""))  # the job as a whole
    text = written.text()
    assert "26" not in text and "j (failed: no data)" in text


def test_memory_and_sums_do_not_outlive_a_red_result(tmp_path: Path) -> None:
    written = Written(tmp_path)
    facts = {"suite": "memory", "rows": 8}
    written.run(1, number("a", 2**20, "counted_bytes"), **facts, data="SmolLM2")
    # A row without a number has fewer facts: its child never told them.
    written.run(2, none("a", "failed", "killed", entropy=""), **facts, dim="")
    ratio = {"suite": "accuracy", "mode": "", "data": "SmolLM2 at 1.0", "length": 512}
    for name in ("a", "a, the sum alone", "b"):
        made = [number(name, 1e-5, f"log_ratio_error_{which}") for which in ("mean", "spread")]
        written.run(1, *made, **ratio)
    written.run(2, none("a"), **{**ratio, "length": ""})
    text = written.text()
    assert "| a" not in text and "| b |" in text
    assert "a (failed: killed)" in text and "a (red: wrong)" in text


def test_an_empty_cell_has_a_reason(tmp_path: Path) -> None:
    written = Written(tmp_path)
    sharp = {"entropy": "0.6"}
    written.run(1, *(number(name, 9.0) for name in "abc"), number("a", 8.0, **sharp))
    written.run(1, none("b", "failed", "no room", **sharp))
    text = written.text()
    assert "| a | 9 | 8 |" not in text and "| a | 9.00 | 8.00 |" in text
    assert "b at 0.6 nats (failed: no room); c at 0.6 nats (not measured)." in text
    for path, shape in (("linear", "8 rows"), ("logits", "float32, 8 x 8")):
        facts = {"suite": "memory", "path": path}
        for name, rows in (("a", 4), ("a", 8), ("b", 4)):
            made = [number(name, 2**20, "counted_bytes"), number(name, 2**21, "logits_bytes")]
            written.run(1, *made, **facts, rows=rows)
        written.run(1, none("b", "failed", "killed"), **facts, rows=8)
        assert f"b at {shape} (failed: killed)" in written.text()
    assert "does not fit" not in written.text()
    written.run(2, none("b", "does not fit", ""), suite="memory", rows=8)
    assert "| b | 1 | does not fit |" in written.text()


def test_a_ratio_to_eager_is_of_one_run(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.run(1, number("torch eager", 50.0), number("torch eager", 1.0, "eager_per_total"))
    written.run(1, number("a", 25.0), number("a", 2.1, "eager_per_total"))
    assert "| a | 25 (2.10) |" in written.text()
    written.run(2, number("a", 20.0))  # without eager beside it
    assert "| a | 20 |" in written.text()
    logits = {"path": "logits", "entropy": "4", "mode": ""}
    written.run(3, number("torch eager", 50.0), number("a", 25.0), **logits)
    assert "| a | 25 |" in written.text()


def test_colours_are_told_apart() -> None:
    assert len(set(report.COLOURS)) == len(set(report.MARKERS)) == 8


# --compare


def judged(factor: float, noise: float) -> bool:
    """Whether a head that takes ``factor`` times as long is called slower, by a made-up clock."""
    g = torch.Generator().manual_seed(1)

    def side(mean: float) -> Callable[[], float]:
        return lambda: mean * math.exp(noise * torch.randn((), generator=g).item())

    return judge("made up", side(10.0), side(10.0 * factor), 25, 1.1)


def test_a_planted_slowdown_is_seen_and_noise_is_not() -> None:
    assert judged(1.5, 0.2)
    assert not judged(1.0, 0.2)
    assert not judged(1.08, 0.02)  # slower, but not by more than a tenth
    assert judged(1.15, 0.02)


SLOWDOWN = """
import time as _time
_right = topr_loss

def topr_loss(*args, **options):
    if options.get("inplace"):
        _time.sleep(0.03)
    return _right(*args, **options)
"""


def test_compare_with_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".cache", "results")
    for folder in ("topr_kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in (".gitignore", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)

    def git(*arguments: str) -> str:
        name = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        command = ["git", *name, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "base")
    monkeypatch.setattr("benchmarks.compare.ROOT", tmp_path)
    with (tmp_path / "topr_kernels" / "__init__.py").open("a", encoding="utf-8") as f:
        f.write(SLOWDOWN)
    assert runner.main(["--compare", "HEAD", "--quick", "--filter", "logits"]) == 1
    out = capfd.readouterr().out
    assert out.rstrip().endswith("or red: logits, in place")  # and not what is equal
    assert out.count("ratio") == 2 and out.count("SLOWER") == 1
    assert git("worktree", "list").count("\n") == 1  # nothing stays behind
    with pytest.raises(SystemExit, match="git cannot check out 'nonsense'"):
        runner.main(["--compare", "nonsense", "--quick"])
    with pytest.raises(SystemExit, match="no case of --compare has all of"):
        runner.main(["--compare", "HEAD", "--filter", "nonsense"])


def test_a_red_head_is_not_called_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Worker:
        def __init__(self, package: Path, *_: Any) -> None:
            self.head = package == ROOT

        def call(self, command: str, name: str) -> Any:
            if command == "check":
                return "wrong" if self.head and name == "logits" else ""
            if name == "logits, in place" and not self.head:
                raise RuntimeError("base has no such option")
            return 1.0

        def close(self) -> None:
            pass

    @contextlib.contextmanager
    def checked_out(rev: str) -> Iterator[Path]:
        yield Path("base")

    monkeypatch.setattr("benchmarks.compare.Worker", Worker)
    monkeypatch.setattr("benchmarks.compare.checked_out", checked_out)
    assert runner.main(["--compare", "X", "--filter", "logits"]) == 1
    out = capsys.readouterr().out
    assert "head is RED: wrong" in out and "not compared: base has no such option" in out
    assert runner.main(["--compare", "X", "--filter", "linear"]) == 0
    assert runner.main(["--compare", "X", "--filter", "in place"]) == 2  # nothing was compared
