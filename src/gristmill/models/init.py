"""All initialisation of the decoder, in one place and the same on every device and mesh."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gristmill.config.model import ModelConfig

STD = 0.02
READERS = {"embed", "positions", "head", "q", "k", "v", "gate", "up", "router"}
READERS |= {"q_down", "q_up", "kv_down", "kv_up"}
"""Modules whose matrices have the plain deviation."""


def init_weights(
    model: nn.Module, seed: int, *, put: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Fill every parameter of a `Decoder`; values depend on seed, name and shape alone.

    | parameter                          | value                                                  |
    |------------------------------------|--------------------------------------------------------|
    | embed, positions, head             | N(0, 0.02)                        (GPT-2)              |
    | matrices that read the stream      | N(0, 0.02)                        (GPT-2)              |
    | attn.o, mlp.down (experts' too)    | N(0, 0.02 / sqrt(2 num_layers))   (GPT-2, section 2.3) |
    | every bias                         | 0                                                      |
    | norm weights                       | 1, or 0 where one is added to them                     |
    | adaption prompts: vectors, gate    | N(0, 1), 0                        (LLaMA-Adapter)      |

    The depth scale keeps the variance of the residual stream from growing with the 2 num_layers
    branches that add to it ("Language Models are Unsupervised Multitask Learners", 2019).

    Each parameter is drawn in fp32 on the CPU from a generator of its own, one at a time, so that
    order, device, precision and sharding do not matter. `put(parameter, full_value)` stores a
    value; a sharded model passes one that keeps its own part.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(config, name, parameter.shape, seed)
            if put is None:
                parameter.copy_(value)
            else:
                put(parameter, value)


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of the parameter `name`, fp32 on the CPU."""
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if kind in ("bias", "selection_bias", "gate"):
        return torch.zeros(shape)
    if kind == "vectors":
        return torch.empty(shape).normal_(generator=generator_of(seed, name))
    assert kind == "weight", f"no initial value for the parameter {name}"
    if leaf.endswith("norm"):
        return torch.full(shape, 0.0 if config.norm_unit_offset else 1.0)
    if leaf in ("o", "down"):
        std = STD / math.sqrt(2 * config.num_layers)
    else:
        assert leaf in READERS, f"no initial value for the parameter {name}"
        std = STD
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter: 63 bits of blake2b over seed and name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
