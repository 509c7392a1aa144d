"""The final answers of texts, and their equality."""

from __future__ import annotations

import json
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from answers_pairs import BOXED, HOSTILE, SAID, WHOLE

from topr_kernels.recipe import FileTask
from topr_kernels.recipe.answers import final_answer, gold_answer
from topr_kernels.recipe.equality import canonical, same_answer
from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.settings import QuestionOptions
from topr_kernels.recipe.task_files import find_task, questions_of, task_inputs
from topr_kernels.recipe.tasks import Question, canonical_number

CASES = [
    *(
        (kind, "gsm8k", gold, f"So be it.\nThe answer is: {a}", right)
        for kind, gold, a, right in SAID
    ),
    *((kind, "math", gold, rf"So it is $\boxed{{{a}}}$.", right) for kind, gold, a, right in BOXED),
    *WHOLE,
]


def reward(kind: str, gold: str, completion: str) -> float:
    task = FileTask(kind, Path("none"))
    question = Question(0, "?", "?", {"question": "?", "answer": gold})
    return task.reward(task.parse(completion, "stop", question), question)


def test_verdicts_are_those_of_a_reader():
    assert len(CASES) > 300
    wrong = [
        (kind, gold, completion)
        for kind, task, gold, completion, right in CASES
        if reward(task, gold, completion) != (1.0 if right else -1.0)
    ]
    assert wrong == []


def test_a_right_answer_is_its_own_equal():
    golds = sorted({(task, gold) for _, task, gold, _, _ in CASES})
    assert [g for _, g in golds if not same_answer(g, g)] == []
    assert [g for t, g in golds if t == "math" and reward(t, g, rf"\boxed{{{g}}}") < 0] == []


def test_commas_of_lists_are_not_those_of_thousands():
    assert canonical_number("1,234.5") == "2469/2" and canonical_number("-1,234,567") == "-1234567"
    assert canonical_number("1,2,3") is canonical_number("12,34") is None


def test_forms_group_equal_answers():
    for equal in (("1,200", "1200.0", "$1200", "1200 eggs"), (r"\dfrac12", "0.5", "1/2")):
        assert len({canonical(x) for x in equal}) == 1
    apart = ("31/4", "3 1/4", "12", "1 2", "1,2", "12 cm", "12 m", r"12\%", "x2", "x^2", "1:2")
    assert len({canonical(x) for x in apart}) == len(apart)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.timeout(60)
def test_hostile_answers_end_quickly_as_wrong(text: str):
    same_answer("x+1", "1+x")  # loads sympy
    for kind, completion in (("gsm8k", f"The answer is: {text}"), ("math", rf"\boxed{{{text}}}")):
        start = time.process_time()
        assert reward(kind, "7", completion) == -1.0
        assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "part",
    [
        *("the answer is ", "The answer is: 7\n", "answer to ", r"\boxed{", r"\boxed{7} and "),
        *(
            "<think>",
            "</think>",
            "<answer>",
            "#### 7\n",
            "\n",
            " ",
            "I see the ",
            "a",
            "\\",
            "{",
            "$$",
        ),
    ],
)
@pytest.mark.timeout(60)
def test_long_texts_are_read_in_linear_time(part: str):
    text = part * (60_000 // len(part))
    for boxed in (True, False):
        start = time.process_time()
        final_answer(f"The answer is: {text}", boxed=boxed)
        final_answer(text, boxed=boxed)
        assert time.process_time() - start < 3


def test_verdicts_need_no_main_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(same_answer, "(x+1)^2", "x^2+2x+1").result(timeout=60)


# --- right answers of files ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Add them.\n#### 72", "72"),
        (r"So $\boxed 7$.", "7"),
        (r"So $\boxed7$.", "7"),
        (r"So $\boxed {7}$.", "7"),
        (r"So $\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
        (r"So \fbox{7}.", "7"),
        (r"First \boxed{6}, which gives in the end $\boxed{7}$.", "7"),
        (r"$\boxed{6}$ and $\boxed{7}$", "6, 7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\infty}", r"\infty"),
        ("9" * 400, "9" * 400),
        ("Paris", "Paris"),
    ],
)
def test_right_answers_are_read(text: str, answer: str):
    assert gold_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('"It is 72.\\n####"', "field 'answer': nothing after ####"),
        ('"####  "', "field 'answer': nothing after ####"),
        ("NaN", "field 'answer': not a finite number"),
        ("-Infinity", "field 'answer': not a finite number"),
        ('"nan"', "field 'answer': not a finite number"),
        ('"#### inf"', "field 'answer': not a finite number"),
        ('"So \\\\boxed{\\\\frac{1}{2}"', "field 'answer': a box whose braces do not close"),
        ('"\\\\boxed{1}, \\\\boxed{2"', "field 'answer': a box whose braces do not close"),
        ('"#### ."', "field 'answer': nothing but signs"),
        ('"$$"', "field 'answer': nothing but signs"),
        ('"7 \\\\ud800"'.replace("\\\\", "\\"), "field 'answer': holds half a character"),
        ('"So \\\\boxed{ }."', "field 'answer': an empty box"),
        ("[" * 100_000, "JSON that cannot be read|not a line of JSON"),
        ("9" * 5_000, "JSON that cannot be read"),
    ],
)
def test_lines_without_a_right_answer_are_refused(answer: str, message: str, tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"question": "a", "answer": "1"}\n{"question": "b", "answer": ' + answer + "}\n"
    )
    with pytest.raises(FileError, match=rf"t\.jsonl, line 2(: |, ).*({message})"):
        FileTask("math", path).questions(1, seed=0)


