"""vLLM itself, as backend and as server: `make test-vllm`; not collected where it is not installed.

Some 18 minutes on two cores beside other work: the engine starts some 40 times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import contents
from processes import free_port
from tiny import save, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from vllm.engine.arg_utils import EngineArgs

from topr_kernels.recipe import SettingsError, read_records, score
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.settings import _ENGINE
from topr_kernels.recipe.vllm_backend import LEAST_TEMPERATURE, vllm_sampler

pytestmark = pytest.mark.timeout(900)
TESTS = Path(__file__).parents[1]
COMMON = ["--questions", "10", "--held-out", "2", "--backend", "vllm", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a size that has differences between fp32 and bf16."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    random_llama = LlamaForCausalLM(tiny_config(**shape)).eval()
    return save(random_llama, tmp_path_factory.mktemp("models") / "fp32")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    """URL of vLLM's own server of the model."""
    url = f"http://127.0.0.1:{free_port()}"
    argv = ["--model", str(model), "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    # Each batch by itself, and each answer: what samples with it changes its rounding.
    argv += ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
    argv += ["--max-num-seqs", "1"]
    process = subprocess.Popen(
        # Not `vllm serve`, which looks for a distribution named vllm.
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *argv],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not answers(url):
            assert process.poll() is None
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return True
    except OSError:
        return False


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(model), *COMMON, "--samples", "5", "--out", str(out), *more]


def start(argv: list[str]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, "-m", "topr_kernels.recipe", *argv],
        # Two workers cannot each have a memory node of their own on a small machine.
        env={**os.environ, "PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        stderr=subprocess.DEVNULL,
    )


