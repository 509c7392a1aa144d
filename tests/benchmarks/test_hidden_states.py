"""The generator of the fused-linear benchmarks' data, on a tiny head in place of the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import hidden_states

V, D, ROWS = 300, 16, 1200
LENGTHS = [100, 250, 350, 500]


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g)
    found: dict[str, Any] = {"head": (weight, torch.empty(0))}
    for i, temperature in enumerate(hidden_states.TEMPERATURES):
        hidden = torch.randn(ROWS, D, generator=g).half()
        labels, log_mu = hidden_states._draw(hidden.float(), weight, g, temperature)
        found[str(temperature)] = {
            "hidden": hidden, "labels": labels, "log_mu": log_mu, "entropy": 1.0 + i,
            "sizes": torch.tensor([0, *LENGTHS]).cumsum(0),
        }  # fmt: skip
    monkeypatch.setattr(hidden_states, "TOKENS", ROWS)
    monkeypatch.setattr(hidden_states, "_stored", lambda: found)
    return found


@pytest.mark.parametrize(("target", "nearest"), [(0.5, 1.0), (1.7, 0.6), (4.0, 0.75)])
def test_rows_get_the_entropy_that_is_asked_for(
    target: float, nearest: float, stored: dict[str, Any]
):
    made = hidden_states.at_entropy(target, 1000, seed=3)
    log_pi, entropy = hidden_states.log_prob_and_entropy(made)
    assert entropy.mean().item() == pytest.approx(target, rel=2e-3)
    factor = (
        made.hidden.norm()
        / hidden_states.first(
            hidden_states._shuffled(hidden_states.load(nearest, ROWS), 3), 1000
        ).hidden.norm()
    )
    assert made.temperature == pytest.approx(nearest / factor.item(), rel=1e-4)
    # Whole sequences in another order, the last one cut; every row a multiple of a stored one.
    sizes = made.cu_seqlens.diff().tolist()
    assert sum(sizes) == len(made.labels) == 1000
    assert set(sizes[:-1]) <= set(LENGTHS) and sizes != LENGTHS[: len(sizes)]
    rows = torch.nn.functional.normalize(stored[str(nearest)]["hidden"].float(), dim=1)
    found = torch.nn.functional.normalize(made.hidden, dim=1) @ rows.T
    assert torch.allclose(found.amax(1), torch.ones(1000), atol=1e-4)
    assert len(set(found.argmax(1).tolist())) == 1000
    # Tokens are mu's, which is pi with noise: a little less likely under pi, and log mu is known.
    behind = made.behavior_log_prob - log_pi
    assert 0 < behind.mean().item() < 0.05 * (1 + target) and behind.std() > 0
    assert made.reward.tolist() == [1.0, -1.0] * (len(sizes) // 2) + [1.0] * (len(sizes) % 2)


def test_draws_differ_by_their_seed_and_repeat(monkeypatch: pytest.MonkeyPatch):
    first, again, other = (hidden_states.at_entropy(2.0, ROWS, seed) for seed in (0, 0, 1))
    assert torch.equal(first.labels, again.labels) and torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.hidden, other.hidden)
    monkeypatch.setattr(hidden_states, "_shuffled", lambda data, seed: data)
    first, other = (hidden_states.at_entropy(2.0, ROWS, seed) for seed in (0, 1))
    assert torch.equal(first.hidden, other.hidden)
    assert not torch.equal(first.labels, other.labels)
    same = first.labels == other.labels
    assert not torch.equal(first.behavior_log_prob[same], other.behavior_log_prob[same])


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=f"rows=1201: at most {ROWS}"):
        hidden_states.at_entropy(1.0, ROWS + 1)
    with pytest.raises(ValueError, match="no factor found"):  # log V is 5.7
        hidden_states.at_entropy(6.0, ROWS)


def test_more_dimensions_leave_the_logits_and_more_columns_their_odds():
    real = hidden_states.at_entropy(2.0, ROWS)
    made = hidden_states.synthesise(real, D + 9, V + 200, 0.03, seed=1)
    assert made.hidden.shape == (ROWS, D + 9) and made.weight.shape == (V + 200, D + 9)
    logits, before = made.hidden @ made.weight.T, real.hidden @ real.weight.T
    torch.testing.assert_close(logits[:, :V], before, rtol=1e-4, atol=1e-4)
    tail = logits.softmax(-1)[:, V:].sum(1)
    assert tail.mean().item() == pytest.approx(0.03, rel=1e-3)
    # log mu follows log pi, so the log-ratios stay.
    log_ratio = [
        hidden_states.log_prob_and_entropy(d)[0] - d.behavior_log_prob for d in (real, made)
    ]
    torch.testing.assert_close(*log_ratio, rtol=1e-3, atol=1e-4)


def test_active_sizes_are_the_fewest_columns_that_leave_out_the_share():
    data = hidden_states.at_entropy(2.0, 512)
    found = hidden_states.active_sizes(data, [64, 256], log2_tau=-3)
    for size, tiles in zip((64, 256), found, strict=True):
        counts = []
        for h, y in zip(data.hidden.split(size), data.labels.split(size), strict=True):
            p = (h.double() @ data.weight.double().T).softmax(-1)
            p[torch.arange(size), y] -= 1
            energy = p.square().sum(0)
            kept = set(y.tolist())
            for column in energy.argsort(descending=True).tolist():
                if energy.sum() - energy[list(kept)].sum() <= 4.0**-3 * energy.sum():
                    break
                kept.add(column)
            counts.append(len(kept))
        assert tiles.tolist() == counts


@pytest.mark.parametrize(
    ("ratio", "error", "word"),
    [
        (1.1, 0.0, ""), (0.9, 0.0, ""), (1.101, 0.0, "OFF"), (0.899, 0.0, "OFF"),
        (1.08, 0.05, ""), (1.19, 0.05, "beyond 10 %"), (0.81, 0.05, "beyond 10 %"),
        (1.21, 0.05, "OFF"), (0.79, 0.05, "OFF"),
    ],
)  # fmt: skip
def test_what_the_check_says_of_a_ratio(ratio: float, error: float, word: str):
    # Rounded: 1.1 - 1 is more than 0.1.
    assert hidden_states.judge(round(ratio, 3) - 1e-12 * (ratio > 1), error) == word


@pytest.mark.parametrize(
    ("again", "other", "good", "said"),
    [
        (1.0, 1.0, True, set()),
        (1.09, 1.12, True, {"beyond 10 %"}),
        (1.0, 1.4, False, {"OFF"}),
        (1.12, 1.0, False, {"OFF"}),
        (0.85, 1.0, False, {"OFF"}),
    ],
)
def test_the_check_compares_generated_with_real_data(
    again: float, other: float, good: bool, said: set[str],
    stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    texts = {str(t): stored["0.75"] for t in hidden_states.OTHER_TEXTS}
    monkeypatch.setattr(hidden_states, "_held_out", lambda: texts)
    spread = torch.tensor([0.9, 1.1] * 8, dtype=torch.float64)
    calls = []

    def sizes(data: hidden_states.Hidden, of: list[int]) -> list[torch.Tensor]:
        calls.append(data)
        made = data.hidden.shape[1] > D
        known = len(calls) <= 4 * len(hidden_states.TEMPERATURES)
        return [100 * (1.0 if not made else again if known else other) * spread for _ in of]

    monkeypatch.setattr(hidden_states, "active_sizes", sizes)
    assert hidden_states.check(dim=D + 1) is good
    text = capsys.readouterr().out
    assert {w for w in ("OFF", "beyond 10 %") if w in text} == said
    # Two texts of 16 tiles that spread by a tenth.
    assert text.count("standard error of the ratio 0.037") == len(hidden_states.OTHER_TEXTS)
