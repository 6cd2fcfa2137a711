"""Several sequences decoded together, which come and go at any step (continuous batching).

put ─ reads a prompt into a row ─ step, step, … ─ drop
          (other rows wait)        (one token for each of the rows named)
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.config.use_commands import Sampling
from gristmill.models.cache import PREFILL_TOKENS, KVCache, RowsCache, attends_directly
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import check_prompt, check_sampling, compile_blocks, eager_if
from gristmill.models.device import autocast
from gristmill.models.sampling import penalize, sample


class Batch:
    """A model and the key-value cache of `rows` sequences of at most `max_length` tokens each.

    Rows are numbered from 0. `limit` is max_length, or the model's context if that is shorter.
    """

    def __init__(
        self,
        model: Decoder,
        rows: int,
        max_length: int,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        weight = model.embed.weight
        self.model, self.rows, self.autocast = model, rows, autocast
        self.device = weight.device
        self.limit = min(max_length, model.config.max_seq_length)
        # One position more than sequences have: what a row without a next token computes is
        # written behind its end.
        self._cache = KVCache(
            model.own_config,
            rows,
            self.limit + 1,
            device=self.device,
            dtype=autocast or weight.dtype,
        )
        self.compiled = False
        self.lengths = [0] * rows
        """How many tokens each row holds."""

    def compile(self) -> str | None:
        """Compile the step of all rows now; None, or why it stays as it is."""
        rows = list(range(self.rows))

        def steps() -> None:
            for row in rows:
                self.put(row, [0])
            for _ in range(2):
                self.step(rows, [0] * self.rows)

        self.compiled = True
        reason = compile_blocks(self.model, steps)
        self.compiled = reason is None
        for row in rows:
            self.drop(row)
        return reason

    def put(self, row: int, ids: Sequence[int]) -> Tensor:
        """Logits [1, token_ids] after the sequence `ids`, which replaces what the row held."""
        *_, logits = self.read(row, ids)
        return logits

    def read(
        self, row: int, ids: Sequence[int], *, held: int = 0, part_tokens: int | None = None
    ) -> Iterator[Tensor]:
        """`put` in parts of so many tokens, between which other rows may step.

        Logits [1, token_ids] after each part; the last are the result. The first `held` ids are
        those that the row held when it was last dropped, and are not read again; as many as it has
        `kept`.
        """
        assert 0 < len(ids) <= self.limit, f"{len(ids)} ids for {self.limit} positions"
        assert 0 <= held < len(ids), "the last id is always read"
        self.drop(row)
        cache = self._cache.part(row, row + 1, held)
        cache.context = len(ids)
        tokens = torch.tensor([list(ids[held:])], device=self.device)
        for part in tokens.split(part_tokens or PREFILL_TOKENS, 1):
            with torch.inference_mode(), self._reading():
                logits = self.model(part, cache=cache, num_logits=1)[:, -1]
            self.lengths[row] = cache.length
            yield logits

    def kept(self, row: int, count: int) -> int:
        """How many of the first `count` ids that a row held when dropped it can go on from.

        All or none: sliding windows are forgotten some way behind the text's end.
        """
        return count if self._cache.keeps(count, row) else 0

    def put_all(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [len(rows), token_ids] after each prompt; neighbours are read side by side.

        Rows next to each other with prompts of like lengths share a pass over the weights.
        """
        out, start = [], 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and self._fits_beside(rows, prompts, start, stop):
                stop += 1
            if stop == start + 1:
                out.append(self.put(rows[start], prompts[start]))
            else:
                out.append(self._put_beside(rows[start], prompts[start:stop]))
            start = stop
        return _together(out)

    def _fits_beside(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], start: int, last: int
    ) -> bool:
        """Whether the prompts from `start` to `last` are to be read together."""
        if self.model.config.rotates_by_length:
            return False  # their lengths differ
        lengths = [len(ids) for ids in prompts[start : last + 1]]
        padded = max(lengths) * len(lengths)
        neighbours = rows[last] == rows[start] + last - start
        # Each buffer has room for so many from its beginning: none moves, whatever the lengths.
        return neighbours and padded <= min(PREFILL_TOKENS, 1.25 * sum(lengths))

    @torch.inference_mode()
    def _put_beside(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        # Filled up at the end: nobody looks at what comes after, and steps write over it.
        lengths = [len(ids) for ids in prompts]
        assert min(lengths) > 0, "prompts that have tokens"
        assert max(lengths) <= self.limit, "prompts that fit"
        filled = [[*ids, *[0] * (max(lengths) - len(ids))] for ids in prompts]
        tokens = torch.tensor(filled, device=self.device)
        cache = self._cache.part(first, first + len(prompts))
        with self._reading():
            hidden = self.model.hidden(tokens, cache=cache)
            last = torch.tensor(lengths, device=self.device) - 1
            logits = self.model.logits(hidden[torch.arange(len(prompts)), last])
        self.lengths[first : first + len(prompts)] = lengths
        return logits

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits [len(rows), token_ids] after one more token for each of these rows."""
        assert len(rows) == len(tokens) == len(set(rows)) > 0, "a token for each of some rows"
        assert all(0 < self.lengths[row] < self.limit for row in rows), "rows that have room"
        given = dict(zip(rows, tokens, strict=True))
        config, computed = self.model.own_config, list(rows)
        if self.compiled:
            computed = list(range(self.rows))  # always as many: a shape is compiled once
        elif not attends_directly(config, self._cache):
            # Those between compute with the others, so that all are one view of the cache.
            computed = list(range(min(rows), max(rows) + 1))
        positions = [self.lengths[row] if row in given else None for row in computed]
        cache = RowsCache(config, self._cache, computed, positions, compiled=self.compiled)
        ids = torch.tensor([[given.get(row, 0)] for row in computed], device=self.device)
        with autocast(self.device, self.autocast):
            logits = self.model(ids, cache=cache)[:, -1]
        for row in rows:
            self.lengths[row] += 1
        return logits if computed == list(rows) else logits[[row - computed[0] for row in rows]]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with eager_if(self.compiled), autocast(self.device, self.autocast):
            yield

    def drop(self, row: int) -> None:
        """Forget what the row holds."""
        self.lengths[row] = 0


@dataclass
class _Running:
    """A prompt under way in a row."""

    prompt: int
    ids: list[int]
    left: int
    ends: str
    generator: torch.Generator


def generate_batch(
    batch: Batch,
    prompts: Iterable[Sequence[int]],
    sampling: Sampling,
    *,
    eos_ids: Collection[int] = (),
    generators: Iterable[torch.Generator] | None = None,
    stopped: Collection[int] = (),
) -> Iterator[tuple[int, int | str]]:
    """What the model writes after each prompt, as it comes: (number of the prompt, id).

    A prompt ends with (number, "eos" | "max_new_tokens" | "context"), the id that ended it left
    out, and the next one takes its row: prompts are asked for one by one. Each has a generator of
    its own (unset: seeded with `sampling.seed` + number), so that neighbours do not matter. Close
    the iterator to stop early, or put the number of a prompt that is to end into `stopped`, which
    is looked at after each of its tokens: it ends with (number, "stop"). Raises UserError for
    sampling options out of range, and at its turn for a prompt that is empty or fills the context.
    """
    s = sampling
    check_sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty)
    return _run(batch, enumerate(prompts), sampling, eos_ids, generators, stopped)


def _run(
    batch: Batch,
    prompts: Iterator[tuple[int, Sequence[int]]],
    sampling: Sampling,
    eos_ids: Collection[int],
    generators: Iterable[torch.Generator] | None,
    stopped: Collection[int],
) -> Iterator[tuple[int, int | str]]:
    own = None if generators is None else iter(generators)
    running: dict[int, _Running] = {}
    try:
        while True:
            new: dict[int, Sequence[int]] = {}
            for row in range(batch.rows):
                if row in running or (item := next(prompts, None)) is None:
                    continue
                number, ids = item
                check_prompt(ids, batch.limit)
                generator = next(own) if own is not None else _seeded(batch, sampling.seed + number)
                room = batch.limit - len(ids)
                ends = "max_new_tokens" if room >= sampling.max_new_tokens else "context"
                left = min(room, sampling.max_new_tokens)
                new[row] = ids
                running[row] = _Running(number, list(ids), left, ends, generator)
            logits = []
            if new:
                logits.append(batch.put_all(list(new), list(new.values())))
            rows = sorted(running.keys() - new.keys())
            if rows:
                logits.append(batch.step(rows, [running[row].ids[-1] for row in rows]))
            if not logits:
                return
            rows = [*new, *rows]
            chosen = _choose(_together(logits), [running[row] for row in rows], sampling)
            for row, token in zip(rows, chosen, strict=True):
                state = running[row]
                ended = "eos" if token in eos_ids else None
                if ended is None:
                    state.ids.append(token)
                    state.left -= 1
                    yield state.prompt, token
                    if state.prompt in stopped:
                        ended = "stop"
                    elif state.left == 0:
                        ended = state.ends
                if ended is not None:
                    del running[row]
                    batch.drop(row)
                    yield state.prompt, ended
    finally:
        for row in running:
            batch.drop(row)


def _choose(logits: Tensor, running: Sequence[_Running], sampling: Sampling) -> list[int]:
    """The next id of each of these prompts, whose logits are [prompts, V]."""
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, [one.ids for one in running], sampling.repetition_penalty)
    return sample(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        generator=[one.generator for one in running],
    ).tolist()


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _seeded(batch: Batch, seed: int) -> torch.Generator:
    return torch.Generator(batch.device).manual_seed(seed)
