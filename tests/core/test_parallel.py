"""Several processes against one: a vocabulary in shards, sequences in pieces, data in parts.

Each launch runs all cases of a worker: starting processes takes longer than the cases. To add one, see
``processes.py``.
"""

from __future__ import annotations

import gc
import itertools
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import case, launch
from torch import Tensor

from topr_kernels import (
    IS,
    TIS,
    Limits,
    linear_log_prob,
    linear_topr_loss,
    log_prob,
    topr_loss,
    topr_loss_from_log_prob,
    validation,
)
from topr_kernels.distributed import shards
from topr_kernels.linear import active
from topr_kernels.linear.tile import Shard
from topr_kernels.ops import linear as linear_ops
from topr_kernels.output import TOPROutput

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")

V, D = 301, 24
BOTH = Limits(0.5, 2.0, 0.3, 1.5)


def start() -> tuple[int, int]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return dist.get_rank(), dist.get_world_size()


def batch(
    dtype: torch.dtype, seed: int = 0, packed: bool = False, longer: int = 1
) -> dict[str, Any]:
    """Hidden states and head with a peaked softmax; ragged sequences, an empty one among them."""
    generator = torch.Generator().manual_seed(seed)
    b, t = 5, 12 * longer
    hidden = torch.randn(b, t, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.7
    labels = torch.randint(0, V, (b, t), generator=generator)
    for i, scored in enumerate([11, 4, 0, 7, 2]):
        labels[i, : t - scored * longer] = -100
    noise = torch.randn(b, t, generator=generator, dtype=torch.float64)
    mu = linear_log_prob(hidden, weight, labels, impl="torch").log_prob.detach() + 0.2 * noise
    reward = torch.tensor([1.0, -1.0, -0.5, -2.0, 0.5], dtype=torch.float64)
    result: dict[str, Any] = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(V, generator=generator, dtype=torch.float64).to(dtype),
        "labels": labels,
        "behavior_log_prob": mu.to(torch.promote_types(dtype, torch.float32)),
        "reward": reward.to(dtype),
    }
    if packed:
        result |= {n: result[n].flatten(0, 1) for n in ("hidden", "labels", "behavior_log_prob")}
        result["cu_seqlens"] = torch.arange(b + 1, dtype=torch.int32) * t
    return result


def close(found: Tensor, expected: Tensor, what: str) -> None:
    rtol, atol = (1e-10, 1e-12) if expected.dtype == torch.float64 else (2e-4, 2e-6)
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def compare(found: TOPROutput, expected: TOPROutput, what: str, skip: tuple[str, ...] = ()) -> None:
    for name in TOPROutput._fields:
        if name not in skip:
            close(
                getattr(found, name).detach(), getattr(expected, name).detach(), f"{what}: {name}"
            )


# --- the vocabulary in shards --------------------------------------------------------------------


def cuts(world: int, uneven: bool) -> list[int]:
    """Where the shards of the vocabulary begin."""
    if uneven:
        return [0, *(V - 8 * (world - i) for i in range(1, world)), V]
    return [V * i // world for i in range(world + 1)]


#: Options of the loss; every entry runs in fp64 and fp32, with even and uneven shards.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"limits": TIS, "ratio": "token", "reduction": "token_mean"},
    {"limits": IS, "ratio": "geometric", "baseline": 0.2},
    {"limits": BOTH, "softcap": 4.0, "logit_scale": 0.8, "temperature": 0.7, "entropy": True},
    {"limits": BOTH, "reduction": "sum", "packed": True, "bias": True},
    {"limits": BOTH, "normalizer": 9.0, "frozen": "weight"},
    {"limits": BOTH, "frozen": "hidden", "bias": True},
    {"limits": BOTH, "grad_tolerance": 1e-9, "bias": True},
]


def run(
    data: dict[str, Any], rows: slice | None, group: Any, options: dict[str, Any]
) -> tuple[TOPROutput, dict[str, Tensor | None]]:
    """The loss and its gradients, of the whole head or of some of its rows."""
    options = dict(options)
    frozen = options.pop("frozen", None)
    data = dict(data)
    bias = data.pop("bias") if options.pop("bias", False) else None
    data.pop("bias", None)
    leaves = {"hidden": data["hidden"], "weight": data["weight"], "bias": bias}
    if rows is not None:
        leaves |= {n: leaves[n][rows] for n in ("weight", "bias") if leaves[n] is not None}
    leaves = {n: x.clone().requires_grad_(n != frozen) for n, x in leaves.items() if x is not None}
    out = linear_topr_loss(
        **{**data, **leaves},
        process_group=group,
        workspace_bytes=16 * 8 * V,
        **({"impl": "torch"} if group is None else {}),
        **options,
    )
    (3 * out.loss).backward()
    return out, {n: x.grad for n, x in leaves.items()}


