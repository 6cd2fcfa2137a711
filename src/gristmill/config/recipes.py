"""Run configurations by path, by the name of a bundled recipe, or by URL."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from gristmill.util.errors import UserError

RECIPES_DIR = Path(__file__).parent.parent / "recipes"

HUB_FOLDERS = ("/config_hub/", "config_hub/")
"""Where LitGPT keeps its configurations; a path or URL in it means the bundled recipe."""


def names() -> list[str]:
    """Names of the bundled recipes, such as `pretrain/debug`, sorted."""
    return sorted(
        path.relative_to(RECIPES_DIR).with_suffix("").as_posix()
        for path in RECIPES_DIR.rglob("*.yaml")
    )


def load_recipe(source: str) -> dict[str, Any]:
    """The settings in a file, a bundled recipe or at a URL.

    A file on disk wins over a bundled name; a path or URL in LitGPT's `config_hub` that is not on
    disk is the bundled recipe of the same name. Raises `UserError` with the place of a YAML error.
    """
    text = _read(source)
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"the configuration {source} is not valid YAML ({_place(error)}). Correct that line."
        ) from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(
            f"the configuration {source} holds a {type(settings).__name__}, not settings. "
            "Write `option: value` lines, as --print_config prints them."
        )
    return settings


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)


def _read(source: str) -> str:
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the configuration {source} ({error}). Check the file."
            ) from None
    bundled = _bundled(source)
    if bundled is not None:
        return bundled.read_text(encoding="utf-8")
    if "://" in source:
        return _fetch(source)
    near = difflib.get_close_matches(source, names(), n=3, cutoff=0.4)
    raise UserError(
        f"no configuration file or recipe {source!r}"
        + (f"; near: {', '.join(near)}" if near else "")
        + f". Give a YAML file or one of: {', '.join(names())}."
    )


def _bundled(source: str) -> Path | None:
    name = source
    for folder in HUB_FOLDERS:
        name = name.rpartition(folder)[2]
    if "://" in name:
        return None
    for folder in ("", "pretrain/"):
        # A name may have dots of its own.
        path = RECIPES_DIR / f"{folder}{name.removesuffix('.yaml')}.yaml"
        if path.is_file() and path.is_relative_to(RECIPES_DIR):
            return path
    return None


def _fetch(url: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise UserError(f"cannot read a configuration from {url!r}. Give an http(s) URL or a file.")
    import urllib.request  # a tenth of the time that --help takes

    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content: bytes = response.read(1_000_000)
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot fetch the configuration {url} ({error}). Download it and give the file, "
            f"or use a bundled recipe: {', '.join(names())}."
        ) from None
