"""What is measured: inputs with an fp64 truth, and providers, which are losses of them.

A provider is a loss of (case, *leaves). Those that give a log-probability per token share one TOPR
stage in plain torch (README, "Equivalent to"). Those that can express less compute what they can:
``kind`` says what, and they are checked against that, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import hidden_states
from benchmarks.hidden_states import Hidden
from benchmarks.measure import Clock
from topr_kernels import log_prob

TILE = 256
SEQUENCE = 512
FLOOR_ROWS = 8192
GRPO_CLIP = 0.2


class Reference(NamedTuple):
    """fp64 loss and gradient of every leaf."""

    loss: Tensor
    gradients: dict[str, Tensor]


class Case:
    """Inputs of one measurement on their device; row t is a scored token with a label.

    Attributes:
        label: what the data are, for the table.
        leaf_names: what gets a gradient, in the order of the arguments of a loss.
        mu: [N] log mu of each row's label.
        reward: [B].
        of: [N] sequence of each row.
        length: [B] rows of each sequence.
        aside: what a provider reports besides its loss, as tensors: reading would sync.
    """

    label: str
    leaf_names: tuple[str, ...]
    device: str
    dtype: torch.dtype
    mu: Tensor
    reward: Tensor
    of: Tensor
    length: Tensor
    #: Whether a repetition is more than a provider's loss: the check does not warm it up.
    whole = False

    def __init__(self) -> None:
        self.aside: dict[str, Any] = {}
        self._references: dict[str, Reference] = {}

    def leaves(self, trained: bool, copy: bool = False) -> list[Tensor]:
        """Fresh leaves of the inputs; ``copy`` where a provider overwrites them."""
        raise NotImplementedError

    def repetition(
        self, provider: Provider, loss: Loss, clock: Clock, trained: bool
    ) -> dict[str, float]:
        """One repetition: milliseconds, and on CUDA bytes of peak beyond inputs and gradients.

        ``host_ms``, on CUDA, is how long Python takes to queue both; NaN where one waits for the device.
        """
        leaves = self.leaves(trained, copy=provider.inplace)
        held = _held(clock)
        result: list[Tensor] = []
        forward = clock(lambda: result.append(loss(self, *leaves)))
        host_ms = clock.host_ms
        backward = clock(lambda: result[0].backward())
        host_ms += clock.host_ms
        found = {"forward_ms": forward, "backward_ms": backward, "total_ms": forward + backward}
        if held is not None:
            found["host_ms"] = host_ms
            peak = torch.cuda.max_memory_allocated() - held
            found["peak_bytes"] = float(peak - gradient_bytes(leaves))
        return found

    def search(self, provider: Provider, loss: Loss, clock: Clock, trained: bool) -> float:
        """Milliseconds by which the settings of a provider are compared."""
        return self.repetition(provider, loss, clock, trained)["total_ms"]

    def floors(self, clock: Clock, trained: bool) -> dict[str, Callable[[], dict[str, float]]]:
        """What no provider can do without, measured in the same rounds."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Columns of the CSV."""
        raise NotImplementedError

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and their fp64 logits."""
        raise NotImplementedError

    def row_labels(self) -> Tensor:
        """[N] label of each row."""
        raise NotImplementedError

    def gradients_of(self, j: Callable[[slice, Tensor], Tensor]) -> dict[str, Tensor]:
        """fp64 gradients from the gradient of the logits of a tile."""
        raise NotImplementedError

    def stage(self, kind: str, log_pi: Tensor) -> Tensor:
        """The loss of log pi [N] in plain torch, fp32 or fp64."""
        if kind == "topr":
            return topr(log_pi, self.mu, self.reward, self.of, self.length)
        if kind == "mean":
            return -log_pi.mean()
        if kind != "grpo":
            raise ValueError(f"kind: expected 'topr', 'mean' or 'grpo', got {kind!r}")
        ratio, advantage = (log_pi - self.mu).exp(), self.reward[self.of]
        clipped = ratio.clamp(1 - GRPO_CLIP, 1 + GRPO_CLIP)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    def log_pi(self) -> Tensor:
        """[N] fp64 log-probs of the labels."""
        found, y = [], self.row_labels()
        for rows, z in self.row_tiles():
            found.append(z.log_softmax(-1).gather(1, y[rows, None])[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def reference(self, kind: str) -> Reference:
        """fp64 truth from the same inputs: coefficients by autograd of the stage, the rest by tiles."""
        if kind not in self._references:
            y = self.row_labels()
            with torch.enable_grad():
                log_pi = self.log_pi().detach().requires_grad_()
                loss = self.stage(kind, log_pi)
                (c,) = torch.autograd.grad(loss, log_pi)

            def j(rows: slice, z: Tensor) -> Tensor:
                g = z.softmax(-1).neg_()
                labels = y[rows]
                g[torch.arange(len(labels), device=g.device), labels] += 1
                return g.mul_(c[rows, None])

            self._references[kind] = Reference(loss.detach(), self.gradients_of(j))
        return self._references[kind]


def topr(log_pi: Tensor, mu: Tensor, reward: Tensor, of: Tensor, length: Tensor) -> Tensor:
    """README's "Equivalent to" for packed sequences: row t belongs to sequence ``of[t]``."""
    difference = log_pi - mu
    log_ratio = difference.new_zeros(len(length)).index_add(0, of, difference)
    low = torch.where(reward < 0, 0.0, 1.0).log()
    c = torch.minimum(torch.maximum(log_ratio, low), torch.zeros_like(low)).detach()
    return -(reward * c.exp() * (1 + log_ratio - c) / length).mean()


