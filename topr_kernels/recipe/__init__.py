"""The offline pipeline of the paper as library functions.

Generate, score, curate, train, evaluate, and iterate around them. Records (``records.Record``) flow
between the steps and are stored as Parquet or JSONL. ``generate`` and its like work on objects,
``run_generate`` and its like on files: those resume. The console script ``topr`` (``cli``) runs them.
Needs the ``recipe`` extra.
"""

from topr_kernels.recipe.commands import (
    run_curate,
    run_evaluate,
    run_generate,
    run_score,
    run_train,
)
from topr_kernels.recipe.curate import Curation, CurationOptions, curate, subsample_negatives
from topr_kernels.recipe.evaluate import Accuracy, Evaluation, evaluate, wilson_interval
from topr_kernels.recipe.generate import Completion, complete, generate
from topr_kernels.recipe.iterate import run_iterate
from topr_kernels.recipe.models import Models, load_model
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.processes import ProcessError, joined
from topr_kernels.recipe.records import (
    Judged,
    Record,
    RecordError,
    Sampling,
    read_records,
    write_records,
)
from topr_kernels.recipe.score import max_log_ratio, score
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    IterateSettings,
    ScoreSettings,
    TrainCommandSettings,
    VerifySettings,
    VoteSettings,
)
from topr_kernels.recipe.task_files import FileTask
from topr_kernels.recipe.tasks import Question, Task, held_out_split
from topr_kernels.recipe.train import TrainSettings, train
from topr_kernels.recipe.verifier import (
    VerifierFigures,
    WeightedAccuracy,
    verifier_figures,
    weighted_accuracy,
)
from topr_kernels.recipe.verifier_commands import run_verify, run_vote
from topr_kernels.recipe.voting import SampledAccuracy, sampled_accuracy

__all__ = [
    "Accuracy",
    "Completion",
    "CurateSettings",
    "Curation",
    "CurationOptions",
    "EvaluateSettings",
    "Evaluation",
    "FileTask",
    "GenerateSettings",
    "IterateSettings",
    "Judged",
    "Models",
    "ProcessError",
    "Question",
    "Record",
    "RecordError",
    "SampledAccuracy",
    "Sampling",
    "ScoreSettings",
    "SettingsError",
    "Task",
    "TrainCommandSettings",
    "TrainSettings",
    "VerifierFigures",
    "VerifySettings",
    "VoteSettings",
    "WeightedAccuracy",
    "complete",
    "curate",
    "evaluate",
    "generate",
    "held_out_split",
    "joined",
    "load_model",
    "max_log_ratio",
    "read_records",
    "run_curate",
    "run_evaluate",
    "run_generate",
    "run_iterate",
    "run_score",
    "run_train",
    "run_verify",
    "run_vote",
    "sampled_accuracy",
    "score",
    "subsample_negatives",
    "train",
    "verifier_figures",
    "weighted_accuracy",
    "wilson_interval",
    "write_records",
]
