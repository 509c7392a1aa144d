"""Everything that can be started is started by a test: a script that none runs dies unseen."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Entry point -> the test that runs it: ``file::function`` in tests.
RUN_BY = {
    "benchmarks/__main__.py": "benchmarks/test_benchmarks.py::test_the_runner_from_end_to_end",
    "benchmarks/demo_seeds.py": "benchmarks/test_scripts.py::test_the_demo_is_run_for_a_seed",
    # With a stub for python: what it starts needs a GPU, and is run on a CPU by other tests.
    "benchmarks/gpu_suite.sh": "benchmarks/test_benchmarks.py::test_the_gpu_suite",
    "benchmarks/hidden_states.py": (
        "benchmarks/test_scripts.py::test_hidden_states_are_sampled_and_checked"
    ),
    "benchmarks/learning/__main__.py": (
        "benchmarks/test_learning.py::test_every_grid_leaves_the_figures_that_were_asked_for"
    ),
    "benchmarks/learning/world/__main__.py": (
        "benchmarks/test_world.py::test_a_run_resumes_and_repeats_itself"
    ),
    "benchmarks/linear_gate.py": (
        "benchmarks/test_scripts.py::test_the_gate_trains_with_a_tolerance_and_without"
    ),
    "benchmarks/linear_tails.py": "benchmarks/test_scripts.py::test_treatments_of_the_tail_are_compared",
    "benchmarks/report.py": "test_readme.py::test_the_tables_are_those_that_were_measured",
    "docs/draw_update.py": "test_readme.py::test_the_picture_is_drawn",
    "examples/accelerate_loop.py": "hf/test_examples.py::test_two_processes_take_the_steps_of_one",
    "examples/agent.py": "hf/test_agent.py::test_the_agent_trains_on_what_it_wrote",
    "examples/ddp.py": "hf/test_examples.py::test_two_processes_take_the_steps_of_one",
    "examples/grpo.py": "hf/test_examples.py::test_grpo",
    "examples/images.py": "hf/test_examples.py::test_a_tiny_model_learns_to_count_in_pictures",
    "examples/loop.py": "hf/test_examples.py::test_it_scores_trains_and_saves",
    "examples/trainer.py": "hf/test_examples.py::test_it_scores_trains_and_saves",
    "setup.py": ("test_build.py::test_wheel_holds_a_library_that_needs_neither_python_nor_torch"),
    "tests/aot.py": "core/test_triton_aot.py::test_sm_90",
    "tests/golden_bits.py": "benchmarks/test_scripts.py::test_bits_are_compared",
    # Its table is tested; the whole is run by hand, an hour.
    "tests/mutants.py": "test_mutants.py::test_every_fault_can_still_be_made",
    "tests/specialisation.py": (
        "core/test_triton_aot.py::test_no_length_or_batch_size_needs_another_compilation"
    ),
    "topr_kernels/__main__.py": "core/test_report.py::test_the_report_of_this_installation",
    "tests/static_model.py": "core/test_triton_aot.py::test_the_static_model",
    "topr": "benchmarks/test_scripts.py::test_the_demo_is_run_for_a_seed",
    "topr_kernels/recipe/__main__.py": (
        "recipe/test_recipe_processes.py::test_a_launcher_starts_it_as_a_module"
    ),
    "topr_kernels/recipe/cli.py": (
        "recipe/test_recipe_demo.py::test_a_killed_run_resumes_to_the_same_records"
    ),
    "tests/every_model/__main__.py": (
        "hf/test_every_model.py::test_the_command_prints_the_verdicts_on_a_model"
    ),
    # Started by scoring.py.
    "topr_kernels/recipe/scoring_server.py": "recipe/test_recipe_scoring.py::test_no_answer_harms",
    # Started by vllm_backend.py, here with a stand-in for vLLM.
    "topr_kernels/recipe/vllm_process.py": (
        "recipe/test_recipe_tasks.py::test_the_engine_ends_with_whoever_started_it"
    ),
}
#: Entry point -> why no test can run it.
NOT_RUN = {
    ".ci/run": "it runs these tests",
    "tests/ptx/check_forms.py": "it writes the list anew that make test-ptx compares",
}


def is_entry_point(path: Path) -> bool:
    """Whether a file is there to be started: by its guard, its name, its ``main()`` or its ``#!``."""
    if path.suffix != ".py":
        return path.read_bytes()[:2] == b"#!"
    if path.name == "__main__.py":
        return True
    text = path.read_text(encoding="utf-8")
    return text.startswith("#!") or any(starts(node) for node in ast.parse(text).body)


def starts(node: ast.stmt) -> bool:
    """Whether a statement of a module is ``if __name__ == ...`` or a call of main or setup."""
    if isinstance(node, ast.If):
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    plain = not isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return plain and any(isinstance(f, ast.Name) and f.id in ("main", "setup") for f in called)


def console_scripts() -> dict[str, str]:
    """Name -> ``module:function`` of ``[project.scripts]``; Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]\n")[2].partition("\n[")[0]
    return dict(re.findall(r'^"?([\w.-]+)"? *= *"(.+)"', section, re.MULTILINE))


def entry_points() -> set[str]:
    """Files that git has, or would add, and console scripts."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    files = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    return {name for name in files if is_entry_point(ROOT / name)} | set(console_scripts())


def test_every_entry_point_is_run_by_a_test() -> None:
    found, listed = entry_points(), RUN_BY.keys() | NOT_RUN.keys()
    new, gone = sorted(found - listed), sorted(listed - found)
    assert not new, f"run {new} in a test, at a tiny size, and name the test in RUN_BY"
    assert not gone, f"there is no {gone} any more; take it out of RUN_BY"


@pytest.mark.parametrize("entry", RUN_BY)
def test_the_test_that_runs_it_is_there(entry: str) -> None:
    file, _, function = RUN_BY[entry].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("name", console_scripts())
def test_a_console_script_names_a_function(name: str) -> None:
    module, _, function = console_scripts()[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "def main(): ...\nif __name__ == '__main__':\n    main()\n", True),
        ("a.py", "import sys\nsys.exit(main())\n", True),
        ("a.py", "main()\n", True),
        ("__main__.py", "", True),
        ("a.py", "#!/usr/bin/env python\n", True),
        ("a.sh", "#!/bin/sh\n", True),
        ("a.py", "def f():\n    main()\n", False),
        ("a.md", "python a.py\n", False),
    ],
)
def test_entry_points_are_known(name: str, text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert is_entry_point(tmp_path / name) == expected
