"""What the commands that sample share: the backend, the chat template, and the call of ``generate``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from topr_kernels.recipe.files import one_line
from topr_kernels.recipe.generate import Completion, generate
from topr_kernels.recipe.models import LoadedModel, Models, weights_fingerprint
from topr_kernels.recipe.options import SettingsError, model_key, naming
from topr_kernels.recipe.processes import current
from topr_kernels.recipe.records import Record
from topr_kernels.recipe.scoring import Verdict, count_problems, first_detail
from topr_kernels.recipe.server import ServerSampler, server_url
from topr_kernels.recipe.settings import SamplerOptions, engine_settings
from topr_kernels.recipe.vllm_backend import choose_backend, vllm_sampler, with_engine

AnySampler = TypeVar("AnySampler", bound=SamplerOptions)

#: A question to try chat templates with.
_MESSAGE = "1 + 1 ="


def with_backend(settings: AnySampler) -> AnySampler:
    """The settings with "auto" resolved, so that a resumed run cannot change what samples.

    Raises:
        SettingsError: as ``choose_backend`` and ``with_engine``; or if vLLM or a server is asked for by
            several processes, or the URL of the server is not valid.
    """
    backend = choose_backend(settings.backend, settings.model)
    if settings.server:
        server_url(settings.server)
    if backend != "hf" and current().count > 1:
        if settings.backend == backend:
            raise SettingsError(
                f"backend: got {backend!r} in {current().count} processes; expected one process, or 'hf'"
            )
        backend = "hf"
    return with_engine(dataclasses.replace(settings, backend=backend))


def own_share() -> dict[str, Any]:
    """Arguments with which ``generate`` and ``score`` do only this process's share."""
    return {"take": current().take, "progress": current().rank == 0}


def sample_task(
    settings: SamplerOptions,
    task: Any,
    questions: list[Any],
    samples: int,
    models: Models,
    partial: Path,
    label: str,
    **share: Any,
) -> list[Record]:
    """Samples answers to questions of a task as the settings say, in parts under ``partial``.

    Args:
        settings: the model, and how it is sampled.
        task: as in ``generate``.
        questions: as in ``generate``.
        samples: answers to each question.
        models: loads the model.
        partial: folder of an unfinished step.
        label: named on the progress bar.
        **share: ``take``, ``progress`` and ``judged`` of ``generate``.
    """
    engine = engine_settings(settings.engine)
    what = f"--model {settings.model}, --backend {settings.backend}: sampling failed"
    with naming(what, "--sample-batch"), ExitStack() as held:
        sampler: Callable[..., list[Completion]] | None = None
        positions = engine.get("max_model_len")
        if settings.backend == "vllm":
            loaded = models.take(settings.model)
            # vLLM takes nearly all of the GPU; here the model only tells its fingerprint and stop ids.
            loaded.model.to("cpu")
            sampler = held.enter_context(vllm_sampler(settings.model, engine))
        else:
            loaded = models.get(settings.model)
        shows = any(question.images for question in questions)
        check_chat(settings, loaded.tokenizer, parts=shows)
        if shows:
            _check_shown(settings, loaded)
        if settings.backend == "server":
            server = ServerSampler(settings.server, settings.model, loaded, partial)
            sampler, positions = server, server.positions
        return generate(
            loaded.model,
            loaded.reads if shows else loaded.tokenizer,
            task,
            questions,
            model_name=loaded.name,
            samples=samples,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.sample_batch,
            seed=settings.seed,
            temperature=settings.temperature,
            shards=partial / "parts",
            chat=settings.chat,
            weights=weights_fingerprint(loaded.model),
            sampler=sampler,
            dtype=engine.get("dtype"),
            positions=positions,
            label=label,
            **share,
        )


def _check_shown(settings: SamplerOptions, loaded: LoadedModel) -> None:
    """Refuses questions with images where the model would not see them.

    Raises:
        SettingsError: naming the flag, or the processor that the model lacks.
    """
    if settings.backend != "hf":
        raise SettingsError(
            f"backend: got {settings.backend!r} with questions that have images, which only the "
            "transformers backend gives to the model; use --backend hf"
        )
    if loaded.processor is None:
        raise SettingsError(
            f"--model {settings.model}: has no processor for the images of the questions "
            f"({loaded.no_processor or 'it is no model of images'}); give a model of images with its "
            "processor's files, or a task without images"
        )
    if not settings.chat:
        raise SettingsError(
            "chat: got False with questions that have images; use --chat: the model's chat template "
            "says where images stand"
        )


