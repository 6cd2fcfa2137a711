"""A global batch as tensors, in micro-batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.data.stream import Batch
from gristmill.models.loss import IGNORE


@dataclass
class TokenBatch:
    """Token ids int64 [rows, seq_len + 1] on the device; rows that are padding count nothing."""

    tokens: Tensor
    valid: Tensor
    num_targets: int

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TokenBatch:
        """The stream's batch on the device."""
        tokens = torch.from_numpy(batch.tokens)
        valid = torch.from_numpy(batch.valid)
        num_targets = int(batch.valid.sum()) * (tokens.shape[1] - 1)
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        else:
            tokens = tokens.to(device)
        return cls(tokens, valid.to(device), num_targets)

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) int64 [size, seq_len], one after another; the last is padded.

        Every micro-batch has the same shape, so that a compiled block is compiled once.
        """
        for start in range(0, self.tokens.shape[0], size):
            tokens, valid = self.tokens[start : start + size], self.valid[start : start + size]
            missing = size - tokens.shape[0]
            if missing:
                tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
                valid = torch.cat([valid, valid.new_zeros(missing)])
            targets = tokens[:, 1:].masked_fill(~valid.unsqueeze(1), IGNORE)
            yield tokens[:, :-1].contiguous(), targets
