"""Fields of other trainers' records that mean something which training here would not do.

The names are those of verl, TRL, ms-swift, OpenRLHF, slime, SkyRL and prime-rl.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

#: True or 1 says: do not train on this.
_LEFT_OUT = re.compile(
    r"^(is_)?masked(_out)?$|^(loss_)?ignore(d|_mask)$|^(remove|drop|exclude)_sample$"
)
#: False or 0 says the same.
_TRAINED = re.compile(r"^(is_)?train(able|_on)?$")
_SCALE = re.compile(
    r"^(loss|sample|token)_scales?$|^(importance_sampling|is)_ratios?$|^loss_coefs?$"
)
_ADVANTAGE = re.compile(r"^(token_|per_token_)?advantages?$")
_TOKEN_REWARDS = re.compile(
    r"^((token_level|per_token|token|step|process|turn)_(rewards?|scores?)|rewards|shaped_rewards?)$"
)
_ROUTES = re.compile(r"^(rollout_)?rout(ed|ing)_(experts|indices)$")


def foreign_problem(name: str, value: Any, reward: Any) -> str | None:
    """What is wrong with a field of another trainer, and the remedy; None if nothing.

    Args:
        name: of the field.
        value: Python's numbers and lists; None and empty ones mean nothing.
        reward: of the record, as given.
    """
    numbers = list(_numbers(value))
    got = f"got {value!r:.60}"
    if _LEFT_OUT.search(name) and any(numbers):
        return (
            f"{got}; expected False or 0: it says not to train on this; leave the record "
            "out, or drop the field if it means something else"
        )
    if _TRAINED.search(name) and not all(numbers):
        return f"{got}; expected True or 1: it says not to train on this; leave the record out"
    if _SCALE.search(name) and any(x != 1 for x in numbers):
        return (
            f"{got}; expected 1, it is not read; multiply the reward by a factor for the whole record, "
            "or drop the field (pi/mu is computed here)"
        )
    if _ADVANTAGE.search(name) and not all(_equal(x, reward) for x in numbers):
        return (
            f"{got} beside a reward of {reward!r:.20}; expected the reward, which is what training "
            "uses: give the advantage as reward, one number per record, or drop the field"
        )
    if _TOKEN_REWARDS.search(name) and numbers and not _equal(math.fsum(numbers), reward):
        return (
            f"{got} beside a reward of {reward!r:.20}, which is what training uses; expected numbers "
            "that add up to it: TOPR weighs whole completions. Give their sum as reward, or drop the "
            "field"
        )
    if _ROUTES.search(name) and numbers:
        return (
            "expected none, the experts that the sampler chose are not replayed; drop the field if the "
            "model may route anew"
        )
    return None


def _numbers(value: Any) -> list[float]:
    """The numbers of a value, of whatever depth; of text and other things none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in _numbers(part)]
    return [float(value)] if isinstance(value, Real) else []


def _equal(x: float, reward: Any) -> bool:
    return isinstance(reward, Real) and math.isclose(x, float(reward), rel_tol=1e-5, abs_tol=1e-6)
