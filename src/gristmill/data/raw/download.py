"""The command `gristmill download`: a model, a tokenizer or a corpus from a hub or a list.

What a repository holds is asked of the Hugging Face hub (or the server that `HF_ENDPOINT` names)
once, for one commit; its files come through `fetch.py`, which goes on after any interruption and
checks each against the digest that the repository gives.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from gristmill.config.commands import Download
from gristmill.data.raw.fetch import Fetcher, Outcome, Refused, Remote
from gristmill.util.errors import Interrupted, RunError, UserError
from gristmill.util.paths import DOWNLOADS


class NotThere(UserError):
    """There is no repository of that name, or it is hidden from us."""


_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
)
# The first of these that a repository has; the others are the same weights in another form.
_WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"(?!consolidated|adapter).*\.safetensors(\.index\.json)?",
    r"consolidated.*\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"(?!adapter|training_args|optimizer|scheduler).*\.bin(\.index\.json)?",
    r"lit_model\.pth|model_config\.yaml",
)
_SHARD = re.compile(r"-\d+-of-\d+\.")
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_SHOWN_FAILURES = 5
_LINE_SECONDS = 30.0


def download(cfg: Download) -> Path:
    """Fetch what the options name, print where it is, and give that directory.

    Raises UserError for names, tokens and patterns that do not fit; RunError when files are missing
    at the end.
    """
    if cfg.num_workers < 1:
        raise UserError(f"--num_workers {cfg.num_workers} fetches nothing. give 1 or more.")
    if cfg.urls and cfg.repo_id:
        raise UserError(f"{cfg.repo_id} and --urls {cfg.urls} are two sources. leave one out.")
    if not (cfg.urls or cfg.repo_id):
        raise UserError(
            "nothing to download is named. give a repository as ORG/NAME "
            "(`gristmill download list` shows those of the known models), or a list by --urls."
        )
    if cfg.checkpoint_dir is not None and (cfg.out_dir or cfg.urls):
        raise UserError("--checkpoint_dir is for models without --out_dir. leave one of them out.")
    return _from_list(cfg, cfg.urls) if cfg.urls else _from_hub(cfg)


def _from_hub(cfg: Download) -> Path:
    repo, kind = _repository(cfg)
    commit, entries, headers = _contents(cfg, repo, kind)
    chosen = _chosen(cfg, repo, kind, [entry.path for entry in entries])
    endpoint = _endpoint()
    prefix = "datasets/" if kind == "dataset" else ""
    files = [
        Remote(
            url=f"{endpoint}/{prefix}{repo}/resolve/{commit}/{quote(entry.path)}",
            name=_safe(entry.path),
            size=entry.size,
            digest=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}",
        )
        for entry in entries
        if entry.path in chosen
    ]
    folder = cfg.checkpoint_dir or ("data" if kind == "dataset" else DOWNLOADS)
    out = Path(cfg.out_dir or f"{folder}/{repo}").expanduser()
    try:
        _fetch(files, out, cfg.num_workers, origin=endpoint, headers=headers)
    except Refused as refused:
        raise _refusal(cfg, repo, kind, gated=refused.code == "GatedRepo") from None
    return out


def _repository(cfg: Download) -> tuple[str, str]:
    """(ORG/NAME, kind) of what the user named; the address of its page will do."""
    given = (cfg.repo_id or "").strip().rstrip("/")
    named = re.sub(r"^(hf://|https?://[^/]+/)", "", given)
    named = named.partition("/tree/")[0].removesuffix(".git")
    kind = "dataset" if named.startswith("datasets/") else cfg.repo_type
    named = named.removeprefix("datasets/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named) or ".." in named:
        raise UserError(
            f"{given!r} is no repository. name one as ORG/NAME; a list of addresses goes to --urls."
        )
    return named, kind


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _contents(cfg: Download, repo: str, kind: str) -> tuple[str, list[Any], dict[str, str]]:
    """The commit, the files it holds, and the headers that show who asks."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=_endpoint(), token=cfg.access_token)
    token = _token(cfg)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        info = api.repo_info(repo, repo_type=kind, revision=cfg.revision)
        tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
        return info.sha or "main", [entry for entry in tree if hasattr(entry, "blob_id")], headers
    except GatedRepoError:
        raise _refusal(cfg, repo, kind, gated=True) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{repo} has no revision {cfg.revision!r}. leave --revision out for its main branch, "
            "or name a branch, tag or commit of it."
        ) from None
    except RepositoryNotFoundError:
        raise _refusal(cfg, repo, kind, gated=False) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        if status == 401 and token:
            raise UserError(
                f"{_endpoint()} does not know the token. give one that is valid: set HF_TOKEN, or "
                f"--access_token, to a token from {_TOKENS_PAGE}."
            ) from None
        if status in (401, 403):
            raise _refusal(cfg, repo, kind, gated=False) from None
        raise RunError(
            f"{_endpoint()} answers {status} when asked for {repo}. "
            "run the same command again later."
        ) from None
    except Exception as error:
        # The hub's client has other errors with each of the libraries it talks HTTP with.
        raise RunError(
            f"cannot reach {_endpoint()} ({_hidden(str(error), cfg)}). check the network "
            "(HF_ENDPOINT names another server) and run the same command again."
        ) from None


