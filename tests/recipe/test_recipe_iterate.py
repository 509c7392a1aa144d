"""``topr iterate``: what it leaves, and that a kill at any moment changes nothing of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from processes import call
from tiny import save, tiny_model

from topr_kernels.recipe import commands, read_records
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.files import checksum
from topr_kernels.recipe.tasks import Task

KILLED = ["time-1", "time-2", "time-3", "moves-1", "moves-2"]
CONFIG = """\
task: chain_sum
task_config: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
questions: 12
held_out: 6
max_new_tokens: 6
samples: 4
sample_batch: 16
batch_size: 4
save_steps: 1
size: 16
eval_samples: 4
votes: 3
lr: 1e-4
positive-share: 0.3
dedupe: false
iterations: 2
"""


def iterate(argv: list[str]) -> int:
    """``main`` in a process that may be killed."""
    # Each would start workers anew, which takes a second of the processor.
    Task.in_process = True  # type: ignore[attr-defined]
    return main(argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    path = tmp_path_factory.mktemp("config") / "recipe.yaml"
    path.write_text(CONFIG + f"model: {model}\n")
    return path


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Folder with one run per case, and how often each was killed."""
    folder, kills = tmp_path_factory.mktemp("runs"), {}
    for case in ("whole", *KILLED):
        argv = ["iterate", "--config", str(config), "--out", str(folder / case)]
        job = {"function": "test_recipe_iterate.iterate", "argv": argv, "moves": 4, "seconds": 0.3}
        kills[case] = call("pipeline.kill_until_done", case=case, **job)
    return folder, kills


@pytest.fixture(scope="module")
def whole(runs: tuple[Path, dict[str, int]]) -> Path:
    """Folder of the unbroken run."""
    return runs[0] / "whole"


@pytest.mark.parametrize("case", ["whole", "moves-1", "time-1"])
@pytest.mark.parametrize(
    ("argv", "limit", "message"), [("x", 60, "TypeError: 'str'"), (100, 0.1, "status None")]
)
def test_a_run_that_fails_or_hangs_says_so(case: str, argv: Any, limit: float, message: str):
    """The helper of these tests, with ``time.sleep`` for the command."""
    job = {"function": "time.sleep", "argv": argv, "moves": 4, "seconds": 0.02, "limit": limit}
    with pytest.raises(AssertionError, match=message):
        call("pipeline.kill_until_done", case=case, **job)


