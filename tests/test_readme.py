"""The code that README and docs show runs, and does what they say."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import launch
from torch import Tensor

from topr_kernels import linear_log_prob, linear_topr_loss, topr_loss
from topr_kernels.testing import make_batch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    "README.md": README,
    **{
        f"docs/{p.name}": p.read_text(encoding="utf-8")
        for p in sorted((ROOT / "docs").glob("*.md"))
    },
}
HEADING = re.compile(r"^#+ (.+)\n", re.MULTILINE)
#: (page, heading, number of the block) of every block of Python -> the test that runs it.
RUN_BY = {
    ("README.md", "In a loop", 0): "test_before_and_after",
    ("README.md", "In a loop", 1): "test_before_and_after",
    ("README.md", "With the Trainer", 0): "test_the_trainer",
    ("docs/distributed.md", "Beyond one device", 0): "test_beyond_one_device",
    ("docs/getting-started.md", "Twelve lines", 0): "test_twelve_lines",
    ("docs/getting-started.md", "Twelve lines", 1): "test_twelve_lines",
    ("docs/huggingface.md", "The Trainer", 0): "test_the_trainer",
    ("docs/images.md", "With the Trainer", 0): "test_images",
    ("docs/images.md", "In a loop", 0): "test_images",
    ("docs/loops.md", "TRL", 0): "test_trl",
    ("docs/loops.md", "A loop of your own", 0): "test_other_loops",
    ("docs/loops.md", "A loop of your own", 1): "test_a_plain_loop_over_a_hugging_face_model",
    ("docs/method.md", "Equivalent to", 0): "test_equivalent_to",
    **{
        ("docs/trajectories.md", "A taper of your own", i): "test_a_taper_of_ones_own"
        for i in range(3)
    },
}


def sections(text: str) -> dict[str, str]:
    """Heading -> what stands under it, up to the next heading of whatever level, code left alone."""
    found, heading, inside = {"": ""}, "", False
    for line in text.splitlines(keepends=True):
        inside ^= line.lstrip().startswith("```")
        match = None if inside else HEADING.fullmatch(line)
        if match:
            heading = match[1]
            found[heading] = ""
        else:
            found[heading] += line
    return found


def blocks(page: str, heading: str) -> list[str]:
    """The blocks of Python under a heading."""
    return [b.split("```")[0] for b in sections(PAGES[page])[heading].split("```python\n")[1:]]


def block(page: str, heading: str, i: int = 0) -> str:
    return blocks(f"docs/{page}.md" if page != "README.md" else page, heading)[i]


def test_every_block_is_run_by_a_test() -> None:
    shown = {
        (page, heading, i)
        for page, text in PAGES.items()
        for heading in sections(text)
        for i in range(len(blocks(page, heading)))
    }
    assert shown == set(RUN_BY)
    assert all(callable(globals()[name]) for name in RUN_BY.values())


def test_no_link_is_dead() -> None:
    """Links to files and to headings within them; mkdocs sees those of the docs alone."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            # A picture that a page of docs names lies beside it.
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = sections(path.read_text(encoding="utf-8"))
                # As GitHub and mkdocs name them.
                names = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in names, f"{page}: {target}"


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``python FILE ARGUMENTS`` in this process."""

    def run(file: str, *arguments: str) -> None:
        monkeypatch.syspath_prepend(str(ROOT))
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        runpy.run_path(str(ROOT / file), run_name="__main__")

    return run


def test_the_picture_is_drawn(tmp_path: Path, run_script: Callable[..., None]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        run_script("docs/draw_update.py", str(tmp_path / "update.png"))
    drawn, shown = (p / "update.png" for p in (tmp_path, ROOT / "docs"))
    assert abs(drawn.stat().st_size - shown.stat().st_size) < 0.2 * shown.stat().st_size


def test_the_oldest_python_and_torch_are_those_of_the_package() -> None:
    shown = re.search(r"needs only Python ≥ ([\d.]+) and torch ≥ ([\d.]+)", README)
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = r'^requires-python = ">=([\d.]+)"$.*^dependencies = \["torch>=([\d.]+)"\]$'
    floors = re.search(lines, package, re.MULTILINE | re.DOTALL)
    assert shown and floors and shown.groups() == floors.groups()


def test_equivalent_to() -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 2)], 17, dtype=torch.float32)
    for reward, baseline in (([1.0, -1.0, 0.5], 0.0), ([1.0, 0.0, 1.0], 0.5)):
        logits = batch.logits.clone().requires_grad_()
        names: dict[str, Any] = {
            "torch": torch,
            "logits": logits,
            "labels": batch.labels,
            "mu": batch.behavior_log_prob,
            "reward": torch.tensor(reward),
            "baseline": baseline,
        }
        exec(block("method", "Equivalent to"), names)
        names["loss"].backward()
        ours = batch.logits.clone().requires_grad_()
        loss = topr_loss(ours, *batch[1:3], torch.tensor(reward), baseline=baseline).loss
        loss.backward()
        torch.testing.assert_close(loss, names["loss"])
        torch.testing.assert_close(ours.grad, logits.grad, rtol=1e-4, atol=1e-7)


def test_twelve_lines() -> None:
    batch = make_batch([(2, 4), (1, 6)], 17, dtype=torch.float32)

    def model(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=logits * 1)

    logits = batch.logits.clone().requires_grad_()
    names: dict[str, Any] = {
        "model": model,
        "frozen": model,
        "batch": {"input_ids": batch.labels},
        "labels": batch.labels,
        "reward": torch.tensor([1.0, -1.0]),
    }
    exec(block("getting-started", "Twelve lines"), names)
    assert logits.grad is not None and logits.grad.any()
    assert names["out"].weight.tolist() == [1.0, 1.0]  # nothing has been trained yet
    names |= with_hidden_states()
    exec(block("getting-started", "Twelve lines", 1), names)
    assert names["out"].weight.tolist() == [1.0, 1.0]


def with_hidden_states() -> dict[str, Any]:
    """A model of two layers as the blocks call it, and the copy that sampled."""
    torch.manual_seed(0)
    head, body = torch.nn.Linear(8, 17, bias=False), torch.nn.Embedding(17, 8)

    def hidden(input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=body(input_ids))

    class Model(SimpleNamespace):
        def __call__(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=head(body(input_ids)))

    labels = torch.randint(17, (2, 6))
    model = Model(model=hidden, lm_head=head)
    return {
        **{"model": model, "frozen": model, "batch": {"input_ids": labels}, "labels": labels},
        "reward": torch.tensor([1.0, -1.0]),
    }


def test_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    names = with_hidden_states() | {"torch": torch}
    exec(block("README.md", "In a loop", 1), names)
    assert names["out"].weight.tolist() == [1.0, 1.0]
    assert names["model"].lm_head.weight.grad.any() and "negative" in capsys.readouterr().out
    names |= {"target": names["labels"][:, 1:], "mask": torch.ones(2, 5)}
    exec(block("README.md", "In a loop", 0), names)
    assert names["loss"].item() == pytest.approx(0.0, abs=1e-6)  # ratios of 1, rewards of +1 and -1


def test_a_taper_of_ones_own() -> None:
    from topr_kernels.testing import check_taper

    names = with_hidden_states() | {"torch": torch, "linear_topr_loss": linear_topr_loss}
    head = names["model"].lm_head.weight
    hidden = names["model"].model(names["labels"]).last_hidden_state
    mu = linear_log_prob(hidden, head, names["labels"]).log_prob.detach()
    names |= {"hidden": hidden, "weight": head, "mu": mu}
    exec(block("trajectories", "A taper of your own"), names)
    assert names["out"].weight.tolist() == pytest.approx([1.0, 1.0])
    # As the page says: the slope of a mask is not its weight where it jumps.
    assert "A mask that turns a value off" in (check_taper(names["band"]) or "")
    exec(block("trajectories", "A taper of your own", 1), names)
    assert check_taper(names["gamma"]) is None
    ratio, positive = torch.tensor([0.1, 0.9, 2.0, 0.5]), torch.tensor([True, True, False, False])
    weight = [w**2 * math.exp(3 - 3 * w) for w in (0.1, 0.9)]
    weight += [w**3 * math.exp(2 - 2 * w) for w in (2.0, 0.5)]
    torch.testing.assert_close(names["gamma"](ratio.log(), positive)[1], torch.tensor(weight))
    exec(block("trajectories", "A taper of your own", 2), names)
    # 1.5 high >= 3.25 at 2.2; without a positive nothing is enough.
    for reward, high in (([1, -1, 0.5, -0.25, -2], 2.2), ([1, -0.5], 1.0), ([-1], 3.0)):
        own = names["moving"](torch.tensor(reward))
        assert check_taper(own) is None
        weight = own(
            torch.tensor([9.0, -9.0, 9.0, -0.1]), torch.tensor([True, True, False, False])
        )[1]
        torch.testing.assert_close(weight, torch.tensor([high, 0.8, 1.0, math.exp(-0.1)]))


def test_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tiny import random_model, save

    save(random_model(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = dict(random_model().named_parameters())
    for source in (block("README.md", "With the Trainer"), block("huggingface", "The Trainer")):
        names: dict[str, Any] = {"name": str(tmp_path / "model")}
        exec(source, names)
        assert any(not torch.equal(p, before[n]) for n, p in names["model"].named_parameters())


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    from vision import model, picture, processor

    model("llava").save_pretrained(tmp_path / "model")
    processor("llava").save_pretrained(tmp_path / "model")
    for k, name in enumerate(("a.png", "b.png")):
        picture(16, 16 + 16 * k, seed=k).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before = dict(model("llava").named_parameters())
    names: dict[str, Any] = {"name": str(tmp_path / "model")}
    exec(block("images", "With the Trainer"), names)
    assert any(not torch.equal(p, before[n]) for n, p in names["model"].named_parameters())
    names["model"].zero_grad()
    exec(block("images", "In a loop"), names)
    assert names["batch"]["pixel_values"].shape[0] == 2
    assert all(
        p.grad is not None for n, p in names["model"].named_parameters() if "language_model" in n
    )


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import random_model, save
    from trl import GRPOConfig

    save(random_model(), tmp_path)
    monkeypatch.chdir(tmp_path)
    calls = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        return [float(len(set(c))) for c in completions]

    names = {
        "model": str(tmp_path),
        "reward_funcs": reward,
        "GRPOConfig": partial(
            GRPOConfig, max_completion_length=4, max_steps=1, report_to="none", use_cpu=True
        ),
        "prompts": Dataset.from_list([{"prompt": "2+2="}] * 8),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cast_lm_head_to_fp32")
        exec(block("loops", "TRL"), names)
    assert len(calls) == 1
    assert names["args"].bf16, "the default that the comment names"


@pytest.mark.parametrize("epochs", [1, 2])
def test_other_loops(epochs: int) -> None:
    """Each window takes one step, by the gradient of all its sequences, the shorter last one too."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from test_loops import big_batch, rows
    from tiny import random_model

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    data, model, steps = rows(10), random_model().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: steps.append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    names = {
        "model": model,
        "optimizer": optimizer,
        "loader": torch.utils.data.DataLoader(data, batch_size=2),
        "Accelerator": Accelerator,
        "islice": islice,
        "nullcontext": nullcontext,
        "topr_loss": topr_loss,
    }
    source = block("loops", "A loop of your own")
    exec(source, names)
    for _ in range(epochs - 1):
        exec(source[source.index("batches = iter") :], names)
    windows = [data[:8], data[8:]] * epochs
    assert len(steps) == len(windows)
    for step, window in zip(steps, windows, strict=True):
        for name, gradient in big_batch(window, "sequence_mean").items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-8, atol=1e-12)


