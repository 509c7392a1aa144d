"""How a record was sampled, as it says itself: log mu is that of no other distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from topr_kernels.hf.fields import plain

#: Settings that leave the full softmax as it is -> their values that do.
_HARMLESS: dict[str, tuple[float, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}
#: Settings that change it by what they hold.
_CONSTRAINTS = (
    *("logit_bias", "logits_processors", "bad_words", "allowed_token_ids", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
#: Fields that hold such settings together.
_TOGETHER = ("sampling", "sampling_params", "sampling_parameters", "generation_kwargs")


def check_sampling(record: Mapping[str, Any], temperature: float, where: str) -> None:
    """Refuses log mu of a record that was sampled otherwise than the loss takes it.

    Args:
        record: with log mu, or to be scored; its settings lie in it or in ``sampling_params`` and the
            like. Those that are missing or no numbers pass.
        temperature: of the loss, or of scoring.
        where: names the record in messages.

    Raises:
        ValueError: naming the record, the field and the remedy.
    """
    together = ((f"{name}.", record.get(name)) for name in _TOGETHER)
    for prefix, settings in (("", record), *((name, plain(x)) for name, x in together)):
        if not isinstance(settings, Mapping):
            continue
        value = _number(settings.get("temperature"))
        # A column of fp32 holds 0.7 as 0.699999988.
        if value is not None and not math.isclose(value, temperature, rel_tol=1e-6):
            raise ValueError(
                f"{where}, field '{prefix}temperature': got {value:g}, but the loss (or the scoring of "
                f"log mu) has temperature={temperature:g}, and pi/mu of two temperatures is not 1 where "
                "the policies are equal; give all of them the sampler's (TOPRConfig, prepare_records, "
                "CompletionCollator, score_behavior), or drop the field if log mu is meant so"
            )
        for name, harmless in _HARMLESS.items():
            value = _number(settings.get(name))
            if value is not None and value not in harmless:
                raise _refused(where, f"{prefix}{name}", f"{value:g}", f"{harmless[0]:g}")
        for name in _CONSTRAINTS:
            held = plain(settings.get(name))
            # Arrow gives every mapping the keys of all, as None.
            if isinstance(held, Mapping):
                held = [x for x in held.values() if x is not None]
            if held:
                raise _refused(where, f"{prefix}{name}", f"{settings[name]!r:.60}", "none")


def _refused(where: str, field: str, got: str, expected: str) -> ValueError:
    return ValueError(
        f"{where}, field '{field}': got {got}; expected {expected}: log mu is that of the full softmax, "
        "which did not sample this record; leave the record out, or drop the field if log mu is that of "
        "the very distribution it was drawn from"
    )


def _number(value: Any) -> float | None:
    """A setting as a number; None if it is something else."""
    value = plain(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
