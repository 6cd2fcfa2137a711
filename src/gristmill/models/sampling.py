"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5
"""Below it only the largest logit counts; differences of logits divided by less overflow."""


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """One token id per row of logits [B, V], int64 [B].

    temperature 0, or nearly, takes the largest logit. `top_k` keeps the k largest; `top_p` then
    keeps the smallest set of most probable tokens whose probabilities reach p (nucleus,
    arXiv:1904.09751), and `min_p` those at least min_p times as probable as the likeliest
    (arXiv:2407.01082), always at least one. Filters act on the tempered distribution. With a
    generator for each row, a row's choice does not depend on its neighbours.
    """
    if temperature < LEAST_TEMPERATURE or top_k == 1 or top_p <= 0.0:
        return logits.max(dim=-1).indices  # several times as fast as argmax on a CPU
    ids: Tensor | None = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = torch.topk(logits, top_k, dim=-1)
    elif top_p < 1.0:
        logits, ids = torch.sort(logits, dim=-1, descending=True)
    logits = logits.float()
    # Divided first, large logits would be infinite, and their softmax not a number.
    logits = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits / temperature, dim=-1)
    kept = probs
    if top_p < 1.0:
        before = probs.cumsum(dim=-1) - probs  # mass of the tokens that are more probable
        dropped = before >= top_p
        dropped[..., 0] = False  # in fp32 a tiny top_p is the 0 that is before the likeliest
        kept = kept.masked_fill(dropped, 0.0)
    if min_p > 0.0:
        kept = kept.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    choice = _draw(kept, generator)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def penalize(
    logits: Tensor, seen_ids: Sequence[Sequence[int]], repetition_penalty: float
) -> Tensor:
    """Logits [B, V] in which ids that a row has seen are less likely (arXiv:1909.05858, 4.1).

    Positive ones are divided by the penalty and negative ones multiplied with it, once however
    often the id was seen.
    """
    if repetition_penalty == 1.0:
        return logits
    out = logits.clone()
    for row, ids in enumerate(seen_ids):
        index = torch.tensor(list(ids), dtype=torch.int64, device=logits.device)
        old = logits[row].index_select(0, index)
        new = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
        out[row].index_copy_(0, index, new)
    return out


def _draw(weights: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """An index of each row of weights [B, V], drawn in proportion to them; int64 [B, 1]."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(weights, 1, generator=generator)
    rows = zip(weights, generator, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
