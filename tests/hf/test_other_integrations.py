"""TOPR in SkyRL, Tinker, Trinity-RFT, AReaL and Axolotl, imitated as tests/loops saw the real ones."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_integrations import RATIOS, Batch, batch, whole
from torch import Tensor

from topr_kernels import TIS
from topr_kernels.integrations import skyrl, tinker

CHECKED = dict(rtol=1e-6, atol=1e-9)


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Stand-ins under the names of a framework's modules; ``a__b`` is a.b."""
    for name, content in modules.items():
        path = name.replace("__", ".")
        module = ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)


# SkyRL ------------------------------------------------------------------------------------------


def sky_rows(data: Batch, index: slice) -> dict[str, Any]:
    """SkyRL's sequence_mean is in the advantages; old_log_probs are the trainer's."""
    scale = len(data.reward) * data.mask.sum(1, keepdim=True).clamp(min=1)
    return {
        "log_probs": data.pi[index],
        "old_log_probs": torch.full_like(data.mu, -9.0)[index],
        "advantages": (torch.where(data.mask, data.advantages, 0.0) / scale)[index],
        "config": SimpleNamespace(),
        "loss_mask": data.mask.long()[index],
        "rollout_logprobs": data.mu[index],
    }


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("ratio", RATIOS)
def test_skyrl_sums_up_to_the_mean_over_sequences(ratio: str, parts: int):
    data = batch()
    total, size = torch.zeros(()).double(), 8 // parts
    for i in range(parts):
        rows = sky_rows(data, slice(i * size, (i + 1) * size))
        loss, metrics = skyrl.topr_policy_loss(**rows, ratio=ratio)
        assert all(type(v) is float for v in metrics.values())
        total = total + loss
    (gradient,) = torch.autograd.grad(total, data.pi)
    expected = whole(data, ratio=ratio, normalizer=8)
    torch.testing.assert_close((total.detach(), gradient), expected, **CHECKED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_logprobs": None}, "rollout_logprobs.*sampling_params.logprobs=1"),
        ({"config": SimpleNamespace(use_kl_in_reward=True)}, "use_kl_in_reward: expected false"),
        (
            {"config": SimpleNamespace(advantage_batch_normalize=True)},
            "advantage_batch_normalize: expected false",
        ),
        (
            {
                "config": SimpleNamespace(
                    off_policy_correction=SimpleNamespace(tis_ratio_type="token")
                )
            },
            "off_policy_correction: tis_ratio_type",
        ),
        ({"advantages": torch.arange(56.0).view(8, 7)}, "advantages.*sequence 0.*not gae"),
    ],
)
def test_skyrl_what_would_be_another_loss_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        skyrl.topr_policy_loss(**{**sky_rows(batch(), slice(None)), **changes})


def test_skyrl_registering_twice_does_no_harm(monkeypatch: pytest.MonkeyPatch):
    class Registry:
        losses: dict[str, Any] = {"gspo": print}  # noqa: RUF012
        list_available = classmethod(lambda cls: list(cls.losses))
        get = classmethod(lambda cls, name: cls.losses[name])
        unregister = classmethod(lambda cls, name: cls.losses.pop(name))

        @classmethod
        def register(cls, name: str, function: Any) -> None:
            assert name not in cls.losses, "SkyRL raises"
            cls.losses[name] = function

    names = ["skyrl", "skyrl__backends", "skyrl__backends__skyrl_train"]
    names.append("skyrl__backends__skyrl_train__utils")
    content = {"PolicyLossRegistry": Registry}
    modules = {**{name: {} for name in names}, f"{names[-1]}__ppo_utils": content}
    install(monkeypatch, **modules)
    skyrl.register()
    skyrl.register(limits="tis")
    assert Registry.losses["topr"].keywords["limits"] == TIS
    with pytest.raises(ValueError, match="'gspo' is a policy loss of SkyRL's own"):
        skyrl.register("gspo")


# Tinker -----------------------------------------------------------------------------------------


def datums(data: Batch) -> list[Any]:
    fields = {"logprobs": data.mu, "advantages": data.advantages, "mask": data.mask.float()}
    made = []
    for i in range(len(data.reward)):
        inputs = {
            name: SimpleNamespace(to_torch=lambda value=value[i]: value)
            for name, value in fields.items()
        }
        made.append(SimpleNamespace(loss_fn_inputs=inputs))
    return made


@pytest.mark.parametrize("ratio", RATIOS)
def test_tinker_is_the_mean_over_the_answers_of_a_call(ratio: str):
    data = batch()
    loss, metrics = tinker.topr_loss(datums(data), list(data.pi), ratio=ratio)
    (gradient,) = torch.autograd.grad(loss, data.pi)
    torch.testing.assert_close((loss.detach(), gradient), whole(data, ratio=ratio), **CHECKED)
    assert all(type(v) is float for v in metrics.values())


