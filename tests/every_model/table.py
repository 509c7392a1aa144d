"""The table of verdicts: as JSON, a line for each model, and as a page of the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from every_model.judge import PATHS, PEFT, REFUSED, SAME

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("table.json")
TEMPLATE = Path(__file__).with_name("page.md")
PAGE = ROOT / "docs" / "models.md"

#: Version of transformers -> class -> path -> verdict; "kinds" tells text from image.
Table = dict[str, Any]

#: Heading of a column, and the path of its verdicts.
COLUMNS = {
    "fused": "fused",
    "padded": "padded",
    "packed": "packed",
    "shared": "shared",
    "LoRA": "lora",
}

#: What a refusal says, and the word for it.
_REASONS = [
    ("names no position_ids", "no positions"),
    ("which carry one sequence|carries a state", "state"),
    ("does not keep packed|does not keep the branches", "leaks"),
    ("positions of several dimensions", "own positions"),
    ("given the mask of a tree raises|given packed tokens alone raises", "own masks"),
    ("lets tokens see later ones", "sees later tokens"),
    ("is an encoder and a decoder", "encoder and decoder"),
    ("cannot run a row of tokens alone|gave logits of shape", "not of tokens alone"),
    ("window of columns", "window of columns"),
    ("chunks of", "chunks"),
    ("further model inputs|may compute positions", "other inputs"),
    ("hidden states beside padding", "sees padding"),
    ("head|logits differ", "own head"),
]


def reason(message: str) -> str:
    """A refusal in a few words."""
    return next((word for pattern, word in _REASONS if re.search(pattern, message)), "other")


def shortened(verdicts: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a model's verdicts: of a refusal why, and what its remedy gave."""
    if not set(verdicts) <= set(PATHS):
        return verdicts
    result: dict[str, Any] = {}
    for path, found in verdicts.items():
        if found["verdict"] == SAME:
            result[path] = SAME
        elif found["verdict"] == REFUSED:
            result[path] = {
                REFUSED: reason(found["message"]),
                "remedy": found.get("remedy", "none"),
            }
        elif found["verdict"] == PEFT:
            # What PEFT says holds sets, in any order.
            error = found["message"].partition(":")[0]
            result[path] = {PEFT: error, "remedy": found.get("remedy", "none")}
        else:
            result[path] = found
    return result


def read() -> Table:
    """The committed table."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"versions": {}, "kinds": {}}


def written(table: Table) -> str:
    """The table as text, a line for each model."""
    versions = []
    for version in sorted(table["versions"], key=_number, reverse=True):
        models = table["versions"][version].items()
        lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in models]
        versions.append(f'"{version}": {{\n' + ",\n".join(lines) + "\n}")
    kinds = json.dumps(table["kinds"], sort_keys=True, indent=0)
    return f'{{\n"kinds": {kinds},\n"versions": {{\n' + ",\n".join(versions) + "\n}\n}\n"


def verdict(found: Any) -> str:
    """The verdict of a kept entry."""
    return found if isinstance(found, str) else next(iter(found))


def counts(models: dict[str, Any]) -> dict[str, int]:
    """How many classes have the gradients of their own logits, how, and how many are refused."""
    judged = [found for found in models.values() if set(found) <= set(PATHS)]
    by_path = {path: sum(verdict(f[path]) == SAME for f in judged) for path in PATHS}
    same = sum(SAME in (verdict(f["fused"]), verdict(f["logits"])) for f in judged)
    return {"all": len(models), "same": same, "refused": len(judged) - same, **by_path}


def page(table: Table) -> str:
    """The page of the documentation."""
    newest, *older = sorted(table["versions"], key=_number, reverse=True)
    oldest = older[-1] if older else newest
    summary = ["| transformers | classes | same | by the fused head | refused |", "|---" * 5 + "|"]
    for version in (newest, *older):
        n = counts(table["versions"][version])
        summary.append(_row([version, *(str(n[x]) for x in ("all", "same", "fused", "refused"))]))
    lines = [TEMPLATE.read_text().replace("{versions}", "\n".join(summary))]
    for kind, title in (("text", "Causal language models"), ("image", "Images and text")):
        lines += [f"## {title}", "", _row(["", *COLUMNS, f"with {oldest}"]), "|---" * 7 + "|"]
        for name, found in table["versions"][newest].items():
            if table["kinds"][name] == kind:
                before = table["versions"][oldest].get(name)
                cells = [_cell(found, path) for path in COLUMNS.values()]
                lines.append(_row([name, *cells, _difference(found, before)]))
        lines.append("")
    return "\n".join(lines)


def _number(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(found: dict[str, Any], path: str) -> str:
    if not set(found) <= set(PATHS):
        return next(iter(found))
    entry = found[path]
    if entry == SAME:
        return "yes"
    if path == "fused" and entry.get("remedy") == SAME:
        return "logits"
    if PEFT in entry:
        return "in part" if entry.get("remedy") == SAME else "no"
    return str(entry.get(REFUSED, verdict(entry)))


def _difference(found: dict[str, Any], before: dict[str, Any] | None) -> str:
    """What an older version does otherwise."""
    if before is None:
        return "not there"
    columns = {head: (_cell(before, p), _cell(found, p)) for head, p in COLUMNS.items()}
    if len({old for old, _ in columns.values()}) == 1 and all(a != b for a, b in columns.values()):
        return next(iter(columns.values()))[0]
    others = [f"{head}: {old}" for head, (old, new) in columns.items() if old != new]
    return ", ".join(others) or "the same"
