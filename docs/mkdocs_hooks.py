"""For mkdocs: the repository's pages that lie outside ``docs/``, and roles in docstrings.

Pages link to each other as they lie in the repository, which is what readers of the repository need. In the site those
outside ``docs/`` are under ``repository/``, so their links, and links to them, have to be turned.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "kernels/README.md",
    "sfs_triton/embedded/README.md",
    "tests/golden/README.md",
]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|meth|mod|data|func):(<code[^>]*>)~?")


def on_files(files, config):
    """Add the pages outside, and whatever else outside is linked to."""
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")] + OUTSIDE
    targets = {_target(posixpath.dirname(name), link) for name in pages for link in _links(name)}
    outside = {name for name in targets if not name.startswith("docs/") and (ROOT / name).is_file()}
    for name in sorted(outside.union(OUTSIDE)):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def _links(name: str) -> list[str]:
    return [link[0] for link in LINK.findall((ROOT / name).read_text(encoding="utf-8"))]


def _target(folder: str, link: str) -> str:
    """The path in the repository that a link in ``folder`` leads to."""
    return posixpath.normpath(posixpath.join(folder, link))


def on_page_markdown(markdown, page, config, files):
    """Turn links from how files lie in the repository to how they lie in the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}")

    def turned(link: re.Match) -> str:
        target = _target(folder, link[1])
        if not (ROOT / target).is_file():
            return link[0]
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return LINK.sub(turned, markdown)


def on_page_content(html, page, config, files):
    """Docstrings name things as ``:class:`Engine` ``; the name is enough."""
    return ROLE.sub(r"\1", html)
