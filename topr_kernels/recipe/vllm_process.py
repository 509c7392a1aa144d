"""The process that vLLM runs in: ``vllm_backend`` starts this file as a script. It ends with its parent.

Reads pickles from a socket: the settings of the engine first, then batches. Imports nothing of this
package, so that it starts at once and shares no state with it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any


def end_with(parent: int) -> None:
    """Kills this process's group, vLLM's workers among it, once the process ``parent`` is gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def sample_until_closed(link: Connection) -> None:
    """Starts an engine and samples the batches that arrive, until the other side closes.

    Every answer is a pair (error, value), one of which is None.
    """
    try:
        vllm: Any = importlib.import_module("vllm")
        engine = vllm.LLM(**link.recv())
        link.send((None, vllm.__version__))
        while True:
            link.send((None, sample(vllm, engine, *link.recv())))
    except EOFError:
        return
    except BaseException as error:
        # The other side shows only the last line.
        traceback.print_exc()
        link.send((f"{type(error).__name__}: {error}", None))


def sample(
    vllm: Any, engine: Any, prompts: list[list[int]], settings: list[dict[str, Any]]
) -> list[tuple[list[int], list[float]]]:
    """Ids and their log-probabilities for each prompt.

    Args:
        vllm: the module.
        engine: its ``LLM``.
        prompts: ids of each.
        settings: of ``SamplingParams``, one for each prompt.
    """
    # A batch must not depend on earlier ones, whose cached prefixes differ by rounding. Samples of one
    # question still share their prefix within the batch.
    engine.reset_prefix_cache()
    outputs = engine.generate(
        [{"prompt_token_ids": row} for row in prompts],
        [vllm.SamplingParams(**options) for options in settings],
        use_tqdm=False,
    )
    completions = []
    for output in outputs:
        drawn = output.outputs[0]
        tokens = list(drawn.token_ids)
        # One mapping per token, from ids to their log-probabilities; the drawn id is among them.
        known = zip(tokens, drawn.logprobs, strict=True)
        completions.append((tokens, [min(0.0, float(of[token].logprob)) for token, of in known]))
    return completions


if __name__ == "__main__":
    # The folder of this file, so that nothing imports its modules by mistake. vLLM's workers, which run
    # this file under another name, inherit the path.
    del sys.path[0]
    # In one process: requests that arrive while an engine in another process runs would be batched by
    # chance, and rounding would change with the batches.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    descriptor, starter = (int(argument) for argument in sys.argv[1:])
    threading.Thread(target=end_with, args=(starter,), daemon=True).start()
    sample_until_closed(Connection(descriptor))
