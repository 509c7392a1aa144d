"""The recipe's commands in several processes: the results of one, resuming, and failures that end."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from processes import TESTS, free_port
from recipe_server import BUSY, COMMANDS, TASK, Server
from safetensors.torch import load_file
from tiny import save, tiny_model

from topr_kernels.recipe import GenerateSettings, SettingsError, read_records
from topr_kernels.recipe.cli import main

commands, processes, sampling, steps = (
    importlib.import_module(f"topr_kernels.recipe.{name}")
    for name in ("commands", "processes", "sampling", "steps")
)
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="forks, and locks folders"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    model = save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")
    return Server(model, tmp_path_factory.mktemp("jobs") / "job")


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of unbroken runs of all commands in one process."""
    out = tmp_path_factory.mktemp("whole")
    server.succeed(1, *(server.argv(command, out) for command in COMMANDS))
    return out


def contents(folder: Path, pattern: str = "*") -> dict[str, Any]:
    """Every file but a trained model and its manifest, without the seconds of the manifests."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.glob(pattern) if "trained" not in p.name):
        value: Any = path.read_bytes()
        if path.suffix == ".json":
            value = {k: v for k, v in json.loads(value).items() if k != "seconds"}
        found[path.name] = value
    return found


RESULT = {"generate": "samples*", "score": "scored*", "curate": "curated*", "evaluate": "evaluat*"}


def partial(out: Path, command: str) -> Path:
    name = {"generate": "samples.parquet", "score": "scored.jsonl", "train": "trained"}.get(command)
    return out / f".{name or 'evaluation'}.json.partial"


def readied(command: str, whole: Path, out: Path) -> Path:
    """A copy of what a command reads, and nothing that it makes."""
    for pattern in {"score": ["samples*"], "train": ["curated*"]}.get(command, []):
        for path in whole.glob(pattern):
            shutil.copy(path, out)
    return out


# --- the results of one process --------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_give_what_one_gives(
    world: int, server: Server, whole: Path, tmp_path: Path
):
    commands = [server.argv(c, tmp_path) for c in COMMANDS if c != "train"]
    done = server.succeed(world, *commands, judge_in_workers=world == 2)
    assert contents(tmp_path) == contents(whole)
    # Nothing is left over, and only the first speaks.
    assert not list(tmp_path.glob(".*"))
    assert "evaluate: " in done["output"][0] and "vote: " in done["output"][0]
    assert all("sample" not in text and "curate" not in text for text in done["output"][1:])


def test_each_process_does_a_share(server: Server, whole: Path, tmp_path: Path):
    """Not the first all of it: where both wait at their second batch, both have done one."""
    event = {"rank": "all", "function": "generate.complete", "call": 2, "what": "wait"}
    server(2, server.argv("generate", tmp_path), events=[event], kill_when=2)
    assert len(list(partial(tmp_path, "generate").glob("parts/*.parquet"))) == 2
    # In the second command, too, which is another share.
    event = {"rank": "all", "function": "score._token_log_probs", "call": 17, "what": "wait"}
    both = [server.argv(command, tmp_path) for command in ("generate", "score")]
    server(2, *both, events=[event], kill_when=2)
    assert len(list(partial(tmp_path, "score").glob("parts/*.parquet"))) == 2


@pytest.mark.parametrize(("begun", "continued"), [(4, 2), (2, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_killed_run_continues_with_another_number_of_processes(
    command: str, begun: int, continued: int, server: Server, whole: Path, tmp_path: Path
):
    readied(command, whole, tmp_path)
    # So many calls of the function make a part. Each process does one part, but those for whom there
    # are not two of the six parts of the scores.
    calls = {"generate": 1, "score": 16}[command]
    few = command == "score" and begun > 2
    events = [
        {
            **{"rank": rank, "function": BUSY[command], "what": "wait"},
            "call": 3 if few and rank > 1 else calls + 1,
        }
        for rank in range(begun)
    ]
    argv = server.argv(command, tmp_path)
    killed = server(begun, argv, events=events, kill_when=begun)
    assert killed["status"] == [-signal.SIGKILL] * begun, killed["output"]
    parts = list(partial(tmp_path, command).glob("parts/*.parquet"))
    assert len(parts) == (2 if few else begun)
    # What is there is not made again: there are not that many calls left.
    left = {"generate": 12, "score": 96}[command] - len(parts) * calls
    event = {"rank": "all", "function": BUSY[command], "call": left + 1, "what": "bug"}
    server.succeed(continued, argv, events=[event])
    assert contents(tmp_path, RESULT[command]) == contents(whole, RESULT[command])
    assert not list(tmp_path.glob(".*"))


def test_a_finished_command_does_nothing(server: Server, whole: Path, tmp_path: Path):
    out = shutil.copytree(whole, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    server.succeed(2, *(server.argv(command, out) for command in COMMANDS if command != "train"))
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "what", "rank"),
    [
        # Every pair of command and failure, and either process for each of both.
        (command, what, (i + j) % 2)
        for i, command in enumerate(["generate", "score", "evaluate"])
        for j, what in enumerate(["kill", "bug", "full", "interrupt"])
    ],
)
def test_a_process_that_fails_ends_the_others(
    command: str, what: str, rank: int, server: Server, whole: Path, tmp_path: Path
):
    readied(command, whole, tmp_path)
    argv = server.argv(command, tmp_path)
    # The other waits, or it might have done all before this one comes to its first batch.
    common = {"function": BUSY[command], "call": 1}
    events = [
        {"rank": rank, "what": what, **common},
        {"rank": 1 - rank, "what": "slow", "after": rank, **common},
    ]
    done = server(2, argv, events=events, limit=30)
    own, other = done["status"][rank], done["status"][1 - rank]
    assert own == {"kill": -signal.SIGKILL, "bug": 71, "full": 2, "interrupt": 130}[what]
    assert other == 1, done["output"]
    text = done["output"][1 - rank]
    failed = {"score": "scoring"}.get(command, "sampling")
    said = {"bug": "a bug", "full": "--model "}.get(what)
    if said is not None:
        assert f"topr: process {rank} of 2 failed: {said}" in text
        assert what == "bug" or f": {failed} failed: disk is full" in text
    else:
        assert f"process {rank} of 2 failed" in text or "lost another one" in text
    assert "the same command continues" in text and "Traceback" not in text
    assert not list(tmp_path.glob(RESULT[command].replace("*", ".json")))
    server.succeed(2, argv)
    assert contents(tmp_path, RESULT[command]) == contents(whole, RESULT[command])


def test_the_others_stop_at_their_next_batch(server: Server, tmp_path: Path):
    events = [
        {"rank": 0, "function": "generate.complete", "call": 1, "what": "slow", "after": 1},
        {"rank": 1, "function": "generate.complete", "call": 1, "what": "bug"},
    ]
    done = server(2, server.argv("generate", tmp_path), events=events, limit=30)
    assert done["status"] == [1, 71]
    # One batch was under way; nine more were to do.
    assert len(list(partial(tmp_path, "generate").glob("parts/*.parquet"))) <= 1


def test_an_interrupted_process_does_not_wait_for_the_batch_of_another(
    server: Server, tmp_path: Path
):
    events = [
        {"rank": 0, "function": "generate.complete", "call": 1, "what": "wait"},
        {"rank": 1, "function": "generate.complete", "call": 2, "what": "interrupt", "after": 0},
    ]
    argv = server.argv("generate", tmp_path)
    done = server(2, argv, events=events, judge_in_workers=True, limit=10)
    assert done["status"] == [None, 130]


@pytest.mark.parametrize("function", ["commands.write_records", "steps.write_or_check_settings"])
@pytest.mark.parametrize("what", ["kill", "full"])
def test_the_others_do_not_wait_for_a_first_that_failed(
    function: str, what: str, server: Server, tmp_path: Path
):
    event = {"rank": 0, "function": function, "call": 1, "what": what}
    done = server(3, server.argv("generate", tmp_path), events=[event], limit=30)
    assert done["status"] == [2 if what == "full" else -signal.SIGKILL, 1, 1], done["output"]
    assert not (tmp_path / "samples.parquet").exists()


def test_a_process_that_says_nothing_is_not_waited_for_for_ever(server: Server, tmp_path: Path):
    event = {"rank": 1, "function": "generate.complete", "call": 1, "what": "wait"}
    done = server(2, server.argv("generate", tmp_path), events=[event], patience=2, limit=15)
    assert done["status"][0] == 1 and "said nothing for 0:00:02" in done["output"][0]


def test_other_settings_are_refused_by_all(server: Server, whole: Path, tmp_path: Path):
    out = shutil.copytree(whole, tmp_path / "copy")
    done = server(2, server.argv("generate", out, "--seed", "5"), limit=30)
    assert done["status"] == [2, 1]
    assert all("--seed: 0 there, 5 now" in text for text in done["output"])
    assert contents(out) == contents(whole)


def test_one_run_holds_one_result(server: Server, tmp_path: Path):
    """The lock is of the run: its own processes pass it, others do not."""
    with steps.locked(partial(tmp_path, "generate")):
        done = server(2, server.argv("generate", tmp_path), limit=30)
    assert done["status"] == [2, 1]
    assert all("another process is working there" in text for text in done["output"])


def test_a_process_that_outlives_its_first_one_keeps_the_folder(
    server: Server, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It may be in the middle of a batch, whose file the next run would write at the same time."""
    events = [
        {"rank": 1, "function": "generate.complete", "call": 1, "what": "wait"},
        {"rank": 0, "function": "generate.complete", "call": 2, "what": "kill", "after": 1},
    ]
    argv = server.argv("generate", tmp_path)
    server.send(2, argv, events=events, judge_in_workers=True, limit=15)
    folder = partial(tmp_path, "generate")
    wait_for(lambda: (server.folder / "waits-1").exists())
    wait_for(lambda: len(list(folder.glob("parts/*.parquet"))) == 1)
    wait_for(lambda: not is_locked(folder))
    assert main(argv) == 2
    assert "another process is working there" in capsys.readouterr().err
    assert server.receive()["status"] == [-signal.SIGKILL, None]
    assert main(argv) == 0
    assert contents(tmp_path) == contents(whole, "samples*")


