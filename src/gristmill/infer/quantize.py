"""Weights in fewer bits, through torchao: less memory, and less to read for each token."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import torch
from torch import nn

from gristmill.models.decoder import Decoder
from gristmill.models.kernels import Int8Linear, linear
from gristmill.util.errors import UserError
from gristmill.util.extras import install_command

WHOLE = ("head", "router", "kv_up")
"""Read as they are by something else than their own product: the head (it may be the embedding),
what chooses experts, and what latent attention applies to queries instead of keys."""


def quantize(model: Decoder, kind: Literal["int8", "int4"], device: torch.device) -> None:
    """Round the matrices of linear layers to `kind` in place; embedding, head and experts stay.

    Each row (int8) or group of 32 values (int4) has a scale of its own; activations stay as they
    are (weight only). Raises UserError without torchao, and where a device has no such products.
    """
    try:
        # It says at each import which of its kernels this machine is not for, and torch what is
        # old in it.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError(
            f"--quantize {kind} needs torchao, which is not installed. Install it: "
            f"{install_command('int8')}"
        ) from None

    def taken(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] not in WHOLE

    try:
        if kind == "int8":
            quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=taken)
        else:
            quantize_(model, Int4WeightOnlyConfig(group_size=32), filter_fn=taken)
    except (ImportError, NotImplementedError, AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"this device cannot multiply {kind} weights ({device.type}: {reason}). "
            + ("use --quantize int8." if kind == "int4" else "leave --quantize out.")
        ) from None
    if kind == "int8" and model.linear is linear:
        _use_own_products(model)


def _use_own_products(model: nn.Module) -> None:
    """torchao's int8 matrices as layers whose products of few rows go through our kernel."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if isinstance(child, nn.Linear) and hasattr(weight, "qdata"):
                scale = weight.scale.reshape(-1).to(torch.bfloat16)
                setattr(parent, name, Int8Linear(weight.qdata, scale, child.bias))
