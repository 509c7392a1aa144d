"""Tinker's own client, offline: the step that turns a custom loss into weights, and its tracing."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import plain
import pytest
import torch
from tinker import types
from tinker.lib.public_interfaces.custom_loss import check_loss_inputs, encode_graph, trace_loss
from tinker.lib.public_interfaces.training_client import TrainingClient

from topr_kernels.integrations import tinker


def data(batch: plain.Batch, rows: range) -> list[types.Datum]:
    """As the cookbook makes them; the prompt's tokens are masked."""
    made = []
    for i in rows:
        length = plain.PROMPT + plain.ANSWER
        mask = torch.cat([torch.zeros(plain.PROMPT), batch.mask[i].float()])
        fields = {
            "target_tokens": batch.ids[i],
            "logprobs": torch.cat([torch.full((plain.PROMPT,), -3.0), batch.mu[i]]),
            "advantages": mask * batch.score[i],
            "mask": mask,
        }
        share = torch.tensor([1 / (plain.ROWS * max(float(batch.mask[i].sum()), 1.0))])
        fields |= {"behavior_logprobs": fields["logprobs"], "share": share}
        inputs = {name: types.TensorData.from_torch(value) for name, value in fields.items()}
        model_input = types.ModelInput.from_ints([0] * length)
        made.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return made


def step(batch: plain.Batch, pi: torch.Tensor, rows: range, loss_fn: object) -> tuple[float, list]:
    """Tinker's static step: the loss, and the weights -dC/dlogprobs that it would send."""
    outputs = [
        {"logprobs": types.TensorData.from_torch(torch.cat([torch.full((4,), -3.0), pi[i]]))}
        for i in rows
    ]
    forward = SimpleNamespace(loss_fn_outputs=outputs)
    found = TrainingClient._compute_custom_loss(data(batch, rows), loss_fn, forward)
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in found.data]
    assert found.metrics and all(type(v) is float for v in found.metrics.values())
    return found.loss_sum, weights


def expected(batch: plain.Batch, pi: torch.Tensor) -> tuple[float, torch.Tensor]:
    pi = pi.clone().requires_grad_()
    loss = plain.loss(pi, batch, batch.score)
    loss.backward()
    return float(loss.detach()), torch.where(batch.mask == 1, -pi.grad, 0.0)


@pytest.fixture(scope="module")
def given() -> tuple[plain.Batch, torch.Tensor]:
    model = plain.model()
    batch = plain.batch(1, model)
    return batch, plain.log_prob(model, batch).detach()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_custom_loss_is_that_of_the_plain_loop(given, parts: int):
    batch, pi = given
    loss_fn = functools.partial(tinker.topr_loss, normalizer=plain.ROWS)
    rows = plain.ROWS // parts
    total, weights = 0.0, []
    for i in range(parts):
        loss, part = step(batch, pi, range(i * rows, (i + 1) * rows), loss_fn)
        total, weights = total + loss, weights + part
    loss, gradient = expected(batch, pi)
    assert total == pytest.approx(loss, rel=1e-6)
    found = torch.stack(weights)
    assert (found[:, : plain.PROMPT] == 0).all()
    torch.testing.assert_close(found[:, plain.PROMPT :], gradient, rtol=1e-6, atol=1e-8)


def test_the_traced_form_is_the_same(given):
    batch, pi = given
    handle = trace_loss(tinker.traced_topr_loss, tinker.TRACED_RANKS, "session")
    encode_graph(handle)  # what it would send
    check_loss_inputs(handle, data(batch, range(plain.ROWS)))
    total, weights = step(batch, pi, range(plain.ROWS), handle)
    loss, gradient = expected(batch, pi)
    assert total == pytest.approx(loss, rel=1e-6)
    found = torch.stack(weights)[:, plain.PROMPT :]
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)
