"""The head of the model as an operand of the three matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from topr_kernels.linear import matmul
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops.options import HeadWeights

# Columns of one forward matmul on a CPU: its result stays in cache while it is summed, a seventh faster.
CPU_COLUMNS = 2048
# Elements of a block of the head that is cast, or of active rows that are gathered; rows of it at least.
CPU_BLOCK, GPU_BLOCK = 1 << 21, 1 << 25
LEAST_BLOCK_ROWS = 128


class HeadProducts:
    """The head's matrix in blocks of its rows, as operand of the three products.

    On a GPU half-precision operands stay so and the products accumulate and write fp32; anywhere else
    operands have the arithmetic dtype.
    """

    def __init__(self, weights: HeadWeights) -> None:
        weight, bias, compute = weights
        self.arithmetic = accumulate_dtype(compute)
        half = compute in (torch.float16, torch.bfloat16)
        self.compute = compute
        self.operand = compute if weight.is_cuda and half else self.arithmetic
        # Autocast: one cast of the head per call, unless its blocks are cast one by one.
        whole = weight.is_cuda and weight.dtype != compute
        self.weight = weight.detach().to(compute) if whole else weight.detach()
        self.bias = None if bias is None else bias.detach().to(compute).to(self.arithmetic)
        self.vocab, self.dim = weight.shape
        elements = GPU_BLOCK if weight.is_cuda else CPU_BLOCK
        #: Rows of the head that are cast or gathered at a time.
        self.step = max(LEAST_BLOCK_ROWS, elements // max(self.dim, 1))
        self.blocks = (
            [slice(0, self.vocab)]
            if self.weight.dtype == self.compute == self.operand
            else [slice(v, v + self.step) for v in range(0, self.vocab, self.step)]
        )

    def cast(self, x: Tensor) -> Tensor:
        """Rounds to the compute dtype, then takes the dtype of operands."""
        return x.to(self.compute).to(self.operand)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden Wt + bias to out [n, V]."""
        step = self.vocab if self.weight.is_cuda else CPU_COLUMNS
        for v in range(0, self.vocab, step):
            matmul.mm(hidden, self.cast(self.weight[v : v + step]).t(), out[:, v : v + step])
        if self.bias is not None:
            out.add_(self.bias)

    def times(self, j: Tensor) -> Tensor:
        """[n, V] -> j W [n, D] in the arithmetic dtype."""
        out = j.new_empty((j.shape[0], self.dim), dtype=self.arithmetic)
        for v in self.blocks:
            matmul.mm(j[:, v], self.cast(self.weight[v]), out, accumulate=v.start > 0)
        return out

    def transposed(self, j: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """Writes jt hidden to out [V, D], or adds it."""
        for v in self.blocks:
            matmul.mm(j[:, v].t(), hidden, out[v], accumulate=accumulate)
