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
    """Inputs and targets int64 [rows, seq_len] on the device; a target of -100 counts nothing."""

    inputs: Tensor
    targets: Tensor
    num_targets: int
    documents: Tensor | None = None
    """int32 [rows, seq_len], the number of each input's document in its row; None: no mask."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, document_mask: bool = False) -> TokenBatch:
        """The stream's batch on the device.

        With `document_mask` the first token of a document is nobody's target. Rows that are padding
        and what is behind the last token of a packed row have no targets, and the latter is a
        document of its own for the mask.
        """
        width = batch.tokens.shape[1]
        is_target = (np.arange(1, width) < batch.lengths[:, None]) & batch.valid[:, None]
        if batch.targets is not None:
            is_target &= batch.targets[:, 1:]
        documents = None
        if document_mask:
            numbers = _document_numbers(batch)
            is_target &= numbers[:, 1:] == numbers[:, :-1]
            documents = _on_device(numbers[:, :-1], device)
        targets = np.where(is_target, batch.tokens[:, 1:], IGNORE)
        return cls(
            _on_device(batch.tokens[:, :-1], device),
            _on_device(targets, device),
            int(is_target.sum()),
            documents,
        )

    def num_micro_batches(self, size: int) -> int:
        """How many `micro_batches` of this size there are."""
        return -(-len(self.inputs) // size)

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """The rows, `size` at a time; the last ones are padded.

        Every micro-batch has the same shape, so that a compiled block is compiled once.
        """
        for start in range(0, len(self.inputs), size):
            rows = slice(start, start + size)
            documents = None
            if self.documents is not None:
                documents = _filled(self.documents[rows], size, 0)
            inputs = _filled(self.inputs[rows], size, 0)
            yield MicroBatch(inputs, _filled(self.targets[rows], size, IGNORE), documents)


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


def _filled(rows: Tensor, size: int, value: int) -> Tensor:
    """The rows and more of one value, so that there are `size`."""
    missing = size - len(rows)
    return torch.cat([rows, rows.new_full((missing, rows.shape[1]), value)]) if missing else rows


def _on_device(values: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
