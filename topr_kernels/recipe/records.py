"""Records of the offline pipeline: a prompt, the completion that was sampled, how, and its reward."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from topr_kernels.hf.fields import IMAGES, MASK, SEGMENTS, mask_of, name_here, segments_of
from topr_kernels.recipe.files import atomic_path, one_line, parse_object

FinishReason = Literal["stop", "length"]
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


class RecordError(ValueError):
    """A record that cannot be trained on; the message names the record and the field."""


@dataclass(frozen=True)
class Sampling:
    """How a completion was sampled.

    Args:
        model: name of the sampling model (no path of the machine it ran on).
        temperature: 0 for greedy.
        top_k: 0 for the full softmax.
        top_p: 1 for the full softmax.
        max_new_tokens: length at which generation was cut.
        seed: seed of the batch that the completion came from.
        tokenizer: fingerprint of the tokenizer (``tokenizer_fingerprint``), "" if not known.
        weights: fingerprint of the weights (``weights_fingerprint``), "" if not known.
        dtype: that the sampler computed in, as "float32"; "" if not known.
    """

    model: str
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int
    tokenizer: str = ""
    weights: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Judged:
    """The solution that a judgement is of.

    Args:
        record: its number in the records file that was judged, from 0.
        group: number of its question.
        right: whether it is right: its reward is above 0.
    """

    record: int
    group: int
    right: bool


@dataclass(frozen=True)
class Record:
    """One sampled completion.

    Args:
        group: number of the question; samples of one question share it. Of a judgement: number of the
            solution it judges.
        prompt: text that was completed.
        completion: text that was sampled, without special tokens.
        prompt_token_ids: ids of the prompt as the model saw them, at least one.
        completion_token_ids: sampled ids, the stop token included where generation stopped itself.
        reward: signed; +1 or -1 from the tasks here.
        finish_reason: "stop" if the model ended the completion, "length" if it was cut.
        sampling: settings of the sampler.
        behavior_log_prob: log-probability of each completion token under the full softmax of the
            sampling model at the sampling temperature, one per completion token; None before
            ``score``.
        behavior_source: where ``behavior_log_prob`` comes from: "score", "sampler" (what the sampling
            engine reported), or "" if not known.
        valid: whether the completion gave an answer at all; None if not known.
        judged: what the completion judges (``topr verify``); None if it answers a question.
        completion_mask: of a trajectory: 1 for each completion token that the policy wrote, 0 for those
            of tools and others, under which ``behavior_log_prob`` is not read; None if it wrote all.
        sample_weight: >= 0, multiplies the record's loss; None for 1.
        segments: of a trajectory: one integer for each completion token, equal ones in a row being a
            segment, for the ratios per segment; None for a segment per turn.
        images: of the prompt and, in a trajectory, the completion, in the order of their tokens: paths,
            relative ones to the folder that commands run in, or ``data:`` URLs in base64; None for none.
    """

    group: int
    prompt: str
    completion: str
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    reward: float
    finish_reason: FinishReason
    sampling: Sampling
    behavior_log_prob: list[float] | None = None
    behavior_source: str = ""
    valid: bool | None = None
    judged: Judged | None = None
    completion_mask: list[int] | None = None
    sample_weight: float | None = None
    segments: list[int] | None = None
    images: list[str] | None = None

    @property
    def length(self) -> int:
        """Number of completion tokens that the policy wrote."""
        mask = self.completion_mask
        return len(self.completion_token_ids) if mask is None else sum(mask)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, as it is stored."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str) -> Record:
        """Checks plain values and builds the record.

        Args:
            raw: field name to value.
            where: names the record in messages, for instance "data.jsonl, record 3".

        Raises:
            RecordError: if a field is missing, unknown, of the wrong type, NaN or of the wrong
                length.
        """
        raw = _without_unread(_present(raw, Record))
        _check_names(raw, Record, where)
        sampling = raw["sampling"]
        if not isinstance(sampling, Mapping):
            raise _error(where, "sampling", sampling, "a mapping of the sampler's settings")
        sampling = _present(sampling, Sampling)
        _check_names(sampling, Sampling, f"{where}, field 'sampling'")
        checked = {name: _CHECKS[name](raw[name], where, name) for name in _CHECKS if name in raw}
        checked["sampling"] = Sampling(
            **{
                name: check(sampling[name], where, f"sampling.{name}")
                for name, check in _SAMPLING_CHECKS.items()
                if name in sampling
            }
        )
        record = Record(**checked)
        _check_lengths(record, where)
        return record


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes records as Parquet (``.parquet``) or JSONL (``.jsonl``), atomically.

    Raises:
        RecordError: if a record is not valid, or the suffix is another; nothing is written then.
    """
    check_suffix(path)
    rows = [Record.from_dict(r.to_dict(), f"record {i}").to_dict() for i, r in enumerate(records)]
    schema = _SCHEMA
    for column in _OPTIONAL:
        if any(row[column.name] is not None for row in rows):
            schema = schema.append(column)
        else:
            # Files that need no such column have none, as before there was one.
            for row in rows:
                del row[column.name]
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
        else:
            lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Reads and checks records from Parquet or JSONL.

    Raises:
        RecordError: naming the file, the record and the field, if a record is not valid or the
            file is not readable, or the suffix is another.
        FileNotFoundError: if there is no such file.
    """
    check_suffix(path)
    if path.suffix == ".parquet":
        try:
            rows = _parquet_rows(path)
        except (FileNotFoundError, PermissionError):
            raise
        # A file that is damaged in the middle alone raises the other two.
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise RecordError(
                f"{path.name}: not a Parquet file ({one_line(error)}); make it anew"
            ) from error
        return [Record.from_dict(row, f"{path.name}, record {i}") for i, row in enumerate(rows)]
    records: list[Record] = []
    try:
        # utf-8-sig: some editors write a byte order mark, and blank lines at the end.
        with path.open(encoding="utf-8-sig") as lines:
            for line in filter(str.strip, lines):
                where = f"{path.name}, record {len(records)}"
                records.append(Record.from_dict(parse_object(line, where, RecordError), where))
        return records
    except UnicodeDecodeError as error:
        raise RecordError(f"{path.name}: not UTF-8 text ({error}); make it anew") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, without the index that pandas adds."""
    # Not read_table, which turns a parent folder of the name "seed=3" into a column.
    with pq.ParquetFile(path) as file:
        table = file.read()
    fields = {field.name for field in dataclasses.fields(Record)}
    told = (table.schema.pandas_metadata or {}).get("index_columns", [])
    for name in table.column_names:
        # By name too: another tool may have rewritten a file of pandas without its metadata.
        if (name in told and name not in fields) or _PANDAS_INDEX.fullmatch(name):
            table = table.drop_columns([name])
    return list(table.to_pylist())


