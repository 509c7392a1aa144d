"""Manifests: what a result was made of. Reads them, and compares them with the run that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from topr_kernels.recipe.files import FileError, check_link, checksum, read_json, write_json
from topr_kernels.recipe.options import SettingsError, flag


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
    """Reads a manifest; None if there is none, or the file of that name is no manifest.

    Raises:
        FileError: if it is not JSON: it may be a damaged manifest.
    """
    value = read_json(path) if path.exists() else None
    ours = isinstance(value, dict) and "step" in value and isinstance(value.get("outputs"), dict)
    return value if ours else None


def manifest_of(output: Path) -> dict[str, Any] | None:
    """The manifest of an output, or None if it has none.

    Raises:
        FileError: as ``read_manifest``.
    """
    manifest = read_manifest(manifest_path(output))
    # The output of these is NAME.json itself: a file NAME beside it is not theirs.
    return None if manifest is None or manifest["step"] in ("evaluate", "vote") else manifest


def check_input(path: Path) -> None:
    """Checks that an input exists, is finished, and has the checksum of its manifest.

    Raises:
        FileError: if it is absent, unfinished or changed; a file without a manifest passes.
    """
    manifest, file = manifest_of(path), manifest_path(path)
    if manifest is not None:
        check_outputs(manifest, file, [path])
    elif partial_path(file).exists():
        raise FileError(
            f"{path}: unfinished; run the command that makes it again, and it continues"
        )
    check_link(path)
    if not path.exists():
        raise FileError(f"{path}: no such file")


def noted_checksum(manifest: Mapping[str, Any], output: Path) -> Any:
    """The checksum of an output in a manifest; None if it is not there."""
    known = manifest.get("outputs")
    return known.get(output.name) if isinstance(known, Mapping) else None


def write_or_check_settings(path: Path, wanted: Mapping[str, Any], shown: Path) -> None:
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
        check_settings(path, wanted, shown)


def check_settings(path: Path, wanted: Mapping[str, Any], shown: Path) -> None:
    """Checks that the settings in a file are those of this run.

    Arguments and errors are those of ``write_or_check_settings``.
    """
    try:
        stored = read_mapping(path)
    except FileError as error:
        # Deleting just this file would let results of unknown settings pass for these.
        raise SettingsError(
            f"{path}: damaged, so the settings of the results beside it are unknown; delete the "
            f"folder {path.parent}, or choose another --out"
        ) from error
    refuse_other_settings(stored, wanted, shown)


def refuse_other_settings(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], shown: Path
) -> None:
    """Refuses results of other settings or inputs.

    Args:
        stored: settings and inputs of the results.
        wanted: those of this run.
        shown: what the message calls the results.

    Raises:
        SettingsError: naming each difference and the remedy.
    """
    lines = list(_differences(stored, wanted))
    if lines:
        raise SettingsError(
            f"{shown} is of a run with other settings:{''.join(lines)}\nGive the same settings to "
            "resume it, delete it to start anew (topr demo: --restart), or choose another --out"
        )


def _differences(stored: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        there = stored.get(name) if isinstance(stored, Mapping) else None
        if there == value:
            continue
        if name == "inputs" and isinstance(value, Mapping):
            yield from _other_inputs(there if isinstance(there, Mapping) else {}, value)
        elif isinstance(value, Mapping) and isinstance(there, Mapping):
            yield from _differences(there, value)
        else:
            shown = "topr_kernels" if name == "version" else flag(name)
            yield f"\n  {shown}: {there!r} there, {value!r} now"


def _other_inputs(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        there = stored.get(name)
        if there == value:
            continue
        # The manifest of topr iterate holds the checksum alone.
        one, other = (
            x if isinstance(x, Mapping) else {"file": name, "sha256": x} for x in (there, value)
        )
        before, after = (one.get("file") if there else None), other["file"]
        if before != after:
            yield f"\n  {flag(name)}: {before!r} there, {after!r} now"
        else:
            old, new = (f"{str(x.get('sha256'))[:12]}..." for x in (one, other))
            yield f"\n  {flag(name)}: {after!r} has changed since: sha256 {old} there, {new} now"
    for name in sorted(stored.keys() - wanted.keys()):
        yield f"\n  {flag(name)}: a file there, none now"


def check_outputs(manifest: Mapping[str, Any], file: Path, outputs: Sequence[Path]) -> None:
    """Checks outputs against the checksums in their manifest.

    Args:
        manifest: what it holds.
        file: its path, for the messages.
        outputs: the files and folders to check.

    Raises:
        FileError: naming the output that is missing, changed or not in the manifest, and the remedy.
    """
    for path in outputs:
        known = noted_checksum(manifest, path)
        # For instance after both were renamed.
        if known is None:
            raise FileError(
                f"{file}: does not tell the checksum of {path.name}; give both the names they had, "
                f"or move {file.name} away"
            )
        if not path.exists():
            raise FileError(f"{path}: missing, though {file.name} tells of it; delete that too")
        if checksum(path) != known:
            raise FileError(
                f"{path}: not as it was written (its checksum is not the one in {file.name}); "
                "delete both and make it anew"
            )
