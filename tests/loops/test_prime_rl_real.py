"""prime-rl's own loss: ``PRIME_RL_LOSS`` names its src/prime_rl/trainer/rl/loss.py.

It is on no registry. Last run with commit 559b44772e471d1538537b8805cc77f3824a5e64.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import plain
import pytest
import torch

from topr_kernels.integrations import prime_rl

SOURCE = os.environ.get("PRIME_RL_LOSS", "")


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """Their module; of its imports only the names of configurations are made up."""
    if not SOURCE:
        pytest.skip("PRIME_RL_LOSS does not name prime-rl's loss.py")
    trainer = ModuleType("prime_rl.configs.trainer")
    for name in ("CustomLossConfig", "DefaultLossConfig", "IPOLossConfig"):
        setattr(trainer, name, type(name, (SimpleNamespace,), {}))
    trainer.LossConfig = Any
    utils = ModuleType("prime_rl.utils.utils")
    utils.import_object = lambda path: getattr(prime_rl, path.rpartition(".")[2])
    names = ["prime_rl", "prime_rl.configs", "prime_rl.utils"]
    sys.modules |= {name: ModuleType(name) for name in names}
    sys.modules |= {trainer.__name__: trainer, utils.__name__: utils}
    spec = importlib.util.spec_from_file_location("prime_rl_loss", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prime_rl_loss"] = module
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize("weighted", [False, True], ids=["tokens", "sequences"])
def test_their_sum_is_the_plain_loop(theirs: Any, weighted: bool):
    model = plain.model()
    data = plain.batch(1, model)
    pi = plain.log_prob(model, data).detach().requires_grad_()
    mask = data.mask.bool()
    length = data.mask.sum(1, keepdim=True).clamp(min=1)
    weights = torch.where(mask, 1 / length, 0.0) if weighted else None
    scale = int((data.mask.sum(1) > 0).sum()) if weighted else int(mask.sum())
    config = theirs.CustomLossConfig(
        import_path="topr_kernels.integrations.prime_rl.topr_loss", kwargs={"limits": "topr"}
    )
    loss, metrics = theirs.compute_loss(
        list(pi),
        list(data.mu),
        None,
        list(data.score[:, None].expand_as(pi).contiguous()),
        list(mask),
        None if weights is None else list(weights),
        None,
        None,
        theirs.setup_rl_loss_fn(config),
        scale,
        1,
        1,
    )
    assert {"topr/log_ratio", "topr/negative_weight"} <= metrics.keys()
    loss.backward()
    twin = pi.detach().requires_grad_()
    expected = plain.loss(twin, data, data.score, (scale, weighted))
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(pi.grad, twin.grad, rtol=1e-6, atol=1e-9)
