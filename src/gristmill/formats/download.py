"""The command `gristmill download`: names of models as people know them, then the download."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import replace
from pathlib import Path

from gristmill.config.commands import Download
from gristmill.data.raw import download as raw
from gristmill.models import zoo
from gristmill.util.errors import UserError


def download(cfg: Download) -> None:
    """Fetch what the options name, print where it is and which commands use it.

    A model may go by a name without organisation (`pythia-14m`). Raises what
    `data.raw.download.download` raises; where there is no such repository, with the nearest names.
    """
    if cfg.repo_id and cfg.repo_type == "model" and "/" not in cfg.repo_id:
        cfg = replace(cfg, repo_id=repository(cfg.repo_id))
    try:
        out = raw.download(cfg)
    except raw.NotThere as error:
        known = {name.lower(): name for name in zoo.repositories()}
        near = difflib.get_close_matches(str(cfg.repo_id).lower(), known, n=3, cutoff=0.75)
        hint = f" Did you mean {' or '.join(known[name] for name in near)}?" if near else ""
        raise UserError(f"{error}{hint}") from None
    if cfg.repo_type == "model" and (out / "config.json").is_file():
        print(_use(cfg, out))


def repository(name: str) -> str:
    """ORG/NAME of a model of `pretrain list` or of the end of a known repository's name.

    Any other name is given back: the hub has some without organisation.
    """
    try:
        config = zoo.get(name)
    except UserError:
        return name
    return zoo.models()[config.name].repo or name


def _use(cfg: Download, out: Path) -> str:
    place = shlex.quote(str(out))
    if cfg.tokenizer_only:
        return f"Use it as a tokenizer: --tokenizer_dir {place}"
    return (
        f"Use it: gristmill chat {place}\n"
        f"        gristmill pretrain --initial_checkpoint_dir {place} --data …"
    )
