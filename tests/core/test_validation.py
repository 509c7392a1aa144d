"""Bad input: the right type of error, naming the argument, before any work; poisoned when compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from topr_kernels import (
    TOPR,
    Limits,
    TOPRLoss,
    baseline_for_positive_share,
    effective_positive_share,
    log_prob,
    topr_loss,
)
from topr_kernels.ops import logits as ops

V = 7


def padded() -> dict[str, Any]:
    """Sound padded arguments: B = 2, T = 4."""
    return {
        "logits": torch.randn(2, 4, V, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]]),
        "behavior_log_prob": torch.full((2, 4), -1.0),
        "reward": torch.tensor([1.0, -1.0]),
    }


def packed() -> dict[str, Any]:
    """Sound packed arguments: sequences of 3 and 2 tokens."""
    return {
        "logits": torch.randn(5, V, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([-100, 1, 2, -100, 3]),
        "behavior_log_prob": torch.full((5,), -1.0),
        "reward": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
    }


Case = tuple[Callable[[], dict[str, Any]], dict[str, Any], type[Exception], str]

CASES: dict[str, Case] = {
    # Types and dtypes.
    "logits list": (padded, {"logits": [[1.0]]}, TypeError, r"logits: .*Tensor.*list"),
    "logits int": (
        padded,
        {"logits": torch.zeros(2, 4, V, dtype=torch.int64)},
        TypeError,
        r"logits: expected dtype float32 or .*int64",
    ),
    "labels int32": (
        padded,
        {"labels": torch.zeros(2, 4, dtype=torch.int32)},
        TypeError,
        r"labels: expected dtype int64, got int32.*long",
    ),
    "labels None": (padded, {"labels": None}, TypeError, r"labels: .*Tensor.*NoneType"),
    "mu bf16": (
        padded,
        {"behavior_log_prob": torch.zeros(2, 4, dtype=torch.bfloat16)},
        TypeError,
        r"behavior_log_prob: expected dtype float32 or float64, got bfloat16",
    ),
    "reward list": (padded, {"reward": [1.0, -1.0]}, TypeError, r"reward: .*Tensor.*list"),
    "reward int": (
        padded,
        {"reward": torch.ones(2, dtype=torch.int64)},
        TypeError,
        r"reward: expected dtype .*int64.*float",
    ),
    "weight list": (
        padded,
        {"sequence_weight": [1.0, 2.0]},
        TypeError,
        r"sequence_weight: expected a torch.Tensor, got list; make it one with torch\.as_tensor",
    ),
    "segments float": (
        padded,
        {"segments": torch.zeros(2, 4), "ratio": "segment"},
        TypeError,
        r"segments: expected dtype int64 or .*got float32; give whole numbers, .*\.long\(\)",
    ),
    "known int": (
        padded,
        {"behavior_known": torch.ones(2, dtype=torch.int64)},
        TypeError,
        r"behavior_known: expected dtype bool, got int64; give True .*known",
    ),
    "cu_seqlens float": (
        packed,
        {"cu_seqlens": torch.tensor([0.0, 3, 5])},
        TypeError,
        r"cu_seqlens: expected dtype int32 or int64, got float32",
    ),
    "cu_seqlens list": (packed, {"cu_seqlens": [0, 3, 5]}, TypeError, r"cu_seqlens: .*list"),
    # Devices.
    "labels device": (
        padded,
        {"labels": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
        ValueError,
        r"labels: on meta, expected cpu",
    ),
    "mu device": (
        padded,
        {"behavior_log_prob": torch.zeros(2, 4, device="meta")},
        ValueError,
        r"behavior_log_prob: on meta, expected cpu",
    ),
    "reward device": (
        padded,
        {"reward": torch.zeros(2, device="meta")},
        ValueError,
        r"reward: on meta, expected cpu",
    ),
    "cu_seqlens device": (
        packed,
        {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
        ValueError,
        r"cu_seqlens: on meta, expected cpu",
    ),
    "normalizer device": (
        padded,
        {"normalizer": torch.ones((), device="meta")},
        ValueError,
        r"normalizer: expected .*cpu.*meta",
    ),
    # Shapes.
    "logits 1-d": (padded, {"logits": torch.zeros(V)}, ValueError, r"logits: .*\(7,\)"),
    "logits 4-d": (padded, {"logits": torch.zeros(1, 2, 4, V)}, ValueError, r"logits: .*1, 2, 4"),
    "empty vocabulary": (padded, {"logits": torch.zeros(2, 4, 0)}, ValueError, r"logits: .*V >= 1"),
    "labels shifted": (
        padded,
        {"labels": torch.zeros(2, 3, dtype=torch.int64)},
        ValueError,
        r"labels: expected shape \(2, 4\).*got \(2, 3\).*shift",
    ),
    "mu shape": (
        padded,
        {"behavior_log_prob": torch.zeros(2, 3)},
        ValueError,
        r"behavior_log_prob: expected shape \(2, 4\).*\(2,\).*got \(2, 3\)",
    ),
    "reward per token": (
        padded,
        {"reward": torch.zeros(2, 4)},
        ValueError,
        r"reward: expected one per sequence, shape \(2,\), got \(2, 4\)",
    ),
    "reward count": (
        packed,
        {"reward": torch.zeros(3)},
        ValueError,
        r"reward: .*\(2,\), got \(3,\)",
    ),
    "packed without offsets": (packed, {"cu_seqlens": None}, ValueError, r"cu_seqlens: missing"),
    "cu_seqlens 2-d": (
        packed,
        {"cu_seqlens": torch.tensor([[0, 3, 5]])},
        ValueError,
        r"cu_seqlens: expected shape \[B \+ 1\], got \(1, 3\)",
    ),
    "cu_seqlens empty": (
        packed,
        {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
        ValueError,
        r"cu_seqlens: expected shape \[B \+ 1\], got \(0,\)",
    ),
    "packed batch": (
        padded,
        {"cu_seqlens": torch.tensor([0, 4, 8])},
        ValueError,
        r"logits: with cu_seqlens expected .*\(2, 4, 7\)",
    ),
    "summed mu by token": (
        padded,
        {"behavior_log_prob": torch.zeros(2), "ratio": "token"},
        ValueError,
        r"behavior_log_prob: ratio='token' needs it per token, shape \(2, 4\)",
    ),
    "normalizer shape": (
        padded,
        {"normalizer": torch.ones(2)},
        ValueError,
        r"normalizer: .*0-dim.*\(2,\)",
    ),
    # Values.
    "label too large": (
        padded,
        {"labels": torch.full((2, 4), V)},
        ValueError,
        r"labels: expected token ids in \[0, 7\).*got 7 at \(0, 0\)",
    ),
    "label negative": (
        padded,
        {"labels": torch.tensor([[0, 0, 0, 0], [0, 0, -1, 0]])},
        ValueError,
        r"labels: .*got -1 at \(1, 2\)",
    ),
    "cu_seqlens start": (
        packed,
        {"cu_seqlens": torch.tensor([1, 3, 5])},
        ValueError,
        r"cu_seqlens: expected to start at 0, got 1",
    ),
    "cu_seqlens decreasing": (
        packed,
        {"cu_seqlens": torch.tensor([0, 6, 5])},
        ValueError,
        r"cu_seqlens: not increasing: entry 2 is 5 after 6",
    ),
    "cu_seqlens end": (
        packed,
        {"cu_seqlens": torch.tensor([0, 3, 4])},
        ValueError,
        r"cu_seqlens: .*end at .*N = 5, got 4",
    ),
    "cu_seqlens beyond": (
        packed,
        {"cu_seqlens": torch.tensor([0, 3, 9])},
        ValueError,
        r"cu_seqlens: .*end at .*N = 5, got 9",
    ),
    "reward nan": (
        padded,
        {"reward": torch.tensor([1.0, math.nan])},
        ValueError,
        r"reward: expected finite numbers, got nan for sequence 1",
    ),
    "reward inf": (
        padded,
        {"reward": torch.tensor([-math.inf, 1.0])},
        ValueError,
        r"reward: expected finite numbers, got -inf for sequence 0",
    ),
    "mu requires grad": (
        padded,
        {"behavior_log_prob": torch.zeros(2, 4, requires_grad=True)},
        ValueError,
        r"behavior_log_prob: requires grad.*detach",
    ),
    "reward requires grad": (
        padded,
        {"reward": torch.zeros(2, requires_grad=True)},
        ValueError,
        r"reward: requires grad.*detach",
    ),
    "normalizer requires grad": (
        padded,
        {"normalizer": torch.ones((), requires_grad=True)},
        ValueError,
        r"normalizer: requires grad.*detach",
    ),
    # Options.
    "ratio": (padded, {"ratio": "seq"}, ValueError, r"ratio: .*'sequence'.*'token'.*got 'seq'"),
    "reduction": (padded, {"reduction": "mean"}, ValueError, r"reduction: .*'sum'.*got 'mean'"),
    "impl": (padded, {"impl": "cuda"}, ValueError, r"impl: .*'torch'.*got 'cuda'"),
    "limits name": (padded, {"limits": "topr"}, TypeError, r"limits: .*Limits.*str.*PRESETS"),
    "limits tuple": (padded, {"limits": (1, 1, 0, 1)}, TypeError, r"limits: .*Limits.*tuple"),
    "baseline nan": (padded, {"baseline": math.nan}, ValueError, r"baseline: .*finite.*nan"),
    "baseline tensor": (padded, {"baseline": torch.ones(2)}, TypeError, r"baseline: .*Tensor"),
    "normalizer with sum": (
        padded,
        {"normalizer": 3, "reduction": "sum"},
        ValueError,
        r"normalizer: reduction='sum' has no denominator",
    ),
    "normalizer string": (padded, {"normalizer": "4"}, TypeError, r"normalizer: .*str"),
    "temperature string": (padded, {"temperature": "1"}, TypeError, r"temperature: .*str"),
    "softcap tiny": (
        padded,
        {"softcap": 1e-6},
        ValueError,
        r"softcap: got 1e-06 .*1e-05 to 100000",
    ),
    "softcap vast": (
        padded,
        {"softcap": 1e6},
        ValueError,
        r"softcap: got 1000000.0 .*None is no s",
    ),
    "inplace expanded": (
        padded,
        {"logits": torch.zeros(1, 4, V).expand(2, 4, V), "inplace": True},
        ValueError,
        r"inplace=True: logits of shape .* are expanded",
    ),
} | {
    f"{name} {value}": (padded, {name: value}, ValueError, rf"{name}: .*> 0, got {value}")
    for name in ("temperature", "softcap", "normalizer")
    for value in (0.0, -1.0, math.nan, math.inf)
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_raises_before_any_work(case: str) -> None:
    make, change, error, message = CASES[case]
    arguments = make() | change
    tensors = {k: x for k, x in arguments.items() if isinstance(x, Tensor)}
    versions = {k: x._version for k, x in tensors.items()}
    worker = mock.Mock(side_effect=AssertionError("work was done"))
    with (
        mock.patch.dict(ops._KERNELS, {"torch": ops.Kernels(*[worker] * 4)}),
        pytest.raises(error, match=message),
    ):
        topr_loss(**arguments)
    assert not worker.called
    assert versions == {k: x._version for k, x in tensors.items()}


@pytest.mark.parametrize("make", [padded, packed])
def test_the_sound_arguments_are_sound(make: Callable[[], dict[str, Any]]) -> None:
    assert topr_loss(**make()).loss.isfinite()
    assert topr_loss(**make(), debug=True).loss.isfinite()


SCORER = (
    "logits list",
    "logits int",
    "labels int32",
    "labels shifted",
    "labels device",
    "packed without offsets",
    "label too large",
    "label negative",
    "cu_seqlens start",
    "cu_seqlens decreasing",
    "cu_seqlens end",
    "impl",
    "temperature 0.0",
    "softcap nan",
)


@pytest.mark.parametrize("case", SCORER)
def test_log_prob_raises_alike(case: str) -> None:
    make, change, error, message = CASES[case]
    arguments = {
        k: v for k, v in (make() | change).items() if k not in ("behavior_log_prob", "reward")
    }
    with pytest.raises(error, match=message):
        log_prob(**arguments)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ((2.0, 1.0, 0.0, 1.0), ValueError, r"pos_min = 2.0 exceeds Limits.pos_max = 1.0"),
        ((1.0, 1.0, 3.0, 1.0), ValueError, r"neg_min = 3.0 exceeds Limits.neg_max = 1.0"),
        ((-1.0, 1.0, 0.0, 1.0), ValueError, r"Limits.pos_min: .*>= 0, got -1.0"),
        ((1.0, 1.0, 0.0, -0.5), ValueError, r"Limits.neg_max: .*>= 0, got -0.5"),
        ((1.0, math.nan, 0.0, 1.0), ValueError, r"Limits.pos_max: .*got nan"),
        ((1.0, 1.0, math.inf, math.inf), ValueError, r"Limits.neg_min: .*finite.*got inf"),
        ((1.0, 1.0, "0", 1.0), TypeError, r"Limits.neg_min: .*number, got str"),
        ((True, 1.0, 0.0, 1.0), TypeError, r"Limits.pos_min: .*number, got bool"),
        ((torch.ones(()), 1.0, 0.0, 1.0), TypeError, r"Limits.pos_min: .*number, got Tensor"),
    ],
)
def test_limits(limits: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Limits(*limits)


def test_limits_are_constants() -> None:
    with pytest.raises(AttributeError):
        TOPR.pos_min = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("option", ["limit", "cu_seqlens", "normalizer"])
def test_module_refuses_unknown_options(option: str) -> None:
    with pytest.raises(TypeError, match=rf"TOPRLoss: unknown options \['{option}'\].*'limits'"):
        TOPRLoss(**{option: None})


def test_module_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="ratio: "):
        TOPRLoss(ratio="mean")(**padded())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baseline_for_positive_share(0.0, 0.5), r"positive_share: got 0.0"),
        (lambda: baseline_for_positive_share(1.0, 0.5), r"positive_share: got 1.0"),
        (lambda: baseline_for_positive_share(-0.1, 0.5), r"positive_share: .*\[0, 1\], got -0.1"),
        (lambda: baseline_for_positive_share(0.2, 1.5), r"target: .*\[0, 1\], got 1.5"),
        (lambda: baseline_for_positive_share(math.nan, 0.5), r"positive_share: .*got nan"),
        (lambda: baseline_for_positive_share(0.2, math.nan), r"target: .*got nan"),
        (lambda: effective_positive_share(1.1, 0.0), r"positive_share: .*\[0, 1\], got 1.1"),
        (lambda: effective_positive_share(0.5, 1.01), r"baseline: .*\[-1, 1\].*got 1.01"),
        (lambda: effective_positive_share(0.5, math.nan), r"baseline: .*\[-1, 1\].*got nan"),
        (lambda: effective_positive_share(1.0, 1.0), r"baseline = 1.0 equals every reward"),
        (lambda: effective_positive_share(0.0, -1.0), r"baseline = -1.0 equals every reward"),
    ],
)
def test_baseline_helpers(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [-2.0, math.nan])
def test_normalizer_tensor_value(value: float) -> None:
    """A denominator that would turn the update around is caught where reading it is free."""
    with pytest.raises(ValueError, match=rf"normalizer: .*got {value}"):
        topr_loss(**padded(), normalizer=torch.tensor(value))


def test_normalizer_tensor_zero_of_an_empty_batch() -> None:
    """A counted denominator is 0 when nothing is scored anywhere: then the loss is a plain 0."""
    arguments = padded() | {"labels": torch.full((2, 4), -100)}
    assert topr_loss(**arguments, normalizer=torch.tensor(0)).loss.item() == 0


def test_accelerator_values_are_not_read() -> None:
    """Off the CPU value checks would sync: metadata is checked, values are not."""
    arguments = {k: x.to("meta") for k, x in packed().items()}
    assert topr_loss(**arguments).loss.device.type == "meta"
    with pytest.raises(ValueError, match="reward: "):
        topr_loss(**(arguments | {"reward": torch.zeros(3, device="meta")}))


def test_tokens_without_a_sequence_are_refused_anywhere() -> None:
    arguments = packed() | {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    for device in ("cpu", "meta"):
        moved = {k: x.to(device) for k, x in arguments.items()}
        with pytest.raises(ValueError, match="cu_seqlens: a single entry"):
            topr_loss(**moved)


def test_inplace_is_refused_where_rows_overlap() -> None:
    arguments = padded()
    shape = arguments["logits"].shape
    room = torch.zeros(10_000)
    overlapping = room.as_strided(shape, (shape[1] * shape[2], shape[2] - 1, 1))
    with pytest.raises(ValueError, match=r"inplace=True: .*overlap"):
        topr_loss(**(arguments | {"logits": overlapping}), inplace=True)
    dense = arguments["logits"].transpose(0, 1).contiguous().transpose(0, 1)
    topr_loss(**(arguments | {"logits": dense}), inplace=True)


@pytest.mark.parametrize("options", [{"ratio": "bogus"}, {"reduction": "mean"}, {"limits": "topr"}])
def test_module_refuses_bad_options_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        TOPRLoss(**options)


# --- Compiled graphs: values cannot be read, so they poison ----------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Callable[..., Any]:
    torch._dynamo.reset()

    def step(logits: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        out = topr_loss(logits, **arguments)
        return out.loss, out.weight

    return torch.compile(step, fullgraph=True, backend="aot_eager")


def guarded(x: Tensor) -> Tensor:
    """A copy of x in the middle of a larger buffer of NaN, so that stray reads show."""
    room = torch.full((3, *x.shape), math.nan)
    room[1] = x
    return room[1]


POISON: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], list[int]]] = {
    # name: arguments, change, sequences whose gradient must not look sound
    "label beyond": (padded, {"labels": torch.tensor([[0, 1, V, 3], [0, 1, 2, 3]])}, [0]),
    "label huge": (padded, {"labels": torch.tensor([[0, 1, 2, 3], [0, 1 << 40, 2, 3]])}, [1]),
    "label negative": (padded, {"labels": torch.tensor([[0, 1, -1, 3], [0, 1, 2, 3]])}, [0]),
    "reward nan": (padded, {"reward": torch.tensor([1.0, math.nan])}, [1]),
    "decreasing": (packed, {"cu_seqlens": torch.tensor([0, 6, 5], dtype=torch.int32)}, [0, 1]),
    "negative": (packed, {"cu_seqlens": torch.tensor([0, -3, 5], dtype=torch.int32)}, [0, 1]),
    "start": (packed, {"cu_seqlens": torch.tensor([1, 3, 5], dtype=torch.int32)}, [0, 1]),
    "short": (packed, {"cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32)}, [0, 1]),
    "beyond": (packed, {"cu_seqlens": torch.tensor([0, 3, 1 << 30], dtype=torch.int32)}, [0, 1]),
}


@pytest.mark.parametrize("limits", [TOPR, Limits(1, 1, 0, 0)], ids=["topr", "sft"])
@pytest.mark.parametrize("case", POISON)
def test_bad_values_poison_a_compiled_graph(
    compiled: Callable[..., Any], case: str, limits: Limits
) -> None:
    make, change, bad = POISON[case]
    arguments = make() | change
    z = guarded(arguments.pop("logits")).requires_grad_()
    loss, weight = compiled(z, **arguments, limits=limits)
    loss.backward()
    assert loss.isnan()
    if make is padded:
        assert weight.isnan().nonzero().flatten().tolist() == bad
    assert z.grad is not None
    rows = z.grad.unsqueeze(0) if make is packed else z.grad
    spans = [rows[0, :2], rows[0, 3:4]] if make is packed else [rows[0], rows[1]]
    for s, span in enumerate(spans):
        # A bad sequence shows in its gradient, a sound one beside it keeps its own.
        assert span.isnan().any() == (s in bad)


def test_poisoned_sequence_of_reward_zero_is_still_seen(compiled: Callable[..., Any]) -> None:
    arguments = padded() | {"reward": torch.zeros(2)}
    arguments["labels"][0, 2] = V
    assert compiled(arguments.pop("logits"), **arguments)[0].isnan()


def test_sound_values_are_not_poisoned(compiled: Callable[..., Any]) -> None:
    for make in (padded, packed):
        arguments = make()
        expected = topr_loss(**arguments).loss
        assert torch.equal(compiled(arguments.pop("logits"), **arguments)[0], expected)


@pytest.mark.parametrize("option", ["inplace", "debug"])
def test_options_that_a_compiled_graph_refuses(option: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda logits, **kw: topr_loss(logits, **kw, **{option: True}).loss,
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match=f"{option}=True"):
        step(**padded())


def test_metadata_raises_in_a_compiled_graph(compiled: Callable[..., Any]) -> None:
    arguments = padded() | {"reward": torch.zeros(3)}
    with pytest.raises(Exception, match="reward: expected one per sequence"):
        compiled(arguments.pop("logits"), **arguments)
