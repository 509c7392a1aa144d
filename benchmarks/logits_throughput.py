"""Time, traffic and peak memory of the logits path, forward, backward and both, beside its peers.

    python benchmarks/logits_throughput.py --out results_folder            # a CUDA device, bf16
    python benchmarks/logits_throughput.py --device cpu --dtype float32 --out results_folder

Every provider computes a loss of the same labels with one weight per sequence, or the nearest thing
it can express, and a gradient of the logits. Before any timing each of ours is compared with the
fp64 reference on a small batch: a red comparison stops the script. Timings are medians over
interleaved repetitions, on CUDA with the
L2 cache flushed in between (on a CPU the logits are larger than it); the share of bandwidth is against a
copy measured in the same run. Rows go to <out>/logits_throughput.csv in long format.

The logits are 4 * randn in sequences of 512, all scored but for the first position, half of them
positive; the mean entropy is measured and stated in every row. The kernels here do the same work
whatever the values, except on rows whose coefficient is 0, of which there are none.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topr_kernels import log_prob, reference, topr_loss
from topr_kernels.testing import make_batch

SHAPES = [(8192, 128256), (16384, 151936), (4096, 151936), (2048, 50257)]
CPU_SHAPES = [(1024, 49152), (1024, 151936)]
QUICK = [(64, 4096)]
#: Implementations of ours per kind of device.
IMPLS = {"cuda": ["triton", "triton_staged"], "cpu": ["torch", "native"]}
SEQUENCE = 512


class Case:
    """Inputs of one shape: logits [B, T, V], labels, log mu [B, T], rewards [B]."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: str) -> None:
        t = min(SEQUENCE, rows)
        b = rows // t
        g = torch.Generator(device).manual_seed(0)
        self.rows, self.vocab = rows, vocab
        self.logits = torch.empty(b, t, vocab, dtype=dtype, device=device)
        for row in self.logits:  # by sequence: no fp32 copy of it all
            row.copy_(torch.randn(t, vocab, generator=g, device=device) * 4)
        self.labels = torch.randint(0, vocab, (b, t), generator=g, device=device)
        with torch.no_grad():
            scores = log_prob(self.logits, self.labels, entropy=True)
        self.mu, self.entropy = scores.log_prob, scores.entropy[:, 1:].mean().item()
        self.mu = self.mu + 0.02 * torch.randn(b, t, generator=g, device=device)
        self.reward = torch.ones(b, device=device)
        self.reward[1::2] = -1


def ours(impl: str, inplace: bool) -> Callable[[Case, Tensor], Tensor]:
    """This package."""
    return lambda c, x: topr_loss(x, c.labels, c.mu, c.reward, impl=impl, inplace=inplace).loss


def plain(c: Case, x: Tensor) -> Tensor:
    """TOPR in plain torch: fp32 log-softmax, gather, the weight under stop-gradient."""
    log_prob = torch.log_softmax(x[:, :-1].float(), -1)
    log_prob = log_prob.gather(-1, c.labels[:, 1:, None]).squeeze(-1)
    log_ratio = (log_prob.detach() - c.mu[:, 1:]).sum(1)
    weight = torch.where(c.reward < 0, log_ratio.clamp(max=0).exp(), 1.0)
    return -(weight * c.reward * log_prob.mean(1)).mean()


def providers(device: str) -> dict[str, Callable[[Case, Tensor], Tensor] | str]:
    """Name to loss, or to the reason why it is missing."""
    found: dict[str, Callable[[Case, Tensor], Tensor] | str] = {}
    for impl in IMPLS[device]:
        found[f"topr {impl}"] = ours(impl, False)
        found[f"topr {impl} inplace"] = ours(impl, True)
    found["torch eager"] = plain
    compiled = torch.compile(plain)
    found["torch.compile"] = lambda c, x: compiled(c, x)
    found["liger cross-entropy (mean loss)"] = liger_cross_entropy()
    found["liger GRPO (token weights)"] = liger_grpo()
    return found


def liger_cross_entropy() -> Callable[[Case, Tensor], Tensor] | str:
    """Liger's in-place Triton cross-entropy: a scalar mean, no weights."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError as error:
        return str(error)

    def loss(c: Case, x: Tensor) -> Tensor:
        labels = F.pad(c.labels[:, 1:], (0, 1), value=-100).reshape(-1)
        out = LigerCrossEntropyFunction.apply(x.reshape(-1, c.vocab), labels, None)
        return out[0] if isinstance(out, tuple) else out

    return loss


def liger_grpo() -> Callable[[Case, Tensor], Tensor] | str:
    """Liger's Triton GRPO loss with old log-probs, no KL: per-token weights."""
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError as error:
        return str(error)

    def loss(c: Case, x: Tensor) -> Tensor:
        mask = torch.ones_like(c.labels[:, 1:])
        out = triton_grpo_loss(
            x, c.mu[:, 1:], None, c.labels[:, 1:], c.reward, mask, 1.0, 0.0, 0.2, 0.2, True
        )
        return (out[0] if isinstance(out, tuple) else out).mean()

    return loss