def check_suffix(path: Path, name: str = "path") -> None:
    """Refuses a file name without the suffix of a records file.

    Args:
        path: the file.
        name: of the argument, for the message.

    Raises:
        RecordError: if the suffix is neither ``.parquet`` nor ``.jsonl``.
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise RecordError(
            f"{name}: got {path.name!r}; expected a name that ends in .parquet or .jsonl"
        )


def _present(raw: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values without None in optional fields: a column holds None where a record lacks the field."""
    optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return {n: v for n, v in raw.items() if v is not None or n not in optional}


def _without_unread(raw: dict[str, Any]) -> dict[str, Any]:
    """The values with 0 for log-probs of tokens that the policy did not write: they are never read."""
    mask, scored = raw.get(MASK), raw.get("behavior_log_prob")
    if isinstance(mask, list) and isinstance(scored, list) and len(mask) == len(scored):
        pairs = zip(scored, mask, strict=True)
        return {**raw, "behavior_log_prob": [x if written else 0.0 for x, written in pairs]}
    return raw


_TEXT_ALONE = (
    "; records of the pipeline hold the tokens that were sampled, as `topr generate` writes them. "
    "TOPRTrainer takes records of text (examples/trainer.py)"
)


def _check_names(raw: Mapping[str, Any], kind: type, where: str) -> None:
    fields = dataclasses.fields(kind)
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    missing = sorted(required - raw.keys())
    if missing:
        text = kind is Record and {"prompt", "completion"} <= raw.keys()
        remedy = _TEXT_ALONE if text and "completion_token_ids" in missing else ""
        also = f", and {', '.join(map(repr, missing[1:]))}" if missing[1:] else ""
        raise RecordError(f"{where}, field {missing[0]!r}{also}: missing{remedy}")
    unknown = sorted(raw.keys() - {f.name for f in fields})
    if unknown:
        name = name_here(unknown[0])
        remedy = "remove it" if name is None else f"rename it {name!r} if that is what it means"
        raise RecordError(f"{where}, field {unknown[0]!r}: unknown; {remedy}")


def _check_lengths(record: Record, where: str) -> None:
    if not record.prompt_token_ids:
        raise _error(where, "prompt_token_ids", [], "at least one token")
    scored = record.behavior_log_prob
    if scored is not None and len(scored) != len(record.completion_token_ids):
        raise RecordError(
            f"{where}, field 'behavior_log_prob': {len(scored)} entries for "
            f"{len(record.completion_token_ids)} completion tokens; one per token is expected"
        )
    for name, values in ((MASK, record.completion_mask), (SEGMENTS, record.segments)):
        if values is not None and len(values) != len(record.completion_token_ids):
            raise RecordError(
                f"{where}, field {name!r}: {len(values)} entries for "
                f"{len(record.completion_token_ids)} completion tokens; one per token is expected, and "
                "none for the prompt"
            )


