"""Pages of files outside docs/, so that links to them are right in a checkout and on the site.

On the site, a link to a file of the repository leads to a page made of that file: Markdown as it
is, other text as a listing, a folder as the list of what it holds. Pictures and data are copied.
A paragraph that is nothing but a link with the title "include",

    [the models, in README](../README.md#models "include")

gives way to what it names: a section of Markdown up to its next heading, or the text of a file
(Markdown without its title).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS, REPOSITORY = "docs/", "repository/"
COPIED = {".csv", ".json", ".png", ".svg"}
LANGUAGES = {
    ".cuh": "cuda",
    ".cu": "cuda",
    ".py": "python",
    ".jinja": "jinja",
    ".c": "c",
    ".h": "c",
}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=[ )])")
INCLUDE = re.compile(
    r'^\[[^\]\n]*\]\((?P<path>[^)\s#]+)(?:#(?P<section>\S+))? "include"\)$', re.MULTILINE
)
HEADING = re.compile(r"^#+ (.*)$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that a page links to, however many steps away."""
    root = _root(config)
    texts = {DOCS + file.src_uri: file.content_string for file in files.documentation_pages()}
    unread, seen = [*texts, *_in_nav(config.nav)], set[str]()
    while unread:
        origin = unread.pop()
        if origin in seen:
            continue
        seen.add(origin)
        if origin not in texts:
            files.append(made := _file(root, origin, config))
            texts[origin] = made.content_string if origin.endswith(".md") else ""
        text = _included(root, origin, texts[origin])
        targets = [_resolved(root, origin, link["path"]) for link in LINK.finditer(text)]
        unread += [path for path in targets if path and not path.startswith(DOCS)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Include what is to be included, and let links lead to the pages that files have become."""
    root, origin = _root(config), _origin(page.file)
    text = _included(root, origin, markdown)
    here = posixpath.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        target = _resolved(root, origin, found["path"])
        if target is None:
            return found[0]
        return posixpath.relpath(_uri(root, target), here or ".") + (found["anchor"] or "")

    return LINK.sub(moved, text)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path or "").resolve().parent


def _origin(file: File) -> str:
    """The path in the repository of the file that a page is made of."""
    uri = file.src_uri
    return uri.removeprefix(REPOSITORY) if uri.startswith(REPOSITORY) else DOCS + uri


def _resolved(root: Path, origin: str, path: str) -> str | None:
    """The path in the repository that a link leads to; None where nothing is there."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    inside = not target.startswith(("..", "/")) and target != "."
    return target if inside and (root / target).exists() else None


def _in_nav(nav: Any) -> list[str]:
    """Files of the repository that the navigation names."""
    if isinstance(nav, str):
        return [nav.removeprefix(REPOSITORY)] if nav.startswith(REPOSITORY) else []
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [path for part in parts for path in _in_nav(part)]


def _uri(root: Path, path: str) -> str:
    """Where the site has a file of the repository, among its sources."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if (root / path).is_dir():
        return f"{REPOSITORY}{path}/index.md"
    as_it_is = Path(path).suffix in COPIED | {".md"}
    return REPOSITORY + path + ("" if as_it_is else ".md")


def _file(root: Path, path: str, config: MkDocsConfig) -> File:
    source, uri = root / path, _uri(root, path)
    if source.suffix in COPIED:
        return File.generated(config, uri, abs_src_path=str(source))
    if source.is_dir():
        names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in source.iterdir())
        shown = [name for name in names if not name.startswith((".", "__pycache__"))]
        content = f"# {path}\n\n" + "\n".join(f"- `{name}`" for name in shown)
    elif source.suffix == ".md":
        content = source.read_text()
    else:
        content = f"# {path}\n\n{_listing(source)}"
    unsearched = "" if source.suffix == ".md" else "---\nsearch: {exclude: true}\n---\n"
    return File.generated(config, uri, content=unsearched + content)


def _listing(source: Path) -> str:
    return f"````` {LANGUAGES.get(source.suffix, 'text')}\n{source.read_text()}`````\n"


def _included(root: Path, origin: str, text: str) -> str:
    """A page's text with what it includes, whose links are as from the page's place."""

    def replaced(found: re.Match[str]) -> str:
        path = _resolved(root, origin, found["path"])
        if path is None:
            raise PluginError(f"{origin} includes {found['path']}, and there is no such file")
        if not path.endswith(".md"):
            return _listing(root / path)
        part = _section((root / path).read_text(), found["section"], f"{origin}: {found[0]}")
        up = posixpath.relpath(posixpath.dirname(path) or ".", posixpath.dirname(origin) or ".")

        def rebased(link: re.Match[str]) -> str:
            if _resolved(root, path, link["path"]) is None:
                return link[0]
            return posixpath.join(up, link["path"]) + (link["anchor"] or "")

        here = posixpath.join(up, posixpath.basename(path))
        return re.sub(r"\]\(#", f"]({here}#", LINK.sub(rebased, part))

    return INCLUDE.sub(replaced, text)


def _section(text: str, name: str | None, where: str) -> str:
    """What stands below a heading, up to the next one; without a name all below the first."""
    if name is None:
        return text.partition("\n")[2].strip()
    found, taken, fenced = [], False, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := HEADING.match(line)):
            taken = slugify(heading[1].replace("`", ""), "-") == name
        elif taken:
            found.append(line)
    if not found:
        raise PluginError(f"{where} names no section")
    return "\n".join(found).strip()
