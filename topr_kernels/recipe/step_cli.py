"""Flags of the commands of ``topr`` other than ``demo``, and the calls behind them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from topr_kernels.recipe import settings as kinds
from topr_kernels.recipe.files import check_link, one_line, user_path
from topr_kernels.recipe.options import Options, SettingsError, did_you_mean, in_words
from topr_kernels.recipe.processes import current

#: Command to its settings, whether it reads records, and what ``--out`` is.
_COMMANDS: dict[str, tuple[type[Options], bool, str]] = {
    "generate": (kinds.GenerateSettings, False, "records to write, .parquet or .jsonl"),
    "score": (kinds.ScoreSettings, True, "records to write, .parquet or .jsonl"),
    "curate": (kinds.CurateSettings, True, "records to write, .parquet or .jsonl"),
    "train": (kinds.TrainCommandSettings, True, "folder of the trained model"),
    "evaluate": (kinds.EvaluateSettings, False, ".json file of the figures"),
    "verify": (kinds.VerifySettings, True, "records to write, .parquet or .jsonl"),
    "vote": (kinds.VoteSettings, True, ".json file of the figures"),
    "iterate": (kinds.IterateSettings, False, "folder of the run"),
}

#: Where the function of a command is, if not in ``commands``.
_MODULES = {"iterate": "iterate", "verify": "verifier_commands", "vote": "verifier_commands"}


def add_flags(parser: argparse.ArgumentParser, command: str, debug: str) -> None:
    """Gives a parser the flags of a command: one for every field of its settings.

    Args:
        parser: of the command.
        command: its name.
        debug: help of ``--debug``.
    """
    kind, reads, out = _COMMANDS[command]
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=user_path, required=True, help=out)
    if reads:
        run.add_argument("--records", type=user_path, required=True, help="records to read")
    run.add_argument("--config", type=user_path, help="YAML file of flags; those given here win")
    run.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="say what would be done and cost; write nothing",
    )
    run.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help=debug)
    owners: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(kind):
        owner = _owner(kind, field.name)
        title = (owner.__doc__ or "").splitlines()[0].partition(";")[0].rstrip(".").lower()
        group = owners.setdefault(title, parser.add_argument_group(title))
        flag = f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=text
            )
        elif isinstance(field.default, tuple):
            group.add_argument(flag, action="append", default=[], metavar="NAME=VALUE", help=text)
        else:
            group.add_argument(
                flag,
                type=field.metadata.get("type", type(field.default)),
                default=field.default,
                choices=field.metadata.get("choices"),
                help=text,
            )


def run_command(command: str, args: argparse.Namespace) -> None:
    """Runs a command, or prints what it would do."""
    kind, reads, _ = _COMMANDS[command]
    settings = kind(**{f.name: getattr(args, f.name) for f in dataclasses.fields(kind)})
    # Imported here, so that a wrong flag is reported before transformers is imported.
    module = "plans" if args.dry_run else _MODULES.get(command, "commands")
    functions = importlib.import_module(f"topr_kernels.recipe.{module}")
    function: Callable[..., Any] = getattr(
        functions, f"{'plan' if args.dry_run else 'run'}_{command}"
    )
    result = function(settings, *([args.records] if reads else []), args.out)
    if args.dry_run:
        print("\n".join(result))
    elif command != "iterate" and current().rank == 0:
        print(f"{command}: {args.out}, {result['seconds']:.1f} s")


class _FileParser(argparse.ArgumentParser):
    """Reads one flag of a file at a time."""

    def __init__(self, command: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        add_flags(self, command, "")
        for action in self._actions:
            action.required = False
        flags = [flag[2:] for action in self._actions for flag in action.option_strings]
        #: Names that a file may have, as the flags are spelt but for the dashes in front.
        self.known = [flag for flag in flags if flag != "config"]

    def error(self, message: str) -> NoReturn:
        raise SettingsError(in_words(re.sub(r"^argument \S+: ", "", message)))


def config_flags(argv: Sequence[str]) -> list[str]:
    """The arguments, with the flags of ``--config`` in front, so that arguments override them.

    Raises:
        SettingsError: if the file is not a YAML mapping of names of flags to plain values.
        FileNotFoundError: if there is no such file.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=user_path)
    path = finder.parse_known_args(argv[1:])[0].config
    if path is None:
        return list(argv)
    flags_by_name = read_yaml(path)
    if not isinstance(flags_by_name, Mapping):
        raise SettingsError(
            f"{path}: got a {type(flags_by_name).__name__}; expected a mapping of flags"
        )
    parser = _FileParser(argv[0])
    flags: list[str] = []
    names: set[str] = set()
    for name, value in flags_by_name.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag in names or flag == "--config":
            raise SettingsError(
                f"{path}, {name}: "
                + (
                    "there twice; keep one"
                    if flag in names
                    else "a file names no other; put it here"
                )
            )
        names.add(flag)
        if flag[2:] not in parser.known:
            meant = did_you_mean(flag[2:], parser.known).replace("-", "_")
            raise SettingsError(f"{path}, {name}: topr {argv[0]} has no such flag{meant}")
        if value is False and flag.startswith("--no-"):
            raise SettingsError(f"{path}, {name}: got false; write {flag[5:]}: true")
        if isinstance(value, bool):
            said = [flag if value else f"--no-{flag[2:]}"]
        elif name == "engine" and isinstance(value, Mapping):
            said = [f"{flag}={setting}={x}" for setting, x in value.items()]
        elif isinstance(value, Mapping):
            said = [f"{flag}={json.dumps(value)}"]
        elif isinstance(value, (str, int, float)):
            said = [f"{flag}={value}"]
        else:
            raise SettingsError(
                f"{path}, {name}: got {value!r}; expected a text, a number, true or false"
            )
        try:
            parser.parse_args(said)
        except SettingsError as error:
            raise SettingsError(f"{path}, {name}: {error}") from None
        flags += said
    return [argv[0], *flags, *argv[1:]]


