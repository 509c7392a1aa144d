"""Settings of the commands: every field is a flag, a key of ``--config``, and part of a manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topr_kernels.choices import RATIOS
from topr_kernels.limits import PRESETS
from topr_kernels.recipe.curate import CurationOptions
from topr_kernels.recipe.options import Options, SettingsError, option, with_default

#: The largest seed that the Trainer takes; the seeds of batches, derived from it, fit 64 bits.
MOST_SEED = 2**32 - 1
#: Longest answer by default: of sums in few-shot prompts, and of tasks with reasoning.
_SHORT, _LONG = 6, 512
#: Dtypes that vLLM may sample in.
DTYPES = ("float32", "bfloat16", "float16")
#: Settings of vLLM that ``--engine`` takes: its resources and its arithmetic, and nothing that would
#: sample from another distribution.
_ENGINE: dict[str, type] = {
    "block_size": int,
    "cpu_offload_gb": float,
    "dtype": str,
    "enable_prefix_caching": bool,
    "enforce_eager": bool,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
    "max_model_len": int,
    "max_num_batched_tokens": int,
    "max_num_seqs": int,
    "pipeline_parallel_size": int,
    "tensor_parallel_size": int,
}


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which model, and the seed of everything drawn."""

    model: str = option("smollm2", "smollm2, a local folder, or a hub id", type=os.path.expanduser)
    seed: int = option(
        0, "of whatever is drawn: questions, samples, order", least=0, most=MOST_SEED
    )


@dataclass(frozen=True)
class QuestionOptions(Options):
    """Where the questions come from."""

    task: str = option(
        "arithmetic",
        "arithmetic (two-digit sums), the name of a reasoning-gym data set, or gsm8k:FILE or math:FILE, "
        "a JSONL file of question and answer",
    )
    task_config: str = option(
        "{}", "settings of the reasoning-gym data set of --task, as JSON; no other task takes any"
    )
    test_task: str = option(
        "",
        "task of the held-out questions, if not that of the others; --task-config is not for it",
    )
    questions: int = option(192, "training questions", least=1)
    trust_scorer: str = option(
        "",
        "reasoning-gym data sets, by commas, to take although they are refused: their scorers execute "
        "answers, or reward wrong ones",
    )
    reward: str = option(
        "",
        "module:function of your own that rewards in place of the task: given question, completion and "
        "entry, it gives a number, or nothing where there is no answer",
    )
    held_out: int = option(200, "held-out questions; no training question is one of them", least=1)
    question_seed: int = option(0, "of the choice of questions", least=0, most=MOST_SEED)