def test_a_solution_is_named_by_its_own_field(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"problem": "b", "solution": "So \\\\boxed{"}')
    with pytest.raises(FileError, match="line 1, field 'solution': a box"):
        FileTask("math", path).questions(1, seed=0)


def test_one_question_has_one_right_answer(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    same = ['{"question": "a", "answer": "0.5"}', '{"question": "a", "answer": "1/2"}']
    path.write_text("\n".join(same))
    assert len(FileTask("math", path).questions(1, seed=0)) == 1
    path.write_text(
        "\n".join(['{"question": "b", "answer": "1"}', *same, same[0].replace("0.5", "2")])
    )
    with pytest.raises(FileError, match=r"t\.jsonl, lines 2 and 4: .* '0\.5' and '2'; remove one"):
        FileTask("math", path).questions(1, seed=0)
    path.write_text('{"question": "a b", "answer": "1"}\n{"question": "a\\n b", "answer": "2"}')
    with pytest.raises(FileError, match=r"t\.jsonl, lines 1 and 2: one question with two"):
        FileTask("math", path).questions(1, seed=0)


def test_files_of_other_editors_are_read(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"question": f"q{i}", "answer": i}) for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n \r\n")
    found = FileTask("math", path).questions(3, seed=0)
    assert {q.text: q.entry["answer"] for q in found} == {f"q{i}": str(i) for i in range(3)}


def test_a_task_is_sent_without_its_questions(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{i} " * 99, "answer": i}) + "\n" for i in range(99))
    )
    task = FileTask("math", path)
    task.questions(1, seed=0)
    sent = pickle.dumps(task)
    assert len(sent) < 1000 and pickle.loads(sent) == task
    assert pickle.loads(sent).questions(9, seed=1) == task.questions(9, seed=1)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_task("math:~/t.jsonl", "{}") == FileTask("math", tmp_path / "t.jsonl")
    options = QuestionOptions(task="math:~/t.jsonl")
    assert task_inputs(options) == {"task": tmp_path / "t.jsonl"}


def test_nearly_equal_questions_are_warned_of(tmp_path: Path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(
        "".join(json.dumps({"question": f"How  MANY {i}?", "answer": i}) + "\n" for i in range(4))
    )
    test.write_text(
        "".join(json.dumps({"question": f"How many {i}?", "answer": i}) + "\n" for i in range(2))
    )
    options = QuestionOptions(task=f"math:{train}", test_task=f"math:{test}", held_out=2)
    with pytest.warns(
        UserWarning, match=r"2 training questions equal held-out ones .* 'How  MANY [01]\?'"
    ):
        questions_of(options, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        questions_of(options, 0)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("(a) 3, (b) 4", "(a) 5, (b) 6", False),
        ("(a) 3, (b) 4", "(a) 3, (b) 4", True),
        ("(x) + 1", "(x) - 1", False),
        ("(B) 12", "B", True),
        ("6", "6 divided by two", False),
        ("5", "5 times seven", False),
        ("5", "5 times", True),
        ("2", "2 sin x", False),
        ("2", "2 over three", False),
        ("9", "four and five", False),
        ("6", "one two three", False),
        ("50", "twenty thirty", False),
        ("123", "one hundred and twenty-three", True),
        ("1200", "one thousand two hundred", True),
    ],
)
def test_words_beside_a_number_are_read_only_where_they_mean_it(
    gold: str, answer: str, right: bool
):
    assert same_answer(gold, answer) == right
