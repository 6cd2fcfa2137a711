"""How probable texts are to a model: the log-likelihood of continuations of contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.infer.load import LoadedModel
from gristmill.measure.rows import Group, Ids, Row, batches, plan
from gristmill.models.device import autocast, autocast_dtype
from gristmill.models.forest import Beginning, Forest, forest_hidden
from gristmill.util.errors import RunError, UserError

CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Tokens computed at a time where nothing else is asked for."""

LOGIT_BYTES = 64 << 20
"""How many bytes of logits exist at a time."""

CACHED_LOGITS = 1 << 19
"""Logits whose exponentials are summed at a time, so that they stay in a processor's cache."""


class Query(NamedTuple):
    """A context, never empty, and the tokens behind it."""

    context: Sequence[int]
    continuation: Sequence[int]


class Answer(NamedTuple):
    """The log-likelihood of a continuation, and whether each of its tokens is the likeliest."""

    log_likelihood: float
    is_greedy: bool


Found = Sequence[tuple[int, Answer]]
"""Numbers of queries, and their answers."""


@dataclass
class Work:
    """What there was to do: for people, and to see that beginnings are shared."""

    queries: int = 0
    tokens: int = 0
    """Of all queries together, as they would be computed one by one."""
    computed: int = 0
    """Of the trees that were computed in their place, padding included."""
    shortened: int = 0
    """Queries that were longer than the model's context and lost their beginning."""


