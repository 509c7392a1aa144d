"""Answers judged in worker processes: whatever they are, no file, no exception, no process is left."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scorers
import torch
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS
from scorers import Executes, InProcess

from topr_kernels.recipe import commands, scoring, voting
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.commands import plain_settings
from topr_kernels.recipe.files import checksum
from topr_kernels.recipe.generate import generate
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.records import Record, Sampling
from topr_kernels.recipe.rewards import RewardTask
from topr_kernels.recipe.sampling import said_problems
from topr_kernels.recipe.scoring import ScoringError, Verdict, count_problems, verdicts
from topr_kernels.recipe.settings import EvaluateSettings, GenerateSettings
from topr_kernels.recipe.task_files import find_task, find_tasks, scorer
from topr_kernels.recipe.tasks import ARITHMETIC, REFUSED, Question, Task

QUESTION = Question(0, "", "", {})
RECIPE = str(Path(scoring.__file__).parent)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def judged(*answers: str, task: Any = None, **limits: Any) -> list[Verdict]:
    asked = [(answer, "stop", QUESTION) for answer in answers]
    return verdicts(task or Executes(), asked, **limits)


def problem(answer: str, **limits: Any) -> str:
    return judged(answer, **limits)[0].problem


# --- verdicts --------------------------------------------------------------------------------


def test_workers_say_what_the_task_says():
    questions = ARITHMETIC.questions(40, seed=0)
    texts = [str(q.entry["answer"]) if q.group % 2 else "12 apples" for q in questions]
    asked = [(t, "length" if i % 5 == 0 else "stop", questions[i]) for i, t in enumerate(texts)]
    found = verdicts(ARITHMETIC, asked)
    for (text, reason, question), verdict in zip(asked, found, strict=True):
        answer = ARITHMETIC.parse(text, reason, question)
        form = None if answer is None else ARITHMETIC.canonical(answer)
        assert verdict == Verdict(answer, form, ARITHMETIC.reward(answer, question))
    assert Counter(v.reward for v in found) == {1.0: 16, -1.0: 24}
    assert verdicts(ARITHMETIC, []) == []


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("True", ""),
        ("1/0", "raised"),
        ("nan", "raised"),
        ("float('nan')", "raised"),
        ("exit()", "raised"),
        ("'a' * 2**31", "memory"),
        ("hang", "timed out"),
        ("9**9**9**9", "timed out"),
        ("fall", "died"),
        ("swallow", "refused operation"),
        ("'\\ud800'", ""),
        ("'x' * 10**6", ""),
    ],
)
def test_every_cause_has_its_name_and_costs_the_reward(answer: str, cause: str):
    (found,) = judged(answer, seconds=1.0)
    assert found.problem == cause
    if cause:
        assert found == Verdict(None, None, -1.0, cause)
    # The next answer finds workers as before.
    assert judged("True") == [Verdict("True", "True", 1.0)]


@linux
def test_what_sleeps_is_over_by_the_clock_and_cannot_ignore_it():
    start = time.monotonic()
    found = judged("sleep", "__import__('scorers').deaf()", seconds=0.25)
    assert [v.problem for v in found] == ["timed out"] * 2
    assert 1.0 <= time.monotonic() - start < 30


def test_a_hanging_answer_costs_its_limit_once_and_no_other_answer():
    judged("True")
    start = time.monotonic()
    found = judged("hang", *["True"] * 50, "fall", *["True"] * 50, seconds=2.0)
    assert Counter(v.problem for v in found) == {"": 100, "timed out": 1, "died": 1}
    assert found[0].problem == "timed out" and found[51].problem == "died"
    assert count_problems(found) == {"timed out": 1, "died": 1}
    # Not the limit of every answer behind it in the batch.
    assert time.monotonic() - start < 60


def test_a_worker_judges_many_answers_unless_they_may_be_executed():
    pids = {v.answer for v in judged(*["__import__('scorers').pid()"] * 20)}
    assert len(pids) <= 4
    task = Executes(one_worker_each=True)
    pids = {v.answer for v in judged(*["__import__('scorers').pid()"] * 20, task=task)}
    assert len(pids) == 20 and str(os.getpid()) not in pids


def test_an_executed_answer_that_writes_verdicts_changes_no_other():
    # It finds the pipe of its verdicts, and calls itself right, then whatever follows.
    verdict = json.dumps({"answer": "True", "form": "True", "reward": 1.0, "problem": ""})
    write = f"__import__('os').write(fd, {verdict.encode() + bytes([10])!r})"
    forge = (
        f"[({write}, __import__('time').sleep(0.01)) for fd in range(40, 2, -1) "
        "if __import__('os').path.exists(f'/proc/self/fd/{fd}') for _ in range(50)]"
    )
    found = judged(forge, *["2"] * 20, task=Executes(one_worker_each=True))
    assert [v.reward for v in found[1:]] == [-1.0] * 20


@linux
def test_an_executed_answer_opens_nothing_of_the_others(monkeypatch: Any):
    monkeypatch.setattr(scoring, "_processors", lambda: 2)
    task = Executes(one_worker_each=True)
    spy, _ = judged("__import__('scorers').spied()", "sleep", task=task, seconds=3.0)
    others, opened = ast.literal_eval(str(spy.answer))
    assert others >= 1 and opened == []


# --- what workers give up --------------------------------------------------------------------

_OS = "__import__('os')"


@pytest.mark.parametrize(
    "answer",
    [
        f"{_OS}.system('touch X')",
        "__import__('subprocess').run(['true'])",
        f"{_OS}.execv('/bin/true', ['true'])",
        f"{_OS}.fork()",
        f"{_OS}.posix_spawn('/bin/true', ['true'], {{}})",
        "open('X', 'w')",
        "open('X', 'ab')",
        "open('X', 'r+')",
        f"{_OS}.open('X', {_OS}.O_CREAT)",
        f"{_OS}.mkdir('X')",
        f"{_OS}.remove('X')",
        f"{_OS}.rename('X', 'Y')",
        f"{_OS}.kill({_OS}.getppid(), 9)",
        "__import__('socket').socket()",
        "__import__('ctypes').CDLL(None)",
        "__import__('shutil').rmtree('X')",
        "__import__('tempfile').mkdtemp()",
        "__import__('resource').setrlimit(1, (-1, -1))",
        "__import__('resource').prlimit(1, 1)",
    ],
)
def test_an_operation_that_no_scorer_needs_is_refused(
    answer: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    assert problem(answer) == "refused operation"
    assert not list(tmp_path.iterdir())


def test_workers_have_neither_the_environment_nor_the_folder(monkeypatch: Any):
    monkeypatch.setenv("API_KEY", "secret")
    scoring._stop()
    (found,) = judged(f"dict({_OS}.environ)")
    assert found.answer == "{}"
    (found,) = judged("open('/proc/self/environ').read()")
    assert "secret" not in str(found.answer)
    folder, inside = (v.answer for v in judged(f"{_OS}.getcwd()", f"{_OS}.listdir('.')"))
    assert folder != os.getcwd() and inside == "[]"


@linux
def test_the_kernel_refuses_what_passes_the_audit_hook():
    script = """