def vocab_worker() -> None:
    rank, world = start()
    group = dist.group.WORLD
    for dtype, options, uneven in itertools.product(
        (torch.float64, torch.float32), OPTIONS, (False, True)
    ):
        what = f"rank {rank} of {world}, {dtype}, {options}, uneven={uneven}"
        options = dict(options)
        data = batch(dtype, packed=options.pop("packed", False))
        edges = cuts(world, uneven)
        rows = slice(edges[rank], edges[rank + 1])
        expected, whole = run(data, None, None, {**options, "grad_tolerance": 0.0})
        found, part = run(data, rows, group, options)
        with case(what):
            skip = ("active_share", "left_out") if "grad_tolerance" in options else ()
            compare(found, expected, what, skip)
            assert expected.loss != 0
            for name, gradient in part.items():
                if gradient is None:
                    assert whole[name] is None
                    continue
                close(
                    gradient,
                    whole[name] if name == "hidden" else whole[name][rows],
                    f"{what} {name}",
                )
                assert gradient.abs().max() > 1e-4


def hidden_cases_worker() -> None:
    start()
    for name, right in (("first", False), ("second", True), ("third", False)):
        with case(name):
            assert right, f"what is wrong with the {name}"


def test_a_case_that_fails_does_not_hide_the_others():
    with pytest.raises(AssertionError, match=r"(?s)case first.*wrong with the first.*case third"):
        launch(2, "test_parallel.hidden_cases_worker")


@pytest.mark.parametrize("world", [2, 4])
def test_a_vocabulary_in_shards_gives_what_the_whole_gives(world: int):
    launch(world, "test_parallel.vocab_worker")


def tolerance_worker() -> None:
    """With a tolerance the energy left out is that of the whole vocabulary, and within it."""
    rank, world = start()
    group, edges = dist.group.WORLD, cuts(world, True)
    rows = slice(edges[rank], edges[rank + 1])
    active.COLUMN_MULTIPLE = 1
    for seed, tau in itertools.product(range(3), (0.02, 0.2)):
        data = batch(torch.float64, seed)
        data["weight"] = data["weight"] * 3
        _, whole = run(data, None, None, {"limits": BOTH, "grad_tolerance": 0.0})
        out, part = run(data, rows, group, {"limits": BOTH, "grad_tolerance": tau})
        one, alone = run(data, None, None, {"limits": BOTH, "grad_tolerance": tau})
        gathered = [torch.zeros_like(part["hidden"]) for _ in range(world)]
        dist.all_gather(gathered, part["hidden"])
        with case(f"rank {rank}, seed {seed}, tau {tau}"):
            assert 0 < out.left_out <= tau and 0 < out.active_share < 0.6
            # The same columns as one process takes, so the same share is left out.
            close(out.left_out, one.left_out, "left_out")
            close(out.active_share, one.active_share, "active_share")
            error = (part["hidden"] - whole["hidden"]).norm() / whole["hidden"].norm()
            reference = (alone["hidden"] - whole["hidden"]).norm() / whole["hidden"].norm()
            # The tail's mean is taken per shard: never much worse than over the whole.
            assert 0 < error <= 2 * reference + 1e-3, (error, reference)
            assert all(torch.equal(gathered[0], g) for g in gathered)


def test_a_tolerance_holds_for_the_whole_vocabulary():
    launch(3, "test_parallel.tolerance_worker")


def test_labels_of_a_shard_are_always_kept():
    """Also one whose energy would let it go; labels of other shards keep nothing here."""
    energy = torch.full((400,), 1e-12)
    energy[:3] = 1.0
    label = torch.tensor([5, 1000 + 17, 1000 + 399, 1400])
    shard = Shard(1000, 400, 5000, lambda x: x)
    columns, left, total = active.select_columns(energy, label, 0.01, shard)
    assert columns is not None and {0, 1, 2, 17, 399} <= set(columns.tolist())
    assert len(columns) == active.COLUMN_MULTIPLE
    close(left + energy[columns].double().sum(), energy.double().sum(), "left out")
    close(total, energy.double().sum(), "total")


# --- what is sent --------------------------------------------------------------------------------


