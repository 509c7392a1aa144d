"""Which questions a model was trained on: a file in its folder, so that it is not measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.records import Record

_FILE = "trained_on.txt"


def digest(prompt: str) -> str:
    """12 hex digits of a prompt's hash."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def with_images(prompt: str, images: Sequence[str] | None) -> str:
    """A prompt and the images that are shown with it, which make another question of it."""
    return "\n".join([prompt, *(images or ())])


def read_trained_on(model: str) -> set[str]:
    """Digests of the prompts that a model, or the model it was trained from, was trained on.

    Args:
        model: as in ``load_model``. An empty set if it is not a folder, or was not trained here.

    Raises:
        FileError: if the file is not text.
    """
    path = Path(model) / _FILE
    try:
        return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not text ({error}); copy the model anew") from error


def write_trained_on(folder: Path, records: Iterable[Record], start: str) -> None:
    """Writes what a model was trained on into its folder.

    Args:
        folder: of the trained model.
        records: those it was trained on.
        start: the model that the training started from.
    """
    asked = {digest(with_images(record.prompt, record.images)) for record in records}
    digests = asked | read_trained_on(start)
    text = "".join(f"{known}\n" for known in sorted(digests))
    (folder / _FILE).write_text(text, encoding="utf-8")


def count_seen(model: str, prompts: Sequence[str]) -> int:
    """How many of the prompts a model was trained on."""
    known = read_trained_on(model)
    return sum(digest(prompt) in known for prompt in prompts)


def check_unseen(model: str, prompts: Sequence[str]) -> None:
    """Refuses held-out questions that a model was trained on.

    Args:
        model: as in ``load_model``.
        prompts: of the held-out questions.

    Raises:
        SettingsError: with their number and the remedy.
    """
    seen = count_seen(model, prompts)
    if seen:
        raise SettingsError(
            f"held_out: {seen} of the {len(prompts)} held-out questions are among those that the model "
            f"{Path(model).resolve().name!r} was trained on; give the --question-seed, --held-out and "
            "--test-task of topr generate, or another --task or --test-task"
        )
