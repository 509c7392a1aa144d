"""What the fields of a record mean and which values they take, alike at every entrance.

A field that is known to mean something is honoured or refused; one that is not known is kept. None is
what Arrow writes for an absent field, so it counts as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from topr_kernels.hf.foreign import foreign_problem
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.limits import Limits

TOKENS = ("prompt_token_ids", "completion_token_ids")
#: One 0 or 1 per token of the completion, 1 where the policy wrote it.
MASK = "completion_mask"
#: One integer per token of the completion: runs of equal ones are a segment.
SEGMENTS = "segments"
#: One number >= 0, by which the loss of the record is multiplied.
WEIGHT = "sample_weight"
#: A list: the images of prompt and completion in their order.
IMAGES = "images"

_MASK = re.compile(r"(^|_)masks?$")
_WEIGHT = re.compile(r"(^|_)weights?$")
#: Log mu, as samplers and other trainers call it. Those of a reference model are something else.
_LOG_PROB = re.compile(
    r"^(old_|rollout_|sampl(ing|er|ed)_|behaviou?r_|completion_|token_|policy_|generat(ion|ed|or)_"
    r"|inference_|vllm_|sglang_|action_|response_|output_|actor_|trajectory_|engine_|cumulative_|sum_|mu_)*"
    r"(per_token_)?(log_?probs?|logps?|log_?likelihoods?)$"
)
_MEDIA = re.compile(
    r"^_?(input_|num_)?(images?|imgs?|pictures?|videos?|audios?|speech|frames)"
    r"(_?(urls?|paths?|files?|bytes|base64|data|num|grid_thw|sizes|position_ids))?$"
    r"|^(pixel_values\w*|pixel_(attention_mask|position_ids)|input_features|feature_attention_mask"
    r"|input_audio\w*|second_per_grid_ts|spatial_shapes|num_tiles)$"
    r"|^(multi_?modal|mm)_(train_)?(data|inputs?|kwargs)$"
)
_IMAGE = re.compile(
    r"^_?(input_)?(images?|imgs?|pictures?)(_?(urls?|paths?|files?|bytes|base64|data))?$"
)
_LABELS = ("labels", "target_ids")
_POSITIONS = ("position_ids", "positions")
_KINDS = ("token_type_ids", "mm_token_type_ids", "segment_ids", "sequence_ids", "document_ids")
#: What samplers write where they cut a completion off, and where it ended.
_CUT = ("length", "max_tokens", "max_length", "max_new_tokens", "abort", "aborted", "truncated")
_ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "tool_use")
_FLAGS = ("truncated", "is_truncated")
#: Fields in which other words than these mean something else.
_WORDS = ("stop_reason", "status")


def plain(value: Any) -> Any:
    """Python's own numbers and lists for tensors, arrays and Arrow's values."""
    for name in ("tolist", "as_py", "to_pylist"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def token_ids(
    record: Mapping[str, Any], name: str, where: str, vocabulary: int | None = None
) -> list[int]:
    """Token ids of a record as Python's ints.

    Args:
        record: with the field.
        name: of the field.
        where: names the record in messages, as "record 3".
        vocabulary: number of ids of the model; None if not known.

    Raises:
        TypeError: if the field is not a flat sequence of whole numbers.
        ValueError: if an id is below 0, or not below ``vocabulary``.
    """
    ids = plain(record[name])
    flat = isinstance(ids, Sequence) and not isinstance(ids, (str, bytes))
    if flat and not set(map(type, ids)) <= {int}:
        # Tools store a column of whole numbers as floats if a value was missing.
        ids = [plain(x) for x in ids]
        ids = [int(x) if isinstance(x, float) and x.is_integer() else x for x in ids]
        flat = set(map(type, ids)) <= {int}
    if not flat:
        raise TypeError(
            f"{where}, field {name!r}: got {ids!r:.60}; expected a sequence of int token ids"
        )
    most = math.inf if vocabulary is None else vocabulary - 1
    if ids and (min(ids) < 0 or max(ids) > most):
        k, x = next((k, x) for k, x in enumerate(ids) if not 0 <= x <= most)
        allowed = "at least 0" if vocabulary is None else f"from 0 to {most}"
        raise ValueError(
            f"{where}, field {name!r}: got the id {x} at position {k}; expected ids {allowed}. Give "
            "the ids as they were sampled with this model's tokenizer; -100 is for labels"
        )
    return list(ids)


def reward_of(record: Mapping[str, Any], where: str) -> float:
    """The reward of a record.

    Raises:
        TypeError: if it is not one number.
        ValueError: if it is missing, NaN or infinite.
    """
    reward = plain(record.get("reward"))
    if reward is None:
        hint = ": reward = 1.0 if label else -1.0" if "label" in record else ""
        raise ValueError(
            f"{where}, field 'reward': is missing; it has {sorted(record)}; give every record its "
            f"signed reward{hint}"
        )
    # True would be 1, and False no failure but nothing at all.
    # DuckDB and Arrow write 1.0 as a decimal.
    if isinstance(reward, bool) or not isinstance(reward, (Real, Decimal)):
        raise TypeError(
            f"{where}, field 'reward': got {reward!r} of type {type(reward).__name__}; expected a "
            "signed number, such as 1.0 for a success and -1.0 for a failure; of several rewards "
            "their sum"
        )
    if not math.isfinite(reward):
        raise ValueError(f"{where}, field 'reward': got {reward}; expected a finite number")
    return float(reward)


def mask_of(record: Mapping[str, Any], tokens: int, where: str) -> list[int] | None:
    """Which of a completion's tokens the policy wrote, 1 or 0 each; None where nothing says so: all.

    Args:
        record: with or without the field.
        tokens: length of the completion.
        where: names the record in messages.

    Raises:
        TypeError: if it is not a flat sequence.
        ValueError: if it is not as long as the completion, or an entry is neither 0 nor 1.
    """
    values = plain(record.get(MASK))
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(
            f"{where}, field {MASK!r}: got a {type(values).__name__}; expected a sequence of one 0 or 1 "
            "per token of the completion, 1 where the policy wrote it"
        )
    if len(values) != tokens:
        raise ValueError(
            f"{where}, field {MASK!r}: has {len(values)} entries, but the completion has {tokens} "
            "tokens; expected one 0 or 1 for each of them and none for the prompt, 1 where the policy "
            "wrote it"
        )
    entries = [plain(x) for x in values]
    for k, x in enumerate(entries):
        if not isinstance(x, (bool, Real)) or x not in (0, 1):
            raise ValueError(
                f"{where}, field {MASK!r}: got {x!r:.40} at position {k}; expected 1 for a token that "
                f"the policy wrote and 0 for another; the weight of a record goes under {WEIGHT}"
            )
    return [int(x) for x in entries]


def segments_of(record: Mapping[str, Any], tokens: int, where: str) -> list[int] | None:
    """The segment of each of a completion's tokens, an integer; None where the record has none.

    Raises:
        TypeError: if they are not a flat sequence of whole numbers.
        ValueError: if there are more or fewer than tokens.
    """
    values = plain(record.get(SEGMENTS))
    if values is None:
        return None
    entries = None
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        entries = [plain(x) for x in values]
        entries = [int(x) if isinstance(x, float) and x.is_integer() else x for x in entries]
    if entries is None or not set(map(type, entries)) <= {int}:
        raise TypeError(
            f"{where}, field {SEGMENTS!r}: got {values!r:.40}; expected one integer per token of the "
            "completion, equal ones in a row being a segment; drop the field if it means something else"
        )
    if len(entries) != tokens:
        raise ValueError(
            f"{where}, field {SEGMENTS!r}: has {len(entries)} entries, but the completion has {tokens} "
            "tokens; expected one integer for each of them and none for the prompt"
        )
    return entries


def weight_of(record: Mapping[str, Any], where: str) -> float:
    """The weight of a record, 1 where it has none.

    Raises:
        TypeError: if it is not one number.
        ValueError: if it is negative, NaN or infinite.
    """
    weight = plain(record.get(WEIGHT))
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(
            f"{where}, field {WEIGHT!r}: got {weight!r:.40} of type {type(weight).__name__}; expected "
            "one number >= 0 for the whole record"
        )
    if not (math.isfinite(weight) and float(weight) >= 0):
        raise ValueError(
            f"{where}, field {WEIGHT!r}: got {weight}; expected a finite number >= 0; the sign of a "
            "record is that of its reward"
        )
    return float(weight)


def behavior_of(
    record: Mapping[str, Any], tokens: int, where: str, mask: Sequence[int] | None = None
) -> list[float] | None:
    """Log mu of a record's completion, one number per token; None where it has none.

    Args:
        record: with or without the field.
        tokens: length of the completion.
        where: names the record in messages.
        mask: as ``mask_of``. Entries under 0 are not read, and are 0 in the result.

    Raises:
        TypeError: if it is not a flat sequence of numbers.
        ValueError: if it is not as long as the completion, or an entry is NaN, infinite or positive.
    """
    values = plain(record.get("behavior_log_prob"))
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(
            f"{where}, field 'behavior_log_prob': got a {type(values).__name__}; expected a sequence "
            "of one float per token of the completion"
        )
    if len(values) != tokens:
        raise ValueError(
            f"{where}, field 'behavior_log_prob': has {len(values)} entries, but the completion has "
            f"{tokens} tokens (with the EOS that ends it, unless finish_reason is 'length'); give the "
            "completion_token_ids that were sampled, or leave it out and score the records"
        )
    if mask is not None:
        values = [x if written else 0.0 for x, written in zip(values, mask, strict=True)]
    # Most records take this short way: a sum is finite only if all of its parts are.
    plainly = set(map(type, values)) <= {float} and math.isfinite(sum(values))
    if plainly and max(values, default=0.0) <= 0:
        return list(values)
    entries = [plain(x) for x in values]
    for k, x in enumerate(entries):
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(
                f"{where}, field 'behavior_log_prob': got {x!r:.40} of type {type(x).__name__} at "
                f"position {k}; expected the log-probability of the sampled token, a number"
            )
        # A sampled token had a probability above 0, so -inf is as wrong as NaN.
        if not (math.isfinite(x) and x <= 0):
            raise ValueError(
                f"{where}, field 'behavior_log_prob': got {x} at position {k}; expected a finite "
                "log-probability <= 0 (the logarithm of a probability, with its sign); score the "
                "record, or leave it out"
            )
    return [float(x) for x in entries]


def reads_behavior(reward: float, limits: Any, baseline: float) -> bool:
    """Whether a record's weight depends on log mu: not where the limits of its sign are equal."""
    # What a custom taper reads is not known.
    if not isinstance(limits, Limits):
        return True
    if reward - baseline < 0:
        return limits.neg_min != limits.neg_max
    return limits.pos_min != limits.pos_max


