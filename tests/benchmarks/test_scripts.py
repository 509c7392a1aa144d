"""The scripts of benchmarks that no other test runs: each end to end, at a tiny size."""

from __future__ import annotations

import csv
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from tiny import save, tiny_model, tiny_tokenizer

from topr_kernels import TOPROutput, kernels, linear_topr_loss

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: Columns of a head of which few are active; fewer than 256 are never.
WIDE = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a wide head: the columns that were added are as unlikely as a letter."""
    model = tiny_model()
    vocab, unlikely = len(tiny_tokenizer()), tiny_tokenizer().convert_tokens_to_ids("Z")
    model.resize_token_embeddings(WIDE, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[vocab:] = model.lm_head.weight[unlikely]
    folder = save(model, tmp_path_factory.mktemp("models") / "tiny")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> dict[str, Any]:
    """Runs ``python benchmarks/NAME.py ARGUMENTS`` in this process; the script's globals."""
    path = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(path, run_name="__main__")


def test_the_gate_trains_with_a_tolerance_and_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LINEAR", dict(kernels.LINEAR))  # the gate adds one
    flags = ("--quick", "--model", model, "--seeds", 0, "--log2-tau", -6, "--out", tmp_path)
    run(monkeypatch, "linear_gate", *flags, "--steps", 1)
    found = json.loads((tmp_path / "gate.json").read_text())
    sparse, exact = found
    assert (sparse["tau"], exact["tau"]) == (2.0**-6, 0.0)
    assert 0 < sparse["left_out"] <= 2.0**-6 and exact["left_out"] == 0
    assert sparse["active_share"] < 0.5 and exact["active_share"] == 1
    # One step: rows of the head that were ever active are those of its two tiles.
    ever = 1 - sparse["never_active_share_0.015625"]
    assert sparse["active_share"] <= ever <= 2 * sparse["active_share"]
    assert 0 < sparse["drift_never_0.015625"] < sparse["drift_active_0.015625"]
    # A finished run is not run again, and other settings do not meet it.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    run(monkeypatch, "linear_gate", *flags, "--steps", 1)
    assert len(times) == 2 and all(path.stat().st_mtime_ns == t for path, t in times.items())
    assert json.loads((tmp_path / "gate.json").read_text()) == found
    with pytest.raises(SystemExit, match="steps: 1 there, 2 now"):
        run(monkeypatch, "linear_gate", *flags, "--steps", 2)


@pytest.mark.parametrize(("tau", "sparse"), [(2.0**-3, True), (0.0, False)])
def test_the_gate_records_the_columns_of_the_backward(
    tau: float, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LINEAR", dict(kernels.LINEAR))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gate = importlib.import_module("linear_gate")
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g, requires_grad=True) for n in (40, WIDE))
    labels = torch.randint(0, WIDE, (1, 40), generator=g)
    arguments = (weight, labels, torch.tensor([-90.0]), torch.tensor([1.0]))

    def backward(impl: str) -> tuple[TOPROutput, tuple[torch.Tensor, ...]]:
        out = linear_topr_loss(3 * hidden[None], *arguments, grad_tolerance=tau, impl=impl)
        return out, torch.autograd.grad(out.loss, (hidden, weight))

    ever = gate.record_columns(weight)
    found, gradients = backward(gate.RECORDING)
    assert bool(ever.all()) != sparse and ever.double().mean() == found.active_share
    assert ever[labels[0, 1:]].all()
    # What is trained on is what "auto" computes.
    for a, b in zip(gradients, backward("auto")[1], strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def hidden_states(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The script as its neighbours import it, of the tiny model and with a cache of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("hidden_states")
    cache = model.parent / "hidden_states.pt"
    values = {"MODEL": str(model), "TOKENS": 1024, "LONGEST": 40}
    values |= {"CACHE": cache, "HELD_OUT": cache.with_name("held_out.pt")}
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_hidden_states_are_sampled_and_checked(
    hidden_states: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hidden_states.main(["--rows", "100", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-6:]] == [
        f"T = {t}" for t in hidden_states.TEMPERATURES for _ in range(2)
    ]
    stored = torch.load(hidden_states.CACHE)
    assert stored["1.0"]["hidden"].shape == (1024, 32)
    # So small a model need not be like itself: that it is compared, not how, is what is seen here.
    assert hidden_states.main(["--check"]) in (0, 1)
    assert capsys.readouterr().out.count("worst ratio") == 3 + len(hidden_states.OTHER_TEXTS)


def test_treatments_of_the_tail_are_compared(
    hidden_states: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "linear_tails", "--temperatures", "1.0", "--log2-tau", "-5")
    text = capsys.readouterr().out.split("T = 1.0, ")[1]
    share = float(text.split("'0.031': '")[1].split("%")[0])
    assert 0 < share < 50
    error = {line[:20].strip(): float(line[20:].split()[0]) for line in text.splitlines()[2:]}
    assert set(error) == {"bf16 J"} | {
        f"2^-5 {name}"
        for name in ("zero", "one", "sign", "sampled", *(f"clusters {k}" for k in (4, 8, 16, 32)))
    }
    assert 0 < error["2^-5 clusters 8"] < 0.1 * error["2^-5 zero"] and error["bf16 J"] > 0


def test_the_demo_is_run_for_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(), tmp_path / "tiny")
    committed = (BENCHMARKS / "results" / "demo_seeds.csv").read_bytes()
    flags = ("--quick", "--model", model, "--seeds", 1, "--out", tmp_path / "out")
    run(monkeypatch, "demo_seeds", *flags)
    with (tmp_path / "out" / "demo_seeds.csv").open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6 and {r["method"] for r in rows} == {"base", "TOPR", "SFT"}
    assert all(r["seed"] == "1" and r["setting_model"] == "tiny" for r in rows)
    assert capsys.readouterr().out.count("| positives only, ") == 2
    assert (BENCHMARKS / "results" / "demo_seeds.csv").read_bytes() == committed


def test_bits_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, bits = str(Path(__file__).parents[1].joinpath("golden_bits.py")), tmp_path / "bits.json"

    def status(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", [script, "--only", "tokens", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        return ended.value.code

    assert status("--write", str(bits)) == 0
    assert status("--check", str(bits)) == 0
    known = json.loads(bits.read_text())
    bits.write_text(json.dumps({**known, next(iter(known)): "another"}))
    assert status("--check", str(bits)) == 1
    assert f"differs: {next(iter(known))}" in capsys.readouterr().out
