"""PPO's clipped objective on whole sequences, for comparison: it is not one of TOPR's tapers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topr_kernels import IS, TOPROutput, linear_log_prob, topr_loss_from_log_prob
from topr_kernels.hf import TOPRTrainer
from topr_kernels.hf.capture import loss_in_head
from topr_kernels.hf.forward import model_inputs
from topr_kernels.hf.heads import Head
from topr_kernels.hf.sharing import unshared
from topr_kernels.layout import IGNORE_INDEX

#: Range of the ratio inside which PPO has a gradient on both signs: 1 - 0.2 to 1 + 0.2.
EPSILON = 0.2


def ppo_objective(log_ratio: Tensor, reward: Tensor, epsilon: float = EPSILON) -> Tensor:
    """min(x R, [x] R) with x = pi/mu of the sequence and [x] its clip to 1 -+ epsilon; [B].

    Its gradient is w R grad log pi with w = x where x < 1 + epsilon (R >= 0) or x > 1 - epsilon
    (R < 0), and 0 elsewhere. A taper's gradient is never cut off like that on the positives, and fades
    on the negatives.

    Args:
        log_ratio: [B], sum over the tokens of log pi - log mu, in nats, differentiable.
        reward: [B], baseline subtracted.
        epsilon: half-width of the clip.
    """
    x = log_ratio.exp()
    return torch.minimum(x * reward, x.clamp(1 - epsilon, 1 + epsilon) * reward)


class PPOTrainer(TOPRTrainer):
    """``TOPRTrainer`` with PPO's objective, each sequence's divided by its length as TOPR's is.

    Of the settings, ``limits`` and ``ratio`` are without effect: the ratio is the sequence's.
    """

    def _topr(self, model: Any, inputs: dict[str, Any], items: Any) -> TOPROutput:
        inputs = unshared(inputs)
        passed, keep = model_inputs(model, inputs)
        labels, behavior = (inputs[n][:, -keep:] for n in ("labels", "behavior_log_prob"))
        # The first token of a row has nothing before it that could predict it.
        mask = labels.ne(IGNORE_INDEX)
        found: list[TOPROutput] = []

        def compute(hidden: Tensor, head: Head) -> Tensor:
            log_prob = linear_log_prob(
                hidden[:, -keep:],
                head.weight,
                labels,
                **head.options,
                workspace_bytes=self.args.workspace_bytes,
            ).log_prob
            # For everything but the loss and the weight: the figures that the other methods log.
            out = topr_loss_from_log_prob(
                log_prob.detach(),
                mask,
                behavior,
                inputs["reward"],
                limits=IS,
                baseline=self.args.baseline,
                normalizer=items,
            )
            log_ratio = torch.where(mask, log_prob - behavior, 0.0).sum(1)
            objective = ppo_objective(log_ratio, out.reward)
            count = (out.length > 0).sum() if items is None else items
            loss = -(objective / out.length.clamp(min=1)).sum() / count
            w = out.log_ratio.exp()
            inside = torch.where(out.reward < 0, w > 1 - EPSILON, w < 1 + EPSILON)
            found.append(out._replace(weight=torch.where(inside, w, 0.0)))
            return loss

        with loss_in_head(model, compute, sample=not self._head_checked) as inside_head:
            outputs = model(**passed)
        self._head_checked = True
        return found[0]._replace(loss=inside_head.arrive(outputs.logits))
