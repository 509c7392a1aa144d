"""The process that vLLM runs in; ``vllm_backend`` starts this file as a script, and it ends with it.

Speaks pickles over a socket: the settings of the engine first, then batches. Imports nothing of this
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


def serve(link: Connection) -> None:
    """Starts an engine and samples what is asked, until the other side closes.

    Every answer is a pair: None and the value, or what went wrong and None.
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
        # The other side says only the last line.
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
    # A batch must not depend on those before it: a prefix that another batch has computed differs by
    # rounding. Within a batch, samples of one question still share theirs.
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
    # The folder of this file, whose names are not for others to import. Not in vLLM's workers, which
    # run this file under another name and are given the path as it is here.
    del sys.path[0]
    # One process where one does: requests that arrive while another one steps are batched as it happens,
    # and rounding with them.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    descriptor, starter = (int(argument) for argument in sys.argv[1:])
    threading.Thread(target=end_with, args=(starter,), daemon=True).start()
    serve(Connection(descriptor))
