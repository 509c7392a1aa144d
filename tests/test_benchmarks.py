"""The runner, its protocol, its CSV, the report and the comparison with a revision."""

from __future__ import annotations

import contextlib
import csv
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is a folder of the repository, not of the package

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import data, providers, report  # noqa: E402
from benchmarks.case import Case, LinearCase, LogitsCase, Provider, per_token  # noqa: E402
from benchmarks.compare import judge  # noqa: E402
from benchmarks.engine import COLUMNS, Results, errors  # noqa: E402
from benchmarks.measure import deciles, interleave, median_interval  # noqa: E402
from benchmarks.providers import eager, ours, trl, verl  # noqa: E402
from benchmarks.suites import memory  # noqa: E402

Rows = list[dict[str, str]]


@pytest.fixture(autouse=True)
def few_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, eager and two peers that are missing; the others take seconds to import."""
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    monkeypatch.setattr(providers, "MODULES", (ours, eager, trl, verl))


def run(out: Path, *arguments: str) -> tuple[int, Rows]:
    """Exit status and rows of the runner."""
    status = runner.main(["--quick", "--out", str(out), *arguments])
    (path,) = out.glob("*.csv")
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
    with next(tmp_path.glob("*.csv")).open(encoding="utf-8") as f:
        assert next(csv.reader(f)) == list(COLUMNS)
    assert {r["suite"] for r in rows} == set(names)
    finished = [r["job"] for r in rows if r["metric"] == "finished"]
    assert len(finished) == len(set(finished)) == 10
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
    assert {r["suite"] for r in tuned} == set(names)
    assert "trl.kernels" in missing[0]["note"]
    assert "verl fused kernel: missing: runs on CUDA only" in capsys.readouterr().out


def test_memory_in_a_process_of_its_own(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--filter", "memory", "logits", "--providers", "torch eager")
    assert status == 0
    (logits,) = set(values(rows, "torch eager", "logits_bytes"))
    assert logits == 16 * 97 * 4
    # An fp32 log-softmax and its gradient: at least one copy of the scored rows, less than four.
    (counted,) = values(rows, "torch eager", "counted_bytes")
    assert 15 / 16 * logits < counted < 4 * logits
    assert len(values(rows, "torch eager", "resident_bytes")) == 1


def test_memory_counts_what_an_operator_makes() -> None:
    shape = (40, 97, "float32")
    ours, about = memory.in_child("counted", "topr exact", "linear", "cpu", True, *shape)
    assert about["rows"] == 40
    assert ours > 0  # without entering the mode inside the operator nothing of it is seen
    plain, _ = memory.in_child("counted", "torch eager", "linear", "cpu", True, *shape)
    assert plain > 40 * 97 * 4


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
    text = "\n".join(report.tables(tmp_path))
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
    assert calls["slow"] == 2 and calls["fast"] == 2 + 1 + 2  # search, errors, two rounds


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Trained: one call of warm-up, one of the check, two rounds. Frozen: warm-up, check, round, stop.
    stop = raising_at(4 + 2 + 2)

    def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
        stop()
        return eager.log_prob(h, w, c.row_labels())

    extra(monkeypatch, peer=per_token({"": log_prob}))
    status, rows = run(tmp_path, "--filter", "throughput", "linear", "--providers", "peer")
    assert status == 130
    kept = [r for r in rows if (r["provider"], r["metric"]) == ("peer", "total_ms")]
    assert [(r["mode"], r["repetitions"]) for r in kept] == [("trained", "2"), ("frozen", "1")]
    assert [r["job"] for r in rows if r["metric"] == "finished"] == [kept[0]["job"]]
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
        (path,) = tmp_path.glob("*.csv")
        done = [r for r in report.read(path) if r["metric"] == "finished"]
        assert sum(r["commit"] == f"c{dirty}" for r in done) == times
    assert "--resume: 1 jobs are finished, 0 to do" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    arguments = ("--filter", "throughput", "linear", "--providers", "eager", "--minutes", "0")
    status, rows = run(tmp_path, *arguments)
    assert status == 0
    assert [r["metric"] for r in rows] == ["not measured"] * 2
    assert "out of time" in rows[0]["note"]


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


def test_every_job_of_the_gpu_suite_has_its_own_name() -> None:
    for device in ("cpu", "cuda"):
        names = [job.name for _, job in runner.all_jobs(device, False)]
        assert len(names) == len(set(names))
    # What gpu_suite.sh asks for is there.
    for words in (("throughput", "linear", "1.2 nats"), ("throughput", "logits")):
        assert any(all(word in name for word in words) for name in names)


def test_the_vocabulary_is_cut_to_its_likely_columns() -> None:
    whole = data.tiny(60, 16, 97)
    cut = data.cut_vocabulary(whole, 80)
    assert cut.weight.shape == (80, 16)
    assert torch.equal(cut.weight[cut.labels], whole.weight[whole.labels])
    more = data.repeated(whole, 95)
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
    yield out


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
    found.append([row("a", "total_ms", 25.0), row("a", "d_hidden_error", 3e-5)])  # the last counts
    (table,) = report.tables(tmp_path)
    assert "| a | 25 (2.00) | 3.0e-05 |  |" in table
    readme = tmp_path / "README.md"
    stale = table.replace("25 (2.00)", "24 (2.08)")
    readme.write_text(f"text\n\n{stale}\n\n| other |\n| --- |\n", encoding="utf-8")
    assert report.write(readme, [table, "| unknown |\n| --- |"]) == ["unknown"]
    assert readme.read_text(encoding="utf-8") == f"text\n\n{table}\n\n| other |\n| --- |\n"


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
