"""The documentation names what is there: messages, links, anchors, pages in the navigation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")
ELSEWHERE = ("http://", "https://", "mailto:")
MADE_FROM_CODE = "reference/commands/"


def _generator(name: str) -> ModuleType:
    """A file of `docs/_pages`, which is no package."""
    path = DOCS / "_pages" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_pages_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> list[str]:
    """The lines of a page outside of its blocks of code."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith("    "):
            lines.append(line)
    return lines


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for line in prose(page):
        heading = re.match(r"#{1,6} (.+)", line)
        if heading:
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            found.add(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return found


def quoted(page: Path) -> list[str]:
    """The messages that a page quotes, a block quotation each."""
    return [line[2:].strip() for line in prose(page) if line.startswith("> ")]


def is_said(message: str, said: str) -> bool:
    """Whether the code has this text, values being `…`; it may be a part of a longer one."""
    return re.sub(r"[ …]+$", "", message) in said


@pytest.fixture(scope="module")
def said() -> str:
    """What the code and the Makefile can say."""
    return _generator("messages").strings() + (ROOT / "Makefile").read_text(encoding="utf-8")


def test_messages_of_the_troubleshooting_page_are_in_the_code(said):
    messages = quoted(DOCS / "troubleshooting.md")
    assert len(messages) > 50
    strange = [message for message in messages if not is_said(message, said)]
    assert not strange, "no such message in the code:\n" + "\n".join(strange)


def test_a_message_that_nothing_says_is_seen(said):
    assert is_said("no tokenizer at …", said)
    assert not is_said("no tokeniser at …", said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_of_a_page_are_there(page):
    broken = []
    for target in LINK.findall("\n".join(prose(page))):
        if target.startswith(ELSEWHERE):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def in_navigation(nav: object) -> set[str]:
    if isinstance(nav, list):
        return {page for item in nav for page in in_navigation(item)}
    if isinstance(nav, dict):
        return {page for item in nav.values() for page in in_navigation(item)}
    return {str(nav)}


class _Loader(yaml.SafeLoader):
    """Reads the site's settings without making the objects that they name."""


def test_every_page_is_in_the_navigation():
    _Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)
    listed = in_navigation(settings["nav"])
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert written <= listed, f"not in mkdocs.yml: {sorted(written - listed)}"
    assert MADE_FROM_CODE in listed


def test_an_option_has_its_type_default_and_meaning_on_its_page():
    options = _generator("options")
    page = options.command_page(options.COMMANDS["pretrain"], ["pretrain"])
    assert "`--train.max_tokens` · a whole number or `auto` · default `auto`" in page
    assert "Stop after this many tokens; auto: one epoch, or as max\\_steps or epochs say." in page
    assert "`--tokenizer_dir` · text · unset { #tokenizer_dir }" in page
    data = options.classes_page(options.DataModule)
    assert "`--data.train_data_path` · text · needed { #TextFiles.data.train_data_path }" in data


READ = re.compile(r"(?:environ|environment)(?:\.get|\.setdefault)?[\[(]\"([A-Z][A-Z_]+)\"")
# Set by schedulers and terminals, or by us for libraries and workers; nobody chooses them.
NOBODYS = re.compile(
    r"SLURM_|OMPI_|TERM$|RAY_USAGE_|CUBLAS_|HF_DATASETS_|TOKENIZERS_|LOCAL_WORLD_SIZE|PYTHONPATH"
)


def test_variables_that_the_code_reads_are_explained():
    shown = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    read = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in READ.findall(path.read_text(encoding="utf-8"))
        if not NOBODYS.match(name)
    }
    assert "XDG_CACHE_HOME" in read
    missing = sorted(name for name in read if f"`{name}`" not in shown)
    assert not missing, f"explain {missing} in docs/reference/files.md"


def test_every_benchmark_is_explained():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
    assert scripts
    assert [name for name in scripts if f"## {name}" not in text] == []
