"""A global batch as tensors, in micro-batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gristmill.data.reading.stream import Batch
from gristmill.models.loss import IGNORE

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class TokenBatch:
    """Token ids int64 [rows, seq_len + 1] on the device; rows that are padding count nothing."""

    tokens: Tensor
    valid: Tensor
    num_targets: int
    documents: Tensor | None = None
    """int32 [rows, seq_len + 1], the number of each token's document in its row; None: no mask."""
    lengths: Tensor | None = None
    """int64 [rows], tokens of each row that are there; None: all."""
    learned: Tensor | None = None
    """bool [rows, seq_len + 1], the tokens that may be targets; None: all."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, document_mask: bool = False) -> TokenBatch:
        """The stream's batch on the device.

        With `document_mask` the first token of a document is nobody's target. Padding behind the
        last token of a packed row is nobody's either, and a document of its own for the mask.
        """
        width = batch.tokens.shape[1]
        is_target = (np.arange(1, width) < batch.lengths[:, None]) & batch.valid[:, None]
        documents = lengths = learned = None
        if batch.targets is not None:
            is_target &= batch.targets[:, 1:]
            learned = _to_device(torch.from_numpy(batch.targets), device)
        if bool((batch.lengths[batch.valid] < width).any()):
            lengths = torch.from_numpy(batch.lengths).to(device)
        if document_mask:
            numbers = _document_numbers(batch)
            is_target &= numbers[:, 1:] == numbers[:, :-1]
            documents = _to_device(torch.from_numpy(numbers), device)
        tokens = _to_device(torch.from_numpy(batch.tokens), device)
        valid = torch.from_numpy(batch.valid).to(device)
        return cls(tokens, valid, int(is_target.sum()), documents, lengths, learned)

    def num_micro_batches(self, size: int) -> int:
        """How many `micro_batches` of this size there are."""
        return -(-self.tokens.shape[0] // size)

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """The rows, `size` at a time; the last ones are padded.

        Every micro-batch has the same shape, so that a compiled block is compiled once.
        """
        for start in range(0, self.tokens.shape[0], size):
            rows = slice(start, start + size)
            tokens = _padded(self.tokens[rows], size)
            ignored = ~_padded(self.valid[rows], size).unsqueeze(1)
            documents = None
            if self.lengths is not None:
                index = torch.arange(1, tokens.shape[1], device=tokens.device)
                ignored = ignored | (index >= _padded(self.lengths[rows], size).unsqueeze(1))
            if self.learned is not None:
                ignored = ignored | ~_padded(self.learned[rows], size)[:, 1:]
            if self.documents is not None:
                numbers = _padded(self.documents[rows], size)
                ignored = ignored | (numbers[:, 1:] != numbers[:, :-1])
                documents = numbers[:, :-1].contiguous()
            targets = tokens[:, 1:].masked_fill(ignored, IGNORE)
            yield MicroBatch(tokens[:, :-1].contiguous(), targets, documents)


class MicroBatch(NamedTuple):
    """Inputs and targets int64 [size, seq_len], and the documents of the inputs if kept apart."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None


def _document_numbers(batch: Batch) -> NDArray[np.int32]:
    """For each token the number of documents that end before it in its row."""
    rows, width = batch.tokens.shape
    ended = np.zeros((rows, width + 1), dtype=np.int32)
    lengths = [len(ends) for ends in batch.doc_ends]
    ended[np.repeat(np.arange(rows), lengths), np.concatenate(batch.doc_ends)] = 1
    return np.cumsum(ended[:, :width], axis=1, dtype=np.int32)


def _padded(rows: Tensor, size: int) -> Tensor:
    missing = size - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
