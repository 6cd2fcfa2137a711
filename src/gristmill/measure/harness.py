"""lm-evaluation-harness: which tasks it has, and a run of some of them on a `Subject`.

The one file that knows that package. It cuts texts, counts and averages as it does for every other
model; only who answers is ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gristmill.config.evaluate import Evaluate
from gristmill.util.errors import RunError, UserError
from gristmill.util.extras import install_command

if TYPE_CHECKING:  # it imports torch, which a list of tasks need not wait for
    from gristmill.measure.subject import Subject

PACKAGE = "lm_eval"
SUBJECT = "gristmill.measure.subject"
SEED = 1234
"""What the package draws with unless it is told."""
OFFLINE = (
    *("ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "MaxRetryError"),
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "gaierror", "TimeoutException"),
)
"""Names of errors, of several packages, that mean that the hub was not reached."""

ABSENT = ("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError")
"""Names of errors that mean that the hub has no such data, or not for everybody."""


class Entry(NamedTuple):
    """A task, group or tag that the package or a folder has."""

    path: str | None
    """Its file; tags have none."""
    parts: list[str]
    """Names of what a group or a tag is made of."""


def version() -> str:
    """The package's. Raises UserError when it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "lm-evaluation-harness is not installed, which has the tasks. Install it: "
            f"{install_command('evaluate')}"
        ) from None


def home() -> Path:
    """Where the package is."""
    version()
    found = importlib.util.find_spec(PACKAGE)
    return Path((found.origin if found else None) or ".").parent


def entries(folders: Sequence[str] | None) -> dict[str, Entry]:
    """The tasks, groups and tags in some folders; None: all that the package brings along."""
    index = _manager(folders).task_index
    found = {}
    for name, entry in index.items():
        listed = entry.cfg.get("task") if entry.cfg else None
        parts = _listed(listed) if isinstance(listed, list) else []
        if entry.yaml_path is None:
            parts = sorted(entry.tags)
        found[name] = Entry(None if entry.yaml_path is None else str(entry.yaml_path), parts)
    return found


def run(
    subject: Subject, names: Sequence[str], folders: Sequence[str], cfg: Evaluate
) -> dict[str, Any]:
    """What the package measures on tasks in some folders: `results`, `groups`, `configs`, ….

    With `cfg.log_samples` also `samples`. Raises UserError for tasks that cannot be read, RunError
    when their data cannot be had.
    """
    tasks = _loaded(names, folders, cfg)
    import lm_eval.api.task
    from lm_eval import evaluate

    if not sys.stderr.isatty():
        # Its bars are for terminals, and torch has imported theirs before a variable could say so.
        lm_eval.api.task.tqdm = lambda items, **_: items
    with _in_words():
        results = evaluate(
            lm=_language_model(subject),
            task_dict=tasks,
            limit=cfg.limit,
            log_samples=cfg.log_samples,
            system_instruction=cfg.system_instruction,
            apply_chat_template=cfg.apply_chat_template,
            fewshot_as_multiturn=cfg.fewshot_as_multiturn is not False,
            confirm_run_unsafe_code=cfg.confirm_run_unsafe_code,
        )
    assert results is not None, "the only process has the results"
    return {**results, "lm_eval_version": version()}


def unheeded(results: Mapping[str, Any], cfg: Evaluate) -> list[str]:
    """Lines that name tasks whose definition says otherwise than an option."""
    if cfg.num_fewshot is None:
        return []
    shots = {task: n for task, n in results.get("n-shot", {}).items() if n != cfg.num_fewshot}
    listed = ", ".join(f"{task}: {n}" for task, n in list(shots.items())[:6])
    return [f"--num_fewshot {cfg.num_fewshot} is not for every task ({listed})."] if shots else []


def table(results: Mapping[str, Any]) -> str:
    """The results for people, groups below single tasks."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(part.rstrip("\n") for part in parts)


def to_json(value: Any) -> str:
    """Results as JSON, in which functions and types are their names."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, indent=2, ensure_ascii=False, default=handle_non_serializable)


