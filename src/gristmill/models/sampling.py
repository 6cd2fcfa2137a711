"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id per row of logits [B, V], int64 [B].

    temperature 0 takes the largest logit. `top_k` keeps the k largest; `top_p` then keeps the
    smallest set of most probable tokens whose probabilities reach p (nucleus, arXiv:1904.09751),
    always at least one. Filters act on the tempered distribution.
    """
    if temperature == 0.0 or top_k == 1 or top_p <= 0.0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    ids: Tensor | None = None
    if top_k is not None and top_k < scaled.shape[-1]:
        scaled, ids = torch.topk(scaled, top_k, dim=-1)
    elif top_p < 1.0:
        scaled, ids = torch.sort(scaled, dim=-1, descending=True)
    probs = torch.softmax(scaled, dim=-1)
    if top_p < 1.0:
        before = probs.cumsum(dim=-1) - probs  # mass of the tokens that are more probable
        probs = probs.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
