"""The documentation builds as a site without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.cli import COMMANDS

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself to show a page.
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\">\s]+)|"
    r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]+href=\"?(https?:[^\">\s]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> tuple[Path, str]:
    """The built site, and what was said while it was built."""
    pytest.importorskip("material")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stderr


def test_it_builds_without_a_warning(site):
    _, said = site
    assert not re.findall(r"^(?:WARNING|ERROR).*", said, re.MULTILINE)


def test_every_command_has_a_page_with_its_options(site):
    out, _ = site
    shown = "\n".join(p.read_text() for p in (out / "reference" / "commands").glob("*.html"))
    assert len(COMMANDS) > 15
    for name in COMMANDS:
        assert f"gristmill {name}" in shown
    page = (out / "reference" / "commands" / "pretrain.html").read_text()
    for option in ("model_name", "train.max_tokens", "slurm.lead_s", "optimizer"):
        assert f'id="{option}"' in page


def test_links_out_of_the_docs_folder_lead_to_pages_of_the_site(site):
    out, _ = site
    assert "starcoder2" in (out / "source/src/gristmill/models/zoo/starcoder2.py.html").read_text()
    assert (out / "benchmarks.html").is_file()
    assert (out / "contributing.html").is_file()


def test_pages_fetch_nothing_from_elsewhere(site):
    out, _ = site
    pages = list(out.rglob("*.html"))
    assert len(pages) > 50
    fetched = {
        url for page in pages for found in FETCHED.findall(page.read_text()) for url in found
    }
    assert fetched <= {""}
