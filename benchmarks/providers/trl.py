"""TRL's fused head, at the vocabulary chunk its trainers use and at the best of a few."""

from __future__ import annotations

from torch import Tensor

from benchmarks.case import Case, LogProb, Provider, absent, per_token

LINK = "https://github.com/huggingface/trl/issues/7244"
CHUNKS = (1024, 2048, 4096, 8192, 16384)


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    names = ("TRL fused head", "TRL fused head tuned")
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as default
    except Exception as error:  # a broken install raises whatever it likes
        return dict.fromkeys(names, absent(error))

    def at(chunk: int) -> LogProb:
        def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
            y = c.row_labels()
            return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, ())[0]

        return log_prob

    return {
        names[0]: per_token({f"chunk {default}": at(default)}),
        names[1]: per_token({f"chunk {chunk}": at(chunk) for chunk in CHUNKS}),
    }
