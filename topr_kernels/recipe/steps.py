"""Steps of the pipeline that resume: settings claimed first, outputs whole or absent, manifest last.

A step leaves its outputs and one manifest (JSON: settings, checksums of inputs and outputs, figures).
While it runs, a folder ``.NAME.partial`` beside the manifest holds its settings, finished parts and the
drafts of its outputs. A finished draft is moved to its place and never onto anything: what lies there is
the user's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from topr_kernels import __version__
from topr_kernels.recipe.files import (
    FileError,
    check_link,
    checksum,
    move,
    one_line,
    read_json,
    write_json,
)
from topr_kernels.recipe.processes import ProcessError, current
from topr_kernels.recipe.records import RecordError

if sys.platform != "win32":
    import fcntl

S = TypeVar("S")

#: What a mistake in code raises, which shows its traceback.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
#: The manifest to be, in the folder of an unfinished step.
_DRAFT = "manifest.json"


class SettingsError(ValueError):
    """Settings that cannot be run, or that are not those of the results in the folder."""


@contextmanager
def naming(what: str, memory: str = "") -> Iterator[None]:
    """Has a failure of a library in the block tell, in one line, what flag or file it is of.

    Args:
        what: the flag or file, and what was done with it.
        memory: the flag to lower where memory does not suffice.

    Raises:
        SettingsError: for any error but a bug's, and those that name their file or field themselves.
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
    """A dataclass field that is also a flag: its default, its help, and what values it takes.

    Args:
        default: also tells the flag's type, unless ``type`` is given.
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
    """Settings of one step out of those of a whole run: fields of equal name, and ``changes``."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    shared = {n: v for n, v in vars(settings).items() if n in names}
    return kind(**{**shared, **changes})


def model_key(model: str) -> str:
    """The model as settings name it: a local folder by its name, without this machine's path."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies: its name and ``.json``."""
    # "." has no name.
    output = output if output.name else output.resolve()
    return output.with_name(output.name + ".json")


