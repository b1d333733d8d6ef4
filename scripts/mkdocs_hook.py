"""Turns the pages as GitHub shows them into what MkDocs understands, and has search work without a server.

Called by MkDocs while it builds the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

FENCE = re.compile(r"^(```+)([\w-]+) [^\n`]*$", re.M)
"""An info string of several words: all but the language are for the tests (tests/fences.py)."""

CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)")


def on_post_build(config, **_) -> None:
    """The index of the search as a script too: a page opened from disk may load scripts, but no data."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"self.searchIndex = {index};\n", encoding="utf-8")


def on_page_markdown(markdown: str, page, **_) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    parts = CODE.split(FENCE.sub(r"\1\2", markdown))
    return "".join(
        part if i % 2 else LINK.sub(lambda link: _inside(link, folder), part) for i, part in enumerate(parts)
    )


def _inside(link: re.Match, folder: str) -> str:
    """A link out of docs/ as text and the path in the repository: the site holds the pages alone."""
    path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
    return link[0] if path.startswith("docs/") else f"{link[1]} (`{path}`)"
