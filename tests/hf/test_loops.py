"""TOPR in a plain PyTorch loop and in an Accelerate loop: small, complete, and exact.

Accumulation and data parallelism change no gradient: ``normalizer`` is the count of the whole optimizer
step, so the micro-batches add up to the loss of one big batch whatever their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from processes import launch
from tiny import random_model
from torch import Tensor
from torch.utils.data import DataLoader

from topr_kernels import log_prob, topr_loss

Row = dict[str, Tensor]
REDUCTIONS = ["sequence_mean", "token_mean"]


def rows(n: int = 8) -> list[Row]:
    """Prompts of 3 tokens and answers of 0 to 6, every third one right; log mu of a frozen scorer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 100, (n, 9), generator=generator)
    labels = ids.clone()
    for i, length in enumerate([6, 1, 4, 0, 2, 5, 3, 6] * (n // 8)):
        labels[i, :3] = -100
        labels[i, 3 + length :] = -100
    with torch.no_grad():
        mu = log_prob(random_model().double()(ids).logits, labels).log_prob
        # Off-policy by up to a nat per token, so that the tapers differ.
        mu += torch.rand(mu.shape, generator=generator).double() - 0.5
    reward = torch.tensor([1.0 if i % 3 == 0 else -1.0 for i in range(n)])
    names = ("input_ids", "labels", "mu", "reward")
    return [dict(zip(names, row, strict=True)) for row in zip(ids, labels, mu, reward, strict=True)]


def loader(data: list[Row], size: int) -> Any:
    return DataLoader(data, batch_size=size)  # type: ignore[arg-type]


def windows(batches: Any, accumulation: int) -> Iterator[list[Row]]:
    """The micro-batches of one optimizer step at a time."""
    batches = iter(batches)
    while window := list(islice(batches, accumulation)):
        yield window


def count(batch: Row, reduction: str = "sequence_mean") -> Tensor:
    """Denominator of a micro-batch: its non-empty sequences, or its scored tokens."""
    scored = batch["labels"][:, 1:] != -100  # nothing predicts the first token
    return (scored.any(1) if reduction == "sequence_mean" else scored).sum()


def topr(model: Any, batch: Row, normalizer: Any, reduction: str = "sequence_mean") -> Tensor:
    logits = model(batch["input_ids"]).logits
    labels, mu, reward = batch["labels"], batch["mu"], batch["reward"]
    return topr_loss(logits, labels, mu, reward, reduction=reduction, normalizer=normalizer).loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def big_batch(data: list[Row], reduction: str) -> dict[str, Tensor]:
    """Gradient of all the data in one batch, the loss's own denominator."""
    model = random_model().double()
    (batch,) = loader(data, len(data))
    topr(model, batch, None, reduction).backward()
    found = gradients(model)
    assert max(g.abs().max() for g in found.values()) > 1e-3
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-13, msg=name)


# A plain loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_plain_accumulation_is_one_big_batch(reduction: str, accumulation: int):
    data = rows()
    model = random_model().double()
    (window,) = windows(loader(data, len(data) // accumulation), accumulation)
    normalizer = sum(count(batch, reduction) for batch in window)
    total = sum(loss_and_backward(model, batch, normalizer, reduction) for batch in window)
    assert_equal(gradients(model), big_batch(data, reduction))
    (everything,) = loader(data, len(data))
    torch.testing.assert_close(total, topr(model, everything, None, reduction).detach())


def loss_and_backward(model: Any, batch: Row, normalizer: Any, reduction: str) -> Tensor:
    loss = topr(model, batch, normalizer, reduction)
    loss.backward()
    return loss.detach()


def test_the_mean_of_means_is_another_gradient():
    """Why the count is needed at all: shares differ in sequences, and one sequence is empty."""
    data = rows()
    model = random_model().double()
    for batch in loader(data, 2):
        (topr(model, batch, None) / 4).backward()
    expected = big_batch(data, "sequence_mean")["lm_head.weight"]
    assert (model.lm_head.weight.grad - expected).abs().max() > 0.01 * expected.abs().max()


def test_a_plain_loop_learns():
    """The loop of README, on a batch that stays: the objective rises, right answers with it."""
    data = rows(24)
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, likelihood = [], []
    for _ in range(6):
        for window in windows(loader(data, 6), 2):
            sequences = sum(count(batch) for batch in window)
            for batch in window:
                logits = model(batch["input_ids"]).logits
                out = topr_loss(
                    logits, batch["labels"], batch["mu"], batch["reward"], normalizer=sequences
                )
                out.loss.backward()
                losses.append(float(out.loss.detach()))
                right = (out.reward > 0) & (out.length > 0)
                likelihood.append(float((out.log_ratio / out.length)[right].mean()))
            optimizer.step()
            optimizer.zero_grad()
    epoch = len(data) // 6
    assert sum(losses[-epoch:]) < sum(losses[:epoch]) - 0.5
    assert sum(likelihood[-epoch:]) / epoch > sum(likelihood[:epoch]) / epoch + 0.5


# An Accelerate loop -----------------------------------------------------------------------------


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerators share their state in a process; every test here configures its own."""
    reset_state()
    yield
    reset_state()


def reset_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerate_epoch(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    batches: Any,
    accumulation: int,
    reduction: str = "sequence_mean",
) -> list[float]:
    """One epoch; returns the loss of every optimizer step, summed over all processes.

    Not by ``accelerator.accumulate``, which counts micro-batches across the end of an epoch and
    divides by a number that a shorter last window does not have.
    """
    losses = []
    for window in windows(batches, accumulation):
        counts = torch.stack([count(batch, reduction) for batch in window])
        normalizer = accelerator.reduce(counts.sum(), "sum")
        step = torch.zeros(())
        for i, batch in enumerate(window):
            accelerator.sync_gradients = i + 1 == len(window)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                loss = topr(model, batch, normalizer, reduction)
                # DDP averages over the processes: the normaliser has done that already.
                accelerator.backward(loss * accelerator.num_processes)
                optimizer.step()
                optimizer.zero_grad()
            step += loss.detach()
        losses.append(float(accelerator.reduce(step, "sum")))
    return losses


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accelerate_accumulation_is_one_big_batch(reduction: str, accumulation: int):
    data = rows()
    model = random_model().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, loader(data, len(data) // accumulation))
    (_,) = accelerate_epoch(accelerator, *prepared, accumulation, reduction)
    # zero_grad() has run: with SGD and a rate of 1 the step is the gradient.
    step = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert_equal(step, big_batch(data, reduction))


@pytest.mark.usefixtures("fresh_state")
def test_accelerate_takes_a_step_per_window_whatever_its_length():
    """Six micro-batches an epoch in windows of four: two steps, each by the gradient of its window."""
    accelerator, data, model, taken = Accelerator(cpu=True), rows(12), random_model().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: taken.append(gradients(model)))
    prepared = accelerator.prepare(model, optimizer, loader(data, 2))
    for _ in range(2):
        accelerate_epoch(accelerator, *prepared, 4)
    assert len(taken) == 4
    for step, part in zip(taken, [data[:8], data[8:]] * 2, strict=True):
        assert_equal(step, big_batch(part, "sequence_mean"))


@pytest.mark.usefixtures("fresh_state")
def test_an_accelerate_loop_learns():
    accelerator = Accelerator(cpu=True)
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prepared = accelerator.prepare(model, optimizer, loader(rows(24), 6))
    epochs = [sum(accelerate_epoch(accelerator, *prepared, 2)) for _ in range(6)]
    assert epochs[-1] < epochs[0] - 0.5


def worker(folder: str, reduction: str) -> None:
    """One process of two: an epoch over its share of the data, then the weights."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = random_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prepared = accelerator.prepare(model, optimizer, loader(rows(), 2))
    (loss,) = accelerate_epoch(accelerator, *prepared, 2, reduction)
    if accelerator.is_main_process:
        assert accelerator.num_processes == 2
        state = {"loss": loss, "weights": accelerator.unwrap_model(prepared[0]).state_dict()}
        torch.save(state, Path(folder) / "state.pt")
    accelerator.wait_for_everyone()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_accelerate_two_processes_take_the_step_of_one(tmp_path: Path):
    """Two processes, two micro-batches each: DDP's average and the division by the steps undone."""
    reduction = "sequence_mean"
    launch(
        2,
        "test_loops.worker",
        str(tmp_path),
        reduction,
        env={"ACCELERATE_USE_CPU": "1"},
    )
    state = torch.load(tmp_path / "state.pt")
    before = random_model().double().state_dict()
    expected = big_batch(rows(), reduction)
    assert_equal({name: before[name] - state["weights"][name] for name in expected}, expected)
    (everything,) = loader(rows(), 8)
    whole = float(topr(random_model().double(), everything, None, reduction).detach())
    assert state["loss"] == pytest.approx(whole, rel=1e-6)