class Sent:
    """Bytes that this process puts into collectives, by kind and dtype."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        for name, index in (("all_reduce", 0), ("all_gather", 1)):
            monkeypatch.setattr(dist, name, self.count(name, getattr(dist, name), index))

    def count(self, name: str, original: Any, index: int) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[index].numel() * args[index].element_size()))
            return original(*args, **kwargs)

        return called


def traffic_worker() -> None:
    """Bytes per tile are those of benchmarks/PARALLEL.md, for tiles of 16 rows in fp32."""
    rank, world = start()
    group, edges = dist.group.WORLD, cuts(world, False)
    rows = slice(edges[rank], edges[rank + 1])
    data = batch(torch.float32)
    data.pop("bias")
    here = {**data, "weight": data["weight"][rows].requires_grad_()}
    here["hidden"] = here["hidden"].requires_grad_()
    scored, n = 11 + 4 + 7 + 2, 16
    once = ("all_gather", 5 * 8)
    tile = [("all_reduce", 4 * n), ("all_reduce", 3 * 4 * n)]
    options: dict[str, Any] = {"process_group": group, "workspace_bytes": n * 4 * V}
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(patch)
        with torch.no_grad():
            linear_topr_loss(**here, **options)
        assert sent.calls == [once, *tile * 2], "two tiles, forward alone"
        sent.calls.clear()
        # Rows of weight 0 need no gradient: here all have one.
        out = linear_topr_loss(**here, limits=BOTH, **options)
        out.loss.backward()
        sizes = [size for name, size in sent.calls if name == "all_reduce"]
        # d_hidden in fp32: 4 D bytes per scored row, and at the end two numbers of the report.
        assert sum(sizes) == 2 * sum(s for _, s in tile) + 4 * D * scored + 2 * 8
        assert sent.calls[0] == once
        sent.calls.clear()
        linear_topr_loss(**here, limits=BOTH, grad_tolerance=1e-9, **options)
        sizes = [size for name, size in sent.calls if name == "all_reduce"]
        # Each tile besides: the energy (8), its histogram (8 * 2^14) and the number of columns (8).
        extra = 2 * (8 + 8 * (1 << 14) + 8)
        assert sum(sizes) == 2 * sum(s for _, s in tile) + 4 * D * scored + 2 * 8 + extra
        sent.calls.clear()
        # Sequences in pieces: lengths, log-ratios for the weights, and log-ratios of the result.
        columns = slice(PIECES[world][rank], PIECES[world][rank + 1])
        linear_topr_loss(**piece(data, columns), limits=BOTH, sequence_group=group)
        b = len(data["reward"])
        reduced = [size for name, size in sent.calls if name == "all_reduce"]
        assert reduced == [8 * (b + 1), 8 * b, 8 * b]
        gathered = [size for name, size in sent.calls if name == "all_gather"]
        # What must agree; labels and log mu across the borders, and three results back.
        assert gathered == [5 * 8, 8 * (b + 1), *[4 * (b + 1)] * 4]


def test_what_is_sent_is_what_the_docs_say():
    launch(2, "test_parallel.traffic_worker")


def log_prob_worker() -> None:
    rank, world = start()
    edges = cuts(world, False)
    rows = slice(edges[rank], edges[rank + 1])
    for dtype in (torch.float64, torch.float32):
        data = batch(dtype)
        upstream = torch.randn(
            data["labels"].shape, generator=torch.Generator().manual_seed(1), dtype=dtype
        )
        results = []
        for group in (None, dist.group.WORLD):
            hidden = data["hidden"].clone().requires_grad_()
            weight = data["weight"] if group is None else data["weight"][rows]
            weight = weight.clone().requires_grad_()
            out = linear_log_prob(
                hidden,
                weight,
                data["labels"],
                softcap=5.0,
                entropy=True,
                process_group=group,
                **({"impl": "torch"} if group is None else {}),
            )
            (out.log_prob * upstream).sum().backward()
            results.append((*out, hidden.grad, weight.grad))
        *whole, d_weight = results[0]
        with case(f"rank {rank}, {dtype}"):
            for a, b in zip(results[1], (*whole, d_weight[rows]), strict=True):
                close(a.detach(), b.detach(), f"{dtype}")


def unscored_worker() -> None:
    """Rows without a label get no gradient, whatever comes from above, and may hold NaN."""
    rank, world = start()
    edges = cuts(world, True)
    rows = slice(edges[rank], edges[rank + 1])
    for packed in (False, True):
        data = batch(torch.float64, packed=packed)
        offsets = data.get("cu_seqlens")
        logits = (data["hidden"] @ data["weight"].t()).detach()
        # A slice that no view can flatten.
        logits = torch.cat([logits, logits], dim=-2)[..., : logits.shape[-2], :]
        y = data["labels"]
        rows_of = torch.nn.functional.pad(y, (0, 1), value=-100)[..., 1:]
        if packed:
            rows_of[offsets[1:].long() - 1] = -100
        for fill in (0.0, torch.nan):
            z = torch.where((rows_of == -100)[..., None], logits + fill, logits)
            whole, part = z.clone().requires_grad_(), z[..., rows].clone().requires_grad_()
            log_prob(whole, y, cu_seqlens=offsets, impl="torch").log_prob.sum().backward()
            found = log_prob(part, y, cu_seqlens=offsets, process_group=dist.group.WORLD)
            found.log_prob.sum().backward()
            close(part.grad, whole.grad[..., rows], f"packed={packed}, fill={fill}")
            assert not part.grad[rows_of == -100].any() and part.grad.isfinite().all()


def scorer_worker() -> None:
    """log mu scored in pieces is that of the whole sequences, at the borders too."""
    rank, world = start()
    group, edges = dist.group.WORLD, PIECES[world]
    columns = slice(edges[rank], edges[rank + 1])
    data = batch(torch.float64)
    labels, upstream = data["labels"], torch.randn(5, 12, dtype=torch.float64)
    dist.broadcast(upstream, 0)
    hidden = data["hidden"].clone().requires_grad_()
    weight = data["weight"].clone().requires_grad_()
    expected = linear_log_prob(hidden, weight, labels, entropy=True)
    (expected.log_prob * upstream).sum().backward()
    here = data["hidden"][:, columns].clone().requires_grad_()
    head = data["weight"].clone().requires_grad_()
    found = linear_log_prob(here, head, labels[:, columns], entropy=True, sequence_group=group)
    (found.log_prob * upstream[:, columns]).sum().backward()
    for name, x in expected._asdict().items():
        close(getattr(found, name).detach(), x.detach()[:, columns], name)
    close(here.grad, hidden.grad[:, columns], "hidden")
    dist.all_reduce(head.grad)
    close(head.grad, weight.grad, "weight")
    logits = (data["hidden"] @ data["weight"].t()).detach()
    whole, part = logits.clone().requires_grad_(), logits[:, columns].clone().requires_grad_()
    (log_prob(whole, labels).log_prob * upstream).sum().backward()
    found = log_prob(part, labels[:, columns], sequence_group=group)
    (found.log_prob * upstream[:, columns]).sum().backward()
    close(part.grad, whole.grad[:, columns], "logits")
    close(found.log_prob.detach(), expected.log_prob.detach()[:, columns], "of logits")
    # What README does: every ratio is 1.
    out = linear_topr_loss(
        here,
        head,
        labels[:, columns],
        found.log_prob.detach(),
        data["reward"],
        sequence_group=group,
    )
    assert out.log_ratio.abs().max() < 1e-12 and (out.length > 0).any()
    with pytest.raises(ValueError, match="shift the labels before they are cut"):
        offsets = torch.tensor([0, here.shape[1] * 5], dtype=torch.int32)
        linear_log_prob(
            here.flatten(0, 1),
            head,
            labels[:, columns].flatten(),
            cu_seqlens=offsets,
            sequence_group=group,
        )


@pytest.mark.parametrize("world", [2, 4])
def test_log_probs_of_sequences_in_pieces(world: int):
    launch(world, "test_parallel.scorer_worker")


def ambiguous_worker() -> None:
    """As many packed tokens here as sequences: what log mu is, all processes decide together."""
    rank, _ = start()
    group = dist.group.WORLD
    # Two sequences; process 0 holds one token of each, process 1 the other five.
    pieces = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -0.7, -0.2, -0.1, -0.3])]
    offsets = [[0, 1, 2], [0, 2, 5]][rank]
    here = {
        "log_prob": pieces[rank],
        "mask": torch.ones(len(pieces[rank])),
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
        "reward": torch.tensor([1.0, -1.0]),
    }
    sums = torch.tensor([-2.2, -2.6])
    out = topr_loss_from_log_prob(**here, behavior_log_prob=sums, sequence_group=group)
    close(out.log_ratio, torch.zeros(2), "sums")
    per_token = pieces[rank] + torch.tensor([[0.1, 0.1], [0.1, 0.1, 0.2, 0.2, 0.2]][rank])
    out = topr_loss_from_log_prob(**here, behavior_log_prob=per_token, sequence_group=group)
    close(out.log_ratio, -torch.tensor([0.3, 0.7]), "per token")
    with pytest.raises(ValueError, match="behavior_log_prob is per token on some"):
        mixed = per_token[None] if rank == 0 else sums
        topr_loss_from_log_prob(**here, behavior_log_prob=mixed, sequence_group=group)
    # Unsound offsets in one piece, where values are not read on the host.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "values_readable", lambda *_: False)
        if rank == 1:
            here["cu_seqlens"] = torch.tensor([0, 2, 4], dtype=torch.int32)
        out = topr_loss_from_log_prob(**here, behavior_log_prob=per_token, sequence_group=group)
        assert out.loss.isnan()


def test_what_log_mu_is_all_processes_decide_together():
    launch(2, "test_parallel.ambiguous_worker")


def test_rows_without_a_label_have_no_gradient_in_shards():
    launch(2, "test_parallel.unscored_worker")


def test_log_probs_of_a_vocabulary_in_shards():
    launch(2, "test_parallel.log_prob_worker")


def logits_worker() -> None:
    """``topr_loss`` and ``log_prob`` on logits whose columns, tokens or both are spread."""
    rank, world = start()
    group = dist.group.WORLD
    names = {"weight", "bias", "hidden"}
    served = [o for o in OPTIONS if not {"frozen", "grad_tolerance"} & set(o)]
    shards.BLOCK = 4 * V  # several blocks
    for dtype, options in itertools.product((torch.float64, torch.float32), served):
        options = {n: x for n, x in options.items() if n not in ("bias", "logit_scale")}
        packed = options.pop("packed", False)
        data = batch(dtype, packed=packed)
        logits = (data["hidden"] @ data["weight"].t()).detach()
        rest = {n: x for n, x in data.items() if n not in names}
        whole = logits.clone().requires_grad_()
        expected = topr_loss(whole, **rest, **options, impl="torch")
        (3 * expected.loss).backward()
        skip = (*TOKENS, *MEASURED)
        for edges, what in ((cuts(world, True), "uneven"), (cuts(world, False), "even")):
            rows = slice(edges[rank], edges[rank + 1])
            part = logits[..., rows].clone().requires_grad_()
            found = topr_loss(part, **rest, **options, process_group=group)
            (3 * found.loss).backward()
            with case(f"rank {rank}, {dtype}, logits, {what}, {options}"):
                compare(found, expected, what, MEASURED)
                close(part.grad, whole.grad[..., rows], "gradient")
        if packed:
            continue
        edges = PIECES[world]
        columns = slice(edges[rank], edges[rank + 1])
        part = logits[:, columns].clone().requires_grad_()
        here = {n: x[:, columns] if x.dim() > 1 else x for n, x in rest.items()}
        found = topr_loss(part, **here, **options, sequence_group=group)
        (3 * found.loss).backward()
        with case(f"rank {rank}, {dtype}, logits in pieces, {options}"):
            compare(found, expected, "pieces", skip)
            for name in TOKENS:
                close(getattr(found, name), getattr(expected, name)[:, columns], name)
            close(part.grad, whole.grad[:, columns], "gradient")
    check_extreme_logits(rank, world, group)


def check_extreme_logits(rank: int, world: int, group: Any) -> None:
    """Columns of -inf (a padded vocabulary), a whole shard of them, NaN and labels out of range."""
    edges = cuts(world, True)
    rows = slice(edges[rank], edges[rank + 1])
    logits = torch.randn(1, 6, V, generator=torch.Generator().manual_seed(2))
    logits[..., edges[1] :] = -torch.inf
    labels = torch.tensor([[0, 1, V - 1, 3, 4, 5]])
    logits[0, 4, 2] = torch.nan
    options = {"temperature": 0.8, "entropy": True}
    whole = logits.clone().requires_grad_()
    expected = log_prob(whole, labels, **options, impl="torch")
    part = logits[..., rows].clone().requires_grad_()
    found = log_prob(part, labels, **options, process_group=group)
    for name, x in found._asdict().items():
        close(x.detach(), getattr(expected, name).detach(), name)
    assert found.log_prob[0, 2] == -torch.inf and found.log_prob[0, 5].isnan()
    upstream = torch.tensor([[0.0, 1, 0, 2, 1, 0]])
    torch.where(upstream != 0, expected.log_prob * upstream, 0.0).sum().backward()
    torch.where(upstream != 0, found.log_prob * upstream, 0.0).sum().backward()
    close(part.grad, whole.grad[..., rows], "gradient")
    with pytest.raises(ValueError, match=rf"labels: expected token ids in \[0, {V}\)"):
        log_prob(part, labels + V - 2, process_group=group)
    (gradient,) = torch.autograd.grad(
        log_prob(part, labels, process_group=group).log_prob[0, 1], part
    )
    assert gradient.any() or rank > 0
    for wrong in ({"inplace": True}, {"impl": "native"}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: got"):
            topr_loss(part, labels, torch.zeros(1, 6), torch.ones(1), process_group=group, **wrong)


@pytest.mark.parametrize("world", [2, 4])
def test_logits_in_shards_and_pieces(world: int):
    launch(world, "test_parallel.logits_worker")


def dtensor_worker() -> None:
    """A head that tensor parallelism spread as a DTensor; its gradient comes back as one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    _, world = start()
    mesh = init_device_mesh("cpu", (world,))
    data = batch(torch.float64)
    data.pop("bias")
    _, whole = run(data, None, None, {"limits": BOTH})
    weight = distribute_tensor(data.pop("weight"), mesh, [Shard(0)]).requires_grad_()
    hidden = data.pop("hidden").requires_grad_()
    group = mesh.get_group()
    out = linear_topr_loss(hidden, weight, **data, limits=BOTH, process_group=group)
    (3 * out.loss).backward()
    close(hidden.grad, whole["hidden"], "hidden")
    assert weight.grad.placements == (Shard(0),)
    close(weight.grad.full_tensor(), whole["weight"], "weight")
    # Gathered, each process with data of its own, as the message of the next refusal says.
    weight.grad = None
    share = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    mine = {n: x[share] for n, x in data.items()}
    gathered = weight.full_tensor(grad_placements=[Partial()])
    part = linear_topr_loss(hidden[share], gathered, **mine, limits=BOTH, normalizer=4)
    (3 * part.loss).backward()
    close(weight.grad.full_tensor(), whole["weight"], "weight, gathered")
    # Logits as loss parallelism has them.
    logits = (hidden.detach() @ weight.detach().full_tensor().t()).requires_grad_()
    expected = topr_loss(logits, **data, limits=BOTH)
    expected.loss.backward()
    spread = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    found = topr_loss(spread, **data, limits=BOTH, process_group=group)
    found.loss.backward()
    compare(found, expected, "logits", MEASURED)
    close(spread.grad.full_tensor(), logits.grad, "logits")
    with pytest.raises(TypeError, match=r"logits: a DTensor; pass .*process_group="):
        topr_loss(spread, **data)
    with pytest.raises(ValueError, match=r"logits: a DTensor of .*expected \(Shard\(dim=2\),\)"):
        log_prob(
            spread.detach().redistribute(mesh, [Shard(0)]), data["labels"], process_group=group
        )
    with pytest.raises(TypeError, match=r"process_group=weight\.device_mesh"):
        linear_topr_loss(hidden, weight, **data)
    replicated = weight.detach().redistribute(mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"expected \(Shard\(dim=0\),\)"):
        linear_topr_loss(hidden, replicated, **data, process_group=group)


