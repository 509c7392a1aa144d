"""Steps of the pipeline that resume: settings claimed first, outputs whole or absent, manifest last.

A step leaves its outputs and one manifest (JSON: settings, checksums of inputs and outputs, figures).
While it runs, a folder ``.NAME.partial`` beside the manifest holds its settings, finished parts and the
drafts of its outputs. A finished draft is moved to its place and never onto anything: what lies there is
the user's.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from topr_kernels import __version__
from topr_kernels.recipe.files import (
    FileError,
    checksum,
    move,
    write_json,
)
from topr_kernels.recipe.manifests import (
    check_claim,
    check_input,
    check_outputs,
    claim,
    noted_checksum,
    partial_path,
    read_manifest,
    read_mapping,
    refuse_other,
)
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.processes import current

if sys.platform != "win32":
    import fcntl

#: The manifest to be, in the folder of an unfinished step.
_DRAFT = "manifest.json"


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
    check_outputs(found, manifest, outputs)
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
        if not found.exists() or checksum(found) != noted_checksum(drafted, path):
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
        ours = path.exists() and checksum(path) == noted_checksum(drafted, path)
        if not ours and not step.manifest.exists():
            raise foreign(path)


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, a link to nothing included."""
    return os.path.lexists(path)


def foreign(path: Path) -> SettingsError:
    """The refusal of what lies in the place of a result and is not ours."""
    return SettingsError(
        f"{path}: exists, but was not made by this command; move it, or choose another --out"
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
