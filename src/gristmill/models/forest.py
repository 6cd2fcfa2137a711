"""Texts that begin alike, computed together: what several begin with is computed once.

A row holds trees of tokens, each in preorder: a token, then everything that continues it. One that
stands behind two texts' common beginning has both of them as branches:

    index    0     1    2    3      4         ends = 5 5 3 5 5
    token    The   cat  sat  sleeps  .        "The cat sat", "The cat sleeps."

Token i looks at token j exactly where j <= i < ends[j], and its position is its depth in the tree,
so that each path from a root is what the text would be alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gristmill.models.cache import KVCache
from gristmill.models.decoder import Decoder


class Forest(NamedTuple):
    """Rows of trees, all int64 [B, T], T above 1."""

    tokens: Tensor
    depths: Tensor
    """How many tokens of its text are before each token, a shared `Beginning` not counted."""
    ends: Tensor
    """One more than the index of the last token of the row that continues each token."""
    lengths: Tensor
    """How many tokens the text of each token has in all."""


class Beginning:
    """What the blocks keep of the tokens int64 [1, P] that every text of some rows begins with."""

    def __init__(self, model: Decoder, tokens: Tensor, dtype: torch.dtype) -> None:
        """Read them; `dtype` is that in which products are computed."""
        self.length = tokens.shape[1]
        cache = KVCache(
            model.own_config, 1, self.length, device=model.embed.weight.device, dtype=dtype
        )
        model.hidden(tokens, cache=cache)
        self.kept = {w: cache.index(0, w, self.length) for w in dict.fromkeys(cache.windows)}
        """How many of them the blocks with each kind of window have kept, the last ones."""
        self.layers = [
            _Behind(block, self.kept[window])
            for block, window in zip(cache.blocks, cache.windows, strict=True)
        ]


class _Behind:
    """One block's view: the first `start` of tensors, and what rows append behind them."""

    def __init__(self, tensors: tuple[Tensor, ...], start: int) -> None:
        self.kept, self.start = tuple(tensor[:, :, :start] for tensor in tensors), start

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.cat((kept.expand(len(part), -1, -1, -1).to(part.dtype), part), 2)
            for kept, part in zip(self.kept, new, strict=True)
        )


def forest_hidden(model: Decoder, forest: Forest, beginning: Beginning | None = None) -> Tensor:
    """The normalised residual stream of every token before the head, [B, T, d]."""
    start = 0 if beginning is None else beginning.length
    positions = forest.depths + start
    masks: dict[int | None, Any] = {
        window: _visible(forest, window, 0 if beginning is None else beginning.kept[window])
        for window in dict.fromkeys(model.config.windows)
    }
    return model._through_blocks(
        model._embedded(forest.tokens, positions),
        model._tables(positions, forest.lengths),
        masks,
        None if beginning is None else beginning.layers,
    )[0]


def _visible(forest: Forest, window: int | None, kept: int) -> Tensor:
    """Who looks at whom, bool [B, 1, T, kept + T]: the last `kept` of the beginning come first."""
    depths, ends = forest.depths, forest.ends
    index = torch.arange(depths.shape[1], device=depths.device)
    visible = (index.unsqueeze(1) >= index) & (index.unsqueeze(1) < ends.unsqueeze(1))
    if window is not None:
        visible &= depths.unsqueeze(2) - depths.unsqueeze(1) < window
    if kept:
        behind = depths.unsqueeze(2) + kept - torch.arange(kept, device=depths.device)
        seen = behind < (window or behind.max() + 1)
        visible = torch.cat((seen, visible), 2)
    return visible.unsqueeze(1)