def is_locked(folder: Path) -> bool:
    try:
        with steps.locked(folder):
            return False
    except SettingsError:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- training --------------------------------------------------------------------------------


def weights(out: Path, name: str = "trained") -> dict[str, torch.Tensor]:
    return dict(load_file(out / name / "model.safetensors"))


def test_training_in_several_processes_takes_the_updates_of_one(
    server: Server, whole: Path, tmp_path: Path
):
    readied("train", whole, tmp_path)
    done = server.succeed(2, server.argv("train", tmp_path))
    one, two = (json.loads((f / "trained.json").read_text()) for f in (whole, tmp_path))
    assert two["figures"].pop("processes") == 2
    assert {k: v for k, v in one.items() if k not in ("figures", "outputs", "seconds")} == {
        k: v for k, v in two.items() if k not in ("figures", "outputs", "seconds")
    }
    assert one["figures"]["steps"] == two["figures"]["steps"] == 10
    for before, after in zip(one["figures"]["history"], two["figures"]["history"], strict=True):
        for name in ("loss", "grad_norm", "objective", "log_ratio_negative_min", "learning_rate"):
            if name in before:
                assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4), name
    assert_near(weights(tmp_path), weights(whole))
    assert not list(tmp_path.glob(".*")) and "train" not in done["output"][1]


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the order in which sums over sequences are rounded."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6)