def read_yaml(path: Path) -> Any:
    """Reads a YAML file; refuses duplicate keys, and numbers that YAML reads as another value.

    Raises:
        SettingsError: naming the file, and the line, if it is not such a file.
    """
    # PyYAML comes with transformers.
    yaml: Any = importlib.import_module("yaml")
    check_link(path)
    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(yaml, yaml.compose(text, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(text)
    # RecursionError: brackets too deep.
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: not YAML ({one_line(error)})") from error


def _check_yaml(yaml: Any, node: Any, path: Path, seen: set[int] | None = None) -> None:
    """Refuses duplicate keys, and text that YAML 1.1 reads as another value than it looks like."""
    seen = set() if seen is None else seen
    # Copies of copies would take forever, and one may be inside of itself.
    if id(node) in seen and not isinstance(node, yaml.ScalarNode):
        raise SettingsError(
            f"{path}, line {node.start_mark.line + 1}: an alias stands for a list or a mapping; write "
            "it out where it is meant"
        )
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        # YAML 1.1 reads 010 as 8, 1:30 as 90, and 09 as a text.
        octal = re.fullmatch(r"[-+]?0[\d_]+(\.\d*)?", node.value)
        number = node.tag.endswith((":int", ":float")) and set(node.value) & set("_:xb")
        if plain and (octal or number):
            raise SettingsError(
                f"{path}, line {node.start_mark.line + 1}: got {node.value}; expected a decimal number "
                "without leading zeros, or a text in quotes"
            )
        return
    if isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SettingsError(
                    f"{path}, line {key.start_mark.line + 1}: expected a name before the colon"
                )
            if key.value in known:
                raise SettingsError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value} is there twice; keep one"
                )
            known.add(key.value)
    for part in getattr(node, "value", ()):
        for child in part if isinstance(part, tuple) else (part,):
            _check_yaml(yaml, child, path, seen)


def _owner(kind: type[Options], name: str) -> type:
    """The class that adds the field, whose first line of documentation heads its group."""
    return next(c for c in reversed(kind.__mro__) if name in vars(c).get("__annotations__", {}))