def test_tinker_the_traced_form_is_the_same():
    data = batch()
    traced = torch.fx.symbolic_trace(tinker.traced_topr_loss)
    total = torch.zeros(()).double()
    for i in range(8):
        share = 1 / (7 * data.mask[i].sum().clamp(min=1))
        inputs = (data.mu[i], data.advantages[i], data.mask[i].float(), share[None])
        total = total + traced(data.pi[i], *inputs)[0]
    (gradient,) = torch.autograd.grad(total, data.pi)
    torch.testing.assert_close((total.detach(), gradient), whole(data), **CHECKED)


def test_tinker_a_missing_field_is_named():
    data = datums(batch())
    del data[2].loss_fn_inputs["mask"]
    with pytest.raises(ValueError, match=r"data\[2\].loss_fn_inputs: 'mask' is missing"):
        tinker.topr_loss(data, list(batch().pi))


# Trinity-RFT ------------------------------------------------------------------------------------


@pytest.fixture
def trinity(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class PolicyLossFn:
        """The base class: Trinity selects the batch's entries by the names of the parameters."""

        def __init__(self, backend: str) -> None:
            self.backend = backend

    base = {"PolicyLossFn": PolicyLossFn}
    install(monkeypatch, trinity={}, trinity__algorithm={}, trinity__algorithm__policy_loss_fn=base)
    yield importlib.import_module("topr_kernels.integrations.trinity")
    sys.modules.pop("topr_kernels.integrations.trinity")


@pytest.mark.parametrize("parts", [1, 4])
def test_trinity_micro_batches_add_up(trinity: Any, parts: int):
    data = batch()
    total, size = torch.zeros(()).double(), 8 // parts
    counts = {"dp_size": 1, "batch_num_tokens": int(data.mask.sum()), "global_batch_size": 8}
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        inputs = (data.pi[rows], data.mu[rows], data.mask[rows], data.advantages[rows])
        loss, metrics = trinity.TOPRPolicyLossFn()(*inputs, **counts)
        assert "topr_positive_share" in metrics
        total = total + loss
    (gradient,) = torch.autograd.grad(total, data.pi)
    torch.testing.assert_close((total.detach(), gradient), whole(data, normalizer=8), **CHECKED)


def test_trinity_one_answer_in_one_dimension(trinity: Any):
    data = batch()
    loss, _ = trinity.TOPRPolicyLossFn("tinker")(*(x[1] for x in data_of(data)))
    expected, _ = trinity.TOPRPolicyLossFn()(*(x[1:2] for x in data_of(data)))
    torch.testing.assert_close(loss, expected)


def data_of(data: Batch) -> tuple[Tensor, ...]:
    return data.pi, data.mu, data.mask, data.advantages


def test_trinity_takes_only_the_keyword_that_it_leaves_out(trinity: Any):
    """Of parameters beside these Trinity asks its batch, which has none of another name."""
    import inspect

    names = set(inspect.signature(trinity.TOPRPolicyLossFn.__call__).parameters)
    assert names - {"self", "logprob", "kwargs"} == {
        "old_logprob",
        "action_mask",
        "advantages",
        "dp_size",
        "batch_num_tokens",
        "global_batch_size",
    }


# AReaL ------------------------------------------------------------------------------------------


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Actor:
        def __init__(self, config: Any) -> None:
            self.config = config

        def train_batch(self, input_: Any, loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
            """Micro-batches weighed by the second function, as FSDPEngine does."""
            total = sum(loss_weight_fn(part) for part in input_)
            losses = [loss_fn(x["pi"], None, x) * loss_weight_fn(x) / total for x in input_]
            sum(losses).backward()
            return {"loss": float(sum(losses).detach())}

    tracker = SimpleNamespace(scalar=lambda **figures: None)
    install(
        monkeypatch,
        areal={},
        areal__engine={},
        areal__engine__fsdp_engine={"FSDPPPOActor": Actor},
        areal__utils={"stats_tracker": tracker},
    )
    yield importlib.import_module("topr_kernels.integrations.areal")
    sys.modules.pop("topr_kernels.integrations.areal")


def packed(data: Batch, rows: slice) -> dict[str, Any]:
    names = {"pi": data.pi, "logprobs": data.mu, "advantages": data.advantages}
    offsets = torch.arange(len(data.reward[rows]) + 1, dtype=torch.int32) * 7
    fields = {name: value[rows].flatten() for name, value in names.items()}
    return {**fields, "loss_mask": data.mask[rows].flatten().long(), "cu_seqlens": offsets}


def areal_config(**changes: Any) -> SimpleNamespace:
    names = ("adv_norm", "reward_norm", "rejection_sampling", "m2_threshold")
    fields = {**dict.fromkeys(names), "kl_ctl": 0.0, "use_sapo_loss": False}
    fields |= {"recompute_logprob": False, "use_decoupled_loss": False}
    return SimpleNamespace(**{**fields, "enable_tree_training": False, **changes})


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_areal_micro_batches_add_up(areal: Any, reduction: str, parts: int):
    data = batch()
    actor = areal.TOPRActor(areal_config())
    actor.reduction = reduction
    size = 8 // parts
    batches = [packed(data, slice(i * size, (i + 1) * size)) for i in range(parts)]
    stats = actor.train_batch(batches, None, None)
    expected, gradient = whole(data, reduction=reduction)
    assert stats["loss"] == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(data.pi.grad, gradient, **CHECKED)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_ctl": 0.1},
        {"recompute_logprob": True},
        {"adv_norm": SimpleNamespace(mean_level="batch")},
        {"use_sapo_loss": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_areal_settings_are_refused_by_name(areal: Any, changes: dict[str, Any]):
    with pytest.raises(ValueError, match=f"actor.{next(iter(changes))}"):
        areal.TOPRActor(areal_config(**changes))


def test_areal_packed_advantages_that_differ_are_found(areal: Any):
    data = batch()
    micro = packed(data, slice(4, 7))
    micro["advantages"] = micro["advantages"].clone()
    micro["advantages"][10] = 5.0
    with pytest.raises(ValueError, match=r"advantages.*in sequence 1.*kl_ctl=0"):
        areal.topr_loss(micro["pi"], None, micro)


# Axolotl ------------------------------------------------------------------------------------------


class Settings(dict[str, Any]):
    """Axolotl's: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("pydantic")
    mixins = dataclasses.make_dataclass(
        "AxolotlTrainingMixins",
        [
            ("loraplus_lr_ratio", Any, None),
            ("sample_packing", bool, False),
            ("model_type", Any, None),
        ],
    )
    meta = dataclasses.make_dataclass("TrainDatasetMeta", ["train_dataset", "eval_dataset"])
    install(
        monkeypatch,
        axolotl={},
        axolotl__common={},
        axolotl__common__datasets={"TrainDatasetMeta": meta},
        axolotl__core={},
        axolotl__core__training_args_base={"AxolotlTrainingMixins": mixins},
        axolotl__integrations={},
        axolotl__integrations__base={"BasePlugin": type("BasePlugin", (), {})},
        axolotl__utils={},
        axolotl__utils__data={},
        axolotl__utils__data__shared={
            "load_dataset_with_config": lambda data, token: data["rows"],
            "merge_datasets": lambda parts, cfg: [row for part in parts for row in part],
        },
    )
    yield importlib.import_module("topr_kernels.integrations.axolotl")
    sys.modules.pop("topr_kernels.integrations.axolotl")


def test_axolotl_trains_on_the_records_of_its_files(axolotl: Any, tmp_path: Any):
    from test_trainer import config, rows
    from tiny import random_model, tiny_tokenizer

    plugin = axolotl.TOPRPlugin()
    settings = {"limits": "tis", "packing": True}
    data = [{"rows": rows(3)}, {"rows": rows(1)}]
    cfg = Settings(datasets=data, topr=settings, sequence_len=64, learning_rate=0.5)
    meta = plugin.load_datasets(cfg)
    assert meta.train_dataset == [*rows(3), *rows(1)] and meta.eval_dataset is None
    kind = plugin.get_trainer_cls(cfg)
    assert kind.requires_all_columns(cfg) and plugin.get_input_args().endswith("axolotl.TOPRArgs")
    args = config(tmp_path, learning_rate=0.5)
    vars(args).update(loraplus_lr_ratio=None, sample_packing=False, model_type="llama")
    more = {"processing_class": tiny_tokenizer(), "dataset_tags": [], "eval_data_collator": len}
    given = {"train_dataset": meta.train_dataset, "data_collator": len, **more}
    run = kind(model=random_model(), args=args, **given)
    assert run.args.limits == TIS and run.args.learning_rate == 0.5 and run.args.max_length == 64
    assert run.data_collator.packing and run.args.remove_unused_columns is False
    args.loraplus_lr_ratio = 16.0
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio: got 16\.0.*Axolotl's own trainers"):
        kind(model=random_model(), args=args, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl": "grpo"}, "rl: got 'grpo' with TOPRPlugin; leave it out"),
        ({"val_set_size": 0.1}, r"val_set_size: got 0\.1.*test_datasets"),
        ({"sample_packing": True}, "sample_packing: got True.*packing: true under topr"),
        ({"topr": {"max_steps": 3}}, "topr: got 'max_steps', which is no setting of the loss"),
    ],
)
def test_axolotl_settings_of_another_training_are_refused(
    axolotl: Any, changes: dict[str, Any], message: str
):
    for entrance in (axolotl.TOPRPlugin().load_datasets, axolotl.TOPRPlugin().get_trainer_cls):
        with pytest.raises(ValueError, match=message):
            entrance(Settings(**changes))