def test_a_dtensor_head_is_served_where_it_lies():
    launch(2, "test_parallel.dtensor_worker")


# --- sequences in pieces -------------------------------------------------------------------------

#: First columns of the pieces; one process has none, another only the beginning of one sequence.
PIECES = {2: [0, 5, 12], 4: [0, 1, 1, 7, 12]}
TOKENS = ("log_prob", "entropy", "token_log_ratio")
MEASURED = ("active_share", "left_out")


def piece(data: dict[str, Any], columns: slice) -> dict[str, Any]:
    """The columns of a padded batch that a process holds."""
    names = [n for n in ("hidden", "labels", "behavior_log_prob") if data[n].dim() > 1]
    return {**data, **{n: data[n][:, columns] for n in names}}


def summed(data: dict[str, Any]) -> dict[str, Any]:
    """The batch with log mu summed per sequence."""
    scored = data["labels"] != -100
    mu = torch.where(scored, data["behavior_log_prob"], 0.0).double().sum(1)
    return {**data, "behavior_log_prob": mu}


def pieces_worker() -> None:
    rank, world = start()
    group, edges = dist.group.WORLD, PIECES[world]
    columns = slice(edges[rank], edges[rank + 1])
    options_of = [o for o in OPTIONS if "packed" not in o]
    for dtype, options, per_sequence in itertools.product(
        (torch.float64, torch.float32), options_of, (False, True)
    ):
        if per_sequence and options.get("ratio") == "token":
            continue
        what = f"rank {rank} of {world}, {dtype}, {options}, per_sequence={per_sequence}"
        data = batch(dtype)
        data = summed(data) if per_sequence else data
        expected, whole = run(data, None, None, options)
        found, part = run(piece(data, columns), None, None, {**options, "sequence_group": group})
        gradients = {name: x for name, x in part.items() if x is not None}
        for name, gradient in gradients.items():
            if name != "hidden":
                dist.all_reduce(gradient)
        with case(what):
            compare(found, expected, what, (*TOKENS, *MEASURED))
            for name in TOKENS:
                close(getattr(found, name), getattr(expected, name)[:, columns], name)
            for name, gradient in gradients.items():
                close(gradient, whole[name][:, columns] if name == "hidden" else whole[name], name)
    # Pieces of more rows than a tile has, and a sequence per tile.
    data, options = batch(torch.float64, longer=6), {"limits": BOTH}
    longer = slice(6 * columns.start, 6 * columns.stop)
    expected, whole = run(data, None, None, options)
    found, part = run(piece(data, longer), None, None, {**options, "sequence_group": group})
    compare(found, expected, "longer", (*TOKENS, *MEASURED))
    close(part["hidden"], whole["hidden"][:, longer], "longer: hidden")
    check_pieces_of_log_probs(group, columns)
    check_packed_pieces(group, rank, world)
    # All tokens here or none: a sequence that does not reach this piece has no row in it.
    with pytest.raises(ValueError, match=r"differ in .*reward"):
        data = piece(batch(torch.float64), columns)
        data.pop("bias")
        linear_topr_loss(**{**data, "reward": data["reward"] * (1 + rank)}, sequence_group=group)