def descendants(of: int) -> set[int]:
    """Ids of the processes that a process has started, and those have, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {of}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {of}


def alive(pids: set[int]) -> set[int]:
    """Those that are still there, but for what only waits to be reaped."""
    left = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        left |= {pid} if state != "Z" else set()
    return left


def test_the_settings_of_engine_are_those_of_vllm():
    assert set(_ENGINE) <= {field.name for field in fields(EngineArgs)}


def test_the_floor_of_the_temperature_is_that_of_vllm():
    from vllm import sampling_params

    assert LEAST_TEMPERATURE == sampling_params._MAX_TEMP


def test_what_vllm_says_of_its_tokens_is_what_score_says(model: Path, tmp_path: Path):
    out = tmp_path / "samples.parquet"
    assert main(arguments(model, out)) == 0
    records = read_records(out)
    assert len(records) == 50 and {r.sampling.dtype for r in records} == {"float32"}
    # Stop tokens are part of what was sampled; what was cut has none.
    stops = {t for t in range(len(tiny_tokenizer())) if "\n" in tiny_tokenizer().decode([t])} | {0}
    for record in records:
        *inner, last = record.completion_token_ids
        assert not stops & set(inner) and (last in stops) == (record.finish_reason == "stop")
        assert last in stops or len(record.completion_token_ids) == 6
    # Neither equal answers to a question asked several times, nor greedy ones.
    assert len({tuple(r.completion_token_ids) for r in records}) > 25
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scored = score(loaded, records, pad_token_id=0, batch_size=16, progress=False)
    worst = max(
        abs(x - y)
        for theirs, ours in zip(records, scored, strict=True)
        for x, y in zip(theirs.behavior_log_prob or (), ours.behavior_log_prob or (), strict=True)
    )
    print(f"largest difference of a token: {worst:.1e} nats")
    assert worst < 1e-3
    settings = json.loads(Path(f"{out}.json").read_text())["settings"]
    assert settings["engine"] == ["dtype=float32"]
    assert settings["vllm"] and settings["torch"] == torch.__version__


def test_another_dtype_is_another_policy_and_refused_by_score(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, scored = tmp_path / "samples.parquet", tmp_path / "scored.parquet"
    assert main(arguments(model, out, "--engine", "dtype=bfloat16")) == 0
    argv = ["score", "--model", str(model), "--records", str(out), "--out", str(scored)]
    assert main(argv) == 2
    assert "got 'bfloat16', but mu would be scored in 'float32'" in capsys.readouterr().err
    # What is refused: more than ten times the noise of fp32.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    from dataclasses import replace

    records = read_records(out)
    unknown = [replace(r, sampling=replace(r.sampling, dtype="")) for r in records]
    again = score(loaded, unknown, pad_token_id=0, batch_size=16, progress=False)
    worst = max(
        abs(x - y)
        for theirs, ours in zip(records, again, strict=True)
        for x, y in zip(theirs.behavior_log_prob or (), ours.behavior_log_prob or (), strict=True)
    )
    print(f"largest difference of a token in bf16: {worst:.1e} nats")
    assert worst > 1e-3


def test_a_model_stored_in_bf16_is_sampled_in_bf16(model: Path, tmp_path: Path):
    half = save(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), tmp_path / "bf16"
    )
    out = tmp_path / "samples.parquet"
    assert main(arguments(half, out)) == 0
    assert {r.sampling.dtype for r in read_records(out)} == {"bfloat16"}


def test_what_vllm_refuses_is_told(model: Path):
    with (
        pytest.raises(SettingsError, match="vLLM refused"),
        vllm_sampler(str(model), {"dtype": "float32", "max_model_len": 2000}) as sample,
    ):
        sample(
            *(None, tiny_tokenizer(), ["1 + 1 ="]),
            **{"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "stop_ids": [0]},
        )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_nothing_is_left_and_it_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, how: signal.Signals, workers: int
):
    # Eager: what takes its time is the start.
    more = ["--sample-batch", "5", "--engine", "enforce_eager=true"]
    more += ["--engine", f"tensor_parallel_size={workers}"]
    whole = start(arguments(model, tmp_path / "whole" / "samples.parquet", *more))
    began = time.monotonic()
    assert whole.wait() == 0
    seconds = time.monotonic() - began
    out = tmp_path / "killed" / "samples.parquet"
    argv, parts = arguments(model, out, *more), out.parent / f".{out.name}.json.partial" / "parts"
    # While the engine starts, and while it samples: after some of the ten batches.
    early = random.Random(f"{how} {workers}").uniform(0.1, 0.7) * seconds
    for batches in (0, 3):
        run = start(argv)
        began, seen = time.monotonic(), set()
        while run.poll() is None:
            seen |= descendants(run.pid)
            done = len(list(parts.glob("batch-*.parquet")))
            if done >= batches and (batches or time.monotonic() > began + early):
                break
            time.sleep(0.01)
        assert run.poll() is None
        run.send_signal(how)
        run.wait()
        killed = time.monotonic()
        while (left := alive(seen)) and time.monotonic() < killed + 20:
            time.sleep(0.2)
        assert not left
        lasted = time.monotonic() - killed
        print(f"{how.name} after {done} batches: none of {len(seen)} left after {lasted:.1f} s")
    assert start(argv).wait() == 0
    expected, found = (contents(tmp_path / name) for name in ("whole", "killed"))
    assert expected == found and "samples.parquet" in found


def by_server(model: Path, url: str, out: Path) -> list[str]:
    argv = ["generate", "--model", str(model), "--questions", "10", "--held-out", "2"]
    argv += ["--max-new-tokens", "6", "--samples", "5", "--sample-batch", "5"]
    return [*argv, "--server", url, "--out", str(out)]


def test_a_server_samples_from_the_model_that_scores(
    model: Path, server: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    out, scored = tmp_path / "samples.parquet", tmp_path / "scored.parquet"
    assert main(by_server(model, server, out)) == 0
    records = read_records(out)
    assert len(records) == 50 and all(r.behavior_log_prob is None for r in records)
    stops = {t for t in range(len(tiny_tokenizer())) if "\n" in tiny_tokenizer().decode([t])} | {0}
    for record in records:
        *inner, last = record.completion_token_ids
        assert not stops & set(inner) and (last in stops) == (record.finish_reason == "stop")
        assert last in stops or len(record.completion_token_ids) == 6
    assert len({tuple(r.completion_token_ids) for r in records}) > 25
    found = json.loads(Path(f"{out}.json").read_text())["figures"]["server"]
    print(found)
    assert (found["software"], found["token_ids"]) == ("vllm", "of the server") and found["version"]
    assert found["log_prob_difference"] < 1e-3
    assert not [w for w in recwarn if "--server" in str(w.message)]
    argv = ["score", "--model", str(model), "--records", str(out), "--out", str(scored)]
    assert main(argv) == 0 and {r.behavior_source for r in read_records(scored)} == {"score"}


def test_a_server_of_another_model_is_warned_of(model: Path, server: str, tmp_path: Path):
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    other = save(LlamaForCausalLM(tiny_config(**shape)), tmp_path / "other")
    with pytest.warns(UserWarning, match="differ from those of --model by .* nats on average"):
        assert main(by_server(other, server, tmp_path / "samples.parquet")) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_killed_while_a_server_samples_it_resumes_to_the_same_bytes(
    model: Path, server: str, tmp_path: Path, how: signal.Signals
):
    assert start(by_server(model, server, tmp_path / "whole" / "samples.parquet")).wait() == 0
    out = tmp_path / "killed" / "samples.parquet"
    parts = out.parent / f".{out.name}.json.partial" / "parts"
    for batches in (1, 3, 6):
        run = start(by_server(model, server, out))
        while run.poll() is None and len(list(parts.glob("batch-*.parquet"))) < batches:
            time.sleep(0.002)
        seen = descendants(run.pid)
        run.send_signal(how)
        print(f"{how.name} after {batches} batches: status {run.wait()}")
        nothing_left(seen)
    assert start(by_server(model, server, out)).wait() == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def nothing_left(seen: set[int]) -> None:
    """Waits until processes are gone, 20 s at most."""
    killed = time.monotonic()
    while (left := alive(seen)) and time.monotonic() < killed + 20:
        time.sleep(0.2)
    assert not left
    print(f"none of {len(seen)} left after {time.monotonic() - killed:.1f} s")


def figures_of(folder: Path) -> dict[str, Any]:
    """Every file of a run of iterate, without the seconds that its manifests tell."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        value: Any = path.read_bytes()
        if path.suffix == ".json" and not path.parent.name.startswith("model-"):
            value = json.loads(value)
            value.pop("seconds", None)
        found[path.relative_to(folder).as_posix()] = value
    return found


