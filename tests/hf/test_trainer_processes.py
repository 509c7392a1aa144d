"""TOPRTrainer with several processes: what each loads, counts and refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from processes import launch
from test_trainer import Row, config, plain_loss, rows, two_process_model
from tiny import random_model, tiny_tokenizer
from transformers import PrinterCallback

from topr_kernels.hf import CompletionCollator, TOPRTrainer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

LENGTHS = [3, 1, 4, 2, 2, 4, 1]
#: Records, and what goes to the settings: a last batch that is repeated in part, on one process in
#: whole, more often than once, and not at all.
EVALUATIONS: list[tuple[int, dict[str, Any]]] = [
    (7, {}),
    (7, {"packing": True}),
    (7, {"packing": True, "reduction": "token_mean"}),
    (5, {}),
    (5, {"packing": True}),
    (1, {"per_device_eval_batch_size": 4}),
    (4, {}),
    (7, {"accelerator_config": {"split_batches": True}}),
    (7, {"dataloader_drop_last": True}),
]


def make(folder: str, data: Any, model: Any = None, *, collator: Any = None, **changes: Any) -> Any:
    settings = {"per_device_eval_batch_size": 2, "ddp_backend": "gloo", **changes}
    run = TOPRTrainer(
        random_model() if model is None else model,
        config(Path(folder), **settings),
        collator,
        data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    run.remove_callback(PrinterCallback)
    return run


def finish(folder: str, found: Any) -> None:
    rank = torch.distributed.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def launched(folder: Path, worker: str) -> list[Any]:
    launch(2, f"test_trainer_processes.{worker}", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def evaluation_worker(folder: str) -> None:
    torch.set_num_threads(1)
    figures = []
    for count, changes in EVALUATIONS:
        data = rows(count, lengths=LENGTHS[:count])
        run = make(folder, data, two_process_model(True), **changes)
        found = run.evaluate()
        predicted = run.predict(run.eval_dataset).metrics["test_loss"]
        figures.append([found["eval_loss"], found["eval_positive_share"], predicted])
    finish(folder, figures)


def test_evaluation_counts_every_record_once(tmp_path: Path):
    """accelerate repeats records, so that all processes run equally many batches."""
    first, second = launched(tmp_path, "evaluation_worker")
    assert first == second
    for (count, changes), (loss, positives, predicted) in zip(EVALUATIONS, first, strict=True):
        data = rows(count, lengths=LENGTHS[:count])
        options = {k: v for k, v in changes.items() if k == "reduction"}
        expected = plain_loss(two_process_model(True), data, **options).item()
        assert loss == pytest.approx(expected, rel=1e-5), (count, changes)
        assert predicted == pytest.approx(expected, rel=1e-5), (count, changes)
        assert positives == pytest.approx(sum(r["reward"] > 0 for r in data) / count)


def raised(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def stream_worker(folder: str) -> None:
    from datasets import Dataset

    torch.set_num_threads(1)
    data = Dataset.from_list(rows(4, lengths=[2, 2, 6, 6]))
    own = {"accelerator_config": {"dispatch_batches": False}}
    found: dict[str, Any] = {}
    found["train"] = raised(lambda: make(folder, data.to_iterable_dataset()))
    run = make(folder, data)
    found["evaluate"] = raised(lambda: run.evaluate(data.to_iterable_dataset()))

    run = make(folder, data.to_iterable_dataset(), per_device_train_batch_size=2, **own)
    run.train()
    found["grad_norm"] = run.state.log_history[0]["grad_norm"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.evaluate()
    found["warned"] = [str(w.message) for w in caught if "evaluate a stream" in str(w.message)]

    # A collator whose batches are equally wide may be dispatched; its repeats do not count either.
    same = rows(3, lengths=[2] * 3)
    for r in same:
        r["prompt_token_ids"] = r["prompt_token_ids"][:5]

    def collate(features: list[Row]) -> dict[str, Any]:
        batch = CompletionCollator(0)(features)
        return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}

    dispatched = {"accelerator_config": {"dispatch_batches": True}}
    run = make(folder, same, two_process_model(True), collator=collate, **dispatched)
    found["dispatched"] = run.evaluate()["eval_loss"]
    found["alone"] = plain_loss(two_process_model(True), same).item()
    finish(folder, found)


def test_streams_are_refused_by_all_or_loaded_by_each(tmp_path: Path):
    pytest.importorskip("datasets")
    remedy = "use accelerator_config={'dispatch_batches': False}"
    for found in launched(tmp_path, "stream_worker"):
        assert found["train"].endswith(remedy) and found["evaluate"].endswith(remedy)
        assert found["grad_norm"] > 0
        (warning,) = found["warned"]
        assert "they count twice" in warning
        assert found["dispatched"] == pytest.approx(found["alone"], rel=1e-5)


def initial_worker(folder: str) -> None:
    from datasets import Dataset

    torch.set_num_threads(1)
    records = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in rows(8)]
    found: dict[str, Any] = {}
    model = random_model()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    run = make(folder, records, model, behavior="initial")
    found["scored"] = [r["behavior_log_prob"] for r in run.train_dataset]
    # As FSDP loads models to spare memory.
    if torch.distributed.get_rank() == 1:
        for p in model.parameters():
            p.data.zero_()
    found["weights"] = raised(lambda: make(folder, records, model, behavior="initial"))

    def collate(features: list[Row]) -> dict[str, Any]:
        if torch.distributed.get_rank() == 1:
            raise ValueError("a field of the second process")
        return CompletionCollator(0)(features)

    found["collator"] = raised(lambda: make(folder, records, collator=collate, behavior="initial"))
    records[3]["prompt_token_ids"] = []
    bad = Dataset.from_list(records)
    found["record"] = raised(lambda: make(folder, bad, behavior="initial"))
    finish(folder, found)


def test_all_processes_refuse_what_one_cannot_score(tmp_path: Path):
    """One that raised alone would leave the others waiting for its share."""
    pytest.importorskip("datasets")
    first, second = launched(tmp_path, "initial_worker")
    assert first["scored"] == second["scored"] and len(first["scored"]) == 8
    for found in (first, second):
        assert "record 3, field 'prompt': has no tokens" in found["record"]
        assert "expected the same weights on each" in found["weights"]
        assert "'cpu_ram_efficient_loading': False" in found["weights"]
        assert "a field of the second process" in found["collator"]
    assert "not scored by process 1: ValueError" in first["collator"]
