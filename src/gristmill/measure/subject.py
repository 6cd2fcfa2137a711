"""The model that is measured: loaded when the first question comes, after the tasks are there."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gristmill.infer.load import LoadedModel, load_aloud, note, open_tokenizer
from gristmill.measure.encode import Encoder
from gristmill.measure.kept import Kept
from gristmill.measure.score import Answer, Found, Query, Scorer
from gristmill.measure.write import Prompt, Writer
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
        tokenizer_dir: str | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        kept: Kept | None = None,
        remark: str | None = None,
    ) -> None:
        self.path, self.device, self.precision = path, device, precision
        self.batch_size, self.seed, self.quantize = batch_size, seed, quantize
        self.tokenizer_dir, self._remark = tokenizer_dir, remark
        self.tokenizer: Tokenizer = open_tokenizer(path, tokenizer_dir)[0]
        self._encoder = Encoder(self.tokenizer)
        self._kept = kept or Kept(None)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with its weights."""
        loaded = load_aloud(
            self.path,
            self.device,
            self.precision,
            tokenizer_dir=self.tokenizer_dir,
            quantize=self.quantize,
        )
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
        return Writer(self.loaded, self.batch_size)

    def answers(self, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
        """For each (context, continuation) the continuation's log-likelihood behind it."""
        queries = [self._encoder.query(context, continuation) for context, continuation in pairs]
        return self._scored(queries, "answers computed")

    def likelihoods(self, texts: Sequence[str]) -> list[float]:
        """For each text its log-likelihood, in windows as long as the model's context."""
        limit = self.loaded.limit
        windows = [list(self._encoder.windows(text, limit)) for text in texts]
        queries = [query for part in windows for query in part]
        answers = iter(self._scored(queries, "windows computed"))
        return [sum(next(answers).log_likelihood for _ in part) for part in windows]

    def _scored(self, queries: Sequence[Query], what: str) -> list[Answer]:
        """One answer each: what is kept, and the rest computed."""
        self._check(queries)
        keys = [self._kept.key(*query) for query in queries]
        found = {n: Answer(*held) for n, held in enumerate(self._kept.find(keys)) if held}
        left = [n for n in range(len(queries)) if n not in found]
        with _Progress(len(left), what) as progress:

            def done(new: Found) -> None:
                self._kept.put((keys[left[n]], answer) for n, answer in new)
                progress(len(new))

            found |= zip(left, self.scorer.answers([queries[n] for n in left], done))
        return [found[n] for n in range(len(queries))]

    def _check(self, queries: Sequence[Query]) -> None:
        """Raise UserError for ids without a row in the model: computing them ends the process."""
        for query in queries:
            self.loaded.checked([*query.context, *query.continuation])

    def texts(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model writes after each prompt, by the settings beside it."""
        asked = [Prompt(*prompt, self.seed + n) for n, prompt in enumerate(prompts)]
        keys = [self._text_key(prompt) for prompt in asked]
        found = {n: held[0] for n, held in enumerate(self._kept.find(keys)) if held}
        left = [n for n in range(len(asked)) if n not in found]
        with _Progress(len(left), "texts written") as progress:

            def done(number: int, text: str) -> None:
                self._kept.put([(keys[left[number]], [text])])
                progress(1)

            found |= zip(left, self.writer.texts([asked[n] for n in left], done))
        return [found[n] for n in range(len(asked))]

    def _text_key(self, prompt: Prompt) -> str:
        """What a text is kept by: the seed counts where it is drawn."""
        sampling = self.writer.sampling(prompt.settings)
        seed = prompt.seed if sampling.temperature else None
        ids = tuple(self._encoder.encode(prompt.text))
        ends = sorted(self.tokenizer.stop_ids)
        return self._kept.key(prompt.text, ids, ends, replace(sampling, seed=seed or 0))

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
            "quantize": self.quantize,
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
    """Counts what is done on a terminal's last line, elsewhere in a line a minute; says at the end
    how long it took."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self._live = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._shown < (0.5 if self._live else 60):
            return
        self._shown = now
        left = (now - self._start) * (self.total - self.done) / self.done
        text = f"{self.done:,} of {self.total:,} {self.what}, {left:.0f} s left"
        if self._live:
            sys.stderr.write(f"\r{text:<70}")
            sys.stderr.flush()
        else:
            note(text)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live and self._shown > self._start:
            sys.stderr.write(f"\r{'':<70}\r")
        if kind is None and self.total:
            seconds = time.monotonic() - self._start
            note(f"{self.total:,} {self.what} in {seconds:.1f} s")
