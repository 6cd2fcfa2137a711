"""MkDocs' doors: pages made from the code, and links that lead out of `docs/`.

Pages are written to be read where they lie, too, so their links are paths in the repository. Here a
link to a file outside of `docs/` becomes one to a page of the site with the same content.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import messages
import options
import tables
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository that are pages of the site, and where."""

MADE = {
    "Commands": "commands/index.md",
    "Data modules": "data-modules.md",
    "Finetuning data": "tuning-data.md",
    "Optimizers": "optimizers.md",
    "Layouts": "layouts.md",
    "Named models": "models.md",
    "Model switches": "model-config.md",
    "Recipes": "recipes.md",
    "Every message": "messages.md",
}
"""What the page `reference/index.md` calls the pages made from the code, in bold letters."""
NAMED = re.compile(r"\*\*([^*]+)\*\*")

LINK = re.compile(r"(\]\()([^()\s#]+)(#[^()\s]*)?(\))")
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
CODE = re.compile(r"<code[ >].*?</code>", re.DOTALL)
BLOCK = re.compile(
    r'<div class="highlight"><pre>(<span></span>)?<code>'
    r"((?:gristmill|srun|torchrun|python|pip|make|export) .*?)</code>",
    re.DOTALL,
)
OPTION = re.compile(r"(?<![\w<-])(--?[A-Za-z][\w.-]*)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


COMMANDS = "reference/commands/"
"""What stands in the navigation for the pages of all commands."""


def on_config(config: Any) -> Any:
    """The navigation with a page for each command."""
    config["nav"] = _with_commands(config["nav"])
    return config


def _with_commands(nav: Any) -> Any:
    if isinstance(nav, list):
        return [_with_commands(item) for item in nav]
    if isinstance(nav, dict):
        return {title: _with_commands(item) for title, item in nav.items()}
    if nav != COMMANDS:
        return nav
    pages = [
        {names[0]: f"{COMMANDS}{slug}.md"}
        for slug, (_, names) in options.pages_of_commands().items()
    ]
    return [f"{COMMANDS}index.md", *pages]


def on_files(files: Files, config: Any) -> Files:
    """The files of the site: those in `docs/`, those made from the code, those linked to."""
    made = options.pages() | messages.pages() | tables.pages()
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    for path, place in OUTSIDE.items():
        if place != "index.md":
            files.append(File.generated(config, place, content=(ROOT / path).read_text("utf-8")))
    for path in sorted(sources(files)):
        files.append(File.generated(config, source_page(path), content=source(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links to places in the repository turned into links within the site."""
    here = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        place = place_of(page.file.src_uri, match[2])
        if place is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(place, here or '.')}{match[3] or ''}{match[4]}"

    if page.file.src_uri == "reference/index.md":
        markdown = NAMED.sub(_to_page, markdown)
    for name, place in MADE.items():
        markdown = re.sub(
            rf"\[{name}\]\(([./]*)reference/index\.md\)",
            rf"[{name}](\1reference/{place})",
            markdown,
        )
    return LINK.sub(turned, markdown)


def _to_page(name: re.Match[str]) -> str:
    """A link to a page that is made from the code, which only the site has."""
    place = MADE[name[1]]
    return f"[{name[1]}]({place})"


def on_page_content(html: str, **_: Any) -> str:
    """The page with blocks of commands marked, whose lines are broken where they are too long.

    Options in code are marked, too: browsers would break them after their hyphens. A stroke within
    code in a table, which GitHub wants escaped, is shown as itself.
    """
    html = BLOCK.sub(_commands, html)
    html = CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
    return CODE.sub(lambda code: OPTION.sub(r'<span class="option">\1</span>', code[0]), html)


def _commands(block: re.Match[str]) -> str:
    """A block of commands, each line in an element of its own, so that its rest is indented."""
    lines = [f'<span class="command">{line}</span>' for line in block[2].rstrip("\n").split("\n")]
    code = block[2] if "<span" in block[2] else "\n".join(lines) + "\n"
    return f'<div class="highlight commands"><pre><code>{code}</code>'


def repository_path(src_uri: str) -> str:
    """Where in the repository the page of the site at `src_uri` is from."""
    for path, place in OUTSIDE.items():
        if place == src_uri and place != "index.md":
            return path
    return f"docs/{src_uri}"


def place_of(src_uri: str, link: str) -> str | None:
    """The page of the site that a link on the page `src_uri` means; None where it needs no change.

    Links to pages made from the code are right as they are, and so are addresses.
    """
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(src_uri)), link))
    if path in OUTSIDE:
        return OUTSIDE[path]
    target = ROOT / path
    if target.is_dir():
        path, target = f"{path}/index.md", target / "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return source_page(path) if target.is_file() else None


def sources(files: Files) -> set[str]:
    """Files of the repository that pages link to and that are no pages themselves."""
    found = set()
    for file in files.documentation_pages():
        for match in LINK.finditer(file.content_string):
            place = place_of(file.src_uri, match[2])
            if place is not None and place.startswith("source/"):
                found.add(place.removeprefix("source/").removesuffix(".md"))
    return found


def source_page(path: str) -> str:
    """Where the site shows a file of the repository."""
    return f"source/{path}.md"


def source(path: str) -> str:
    """The page that shows a file of the repository."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"# {path}\n\n{fence}{language}\n{text}\n{fence}\n"
