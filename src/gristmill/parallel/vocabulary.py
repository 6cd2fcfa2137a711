"""Embedding and head with their rows on several processes."""

from __future__ import annotations

import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gristmill.parallel.sums import SumValue, reduced


class Vocabulary:
    """Which rows this process has, and what it tells the others (a `VocabularyShard`)."""

    def __init__(self, axis: DeviceMesh, num_rows: int) -> None:
        self.axis = axis
        self.most = -(-num_rows // axis.size())
        """Rows of each process; the last has what is left."""
        self.start = self.most * axis.get_local_rank()

    def local(self, rows: Tensor) -> Tensor:
        """This process's rows of a whole parameter."""
        assert isinstance(rows, DTensor)
        return rows.to_local()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes; no gradient."""
        return reduced(value, self.axis)

    def max(self, value: Tensor) -> Tensor:
        """The largest over the processes; no gradient."""
        return reduced(value, self.axis, "max")

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all rows, in their order, of this process's [..., rows]; no gradient."""
        padded = F.pad(logits.detach(), (0, self.most - logits.shape[-1]))
        whole = collectives.all_gather_single(padded, padded.ndim - 1, self.axis)
        return collectives.wait_tensor(whole)


class VocabularyEmbedding(nn.Embedding):
    """An embedding that looks up the ids it has; the others' vectors come from the others."""

    def __init__(self, weight: nn.Parameter, vocabulary: Vocabulary) -> None:
        super().__init__(*weight.shape, _weight=weight)
        self.weight = weight
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens [B, T], [B, T, d]."""
        rows = self.vocabulary.local(self.weight)
        index = tokens - self.vocabulary.start
        elsewhere = (index < 0) | (index >= len(rows))
        vectors = F.embedding(index.masked_fill(elsewhere, 0), rows)
        vectors = vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return SumValue.apply(vectors, self.vocabulary.axis)