def _error(where: str, name: str, value: Any, expected: str) -> RecordError:
    return RecordError(f"{where}, field {name!r}: expected {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    said = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a longer number"
    return said if len(said) <= 80 else f"{said[:77]}..."


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise _error(where, name, value, "a text")
    if not is_unicode(value):
        raise _error(where, name, value, "a text without halves of characters (\\ud800 to \\udfff)")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text can be stored: JSON may hold half of a surrogate pair, UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(value: Any, where: str, name: str, bits: int = 63) -> int:
    # Tools store columns of whole numbers as floats if a value was missing.
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
        raise _error(where, name, value, f"a whole number >= 0, below 2^{bits}")
    return value


def _number(value: Any, where: str, name: str) -> float:
    # DuckDB writes 1.0 as a decimal.
    wrong = not isinstance(value, (int, float, Decimal)) or isinstance(value, bool)
    try:
        if wrong or not math.isfinite(number := float(value)):
            raise _error(where, name, value, "a finite number")
    except OverflowError as error:
        raise _error(where, name, value, "a finite number") from error
    return number


def _token_ids(value: Any, where: str, name: str) -> list[int]:
    if not isinstance(value, list):
        raise _error(where, name, value, "a list of token ids")
    return [_integer(token, where, f"{name}[{i}]", bits=31) for i, token in enumerate(value)]


def _log_probs(value: Any, where: str, name: str) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _error(where, name, value, "a list of log-probabilities, or nothing")
    for i, x in enumerate(value):
        # A sampled token had a probability above 0, so -inf is as wrong as NaN.
        if _number(x, where, f"{name}[{i}]") > 0:
            raise _error(where, f"{name}[{i}]", x, "a log-probability <= 0")
    return [float(x) for x in value]


def _completion_mask(value: Any, where: str, name: str) -> list[int] | None:
    if value is not None and not isinstance(value, list):
        raise _error(where, name, value, "a list of 0 and 1, or nothing")
    try:
        return mask_of({name: value}, len(value or ()), where)
    except ValueError as error:
        raise RecordError(str(error)) from error


def _segments(value: Any, where: str, name: str) -> list[int] | None:
    if value is not None and not isinstance(value, list):
        raise _error(where, name, value, "a list of whole numbers, or nothing")
    try:
        return segments_of({name: value}, len(value or ()), where)
    except (TypeError, ValueError) as error:
        raise RecordError(str(error)) from error


def _weight(value: Any, where: str, name: str) -> float | None:
    if value is not None and _number(value, where, name) < 0:
        raise _error(where, name, value, "a number >= 0; the sign is that of the reward")
    return None if value is None else float(value)


def _images(value: Any, where: str, name: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _error(where, name, value, "a list of paths and data: URLs in base64, or nothing")
    return [_text(image, where, f"{name}[{i}]") for i, image in enumerate(value)] or None


def _finish_reason(value: Any, where: str, name: str) -> FinishReason:
    if value == "stop":
        return "stop"
    if value == "length":
        return "length"
    raise _error(where, name, value, "'stop' or 'length'")


def _valid(value: Any, where: str, name: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise _error(where, name, value, "true, false or nothing")
    return value


def _judged(value: Any, where: str, name: str) -> Judged | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error(where, name, value, "a mapping that tells the judged solution, or nothing")
    _check_names(value, Judged, f"{where}, field {name!r}")
    if not isinstance(value["right"], bool):
        raise _error(where, f"{name}.right", value["right"], "true or false")
    number, group = (_integer(value[n], where, f"{name}.{n}") for n in ("record", "group"))
    return Judged(number, group, value["right"])


_CHECKS: dict[str, Any] = {
    "group": _integer,
    "prompt": _text,
    "completion": _text,
    "prompt_token_ids": _token_ids,
    "completion_token_ids": _token_ids,
    "reward": _number,
    "finish_reason": _finish_reason,
    "completion_mask": _completion_mask,
    "behavior_log_prob": _log_probs,
    "behavior_source": _text,
    "valid": _valid,
    "judged": _judged,
    "sample_weight": _weight,
    "segments": _segments,
    IMAGES: _images,
}
_SAMPLING_CHECKS: dict[str, Any] = {
    "model": _text,
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "max_new_tokens": _integer,
    "seed": _integer,
    "tokenizer": _text,
    "weights": _text,
    "dtype": _text,
}
_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        (
            "sampling",
            pa.struct(
                [
                    ("model", pa.string()),
                    ("temperature", pa.float64()),
                    ("top_k", pa.int64()),
                    ("top_p", pa.float64()),
                    ("max_new_tokens", pa.int64()),
                    ("seed", pa.int64()),
                    ("tokenizer", pa.string()),
                    ("weights", pa.string()),
                    ("dtype", pa.string()),
                ]
            ),
        ),
        ("behavior_log_prob", pa.list_(pa.float32())),
        ("behavior_source", pa.string()),
        ("valid", pa.bool_()),
    ]
)
#: Columns of the files that need them.
_OPTIONAL = (
    pa.field(
        "judged",
        pa.struct([("record", pa.int64()), ("group", pa.int64()), ("right", pa.bool_())]),
    ),
    pa.field(MASK, pa.list_(pa.int8())),
    pa.field("sample_weight", pa.float64()),
    pa.field(SEGMENTS, pa.list_(pa.int64())),
    pa.field(IMAGES, pa.list_(pa.string())),
)
