"""Tasks from JSONL files, answers in free text, and the vLLM backend."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from tiny import save, tiny_model, tiny_tokenizer

from topr_kernels.recipe import FileTask, SettingsError, generate, read_records, score
from topr_kernels.recipe.answers import boxes
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.equality import canonical
from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.generate import prompt_token_ids, stop_token_ids
from topr_kernels.recipe.tasks import Question
from topr_kernels.recipe.vllm_backend import choose_backend, vllm_sampler

task_files = importlib.import_module("topr_kernels.recipe.task_files")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(path: Path, count: int = 12) -> Path:
    return write(
        path,
        [
            {
                "question": f"Ann has {i} apples and buys {2 * i}. How many?",
                "answer": f"{i} + {2 * i} = <<{i}+{2 * i}={3 * i}>>{3 * i}\n#### {3000 + i:,}",
            }
            for i in range(count)
        ],
    )


def question(answer: str) -> Question:
    return Question(0, "?", "?", {"question": "?", "answer": answer})


# --- files -----------------------------------------------------------------------------------


def test_gsm8k_lines_become_questions(tmp_path: Path):
    task = FileTask("gsm8k", gsm8k(tmp_path / "train.jsonl"))
    found = task.questions(12, seed=0)
    assert [q.group for q in found] == list(range(12))
    assert len({q.text for q in found}) == 12
    assert task.questions(12, seed=0) == found and task.questions(12, seed=1) != found
    assert all(q.text in q.prompt and '"The answer is: "' in q.prompt for q in found)
    entry = next(q for q in found if q.text.startswith("Ann has 7 ")).entry
    assert entry["answer"] == "3,007"
    left = task.questions(2, seed=0, exclude=[q.text for q in found[:10]])
    assert {q.text for q in left} == {q.text for q in found[10:]}
    with pytest.raises(ValueError, match=r"count: train\.jsonl holds only 12 distinct questions"):
        task.questions(13, seed=0)


def test_math_lines_become_questions(tmp_path: Path):
    rows = [
        {"problem": "One half?", "solution": r"It is \boxed{1}. No: $\boxed{\frac{1}{2}}$."},
        {"question": "Two?", "answer": 2},
    ]
    found = FileTask("math", write(tmp_path / "m.jsonl", rows)).questions(2, seed=0)
    assert {q.text: q.entry["answer"] for q in found} == {
        "One half?": r"\frac{1}{2}",
        "Two?": "2",
    }
    assert all(r"\boxed{}" in q.prompt for q in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"}', r"t\.jsonl, line 2, field 'answer': expected a text"),
        ('{"question": " ", "answer": "1"}', r"line 2, field 'question'"),
        ('{"question": "a", "ans', r"line 2: not a line of JSON .* half-written"),
        ("[1]", r"line 2: expected a JSON object, got list"),
        (
            '{"question": "a", "answer": "1", "answer": "2"}',
            r"line 2: JSON that cannot be read \(the key 'answer' is there twice; leave one",
        ),
        ('{"question": "a", "answer": true}', r"line 2, field 'answer'"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n' + line)
    with pytest.raises(FileError, match=message):
        FileTask("gsm8k", path).questions(1, seed=0)


# --- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So 3 + 4 = 7.\nThe answer is: 7", "7"),
        ("The answer is 5. Wait.\nThe answer is: $1,234.", "$1,234"),
        ("the final answer is: **42**\n", "42"),
        ("The answer is: 50%", "50%"),
        ("So it is 7.", None),
        ("The answer is:", None),
        (r"It is \boxed{7}", None),
    ],
)
def test_gsm8k_answers_follow_the_phrase(completion: str, answer: str | None):
    task = FileTask("gsm8k", Path("none"))
    assert task.parse(completion, "stop", question("7")) == answer
    # A cut answer may be half a number.
    assert task.parse(completion, "length", question("7")) is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"Thus $\boxed{\frac{1}{2}}$ and \boxed{\sqrt{3}}.", r"\frac{1}{2}, \sqrt{3}"),
        (r"Thus $\boxed{\frac{1}{2}}$, so it is \boxed{\sqrt{3}}.", r"\sqrt{3}"),
        (r"Thus \boxed{\frac{\pi}{2}", None),
        (r"First \boxed{4}, then \boxed{5", "4"),
        (r"\boxed{ }", None),
        ("The answer is: 4", "4"),
    ],
)
def test_math_answers_are_boxed(completion: str, answer: str | None):
    assert FileTask("math", Path("none")).parse(completion, "stop", question("7")) == answer


def test_boxes_close_where_their_braces_do():
    (box,), unclosed = boxes(r"\boxed{a_{1}^{2}} + b}")
    assert box.answer == "a_{1}^{2}" and not unclosed
    assert boxes(r"\boxed{a") == ([], True) and boxes("a") == ([], False)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1234.0", "1,234", True),
        ("$1,234", "1234", True),
        ("0.5", "1/2", True),
        ("1235", "1,234", False),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"\text{east}", "east", True),
        (r"(2,1)", "(1,2)", False),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
    ],
)
def test_answers_are_compared_as_numbers_and_as_plain_latex(answer: str, gold: str, right: bool):
    task = FileTask("math", Path("none"))
    assert task.reward(answer, question(gold)) == (1.0 if right else -1.0)
    assert (task.canonical(answer) == task.canonical(gold)) == right
    assert task.reward(None, question(gold)) == -1.0
    assert canonical(r"x \, y") == "xy"


def test_math_verify_decides_on_algebra(monkeypatch: pytest.MonkeyPatch):
    math_verify = importlib.import_module("math_verify")
    verify, asked = math_verify.verify, []

    def spy(gold: Any, answer: Any, **options: Any) -> bool:
        asked.append((str(gold), str(answer), options["timeout_seconds"]))
        return bool(verify(gold, answer, **options))

    monkeypatch.setattr(math_verify, "verify", spy)
    task = FileTask("math", Path("none"))
    assert task.reward(r"x(x+2)", question(r"x^2+2x")) == 1.0
    assert task.reward(r"x(x-2)", question(r"x^2+2x")) == -1.0
    # The right answer comes first: math-verify is not symmetric. Its timeouts need a main thread.
    assert asked[0] == ("x**2 + 2*x", "x*(x + 2)", None) and len(asked) == 2
    # Equal ones need not be asked.
    assert task.reward(r"x^2 + 2x", question(r"x^2+2x")) == 1.0 and len(asked) == 2


# --- through the commands --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    long = tiny_model()
    # The prompts are longer than those it learnt.
    long.config.max_position_embeddings = 512
    return save(long, folder)


def test_questions_of_a_file_run_through_the_commands(model: Path, tmp_path: Path, capsys: Any):
    train, test = gsm8k(tmp_path / "train.jsonl"), gsm8k(tmp_path / "test.jsonl", 4)
    common = ["--model", str(model), "--task", f"gsm8k:{train}", "--max-new-tokens", "20"]
    out = tmp_path / "samples.parquet"
    argv = ["generate", *common, "--questions", "6", "--held-out", "6", "--samples", "2"]
    assert main([*argv, "--out", str(out)]) == 0
    records = read_records(out)
    assert len(records) == 12 and {r.reward for r in records} == {-1.0}
    # A newline does not end such an answer.
    assert any("\n" in r.completion[:-1] for r in records)
    figures = tmp_path / "evaluation.json"
    argv = ["evaluate", *common, "--held-out", "3", "--eval-samples", "2", "--votes", "1"]
    assert main([*argv, "--test-task", f"gsm8k:{test}", "--out", str(figures)]) == 0
    answered = {r.prompt for r in read_records(tmp_path / "evaluation.parquet")}
    assert len(answered) == 3
    manifest = json.loads(figures.read_text())
    assert manifest["settings"]["task"] == "gsm8k:train.jsonl"
    assert manifest["settings"]["math_verify"] == importlib.metadata.version("math-verify")
    assert set(manifest["inputs"]) == {"model", "task", "test_task"}
    # The file is an input: another one of the same name is another run.
    gsm8k(test, 5)
    assert main([*argv, "--test-task", f"gsm8k:{test}", "--out", str(figures)]) == 2
    assert "--test-task: 'test.jsonl' has changed since" in capsys.readouterr().err


def test_held_out_questions_do_not_train(model: Path, tmp_path: Path, capsys: Any):
    path = gsm8k(tmp_path / "all.jsonl")
    options = importlib.import_module("topr_kernels.recipe.settings").QuestionOptions
    for test_task in ("", f"gsm8k:{path}"):
        settings = options(task=f"gsm8k:{path}", test_task=test_task, held_out=5)
        train, test = task_files.questions_of(settings, 7)
        assert len({q.text for q in train} | {q.text for q in test}) == 12
        assert task_files.questions_of(settings, 0)[1] == test
        with pytest.raises(SettingsError, match=r"questions and held_out: count: all\.jsonl holds"):
            task_files.questions_of(settings, 8)
    argv = ["generate", "--model", str(model), "--task", "gsm9k:x.jsonl"]
    assert main([*argv, "--out", str(tmp_path / "s.parquet")]) == 2
    assert "kind: got 'gsm9k'; expected one of gsm8k, math" in capsys.readouterr().err


def test_chat_models_are_asked_through_their_template():
    tokenizer = tiny_tokenizer()
    plain = prompt_token_ids(tokenizer, "1 + 1 =")
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        asked = prompt_token_ids(tokenizer, "1 + 1 =", chat=True)
        assert tokenizer.decode(asked) == "[user]1 + 1 =[assistant]"
        assert prompt_token_ids(tokenizer, "1 + 1 =") == plain
    finally:
        tokenizer.chat_template = template


def test_a_model_may_name_more_stop_tokens():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    assert stop_token_ids(tokenizer, one_line=False, model=model) == [0, 7]
    assert stop_token_ids(tokenizer, one_line=False) == [0]


# --- vLLM ------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Puts tests/fake_vllm in the place of vLLM; the file of what it is asked."""
    folder, log = Path(__file__).parents[1] / "fake_vllm", tmp_path / "asked.jsonl"
    answers = [tiny_tokenizer()(text)["input_ids"] for text in (" 11111", " 1\n")]
    monkeypatch.syspath_prepend(str(folder))
    # For the process that vLLM runs in.
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(log))
    monkeypatch.setenv("FAKE_VLLM_ANSWERS", json.dumps(answers))
    return log