def sign_of(reward: float, baseline: float) -> str:
    """The branch of the loss that a reward takes, in words."""
    kind = "negative" if reward - baseline < 0 else "positive"
    return f"a reward of {reward:g} with baseline={baseline:g} is a {kind}"


def was_cut(record: Mapping[str, Any], where: str) -> bool | None:
    """Whether a completion was cut off, by ``finish_reason`` and the like; None if nothing tells.

    Raises:
        TypeError: if ``truncated`` is not a bool.
        ValueError: if ``finish_reason`` is not known, or two fields contradict each other.
    """
    reason = record.get("finish_reason")
    # SGLang tells the reason with its details.
    name = reason.get("type") if isinstance(reason, Mapping) else reason
    known = None if name is None else str(name).lower() in _CUT
    if name is not None and not known and str(name).lower() not in _ENDED:
        raise ValueError(
            f"{where}, field 'finish_reason': got {reason!r}; expected 'length' for a completion that "
            "was cut off and 'stop' for one that ended by itself; leave other records out"
        )
    for field in _FLAGS:
        flag = plain(record.get(field))
        if flag is None:
            continue
        if not isinstance(flag, bool):
            raise TypeError(f"{where}, field {field!r}: got {flag!r:.40}; expected True or False")
        if known is not None and known != flag:
            raise ValueError(
                f"{where}, field {field!r}: got {flag} with finish_reason={reason!r}, which says "
                "otherwise; leave the wrong one out"
            )
        known = flag
    for field in _WORDS:
        word = str(plain(record.get(field))).lower()
        if word not in (*_CUT, *_ENDED):
            continue
        if known is not None and known != (word in _CUT):
            raise ValueError(
                f"{where}, field {field!r}: got {record[field]!r}, but another field says otherwise; "
                "leave the wrong one out"
            )
        known = word in _CUT
    return known


