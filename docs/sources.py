"""A hook of the site's build: files outside ``docs/`` that pages link to become pages of the site.

On the site a link ``../parallelflow/flow.py`` leads to the file's text, highlighted; a link to a folder to a list of
the Python files in it. A link to what does not exist stays as it is, and the strict build fails on it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+(?=\))")
LANGUAGES = {".py": "python", ".md": "markdown", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of all files that are linked to, and of those in linked folders."""
    root = Path(config.config_file_path).parent
    wanted = {
        path
        for file in files.documentation_pages()
        for link in LINK.findall(file.content_string)
        if (path := _outside(link, file, config)) is not None
    }
    wanted |= {part for path in wanted if path.is_dir() for part in _parts(path)}
    for path in sorted(wanted):
        name = path.relative_to(root).as_posix()
        text = _folder_page(path, name) if path.is_dir() else _file_page(path, name)
        page = File.generated(config, _page_of(path, root), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links to such files into links to their pages."""
    root = Path(config.config_file_path).parent
    if page.file.generated_by is not None:
        return markdown  # a page made here: the links in a file's text are its text

    def turned(match: re.Match[str]) -> str:
        path = _outside(match[0], page.file, config)
        if path is None:
            return match[0]
        return posixpath.relpath(_page_of(path, root), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(turned, markdown)


def _outside(link: str, file: File, config: MkDocsConfig) -> Path | None:
    """What a page's link leads to, if that exists in the repository and is no part of the site itself."""
    docs, root = Path(config.docs_dir), Path(config.config_file_path).parent
    path = Path(os.path.normpath(docs / posixpath.dirname(file.src_uri) / link))
    inside = path.is_relative_to(docs) or not path.is_relative_to(root)
    return None if inside or not path.exists() else path


def _page_of(path: Path, root: Path) -> str:
    return f"source/{path.relative_to(root).as_posix()}{'/index' if path.is_dir() else ''}.md"


def _parts(folder: Path) -> Iterator[Path]:
    return folder.glob("*.py")


def _head(name: str) -> str:
    return f"---\ntitle: {name}\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# `{name}`\n\n"


def _file_page(path: Path, name: str) -> str:
    text = path.read_text(encoding="utf-8")
    fence = "`" * (1 + max(2, *map(len, re.findall("`+", text)), 0))  # longer than any in the text
    return f"{_head(name)}{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}{fence}\n"


def _folder_page(path: Path, name: str) -> str:
    return _head(name + "/") + "".join(f"- [`{part.name}`]({part.name}.md)\n" for part in sorted(_parts(path)))
