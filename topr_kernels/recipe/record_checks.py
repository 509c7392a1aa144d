"""Whether records fit together, and fit the model that scores them or trains on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from topr_kernels.hf.fields import reads_behavior, sign_of
from topr_kernels.hf.images import check_readable
from topr_kernels.limits import Limits
from topr_kernels.recipe.records import Record, RecordError

#: Fields of a record that training may do without.
_MAY_BE_ABSENT = ("behavior_log_prob", "completion_mask", "sample_weight", "segments", "images")


def training_fields(
    records: Iterable[Record], limits: Limits, baseline: float
) -> list[dict[str, Any]]:
    """The fields of records that ``TOPRTrainer`` takes.

    Args:
        records: N records.
        limits: of the training.
        baseline: of the training.

    Raises:
        RecordError: if a record has not been scored and the limits of its sign read log mu.
    """
    fields = []
    for i, record in enumerate(records):
        reads = reads_behavior(record.reward, limits, baseline)
        if record.behavior_log_prob is None and reads:
            raise RecordError(
                f"record {i}, field 'behavior_log_prob': missing ({sign_of(record.reward, baseline)}, "
                "which these limits weigh by pi/mu); run score first, or leave out what no model sampled"
            )
        names = ("prompt_token_ids", "completion_token_ids", "reward")
        optional = {name: getattr(record, name) for name in _MAY_BE_ABSENT}
        fields.append(
            {name: getattr(record, name) for name in names}
            | {name: value for name, value in optional.items() if value is not None}
        )
    return fields


def check_processor(records: Sequence[Record], processor: Any, problem: str = "") -> None:
    """Refuses records with images for a model without a processor.

    Args:
        records: N records.
        processor: of the model, None if it has none.
        problem: why it has none.

    Raises:
        RecordError: naming the first record with images.
    """
    shown = next(((i, r.images) for i, r in enumerate(records) if r.images), None)
    if shown is not None and processor is None:
        i, images = shown
        raise RecordError(
            f"record {i}, field 'images': has {len(images)}, but the model has no processor for "
            f"them{problem and f' ({problem})'}; give the model that sampled the record, with its "
            "processor's files in its folder"
        )


def check_images(records: Sequence[Record], processor: Any) -> None:
    """Refuses records with images that the model cannot be given; opens each image.

    Raises:
        RecordError: as ``check_processor``, or naming the record with an image that cannot be read.
    """
    check_processor(records, processor)
    for i, record in enumerate(records):
        for k, image in enumerate(record.images or ()):
            try:
                check_readable(image, k, f"record {i}")
            except ValueError as error:
                raise RecordError(str(error)) from error


def check_sources(records: Sequence[Record]) -> None:
    """Refuses records whose mu come from different policies, or were scored in different ways.

    Beside records with log mu those without may come from anywhere: nothing is to be scored with them.

    Raises:
        RecordError: naming the first record whose source differs from that of the first.
    """
    scored = _scored(records) or list(enumerate(records))
    for i, record in scored:
        k, beginning = scored[0]
        for name, value, first in (
            *(
                (f"sampling.{n}", getattr(record.sampling, n), getattr(beginning.sampling, n))
                for n in ("model", "weights", "tokenizer", "dtype")
            ),
            ("behavior_source", record.behavior_source, beginning.behavior_source),
        ):
            if value != first:
                raise RecordError(
                    f"record {i}, field {name!r}: got {value!r}, but record {k} has {first!r}; mu must "
                    "come from one source: score all records with the model that sampled them, and "
                    "train on the samples of one model at a time"
                )


def _scored(records: Sequence[Record]) -> list[tuple[int, Record]]:
    """The records that have log mu, with their numbers."""
    return [(i, r) for i, r in enumerate(records) if r.behavior_log_prob is not None]


def check_scored_softmax(records: Sequence[Record]) -> None:
    """``check_full_softmax`` of the records that have log mu."""
    for i, record in _scored(records):
        check_full_softmax([record], first=i)


def check_full_softmax(records: Sequence[Record], first: int = 0) -> None:
    """Refuses records that were not sampled from the full softmax, under which mu is scored.

    Args:
        records: N records.
        first: number of the first of them, for the message.

    Raises:
        RecordError: if a record was sampled greedily (temperature 0) or with top-k or top-p.
    """
    for i, record in enumerate(records, first):
        sampling = record.sampling
        for name, value, fine in (
            ("temperature", sampling.temperature, sampling.temperature > 0),
            ("top_k", sampling.top_k, sampling.top_k == 0),
            ("top_p", sampling.top_p, sampling.top_p == 1),
        ):
            if not fine:
                raise RecordError(
                    f"record {i}, field 'sampling.{name}': got {value}; mu is taken from the full "
                    "softmax, which did not sample this record; sample with temperature > 0, top_k=0 "
                    "and top_p=1"
                )


def check_dtype(records: Sequence[Record], dtype: str) -> None:
    """Refuses records that were sampled in another dtype than they will be scored in.

    Args:
        records: N records. Those without a dtype ("") pass.
        dtype: of the model that scores, as "float32".

    Raises:
        RecordError: naming the record.
    """
    for i, record in enumerate(records):
        if record.sampling.dtype not in ("", dtype):
            raise RecordError(
                f"record {i}, field 'sampling.dtype': got {record.sampling.dtype!r}, but mu would "
                f"be scored in {dtype!r}, which is another policy: log-ratios of sequences are off by "
                f"up to a nat. Sample anew with --engine dtype={dtype}, or leave score out and train "
                "on the log-probabilities that the sampler reported"
            )


def check_tokens(records: Sequence[Record], vocabulary: int, fingerprint: str) -> None:
    """Refuses records whose token ids mean other tokens to the model.

    Args:
        records: N records.
        vocabulary: number of ids of the model.
        fingerprint: of its tokenizer. Records without one ("") pass.

    Raises:
        RecordError: naming the record and the field.
    """
    for i, record in enumerate(records):
        if record.sampling.tokenizer not in ("", fingerprint):
            raise RecordError(
                f"record {i}, field 'sampling.tokenizer': got {record.sampling.tokenizer!r}, but the "
                f"model's tokenizer is {fingerprint!r}: its token ids mean something else; use the "
                "model that sampled the records, or one trained from it"
            )
        for name in ("prompt_token_ids", "completion_token_ids"):
            largest = max(getattr(record, name), default=0)
            if largest >= vocabulary:
                raise RecordError(
                    f"record {i}, field {name!r}: got the id {largest}, but the model has {vocabulary} "
                    "ids; the records come from another tokenizer"
                )


def check_positions(records: Sequence[Record], positions: int | None) -> None:
    """Refuses records that are longer than the model's positions.

    Args:
        records: N records.
        positions: tokens that the model has room for; None if it does not tell.

    Raises:
        RecordError: naming the record.
    """
    for i, record in enumerate(records):
        length = len(record.prompt_token_ids) + len(record.completion_token_ids)
        if positions is not None and length > positions:
            raise RecordError(
                f"record {i}: has {length} tokens of prompt and completion, but the model has "
                f"{positions} positions; leave it out, or use the model that sampled it"
            )