def partial_path(manifest: Path) -> Path:
    """Folder of an unfinished step's settings and parts."""
    return manifest.with_name(f".{manifest.name}.partial")


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileError: naming the file, if it is not one.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object; delete it and run again")
    return value


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Reads a manifest; None if there is none, or the file of that name is not one of ours.

    Raises:
        FileError: if it is not JSON: it may have been one.
    """
    found = read_json(path) if path.exists() else None
    ours = isinstance(found, dict) and "step" in found and isinstance(found.get("outputs"), dict)
    return found if ours else None


def manifest_of(output: Path) -> dict[str, Any] | None:
    """The manifest of an output, or None if it has none.

    Raises:
        FileError: as ``read_manifest``.
    """
    found = read_manifest(manifest_path(output))
    # These write no NAME but NAME.json itself: it may lie beside a model of that name by chance.
    return None if found is None or found["step"] in ("evaluate", "vote") else found


def check_input(path: Path) -> None:
    """Checks that an input is there, finished, and as its manifest says.

    Raises:
        FileError: if it is absent, unfinished or changed; a file without a manifest passes.
    """
    manifest = manifest_path(path)
    found = manifest_of(path)
    if found is not None:
        _check_outputs(found, manifest, [path])
    elif partial_path(manifest).exists():
        raise FileError(
            f"{path}: unfinished; run the command that makes it again, and it continues"
        )
    check_link(path)
    if not path.exists():
        raise FileError(f"{path}: no such file")


class Step(NamedTuple):
    """What one run of a command is.

    Attributes:
        step: name of the command.
        manifest: JSON file, written last.
        settings: all that the outputs depend on, as plain values without paths of this machine.
        inputs: what is read, by the name of its flag.
        outputs: files and folders that the run writes, each whole or not at all.
    """

    step: str
    manifest: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: Sequence[Path]

    def draft(self, output: Path) -> Path:
        """Where the run writes an output; once all are there they take their places."""
        return partial_path(self.manifest) / "outputs" / output.name

    def wanted(self) -> dict[str, Any]:
        """The head of its manifest, of checked inputs.

        Raises:
            FileError: as ``check_input``.
        """
        for path in self.inputs.values():
            check_input(path)
        return {
            "step": self.step,
            "version": __version__,
            "settings": dict(self.settings),
            "inputs": {n: {"file": p.name, "sha256": checksum(p)} for n, p in self.inputs.items()},
        }


def state_of(step: Step) -> str:
    """What ``run_step`` finds: "finished", "interrupted" or "new". Changes nothing.

    Raises:
        FileError, SettingsError: as ``run_step``.
    """
    wanted = step.wanted()
    if _finished(step.manifest, wanted, step.outputs) is not None:
        return "finished"
    _refuse_foreign(step)
    claimed = partial_path(step.manifest) / "settings.json"
    if not claimed.exists():
        return "new"
    try:
        check_claim(claimed, wanted, step.manifest)
    except SettingsError:
        if not _nothing_done(claimed):
            raise
        return "new"
    return "interrupted"


def run_step(
    step: Step,
    compute: Callable[[Path], dict[str, Any]],
    *,
    share: Callable[[Path], object] | None = None,
    lockstep: bool = False,
) -> dict[str, Any]:
    """Runs a step unless it is finished, and returns its manifest.

    Of several processes (``processes.joined``), each of which must call this, the first does everything
    but ``share``, and the others wait for it.

    Args:
        step: what is run; ``compute`` writes the drafts of its outputs (``Step.draft``).
        compute: is given the folder for its parts, where it finds those of a killed run; returns the
            figures.
        share: what several processes do together before ``compute``, which finds the parts they leave;
            not called where there is only one.
        lockstep: see ``Processes.share``.

    Raises:
        FileError: if an input or a finished output is damaged.
        SettingsError: if the results there have other settings or inputs, or are not this step's, or
            another process is at it.
        ProcessError: if another of several processes fails.
    """
    manifest, outputs = step.manifest, step.outputs
    partial = partial_path(manifest)
    crew = current()

    def begin() -> tuple[dict[str, Any], bool]:
        wanted = step.wanted()
        found = _finished(manifest, wanted, outputs)
        if found is None:
            found = _take_on(held, step, wanted)
        if found is not None:
            # A kill after the manifest was written leaves the parts behind.
            shutil.rmtree(partial, ignore_errors=True)
        return found or wanted, found is not None

    def finish() -> dict[str, Any]:
        figures = compute(partial)
        result = {
            **wanted,
            "outputs": {path.name: checksum(step.draft(path)) for path in outputs},
            "figures": figures,
            "seconds": round(time.perf_counter() - start, 1),
        }
        # Before any move: after a kill it tells which of what lies there is ours.
        write_json(partial / _DRAFT, result)
        _put_in_place(step, result)
        shutil.rmtree(partial)
        return result

    def hold_and(share: Callable[[Path], object]) -> None:
        # The first process holds the folder. A lock of the others on what it claimed outlives it: the
        # next run must not begin while one that lost the first still writes a part.
        with _held(partial / "settings.json", shared=True):
            share(partial)

    with ExitStack() as held:
        wanted, done = crew.first(begin)
        if done:
            return wanted
        start = time.perf_counter()
        if share is not None and crew.count > 1:
            crew.share(lambda: hold_and(share), lockstep=lockstep)
        return crew.first(finish)


def _finished(
    manifest: Path, wanted: Mapping[str, Any], outputs: Sequence[Path]
) -> dict[str, Any] | None:
    """The manifest of a finished step, if it is."""
    if not manifest.exists():
        return None
    found = read_manifest(manifest)
    if found is None:
        raise foreign(manifest)
    refuse_other(found, wanted, manifest)
    _check_outputs(found, manifest, outputs)
    return found


def _take_on(held: ExitStack, step: Step, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Locks and claims an unfinished step; the manifest, if all that is left is to move its drafts."""
    manifest, partial = step.manifest, partial_path(step.manifest)
    _refuse_foreign(step)
    held.enter_context(locked(partial))
    found = _finished(manifest, wanted, step.outputs)
    if found is not None:
        return found
    claimed = partial / "settings.json"
    if claimed.exists():
        # Nobody is left of a run that lost its first process.
        with _held(claimed):
            pass
    # Settings under which nothing was done, as those of a model that cannot be loaded, bind nobody.
    if claimed.exists() and _nothing_done(claimed):
        claimed.unlink()
    on_refusal(held, lambda: _withdraw(claimed))
    claim(claimed, wanted, manifest)
    drafted = partial / _DRAFT
    if drafted.exists():
        found = read_mapping(drafted)
        refuse_other(found, wanted, manifest)
        _put_in_place(step, found)
    return found


def _nothing_done(claimed: Path) -> bool:
    return [path for path in claimed.parent.rglob("*") if not path.is_dir()] == [claimed]


