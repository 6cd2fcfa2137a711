"""Documents packed into one row: who may look at whom, and where each begins to count.

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


def document_mask(documents: Tensor, *, compiled: bool) -> Any:
    """Who may look at whom: a token at those before it in its document, and at itself.

    bool [B, 1, T, T] for SDPA, or where blocks are compiled on a GPU a block mask of
    `flex_attention`, which skips what is masked.
    """
    batch, length = documents.shape
    if compiled and documents.device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents[b, query] == documents[b, key])

        return create_block_mask(visible, batch, None, length, length, device=documents.device)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril_().unsqueeze(1)
