"""Text that the model writes while it is trained, after the user's prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.tokenizer.tokenizer import Tokenizer

TEMPERATURE, TOP_K = 0.8, 50


def write_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    bos: bool,
    autocast: torch.dtype | None = None,
    encode: Callable[[str], list[int]] | None = None,
    stop_ids: frozenset[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, begun with BOS or not, the prompt left out.

    The model is used as it stands, in its training type, and stays as it is; random choices come
    from a source of their own, the same at every call. Blocks run uncompiled: every new length
    would be compiled anew. `encode` makes the ids of a prompt, and `stop_ids` end a text, where
    these are not the tokenizer's own.
    """
    stop = frozenset(tokenizer.stop_ids) if stop_ids is None else stop_ids
    compiled, training = model.compiled, model.training
    eager: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if compiled:
        eager = torch.compiler.set_stance("force_eager")
    model.eval()
    model.compiled = False
    try:
        with eager:
            return [
                _continued(model, tokenizer, ids, max_new_tokens, seed, autocast, stop)
                for ids in map(encode or partial(tokenizer.encode, bos=bos), prompts)
            ]
    finally:
        model.compiled = compiled
        model.train(training)


def _continued(
    model: Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    seed: int,
    autocast: torch.dtype | None,
    stop_ids: frozenset[int],
) -> str:
    device = model.embed.weight.device
    ids = ids or [tokenizer.eos_id or 0]
    ids = ids[-max(1, model.config.max_seq_length - max_new_tokens) :]
    new = generate_tokens(
        Context(model, autocast=autocast),
        ids,
        max_new_tokens=max_new_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        eos_ids=stop_ids,
        generator=torch.Generator(device).manual_seed(seed),
    )
    decoder = tokenizer.decoder()
    # The last few settle whether a leading space is one.
    for token_id in ids[-8:]:
        decoder.put(token_id)
    return "".join([decoder.put(token_id) for token_id in new] + [decoder.flush()])