def check_pieces_of_log_probs(group: Any, columns: slice) -> None:
    """The same for log-probs that a loop has made, per token and summed."""
    for ratio, per_sequence in (("sequence", False), ("token", False), ("geometric", True)):
        data = batch(torch.float64)
        mask = data["labels"] != -100
        mu, reward = data["behavior_log_prob"], data["reward"]
        token = (mu + 0.3 * torch.sin(mu * 7)).requires_grad_()
        mu = torch.where(mask, mu, 0.0).sum(1) if per_sequence else mu
        expected = topr_loss_from_log_prob(token, mask, mu, reward, ratio=ratio, limits=BOTH)
        (gradient,) = torch.autograd.grad(expected.loss, token)
        here = token.detach()[:, columns].requires_grad_()
        found = topr_loss_from_log_prob(
            here,
            mask[:, columns],
            mu if per_sequence else mu[:, columns],
            reward,
            ratio=ratio,
            limits=BOTH,
            sequence_group=group,
        )
        (part,) = torch.autograd.grad(found.loss, here)
        with case(f"log-probs, {ratio}"):
            compare(found, expected, ratio, (*TOKENS, *MEASURED))
            close(part, gradient[:, columns], "gradient")


def check_packed_pieces(group: Any, rank: int, world: int) -> None:
    """Packed pieces with labels shifted before the cut; each process has its share of every one."""
    data = batch(torch.float64)
    data.pop("bias")
    expected = linear_topr_loss(**data, limits=BOTH)
    labels = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    mu = torch.nn.functional.pad(data["behavior_log_prob"][:, 1:], (0, 1))
    b, t = labels.shape
    # Every sequence is cut elsewhere.
    cuts = [[0, *sorted((3 * s + 5 * i) % t for i in range(1, world)), t] for s in range(b)]
    parts = [slice(c[rank], c[rank + 1]) for c in cuts]
    lengths = [p.stop - p.start for p in parts]
    here = {
        "hidden": torch.cat([data["hidden"][s, p] for s, p in enumerate(parts)]),
        "labels": torch.cat([labels[s, p] for s, p in enumerate(parts)]),
        "behavior_log_prob": torch.cat([mu[s, p] for s, p in enumerate(parts)]),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }
    rest = {"weight": data["weight"], "reward": data["reward"], "limits": BOTH}
    found = linear_topr_loss(**here, **rest, shift=False, sequence_group=group)
    compare(found, expected, "packed pieces", (*TOKENS, *MEASURED))
    with pytest.raises(ValueError, match="shift the labels before they are cut"):
        linear_topr_loss(**here, **rest, sequence_group=group)