def check(device: str) -> None:
    """Compares ours with plain torch in fp64 on a small batch; raises when red."""
    batch = make_batch([(2, 30), (1, 40)], 4097, dtype=torch.bfloat16, sharpness=4.0)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0]))
    exact = batch.logits.double().requires_grad_()
    want = reference.topr_loss(exact, batch.labels, batch.behavior_log_prob, batch.reward)
    want.loss.backward()
    assert exact.grad is not None
    for impl in IMPLS[device]:
        x = batch.logits.to(device, copy=True).requires_grad_()
        loss = topr_loss(x, *(t.to(device) for t in batch[1:]), impl=impl).loss
        loss.backward()
        assert x.grad is not None
        error = (x.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        if not (abs(loss.item() - want.loss.item()) < 1e-4 and error < 4e-3):
            raise SystemExit(f"{impl}: red (loss {loss.item()} for {want.loss.item()}, {error=})")


class Clock:
    """Times a call on a device, cold: the L2 cache is overwritten first."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if self.flush is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after))


def measure(case: Case, loss: Callable[[Case, Tensor], Tensor], clock: Clock) -> dict[str, float]:
    """One repetition: milliseconds forward, backward, and bytes of peak memory beyond the inputs."""
    x = case.logits.detach().requires_grad_()
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    result: list[Tensor] = []
    forward = clock(lambda: result.append(loss(case, x)))
    backward = clock(lambda: result[0].backward())
    peak = torch.cuda.max_memory_allocated() - held if clock.cuda else float("nan")
    return {"forward_ms": forward, "backward_ms": backward, "peak_bytes": float(peak)}


def copy_bandwidth(case: Case, clock: Clock, repetitions: int) -> float:
    """Bytes per second of copying the logits: read plus write."""
    target = torch.empty_like(case.logits)
    times = [clock(lambda: target.copy_(case.logits)) for _ in range(repetitions)]
    return 2 * case.logits.nbytes / (statistics.median(times) / 1e3)


def environment(device: str) -> dict[str, str]:
    """What a row was measured with."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))),
        "torch": torch.__version__,
        "triton": triton_version,
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
    }


def processor() -> str:
    """The CPU and the threads torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {names[0] if names else 'unknown'}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measures and writes the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one tiny shape, three repetitions")
    args = parser.parse_args()
    check(args.device)
    dtype = getattr(torch, args.dtype)
    shapes = QUICK if args.quick else SHAPES if args.device == "cuda" else CPU_SHAPES
    repetitions = 3 if args.quick else args.repetitions
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for shape in shapes:
            rows += measure_shape(shape, dtype, args.device, repetitions)
    finally:  # Ctrl-C keeps what was measured
        if rows:
            write(args.out / "logits_throughput.csv", rows, environment(args.device))


def measure_shape(
    shape: tuple[int, int], dtype: torch.dtype, device: str, repetitions: int
) -> list[dict[str, Any]]:
    """Rows of one shape, all providers interleaved."""
    clock, case = Clock(device), Case(*shape, dtype, device)
    bandwidth = copy_bandwidth(case, clock, repetitions)
    print(f"\n{shape[0]} x {shape[1]} {dtype}: copy {bandwidth / 1e9:.0f} GB/s, ", end="")
    print(f"mean entropy {case.entropy:.2f} nats")
    samples: dict[str, list[dict[str, float]]] = {}
    calls = {}
    for name, loss in providers(device).items():
        if isinstance(loss, str):
            print(f"{name:34} missing: {loss}")
            continue
        try:
            for _ in range(
                2
            ):  # compilation and warm-up; in-place providers ruin the logits, see below
                measure(case, loss, clock)
            calls[name], samples[name] = loss, []
        except Exception as error:  # a peer that cannot do this shape is a row of its own
            print(f"{name:34} failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        case = Case(*shape, dtype, device)
    for _ in range(repetitions):
        for name, loss in calls.items():
            keep = case.logits
            if "inplace" in name or "cross-entropy" in name:
                case.logits = keep.clone()
            samples[name].append(measure(case, loss, clock))
            case.logits = keep
    rows = []
    for name, found in samples.items():
        total = [s["forward_ms"] + s["backward_ms"] for s in found]
        values = {
            "forward_ms": [s["forward_ms"] for s in found],
            "backward_ms": [s["backward_ms"] for s in found],
            "total_ms": total,
            "peak_bytes": [s["peak_bytes"] for s in found],
            # As if nothing but copying took time: traffic that would explain it, per logit.
            "copy_equivalent_bytes_per_logit": [
                t / 1e3 * bandwidth / (shape[0] * shape[1]) for t in total
            ],
        }
        median = statistics.median(total)
        minimum = 3 * case.logits.element_size() * shape[0] * shape[1] / bandwidth * 1e3
        print(f"{name:34} {median:9.3f} ms   minimum of 3 passes / time: {minimum / median:5.1%}")
        for metric, xs in values.items():
            q = statistics.quantiles(xs, n=10)
            rows.append(
                {
                    "provider": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows": shape[0],
                    "vocab": shape[1],
                    "metric": metric,
                    "median": statistics.median(xs),
                    "q10": q[0],
                    "q90": q[-1],
                    "copy_bytes_per_s": bandwidth,
                    "entropy_nats": round(case.entropy, 3),
                }
            )
    return rows


def write(path: Path, rows: list[dict[str, Any]], where: dict[str, str]) -> None:
    """Writes the rows with what they were measured on."""
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=[*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)


if __name__ == "__main__":
    main()