def _refusal(cfg: Download, repo: str, kind: str, *, gated: bool) -> UserError:
    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    token = f"set HF_TOKEN, or give --access_token, a token from {_TOKENS_PAGE}"
    if gated and _token(cfg):
        return UserError(
            f"{repo} is given only to those who accepted its terms, and the token's owner has not, "
            f"or the token may not read it. accept them at {page} and run the same command again."
        )
    if gated:
        return UserError(
            f"{repo} is given only to those who accepted its terms, and no token says who asks. "
            f"accept them at {page}, then {token}."
        )
    other = "model" if kind == "dataset" else "dataset"
    return NotThere(
        f"there is no {kind} {repo} at {_endpoint()}, or it is private. check the name; "
        f"for a {other} add --repo_type {other}; if it is private, {token}."
    )


def _token(cfg: Download) -> str | None:
    """The user's token: the option's, or what the hub's own tools would take."""
    from huggingface_hub import constants, get_token

    return cfg.access_token or (None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token())


def _hidden(text: str, cfg: Download) -> str:
    """The text without the user's token, which no message may show."""
    token = _token(cfg)
    return text.replace(token, "***") if token else text


def _chosen(cfg: Download, repo: str, kind: str, names: Sequence[str]) -> set[str]:
    """The files of the repository that the options mean. Raises UserError when there are none."""
    if cfg.pattern is not None:
        if cfg.tokenizer_only:
            raise UserError("--tokenizer_only and --pattern both choose files. leave one out.")
        return _matching(names, cfg.pattern, repo)
    if kind == "dataset":
        return {name for name in names if name != ".gitattributes"} or _nothing(repo, "files")
    own = [name for name in names if "/" not in name]
    settings = {name for name in own if any(fnmatch.fnmatch(name, p) for p in _SETTINGS)}
    if cfg.tokenizer_only:
        return settings or _nothing(repo, "tokenizer")
    for pattern in _WEIGHTS:
        if weights := {name for name in own if re.fullmatch(pattern, name)}:
            return settings | _one_copy(weights)
    if any(name.endswith(".gguf") for name in own):
        files = ", ".join(name for name in own if name.endswith(".gguf"))
        raise UserError(
            f"{repo} holds its weights as GGUF ({files}). name the file that you want: "
            "--pattern '*Q8_0.gguf'"
        )
    return _nothing(repo, "weights")


def _one_copy(weights: set[str]) -> set[str]:
    """Weights that come whole and in shards too, once: as what the index names."""
    shards = {name for name in weights if _SHARD.search(name)}
    indices = {name for name in weights if name.endswith(".index.json")}
    if shards and indices:
        return shards | indices
    return weights - indices or weights


def _matching(names: Iterable[str], pattern: list[str] | str, where: str) -> set[str]:
    patterns = [pattern] if isinstance(pattern, str) else pattern
    names = list(names)
    found = {name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)}
    if not found:
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise UserError(
            f"no file of {where} matches {' or '.join(map(repr, patterns))} (there: {some}). "
            "give a pattern that fits."
        )
    return found


def _nothing(repo: str, what: str) -> set[str]:
    raise UserError(f"{repo} holds no {what} that are known here. choose its files by --pattern.")