import ctypes, os, resource, socket, sys
sys.path.insert(0, sys.argv[1])
import confine
assert confine._filter_calls(ctypes.CDLL(None, use_errno=True))
libc = ctypes.CDLL(None, use_errno=True)
def call(name):
    if libc.syscall(confine._CALLS[name][os.uname().machine == 'aarch64'], 0, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), name)
def refused(work):
    try:
        work()
    except PermissionError:
        return True
    except OSError:
        pass
    return False
print([refused(work) for work in (
    lambda: open('X', 'w'), lambda: os.open('X', os.O_CREAT), lambda: os.mkdir('X'),
    lambda: os.unlink('/dev/null'), lambda: os.rename('/dev/null', 'X'), lambda: os.chmod('.', 0o777),
    lambda: os.truncate('/dev/null', 0), lambda: os.symlink('X', 'Y'), lambda: os.utime('.'),
    lambda: os.fork(), lambda: os.execv('/bin/true', ['true']), lambda: os.kill(os.getppid(), 0),
    lambda: socket.socket(), lambda: socket.socketpair(),
    lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0)),
    lambda: call('name_to_handle_at'), lambda: call('open_by_handle_at'), lambda: call('mq_open'),
)])
print(open('/etc/hostname').read() and 'reads')
"""
    done = subprocess.run([sys.executable, "-c", script, RECIPE], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str([True] * 18), "reads"], done.stderr


def test_where_the_kernel_filters_nothing_it_is_said_once(tmp_path: Path, monkeypatch: Any):
    # A server whose kernel refuses the filter.
    script = """
