"""For mkdocs, links to files of the repository: pictures are copied, other files are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_PICTURE = re.compile(r"\]\(\.\./([\w/.-]+\.png)\)")
_FILE = re.compile(r"\[([^\]]+)\]\(\.\./([\w/.-]+)(?:#[\w-]+)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with the pictures of the repository, and names in the place of links to its files."""
    from mkdocs.structure.files import File

    for name in _PICTURE.findall(markdown):
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    markdown = _PICTURE.sub(r"](\1)", markdown)
    return _FILE.sub(r"\1 (`\2`)", markdown)