def test_records_that_are_no_multiple_of_the_batch_are_all_trained_on(
    server: Server, whole: Path, tmp_path: Path
):
    """The last update of an epoch is filled up from its first records."""
    readied("train", whole, tmp_path)
    argv = server.argv("train", tmp_path, "--batch-size", "8", "--epochs", "1")
    server.succeed(2, argv)
    two = json.loads((tmp_path / "trained.json").read_text())["figures"]["history"]
    (tmp_path / "one").mkdir()
    readied("train", whole, tmp_path / "one")
    argv = server.argv("train", tmp_path / "one", "--batch-size", "8", "--epochs", "1")
    server.succeed(1, argv)
    one = json.loads((tmp_path / "one" / "trained.json").read_text())["figures"]["history"]
    assert len(one) == len(two) == 3
    assert [e["loss"] for e in two[:2]] == pytest.approx([e["loss"] for e in one[:2]], rel=1e-4)


@pytest.mark.parametrize(("begun", "continued"), [(2, 1), (1, 2)])
def test_a_killed_training_continues_with_another_number_of_processes(
    begun: int, continued: int, server: Server, whole: Path, tmp_path: Path
):
    readied("train", whole, tmp_path)
    event = {
        "rank": "all",
        "function": "train.TOPRTrainer.training_step",
        "call": 7,
        "what": "wait",
    }
    argv = server.argv("train", tmp_path)
    killed = server(begun, argv, events=[event], kill_when=begun)
    assert killed["status"] == [-signal.SIGKILL] * begun, killed["output"]
    assert list(partial(tmp_path, "train").glob("checkpoints/checkpoint-6"))
    # Four updates are left.
    event |= {"call": 5, "what": "bug"}
    server.succeed(continued, argv, events=[event])
    assert_near(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("what", ["kill", "bug"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_in_training_ends_the_others(
    what: str, rank: int, server: Server, whole: Path, tmp_path: Path
):
    readied("train", whole, tmp_path)
    event = {"rank": rank, "function": "train.TOPRTrainer.training_step", "call": 3, "what": what}
    argv = server.argv("train", tmp_path)
    done = server(2, argv, events=[event], limit=30)
    assert done["status"][rank] == (-signal.SIGKILL if what == "kill" else 71)
    assert done["status"][1 - rank] in (1, 71), done["output"]
    assert not (tmp_path / "trained").exists()
    server.succeed(2, argv)
    assert_near(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--batch-size", "5"], {}, "batch_size: got 5 with 2 processes; expected a multiple"),
        (
            [],
            {"ACCELERATE_USE_FSDP": "true"},
            "the launcher shards the model (ACCELERATE_USE_FSDP)",
        ),
    ],
)
def test_a_training_that_would_not_be_that_of_one_process_is_refused(
    flags: list[str], env: dict[str, str], message: str, server: Server, whole: Path, tmp_path: Path
):
    readied("train", whole, tmp_path)
    done = server(2, server.argv("train", tmp_path, *flags), env=env, limit=30)
    assert done["status"] == [2, 2] and all(message in text for text in done["output"])
    assert not list(tmp_path.glob(".*"))


# --- iterations ------------------------------------------------------------------------------


def iterate(server: Server, out: Path) -> list[str]:
    return [
        *("iterate", *TASK, "--samples", "4", "--sample-batch", "8", "--batch-size", "4"),
        *("--save-steps", "1", "--eval-samples", "4", "--votes", "3", "--iterations", "2"),
        *("--no-dedupe", "--method", "anna-karenina", "--size", "20", "--positive-share", "0"),
        *("--epochs", "1"),
        *("--lr", "1e-4", "--model", str(server.model), "--out", str(out)),
    ]


def test_iterations_in_several_processes(server: Server, tmp_path: Path):
    """Killed in the training of the second, continued by another number, and left alone when done."""
    out = tmp_path / "run"
    event = {
        "rank": "all",
        "function": "train.TOPRTrainer.training_step",
        "call": 7,
        "what": "wait",
    }
    killed = server(2, iterate(server, out), events=[event], kill_when=2)
    assert killed["status"] == [-signal.SIGKILL] * 2, killed["output"]
    assert (out / "iteration-1" / "manifest.json").exists()
    assert list((out / "iteration-2").glob(".model-2.json.partial/checkpoints/checkpoint-*"))
    done = server.succeed(2, iterate(server, out))
    assert "pass@1" in done["output"][0] and "iteration 1" not in done["output"][1]
    report = json.loads((out / "report.json").read_text())["iterations"]
    assert [entry["iteration"] for entry in report] == [0, 1, 2]
    for i in (1, 2):
        records = read_records(out / f"iteration-{i}" / "samples.parquet")
        assert [r.group for r in records] == [n // 4 for n in range(96)]
    # What one process makes of the same settings, up to the first training, is the same.
    alone = tmp_path / "alone"
    event = {"rank": 0, "function": "commands.train", "call": 1, "what": "interrupt"}
    assert server(1, iterate(server, alone), events=[event])["status"] == [130]
    for name in ("iteration-0/evaluation.parquet", "iteration-1/curated.parquet"):
        assert (alone / name).read_bytes() == (out / name).read_bytes()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    server.succeed(1, iterate(server, out))
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert {p.name for p in before if before[p] != after[p]} <= {"report.json"}


# --- launchers and environments --------------------------------------------------------------


def test_a_launcher_starts_it_as_a_module(server: Server, whole: Path, tmp_path: Path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "topr_kernels.recipe"),
        *server.argv("generate", tmp_path),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("generate: ") == 1
    assert contents(tmp_path) == contents(whole, "samples*")


def test_a_dry_run_and_the_demo_are_of_one_process(server: Server, tmp_path: Path):
    done = server.succeed(2, server.argv("generate", tmp_path / "new", "--dry-run"))
    assert "96 samples" in done["output"][0] and done["output"][1] == ""
    assert not (tmp_path / "new").exists()
    done = server(2, ["demo", "--quick", "--out", str(tmp_path / "demo")])
    assert (
        done["status"] == [2, 2] and "processes: got 2; topr demo runs in one" in done["output"][0]
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE='2', RANK=None; expected whole numbers"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "got WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 without MASTER_ADDR; start"),
    ],
)
def test_an_environment_that_is_not_sound_is_refused(
    env: dict[str, str], message: str, server: Server, tmp_path: Path
):
    done = server(1, server.argv("generate", tmp_path), env=env)
    assert done["status"] == [1] and message in done["output"][0]


def test_one_process_of_a_launcher_is_a_process(server: Server, whole: Path, tmp_path: Path):
    """WORLD_SIZE=1 starts no group: there need not be an address."""
    server.succeed(1, server.argv("generate", tmp_path), env={"WORLD_SIZE": "1", "RANK": "0"})
    assert contents(tmp_path) == contents(whole, "samples*")


def test_training_needs_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(commands, "current", lambda: processes.Processes(0, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match=r"processes: got 4 on a machine of 2 GPU\(s\)"):
        commands.check_training_processes(8)
    # On two machines.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    commands.check_training_processes(8)


def test_vllm_is_of_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "choose_backend", lambda *_: "vllm")
    backend = importlib.import_module("topr_kernels.recipe.vllm_backend")
    monkeypatch.setattr(backend, "stored_dtype", lambda _: "float32")
    settings = GenerateSettings(backend="auto")
    assert sampling.with_backend(settings).backend == "vllm"
    monkeypatch.setattr(sampling, "current", lambda: processes.Processes(0, 2))
    assert sampling.with_backend(settings).backend == "hf"
    with pytest.raises(SettingsError, match="backend: got 'vllm' in 2 processes"):
        sampling.with_backend(dataclasses.replace(settings, backend="vllm"))