@dataclass(frozen=True)
class SamplerOptions(ModelOptions):
    """How answers are sampled."""

    max_new_tokens: int = option(
        None,
        f"longest answer, in tokens; by default {_SHORT} for arithmetic and {_LONG} for other tasks",
        least=1,
        type=int,
    )
    temperature: float = option(1.0, "of the sampler; 1 is the policy itself", least=0)
    sample_batch: int = option(128, "answers sampled together", least=1)
    chat: bool = option(False, "ask through the tokenizer's chat template")
    backend: str = option(
        "auto",
        "what samples: hf (transformers), vllm, server (see --server), or auto: vllm where it and a GPU "
        "are there",
        choices=("auto", "hf", "vllm", "server"),
    )
    server: str = option(
        "",
        "URL of an OpenAI-compatible server that samples, as http://127.0.0.1:8000: vLLM, SGLang or "
        "llama.cpp. It must serve the model of --model, which scores mu, in float32; its key, if any, "
        "is that of TOPR_SERVER_KEY, else OPENAI_API_KEY",
    )
    engine: tuple[str, ...] = option(
        (),
        f"a setting of vLLM, as max_model_len=2048; repeatable; of {', '.join(_ENGINE)}. By default the "
        "dtype is that of the stored model",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server and self.backend not in ("auto", "server"):
            raise SettingsError(
                f"server: got {self.server!r} with the backend {self.backend!r}; leave one of them out"
            )
        if self.backend == "server" and not self.server:
            raise SettingsError("backend: got 'server' without --server; give its URL there")
        if self.server:
            object.__setattr__(self, "backend", "server")
        # One form of each, so that manifests agree whatever the order.
        pairs = sorted(engine_settings(self.engine).items())
        object.__setattr__(self, "engine", tuple(f"{name}={value}" for name, value in pairs))


def engine_settings(engine: Sequence[str]) -> dict[str, Any]:
    """Settings of vLLM by name, of "name=value" texts; the last of a name counts.

    Raises:
        SettingsError: if a name is not one of ``_ENGINE``, or a value not of its type.
    """
    values = {}
    for text in engine:
        name, equals, value = text.partition("=")
        if not equals or name not in _ENGINE:
            raise SettingsError(
                f"engine: got {text!r}; expected NAME=VALUE with a name of {', '.join(_ENGINE)}"
            )
        kind = _ENGINE[name]
        try:
            flags = {"true": True, "false": False}
            values[name] = flags[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError) as error:
            expected = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
            raise SettingsError(f"engine: got {text!r}; expected {expected} for {name}") from error
        if name == "dtype" and value not in DTYPES:
            raise SettingsError(f"engine: got {text!r}; expected one of {', '.join(DTYPES)}")
    return values


@dataclass(frozen=True)
class AnswerOptions(SamplerOptions, QuestionOptions):
    """Questions and their answers; resolves the longest answer, so that it is in the manifest."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is None:
            short = {self.task, self.test_task or self.task} == {"arithmetic"}
            object.__setattr__(self, "max_new_tokens", _SHORT if short else _LONG)
        super().__post_init__()


@dataclass(frozen=True)
class GenerateSettings(AnswerOptions):
    """The samples; settings of ``topr generate``."""

    samples: int = option(8, "answers sampled per training question", least=1)


@dataclass(frozen=True)
class ScoreSettings(ModelOptions):
    """The batches; settings of ``topr score``. Nothing is drawn, so the seed changes nothing."""

    batch_size: int = option(32, "sequences scored together; use the training's", least=1)


@dataclass(frozen=True)
class CurateSettings(CurationOptions):
    """The draws; settings of ``topr curate``."""

    seed: int = option(0, "of the draws", least=0)


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How the model is trained."""

    limits: str = option("topr", "clip limits of the ratio", choices=tuple(PRESETS))
    ratio: str = option("sequence", "level of the ratio", choices=RATIOS)
    epochs: int = option(1, "passes over the samples", least=1)
    lr: float = option(2e-5, "learning rate of AdamW, constant", above=0)
    batch_size: int = option(32, "sequences per update", least=1)
    save_steps: int = option(12, "updates between checkpoints; a kill loses at most these", least=1)


@dataclass(frozen=True)
class TrainCommandSettings(TrainingOptions, ModelOptions):
    """The baseline; settings of ``topr train``."""

    baseline: float | None = option(
        None, "subtracted from every reward; by default what curate chose, else 0", type=float
    )


@dataclass(frozen=True)
class VotingOptions(Options):
    """How a model is measured."""

    eval_samples: int = option(8, "answers sampled per held-out question (N)", least=1)
    votes: int = option(4, "answers that vote in maj@K (K)", least=1)
    draws: int = option(100, "how often K of the N answers are drawn", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.votes > self.eval_samples:
            raise SettingsError(
                f"votes: got {self.votes}; expected at most eval_samples, {self.eval_samples}"
            )


@dataclass(frozen=True)
class EvaluateSettings(VotingOptions, AnswerOptions):
    """Settings of ``topr evaluate``; ``questions`` changes nothing: held-out ones are drawn first."""


#: The default of ``template``: what a verifier is asked.
VERIFIER_TEMPLATE = (
    "{prompt}{completion}\n\nIs the solution above right? Check it step by step. End with a line "
    'that says "Verdict: right" or "Verdict: wrong".\n'
)


@dataclass(frozen=True)
class JudgementOptions(SamplerOptions):
    """What a verifier is asked about a solution."""

    max_new_tokens: int = option(256, "longest judgement, in tokens", least=1)
    template: str = option(
        VERIFIER_TEMPLATE,
        "the question to the verifier; {prompt} and {completion} stand for those of the solution",
    )
    one_line: bool = option(False, "a judgement ends with its line")

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("{prompt}", "{completion}"):
            if part not in self.template:
                raise SettingsError(f"template: got {self.template!r}; expected {part} in it")


@dataclass(frozen=True)
class VerifySettings(JudgementOptions):
    """Which solutions are judged; settings of ``topr verify``."""

    samples: int = option(4, "judgements sampled per solution", least=1)
    solutions: int = option(0, "solutions of a question to judge, at random; 0 for all", least=0)
    right_share: float = option(
        0.0, "share of right solutions to make by leaving some out; 0 leaves it", least=0, most=1
    )


@dataclass(frozen=True)
class VoteSettings(JudgementOptions, QuestionOptions):
    """The votes; settings of ``topr vote``; the questions are those of ``topr evaluate``."""

    judgements: int = option(4, "judgements sampled per answer", least=1)
    votes: int = option(4, "answers that vote (K)", least=1)
    draws: int = option(100, "how often K of the answers are drawn", least=1)


@dataclass(frozen=True)
class IterateSettings(
    VotingOptions,
    TrainingOptions,
    CurationOptions,
    AnswerOptions,
):
    """The rounds; settings of ``topr iterate``."""

    # The seeds of the iterations are derived from it and must fit as well.
    seed: int = option(
        0, "of whatever is drawn: questions, samples, order", least=0, most=4_000_000
    )
    samples: int = option(8, "answers sampled per training question", least=1)
    iterations: int = option(3, "rounds of sampling and training", least=1)
    # Those of the demo: with few right answers, leaving wrong ones out is the cheapest good setting that
    # was found (benchmarks/LOG.md).
    positive_share: float = with_default(CurationOptions, "positive_share", 0.5)
    epochs: int = with_default(TrainingOptions, "epochs", 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server:
            raise SettingsError(
                f"server: got {self.server!r}; expected none: each round samples from the model that "
                "the last one trained, which a server does not have. Run generate --server, score, "
                "curate and train for each round, and serve the trained model for the next"
            )
        # Before a whole round of greedy samples, which cannot be scored.
        if self.temperature == 0:
            raise SettingsError(
                "temperature: got 0; expected a number above 0: greedy samples cannot be scored, so "
                "they do not train"
            )