def contents(folder: Path) -> dict[str, Any]:
    """Every file, without the seconds that the manifests tell."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        value: Any = path.read_bytes()
        if path.suffix == ".json" and "model-" not in path.parent.name:
            value = json.loads(value)
            value.pop("seconds", None)
        found[path.relative_to(folder).as_posix()] = value
    return found


def test_an_iteration_learns_from_the_samples_of_the_last_model(whole: Path, model: Path):
    """mu_i = pi_(i-1): sampled by it, scored by it, and trained on from it."""
    manifests = [
        json.loads((whole / f"iteration-{i}" / "manifest.json").read_text()) for i in (1, 2)
    ]
    first, second = (m["inputs"] for m in manifests)
    trained = checksum(whole / "iteration-1" / "model-1")
    for step in ("generate", "score", "train"):
        assert first[step]["model"] == {"file": "tiny", "sha256": checksum(model)}
        assert second[step]["model"] == {"file": "model-1", "sha256": trained}
    assert first["evaluate"]["model"]["sha256"] == trained
    one, two = (read_records(whole / f"iteration-{i}" / "samples.parquet") for i in (1, 2))
    assert [r.prompt for r in one] == [r.prompt for r in two]
    assert {r.sampling.model for r in one} == {"tiny"}
    assert {r.sampling.model for r in two} == {"model-1"}
    assert one[0].sampling.seed != two[0].sampling.seed
    assert len({r.sampling.weights for r in one + two}) == 2
    # Before its first update the policy is mu, to the noise of another packing.
    for i in (1, 2):
        history = json.loads((whole / f"iteration-{i}" / f"model-{i}.json").read_text())["figures"]
        assert abs(history["history"][0]["log_ratio_negative_min"]) < 1e-4
    report = json.loads((whole / "report.json").read_text())["iterations"]
    assert [entry["iteration"] for entry in report] == [0, 1, 2]
    assert report[1:] == [m["figures"] for m in manifests]
    for m, folder in zip(manifests, ("iteration-1", "iteration-2"), strict=True):
        assert set(m["settings"]) == {"generate", "score", "curate", "train", "evaluate"}
        assert all(checksum(whole / folder / n) == sha for n, sha in m["outputs"].items())
    for path in whole.rglob("*.json"):
        assert str(model.parent) not in path.read_text()


def times(folder: Path) -> dict[Path, int]:
    """When each file but the report was written."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "report.json"]
    return {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize("case", KILLED)
def test_kills_change_nothing(case: str, runs: tuple[Path, dict[str, int]], whole: Path):
    """At random moments ("time"), and just before or after a file takes its place ("moves")."""
    folder, kills = runs
    assert kills[case] >= (10 if case.startswith("moves") else 5)
    assert contents(folder / case) == contents(whole)
    # Said once more of what matters most: no record lost, none repeated.
    for i in (1, 2):
        records = read_records(folder / case / f"iteration-{i}" / "samples.parquet")
        assert [r.group for r in records] == [n // 4 for n in range(48)]


def test_flags_override_the_file_and_a_finished_run_is_left_alone(
    whole: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = times(out)
    command = ["iterate", "--config", str(config), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed and "maj@3" in printed and "base" in printed
    assert times(out) == before and contents(out) == contents(whole)
    assert main([*command, "--lr", "0.5", "--no-dedupe"]) == 2
    error = capsys.readouterr().err
    assert "--lr: 0.0001 there, 0.5 now" in error and "dedupe" not in error
    assert main([*command, "--dry-run"]) == 0
    assert "2 iterations, 2 of them done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("iteration-1/samples.parquet", "not as it was written"),
        ("iteration-1/model-1/model.safetensors", "model-1: not as it was written"),
        ("iteration-2/curated.parquet.json", "not JSON"),
        ("iteration-1/manifest.json", "not JSON"),
        ("iteration-0/evaluation.json", "not JSON"),
        ("settings.json", "damaged"),
    ],
)
def test_damaged_files_are_named(
    victim: str, message: str, whole: Path, config: Path, tmp_path: Path, capsys: Any
):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / victim
    path.write_bytes(path.read_bytes()[:-7])
    assert main(["iterate", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and Path(victim).parts[0] in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("questions: [1, 2]", "questions: got [1, 2]; expected a text, a number, true or false"),
        ("- questions", "got a list; expected a mapping of flags"),
        ("a: b: c", "not YAML"),
        ("votes: 9", "votes: got 9; expected at most eval_samples, 8"),
    ],
)
def test_bad_config_files_are_refused(text: str, message: str, tmp_path: Path, capsys: Any):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["iterate", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert main(["iterate", "--config", str(tmp_path / "none.yaml"), "--out", "x"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_unknown_keys_are_refused_as_unknown_flags_are(tmp_path: Path, capsys: Any):
    path = tmp_path / "recipe.yaml"
    path.write_text("questionz: 3")
    assert main(["iterate", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    told = "recipe.yaml, questionz: topr iterate has no such flag; did you mean questions?"
    assert told in capsys.readouterr().err


def test_a_start_that_failed_binds_nobody(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    command = ["iterate", "--config", str(config), "--out", str(out)]
    (tmp_path / "empty").mkdir()
    assert main([*command, "--model", str(tmp_path / "empty")]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert not out.exists()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # In the middle of the first step, which leaves its settings.
    with monkeypatch.context() as first:
        first.setattr(commands, "sample_task", interrupted)
        assert main(command) == 130
    assert list(out.glob("iteration-0/.*.partial/settings.json"))
    assert main([*command, "--lr", "0.5", "--dry-run"]) == 0
    assert main([*command, "--iterations", "1", "--lr", "0.5"]) == 0


def test_more_iterations_follow_those_done(whole: Path, config: Path, tmp_path: Path, capsys: Any):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in ("iteration-2", "iteration-1/manifest.json", "report.json"):
        victim = out / path
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    command = ["iterate", "--config", str(config), "--out", str(out)]
    assert main([*command, "--iterations", "1"]) == 0
    before = times(out)
    assert main(command) == 0
    after = times(out)
    assert {p: t for p, t in after.items() if p in before} == before
    assert contents(out) == contents(whole)
    # A dry run looks at the settings as the command does.
    assert main([*command, "--lr", "0.5", "--dry-run"]) == 2
    assert "--lr: 0.0001 there, 0.5 now" in capsys.readouterr().err


def test_a_seed_is_one_that_every_iteration_can_take(tmp_path: Path, capsys: Any):
    command = ["iterate", "--out", str(tmp_path / "run"), "--seed", "4000001"]
    assert main(command) == 2
    assert "seed: got 4000001; expected at most 4000000" in capsys.readouterr().err
