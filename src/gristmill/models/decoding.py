"""Cached decoding, token by token: what `infer` and a training loop's sample hook share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from gristmill.models.cache import PREFILL_TOKENS, KVCache, RowsCache
from gristmill.models.decoder import Decoder
from gristmill.models.device import autocast
from gristmill.models.sampling import penalize, sample
from gristmill.util.errors import UserError


def read_pieces(model: Decoder, cache: KVCache, tokens: Tensor) -> Tensor:
    """Logits [1, token_ids] after tokens [1, T] that continue what the cache holds."""
    cache.context = cache.length + tokens.shape[1]
    *pieces, last = tokens.split(PREFILL_TOKENS, 1)
    for piece in pieces:
        model.hidden(piece, cache=cache)
    return model(last, cache=cache, num_logits=1)[:, -1]


def compile_blocks(model: Decoder, steps: Callable[[], None]) -> str | None:
    """Compile the blocks of a model for what is computed by `steps`; None, or why they stay.

    More than one step, because the second shows that the length varies.
    """
    # Here, because importing it takes a second that nobody else should wait for.
    from torch._dynamo.exc import TorchDynamoException

    for block in model.layers:
        block.compile()
    try:
        steps()
    except TorchDynamoException as error:
        for block in model.layers:
            block._compiled_call_impl = None
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def eager_if(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """Where blocks are compiled, for their steps, something else is computed without that."""
    # Prompts have every length: only the step of one token is worth compiling.
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


class Context:
    """A model and the key-value cache of one sequence, with the ids that the cache holds.

    Reading a sequence computes only what differs from the one held, so a conversation whose next
    turn extends the last costs the new tokens; not so where rotations depend on the length of the
    text, nor where it goes back further than sliding windows are kept. The cache grows up to the
    model's context.
    """

    def __init__(self, model: Decoder, *, autocast: torch.dtype | None = None) -> None:
        weight = model.embed.weight
        self.model = model
        self.limit = model.config.max_seq_length
        self.ids: list[int] = []
        self.compiled = False
        self.device = weight.device
        self.autocast = autocast
        self._cache_dtype = autocast or weight.dtype
        self._cache: KVCache | None = None

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in all, at most the model's context."""
        held = 0 if self._cache is None else self._cache.max_length
        length = min(length, self.limit)
        if length <= held:
            return
        # At least twice as long as before: a growing conversation is copied a few times only.
        length = min(max(length, 2 * held), self.limit)
        config = self.model.own_config
        grown = KVCache(config, 1, length, device=self.device, dtype=self._cache_dtype)
        if self._cache is not None:
            grown.copy_from(self._cache, len(self.ids))
        self._cache = grown

    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits [1, token_ids] after the whole sequence `ids`, which replaces the one held."""
        assert 0 < len(ids) <= self.limit, f"{len(ids)} ids for a context of {self.limit}"
        self.reserve(len(ids))
        same = 0
        if self.model.config.rotates_by_length:
            self.ids.clear()  # keys held were turned for another length
        # The last id is always computed: its logits are the result.
        for held, wanted in zip(self.ids, ids[:-1], strict=False):
            if held != wanted:
                break
            same += 1
        assert self._cache is not None
        if not self._cache.keeps(same):
            same = 0
        del self.ids[same:]
        new = list(ids[same:])
        with eager_if(self.compiled):
            logits = self._advance(torch.tensor([new], device=self.device))
        self.ids += new
        return logits

    def add(self, token: Tensor, token_id: int) -> Tensor:
        """Logits [1, token_ids] after one more token, int64 [1], whose value is `token_id`."""
        self.reserve(len(self.ids) + 1)
        logits = self._advance(token.view(1, 1)) if self.compiled else self._step(token)
        self.ids.append(token_id)
        return logits

    def compile(self) -> str | None:
        """Compile the decoding step now; None, or why it stays as it is."""

        def steps() -> None:
            self.read([0])
            for _ in range(2):
                self.add(torch.zeros(1, dtype=torch.int64, device=self.device), 0)

        self.compiled = True
        reason = compile_blocks(self.model, steps)
        self.compiled = reason is None
        self.ids.clear()
        return reason

    # Not around the generator: a mode held over a `yield` would leak into the caller's code.
    @torch.inference_mode()
    def _advance(self, tokens: Tensor) -> Tensor:
        assert self._cache is not None
        # Stated anew each time, because an interrupt can fall between the model and `ids`.
        self._cache.length = len(self.ids)
        with autocast(self.device, self.autocast):
            return read_pieces(self.model, self._cache, tokens)

    @torch.inference_mode()
    def _step(self, token: Tensor) -> Tensor:
        assert self._cache is not None
        rows = RowsCache(self.model.own_config, self._cache, [0], [len(self.ids)])
        with autocast(self.device, self.autocast):
            return self.model(token.view(1, 1), cache=rows)[:, -1]


class Continuation(Iterator[int]):
    """The ids that follow a prompt, one by one, and afterwards why they ended.

    `stop` is None while running, then "eos", "max_new_tokens" or "context" (no room is left).
    `first_s` is the time to the first id, `total_s` the time inside the iterator, in seconds.
    """

    def __init__(self, ids: Iterator[int | str]) -> None:
        self._ids = ids
        self.stop: str | None = None
        self.num_tokens = 0
        self.first_s = 0.0
        self.total_s = 0.0

    def __next__(self) -> int:
        if self.stop is not None:
            raise StopIteration
        start = time.perf_counter()
        try:
            item = next(self._ids)
        finally:
            self.total_s += time.perf_counter() - start
        if isinstance(item, str):
            self.stop = item
            raise StopIteration
        if self.num_tokens == 0:
            self.first_s = self.total_s
        self.num_tokens += 1
        return item


def generate_tokens(
    model: Decoder | Context,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Continuation:
    """The ids that the model writes after `prompt_ids`; the ending one of `eos_ids` is left out.

    A `Context` instead of a model keeps its cache between calls. `generator` lives on the model's
    device. Raises UserError for an empty prompt, one that fills the context, and sampling options
    out of range.
    """
    context = model if isinstance(model, Context) else Context(model)
    check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    check_prompt(prompt_ids, context.limit)

    def run() -> Iterator[int | str]:
        room = context.limit - len(prompt_ids)
        left = min(room, max_new_tokens)
        context.reserve(len(prompt_ids) + left)
        logits = context.read(prompt_ids)
        while True:
            if repetition_penalty != 1.0:
                logits = penalize(logits, [context.ids], repetition_penalty)
            token = sample(
                logits,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                generator=generator,
            )
            token_id = int(token)
            if token_id in eos_ids:
                yield "eos"
                return
            yield token_id
            left -= 1
            if left == 0:
                break
            logits = context.add(token, token_id)
        yield "max_new_tokens" if room >= max_new_tokens else "context"

    return Continuation(run())


def check_prompt(prompt_ids: Sequence[int], limit: int) -> None:
    """Raise UserError for a prompt that is empty or leaves no room in a context of `limit`."""
    if not prompt_ids:
        raise UserError("the prompt is empty (0 tokens). give it at least one token.")
    if len(prompt_ids) >= limit:
        raise UserError(
            f"the prompt leaves no room in the model's context ({len(prompt_ids)} tokens of "
            f"{limit}). shorten it to at most {limit - 1} tokens."
        )


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise UserError for sampling options that mean nothing."""
    if max_new_tokens < 1:
        raise UserError(f"nothing to generate (max_new_tokens {max_new_tokens}). give 1 or more.")
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 or more ({temperature}). 0 takes the likeliest.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be 1 or more ({top_k}). --top_k null takes all tokens.")
    if not 0.0 <= top_p <= 1.0:
        raise UserError(
            f"top_p must be from 0 to 1 ({top_p}). 1 takes all tokens, 0 the likeliest."
        )
    if not 0.0 <= min_p <= 1.0:
        raise UserError(f"min_p must be between 0 and 1 ({min_p}). 0 takes all tokens.")
    if not 0.0 < repetition_penalty < float("inf"):
        raise UserError(
            f"repetition_penalty must be above 0 ({repetition_penalty}). 1 changes nothing."
        )
