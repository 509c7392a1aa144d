"""Steps of the pipeline that resume: settings first, then outputs whole or absent, the manifest last.

A step leaves its outputs and one manifest (JSON: settings, checksums of inputs and outputs, figures).
While it runs, a folder ``.NAME.partial`` beside the manifest holds its settings, finished parts and the
drafts of its outputs. A finished draft is moved to its place, but never onto an existing file, which is
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
    check_input,
    check_outputs,
    check_settings,
    noted_checksum,
    partial_path,
    read_manifest,
    read_mapping,
    refuse_other_settings,
    write_or_check_settings,
)
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.processes import current

if sys.platform != "win32":
    import fcntl

#: Draft of the manifest, in the folder of an unfinished step.
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
    """The state of a step: "finished", "interrupted" or "new". Changes nothing.

    Raises:
        FileError, SettingsError: as ``run_step``.
    """
    wanted = step.wanted()
    if _finished(step.manifest, wanted, step.outputs) is not None:
        return "finished"
    _refuse_foreign(step)
    settings_file = partial_path(step.manifest) / "settings.json"
    if not settings_file.exists():
        return "new"
    try:
        check_settings(settings_file, wanted, step.manifest)
    except SettingsError:
        if not _nothing_done(settings_file):
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
        compute: takes the folder for its parts, where those of a killed run lie; returns the figures.
        share: what several processes do together before ``compute``; takes the same folder and leaves
            finished parts there. Not called where there is only one process.
        lockstep: see ``Processes.share``.

    Raises:
        FileError: if an input or a finished output is damaged.
        SettingsError: if the results there have other settings or inputs, or were not made by this step,
            or another process is working on it.
        ProcessError: if another of several processes fails.
    """
    manifest, outputs = step.manifest, step.outputs
    partial = partial_path(manifest)
    crew = current()

    def begin() -> tuple[dict[str, Any], bool]:
        wanted = step.wanted()
        finished = _finished(manifest, wanted, outputs)
        if finished is None:
            finished = _lock_and_resume(held, step, wanted)
        if finished is not None:
            # A kill after the manifest was written leaves the parts behind.
            shutil.rmtree(partial, ignore_errors=True)
        return finished or wanted, finished is not None

    def finish() -> dict[str, Any]:
        figures = compute(partial)
        result = {
            **wanted,
            "outputs": {path.name: checksum(step.draft(path)) for path in outputs},
            "figures": figures,
            "seconds": round(time.perf_counter() - start, 1),
        }
        # Before any move: after a kill its checksums tell our files from the user's.
        write_json(partial / _DRAFT, result)
        _put_in_place(step, result)
        shutil.rmtree(partial)
        return result

    def hold_and(share: Callable[[Path], object]) -> None:
        # The first process locks the folder, the others its settings file. If the first one dies, their
        # locks stay: the next run must not begin while another process still writes a part.
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
    """The manifest of a step that is finished; None if it is not."""
    if not manifest.exists():
        return None
    stored = read_manifest(manifest)
    if stored is None:
        raise not_ours(manifest)
    refuse_other_settings(stored, wanted, manifest)
    check_outputs(stored, manifest, outputs)
    return stored


def _lock_and_resume(
    held: ExitStack, step: Step, wanted: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Locks an unfinished step and writes or checks its settings; moves its drafts if they are complete.

    Returns:
        The manifest if the step is finished now, else None.
    """
    manifest, partial = step.manifest, partial_path(step.manifest)
    _refuse_foreign(step)
    held.enter_context(locked(partial))
    finished = _finished(manifest, wanted, step.outputs)
    if finished is not None:
        return finished
    settings_file = partial / "settings.json"
    if settings_file.exists():
        # Raises if a process of an earlier run, whose first process died, still holds it.
        with _held(settings_file):
            pass
    # Settings without any work done, as of a model that could not be loaded, are discarded.
    if settings_file.exists() and _nothing_done(settings_file):
        settings_file.unlink()
    on_error(held, lambda: _remove_settings(settings_file))
    write_or_check_settings(settings_file, wanted, manifest)
    drafted = partial / _DRAFT
    if drafted.exists():
        finished = read_mapping(drafted)
        refuse_other_settings(finished, wanted, manifest)
        _put_in_place(step, finished)
    return finished


def _nothing_done(settings_file: Path) -> bool:
    """Whether the folder of a step holds its settings and nothing else."""
    return [path for path in settings_file.parent.rglob("*") if not path.is_dir()] == [
        settings_file
    ]


def on_error(held: ExitStack, work: Callable[[], object]) -> None:
    """Has work done if the block of ``held`` raises; not if it is interrupted, which may resume."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            work()

    held.push(leave)


def _remove_settings(settings_file: Path) -> None:
    """Removes the settings of a run that failed before it had done anything."""
    # Another process of the run may still be at work: then they stay.
    with suppress(SettingsError, OSError):
        if _nothing_done(settings_file):
            with _held(settings_file):
                shutil.rmtree(settings_file.parent)


def _put_in_place(step: Step, drafted: Mapping[str, Any]) -> None:
    """Moves the drafts of a step to their places and writes its manifest.

    Raises:
        SettingsError: if something else lies in such a place.
        FileError: if a draft is damaged.
    """
    for path in step.outputs:
        draft = step.draft(path)
        # Without a draft: a killed run has moved it already.
        if draft.exists() and is_there(path):
            raise not_ours(path)
        source = draft if draft.exists() else path
        if not source.exists() or checksum(source) != noted_checksum(drafted, path):
            raise FileError(
                f"{source}: not as it was written; delete the folder {partial_path(step.manifest)} and "
                "run again"
            )
        if source is draft:
            move(draft, path)
    if is_there(step.manifest):
        raise not_ours(step.manifest)
    write_json(step.manifest, drafted)


def _refuse_foreign(step: Step) -> None:
    """Refuses files at the place of an output, unless an unfinished run of this step put them there."""
    # Outputs are looked at first. A process that finishes meanwhile writes the draft of its manifest,
    # moves its outputs, writes the manifest and deletes the draft, in this order.
    there = [path for path in step.outputs if is_there(path)]
    try:
        drafted = read_mapping(partial_path(step.manifest) / _DRAFT)
    except FileNotFoundError:
        drafted = {}
    for path in there:
        ours = path.exists() and checksum(path) == noted_checksum(drafted, path)
        if not ours and not step.manifest.exists():
            raise not_ours(path)


def is_there(path: Path) -> bool:
    """Whether the name is taken, also by a broken link."""
    return os.path.lexists(path)


def not_ours(path: Path) -> SettingsError:
    """The error for a file at the place of a result that this command did not make."""
    return SettingsError(
        f"{path}: exists, but was not made by this command; move it, or choose another --out"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it against other processes while the block runs.

    The folder, and those above it, are deleted again if they were made here and stayed empty.

    Raises:
        SettingsError: if another process has locked it.
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
            # The system releases the lock when the process ends, however it ends.
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # The process that held it may have deleted it, and a third one made it anew.
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
