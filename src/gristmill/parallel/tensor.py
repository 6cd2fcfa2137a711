"""Products shared by neighbouring processes (arXiv:1909.08053).

    x ─┬─ q, k, v ──┐ rows of the matrix: heads     ─ attention of these heads ─ o ────┐ columns
       └─ gate, up ─┘ rows of the matrix: inner values            ─ act, product ─ down ┘ + sum

    embedding and head: rows of the vocabulary, see `vocabulary.py`

Every process has the whole residual stream. Its gradient is summed where it enters attention and
feed-forward, its value where it leaves them: two sums a block in each direction. What is not cut
(norms, biases behind a sum, learned positions) has the same gradient everywhere, but for norms
inside a head, which see this process's heads alone: `gradients.py` sums those once a step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from gristmill.parallel.mesh import Mesh
from gristmill.parallel.sums import SumGradient, SumValue
from gristmill.parallel.vocabulary import Vocabulary, VocabularyEmbedding


def share_products(model: nn.Module, mesh: Mesh) -> None:
    """Cut the matrices of a decoder over the ranks along `tensor`, in place; names stay."""
    axis = mesh.tensor
    if axis is None:
        return
    for block in model.layers:
        attn, mlp = block.attn, block.mlp
        for name in ("q", "k", "v"):
            setattr(attn, name, ColumnLinear(getattr(attn, name), axis))
        for name in ("gate", "up"):
            if hasattr(mlp, name):
                setattr(mlp, name, ColumnLinear(getattr(mlp, name), axis))
        attn.o, mlp.down = RowLinear(attn.o, axis), RowLinear(mlp.down, axis)
        for module in (attn, mlp):
            module.register_forward_pre_hook(_Entrance(axis))
        for norm in (attn.q_norm, attn.k_norm):
            norm.summed_over = (axis,)
    config, ranks = model.config, axis.size()
    model.own_config = dataclasses.replace(
        config,
        num_heads=config.num_heads // ranks,
        num_kv_heads=config.kv_heads // ranks,
        head_dim=config.head_size,
    )
    model.vocabulary = Vocabulary(axis, model.config.vocab_size)
    model.embed = VocabularyEmbedding(cut(model.embed.weight, axis, 0), model.vocabulary)
    if not model.config.tie_embeddings:
        for name, parameter in list(model.head.named_parameters()):
            setattr(model.head, name, cut(parameter, axis, 0))


def cut(parameter: nn.Parameter, axis: DeviceMesh, dim: int) -> nn.Parameter:
    """This process's part of a parameter, which keeps the shape of the whole."""
    part = distribute_tensor(parameter.data, axis, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class ColumnLinear(nn.Module):
    """A part of the outputs of a linear layer, made from all inputs."""

    def __init__(self, linear: nn.Linear, axis: DeviceMesh) -> None:
        super().__init__()
        self.weight = cut(linear.weight, axis, 0)
        self.bias = None if linear.bias is None else cut(linear.bias, axis, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to this process's outputs [..., out / ranks]."""
        bias = None if self.bias is None else self.bias.to_local()
        return F.linear(x, self.weight.to_local(), bias)


class RowLinear(nn.Module):
    """All outputs of a linear layer, from a part of the inputs on each process."""

    def __init__(self, linear: nn.Linear, axis: DeviceMesh) -> None:
        super().__init__()
        self.weight, self.bias = cut(linear.weight, axis, 1), linear.bias
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """This process's x [..., in / ranks] to the sum over processes [..., out]."""
        out = SumValue.apply(F.linear(x, self.weight.to_local()), self.axis)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Entrance:
    """What a module does to its first input: nothing; its gradient is summed over processes."""

    def __init__(self, axis: DeviceMesh) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (SumGradient.apply(args[0], self.axis), *args[1:])