def check_meaning(
    record: Mapping[str, Any],
    prompt: Sequence[int],
    completion: Sequence[int],
    mask: Sequence[int] | None,
    where: str,
    images: bool = False,
) -> None:
    """Refuses fields that mean something which training would not do.

    Values that change nothing pass: masks of ones or equal to ``completion_mask``, labels that are the
    tokens it scores, weights of 1, positions from 0.

    Args:
        record: as the user gave it.
        prompt: its token ids.
        completion: its token ids.
        mask: which of the completion's tokens the policy wrote, as ``mask_of``.
        where: names the record in messages.
        images: whether the field ``images`` is given to the model.

    Raises:
        ValueError: naming the record, the field and the remedy.
    """
    prompt, completion = list(prompt), list(completion)
    written = [1] * len(completion) if mask is None else list(mask)
    for name, given in record.items():
        if not isinstance(name, str) or given is None or (images and name == IMAGES):
            continue
        problem = _problem(name, plain(given), prompt, completion, written) or foreign_problem(
            name, plain(given), plain(record.get("reward"))
        )
        if problem is None and _LOG_PROB.match(name) and record.get("behavior_log_prob") is None:
            problem = (
                "expected log mu under the name behavior_log_prob; rename the field, or drop it if "
                "the records are to be scored"
            )
        if problem is None and name == "completion" and mask is None and _has_other_turns(given):
            problem = (
                f"has turns that the policy did not write, and nothing says which of the "
                f"completion_token_ids they are; give the record a {MASK} of one 0 or 1 per token, 1 "
                "where the policy wrote it"
            )
        if problem is not None:
            raise ValueError(f"{where}, field {name!r}: {problem}")