def _held(clock: Clock) -> int | None:
    if not clock.cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def gradient_bytes(leaves: list[Tensor]) -> int:
    """Bytes of gradients that do not lie in the memory of their leaf."""
    grads = [(x, x.grad) for x in leaves if x.grad is not None]
    return sum(g.nbytes for x, g in grads if g.data_ptr() != x.data_ptr())


class LinearCase(Case):
    """Hidden states [N, D] and a head [V, D]."""

    leaf_names = ("d_hidden", "d_weight")

    def __init__(self, label: str, data: Hidden, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        data = hidden_states.to(data, device)
        self.label, self.device, self.dtype = label, device, dtype
        self.data = data._replace(hidden=data.hidden.to(dtype), weight=data.weight.to(dtype))
        self.mu, self.reward = self.data.behavior_log_prob, self.data.reward
        self.length = self.data.cu_seqlens.diff().long()
        self.of = torch.arange(len(self.length), device=device).repeat_interleave(self.length)

    def leaves(self, trained: bool, copy: bool = False) -> list[Tensor]:
        """Hidden states and head."""
        inputs = (self.data.hidden, self.data.weight)
        h, w = (x.detach().clone() if copy else x.detach() for x in inputs)
        return [h.requires_grad_(), w.requires_grad_(trained)]

    def facts(self) -> dict[str, Any]:
        """Shape, entropy and shares; only scored rows get here, so none is masked."""
        about = hidden_states.describe(self.data)
        shape = {"rows": len(self.data.labels), "dim": self.data.weight.shape[1]}
        shape |= {"vocab": len(self.data.weight), "dtype": str(self.dtype).removeprefix("torch.")}
        named = ("entropy", "positive_share", "tapered_share")
        shares = {k: f"{about[k]:.4g}" for k in named} | {"masked_share": "0"}
        return {"path": "linear", "data": self.label} | shape | shares

    def floors(self, clock: Clock, trained: bool) -> dict[str, Callable[[], dict[str, float]]]:
        """The forward product in the dtype of the inputs, the unit; and it with those of a backward.

        By torch's own calls, and on a CPU by the library that this package chooses. In blocks of
        rows, so that what is measured at 64k rows is the product and not the memory.
        """
        from topr_kernels.linear import matmul  # here: --compare runs revisions without it

        h, w = self.data.hidden, self.data.weight
        count = "three" if trained else "two"

        def forward() -> None:
            for block in h.split(FLOOR_ROWS):
                F.linear(block, w)

        def products() -> None:
            for block in h.split(FLOOR_ROWS):
                g = F.linear(block, w)
                g @ w
                if trained:
                    g.T @ block

        def by_package() -> None:
            for block in h.split(FLOOR_ROWS):
                g = h.new_empty(len(block), len(w))
                matmul.mm(block, w.T, g)
                matmul.mm(g, w, torch.empty_like(block))
                if trained:
                    matmul.mm(g.T, block, torch.empty_like(w))

        found = {"matmul": forward, f"{count} matmuls": products}
        if self.device == "cpu" and self.dtype == torch.float32 and matmul.onednn_is_faster():
            found[f"{count} matmuls, oneDNN"] = by_package
        return {
            name: lambda call=call: {"total_ms": clock(torch.no_grad()(call))}
            for name, call in found.items()
        }

    def row_labels(self) -> Tensor:
        """[N] label of each row."""
        return self.data.labels

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and their fp64 logits."""
        w = self.data.weight.double()
        for start in range(0, len(self.data.labels), TILE):
            rows = slice(start, start + TILE)
            yield rows, self.data.hidden[rows].double() @ w.T

    def gradients_of(self, j: Callable[[slice, Tensor], Tensor]) -> dict[str, Tensor]:
        """fp64 d_hidden and d_weight."""
        w = self.data.weight.double()
        d_hidden, d_weight = [], torch.zeros_like(w)
        for rows, z in self.row_tiles():
            g = j(rows, z)
            d_hidden.append(g @ w)
            d_weight.addmm_(g.T, self.data.hidden[rows].double())
        return {"d_hidden": torch.cat(d_hidden), "d_weight": d_weight}


class LogitsCase(Case):
    """Logits [B, T, V] as a model gives them: unshifted, the last position and prompt unscored."""

    leaf_names = ("d_logits",)

    def __init__(self, rows: int, vocab: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        t = min(SEQUENCE, rows // 2)  # at least two sequences, one of each sign
        b = rows // t
        g = torch.Generator(device).manual_seed(0)
        self.label, self.device, self.dtype = "4 randn", device, dtype
        self.rows, self.vocab = rows, vocab
        self.logits = torch.empty(b, t, vocab, dtype=dtype, device=device)
        for sequence in self.logits:  # one at a time: no fp32 copy of it all
            sequence.copy_(torch.randn(t, vocab, generator=g, device=device) * 4)
        self.labels = torch.randint(0, vocab, (b, t), generator=g, device=device)
        with torch.no_grad():
            scores = log_prob(self.logits, self.labels, entropy=True)
        self.entropy = scores.entropy[:, 1:].mean().item()
        noise = 0.02 * torch.randn(b, t, generator=g, device=device)
        self.token_mu = scores.log_prob + noise
        self.mu = self.token_mu[:, 1:].flatten()
        self.reward = torch.ones(b, device=device)
        self.reward[1::2] = -1
        self.length = torch.full((b,), t - 1, device=device)
        self.of = torch.arange(b, device=device).repeat_interleave(t - 1)

    def leaves(self, trained: bool, copy: bool = False) -> list[Tensor]:
        """The logits."""
        x = self.logits.detach()
        return [(x.clone() if copy else x).requires_grad_()]

    def floors(self, clock: Clock, trained: bool) -> dict[str, Callable[[], dict[str, float]]]:
        """A copy of the logits: bytes read and written per second."""
        target = torch.empty_like(self.logits)

        def copy() -> dict[str, float]:
            ms = clock(lambda: target.copy_(self.logits))
            return {"total_ms": ms, "bytes_per_s": 2 * self.logits.nbytes / ms * 1e3}

        return {"copy": copy}

    def facts(self) -> dict[str, Any]:
        """Shape, entropy and shares."""
        log_ratio = torch.zeros(len(self.length), dtype=torch.float64, device=self.device)
        log_ratio.index_add_(0, self.of, self.log_pi() - self.mu)
        tapered = ((self.reward < 0) & (log_ratio < 0)).float().mean().item()
        return {
            "path": "logits",
            "data": self.label,
            "rows": self.rows,
            "vocab": self.vocab,
            "dtype": str(self.dtype).removeprefix("torch."),
            "entropy": f"{self.entropy:.4g}",
            "masked_share": f"{1 - len(self.mu) / self.rows:.4g}",
            "positive_share": f"{(self.reward > 0).float().mean().item():.4g}",
            "tapered_share": f"{tapered:.4g}",
        }

    def row_labels(self) -> Tensor:
        """[N] label of each scored row."""
        return self.labels[:, 1:].flatten()

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """A tile is a sequence."""
        t = self.logits.shape[1] - 1
        for i, sequence in enumerate(self.logits):
            yield slice(i * t, (i + 1) * t), sequence[:-1].double()

    def gradients_of(self, j: Callable[[slice, Tensor], Tensor]) -> dict[str, Tensor]:
        """fp64 gradient of the logits; the last position of a sequence has none."""
        found = [F.pad(j(rows, z), (0, 0, 0, 1)) for rows, z in self.row_tiles()]
        return {"d_logits": torch.stack(found)}


Loss = Callable[..., Tensor]
LogProb = Callable[[Case, Tensor, Tensor], Any]


class Provider(NamedTuple):
    """A loss at each of its settings, or why it is missing.

    Attributes:
        settings: name to loss(case, *leaves); the fastest is measured.
        log_probs: setting to log-probs [N] of (case, hidden, weight), where it has them per token.
        kind: "topr"; "mean", the mean cross-entropy; or "grpo", token ratios clipped as in PPO.
        missing: the reason.
        ours: held to a limit of error; a peer is shown with the error it has.
        tolerance: of ours, ``grad_tolerance``.
        makes_logits: of the fused-linear path: needs room for them.
        inplace: overwrites its leaves.
        link: the peer's own benchmark.
    """

    settings: Mapping[str, Loss] = {}
    log_probs: Mapping[str, LogProb] = {}
    kind: str = "topr"
    missing: str = ""
    ours: bool = False
    tolerance: float = 0.0
    makes_logits: bool = False
    inplace: bool = False
    link: str = ""


def per_token(log_probs: Mapping[str, LogProb]) -> Provider:
    """A provider of log-probs per token, under the TOPR stage in plain torch."""

    def loss(log_prob: LogProb) -> Loss:
        return lambda c, h, w: c.stage("topr", log_prob(c, h, w).float())

    return Provider({name: loss(f) for name, f in log_probs.items()}, dict(log_probs))


def absent(error: Exception) -> Provider:
    """A provider that cannot be imported, for whatever reason."""
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return Provider(missing=f"{kind}{error}".splitlines()[0][:120])
