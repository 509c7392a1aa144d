"""Options of the commands: fields that are flags too, checked when settings are made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from topr_kernels.recipe.files import FileError, one_line
from topr_kernels.recipe.processes import ProcessError
from topr_kernels.recipe.records import RecordError

S = TypeVar("S")


#: Errors that a bug in the code raises; they keep their traceback.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)


class SettingsError(ValueError):
    """Settings that cannot be used, or that differ from those of the results in the folder."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?``: the known name that is nearest, or that is its initials; "" for none."""
    known = list(known)
    initials = "".join(part[:1] for part in re.split("[-_]", name.strip("-")))
    short = [k for k in known if len(initials) > 1 and k.strip("-") == initials]
    near = short or difflib.get_close_matches(name, known)
    return f"; did you mean {near[0]}?" if near else ""


#: What argparse says of a value, and what a user is told.
_OF_VALUES = (
    (r"invalid int value: (.*)", r"got \1; expected a whole number"),
    (r"invalid float value: (.*)", r"got \1; expected a number"),
    (r"ignored explicit argument (.*)", r"got \1; expected no value, or true or false in a file"),
)


def in_words(message: str) -> str:
    """What argparse says of a value, in the words of the other errors."""
    for said, told in _OF_VALUES:
        message = re.sub(said, told, message)
    return message


@contextmanager
def naming(what: str, memory: str = "") -> Iterator[None]:
    """Turns a library's error in the block into one line that names the flag or file it is about.

    Args:
        what: the flag or file, and what was done with it.
        memory: the flag to lower if there is too little memory.

    Raises:
        SettingsError: for every error but those of bugs, and those that name a file or field themselves.
    """
    try:
        yield
    except (SettingsError, FileError, RecordError, ProcessError, *_BUGS):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        said = one_line(error)
        short = isinstance(error, MemoryError) or "memory" in said
        remedy = f"; a smaller {memory} takes less memory" if memory and short else ""
        raise SettingsError(f"{what}: {said}{remedy}") from error


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a flag: its default, its help, and the values it takes.

    Args:
        default: its type is the flag's, unless ``type`` is given.
        help: one line.
        limits: ``least``, ``most`` (numbers, inclusive), ``above`` (exclusive), ``choices``, ``type``.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def with_default(kind: type, name: str, default: Any) -> Any:
    """The option ``name`` of other settings, with another default."""
    (known,) = (field for field in dataclasses.fields(kind) if field.name == name)
    return dataclasses.field(default=default, metadata=known.metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings whose fields are made by ``option``; checked when they are made.

    Raises:
        SettingsError: naming the field, if a value is not one that it takes.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if value is None:
                continue
            for wrong, expected in (
                # NaN is neither below nor above any limit.
                (isinstance(value, float) and not math.isfinite(value), "a finite number"),
                ("least" in limits and value < limits["least"], f"at least {limits.get('least')}"),
                ("most" in limits and value > limits["most"], f"at most {limits.get('most')}"),
                ("above" in limits and not value > limits["above"], f"above {limits.get('above')}"),
                (
                    "choices" in limits and value not in limits["choices"],
                    f"one of {', '.join(map(str, limits.get('choices', ())))}",
                ),
            ):
                if wrong:
                    raise SettingsError(f"{field.name}: got {value!r}; expected {expected}")


def pick(kind: type[S], settings: Options, **changes: Any) -> S:
    """Settings of one step from those of a whole run: fields of equal name, changed by ``changes``."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    shared = {n: v for n, v in vars(settings).items() if n in names}
    return kind(**{**shared, **changes})


def model_key(model: str) -> str:
    """A model's name in stored settings: of a local folder the name alone, without its path."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"