def on_refusal(held: ExitStack, work: Callable[[], object]) -> None:
    """Has work done if the block of ``held`` fails, but not if it is interrupted, which may go on."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            work()

    held.push(leave)


def _withdraw(claimed: Path) -> None:
    """Takes back the claim of a run that failed before it had done anything."""
    # Another process of the run may still be at work: then it stays.
    with suppress(SettingsError, OSError):
        if _nothing_done(claimed):
            with _held(claimed):
                shutil.rmtree(claimed.parent)


def _put_in_place(step: Step, drafted: Mapping[str, Any]) -> None:
    """Moves the drafts of a step to their places and writes its manifest.

    Raises:
        SettingsError: if something else lies in such a place.
        FileError: if a draft is damaged.
    """
    for path in step.outputs:
        draft = step.draft(path)
        # A killed run has moved the others.
        if draft.exists() and is_there(path):
            raise foreign(path)
        found = draft if draft.exists() else path
        if not found.exists() or checksum(found) != _noted(drafted, path):
            raise FileError(
                f"{found}: not as it was written; delete the folder {partial_path(step.manifest)} and "
                "run again"
            )
        if found is draft:
            move(draft, path)
    if is_there(step.manifest):
        raise foreign(step.manifest)
    write_json(step.manifest, drafted)


def _refuse_foreign(step: Step) -> None:
    """Refuses what lies in the place of an output and is not what an unfinished run put there."""
    # The outputs first: a process that finishes meanwhile has written the draft of its manifest
    # before it moved them, and the manifest before it deletes that draft.
    there = [path for path in step.outputs if is_there(path)]
    try:
        drafted = read_mapping(partial_path(step.manifest) / _DRAFT)
    except FileNotFoundError:
        drafted = {}
    for path in there:
        ours = path.exists() and checksum(path) == _noted(drafted, path)
        if not ours and not step.manifest.exists():
            raise foreign(path)


def _noted(manifest: Mapping[str, Any], output: Path) -> Any:
    """The checksum of an output that a manifest tells; None if it tells none."""
    known = manifest.get("outputs")
    return known.get(output.name) if isinstance(known, Mapping) else None


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, a link to nothing included."""
    return os.path.lexists(path)


def foreign(path: Path) -> SettingsError:
    """The refusal of what lies in the place of a result and is not ours."""
    return SettingsError(
        f"{path}: exists, but was not made by this command; move it, or choose another --out"
    )


def claim(path: Path, wanted: Mapping[str, Any], shown: Path) -> None:
    """Writes settings into a new file, or checks that the file's are the same.

    Args:
        path: JSON file of settings.
        wanted: those of this run.
        shown: what the messages call the results.

    Raises:
        SettingsError: if they differ, or the file is damaged.
    """
    if not path.exists():
        write_json(path, wanted)
    else:
        check_claim(path, wanted, shown)


def check_claim(path: Path, wanted: Mapping[str, Any], shown: Path) -> None:
    """Checks that the settings in a file are those of this run; arguments and errors as ``claim``."""
    try:
        found = read_mapping(path)
    except FileError as error:
        # Deleting just this file would let results of unknown settings pass for these.
        raise SettingsError(
            f"{path}: damaged, so the settings of the results beside it are unknown; delete the "
            f"folder {path.parent}, or choose another --out"
        ) from error
    refuse_other(found, wanted, shown)


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], shown: Path) -> None:
    """Refuses results of other settings or inputs, saying what differs.

    Raises:
        SettingsError: naming each difference and the remedy.
    """
    lines = list(_differences(found, wanted))
    if lines:
        raise SettingsError(
            f"{shown} is of a run with other settings:{''.join(lines)}\nGive the same settings to "
            "resume it, delete it to start anew (topr demo: --restart), or choose another --out"
        )


def _differences(found: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        there = found.get(name) if isinstance(found, Mapping) else None
        if there == value:
            continue
        if name == "inputs" and isinstance(value, Mapping):
            yield from _other_inputs(there if isinstance(there, Mapping) else {}, value)
        elif isinstance(value, Mapping) and isinstance(there, Mapping):
            yield from _differences(there, value)
        else:
            shown = "topr_kernels" if name == "version" else flag(name)
            yield f"\n  {shown}: {there!r} there, {value!r} now"


def _other_inputs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        there = found.get(name)
        if there == value:
            continue
        # That of topr iterate is the checksum alone.
        one, other = (
            x if isinstance(x, Mapping) else {"file": name, "sha256": x} for x in (there, value)
        )
        before, after = (one.get("file") if there else None), other["file"]
        if before != after:
            yield f"\n  {flag(name)}: {before!r} there, {after!r} now"
        else:
            old, new = (f"{str(x.get('sha256'))[:12]}..." for x in (one, other))
            yield f"\n  {flag(name)}: {after!r} has changed since: sha256 {old} there, {new} now"
    for name in sorted(found.keys() - wanted.keys()):
        yield f"\n  {flag(name)}: a file there, none now"


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _check_outputs(found: Mapping[str, Any], manifest: Path, outputs: Sequence[Path]) -> None:
    for path in outputs:
        known = _noted(found, path)
        # As after a renaming of both.
        if known is None:
            raise FileError(
                f"{manifest}: does not tell the checksum of {path.name}; give both the names they had, "
                f"or move {manifest.name} away"
            )
        if not path.exists():
            raise FileError(f"{path}: missing, though {manifest.name} tells of it; delete that too")
        if checksum(path) != known:
            raise FileError(
                f"{path}: not as it was written (its checksum is not the one in {manifest.name}); "
                "delete both and make it anew"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it against other processes while the block runs.

    The folder, and those above it, are deleted again if they were made here and stayed empty.

    Raises:
        SettingsError: if another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        try:
            yield
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def _held(path: Path, *, shared: bool = False) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            # The system lets go of it when the process ends, however it ends.
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # Whoever held it may have deleted it, and a third made it anew.
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            folder = path if path.is_dir() else path.parent
            raise SettingsError(
                f"{folder}: another process is working there; wait for it, or choose another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)
