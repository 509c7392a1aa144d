"""What the backend uses of vLLM 0.32, as that behaves: ids in, ids and log-probabilities out.

Writes what it was asked, one JSON line each, to the file that ``FAKE_VLLM_LOG`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

__version__ = "0.32.0"


def log(**entry: Any) -> None:
    with Path(os.environ["FAKE_VLLM_LOG"]).open("a") as file:
        file.write(json.dumps(entry) + "\n")


class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop_token_ids: list[int] | None = None,
        max_tokens: int | None = 16,
        logprobs: int | None = None,
        detokenize: bool = True,
    ) -> None:
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})
        # Without a word.
        self.temperature = max(temperature, 0.01) if temperature else 0.0


class LLM:
    def __init__(self, model: str, *, dtype: str = "auto", **options: Any) -> None:
        if options.get("gpu_memory_utilization", 0.5) > 1:
            raise ValueError("gpu_memory_utilization must be at most 1")
        # fp32 weights are rounded unless it is told otherwise.
        log(made={"model": model, "dtype": dtype, **options}, pid=os.getpid())
        # One of several workers, which no more than this process knows when to end.
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        log(worker=worker.pid)

    def reset_prefix_cache(self) -> bool:
        log(reset=True)
        return True

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[Any]:
        log(prompts=prompts, settings=[vars(s) for s in sampling_params])
        time.sleep(float(os.environ.get("FAKE_VLLM_SECONDS", "0")))
        if os.environ["FAKE_VLLM_ANSWERS"] == "exit":
            os._exit(9)
        answers = json.loads(os.environ["FAKE_VLLM_ANSWERS"])
        outputs = []
        for i, _ in enumerate(prompts):
            ids = answers[i % len(answers)]
            # The drawn token is not the likeliest, which vLLM lists beside it.
            known = [
                {
                    token: types.SimpleNamespace(logprob=-0.25),
                    0: types.SimpleNamespace(logprob=1e-9),
                }
                for token in ids
            ]
            drawn = types.SimpleNamespace(token_ids=ids, logprobs=known)
            outputs.append(types.SimpleNamespace(outputs=[drawn]))
        return outputs
