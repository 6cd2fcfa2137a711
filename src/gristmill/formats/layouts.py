"""How parameters lie in the tensors of a file: cut, joined and turned, exactly and both ways.

| layout            | tensors of the file                         | parameters                    |
|-------------------|---------------------------------------------|-------------------------------|
| same              | one                                         | the same                      |
| transposed        | [in, out]                                   | [out, in]                     |
| groups            | per key head: its query heads, it, its value head | q, k, v                 |
| blocks            | one after the other on rows                 | several                       |
| blocks_transposed | one after the other on columns of [in, out] | several [out, in]             |
| experts           | one tensor for each expert                  | [experts, out, in]            |
| stacked_blocks    | [experts, rows one after the other, in]     | several [experts, out, in]    |
| halves_swapped    | heads that are rotated in the other sense   | a head's halves change places |
| pairs_per_head    | rotated rows of each head lie in pairs      | in halves                     |
| pairs_at_end      | the same for one head behind other rows     | in halves                     |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig

Shape = tuple[int, ...]
Split = Callable[[Sequence[Tensor], ModelConfig, Sequence[Shape]], list[Tensor]]
Join = Callable[[Sequence[Tensor], ModelConfig], list[Tensor]]


@dataclass(frozen=True)
class Layout:
    """Both directions: `split` needs the shapes of the parameters, `join` is its inverse."""

    split: Split
    join: Join


def to_ours(
    layout: str, tensors: Sequence[Tensor], config: ModelConfig, shapes: Sequence[Shape]
) -> list[Tensor]:
    """The parameters, of `shapes`, that tensors of a file hold."""
    return LAYOUTS[layout].split(tensors, config, shapes)


def to_theirs(layout: str, tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    """The tensors of a file that hold parameters."""
    return LAYOUTS[layout].join(tensors, config)


def _same(tensors: Sequence[Tensor], config: ModelConfig, _: object = None) -> list[Tensor]:
    return list(tensors)


def _transposed(tensors: Sequence[Tensor], config: ModelConfig, _: object = None) -> list[Tensor]:
    return [tensor.t() for tensor in tensors]


def _split_groups(
    tensors: Sequence[Tensor], config: ModelConfig, shapes: Sequence[Shape]
) -> list[Tensor]:
    per_group, rest = config.num_heads // config.kv_heads, tensors[0].shape[1:]
    grouped = tensors[0].view(config.kv_heads, per_group + 2, config.head_size, *rest)
    parts = torch.split(grouped, [per_group, 1, 1], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def _join_groups(tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    rest = tensors[0].shape[1:]
    grouped = [t.reshape(config.kv_heads, -1, config.head_size, *rest) for t in tensors]
    return [torch.cat(grouped, dim=1).reshape(-1, *rest)]


def _split_blocks(
    tensors: Sequence[Tensor], config: ModelConfig, shapes: Sequence[Shape]
) -> list[Tensor]:
    return list(torch.split(tensors[0], [shape[0] for shape in shapes]))


def _join_blocks(tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _split_turned_blocks(
    tensors: Sequence[Tensor], config: ModelConfig, shapes: Sequence[Shape]
) -> list[Tensor]:
    return list(torch.split(tensors[0].t(), [shape[0] for shape in shapes]))


def _join_turned_blocks(tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    return [torch.cat(list(tensors)).t()]


def _stack(tensors: Sequence[Tensor], config: ModelConfig, _: object = None) -> list[Tensor]:
    return [torch.stack(list(tensors))]


def _unstack(tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    return list(tensors[0].unbind())


def _split_stacked(
    tensors: Sequence[Tensor], config: ModelConfig, shapes: Sequence[Shape]
) -> list[Tensor]:
    return list(torch.split(tensors[0], [shape[1] for shape in shapes], dim=1))


def _join_stacked(tensors: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    return [torch.cat(list(tensors), dim=1)]


def _swap_halves(tensors: Sequence[Tensor], config: ModelConfig, _: object = None) -> list[Tensor]:
    """Each head's two halves change places, which turns the sense of its rotation."""
    half = config.head_size // 2
    return [t.reshape(-1, 2, half, *t.shape[1:]).flip(1).reshape(t.shape) for t in tensors]


def _turn_pairs(tensor: Tensor, head: int, rotated: int, to_halves: bool) -> Tensor:
    """The last `rotated` of each `head` rows from pairs to halves, or back."""
    heads = tensor.reshape(-1, head, *tensor.shape[1:])
    kept, turned = heads[:, : head - rotated], heads[:, head - rotated :]
    inner = (-1, 2) if to_halves else (2, -1)
    turned = torch.unflatten(turned, 1, inner).transpose(1, 2).flatten(1, 2)
    return torch.cat((kept, turned), dim=1).reshape(tensor.shape)


def _pairs(at_end: bool, to_halves: bool) -> Callable[..., list[Tensor]]:
    def turn(tensors: Sequence[Tensor], config: ModelConfig, _: object = None) -> list[Tensor]:
        latent = config.latent_attention
        rotated = config.head_size if latent is None else latent.qk_rope_head_dim
        heads = [t.shape[0] if at_end else config.head_size for t in tensors]
        return [_turn_pairs(t, head, rotated, to_halves) for t, head in zip(tensors, heads)]

    return turn


LAYOUTS = {
    "same": Layout(_same, _same),
    "transposed": Layout(_transposed, _transposed),
    "groups": Layout(_split_groups, _join_groups),
    "blocks": Layout(_split_blocks, _join_blocks),
    "blocks_transposed": Layout(_split_turned_blocks, _join_turned_blocks),
    "experts": Layout(_stack, _unstack),
    "stacked_blocks": Layout(_split_stacked, _join_stacked),
    "halves_swapped": Layout(_swap_halves, _swap_halves),
    "pairs_per_head": Layout(_pairs(False, True), _pairs(False, False)),
    "pairs_at_end": Layout(_pairs(True, True), _pairs(True, False)),
}