@pytest.mark.parametrize("world", [2, 4])
def test_sequences_in_pieces_give_what_whole_ones_give(world: int):
    launch(world, "test_parallel.pieces_worker")


# --- several forms together ----------------------------------------------------------------------


def grid_worker() -> None:
    """Four processes as 2 x 2: the vocabulary over one axis, sequences or data over the other."""
    from topr_kernels.distributed.pieces import next_tokens

    rank, _ = start()
    rows_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    column_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    vocab_group, other_group = rows_groups[rank // 2], column_groups[rank % 2]
    edges = cuts(2, True)
    rows = slice(edges[rank % 2], edges[rank % 2 + 1])
    for options in OPTIONS[:5]:
        options = {n: x for n, x in options.items() if n != "packed"}
        data = batch(torch.float64)
        expected, whole = run(data, None, None, options)
        # Sequences in pieces.
        columns = slice(0, 5) if rank // 2 == 0 else slice(5, 12)
        both = {**options, "sequence_group": other_group}
        found, part = run(piece(data, columns), rows, vocab_group, both)
        compare(found, expected, f"vocabulary x sequences, {options}", (*TOKENS, *MEASURED))
        close(part["hidden"], whole["hidden"][:, columns], "hidden")
        dist.all_reduce(part["weight"], group=other_group)
        close(part["weight"], whole["weight"][rows], "weight")
        # Data in parts: the normaliser is that of all.
        if options.get("reduction") == "sum":
            continue
        share = slice(0, 2) if rank // 2 == 0 else slice(2, 5)
        mine = {
            n: x[share] if n in ("hidden", "labels", "behavior_log_prob", "reward") else x
            for n, x in data.items()
        }
        tokens = options.get("reduction") == "token_mean"
        scored = mine["labels"][:, 1:] != -100
        count = scored.sum() if tokens else scored.any(1).sum()
        dist.all_reduce(count, group=other_group)
        found, part = run(mine, rows, vocab_group, {**options, "normalizer": count})
        loss = found.loss.detach().clone()
        dist.all_reduce(loss, group=other_group)
        close(loss, expected.loss.detach(), "vocabulary x data")
        close(part["hidden"], whole["hidden"][share], "hidden")
        dist.all_reduce(part["weight"], group=other_group)
        close(part["weight"], whole["weight"][rows], "weight")
    data = batch(torch.float64)
    expected = linear_log_prob(data["hidden"], data["weight"], data["labels"])
    groups = {"process_group": vocab_group, "sequence_group": other_group}
    here = [data["hidden"][:, columns], data["weight"][rows], data["labels"][:, columns]]
    for kind in (linear_log_prob, log_prob):
        if kind is log_prob:
            here = [here[0] @ here[1].t(), here[2]]
        close(kind(*here, **groups).log_prob, expected.log_prob[:, columns], kind.__name__)
    x = torch.arange(6.0).view(1, 6)[:, 3 * (rank // 2) : 3 * (rank // 2) + 3]
    moved = next_tokens(x, -1.0, other_group)
    assert moved.tolist() == [[[1.0, 2, 3]], [[4.0, 5, -1]]][rank // 2]


def test_vocabulary_sequences_and_data_together():
    launch(4, "test_parallel.grid_worker")


def forgotten_worker() -> None:
    """The operators over a group are registered as long as the group is there."""
    rank, world = start()
    edges, data = cuts(world, False), batch(torch.float64)
    known = set(linear_ops._KERNELS)
    group = dist.new_group(list(range(world)))
    for _ in range(2):
        run(data, slice(edges[rank], edges[rank + 1]), group, {})
    names = set(linear_ops._KERNELS) - known - {"torch", "native"}
    assert len(names) == 1, names
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert not names & set(linear_ops._KERNELS)


def test_the_operators_of_a_group_are_forgotten_with_it():
    launch(2, "test_parallel.forgotten_worker")


# --- what goes wrong -------------------------------------------------------------------------------


def refusal_worker() -> None:
    """What processes disagree in raises on all of them; a process that fails stops the others."""
    rank, world = start()
    group = dist.group.WORLD
    data = batch(torch.float64)
    data.pop("bias")
    rows = slice(cuts(world, False)[rank], cuts(world, False)[rank + 1])
    shard = {**data, "weight": data["weight"][rows]}
    other = {**shard, "labels": shard["labels"].roll(rank, 0)}
    with pytest.raises(ValueError, match="differ in labels"):
        linear_topr_loss(**other, process_group=group)
    problem = r"weight: expected \[V, D\]" if rank == 1 else "process 1 of it refused its own"
    with pytest.raises(ValueError, match=problem):
        empty = {**data, "weight": data["weight"][: V * (1 - rank)]}
        linear_topr_loss(**empty, process_group=group)
    with pytest.raises(ValueError, match="impl: got 'native' with process_group"):
        linear_topr_loss(**shard, process_group=group, impl="native")
    mu, reward = data["behavior_log_prob"], data["reward"]
    for name, here in (
        ("reward", {"reward": reward * (1 - rank)}),
        ("behavior_log_prob", {"behavior_log_prob": mu + 0.1 * rank}),
        ("shape", {"hidden": torch.cat([data["hidden"]] * (1 + rank), -1), "weight": None}),
        ("baseline", {"baseline": 0.1 * rank}),
        ("limits", {"limits": (BOTH, TIS)[rank]}),
        ("ratio", {"ratio": ("sequence", "geometric")[rank]}),
        ("normalizer", {"normalizer": 3.0 + rank}),
        ("options", {"temperature": 1.0 + rank}),
        ("options", {"workspace_bytes": (1 + rank) << 20}),
        ("requires_grad", {"hidden": data["hidden"].clone().requires_grad_(rank == 1)}),
    ):
        here = {**shard, **here}
        if here["weight"] is None:
            here["weight"] = torch.cat([shard["weight"]] * (1 + rank), -1)
        with pytest.raises(ValueError, match=rf"process_group: its processes differ in .*{name}"):
            linear_topr_loss(**here, process_group=group)
    # log mu of each process may have its own rounding; -inf and NaN are values like others.
    odd = mu.clone()
    odd[0, -1], odd[0, -2] = -torch.inf, torch.nan
    assert linear_topr_loss(**{**shard, "behavior_log_prob": odd}, process_group=group).loss.isnan()
    linear_topr_loss(**{**shard, "behavior_log_prob": mu + 1e-9 * rank}, process_group=group)
    # What only one of them sees wrong in its own piece.
    columns = slice(0, 5) if rank == 0 else slice(5, 12)
    for wrong, problem in (
        ({"labels": torch.full((5, columns.stop - columns.start), 999)}, "token ids in"),
        ({"hidden": data["hidden"][:, :1]}, "labels: expected shape"),
    ):
        here = piece(data, columns)
        here |= wrong if rank == 1 else {}
        problem = problem if rank == 1 else "sequence_group: process 1 of it refused"
        with pytest.raises(ValueError, match=problem):
            linear_topr_loss(**here, sequence_group=group)
    token = torch.zeros(5, 3)
    for rewards, problem in ((reward * (1 + rank), "reward"), (reward[: 5 - rank], "reward")):
        here = {"log_prob": token[: len(rewards)], "mask": token[: len(rewards)] == 0}
        with pytest.raises(ValueError, match=f"sequence_group: .*differ in .*{problem}"):
            topr_loss_from_log_prob(
                **here,
                behavior_log_prob=here["log_prob"],
                reward=rewards.float(),
                sequence_group=group,
            )
    for wrong in (True, "tp", SimpleNamespace(get_group=lambda: group)):
        with pytest.raises(TypeError, match=r"process_group: got .*expected a torch.distributed"):
            linear_topr_loss(**shard, process_group=wrong)
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(TypeError, match="a group that this process is not in"):
            linear_topr_loss(**shard, process_group=alone)


def grid_refusal_worker() -> None:
    """One of 2 x 2 processes refuses: the other row of the grid must hear of it too."""
    rank, _ = start()
    rows_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    column_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    data = batch(torch.float64)
    data.pop("bias")
    edges = cuts(2, False)
    data["weight"] = data["weight"][edges[rank % 2] : edges[rank % 2 + 1]]
    here = piece(data, slice(0, 5) if rank // 2 == 0 else slice(5, 12))
    groups = {"process_group": rows_groups[rank // 2], "sequence_group": column_groups[rank % 2]}
    for wrong, ranks in (
        ({"temperature": -1.0}, [3]),
        ({"labels": here["labels"] + 1000}, [3]),
        ({"labels": here["labels"] + 1000}, [2, 3]),
    ):
        problem = r"temperature: expected|token ids in|differ in labels|refused its own"
        with pytest.raises(ValueError, match=problem):
            linear_topr_loss(**{**here, **(wrong if rank in ranks else {})}, **groups)


def test_a_refusal_is_heard_across_a_grid():
    launch(4, "test_parallel.grid_refusal_worker")


def test_disagreement_raises_on_every_process():
    launch(2, "test_parallel.refusal_worker")


def failing_worker() -> None:
    rank, world = start()
    data = batch(torch.float64)
    data.pop("bias")
    edges = cuts(world, False)
    data["weight"] = data["weight"][edges[rank] : edges[rank + 1]]
    if rank == 1:
        raise RuntimeError("this process fails on purpose")
    linear_topr_loss(**data, process_group=dist.group.WORLD)


def test_a_process_that_fails_stops_the_others():
    with pytest.raises(AssertionError, match=r"Connection (closed|reset) by peer|fails on purpose"):
        launch(2, "test_parallel.failing_worker", timeout=70)
