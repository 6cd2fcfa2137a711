"""The model that is measured: loaded when the first question comes, after the tasks are there."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.measure.encode import Encoder
from gristmill.measure.score import Answer, Query, Scorer
from gristmill.measure.write import Prompt, Writer
from gristmill.formats.tokenizer_files import load_tokenizer
from gristmill.infer.load import LoadedModel, load, note, use_few_threads
from gristmill.tokenizer import chat
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError


class Subject:
    """Answers the three kinds of questions that tasks put to a language model."""

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        precision: str,
        batch_size: int | str,
        seed: int,
        remark: str | None = None,
    ) -> None:
        self.path, self.device, self.precision = path, device, precision
        self.batch_size, self.seed, self._remark = batch_size, seed, remark
        self.is_asked = False
        """Whether a question came yet."""
        self.tokenizer: Tokenizer = load_tokenizer(path)
        self._encoder = Encoder(self.tokenizer)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with its weights."""
        loaded = load(self.path, self.device, self.precision)
        use_few_threads(loaded)
        note(loaded.summary())
        if self._remark is not None:
            note(self._remark)
        return loaded

    @cached_property
    def scorer(self) -> Scorer:
        """What computes log-likelihoods."""
        return Scorer(self.loaded, self.batch_size)

    @cached_property
    def writer(self) -> Writer:
        """What writes."""
        return Writer(self.loaded, self.batch_size, self.seed)

    def answers(self, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
        """For each (context, continuation) the continuation's log-likelihood behind it."""
        self.is_asked = True
        queries = [self._encoder.query(context, continuation) for context, continuation in pairs]
        self._check(queries)
        with _Progress(len(queries), "answers computed") as progress:
            return self.scorer.answers(queries, progress)

    def likelihoods(self, texts: Sequence[str]) -> list[float]:
        """For each text its log-likelihood, in windows as long as the model's context."""
        self.is_asked = True
        limit = self.loaded.limit
        windows = [list(self._encoder.windows(text, limit)) for text in texts]
        queries = [query for part in windows for query in part]
        self._check(queries)
        with _Progress(len(queries), "windows computed") as progress:
            answers = iter(self.scorer.answers(queries, progress))
        return [sum(next(answers).log_likelihood for _ in part) for part in windows]

    def _check(self, queries: Sequence[Query]) -> None:
        """Raise UserError for ids without a row in the model: computing them ends the process."""
        for query in queries:
            self.loaded.checked([*query.context, *query.continuation])

    def texts(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model writes after each prompt, by the settings beside it."""
        self.is_asked = True
        with _Progress(len(prompts), "texts written") as progress:
            return self.writer.texts([Prompt(*prompt) for prompt in prompts], progress)

    def rendered(self, messages: Sequence[Mapping[str, str]], *, for_reply: bool) -> str:
        """A conversation by the model's chat template, up to where the reply begins.

        Not `for_reply`, it ends with the words of the last message, for more of them.
        """
        text = chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=for_reply,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )
        if for_reply:
            return text
        last = messages[-1]["content"]
        start = text.rfind(last.strip())
        if start < 0:
            return text
        end = start + len(last.lstrip())
        # Space at its end stays where the template keeps it.
        return text[:end] if text[start:end] == last else text[: start + len(last.strip())]

    def describe(self) -> dict[str, Any]:
        """What was measured and with what, for the results."""
        return {
            "model": "gristmill",
            "model_args": {"path": str(self.path)},
            "device": str(self.loaded.device),
            "precision": self.loaded.precision,
            "batch_size": self.batch_size,
        }

    def remarks(self) -> list[str]:
        """Lines for people about texts that were cut, and about what sharing saved."""
        lines = []
        work = self.__dict__["scorer"].work if "scorer" in self.__dict__ else None
        shortened = work.shortened if work else 0
        shortened += self.writer.shortened if "writer" in self.__dict__ else 0
        if shortened:
            lines.append(
                f"{shortened:,} questions are longer than the model's context of "
                f"{self.loaded.limit:,} tokens and lost their beginning."
            )
        if work and work.computed:
            lines.append(
                f"{work.tokens:,} tokens of {work.queries:,} answers were computed as "
                f"{work.computed:,}, common beginnings once."
            )
        return lines

    @property
    def chat_template(self) -> str:
        """The model's own. Raises UserError where it has none."""
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{self.path} has no chat template. Leave --apply_chat_template out, or put a "
                "chat_template.jinja into it.",
                {"--apply_chat_template": None},
            )
        return template


class _Progress:
    """Counts what is done on a terminal's last line, and says at the end how long it took."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self._live = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self._live and now - self._shown > 0.5:
            self._shown = now
            left = (now - self._start) * (self.total - self.done) / self.done
            text = f"{self.done:,} of {self.total:,} {self.what}, {left:.0f} s left"
            sys.stderr.write(f"\r{text:<70}")
            sys.stderr.flush()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live and self._shown > self._start:
            sys.stderr.write(f"\r{'':<70}\r")
        if kind is None:
            seconds = time.monotonic() - self._start
            note(f"{self.total:,} {self.what} in {seconds:.1f} s")