def _from_list(cfg: Download, source: str) -> Path:
    """Fetch the addresses of a list, each under its name below what all of them share."""
    for option in ("revision", "tokenizer_only", "access_token"):
        if getattr(cfg, option):
            raise UserError(f"--{option} is for repositories, not for --urls. leave it out.")
    if cfg.out_dir is None:
        raise UserError("--urls needs a directory to write to. name it with --out_dir.")
    urls = _addresses(source)
    base = cfg.base_url or _shared(urls)
    files: dict[str, Remote] = {}
    for url in urls:
        if not url.startswith(base):
            raise UserError(f"{url} does not begin with --base_url {base}. give what all share.")
        name = _safe(unquote(url[len(base) :].partition("?")[0]).lstrip("/"))
        if files.setdefault(name, Remote(url, name)).url != url:
            raise UserError(
                f"{url} and {files[name].url} would both be {name}. give a shorter --base_url."
            )
    if cfg.pattern is not None:
        names = _matching(files, cfg.pattern, source)
        files = {name: file for name, file in files.items() if name in names}
    out = Path(cfg.out_dir).expanduser()
    try:
        _fetch(list(files.values()), out, cfg.num_workers)
    except Refused as refused:
        raise UserError(
            f"{refused.file.url} is refused ({refused.status}). "
            "check that the list is still valid, and leave this address out if it is not."
        ) from None
    return out


def _addresses(source: str) -> list[str]:
    try:
        if re.match(r"https?://", source):
            with urllib.request.urlopen(source, timeout=60) as response:
                text = response.read().decode()
        else:
            text = Path(source).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the list {source} ({reason}). give a file or URL.") from None
    urls = []
    for number, line in enumerate(text.splitlines(), 1):
        if (word := line.strip()) and not word.startswith("#"):
            if not re.match(r"https?://[^/]+/.", word):
                raise UserError(
                    f"line {number} of {source} is no address ({word[:80]}). "
                    "the list has one http(s) address a line."
                )
            urls.append(word)
    if not urls:
        raise UserError(f"{source} holds no address. the list has one http(s) address a line.")
    return list(dict.fromkeys(urls))


def _shared(urls: Sequence[str]) -> str:
    """The folder that all addresses have in common."""
    folders = [url.partition("?")[0].rpartition("/")[0] + "/" for url in urls]
    return os.path.commonprefix(folders).rpartition("/")[0] + "/"


def _safe(name: str) -> str:
    """The name, which stays below the target directory."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or {"", ".", ".."} & set(parts):
        raise UserError(f"the file name {name!r} leads elsewhere. leave it out (--pattern).")
    return name


def _fetch(
    files: Sequence[Remote],
    out: Path,
    num_workers: int,
    *,
    origin: str = "",
    headers: dict[str, str] | None = None,
) -> None:
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file. name a directory to fetch into with --out_dir.")
    progress = _Progress(sum(max(0, file.size) for file in files))
    fetcher = Fetcher(out, origin=origin, headers=headers, on_bytes=progress.add)
    missing = fetcher.missing_bytes(files)
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise RunError(
            f"no space left for {out}: {missing / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are "
            "free. free some, choose files by --pattern, or name another --out_dir."
        )
    print(f"{len(files):,} files, {_gigabytes(missing)} to fetch into {out}", file=sys.stderr)
    progress.total = missing
    try:
        outcome = fetcher.fetch(files, num_workers)
    except KeyboardInterrupt:
        raise Interrupted(2, "stopped. the same command goes on from here.") from None
    finally:
        progress.end()
    _report(out, files, outcome)


def _report(out: Path, files: Sequence[Remote], outcome: Outcome) -> None:
    if outcome.failed:
        shown = outcome.failed[:_SHOWN_FAILURES]
        listed = "; ".join(f"{file.name}: {reason}" for file, reason in shown)
        more = len(outcome.failed) - len(shown)
        raise RunError(
            f"{len(outcome.failed):,} of {len(files):,} files are missing in {out} ({listed}"
            f"{f'; and {more:,} more' if more else ''}). run the same command again: it goes on."
        )
    print(
        f"{out}: {len(files):,} files are complete ({outcome.fetched:,} fetched, "
        f"{_gigabytes(outcome.bytes)}; {outcome.kept:,} were there)."
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e6:.2f} MB"


class _Progress:
    """How much has come: one live line on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._done = 0
        self._began = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes that have come."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown >= (0.5 if self._live else _LINE_SECONDS):
                self._shown = now
                self._show("\r" if self._live else "")

    def end(self) -> None:
        """Leave the last state on the terminal."""
        if self._live and self._done:
            self._show("\r")
            print(file=sys.stderr)

    def _show(self, start: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-3)
        rate = self._done / seconds
        text = f"{_gigabytes(self._done)}, {rate / 1e6:.1f} MB/s"
        if self.total:
            left = max(0, self.total - self._done) / max(rate, 1.0)
            text += f" of {_gigabytes(self.total)}, {left / 60:.0f} min left"
        end = "" if start else "\n"
        print(f"{start}{text:<78}"[:79] if start else text, end=end, file=sys.stderr, flush=True)