import sys
sys.path.insert(0, RECIPE)
import scoring_server
scoring_server._lighten()
import importlib
confine = importlib.import_module("topr_kernels.recipe.confine")
confine._filter_calls = lambda libc: False
scoring_server.main()
"""
    fake = tmp_path / "server.py"
    fake.write_text(script.replace("RECIPE", repr(RECIPE)))
    assert judged("True") == [Verdict("True", "True", 1.0)]
    scoring._stop()
    scoring._warn_unfiltered.cache_clear()
    monkeypatch.setattr(scoring.scoring_server, "__file__", str(fake))
    try:
        with pytest.warns(UserWarning, match="scoring: .*seccomp.* Run .* in a container"):
            found = judged("True")
        assert found == [Verdict("True", "True", 1.0, unfiltered=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Once is enough, and the audit hook stands.
            assert judged("open('X', 'w')")[0].problem == "refused operation"
    finally:
        scoring._stop()
        scoring._warn_unfiltered.cache_clear()
    assert said_problems([*found, Verdict(None, None, -1.0)])["unfiltered"] == 1


@linux
def test_nothing_outlives_the_process_that_asked():
    # A parent that speaks to the server itself: to import the package would take it seconds.
    script = """
import pickle, subprocess, sys, time
sys.path[:0] = sys.argv[1:]
import scoring_server
scoring_server._lighten()
from scorers import Executes
items = [pickle.dumps(("sleep", "stop", None))] * 4
order = dict(task=pickle.dumps(Executes()), path=sys.path, items=items)
order |= dict(seconds=60, memory=2**30, workers=4, each=0)
command = [sys.executable, "-I", scoring_server.__file__, "[]"]
server = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
scoring_server.write_frame(server.stdin, pickle.dumps(order))
print(server.pid, flush=True)
time.sleep(60)
"""
    folders = [RECIPE, str(Path(__file__).parents[1])]
    parent = subprocess.Popen([sys.executable, "-c", script, *folders], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while len(children(server)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    everyone = [server, *children(server)]
    assert len(everyone) == 5
    parent.kill()
    parent.communicate()
    while any(map(alive, everyone)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, everyone))


@linux
def test_a_server_that_is_killed_takes_its_workers_along_and_is_started_again():
    judged("True")
    server = scoring._running
    assert server is not None
    everyone: list[int] = [server._process.pid]

    def kill() -> None:
        everyone.extend(children(everyone[0]))
        os.kill(everyone[0], signal.SIGKILL)

    threading.Timer(1.0, kill).start()
    with pytest.raises(ScoringError, match="the server of the workers ended"):
        judged("sleep", "sleep", seconds=60)
    assert len(everyone) > 1
    deadline = time.monotonic() + 10
    while any(map(alive, everyone)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, everyone))
    assert judged("True")[0].reward == 1.0


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_batch_that_is_interrupted_leaves_no_server(monkeypatch: Any):
    judged("True")
    server = scoring._running

    def interrupt(stream: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "read_frame", interrupt)
    with pytest.raises(KeyboardInterrupt):
        judged("True")
    monkeypatch.undo()
    assert server is not None and not server.alive
    assert judged("2", "True")[1].reward == 1.0


# --- a task of one's own ---------------------------------------------------------------------


def test_a_task_is_asked_in_this_process_only_if_it_says_so():
    (found,) = judged("__import__('scorers').pid()", task=InProcess())
    assert found.answer == str(os.getpid())
    with pytest.raises(ZeroDivisionError):
        judged("1/0", task=InProcess())


def test_a_task_that_workers_cannot_have_is_refused_with_the_remedy():
    class Local(Executes):
        pass

    for task in (Local(), SimpleNamespace(parse=lambda *_: None)):
        with pytest.raises(ScoringError, match=r"workers cannot have .*in_process = True"):
            judged("True", task=task)
    assert judged("True")[0].reward == 1.0


# --- a reward of one's own -------------------------------------------------------------------


def test_a_function_of_ones_own_rewards_in_a_worker():
    options = GenerateSettings(task="countdown", reward="scorers:count_a")
    task, test = find_tasks(options)
    assert task == test == RewardTask(Task("countdown", trusted=tuple(REFUSED)), "scorers:count_a")
    (question,) = task.questions(1, seed=0)
    texts = [" banana\n", "none", "-", "boom"]
    found = verdicts(task, [(text, "stop", question) for text in texts])
    assert found == [
        Verdict("banana", "banana", 3.0),
        Verdict("none", "none", 0.0),
        Verdict(None, None, -1.0),
        Verdict(None, None, -1.0, "raised", detail=found[3].detail),
    ]
    assert found[3].detail.startswith("raised ValueError: ")
    assert verdicts(task, [("banana", "length", question)])[0].answer is None


def test_a_function_that_gives_no_number_costs_the_reward():
    task = RewardTask(ARITHMETIC, "scorers:gives")
    said = ("text", "list", "huge", "nan", "exit", "fork", "none", "print", "one")
    judged = verdicts(task, [(c, "stop", Question(0, "q", "q", {})) for c in said])
    assert [v.reward for v in judged] == [-1.0] * 7 + [1.0] * 2
    causes = [*["raised"] * 5, "refused operation", "", "", ""]
    assert [v.problem for v in judged] == causes
    assert judged[6].answer is None


def line_of(code: str) -> int:
    lines = Path(scorers.__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == code)


def test_what_a_function_raised_is_told_with_its_line():
    asked = ("typo", "library", "unshown", "long", "forged")
    task = RewardTask(ARITHMETIC, "scorers:errs")
    found = verdicts(task, [(text, "stop", QUESTION) for text in asked])
    typo, library, unshown, long, forged = (verdict.detail for verdict in found)
    lines = [line_of(code) for code in ('return entry["answr"]', 'return json.loads("{")')]
    assert typo == f"raised KeyError: 'answr' (scorers.py, line {lines[0]})"
    # The user's line, not json's.
    assert library.startswith("raised JSONDecodeError: Expecting ")
    assert library.endswith(f"(scorers.py, line {lines[1]})")
    assert unshown == "" and found[2].problem == "raised"
    assert long.startswith("raised RuntimeError: ?[2J??") and long.isprintable()
    assert len(long) < 300
    # What an executed answer writes in the place of a verdict is no more than such a line.
    assert forged.startswith("?[2J?[2J") and forged.isprintable() and len(forged) <= 500


def test_what_a_function_returned_in_place_of_a_number_is_told():
    task = RewardTask(ARITHMETIC, "scorers:gives")
    found = verdicts(task, [(text, "stop", QUESTION) for text in ("text", "list", "nan", "huge")])
    text, items, nan, huge = (verdict.detail for verdict in found)
    assert text == "returned 'right', a str; expected a number or None"
    assert items == "returned [1], a list; expected a number or None"
    assert nan == "returned nan, a float; expected a finite number or None"
    assert huge.endswith(", an int; expected a finite number or None") and len(huge) < 120
    # Other tasks are not asked.
    assert judged("1/0") == [Verdict(None, None, -1.0, "raised")]


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_function_that_always_fails_ends_the_run(
    command: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    sampling = Sampling("m", 1.0, 0, 1.0, 6, 0, "", "")
    texts: list[str] = []

    def sample(_: Any, task: Any, *__: Any, judged: list[Verdict], **___: Any) -> list[Record]:
        ends = ["length" if text == "cut" else "stop" for text in texts]
        judged += verdicts(task, [(t, e, QUESTION) for t, e in zip(texts, ends, strict=True)])
        return [
            Record(0, "", t, [1], [2], -1.0, e, sampling, None, "", False)
            for t, e in zip(texts, ends, strict=True)
        ]

    monkeypatch.setattr(commands, "sample_task", sample)
    shared = {"model": "m", "backend": "hf", "held_out": 1, "reward": "scorers:count_a"}

    def run(name: str) -> None:
        if command == "generate":
            commands.run_generate(
                GenerateSettings(**shared, questions=1), tmp_path / f"{name}.jsonl"
            )
        else:
            settings = EvaluateSettings(**shared, eval_samples=3, votes=1)
            commands.run_evaluate(settings, tmp_path / f"{name}.json")

    texts[:] = ["boom", "boom", "cut"]
    with pytest.raises(
        SettingsError,
        match=r"(?s)^--reward scorers:count_a: failed on all 2 answers; the first time it raised "
        r"ValueError \(scorers.py, line \d+\)\. Mend it .*delete the folder .*partial and run",
    ):
        run("all")
    assert not list(tmp_path.glob("all*"))
    texts[:] = ["boom", "-", "cut"]
    with pytest.warns(UserWarning, match="is right") as warned:
        run("some")
    said = str(warned[0].message)
    assert said.endswith("the scorer failed on 1 of them; mend that first")
    assert "1 raised; the first raised ValueError (" in capsys.readouterr().out


def test_a_manifest_names_the_function_and_its_file(tmp_path: Path, monkeypatch: Any):
    (tmp_path / "mine.py").write_text("def f(question, completion, entry): return 1.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = GenerateSettings(reward="mine:f", model="m")
    assert plain_settings(options)["reward"] == "mine:f" and "trust_scorer" not in plain_settings(
        options
    )
    known = scorer(options)
    assert known == {"reward": "mine:f", "reward_sha256": checksum(tmp_path / "mine.py")}
    # Without one a manifest is what it was.
    assert scorer(GenerateSettings()) == {} and not {"reward"} & set(
        plain_settings(GenerateSettings())
    )


@pytest.mark.parametrize("function", ["scorers", "scorers:none", "nowhere:f", ":f", "math:sqrt"])
def test_a_function_that_is_not_there_is_refused(function: str, capsys: Any):
    with pytest.raises(
        SettingsError, match=f"--reward {function}: reward: got '{function}'; expected"
    ):
        find_tasks(GenerateSettings(reward=function))
    argv = ["generate", "--reward", function, "--model", "none", "--out", "s.jsonl"]
    for flags in ([], ["--dry-run"]):
        assert main([*argv, *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"topr: --reward {function}: reward: ") and said.count("\n") == 1


def test_a_reward_is_tried_on_a_file(tmp_path: Path, capsys: Any):
    pairs = tmp_path / "pairs.jsonl"
    texts = ("banana", "none", "-", "boom")
    pairs.write_text("".join(json.dumps({"question": "q", "completion": t}) + "\n" for t in texts))
    argv = ["reward", "--reward", "scorers:count_a", "--try", str(pairs)]
    # One of them failed.
    assert main(argv) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "1: +3  'banana'",
        "2: +0  'none'",
        "3: no answer  '-'",
        f"4: raised ValueError: q (scorers.py, line {line_of('raise ValueError(question)')})  'boom'",
    ]
    assert (
        said[4] == "4 completions: 1 rewarded above 0, 1 no answer, 1 raised or returned no number"
    )
    for line in ('{"question": "q"}', "[1]", "{", '{"question": "q", "completion": 1}'):
        pairs.write_text(line)
        assert main(argv) == 2
        assert "pairs.jsonl, line 1: " in capsys.readouterr().err
    assert main([*argv[:2], "scorers:none", *argv[3:]]) == 2
    assert "--reward scorers:none" in capsys.readouterr().err


def test_a_file_of_another_editor_is_tried(tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setenv("HOME", str(tmp_path))
    pairs = tmp_path / "pairs.jsonl"
    line = b'{"question": "q", "completion": "a"}\r\n'
    pairs.write_bytes(b"\xef\xbb\xbf" + line + line + b"\r\n")
    argv = ["reward", "--reward", "scorers:count_a", "--try", "~/pairs.jsonl"]
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith("2 completions: 2 rewarded above 0, 0 no answer\n")
    for content, message in (
        (b"\xff\xfe", "not UTF-8 text"),
        (b"", "holds no completions"),
        (b"[" * 100_000, "pairs.jsonl, line 1: "),
    ):
        pairs.write_bytes(content)
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("body", ["def reward(:", "1 / 0", "raise SystemExit(3)"])
def test_a_module_that_cannot_be_imported_is_named(
    body: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    (tmp_path / "broken_reward.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["reward", "--reward", "broken_reward:reward", "--try", "pairs.jsonl"]
    for flags in ([], ["--debug"]):
        assert main([*argv, *flags]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("topr: --reward broken_reward:reward: reward: got ")
        assert (len(said) == 1) != bool(flags)


# --- reasoning-gym's scorers -----------------------------------------------------------------

#: They evaluate their own question and right answer, never the answer that is judged.
HARMLESS = {("bitwise_arithmetic", "problem"), ("number_sorting", "entry['answer']")}
OWN = ("metadata[", "entry[")


def evaluated(kind: type, function: Any, seen: set[Any]) -> Iterator[str]:
    """What a function, and those of reasoning-gym that it calls, evaluate: the first argument."""
    if function in seen:
        return
    seen.add(function)
    module = sys.modules[function.__module__]
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if not isinstance(node, ast.Call):
            continue
        call = node.func
        target: Any = None
        name = call.id if isinstance(call, ast.Name) else getattr(call, "attr", "")
        if isinstance(call, ast.Name):
            target = getattr(module, name, None)
        elif isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
            owner = (
                kind if call.value.id in ("self", "cls") else getattr(module, call.value.id, None)
            )
            target = getattr(owner, name, None)
        inner = list(vars(target).values()) if inspect.isclass(target) else [target]
        for one in filter(inspect.isfunction, inner):
            if one.__module__.startswith("reasoning_gym"):
                yield from evaluated(kind, one, seen)
        ours = inspect.isfunction(target) and target.__module__.startswith("reasoning_gym")
        if name in ("eval", "exec", "parse_expr", "sympify") and not ours:
            yield ast.unparse(node.args[0])


def test_every_installed_scorer_that_evaluates_the_answer_is_refused():
    found = {
        (name, what)
        for name, (kind, _) in DATASETS.items()
        for what in evaluated(kind, kind.score_answer, set())
        if not what.startswith(OWN) or (name, what) in HARMLESS
    }
    assert found >= HARMLESS, "the search finds nothing"
    executing = {name for name, _ in found - HARMLESS}
    assert executing == {name for name, why in REFUSED.items() if "as Python" in why}
    assert len(executing) >= 9 and set(DATASETS) >= set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_data_set_is_served_only_when_it_is_named(name: str):
    remedy = f"--trust-scorer {name}"
    with pytest.raises(SettingsError, match=f"{name}.* is refused: its scorer .*{remedy}"):
        find_task(name, "{}")
    with pytest.raises(SettingsError, match=remedy):
        find_tasks(GenerateSettings(test_task=name))
    trusted = ",".join({name, "countdown"})
    task = find_tasks(GenerateSettings(test_task=name, trust_scorer=trusted))[1]
    assert isinstance(task, Task) and task.one_worker_each


def test_a_composite_data_set_is_refused_for_its_parts():
    parts = {"datasets": [DatasetSpec(name, 1.0, {}) for name in ("chain_sum", "countdown")]}
    with pytest.raises(ValueError, match="'countdown' is refused"):
        Task("composite", parts)
    assert Task("composite", parts, trusted=("countdown",)).one_worker_each
    assert not Task("composite", {"datasets": parts["datasets"][:1]}).one_worker_each
    # A configuration of names, as JSON has it, is not one that reasoning-gym takes.
    with pytest.raises(ValueError, match="reasoning-gym refused 'composite'"):
        Task("composite", {"datasets": [{"name": "countdown"}]})


def test_trust_is_for_refused_data_sets_alone():
    with pytest.raises(
        SettingsError, match=r"trust_scorer: got 'chain_sum'; expected some of binary"
    ):
        find_task("chain_sum", "{}", "chain_sum")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no scorer of reasoning-gym judges arithmetic; leave it out, or name one .*countdown"),
        ({"task": "math:x.jsonl", "test_task": "arithmetic"}, "judges arithmetic and math:x"),
        (
            {"task": "countdown", "reward": "scorers:count_a"},
            "--reward scorers:count_a judges in place of all scorers; leave one of the two out",
        ),
    ],
)
def test_trust_without_effect_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=f"trust_scorer: got 'countdown', but .*{message}"):
        find_tasks(GenerateSettings(**options, trust_scorer="countdown"))


def test_a_setting_of_a_data_set_is_given_once():
    for config in ('{"max_terms": 2, "max_terms": 3}', '{"a": {"max_terms": 2, "max_terms": 3}}'):
        with pytest.raises(SettingsError, match="task_config: the key 'max_terms' is there twice"):
            find_task("chain_sum", config)
    assert isinstance(find_task("chain_sum", '{"min_terms": 2, "max_terms": 2}'), Task)


HOSTILE = [
    *("9**9**9**9", "[[9**9**9**9]]", "10**(10**9)", "x**x**x**9999999", "factorial(10**9)"),
    *("(" * 5000 + "1" + ")" * 5000, "sqrt(" * 300 + "2" + ")" * 300, "[" * 20000 + "]" * 20000),
    *("{" * 20000, "9" * 5000, "9" * 100000, "0" * 3000, "x" * 10**6, "1," * 10**5, "[0]*10**10"),
    *("'a'*10**10", "__import__('os').system('touch X')", "[__import__('os').system('touch X')]"),
    *("open('X','w')", "(lambda f:f(f))(lambda f:f(f))", "\0", "\ud800", "\U0001f600" * 1000),
    *("nan", "inf", "-inf", "nan+nanj", "1e999", "1/0", "None", "[]", "{}", "()", "\n\n", "²", "٣"),
    *(
        "two times three",
        "2 \u00d7 3 \u00d7 5",
        '{"a": 1}',
        "[NaN]",
        "[[]]",
        "[[1]",
        '"',
        "1e400j",
        "x=1",
    ),
]
#: They give no right answer, so theirs is text that their own scorers do not take.
NO_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
SERVED = sorted(set(DATASETS) - set(REFUSED) - {"composite"})
#: Those that hang or raise, and some of the others; all of them with the slow tests.
SOME = {*SERVED[::9], "boxnet", "game_of_life", "prime_factorization", "propositional_logic"}
SLOW = [
    pytest.param(n, marks=() if n in SOME - {"knight_swap"} else pytest.mark.slow) for n in SERVED
]


@pytest.mark.parametrize("name", SLOW)
def test_no_answer_harms(name: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    before = set(children(os.getpid()))
    task = Task(name)
    entries = [task._dataset(1, 7)[0]]
    questions = [Question(i, "", "", entry) for i, entry in enumerate(entries)]
    found = verdicts(task, [(a, "stop", q) for q in questions for a in HOSTILE], seconds=0.5)
    assert len(found) == len(HOSTILE) and not list(tmp_path.iterdir())
    assert all(v.reward == -1.0 for v in found if v.problem)
    gold = verdicts(task, [(str(q.entry["answer"]), "stop", q) for q in questions])
    assert all((v.reward == 1.0) != (name in NO_GOLD) for v in gold)
    # Other tests may have left servers of their own.
    left = set(children(os.getpid())) - before
    assert left <= {scoring._running._process.pid}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["countdown", "n_queens"])
def test_a_trusted_scorer_executes_in_a_worker(name: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    task = Task(name, trusted=(name,))
    (question,) = task.questions(1, seed=3)
    hostile = [a for a in HOSTILE if "touch" in a or "open" in a] + ["9**9**9**9"]
    found = verdicts(task, [(a, "stop", question) for a in hostile], seconds=0.5)
    assert [v.problem for v in found] == ["refused operation"] * 3 + ["timed out"]
    assert not list(tmp_path.iterdir())


# --- the pipeline ----------------------------------------------------------------------------


class _Tokenizer:
    """Of one token, for what ``generate`` asks of one besides sampling."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 1

    def batch_decode(self, ids: Any) -> list[str]:
        return ["a"]


