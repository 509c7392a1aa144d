"""QuACK's chunked mean cross-entropy; CUDA only."""

from __future__ import annotations

from benchmarks.case import Loss, Provider, absent

LINK = "https://github.com/Dao-AILab/quack/tree/main/benchmarks"
CHUNKS = (2048, 4096, 8192)


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    if device != "cuda":
        return {"QuACK mean": Provider(missing="runs on CUDA only")}
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked
    except Exception as error:  # a broken install raises whatever it likes
        return {"QuACK mean": absent(error)}

    def at(chunk: int) -> Loss:
        return lambda c, h, w: chunked(h, w, c.row_labels(), chunk_size=chunk)

    return {"QuACK mean": Provider({f"chunk {k}": at(k) for k in CHUNKS}, kind="mean")}
