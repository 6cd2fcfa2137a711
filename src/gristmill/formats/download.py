"""The command `gristmill download`: names of models as people know them, then the download."""

from __future__ import annotations

import difflib
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from gristmill.config.commands import Download
from gristmill.data.raw import download as raw
from gristmill.data.raw.fetch import STATE
from gristmill.data.raw.first_use import alone, is_offline
from gristmill.models import zoo
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError
from gristmill.util.paths import DOWNLOADS, resolve_model_dir


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


def own_tokenizer(name: str) -> Path:
    """The folder of the tokenizer that a named model comes with, fetched when it is not there.

    Raises UserError for a model without a repository, and where the network is not to be used.
    """
    repo = zoo.models()[zoo.get(name).name].repo
    if repo is None:
        raise UserError(
            f"no tokenizer for the raw text: {name} comes with none. Give --tokenizer_dir DIR; "
            "`gristmill tokenizer train FOLDER --out_dir DIR` makes one."
        )
    place = resolve_model_dir(repo)
    if not _has_tokenizer(place):
        command = f"gristmill download {repo} --tokenizer_only true"
        if is_offline():
            raise UserError(
                f"no tokenizer for the raw text, and HF_HUB_OFFLINE is set. Fetch {name}'s own "
                f"with `{command}`, or give --tokenizer_dir DIR."
            )
        place = Path(DOWNLOADS) / repo
        with alone(place / STATE):
            if not _has_tokenizer(place):
                print(f"no --tokenizer_dir: fetching {name}'s own ({command})", file=sys.stderr)
                download(Download(repo_id=repo, tokenizer_only=True))
    return Tokenizer.load(place).path.parent


def _has_tokenizer(place: Path) -> bool:
    return any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


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