def test_generate_counts_problems_and_a_resumed_run_counts_them_again(
    tmp_path: Path, monkeypatch: Any
):
    # The package's name of it is the function.
    module = sys.modules[generate.__module__]
    monkeypatch.setattr(module, "tokenizer_fingerprint", lambda _: "fingerprint")
    texts = ["fall", "True", "1/0", "1/0", "True", "True"]
    sampled: list[int] = []

    def sampler(model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[Any]:
        sampled.extend(map(int, prompts))
        return [module.Completion([1], [0], texts[int(p)], "stop") for p in prompts]

    questions = [Question(i, str(i), str(i), {}) for i in range(6)]

    def run() -> tuple[list[Any], list[Verdict]]:
        verdicts: list[Verdict] = []
        records = generate(
            torch.nn.Linear(1, 1),
            _Tokenizer(),
            Executes(),
            questions,
            model_name="m",
            samples=1,
            max_new_tokens=4,
            batch_size=2,
            seed=0,
            shards=tmp_path,
            sampler=sampler,
            progress=False,
            judged=verdicts,
        )
        return records, verdicts

    records, found = run()
    assert [r.reward for r in records] == [-1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
    assert [r.valid for r in records] == [False, True, False, False, True, True]
    assert [v.form for v in found] == [None, "True", None, None, "True", "True"]
    assert count_problems(found) == {"died": 1, "raised": 2}
    noted = sorted(p.name for p in tmp_path.glob("*.json"))
    assert noted == [f"batch-{i:05d}.verdicts.json" for i in range(3)]
    (tmp_path / "batch-00001.parquet").unlink()
    assert run() == (records, found) and sampled == [0, 1, 2, 3, 4, 5, 2, 3]
    # No answer of the batches that were found is judged again.
    monkeypatch.setattr(module, "verdicts", None)
    assert run() == (records, found)


def test_manifests_count_problems_of_answers_judged_once(
    tmp_path: Path, monkeypatch: Any, capsys: Any
):
    sampling = Sampling("m", 1.0, 0, 1.0, 6, 0, "", "")
    answer = Record(0, "", "1", [1], [2], -1.0, "stop", sampling, None, "", False)

    def sample(*_: Any, judged: list[Verdict], **__: Any) -> list[Record]:
        causes = ("timed out", "died", "timed out")
        judged += [Verdict(None, None, -1.0, cause, unfiltered=True) for cause in causes]
        return [answer] * 3

    monkeypatch.setattr(commands, "sample_task", sample)
    monkeypatch.setattr(voting, "verdicts", None)
    shared = {"model": "m", "backend": "hf", "questions": 1, "held_out": 1}
    commands.run_generate(GenerateSettings(**shared), tmp_path / "samples.jsonl")
    settings = EvaluateSettings(**shared, eval_samples=3, votes=1)
    commands.run_evaluate(settings, tmp_path / "evaluation.json")
    for name in ("samples.jsonl.json", "evaluation.json"):
        figures = json.loads((tmp_path / name).read_text())["figures"]
        assert figures["scorer_problems"] == {"died": 1, "timed out": 2}
        assert figures["unfiltered"] == 3
    assert capsys.readouterr().out.count("rewarded -1: 1 died, 2 timed out") == 2