def asked(log: Path, what: str) -> list[Any]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry[what] for entry in entries if what in entry]


def test_the_backend_is_vllm_only_where_it_can_be(vllm: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    for gpu, expected in ((True, "vllm"), (False, "hf")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert choose_backend("auto", "some/model") == expected
        assert choose_backend("auto", "smollm2") == "hf"
        assert choose_backend("hf", "some/model") == "hf"
        assert choose_backend("vllm", "some/model") == "vllm"
    with pytest.raises(SettingsError, match="'smollm2', a GGUF file"):
        choose_backend("vllm", "smollm2")
    monkeypatch.undo()
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(SettingsError, match="backend: got 'vllm', which is not installed"):
            choose_backend("vllm", "some/model")


def test_vllm_is_asked_for_the_log_probs_of_what_it_samples(vllm: Path):
    tokenizer = tiny_tokenizer()
    stops = stop_token_ids(tokenizer)
    with vllm_sampler("some/model", {"dtype": "float32"}) as sample:
        # Not before there is something to sample.
        assert not vllm.exists()
        cut, stopped = sample(
            None,
            tokenizer,
            ["1 + 1 =", "2 + 2 ="],
            max_new_tokens=6,
            temperature=0.7,
            seed=3,
            stop_ids=stops,
        )
    (made,) = asked(vllm, "made")
    assert made.items() >= {
        ("model", "some/model"),
        ("logprobs_mode", "processed_logprobs"),
        ("dtype", "float32"),
        ("generation_config", "vllm"),
    }
    (prompts,), (settings,) = asked(vllm, "prompts"), asked(vllm, "settings")
    assert prompts == [
        {"prompt_token_ids": tokenizer(t)["input_ids"]} for t in ("1 + 1 =", "2 + 2 =")
    ]
    one, two = settings
    assert [one[n] for n in ("temperature", "top_k", "top_p", "max_tokens")] == [0.7, 0, 1.0, 6]
    assert one["stop_token_ids"] == stops and one["logprobs"] == 0 and one["seed"] != two["seed"]
    assert asked(vllm, "reset") == [True]
    assert (cut.finish_reason, cut.text, cut.log_prob) == ("length", " 11111", [-0.25] * 6)
    assert (stopped.finish_reason, stopped.text) == ("stop", " 1\n")
    assert len(stopped.log_prob) == len(stopped.token_ids) == 3


def sampling(model: Path, out: Path, *more: str) -> list[str]:
    common = ["--questions", "4", "--held-out", "2", "--samples", "2", "--backend", "vllm"]
    return ["generate", "--model", str(model), *common, "--out", str(out), *more]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_samples_in_the_dtype_of_the_folder(
    vllm: Path, model: Path, tmp_path: Path, capsys: Any, dtype: str
):
    stored = save(tiny_model().to(getattr(torch, dtype)), tmp_path / dtype)
    # What most entries are stored as counts, whatever the configuration says.
    config = json.loads((stored / "config.json").read_text()) | {"dtype": "float16"}
    (stored / "config.json").write_text(json.dumps(config))
    out, scored = tmp_path / "samples.parquet", tmp_path / "scored.parquet"
    assert main(sampling(stored, out, "--engine", "max_num_seqs=8")) == 0
    assert [made["dtype"] for made in asked(vllm, "made")] == [dtype]
    settings = json.loads(Path(f"{out}.json").read_text())["settings"]
    assert settings["engine"] == [f"dtype={dtype}", "max_num_seqs=8"]
    assert settings["torch"] == torch.__version__ and "vllm" in settings
    assert {r.sampling.dtype for r in read_records(out)} == {dtype}
    # The same command again, and in another order of words, finds it done.
    again = ["--engine", "max_num_seqs=8", "--engine", f"dtype={dtype}"]
    assert main(sampling(stored, out, *again)) == 0
    assert main(sampling(stored, out)) == 2
    assert "--engine: " in capsys.readouterr().err
    argv = ["score", "--model", str(stored), "--records", str(out), "--out", str(scored)]
    for more in ([], ["--dry-run"]):
        assert main([*argv, *more]) == (0 if dtype == "float32" else 2)
        if dtype != "float32":
            expected = "'sampling.dtype': got 'bfloat16', but mu would be scored in 'float32'"
            assert expected in capsys.readouterr().err
    argv = ["iterate", *sampling(stored, tmp_path / "run")[1:]]
    assert main([*argv, "--dry-run"]) == (0 if dtype == "float32" else 2)
    if dtype != "float32":
        assert "give --engine dtype=float32" in capsys.readouterr().err
        assert main(argv) == 2 and not (tmp_path / "run").exists()


def test_transformers_samples_in_what_score_computes_in(model: Path, tmp_path: Path):
    out = tmp_path / "samples.parquet"
    assert main([*sampling(model, out), "--backend", "hf"]) == 0
    assert {r.sampling.dtype for r in read_records(out)} == {"float32"}
    assert json.loads(Path(f"{out}.json").read_text())["settings"]["engine"] == []


@pytest.mark.parametrize(
    "more, message",
    [
        (["--engine", "max_model_len"], "engine: got 'max_model_len'; expected NAME=VALUE"),
        (["--engine", "top_k=3"], "engine: got 'top_k=3'; expected NAME=VALUE with a name of "),
        (["--engine", "max_num_seqs=x"], "engine: got 'max_num_seqs=x'; expected a whole number"),
        (["--engine", "enforce_eager=1"], "engine: got 'enforce_eager=1'; expected true or false"),
        (["--engine", "dtype=auto"], "engine: got 'dtype=auto'; expected one of float32, bfloat16"),
        (
            ["--backend", "hf", "--engine", "max_num_seqs=2"],
            "engine: got max_num_seqs=2 with the backend 'hf', which takes none",
        ),
        (
            ["--temperature", "0.009"],
            "temperature: got 0.009 with the backend 'vllm', which samples anything between 0 and 0.01",
        ),
        (["--engine", "gpu_memory_utilization=2"], "vLLM refused"),
        (["--max-new-tokens", "600"], "max_new_tokens: question 0 has a prompt of"),
        (
            ["--max-new-tokens", "40", "--engine", "max_model_len=44"],
            "answers may have 40; the sampler has room for 44 together",
        ),
        (["--backend", "hf", "--max-new-tokens", "600"], "the sampler has room for 512 together"),
    ],
)
def test_what_the_sampler_cannot_do_is_refused_before_it_samples(
    vllm: Path, model: Path, tmp_path: Path, capsys: Any, more: list[str], message: str
):
    assert main(sampling(model, tmp_path / "samples.parquet", *more)) == 2
    assert message in capsys.readouterr().err
    assert not vllm.exists() or not asked(vllm, "prompts")


def test_settings_of_vllm_may_stand_in_a_configuration(vllm: Path, model: Path, tmp_path: Path):
    config, out = tmp_path / "recipe.yaml", tmp_path / "samples.parquet"
    config.write_text("engine:\n  max_num_seqs: 8\n  enforce_eager: true\n")
    assert main(sampling(model, out, "--config", str(config), "--engine", "max_num_seqs=4")) == 0
    (made,) = asked(vllm, "made")
    assert made["max_num_seqs"] == 4 and made["enforce_eager"] is True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_the_engine_ends_with_whoever_started_it(
    vllm: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
):
    monkeypatch.setenv("FAKE_VLLM_SECONDS", "300")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], *sys.path]))
    argv = sampling(model, tmp_path / "samples.parquet")
    run = subprocess.Popen([sys.executable, "-m", "topr_kernels.recipe", *argv])
    while run.poll() is None and not (vllm.exists() and asked(vllm, "prompts")):
        time.sleep(0.1)
    engine, worker = asked(vllm, "pid")[0], asked(vllm, "worker")[0]
    assert all(Path(f"/proc/{pid}").exists() for pid in (engine, worker))
    run.send_signal(how)
    assert run.wait(30) in (-signal.SIGKILL, 128 + signal.SIGTERM)
    until = time.monotonic() + 20
    while running(engine) or running(worker):
        assert time.monotonic() < until
        time.sleep(0.1)


