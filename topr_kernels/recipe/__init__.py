"""The offline pipeline of the paper as library functions.

Generate, curate, score, train, evaluate. Records (``records.Record``) flow between the steps and are
stored as Parquet or JSONL. The console script ``topr`` (``cli``) runs them. Needs the ``recipe``
extra.
"""

from topr_kernels.recipe.curate import subsample_negatives
from topr_kernels.recipe.evaluate import Accuracy, Evaluation, evaluate, wilson_interval
from topr_kernels.recipe.generate import Completion, complete, generate
from topr_kernels.recipe.models import load_model
from topr_kernels.recipe.records import (
    Record,
    RecordError,
    Sampling,
    read_records,
    write_records,
)
from topr_kernels.recipe.score import max_log_ratio, score
from topr_kernels.recipe.tasks import Question, Task, held_out_split
from topr_kernels.recipe.train import TrainSettings, train

__all__ = [
    "Accuracy",
    "Completion",
    "Evaluation",
    "Question",
    "Record",
    "RecordError",
    "Sampling",
    "Task",
    "TrainSettings",
    "complete",
    "evaluate",
    "generate",
    "held_out_split",
    "load_model",
    "max_log_ratio",
    "read_records",
    "score",
    "subsample_negatives",
    "train",
    "wilson_interval",
    "write_records",
]
