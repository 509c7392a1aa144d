"""Log mu under the initial model, scored by all processes before training begins."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from topr_kernels.hf.behavior import check_records
from topr_kernels.hf.fields import mask_of
from topr_kernels.hf.packing import allowed_difference

_REMEDY = (
    "score the records beforehand (topr score, or score_behavior with the whole model in one process) "
    "and use behavior='recorded'"
)
#: Nats by which processes may differ on a token: devices round differently, other weights differ more.
_ALLOWED = 0.1
#: Share of the free memory that weights may take; the rest is for activations and a tile of logits.
_MOST_MEMORY = 0.8

Score = Callable[[Sequence[Mapping[str, Any]]], list[list[float]]]
#: Log-probs of a process's share of the records, and of the one that all score.
Scored = tuple[list[list[float]], list[float]]


def score_initial(
    model: nn.Module,
    records: Sequence[Mapping[str, Any]],
    score: Score,
    *,
    device: torch.device,
    processes: int,
    rank: int,
) -> list[list[float]]:
    """Log-probabilities of all records, of which each process scores a share.

    Args:
        model: Hugging Face causal language model, before it is wrapped.
        records: all of them, the same on every process.
        score: from records to a list of log-probs for each, under ``model``.
        device: where training will run. A model that waits on the CPU for FSDP or DeepSpeed is moved to
            that device for scoring if it fits, and then back.
        processes: number of processes; each must call this.
        rank: of this process.

    Returns:
        One list of log-probabilities per record, in their order, on every process.

    Raises:
        ValueError: on all processes: if a record cannot be scored (see ``check_records``), or if the
            model is not whole on each process, or not the same on all, or one process cannot score its
            share.

    Warns:
        UserWarning: if the model is scored on the CPU although training will not run there.
    """
    # Before the records are shared out: if one process failed alone, the others would wait for it.
    check_records(records, "the data set")
    own_problem = _problem(model)
    problems = gather_object([own_problem]) if processes > 1 else [own_problem]
    problem = next((p for p in problems if p is not None), None)
    if problem is not None:
        raise ValueError(f"behavior: got 'initial', but {problem}; {_REMEDY}")
    probe = next((r for r in records if _written(r)), None)
    with _on(model, device):
        if processes == 1:
            return score(records)
        log_probs, probed = _together(
            lambda: (
                score(records[rank::processes]),
                score([probe])[0] if probe is not None else [],
            ),
            rank,
        )
    shares = gather_object([(log_probs, probed)])
    differences = [
        abs(a - b) for _, other in shares for a, b in zip(shares[0][1], other, strict=True)
    ]
    # Written so that NaN fails.
    if not all(x <= _ALLOWED for x in differences):
        raise ValueError(
            f"behavior: got 'initial', but under the models of {processes} processes the log-probs of "
            f"one token differ by up to {max(differences):.2g} nats; expected the same weights on each. "
            "FSDP's cpu_ram_efficient_loading gives them to the first process alone: use "
            f"fsdp_config={{'cpu_ram_efficient_loading': False}}, or {_REMEDY}"
        )
    return [shares[i % processes][0][i // processes] for i in range(len(records))]


def _together(work: Callable[[], Scored], rank: int) -> Scored:
    """Does a process's share, and raises on all processes if one of them cannot: they would wait for it.

    Raises:
        ValueError: if the work of another process raised; this one's own error is raised as it is.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    told = None if error is None else f"process {rank}: {type(error).__name__}: {error}"
    problem = next((p for p in gather_object([told]) if p is not None), None)
    if error is not None:
        raise error
    if problem is not None or result is None:
        raise ValueError(f"behavior: got 'initial', but its share was not scored by {problem}")
    return result


def _written(record: Mapping[str, Any]) -> int:
    """Number of tokens of a completion that the policy wrote."""
    tokens = len(record["completion_token_ids"])
    mask = mask_of(record, tokens, "record")
    return tokens if mask is None else sum(mask)


class ScoredBy(TrainerCallback):
    """Keeps the first log-probs in every checkpoint, to recognise the model that scored log mu.

    A script that loads the model of the checkpoint it resumes from would score that one instead.

    Args:
        log_probs: of the records of the first data set that was scored.
        eps: of the dtype that scored them.
    """

    NAME = "initial_log_probs.json"
    #: The first so many tokens.
    TOKENS = 256

    def __init__(self, log_probs: Sequence[Sequence[float]], eps: float) -> None:
        #: Nats that another shape of the batch explains, in which products round otherwise: as many eps
        #: of a hidden state's norm as for packed batches, since logits of a few nats come of it.
        self.rounding = allowed_difference(eps)
        self.first = list(islice(chain.from_iterable(log_probs), self.TOKENS))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes them into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / self.NAME).write_text(json.dumps(self.first), encoding="utf-8")

    def check(self, checkpoint: Path) -> None:
        """Compares them with those of a checkpoint, if it has any.

        Raises:
            ValueError: if another model, or other records, were scored then.

        Warns:
            UserWarning: if they differ by more than rounding in another batch explains (1e-4 nats in
                fp32), but so little that another device may explain it.
        """
        path = checkpoint / self.NAME
        if not path.is_file():
            return
        then = json.loads(path.read_text(encoding="utf-8"))
        if then == self.first:
            return
        what = "the records are others"
        worst = math.inf
        if len(then) == len(self.first):
            worst = max(abs(a - b) for a, b in zip(then, self.first, strict=True))
            what = f"the log-probs of one token differ by up to {worst:.2g} nats"
        problem = f"log mu of {checkpoint} is not that of the model given here: {what}"
        remedy = (
            "Give TOPRTrainer the model that the run began with, not that of the checkpoint (whose "
            f"weights are loaded as it resumes), or {_REMEDY}"
        )
        # Written so that NaN fails.
        if not worst <= _ALLOWED:
            raise ValueError(f"behavior: got 'initial', but {problem}. {remedy}")
        if worst <= self.rounding:
            return
        warnings.warn(f"behavior='initial': {problem}. {remedy}", UserWarning, stacklevel=3)


def _problem(model: nn.Module) -> str | None:
    """Why this process cannot run the model by itself; None if it can."""
    # Hooks of accelerate fetch the weights of an offloaded model as it runs.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") and p.numel() == 0:
            return (
                f"ZeRO-3 partitioned {name} over the processes as it was loaded, and none can score by "
                "itself"
            )
        if hasattr(p, "full_tensor"):
            return f"{name} is sharded over the processes, and none can score by itself"
        if p.is_meta and not offloaded:
            return f"{name} has no values on some process"
    return None


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model that waits on the CPU to the device that will train it, and back."""
    tensors = list(chain(model.parameters(), model.buffers()))
    waits = device.type != "cpu" and all(t.device.type == "cpu" for t in tensors)
    # Quantised and offloaded models choose their own devices.
    placed = any(hasattr(model, name) for name in ("quantization_method", "hf_device_map"))
    if not waits or placed:
        yield
        return
    backend: Any = torch.get_device_module(device)
    size, free = sum(t.nbytes for t in tensors), 0
    if hasattr(backend, "mem_get_info"):
        free = backend.mem_get_info(device)[0]
    if size > _MOST_MEMORY * free:
        warnings.warn(
            f"behavior='initial': the model's {size / 2**30:.1f} GiB do not fit into the "
            f"{free / 2**30:.1f} GiB free on {device}, so it is scored on the CPU, which takes long; to "
            f"avoid that {_REMEDY}",
            UserWarning,
            stacklevel=2,
        )
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
