"""Who may look at whom: causal, inside a sliding window, inside a document of a packed row.

`documents` is int [B, T], for each token the number of its document within the row, never falling.
Attention inside a document and positions from its start make a packed row equal to its documents
apart (arXiv:2107.02027 calls this avoiding cross-contamination).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def positions_within(documents: Tensor) -> Tensor:
    """The position of each token in its document, int64 [B, T]."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(first, index, 0).cummax(1).values


def lengths_within(documents: Tensor) -> Tensor:
    """How many tokens the document of each token has in its row, int64 [B, T]."""
    behind = positions_within(documents.flip(1)).flip(1)
    return positions_within(documents) + behind + 1


def attention_mask(
    start: int,
    length: int,
    device: torch.device,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    blocks: bool = False,
) -> Any:
    """What `length` tokens behind `start` others may look at; None where plain causal will do.

    A token sees itself, those before it, of these the last `window` in all, and those of its own
    document. bool [B or 1, 1, length, start + length], True = may look; with `blocks` a block mask
    of `flex_attention`, which skips what is masked. A single token gets None: it sees every key
    it is given.
    """
    if window is not None and window >= start + length:
        window = None
    if length == 1 or (start == 0 and window is None and documents is None and not blocks):
        return None
    if blocks and start == 0:
        return _block_mask(length, device, window, documents)
    rows = torch.arange(start, start + length, device=device).unsqueeze(1)
    behind = rows - torch.arange(start + length, device=device)
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if documents is not None:
        return visible & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return visible[None, None]


def mask_between(
    queries: Tensor,
    keys: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The same rule where tokens at positions `queries` [T] look at those at `keys` [S], any order.

    `documents` [B, length] is of the whole row. bool [B or 1, 1, T, S], True = may look.
    """
    behind = queries.unsqueeze(1) - keys
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if documents is None:
        return visible[None, None]
    same = documents[:, queries].unsqueeze(2) == documents[:, keys].unsqueeze(1)
    return (visible & same).unsqueeze(1)


def _block_mask(
    length: int, device: torch.device, window: int | None, documents: Tensor | None
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[b, query] == documents[b, key])
        return seen

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(visible, batch, None, length, length, device=device)