def _manager(folders: Sequence[str] | None) -> Any:
    """The package's register of tasks: of all its own, or of some folders'."""
    version()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from lm_eval.tasks import TaskManager

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    if folders is None:
        return TaskManager()
    return TaskManager(include_path=list(folders), include_defaults=False)


def _loaded(names: Sequence[str], folders: Sequence[str], cfg: Evaluate) -> Any:
    """The tasks with their data, as many examples in front of a question as asked for."""
    _seed(cfg.seed)
    with _in_words():
        loaded = _manager(folders).load(list(names))
        settings = _settings(cfg.gen_kwargs)
        for task in loaded["tasks"].values():
            if settings and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=settings, update=True)
            defined = task.get_config("num_fewshot")
            # One that is defined to have none makes no sense with some.
            if defined is None or (cfg.num_fewshot is not None and defined != 0):
                task.set_config(key="num_fewshot", value=cfg.num_fewshot or 0)
            task.set_fewshot_seed(seed=SEED if cfg.seed is None else cfg.seed)
    return loaded


def _seed(seed: int | None) -> None:
    """Seed what tasks draw from when they lay out their documents, as `lm_eval` does by default."""
    import numpy as np
    import torch

    random.seed(0 if seed is None else seed)
    np.random.seed(SEED if seed is None else seed)
    torch.manual_seed(SEED if seed is None else seed)


def _settings(text: str | None) -> dict[str, Any]:
    """What --gen_kwargs says."""
    from lm_eval.utils import simple_parse_args_string

    if text is None:
        return {}
    if not all(part.partition("=")[1] for part in text.split(",")):
        raise UserError(
            f"--gen_kwargs {text} is no list of settings. write them as "
            "temperature=0.8,max_gen_toks=128."
        )
    return dict(simple_parse_args_string(text))


def _listed(parts: Sequence[Any]) -> list[str]:
    """The names in a group's list, those of groups within it too."""
    found: list[str] = []
    for part in parts:
        name = part if isinstance(part, str) else part.get("group") or part.get("task")
        if isinstance(name, str):
            found.append(name)
        if isinstance(part, dict) and isinstance(part.get("task"), list):
            found += _listed(part["task"])
    return found


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Errors of the package in our words, those of our own computing as they are."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(frame.f_globals.get("__name__") == SUBJECT for frame in frames):
            raise
        configs = [getattr(frame.f_locals.get("self"), "config", None) for frame in frames]
        names = [name for config in configs if isinstance(name := getattr(config, "task", 0), str)]
        raise _told(error, f"the task {names[-1]}" if names else "a task") from error


def _language_model(subject: Subject) -> Any:
    """The subject as a model of the package's."""
    from lm_eval.api.model import LM

    class Model(LM):
        """Hands questions on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [tuple(answer) for answer in subject.answers([r.args for r in requests])]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return subject.likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return subject.texts([request.args for request in requests])

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return subject.rendered(chat_history, for_reply=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return subject.chat_template if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            return subject.tokenizer.digest

    return Model()


def _told(error: Exception, task: str) -> UserError | RunError:
    """An error of the package's in our words; `task`: whose it is."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    words = " ".join(str(error).split())[:300]
    if kinds & set(OFFLINE):
        return RunError(
            f"the data of {task} could not be fetched, the hub was not reached ({words}). Connect "
            "and try again; data fetched before are found with HF_HUB_OFFLINE=1, and tasks on "
            "files of your own work with --include_path."
        )
    if kinds & set(ABSENT):
        return RunError(
            f"the data of {task} cannot be had ({words}). If its page on the hub asks for terms to "
            "be accepted, accept them there and give --access_token or set HF_TOKEN."
        )
    if "unsafe" in words and "confirm_run_unsafe_code" in words:
        return UserError(
            f"{words.split('.')[0]}: it runs programs that the model writes, on this machine. "
            "Allow it with --confirm_run_unsafe_code true.",
            {"--confirm_run_unsafe_code": "true"},
        )
    return UserError(
        f"{task} failed ({type(error).__name__}: {words}). Correct its definition, or leave it "
        "out; --debug shows where it happened."
    )