class Scorer:
    """Answers queries with a model, many at a time; every common beginning is computed once.

    `batch_size` is "auto" or how many of the longest texts may be computed at a time.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int | str = "auto") -> None:
        self.loaded, self.batch_size = loaded, batch_size
        self.work = Work()
        self._limit = GPU_TOKENS if loaded.device.type != "cpu" else CPU_TOKENS
        self._autocast = autocast_dtype(loaded.precision)

    def answers(
        self, queries: Sequence[Query], done: Callable[[Found], None] | None = None
    ) -> list[Answer]:
        """One answer each; `done` is told of each batch what was found.

        What does not fit into the model's context loses its beginning. Raises UserError for a
        continuation that is longer than the context, RunError when memory is too small.
        """
        sheet = _Sheet(queries, self.loaded.limit)
        batch_tokens = self._limit
        if isinstance(self.batch_size, int):
            batch_tokens = self.batch_size * max(map(len, sheet.texts), default=1)
        groups = plan(
            sheet.texts,
            sheet.num_free,
            batch_tokens=batch_tokens,
            share=not self.loaded.model.config.rotates_by_length,
        )
        for group in groups:
            batch_tokens = self._run_group(group, sheet, batch_tokens, done)
        if self.batch_size == "auto":
            self._limit = batch_tokens
        self.work.queries += len(queries)
        self.work.shortened += sheet.shortened
        self.work.tokens += sum(len(sheet.texts[i]) for i in sheet.text_of)
        return [sheet.answer(query) for query in range(len(queries))]

    @torch.inference_mode()
    def _run_group(
        self,
        group: Group,
        sheet: _Sheet,
        batch_tokens: int,
        done: Callable[[Found], None] | None,
    ) -> int:
        """Answer the queries of a group; the tokens at a time for which memory was enough."""
        beginning = self._read(group.beginning)
        left = group.rows
        while left:
            for rows in batches(left, batch_tokens):
                try:
                    found = self._run(rows, beginning, sheet)
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise RunError(
                            f"memory is too small for a text of {len(rows[0]):,} tokens. Use "
                            "--precision bf16-true, or another device."
                        ) from None
                    batch_tokens = max(1, batch_tokens // 2)
                    torch.cuda.empty_cache()
                    break
                left = left[len(rows) :]
                if done is not None:
                    done(found)
        return batch_tokens

    def _read(self, ids: Ids) -> Beginning | None:
        """The blocks' view of what all texts of a group begin with, if anything."""
        if not len(ids):
            return None
        model = self.loaded.model
        dtype = self._autocast or model.embed.weight.dtype
        self.work.computed += len(ids)
        tokens = torch.from_numpy(ids).to(self.loaded.device).unsqueeze(0)
        with autocast(self.loaded.device, self._autocast):
            return Beginning(model, tokens, dtype)

    def _run(self, rows: Sequence[Row], beginning: Beginning | None, sheet: _Sheet) -> Found:
        """Answer the queries of some rows."""
        forest = _forest(rows)
        self.work.computed += forest[0].size
        width = forest[0].shape[1]
        pairs = sheet.pairs(rows, width)
        nodes, place = np.unique(pairs.nodes, return_inverse=True)
        with autocast(self.loaded.device, self._autocast):
            device = self.loaded.device
            tensors = Forest(*(torch.from_numpy(part).to(device) for part in forest))
            hidden = forest_hidden(self.loaded.model, tensors, beginning).flatten(0, 1)
            hidden = hidden[torch.from_numpy(nodes).to(device)]
            found, likeliest = self._log_probabilities(hidden, place, pairs.targets)
        sheet.enter(pairs.queries, found, likeliest)
        numbers = [number for row in rows for number, _ in row.texts]
        return [(query, sheet.answer(query)) for n in numbers for query in sheet.queries_of[n]]

    def _log_probabilities(
        self, hidden: Tensor, place: Ids, targets: Ids
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of target i after hidden[place[i]]: its log-probability, and whether none is likelier.

        All rows of the head take part, as in other tools, those that stand for no token too.
        """
        weight, bias = self.loaded.model.own_head
        softcap = self.loaded.model.config.logit_softcap
        order = np.argsort(place, kind="stable")
        found, likeliest = np.empty(len(order), np.float64), np.empty(len(order), bool)
        size = max(1, LOGIT_BYTES // (4 * len(weight)))
        borders = np.searchsorted(place[order], np.arange(0, len(hidden) + size, size))
        for chunk, (first, last) in enumerate(zip(borders, borders[1:])):
            logits = F.linear(hidden[chunk * size : (chunk + 1) * size], weight, bias)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            pairs = order[first:last]
            row = torch.from_numpy(place[pairs] - chunk * size).to(logits.device)
            column = torch.from_numpy(targets[pairs]).to(logits.device)
            value = logits[row, column].float()
            peak, total = _normalise(logits)
            best = value == peak[row]
            if best.any():
                # Among equal logits the first one counts, as elsewhere.
                ties = best.nonzero().squeeze(-1)
                best[ties] = logits[row[ties]].argmax(-1) == column[ties]
            found[pairs] = (value - total[row]).cpu().double().numpy()
            likeliest[pairs] = best.cpu().numpy()
        return found, likeliest


class _Pairs(NamedTuple):
    """Tokens to look for: in which query, behind which token of the batch."""

    queries: Ids
    nodes: Ids
    targets: Ids


class _Sheet:
    """Queries as distinct texts, and their answers as they come in."""

    def __init__(self, queries: Sequence[Query], limit: int) -> None:
        self.texts: list[Ids] = []
        self.text_of: list[int] = []
        """The text of each query that has something to ask for."""
        self.queries_of: list[list[int]] = []
        self.num_free: list[int] = []
        self.shortened = 0
        self._sums = np.zeros(len(queries))
        self._greedy = np.ones(len(queries), bool)
        self._wanted: list[Ids] = []
        numbers: dict[bytes, int] = {}
        for query, (context, continuation) in enumerate(queries):
            assert len(context), "a context has at least one token"
            self._wanted.append(np.asarray(continuation, np.int64))
            if len(continuation) > limit:
                raise UserError(
                    f"a continuation of {len(continuation):,} tokens does not fit into the "
                    f"model's context of {limit:,}. leave the task out, or use a model with more."
                )
            if not len(continuation):
                continue
            whole = np.asarray([*context, *continuation], np.int64)
            self.shortened += len(whole) > limit + 1
            text = whole[-(limit + 1) : -1]
            number = numbers.setdefault(text.tobytes(), len(self.texts))
            if number == len(self.texts):
                self.texts.append(text)
                self.queries_of.append([])
                self.num_free.append(len(text))
            self.queries_of[number].append(query)
            self.num_free[number] = min(self.num_free[number], len(text) - len(continuation))
            self.text_of.append(number)

    def pairs(self, rows: Sequence[Row], width: int) -> _Pairs:
        """What the queries of some rows ask for, in a batch of rows of `width` tokens."""
        queries, nodes = [], []
        for index, row in enumerate(rows):
            for number, path in row.texts:
                for query in self.queries_of[number]:
                    queries.append(query)
                    nodes.append(path[-len(self._wanted[query]) :] + index * width)
        targets = [self._wanted[query] for query in queries]
        return _Pairs(
            np.repeat(np.asarray(queries, np.int64), [len(part) for part in targets]),
            np.concatenate(nodes),
            np.concatenate(targets),
        )

    def enter(self, queries: Ids, log_probabilities: np.ndarray, likeliest: np.ndarray) -> None:
        """What was found for each pair."""
        np.add.at(self._sums, queries, log_probabilities)
        np.logical_and.at(self._greedy, queries, likeliest)

    def answer(self, query: int) -> Answer:
        """What was found for a query."""
        return Answer(float(self._sums[query]), bool(self._greedy[query]))


def _forest(rows: Sequence[Row]) -> tuple[Ids, Ids, Ids, Ids]:
    """The arrays of a `Forest`, rows padded with tokens that look at themselves alone."""
    width = max(2, *map(len, rows))
    tokens, depths = np.zeros((2, len(rows), width), np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    lengths = np.ones((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row.tokens
        depths[index, : len(row)] = row.depths
        ends[index, : len(row)] = row.ends
        lengths[index, : len(row)] = row.lengths
    return tokens, depths, ends, lengths


def _normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [N, V], and the logarithm of the sum of exponentials."""
    peaks, totals = [], []
    rows = len(logits) if logits.is_cuda else CACHED_LOGITS // logits.shape[1]
    for part in logits.split(max(1, rows)):
        values = part.float()  # the largest of bf16 is slow to find on a CPU
        peak = values.amax(-1)
        powers = values - peak.unsqueeze(-1)
        peaks.append(peak)
        totals.append(peak + powers.exp_().sum(-1).log())
    return torch.cat(peaks), torch.cat(totals)