def name_here(name: str) -> str | None:
    """What a field of another name is called here; None if it is nothing that is known."""
    if _LOG_PROB.match(name):
        return "behavior_log_prob"
    if _MASK.search(name) or name in _LABELS:
        return MASK
    if _IMAGE.match(name):
        return IMAGES
    return WEIGHT if _WEIGHT.search(name) else None


def _has_other_turns(completion: Any) -> bool:
    """Whether a completion is messages, some of them not the assistant's."""
    if not isinstance(completion, (list, tuple)):
        return False
    roles = [message.get("role") for message in completion if isinstance(message, Mapping)]
    return any(role not in (None, "assistant") for role in roles)


def _problem(
    name: str, value: Any, prompt: list[int], completion: list[int], written: list[int]
) -> str | None:
    """What is wrong with a field that means something, and the remedy; None if nothing."""
    named = name in (*_LABELS, *_POSITIONS, *_KINDS, "input_ids")
    if name in (MASK, WEIGHT):
        return None
    if not (named or any(kind.search(name) for kind in (_MASK, _WEIGHT, _MEDIA))):
        return None
    got = f"got {value!r:.60}"
    if isinstance(value, (Sequence, Mapping)) and not value:
        return None
    if _MEDIA.match(name):
        # A count of none.
        if isinstance(value, Real) and not value:
            return None
        if _IMAGE.match(name):
            return (
                f"expected images in a list under the name {IMAGES!r}, with the model's processor in "
                "the place of its tokenizer (processing_class of TOPRTrainer, processor of "
                "CompletionCollator), which makes them its inputs; or drop the field if the prompt can "
                "do without it"
            )
        return (
            "expected none, video and sound are not given to the model, and tensors of images are made "
            f"of the field {IMAGES!r}; drop the field if the prompt can do without it"
        )
    row = value if isinstance(value, (list, tuple)) else [value]
    length = len(prompt) + len(completion)
    before = [0] * len(prompt)
    if _MASK.search(name):
        if isinstance(value, str) or all(x == 1 for x in row) or row in (written, before + written):
            return None
        if name == "attention_mask":
            return f"{got}; expected ones, records hold no padding; leave it out of the token ids"
        return (
            f"{got}; what the policy did not write is said by {MASK}, expected with one 0 or 1 per "
            "token of the completion, 1 where the policy wrote it; rename the field (and leave out "
            "entries of the prompt), or drop it if it means something else"
        )
    if _WEIGHT.search(name):
        if isinstance(value, str) or all(x == 1 for x in row):
            return None
        return (
            f"{got}; expected 1: the weight of a record is said by {WEIGHT}, one number >= 0, and "
            "weights of single tokens are not read; rename the field, or drop it"
        )
    labels = [x if w else IGNORE_INDEX for x, w in zip(completion, written, strict=True)]
    unscored = [IGNORE_INDEX] * len(prompt)
    if name in _LABELS and not any(row in (x, unscored + x) for x in (completion, labels)):
        return (
            f"{got}; expected the completion's ids, with -100 before them for the prompt; tokens that "
            f"the policy did not write are said by {MASK}, one 0 or 1 per token of the completion: "
            "rename the field, with 0 in the place of -100 and 1 of an id, or drop it"
        )
    if name == "input_ids" and row != prompt + completion:
        return (
            f"{got}; expected prompt_token_ids followed by completion_token_ids, which are what the "
            "model is given; drop the field, or correct it"
        )
    if name in _POSITIONS and row != list(range(length)):
        return (
            f"{got}; expected 0 to {length - 1}, positions are counted from the first token of the "
            "prompt; drop the field, or make a record of each sequence"
        )
    if name in _KINDS and not all(x == row[0] for x in row):
        return (
            f"{got}; expected one value for all tokens, kinds of tokens and packed sequences are not "
            "told to the model; drop the field, or make a record of each sequence"
        )
    return None
