"""The forward of a tile: from hidden states over logits, in memory of a fixed size, to log-probs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.linear.head import HeadProducts
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.ops.options import Transforms

# Rows of one forward matmul, the same for every one so that its result is too; rows of a tile. On a
# CPU BLAS packs the head once per call, which 256 rows pay for; on a GPU d_weight is read once per tile.
CPU_ROWS, CPU_TILE_ROWS = 256, 512
GPU_ROWS, GPU_TILE_ROWS = 1024, 2048

_HELD = threading.local()


def _buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of uninitialised memory, on a CPU the same one at every call of a thread.

    A CPU gives memory of this size back to the system when it is freed; taking it again costs a page
    fault per 4 KiB, a tenth of the time of the matmul that fills it. GPU allocators keep it themselves.
    """
    if like.device.type != "cpu":
        return like.new_empty((rows, columns), dtype=dtype)
    size = rows * columns * torch.finfo(dtype).bits // 8
    held: Tensor | None = getattr(_HELD, "memory", None)
    if held is None or held.numel() < size:
        _HELD.memory = None  # frees it first: never two
        held = _HELD.memory = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(dtype).view(rows, columns)


class Workspace:
    """The forward of the tiles of one call, and its buffers: hidden states and logits of a tile."""

    def __init__(
        self,
        kernels: TileKernels,
        head: HeadProducts,
        hidden: Tensor,
        transforms: Transforms,
        row_count: int,
        workspace_bytes: int,
    ) -> None:
        self.kernels, self.head, self.transforms = kernels, head, transforms
        self.source = hidden.detach()
        step, most = (GPU_ROWS, GPU_TILE_ROWS) if hidden.is_cuda else (CPU_ROWS, CPU_TILE_ROWS)
        # Shards of the vocabulary may differ in size, the tiles of their processes must not.
        vocab = head.vocab if kernels.shard is None else kernels.shard.largest
        fits = workspace_bytes // (vocab * torch.finfo(head.arithmetic).bits // 8)
        #: Rows of one forward matmul, from the budget alone: a batch must not choose its own shapes.
        while step > 16 and step > fits:
            step //= 2
        self.step = step
        #: Rows of a tile.
        self.capacity = step * max(1, min(fits, most) // step)
        n = min(self.capacity, -(-row_count // step) * step)
        self.hidden = hidden.new_empty((n, head.dim), dtype=head.operand)
        self.logits = _buffer(hidden, n, head.vocab, head.arithmetic)

    def forward(
        self, row: Tensor, label: Tensor, entropy: bool, gradient: bool
    ) -> tuple[Tensor, Tensor, RowStats]:
        """-> (hidden states [n, D], logits [n, V], their statistics) of some rows.

        The first two are views of the workspace. Both the matmul and the row kernel get whole steps of
        rows, whatever n is, so that the results of a row do not depend on the batch size.
        """
        n = len(row)
        padded = -(-n // self.step) * self.step
        # By two indices: flattening a slice of the hidden states would copy all of them.
        t = self.source.shape[1]
        self.hidden[:n] = self.head.cast(self.source[row // t, row % t])
        # Rows of an earlier tile could hold NaN, which slows some CPUs; it cannot reach other rows.
        self.hidden[n:padded] = 0
        for a in range(0, padded, self.step):
            self.head.logits(self.hidden[a : a + self.step], self.logits[a : a + self.step])
        label = torch.nn.functional.pad(label, (0, padded - n), value=IGNORE_INDEX)
        stats = self.kernels.rows(self.logits[:padded], label, self.transforms, entropy, gradient)
        return self.hidden[:n], self.logits[:n], RowStats(*(x[:n] for x in stats))
