"""``topr reward``: tries a custom reward on the completions in a file."""

from __future__ import annotations

from pathlib import Path

from topr_kernels.recipe.files import FileError, check_link, parse_object
from topr_kernels.recipe.rewards import RewardTask
from topr_kernels.recipe.scoring import count_problems, verdicts
from topr_kernels.recipe.task_files import naming_reward
from topr_kernels.recipe.tasks import ARITHMETIC, Question


def try_reward(function: str, path: Path) -> tuple[list[str], bool]:
    """Judges the completions of a file, in workers as in a run.

    Args:
        function: as in ``RewardTask``.
        path: JSONL file. Each line is an object with the texts ``question`` and ``completion``; the
            function gets the whole object as its ``entry``.

    Returns:
        Lines of text, and whether the function failed on any completion.

    Raises:
        SettingsError: if there is no such function.
        FileError: naming the line that is not such an object.
    """
    with naming_reward(function):
        # Any task will do: the questions are those of the file.
        task = RewardTask(ARITHMETIC, function)
    answers = _answers(path)
    judged = verdicts(task, answers)
    said = []
    for (completion, _, question), verdict in zip(answers, judged, strict=True):
        what = f"{verdict.reward:+g}" if verdict.answer is not None else "no answer"
        what = verdict.detail or verdict.problem or what
        said.append(f"{question.group}: {what}  {completion.strip()[:60]!r}")
    problems = count_problems(judged)
    said_of = {"raised": "raised or returned no number"}
    causes = "".join(f", {n} {said_of.get(cause, cause)}" for cause, n in sorted(problems.items()))
    none = sum(v.answer is None for v in judged) - sum(problems.values())
    above = sum(v.reward > 0 for v in judged)
    said.append(f"{len(judged)} completions: {above} rewarded above 0, {none} no answer{causes}")
    return said, bool(problems)


def _answers(path: Path) -> list[tuple[str, str, Question]]:
    check_link(path)
    answers = []
    try:
        # utf-8-sig: some editors write a byte order mark.
        with path.open(encoding="utf-8-sig") as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    answers.append(_answer(line, i, path.name))
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text ({error}); expected JSONL") from error
    if not answers:
        raise FileError(f"{path}: holds no completions; {_EXPECTED} in each line")
    return answers


def _answer(line: str, number: int, file: str) -> tuple[str, str, Question]:
    entry = parse_object(line, f"{file}, line {number}", FileError)
    question, completion = (entry.get(name) for name in ("question", "completion"))
    if not isinstance(question, str) or not isinstance(completion, str):
        raise FileError(f"{file}, line {number}: got {line.strip()[:80]}; {_EXPECTED}")
    return completion, "stop", Question(number, question, question, entry)


_EXPECTED = 'expected {"question": text, "completion": text, ...}'