def test_a_plain_loop_over_a_hugging_face_model() -> None:
    pytest.importorskip("transformers")
    from tiny import random_model, tiny_tokenizer

    model, norms = random_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: norms.append(model.lm_head.weight.grad.norm()))
    records = [
        {"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "reward": (-1.0) ** i}
        for i in range(12)
    ]
    names: dict[str, Any] = {
        "model": model,
        "tokenizer": tiny_tokenizer(),
        "records": records,
        "optimizer": optimizer,
        "DataLoader": torch.utils.data.DataLoader,
        "torch": torch,
    }
    exec(block("loops", "A loop of your own", 1), names)
    assert len(norms) == 2 and min(norms) > 1e-3


def test_the_commands_of_the_pipeline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    from pipeline import run_shown, shown_commands
    from tiny import save, tiny_model

    commands = shown_commands(sections(PAGES["docs/pipeline.md"])["The whole pipeline"])
    assert [command[0] for command in commands] == [
        *("iterate", "generate", "score", "curate", "train", "evaluate"),
        *("verify", "score", "train", "vote"),
    ]
    folder = tmp_path / "work"
    folder.mkdir()
    run_shown(commands, save(tiny_model(), tmp_path / "tiny"), folder, monkeypatch)
    assert (folder / "run" / "vote.json").exists() and (folder / "run" / "report.json").exists()


def test_the_record_that_is_shown_is_one() -> None:
    Record = pytest.importorskip("topr_kernels.recipe").Record
    shown = PAGES["docs/pipeline.md"].split("```json\n")[1].split("```")[0]
    record = Record.from_dict(json.loads(shown), "docs/pipeline.md")
    assert record.behavior_log_prob and record.prompt == "2 + 2 ="


def test_the_table_of_seeds_is_the_one_that_was_measured(
    run_script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("benchmarks/demo_seeds.py", "--table-only")
    table = capsys.readouterr().out.strip()
    assert table and table in PAGES["docs/demo.md"]


@pytest.mark.parametrize(
    ("folder", "page", "count"),
    [
        ("results", "docs/performance.md", 5),
        ("results/avx2", "docs/performance.md", 1),
        ("results/bench", "benchmarks/README.md", 15),
        ("results/prompts", "benchmarks/README.md", 3),
    ],
)
def test_the_tables_are_those_that_were_measured(
    folder: str,
    page: str,
    count: int,
    run_script: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_script("benchmarks/report.py", f"benchmarks/{folder}")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == count
    shown = (ROOT / page).read_text(encoding="utf-8")
    for table in tables:
        assert table in shown


def processes_worker() -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    class Axis:
        def get_group(self) -> Any:
            return dist.group.WORLD

    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (3, 8))
    mu = linear_log_prob(hidden, weight, labels).log_prob
    columns = slice(0, 5) if rank == 0 else slice(5, 8)
    names: dict[str, Any] = {
        **{"linear_topr_loss": linear_topr_loss, "mesh": {"tp": Axis(), "cp": Axis()}},
        **{"hidden": hidden, "weight": weight, "labels": labels, "mu": mu},
        **{"weight_shard": weight[:20] if rank == 0 else weight[20:]},
        **{"hidden_piece": hidden[:, columns], "labels_piece": labels[:, columns]},
        **{
            "frozen_piece": hidden[:, columns],
            "linear_log_prob": linear_log_prob,
            "reward": torch.tensor([1.0, -1.0, -1.0]),
        },
    }
    expected = linear_topr_loss(hidden, weight, labels, mu, names["reward"]).loss
    first, second = block("distributed", "Beyond one device").split("\n\n")
    for part in (first, second):
        names.pop("out", None)
        exec(part, names)
        torch.testing.assert_close(names["out"].loss, expected)


def test_beyond_one_device() -> None:
    launch(2, "test_readme.processes_worker")