def said_problems(judged: Sequence[Verdict]) -> dict[str, Any]:
    """Prints how many answers have no verdict, by cause, and returns that for the figures.

    The figures also say how many were judged without a filter of system calls, if any were.
    """
    problems = dict(sorted(count_problems(judged).items()))
    if problems:
        causes = ", ".join(f"{count} {cause}" for cause, count in problems.items())
        first = first_detail(judged)
        first = first and f"; the first {first}"
        print(f"answers whose scorer failed, rewarded -1: {causes}{first}")
    unfiltered = sum(verdict.unfiltered for verdict in judged)
    return {"scorer_problems": problems} | ({"unfiltered": unfiltered} if unfiltered else {})


def refuse_broken_reward(
    function: str, records: Sequence[Record], judged: Sequence[Verdict], partial: Path
) -> None:
    """Refuses answers of which a custom reward could judge none.

    Args:
        function: the custom reward; "" for none.
        records: N records.
        judged: the verdict on each.
        partial: folder of the unfinished step.

    Raises:
        SettingsError: if the function failed each time it was called; says how.
    """
    # It is not called for answers that were cut off.
    asked = [v for r, v in zip(records, judged, strict=True) if r.finish_reason == "stop"]
    if function and asked and all(verdict.problem == "raised" for verdict in asked):
        raise SettingsError(
            f"--reward {function}: failed on all {len(asked)} answers; the first time it "
            f"{first_detail(asked) or 'raised'}. Mend it (topr reward --reward {function} --try FILE "
            f"shows its verdicts), delete the folder {partial} and run again"
        )


def check_chat(settings: SamplerOptions, tokenizer: Any, *, parts: bool = False) -> None:
    """Refuses to ask through a chat template that is not there or fails, and warns of one with a clock.

    Args:
        settings: of the sampler.
        tokenizer: of the model.
        parts: whether messages may be lists of parts, which some templates of images alone read.

    Raises:
        SettingsError: if it is asked for, and the tokenizer has none, it cannot be filled in, or it
            leaves the question out.
    """
    if not settings.chat:
        return
    name = model_key(settings.model)
    if not tokenizer.chat_template:
        raise SettingsError(
            f"chat: the tokenizer of the model {name!r} has no chat template; leave it out, or give a "
            "model that has one"
        )
    try:
        template = tokenizer.get_chat_template()
        asked = _asked(tokenizer, template)
        if parts and _MESSAGE not in asked:
            asked = _asked(tokenizer, template, [{"type": "text", "text": _MESSAGE}])
    except Exception as error:
        raise SettingsError(
            f"chat: the chat template of the model {name!r} fails: {one_line(error)}; mend it, or leave "
            "--chat out"
        ) from error
    if _MESSAGE not in asked:
        raise SettingsError(
            f"chat: the chat template of the model {name!r} leaves the question {_MESSAGE!r} out, and "
            f"gives {asked[:80]!r}; mend it, or leave --chat out"
        )
    if current().rank == 0 and _reads_the_clock(tokenizer, template):
        warnings.warn(
            f"chat: the chat template of the model {name!r} writes the date into every prompt, so the "
            "same command asks other prompts tomorrow, and a run continued then is of both; put a date "
            "in the place of strftime_now(...) in the template in the model's folder",
            stacklevel=2,
        )


def _reads_the_clock(tokenizer: Any, template: str) -> bool:
    """Whether a template that can be filled in asks its only clock, ``strftime_now``, for a prompt."""
    stopped = "{% macro strftime_now(format) %}{{ raise_exception('clock') }}{% endmacro %}"
    try:
        _asked(tokenizer, stopped + template)
    except Exception:
        return True
    return False


def _asked(tokenizer: Any, template: str, content: Any = _MESSAGE) -> str:
    message = [{"role": "user", "content": content}]
    return str(
        tokenizer.apply_chat_template(
            message, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    )