def running(pid: int) -> bool:
    """Whether a process is there and does not only wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_engine_that_dies_is_told(vllm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_VLLM_ANSWERS", "exit")
    with (
        vllm_sampler("some/model", {}) as sample,
        pytest.raises(SettingsError, match="vLLM's process ended without an answer"),
    ):
        sample(
            *(None, tiny_tokenizer(), ["1 + 1 ="]),
            **{"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "stop_ids": [0]},
        )


def test_records_say_that_the_sampler_reported_mu(vllm: Path, model: Path, tmp_path: Path):
    out = tmp_path / "samples.parquet"
    argv = ["generate", "--model", str(model), "--questions", "4", "--held-out", "2"]
    assert main([*argv, "--samples", "2", "--backend", "vllm", "--out", str(out)]) == 0
    records = read_records(out)
    assert {r.behavior_source for r in records} == {"sampler"}
    assert all(r.behavior_log_prob == [-0.25] * len(r.completion_token_ids) for r in records)
    assert json.loads(Path(f"{out}.json").read_text())["settings"]["backend"] == "vllm"
    # Scored again, as the pipeline does, they are this package's.
    again = score(tiny_model(), records, pad_token_id=0, batch_size=4)
    assert {r.behavior_source for r in again} == {"score"}
    assert again[0].behavior_log_prob != records[0].behavior_log_prob


def test_a_sampler_of_ones_own_takes_the_place_of_complete():
    from topr_kernels.recipe import Completion, Task

    task = Task("chain_sum", {"min_terms": 2, "max_terms": 2})

    def sampler(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[Completion]:
        return [Completion([5], [6, 7], " 3\n", "stop", [-1.0, -2.0]) for _ in prompts]

    records = generate(
        *(None, tiny_tokenizer(), task, task.questions(2, seed=0)),
        **{"model_name": "own", "samples": 2, "max_new_tokens": 6, "batch_size": 3, "seed": 0},
        sampler=sampler,
    )
    assert [r.behavior_log_prob for r in records] == [[-1.0, -2.0]] * 4
