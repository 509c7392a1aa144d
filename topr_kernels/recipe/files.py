"""Files that are either whole or absent: every result is written beside its place, then moved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that does not hold what it should; the message names it and the remedy."""


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters; after its type where that helps."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else f"{said[:297]}..."
    # Messages of these make sense on their own, unlike a KeyError's.
    if isinstance(error, (OSError, ValueError)) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def user_path(text: str) -> Path:
    """The path that a flag gives; ``~`` is the home folder, also if no shell has expanded it."""
    return Path(os.path.expanduser(text))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to ``path`` that takes its place when the block succeeds.

    A process killed inside the block leaves ``path`` as it was. The bytes are written to disk before the
    file is renamed, so that a machine that goes down leaves no empty file either.

    Raises:
        FileError: if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id in the name: the next run overwrites what a killed one left behind.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        move(temporary, path)
    except OSError as error:
        # For instance a full disk.
        if error.filename is None:
            raise FileError(f"{path}: cannot be written ({error})") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Gives a whole file or folder another name on the same file system, and waits for the disk."""
    os.replace(source, target)
    _sync(target.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN is refused: it is not JSON.

    Raises:
        ValueError: if ``value`` holds a NaN or an infinity.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileError: if it does not parse; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not JSON ({error}); delete it and run again") from error


def parse_json(text: str) -> Any:
    """A text as JSON.

    Raises:
        json.JSONDecodeError: if it is not JSON.
        ValueError: if an object holds a key twice, of which Python would keep the last; if a number has
            thousands of digits.
        RecursionError: if brackets are nested thousands deep.
    """
    return json.loads(text, object_pairs_hook=_once)


def parse_object(line: str, where: str, error: type[ValueError]) -> Mapping[str, Any]:
    """A line of a JSONL file; raises ``error``, naming the line, if it is not a JSON object."""
    try:
        value = parse_json(line)
    except json.JSONDecodeError as problem:
        why = f"{problem.msg} at character {problem.pos + 1}"
        raise error(f"{where}: not a line of JSON ({why}); half-written?") from problem
    # A number of thousands of digits, or brackets as deep.
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: JSON that cannot be read ({problem})") from problem
    if not isinstance(value, Mapping):
        raise error(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"the key {name!r} is there twice; leave one of the two out")
        mapping[name] = value
    return mapping


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``path`` when the block succeeds.

    Raises:
        FileExistsError: if ``path`` exists already and is not empty.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        move(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def merged_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder whose files go into ``path`` when the block succeeds, one by one.

    Files of other names stay. A process killed inside the block leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in list(temporary.rglob("*")):
            target = path / file.relative_to(temporary)
            if not file.is_dir():
                _sync(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                move(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


#: Files that file managers and file systems leave in folders.
_NOT_OURS = {
    ".DS_Store",
    "Thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    ".directory",
    ".Spotlight-V100",
}
_NOT_OURS |= {".Trashes", ".fseventsd", ".AppleDouble", "__MACOSX", "@eaDir"}


def files_in(folder: Path) -> list[Path]:
    """The files in a folder and below, sorted, without those of the system (``.DS_Store``).

    Raises:
        FileError: naming a broken link.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if any(n in _NOT_OURS or n.startswith(("._", ".nfs")) for n in names):
            continue
        check_link(path)
        if path.is_file():
            files.append(path)
    return files


def check_link(path: Path) -> None:
    """Refuses a broken link.

    Raises:
        FileError: naming the link and its target.
    """
    if path.is_symlink() and not path.exists():
        raise FileError(
            f"{path}: a link to {os.readlink(path)}, which is not there; copy the file itself, or mend "
            "the link"
        )


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder, as hex.

    Raises:
        FileError: as ``files_in``.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for file in files_in(path):
            digest.update(f"{file.relative_to(path).as_posix()} {checksum(file)}\n".encode())
        return digest.hexdigest()
    status = path.stat()
    # Several steps in a row read the same model: its bytes are read again only if the file changed.
    return _content(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _content(path: Path, *_state: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    # Windows cannot open folders, and has no such call for them.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
