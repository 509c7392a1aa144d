"""``topr reward``: what a reward of one's own says of the completions in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.rewards import RewardTask
from topr_kernels.recipe.scoring import count_problems, verdicts
from topr_kernels.recipe.tasks import ARITHMETIC, Question


def try_reward(function: str, path: Path) -> list[str]:
    """The verdicts on the completions of a file, in workers as those of a run, as lines of text.

    Args:
        function: as in ``RewardTask``.
        path: JSONL file; each line an object with the texts ``question`` and ``completion``, and what
            else the function reads of its ``entry``, which is the whole object.

    Raises:
        SettingsError: if there is no such function.
        FileError: naming the line that is no such object.
    """
    try:
        # The task of the questions is not asked for any.
        task = RewardTask(ARITHMETIC, function)
    except ValueError as error:
        raise SettingsError(f"--reward {function}: {error}") from error
    answers = []
    with path.open(encoding="utf-8") as lines:
        for i, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                texts = isinstance(entry, Mapping) and [entry["question"], entry["completion"]]
            except (ValueError, KeyError) as error:
                raise FileError(f"{path.name}, line {i}: {error!r}; {_EXPECTED}") from error
            if not texts or not all(isinstance(text, str) for text in texts):
                raise FileError(f"{path.name}, line {i}: got {line.strip()[:80]}; {_EXPECTED}")
            answers.append((texts[1], "stop", Question(i, texts[0], texts[0], entry)))
    found = verdicts(task, answers)
    said = []
    for (completion, _, question), verdict in zip(answers, found, strict=True):
        what = f"{verdict.reward:+g}" if verdict.answer is not None else "no answer"
        said.append(f"{question.group}: {verdict.problem or what}  {completion.strip()[:60]!r}")
    problems = count_problems(found)
    causes = "".join(f", {count} {cause}" for cause, count in sorted(problems.items()))
    none = sum(v.answer is None for v in found) - sum(problems.values())
    above = sum(v.reward > 0 for v in found)
    return [*said, f"{len(found)} completions: {above} rewarded above 0, {none} no answer{causes}"]


_EXPECTED = 'expected {"question": text, "completion": text, ...}'