@pytest.mark.timeout(1500)
def test_iterate_killed_at_ten_random_points_gives_the_same_records(model: Path, tmp_path: Path):
    argv = ["iterate", "--model", str(model), "--backend", "vllm", "--iterations", "1"]
    argv += ["--questions", "8", "--held-out", "3", "--samples", "4", "--sample-batch", "8"]
    argv += ["--eval-samples", "2", "--votes", "1", "--max-new-tokens", "6", "--batch-size", "4"]
    argv += ["--save-steps", "1", "--reward", "scorers:by_length", "--no-dedupe"]
    argv += ["--engine", "enforce_eager=true"]
    began = time.monotonic()
    assert start([*argv, "--out", str(tmp_path / "whole")]).wait() == 0
    seconds = time.monotonic() - began
    draw, kills, case = random.Random(0), 0, 0
    while kills < 10:
        out = tmp_path / f"killed-{case}"
        # Up to half of what it takes in all. One that is done nevertheless is compared, the next begun.
        run, until = start([*argv, "--out", str(out)]), draw.uniform(0.02, 0.5) * seconds
        if not killed_after(run, until, draw.choice([signal.SIGKILL, signal.SIGTERM])):
            assert figures_of(tmp_path / "whole") == figures_of(out)
            case += 1
            continue
        kills += 1
    assert start([*argv, "--out", str(out)]).wait() == 0
    print(f"{kills} kills of {case + 1} runs, each {seconds:.0f} s if left alone")
    assert figures_of(tmp_path / "whole") == figures_of(out)


def killed_after(run: subprocess.Popen[bytes], seconds: float, how: signal.Signals) -> bool:
    """Kills a run and sees that nothing is left; False if it was done before."""
    until, seen = time.monotonic() + seconds, set()
    while run.poll() is None and time.monotonic() < until:
        seen |= descendants(run.pid)
        time.sleep(0.05)
    if run.poll() is not None:
        assert run.returncode == 0
        return False
    run.send_signal(how)
    run.wait()
    print(f"{how.name} after {seconds:.0f} s: ", end="")
    nothing_left(seen)
    return True
